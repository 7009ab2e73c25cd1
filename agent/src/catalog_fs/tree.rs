//! Names and inodes. Small for each file: a hundred thousand of them take some tens of megabytes.

use std::collections::{BTreeMap, HashMap};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::class::BACKUP_DEPTH;
use super::error::FsError;
use super::memory::MemoryFile;
use super::segment::Segment;
use super::stream::Stream;
use super::{Attr, DirEntry, FileKind, Ino, LowerId, ROOT, time_of};

/// Longest name, as on other file systems.
const NAME_MAX: usize = 255;

/// A file: what its name, its handles and work in the background share.
#[derive(Debug)]
pub(super) struct Node {
    pub(super) ino: Ino,
    state: Mutex<State>,
}

/// What there is of a file.
#[derive(Debug)]
pub(super) struct State {
    pub(super) mode: u32,
    /// Seconds since 1970.
    pub(super) mtime: i64,
    /// Open handles, and those of them that write.
    pub(super) opens: u32,
    pub(super) writers: u32,
    /// Whether it still has a name.
    pub(super) linked: bool,
    /// Whether it was counted as a file that is done.
    pub(super) counted: bool,
    pub(super) data: Data,
}

/// How its bytes are kept.
#[derive(Debug)]
pub(super) enum Data {
    Stream(Stream),
    Memory(MemoryFile),
    Segment(Box<Segment>),
    Lower { id: LowerId, size: u64 },
}

impl Node {
    pub(super) fn new(ino: Ino, mode: u32, mtime: i64, data: Data) -> Arc<Self> {
        let state = Mutex::new(State {
            mode: mode & 0o7777,
            mtime,
            opens: 0,
            writers: 0,
            linked: true,
            counted: false,
            data,
        });
        Arc::new(Self { ino, state })
    }

    /// Never held while something else is waited for, and no other lock is taken under it but those of counters.
    pub(super) fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn attr(&self) -> Attr {
        let state = self.state();
        Attr {
            ino: self.ino,
            kind: FileKind::File,
            mode: state.mode,
            size: state.data.size(),
            mtime: time_of(state.mtime),
        }
    }
}

impl Data {
    pub(super) fn size(&self) -> u64 {
        match self {
            Self::Stream(stream) => stream.size(),
            Self::Memory(file) => file.size(),
            Self::Segment(segment) => segment.size(),
            Self::Lower { size, .. } => *size,
        }
    }
}

/// A name and what it stands for.
#[derive(Debug)]
pub(super) struct Inode {
    pub(super) parent: Ino,
    pub(super) name: Arc<str>,
    /// Whether it came from the lower layer.
    pub(super) lower: bool,
    pub(super) body: Body,
}

#[derive(Debug)]
pub(super) enum Body {
    Directory(Directory),
    File(Arc<Node>),
}

#[derive(Debug)]
pub(super) struct Directory {
    pub(super) mode: u32,
    pub(super) mtime: i64,
    pub(super) children: BTreeMap<Arc<str>, Ino>,
}

impl Directory {
    pub(super) fn new(mode: u32, mtime: i64) -> Self {
        Self {
            mode: mode & 0o7777,
            mtime,
            children: BTreeMap::new(),
        }
    }
}

/// All names.
#[derive(Debug)]
pub(super) struct Tree {
    inodes: HashMap<Ino, Inode>,
    next: Ino,
}

/// Checks a name for something new.
///
/// # Errors
/// [`FsError::NameTooLong`], [`FsError::BadName`].
pub(super) fn check_name(name: &std::ffi::OsStr) -> Result<&str, FsError> {
    if name.len() > NAME_MAX {
        return Err(FsError::NameTooLong);
    }
    let name = name.to_str().ok_or(FsError::BadName)?;
    let bad = matches!(name, "" | "." | "..") || name.contains(['/', '\0']);
    if bad { Err(FsError::BadName) } else { Ok(name) }
}

impl Tree {
    pub(super) fn new(mtime: i64) -> Self {
        let root = Inode {
            parent: ROOT,
            name: "".into(),
            lower: true,
            body: Body::Directory(Directory::new(0o700, mtime)),
        };
        Self {
            inodes: HashMap::from([(ROOT, root)]),
            next: ROOT + 1,
        }
    }

    /// A number that was never used.
    pub(super) fn new_ino(&mut self) -> Ino {
        let ino = self.next;
        self.next += 1;
        ino
    }

    pub(super) fn inode(&self, ino: Ino) -> Result<&Inode, FsError> {
        self.inodes.get(&ino).ok_or(FsError::NotFound)
    }

    pub(super) fn directory(&self, ino: Ino) -> Result<&Directory, FsError> {
        match &self.inode(ino)?.body {
            Body::Directory(directory) => Ok(directory),
            Body::File(_) => Err(FsError::NotDirectory),
        }
    }

    fn directory_mut(&mut self, ino: Ino) -> Result<&mut Directory, FsError> {
        match &mut self.inodes.get_mut(&ino).ok_or(FsError::NotFound)?.body {
            Body::Directory(directory) => Ok(directory),
            Body::File(_) => Err(FsError::NotDirectory),
        }
    }

    pub(super) fn set_directory_mode(&mut self, ino: Ino, mode: u32) -> Result<(), FsError> {
        self.directory_mut(ino)?.mode = mode & 0o7777;
        Ok(())
    }

