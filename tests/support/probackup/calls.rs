//! System calls on the catalog, one by one and in the real programs' way: buffered as the C library's `FILE` is,
//! closed with a look at the result.

use std::fs::File;
use std::io::{Read as _, Seek as _, SeekFrom};
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};

use rustix::fs::{self, Access, CWD, Mode, OFlags};
use rustix::io::Errno;

use super::Failure;

/// Buffer of a data or other file.
pub(super) const STDIO: usize = 64 << 10;
/// Buffer of a `FILE` that nobody sized.
pub(super) const SMALL: usize = 4 << 10;

/// A file being written, like a `FILE` opened for writing with a buffer of a given size.
#[derive(Debug)]
pub(super) struct Out {
    fd: OwnedFd,
    path: PathBuf,
    buffer: Vec<u8>,
    room: usize,
}

fn open(path: &Path, flags: OFlags, mode: u32) -> Result<OwnedFd, Errno> {
    fs::openat(CWD, path, flags, Mode::from_raw_mode(mode))
}

impl Out {
    /// `fopen(path, "w")`.
    pub(super) fn create(path: &Path, room: usize) -> Result<Self, Failure> {
        Self::open(
            path,
            OFlags::WRONLY | OFlags::CREATE | OFlags::TRUNC,
            0o666,
            room,
        )
    }

    /// Opens with given flags; writes go through a buffer of `room` bytes, none if it is 0.
    pub(super) fn open(
        path: &Path,
        flags: OFlags,
        mode: u32,
        room: usize,
    ) -> Result<Self, Failure> {
        let fd = open(path, flags, mode).map_err(|e| Failure::call("open file", path, e))?;
        Ok(Self {
            fd,
            path: path.to_owned(),
            buffer: Vec::with_capacity(room),
            room,
        })
    }

    /// `chmod(path)` right after the open, as both programs do.
    pub(super) fn mode(&self, mode: u32) -> Result<(), Failure> {
        fs::chmod(&self.path, Mode::from_raw_mode(mode))
            .map_err(|e| Failure::call("change mode of", &self.path, e))
    }

    fn put(&self, mut bytes: &[u8]) -> Result<(), Failure> {
        while !bytes.is_empty() {
            match rustix::io::write(&self.fd, bytes) {
                Ok(written) => bytes = bytes.get(written..).unwrap_or_default(),
                Err(Errno::INTR) => {}
                Err(e) => return Err(Failure::call("write to file", &self.path, e)),
            }
        }
        Ok(())
    }

    /// `fwrite`: fills the buffer, writes it when it is full, and what is larger than it directly.
    pub(super) fn write(&mut self, mut bytes: &[u8]) -> Result<(), Failure> {
        if !self.buffer.is_empty() && self.buffer.len() + bytes.len() > self.room {
            let (now, later) = bytes.split_at(self.room - self.buffer.len());
            self.buffer.extend_from_slice(now);
            bytes = later;
            self.flush()?;
        }
        if bytes.len() >= self.room {
            let direct = bytes.len() - bytes.len().checked_rem(self.room).unwrap_or(0);
            self.put(&bytes[..direct])?;
            bytes = &bytes[direct..];
        }
        self.buffer.extend_from_slice(bytes);
        Ok(())
    }

    /// `fflush`.
    pub(super) fn flush(&mut self) -> Result<(), Failure> {
        if !self.buffer.is_empty() {
            let buffer = std::mem::take(&mut self.buffer);
            self.put(&buffer)?;
            self.buffer = buffer;
            self.buffer.clear();
        }
        Ok(())
    }

    /// `fseek` from the start.
    pub(super) fn seek(&mut self, position: u64) -> Result<(), Failure> {
        self.flush()?;
        fs::seek(&self.fd, fs::SeekFrom::Start(position))
            .map_err(|e| Failure::call("seek in file", &self.path, e))?;
        Ok(())
    }

    /// `fseek` to the end.
    pub(super) fn seek_end(&mut self) -> Result<(), Failure> {
        self.flush()?;
        fs::seek(&self.fd, fs::SeekFrom::End(0))
            .map_err(|e| Failure::call("seek in file", &self.path, e))?;
        Ok(())
    }

    /// `fsync` of what is flushed.
    pub(super) fn sync(&self) -> Result<(), Failure> {
        fs::fsync(&self.fd).map_err(|e| Failure::call("fsync file", &self.path, e))
    }

    /// `fclose`: a failed upload shows here.
    pub(super) fn close(mut self) -> Result<(), Failure> {
        self.flush()?;
        nix::unistd::close(self.fd).map_err(|e| Failure::call("close file", &self.path, e))
    }
}

