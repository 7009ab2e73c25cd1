//! One byte budget for the buffers of a process, and the part buffers that it pays for.
//!
//! Whoever must make progress takes a reserve at start, and is refused then and there if it does not
//! fit. The rest is a pool that is taken before a buffer is filled. Nobody waits for the pool while
//! holding a filled buffer, so a used-up pool makes producers slow and never makes them stop.

use std::mem;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, TryAcquireError};
use tokio_util::sync::CancellationToken;

use crate::error::PipelineError;
use crate::pack::PART_SIZE;
use crate::retry::or_cancelled;

/// Bytes for which one permit stands. tokio counts permits in 32 bits for one request.
const UNIT: usize = 1 << 10;

fn units(bytes: usize) -> u32 {
    u32::try_from(bytes.div_ceil(UNIT)).unwrap_or(u32::MAX)
}

/// The budget. Clones share it.
#[derive(Debug, Clone)]
pub struct Budget {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    free: Arc<Semaphore>,
    /// In units.
    total: usize,
    /// Part buffers kept for reuse, because fresh pages cost a fault each. They live in what is free of the
    /// budget and are given back to the system as soon as somebody else needs it.
    spare: Mutex<Vec<Vec<u8>>>,
    /// What it is a part of.
    _of: Option<BudgetLease>,
}

/// Bytes taken from a [`Budget`]; they go back when this is dropped.
#[derive(Debug)]
pub struct BudgetLease {
    _permit: OwnedSemaphorePermit,
    /// A part goes back to the whole when the last lease of it has.
    _budget: Arc<Shared>,
}

impl Budget {
    /// A budget of `total_bytes` (rounded down to whole KiB).
    #[must_use]
    pub fn new(total_bytes: usize) -> Self {
        Self::with(total_bytes, None)
    }

    fn with(total_bytes: usize, of: Option<BudgetLease>) -> Self {
        let total = (total_bytes / UNIT).min(Semaphore::MAX_PERMITS);
        Self {
            shared: Arc::new(Shared {
                free: Arc::new(Semaphore::new(total)),
                total,
                spare: Mutex::default(),
                _of: of,
            }),
        }
    }

    /// A budget for somebody who must not wait for what others hold: `bytes` of this one (rounded up to whole KiB), for as long as it
    /// or a lease of it lives.
    ///
    /// # Errors
    /// [`PipelineError::Setup`] if so much is not free now; `what` says for what.
    pub fn part(&self, bytes: usize, what: &str) -> Result<Self, PipelineError> {
        let lease = self.reserve(bytes, what)?;
        Ok(Self::with(bytes.next_multiple_of(UNIT), Some(lease)))
    }

    /// The whole budget in bytes.
    #[must_use]
    pub fn total_bytes(&self) -> usize {
        self.shared.total * UNIT
    }

    /// Bytes that nobody has taken.
    #[must_use]
    pub fn free_bytes(&self) -> usize {
        self.shared.free.available_permits() * UNIT
    }

    /// Waits for `bytes` of the pool. Requests are served in order.
    ///
    /// # Errors
    /// [`PipelineError::Setup`] if the whole budget is smaller; [`PipelineError::Cancelled`].
    pub async fn acquire(
        &self,
        bytes: usize,
        cancel: &CancellationToken,
    ) -> Result<BudgetLease, PipelineError> {
        if units(bytes) as usize > self.shared.total {
            return Err(self.too_small(bytes, "one buffer"));
        }
        let free = Arc::clone(&self.shared.free);
        let permit = or_cancelled(cancel, free.acquire_many_owned(units(bytes))).await?;
        // Nobody closes the semaphore.
        let permit = permit.map_err(|_| PipelineError::Cancelled)?;
        Ok(self.lease(permit))
    }

