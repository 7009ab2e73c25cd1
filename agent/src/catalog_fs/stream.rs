//! A file that streams away: what of it has not been handed to the lanes yet.

use pipeline::index::FileId;
use pipeline::pack::FRAME_PLAIN_MAX;

use super::error::FsError;
use super::lanes::{Job, Work};
use super::memory::is_zero;

/// Zeros of fewer bytes between other bytes are kept as bytes: 64 KiB.
const FEW_ZEROS: u64 = 64 << 10;
/// Zeros are handed on when they are so many: 16 MiB.
const MANY_ZEROS: u64 = 16 << 20;
/// A write of fewer bytes is not looked through for zeros.
const LOOK_FROM: usize = 4 << 10;

/// What to do after a write.
#[derive(Debug, Default)]
pub(super) struct Taken {
    /// Bytes of memory that were taken for it. What the jobs hold was charged before, or is in here.
    pub(super) charge: usize,
    /// What is ready for the lanes.
    pub(super) jobs: Vec<Job>,
}

/// The file: bytes handed on, then `bytes`, then `zeros`.
#[derive(Debug)]
pub(super) struct Stream {
    file: FileId,
    size: u64,
    bytes: Vec<u8>,
    zeros: u64,
}

impl Stream {
    pub(super) fn new(file: FileId) -> Self {
        Self {
            file,
            size: 0,
            bytes: Vec::new(),
            zeros: 0,
        }
    }

    pub(super) fn file(&self) -> FileId {
        self.file
    }

    pub(super) fn size(&self) -> u64 {
        self.size
    }

    /// Bytes of memory that it holds.
    pub(super) fn held(&self) -> usize {
        self.bytes.capacity()
    }

    fn base(&self) -> u64 {
        self.size - self.zeros - self.bytes.len() as u64
    }

    /// Writes at or behind the end; what is skipped becomes zeros.
    ///
    /// # Errors
    /// [`FsError::Refused`] before the end; [`FsError::TooLarge`].
    pub(super) fn write(&mut self, offset: u64, bytes: &[u8]) -> Result<Taken, FsError> {
        let mut taken = Taken::default();
        if bytes.is_empty() {
            return Ok(taken);
        }
        if offset < self.size {
            return Err(FsError::Refused("it is written once, in order"));
        }
        if offset.checked_add(bytes.len() as u64).is_none() {
            return Err(FsError::TooLarge);
        }
        self.add_zeros(offset - self.size, &mut taken);
        if bytes.len() >= LOOK_FROM && is_zero(bytes) {
            self.add_zeros(bytes.len() as u64, &mut taken);
        } else {
            self.add_bytes(bytes, &mut taken);
        }
        Ok(taken)
    }

    /// Lengthens the file by zeros.
    pub(super) fn add_zeros(&mut self, length: u64, taken: &mut Taken) {
        self.zeros += length;
        self.size += length;
        if self.zeros >= MANY_ZEROS {
            taken.jobs.extend(self.hand_on());
        }
    }

    fn add_bytes(&mut self, mut bytes: &[u8], taken: &mut Taken) {
        if self.zeros >= FEW_ZEROS {
            taken.jobs.extend(self.hand_on());
        } else if self.zeros > 0 {
            let few = usize::try_from(self.zeros).unwrap_or(0);
            self.size -= self.zeros;
            self.zeros = 0;
            self.append(super::memory::ZEROS.get(..few).unwrap_or_default(), taken);
        }
        while !bytes.is_empty() {
            let (now, later) = bytes.split_at(bytes.len().min(FRAME_PLAIN_MAX));
            self.append(now, taken);
            bytes = later;
        }
    }

    fn append(&mut self, mut bytes: &[u8], taken: &mut Taken) {
        while !bytes.is_empty() {
            let room = FRAME_PLAIN_MAX - self.bytes.len();
            let (now, later) = bytes.split_at(bytes.len().min(room));
            self.reserve(now.len(), taken);
            self.bytes.extend_from_slice(now);
            self.size += now.len() as u64;
            bytes = later;
            if self.bytes.len() == FRAME_PLAIN_MAX {
                taken.jobs.extend(self.hand_on());
            }
        }
    }

    /// Makes room: exactly what is needed first, since most files are small, then twice as much each time.
    fn reserve(&mut self, more: usize, taken: &mut Taken) {
        let (length, before) = (self.bytes.len(), self.bytes.capacity());
        if length + more > before {
            let wanted = (length + more).max(before * 2).min(FRAME_PLAIN_MAX);
            self.bytes.reserve_exact(wanted - length);
            taken.charge += self.bytes.capacity() - before;
        }
    }

    /// Everything that is not handed on yet, as work for the lanes.
    pub(super) fn hand_on(&mut self) -> Vec<Job> {
        let mut jobs = Vec::new();
        let base = self.base();
        let bytes = std::mem::take(&mut self.bytes);
        let zeros = std::mem::take(&mut self.zeros);
        let length = bytes.len() as u64;
        if length > 0 {
            let charge = bytes.capacity();
            jobs.push(Job::new(self.file, base, Work::Bytes(bytes), charge));
        }
        if zeros > 0 {
            jobs.push(Job::new(self.file, base + length, Work::Zeros(zeros), 0));
        }
        jobs
    }
}
