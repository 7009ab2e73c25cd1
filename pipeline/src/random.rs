//! Random access to the files of one or several copies: what a program sees that reads a backup through a mount.
//!
//! The unit is the frame: a read finds its frame, which is fetched, verified and decompressed once, kept while there
//! is room, and shared by all who read in it. Who reads on is read ahead of:
//! - a file of more than one frame, along its own extents, wherever other files' frames lie between them;
//! - files that share frames, along the pack, because they are read in about the order in which they were written.
//!
//! The window of a reader begins with one frame and doubles whenever it turned out right, so that a reader of a
//! whole file costs a request per [`AHEAD_MAX`], and one that looks up a few bytes costs a request per frame.
//!
//! Memory: a reserve taken at the start (a table of frames, and for each reader a frame), so that somebody always
//! goes on; and of the pool what is free, up to half of the budget. Nobody waits for the pool. Frames that nobody
//! has asked for in ten seconds are let go, because others do wait for it.

mod ahead;
mod cache;
mod files;
mod flight;
mod memory;
mod tables;

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::Duration;

use bytes::Bytes;
use tokio::runtime::Handle;
use tokio_util::sync::{CancellationToken, DropGuard};

use crate::download::Downloader;
use crate::error::PipelineError;
use crate::pack::FRAME_PLAIN_MAX;
use crate::retry::or_cancelled;

use ahead::Access;
use cache::{Cache, Look, Pressure};
use flight::Hangar;
use memory::{Claim, Memory};
use tables::{Table, Tables};

pub use files::{CopyPacks, RandomFile, RandomFiles};

/// Most bytes, plain or stored, of one request that reads ahead: 8 MiB.
pub const AHEAD_MAX: usize = 8 << 20;

/// Frames that nobody asks for are kept so long.
const IDLE: Duration = Duration::from_secs(10);
/// How often that is looked after.
const SWEEP: Duration = Duration::from_secs(2);

/// Reads files, from any number of tasks at the same time. Clones share everything; when the last one is
/// dropped, what is under way ends.
#[derive(Debug, Clone)]
pub struct RandomReader {
    shared: Arc<Shared>,
    _guard: Arc<DropGuard>,
}

#[derive(Debug)]
struct Shared {
    /// With the token that ends when the last reader is dropped.
    downloader: Downloader,
    files: RandomFiles,
    memory: Memory,
    cache: Mutex<Cache>,
    tables: Tables,
    hangar: Hangar,
    runtime: Handle,
    /// Plain bytes that were asked for and given.
    served: AtomicU64,
}

impl RandomFiles {
    /// Opens the files for `readers` at the same time (1 to 64; more of them only wait for each other). What is fetched
    /// is counted in the downloader's meter, each frame once; an error after the downloader's own patience is the
    /// reader's, and the next read tries again.
    ///
    /// Takes of the budget for good: a frame (1 MiB) for each reader and another one, a request's buffer (1 MiB) for up
    /// to eight of them, and 112 bytes a frame of the largest pack (7 MiB at most); fewer frames and buffers where
    /// that is more than a quarter of what is free, but two frames and one buffer always. Call it within a tokio
    /// runtime; that is where the work is done.
    ///
    /// # Errors
    /// [`PipelineError::Setup`] if the budget has no room, or there is no runtime.
    pub fn open(
        mut self,
        downloader: &Downloader,
        readers: usize,
    ) -> Result<RandomReader, PipelineError> {
        self.shrink();
        let runtime = Handle::try_current()
            .map_err(|error| PipelineError::Setup(format!("random access: {error}")))?;
        let token: CancellationToken = downloader.cancel.child_token();
        let frames_most = self.frames_most();
        let (memory, flights) = Memory::new(&downloader.budget, readers, frames_most)?;
        let shared = Arc::new(Shared {
            downloader: downloader.with_cancel(token.clone()),
            cache: Mutex::new(Cache::new(memory.capacity())),
            tables: Tables::new(self.packs().len()),
            files: self,
            memory,
            hangar: Hangar::new(flights),
            runtime: runtime.clone(),
            served: AtomicU64::new(0),
        });
        runtime.spawn(sweep(Arc::downgrade(&shared), token.clone()));
        Ok(RandomReader {
            shared,
            _guard: Arc::new(token.drop_guard()),
        })
    }
}

impl RandomReader {
    /// Bytes of a file; 0 for one that is not there.
    #[must_use]
    pub fn size(&self, file: RandomFile) -> u64 {
        self.shared.files.size(file)
    }

    /// Plain bytes that were asked for and given so far, repetitions included.
    #[must_use]
    pub fn served(&self) -> u64 {
        self.shared.served.load(Ordering::Relaxed)
    }

