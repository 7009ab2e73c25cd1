//! The threads that compress and hash, the work that waits for them, and the memory that it takes.

use std::collections::VecDeque;
use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use bytes::Bytes;
use crossbeam_channel::{Receiver, Sender, unbounded};
use pipeline::error::PipelineError;
use pipeline::index::{FileId, FilePacker, IndexBuilder};
use pipeline::pack::{FRAME_PLAIN_MAX, Lane};
use tokio::sync::{Notify, oneshot};

use super::error::FsError;
use super::faults::Faults;

/// What a job costs at least, so that a great many small files are limited too.
const JOB_LEAST: usize = 1 << 10;

fn signed(bytes: usize) -> i64 {
    i64::try_from(bytes).unwrap_or(i64::MAX)
}

/// Called once, when there is room or never will be.
pub(super) type Waiter = Box<dyn FnOnce(Result<(), FsError>) + Send>;

/// The memory of bytes on their way to the lanes.
pub(super) struct Room {
    limit: i64,
    /// Whether nothing but jobs that end makes room: with none under way, waiting is of no use.
    by_jobs_only: bool,
    state: Mutex<RoomState>,
    idle: Notify,
}

#[derive(Default)]
struct RoomState {
    /// Bytes. Below zero for a moment when a job is done before what it held was counted.
    used: i64,
    /// Jobs that are not done.
    jobs: usize,
    waiting: VecDeque<Waiter>,
    closed: bool,
}

impl fmt::Debug for Room {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let state = self.state();
        f.debug_struct("Room")
            .field("limit", &self.limit)
            .field("used", &state.used)
            .field("jobs", &state.jobs)
            .finish_non_exhaustive()
    }
}

impl Room {
    pub(super) fn new(limit: usize, by_jobs_only: bool) -> Arc<Self> {
        Arc::new(Self {
            limit: signed(limit),
            by_jobs_only,
            state: Mutex::default(),
            idle: Notify::new(),
        })
    }

    fn state(&self) -> MutexGuard<'_, RoomState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Bytes that may be taken before answers wait.
    pub(super) fn limit(&self) -> usize {
        usize::try_from(self.limit).unwrap_or(0)
    }

    /// Counts memory that was taken; says whether it is more than there should be.
    pub(super) fn charge(&self, bytes: usize) -> bool {
        let mut state = self.state();
        state.used += signed(bytes);
        state.used > self.limit
    }

    /// Calls `waiter` when there is room: now, if there is.
    pub(super) fn answer(&self, waiter: Waiter) {
        let mut state = self.state();
        if state.closed {
            drop(state);
            return waiter(Err(FsError::Io));
        }
        if state.used > self.limit {
            if self.by_jobs_only && state.jobs == 0 {
                drop(state);
                return waiter(Err(FsError::NoSpace));
            }
            state.waiting.push_back(waiter);
            return;
        }
        drop(state);
        waiter(Ok(()));
    }

    /// Counts a job that is under way.
    pub(super) fn begin(&self) {
        self.state().jobs += 1;
    }

    /// Counts a job as done; its memory was given back by [`Self::release`].
    pub(super) fn end(&self) {
        self.give_back(0, 1);
    }

    /// Gives memory back that no job holds.
    pub(super) fn release(&self, bytes: usize) {
        self.give_back(bytes, 0);
    }

    fn give_back(&self, bytes: usize, jobs: usize) {
        let mut state = self.state();
        state.used -= signed(bytes);
        state.jobs -= jobs.min(state.jobs);
        if state.jobs == 0 {
            self.idle.notify_waiters();
        }
        let outcome = if state.used <= self.limit {
            Ok(())
        } else if self.by_jobs_only && state.jobs == 0 {
            Err(FsError::NoSpace)
        } else {
            return;
        };
        let waiting = std::mem::take(&mut state.waiting);
        drop(state);
        for waiter in waiting {
            waiter(outcome);
        }
    }

    /// From now on everybody who waits, and would wait, is told that there is no use.
    pub(super) fn close(&self) {
        let waiting = {
            let mut state = self.state();
            state.closed = true;
            std::mem::take(&mut state.waiting)
        };
        for waiter in waiting {
            waiter(Err(FsError::Io));
        }
        self.idle.notify_waiters();
    }

    /// Waits until no job is left, or nobody works on them any more.
    pub(super) async fn idle(&self) {
        loop {
            let idle = self.idle.notified();
            tokio::pin!(idle);
            // Counts from here on, so that nothing is missed between the look and the wait.
            idle.as_mut().enable();
            {
                let state = self.state();
                if state.jobs == 0 || state.closed {
                    return;
                }
            }
            idle.await;
        }
    }
}

