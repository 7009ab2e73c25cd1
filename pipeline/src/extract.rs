//! A whole copy, or part of it, out of the store into files.
//!
//! The index is read and checked first, then pack after pack: ranges of about 8 MiB are fetched in order,
//! several in flight, and threads verify and decompress their frames and write the files' bytes where
//! they belong. A file with all its bytes gets its mode and goes to the threads that flush. Directories
//! come last, deepest first.

mod files;
mod plan;
mod sync;

use std::collections::BTreeMap;
use std::ops::Range;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::mpsc;
use tokio::task::JoinSet;

use crate::budget::{PartBuffer, Reserve};
use crate::download::{Downloader, PackReader};
use crate::error::{Fault, PipelineError};
use crate::frame::FrameDecoder;
use crate::index::Index;
use crate::pack::{FRAME_PLAIN_MAX, FRAMES_MAX, IndexEntry, PART_SIZE, PackInfo};
use crate::store::Key;
use crate::threads;

use files::Files;
use plan::{Piece, Plan};
pub(crate) use plan::{Slice, check_extents, slices_of};

/// How to extract.
#[derive(Debug, Clone, Copy)]
pub struct ExtractOptions {
    /// Threads that verify, decompress and write; 1 to 64.
    pub jobs: usize,
    /// Whether files get the modification times of the index.
    pub times: bool,
}

impl Default for ExtractOptions {
    fn default() -> Self {
        Self {
            jobs: 2,
            times: false,
        }
    }
}

/// What was made.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Extracted {
    /// Regular files.
    pub files: u64,
    /// Directories, those that were there already included.
    pub directories: u64,
    /// Symbolic links.
    pub links: u64,
    /// Plain bytes of the files.
    pub plain_bytes: u64,
}

/// How long a copy waits for others to give back memory of the pool before it is refused.
const PATIENCE: Duration = Duration::from_mins(1);
/// Bytes of memory that a frame of a table takes.
const TABLE_ENTRY: usize = 48;

/// Makes the directories, links and files of `index` where `map` says (`None`: not wanted), flushed to disk
/// when this returns. `map` is called once for every entry, in the order of paths; paths of entries are
/// relative and without `..`, where they end up is `map`'s own doing. Files and links must not exist;
/// directories may. All-zero frames become holes.
///
/// Takes one part (8 MiB), 1 MiB a job and 3 MiB of the budget, for which it waits up to a minute; more parts while the pool has
/// some.
///
/// # Errors
/// [`PipelineError::Damaged`] if anything stored is missing or not what was written, naming the object and the place;
/// [`PipelineError::Sink`] for local files. **What has been made by then is left for the caller to
/// remove**: it is not whole, and never looks it (a file with missing bytes keeps mode 0600 and may be short).
/// To stop it, fire the downloader's token: then no thread of it runs any more when this returns. A dropped future
/// leaves threads behind that end a little later.
pub async fn extract(
    downloader: &Downloader,
    index: &Index,
    packs: &[(Key, PackInfo)],
    options: ExtractOptions,
    map: impl FnMut(&IndexEntry) -> Result<Option<PathBuf>, PipelineError> + Send,
) -> Result<Extracted, PipelineError> {
    if !(1..=64).contains(&options.jobs) {
        let what = format!("{} jobs were asked for, 1 to 64 can be", options.jobs);
        return Err(PipelineError::Setup(what));
    }
    let extra = options.jobs * FRAME_PLAIN_MAX + FRAMES_MAX as usize * TABLE_ENTRY;
    let (budget, cancel) = (&downloader.budget, &downloader.cancel);
    let reserve = Reserve::within(PATIENCE, budget, 1, extra, "a restore", cancel).await?;
    let fault = Fault::new(downloader.cancel.child_token());
    // However this future ends, everything that it started ends too.
    let _guard = fault.token().clone().drop_guard();
    let job = Job {
        downloader: downloader.with_cancel(fault.token().clone()),
        reserve,
        fault: fault.clone(),
        options,
    };
    let outcome = job.run(index, packs, map).await;
    outcome.map_err(|error| fault.instead_of(error))
}

