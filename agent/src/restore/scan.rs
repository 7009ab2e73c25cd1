//! WAL from the copy's start to the point, read before any server replays it.
//!
//! It proves that all of it is there, unbroken, and ends in the point's own record, and it finds the
//! tablespaces that replay would create at paths of the source. The first segments stay in the spool for the
//! server, so that they are not fetched twice.

use std::collections::{BTreeSet, HashMap};
use std::fs;
use std::path::Path;
use std::thread;

use agent_api::{ApiError, ErrorKind, RestoreSpec};
use agent_wal::kind::{create_tablespace, restore_point};
use agent_wal::record::{ReaderOptions, Record, RecordReader, Step};
use agent_wal::{Lsn, SegmentName};
use futures_util::{StreamExt as _, TryStreamExt as _, stream};
use pipeline::budget::{Budget, BudgetLease};
use tokio::sync::{mpsc, oneshot};
use tokio_util::sync::CancellationToken;

use super::errors::{cancelled, local, of_pipeline};
use super::tablespaces::Created;
use super::target::Plan;
use super::walserve::{Spooled, WalSource};
use crate::walget::WalFile;

/// Most bytes of segments kept for the server.
pub(super) const KEPT: u64 = 512 << 20;
/// Segments fetched at the same time.
const FETCHES: usize = 3;

/// What the WAL does up to the point.
#[derive(Debug, Default)]
pub(super) struct Scanned {
    /// Tablespaces it creates, by location.
    pub(super) created: BTreeSet<Created>,
    /// Segments that are in the spool.
    pub(super) spooled: HashMap<WalFile, Spooled>,
}

/// A segment on its way to the reading thread.
struct Fed {
    number: u64,
    bytes: Bytes,
}

/// Its bytes, and what they were taken from.
struct Bytes {
    bytes: Vec<u8>,
    _lease: Option<BudgetLease>,
}

impl AsRef<[u8]> for Bytes {
    fn as_ref(&self) -> &[u8] {
        &self.bytes
    }
}

/// Fetches and reads the WAL.
///
/// # Errors
/// [`ErrorKind::Damaged`] if it does not lead to the point; what the store says.
pub(super) async fn scan(
    wal: &impl WalSource,
    plan: &Plan,
    spec: &RestoreSpec,
    spool: &Path,
    budget: &Budget,
    cancel: &CancellationToken,
) -> Result<Scanned, ApiError> {
    let (segments, receiver) = mpsc::channel(1);
    let (answer, read) = oneshot::channel();
    let reading = Reading::new(plan, spec);
    let thread = thread::Builder::new().name("wal-scan".to_owned());
    thread
        .spawn(move || {
            // Nobody waits for the answer if the scan was dropped.
            let _ = answer.send(reading.run(receiver));
        })
        .map_err(|error| ApiError::new(ErrorKind::Internal, format!("a thread: {error}")))?;
    let fetched = tokio::select! {
        fetched = fetch(wal, plan, spool, budget, cancel, segments) => fetched?,
        () = cancel.cancelled() => return Err(cancelled()),
    };
    let read = read.await;
    let created =
        read.map_err(|_| ApiError::new(ErrorKind::Internal, "the thread `wal-scan` ended"))??;
    Ok(Scanned {
        created,
        spooled: fetched,
    })
}

