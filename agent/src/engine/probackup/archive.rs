//! The archive that a PAGE reads: the node's WAL since the start of its parent, out of the bucket.
//!
//! `pg_probackup` looks for it below `wal/INSTANCE` of its catalog. It begins its backup, goes on to the next segment, waits until the one with its
//! start is in the archive, and reads all from its parent's start to its own (backup.c, `wait_wal_lsn`; parsexlog.c, `extractPageMap`).
//! So the agent has to ship WAL all the time; what is not in the bucket yet when the program starts appears when it is.

use std::collections::BTreeSet;
use std::convert::Infallible;
use std::future::pending;
use std::sync::Arc;
use std::time::Duration;

use agent_api::{ApiError, BackupSpec, ChainLink, ErrorKind};
use agent_wal::{SegmentName, SegmentSize};
use catalog::Catalog;
use catalog::error::CatalogError;
use catalog::model::{BackupMode, Epoch, StreamedWal};
use catalog::wal::{WalFile, list_segments};
use pipeline::budget::Budget;
use pipeline::store::{ObjectStore, StoreError};
use tokio::time::{sleep, timeout};

use super::arguments::INSTANCE;
use super::chain::Parents;
use super::preflight::late;
use crate::catalog_fs::CatalogFs;
use crate::catalog_fs::stored::StoredLower;
use crate::engine::attempt::{Attempt, cancelled};
use crate::engine::errors;
use crate::engine::node::Node;
use crate::operation::OperationContext;

/// For one question to the store.
const STORE: Duration = Duration::from_mins(2);
/// How often a segment is looked for that is not there yet.
const LOOK: Duration = Duration::from_millis(500);

/// The first segment that a PAGE on `link` reads.
fn first(link: &ChainLink, size: SegmentSize) -> Result<SegmentName, ApiError> {
    let start: agent_wal::Lsn = link.node.start_lsn.parse().map_err(errors::internal)?;
    Ok(SegmentName::of_lsn(link.node.timeline, start, size))
}

async fn listed(store: &dyn ObjectStore, of: &BackupSpec) -> Result<BTreeSet<String>, ApiError> {
    let listed = timeout(STORE, list_segments(store, of.node_id, &of.epoch));
    let listed = listed.await.map_err(|_| late(STORE))?;
    let listed = listed.map_err(errors::catalog)?;
    Ok(listed.iter().map(|found| found.name.to_string()).collect())
}

/// Checks that the WAL since the parent's start is in the bucket, or will be: the agent has to ship it all the time.
///
/// # Errors
/// [`ErrorKind::Conflict`] with what is missing.
pub(super) async fn reaches(
    cx: &OperationContext,
    spec: &BackupSpec,
    node: &Node,
    link: &ChainLink,
) -> Result<(), ApiError> {
    let refused = |what: String| {
        let message = format!(
            "a PAGE reads all WAL since the start of backup {}, and {what}",
            link.backup_id
        );
        ApiError::new(ErrorKind::Conflict, message).next(
            "use -b DELTA; where WAL is shipped all the time (`gs_pitr wal start`) a PAGE can build on that one",
        )
    };
    let stream = cx.wal.stream(spec.node_id, &spec.epoch);
    let stream = stream.map_err(|error| {
        refused(format!(
            "the agent does not ship it all the time: {}",
            error.message
        ))
    })?;
    let size = node.segment_size();
    let mut next = first(link, size)?;
    if next >= stream.first_segment() {
        return Ok(());
    }
    let names = listed(&*cx.store, spec).await?;
    while next < stream.first_segment() {
        let name = next.format(size);
        if !names.contains(&name) {
            return Err(refused(format!("the bucket has not the segment {name}")));
        }
        next = next.next();
    }
    Ok(())
}

/// How many segments can be in memory for a PAGE.
pub(super) fn kept(attempt: &Attempt<'_>) -> u32 {
    let segment = attempt.node.segment_size().in_memory();
    let share = attempt.cx.budget.total_bytes() / 4 / segment;
    u32::try_from(share).map_or(StoredLower::SEGMENTS_KEPT, |share| {
        share.clamp(1, StoredLower::SEGMENTS_KEPT)
    })
}