/// `open(O_WRONLY)`, `fsync`, `close`: how both programs sync a file they have closed.
pub(super) fn sync_again(path: &Path) -> Result<(), Failure> {
    let file = Out::open(path, OFlags::WRONLY, 0, 0)?;
    file.sync()?;
    file.close()
}

/// `access(path, F_OK)`.
pub(super) fn exists(path: &Path) -> bool {
    fs::access(path, Access::EXISTS).is_ok()
}

/// `mkdir` after a look at the parent, as `dir_create_dir` does. One that is there already is as good.
pub(super) fn make_directory(path: &Path) -> Result<(), Failure> {
    if let Some(parent) = path.parent()
        && !exists(parent)
    {
        std::fs::create_dir_all(parent)
            .map_err(|e| Failure::call("create directory", parent, e))?;
    }
    match fs::mkdir(path, Mode::from_raw_mode(0o700)) {
        Ok(()) | Err(Errno::EXIST) => Ok(()),
        Err(e) => Err(Failure::call("create directory", path, e)),
    }
}

/// `mkdir`; whether it was not there before.
pub(super) fn make_new_directory(path: &Path) -> Result<bool, Failure> {
    if let Some(parent) = path.parent() {
        let _ = exists(parent);
    }
    match fs::mkdir(path, Mode::from_raw_mode(0o700)) {
        Ok(()) => Ok(true),
        Err(Errno::EXIST) => Ok(false),
        Err(e) => Err(Failure::call("create directory", path, e)),
    }
}

/// `rename`.
pub(super) fn rename(from: &Path, to: &Path) -> Result<(), Failure> {
    fs::rename(from, to)
        .map_err(|e| Failure::call(&format!("rename file to \"{}\":", to.display()), from, e))
}

/// `unlink`; whether there was anything.
pub(super) fn unlink(path: &Path) -> Result<bool, Failure> {
    match fs::unlink(path) {
        Ok(()) => Ok(true),
        Err(Errno::NOENT) => Ok(false),
        Err(e) => Err(Failure::call("remove file", path, e)),
    }
}

/// A file being read through a buffer of a given size.
#[derive(Debug)]
pub(super) struct In {
    file: File,
    path: PathBuf,
    buffer: Vec<u8>,
    filled: usize,
    next: usize,
}

impl In {
    /// `fopen(path, "r")`; `None` if there is no such file.
    pub(super) fn open(path: &Path, room: usize) -> Result<Option<Self>, Failure> {
        match open(path, OFlags::RDONLY, 0) {
            Ok(fd) => Ok(Some(Self {
                file: fd.into(),
                path: path.to_owned(),
                buffer: vec![0; room],
                filled: 0,
                next: 0,
            })),
            Err(Errno::NOENT) => Ok(None),
            Err(e) => Err(Failure::call("open file", path, e)),
        }
    }

    /// Like [`Self::open`], but the file must be there.
    pub(super) fn existing(path: &Path, room: usize) -> Result<Self, Failure> {
        Self::open(path, room)?.ok_or_else(|| Failure::call("open file", path, Errno::NOENT))
    }

    /// `fseek`: what is buffered is given up.
    pub(super) fn seek(&mut self, position: u64) -> Result<(), Failure> {
        (self.filled, self.next) = (0, 0);
        self.file
            .seek(SeekFrom::Start(position))
            .map_err(|e| Failure::call("seek in file", &self.path, e))?;
        Ok(())
    }

    /// `fread`: fewer bytes than asked for only at the end of the file.
    pub(super) fn read(&mut self, into: &mut [u8]) -> Result<usize, Failure> {
        let mut done = 0;
        while done < into.len() {
            if self.next == self.filled {
                self.next = 0;
                self.filled = self
                    .file
                    .read(&mut self.buffer)
                    .map_err(|e| Failure::call("read file", &self.path, e))?;
                if self.filled == 0 {
                    break;
                }
            }
            let piece = (into.len() - done).min(self.filled - self.next);
            into[done..done + piece].copy_from_slice(&self.buffer[self.next..self.next + piece]);
            (done, self.next) = (done + piece, self.next + piece);
        }
        Ok(done)
    }

    /// All that is left.
    pub(super) fn rest(mut self) -> Result<Vec<u8>, Failure> {
        let mut all = Vec::new();
        let mut piece = vec![0; self.buffer.len()];
        loop {
            let got = self.read(&mut piece)?;
            all.extend_from_slice(&piece[..got]);
            if got < piece.len() {
                return Ok(all);
            }
        }
    }
}

/// The whole of a file, read with a buffer of `room` bytes; `None` if there is none.
pub(super) fn read_whole(path: &Path, room: usize) -> Result<Option<Vec<u8>>, Failure> {
    In::open(path, room)?.map(In::rest).transpose()
}
