//! Calls on open files: read, write, flush, close.

use std::sync::Arc;

use bytes::Bytes;

use super::class::is_final;
use super::error::FsError;
use super::memory::{self, MemoryFile, Piece, Repack};
use super::names::refuse;
use super::segment::Source;
use super::stream::{Stream, Taken};
use super::tree::Node;
use super::{CatalogFs, Data, Done, Handle};

const UNREADABLE: &str = "a file of the running backup streams away and cannot be read";
const NOT_OVERWRITTEN: &str = "a file of the lower layer can only be replaced as a whole";
const CUT: &str = "a file that streams away can only be cut to nothing";

/// Where bytes to be read are.
enum Found {
    Here(Vec<Piece>),
    Shared(Bytes),
    Lower(super::LowerId),
    /// The segment's name and bytes.
    Bucket(Box<str>, u64),
}

impl CatalogFs {
    /// Reads `length` bytes from `offset`, fewer only at the end of the file.
    ///
    /// Answers [`FsError::BadHandle`], [`FsError::Refused`] for what streams away, [`FsError::Io`].
    pub fn read(&self, handle: Handle, offset: u64, length: usize, done: Done<Bytes>) {
        self.activity.touch();
        let open = match self.open_of(handle) {
            Ok(open) if open.how.read => open,
            Ok(_) => return done(Err(FsError::BadHandle)),
            Err(error) => return done(Err(error)),
        };
        let found = match &open.node.state().data {
            Data::Memory(file) => Ok(Found::Here(file.read(offset, length))),
            Data::Lower { id, .. } => Ok(Found::Lower(*id)),
            Data::Segment(segment) => Ok(match segment.read(offset, length) {
                Source::Memory(pieces) => Found::Here(pieces),
                Source::Shared(bytes) => Found::Shared(bytes),
                Source::Bucket(name) => Found::Bucket(name, segment.size()),
            }),
            Data::Stream(_) => Err(FsError::Refused(UNREADABLE)),
        };
        match found {
            Ok(Found::Here(pieces)) => done(memory::join(pieces).map(Bytes::from)),
            Ok(Found::Shared(bytes)) => done(Ok(bytes)),
            Ok(Found::Lower(id)) => self.lower.read(id, offset, length, done),
            Ok(Found::Bucket(name, size)) => {
                let start = offset.min(size);
                let end = size.min(start.saturating_add(length as u64));
                match &self.backup {
                    Some(backup) if start < end => {
                        backup.wal.read(name.into(), size, start..end, done);
                    }
                    _ => done(Ok(Bytes::new())),
                }
            }
            Err(error) => done(Err(refuse(&self.path(open.node.ino), error))),
        }
    }

    /// Writes. Never blocks: the bytes are taken, and the answer comes when there is room.
    ///
    /// Answers with the number of bytes, which is always all of them; [`FsError::BadHandle`], [`FsError::TooLarge`],
    /// [`FsError::NoSpace`], [`FsError::Refused`]; [`FsError::Io`] if the copy has failed, or if this file streams away and was written
    /// there before (the copy is spoiled then).
    pub fn write(&self, handle: Handle, offset: u64, bytes: &[u8], done: Done<u32>) {
        self.activity.touch();
        let count = u32::try_from(bytes.len()).unwrap_or(u32::MAX);
        let open = self.faults.check().and_then(|()| self.open_of(handle));
        let open = match open {
            Ok(open) if open.how.write => open,
            Ok(_) => return done(Err(FsError::BadHandle)),
            Err(error) => return done(Err(error)),
        };
        let offset = (!open.how.append).then_some(offset);
        match self.take(&open.node, offset, bytes) {
            Ok(None) => done(Ok(count)),
            Ok(Some(room)) => {
                let activity = Arc::clone(&self.activity);
                room.answer(Box::new(move |waited| {
                    activity.touch();
                    done(waited.map(|()| count));
                }));
            }
            Err(error) => done(Err(error)),
        }
    }

