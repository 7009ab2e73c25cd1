//! Leases and operations: readable, each under its own name, without gaps, and none left hanging.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use jiff::{SignedDuration, Timestamp};
use pipeline::store::Key;
use uuid::Uuid;

use super::Context;
use super::finding::Finding;
use super::inventory::Inventory;
use super::records::{Journal, Records, scope_of};
use crate::error::CatalogError;
use crate::ids::BackupId;
use crate::journal::WAL_SERVICE;
use crate::keys;
use crate::model::{LeaseScope, LeaseState, OperationEvent, Verdict};
use crate::repo::Catalog;
use crate::retention::plan::{GRACE, JOURNALS};

/// Who is at work now.
#[derive(Debug, Default)]
pub(super) struct Live {
    operations: BTreeSet<Uuid>,
    backups: BTreeSet<BackupId>,
}

impl Live {
    /// The operations whose lease has not run out, by the store's clock.
    ///
    /// # Errors
    /// [`CatalogError::Store`].
    pub(super) async fn find(
        context: &Context<'_>,
        records: &Records,
    ) -> Result<Self, CatalogError> {
        let mut live = Self::default();
        let Ok(catalog) = Catalog::open(Arc::clone(&context.store)).await else {
            return Ok(live);
        };
        for scope in [
            LeaseScope::Backup,
            LeaseScope::Restore,
            LeaseScope::Maintain,
        ] {
            let standing = match catalog.lease(scope).await {
                Ok(Some(standing)) if standing.is_held() => standing,
                Ok(_) => continue,
                Err(error) if error.is_of_object() => continue,
                Err(error) => return Err(error),
            };
            live.backups.extend(standing.lease.backup_id);
            live.operations.insert(standing.lease.operation);
        }
        // Agents' parts of it have ids of their own.
        for (id, journal) in &records.operations {
            if let Some(backup) = journal.backup()
                && (live.backups.contains(backup) || live.operations.contains(id))
            {
                live.backups.insert(backup.clone());
                live.operations.insert(*id);
            }
        }
        // WAL that is shipped all the time, and points, have no lease; a new journal is begun often enough.
        let now = Timestamp::try_from(context.store.now().await?).unwrap_or(Timestamp::MAX);
        for (id, journal) in &records.operations {
            if journal.is_without_lease()
                && journal.ended().is_none()
                && !journal.is_older(GRACE, now)
            {
                live.operations.insert(*id);
            }
        }
        Ok(live)
    }

    pub(super) fn operation(&self, id: Uuid) -> bool {
        self.operations.contains(&id)
    }

    pub(super) fn backup(&self, id: &BackupId) -> bool {
        self.backups.contains(id)
    }
}

impl Journal {
    fn events(&self) -> impl Iterator<Item = &OperationEvent> {
        let bodies = self
            .records
            .values()
            .filter_map(|record| record.body.as_ref());
        bodies.map(|body| &body.event)
    }

    pub(super) fn backup(&self) -> Option<&BackupId> {
        self.events().find_map(|event| match event {
            OperationEvent::Started { backup_id, .. } => backup_id.as_ref(),
            _ => None,
        })
    }

    /// What an operator started, with its kind; agents' parts are none.
    fn kind(&self) -> Option<&str> {
        self.events().find_map(|event| match event {
            OperationEvent::Started {
                kind,
                node_id: None,
                ..
            } => Some(kind.as_str()),
            _ => None,
        })
    }

    /// Whether it is of an agent that ships WAL all the time, or of a client that makes points.
    fn is_without_lease(&self) -> bool {
        self.events().any(|event| match event {
            OperationEvent::Started { kind, .. } => kind == WAL_SERVICE || kind == "point",
            _ => false,
        })
    }

    /// Whether it said that it has ended, and whether well.
    pub(super) fn ended(&self) -> Option<bool> {
        self.events().find_map(|event| match event {
            OperationEvent::Ended { error } => Some(error.is_none()),
            _ => None,
        })
    }

    /// Whether its newest record is older than that.
    fn is_older(&self, age: Duration, now: Timestamp) -> bool {
        let bodies = self.records.values().filter_map(|it| it.body.as_ref());
        let newest = bodies.map(|body| body.at).max();
        let age = SignedDuration::try_from(age).unwrap_or(SignedDuration::MAX);
        newest.is_some_and(|newest| now.duration_since(newest) > age)
    }

    fn promoted(&self) -> bool {
        self.events()
            .any(|event| matches!(event, OperationEvent::NodePromoted(_)))
    }

    /// Keys of uploads that it may have begun.
    pub(super) fn intended(&self) -> impl Iterator<Item = &String> {
        self.events().flat_map(|event| match event {
            OperationEvent::UploadsIntended { keys } => keys.as_slice(),
            _ => &[],
        })
    }
}

/// Checks all of them.
///
/// # Errors
/// [`CatalogError::Store`].
pub(super) async fn check(
    context: &Context<'_>,
    inventory: &Inventory,
    records: &Records,
    live: &Live,
) -> Result<(), CatalogError> {
    leases(context, records, live).await?;
    let now = Timestamp::try_from(context.store.now().await?).unwrap_or(Timestamp::MIN);
    for (id, journal) in &records.operations {
        operation(context, *id, journal, now).await?;
        if !live.operation(*id) {
            unfinished(context, *id, journal);
        }
        if journal.kind() == Some("restore") {
            restore(context, inventory, *id, journal);
        }
    }
    Ok(())
}

