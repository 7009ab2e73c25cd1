//! Whose memory a frame is in.

use std::sync::Arc;

use tokio::sync::futures::Notified;
use tokio::sync::{Notify, OwnedSemaphorePermit, Semaphore};

use super::frames_of;
use crate::budget::{Budget, BudgetLease};
use crate::error::PipelineError;
use crate::frame::FRAME_STORED_MAX;
use crate::pack::FRAME_PLAIN_MAX;

/// Bytes that a frame of a table takes in memory, the stored table while it is read included.
const TABLE_ENTRY: usize = 112;
/// Most requests under way.
const FLIGHTS: usize = 8;
/// Most readers that get a frame of their own.
const READERS: usize = 64;

/// The reserve, and the way to the pool.
#[derive(Debug)]
pub(super) struct Memory {
    budget: Budget,
    /// Frames of the reserve.
    own: Arc<Semaphore>,
    /// Frames of the pool that we may take.
    pooled: Arc<Semaphore>,
    /// The reserve's one table.
    table: Arc<Semaphore>,
    table_bytes: usize,
    freed: Arc<Notify>,
    capacity: usize,
    _reserve: BudgetLease,
}

/// Memory for one frame, or one table; it goes back when this is dropped, and whoever waits is told.
#[derive(Debug)]
pub(super) struct Claim {
    own: Option<OwnedSemaphorePermit>,
    lease: Option<BudgetLease>,
    freed: Arc<Notify>,
}

impl Drop for Claim {
    fn drop(&mut self) {
        // Given back first, told after.
        self.lease.take();
        self.own.take();
        self.freed.notify_waiters();
    }
}

impl Memory {
    /// Takes the reserve. Returns with it how many requests may be under way.
    pub(super) fn new(
        budget: &Budget,
        readers: usize,
        frames_most: u32,
    ) -> Result<(Self, usize), PipelineError> {
        let table_bytes = frames_most as usize * TABLE_ENTRY;
        let need = |frames: usize, flights: usize| {
            frames * FRAME_PLAIN_MAX + flights * FRAME_STORED_MAX + table_bytes
        };
        let readers = readers.clamp(1, READERS);
        let (mut frames, mut flights) = (readers + 1, readers.clamp(2, FLIGHTS));
        while need(frames, flights) > budget.free_bytes() / 4 && (frames, flights) != (2, 1) {
            (frames, flights) = ((frames / 2).max(2), (flights / 2).max(1));
        }
        let reserve = budget.reserve(need(frames, flights), "reading files of a copy")?;
        // The other half is for those who share the budget.
        let half = (budget.total_bytes() / 2).saturating_sub(need(frames, flights));
        let pooled = frames_of(half);
        let memory = Self {
            budget: budget.clone(),
            own: Arc::new(Semaphore::new(frames)),
            pooled: Arc::new(Semaphore::new(pooled)),
            table: Arc::new(Semaphore::new(1)),
            table_bytes,
            freed: Arc::default(),
            capacity: frames + pooled,
            _reserve: reserve,
        };
        Ok((memory, flights))
    }

    /// Frames that fit at most.
    pub(super) fn capacity(&self) -> usize {
        self.capacity
    }

    /// Ends at the next release of a claim, or arrival of a frame, once it is enabled.
    pub(super) fn freed(&self) -> Notified<'_> {
        self.freed.notified()
    }

    /// Says that there is something that could be evicted.
    pub(super) fn arrived(&self) {
        self.freed.notify_waiters();
    }

    fn claim(&self, own: Option<OwnedSemaphorePermit>, lease: Option<BudgetLease>) -> Claim {
        Claim {
            own,
            lease,
            freed: Arc::clone(&self.freed),
        }
    }

    /// Memory for a frame, of the pool first: the reserve is for when that is used up.
    pub(super) fn try_frame(&self) -> Option<Claim> {
        if let Ok(permit) = Arc::clone(&self.pooled).try_acquire_owned()
            && let Some(lease) = self.budget.try_acquire(FRAME_PLAIN_MAX)
        {
            return Some(self.claim(Some(permit), Some(lease)));
        }
        let permit = Arc::clone(&self.own).try_acquire_owned().ok()?;
        Some(self.claim(Some(permit), None))
    }

    /// Memory for a table.
    pub(super) fn try_table(&self) -> Option<Claim> {
        if let Ok(permit) = Arc::clone(&self.table).try_acquire_owned() {
            return Some(self.claim(Some(permit), None));
        }
        let lease = self.budget.try_acquire(self.table_bytes)?;
        Some(self.claim(None, Some(lease)))
    }
}
