//! Files into frames.

use std::sync::Arc;

use super::{FileId, IndexBuilder};
use crate::error::PipelineError;
use crate::pack::{Extent, FRAME_PLAIN_MAX, Lane};

/// A piece of a file below this many bytes shares a frame with others: 256 KiB.
pub const SHARE_BELOW: usize = 256 << 10;

static ZEROS: [u8; FRAME_PLAIN_MAX] = [0; FRAME_PLAIN_MAX];

/// Cuts chunks of files into frames for one lane, and tells the index where they are.
///
/// A big file is read as independent chunks of, say, 16 MiB by several threads, each with its own
/// packer, so that one big file uses every core.
#[derive(Debug)]
pub struct FilePacker {
    lane: Lane,
    index: Arc<IndexBuilder>,
    /// Small pieces that will be one frame.
    shared: Vec<u8>,
    waiting: Vec<Waiting>,
}

#[derive(Debug)]
struct Waiting {
    file: FileId,
    file_offset: u64,
    /// Where in the shared frame.
    offset: u32,
    length: u64,
}

fn narrow(offset: usize) -> u32 {
    u32::try_from(offset).unwrap_or(u32::MAX)
}

impl FilePacker {
    /// A packer for `lane`; belongs to the lane's thread.
    #[must_use]
    pub fn new(lane: Lane, index: Arc<IndexBuilder>) -> Self {
        Self {
            lane,
            index,
            shared: Vec::new(),
            waiting: Vec::new(),
        }
    }

    /// The counters of the operation.
    #[must_use]
    pub fn meter(&self) -> &crate::meter::Meter {
        self.lane.meter()
    }

    /// Stores `plain`, the bytes of `file` from `file_offset`. Any length; multiples of 1 MiB are best:
    /// they are compressed from where they are. A rest below 256 KiB shares a frame with other small pieces
    /// and is placed when that is full.
    ///
    /// # Errors
    /// As [`Lane::write`].
    pub fn chunk(
        &mut self,
        file: FileId,
        file_offset: u64,
        plain: &[u8],
    ) -> Result<(), PipelineError> {
        self.pieces(file, file_offset, plain.chunks(FRAME_PLAIN_MAX))
    }

    /// Stores `length` zeros as the bytes of `file` from `file_offset`. They take next to nothing, and a
    /// gigabyte of them about a fifth of a second.
    ///
    /// # Errors
    /// As [`Lane::write`].
    pub fn zeros(
        &mut self,
        file: FileId,
        file_offset: u64,
        length: u64,
    ) -> Result<(), PipelineError> {
        let whole = length / FRAME_PLAIN_MAX as u64;
        let rest = usize::try_from(length % FRAME_PLAIN_MAX as u64).unwrap_or(0);
        let frames = (0..whole).map(|_| &ZEROS[..]);
        let rest = ZEROS.get(..rest).filter(|rest| !rest.is_empty());
        self.pieces(file, file_offset, frames.chain(rest))
    }

    fn pieces<'a>(
        &mut self,
        file: FileId,
        file_offset: u64,
        pieces: impl Iterator<Item = &'a [u8]>,
    ) -> Result<(), PipelineError> {
        let mut run: Option<Waiting> = None;
        let mut run_place = (0, 0, 0);
        let mut at = file_offset;
        for piece in pieces {
            let length = piece.len() as u64;
            if piece.len() < SHARE_BELOW {
                self.share(file, at, piece)?;
            } else {
                let (pack, frame) = self.lane.write(piece)?;
                let (run_pack, first, count) = run_place;
                match &mut run {
                    Some(run) if run_pack == pack && first + count == frame => {
                        run.length += length;
                        run_place.2 += 1;
                    }
                    _ => {
                        self.place(run.take(), run_place);
                        run_place = (pack, frame, 1);
                        run = Some(Waiting {
                            file,
                            file_offset: at,
                            offset: 0,
                            length,
                        });
                    }
                }
            }
            at += length;
        }
        self.place(run, run_place);
        Ok(())
    }

    fn place(&self, run: Option<Waiting>, (pack, first, count): (u32, u32, u32)) {
        if let Some(run) = run {
            let extent = Extent {
                pack,
                first,
                count,
                offset: run.offset,
                length: run.length,
            };
            self.index.placed(run.file, run.file_offset, extent);
        }
    }

    fn share(&mut self, file: FileId, file_offset: u64, piece: &[u8]) -> Result<(), PipelineError> {
        if self.shared.len() + piece.len() > FRAME_PLAIN_MAX {
            self.flush()?;
        }
        let offset = narrow(self.shared.len());
        self.shared.extend_from_slice(piece);
        let length = piece.len() as u64;
        match self.waiting.last_mut() {
            // The next bytes of the same file: one extent.
            Some(last) if last.file == file && last.file_offset + last.length == file_offset => {
                last.length += length;
            }
            _ => self.waiting.push(Waiting {
                file,
                file_offset,
                offset,
                length,
            }),
        }
        Ok(())
    }

    fn flush(&mut self) -> Result<(), PipelineError> {
        if self.shared.is_empty() {
            return Ok(());
        }
        let (pack, frame) = self.lane.write(&self.shared)?;
        self.shared.clear();
        for waiting in std::mem::take(&mut self.waiting) {
            self.place(Some(waiting), (pack, frame, 1));
        }
        Ok(())
    }

    /// Writes what waits, and ends the lane.
    ///
    /// # Errors
    /// As [`Lane::write`].
    pub fn finish(mut self) -> Result<(), PipelineError> {
        self.flush()?;
        self.lane.finish()
    }
}
