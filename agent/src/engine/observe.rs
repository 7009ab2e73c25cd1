//! A look at the node's transactions, for the proof of a point.

use std::time::Instant;

use agent_api::{ApiError, Look, Observed, PreparedAs, XidHolder, XidHolders};
use agent_sql::NodeConnection;
use jiff::Timestamp;

use crate::engine::errors;

/// Looks. `session` says which session of the agent `sql` is.
///
/// # Errors
/// Of the statements.
pub(super) async fn observe(
    sql: &NodeConnection,
    session: u64,
    look: Look,
) -> Result<Observed, ApiError> {
    let (at, begun) = (Timestamp::now(), Instant::now());
    let holders = match look {
        Look::Snapshot => None,
        Look::Holders | Look::HoldersThenSnapshot => {
            let holders = sql.xid_holders().await.map_err(errors::sql)?;
            Some(XidHolders {
                total: holders.total,
                oldest: holders.oldest.into_iter().map(holder).collect(),
            })
        }
    };
    // In this order: a transaction whose end is in the WAL and not yet in the snapshot still holds its id.
    let snapshot = match look {
        Look::Holders => None,
        Look::Snapshot | Look::HoldersThenSnapshot => {
            Some(sql.transaction_snapshot().await.map_err(errors::sql)?)
        }
    };
    let took_us = u64::try_from(begun.elapsed().as_micros()).unwrap_or(u64::MAX);
    Ok(Observed {
        holders,
        snapshot,
        session,
        at,
        took_us,
    })
}

fn holder(holder: agent_sql::XidHolder) -> XidHolder {
    XidHolder {
        pid: holder.pid,
        application: holder.application,
        state: holder.state,
        database: holder.database,
        age_ms: holder.age_ms,
        prepared: holder
            .prepared
            .map(|(gid, owner)| PreparedAs { gid, owner }),
    }
}
