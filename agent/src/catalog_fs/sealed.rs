//! The end of a copy: everything in packs, and the index that names it.

use std::collections::BTreeSet;
use std::sync::Arc;

use bytes::Bytes;
use catalog::model::StreamedWal;
use pipeline::error::PipelineError;
use pipeline::index::FileId;
use pipeline::pack::{EntryKind, IndexEntry, IndexInfo, PackInfo};
use pipeline::store::Key;
use tokio::sync::oneshot;

use super::backup::{Backup, End};
use super::class::Class;
use super::error::{Failure, FsError};
use super::lanes::{Job, PIECE, Work};
use super::memory;
use super::segment::{SegmentBody, Source};
use super::tree::{Body, Inode, Node, Tree};
use super::{CatalogFs, Data};

/// A copy to which nothing is written any more. Dropped before it is finished, it is aborted.
#[derive(Debug)]
pub struct Sealed {
    fs: Arc<CatalogFs>,
    end: End,
    files: Vec<Stored>,
    directories: BTreeSet<String>,
    directory_entries: Vec<IndexEntry>,
    wal: Vec<StreamedWal>,
    attached: u64,
}

/// A copy whose packs and index are in the bucket.
#[derive(Debug, Clone)]
pub struct SealedCopy {
    /// The packs.
    pub packs: Vec<PackInfo>,
    /// The index.
    pub index: IndexInfo,
    /// Files in the index.
    pub files: u64,
    /// Their bytes.
    pub plain_bytes: u64,
}

/// A file that will stand in the index.
#[derive(Debug)]
struct Stored {
    path: String,
    mode: u32,
    mtime: i64,
    size: u64,
    content: Content,
}

#[derive(Debug)]
enum Content {
    /// In packs, or on its way there.
    Sent(FileId),
    /// Still in memory.
    Held(Arc<Node>),
}

/// What the names say at the end.
#[derive(Debug, Default)]
struct Inventory {
    files: Vec<Stored>,
    own_directories: Vec<IndexEntry>,
    wal: Vec<StreamedWal>,
}

impl CatalogFs {
    /// Ends the copy: call it when the mount is gone. Waits until everything that was written is with the lanes and every complete WAL
    /// segment is in the bucket.
    ///
    /// # Errors
    /// [`Failure::StillOpen`]; what went wrong first; [`Failure::Closed`] for a second time, or a file system to read from.
    /// Call [`Self::abort`] then.
    pub async fn seal(self: &Arc<Self>) -> Result<Sealed, Failure> {
        let backup = self.backup.as_ref().ok_or(Failure::Closed)?;
        self.check_good()?;
        if let Some(open) = self.handles().values().next().cloned() {
            let path = self.path(open.node.ino);
            return Err(Failure::StillOpen { path });
        }
        self.faults.close();
        backup.hand_on_all();
        backup.lanes.room().idle().await;
        backup.wal.room.idle().await;
        self.check_good()?;
        let inventory = self.inventory();
        let end = backup.end().take().ok_or(Failure::Closed)?;
        Ok(Sealed {
            fs: Arc::clone(self),
            end,
            files: inventory.files,
            directories: BTreeSet::new(),
            directory_entries: inventory.own_directories,
            wal: inventory.wal,
            attached: 0,
        })
    }

    fn check_good(&self) -> Result<(), Failure> {
        self.faults.first().map_or(Ok(()), Err)
    }

    /// Stops everything that is under way, uploads included, and waits until nothing is. Whoever still writes is told. Of use
    /// at any time, and again.
    pub async fn abort(&self) {
        self.faults.poison(PipelineError::Cancelled.into());
        let Some(backup) = &self.backup else {
            return;
        };
        backup.lanes.close();
        let end = backup.end().take();
        if let Some(end) = end {
            stop(end).await;
        }
        backup.wal.stop().await;
    }

    /// What of all names will stand in the index.
    fn inventory(&self) -> Inventory {
        let mut inventory = Inventory::default();
        let tree = self.tree();
        tree.walk(&mut |path, inode| inventory.add(&tree, path, inode));
        inventory
    }
}

async fn stop(end: End) {
    end.packs.abort().await;
    for thread in end.threads {
        // They end because the packs have; why is known.
        let _ = thread.join().await;
    }
}