    /// Puts bytes where they belong, at the end if there is no offset; says which room the answer has to wait for.
    fn take(
        &self,
        node: &Arc<Node>,
        offset: Option<u64>,
        bytes: &[u8],
    ) -> Result<Option<Arc<super::lanes::Room>>, FsError> {
        let mut state = node.state();
        state.mtime = super::now();
        let offset = offset.unwrap_or_else(|| state.data.size());
        match (&mut state.data, &self.backup) {
            (Data::Stream(stream), Some(backup)) => {
                let taken = stream.write(offset, bytes);
                drop(state);
                let taken = taken.map_err(|error| self.spoil(node, error))?;
                backup.took(node, taken);
                Ok(Some(Arc::clone(backup.lanes.room())))
            }
            (Data::Segment(segment), Some(backup)) => {
                let taken = segment.write(offset, bytes, &backup.wal.room);
                drop(state);
                taken.map_err(|error| self.spoil(node, error))?;
                Ok(Some(Arc::clone(&backup.wal.room)))
            }
            (Data::Memory(_), _) => {
                drop(state);
                write_memory(node, offset, bytes)?;
                Ok(None)
            }
            (Data::Lower { .. }, _) => {
                drop(state);
                let error = FsError::Refused(NOT_OVERWRITTEN);
                Err(refuse(&self.path(node.ino), error))
            }
            // A reading mount makes none of these.
            (Data::Stream(_) | Data::Segment(_), None) => Err(FsError::Io),
        }
    }

    /// What the copy cannot follow.
    fn spoil(&self, node: &Node, error: FsError) -> FsError {
        match error {
            FsError::Refused(what) => {
                self.faults.spoil(&self.path(node.ino), what);
                FsError::Io
            }
            other => other,
        }
    }

    /// One `close()` of the file. Answers at once, with what is known to have gone wrong so far: it waits for no part.
    pub fn flush(&self, handle: Handle, done: Done<()>) {
        self.activity.touch();
        let open = match self.open_of(handle) {
            Ok(open) => open,
            Err(error) => return done(Err(error)),
        };
        if open.how.write {
            // Not when it is released: the kernel does that at some later time.
            self.complete_written(&open.node);
        }
        done(self.known(open.how.write));
    }

    /// Answers at once, as [`Self::flush`]: nothing is durable before the copy is sealed, and then everything is.
    pub fn fsync(&self, handle: Handle, done: Done<()>) {
        self.activity.touch();
        let open = self.open_of(handle);
        done(open.and_then(|open| self.known(open.how.write)));
    }

    fn known(&self, writes: bool) -> Result<(), FsError> {
        if writes { self.faults.check() } else { Ok(()) }
    }

    /// Closes a handle. An unknown one is ignored.
    pub fn release(&self, handle: Handle) {
        self.activity.touch();
        let open = self.handles().remove(&handle.0);
        let Some(open) = open else {
            return;
        };
        let node = &open.node;
        let (last_writer, unused, done) = {
            let mut state = node.state();
            state.opens = state.opens.saturating_sub(1);
            if open.how.write {
                state.writers = state.writers.saturating_sub(1);
            }
            let last_writer = open.how.write && state.writers == 0;
            let done = last_writer && !state.counted && matches!(state.data, Data::Stream(_));
            state.counted |= done;
            (last_writer, state.opens == 0 && !state.linked, done)
        };
        if last_writer && let Some(backup) = &self.backup {
            backup.hand_on(node);
            if done {
                backup.meter().add_files(1);
            }
        }
        if unused {
            let gone = self.tree().forget(node.ino);
            if let Some(backup) = &self.backup {
                backup.pending().remove(&node.ino);
            }
            drop(gone);
        }
    }

