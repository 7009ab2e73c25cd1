//! WAL segments out of the bucket: each fetched and verified as a whole, and kept while it is read.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock, Weak};
use std::time::{Duration, Instant};

use agent_api::{ApiError, ErrorKind};
use bytes::Bytes;
use catalog::error::CatalogError;
use catalog::model::{Epoch, StreamedWal};
use catalog::wal::{self, WalFile, WalName};
use pipeline::budget::{Budget, BudgetLease};
use pipeline::download::Downloader;
use pipeline::store::Retry;

use super::{cut, of_catalog};
use crate::failure::pipeline_error;

/// A fetch may take so long, and a second more for each MiB.
const FETCH: Duration = Duration::from_mins(2);
/// How long to wait for memory.
const MEMORY: Duration = Duration::from_mins(2);
const ATTEMPTS: u32 = 6;
const PAUSE: Duration = Duration::from_secs(1);
/// Kept so long when nobody reads.
const IDLE: Duration = Duration::from_secs(10);
/// Most that are kept.
pub(super) const KEPT: u32 = 8;

/// The segments of all copies of a chain.
#[derive(Debug)]
pub(super) struct Segments {
    downloader: Downloader,
    /// Memory for nothing else. Without it they take from what the whole operation has.
    own: Option<Budget>,
    /// Grows only.
    all: RwLock<Vec<Arc<Segment>>>,
    kept: Mutex<Vec<Kept>>,
    most: usize,
    /// One is fetched at a time: each needs the memory of a whole one.
    loading: tokio::sync::Mutex<()>,
    served: AtomicU64,
}

#[derive(Debug)]
struct Segment {
    path: String,
    name: WalName,
    size: u64,
    /// Where to look for it.
    epochs: Arc<Vec<Epoch>>,
    counted: AtomicU64,
}

#[derive(Debug)]
struct Kept {
    number: usize,
    plain: Bytes,
    touched: Instant,
    /// Its last byte was read.
    finished: bool,
}

/// Why a segment could not be read.
pub(super) struct SegmentError {
    pub(super) path: String,
    pub(super) error: ApiError,
}

/// A segment's bytes, paid for by the budget.
struct Leased {
    plain: Bytes,
    _lease: BudgetLease,
}

impl AsRef<[u8]> for Leased {
    fn as_ref(&self) -> &[u8] {
        &self.plain
    }
}

impl Segments {
    pub(super) fn new(downloader: Downloader, own: Option<Budget>, readers: usize) -> Self {
        Self {
            downloader,
            own,
            all: RwLock::default(),
            kept: Mutex::default(),
            most: readers.clamp(2, KEPT as usize),
            loading: tokio::sync::Mutex::default(),
            served: AtomicU64::new(0),
        }
    }

    /// Takes a segment. Returns its number.
    ///
    /// # Errors
    /// What is wrong with its description.
    pub(super) fn add(&self, epochs: &Arc<Vec<Epoch>>, wal: &StreamedWal) -> Result<u64, String> {
        let name: WalName = wal
            .segment
            .parse()
            .map_err(|_| format!("`{}` is no name of a WAL segment", wal.segment))?;
        if wal.size == 0 || wal.size > wal::WAL_FILE_LIMIT {
            let (segment, size) = (&wal.segment, wal.size);
            return Err(format!("WAL segment {segment} cannot have {size} bytes"));
        }
        let mut all = self.all.write().unwrap_or_else(PoisonError::into_inner);
        all.push(Arc::new(Segment {
            path: wal.path.clone(),
            name,
            size: wal.size,
            epochs: Arc::clone(epochs),
            counted: AtomicU64::new(0),
        }));
        Ok(all.len() as u64 - 1)
    }

    fn segment(&self, number: usize) -> Option<Arc<Segment>> {
        let all = self.all.read().unwrap_or_else(PoisonError::into_inner);
        all.get(number).cloned()
    }

    /// Bytes given so far, repetitions included.
    pub(super) fn served(&self) -> u64 {
        self.served.load(Ordering::Relaxed)
    }

    fn kept(&self) -> MutexGuard<'_, Vec<Kept>> {
        self.kept.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What is asked for, if the segment is in memory.
    pub(super) fn try_read(&self, number: usize, offset: u64, length: usize) -> Option<Bytes> {
        let mut kept = self.kept();
        let kept = kept.iter_mut().find(|kept| kept.number == number)?;
        kept.touched = Instant::now();
        let bytes = cut(&kept.plain, offset, length);
        kept.finished |= offset + bytes.len() as u64 >= kept.plain.len() as u64;
        self.served.fetch_add(bytes.len() as u64, Ordering::Relaxed);
        Some(bytes)
    }

    pub(super) async fn read(
        self: Arc<Self>,
        number: usize,
        offset: u64,
        length: usize,
    ) -> Result<Bytes, SegmentError> {
        let Some(segment) = self.segment(number) else {
            let error = ApiError::new(ErrorKind::Internal, "there is no such WAL segment");
            let path = String::new();
            return Err(SegmentError { path, error });
        };
        let cancel = self.downloader.cancel().clone();
        let reading = async {
            let _turn = self.loading.lock().await;
            if let Some(bytes) = self.try_read(number, offset, length) {
                return Ok(bytes);
            }
            self.load(number, &segment).await?;
            let bytes = self.try_read(number, offset, length);
            // Only the next one to load lets go of it.
            bytes.ok_or_else(|| ApiError::new(ErrorKind::Internal, "a WAL segment was lost"))
        };
        let read = tokio::select! {
            read = reading => read,
            () = cancel.cancelled() => Err(ApiError::new(ErrorKind::Cancelled, "cancelled")),
        };
        read.map_err(|error| SegmentError {
            path: segment.path.clone(),
            error,
        })
    }

