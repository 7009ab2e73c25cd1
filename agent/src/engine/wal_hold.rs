//! The hold on a node's WAL from before the backup begins until all of it is in the bucket.

use std::fmt;

use agent_api::{ApiError, ErrorKind};
use agent_sql::{Archiving, Flavour, NodeConnection};
use agent_wal::Lsn;

use super::errors;
use super::node::Node;
use super::slot::Slot;
use crate::operation::OperationContext;
use crate::wal::gate::Held;
use crate::wal::keeper::Keeper;
use crate::wal::service::WalStream;
use crate::walput;

/// What holds the WAL. It ends at the latest with this.
#[derive(Debug)]
pub enum WalHold {
    /// A slot: PostgreSQL.
    Slot(Slot),
    /// The server's archiver, which asks this agent before it lets go: openGauss, whose slots hold nothing.
    Archive(Held),
    /// The agent's own shipping, which goes on after the backup.
    Service(WalStream),
    /// Nothing: an openGauss that does not ask this agent.
    Nothing,
}

impl WalHold {
    /// Holds WAL from now on.
    ///
    /// # Errors
    /// Of the database. What was begun is undone.
    pub async fn take(cx: &OperationContext, node: &Node) -> Result<Self, ApiError> {
        if node.facts.flavour == Flavour::PostgreSql {
            let slot = Slot::create(cx.id, &node.sql, node.options.clone()).await?;
            return Ok(Self::Slot(slot));
        }
        let archiving = node.sql.archiving().await.map_err(errors::sql)?;
        if let Some(why) = why_not_ours(&archiving, &cx.config.archive_socket) {
            cx.report.warning(format!(
                "WAL is not held on the node ({why}): if the database removes a segment before it is shipped, the backup \
                 fails; {}",
                mend(&cx.config.archive_socket)
            ));
            return Ok(Self::Nothing);
        }
        let held = cx.gate.hold(cx.id, node.segment_size());
        // Only now: what is filled from here on meets the hold.
        let position = node.sql.insert_lsn().await.map_err(errors::sql)?;
        let size = node.segment_size().bytes();
        held.handle().advance(Lsn(position.0 / size * size));
        Ok(Self::Archive(held))
    }

    /// The hold as a shipper of the backup's own needs it.
    #[must_use]
    pub fn keeper(&self) -> Keeper {
        match self {
            Self::Slot(slot) => Keeper::Slot(slot.name().to_owned()),
            Self::Archive(held) => Keeper::Archive(held.handle()),
            Self::Service(_) | Self::Nothing => Keeper::Nobody,
        }
    }

    /// The oldest position that is held or in the bucket already; `None`: nothing is held.
    ///
    /// # Errors
    /// If the hold is gone; those of a statement.
    pub async fn held_from(&self, sql: &NodeConnection) -> Result<Option<Lsn>, ApiError> {
        match self {
            Self::Service(stream) => Ok(Some(stream.start())),
            _ => Ok(self.keeper().kept_from(sql).await?),
        }
    }

    /// The oldest position that is held; without a hold the one that is written now.
    ///
    /// # Errors
    /// If the hold is gone; those of a statement.
    pub async fn kept_from(&self, sql: &NodeConnection) -> Result<Lsn, ApiError> {
        match self.held_from(sql).await? {
            Some(kept) => Ok(kept),
            None if matches!(self, Self::Nothing) => sql.insert_lsn().await.map_err(errors::sql),
            None => {
                let message = format!("{self} holds no WAL");
                Err(ApiError::new(ErrorKind::Database, message))
            }
        }
    }

    /// Lets go. May be repeated.
    ///
    /// # Errors
    /// If a slot could not be dropped: it holds WAL until somebody drops it. The error says how.
    pub async fn release(&mut self) -> Result<(), ApiError> {
        match self {
            Self::Slot(slot) => slot.release().await,
            Self::Archive(held) => {
                held.release();
                Ok(())
            }
            Self::Service(_) | Self::Nothing => Ok(()),
        }
    }
}

impl fmt::Display for WalHold {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Slot(slot) => write!(f, "the slot `{}`", slot.name()),
            Self::Archive(_) => f.write_str("the database's archiver"),
            Self::Service(_) => f.write_str("what the agent ships all the time"),
            Self::Nothing => f.write_str("the database"),
        }
    }
}

/// Why the server's archiver does not ask the agent on `socket` before it lets go of WAL; `None`: it does.
#[must_use]
pub fn why_not_ours(archiving: &Archiving, socket: &std::path::Path) -> Option<String> {
    if !archiving.on {
        return Some("archive_mode is off".into());
    }
    if let Some(directory) = &archiving.directory {
        return Some(format!(
            "archive_dest is `{directory}`, and comes before archive_command"
        ));
    }
    let command = archiving.command.as_deref().unwrap_or_default();
    let words: Vec<_> = command.split_whitespace().collect();
    let socket = socket.display().to_string();
    let asks = words.iter().position(|word| *word == walput::SUBCOMMAND);
    let ours = asks.is_some_and(|at| words[at + 1..] == ["--socket", &socket, "%p", "%f"]);
    (!ours).then(|| format!("archive_command is `{command}`"))
}

/// Statements that make the server's archiver ask the agent on `socket`.
#[must_use]
pub fn mend(socket: &std::path::Path) -> String {
    let program = std::env::current_exe().unwrap_or_else(|_| "/usr/bin/pitr-agent".into());
    format!(
        "ALTER SYSTEM SET archive_command = '{} {} --socket {} %p %f'; ALTER SYSTEM SET archive_mode = on;",
        program.display(),
        walput::SUBCOMMAND,
        socket.display(),
    )
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;

    #[test]
    fn only_a_server_that_asks_this_agent_holds_wal_for_it() {
        let socket = Path::new("/run/gs_pitr/archive-5432.sock");
        let why = |on, command: &str, directory: Option<&str>| {
            let archiving = Archiving {
                on,
                command: Some(command.to_owned()),
                directory: directory.map(str::to_owned),
            };
            why_not_ours(&archiving, socket)
        };
        let ours = "/usr/bin/pitr-agent wal-put --socket /run/gs_pitr/archive-5432.sock %p %f";
        assert_eq!(why(true, ours, None), None);
        assert!(mend(socket).contains(" wal-put --socket /run/gs_pitr/archive-5432.sock %p %f'"));
        assert!(why(false, ours, None).unwrap().contains("archive_mode"));
        assert!(
            why(true, ours, Some("/archive"))
                .unwrap()
                .contains("/archive")
        );
        for other in [
            "",
            "cp %p /archive/%f",
            "/usr/bin/pitr-agent wal-put --socket /run/gs_pitr/archive-5433.sock %p %f",
            "/usr/bin/pitr-agent wal-put --socket /run/gs_pitr/archive-5432.sock %f %p",
        ] {
            assert!(why(true, other, None).unwrap().contains(other), "{other}");
        }
    }
}