    /// Takes `bytes` for as long as a job runs, at its start, or refuses.
    ///
    /// # Errors
    /// [`PipelineError::Setup`] if so much is not free now; `what` says for what.
    pub fn reserve(&self, bytes: usize, what: &str) -> Result<BudgetLease, PipelineError> {
        self.try_acquire(bytes)
            .ok_or_else(|| self.too_small(bytes, what))
    }

    /// Takes `bytes` if so much is free now.
    pub(crate) fn try_acquire(&self, bytes: usize) -> Option<BudgetLease> {
        let free = Arc::clone(&self.shared.free);
        match free.try_acquire_many_owned(units(bytes)) {
            Ok(permit) => Some(self.lease(permit)),
            Err(TryAcquireError::NoPermits | TryAcquireError::Closed) => None,
        }
    }

    fn lease(&self, permit: OwnedSemaphorePermit) -> BudgetLease {
        self.trim();
        BudgetLease {
            _permit: permit,
            _budget: Arc::clone(&self.shared),
        }
    }

    fn too_small(&self, bytes: usize, what: &str) -> PipelineError {
        PipelineError::Setup(format!(
            "the memory budget is too small: {what} needs {} KiB, {} of {} KiB are free",
            bytes.div_ceil(UNIT),
            self.shared.free.available_permits(),
            self.shared.total,
        ))
    }

    fn spare(&self) -> MutexGuard<'_, Vec<Vec<u8>>> {
        let spare = self.shared.spare.lock();
        spare.unwrap_or_else(PoisonError::into_inner)
    }

    /// How many part buffers fit in what is free.
    fn room(&self) -> usize {
        self.shared.free.available_permits() / (PART_SIZE / UNIT)
    }

    /// Gives spare buffers back to the system that no longer fit in what is free.
    fn trim(&self) {
        let mut spare = self.spare();
        let room = self.room();
        spare.truncate(room);
    }

    /// Keeps a buffer whose lease is about to be dropped (hence the one more that fits).
    fn keep(&self, data: Vec<u8>) {
        let mut spare = self.spare();
        if spare.len() < self.room() + 1 {
            spare.push(data);
        }
    }

    fn buffer(&self, lease: BudgetLease) -> PartBuffer {
        let data = self.spare().pop().unwrap_or_else(|| vec![0; PART_SIZE]);
        let home = Home::Pool(self.clone(), lease);
        PartBuffer {
            data,
            filled: 0,
            home,
        }
    }
}

/// Room for one part that a job holds from start to end, plus what else it needs at all times.
#[derive(Debug, Clone)]
pub(crate) struct Reserve {
    budget: Budget,
    own: Arc<Own>,
}

#[derive(Debug)]
struct Own {
    parts: Arc<Semaphore>,
    spare: Mutex<Vec<Vec<u8>>>,
    _lease: BudgetLease,
}

impl Reserve {
    /// Takes `parts` part buffers and `extra` bytes for good.
    ///
    /// # Errors
    /// [`PipelineError::Setup`] if that is not free.
    pub(crate) fn new(
        budget: &Budget,
        parts: usize,
        extra: usize,
        what: &str,
    ) -> Result<Self, PipelineError> {
        let lease = budget.reserve(parts * PART_SIZE + extra, what)?;
        Ok(Self::of(budget, parts, lease))
    }

    /// The same, but waits up to `patience`: jobs that run give back what they have taken of the pool.
    ///
    /// # Errors
    /// [`PipelineError::Setup`] if that is not free by then; [`PipelineError::Cancelled`].
    pub(crate) async fn within(
        patience: Duration,
        budget: &Budget,
        parts: usize,
        extra: usize,
        what: &str,
        cancel: &CancellationToken,
    ) -> Result<Self, PipelineError> {
        let bytes = parts * PART_SIZE + extra;
        let lease = tokio::time::timeout(patience, budget.acquire(bytes, cancel)).await;
        let lease = lease.map_err(|_| budget.too_small(bytes, what))??;
        Ok(Self::of(budget, parts, lease))
    }

