//! The database beside the agent, and the host it is on.

use std::path::{Path, PathBuf};
use std::time::Duration;

use agent_api::{ApiError, ErrorKind, Finding};
use agent_sql::{
    Archiving, ConnectOptions, Flavour, NodeConnection, ServerFacts, Severity, SqlError,
    WalReceiver,
};
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;

use super::host;
use crate::config::Config;
use crate::database::connect_options;
use crate::engine::node::{Looked, fits_memory};
use crate::engine::slot;
use crate::engine::wal_hold;
use crate::failure::sql_error;
use crate::managers;
use crate::wal::ship::wal_directory;

/// For all that the database is asked but its size.
const ASK: Duration = Duration::from_secs(25);
/// One statement.
const STATEMENT: Duration = Duration::from_secs(10);
/// To sum the sizes of all databases.
const SIZE: Duration = Duration::from_secs(30);

/// What the database says.
struct Asked {
    facts: ServerFacts,
    preflight: Vec<agent_sql::Finding>,
    slots: Vec<agent_sql::SlotState>,
    receivers: Vec<WalReceiver>,
    archiving: Archiving,
    size: Option<u64>,
}

pub(super) async fn check(config: &Config, slots_in_use: &[String]) -> Vec<Finding> {
    let mut findings = host::check(config);
    findings.push(host::probackup(config).await);
    let options = match connect_options(config, "gs_pitr check") {
        Ok(options) => options,
        Err(error) => {
            findings.push(Finding::failure("database", error));
            return findings;
        }
    };
    match ask(options, &mut findings).await {
        Ok(asked) => {
            // Another version than those that are known does not get past the log-in.
            findings.push(Finding::fine("version", asked.facts.version.as_str()));
            findings.extend(asked.preflight.into_iter().map(of_preflight));
            findings.push(match asked.facts.flavour {
                Flavour::PostgreSql => left_slots(&asked.slots, slots_in_use),
                Flavour::OpenGauss => hold(&asked.archiving, &config.archive_socket),
            });
            findings.push(standbys(&asked.receivers));
            findings.push(memory(config, &asked.facts));
            if asked.facts.flavour == Flavour::PostgreSql {
                let major = asked.facts.server_version_num / 10_000;
                findings.push(host::programs(config, major).await);
            }
            let pgdata = PathBuf::from(&asked.facts.data_directory);
            findings.extend(files(config, asked.facts, asked.size).await);
            findings.push(managed(config, pgdata).await);
        }
        Err(error) => findings.push(Finding::failure("database", error)),
    }
    findings
}

/// Asks everything in one session.
async fn ask(mut options: ConnectOptions, findings: &mut Vec<Finding>) -> Result<Asked, ApiError> {
    options.statement_deadline = STATEMENT;
    let cancel = CancellationToken::new();
    let _guard = cancel.clone().drop_guard();
    let user = options.user.clone();
    let asking = async {
        let sql = NodeConnection::connect(&options, cancel).await?;
        // Before anything that needs privileges: what is missing comes with its GRANT.
        let preflight = sql.examine().await?;
        Ok((preflight, sql))
    };
    let answered = timeout(ASK, asking).await.map_err(|_| late())?;
    let (preflight, sql) = answered.map_err(|error: SqlError| sql_error(&error))?;
    findings.push(Finding::fine(
        "database",
        format!("logged in as user `{user}`"),
    ));
    let asking = async {
        let facts = sql.server_facts().await?;
        let slots = sql.slots_like(slot::PREFIX).await?;
        let receivers = sql.wal_receivers().await?;
        let archiving = sql.archiving().await?;
        Ok((facts, slots, receivers, archiving))
    };
    let answered = timeout(ASK, asking).await.map_err(|_| late())?;
    let (facts, slots, receivers, archiving) = match answered {
        Ok(answered) => answered,
        Err(error) => {
            findings.extend(preflight.into_iter().map(of_preflight));
            let error: SqlError = error;
            return Err(sql_error(&error));
        }
    };
    let size = timeout(SIZE, sql.size_bytes()).await;
    Ok(Asked {
        facts,
        preflight,
        slots,
        receivers,
        archiving,
        size: size.ok().and_then(Result::ok),
    })
}

fn late() -> ApiError {
    let message = format!("the database did not answer within {} s", ASK.as_secs());
    ApiError::new(ErrorKind::Database, message).next("look at the database's log")
}

/// A finding of the preflight that a backup is refused by, too.
fn of_preflight(found: agent_sql::Finding) -> Finding {
    match found.severity {
        Severity::Fine => Finding::fine(found.name, found.what),
        Severity::Warning => {
            Finding::warning(found.name, found.what, found.mend.unwrap_or_default())
        }
        Severity::Refusal => {
            let mut error = ApiError::new(ErrorKind::Database, found.what);
            error.next = found.mend;
            Finding::failure(found.name, error)
        }
    }
}

/// Slots of ours that no operation uses keep WAL for nothing, until the disk is full.
fn left_slots(slots: &[agent_sql::SlotState], in_use: &[String]) -> Finding {
    let name = "replication slots";
    let of_ours = |name: &str| slot::is_ours(name) || slot::is_of_service(name);
    let ours = slots.iter().filter(|found| of_ours(&found.name));
    let left: Vec<_> = ours
        .filter(|found| !found.active && !in_use.contains(&found.name))
        .map(|found| found.name.as_str())
        .collect();
    if left.is_empty() {
        return Finding::fine(name, "none of ours is left over");
    }
    let message = format!(
        "slots of gs_pitr keep WAL and no operation of this agent uses them: {}",
        left.join(", ")
    );
    let drops = left
        .iter()
        .map(|name| format!("SELECT pg_drop_replication_slot('{name}');"));
    let drops: Vec<_> = drops.collect();
    Finding::warning(name, message, drops.join(" "))
}

