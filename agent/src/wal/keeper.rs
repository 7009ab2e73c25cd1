//! What keeps WAL on the node until it is in the bucket, as the shipper sees it.

use agent_api::{ApiError, ErrorKind};
use agent_sql::NodeConnection;
use agent_wal::Lsn;

use super::gate::HeldHandle;
use super::trouble::Trouble;

/// Who keeps it. Clones mean the same hold.
#[derive(Debug, Clone)]
pub enum Keeper {
    /// A physical slot of that name (PostgreSQL).
    Slot(String),
    /// The server's archiver, which asks the agent (openGauss).
    Archive(HeldHandle),
    /// Nobody: the server keeps what it likes. A segment that is gone before it is shipped ends the backup.
    Nobody,
}

impl Keeper {
    /// Oldest position that is kept; `None`: nothing is.
    ///
    /// # Errors
    /// [`Trouble::Gone`] if the hold is gone; of the statement.
    pub async fn kept_from(&self, sql: &NodeConnection) -> Result<Option<Lsn>, Trouble> {
        match self {
            Self::Slot(name) => Ok(slot(sql, name).await?.restart_lsn),
            Self::Archive(held) => held.from().map(Some).ok_or_else(ended),
            Self::Nobody => Ok(None),
        }
    }

    /// Checks that the segment that ends at `end`, and all after it, was kept to this moment. `file` is its name. A slot keeps the
    /// segment that its position lies in as a whole (`KeepLogSeg`).
    ///
    /// # Errors
    /// [`Trouble::Gone`] if it was not: what was read may be something else.
    pub async fn check(&self, sql: &NodeConnection, end: Lsn, file: &str) -> Result<(), Trouble> {
        match self {
            Self::Slot(name) => {
                let slot = slot(sql, name).await?;
                if slot.holds(Lsn(end.0.saturating_sub(1))) {
                    return Ok(());
                }
                let restart = slot.restart_lsn;
                Err(gone(format!(
                    "the slot `{name}` no longer held the WAL segment {file} (restart_lsn {}, wal_status {:?}): somebody \
                     moved it, or max_slot_wal_keep_size is too small",
                    restart.map_or_else(|| "none".into(), |lsn| lsn.to_string()),
                    slot.wal_status,
                )))
            }
            Self::Archive(held) => held.from().map(|_| ()).ok_or_else(ended),
            Self::Nobody => Ok(()),
        }
    }

    /// Lets go of WAL before `end`.
    ///
    /// # Errors
    /// Of the statement.
    pub async fn advance(&self, sql: &NodeConnection, end: Lsn) -> Result<(), Trouble> {
        match self {
            Self::Slot(name) => Ok(sql.advance_slot(name, end).await?),
            Self::Archive(held) => {
                held.advance(end);
                Ok(())
            }
            Self::Nobody => Ok(()),
        }
    }
}

async fn slot(sql: &NodeConnection, name: &str) -> Result<agent_sql::SlotState, Trouble> {
    let slot = sql.slot(name).await?;
    slot.ok_or_else(|| gone(format!("somebody dropped the slot `{name}`")))
}

fn ended() -> Trouble {
    gone("the hold on the database's archiver has ended".into())
}

/// WAL that was not kept: only a new base can begin behind it.
pub(super) fn gone(message: String) -> Trouble {
    Trouble::Gone(ApiError::new(ErrorKind::Database, message).next("start a new backup"))
}