struct Job {
    downloader: Downloader,
    reserve: Reserve,
    fault: Fault,
    options: ExtractOptions,
}

/// Consecutive frames of a pack, fetched.
struct Fetched {
    pack: Arc<PackReader>,
    frames: Range<u32>,
    buffer: PartBuffer,
    /// Of the whole pack, sorted by frame.
    slices: Arc<Vec<Slice>>,
}

impl Job {
    async fn run(
        &self,
        index: &Index,
        packs: &[(Key, PackInfo)],
        map: impl FnMut(&IndexEntry) -> Result<Option<PathBuf>, PipelineError> + Send,
    ) -> Result<Extracted, PipelineError> {
        let reading = Plan::read(index, packs, map);
        let plan = crate::retry::or_cancelled(self.fault.token(), reading).await??;
        let Plan {
            tree,
            files,
            pieces,
            extracted,
        } = plan;
        let times = self.options.times;
        let meter = Arc::clone(&self.downloader.meter);
        let tree = threads::spawn("make-directories", move || tree.make().map(|()| tree))?;
        let tree = tree.join().await??;
        let (syncing, to_sync) = sync::start(&self.fault)?;
        let files = Arc::new(Files::new(files, times, meter, syncing));
        let (fetched, receiver) = mpsc::channel(1);
        let workers = self.start_workers(&files, receiver)?;
        let fetching = self.fetch_all(packs, pieces, &files, fetched).await;
        self.note(fetching);
        // Also after an error every thread is waited for: the caller is about to remove their files.
        for worker in workers {
            self.note(worker.join().await);
        }
        // The last sender: the threads that flush end when their queue is empty.
        drop(files);
        for syncer in to_sync {
            self.note(syncer.join().await);
        }
        self.fault.check()?;
        self.downloader.meter.add_files(tree.empty_files());
        let finish = threads::spawn("sync-directories", move || tree.finish(times))?;
        finish.join().await??;
        self.fault.check()?;
        Ok(extracted)
    }

    fn note(&self, outcome: Result<(), PipelineError>) {
        if let Err(error) = outcome {
            self.fault.fail(error);
        }
    }

    async fn fetch_all(
        &self,
        packs: &[(Key, PackInfo)],
        mut pieces: BTreeMap<u32, Vec<Piece>>,
        files: &Files,
        fetched: mpsc::Sender<Fetched>,
    ) -> Result<(), PipelineError> {
        for (key, info) in packs {
            if let Some(pieces) = pieces.remove(&info.number) {
                self.fetch_pack(key, info, pieces, files, &fetched).await?;
            }
        }
        Ok(())
    }

    fn start_workers(
        &self,
        files: &Arc<Files>,
        receiver: mpsc::Receiver<Fetched>,
    ) -> Result<Vec<threads::Worker<()>>, PipelineError> {
        let receiver = Arc::new(std::sync::Mutex::new(receiver));
        let start = |number: usize| {
            let worker = Worker {
                receiver: Arc::clone(&receiver),
                files: Arc::clone(files),
                fault: self.fault.clone(),
            };
            let guard = PanicGuard(self.fault.clone(), format!("extract-{number}"));
            threads::spawn(&format!("extract-{number}"), move || {
                let guard = guard;
                if let Err(error) = worker.run() {
                    guard.0.fail(error);
                }
            })
        };
        (0..self.options.jobs).map(start).collect()
    }