/// Slots of openGauss hold nothing: its archiver must ask this agent.
fn hold(archiving: &Archiving, socket: &Path) -> Finding {
    let name = "WAL hold";
    match wal_hold::why_not_ours(archiving, socket) {
        None if socket.exists() => {
            Finding::fine(name, format!("the archiver asks on `{}`", socket.display()))
        }
        None => {
            let message = format!(
                "the archiver asks on `{}`, where this agent does not answer",
                socket.display()
            );
            Finding::warning(
                name,
                message,
                "look at the agent's log for why, then start it again",
            )
        }
        Some(why) => {
            let message = format!(
                "{why}: WAL that a backup still needs may be removed, and the backup fails then"
            );
            Finding::warning(name, message, wal_hold::mend(socket))
        }
    }
}

fn standbys(receivers: &[WalReceiver]) -> Finding {
    let name = "standbys";
    if receivers.is_empty() {
        return Finding::fine(name, "none is connected");
    }
    let each = receivers.iter().map(|receiver| {
        let from = receiver.address.as_deref().unwrap_or("the socket");
        format!(
            "`{}` from {from} ({})",
            receiver.application, receiver.state
        )
    });
    let each: Vec<_> = each.collect();
    let message = format!(
        "{} receive its WAL; they are to be made anew after a restore of this node",
        each.join(", ")
    );
    Finding::fine(name, message)
}

fn memory(config: &Config, facts: &ServerFacts) -> Finding {
    let name = "memory";
    match fits_memory(facts, config.memory as u64) {
        Ok(()) => Finding::fine(
            name,
            format!(
                "{} MiB for buffers, WAL segments of {} MiB",
                config.memory >> 20,
                facts.wal_segment_size >> 20
            ),
        ),
        Err(error) => Finding::failure(name, error),
    }
}

/// Everything that is read from disk.
async fn files(config: &Config, facts: ServerFacts, size: Option<u64>) -> Vec<Finding> {
    let config = config.clone();
    let looking = tokio::task::spawn_blocking(move || {
        let looked = match Looked::read(config.pgdata.as_deref(), &facts) {
            Ok(looked) => looked,
            Err(error) => return vec![Finding::failure("data directory", error)],
        };
        let wal = wal_directory(facts.flavour);
        let spaces = facts.tablespaces.iter();
        let spaces = spaces.filter(|space| Path::new(&space.location).is_absolute());
        let spaces: Vec<_> = spaces.map(|space| PathBuf::from(&space.location)).collect();
        vec![
            host::readable(&looked.pgdata, wal, &spaces),
            host::room_for_wal(&config, &looked.pgdata, wal),
            match size {
                Some(size) => host::room_for_a_copy(&looked.pgdata, size),
                None => Finding::warning(
                    "room for a restore",
                    "the databases' size could not be summed in time",
                    "compare it with df by hand",
                ),
            },
        ]
    });
    // A disk that hangs must not keep the answer.
    match timeout(ASK, looking).await {
        Ok(Ok(findings)) => findings,
        Ok(Err(error)) => {
            let message = format!("a bug in the agent: {error}");
            let error = ApiError::new(ErrorKind::Internal, message);
            vec![Finding::failure("data directory", error)]
        }
        Err(_) => {
            let message = format!("reading it takes longer than {} s", ASK.as_secs());
            let error = ApiError::new(ErrorKind::Database, message);
            vec![Finding::failure(
                "data directory",
                error.next("look at the disk's health"),
            )]
        }
    }
}

async fn managed(config: &Config, pgdata: PathBuf) -> Finding {
    let name = "cluster manager";
    let found = managers::find(config, Some(pgdata)).await;
    if found.is_empty() {
        return Finding::fine(name, "none was seen");
    }
    let seen = found
        .iter()
        .map(|found| format!("{}: {}", found.name, found.evidence));
    let seen: Vec<_> = seen.collect();
    let next: Vec<_> = found.iter().map(|found| found.next.as_str()).collect();
    let message = format!(
        "{}; it would fight a restore over the running database (backups are not touched by it)",
        seen.join("; ")
    );
    Finding::warning(name, message, next.join("; "))
}

#[cfg(test)]
mod tests {
    use agent_api::Level;
    use agent_sql::SlotState;

    use super::*;

    #[test]
    fn slots_that_an_operation_uses_are_not_left_over() {
        let slot = |name: &str, active| SlotState {
            name: name.to_owned(),
            active,
            restart_lsn: None,
            wal_status: None,
        };
        let slots = [
            slot("gs_pitr_0123abcd", false),
            slot("gs_pitr_89abcdef", true),
            slot("gs_pitr_standby", false),
        ];
        let found = left_slots(&slots, &[]);
        assert_eq!(found.level, Level::Warning);
        assert_eq!(
            found.mend.as_deref(),
            Some("SELECT pg_drop_replication_slot('gs_pitr_0123abcd');")
        );
        let found = left_slots(&slots, &["gs_pitr_0123abcd".to_owned()]);
        assert_eq!(found.level, Level::Ok);
    }
}
