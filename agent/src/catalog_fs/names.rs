//! Calls on names: look up, make, remove, rename.

use std::ffi::OsStr;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use pipeline::error::PipelineError;
use pipeline::index::check_path;

use super::class::{Class, is_final, written_to_parents};
use super::error::{Failure, FsError};
use super::memory::MemoryFile;
use super::segment::{Segment, SegmentBody};
use super::stream::Stream;
use super::tree::check_name;
use super::{
    Attr, Body, CatalogFs, Data, DirEntry, Directory, FileKind, Handle, Ino, LowerEntry, LowerKind,
    Node, Open, OpenHow, Opened, ROOT, StatFs, Tree, now,
};

const UNREADABLE: &str = "a file of the running backup streams away and cannot be read";
const DIRECTORY_RENAME: &str = "directories cannot be renamed here";

/// Adds what lies below; directories above it are made if they are missing.
pub(super) fn add_lower(tree: &mut Tree, entry: &LowerEntry) -> Result<(), Failure> {
    let bad = |what: &str| PipelineError::Setup(format!("`{}`: {what}", entry.path));
    check_path(&entry.path).map_err(bad)?;
    let mtime = entry.mtime.unwrap_or_default();
    let (mut parent, mut parts) = (ROOT, entry.path.split('/').peekable());
    while let Some(name) = parts.next() {
        let child = tree.child(parent, name);
        let child = child.map_err(|_| bad("it lies below a file"))?;
        let last = parts.peek().is_none();
        let ino = match (child, entry.kind) {
            (Some(ino), LowerKind::Directory) if last => {
                let set = tree.set_directory_mode(ino, entry.mode);
                set.map_err(|_| bad("it is listed twice"))?;
                ino
            }
            (Some(_), LowerKind::File { .. }) if last => {
                return Err(bad("it is listed twice").into());
            }
            (Some(ino), _) => ino,
            (None, kind) => {
                let ino = tree.new_ino();
                let body = match kind {
                    LowerKind::File { size, id } if last => {
                        Body::File(Node::new(ino, entry.mode, mtime, Data::Lower { id, size }))
                    }
                    _ if last => Body::Directory(Directory::new(entry.mode, mtime)),
                    _ => Body::Directory(Directory::new(0o700, mtime)),
                };
                let made = tree.insert(ino, parent, name, true, body);
                made.map_err(|_| bad("it is listed twice"))?;
                ino
            }
        };
        parent = ino;
    }
    Ok(())
}

impl CatalogFs {
    /// What a name in a directory stands for.
    ///
    /// # Errors
    /// [`FsError::NotFound`], [`FsError::NotDirectory`].
    pub fn lookup(&self, parent: Ino, name: &OsStr) -> Result<Attr, FsError> {
        self.activity.touch();
        let name = name.to_str().ok_or(FsError::NotFound)?;
        let tree = self.tree();
        let child = tree.child(parent, name)?.ok_or(FsError::NotFound)?;
        tree.attr(child)
    }

    /// What there is to know of a file or directory.
    ///
    /// # Errors
    /// [`FsError::NotFound`].
    pub fn getattr(&self, ino: Ino) -> Result<Attr, FsError> {
        self.activity.touch();
        self.tree().attr(ino)
    }

    /// The directory that a directory is in; the root is in itself.
    ///
    /// # Errors
    /// [`FsError::NotFound`].
    pub fn parent(&self, ino: Ino) -> Result<Ino, FsError> {
        Ok(self.tree().inode(ino)?.parent)
    }

    /// All entries of a directory in the order of their names, without `.` and `..`.
    ///
    /// # Errors
    /// [`FsError::NotFound`], [`FsError::NotDirectory`].
    pub fn readdir(&self, ino: Ino) -> Result<Vec<DirEntry>, FsError> {
        self.activity.touch();
        self.tree().list(ino)
    }

