//! What nothing names: left of attempts that failed, of backups that are deleted, given up or were never finished,
//! and whatever else lies below the prefix.

use std::collections::BTreeSet;

use pipeline::store::{Key, StoreError};

use super::finding::{Finding, Severity};
use super::inventory::{Inventory, Kind};
use super::lives::Live;
use super::records::Records;
use super::{Context, Depth, PARALLEL, each};
use crate::error::CatalogError;
use crate::ids::BackupId;
use crate::keys;
use crate::model::ManifestState;

/// Looks for them.
///
/// # Errors
/// [`CatalogError::Store`].
pub(super) async fn check(
    context: &Context<'_>,
    inventory: &Inventory,
    records: &Records,
    live: &Live,
) -> Result<(), CatalogError> {
    let settled = settled(context, inventory, records).await?;
    for (key, kind) in inventory.iter() {
        let (backup, node, what) = match kind {
            Kind::Unknown => {
                let what = "no object of a repository has such a key";
                let finding = Finding::new(Severity::Orphan, key, what);
                context.add(finding.next("remove it if nobody needs it; gs_pitr leaves it alone"));
                continue;
            }
            Kind::PartialWal => {
                let what = "a reserved kind of object, which this program does not verify";
                context.add(Finding::note(key, what));
                continue;
            }
            Kind::Probe(operation) => {
                let journal = records.operations.get(&operation);
                // A check runs without a lease: while it has not ended it may be at work.
                if journal.is_none_or(|journal| journal.ended().is_some()) {
                    let what = "left of a check of the store";
                    let finding = Finding::new(Severity::Orphan, key, what);
                    context.add(finding.next("gs_pitr prune, when it is 30 days old"));
                }
                continue;
            }
            Kind::Index(id, ..) | Kind::Pack(id, ..) if settled.contains(&id) => continue,
            Kind::Wal(file) => {
                let epoch = (file.node, file.epoch.clone());
                if records.epochs.contains_key(&epoch)
                    || is_lost(records, &keys::epoch(file.node, &file.epoch))
                {
                    continue;
                }
                (
                    None,
                    file.node,
                    Some("WAL of an epoch that was never opened".to_owned()),
                )
            }
            Kind::Index(id, node, attempt) => {
                let what = left(records, live, &id, |copy| {
                    (copy.node_id, copy.attempt) == (node, attempt)
                });
                (Some(id), node, what)
            }
            Kind::Pack(id, node, attempt, number) => {
                let what = left(records, live, &id, |copy| {
                    let packs = copy.packs.iter().any(|pack| pack.number == number);
                    (copy.node_id, copy.attempt) == (node, attempt) && packs
                });
                (Some(id), node, what)
            }
            _ => continue,
        };
        let Some(what) = what else {
            continue;
        };
        let mut finding = Finding::new(Severity::Orphan, key, what).of_node(node);
        finding.backup = backup;
        context.add(finding.next("gs_pitr prune"));
    }
    uploads(context, records, live).await
}

/// Backups that were finished, given up or deleted since the listing: what is left of them is for another time.
async fn settled(
    context: &Context<'_>,
    inventory: &Inventory,
    records: &Records,
) -> Result<BTreeSet<BackupId>, CatalogError> {
    let open: BTreeSet<BackupId> = inventory
        .iter()
        .filter_map(|(_, kind)| match kind {
            Kind::Index(id, ..) | Kind::Pack(id, ..) => Some(id),
            _ => None,
        })
        .filter(|id| !records.manifests.contains_key(id) && !records.is_deleted(id))
        .collect();
    let settled = each(open, PARALLEL, |id| async move {
        let now = context.is_there(&keys::manifest(&id)).await?
            || context.is_there(&keys::tombstone(&id)).await?;
        Ok(now.then_some(id))
    });
    Ok(settled.await?.into_iter().flatten().collect())
}

/// Whether the log names an object that is not there: then what belongs to it is no orphan.
fn is_lost(records: &Records, key: &Key) -> bool {
    let mut entries = records.log.values().filter_map(|found| found.body.as_ref());
    entries.any(|entry| entry.object == key.as_str())
}

/// Why an object of a backup's copies is left over, if it is.
fn left(
    records: &Records,
    live: &Live,
    id: &BackupId,
    named: impl Fn(&crate::model::NodeBackup) -> bool,
) -> Option<String> {
    if records.is_deleted(id) {
        return Some("left of a backup that was deleted".to_owned());
    }
    match records.manifests.get(id) {
        None if live.backup(id) || is_lost(records, &keys::manifest(id)) => None,
        None => Some("left of a backup that was never finished".to_owned()),
        Some(found) => match &found.body {
            // Nobody can say what it names.
            None => None,
            Some(manifest) if manifest.state == ManifestState::Abandoned => {
                Some("left of a backup that was given up".to_owned())
            }
            Some(manifest) if manifest.nodes.iter().any(named) => None,
            Some(_) => {
                Some("its backup's manifest does not name it: an attempt that failed".to_owned())
            }
        },
    }
}

/// Uploads under way of operations that are over: each key is asked for, because some stores list them only so.
async fn uploads(
    context: &Context<'_>,
    records: &Records,
    live: &Live,
) -> Result<(), CatalogError> {
    let (mut asked, mut busy) = (BTreeSet::new(), BTreeSet::new());
    for (id, journal) in &records.operations {
        if live.operation(*id) {
            busy.extend(journal.intended());
        } else if journal.ended().is_none() || context.verify.depth == Depth::Full {
            // One that ended said that it left none.
            asked.extend(journal.intended());
        }
    }
    let keys = asked
        .difference(&busy)
        .filter_map(|key| Key::new(key.as_str()).ok());
    each(keys, PARALLEL, |key| async move {
        let uploads = match context.store.list_uploads(&key).await {
            Ok(uploads) => uploads,
            Err(StoreError::NotFound(_)) => return Ok(()),
            Err(error) => return Err(error.into()),
        };
        if !uploads.is_empty() {
            let what = format!(
                "{} uploads of it are under way, and nobody works on them",
                uploads.len()
            );
            let finding = Finding::new(Severity::Orphan, &key, what);
            context.add(finding.next("gs_pitr prune"));
        }
        Ok(())
    })
    .await?;
    Ok(())
}
