//! A backup catalog as a file system in this process, for programs that can only write into a directory.
//!
//! [`CatalogFs`] knows no FUSE: a session in front of it turns the kernel's requests into its calls. What a program writes
//! streams away into packs, and nothing of it touches a disk.
//!
//! # How files are kept during a backup
//!
//! | files | kept |
//! |---|---|
//! | all below `database/` and `external_directories/`, `page_header_map` | **stream**: at most one frame of it is in memory; written once, in order, holes are zeros; opened with `O_TRUNC` it begins anew; never read |
//! | `database/pg_wal\|pg_xlog/<24 hex>[.partial]` | **segment**: in memory, in any order, until it is complete: renamed from `.partial` (`gs_probackup`), or closed after what came behind its zero padding reached its end (`pg_probackup`). Then it goes to the bucket through [`WalSink`], its memory is free, and reads are answered from there |
//! | `backup_label`, `tablespace_map`, `database_map`, `*.control`, `pg_probackup.conf`, and all others | in memory, like any file; stored when the copy is sealed, under the name they have then |
//! | `backup_content.control*` | the same, compressed (about 25 bytes a file of the backup) |
//! | `*.pid*` outside the database | in memory, never stored |
//!
//! Below it may lie a [`Lower`] layer: the backups that this one builds on, or, for reading, the chain to restore. In a
//! backup it is read-only, but for locks and the status of a parent, which go nowhere. In a [`CatalogFs::for_reading`]
//! every write goes to memory.
//!
//! # Memory, and why nobody waits for ever
//!
//! All memory is taken from the budget when the file system is made, or it is refused then. It never asks the budget again,
//! so it cannot be caught in a circle with the uploads, which share that budget.
//!
//! - *Bytes are taken at once, the answer is given when there is room.* A write never blocks its caller: the bytes go where they
//!   belong, and if that was more than there is room for, the answer waits. So at most one write of each of
//!   the program's threads is in memory beyond the limit; that much is set aside for it.
//! - *Streams.* Memory is either in jobs, which the lanes finish whatever else happens (they wait for parts only, which the
//!   uploads finish), or in what open files have collected. When answers wait, the largest collections are handed on as
//!   smaller frames until they hold no more than half of the room. So there are always jobs under way, and when they are done there
//!   is room. Nobody who waits holds what another one waits for.
//! - *Segments* have room of their own, at least one whole segment. An answer waits for it only while a complete segment is on its
//!   way to the bucket. With none under way, waiting would be of no use, and the answer is `ENOSPC`.
//! - *Small files in memory* have a limit, and its end is `ENOSPC`.
//!
//! # Errors
//!
//! The first error of an upload poisons the copy: whoever waits and whoever writes from then on gets `EIO`, and
//! [`CatalogFs::failed`] comes. `close()` never waits for a part, it returns what is known. A call that the copy
//! cannot follow (a stream written again before its end) is answered by an error and logged; the copy goes on, but can no longer be sealed.

mod backup;
mod class;
mod error;
mod faults;
mod files;
mod lanes;
pub mod life;
mod memory;
mod names;
pub mod private;
mod sealed;
mod segment;
mod serving;
mod session;
pub mod stored;
mod stream;
mod tree;
mod wal;

use std::collections::HashMap;
use std::fmt;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use bytes::Bytes;
use pipeline::budget::{Budget, BudgetLease};

pub use self::backup::BackupSide;
pub use self::error::{Failure, FsError};
pub use self::sealed::{Sealed, SealedCopy};
pub use self::wal::WalSink;

use self::backup::Backup;
use self::faults::Faults;
use self::memory::Quota;
use self::tree::{Body, Data, Directory, Node, Tree};

/// Number of a file or directory; never used twice.
pub type Ino = u64;

/// The directory of the catalog itself.
pub const ROOT: Ino = 1;

/// How a call that may have to wait is answered: called once, from any thread, at once if possible.
pub type Done<T> = Box<dyn FnOnce(Result<T, FsError>) + Send>;

