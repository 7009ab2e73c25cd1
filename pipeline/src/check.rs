//! A stored copy read and checked as a restore would read it, and nothing of it kept.
//!
//! A restore stops at the first wrong byte; a check goes on and says all of them.

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::Arc;

use futures_util::StreamExt as _;
use futures_util::stream::FuturesOrdered;
use sha2::{Digest as _, Sha256};
use tokio::sync::mpsc;

use crate::budget::{PartBuffer, Reserve};
use crate::download::{Downloader, PackReader, Ranged};
use crate::error::PipelineError;
use crate::frame::{FRAME_STORED_MAX, FrameDamage, FrameDecoder};
use crate::index::Index;
use crate::pack::{
    EntryKind, Extent, FRAME_PLAIN_MAX, FRAMES_MAX, IndexEntry, PART_SIZE, PackInfo,
};
use crate::store::Key;
use crate::threads;

/// Parts of one pack fetched at the same time.
const FLIGHTS: usize = 4;
/// Bytes beside the part buffers: a frame over the edge of two parts, a decoded frame, the frame table.
const EXTRA: usize = FRAME_STORED_MAX + FRAME_PLAIN_MAX + FRAMES_MAX as usize * 48;

/// Bytes of the memory budget that the check of one pack holds from start to end; it takes more parts (8 MiB
/// each) while the pool has some.
pub const PACK_CHECK_BYTES: usize = PART_SIZE + EXTRA;

/// How many plain bytes each frame of a pack has: what an index is checked against. 4 bytes a frame.
#[derive(Debug, Clone)]
pub struct PackShape(Vec<u32>);

/// What is wrong in a pack whose size, header and frame table are right.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct PackFaults {
    /// Frames that are not what was written, by number.
    pub frames: BTreeMap<u32, FrameDamage>,
    /// Every frame is right, and the digest over the object's parts is not the manifest's.
    pub parts: bool,
}

impl PackFaults {
    /// Whether nothing is wrong.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.frames.is_empty() && !self.parts
    }
}

/// What an index adds up to.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct IndexSums {
    /// Entries that are files.
    pub files: u64,
    /// Plain bytes of all files.
    pub plain_bytes: u64,
}

/// Reads and checks the frame table and the header of a pack.
///
/// # Errors
/// [`PipelineError::Damaged`] if the pack is missing, has another size, or either of them is not what was written;
/// what the store says.
pub async fn pack_shape(
    downloader: &Downloader,
    key: &Key,
    info: &PackInfo,
) -> Result<PackShape, PipelineError> {
    let pack = PackReader::open(downloader, key, info).await?;
    let plain = |frame| pack.table().stamp(frame).map_or(0, |stamp| stamp.plain_len);
    Ok(PackShape((0..info.frames).map(plain).collect()))
}

impl PackShape {
    /// What is wrong with an extent that names this pack.
    ///
    /// # Errors
    /// The words.
    pub fn holds(&self, extent: &Extent) -> Result<(), &'static str> {
        let end = extent.first.checked_add(extent.count);
        let frames = end.and_then(|end| self.0.get(extent.first as usize..end as usize));
        let frames = frames.ok_or("names frames that do not exist")?;
        let (mut rest, mut offset) = (extent.length, extent.offset);
        for plain in frames {
            let held = plain
                .checked_sub(offset)
                .filter(|held| *held > 0 && rest > 0);
            let held = held.ok_or("does not fit its frames")?;
            rest = rest.saturating_sub(u64::from(held));
            offset = 0;
        }
        if rest > 0 {
            return Err("is longer than its frames");
        }
        Ok(())
    }
}

/// Reads a whole index: its digest, order, footer and number of entries, and that every extent lies in a pack.
/// Packs whose shape is `None` (they are damaged) are not looked into. `see` gets every entry.
///
/// # Errors
/// [`PipelineError::Damaged`] with what is wrong; what the store says.
pub async fn index(
    index: &Index,
    packs: &BTreeMap<u32, Option<PackShape>>,
    mut see: impl FnMut(&IndexEntry),
) -> Result<IndexSums, PipelineError> {
    let mut sums = IndexSums::default();
    let mut entries = index.entries();
    let mut wrong = None;
    while let Some(entry) = entries.next().await {
        let entry = entry?;
        if let EntryKind::File { size, extents } = &entry.kind {
            sums.files += 1;
            sums.plain_bytes = sums.plain_bytes.saturating_add(*size);
            for extent in extents {
                let held = match packs.get(&extent.pack) {
                    None => Err("names a pack that does not exist"),
                    Some(None) => Ok(()),
                    Some(Some(shape)) => shape.holds(extent),
                };
                if let Err(what) = held {
                    let path = &entry.path;
                    wrong
                        .get_or_insert_with(|| format!("the extent {extent:?} of `{path}` {what}"));
                }
            }
        }
        see(&entry);
    }
    // Only now: an index that is not the one that was written says so more plainly.
    match wrong {
        Some(what) => Err(PipelineError::damaged(index.key(), what)),
        None => Ok(sums),
    }
}

