//! Files in memory: random access, sparse, and compressed where they are large.

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use super::error::FsError;

/// Bytes of a file that are compressed together: 256 KiB.
const LARGE_CHUNK: usize = 256 << 10;
/// Bytes of a small file that are kept together: 16 KiB.
const SMALL_CHUNK: usize = 16 << 10;
/// The longest that a file in memory may be, holes included: 16 GiB.
const LONGEST: u64 = 16 << 30;
/// zstd's level for the list of files: it is text that repeats itself.
const LEVEL: i32 = 3;
/// What a chunk costs besides its bytes.
const OVERHEAD: usize = 64;

/// Memory set aside for files of one kind.
#[derive(Debug)]
pub(super) struct Quota {
    limit: usize,
    used: AtomicUsize,
}

impl Quota {
    pub(super) fn new(limit: usize) -> Arc<Self> {
        let used = AtomicUsize::new(0);
        Arc::new(Self { limit, used })
    }

    fn take(&self, bytes: usize) -> Result<(), FsError> {
        let more = |used: usize| used.checked_add(bytes).filter(|sum| *sum <= self.limit);
        let taken = self
            .used
            .fetch_update(Ordering::AcqRel, Ordering::Acquire, more);
        taken.map(drop).map_err(|_| FsError::NoSpace)
    }

    fn give(&self, bytes: usize) {
        self.used.fetch_sub(bytes, Ordering::AcqRel);
    }
}

/// A piece of a file. What is absent, or behind the end of its bytes, is zeros.
#[derive(Debug, Clone)]
enum Chunk {
    Plain(Vec<u8>),
    Packed(Arc<[u8]>),
}

impl Chunk {
    fn cost(&self) -> usize {
        match self {
            Self::Plain(bytes) => bytes.capacity() + OVERHEAD,
            Self::Packed(bytes) => bytes.len() + OVERHEAD,
        }
    }
}

/// A file in memory.
#[derive(Debug)]
pub(super) struct MemoryFile {
    size: u64,
    chunks: BTreeMap<u32, Chunk>,
    quota: Arc<Quota>,
    /// Whether chunks are compressed once the file has grown past them.
    packs: bool,
}

/// Work on chunks that is to be done with no lock held; its result is handed back.
#[derive(Debug)]
pub(super) struct Repack {
    number: u32,
    before: Chunk,
}

/// The same, done.
#[derive(Debug)]
pub(super) struct Repacked {
    work: Repack,
    after: Chunk,
}

impl Repack {
    /// Compresses or decompresses.
    ///
    /// # Errors
    /// [`FsError::Io`] if zstd fails.
    pub(super) fn run(self) -> Result<Repacked, FsError> {
        let after = match &self.before {
            Chunk::Plain(bytes) => {
                let packed = zstd::bulk::compress(bytes, LEVEL).map_err(|_| FsError::Io)?;
                Chunk::Packed(packed.into())
            }
            Chunk::Packed(packed) => Chunk::Plain(unpack(packed)?),
        };
        Ok(Repacked { work: self, after })
    }
}

fn unpack(packed: &[u8]) -> Result<Vec<u8>, FsError> {
    zstd::bulk::decompress(packed, LARGE_CHUNK).map_err(|_| FsError::Io)
}

/// A part of what was read.
#[derive(Debug)]
pub(super) enum Piece {
    Zeros(usize),
    Plain(Vec<u8>),
    Packed(Arc<[u8]>, Range<usize>),
}

/// Puts together what was read; decompresses, so hold no lock.
///
/// # Errors
/// [`FsError::Io`] if zstd fails.
pub(super) fn join(pieces: Vec<Piece>) -> Result<Vec<u8>, FsError> {
    let mut whole = Vec::new();
    for piece in pieces {
        match piece {
            Piece::Zeros(length) => whole.resize(whole.len() + length, 0),
            Piece::Plain(bytes) => whole.extend_from_slice(&bytes),
            Piece::Packed(packed, range) => {
                let bytes = unpack(&packed)?;
                let there = bytes.get(range.start.min(bytes.len())..range.end.min(bytes.len()));
                let there = there.unwrap_or_default();
                whole.extend_from_slice(there);
                whole.resize(whole.len() + range.len() - there.len(), 0);
            }
        }
    }
    Ok(whole)
}

