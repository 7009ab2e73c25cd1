//! Doing what a plan says, in an order in which every step may be the last.

use std::collections::{BTreeMap, BTreeSet};
use std::time::SystemTime;

use futures_util::{StreamExt as _, TryStreamExt as _};
use jiff::Timestamp;
use pipeline::store::{Hold, Key, StoreError, VersionId};
use uuid::Uuid;

use super::holdings::is_gap;
use super::plan::{LostPoint, Plan, Removed, Why};
use super::{Stored, log};
use crate::envelope::{MANIFEST_LIMIT, OBJECT_LIMIT, sha256_hex};
use crate::error::CatalogError;
use crate::fence::Abandoned;
use crate::ids::BackupId;
use crate::keys;
use crate::model::{LogAction, Tombstone};
use crate::repo::Catalog;

/// Versions deleted with one request; between two it may be stopped.
const AT_ONCE: usize = 500;
/// Versions asked about at the same time.
const PARALLEL: usize = 16;

/// Who applies a plan.
pub trait Guard {
    /// What it fails with.
    type Error: From<CatalogError>;

    /// Proves, at the store, that the lease is still ours. Asked before each fence and tombstone.
    ///
    /// # Errors
    /// If it is not, or that cannot be known: then nothing more is done.
    fn prove(&self) -> impl Future<Output = Result<(), Self::Error>>;

    /// Asked before each request that deletes.
    ///
    /// # Errors
    /// If it is to stop.
    fn go_on(&self) -> Result<(), Self::Error>;

    /// Told after each.
    fn progress(&self, report: &Report) {
        let _ = report;
    }
}

/// A version that the store holds back.
#[derive(Debug, Clone)]
pub struct HeldBack {
    /// Its key.
    pub key: Key,
    /// Stored bytes.
    pub bytes: u64,
    /// What holds it.
    pub hold: Hold,
}

/// What was done.
#[derive(Debug, Clone, Default)]
pub struct Report {
    /// Backups fenced.
    pub fenced: Vec<BackupId>,
    /// Backups deleted: they have a tombstone.
    pub deleted: Vec<BackupId>,
    /// Deleted backups whose bytes stay for now, because somebody reads them.
    pub read: Vec<BackupId>,
    /// Points removed.
    pub points: usize,
    /// Versions deleted.
    pub versions: u64,
    /// Their stored bytes.
    pub bytes: u64,
    /// Uploads aborted.
    pub uploads: usize,
    /// What the store holds back.
    pub held: Vec<HeldBack>,
    /// The first refusal that no hold explains.
    pub refused: Option<StoreError>,
}

/// How it ended.
#[derive(Debug)]
pub enum Applied {
    /// All is done, but for what the report says.
    Done(Report),
    /// What the plan rests on has changed meanwhile: plan again. Nothing was deleted.
    Changed {
        /// What was fenced all the same.
        report: Report,
        /// In what way.
        why: String,
    },
}

/// Carries a plan out. `operation` holds the lease of scope `maintain`, `reason` goes into the tombstones.
///
/// # Errors
/// What the guard says; [`CatalogError::Store`]. What was done until then is done, and the next plan is the rest.
pub async fn apply<G: Guard>(
    catalog: &Catalog,
    plan: &Plan,
    operation: Uuid,
    reason: &str,
    guard: &G,
) -> Result<Applied, G::Error> {
    let mut work = Work {
        catalog,
        guard,
        operation,
        reason,
        report: Report::default(),
    };
    for dead in &plan.dead {
        guard.prove().await?;
        match catalog.abandon(&dead.id, dead.operation).await? {
            Abandoned::Fenced => work.report.fenced.push(dead.id.clone()),
            Abandoned::Complete(_) => {
                let report = work.report;
                let why = format!("backup {} was completed meanwhile", dead.id);
                return Ok(Applied::Changed { report, why });
            }
        }
    }
    if let Some(reader) = work.readers(plan).await?.first() {
        let report = work.report;
        let why = format!("backup {reader} is being read now");
        return Ok(Applied::Changed { report, why });
    }
    for removed in plan.removed.iter().filter(|it| it.why != Why::Leftover) {
        work.bury(removed).await?;
    }
    // A reader that pinned before it saw a tombstone goes on to its end.
    let readers = work.readers(plan).await?;
    work.report.read.clone_from(&readers);
    if readers.is_empty() {
        work.points(&plan.points).await?;
        work.gaps(&plan.wal).await?;
        work.remove(&plan.wal).await?;
    }
    for dead in &plan.dead {
        work.remove(&dead.objects).await?;
    }
    work.remove(&plan.litter).await?;
    for removed in plan.removed.iter().filter(|it| !readers.contains(&it.id)) {
        // The manifest last: it says what the others are, and which WAL and point were its own.
        let rest = work.remove(&removed.objects).await?;
        if rest && readers.is_empty() {
            work.remove(removed.manifest.as_slice()).await?;
        }
    }
    for (key, upload) in &plan.uploads {
        guard.go_on()?;
        let aborted = catalog.store().abort_upload(key, upload).await;
        aborted.map_err(CatalogError::from)?;
        work.report.uploads += 1;
        guard.progress(&work.report);
    }
    work.remove(&plan.journals).await?;
    work.remove(&plan.leases).await?;
    Ok(Applied::Done(work.report))
}

