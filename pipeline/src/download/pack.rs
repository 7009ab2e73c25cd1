//! One pack being read: its frame table first, then its frames.

use std::ops::Range;
use std::sync::Arc;

use super::{Downloader, Ranged};
use crate::budget::PartBuffer;
use crate::error::PipelineError;
use crate::frame::FrameDecoder;
use crate::pack::{FrameTable, PackInfo};
use crate::store::Key;

/// A pack whose frame table was fetched and checked against what the manifest says of it.
#[derive(Debug)]
pub(crate) struct PackReader {
    downloader: Downloader,
    key: Key,
    info: PackInfo,
    table: FrameTable,
}

impl PackReader {
    /// # Errors
    /// [`PipelineError::Damaged`] if the pack is missing, cut or longer, or its table or header is not the one that was
    /// written.
    pub(crate) async fn open(
        downloader: &Downloader,
        key: &Key,
        info: &PackInfo,
    ) -> Result<Arc<Self>, PipelineError> {
        let range = FrameTable::range(key, info)?;
        let table = collect(downloader, key, info, range).await?;
        let table = FrameTable::parse(key, info, &table)?;
        let reader = Self {
            downloader: downloader.clone(),
            key: key.clone(),
            info: info.clone(),
            table,
        };
        let head = 0..reader.table.header().len() as u64;
        if collect(downloader, key, info, head).await? != reader.table.header() {
            return Err(reader.damaged("its header is not the one that its frame table names"));
        }
        Ok(Arc::new(reader))
    }

    pub(crate) fn damaged(&self, what: impl Into<String>) -> PipelineError {
        PipelineError::damaged(&self.key, what)
    }

    pub(crate) fn table(&self) -> &FrameTable {
        &self.table
    }

    /// Where consecutive frames lie in the object.
    pub(crate) fn place(&self, frames: &Range<u32>) -> Result<Range<u64>, PipelineError> {
        let first = self.table.place(frames.start);
        let last = frames
            .end
            .checked_sub(1)
            .and_then(|last| self.table.place(last));
        match (first, last) {
            (Some(first), Some(last)) => Ok(first.start..last.end),
            _ => Err(self.damaged(format!("it has no frames {frames:?}"))),
        }
    }

    /// A range of the object, to be read piece by piece.
    pub(crate) fn ranged(&self, range: Range<u64>) -> Ranged {
        let (downloader, key) = (self.downloader.clone(), self.key.clone());
        Ranged::new(downloader, key, range, self.info.size)
    }

    /// Fills an empty buffer with the stored bytes of consecutive frames, which must fit.
    pub(crate) async fn fetch(
        &self,
        frames: &Range<u32>,
        buffer: &mut PartBuffer,
    ) -> Result<(), PipelineError> {
        let mut ranged = self.ranged(self.place(frames)?);
        while let Some(chunk) = ranged.next().await? {
            if buffer.append(&chunk) != chunk.len() {
                return Err(self.damaged(format!("frames {frames:?} do not fit in a buffer")));
            }
        }
        Ok(())
    }

    /// The plain bytes of one frame, whose stored bytes are in `fetched` after those of the frames from
    /// `first` on.
    pub(crate) fn decode<'a>(
        &self,
        frame: u32,
        first: u32,
        fetched: &[u8],
        decoder: &'a mut FrameDecoder,
    ) -> Result<&'a [u8], PipelineError> {
        let no_frame = || self.damaged(format!("it has no frame {frame}"));
        let stamp = self.table.stamp(frame).ok_or_else(no_frame)?;
        let base = self.place(&(first..frame + 1))?.start;
        let place = self.table.place(frame).ok_or_else(no_frame)?;
        let at = |offset: u64| usize::try_from(offset - base).unwrap_or(usize::MAX);
        let stored = fetched
            .get(at(place.start)..at(place.end))
            .unwrap_or_default();
        let plain = decoder.decode_verified(stored, stamp);
        plain.map_err(|damage| self.damaged(format!("frame {frame}: {damage}")))
    }
}

/// A range that is known to be small.
async fn collect(
    downloader: &Downloader,
    key: &Key,
    info: &PackInfo,
    range: Range<u64>,
) -> Result<Vec<u8>, PipelineError> {
    let mut bytes = Vec::new();
    let mut ranged = Ranged::new(downloader.clone(), key.clone(), range, info.size);
    while let Some(chunk) = ranged.next().await? {
        bytes.extend_from_slice(&chunk);
    }
    Ok(bytes)
}