/// Fetches the segments and hands them to the reading thread, until it has seen enough.
async fn fetch(
    wal: &impl WalSource,
    plan: &Plan,
    spool: &Path,
    budget: &Budget,
    cancel: &CancellationToken,
    segments: mpsc::Sender<Fed>,
) -> Result<HashMap<WalFile, Spooled>, ApiError> {
    let (first, last, size) = (plan.needed.first, plan.needed.last, plan.needed.size);
    let fetches = (first.number..=last.number).map(|number| async move {
        let name = SegmentName { number, ..first }.format(size);
        let path = spool.join(format!("{name}.scan"));
        let file = WalFile::Segment(name);
        let missing = || {
            let message = format!(
                "WAL segment {} is not in the bucket, and the point needs it",
                file.name()
            );
            ApiError::new(ErrorKind::Damaged, message)
                .next("run `gs_pitr show`, and restore another backup")
        };
        let length = wal.fetch(&file, &path).await?.ok_or_else(missing)?;
        Ok::<_, ApiError>((number, file, Spooled { path, size: length }))
    });
    let mut fetches = stream::iter(fetches).buffered(FETCHES);
    let mut spooled = HashMap::new();
    let mut kept = 0;
    while let Some((number, file, segment)) = fetches.try_next().await? {
        let room = usize::try_from(segment.size).unwrap_or(usize::MAX);
        // One segment is read at a time. Of those that are larger than the budget may ever give, one is
        // read all the same: clusters with segments of 1 GiB are rare, and have the memory.
        let lease = if room <= budget.total_bytes() / 2 {
            Some(
                budget
                    .acquire(room, cancel)
                    .await
                    .map_err(|error| of_pipeline(&error))?,
            )
        } else {
            None
        };
        let bytes = tokio::fs::read(&segment.path)
            .await
            .map_err(|e| local(&segment.path, &e))?;
        let bytes = Bytes {
            bytes,
            _lease: lease,
        };
        // Refused by a reader that has ended: its answer says why.
        if segments.send(Fed { number, bytes }).await.is_err() {
            break;
        }
        if kept + segment.size <= KEPT {
            kept += segment.size;
            spooled.insert(file, segment);
        } else {
            fs::remove_file(&segment.path).map_err(|error| local(&segment.path, &error))?;
        }
    }
    Ok(spooled)
}

/// What the reading thread looks for.
struct Reading {
    reader: RecordReader<Bytes>,
    end: Lsn,
    restore_point: String,
}

impl Reading {
    fn new(plan: &Plan, spec: &RestoreSpec) -> Self {
        let mut options = ReaderOptions::new(plan.segment_size);
        options.system_identifier = Some(spec.node.system_identifier);
        Self {
            reader: RecordReader::new(plan.start, options),
            end: plan.end,
            restore_point: spec.point.restore_point.clone(),
        }
    }

    /// Reads up to the point; the tablespaces that were created on the way.
    fn run(mut self, mut segments: mpsc::Receiver<Fed>) -> Result<BTreeSet<Created>, ApiError> {
        let mut created = BTreeSet::new();
        loop {
            match self.reader.step() {
                Step::Record(record) => {
                    created.extend(creates(&record));
                    if record.end >= self.end {
                        self.check_point(&record)?;
                        return Ok(created);
                    }
                }
                Step::NeedSegment(number) => {
                    let Some(fed) = segments.blocking_recv() else {
                        return Err(broken(&format!("segment {number} is missing")));
                    };
                    let given = self.reader.feed(fed.number, fed.bytes);
                    given.map_err(|error| broken(&error))?;
                }
                Step::End(end) => return Err(broken(&end)),
            }
        }
    }

    fn check_point(&self, record: &Record) -> Result<(), ApiError> {
        let found = restore_point(record).map(|point| point.name);
        if record.end == self.end && found.as_ref() == Some(&self.restore_point) {
            return Ok(());
        }
        Err(broken(&format!(
            "the record that ends at {} is not the restore point `{}` that should end at {}",
            record.end, self.restore_point, self.end
        )))
    }
}

fn creates(record: &Record) -> Option<Created> {
    let (oid, location) = create_tablespace(record)?;
    // Empty: in place, within the data directory.
    (location.as_os_str() != "").then_some(Created { location, oid })
}

fn broken(what: &impl std::fmt::Display) -> ApiError {
    ApiError::new(
        ErrorKind::Damaged,
        format!("the WAL in the bucket does not lead from the copy to the point: {what}"),
    )
    .next("run `gs_pitr show`, and restore another backup")
}