impl Inventory {
    fn add(&mut self, tree: &Tree, path: &str, inode: &Inode) {
        // What was written into a parent is its lock and its status, and goes nowhere.
        if tree.in_finished_backup(inode.parent) {
            return;
        }
        let node = match &inode.body {
            Body::File(node) => node,
            Body::Directory(directory) => {
                if !inode.lower {
                    self.own_directories.push(IndexEntry {
                        path: path.to_owned(),
                        mode: directory.mode,
                        mtime: Some(directory.mtime),
                        kind: EntryKind::Directory,
                    });
                }
                return;
            }
        };
        let state = node.state();
        let content = match &state.data {
            Data::Lower { .. } => return,
            _ if Class::of(path) == Class::Temporary => return,
            Data::Segment(segment) if let SegmentBody::Stored(name) = segment.body() => {
                self.wal.push(StreamedWal {
                    path: path.to_owned(),
                    segment: name.to_string(),
                    size: segment.size(),
                });
                return;
            }
            Data::Stream(stream) => Content::Sent(stream.file()),
            Data::Memory(_) | Data::Segment(_) => Content::Held(Arc::clone(node)),
        };
        self.files.push(Stored {
            path: path.to_owned(),
            mode: state.mode,
            mtime: state.mtime,
            size: state.data.size(),
            content,
        });
    }
}

impl Sealed {
    /// A file that is in memory until the end: `backup.control`, `backup_content.control`, `backup_label`...
    /// By its path in the catalog; `None` if there is no such file, or it has streamed away.
    ///
    /// # Errors
    /// [`FsError::Io`] if its compressed parts cannot be read.
    pub fn read(&self, path: &str) -> Result<Option<Bytes>, FsError> {
        let found = self.files.iter().find(|file| file.path == path);
        match found {
            Some(Stored {
                content: Content::Held(node),
                size,
                ..
            }) => {
                let size = usize::try_from(*size).map_err(|_| FsError::TooLarge)?;
                read_held(node, 0, size).map(Some)
            }
            _ => Ok(None),
        }
    }

    /// Every file that will stand in the index: path and bytes, in the order of their paths' components.
    pub fn files(&self) -> impl Iterator<Item = (&str, u64)> {
        self.files.iter().map(|file| (&*file.path, file.size))
    }

    /// The WAL segments that are in the bucket, and not in packs.
    #[must_use]
    pub fn wal(&self) -> &[StreamedWal] {
        &self.wal
    }

    /// Adds a file that the program did not write. `mtime` is in seconds since 1970. Waits for room.
    ///
    /// # Errors
    /// What went wrong; [`Failure::Pipeline`] for a bad path.
    pub async fn add_file(
        &mut self,
        path: &str,
        mode: u32,
        mtime: i64,
        bytes: Bytes,
    ) -> Result<(), Failure> {
        let backup = self.fs.backup.as_ref().ok_or(Failure::Closed)?;
        let file = backup.index.unnamed()?;
        for (end, _) in path.match_indices('/') {
            self.directories.insert(path[..end].to_owned());
        }
        let size = bytes.len() as u64;
        for (number, start) in (0..bytes.len()).step_by(PIECE).enumerate() {
            let piece = bytes.slice(start..bytes.len().min(start + PIECE));
            let offset = (number * PIECE) as u64;
            send(backup, file, offset, Work::Shared(piece), 0).await?;
        }
        self.attached += 1;
        self.files.push(Stored {
            path: path.to_owned(),
            mode,
            mtime,
            size,
            content: Content::Sent(file),
        });
        Ok(())
    }

    /// Stores what is still in memory, completes the packs, and writes the index under `key`.
    ///
    /// # Errors
    /// What went wrong. Nothing is under way then.
    pub async fn finish(self, key: Key) -> Result<SealedCopy, Failure> {
        let fs = Arc::clone(&self.fs);
        let finished = self.run(key).await;
        if finished.is_err() {
            fs.abort().await;
        } else if let Some(backup) = &fs.backup {
            backup.wal.stop().await;
        }
        finished
    }