impl MemoryFile {
    pub(super) fn new(quota: &Arc<Quota>, packs: bool) -> Self {
        Self {
            size: 0,
            chunks: BTreeMap::new(),
            quota: Arc::clone(quota),
            packs,
        }
    }

    pub(super) fn size(&self) -> u64 {
        self.size
    }

    fn chunk(&self) -> usize {
        if self.packs { LARGE_CHUNK } else { SMALL_CHUNK }
    }

    /// The chunk of an offset, and where in it.
    fn place(&self, offset: u64) -> (u32, usize) {
        let chunk = self.chunk() as u64;
        let number = u32::try_from(offset / chunk).unwrap_or(u32::MAX);
        (number, usize::try_from(offset % chunk).unwrap_or(0))
    }

    /// Chunks that must be decompressed before bytes can be written there.
    pub(super) fn packed_in(&self, offset: u64, length: usize) -> Vec<Repack> {
        let last = self.place(offset + (length as u64).max(1) - 1).0;
        let within = self.chunks.range(self.place(offset).0..=last);
        let packed = within.filter(|(_, chunk)| matches!(chunk, Chunk::Packed(_)));
        let repack = |(number, chunk): (&u32, &Chunk)| Repack {
            number: *number,
            before: chunk.clone(),
        };
        packed.map(repack).collect()
    }

    /// Chunks before `offset` that are to be compressed: the file has grown past them.
    pub(super) fn to_pack(&self, offset: u64) -> Vec<Repack> {
        if !self.packs {
            return Vec::new();
        }
        let end = self.place(offset).0;
        // The newest come last, and older ones were packed when they were the newest.
        let behind = self.chunks.range(..end).rev();
        let plain = behind.map_while(|(number, chunk)| match chunk {
            Chunk::Plain(_) => Some(Repack {
                number: *number,
                before: chunk.clone(),
            }),
            Chunk::Packed(_) => None,
        });
        plain.collect()
    }

    /// Puts the result of work in place, unless the chunk was changed meanwhile.
    ///
    /// # Errors
    /// [`FsError::NoSpace`].
    pub(super) fn replace(&mut self, done: Repacked) -> Result<(), FsError> {
        let Some(chunk) = self.chunks.get_mut(&done.work.number) else {
            return Ok(());
        };
        let unchanged = match (&*chunk, &done.work.before) {
            (Chunk::Packed(now), Chunk::Packed(then)) => Arc::ptr_eq(now, then),
            (Chunk::Plain(now), Chunk::Plain(then)) => now == then,
            _ => false,
        };
        if unchanged {
            self.quota.take(done.after.cost())?;
            self.quota.give(chunk.cost());
            *chunk = done.after;
        }
        Ok(())
    }

    /// Writes; no chunk there may be packed.
    ///
    /// # Errors
    /// [`FsError::TooLarge`], [`FsError::NoSpace`]; what was written before that stays.
    pub(super) fn write(&mut self, offset: u64, bytes: &[u8]) -> Result<(), FsError> {
        let end = offset.checked_add(bytes.len() as u64);
        let end = end.filter(|end| *end <= LONGEST).ok_or(FsError::TooLarge)?;
        let mut at = offset;
        let mut rest = bytes;
        while !rest.is_empty() {
            let (number, start) = self.place(at);
            let (now, later) = rest.split_at(rest.len().min(self.chunk() - start));
            self.write_chunk(number, start, now)?;
            at += now.len() as u64;
            self.size = self.size.max(at);
            rest = later;
        }
        self.size = self.size.max(end);
        Ok(())
    }

