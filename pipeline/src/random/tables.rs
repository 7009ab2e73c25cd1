//! Frame tables of the packs that are being read.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use bytes::Bytes;

use super::Shared;
use super::files::Place;
use super::memory::Claim;
use crate::download::PackReader;
use crate::error::PipelineError;
use crate::retry::or_cancelled;

/// Most tables that are kept.
const KEPT: usize = 8;

/// One pack's table, and where its frames lie among all its plain bytes.
#[derive(Debug)]
pub(super) struct Table {
    /// Place of the pack among all of them.
    pub(super) number: u32,
    pub(super) pack: Arc<PackReader>,
    /// Plain bytes before each frame, and all of them.
    before: Vec<u64>,
    _claim: Claim,
}

/// One byte of a file: where it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Spot {
    pub(super) frame: u32,
    /// Where in the frame.
    at: u64,
    /// Bytes of the file in this frame from there on.
    pub(super) length: u64,
    /// Whether the frame has nothing after them.
    pub(super) last: bool,
}

impl Spot {
    /// At most `most` of its bytes, of the frame's plain ones.
    pub(super) fn of(&self, plain: &Bytes, most: u64) -> Bytes {
        let bound = |at: u64| usize::try_from(at).unwrap_or(usize::MAX).min(plain.len());
        plain.slice(bound(self.at)..bound(self.at + self.length.min(most)))
    }
}

impl Table {
    fn new(number: u32, pack: Arc<PackReader>, claim: Claim) -> Self {
        let table = pack.table();
        let mut before = Vec::with_capacity(table.len() + 1);
        let mut plain = 0_u64;
        before.push(plain);
        for frame in 0..table.len() {
            let stamp = u32::try_from(frame)
                .ok()
                .and_then(|frame| table.stamp(frame));
            plain += stamp.map_or(0, |stamp| u64::from(stamp.plain_len));
            before.push(plain);
        }
        Self {
            number,
            pack,
            before,
            _claim: claim,
        }
    }

    fn before(&self, frame: u32) -> Option<u64> {
        self.before.get(frame as usize).copied()
    }

    /// Where the byte at `offset` of the file lies; `place` is the extent that has it.
    ///
    /// # Errors
    /// [`PipelineError::Damaged`] if the extent does not fit its frames.
    pub(super) fn locate(&self, place: &Place, offset: u64) -> Result<Spot, PipelineError> {
        let located = || {
            let begin = self
                .before(place.first)?
                .checked_add(u64::from(place.offset))?;
            let end = begin.checked_add(place.length)?;
            let last = place.first.checked_add(place.count)?.checked_sub(1)?;
            // It begins in its first frame and ends in its last one.
            let fits = begin < self.before(place.first.checked_add(1)?)?
                && end > self.before(last)?
                && end <= self.before(last.checked_add(1)?)?;
            let at = begin.checked_add(offset.checked_sub(place.at)?)?;
            if !fits || at >= end {
                return None;
            }
            // Frames have at least a byte: `fits` and the search agree on which one it is.
            let frame = self.before.partition_point(|before| *before <= at) - 1;
            let frame = u32::try_from(frame).ok()?;
            let frame_end = self.before(frame.checked_add(1)?)?;
            Some(Spot {
                frame,
                at: at - self.before(frame)?,
                length: frame_end.min(end) - at,
                last: frame_end <= end,
            })
        };
        located().ok_or_else(|| {
            let what = format!("the index names frames that do not fit what they hold: {place:?}");
            self.pack.damaged(what)
        })
    }

    /// Plain and stored bytes of a frame.
    pub(super) fn lengths(&self, frame: u32) -> Option<(usize, usize)> {
        let stamp = self.pack.table().stamp(frame)?;
        Some((stamp.plain_len as usize, stamp.stored_len as usize))
    }
}

/// Those that are in memory.
#[derive(Debug)]
pub(super) struct Tables {
    kept: Mutex<Vec<Kept>>,
    /// One at a time: the reserve has room for one.
    loading: tokio::sync::Mutex<()>,
}

#[derive(Debug)]
struct Kept {
    number: u32,
    table: Arc<Table>,
    used: Instant,
}

impl Tables {
    pub(super) fn new(packs: usize) -> Self {
        Self {
            kept: Mutex::new(Vec::with_capacity(packs.min(KEPT))),
            loading: tokio::sync::Mutex::default(),
        }
    }

    fn kept(&self) -> MutexGuard<'_, Vec<Kept>> {
        self.kept.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn ready(&self, number: u32) -> Option<Arc<Table>> {
        let mut kept = self.kept();
        let kept = kept.iter_mut().find(|kept| kept.number == number)?;
        kept.used = Instant::now();
        Some(Arc::clone(&kept.table))
    }

    /// The one that was not used for longest, if there is one.
    fn oldest(&self) -> Option<Kept> {
        let mut kept = self.kept();
        let (place, _) = kept.iter().enumerate().min_by_key(|(_, kept)| kept.used)?;
        Some(kept.swap_remove(place))
    }

    pub(super) fn expire(&self, idle: Duration) {
        let mut gone = Vec::new();
        let mut kept = self.kept();
        gone.extend(kept.extract_if(.., |kept| kept.used.elapsed() > idle));
        // The lock first, the memory after.
        drop(kept);
        drop(gone);
    }

    pub(super) async fn load(
        &self,
        shared: &Shared,
        number: u32,
    ) -> Result<Arc<Table>, PipelineError> {
        let cancel = &shared.downloader.cancel;
        let _turn = or_cancelled(cancel, self.loading.lock()).await?;
        if let Some(table) = self.ready(number) {
            return Ok(table);
        }
        if self.kept().len() >= KEPT {
            drop(self.oldest());
        }
        let claim = self.claim(shared).await?;
        let pack = shared.files.packs().get(number as usize);
        let (key, info) = pack.ok_or_else(|| PipelineError::Setup("no such pack".into()))?;
        let pack = PackReader::open(&shared.downloader, key, info).await?;
        let table = Arc::new(Table::new(number, pack, claim));
        self.kept().push(Kept {
            number,
            table: Arc::clone(&table),
            used: Instant::now(),
        });
        Ok(table)
    }

    async fn claim(&self, shared: &Shared) -> Result<Claim, PipelineError> {
        loop {
            let freed = shared.memory.freed();
            tokio::pin!(freed);
            // From here on no release is missed.
            freed.as_mut().enable();
            loop {
                if let Some(claim) = shared.memory.try_table() {
                    return Ok(claim);
                }
                let Some(oldest) = self.oldest() else { break };
                drop(oldest);
            }
            or_cancelled(&shared.downloader.cancel, freed).await?;
        }
    }
}
