//! What a backup needs besides names: lanes, WAL, the index.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use agent_wal::SegmentSize;
use pipeline::budget::Budget;
use pipeline::error::PipelineError;
use pipeline::index::{FileId, IndexBuilder};
use pipeline::meter::Meter;
use pipeline::pack::{Lane, PackSet};
use pipeline::upload::Uploader;
use tokio::runtime::Handle;
use tokio_util::sync::{CancellationToken, DropGuard};

use super::error::{Failure, FsError};
use super::faults::Faults;
use super::lanes::{LaneThread, Lanes, Room};
use super::memory::Quota;
use super::stream::Taken;
use super::tree::{Data, Node};
use super::wal::{CacheSize, Wal, WalSink};
use super::{CatalogFs, Ino, Lower, LowerEntry};

const MIB: usize = 1 << 20;
/// What answers that wait may have brought beyond the limit: sixteen threads' writes and the WAL receiver's.
const OVERDRAFT: usize = 5 * MIB / 2;
/// Room for streams.
const STREAMS_LEAST: usize = 5 * MIB / 2;
const STREAMS_MOST: usize = 32 * MIB;
/// Room for small files.
const SMALL: usize = MIB;
/// Windows of WAL that is read back.
const WINDOWS: usize = 2;
/// More segments than three bring nothing: one is written, and two are on their way. Small ones may be more: they come faster.
const SEGMENTS_MOST: usize = 3;
const SEGMENT_BYTES: usize = 48 * MIB;
/// The most memory that is taken.
const MOST: usize = 96 * MIB;

/// What a copy is written with.
#[derive(Debug)]
pub struct BackupSide {
    /// For the index; its counters are the operation's.
    pub uploader: Uploader,
    /// The packs.
    pub packs: PackSet,
    /// All their lanes.
    pub lanes: Vec<Lane>,
    /// An empty index.
    pub index: Arc<IndexBuilder>,
    /// The process's memory.
    pub budget: Budget,
    /// The server's WAL segments.
    pub segment_size: SegmentSize,
    /// Where complete segments go.
    pub wal: Arc<dyn WalSink>,
    /// The backups that this one builds on.
    pub entries: Vec<LowerEntry>,
    /// Their bytes.
    pub lower: Arc<dyn Lower>,
    /// Ends the copy.
    pub cancel: CancellationToken,
}

impl BackupSide {
    /// The least memory that [`CatalogFs::for_backup`] takes, in bytes: one WAL segment and about 8 MiB. What else lives on the budget at
    /// that time must leave so much free, and the lanes still want parts: choose their number by this.
    #[must_use]
    pub fn least_bytes(segment_size: SegmentSize) -> usize {
        Shares::least(segment_size.in_memory()).total()
    }
}

/// How memory is divided, in bytes.
#[derive(Debug, Clone, Copy)]
struct Shares {
    streams: usize,
    segments: usize,
    cache: usize,
}

impl Shares {
    fn least(segment: usize) -> Self {
        Self {
            streams: STREAMS_LEAST,
            segments: segment,
            cache: WINDOWS * (segment / 16).clamp(MIB / 2, 4 * MIB),
        }
    }

    /// At least the least, else what fits in `bytes`.
    fn of(bytes: usize, segment: usize) -> Self {
        let mut shares = Self::least(segment);
        let left = |shares: &Self| bytes.saturating_sub(shares.total());
        // First streams that do not wait for each other, then a second segment, then more of both.
        shares.streams += left(&shares).min(8 * MIB);
        let most = (SEGMENTS_MOST * segment).max(SEGMENT_BYTES);
        while left(&shares) >= segment && shares.segments + segment <= most {
            shares.segments += segment;
        }
        shares.streams += left(&shares).min(STREAMS_MOST - shares.streams);
        shares
    }

    fn total(&self) -> usize {
        self.streams + self.segments + self.cache + OVERDRAFT + SMALL
    }
}

/// The writing side of a file system.
#[derive(Debug)]
pub(super) struct Backup {
    pub(super) lanes: Lanes,
    pub(super) wal: Arc<Wal>,
    pub(super) index: Arc<IndexBuilder>,
    pub(super) uploader: Uploader,
    /// Streams that have collected bytes.
    pending: Mutex<HashMap<Ino, Arc<Node>>>,
    end: Mutex<Option<End>>,
    faults: Arc<Faults>,
    _watch: DropGuard,
}

/// What is needed once, at the end.
#[derive(Debug)]
pub(super) struct End {
    pub(super) packs: PackSet,
    pub(super) threads: Vec<LaneThread>,
}

