//! WAL: every segment from a copy's start to its point, along the epochs, and whatever else is stored.

use std::collections::{BTreeMap, BTreeSet};
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::task::{Context as TaskContext, Poll};
use std::time::Duration;

use pipeline::error::PipelineError;
use pipeline::store::{Detail, Key, Retry, StoreError};
use tokio::io::AsyncWrite;
use uuid::Uuid;

use super::finding::Finding;
use super::inventory::{Inventory, Kind};
use super::records::Records;
use super::rules::Rests;
use super::{Context, Scope, each, points};
use crate::check;
use crate::error::CatalogError;
use crate::ids::{BackupId, EpochId};
use crate::keys;
use crate::model::{Manifest, NodeBackup, NodePoint};
use crate::wal::{StoredWal, WalFile, WalName, get_segment};

/// How long an object may stand still while it is read.
const STALL: Duration = Duration::from_mins(1);
/// Tries for an object whose bytes break off.
const TRIES: u32 = 4;
/// Missing segments named one by one for each copy.
pub(super) const NAMED: usize = 20;

/// A WAL object that is there and is to be read.
#[derive(Debug)]
pub(super) struct Wanted {
    file: WalFile,
    pub(super) stored_bytes: u64,
    /// Plain bytes it must have, if a backup says.
    plain_bytes: Option<u64>,
    backups: BTreeSet<BackupId>,
}

/// What is to be read; what backups need and is not there is reported.
///
/// # Errors
/// [`CatalogError::Store`].
pub(super) async fn needed(
    context: &Context<'_>,
    inventory: &Inventory,
    records: &Records,
    rests: &Rests,
) -> Result<Vec<Wanted>, CatalogError> {
    let mut plan = Plan {
        context,
        inventory,
        records,
        wanted: BTreeMap::new(),
        stored: 0,
    };
    for (key, kind) in inventory.iter() {
        if let Kind::Wal(file) = kind {
            plan.stored += 1;
            if context.verify.scope == Scope::All {
                plan.want(key, file, None, None);
            }
        }
    }
    for (id, manifest) in records
        .complete()
        .filter(|(id, _)| rests.sound.contains(*id))
    {
        plan.backup(id, manifest).await?;
    }
    if context.verify.scope == Scope::All {
        points::check(&mut plan, inventory, records, rests).await?;
    }
    Ok(plan.wanted.into_values().collect())
}

/// What will be read.
pub(super) struct Plan<'a> {
    pub(super) context: &'a Context<'a>,
    inventory: &'a Inventory,
    records: &'a Records,
    wanted: BTreeMap<Key, Wanted>,
    /// WAL objects in the bucket.
    stored: u64,
}

/// The segments that one node of a backup needs.
struct Stretch<'a> {
    id: &'a BackupId,
    copy: &'a NodeBackup,
    first: u64,
    last: u64,
    /// The newest timeline first.
    timelines: Vec<u32>,
}

