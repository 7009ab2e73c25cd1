//! What the bucket knows of who may have locked the cluster. The lock itself has no name on it.

use std::time::Duration;

use catalog::Catalog;
use catalog::repo::{JournalledOperation, PointState};
use futures_util::future::join_all;
use jiff::{SignedDuration, Timestamp};
use tokio::time::Instant;
use uuid::Uuid;

use super::budget::{Budget, HOUR};
use crate::failure::Result;

/// So many of the newest operations are looked at.
const OPERATIONS: usize = 40;

/// In words, who may have locked, as far as this repository knows; `ours` is left out.
pub(crate) async fn holders(catalog: &Catalog, ours: Option<Uuid>) -> String {
    match found(catalog, ours).await {
        Ok(holders) if holders.is_empty() => {
            "no operation of this repository says that it has locked".to_owned()
        }
        Ok(holders) => holders.join("; "),
        Err(failure) => format!("the repository does not say who: {failure}"),
    }
}

async fn found(catalog: &Catalog, ours: Option<Uuid>) -> Result<Vec<String>> {
    let ids = catalog.operation_ids().await?.into_keys().rev();
    let ids = ids.filter(|id| Some(*id) != ours).take(OPERATIONS);
    let read = join_all(ids.map(|id| async move { catalog.operation(id).await.ok() })).await;
    let holders = read.iter().flatten().filter_map(|operation| {
        let since = operation.may_lock_since()?;
        Some(words(operation, since))
    });
    Ok(holders.collect())
}

fn words(operation: &JournalledOperation, since: Timestamp) -> String {
    let who = operation.by().map_or_else(
        || "somebody".to_owned(),
        |by| {
            format!(
                "`{}` of {}@{} (pid {})",
                by.command, by.user, by.host, by.pid
            )
        },
    );
    let id = operation.operation;
    let ended = match operation.ended() {
        None => "",
        Some(_) => ", which has ended",
    };
    format!("operation {id}, {who}{ended}, may have locked since {since:.0}")
}

/// Counts the locks of the newest points, whoever made them.
pub(super) async fn spent(catalog: &Catalog, budget: &Budget) -> Result<()> {
    if !budget.begins() {
        return Ok(());
    }
    let now = Timestamp::now();
    let hour = SignedDuration::try_from(HOUR).unwrap_or(SignedDuration::MAX);
    for listed in catalog.points_since(now - hour).await? {
        if let PointState::Usable(point) = listed.state
            && let Some(lock) = &point.lock
        {
            let ago = now.duration_since(point.created).unsigned_abs();
            budget.spend(
                Duration::from_millis(lock.held_ms),
                Instant::now().checked_sub(ago),
            );
        }
    }
    Ok(())
}
