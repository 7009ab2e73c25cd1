//! Calls on a [`CatalogFs`] in this process, as the kernel would make them for a program.

use std::ffi::OsStr;
use std::sync::Arc;
use std::sync::mpsc;
use std::time::Duration;

use bytes::Bytes;
use pitr_agent::catalog_fs::{
    Attr, CatalogFs, Done, FileKind, FsError, Handle, Ino, OpenHow, Opened, ROOT,
};

use crate::ops::{Call, FileSystem, How, Outcome, SLOTS};

/// Nothing waits for longer in a test.
const LONG: Duration = Duration::from_mins(2);

/// A program's view of the file system.
pub(crate) struct Subject {
    pub(crate) fs: Arc<CatalogFs>,
    slots: Vec<Option<Handle>>,
}

/// Waits for the answer of a call.
pub(crate) fn wait<T: Send + 'static>(call: impl FnOnce(Done<T>)) -> Result<T, FsError> {
    let (sender, answer) = mpsc::channel();
    call(Box::new(move |result| {
        let _ = sender.send(result);
    }));
    answer.recv_timeout(LONG).expect("a call was not answered")
}

impl Subject {
    pub(crate) fn new(fs: Arc<CatalogFs>) -> Self {
        let slots = vec![None; SLOTS];
        Self { fs, slots }
    }

    /// The directory of a path, as the kernel walks there, and the last name.
    pub(crate) fn parent<'a>(&self, path: &'a str) -> Result<(Ino, &'a OsStr), FsError> {
        let (parents, name) = path.rsplit_once('/').unwrap_or(("", path));
        let mut at = ROOT;
        for part in parents.split('/').filter(|part| !part.is_empty()) {
            let found = self.fs.lookup(at, OsStr::new(part))?;
            if found.kind != FileKind::Directory {
                return Err(FsError::NotDirectory);
            }
            at = found.ino;
        }
        Ok((at, OsStr::new(name)))
    }

    pub(crate) fn find(&self, path: &str) -> Result<Attr, FsError> {
        let (parent, name) = self.parent(path)?;
        self.fs.lookup(parent, name)
    }

    pub(crate) fn open(&self, path: &str, how: How) -> Result<Opened, FsError> {
        let (parent, name) = self.parent(path)?;
        let flags = OpenHow {
            read: how.read,
            write: how.write,
            truncate: how.truncate,
            exclusive: how.exclusive,
            append: how.append,
        };
        if how.create {
            Ok(self.fs.create(parent, name, 0o600, flags)?.1)
        } else {
            let found = self.fs.lookup(parent, name)?;
            self.fs.open(found.ino, flags)
        }
    }

    pub(crate) fn write(&self, handle: Handle, offset: u64, bytes: &[u8]) -> Result<(), FsError> {
        let mut at = offset;
        // The kernel sends no more at a time.
        for piece in bytes.chunks(1 << 20) {
            let written = wait(|done| self.fs.write(handle, at, piece, done))?;
            assert_eq!(written as usize, piece.len());
            at += piece.len() as u64;
        }
        Ok(())
    }

    pub(crate) fn read(
        &self,
        handle: Handle,
        offset: u64,
        length: usize,
    ) -> Result<Vec<u8>, FsError> {
        let mut bytes = Vec::new();
        while bytes.len() < length {
            let (at, want) = (
                offset + bytes.len() as u64,
                (length - bytes.len()).min(128 << 10),
            );
            let piece: Bytes = wait(|done| self.fs.read(handle, at, want, done))?;
            bytes.extend_from_slice(&piece);
            if piece.len() < want {
                break;
            }
        }
        Ok(bytes)
    }

    pub(crate) fn close(&self, handle: Handle) -> Result<(), FsError> {
        let flushed = wait(|done| self.fs.flush(handle, done));
        self.fs.release(handle);
        flushed
    }

    /// A whole file, in writes of the programs' size.
    pub(crate) fn put(&self, path: &str, bytes: &[u8]) -> Result<(), FsError> {
        let how = How {
            write: true,
            create: true,
            truncate: true,
            ..How::default()
        };
        let handle = self.open(path, how)?.handle;
        let mut written = Ok(());
        for (number, piece) in bytes.chunks(64 << 10).enumerate() {
            written = written.and_then(|()| self.write(handle, (number as u64) << 16, piece));
        }
        let closed = self.close(handle);
        written.and(closed)
    }

    pub(crate) fn get(&self, path: &str) -> Result<Vec<u8>, FsError> {
        let how = How {
            read: true,
            ..How::default()
        };
        let handle = self.open(path, how)?.handle;
        let size = usize::try_from(self.find(path)?.size).unwrap();
        let bytes = self.read(handle, 0, size + 1);
        self.close(handle)?;
        bytes
    }

    pub(crate) fn mkdir(&self, path: &str) -> Result<(), FsError> {
        let (parent, name) = self.parent(path)?;
        self.fs.mkdir(parent, name, 0o700).map(drop)
    }

    pub(crate) fn unlink(&self, path: &str) -> Result<(), FsError> {
        let (parent, name) = self.parent(path)?;
        self.fs.unlink(parent, name)
    }

    pub(crate) fn rename(&self, from: &str, to: &str) -> Result<(), FsError> {
        let (from, name) = self.parent(from)?;
        let (to, new_name) = self.parent(to)?;
        self.fs.rename(from, name, to, new_name)
    }

    fn truncate(&self, path: &str, size: u64) -> Result<(), FsError> {
        let how = How {
            write: true,
            ..How::default()
        };
        let handle = self.open(path, how)?.handle;
        let cut = self.fs.setattr(self.find(path)?.ino, None, Some(size));
        self.close(handle)?;
        cut.map(drop)
    }

    fn slot(&self, slot: usize) -> Result<Handle, FsError> {
        self.slots[slot].ok_or(FsError::BadHandle)
    }
}