    /// Sizes of the file system: there is always plenty of room.
    #[must_use]
    pub fn statfs(&self) -> StatFs {
        self.activity.touch();
        // A PiB: some programs refuse to begin where less is free than they will write.
        StatFs {
            block_size: 4096,
            blocks: 1 << 38,
            free: 1 << 38,
            files: 1 << 32,
            files_free: 1 << 32,
        }
    }

    /// Makes a directory.
    ///
    /// # Errors
    /// [`FsError::Exists`], [`FsError::NotFound`], [`FsError::NotDirectory`], [`FsError::NameTooLong`],
    /// [`FsError::BadName`]; [`FsError::ReadOnly`] within a parent; [`FsError::Io`].
    pub fn mkdir(&self, parent: Ino, name: &OsStr, mode: u32) -> Result<Attr, FsError> {
        self.activity.touch();
        self.faults.check()?;
        let name = check_name(name)?;
        let mut tree = self.tree();
        if tree.child(parent, name)?.is_some() {
            return Err(FsError::Exists);
        }
        if self.backup.is_some() && tree.in_finished_backup(parent) {
            return Err(refuse(&tree.path_in(parent, name), FsError::ReadOnly));
        }
        let ino = tree.new_ino();
        let body = Body::Directory(Directory::new(mode, now()));
        tree.insert(ino, parent, name, false, body)?;
        tree.attr(ino)
    }

    /// Removes an empty directory.
    ///
    /// # Errors
    /// [`FsError::NotEmpty`], [`FsError::NotFound`], [`FsError::NotDirectory`]; [`FsError::ReadOnly`] if the lower layer brought
    /// it and this is a backup; [`FsError::Io`].
    pub fn rmdir(&self, parent: Ino, name: &OsStr) -> Result<(), FsError> {
        self.activity.touch();
        self.faults.check()?;
        let name = name.to_str().ok_or(FsError::NotFound)?;
        let mut tree = self.tree();
        let ino = tree.child(parent, name)?.ok_or(FsError::NotFound)?;
        if !tree.directory(ino)?.children.is_empty() {
            return Err(FsError::NotEmpty);
        }
        if self.backup.is_some() && tree.inode(ino)?.lower {
            return Err(refuse(&tree.path(ino), FsError::ReadOnly));
        }
        tree.unname(parent, name)?;
        tree.forget(ino);
        Ok(())
    }

    /// Takes a file's name away. Its handles go on.
    ///
    /// # Errors
    /// [`FsError::NotFound`], [`FsError::IsDirectory`]; [`FsError::ReadOnly`] if the lower layer brought it and this is a
    /// backup; [`FsError::Io`].
    pub fn unlink(&self, parent: Ino, name: &OsStr) -> Result<(), FsError> {
        self.activity.touch();
        self.faults.check()?;
        let name = name.to_str().ok_or(FsError::NotFound)?;
        let mut tree = self.tree();
        let ino = tree.child(parent, name)?.ok_or(FsError::NotFound)?;
        let node = tree.node(ino)?;
        if self.backup.is_some() && matches!(node.state().data, Data::Lower { .. }) {
            return Err(refuse(&tree.path(ino), FsError::ReadOnly));
        }
        tree.unname(parent, name)?;
        let gone = unlinked(&mut tree, &node);
        // What it held is dropped with no lock held.
        drop(tree);
        drop(gone);
        drop(node);
        Ok(())
    }

    /// Makes and opens a file, or opens the one that is there.
    ///
    /// # Errors
    /// [`FsError::Exists`] if it is there and must not be; those of [`Self::mkdir`] and [`Self::open`].
    pub fn create(
        &self,
        parent: Ino,
        name: &OsStr,
        mode: u32,
        how: OpenHow,
    ) -> Result<(Attr, Opened), FsError> {
        self.activity.touch();
        self.faults.check()?;
        let name = check_name(name)?;
        let (node, existed) = {
            let mut tree = self.tree();
            match tree.child(parent, name)? {
                Some(_) if how.exclusive => return Err(FsError::Exists),
                Some(ino) => (tree.node(ino)?, true),
                None => (self.new_file(&mut tree, parent, name, mode)?, false),
            }
        };
        let how = OpenHow {
            truncate: how.truncate && existed,
            ..how
        };
        let opened = self.open_node(Arc::clone(&node), how, existed)?;
        Ok((node.attr(), opened))
    }

