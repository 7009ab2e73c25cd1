//! A WAL segment while a program writes it, and what it is afterwards.

use std::sync::Arc;

use bytes::Bytes;

use super::error::FsError;
use super::lanes::Room;
use super::memory::{Piece, is_zero};

/// One WAL segment. `pg_probackup` and `gs_probackup` first write zeros up to its size, which take no memory, and then
/// the WAL from its start on.
#[derive(Debug)]
pub(super) struct Segment {
    size: u64,
    /// What a whole one has.
    full: u64,
    /// Whether it has had its whole size.
    padded: bool,
    /// How far it was written for good.
    front: u64,
    body: SegmentBody,
}

/// Where its bytes are.
#[derive(Debug)]
pub(super) enum SegmentBody {
    /// Zeros only.
    Blank,
    /// Being written.
    Held(Box<Held>),
    /// Complete, and on its way into the bucket under this name.
    Whole(Box<str>, Bytes),
    /// In the bucket under this name.
    Stored(Box<str>),
}

/// The memory of a segment, paid for until it is dropped. Pages of it that were never written are none.
#[derive(Debug)]
pub(super) struct Held {
    bytes: Vec<u8>,
    room: Arc<Room>,
}

impl AsRef<[u8]> for Held {
    fn as_ref(&self) -> &[u8] {
        &self.bytes
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        // First the memory itself.
        let bytes = std::mem::take(&mut self.bytes);
        let length = bytes.len();
        drop(bytes);
        self.room.release(length);
    }
}

/// What is to be read from where.
#[derive(Debug)]
pub(super) enum Source {
    Memory(Vec<Piece>),
    Shared(Bytes),
    Bucket(Box<str>),
}

impl Segment {
    pub(super) fn new(full: u64) -> Self {
        Self {
            size: 0,
            full,
            padded: false,
            front: 0,
            body: SegmentBody::Blank,
        }
    }

    pub(super) fn size(&self) -> u64 {
        self.size
    }

    pub(super) fn body(&self) -> &SegmentBody {
        &self.body
    }

    /// Writes. The memory is charged to `room` when the first byte that is not zero comes.
    ///
    /// # Errors
    /// [`FsError::TooLarge`]; [`FsError::Refused`] when it was complete.
    pub(super) fn write(
        &mut self,
        offset: u64,
        bytes: &[u8],
        room: &Arc<Room>,
    ) -> Result<(), FsError> {
        let end = offset.checked_add(bytes.len() as u64);
        let end = end
            .filter(|end| *end <= self.full)
            .ok_or(FsError::TooLarge)?;
        let zero = is_zero(bytes);
        if matches!(self.body, SegmentBody::Blank) && !zero {
            self.body = SegmentBody::Held(Box::new(self.hold(room)));
        }
        match &mut self.body {
            SegmentBody::Blank => {}
            SegmentBody::Held(held) => {
                let start = usize::try_from(offset).unwrap_or(usize::MAX);
                let place = held.bytes.get_mut(start..start + bytes.len());
                place.ok_or(FsError::TooLarge)?.copy_from_slice(bytes);
            }
            SegmentBody::Whole(..) | SegmentBody::Stored(_) => {
                return Err(FsError::Refused("a complete WAL segment is written again"));
            }
        }
        if (self.padded || !zero) && offset <= self.front {
            self.front = self.front.max(end);
        }
        self.size = self.size.max(end);
        self.padded |= self.size == self.full;
        Ok(())
    }

    fn hold(&self, room: &Arc<Room>) -> Held {
        let length = usize::try_from(self.full).unwrap_or(0);
        room.charge(length);
        Held {
            bytes: vec![0; length],
            room: Arc::clone(room),
        }
    }

    /// Lengthens by zeros or cuts off. What it held until now is to be dropped with no lock held.
    ///
    /// # Errors
    /// [`FsError::TooLarge`]; [`FsError::Refused`] when it was complete, unless nothing is left of it.
    pub(super) fn resize(&mut self, size: u64) -> Result<Option<SegmentBody>, FsError> {
        if size > self.full {
            return Err(FsError::TooLarge);
        }
        if size == 0 {
            let new = Self::new(self.full);
            return Ok(Some(std::mem::replace(self, new).body));
        }
        if size == self.size {
            return Ok(None);
        }
        match &mut self.body {
            SegmentBody::Blank => {}
            SegmentBody::Held(held) => {
                let start = usize::try_from(size).unwrap_or(usize::MAX);
                if let Some(gone) = held.bytes.get_mut(start..) {
                    gone.fill(0);
                }
            }
            SegmentBody::Whole(..) | SegmentBody::Stored(_) => {
                return Err(FsError::Refused("a complete WAL segment is cut"));
            }
        }
        self.front = self.front.min(size);
        self.size = size;
        self.padded |= size == self.full;
        Ok(None)
    }

    /// Whether it was written from its start to its end, after the zeros or without any.
    pub(super) fn is_written(&self) -> bool {
        self.size == self.full && self.front == self.full
    }

    /// Declares it complete, if it has its size; from now on it cannot change. Its bytes, if they are not on their way
    /// yet.
    pub(super) fn complete(&mut self, name: &str) -> Option<Bytes> {
        if self.size != self.full || !matches!(self.body, SegmentBody::Held(_)) {
            return None;
        }
        match std::mem::replace(&mut self.body, SegmentBody::Blank) {
            SegmentBody::Held(held) => {
                let bytes = Bytes::from_owner(*held);
                self.body = SegmentBody::Whole(name.into(), bytes.clone());
                Some(bytes)
            }
            other => {
                self.body = other;
                None
            }
        }
    }

    /// Its bytes are in the bucket. What it held until now is to be dropped with no lock held.
    pub(super) fn stored(&mut self, sent: &Bytes) -> Option<SegmentBody> {
        let name = match &self.body {
            SegmentBody::Whole(name, bytes) if bytes.as_ptr() == sent.as_ptr() => name.clone(),
            // It was cut and begun anew meanwhile.
            _ => return None,
        };
        let stored = SegmentBody::Stored(name);
        Some(std::mem::replace(&mut self.body, stored))
    }

    /// Where `length` bytes from `offset` are; they end at the end of the file.
    pub(super) fn read(&self, offset: u64, length: usize) -> Source {
        let start = usize::try_from(offset.min(self.size)).unwrap_or(usize::MAX);
        let size = usize::try_from(self.size).unwrap_or(usize::MAX);
        let end = size.min(start.saturating_add(length));
        match &self.body {
            SegmentBody::Blank => Source::Memory(vec![Piece::Zeros(end - start)]),
            SegmentBody::Held(held) => {
                let bytes = held.bytes.get(start..end).unwrap_or_default();
                Source::Memory(vec![Piece::Plain(bytes.to_vec())])
            }
            SegmentBody::Whole(_, bytes) => Source::Shared(bytes.slice(start..end)),
            SegmentBody::Stored(name) => Source::Bucket(name.clone()),
        }
    }
}