    /// At most `length` bytes of a file from `offset`: fewer only at its end. Nothing is shown that was not verified.
    /// The bytes may hold a whole frame in memory: copy what is kept.
    ///
    /// # Errors
    /// [`PipelineError::Damaged`] if what is stored is missing or not what was written; the store's last error after
    /// the downloader's patience; `Cancelled`.
    pub async fn read(
        &self,
        file: RandomFile,
        offset: u64,
        length: usize,
    ) -> Result<Bytes, PipelineError> {
        let shared = &self.shared;
        let end = shared.end(file, offset, length);
        let mut at = offset;
        let mut whole: Vec<u8> = Vec::new();
        while at < end {
            let part = shared.part(file, at, end).await?;
            at += part.len() as u64;
            if whole.is_empty() && at == end {
                shared.count(part.len());
                return Ok(part);
            }
            // A frame in hand while another is waited for could make all wait for each other: it is let go.
            whole.reserve_exact(usize::try_from(end - offset).unwrap_or(length) - whole.len());
            whole.extend_from_slice(&part);
        }
        shared.count(whole.len());
        Ok(whole.into())
    }

    /// What [`Self::read`] would give, if that is in memory and nothing has to be waited for. Never blocks.
    #[must_use]
    pub fn try_read(&self, file: RandomFile, offset: u64, length: usize) -> Option<Bytes> {
        let shared = &self.shared;
        let end = shared.end(file, offset, length);
        let mut at = offset;
        let mut whole: Vec<u8> = Vec::new();
        while at < end {
            let place = shared.files.place(file, at)?;
            let table = shared.tables.ready(place.pack)?;
            let spot = table.locate(&place, at).ok()?;
            let access = Access::new(file, &place, &spot, at, end);
            let Look::Here(plain) = shared.cache().look(access.frame, access.to_end) else {
                return None;
            };
            shared.ahead(&access, &table);
            let part = spot.of(&plain, end - at);
            at += part.len() as u64;
            if whole.is_empty() && at == end {
                shared.count(part.len());
                return Some(part);
            }
            whole.extend_from_slice(&part);
        }
        shared.count(whole.len());
        Some(whole.into())
    }
}

impl Shared {
    fn cache(&self) -> MutexGuard<'_, Cache> {
        self.cache.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn count(&self, bytes: usize) {
        self.served.fetch_add(bytes as u64, Ordering::Relaxed);
    }

    fn end(&self, file: RandomFile, offset: u64, length: usize) -> u64 {
        let end = offset.saturating_add(length as u64);
        end.min(self.files.size(file))
    }

    /// The bytes from `offset` that lie in its frame, up to `end`, which is within the file.
    async fn part(
        self: &Arc<Self>,
        file: RandomFile,
        offset: u64,
        end: u64,
    ) -> Result<Bytes, PipelineError> {
        let place = self.files.place(file, offset);
        let place = place.ok_or_else(|| PipelineError::Setup("no such file is open".into()))?;
        let table = self.table(place.pack).await?;
        let spot = table.locate(&place, offset)?;
        let access = Access::new(file, &place, &spot, offset, end);
        let plain = self.frame(&access, &table).await?;
        Ok(spot.of(&plain, end - offset))
    }

    /// A whole frame, from memory or from the store.
    async fn frame(
        self: &Arc<Self>,
        access: &Access,
        table: &Arc<Table>,
    ) -> Result<Bytes, PipelineError> {
        let cancel = &self.downloader.cancel;
        loop {
            let look = self.cache().look(access.frame, access.to_end);
            let coming = match look {
                Look::Here(plain) => {
                    self.ahead(access, table);
                    return Ok(plain);
                }
                Look::Coming(coming) => {
                    self.ahead(access, table);
                    coming
                }
                Look::Absent => {
                    let claim = self.claim().await?;
                    let seat = or_cancelled(cancel, self.hangar.seat()).await??;
                    match self.begin(access, table, claim, seat) {
                        Some(coming) => coming,
                        // Another has begun meanwhile.
                        None => continue,
                    }
                }
            };
            return or_cancelled(cancel, coming.wait()).await?;
        }
    }

    /// Memory for a frame that somebody waits for.
    async fn claim(&self) -> Result<Claim, PipelineError> {
        loop {
            let freed = self.memory.freed();
            tokio::pin!(freed);
            // From here on no release is missed.
            freed.as_mut().enable();
            if let Some(claim) = self.claim_by(Pressure::Demand) {
                return Ok(claim);
            }
            or_cancelled(&self.downloader.cancel, freed).await?;
        }
    }

    /// Memory for a frame, if need be at the cost of others in the cache.
    fn claim_by(&self, pressure: Pressure) -> Option<Claim> {
        loop {
            if let Some(claim) = self.memory.try_frame() {
                return Some(claim);
            }
            // Dropped outside of the lock: its memory goes back then.
            let evicted = self.cache().evict(pressure);
            evicted?;
        }
    }

    async fn table(self: &Arc<Self>, pack: u32) -> Result<Arc<Table>, PipelineError> {
        if let Some(table) = self.tables.ready(pack) {
            return Ok(table);
        }
        self.tables.load(self, pack).await
    }
}

/// Lets go of what nobody asks for, for as long as there is a reader.
async fn sweep(shared: Weak<Shared>, token: CancellationToken) {
    loop {
        tokio::select! {
            () = token.cancelled() => return,
            () = tokio::time::sleep(SWEEP) => {}
        }
        let Some(shared) = shared.upgrade() else {
            return;
        };
        let expired = shared.cache().expire(IDLE);
        drop(expired);
        shared.tables.expire(IDLE);
    }
}

/// Frames that so many plain bytes are.
fn frames_of(bytes: usize) -> usize {
    bytes / FRAME_PLAIN_MAX
}