    fn new_file(
        &self,
        tree: &mut Tree,
        parent: Ino,
        name: &str,
        mode: u32,
    ) -> Result<Arc<Node>, FsError> {
        let path = tree.path_in(parent, name);
        let data = match &self.backup {
            None => Data::Memory(MemoryFile::new(&self.quota, false)),
            Some(_) if tree.in_finished_backup(parent) => {
                if !written_to_parents(name) {
                    return Err(refuse(&path, FsError::ReadOnly));
                }
                Data::Memory(MemoryFile::new(&self.quota, false))
            }
            Some(backup) => match Class::of(&path) {
                Class::Stream => Data::Stream(Stream::new(backup.new_file()?)),
                Class::Segment => Data::Segment(Box::new(Segment::new(backup.wal.segment_size))),
                Class::List => Data::Memory(MemoryFile::new(&self.lists, true)),
                Class::Memory | Class::Temporary => {
                    Data::Memory(MemoryFile::new(&self.quota, false))
                }
            },
        };
        let ino = tree.new_ino();
        let node = Node::new(ino, mode, now(), data);
        tree.insert(ino, parent, name, false, Body::File(Arc::clone(&node)))?;
        Ok(node)
    }

    /// Opens a file.
    ///
    /// # Errors
    /// [`FsError::NotFound`], [`FsError::IsDirectory`]; [`FsError::Refused`] for reading only what streams away;
    /// [`FsError::ReadOnly`] for emptying what the lower layer brought, in a backup; [`FsError::Io`].
    pub fn open(&self, ino: Ino, how: OpenHow) -> Result<Opened, FsError> {
        self.activity.touch();
        if how.write {
            self.faults.check()?;
        }
        let node = self.tree().node(ino)?;
        self.open_node(node, how, true)
    }

    fn open_node(&self, node: Arc<Node>, how: OpenHow, existed: bool) -> Result<Opened, FsError> {
        let streams = matches!(node.state().data, Data::Stream(_));
        if streams && how.read && !how.write && existed {
            return Err(refuse(&self.path(node.ino), FsError::Refused(UNREADABLE)));
        }
        if how.truncate {
            self.resize(&node, 0)?;
        }
        let direct_io = {
            let mut state = node.state();
            state.opens += 1;
            state.writers += u32::from(how.write);
            let finished = match &state.data {
                Data::Lower { .. } => true,
                Data::Segment(segment) => {
                    matches!(
                        segment.body(),
                        SegmentBody::Whole(..) | SegmentBody::Stored(_)
                    )
                }
                Data::Stream(_) | Data::Memory(_) => false,
            };
            how.write || !finished
        };
        let number = self.next_handle.fetch_add(1, Ordering::Relaxed);
        self.handles().insert(number, Open { node, how });
        Ok(Opened {
            handle: Handle(number),
            direct_io,
        })
    }

