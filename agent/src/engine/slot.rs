//! The slot that holds a backup's WAL on the node, and its end on every way out.
//!
//! It is permanent, because a temporary one vanishes at the first error of its session. So somebody must drop
//! it: the operation when it ends, its guard when the operation's task is dropped, and the agent when it
//! starts again after it was killed.

use std::time::Duration;

use agent_api::{ApiError, ErrorKind};
use agent_sql::{ConnectOptions, NodeConnection, SqlError};
use agent_wal::Lsn;
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

use crate::config::Config;
use crate::database::connect_options;
use crate::engine::errors;
use crate::wal::service::WalService;

/// What our slots' names begin with.
pub(crate) const PREFIX: &str = "gs_pitr_";
/// What the names of those begin with that WAL is shipped from all the time.
const WAL_PREFIX: &str = "gs_pitr_wal_";
/// How often a drop is tried, and how long we wait before the next time.
const TRIES: u32 = 4;
const PAUSE: Duration = Duration::from_secs(1);
/// For all tries together.
const DROP_DEADLINE: Duration = Duration::from_secs(30);

/// A slot that is dropped at the latest when this is.
#[derive(Debug)]
pub struct Slot {
    name: String,
    options: ConnectOptions,
    sql: NodeConnection,
    held: bool,
}

impl Slot {
    /// Creates the slot of an operation; `sql` is a session that outlives it, if all goes well.
    ///
    /// # Errors
    /// As the statement. The slot may exist all the same if its answer was lost: it is dropped then.
    pub async fn create(
        operation: Uuid,
        sql: &NodeConnection,
        options: ConnectOptions,
    ) -> Result<Self, ApiError> {
        let name = name_of(operation);
        let mut slot = Self {
            name: name.clone(),
            options,
            // Its end must not be cut short by the cancel that caused it.
            sql: sql.with_cancel(CancellationToken::new()),
            held: true,
        };
        let mut created = sql.create_slot(&name).await;
        if matches!(&created, Err(SqlError::Server { sqlstate, .. }) if sqlstate == "42710") {
            // Left by this very operation, started again after the agent was killed.
            created = match sql.drop_slot(&name).await {
                Ok(_) => sql.create_slot(&name).await,
                Err(error) => Err(error),
            };
        }
        match created {
            Ok(()) => Ok(slot),
            Err(error) => {
                if error.outcome_is_unknown() {
                    slot.release().await?;
                } else {
                    slot.held = false;
                }
                Err(errors::sql(error))
            }
        }
    }

    /// Its name.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// What it holds, read in a statement of its own.
    ///
    /// # Errors
    /// If there is no such slot any more, or it holds nothing.
    pub async fn restart_lsn(&self, sql: &NodeConnection) -> Result<Lsn, ApiError> {
        let state = sql.slot(&self.name).await.map_err(errors::sql)?;
        state.and_then(|state| state.restart_lsn).ok_or_else(|| {
            let message = format!("the slot `{}` holds no WAL", self.name);
            ApiError::new(ErrorKind::Database, message)
        })
    }

    /// Drops the slot, in its own session or in a new one. May be repeated.
    ///
    /// # Errors
    /// If it could not be dropped: it holds WAL until somebody drops it. The error says how.
    pub async fn release(&mut self) -> Result<(), ApiError> {
        if self.held {
            drop_slot(&self.name, Some(&self.sql), &self.options).await?;
            self.held = false;
        }
        Ok(())
    }
}

impl Drop for Slot {
    fn drop(&mut self) {
        if !self.held {
            return;
        }
        let (name, sql, options) = (self.name.clone(), self.sql.clone(), self.options.clone());
        let Ok(runtime) = tokio::runtime::Handle::try_current() else {
            tracing::error!(slot = name, "a slot was left: the program is ending");
            return;
        };
        runtime.spawn(async move {
            if let Err(error) = drop_slot(&name, Some(&sql), &options).await {
                tracing::error!(%error, "a slot was left");
            }
        });
    }
}

/// Drops a slot by name, in a session of its own. May be repeated.
///
/// # Errors
/// If it could not be dropped: it holds WAL until somebody drops it. The error says how.
pub(crate) async fn drop_left(config: &Config, name: &str) -> Result<(), ApiError> {
    let options = connect_options(config, "gs_pitr sweep")?;
    drop_slot(name, None, &options).await
}

/// What a sweep did.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Swept {
    /// Slots that were dropped.
    pub dropped: Vec<String>,
    /// Slots of ours whose backup still has a session: another agent's, or one that the server is about to end.
    pub in_use: Vec<String>,
}

