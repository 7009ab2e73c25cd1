//! What is known of who may have taken the lock: operations in the bucket, and locks that points noted.

use std::time::Duration;

use catalog::repo::{JournalledOperation, PointState};
use catalog::{Catalog, CatalogError};
use jiff::Timestamp;
use serde::Serialize;
use serde_json::{Value, json};
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;

use crate::commands::operations::{self, Shown, State};
use crate::failure::{Failure, Result};
use crate::printer::{Printer, duration};
use crate::repo;
use crate::settings::Settings;

/// So many operations and points are shown.
const NEWEST: usize = 5;
/// So many journals are looked into.
const LOOKED_INTO: usize = 40;
/// For the bucket: a lock is held meanwhile, and a store that is down must not keep it there.
const PATIENCE: Duration = Duration::from_secs(15);

/// Shows it. What cannot be had is said, and keeps nobody from unlocking.
///
/// # Errors
/// A cancellation.
pub(super) async fn tell(
    settings: &Settings,
    printer: &Printer,
    cancel: &CancellationToken,
) -> Result<()> {
    if !settings.has_repo() {
        let message = "who locked it is not known: the proxies do not say, and no `--repo` is given to look for operations that make points";
        printer.warning(None, message);
        return Ok(());
    }
    let read = tokio::select! {
        read = timeout(PATIENCE, read(settings)) => read,
        () = cancel.cancelled() => return Err(Failure::cancelled()),
    };
    let read = read.unwrap_or_else(|_| {
        let message = format!("the bucket did not answer within {} s", PATIENCE.as_secs());
        Err(Failure::new(
            agent_api::ErrorKind::StoreUnavailable,
            message,
        ))
    });
    match read {
        Ok((fields, text)) => printer.event("known-of-the-lock", fields, Some(&text)),
        Err(failure) => {
            let message = format!("what the bucket knows of the lock cannot be read: {failure}");
            printer.warning(None, &message);
        }
    }
    Ok(())
}

async fn read(settings: &Settings) -> Result<(Value, String)> {
    let catalog = repo::open(settings).await?;
    let operations = candidates(&catalog).await?;
    let points = locks(&catalog).await?;
    let mut lines = Vec::new();
    if operations.iter().any(|candidate| candidate.since.is_some()) {
        lines.push("operations that say that they may have locked it come first:".to_owned());
    } else {
        lines.push(
            "no operation says that it has locked it; the newest ones that make points:".to_owned(),
        );
    }
    lines.extend(operations.iter().map(Candidate::line));
    if !points.is_empty() {
        lines.push("the newest points that were made under a lock:".to_owned());
        lines.extend(points.iter().map(|(_, line)| line.clone()));
    }
    let points: Vec<Value> = points.into_iter().map(|(fields, _)| fields).collect();
    let fields = json!({"operations": operations, "locks": points});
    Ok((fields, lines.join("\n")))
}

/// An operation that makes points.
#[derive(Debug, Serialize)]
struct Candidate {
    #[serde(flatten)]
    shown: Shown,
    /// Since when it may hold the lock, as far as it has said.
    #[serde(rename = "may_lock_since")]
    since: Option<Timestamp>,
}

/// Operations that make points: those first that may hold the lock, then those at work or left, each the newest first.
async fn candidates(catalog: &Catalog) -> Result<Vec<Candidate>> {
    let leases = operations::leases(catalog).await?;
    let ids = catalog.operation_ids().await?;
    let mut found = Vec::new();
    for id in ids.keys().rev().take(LOOKED_INTO) {
        let journal = match catalog.operation(*id).await {
            Ok(journal) if !journal.is_part() && makes_points(&journal) => journal,
            Ok(_) => continue,
            Err(error) if error.is_absent() || error.is_of_object() => continue,
            Err(error) => return Err(error.into()),
        };
        found.push(Candidate {
            since: journal.may_lock_since(),
            shown: operations::shown(catalog, &journal, &leases).await?,
        });
    }
    found.sort_by_key(|it| {
        let open = matches!(it.shown.state, State::Running | State::Left);
        (it.since.is_none(), !open)
    });
    found.truncate(NEWEST);
    Ok(found)
}

fn makes_points(journal: &JournalledOperation) -> bool {
    !matches!(
        journal.kind(),
        Some("restore" | "delete" | "prune" | "verify" | "check")
    )
}

impl Candidate {
    fn line(&self) -> String {
        let shown = &self.shown;
        let heard = shown.last.map_or_else(|| "-".to_owned(), age);
        let since = self
            .since
            .map(|since| format!("  MAY HOLD IT, since {} ago", age(since)));
        format!(
            "  {}  {} {}  by {}  last heard of {heard} ago{}",
            shown.operation,
            shown.kind.as_deref().unwrap_or("-"),
            shown.state.name(),
            shown.by.as_deref().unwrap_or("nobody known"),
            since.unwrap_or_default(),
        )
    }
}

fn age(at: Timestamp) -> String {
    let since = Timestamp::now().duration_since(at);
    duration(since.unsigned_abs())
}

/// What the newest points say of their locks.
async fn locks(catalog: &Catalog) -> Result<Vec<(Value, String)>, CatalogError> {
    let mut found = Vec::new();
    for listed in catalog.points().await?.into_iter().rev() {
        let PointState::Usable(point) = listed.state else {
            continue;
        };
        let Some(lock) = &point.lock else {
            continue;
        };
        let by = lock.by.as_ref();
        let by = by.map(|by| format!("{}@{}, process {}", by.user, by.host, by.pid));
        let text = format!(
            "  {}  {} ago, held for {} ms in {} tries, by {}",
            point.point_id,
            age(lock.at),
            lock.held_ms,
            lock.tries,
            by.as_deref().unwrap_or("nobody known"),
        );
        let fields = json!({"point": point.point_id, "operation": point.operation, "lock": lock});
        found.push((fields, text));
        if found.len() == NEWEST {
            break;
        }
    }
    Ok(found)
}