    /// Gives a file another name; a file that has it is replaced.
    ///
    /// # Errors
    /// [`FsError::NotFound`], [`FsError::NotDirectory`], [`FsError::IsDirectory`], [`FsError::NameTooLong`],
    /// [`FsError::BadName`]; [`FsError::Refused`] for a directory; [`FsError::ReadOnly`] for what belongs to a
    /// parent; [`FsError::Io`].
    pub fn rename(
        &self,
        parent: Ino,
        name: &OsStr,
        new_parent: Ino,
        new_name: &OsStr,
    ) -> Result<(), FsError> {
        self.activity.touch();
        self.faults.check()?;
        let name = name.to_str().ok_or(FsError::NotFound)?;
        let mut tree = self.tree();
        let ino = tree.child(parent, name)?.ok_or(FsError::NotFound)?;
        let new_name = check_name(new_name)?;
        let replaced = tree.child(new_parent, new_name)?;
        if replaced == Some(ino) {
            return Ok(());
        }
        let node = match tree.node(ino) {
            Ok(node) => node,
            Err(_) if replaced.is_some_and(|ino| tree.node(ino).is_ok()) => {
                return Err(FsError::NotDirectory);
            }
            Err(_) => {
                return Err(refuse(&tree.path(ino), FsError::Refused(DIRECTORY_RENAME)));
            }
        };
        let target = replaced.map(|ino| tree.node(ino)).transpose()?;
        self.check_rename(
            &tree,
            &node,
            (parent, new_parent),
            new_name,
            target.as_ref(),
        )?;
        let gone = target.as_ref().map(|target| {
            let named = tree.unname(new_parent, new_name);
            (named, unlinked(&mut tree, target))
        });
        tree.move_to(ino, new_parent, new_name)?;
        if let Some(backup) = &self.backup
            && is_final(new_name)
            && !is_final(name)
        {
            backup.complete(&node, new_name);
        }
        drop(tree);
        drop(gone);
        drop(target);
        Ok(())
    }

    /// In a backup nothing of another backup changes, and nothing moves between it and this one.
    fn check_rename(
        &self,
        tree: &Tree,
        node: &Node,
        (parent, new_parent): (Ino, Ino),
        new_name: &str,
        target: Option<&Arc<Node>>,
    ) -> Result<(), FsError> {
        if self.backup.is_none() {
            return Ok(());
        }
        let is_lower = |node: &Node| matches!(node.state().data, Data::Lower { .. });
        let to_finished = tree.in_finished_backup(new_parent);
        let moved = tree.in_finished_backup(parent) != to_finished;
        let allowed = !to_finished || written_to_parents(new_name);
        let replaces = to_finished && target.is_some_and(|node| is_lower(node)) && !allowed;
        if is_lower(node) || moved || !allowed || replaces {
            let path = tree.path_in(new_parent, new_name);
            return Err(refuse(&path, FsError::ReadOnly));
        }
        Ok(())
    }

    /// Changes permission bits or size.
    ///
    /// # Errors
    /// [`FsError::NotFound`], [`FsError::IsDirectory`]; [`FsError::Refused`] for cutting what streams away anywhere but at
    /// its start; [`FsError::ReadOnly`], [`FsError::TooLarge`], [`FsError::NoSpace`], [`FsError::Io`].
    pub fn setattr(&self, ino: Ino, mode: Option<u32>, size: Option<u64>) -> Result<Attr, FsError> {
        self.activity.touch();
        self.faults.check()?;
        if let Some(mode) = mode {
            let mut tree = self.tree();
            match tree.attr(ino)?.kind {
                FileKind::Directory => tree.set_directory_mode(ino, mode)?,
                FileKind::File => tree.node(ino)?.state().mode = mode & 0o7777,
            }
        }
        if let Some(size) = size {
            let node = self.tree().node(ino)?;
            self.resize(&node, size)?;
        }
        self.tree().attr(ino)
    }

    pub(super) fn path(&self, ino: Ino) -> String {
        self.tree().path(ino)
    }
}

/// What is to be dropped of a file that has no name any more.
fn unlinked(tree: &mut Tree, node: &Arc<Node>) -> Option<Body> {
    let mut state = node.state();
    state.linked = false;
    let unused = state.opens == 0;
    drop(state);
    unused.then(|| tree.forget(node.ino)).flatten()
}

/// Logs what is refused and why.
pub(super) fn refuse(path: &str, error: FsError) -> FsError {
    tracing::warn!(path, %error, "a call is refused");
    error
}