/// Drops slots that an agent left when it was killed: ours by name, with no session of their backup left; and those that WAL
/// was shipped from all the time, if it is no more.
///
/// # Errors
/// If the database cannot be asked or refuses.
pub async fn sweep(config: &Config, service: &WalService) -> Result<Swept, ApiError> {
    let options = connect_options(config, "gs_pitr sweep")?;
    let sql = NodeConnection::connect(&options, CancellationToken::new())
        .await
        .map_err(errors::sql)?;
    sweep_over(&sql, service).await.map_err(errors::sql)
}

/// [`sweep`] over a session that is there.
pub(super) async fn sweep_over(
    sql: &NodeConnection,
    service: &WalService,
) -> Result<Swept, SqlError> {
    let mut swept = Swept::default();
    for slot in sql.slots_like(PREFIX).await? {
        // Asked after the slots: the service says that one is its own before it makes it.
        if is_of_service(&slot.name) && !slot.active && !service.holds_slot(&slot.name) {
            if sql.drop_slot(&slot.name).await? {
                tracing::warn!(
                    slot = slot.name,
                    "dropped a slot that nothing is shipped from"
                );
                swept.dropped.push(slot.name);
            }
            continue;
        }
        if slot.active || !is_ours(&slot.name) {
            continue;
        }
        // Asked after the slots: a backup has its session before it has its slot.
        let sessions = sql.sessions_named(&session_of(&slot.name)).await?;
        if sessions > 0 {
            swept.in_use.push(slot.name);
        } else if sql.drop_slot(&slot.name).await? {
            tracing::warn!(slot = slot.name, "dropped a slot that a killed agent left");
            swept.dropped.push(slot.name);
        }
    }
    Ok(swept)
}

/// What the session of an operation is called: it shows that the operation lives, to whoever finds its slot.
pub(super) fn session_name(operation: Uuid) -> String {
    session_of(&name_of(operation))
}

fn session_of(slot: &str) -> String {
    format!("gs_pitr WAL {slot}")
}

/// Name of an operation's slot.
pub(crate) fn name_of(operation: Uuid) -> String {
    // The random end: the beginning of a version 7 id is the time, the same for a minute.
    let id = operation.simple().to_string();
    format!("{PREFIX}{}", &id[id.len() - 8..])
}

/// Name of the slot that a node's WAL is shipped from all the time.
pub(crate) fn wal_name_of(node: Uuid) -> String {
    let id = node.simple().to_string();
    format!("{WAL_PREFIX}{}", &id[..8])
}

/// Whether it is such a slot, by its name.
pub(crate) fn is_of_service(name: &str) -> bool {
    name.strip_prefix(WAL_PREFIX).is_some_and(is_tag)
}

fn is_tag(id: &str) -> bool {
    id.len() == 8 && id.bytes().all(|b| b.is_ascii_hexdigit())
}

/// Whether a slot is a backup's, by its name.
pub(crate) fn is_ours(name: &str) -> bool {
    name.strip_prefix(PREFIX).is_some_and(is_tag)
}

async fn drop_slot(
    name: &str,
    sql: Option<&NodeConnection>,
    options: &ConnectOptions,
) -> Result<(), ApiError> {
    let tries = async {
        let mut last = match sql.filter(|sql| !sql.is_lost()) {
            Some(sql) => match sql.drop_slot(name).await {
                Ok(_) => return Ok(()),
                Err(error) => error,
            },
            None => SqlError::Lost {
                what: "dropping the replication slot",
                message: "the session is gone".into(),
            },
        };
        for _ in 0..TRIES {
            let dropped = async {
                let sql = NodeConnection::connect(options, CancellationToken::new()).await?;
                sql.drop_slot(name).await
            };
            match dropped.await {
                Ok(_) => return Ok(()),
                Err(error) => last = error,
            }
            // In use by a statement of a session that is just being closed, or the server is starting.
            tokio::time::sleep(PAUSE).await;
        }
        Err(last.to_string())
    };
    let why = match tokio::time::timeout(DROP_DEADLINE, tries).await {
        Ok(Ok(())) => return Ok(()),
        Ok(Err(why)) => why,
        Err(_) => format!("no answer within {} s", DROP_DEADLINE.as_secs()),
    };
    let message = format!("the replication slot `{name}` could not be dropped: {why}");
    Err(ApiError::new(ErrorKind::Database, message)
        .changed()
        .next(format!(
            "once the database answers: SELECT pg_drop_replication_slot('{name}'); (the agent does it when it starts)"
        )))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn our_slots_are_told_by_their_names() {
        let name = name_of(Uuid::now_v7());
        assert!(is_ours(&name) && !is_of_service(&name), "{name}");
        let name = wal_name_of(Uuid::new_v4());
        assert!(is_of_service(&name) && !is_ours(&name), "{name}");
        for other in [
            "gs_pitr_",
            "gs_pitr_standby1",
            "other_01234567",
            "gs_pitr_0123456g",
        ] {
            assert!(!is_ours(other), "{other}");
        }
    }
}