/// What of a plan the store holds back now, and until when: a forecast, for the eyes of who decides.
///
/// # Errors
/// [`CatalogError::Store`].
pub async fn holds(catalog: &Catalog, plan: &Plan) -> Result<Vec<HeldBack>, CatalogError> {
    let store = catalog.store();
    if !store.holds_objects().await? {
        return Ok(Vec::new());
    }
    let now = store.now().await?;
    let versions = plan.stored().flat_map(|stored| {
        let versions = stored.versions.iter();
        versions.map(|(version, bytes)| (&stored.key, version.as_ref(), *bytes))
    });
    let versions: Vec<_> = versions.collect();
    let asked = versions
        .into_iter()
        .map(|(key, version, bytes)| async move {
            let hold = hold(catalog, key, version, now).await?;
            Ok::<_, CatalogError>(hold.map(|hold| HeldBack {
                key: key.clone(),
                bytes,
                hold,
            }))
        });
    let asked = asked.collect::<Vec<_>>();
    let held: Vec<Option<HeldBack>> = futures_util::stream::iter(asked)
        .buffered(PARALLEL)
        .try_collect()
        .await?;
    Ok(held.into_iter().flatten().collect())
}

/// What holds a version, if it still does. Markers of deletions and what is gone are held by nothing.
async fn hold(
    catalog: &Catalog,
    key: &Key,
    version: Option<&VersionId>,
    now: SystemTime,
) -> Result<Option<Hold>, CatalogError> {
    match catalog.store().hold(key, version).await {
        Ok(hold) => Ok(hold.filter(|it| it.legal || it.until.is_some_and(|until| until > now))),
        // A marker answers 405.
        Err(StoreError::NotFound(_) | StoreError::Invalid(_)) => Ok(None),
        Err(error) => Err(error.into()),
    }
}

struct Work<'a, G> {
    catalog: &'a Catalog,
    guard: &'a G,
    operation: Uuid,
    reason: &'a str,
    report: Report,
}