async fn leases(context: &Context<'_>, records: &Records, live: &Live) -> Result<(), CatalogError> {
    let mut before: Option<(&str, u64)> = None;
    let mut all = records.leases.iter().peekable();
    while let Some(((scope, seq), found)) = all.next() {
        // Old ones may have been removed, from the first on.
        if let Some((_, last)) = before.filter(|(its, last)| its == scope && last + 1 < *seq) {
            let key = keys::lease(scope_of(scope), last + 1);
            if !context.is_there(&key).await? {
                let what = "a lease between others is missing";
                context.add(Finding::note(&key, what));
            }
        }
        before = Some((scope, *seq));
        let Some(body) = &found.body else {
            continue;
        };
        if body.scope.name() != *scope || body.seq != *seq {
            let what = format!("it says it is {} {}", body.scope.name(), body.seq);
            context.add(Finding::damage(&found.key, what));
            continue;
        }
        let newest = all.peek().is_none_or(|((next, _), _)| next != scope);
        let journal = records.operations.get(&body.operation);
        let over = journal.is_some_and(|journal| journal.ended().is_some());
        let next_key = keys::lease(scope_of(scope), seq + 1);
        if newest
            && body.state == LeaseState::Held
            && (over || !live.operation(body.operation))
            && !context.is_there(&next_key).await?
        {
            let what = format!(
                "it was never given back: operation {} ({} on {}) died or stood still",
                body.operation, body.holder.command, body.holder.host
            );
            let next =
                "nothing: the next command of this kind takes it over, and fences what was left";
            context.add(Finding::note(&found.key, what).next(next));
        }
    }
    Ok(())
}

async fn operation(
    context: &Context<'_>,
    id: Uuid,
    journal: &Journal,
    now: Timestamp,
) -> Result<(), CatalogError> {
    let damage = |key: &Key, what: String| context.add(Finding::damage(key, what));
    let last = journal.records.keys().next_back().copied().unwrap_or(0);
    // One that is old enough to be removed may have been removed in part.
    let going = journal.is_older(JOURNALS, now);
    for seq in 1..=last {
        let Some(found) = journal.records.get(&seq) else {
            if going {
                continue;
            }
            let key = keys::operation_record(id, seq);
            if !context.is_there(&key).await? {
                damage(&key, "a record of the operation is missing".to_owned());
            }
            continue;
        };
        let Some(body) = &found.body else {
            continue;
        };
        if body.operation != id || body.seq != seq {
            let what = format!("it says it is record {} of {}", body.seq, body.operation);
            damage(&found.key, what);
        }
    }
    if let Some(found) = &journal.decision
        && let Some(body) = &found.body
        && body.operation != id
    {
        damage(
            &found.key,
            format!("it says it is of operation {}", body.operation),
        );
    }
    if let Some(found) = &journal.pin
        && let Some(body) = &found.body
        && body.operation != id
    {
        damage(
            &found.key,
            format!("it says it is of operation {}", body.operation),
        );
    }
    Ok(())
}

fn unfinished(context: &Context<'_>, id: Uuid, journal: &Journal) {
    if journal.ended().is_some() || journal.records.values().any(|record| record.body.is_none()) {
        return;
    }
    let key = keys::operation_record(id, 1);
    let what = match journal.kind() {
        Some(kind) => format!("the operation ({kind}) never said that it ended"),
        None if journal.records.is_empty() => "the operation left no record".to_owned(),
        None => "an agent's part of an operation never said that it ended".to_owned(),
    };
    let next = format!("gs_pitr operations {id}");
    context.add(Finding::note(&key, what).next(next));
}

/// What a restore has to have written by the time it is so far.
fn restore(context: &Context<'_>, inventory: &Inventory, id: Uuid, journal: &Journal) {
    let key = keys::decision(id);
    let verdict = journal
        .decision
        .as_ref()
        .and_then(|found| found.body.as_ref());
    let verdict = verdict.map(|body| body.verdict);
    let ended = journal.ended();
    if journal.decision.is_none() && inventory.size(&key).is_none() {
        let what = "this restore promoted nodes or ended, and nothing says what was decided";
        if journal.promoted() && ended.is_none() {
            context.add(Finding::damage(&key, what));
        } else if ended == Some(true) {
            context.add(Finding::note(&key, what));
        } else if ended.is_some() && journal.pin.is_some() {
            let what = "this restore failed, and nothing says that it went back: it failed before that was decided, or the decision is lost";
            context.add(Finding::note(&key, what).next("nothing: nobody asks for it any more"));
        }
    } else if verdict == Some(Verdict::Rollback) && ended == Some(true) {
        let what = "it says that the restore went back, and the restore says that it ended well";
        context.add(Finding::damage(&key, what));
    }
    let key = keys::pin(id);
    if journal.pin.is_none() && inventory.size(&key).is_none() && verdict.is_some() {
        let what = "the restore was decided, and nothing says which backups it read";
        context.add(Finding::note(&key, what));
    }
}