/// Reads every byte of a pack: each frame is hashed and decoded, and the digest over all parts compared.
/// Takes [`PACK_CHECK_BYTES`] of the budget and one thread.
///
/// # Errors
/// [`PipelineError::Damaged`] if the pack is missing, has another size, or its header or frame table is not what was
/// written; [`PipelineError::Setup`] if the budget has no room; [`PipelineError::Cancelled`]; what the store says.
pub async fn pack(
    downloader: &Downloader,
    key: &Key,
    info: &PackInfo,
) -> Result<PackFaults, PipelineError> {
    let reserve = Reserve::new(&downloader.budget, 1, EXTRA, "checking a pack")?;
    let reader = PackReader::open(downloader, key, info).await?;
    let (parts, received) = mpsc::channel(1);
    let scan = Scan::new(reader, info)?;
    // If this future is dropped the channel closes, and the thread ends.
    let worker = threads::spawn("check-pack", move || scan.run(received))?;
    let fed = feed(downloader, key, info, &reserve, parts).await;
    let faults = worker.join().await?;
    fed?;
    Ok(faults)
}

/// Fetches the object part by part, several at a time, and hands the parts on in order.
async fn feed(
    downloader: &Downloader,
    key: &Key,
    info: &PackInfo,
    reserve: &Reserve,
    parts: mpsc::Sender<PartBuffer>,
) -> Result<(), PipelineError> {
    let mut flights = FuturesOrdered::new();
    let mut next = 0;
    loop {
        // What has landed goes first: it holds the memory that the next one waits for.
        tokio::select! {
            biased;
            Some(landed) = flights.next() => {
                // Closed only by a panic of the thread, which its join reports.
                if parts.send(landed?).await.is_err() {
                    return Ok(());
                }
            }
            buffer = reserve.buffer(&downloader.cancel), if next < info.size && flights.len() < FLIGHTS => {
                let range = next..info.size.min(next + PART_SIZE as u64);
                next = range.end;
                flights.push_back(fetch(downloader, key, info, range, buffer?));
            }
            else => return Ok(()),
        }
    }
}

async fn fetch(
    downloader: &Downloader,
    key: &Key,
    info: &PackInfo,
    range: Range<u64>,
    mut buffer: PartBuffer,
) -> Result<PartBuffer, PipelineError> {
    let mut ranged = Ranged::new(downloader.clone(), key.clone(), range, info.size);
    while let Some(chunk) = ranged.next().await? {
        if buffer.append(&chunk) != chunk.len() {
            return Err(PipelineError::damaged(key, "more bytes came than it has"));
        }
    }
    Ok(buffer)
}

/// The thread's work: parts in, faults out.
struct Scan {
    pack: Arc<PackReader>,
    wanted: String,
    decoder: FrameDecoder,
    /// Bytes of the object before the part at hand.
    before: u64,
    /// The next frame.
    frame: u32,
    /// The beginning of that frame, if it lies in an earlier part.
    begun: Vec<u8>,
    parts: Sha256,
    faults: PackFaults,
}

impl Scan {
    fn new(pack: Arc<PackReader>, info: &PackInfo) -> Result<Self, PipelineError> {
        Ok(Self {
            pack,
            wanted: info.parts_sha256.clone(),
            decoder: FrameDecoder::new()?,
            before: 0,
            frame: 0,
            begun: Vec::with_capacity(FRAME_STORED_MAX),
            parts: Sha256::new(),
            faults: PackFaults::default(),
        })
    }

    fn run(mut self, mut parts: mpsc::Receiver<PartBuffer>) -> PackFaults {
        while let Some(part) = parts.blocking_recv() {
            self.parts.update(Sha256::digest(part.as_ref()));
            self.part(part.as_ref());
        }
        let parts = hex::encode(self.parts.finalize());
        self.faults.parts = self.faults.frames.is_empty() && parts != self.wanted;
        self.faults
    }

    fn part(&mut self, bytes: &[u8]) {
        let end = self.before + bytes.len() as u64;
        let at =
            |offset: u64| usize::try_from(offset.saturating_sub(self.before)).unwrap_or(usize::MAX);
        while let Some(place) = self.pack.table().place(self.frame) {
            if place.start >= end {
                break;
            }
            let here = bytes.get(at(place.start)..at(place.end.min(end)));
            let here = here.unwrap_or_default();
            if place.end > end {
                self.begun.extend_from_slice(here);
                break;
            }
            let whole = if self.begun.is_empty() {
                here
            } else {
                self.begun.extend_from_slice(here);
                &self.begun
            };
            if let Some(stamp) = self.pack.table().stamp(self.frame)
                && let Err(damage) = self.decoder.decode_verified(whole, stamp)
            {
                self.faults.frames.insert(self.frame, damage);
            }
            self.begun.clear();
            self.frame += 1;
        }
        self.before = end;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn extent(first: u32, count: u32, offset: u32, length: u64) -> Extent {
        Extent {
            pack: 0,
            first,
            count,
            offset,
            length,
        }
    }

    #[test]
    fn extents_that_a_restore_would_refuse_are_wrong() {
        let shape = PackShape(vec![100, 50, 10]);
        for (first, count, offset, length) in
            [(0, 1, 0, 100), (0, 1, 99, 1), (0, 3, 40, 120), (2, 1, 0, 3)]
        {
            let extent = extent(first, count, offset, length);
            assert_eq!(shape.holds(&extent), Ok(()), "{extent:?}");
        }
        for (first, count, offset, length) in [
            (0, 4, 0, 160),
            (3, 1, 0, 1),
            (u32::MAX, 2, 0, 1),
            (0, 1, 100, 1),
            (0, 1, 50, 51),
            (0, 2, 0, 100),
            (0, 3, 0, 161),
        ] {
            let extent = extent(first, count, offset, length);
            assert!(shape.holds(&extent).is_err(), "{extent:?}");
        }
    }
}
