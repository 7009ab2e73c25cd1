//! A client's session with a proxy, as drivers use it: simple statements, prepared ones, and batches, which are three or
//! more Bind and Execute of one statement before one Sync (JDBC's `executeBatch`, psycopg3's `executemany`;
//! tokio-postgres sends no such thing).

use std::io;

use crate::raw::{LogIn, Raw, Reply};

/// Why something was not done.
#[derive(Debug, thiserror::Error)]
pub enum WireError {
    /// The server said no: it is known that the statement was not done.
    #[error("{code}: {message}")]
    Refused {
        /// Its SQLSTATE.
        code: String,
        /// In its words.
        message: String,
    },
    /// The connection is gone, or no answer came: what became of the statement is not known.
    #[error("the connection is lost: {0}")]
    Lost(#[from] io::Error),
}

impl WireError {
    /// Whether a proxy refused it because its cluster is locked.
    pub fn is_lock(&self) -> bool {
        matches!(self, Self::Refused { code, message } if code == "58000" && message.contains("cluster state"))
    }
}

/// Type of every parameter here.
const INT8: u32 = 20;

/// A session.
#[derive(Debug)]
pub struct Session(Raw);

/// A row, as text.
pub type Row = Vec<Option<String>>;

impl Session {
    /// Logs in.
    ///
    /// # Errors
    /// [`WireError`].
    pub async fn open(who: &LogIn) -> Result<Self, WireError> {
        match Raw::log_in(who).await? {
            Ok(raw) => Ok(Self(raw)),
            Err(said) => Err(good(&said)
                .err()
                .unwrap_or_else(|| io::Error::other("no log-in").into())),
        }
    }

    /// One simple query of one statement. Returns the rows, if it answers with any.
    ///
    /// # Errors
    /// [`WireError`].
    pub async fn query(&mut self, sql: &str) -> Result<Vec<Row>, WireError> {
        let reply = self.0.query(sql).await?;
        good(&reply)?;
        Ok(reply.rows().into_iter().map(<[_]>::to_vec).collect())
    }

    /// One prepared statement with its parameters: Parse, Bind, Execute, Sync.
    ///
    /// # Errors
    /// [`WireError`].
    pub async fn execute(&mut self, sql: &str, parameters: &[i64]) -> Result<(), WireError> {
        self.bind(sql, &[parameters]).await
    }

    /// A batch: for each row of parameters one Bind and Execute of the same statement, then one Sync. Three and more
    /// pass a proxy's lock.
    ///
    /// # Errors
    /// [`WireError`].
    pub async fn batch(&mut self, sql: &str, rows: &[Vec<i64>]) -> Result<(), WireError> {
        let rows: Vec<_> = rows.iter().map(Vec::as_slice).collect();
        self.bind(sql, &rows).await
    }

    async fn bind(&mut self, sql: &str, rows: &[&[i64]]) -> Result<(), WireError> {
        let types = vec![INT8; rows.first().map_or(0, |row| row.len())];
        good(&self.0.batch(sql, &types, rows).await?)
    }
}

fn good(reply: &Reply) -> Result<(), WireError> {
    match reply.error() {
        None => Ok(()),
        Some((code, message)) => Err(WireError::Refused {
            code: code.to_owned(),
            message: message.to_owned(),
        }),
    }
}