impl<G: Guard> Work<'_, G> {
    /// Which of the plan's backups somebody reads.
    async fn readers(&self, plan: &Plan) -> Result<Vec<BackupId>, CatalogError> {
        let mut ids: Vec<BackupId> = plan.removed.iter().map(|it| it.id.clone()).collect();
        let mut read = Vec::new();
        while !ids.is_empty() {
            match self.catalog.check_unpinned(&ids).await {
                Ok(()) => break,
                Err(CatalogError::Pinned { id, .. }) => {
                    let (hit, rest) = ids.into_iter().partition(|it| it.as_str() == id);
                    (read, ids) = ([read, hit].concat(), rest);
                }
                Err(error) => return Err(error),
            }
        }
        Ok(read)
    }

    async fn bury(&mut self, removed: &Removed) -> Result<(), G::Error> {
        let key = keys::manifest(&removed.id);
        let manifest_sha256 = match self.catalog.fetch(&key, MANIFEST_LIMIT).await {
            Ok(stored) => Some(sha256_hex(&stored)),
            Err(error) if error.is_of_object() => None,
            Err(error) => return Err(error.into()),
        };
        self.guard.prove().await?;
        self.guard.go_on()?;
        let tombstone = Tombstone {
            backup_id: removed.id.clone(),
            manifest_sha256,
            operation: self.operation,
            reason: self.reason.to_owned(),
            at: Timestamp::now(),
            nonce: Uuid::new_v4(),
            extra: serde_json::Map::new(),
        };
        match self.catalog.bury(&tombstone).await {
            // One that cannot be read buries as well.
            Ok(_) | Err(CatalogError::Damaged { .. }) => {}
            Err(error) => return Err(error.into()),
        }
        self.report.deleted.push(removed.id.clone());
        self.guard.progress(&self.report);
        Ok(())
    }

    /// Says in the log that points go, and lets them go: one that is missing without an entry counts as lost.
    async fn points(&mut self, points: &[LostPoint]) -> Result<(), G::Error> {
        if points.is_empty() {
            return Ok(());
        }
        let said = self.said(&LogAction::PointRemoved).await?;
        for point in points {
            let key = &point.stored.key;
            if !said.contains(key.as_str()) {
                self.say_removed(key, LogAction::PointRemoved).await?;
            }
            // While the point is there, the next run finds what is left of both.
            let metadata = point.metadata.as_ref();
            self.remove(metadata.map_or(&[], std::slice::from_ref))
                .await?;
            if self.remove(std::slice::from_ref(&point.stored)).await? {
                self.report.points += 1;
            }
        }
        Ok(())
    }

    /// Says in the log that the gaps among what goes go.
    async fn gaps(&self, wal: &[Stored]) -> Result<(), G::Error> {
        let gaps: Vec<_> = wal.iter().filter(|it| is_gap(&it.key)).collect();
        if gaps.is_empty() {
            return Ok(());
        }
        let said = self.said(&LogAction::GapRemoved).await?;
        for gap in gaps {
            if !said.contains(gap.key.as_str()) {
                self.say_removed(&gap.key, LogAction::GapRemoved).await?;
            }
        }
        Ok(())
    }

    /// What the log calls removed: said once is enough, however often a run is stopped or a lock holds the object.
    async fn said(&self, action: &LogAction) -> Result<BTreeSet<String>, G::Error> {
        let said = log::entries(self.catalog).await?.into_iter();
        let said = said.filter(|entry| entry.action == *action);
        Ok(said.map(|entry| entry.object).collect())
    }

    async fn say_removed(&self, object: &Key, action: LogAction) -> Result<(), G::Error> {
        let stored = match self.catalog.fetch(object, OBJECT_LIMIT).await {
            Ok(stored) => stored,
            Err(error) if error.is_absent() => return Ok(()),
            Err(error) => return Err(error.into()),
        };
        self.guard.prove().await?;
        let sha256 = sha256_hex(&stored);
        let logged = self
            .catalog
            .append_log(action, object, &sha256, self.operation);
        logged.await?;
        Ok(())
    }

    /// Deletes all versions. `false`: some stay.
    async fn remove(&mut self, all: &[Stored]) -> Result<bool, G::Error> {
        let versions = all.iter().flat_map(|stored| {
            let versions = stored.versions.iter();
            versions.map(|(version, bytes)| ((stored.key.clone(), version.clone()), *bytes))
        });
        let versions: Vec<_> = versions.collect();
        let mut gone = true;
        for batch in versions.chunks(AT_ONCE) {
            self.guard.go_on()?;
            gone &= self.remove_batch(batch).await?;
            self.guard.progress(&self.report);
        }
        Ok(gone)
    }

    async fn remove_batch(
        &mut self,
        batch: &[((Key, Option<VersionId>), u64)],
    ) -> Result<bool, CatalogError> {
        let store = self.catalog.store();
        let bytes: BTreeMap<&(Key, Option<VersionId>), u64> = batch
            .iter()
            .map(|(version, bytes)| (version, *bytes))
            .collect();
        let versions: Vec<_> = batch.iter().map(|(version, _)| version.clone()).collect();
        let left = store.delete_versions(&versions).await?;
        let mut stay = BTreeSet::new();
        for undeleted in left {
            let version = (undeleted.key, undeleted.version);
            let now = store.now().await?;
            match hold(self.catalog, &version.0, version.1.as_ref(), now).await? {
                Some(hold) => self.report.held.push(HeldBack {
                    key: version.0.clone(),
                    bytes: bytes.get(&version).copied().unwrap_or_default(),
                    hold,
                }),
                None => {
                    self.report.refused.get_or_insert(undeleted.error);
                }
            }
            stay.insert(version);
        }
        let gone = bytes.iter().filter(|(version, _)| !stay.contains(*version));
        for (_, bytes) in gone {
            self.report.versions += 1;
            self.report.bytes += bytes;
        }
        Ok(stay.is_empty())
    }
}