    /// What a name in a directory stands for.
    pub(super) fn child(&self, parent: Ino, name: &str) -> Result<Option<Ino>, FsError> {
        Ok(self.directory(parent)?.children.get(name).copied())
    }

    /// The file of a number.
    pub(super) fn node(&self, ino: Ino) -> Result<Arc<Node>, FsError> {
        match &self.inode(ino)?.body {
            Body::File(node) => Ok(Arc::clone(node)),
            Body::Directory(_) => Err(FsError::IsDirectory),
        }
    }

    pub(super) fn attr(&self, ino: Ino) -> Result<Attr, FsError> {
        match &self.inode(ino)?.body {
            Body::File(node) => Ok(node.attr()),
            Body::Directory(directory) => Ok(Attr {
                ino,
                kind: FileKind::Directory,
                mode: directory.mode,
                size: 0,
                mtime: time_of(directory.mtime),
            }),
        }
    }

    pub(super) fn list(&self, ino: Ino) -> Result<Vec<DirEntry>, FsError> {
        let children = &self.directory(ino)?.children;
        let entry = |(name, ino): (&Arc<str>, &Ino)| {
            let kind = match self.inodes.get(ino).map(|inode| &inode.body) {
                Some(Body::Directory(_)) => FileKind::Directory,
                _ => FileKind::File,
            };
            DirEntry {
                ino: *ino,
                kind,
                name: Arc::clone(name),
            }
        };
        Ok(children.iter().map(entry).collect())
    }

    /// Gives something a name; replaces nothing.
    pub(super) fn insert(
        &mut self,
        ino: Ino,
        parent: Ino,
        name: &str,
        lower: bool,
        body: Body,
    ) -> Result<(), FsError> {
        let name: Arc<str> = name.into();
        let children = &mut self.directory_mut(parent)?.children;
        if children.contains_key(&name) {
            return Err(FsError::Exists);
        }
        children.insert(Arc::clone(&name), ino);
        let inode = Inode {
            parent,
            name,
            lower,
            body,
        };
        self.inodes.insert(ino, inode);
        Ok(())
    }

    /// Takes a name away from what it stands for.
    pub(super) fn unname(&mut self, parent: Ino, name: &str) -> Result<(), FsError> {
        let removed = self.directory_mut(parent)?.children.remove(name);
        removed.map(drop).ok_or(FsError::NotFound)
    }

    /// Forgets a number; drop what it stood for with no lock held.
    pub(super) fn forget(&mut self, ino: Ino) -> Option<Body> {
        self.inodes.remove(&ino).map(|inode| inode.body)
    }

    /// Gives a file another name, which must be free.
    pub(super) fn move_to(&mut self, ino: Ino, parent: Ino, name: &str) -> Result<(), FsError> {
        let (old_parent, old_name) = {
            let inode = self.inode(ino)?;
            (inode.parent, Arc::clone(&inode.name))
        };
        let name: Arc<str> = name.into();
        self.directory_mut(parent)?
            .children
            .insert(Arc::clone(&name), ino);
        self.directory_mut(old_parent)?.children.remove(&old_name);
        if let Some(inode) = self.inodes.get_mut(&ino) {
            inode.parent = parent;
            inode.name = name;
        }
        Ok(())
    }

    /// The numbers from the root to `ino`.
    fn trail(&self, ino: Ino) -> Vec<Ino> {
        let mut trail = vec![ino];
        let mut at = ino;
        while at != ROOT
            && let Some(inode) = self.inodes.get(&at)
        {
            at = inode.parent;
            trail.push(at);
        }
        trail.reverse();
        trail
    }

    /// The path from the root, without a leading `/`. Of a file whose name was taken away: where it was.
    pub(super) fn path(&self, ino: Ino) -> String {
        let mut path = String::new();
        for ino in self.trail(ino) {
            if let Some(inode) = self.inodes.get(&ino)
                && ino != ROOT
            {
                if !path.is_empty() {
                    path.push('/');
                }
                path.push_str(&inode.name);
            }
        }
        path
    }

    /// The path of a name in a directory.
    pub(super) fn path_in(&self, parent: Ino, name: &str) -> String {
        let mut path = self.path(parent);
        if !path.is_empty() {
            path.push('/');
        }
        path.push_str(name);
        path
    }

    /// Whether a directory is, or is in, a backup that the lower layer brought: one that is finished.
    pub(super) fn in_finished_backup(&self, directory: Ino) -> bool {
        let trail = self.trail(directory);
        let backup = trail.get(BACKUP_DEPTH);
        let inode = backup.and_then(|ino| self.inodes.get(ino));
        inode.is_some_and(|inode| inode.lower)
    }

    /// Every name below the root, each directory before what is in it, in the order of names.
    pub(super) fn walk(&self, each: &mut dyn FnMut(&str, &Inode)) {
        let mut rest = vec![(String::new(), ROOT)];
        while let Some((path, ino)) = rest.pop() {
            let Some(inode) = self.inodes.get(&ino) else {
                continue;
            };
            if ino != ROOT {
                each(&path, inode);
            }
            if let Body::Directory(directory) = &inode.body {
                for (name, child) in directory.children.iter().rev() {
                    let path = if path.is_empty() {
                        name.to_string()
                    } else {
                        format!("{path}/{name}")
                    };
                    rest.push((path, *child));
                }
            }
        }
    }
}