/// Memory for so many, and for nothing else: the program cannot go on without the next one, so it must not be what others wait for, too.
///
/// # Errors
/// If so much is not free.
pub(super) fn memory(attempt: &Attempt<'_>) -> Result<Budget, ApiError> {
    let segment = attempt.node.segment_size().in_memory();
    let bytes = segment.saturating_mul(kept(attempt) as usize);
    let memory = attempt.cx.budget.part(bytes, "the WAL that a PAGE reads");
    memory.map_err(errors::pipeline)
}

/// How many threads of the program may read them. Each needs two, for a record that goes on in the next one: with fewer in memory they
/// would be fetched again and again.
pub(super) fn readers(attempt: &Attempt<'_>) -> u32 {
    attempt.spec.jobs.clamp(1, (kept(attempt) / 2).max(1))
}

/// What is shown to a PAGE.
pub(super) struct Archive<'a> {
    attempt: &'a Attempt<'a>,
    lower: Arc<StoredLower>,
    epochs: Arc<Vec<Epoch>>,
    next: SegmentName,
    /// What was there when it began.
    there: BTreeSet<String>,
}

impl<'a> Archive<'a> {
    /// The archive of a PAGE; `None` for anything else.
    ///
    /// # Errors
    /// What the store says.
    pub(super) async fn open(
        attempt: &'a Attempt<'a>,
        parents: &Parents,
    ) -> Result<Option<Self>, ApiError> {
        let (cx, spec) = (attempt.cx, attempt.spec);
        let (Some(link), Some(lower)) = (spec.chain.last(), parents.stored()) else {
            return Ok(None);
        };
        if spec.mode != BackupMode::Page {
            return Ok(None);
        }
        let epochs = async {
            let catalog = Catalog::open(Arc::clone(&cx.store)).await?;
            catalog.epoch_chain(spec.node_id, &spec.epoch).await
        };
        let reading = async {
            let epochs = timeout(STORE, epochs).await.map_err(|_| late(STORE))?;
            let epochs = epochs.map_err(errors::catalog)?;
            Ok::<_, ApiError>((epochs, listed(&*cx.store, spec).await?))
        };
        let (epochs, there) = tokio::select! {
            biased;
            () = attempt.work.cancelled() => return Err(cancelled()),
            read = reading => read?,
        };
        Ok(Some(Self {
            attempt,
            lower,
            epochs: Arc::new(epochs),
            next: first(link, attempt.node.segment_size())?,
            there,
        }))
    }

    /// Shows the segments of an archive, if there is one, in `fs`, each when it is there. One that never comes ends the
    /// program's patience: it names it.
    pub(super) async fn appear(archive: Option<Self>, fs: &CatalogFs) -> Infallible {
        match archive {
            Some(archive) => archive.show_all(fs).await,
            None => pending().await,
        }
    }

    async fn show_all(mut self, fs: &CatalogFs) -> Infallible {
        let size = self.attempt.node.segment_size();
        loop {
            let segment = self.next.format(size);
            match self.has(&segment).await {
                Ok(true) => {
                    if let Err(error) = self.show(fs, &segment, size) {
                        tracing::error!(segment, %error, "a WAL segment cannot be shown");
                        return pending().await;
                    }
                    self.next = self.next.next();
                }
                Ok(false) => sleep(LOOK).await,
                Err(error) => {
                    tracing::info!(segment, %error, "looking for a WAL segment again");
                    sleep(LOOK).await;
                }
            }
        }
    }

    async fn has(&self, segment: &str) -> Result<bool, CatalogError> {
        if self.there.contains(segment) {
            return Ok(true);
        }
        let spec = self.attempt.spec;
        let file = WalFile {
            node: spec.node_id,
            epoch: spec.epoch.clone(),
            name: segment.parse()?,
        };
        let found = timeout(STORE, self.attempt.cx.store.head(&file.key())).await;
        match found {
            Ok(Ok(_)) => Ok(true),
            Ok(Err(StoreError::NotFound(_))) | Err(_) => Ok(false),
            Ok(Err(error)) => Err(error.into()),
        }
    }

    fn show(&self, fs: &CatalogFs, segment: &str, size: SegmentSize) -> Result<(), ApiError> {
        let wal = StreamedWal {
            path: format!("wal/{INSTANCE}/{segment}"),
            segment: segment.to_owned(),
            size: size.bytes(),
        };
        let entry = self.lower.segment(&self.epochs, &wal)?;
        fs.show(&entry).map_err(errors::internal)
    }
}