fn outcome(done: Result<(), FsError>) -> Outcome {
    done.map_or_else(|error| Outcome::Errno(error.errno()), |()| Outcome::Done)
}

impl FileSystem for Subject {
    fn call(&mut self, call: &Call) -> Outcome {
        match call {
            Call::Open(slot, path, how) => outcome(self.open(path, *how).map(|opened| {
                self.slots[*slot] = Some(opened.handle);
            })),
            Call::Write(slot, offset, fill) => {
                let handle = match self.slot(*slot) {
                    // A system call is not made for nothing.
                    Ok(_) if fill.length == 0 => return Outcome::Done,
                    Ok(handle) => handle,
                    Err(error) => return outcome(Err(error)),
                };
                outcome(self.write(handle, *offset, &fill.bytes()))
            }
            Call::Read(slot, offset, length) => {
                let handle = self.slot(*slot);
                match handle.and_then(|handle| self.read(handle, *offset, *length)) {
                    Ok(bytes) => Outcome::of_bytes(&bytes),
                    Err(error) => Outcome::Errno(error.errno()),
                }
            }
            Call::Fsync(slot) => {
                let handle = self.slot(*slot);
                outcome(handle.and_then(|handle| wait(|done| self.fs.fsync(handle, done))))
            }
            Call::Close(slot) => {
                if let Some(handle) = self.slots[*slot].take() {
                    self.close(handle).unwrap();
                }
                Outcome::Done
            }
            Call::Stat(path) => match self.find(path) {
                Ok(attr) => Outcome::Stat {
                    mode: attr.mode,
                    size: (attr.kind == FileKind::File).then_some(attr.size),
                },
                Err(error) => Outcome::Errno(error.errno()),
            },
            Call::List(path) => {
                let list = self.find(path).and_then(|found| self.fs.readdir(found.ino));
                match list {
                    Ok(list) => {
                        Outcome::Names(list.iter().map(|entry| entry.name.to_string()).collect())
                    }
                    Err(error) => Outcome::Errno(error.errno()),
                }
            }
            Call::Mkdir(path) => outcome(self.mkdir(path)),
            Call::Rmdir(path) => {
                let parent = self.parent(path);
                outcome(parent.and_then(|(parent, name)| self.fs.rmdir(parent, name)))
            }
            Call::Unlink(path) => outcome(self.unlink(path)),
            Call::Rename(from, to) => outcome(self.rename(from, to)),
            Call::Chmod(path, mode) => {
                let found = self.find(path);
                let set = found.and_then(|found| self.fs.setattr(found.ino, Some(*mode), None));
                outcome(set.map(drop))
            }
            Call::Truncate(path, size) => outcome(self.truncate(path, *size)),
        }
    }
}