    fn of(budget: &Budget, parts: usize, lease: BudgetLease) -> Self {
        Self {
            budget: budget.clone(),
            own: Arc::new(Own {
                parts: Arc::new(Semaphore::new(parts)),
                spare: Mutex::default(),
                _lease: lease,
            }),
        }
    }

    /// An empty part buffer: an own one if one is at home, else of the pool, else whichever comes first.
    ///
    /// # Errors
    /// [`PipelineError::Cancelled`].
    pub(crate) async fn buffer(
        &self,
        cancel: &CancellationToken,
    ) -> Result<PartBuffer, PipelineError> {
        if cancel.is_cancelled() {
            return Err(PipelineError::Cancelled);
        }
        if let Ok(permit) = Arc::clone(&self.own.parts).try_acquire_owned() {
            return Ok(self.own_buffer(permit));
        }
        if let Some(lease) = self.budget.try_acquire(PART_SIZE) {
            return Ok(self.budget.buffer(lease));
        }
        tokio::select! {
            biased;
            () = cancel.cancelled() => Err(PipelineError::Cancelled),
            permit = Arc::clone(&self.own.parts).acquire_owned() => {
                let permit = permit.map_err(|_| PipelineError::Cancelled)?;
                Ok(self.own_buffer(permit))
            }
            lease = self.budget.acquire(PART_SIZE, cancel), if self.budget.total_bytes() >= PART_SIZE => {
                Ok(self.budget.buffer(lease?))
            }
        }
    }

    fn own_buffer(&self, permit: OwnedSemaphorePermit) -> PartBuffer {
        let data = self.own.spare().pop().unwrap_or_else(|| vec![0; PART_SIZE]);
        let home = Home::Own(Arc::clone(&self.own), permit);
        PartBuffer {
            data,
            filled: 0,
            home,
        }
    }
}

impl Own {
    fn spare(&self) -> MutexGuard<'_, Vec<Vec<u8>>> {
        self.spare.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Where a buffer's memory goes back to, and the claim on it.
#[derive(Debug)]
enum Home {
    Pool(
        Budget,
        #[expect(dead_code, reason = "held until dropped")] BudgetLease,
    ),
    Own(
        Arc<Own>,
        #[expect(dead_code, reason = "held until dropped")] OwnedSemaphorePermit,
    ),
}

/// A buffer of [`PART_SIZE`] bytes, filled from the front, paid for by the budget.
#[derive(Debug)]
pub(crate) struct PartBuffer {
    data: Vec<u8>,
    filled: usize,
    home: Home,
}

impl PartBuffer {
    /// The bytes not yet filled; what is written there counts after [`Self::advance`].
    pub(crate) fn room(&mut self) -> &mut [u8] {
        self.data.get_mut(self.filled..).unwrap_or_default()
    }

    /// Bytes filled so far.
    pub(crate) fn len(&self) -> usize {
        self.filled
    }

    pub(crate) fn is_full(&self) -> bool {
        self.filled == self.data.len()
    }

    /// Counts `bytes` more as filled.
    pub(crate) fn advance(&mut self, bytes: usize) {
        self.filled = (self.filled + bytes).min(self.data.len());
    }

    /// Copies as much of `bytes` as fits, and says how much that was.
    pub(crate) fn append(&mut self, bytes: &[u8]) -> usize {
        let taken = bytes.len().min(self.room().len());
        if let (Some(room), Some(bytes)) = (self.room().get_mut(..taken), bytes.get(..taken)) {
            room.copy_from_slice(bytes);
        }
        self.advance(taken);
        taken
    }

