//! The session itself: one statement at a time, each with a deadline.

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncWrite};
use tokio::sync::Mutex;
use tokio_postgres::{Client, Connection, SimpleQueryMessage};
use tokio_util::sync::CancellationToken;

use super::ProxyConnection;
use crate::carrier::{Carrier, CloseUnlessAnswered};
use crate::error::{SqlError, chain, words};
use crate::text::Row;

/// The connection's task knows better than the statement why a session ended, and says so within this time.
const REASON: Duration = Duration::from_millis(500);

/// A logged-in session.
#[derive(Debug)]
pub(super) struct Line {
    client: Client,
    /// One statement at a time: one that is given up must not take another's answer with it.
    turn: Mutex<()>,
    carrier: Carrier,
    target: String,
    /// The proxy knows no `TIMEOUT` behind LOCK and UNLOCK (before 5.5.2).
    pub(super) no_timeout_clause: AtomicBool,
}

impl Line {
    pub(super) fn new<S, T>(client: Client, connection: Connection<S, T>, target: String) -> Self
    where
        S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
        T: AsyncRead + AsyncWrite + Unpin + Send + 'static,
    {
        Self {
            client,
            turn: Mutex::new(()),
            carrier: Carrier::spawn(connection),
            target,
            no_timeout_clause: AtomicBool::new(false),
        }
    }

    pub(super) fn target(&self) -> &str {
        &self.target
    }

    pub(super) fn ended(&self) -> Option<String> {
        self.carrier
            .ended()
            .or_else(|| self.client.is_closed().then(|| "connection closed".into()))
    }

    pub(super) fn close(&self, reason: &str) {
        self.carrier.close(reason);
    }

    /// Runs one statement within `deadline`, its turn included.
    async fn run(
        &self,
        what: &'static str,
        sql: &str,
        deadline: Duration,
        cancel: &CancellationToken,
    ) -> Result<Vec<Row>, SqlError> {
        let late = tokio::time::sleep(deadline);
        tokio::pin!(late);
        let not_sent = |message: String| SqlError::Unreachable {
            target: self.target.clone(),
            message: format!("{what} was not sent: {message}"),
        };
        let _turn = tokio::select! {
            biased;
            () = cancel.cancelled() => return Err(not_sent("it was cancelled".to_owned())),
            turn = self.turn.lock() => turn,
            () = &mut late => return Err(not_sent("another statement is under way".to_owned())),
        };
        if let Some(message) = self.ended() {
            return Err(not_sent(message));
        }
        // Whoever drops this future drops an answer that is still under way.
        let unanswered = CloseUnlessAnswered::new(&self.carrier);
        let query = self.client.simple_query(sql);
        tokio::pin!(query);
        let answer = tokio::select! {
            biased;
            answer = &mut query => answer,
            () = cancel.cancelled() => return Err(SqlError::Cancelled { what }),
            () = &mut late => return Err(SqlError::Timeout { what, after: deadline }),
        };
        unanswered.answered();
        match answer {
            Ok(messages) => Ok(messages
                .into_iter()
                .filter_map(|message| match message {
                    SimpleQueryMessage::Row(row) => Some(Row { what, row }),
                    _ => None,
                })
                .collect()),
            Err(error) => Err(self.failed(what, &error).await),
        }
    }

    async fn failed(&self, what: &'static str, error: &tokio_postgres::Error) -> SqlError {
        let Some(db) = error.as_db_error() else {
            // Said at once if it is the connection that ended.
            let reason = tokio::time::timeout(REASON, self.carrier.wait_ended()).await;
            let message = reason.unwrap_or_else(|_| chain(error));
            self.close(&message);
            return SqlError::Lost { what, message };
        };
        // Whatever its severity: a proxy says FATAL and goes on. If it does not, the end of the session is seen by the next call.
        SqlError::Server {
            what,
            sqlstate: db.code().code().to_owned(),
            message: words(db),
        }
    }
}

impl ProxyConnection {
    /// Runs one statement within `deadline`.
    pub(super) async fn ask(
        &self,
        what: &'static str,
        sql: &str,
        deadline: Duration,
    ) -> Result<Vec<Row>, SqlError> {
        self.line.run(what, sql, deadline, &self.cancel).await
    }

    /// Whether LOCK and UNLOCK must go without `TIMEOUT`, as far as this session knows.
    pub(super) fn no_timeout_clause(&self) -> bool {
        self.line.no_timeout_clause.load(Ordering::Relaxed)
    }

    /// They must.
    pub(super) fn note_no_timeout_clause(&self) {
        self.line.no_timeout_clause.store(true, Ordering::Relaxed);
    }
}
