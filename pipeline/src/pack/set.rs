//! The packs of one copy: lanes to fill them, and what became of them.

use std::fmt;
use std::sync::atomic::{AtomicU32, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::runtime::Handle;
use tokio::time::Instant;
use tokio_util::task::TaskTracker;

use super::format::ENTRY;
use super::lane::Lane;
use super::{FRAME_PLAIN_MAX, FRAMES_MAX, PACK_SIZE, PackInfo};
use crate::budget::Reserve;
use crate::error::{Fault, PipelineError};
use crate::frame::{FRAME_STORED_MAX, FrameEncoder};
use crate::store::Key;
use crate::upload::Uploader;

/// The key of the pack of a number.
pub type KeyOf = Arc<dyn Fn(u32) -> Key + Send + Sync>;

/// How packs are made.
#[derive(Debug, Clone, Copy)]
pub struct PackOptions {
    /// Threads that write, each with a pack of its own; 1 to 64.
    pub lanes: usize,
    /// zstd's level, 1 to 19.
    pub level: i32,
    /// A new pack is begun when one would have more stored bytes than this.
    pub pack_size: u64,
}

impl Default for PackOptions {
    fn default() -> Self {
        Self {
            lanes: 2,
            level: 1,
            pack_size: PACK_SIZE,
        }
    }
}

impl PackOptions {
    fn check(&self) -> Result<(), PipelineError> {
        let what = if !(1..=64).contains(&self.lanes) {
            format!("{} lanes were asked for, 1 to 64 can be", self.lanes)
        } else if !(1..=19).contains(&self.level) {
            format!("zstd level {} was asked for, 1 to 19 can be", self.level)
        } else if !(1 << 20..=PACK_SIZE).contains(&self.pack_size) {
            let size = self.pack_size;
            format!("packs of {size} bytes were asked for, 1 MiB to 64 GiB can be")
        } else {
            return Ok(());
        };
        Err(PipelineError::Setup(what))
    }
}

/// What errors call what needs the memory.
const LANE: &str = "a lane";
/// Bytes that a lane needs besides its part: the frame being made, small files waiting to share one, and
/// the frame table.
const LANE_EXTRA: usize = FRAME_STORED_MAX + FRAME_PLAIN_MAX + FRAMES_MAX as usize * ENTRY;

/// The packs of one copy. Dropped before [`PackSet::finish`], everything under way is aborted.
#[derive(Debug)]
pub struct PackSet {
    shared: Arc<Shared>,
    finished: bool,
}

pub(super) struct Shared {
    pub(super) uploader: Uploader,
    pub(super) key_of: KeyOf,
    pub(super) options: PackOptions,
    pub(super) fault: Fault,
    pub(super) runtime: Handle,
    pub(super) tasks: TaskTracker,
    pub(super) begun: AtomicU32,
    pub(super) open_lanes: AtomicUsize,
    done: Mutex<Vec<PackInfo>>,
}

impl fmt::Debug for Shared {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Shared")
            .field("options", &self.options)
            .finish_non_exhaustive()
    }
}

