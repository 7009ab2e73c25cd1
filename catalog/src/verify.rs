//! Is everything in the bucket what was written, and is all of it there?
//!
//! Reads only. What is found comes as [`Finding`]s, one a fact; what can be mended safely comes with a [`Repair`].
//! The catalog may be in use meanwhile: what seems to be missing is asked for again before it is called missing,
//! and what a running operation makes is nobody's orphan.

mod backup;
mod finding;
mod inventory;
mod ledger;
mod lives;
mod metadata;
mod orphans;
mod points;
mod records;
mod repair;
mod rules;
mod segments;

use std::collections::{BTreeMap, BTreeSet};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use futures_util::StreamExt as _;
use pipeline::download::Downloader;
use pipeline::store::{Key, ObjectStore};

pub use finding::{Finding, Report, Severity};
pub use repair::{Repair, Repaired, put_back_repository};

use crate::error::CatalogError;
use crate::ids::BackupId;
use crate::keys;
use crate::mirror::Mirror;
use inventory::Inventory;
use records::Records;

/// Small objects fetched at the same time.
const PARALLEL: usize = 16;

/// What is to be verified.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Scope {
    /// Every object below the prefix.
    All,
    /// One backup and everything that it rests on; what other backups and operations left is not looked at.
    Backup(BackupId),
}

/// How closely.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Depth {
    /// Every stored byte is read.
    Full,
    /// Small objects are read; packs, indexes and WAL are looked for, and packs and indexes have the right size.
    Fast,
}

/// What happens while it runs.
#[derive(Debug)]
pub enum Event<'a> {
    /// So many stored bytes of packs, indexes and WAL will be read. The downloader's meter says how many were.
    Planned {
        /// Bytes.
        bytes: u64,
    },
    /// Something was found.
    Found(&'a Finding),
}

/// One verification.
#[derive(Debug)]
pub struct Verify {
    /// What is verified.
    pub scope: Scope,
    /// How closely.
    pub depth: Depth,
    /// Packs and WAL segments read at the same time, at least 1. A pack takes [`pipeline::check::PACK_CHECK_BYTES`]
    /// of the downloader's budget, so more than fit are not begun.
    pub jobs: usize,
    /// The way to the bytes, with its limits.
    pub downloader: Downloader,
    /// The local mirror, if there is one: it names a head of the log, and may have what the bucket has lost.
    pub mirror: Option<Mirror>,
}

/// What every step shares.
struct Context<'a> {
    verify: &'a Verify,
    store: Arc<dyn ObjectStore>,
    watch: &'a (dyn Fn(Event<'_>) + Sync),
    found: Mutex<Vec<Finding>>,
    /// Findings are kept until it is known which backups rest on what.
    holding: AtomicBool,
}

impl Context<'_> {
    fn found(&self) -> MutexGuard<'_, Vec<Finding>> {
        self.found.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn add(&self, finding: Finding) {
        if !self.holding.load(Ordering::Relaxed) {
            (self.watch)(Event::Found(&finding));
        }
        self.found().push(finding);
    }

    /// Says of every damaged object that was found which backups cannot be restored without it, and tells.
    fn release(&self, records: &Records) {
        self.holding.store(false, Ordering::Relaxed);
        for finding in self.found().iter_mut() {
            if finding.severity == Severity::Damage
                && let Ok(key) = Key::new(finding.key.as_str())
            {
                finding.lost.extend(records.resting_on(&key));
            }
            (self.watch)(Event::Found(finding));
        }
    }

    /// Whether something was found of this object already.
    fn is_named(&self, key: &Key) -> bool {
        self.found()
            .iter()
            .any(|finding| finding.key == key.as_str())
    }

    /// Objects with damage of which nothing says yet what to do about it.
    fn without_next(&self) -> BTreeSet<String> {
        let found = self.found();
        let open = found
            .iter()
            .filter(|finding| finding.severity == Severity::Damage && finding.next.is_none());
        open.map(|finding| finding.key.clone()).collect()
    }

    /// Says so.
    fn say_next(&self, words: &BTreeMap<String, &str>) {
        for finding in self.found().iter_mut() {
            if finding.severity == Severity::Damage && finding.next.is_none() {
                finding.next = words.get(&finding.key).map(ToString::to_string);
            }
        }
    }

    /// Takes back what was found of backups that were deleted since the listing: what they lack is meant to go.
    ///
    /// # Errors
    /// [`CatalogError::Store`].
    async fn forget_deleted(&self, records: &Records) -> Result<(), CatalogError> {
        let of_backup = |finding: &Finding| finding.backup.clone();
        let ids: BTreeSet<BackupId> = self.found().iter().filter_map(of_backup).collect();
        for id in ids {
            if !records.is_deleted(&id) && self.is_there(&keys::tombstone(&id)).await? {
                let other = |finding: &Finding| finding.backup.as_ref() != Some(&id);
                self.found().retain(other);
            }
        }
        Ok(())
    }

    /// Whether an object that the listing did not have is there after all, because it was made meanwhile.
    async fn is_there(&self, key: &Key) -> Result<bool, CatalogError> {
        match self.store.head(key).await {
            Ok(_) => Ok(true),
            Err(pipeline::store::StoreError::NotFound(_)) => Ok(false),
            Err(error) => Err(error.into()),
        }
    }
}