    async fn load(self: &Arc<Self>, number: usize, segment: &Segment) -> Result<(), ApiError> {
        let lease = self.memory(segment).await?;
        let plain = self.fetch(segment).await?;
        if segment.counted.swap(1, Ordering::Relaxed) == 0 {
            self.downloader.count_plain(segment.size);
        }
        let plain = Bytes::from_owner(Leased {
            plain,
            _lease: lease,
        });
        self.kept().push(Kept {
            number,
            plain,
            touched: Instant::now(),
            finished: false,
        });
        tokio::spawn(expire(Arc::downgrade(self), number));
        Ok(())
    }

    /// Memory for a segment, if need be at the cost of others that are kept.
    async fn memory(&self, segment: &Segment) -> Result<BudgetLease, ApiError> {
        let whole = self.downloader.budget();
        let own = self.own.as_ref().map(|own| (own, own.total_bytes()));
        // Else the others of this operation need it, too.
        let (budget, room) = own.unwrap_or((whole, whole.total_bytes() / 4));
        let bytes = usize::try_from(segment.size).unwrap_or(usize::MAX);
        let what = "a WAL segment";
        let share = room / bytes.max(1);
        while self.kept().len() >= self.most.min(share).max(1) {
            drop(self.oldest());
        }
        loop {
            if let Ok(lease) = budget.reserve(bytes, what) {
                return Ok(lease);
            }
            let Some(oldest) = self.oldest() else { break };
            drop(oldest);
        }
        let waiting = budget.acquire(bytes, self.downloader.cancel());
        if let Ok(lease) = tokio::time::timeout(MEMORY, waiting).await {
            return lease.map_err(|error| pipeline_error(&error));
        }
        let message = format!(
            "no memory for WAL segment {} within {} s: {} of {} KiB are free",
            segment.name,
            MEMORY.as_secs(),
            budget.free_bytes() >> 10,
            budget.total_bytes() >> 10
        );
        Err(ApiError::new(ErrorKind::Timeout, message)
            .next("give the agent more --memory, or do less at the same time"))
    }

    /// The one to let go: one that was read to its end, else the one that was not read for longest.
    fn oldest(&self) -> Option<Kept> {
        let mut kept = self.kept();
        let order = |kept: &Kept| (!kept.finished, kept.touched);
        let (place, _) = kept.iter().enumerate().min_by_key(|(_, it)| order(it))?;
        Some(kept.swap_remove(place))
    }

    async fn fetch(&self, segment: &Segment) -> Result<Bytes, ApiError> {
        let deadline = FETCH + Duration::from_secs(segment.size >> 20);
        let mut attempt = 1;
        loop {
            let fetched = tokio::time::timeout(deadline, self.fetch_once(segment)).await;
            let (error, again) = match fetched {
                Ok(Ok(plain)) => return Ok(plain),
                Ok(Err(error)) => {
                    let again = match &error {
                        CatalogError::Store(error) => error.retry() != Retry::Permanent,
                        _ => false,
                    };
                    (of_catalog(&error), again)
                }
                Err(_) => {
                    let (name, seconds) = (&segment.name, deadline.as_secs());
                    let message = format!("WAL segment {name} did not come within {seconds} s");
                    (ApiError::new(ErrorKind::StoreUnavailable, message), true)
                }
            };
            if !again || attempt >= ATTEMPTS {
                return Err(error);
            }
            tracing::info!(attempt, %error, "fetching a WAL segment again");
            tokio::time::sleep(PAUSE * 2_u32.pow(attempt - 1)).await;
            attempt += 1;
        }
    }

    async fn fetch_once(&self, segment: &Segment) -> Result<Bytes, CatalogError> {
        let store = self.downloader.store().as_ref();
        let found = wal::find_wal(store, &segment.epochs, &segment.name).await?;
        let file = found.ok_or_else(|| CatalogError::NotFound {
            what: "WAL segment",
            id: segment.name.to_string(),
            nearest: Vec::new(),
        })?;
        let plain = self.fetch_file(&file, segment).await?;
        if plain.len() as u64 != segment.size {
            let (has, size) = (plain.len(), segment.size);
            let what = format!("it has {has} bytes, and the copy that names it says {size}");
            let key = file.key().to_string();
            return Err(CatalogError::Damaged { key, what });
        }
        Ok(plain)
    }

    async fn fetch_file(&self, file: &WalFile, segment: &Segment) -> Result<Bytes, CatalogError> {
        let limit = usize::try_from(segment.size).unwrap_or(usize::MAX);
        let store = self.downloader.store().as_ref();
        let plain = wal::read_segment(store, file, limit).await?;
        // What was fetched is known only now.
        self.downloader.count(plain.len() as u64);
        Ok(plain)
    }
}

/// Lets go of a segment when nobody has read in it for a while.
async fn expire(segments: Weak<Segments>, number: usize) {
    loop {
        tokio::time::sleep(IDLE).await;
        let Some(segments) = segments.upgrade() else {
            return;
        };
        let mut kept = segments.kept();
        let Some(place) = kept.iter().position(|kept| kept.number == number) else {
            return;
        };
        let idle = kept
            .get(place)
            .is_some_and(|it| it.touched.elapsed() >= IDLE);
        if idle {
            let gone = kept.swap_remove(place);
            drop(kept);
            drop(gone);
            return;
        }
    }
}