    /// The filled bytes, without a copy; the memory goes home with the last clone.
    pub(crate) fn freeze(self) -> Bytes {
        Bytes::from_owner(self)
    }
}

impl AsRef<[u8]> for PartBuffer {
    fn as_ref(&self) -> &[u8] {
        self.data.get(..self.filled).unwrap_or_default()
    }
}

impl Drop for PartBuffer {
    fn drop(&mut self) {
        let data = mem::take(&mut self.data);
        // Kept first, the claim released after (fields drop after this): whoever gets the claim finds
        // the buffer.
        match &self.home {
            Home::Pool(budget, _) => budget.keep(data),
            Home::Own(own, _) => own.spare().push(data),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: usize = 1 << 20;

    #[tokio::test]
    async fn memory_is_taken_reused_and_given_back() {
        let budget = Budget::new(3 * PART_SIZE);
        let cancel = CancellationToken::new();
        let reserve = Reserve::new(&budget, 1, 0, "a test").unwrap();
        assert_eq!(budget.free_bytes(), 2 * PART_SIZE);
        let own = reserve.buffer(&cancel).await.unwrap();
        assert_eq!(
            budget.free_bytes(),
            2 * PART_SIZE,
            "the first one is our own"
        );
        let mut pooled = reserve.buffer(&cancel).await.unwrap();
        assert_eq!(budget.free_bytes(), PART_SIZE);
        assert_eq!(pooled.append(b"kept"), 4);
        let frozen = pooled.freeze();
        assert_eq!(&*frozen, b"kept");
        let clone = frozen.clone();
        drop(frozen);
        assert_eq!(budget.free_bytes(), PART_SIZE, "a clone still has it");
        drop(clone);
        assert_eq!(budget.free_bytes(), 2 * PART_SIZE);
        assert_eq!(budget.spare().len(), 1, "its pages are kept");
        let lease = budget.acquire(2 * PART_SIZE, &cancel).await.unwrap();
        assert_eq!(budget.spare().len(), 0, "until somebody else needs them");
        drop((lease, own, reserve));
        assert_eq!(budget.free_bytes(), 3 * PART_SIZE);
    }

    #[tokio::test]
    async fn an_own_buffer_that_comes_home_ends_the_wait_for_the_pool() {
        let budget = Budget::new(PART_SIZE);
        let cancel = CancellationToken::new();
        let reserve = Reserve::new(&budget, 1, 0, "a test").unwrap();
        let own = reserve.buffer(&cancel).await.unwrap();
        let waiting = tokio::spawn({
            let (reserve, cancel) = (reserve.clone(), cancel.clone());
            async move { reserve.buffer(&cancel).await.is_ok() }
        });
        tokio::task::yield_now().await;
        assert!(!waiting.is_finished());
        drop(own);
        assert!(waiting.await.unwrap());
        let _own = reserve.buffer(&cancel).await.unwrap();
        cancel.cancel();
        assert!(
            reserve.buffer(&cancel).await.is_err(),
            "a cancel ends the wait too"
        );
    }

    #[tokio::test]
    async fn a_part_is_nobody_elses_and_goes_back_with_its_last_lease() {
        let budget = Budget::new(3 * MIB);
        let cancel = CancellationToken::new();
        let part = budget.part(MIB + 1, "a test").unwrap();
        assert_eq!(part.total_bytes(), MIB + UNIT);
        let rest = budget.reserve(2 * MIB - UNIT, "the rest").unwrap();
        assert_eq!(budget.free_bytes(), 0);
        let lease = part.acquire(MIB, &cancel).await.unwrap();
        assert_eq!(part.free_bytes(), UNIT);
        assert!(budget.part(UNIT, "another").is_err());
        drop((part, rest));
        assert_eq!(budget.free_bytes(), 2 * MIB - UNIT, "a lease still has it");
        drop(lease);
        assert_eq!(budget.free_bytes(), 3 * MIB);
    }

    #[tokio::test]
    async fn what_never_fits_is_refused() {
        let budget = Budget::new(MIB);
        let error = Reserve::new(&budget, 1, 0, "a lane")
            .unwrap_err()
            .to_string();
        assert!(
            error.contains("a lane needs 8192 KiB, 1024 of 1024 KiB are free"),
            "{error}"
        );
        let cancel = CancellationToken::new();
        assert!(budget.acquire(2 * MIB, &cancel).await.is_err());
    }
}