pub(super) fn start(side: BackupSide) -> Result<Arc<CatalogFs>, Failure> {
    let runtime = Handle::try_current();
    let runtime = runtime.map_err(|error| PipelineError::Setup(error.to_string()))?;
    let segment = side.segment_size.in_memory();
    let shares = Shares::of((side.budget.free_bytes() / 2).min(MOST), segment);
    let lease = side
        .budget
        .reserve(shares.total(), "the mount of a backup")?;
    let faults = Faults::new();
    let room = Room::new(shares.streams, false);
    let segments = Room::new(shares.segments, true);
    faults.closes(&room);
    faults.closes(&segments);
    let quota = Quota::new(SMALL);
    let mut fs = CatalogFs::new(side.entries, side.lower, quota, Arc::clone(&faults), lease)?;
    let cache = CacheSize {
        window: (shares.cache / WINDOWS) as u64,
        windows: WINDOWS,
    };
    let wal = Wal::start(
        side.segment_size.bytes(),
        segments,
        side.wal,
        cache,
        Arc::clone(&faults),
        runtime.clone(),
    );
    let (lanes, threads) = Lanes::start(side.lanes, &side.index, &room, &faults)?;
    let stop = CancellationToken::new();
    runtime.spawn(watch(
        &side.packs,
        side.cancel,
        stop.clone(),
        Arc::clone(&faults),
    ));
    fs.backup = Some(Backup {
        lanes,
        wal,
        index: side.index,
        uploader: side.uploader,
        pending: Mutex::default(),
        end: Mutex::new(Some(End {
            packs: side.packs,
            threads,
        })),
        faults,
        _watch: stop.drop_guard(),
    });
    Ok(Arc::new(fs))
}

/// Tells everybody of the first error of an upload, which no lane may notice for long, and of a cancel.
fn watch(
    packs: &PackSet,
    cancel: CancellationToken,
    stop: CancellationToken,
    faults: Arc<Faults>,
) -> impl Future<Output = ()> + Send + use<> {
    let failed = packs.failed();
    async move {
        tokio::select! {
            biased;
            () = stop.cancelled() => {}
            error = failed => faults.poison(error.into()),
            () = cancel.cancelled() => faults.poison(PipelineError::Cancelled.into()),
        }
    }
}

impl Backup {
    pub(super) fn new_file(&self) -> Result<FileId, FsError> {
        self.index.unnamed().map_err(|_| FsError::NoSpace)
    }

    /// What went wrong first.
    pub(super) fn failure(&self) -> Failure {
        self.faults.first().unwrap_or(Failure::Closed)
    }

    pub(super) fn meter(&self) -> &Meter {
        self.uploader.meter()
    }

    pub(super) fn pending(&self) -> MutexGuard<'_, HashMap<Ino, Arc<Node>>> {
        self.pending.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn end(&self) -> MutexGuard<'_, Option<End>> {
        self.end.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Accounts for what a stream took, and keeps the lanes busy. Hold no node's lock.
    pub(super) fn took(&self, node: &Arc<Node>, taken: Taken) {
        // First: whoever finds that there is too much must find all that was counted.
        self.pending().insert(node.ino, Arc::clone(node));
        let over = self.lanes.room().charge(taken.charge);
        self.lanes.submit(taken.jobs);
        if over {
            self.relieve();
        }
    }

    /// Hands on the largest collections until all together hold no more than half of the room. The other half, and
    /// what is beyond the limit, is in jobs then, and will be free.
    fn relieve(&self) {
        let held = |node: &Node| match &node.state().data {
            Data::Stream(stream) => stream.held(),
            _ => 0,
        };
        let nodes: Vec<_> = self.pending().values().cloned().collect();
        let sized = nodes.into_iter().map(|node| (held(&node), node));
        let mut sized: Vec<_> = sized.collect();
        sized.sort_by_key(|(held, _)| std::cmp::Reverse(*held));
        let mut all: usize = sized.iter().map(|(held, _)| held).sum();
        for (held, node) in sized {
            if all <= self.lanes.room().limit() / 2 {
                return;
            }
            self.hand_on(&node);
            all -= held;
        }
    }

    /// Hands on what a stream has collected, as little as it may be.
    pub(super) fn hand_on(&self, node: &Node) {
        // First: what is written from here on puts it back.
        self.pending().remove(&node.ino);
        let jobs = match &mut node.state().data {
            Data::Stream(stream) => stream.hand_on(),
            _ => return,
        };
        self.lanes.submit(jobs);
    }

    /// Hands on everything.
    pub(super) fn hand_on_all(&self) {
        let nodes: Vec<_> = self.pending().values().cloned().collect();
        for node in nodes {
            self.hand_on(&node);
        }
    }

    /// Sends a segment on its way, if it has its size.
    pub(super) fn complete(&self, node: &Arc<Node>, name: &str) {
        let bytes = match &mut node.state().data {
            Data::Segment(segment) => segment.complete(name),
            _ => None,
        };
        if let Some(bytes) = bytes {
            self.wal.put(Arc::clone(node), name.to_owned(), bytes);
        }
    }
}