impl Plan<'_> {
    /// WAL objects in the bucket.
    pub(super) fn stored(&self) -> u64 {
        self.stored
    }

    /// Wants a segment behind a copy, as a recovery of it would look for it; `false`: it was not listed.
    pub(super) fn wants(&mut self, copy: &NodeBackup, name: &WalName) -> bool {
        let Some((key, file)) = self.find(copy.node_id, &copy.epoch, name) else {
            return false;
        };
        self.want(&key, file, Some(copy.wal_segment_size), None);
        true
    }

    fn want(&mut self, key: &Key, file: WalFile, plain: Option<u64>, backup: Option<&BackupId>) {
        let stored_bytes = self.inventory.size(key).unwrap_or(0);
        let wanted = self.wanted.entry(key.clone()).or_insert(Wanted {
            file,
            stored_bytes,
            plain_bytes: None,
            backups: BTreeSet::new(),
        });
        wanted.plain_bytes = wanted.plain_bytes.or(plain);
        wanted.backups.extend(backup.cloned());
    }

    async fn backup(&mut self, id: &BackupId, manifest: &Manifest) -> Result<(), CatalogError> {
        let point = manifest.point.as_ref();
        let point = point.and_then(|point| self.records.points.get(point)?.body.as_ref());
        for copy in &manifest.nodes {
            let marked = point
                .and_then(|point| point.nodes.iter().find(|node| node.node_id == copy.node_id));
            match stretch(id, copy, marked) {
                Ok(stretch) => self.stretch(&stretch).await?,
                Err(what) => {
                    let finding = Finding::damage(&keys::manifest(id), what).of_backup(id);
                    self.context.add(finding.of_node(copy.node_id).losing([id]));
                }
            }
        }
        Ok(())
    }

    async fn stretch(&mut self, stretch: &Stretch<'_>) -> Result<(), CatalogError> {
        let (id, copy) = (stretch.id, stretch.copy);
        let size = copy.wal_segment_size;
        let count = stretch.last - stretch.first + 1;
        let of = |finding: Finding| finding.of_backup(id).of_node(copy.node_id).losing([id]);
        let mut missing = 0;
        if count > self.stored.saturating_add(NAMED as u64) {
            // Most of them cannot be there, whoever counts.
            let what = format!(
                "it needs {count} WAL segments of node {}, {} are stored",
                copy.node_id, self.stored
            );
            let finding = of(Finding::damage(&keys::manifest(id), what));
            return self.context.add_of_backup(finding).await;
        }
        for number in stretch.first..=stretch.last {
            let names = stretch
                .timelines
                .iter()
                .filter_map(|timeline| WalName::segment(*timeline, number, size));
            let names: Vec<WalName> = names.collect();
            let found = names
                .iter()
                .find_map(|name| self.find(copy.node_id, &copy.epoch, name));
            if let Some((key, file)) = found {
                self.want(&key, file, Some(size), Some(id));
                continue;
            }
            let Some(name) = names.into_iter().next() else {
                continue;
            };
            let key = keys::wal(copy.node_id, &copy.epoch, &name);
            if self.context.is_there(&key).await? {
                continue;
            }
            missing += 1;
            if missing <= NAMED {
                let what = "the WAL segment is missing: recovery ends before it";
                self.context
                    .add_of_backup(of(Finding::damage(&key, what)))
                    .await?;
            }
        }
        if missing > NAMED {
            let what = format!(
                "{missing} WAL segments of node {} are missing in all",
                copy.node_id
            );
            let finding = of(Finding::damage(&keys::manifest(id), what));
            self.context.add_of_backup(finding).await?;
        }
        for timeline in stretch.timelines.iter().filter(|timeline| **timeline > 1) {
            let name = WalName::history(*timeline);
            if let Some((key, file)) = self.find(copy.node_id, &copy.epoch, &name) {
                self.want(&key, file, None, Some(id));
                continue;
            }
            let key = keys::wal(copy.node_id, &copy.epoch, &name);
            let what = "the timeline's history is missing: recovery cannot follow it";
            let finding = of(Finding::damage(&key, what));
            self.context.add_of_backup(finding).await?;
        }
        Ok(())
    }

    /// Where a recovery in `epoch` finds a WAL file: there, or in a parent that wrote it before the fork.
    fn find(&self, node: Uuid, epoch: &EpochId, name: &WalName) -> Option<(Key, WalFile)> {
        let mut next = Some(epoch.clone());
        let mut seen = BTreeSet::new();
        while let Some(epoch) = next.take().filter(|epoch| seen.insert(epoch.clone())) {
            let file = WalFile {
                node,
                epoch: epoch.clone(),
                name: name.clone(),
            };
            let key = file.key();
            if self.inventory.size(&key).is_some() {
                return Some((key, file));
            }
            let body = self.records.epochs.get(&(node, epoch))?.body.as_ref()?;
            if name.timeline() >= body.timeline {
                return None;
            }
            next.clone_from(&body.parent);
        }
        None
    }
}

/// From the copy's first segment to the one that holds the end of the point's record.
fn stretch<'a>(
    id: &'a BackupId,
    copy: &'a NodeBackup,
    point: Option<&NodePoint>,
) -> Result<Stretch<'a>, String> {
    let size = copy.wal_segment_size;
    let number = |name: &str| {
        let name: WalName = name
            .parse()
            .map_err(|_| format!("`{name}` is no WAL segment"))?;
        let number = name.number(size);
        let number = number.ok_or_else(|| format!("`{name}` is no segment of {size} bytes"))?;
        Ok::<_, String>((name.timeline(), number))
    };
    let (oldest, first) = number(&copy.wal_first)?;
    let (mut newest, mut last) = number(&copy.wal_last)?;
    if check::lsn(&copy.start_lsn)? / size < first {
        let (start, first) = (&copy.start_lsn, &copy.wal_first);
        return Err(format!(
            "its copy starts at {start}, before its first WAL segment {first}"
        ));
    }
    let mut end = check::lsn(&copy.stop_lsn)?;
    if let Some(point) = point {
        let (timeline, of_point) = number(&point.wal_last)?;
        newest = newest.max(timeline);
        last = last.max(of_point);
        end = end.max(check::lsn(&point.end_lsn)?);
    }
    if end.saturating_sub(1) / size > last {
        return Err(format!(
            "its WAL ends at segment number {last}, before its point"
        ));
    }
    if last < first || newest < oldest || newest - oldest > 1000 {
        let (first, last) = (&copy.wal_first, &copy.wal_last);
        return Err(format!("its WAL cannot reach from {first} to {last}"));
    }
    Ok(Stretch {
        id,
        copy,
        first,
        last,
        timelines: (oldest..=newest).rev().collect(),
    })
}

