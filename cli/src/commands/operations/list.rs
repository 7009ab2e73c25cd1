//! All operations, and what each of them is.

use std::fmt::Write as _;

use catalog::lease::StandingLease;
use catalog::model::{LeaseScope, Verdict};
use catalog::repo::JournalledOperation;
use catalog::{Catalog, CatalogError};
use comfy_table::{Table, presets};
use futures_util::future::join_all;
use jiff::Timestamp;
use serde::Serialize;
use serde_json::json;
use uuid::Uuid;

use crate::failure::{Failure, Result};
use crate::printer::Printer;
use crate::repo;
use crate::restoring::resume;
use crate::settings::Settings;

/// Journals read at the same time.
const AT_ONCE: usize = 16;

/// Where an operation stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum State {
    /// It holds its lease.
    Running,
    /// It has ended well.
    Ended,
    /// It has ended with an error.
    Failed,
    /// It was left before its end.
    Left,
    /// Its journal cannot be read.
    Unreadable,
}

impl State {
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Running => "running",
            Self::Ended => "ended",
            Self::Failed => "failed",
            Self::Left => "left behind",
            Self::Unreadable => "unreadable",
        }
    }
}

/// One operation as it is shown.
#[derive(Debug, Serialize)]
pub(crate) struct Shown {
    pub(crate) operation: Uuid,
    pub(crate) kind: Option<String>,
    pub(crate) state: State,
    pub(super) begun: Option<Timestamp>,
    /// When its last record was written.
    pub(crate) last: Option<Timestamp>,
    /// What was decided of a restore.
    pub(super) decision: Option<Verdict>,
    pub(super) backup_id: Option<String>,
    pub(crate) by: Option<String>,
    /// Why it failed, or cannot be read.
    pub(super) why: Option<String>,
    /// The command that goes on with it.
    pub(super) next: Option<String>,
}

/// The leases as they stand, to tell who works.
pub(crate) async fn leases(catalog: &Catalog) -> Result<Vec<StandingLease>> {
    let mut leases = Vec::new();
    for scope in [
        LeaseScope::Backup,
        LeaseScope::Restore,
        LeaseScope::Maintain,
    ] {
        leases.extend(catalog.lease(scope).await?);
    }
    Ok(leases)
}

/// What an operation is.
pub(crate) async fn shown(
    catalog: &Catalog,
    journal: &JournalledOperation,
    leases: &[StandingLease],
) -> Result<Shown> {
    let operation = journal.operation;
    let decision = catalog.decision(operation).await?;
    let lease = leases.iter().find(|it| it.lease.operation == operation);
    let (state, why) = match journal.ended() {
        Some(None) => (State::Ended, None),
        Some(Some(why)) => (State::Failed, Some(why.to_owned())),
        None if lease.is_some_and(StandingLease::is_held) => (State::Running, None),
        None => (State::Left, None),
    };
    let by = journal.by().or(lease.map(|it| &it.lease.holder));
    let is_restore = journal.kind() == Some("restore");
    Ok(Shown {
        operation,
        kind: journal.kind().map(str::to_owned),
        state,
        begun: journal.records.first().map(|record| record.at),
        last: journal.records.last().map(|record| record.at),
        decision: decision.map(|decision| decision.verdict),
        backup_id: journal.backup().map(ToString::to_string),
        by: by.map(|by| format!("{}@{}", by.user, by.host)),
        why,
        next: (is_restore && state == State::Left).then(|| resume(operation)),
    })
}

fn unreadable(operation: Uuid, error: &CatalogError) -> Shown {
    Shown {
        operation,
        kind: None,
        state: State::Unreadable,
        begun: None,
        last: None,
        decision: None,
        backup_id: None,
        by: None,
        why: Some(error.to_string()),
        next: None,
    }
}

/// Runs `gs_pitr operations`.
pub(super) async fn run(limit: usize, settings: &Settings, printer: &Printer) -> Result<()> {
    let catalog = repo::open(settings).await?;
    let leases = leases(&catalog).await?;
    let ids: Vec<_> = catalog.operation_ids().await?.into_keys().collect();
    let mut operations = Vec::new();
    // Ids are by time. The agents' own journals lie between those of operators.
    for some in ids.rchunks(AT_ONCE) {
        let read = join_all(some.iter().rev().map(|id| catalog.operation(*id)));
        for (id, read) in some.iter().rev().zip(read.await) {
            match read {
                Ok(journal) if journal.is_part() => {}
                Ok(journal) => operations.push(shown(&catalog, &journal, &leases).await?),
                // It has a decision or a pin, and nothing else.
                Err(error) if error.is_absent() => {}
                Err(error) if error.is_of_object() => operations.push(unreadable(*id, &error)),
                Err(error) => return Err(Failure::from(error)),
            }
        }
        if operations.len() >= limit {
            break;
        }
    }
    operations.truncate(limit);
    printer.text(&table(&operations));
    printer.result("operations", json!({"operations": operations}));
    Ok(())
}

pub(super) fn moment(time: Option<Timestamp>) -> String {
    time.map_or_else(
        || "-".to_owned(),
        |time| time.strftime("%Y-%m-%d %H:%M:%SZ").to_string(),
    )
}

pub(super) fn verdict(decision: Option<Verdict>) -> &'static str {
    match decision {
        Some(Verdict::Commit) => "forward",
        Some(Verdict::Rollback) => "back",
        None => "-",
    }
}

fn table(operations: &[Shown]) -> String {
    if operations.is_empty() {
        return "no operations".to_owned();
    }
    let mut table = Table::new();
    table.load_style(presets::NOTHING);
    table.set_header(["ID", "KIND", "STATE", "DECIDED", "BEGUN", "BY", "BACKUP"]);
    let word = |text: &Option<String>| text.clone().unwrap_or_else(|| "-".to_owned());
    for it in operations {
        table.add_row([
            it.operation.to_string(),
            word(&it.kind),
            it.state.name().to_owned(),
            verdict(it.decision).to_owned(),
            moment(it.begun),
            word(&it.by),
            word(&it.backup_id),
        ]);
    }
    let mut text = table.trim_fmt();
    for it in operations {
        if let Some(why) = &it.why {
            let _ = write!(text, "\n{}: {why}", it.operation);
        }
        if let Some(next) = &it.next {
            let _ = write!(
                text,
                "\n{}: was left before its end; next: {next}",
                it.operation
            );
        }
    }
    text
}