/// An open file.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Handle(pub u64);

/// What an entry is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FileKind {
    /// A regular file.
    File,
    /// A directory.
    Directory,
}

/// What there is to know of an entry.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Attr {
    /// Its number.
    pub ino: Ino,
    /// What it is.
    pub kind: FileKind,
    /// Permission bits.
    pub mode: u32,
    /// Bytes, exact at every moment; 0 for a directory.
    pub size: u64,
    /// When it was last written, whole seconds.
    pub mtime: SystemTime,
}

/// An entry of a directory.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DirEntry {
    /// Its number.
    pub ino: Ino,
    /// What it is.
    pub kind: FileKind,
    /// Its name.
    pub name: Arc<str>,
}

/// The flags of `open(2)` that matter.
#[expect(clippy::struct_excessive_bools, reason = "they are flags")]
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct OpenHow {
    /// For reading.
    pub read: bool,
    /// For writing.
    pub write: bool,
    /// `O_TRUNC`.
    pub truncate: bool,
    /// `O_EXCL`.
    pub exclusive: bool,
    /// `O_APPEND`.
    pub append: bool,
}

/// An open file, and how the kernel is to treat it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Opened {
    /// For the calls that follow.
    pub handle: Handle,
    /// Whether the kernel must not cache its pages: it is written, or still grows.
    pub direct_io: bool,
}

/// Sizes of the whole file system, for `statfs(2)`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct StatFs {
    /// Bytes of a block.
    pub block_size: u32,
    /// Blocks in all.
    pub blocks: u64,
    /// Blocks that are free.
    pub free: u64,
    /// Files that there can be.
    pub files: u64,
    /// Files that there can be in addition.
    pub files_free: u64,
}

/// A file of the lower layer.
pub type LowerId = u64;

/// What there is in the lower layer. Directories above an entry are made if they are not listed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LowerEntry {
    /// Path in the catalog, without a leading `/`.
    pub path: String,
    /// Permission bits.
    pub mode: u32,
    /// Modification time, seconds since 1970.
    pub mtime: Option<i64>,
    /// What it is.
    pub kind: LowerKind,
}

/// What a [`LowerEntry`] is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LowerKind {
    /// A directory.
    Directory,
    /// A file.
    File {
        /// Bytes.
        size: u64,
        /// For [`Lower::read`].
        id: LowerId,
    },
}

/// Reads the files below.
pub trait Lower: Send + Sync + fmt::Debug {
    /// Answers with `length` bytes of a file from `offset`, fewer only at its end. Does not block. Errors are
    /// logged with their reason by whoever answers.
    fn read(&self, id: LowerId, offset: u64, length: usize, done: Done<Bytes>);
}

/// A lower layer with nothing in it.
#[derive(Debug)]
pub struct NoLower;

impl Lower for NoLower {
    fn read(&self, _: LowerId, _: u64, _: usize, done: Done<Bytes>) {
        done(Err(FsError::NotFound));
    }
}

/// Memory for the small files that a restore or a validation writes: 4 MiB.
const OVERLAY: usize = 4 << 20;
/// Most bytes of compressed lists of files; not from the budget, like the index itself: 25 and 100 bytes a file.
const LISTS_MOST: usize = 512 << 20;

/// The file system. See the module.
#[derive(Debug)]
pub struct CatalogFs {
    tree: Mutex<Tree>,
    handles: Mutex<HashMap<u64, Open>>,
    next_handle: AtomicU64,
    /// Memory of small files.
    quota: Arc<Quota>,
    /// Memory of lists of files.
    lists: Arc<Quota>,
    faults: Arc<Faults>,
    lower: Arc<dyn Lower>,
    /// None: for reading.
    backup: Option<Backup>,
    activity: Arc<Activity>,
    _lease: BudgetLease,
}

/// What a handle stands for.
#[derive(Debug, Clone)]
struct Open {
    node: Arc<Node>,
    how: OpenHow,
}

