//! Points that were made without a backup: the WAL between the backup that they were made on and each of them.

use std::collections::{BTreeMap, BTreeSet};

use uuid::Uuid;

use super::Context;
use super::finding::{Finding, Severity};
use super::inventory::{Inventory, Kind};
use super::records::Records;
use super::rules::Rests;
use super::segments::{NAMED, Plan};
use crate::check;
use crate::error::CatalogError;
use crate::ids::{BackupId, PointId};
use crate::keys;
use crate::model::{Manifest, NodeBackup, Point};
use crate::runs::{Runs, epochs, number};
use crate::wal::WalName;

/// Looks for what they need. What is missing between a backup that is there and points that were made on it is damage; a
/// point whose backup went, and that no other leads to, is for `prune`.
///
/// # Errors
/// [`CatalogError::Store`].
pub(super) async fn check(
    plan: &mut Plan<'_>,
    inventory: &Inventory,
    records: &Records,
    rests: &Rests,
) -> Result<(), CatalogError> {
    let sound: BTreeMap<&BackupId, &Manifest> = records
        .complete()
        .filter(|(id, _)| rests.sound.contains(*id))
        .collect();
    let mut on: BTreeMap<&BackupId, Vec<&Point>> = BTreeMap::new();
    let mut others = Vec::new();
    for (id, found) in &records.points {
        let Some(point) = &found.body else {
            continue;
        };
        let Some(base) = &point.base else {
            continue;
        };
        if check::point(point, id).is_err() {
            continue;
        }
        match sound.get(base) {
            Some(manifest) => match fits(manifest, point) {
                Ok(()) => on.entry(base).or_default().push(point),
                Err(what) => {
                    let what = format!("it cannot be a point on backup {base}: {what}");
                    plan.context.add(Finding::damage(&found.key, what));
                }
            },
            // Its manifest is damaged or lost, which is said of that.
            None if records.manifests.contains_key(base) && !records.is_deleted(base) => {}
            None if !records.is_deleted(base) && is_named(records, base) => {}
            None => others.push((id, point)),
        }
    }
    for (base, points) in on {
        for copy in &sound[base].nodes {
            follow(plan, base, copy, &points).await?;
        }
    }
    orphans(plan.context, inventory, &sound, &others);
    Ok(())
}

/// Whether the log names a manifest.
fn is_named(records: &Records, id: &BackupId) -> bool {
    let key = keys::manifest(id);
    let mut entries = records.log.values().filter_map(|found| found.body.as_ref());
    entries.any(|entry| entry.object == key.as_str())
}

/// Whether a backup is of the same nodes as a point, and older.
fn fits(manifest: &Manifest, point: &Point) -> Result<(), String> {
    check::belongs(manifest, point)?;
    let has = |node: Uuid| manifest.nodes.iter().any(|copy| copy.node_id == node);
    match point.nodes.iter().find(|mark| !has(mark.node_id)) {
        Some(mark) => Err(format!("it has no copy of node {}", mark.node_id)),
        None => Ok(()),
    }
}

/// The segments of one node from the end of its copy to the last of the points on it.
async fn follow(
    plan: &mut Plan<'_>,
    base: &BackupId,
    copy: &NodeBackup,
    points: &[&Point],
) -> Result<(), CatalogError> {
    let (node, size) = (copy.node_id, copy.wal_segment_size);
    let marks = points.iter().flat_map(|point| &point.nodes);
    let marks = marks.filter(|mark| mark.node_id == node);
    let mut ends = BTreeMap::new();
    for mark in marks {
        let end = number(&mark.wal_last, size);
        let record = check::lsn(&mark.end_lsn).unwrap_or(u64::MAX);
        match end {
            Some(end) if record.saturating_sub(1) / size == end => {
                *ends.entry((mark.timeline, end)).or_insert(0_usize) += 1;
            }
            _ => {
                let what = format!(
                    "its WAL of node {node} ends in segment {}, and its record at {}",
                    mark.wal_last, mark.end_lsn
                );
                for point in points.iter().filter(|point| point.nodes.contains(mark)) {
                    let key = keys::point(&point.point_id);
                    plan.context.add(Finding::damage(&key, what.as_str()));
                }
            }
        }
    }
    let Some(first) = number(&copy.wal_last, size).map(|last| last + 1) else {
        return Ok(());
    };
    let Some((timeline, last)) = ends.keys().max_by_key(|(_, end)| *end).copied() else {
        return Ok(());
    };
    let behind = |from: u64| -> usize {
        let later = ends.iter().filter(|((_, end), _)| *end >= from);
        later.map(|(_, count)| count).sum()
    };
    if last.saturating_sub(first) > plan.stored().saturating_add(NAMED as u64) {
        // Most of them cannot be there, whoever counts.
        let what = format!(
            "points on it need WAL of node {node} up to segment number {last}, and {} are stored",
            plan.stored()
        );
        plan.context
            .add(Finding::damage(&keys::manifest(base), what));
        return Ok(());
    }
    let mut missing = 0;
    for number in first..=last {
        let Some(name) = WalName::segment(timeline, number, size) else {
            continue;
        };
        if plan.wants(copy, &name) {
            continue;
        }
        let key = keys::wal(node, &copy.epoch, &name);
        if plan.context.is_there(&key).await? {
            continue;
        }
        missing += 1;
        if missing <= NAMED {
            let what = format!(
                "the WAL segment is missing: {} points behind it cannot be reached from backup {base}",
                behind(number)
            );
            plan.context.add(
                Finding::damage(&key, what)
                    .of_node(node)
                    .next("make a new backup: points behind it can be reached again"),
            );
        }
    }
    if missing > NAMED {
        let what = format!(
            "{missing} WAL segments of node {node} between it and points on it are missing in all"
        );
        plan.context
            .add(Finding::damage(&keys::manifest(base), what));
    }
    Ok(())
}

/// Points whose backup is gone: another may lead there.
fn orphans(
    context: &Context<'_>,
    inventory: &Inventory,
    sound: &BTreeMap<&BackupId, &Manifest>,
    points: &[(&PointId, &Point)],
) {
    if points.is_empty() {
        return;
    }
    let wanted = epochs(sound.values().copied());
    let mut names: BTreeMap<_, BTreeSet<WalName>> = BTreeMap::new();
    for (_, kind) in inventory.iter() {
        if let Kind::Wal(file) = kind {
            let of = (file.node, file.epoch);
            names.entry(of).or_default().insert(file.name);
        }
    }
    let mut runs = Runs::default();
    for (of, size) in wanted {
        runs.add(&of, size, names.get(&of).into_iter().flatten());
    }
    for (id, point) in points {
        let leads = |manifest: &Manifest| {
            fits(manifest, point).is_ok()
                && manifest.nodes.iter().all(|copy| {
                    let size = copy.wal_segment_size;
                    let mark = point.nodes.iter().find(|mark| mark.node_id == copy.node_id);
                    let last = mark.and_then(|mark| number(&mark.wal_last, size));
                    let of = (copy.node_id, copy.epoch.clone());
                    match (number(&copy.wal_first, size), last) {
                        (Some(first), Some(last)) => runs.missing(&of, size, first, last).is_none(),
                        _ => false,
                    }
                })
        };
        if !sound.values().any(|manifest| leads(manifest)) {
            let what = "a point that no backup leads to any more";
            let finding = Finding::new(Severity::Orphan, &keys::point(id), what);
            context.add(finding.next("gs_pitr prune"));
        }
    }
}