/// Reads and checks them. Returns how many there were.
///
/// # Errors
/// [`CatalogError::Store`] if the store as a whole cannot be asked.
pub(super) async fn read(context: &Context<'_>, wanted: &[Wanted]) -> Result<u64, CatalogError> {
    each(wanted, context.verify.jobs.max(1), |wanted| {
        one(context, wanted)
    })
    .await?;
    Ok(wanted.len() as u64)
}

async fn one(context: &Context<'_>, wanted: &Wanted) -> Result<(), CatalogError> {
    let (what, absent) = match fetch(context, wanted).await {
        Ok(stored) => match wanted.plain_bytes {
            Some(plain) if plain != stored.plain_bytes => {
                let its = stored.plain_bytes;
                let what = format!("it has {its} plain bytes, segments of this node have {plain}");
                (what, false)
            }
            _ => return Ok(()),
        },
        Err(error) => {
            let absent = error.is_absent();
            (context.of_object(error).await?, absent)
        }
    };
    let mut lost = BTreeSet::new();
    for id in &wanted.backups {
        if !context.is_there(&keys::tombstone(id)).await? {
            lost.insert(id.clone());
        }
    }
    if absent && lost.is_empty() {
        // It was removed since the listing, when nobody needed it any more.
        return Ok(());
    }
    let finding = Finding::damage(&wanted.file.key(), what).of_node(wanted.file.node);
    context.add(finding.losing(&lost));
    Ok(())
}

async fn fetch(context: &Context<'_>, wanted: &Wanted) -> Result<StoredWal, CatalogError> {
    let downloader = &context.verify.downloader;
    let mut attempt = 1;
    loop {
        downloader.admit(wanted.stored_bytes).await?;
        let mut sink = Discard::default();
        let moved = Arc::clone(&sink.0);
        let read = get_segment(&*context.store, &wanted.file, &mut sink);
        let read = tokio::select! {
            read = read => read,
            () = stalled(&moved) => {
                let message = format!("nothing came for {} s", STALL.as_secs());
                let detail = Detail::new("get", wanted.file.key().as_str(), message);
                Err(StoreError::Unavailable(detail).into())
            }
            () = downloader.cancel().cancelled() => return Err(PipelineError::Cancelled.into()),
        };
        match read {
            Ok(stored) => {
                downloader.count(stored.stored_bytes);
                return Ok(stored);
            }
            Err(CatalogError::Store(error))
                if error.retry() != Retry::Permanent && attempt < TRIES =>
            {
                attempt += 1;
                tokio::time::sleep(Duration::from_millis(200) * attempt).await;
            }
            Err(error) => return Err(error),
        }
    }
}

async fn stalled(moved: &AtomicU64) {
    let mut seen = moved.load(Ordering::Relaxed);
    loop {
        tokio::time::sleep(STALL).await;
        let now = moved.load(Ordering::Relaxed);
        if now == seen {
            return;
        }
        seen = now;
    }
}

/// Where plain bytes go that nobody keeps; counts them.
#[derive(Debug, Default)]
struct Discard(Arc<AtomicU64>);

impl AsyncWrite for Discard {
    fn poll_write(
        self: Pin<&mut Self>,
        _: &mut TaskContext<'_>,
        bytes: &[u8],
    ) -> Poll<std::io::Result<usize>> {
        self.0.fetch_add(bytes.len() as u64, Ordering::Relaxed);
        Poll::Ready(Ok(bytes.len()))
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut TaskContext<'_>) -> Poll<std::io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, _: &mut TaskContext<'_>) -> Poll<std::io::Result<()>> {
        Poll::Ready(Ok(()))
    }
}