    /// Hands all ranges of one pack to the workers, in order, as many in flight as the budget allows.
    async fn fetch_pack(
        &self,
        key: &Key,
        info: &PackInfo,
        pieces: Vec<Piece>,
        files: &Files,
        fetched: &mpsc::Sender<Fetched>,
    ) -> Result<(), PipelineError> {
        let pack = PackReader::open(&self.downloader, key, info).await?;
        let mut slices = Vec::new();
        for piece in pieces {
            let path = files.path(piece.file);
            let path = path.to_string_lossy();
            let (file, at) = (piece.file, piece.file_offset);
            slices.extend(slices_of(&pack, &path, file, at, &piece.extent)?);
        }
        slices.sort_unstable_by_key(|slice| slice.frame);
        let slices = Arc::new(slices);
        let mut flights = JoinSet::new();
        for frames in ranges(&pack, &slices) {
            let mut buffer = self.reserve.buffer(self.fault.token()).await?;
            let (fault, fetched) = (self.fault.clone(), fetched.clone());
            let (pack, slices) = (Arc::clone(&pack), Arc::clone(&slices));
            flights.spawn(async move {
                let outcome = pack.fetch(&frames, &mut buffer).await;
                if let Err(error) = outcome {
                    fault.fail(error);
                    return;
                }
                let range = Fetched {
                    pack,
                    frames,
                    buffer,
                    slices,
                };
                // Closed only if the workers have stopped, and they have said why.
                let _ = fetched.send(range).await;
            });
            while flights.try_join_next().is_some() {}
        }
        // The next pack's table is fetched only now, so that one table at a time is in memory.
        while let Some(landed) = flights.join_next().await {
            landed.map_err(|_| PipelineError::Panicked {
                thread: "fetch of a range".into(),
            })?;
        }
        self.fault.check()
    }
}

/// Runs of consecutive frames that are needed, each of at most one part of stored bytes.
fn ranges(pack: &PackReader, slices: &[Slice]) -> Vec<Range<u32>> {
    let stored = |frame: u32| {
        pack.table()
            .stamp(frame)
            .map_or(0, |stamp| stamp.stored_len)
    };
    let mut ranges: Vec<Range<u32>> = Vec::new();
    let mut bytes = 0;
    for slice in slices {
        let frame = slice.frame;
        let more = stored(frame) as usize;
        match ranges.last_mut() {
            Some(range) if range.contains(&frame) => {}
            Some(range) if range.end == frame && bytes + more <= PART_SIZE => {
                range.end += 1;
                bytes += more;
            }
            _ => {
                ranges.push(frame..frame + 1);
                bytes = more;
            }
        }
    }
    ranges
}

/// Reports a panic of its thread while the others still wait for it.
struct PanicGuard(Fault, String);

impl Drop for PanicGuard {
    fn drop(&mut self) {
        if std::thread::panicking() {
            let thread = std::mem::take(&mut self.1);
            self.0.fail(PipelineError::Panicked { thread });
        }
    }
}

struct Worker {
    receiver: Arc<std::sync::Mutex<mpsc::Receiver<Fetched>>>,
    files: Arc<Files>,
    fault: Fault,
}

impl Worker {
    fn run(self) -> Result<(), PipelineError> {
        let mut decoder = FrameDecoder::new()?;
        loop {
            // One thread waits for the channel, the others for the lock: each range goes to one.
            let fetched = {
                let receiver = self.receiver.lock();
                let mut receiver = receiver.unwrap_or_else(std::sync::PoisonError::into_inner);
                receiver.blocking_recv()
            };
            let Some(fetched) = fetched else {
                return Ok(());
            };
            self.write(&fetched, &mut decoder)?;
        }
    }

    fn write(&self, fetched: &Fetched, decoder: &mut FrameDecoder) -> Result<(), PipelineError> {
        let Fetched {
            pack,
            frames,
            buffer,
            slices,
        } = fetched;
        let begin = slices.partition_point(|slice| slice.frame < frames.start);
        let mut rest = slices.get(begin..).unwrap_or_default();
        for frame in frames.clone() {
            if self.fault.token().is_cancelled() {
                return Err(PipelineError::Cancelled);
            }
            let plain = pack.decode(frame, frames.start, buffer.as_ref(), decoder)?;
            let count = rest.partition_point(|slice| slice.frame == frame);
            let (now, later) = rest.split_at(count);
            for slice in now {
                self.files.write(slice, slice.of(plain))?;
            }
            rest = later;
        }
        Ok(())
    }
}