    /// A segment under its final name is complete when it was closed after it was written to its end.
    fn complete_written(&self, node: &Arc<Node>) {
        let written = match &node.state().data {
            Data::Segment(segment) => segment.is_written(),
            _ => false,
        };
        let Some(backup) = self.backup.as_ref().filter(|_| written) else {
            return;
        };
        let tree = self.tree();
        let name = tree.inode(node.ino).map(|inode| Arc::clone(&inode.name));
        if let Ok(name) = name
            && is_final(&name)
            && node.state().linked
        {
            backup.complete(node, &name);
        }
    }

    /// Cuts or lengthens a file.
    pub(super) fn resize(&self, node: &Arc<Node>, size: u64) -> Result<(), FsError> {
        let mut state = node.state();
        match (&mut state.data, &self.backup) {
            (Data::Memory(_), _) => {
                drop(state);
                resize_memory(node, size)
            }
            (Data::Lower { .. }, None) if size == 0 => {
                let file = MemoryFile::new(&self.quota, false);
                state.data = Data::Memory(file);
                Ok(())
            }
            (Data::Lower { size: now, .. }, _) if *now == size => Ok(()),
            (Data::Lower { .. }, backup) => {
                drop(state);
                let error = match backup {
                    Some(_) => FsError::ReadOnly,
                    None => FsError::Refused(NOT_OVERWRITTEN),
                };
                Err(refuse(&self.path(node.ino), error))
            }
            (Data::Segment(segment), _) => {
                let gone = segment.resize(size);
                drop(state);
                let gone = gone.map_err(|error| self.spoil(node, error))?;
                drop(gone);
                Ok(())
            }
            (Data::Stream(stream), Some(backup)) if size == 0 => {
                if stream.size() == 0 {
                    return Ok(());
                }
                let new = Stream::new(backup.new_file()?);
                let old = std::mem::replace(stream, new);
                drop(state);
                backup.lanes.room().release(old.held());
                Ok(())
            }
            (Data::Stream(stream), Some(backup)) if size >= stream.size() => {
                let mut taken = Taken::default();
                let more = size - stream.size();
                stream.add_zeros(more, &mut taken);
                drop(state);
                backup.took(node, taken);
                Ok(())
            }
            (Data::Stream(_), _) => {
                drop(state);
                let path = self.path(node.ino);
                self.faults.spoil(&path, CUT);
                Err(FsError::Refused(CUT))
            }
        }
    }
}

/// Runs `change` on a file in memory when the chunks it touches are unpacked; what it returns is packed afterwards.
fn change_memory(
    node: &Node,
    mut change: impl FnMut(&mut MemoryFile) -> Result<Result<Vec<Repack>, Vec<Repack>>, FsError>,
) -> Result<(), FsError> {
    loop {
        let work = match &mut node.state().data {
            Data::Memory(file) => change(file)?,
            _ => return Err(FsError::Io),
        };
        let (work, ready) = match work {
            Ok(to_pack) => (to_pack, true),
            Err(to_unpack) => (to_unpack, false),
        };
        for work in work {
            let done = work.run()?;
            if let Data::Memory(file) = &mut node.state().data {
                file.replace(done)?;
            }
        }
        if ready {
            return Ok(());
        }
    }
}

fn write_memory(node: &Node, offset: u64, bytes: &[u8]) -> Result<(), FsError> {
    change_memory(node, |file| {
        let packed = file.packed_in(offset, bytes.len());
        if !packed.is_empty() {
            return Ok(Err(packed));
        }
        file.write(offset, bytes)?;
        Ok(Ok(file.to_pack(offset + bytes.len() as u64)))
    })
}

fn resize_memory(node: &Node, size: u64) -> Result<(), FsError> {
    change_memory(node, |file| {
        let packed = if size < file.size() {
            file.packed_in(size, 1)
        } else {
            Vec::new()
        };
        if !packed.is_empty() {
            return Ok(Err(packed));
        }
        file.resize(size)?;
        Ok(Ok(Vec::new()))
    })
}