    async fn run(self, key: Key) -> Result<SealedCopy, Failure> {
        let fs = Arc::clone(&self.fs);
        let backup = fs.backup.as_ref().ok_or(Failure::Closed)?;
        let (end, files) = (self.end, self.files);
        let listed = Self::list(backup, &files, self.directories, self.directory_entries);
        let sent = match listed {
            Ok(()) => Self::send_all(backup, &files).await,
            Err(error) => Err(error),
        };
        let plain_bytes = match sent {
            Ok(plain_bytes) => plain_bytes,
            Err(error) => {
                backup.lanes.close();
                stop(end).await;
                return Err(error);
            }
        };
        backup.lanes.close();
        let mut joined = Ok(());
        for thread in end.threads {
            let done = thread.join().await;
            joined = joined.and(done);
        }
        if let Err(error) = joined {
            let first = end.packs.error().unwrap_or(error);
            end.packs.abort().await;
            return Err(first.into());
        }
        let packs = end.packs.finish().await?;
        let index = backup.index.write(&backup.uploader, key).await?;
        Ok(SealedCopy {
            packs,
            index,
            files: files.len() as u64,
            plain_bytes,
        })
    }

    /// Directories: the program's own, and those above files, which a reader of the index expects.
    fn list(
        backup: &Backup,
        files: &[Stored],
        mut above: BTreeSet<String>,
        own: Vec<IndexEntry>,
    ) -> Result<(), Failure> {
        for path in files.iter().map(|file| &file.path) {
            // Most files lie beside the one before.
            if let Some((directory, _)) = path.rsplit_once('/')
                && !above.contains(directory)
            {
                for (end, _) in path.match_indices('/') {
                    above.insert(path[..end].to_owned());
                }
            }
        }
        for entry in own {
            above.remove(&entry.path);
            backup.index.add(entry)?;
        }
        for path in above {
            backup.index.add(IndexEntry {
                path,
                mode: 0o700,
                mtime: None,
                kind: EntryKind::Directory,
            })?;
        }
        Ok(())
    }

    async fn send_all(backup: &Backup, files: &[Stored]) -> Result<u64, Failure> {
        let mut plain_bytes = 0;
        for stored in files {
            let file = match &stored.content {
                Content::Sent(file) => *file,
                Content::Held(node) => {
                    let file = backup.index.unnamed()?;
                    send_held(backup, node, file, stored.size).await?;
                    backup.meter().add_files(1);
                    file
                }
            };
            let (path, mtime) = (&stored.path, Some(stored.mtime));
            backup.index.name_file(file, path, stored.mode, mtime)?;
            backup.index.close_file(file, stored.size);
            plain_bytes += stored.size;
        }
        Ok(plain_bytes)
    }
}

async fn send_held(backup: &Backup, node: &Node, file: FileId, size: u64) -> Result<(), Failure> {
    let mut at = 0;
    while at < size {
        let length = usize::try_from(size - at).map_or(PIECE, |left| left.min(PIECE));
        let bytes = read_held(node, at, length)
            .map_err(|_| PipelineError::Setup("a file in memory cannot be decompressed".into()))?;
        let charge = bytes.len();
        send(backup, file, at, Work::Shared(bytes), charge).await?;
        at += length as u64;
    }
    Ok(())
}

fn read_held(node: &Node, offset: u64, length: usize) -> Result<Bytes, FsError> {
    let pieces = match &node.state().data {
        Data::Memory(file) => file.read(offset, length),
        Data::Segment(segment) => match segment.read(offset, length) {
            Source::Memory(pieces) => pieces,
            Source::Shared(bytes) => return Ok(bytes),
            Source::Bucket(_) => return Err(FsError::Io),
        },
        _ => return Err(FsError::Io),
    };
    memory::join(pieces).map(Bytes::from)
}

/// Hands on a job, and waits until there is room for another one.
async fn send(
    backup: &Backup,
    file: FileId,
    offset: u64,
    work: Work,
    charge: usize,
) -> Result<(), Failure> {
    let room = backup.lanes.room();
    room.charge(charge);
    backup
        .lanes
        .submit(vec![Job::new(file, offset, work, charge)]);
    let (sender, answer) = oneshot::channel();
    room.answer(Box::new(move |waited| {
        // Nobody waits if the copy was dropped.
        let _ = sender.send(waited);
    }));
    match answer.await {
        Ok(Ok(())) => Ok(()),
        _ => Err(backup.failure()),
    }
}
