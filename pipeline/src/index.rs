//! The index of one copy: what files there are, and in which frames their bytes lie.
//!
//! Stored as zstd frames of about 1 MiB of JSON lines, sorted by the bytes of the path, and one more
//! frame with the [`Footer`]. `zstd -d` of an index gives its lines, the footer last.

mod packer;
mod read;
mod write;

use std::sync::{Mutex, MutexGuard, PoisonError};

use serde::{Deserialize, Serialize};

use crate::error::PipelineError;
use crate::pack::{EntryKind, Extent, IndexEntry, IndexInfo};
use crate::store::Key;
use crate::upload::Uploader;

pub use packer::{FilePacker, SHARE_BELOW};
pub use read::Index;

/// Most plain bytes of one block, unless a single line is longer.
pub const BLOCK_PLAIN: usize = 1 << 20;

/// One block of an index, as its footer tells it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Block {
    /// The first path in it.
    pub first: String,
    /// Byte offset in the object.
    pub offset: u64,
    /// Stored bytes.
    pub stored: u64,
    /// Plain bytes.
    pub plain: u64,
    /// Hex SHA-256 of its stored bytes.
    pub sha256: String,
}

/// The last line of an index, in a zstd frame of its own.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Footer {
    /// The blocks in order, back to back from the object's first byte.
    pub blocks: Vec<Block>,
    /// Entries in all of them.
    pub entries: u64,
}

/// Checks that `path` is relative, with `/` between components none of which is empty, `.` or `..`.
///
/// # Errors
/// What is wrong with it.
pub fn check_path(path: &str) -> Result<(), &'static str> {
    if path.is_empty() {
        return Err("the path is empty");
    }
    if path.starts_with('/') {
        return Err("the path is absolute");
    }
    if path.contains('\0') {
        return Err("the path has a NUL byte");
    }
    for part in path.split('/') {
        match part {
            "" => return Err("the path has an empty component"),
            "." | ".." => return Err("the path has a `.` or `..` component"),
            _ => {}
        }
    }
    Ok(())
}

/// A file that was announced to an [`IndexBuilder`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct FileId(u32);

/// Collects the index while a copy runs. Shared by all its threads.
///
/// About 100 bytes of memory an entry, its path included, and 40 an extent.
#[derive(Debug, Default)]
pub struct IndexBuilder {
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    items: Vec<Item>,
    /// Of all files together: one growing vector instead of one allocation a file.
    placed: Vec<Placed>,
}

#[derive(Debug)]
struct Item {
    path: Box<str>,
    mode: u32,
    mtime: Option<i64>,
    kind: Kind,
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum Kind {
    Open,
    File(u64),
    Forgotten,
    Directory,
    Symlink(Box<str>),
}

#[derive(Debug, Clone, Copy)]
struct Placed {
    file: u32,
    file_offset: u64,
    extent: Extent,
}

impl IndexBuilder {
    /// An empty index.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn push(
        &self,
        path: &str,
        mode: u32,
        mtime: Option<i64>,
        kind: Kind,
    ) -> Result<FileId, PipelineError> {
        check_path(path).map_err(|what| PipelineError::Setup(format!("`{path}`: {what}")))?;
        self.insert(path, mode, mtime, kind)
    }

    fn insert(
        &self,
        path: &str,
        mode: u32,
        mtime: Option<i64>,
        kind: Kind,
    ) -> Result<FileId, PipelineError> {
        let mut state = self.state();
        let id = u32::try_from(state.items.len())
            .map_err(|_| PipelineError::Setup("more than 2^32 files".into()))?;
        state.items.push(Item {
            path: path.into(),
            mode: mode & 0o7777,
            mtime,
            kind,
        });
        Ok(FileId(id))
    }

    /// Adds a directory, a link, or an empty file.
    ///
    /// # Errors
    /// [`PipelineError::Setup`] for a bad path, or a file that is not empty: its bytes go through
    /// [`Self::file`].
    pub fn add(&self, entry: IndexEntry) -> Result<(), PipelineError> {
        let kind = match entry.kind {
            EntryKind::Directory => Kind::Directory,
            EntryKind::Symlink { target } => Kind::Symlink(target.into()),
            EntryKind::File { size: 0, extents } if extents.is_empty() => Kind::File(0),
            EntryKind::File { .. } => {
                let what = format!("`{}` is not empty", entry.path);
                return Err(PipelineError::Setup(what));
            }
        };
        self.push(&entry.path, entry.mode, entry.mtime, kind)?;
        Ok(())
    }

    /// Announces a file whose bytes will follow. `mode` is its permission bits, `mtime` seconds since
    /// 1970. Close or forget it before the index is written.
    ///
    /// # Errors
    /// [`PipelineError::Setup`] for a bad path.
    pub fn file(&self, path: &str, mode: u32, mtime: Option<i64>) -> Result<FileId, PipelineError> {
        self.push(path, mode, mtime, Kind::Open)
    }

    /// Announces a file whose bytes will follow and whose name is not settled yet. Left out if it never gets one.
    ///
    /// # Errors
    /// [`PipelineError::Setup`] for more than 2^32 files.
    pub fn unnamed(&self) -> Result<FileId, PipelineError> {
        self.insert("", 0, None, Kind::Open)
    }

    /// Names a file, as [`Self::file`] does in the first place.
    ///
    /// # Errors
    /// [`PipelineError::Setup`] for a bad path.
    pub fn name_file(
        &self,
        file: FileId,
        path: &str,
        mode: u32,
        mtime: Option<i64>,
    ) -> Result<(), PipelineError> {
        check_path(path).map_err(|what| PipelineError::Setup(format!("`{path}`: {what}")))?;
        if let Some(item) = self.state().items.get_mut(file.0 as usize) {
            item.path = path.into();
            item.mode = mode & 0o7777;
            item.mtime = mtime;
        }
        Ok(())
    }

    /// Says where bytes of a file are, in any order, from any thread.
    pub fn placed(&self, file: FileId, file_offset: u64, extent: Extent) {
        self.state().placed.push(Placed {
            file: file.0,
            file_offset,
            extent,
        });
    }

    /// Says that the file has `size` bytes. Those of its last frames may be placed later.
    pub fn close_file(&self, file: FileId, size: u64) {
        if let Some(item) = self.state().items.get_mut(file.0 as usize) {
            item.kind = Kind::File(size);
        }
    }

    /// Leaves a file out after all, because it vanished while it was read. What was placed of it stays in
    /// its packs, unnamed.
    pub fn forget_file(&self, file: FileId) {
        if let Some(item) = self.state().items.get_mut(file.0 as usize) {
            item.kind = Kind::Forgotten;
        }
    }

    /// Sorts the index, checks that each file's bytes are placed from 0 to its size without a gap, and
    /// writes it. Finish all packers first. The builder is empty afterwards.
    ///
    /// # Errors
    /// [`PipelineError::Setup`] if a file is open, has a gap or an overlap, or a path stands twice; else
    /// why the upload failed.
    pub async fn write(&self, uploader: &Uploader, key: Key) -> Result<IndexInfo, PipelineError> {
        let state = std::mem::take(&mut *self.state());
        write::write(state, uploader, key).await
    }
}