impl Verify {
    /// Verifies. `watch` hears of everything as it happens.
    ///
    /// # Errors
    /// [`CatalogError::Store`] if the store as a whole cannot be asked; [`CatalogError::NoRepository`] if there is
    /// nothing; [`CatalogError::NotFound`] if there is no backup of that id; [`CatalogError::NewerFormat`] if the
    /// repository's own format is newer than this program. What was found by then was told to `watch`.
    pub async fn run(&self, watch: &(dyn Fn(Event<'_>) + Sync)) -> Result<Report, CatalogError> {
        let context = Context {
            verify: self,
            store: Arc::clone(self.downloader.store()),
            watch,
            found: Mutex::default(),
            holding: AtomicBool::new(true),
        };
        let inventory = Inventory::list(&*context.store).await?;
        if inventory.is_empty() {
            let store = context.store.describe();
            return Err(CatalogError::NoRepository { store });
        }
        let all = self.scope == Scope::All;
        let records = Records::load(&context, &inventory).await?;
        let rests = rules::check(&context, &records);
        metadata::check(&context, &records).await?;
        let repairs = ledger::check(&context, &records).await?;
        context.forget_deleted(&records).await?;
        context.release(&records);
        let mut unrestorable = BTreeSet::new();
        if all {
            let live = lives::Live::find(&context, &records).await?;
            lives::check(&context, &inventory, &records, &live).await?;
            orphans::check(&context, &inventory, &records, &live).await?;
            metadata::orphans(&context, &records, &live).await?;
        }
        let checked = self
            .read_all(&context, &inventory, &records, &rests)
            .await?;
        lost(&context, &records, &rests, &mut unrestorable);
        let findings = std::mem::take(&mut *context.found());
        Ok(Report {
            findings,
            unrestorable,
            backups: rests.restorable.clone(),
            objects: records.count() + checked.objects,
            stored_bytes: checked.bytes,
            repairs,
        })
    }

    /// Packs, indexes and WAL.
    async fn read_all(
        &self,
        context: &Context<'_>,
        inventory: &Inventory,
        records: &Records,
        rests: &rules::Rests,
    ) -> Result<Checked, CatalogError> {
        let copies = backup::copies(records, rests);
        let wal = segments::needed(context, inventory, records, rests).await?;
        let mut bytes = wal.iter().map(|wanted| wanted.stored_bytes).sum::<u64>();
        bytes += copies
            .iter()
            .map(|copy| copy.node.stored_bytes)
            .sum::<u64>();
        if self.depth == Depth::Fast {
            return backup::sizes(context, inventory, &copies, wal.len() as u64).await;
        }
        (context.watch)(Event::Planned { bytes });
        let objects = backup::read(context, &copies).await?;
        let objects = objects + segments::read(context, &wal).await?;
        Ok(Checked { objects, bytes })
    }

    /// How many packs fit into the memory budget, at least one: if that does not fit, its check says so.
    fn packs_at_once(&self) -> usize {
        let fit = self.downloader.budget_bytes() / pipeline::check::PACK_CHECK_BYTES;
        self.jobs.min(fit).max(1)
    }
}

/// What was read of packs, indexes and WAL.
#[derive(Debug, Clone, Copy, Default)]
struct Checked {
    objects: u64,
    bytes: u64,
}

/// Adds the backups that what was found makes unrestorable, and those that build on them.
fn lost(
    context: &Context<'_>,
    records: &Records,
    rests: &rules::Rests,
    unrestorable: &mut BTreeSet<BackupId>,
) {
    unrestorable.extend(
        context
            .found()
            .iter()
            .flat_map(|finding| finding.lost.clone()),
    );
    loop {
        let builds_on = |id: &&BackupId| {
            let parent = records
                .manifest(id)
                .and_then(|manifest| manifest.parent.as_ref());
            parent.is_some_and(|parent| unrestorable.contains(parent))
                && !unrestorable.contains(*id)
        };
        let more: Vec<_> = rests.restorable.iter().filter(builds_on).cloned().collect();
        if more.is_empty() {
            return;
        }
        unrestorable.extend(more);
    }
}

/// Runs `work` for each item, at most `at_once` at a time. The first error ends it.
async fn each<I, T, F, Fut>(items: I, at_once: usize, work: F) -> Result<Vec<T>, CatalogError>
where
    I: IntoIterator,
    F: FnMut(I::Item) -> Fut,
    Fut: Future<Output = Result<T, CatalogError>>,
{
    let runs: Vec<_> = items.into_iter().map(work).collect();
    let mut running = futures_util::stream::iter(runs).buffer_unordered(at_once);
    let mut done = Vec::new();
    while let Some(result) = running.next().await {
        done.push(result?);
    }
    Ok(done)
}