    fn write_chunk(&mut self, number: u32, start: usize, bytes: &[u8]) -> Result<(), FsError> {
        let zero = is_zero(bytes);
        let chunk = match self.chunks.remove(&number) {
            Some(chunk) => chunk,
            // A hole stays one.
            None if zero => return Ok(()),
            None => {
                self.quota.take(OVERHEAD)?;
                Chunk::Plain(Vec::new())
            }
        };
        let Chunk::Plain(mut plain) = chunk else {
            self.chunks.insert(number, chunk);
            return Err(FsError::Io);
        };
        let written = self.write_plain(&mut plain, start, bytes);
        self.chunks.insert(number, Chunk::Plain(plain));
        written
    }

    fn write_plain(&self, plain: &mut Vec<u8>, start: usize, bytes: &[u8]) -> Result<(), FsError> {
        let end = start + bytes.len();
        if end > plain.len() {
            if end > plain.capacity() {
                let wanted = end.max(plain.capacity() * 2).min(self.chunk());
                let more = wanted - plain.capacity();
                self.quota.take(more)?;
                let before = plain.capacity();
                plain.reserve_exact(wanted - plain.len());
                // The allocator may be generous.
                let excess = plain.capacity() - before - more;
                if excess > 0 {
                    self.quota.used.fetch_add(excess, Ordering::AcqRel);
                }
            }
            plain.resize(end, 0);
        }
        if let Some(place) = plain.get_mut(start..end) {
            place.copy_from_slice(bytes);
        }
        Ok(())
    }

    /// Makes the file `size` bytes long; no chunk at its new end may be packed.
    ///
    /// # Errors
    /// [`FsError::TooLarge`].
    pub(super) fn resize(&mut self, size: u64) -> Result<(), FsError> {
        if size > LONGEST {
            return Err(FsError::TooLarge);
        }
        if size < self.size {
            let (last, within) = self.place(size);
            let gone = self.chunks.split_off(&last);
            for (number, mut chunk) in gone {
                match &mut chunk {
                    Chunk::Plain(bytes) if number == last && within > 0 => {
                        bytes.truncate(within);
                        self.chunks.insert(number, chunk);
                    }
                    _ => self.quota.give(chunk.cost()),
                }
            }
        }
        self.size = size;
        Ok(())
    }

    /// What is there, from `offset`, at most `length` bytes.
    pub(super) fn read(&self, offset: u64, length: usize) -> Vec<Piece> {
        let left = usize::try_from(self.size.saturating_sub(offset)).unwrap_or(usize::MAX);
        let mut left = left.min(length);
        let mut at = offset;
        let mut pieces = Vec::new();
        while left > 0 {
            let (number, start) = self.place(at);
            let length = left.min(self.chunk() - start);
            match self.chunks.get(&number) {
                None => pieces.push(Piece::Zeros(length)),
                Some(Chunk::Packed(packed)) => {
                    pieces.push(Piece::Packed(Arc::clone(packed), start..start + length));
                }
                Some(Chunk::Plain(bytes)) => {
                    let end = bytes.len().min(start + length);
                    let there = bytes.get(start.min(end)..end).unwrap_or_default();
                    pieces.push(Piece::Plain(there.to_vec()));
                    if there.len() < length {
                        pieces.push(Piece::Zeros(length - there.len()));
                    }
                }
            }
            at += length as u64;
            left -= length;
        }
        pieces
    }
}

impl Drop for MemoryFile {
    fn drop(&mut self) {
        for chunk in self.chunks.values() {
            self.quota.give(chunk.cost());
        }
    }
}

/// Zeros to compare with and to write.
pub(super) static ZEROS: [u8; 1 << 20] = [0; 1 << 20];

/// Whether all bytes are zero, at the speed of the C library's comparison.
pub(super) fn is_zero(bytes: &[u8]) -> bool {
    let mut parts = bytes.chunks(ZEROS.len());
    parts.all(|part| ZEROS.get(..part.len()) == Some(part))
}