impl Shared {
    pub(super) fn done(&self) -> MutexGuard<'_, Vec<PackInfo>> {
        self.done.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl PackSet {
    /// Makes the lanes. Call within a tokio runtime; hand each lane to a thread of its own.
    ///
    /// Takes for each lane one part and about 5 MiB of the budget for as long as the set lives; more parts
    /// are taken from the pool while it has some.
    ///
    /// # Errors
    /// [`PipelineError::Setup`] if an option is out of range, the budget has no room for the lanes, or
    /// there is no runtime.
    pub fn new(
        uploader: &Uploader,
        key_of: KeyOf,
        options: PackOptions,
    ) -> Result<(Self, Vec<Lane>), PipelineError> {
        options.check()?;
        let reserve = |_| Reserve::new(&uploader.budget, 1, LANE_EXTRA, LANE);
        let reserves = (0..options.lanes).map(reserve).collect::<Result<_, _>>()?;
        Self::with(uploader, key_of, options, reserves)
    }

    /// The same, but what others hold of the budget is waited for: up to `patience` for all lanes together. Makes fewer of them, at
    /// least one, if there is no room for all by then.
    ///
    /// # Errors
    /// As [`Self::new`], if there is no room for one lane; [`PipelineError::Cancelled`].
    pub async fn within(
        patience: Duration,
        uploader: &Uploader,
        key_of: KeyOf,
        options: PackOptions,
    ) -> Result<(Self, Vec<Lane>), PipelineError> {
        options.check()?;
        let (until, budget) = (Instant::now() + patience, &uploader.budget);
        let mut reserves = Vec::with_capacity(options.lanes);
        for _ in 0..options.lanes {
            let left = until.saturating_duration_since(Instant::now());
            match Reserve::within(left, budget, 1, LANE_EXTRA, LANE, &uploader.cancel).await {
                Ok(reserve) => reserves.push(reserve),
                Err(PipelineError::Setup(_)) if !reserves.is_empty() => break,
                Err(error) => return Err(error),
            }
        }
        Self::with(uploader, key_of, options, reserves)
    }

    /// A lane for each of `reserves`.
    fn with(
        uploader: &Uploader,
        key_of: KeyOf,
        options: PackOptions,
        reserves: Vec<Reserve>,
    ) -> Result<(Self, Vec<Lane>), PipelineError> {
        let runtime = Handle::try_current();
        let runtime = runtime.map_err(|error| PipelineError::Setup(error.to_string()))?;
        let fault = Fault::new(uploader.cancel.child_token());
        let shared = Arc::new(Shared {
            uploader: uploader.with_cancel(fault.token().clone()),
            key_of,
            options,
            fault,
            runtime,
            tasks: TaskTracker::new(),
            begun: AtomicU32::new(0),
            open_lanes: AtomicUsize::new(0),
            done: Mutex::default(),
        });
        let mut lanes = Vec::with_capacity(reserves.len());
        for reserve in reserves {
            let encoder = FrameEncoder::new(options.level)?;
            lanes.push(Lane::new(Arc::clone(&shared), reserve, encoder));
        }
        let finished = false;
        Ok((Self { shared, finished }, lanes))
    }

    /// Waits until every pack is in the store. Finish every lane first.
    ///
    /// # Errors
    /// The first error of any lane or upload; [`PipelineError::Setup`] if a lane was not finished. Nothing
    /// is under way then, but packs that were complete before are in the store.
    pub async fn finish(mut self) -> Result<Vec<PackInfo>, PipelineError> {
        let open = self.shared.open_lanes.load(Ordering::Acquire);
        if open > 0 {
            let what = format!("{open} lanes were not finished");
            self.shared.fault.fail(PipelineError::Setup(what));
        }
        self.settle().await;
        self.shared.fault.check()?;
        let mut packs = std::mem::take(&mut *self.shared.done());
        packs.sort_unstable_by_key(|pack| pack.number);
        let begun = self.shared.begun.load(Ordering::Acquire) as usize;
        if packs.len() != begun {
            // Each task reports its pack or an error, unless it panicked.
            let thread = "upload of a pack".into();
            return Err(PipelineError::Panicked { thread });
        }
        self.finished = true;
        Ok(packs)
    }

    /// Stops everything and waits until nothing is under way.
    pub async fn abort(self) {
        self.shared.fault.fail(PipelineError::Cancelled);
        self.settle().await;
    }

    /// Waits for the error that stops the set, whoever holds the set meanwhile. Never comes if the set is finished
    /// and nothing goes wrong.
    pub fn failed(&self) -> impl Future<Output = PipelineError> + Send + use<> {
        let fault = self.shared.fault.clone();
        async move {
            fault.token().cancelled().await;
            fault.check().err().unwrap_or(PipelineError::Cancelled)
        }
    }

    /// The error that stopped the set, if one did.
    #[must_use]
    pub fn error(&self) -> Option<PipelineError> {
        self.shared.fault.check().err()
    }

    /// Each task ends on its own: the store's calls have deadlines, and the token cuts them short.
    async fn settle(&self) {
        self.shared.tasks.close();
        self.shared.tasks.wait().await;
    }
}

impl Drop for PackSet {
    fn drop(&mut self) {
        if !self.finished {
            self.shared.fault.fail(PipelineError::Cancelled);
        }
    }
}
