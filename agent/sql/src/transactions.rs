//! Which transactions are under way: what the proof of a cluster-wide point rests on.
//!
//! Neither statement takes a transaction id itself, or the looking would be seen.

use std::time::Duration;

use crate::connect::NodeConnection;
use crate::error::SqlError;
use crate::session::only;
use crate::text::Row;

/// A look that takes longer is worth nothing: the moment is gone.
const LOOK: Duration = Duration::from_secs(2);
/// More holders than this are counted, not told one by one.
const HOLDERS: u32 = 100;

/// Transactions that hold an id.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct XidHolders {
    /// How many there are.
    pub total: u64,
    /// The oldest of them, at most 100, the oldest first.
    pub oldest: Vec<XidHolder>,
}

/// A transaction that holds an id.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct XidHolder {
    /// Process of its session (openGauss: thread); `None`: it is prepared.
    pub pid: Option<i64>,
    /// `application_name` of its session.
    pub application: Option<String>,
    /// `state` of its session.
    pub state: Option<String>,
    /// Its database.
    pub database: Option<String>,
    /// Age in milliseconds since it began, or since it was prepared; `None`: not shown to our user, or its
    /// session ended while we looked.
    pub age_ms: Option<u64>,
    /// Global identifier and owner, if it is prepared.
    pub prepared: Option<(String, String)>,
}

impl NodeConnection {
    /// Transactions that hold an id now. A transaction that has written
    /// anything is seen until its end has been made visible and its locks are gone; one that ended while we
    /// looked may still be told. `PostgreSQL`'s autovacuum is left out: no client has a half of one.
    ///
    /// # Errors
    /// Those of a statement; [`SqlError::Timeout`] after 2 s.
    pub async fn xid_holders(&self) -> Result<XidHolders, SqlError> {
        let sql = self.dialect().xid_holders(HOLDERS);
        let rows = self.rows_within("looking for transactions", &sql, LOOK);
        let rows = rows.await?;
        Ok(XidHolders {
            total: rows.first().map_or(Ok(0), |row| row.value(7))?,
            oldest: rows.iter().map(holder).collect::<Result<_, _>>()?,
        })
    }

    /// What two looks must have in common if no transaction with an id has ended between them.
    ///
    /// On PostgreSQL `txid_current_snapshot()`. It changes with every end of a transaction that had an id, and not
    /// with a beginning: all ids below its upper bound that are not listed have ended, and no other has. On openGauss the next
    /// id and the next commit number: it changes with every beginning and every commit, and a commit has taken its number before
    /// its record is written, so a look for holders must follow the first snapshot.
    ///
    /// # Errors
    /// Those of a statement; [`SqlError::Timeout`] after 2 s.
    pub async fn transaction_snapshot(&self) -> Result<String, SqlError> {
        let what = "reading the transaction snapshot";
        let rows = self.rows_within(what, self.dialect().snapshot(), LOOK);
        Ok(only(what, rows.await?)?.text(0)?.to_owned())
    }
}

fn holder(row: &Row) -> Result<XidHolder, SqlError> {
    let text = |at| Ok::<_, SqlError>(row.optional(at)?.map(str::to_owned));
    Ok(XidHolder {
        pid: row.optional_value(0)?,
        application: text(1)?,
        state: text(2)?,
        database: text(3)?,
        age_ms: row.optional_value(4)?,
        prepared: text(5)?.zip(text(6)?),
    })
}