/// When something was last done.
#[derive(Debug)]
struct Activity {
    start: Instant,
    /// Milliseconds after it.
    last: AtomicU64,
}

impl Activity {
    fn new() -> Self {
        Self {
            start: Instant::now(),
            last: AtomicU64::new(0),
        }
    }

    fn touch(&self) {
        let now = u64::try_from(self.start.elapsed().as_millis()).unwrap_or(u64::MAX);
        self.last.store(now, Ordering::Relaxed);
    }
}

/// Seconds since 1970.
fn now() -> i64 {
    let now = SystemTime::now().duration_since(UNIX_EPOCH);
    now.ok()
        .and_then(|now| i64::try_from(now.as_secs()).ok())
        .unwrap_or_default()
}

fn time_of(seconds: i64) -> SystemTime {
    let distance = Duration::from_secs(seconds.unsigned_abs());
    let time = if seconds < 0 {
        UNIX_EPOCH.checked_sub(distance)
    } else {
        UNIX_EPOCH.checked_add(distance)
    };
    time.unwrap_or(UNIX_EPOCH)
}

impl CatalogFs {
    /// A file system that a backup is written into. Takes its memory from `side.budget` for as long as it lives: half of what is
    /// free, between [`BackupSide::least_bytes`] and 96 MiB. Call within a tokio runtime.
    ///
    /// # Errors
    /// [`Failure::Pipeline`] if the budget has no room or the system no threads, or a lower path is bad.
    pub fn for_backup(side: BackupSide) -> Result<Arc<Self>, Failure> {
        backup::start(side)
    }

    /// A file system to read from; what is written goes to memory and is gone with it.
    ///
    /// # Errors
    /// [`Failure::Pipeline`] if the budget has no room, or a lower path is bad.
    pub fn for_reading(
        entries: Vec<LowerEntry>,
        lower: Arc<dyn Lower>,
        budget: &Budget,
    ) -> Result<Arc<Self>, Failure> {
        let lease = budget.reserve(OVERLAY, "what is written to the mount")?;
        let made = Self::new(entries, lower, Quota::new(OVERLAY), Faults::new(), lease)?;
        Ok(Arc::new(made))
    }

    fn new(
        entries: Vec<LowerEntry>,
        lower: Arc<dyn Lower>,
        quota: Arc<Quota>,
        faults: Arc<Faults>,
        lease: BudgetLease,
    ) -> Result<Self, Failure> {
        let mut tree = Tree::new(now());
        for entry in entries {
            names::add_lower(&mut tree, &entry)?;
        }
        Ok(Self {
            tree: Mutex::new(tree),
            handles: Mutex::default(),
            next_handle: AtomicU64::new(1),
            quota,
            lists: Quota::new(LISTS_MOST),
            faults,
            lower,
            backup: None,
            activity: Arc::new(Activity::new()),
            _lease: lease,
        })
    }

    /// Shows one more entry of the lower layer from now on.
    ///
    /// # Errors
    /// [`Failure::Pipeline`] if its path is bad or taken.
    pub fn show(&self, entry: &LowerEntry) -> Result<(), Failure> {
        names::add_lower(&mut self.tree(), entry)
    }

    /// Waits for the error that ends the copy: of an upload, or of a cancel. Nothing that is written afterwards is taken.
    pub async fn failed(&self) -> Failure {
        self.faults.failed().await
    }

    /// When the last call came, or the last answer that had to wait was given.
    #[must_use]
    pub fn last_activity(&self) -> Instant {
        let last = Duration::from_millis(self.activity.last.load(Ordering::Relaxed));
        self.activity.start + last
    }

    /// The lock of all names. Nodes may be locked under it, never the other way round.
    fn tree(&self) -> MutexGuard<'_, Tree> {
        self.tree.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn handles(&self) -> MutexGuard<'_, HashMap<u64, Open>> {
        self.handles.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn open_of(&self, handle: Handle) -> Result<Open, FsError> {
        let handles = self.handles();
        handles.get(&handle.0).cloned().ok_or(FsError::BadHandle)
    }
}
