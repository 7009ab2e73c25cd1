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
    /// Process of its session; `None`: it is prepared.
    pub pid: Option<i32>,
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
    /// looked may still be told. Autovacuum's are left out: no client has a half of one.
    ///
    /// # Errors
    /// Those of a statement; [`SqlError::Timeout`] after 2 s.
    pub async fn xid_holders(&self) -> Result<XidHolders, SqlError> {
        // D 54.12 pg_locks: every transaction holds an exclusive lock on its own id as long as it lasts; one
        // that is prepared goes on holding it, with a null pid. The lock table is read in one piece, and what
        // the two other views say (D 28.2.3, 54.16) is joined to it: read by themselves, they miss a
        // transaction that becomes prepared between one and the other. Subtransactions have ids too.
        let sql = format!(
            "SELECT l.pid, a.application_name, a.state, coalesce(a.datname, p.database), \
             greatest(0, (extract(epoch FROM clock_timestamp() - coalesce(p.prepared, a.xact_start)) * 1000)::bigint), \
             p.gid, p.owner, count(*) OVER () \
             FROM (SELECT pid, array_agg(transactionid) AS xids FROM pg_locks \
             WHERE locktype = 'transactionid' AND mode = 'ExclusiveLock' AND granted \
             GROUP BY pid, virtualtransaction) l \
             LEFT JOIN pg_stat_activity a ON a.pid = l.pid \
             LEFT JOIN pg_prepared_xacts p ON l.pid IS NULL AND p.transaction = ANY (l.xids) \
             WHERE a.backend_type IS DISTINCT FROM 'autovacuum worker' \
             ORDER BY 5 DESC NULLS LAST LIMIT {HOLDERS}"
        );
        let rows = self.rows_within("looking for transactions", &sql, LOOK);
        let rows = rows.await?;
        Ok(XidHolders {
            total: rows.first().map_or(Ok(0), |row| row.value(7))?,
            oldest: rows.iter().map(holder).collect::<Result<_, _>>()?,
        })
    }

    /// `txid_current_snapshot()`, as text. It changes with every end of a transaction that had an id, and not
    /// with a beginning: all ids below its upper bound that are not listed have ended, and no other has.
    ///
    /// # Errors
    /// Those of a statement; [`SqlError::Timeout`] after 2 s.
    pub async fn transaction_snapshot(&self) -> Result<String, SqlError> {
        // D 9.26 (transaction ids and snapshots); the newer name pg_current_snapshot came with 13, this one is still there in 18. A
        // statement of its own: its snapshot is then taken now, whatever the isolation level.
        let what = "reading the transaction snapshot";
        let rows = self.rows_within(what, "SELECT txid_current_snapshot()", LOOK);
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