/// Bytes of a file for a lane.
#[derive(Debug)]
pub(super) struct Job {
    file: FileId,
    offset: u64,
    work: Work,
    charge: usize,
}

/// What the bytes are.
#[derive(Debug)]
pub(super) enum Work {
    Bytes(Vec<u8>),
    /// Paid for by somebody else.
    Shared(Bytes),
    Zeros(u64),
}

impl Job {
    /// `charge`: what was charged for its memory already.
    pub(super) fn new(file: FileId, offset: u64, work: Work, charge: usize) -> Self {
        Self {
            file,
            offset,
            work,
            charge,
        }
    }

    fn run(&self, packer: &mut FilePacker) -> Result<(), PipelineError> {
        match &self.work {
            Work::Bytes(bytes) => packer.chunk(self.file, self.offset, bytes),
            Work::Shared(bytes) => packer.chunk(self.file, self.offset, bytes),
            Work::Zeros(length) => packer.zeros(self.file, self.offset, *length),
        }
    }
}

/// The way to the threads.
#[derive(Debug)]
pub(super) struct Lanes {
    jobs: Mutex<Option<Sender<Job>>>,
    room: Arc<Room>,
}

/// A thread that ends when there is nothing more to come.
#[derive(Debug)]
pub(super) struct LaneThread {
    name: String,
    done: oneshot::Receiver<Result<(), PipelineError>>,
}

impl LaneThread {
    /// Waits for its end, with everything in the packs.
    ///
    /// # Errors
    /// Why not everything is.
    pub(super) async fn join(self) -> Result<(), PipelineError> {
        // Dropped unsent by a panic only.
        let panicked = |_| PipelineError::Panicked { thread: self.name };
        self.done.await.map_err(panicked)?
    }
}

impl Lanes {
    /// Starts a thread for each lane.
    ///
    /// # Errors
    /// [`PipelineError::Setup`] if the system has none left.
    pub(super) fn start(
        lanes: Vec<Lane>,
        index: &Arc<IndexBuilder>,
        room: &Arc<Room>,
        faults: &Arc<Faults>,
    ) -> Result<(Self, Vec<LaneThread>), PipelineError> {
        let (jobs, queue) = unbounded();
        let mut threads = Vec::new();
        for (number, lane) in lanes.into_iter().enumerate() {
            let packer = FilePacker::new(lane, Arc::clone(index));
            let (queue, room, faults) = (queue.clone(), Arc::clone(room), Arc::clone(faults));
            let (sender, done) = oneshot::channel();
            let name = format!("gs-lane-{number}");
            let run = move || {
                let result = work(packer, &queue, &room);
                if let Err(error) = &result {
                    faults.poison(error.clone().into());
                }
                // Nobody waits if the copy was dropped.
                let _ = sender.send(result);
            };
            let started = std::thread::Builder::new().name(name.clone()).spawn(run);
            let setup = |error| PipelineError::Setup(format!("thread `{name}`: {error}"));
            started.map_err(setup)?;
            threads.push(LaneThread { name, done });
        }
        let lanes = Self {
            jobs: Mutex::new(Some(jobs)),
            room: Arc::clone(room),
        };
        Ok((lanes, threads))
    }

    pub(super) fn room(&self) -> &Arc<Room> {
        &self.room
    }

    /// Hands jobs to the threads; never waits. Their memory was charged before.
    pub(super) fn submit(&self, jobs: Vec<Job>) {
        if jobs.is_empty() {
            return;
        }
        let sender = self.jobs.lock().unwrap_or_else(PoisonError::into_inner);
        for mut job in jobs {
            let more = JOB_LEAST.saturating_sub(job.charge);
            job.charge += more;
            let mut state = self.room.state();
            state.used += signed(more);
            state.jobs += 1;
            drop(state);
            let charge = job.charge;
            // Closed, or all threads have ended: the copy has failed, and has said so.
            let lost = sender
                .as_ref()
                .is_none_or(|sender| sender.send(job).is_err());
            if lost {
                self.room.give_back(charge, 1);
            }
        }
    }

    /// Nothing more comes: the threads end when they have done what there is.
    pub(super) fn close(&self) {
        self.jobs
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .take();
    }
}

fn work(mut packer: FilePacker, queue: &Receiver<Job>, room: &Room) -> Result<(), PipelineError> {
    for job in queue {
        let done = job.run(&mut packer);
        let charge = job.charge;
        drop(job);
        room.give_back(charge, 1);
        done?;
    }
    packer.finish()
}

/// Bytes of one piece of a file that is cut up for the lanes.
pub(super) const PIECE: usize = FRAME_PLAIN_MAX;
