//! [`CatalogFs`] on `/dev/fuse`.
//!
//! A thread of FUSE never waits: what may take time is answered from where it ends, by the reply that goes with it. A reply
//! that is dropped, by a panic or a lost callback, answers EIO by itself, so the kernel never waits for ever.
//!
//! Sizes are exact at all times: those of files are asked for anew at each look (they are kept for no time), and what still grows
//! is written and read past the page cache. Pages of what is finished are kept.

use std::any::Any;
use std::collections::HashMap;
use std::ffi::OsStr;
use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, SystemTime};

use fuser::{
    AccessFlags, BsdFileFlags, CopyFileRangeFlags, Errno, FileAttr, FileHandle, FileType,
    Filesystem, FopenFlags, Generation, INodeNo, InitFlags, IoctlFlags, KernelConfig, LockOwner,
    OpenAccMode, OpenFlags, RenameFlags, ReplyAttr, ReplyCreate, ReplyData, ReplyDirectory,
    ReplyEmpty, ReplyEntry, ReplyIoctl, ReplyLseek, ReplyOpen, ReplyStatfs, ReplyWrite, ReplyXattr,
    Request, TimeOrNow, WriteFlags,
};
use rustix::fs::OFlags;
use rustix::process::{getegid, geteuid};

use super::{Attr, CatalogFs, FileKind, FsError, Handle, OpenHow, Opened};

/// How long names, and what directories are, may be kept by the kernel. They change through it only, unless
/// two programs have mounts of their own of one catalog.
const KEPT: Duration = Duration::from_secs(1);
/// Of what grows.
const NOT_KEPT: Duration = Duration::ZERO;
/// How much the kernel may send in one write, in bytes; it has a limit of its own, often the same.
const MAX_WRITE: u32 = 1 << 20;
/// Reads ahead that may be under way: programs restore with several threads.
const BACKGROUND: u16 = 64;
/// What files are best read and written by, in bytes.
const BLOCK: u32 = 128 << 10;
/// Longest name, in bytes.
const NAME_MAX: u32 = 255;
/// Permission bits of a mode.
const PERMISSIONS: u32 = 0o7777;

/// What `opendir` saw: entries that come and go while it is read neither repeat others nor hide them.
type Listing = Arc<Vec<(INodeNo, FileType, Arc<str>)>>;

#[derive(Debug)]
pub(super) struct CatalogSession {
    fs: Arc<CatalogFs>,
    uid: u32,
    gid: u32,
    listings: Mutex<HashMap<u64, Option<Listing>>>,
    next: AtomicU64,
}

fn errno(error: &FsError) -> Errno {
    Errno::from_i32(error.errno())
}

fn how(flags: OpenFlags, exclusive: bool) -> OpenHow {
    let mode = flags.acc_mode();
    let flags = OFlags::from_bits_retain(flags.0.cast_unsigned());
    OpenHow {
        read: matches!(mode, OpenAccMode::O_RDONLY | OpenAccMode::O_RDWR),
        write: matches!(mode, OpenAccMode::O_WRONLY | OpenAccMode::O_RDWR),
        truncate: flags.contains(OFlags::TRUNC),
        exclusive: exclusive && flags.contains(OFlags::EXCL),
        append: flags.contains(OFlags::APPEND),
    }
}

/// Whether what it says now is true as long as nobody changes it through this mount.
fn kept(attr: &Attr) -> Duration {
    match attr.kind {
        FileKind::Directory => KEPT,
        FileKind::File => NOT_KEPT,
    }
}

fn file_type(kind: FileKind) -> FileType {
    match kind {
        FileKind::Directory => FileType::Directory,
        FileKind::File => FileType::RegularFile,
    }
}

/// Runs a handler. One that panics has dropped its reply, which has answered EIO; its thread goes on.
fn guarded(name: &'static str, handler: impl FnOnce()) {
    if let Err(panic) = catch_unwind(AssertUnwindSafe(handler)) {
        tracing::error!(
            "a bug in the agent: `{name}` on the mount panicked: {}",
            said(&*panic)
        );
    }
}

fn said(panic: &(dyn Any + Send)) -> &str {
    let text = panic.downcast_ref::<&str>().copied();
    text.or_else(|| panic.downcast_ref::<String>().map(String::as_str))
        .unwrap_or("without a word")
}

impl CatalogSession {
    pub(super) fn new(fs: Arc<CatalogFs>) -> Self {
        Self {
            fs,
            uid: geteuid().as_raw(),
            gid: getegid().as_raw(),
            listings: Mutex::default(),
            next: AtomicU64::new(0),
        }
    }

    fn attr(&self, attr: &Attr) -> FileAttr {
        let directory = attr.kind == FileKind::Directory;
        FileAttr {
            ino: INodeNo(attr.ino),
            size: attr.size,
            blocks: attr.size.div_ceil(512),
            atime: attr.mtime,
            mtime: attr.mtime,
            ctime: attr.mtime,
            crtime: SystemTime::UNIX_EPOCH,
            kind: file_type(attr.kind),
            perm: u16::try_from(attr.mode & PERMISSIONS).unwrap_or_default(),
            nlink: if directory { 2 } else { 1 },
            uid: self.uid,
            gid: self.gid,
            rdev: 0,
            blksize: BLOCK,
            flags: 0,
        }
    }

    fn entry(&self, found: Result<Attr, FsError>, reply: ReplyEntry) {
        match found {
            Ok(attr) => {
                reply.entry_with_ttls(&kept(&attr), &KEPT, &self.attr(&attr), Generation(0));
            }
            Err(error) => reply.error(errno(&error)),
        }
    }

    fn attributes(&self, found: Result<Attr, FsError>, reply: ReplyAttr) {
        match found {
            Ok(attr) => reply.attr(&kept(&attr), &self.attr(&attr)),
            Err(error) => reply.error(errno(&error)),
        }
    }

    fn listing(&self, ino: INodeNo, handle: FileHandle, anew: bool) -> Result<Listing, FsError> {
        let mut listings = self.listings.lock().unwrap_or_else(PoisonError::into_inner);
        let kept = listings.get_mut(&handle.0).ok_or(FsError::BadHandle)?;
        if let Some(listing) = kept.as_ref().filter(|_| !anew) {
            return Ok(Arc::clone(listing));
        }
        let parent = INodeNo(self.fs.parent(ino.0)?);
        let mut entries = vec![
            (ino, FileType::Directory, Arc::from(".")),
            (parent, FileType::Directory, Arc::from("..")),
        ];
        let found = self.fs.readdir(ino.0)?.into_iter();
        entries.extend(found.map(|entry| (INodeNo(entry.ino), file_type(entry.kind), entry.name)));
        let listing = Arc::new(entries);
        *kept = Some(Arc::clone(&listing));
        Ok(listing)
    }
}

fn empty(result: Result<(), FsError>, reply: ReplyEmpty) {
    match result {
        Ok(()) => reply.ok(),
        Err(error) => reply.error(errno(&error)),
    }
}

/// How the kernel is to treat what was opened.
fn opened_flags(opened: &Opened) -> FopenFlags {
    if opened.direct_io {
        FopenFlags::FOPEN_DIRECT_IO
    } else {
        // It is finished: what was read of it at an earlier open is still true.
        FopenFlags::FOPEN_KEEP_CACHE
    }
}

impl Filesystem for CatalogSession {
    fn init(&mut self, _: &Request, config: &mut KernelConfig) -> io::Result<()> {
        // The writeback cache stays off: it sends a page that is filled in parts more than once, and out of order.
        let wanted = [
            // O_TRUNC comes with open, not as a change of the size before it.
            InitFlags::FUSE_ATOMIC_O_TRUNC,
            // Several look-ups in one directory at once.
            InitFlags::FUSE_PARALLEL_DIROPS,
        ];
        for flag in wanted {
            // A kernel without it does it in its older way, which is right, too.
            let _ = config.add_capabilities(flag);
        }
        let _ = config.set_max_write(MAX_WRITE);
        let _ = config.set_max_background(BACKGROUND);
        Ok(())
    }

    fn lookup(&self, _: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEntry) {
        guarded("lookup", || {
            self.entry(self.fs.lookup(parent.0, name), reply);
        });
    }

    fn getattr(&self, _: &Request, ino: INodeNo, _: Option<FileHandle>, reply: ReplyAttr) {
        guarded("getattr", || self.attributes(self.fs.getattr(ino.0), reply));
    }

    fn setattr(
        &self,
        _: &Request,
        ino: INodeNo,
        mode: Option<u32>,
        uid: Option<u32>,
        gid: Option<u32>,
        size: Option<u64>,
        // Times are the file system's own.
        _atime: Option<TimeOrNow>,
        _mtime: Option<TimeOrNow>,
        _ctime: Option<SystemTime>,
        _: Option<FileHandle>,
        _crtime: Option<SystemTime>,
        _chgtime: Option<SystemTime>,
        _bkuptime: Option<SystemTime>,
        _: Option<BsdFileFlags>,
        reply: ReplyAttr,
    ) {
        guarded("setattr", || {
            if uid.is_some_and(|uid| uid != self.uid) || gid.is_some_and(|gid| gid != self.gid) {
                return reply.error(Errno::EPERM);
            }
            let mode = mode.map(|mode| mode & PERMISSIONS);
            self.attributes(self.fs.setattr(ino.0, mode, size), reply);
        });
    }

    fn mkdir(
        &self,
        _: &Request,
        parent: INodeNo,
        name: &OsStr,
        mode: u32,
        _umask: u32,
        reply: ReplyEntry,
    ) {
        guarded("mkdir", || {
            self.entry(self.fs.mkdir(parent.0, name, mode & PERMISSIONS), reply);
        });
    }

    fn unlink(&self, _: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEmpty) {
        guarded("unlink", || empty(self.fs.unlink(parent.0, name), reply));
    }

    fn rmdir(&self, _: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEmpty) {
        guarded("rmdir", || empty(self.fs.rmdir(parent.0, name), reply));
    }

    fn rename(
        &self,
        _: &Request,
        parent: INodeNo,
        name: &OsStr,
        new_parent: INodeNo,
        new_name: &OsStr,
        flags: RenameFlags,
        reply: ReplyEmpty,
    ) {
        guarded("rename", || {
            if !flags.is_empty() {
                return reply.error(Errno::EINVAL);
            }
            let renamed = self.fs.rename(parent.0, name, new_parent.0, new_name);
            empty(renamed, reply);
        });
    }

    fn create(
        &self,
        _: &Request,
        parent: INodeNo,
        name: &OsStr,
        mode: u32,
        _umask: u32,
        flags: i32,
        reply: ReplyCreate,
    ) {
        guarded("create", || {
            let how = how(OpenFlags(flags), true);
            match self.fs.create(parent.0, name, mode & PERMISSIONS, how) {
                Ok((attr, opened)) => reply.created(
                    &kept(&attr),
                    &self.attr(&attr),
                    Generation(0),
                    FileHandle(opened.handle.0),
                    opened_flags(&opened),
                ),
                Err(error) => reply.error(errno(&error)),
            }
        });
    }

    fn open(&self, _: &Request, ino: INodeNo, flags: OpenFlags, reply: ReplyOpen) {
        guarded("open", || match self.fs.open(ino.0, how(flags, false)) {
            Ok(opened) => reply.opened(FileHandle(opened.handle.0), opened_flags(&opened)),
            Err(error) => reply.error(errno(&error)),
        });
    }

    fn read(
        &self,
        _: &Request,
        _: INodeNo,
        handle: FileHandle,
        offset: u64,
        size: u32,
        _: OpenFlags,
        _: Option<LockOwner>,
        reply: ReplyData,
    ) {
        guarded("read", || {
            let done = move |read: Result<bytes::Bytes, FsError>| match read {
                Ok(bytes) => reply.data(&bytes),
                Err(error) => reply.error(errno(&error)),
            };
            let length = usize::try_from(size).unwrap_or(usize::MAX);
            self.fs
                .read(Handle(handle.0), offset, length, Box::new(done));
        });
    }

    fn write(
        &self,
        _: &Request,
        _: INodeNo,
        handle: FileHandle,
        offset: u64,
        data: &[u8],
        _: WriteFlags,
        _: OpenFlags,
        _: Option<LockOwner>,
        reply: ReplyWrite,
    ) {
        guarded("write", || {
            let done = move |written: Result<u32, FsError>| match written {
                Ok(written) => reply.written(written),
                Err(error) => reply.error(errno(&error)),
            };
            self.fs
                .write(Handle(handle.0), offset, data, Box::new(done));
        });
    }

    fn flush(&self, _: &Request, _: INodeNo, handle: FileHandle, _: LockOwner, reply: ReplyEmpty) {
        guarded("flush", || {
            self.fs
                .flush(Handle(handle.0), Box::new(move |done| empty(done, reply)));
        });
    }

    fn fsync(&self, _: &Request, _: INodeNo, handle: FileHandle, _: bool, reply: ReplyEmpty) {
        guarded("fsync", || {
            self.fs
                .fsync(Handle(handle.0), Box::new(move |done| empty(done, reply)));
        });
    }

    fn release(
        &self,
        _: &Request,
        _: INodeNo,
        handle: FileHandle,
        _: OpenFlags,
        _: Option<LockOwner>,
        _: bool,
        reply: ReplyEmpty,
    ) {
        guarded("release", || {
            self.fs.release(Handle(handle.0));
            reply.ok();
        });
    }

    fn opendir(&self, _: &Request, _: INodeNo, _: OpenFlags, reply: ReplyOpen) {
        guarded("opendir", || {
            let handle = self.next.fetch_add(1, Ordering::Relaxed);
            let mut listings = self.listings.lock().unwrap_or_else(PoisonError::into_inner);
            listings.insert(handle, None);
            drop(listings);
            reply.opened(FileHandle(handle), FopenFlags::empty());
        });
    }

    fn readdir(
        &self,
        _: &Request,
        ino: INodeNo,
        handle: FileHandle,
        offset: u64,
        mut reply: ReplyDirectory,
    ) {
        guarded("readdir", || {
            // Back at the start (rewinddir) it is looked at anew.
            let listing = match self.listing(ino, handle, offset == 0) {
                Ok(listing) => listing,
                Err(error) => return reply.error(errno(&error)),
            };
            let entries = listing.iter().zip(1u64..);
            let rest = entries.skip(usize::try_from(offset).unwrap_or(usize::MAX));
            for ((ino, kind, name), next) in rest {
                if reply.add(*ino, next, *kind, &**name) {
                    break;
                }
            }
            reply.ok();
        });
    }

    fn releasedir(
        &self,
        _: &Request,
        _: INodeNo,
        handle: FileHandle,
        _: OpenFlags,
        reply: ReplyEmpty,
    ) {
        guarded("releasedir", || {
            let mut listings = self.listings.lock().unwrap_or_else(PoisonError::into_inner);
            listings.remove(&handle.0);
            drop(listings);
            reply.ok();
        });
    }

    fn fsyncdir(&self, _: &Request, _: INodeNo, _: FileHandle, _: bool, reply: ReplyEmpty) {
        reply.ok();
    }

    fn statfs(&self, _: &Request, _: INodeNo, reply: ReplyStatfs) {
        guarded("statfs", || {
            let room = self.fs.statfs();
            let (size, name) = (room.block_size, NAME_MAX);
            reply.statfs(
                room.blocks,
                room.free,
                room.free,
                room.files,
                room.files_free,
                size,
                name,
                size,
            );
        });
    }

    // ENOSYS once, and the kernel answers by itself from then on: everything may be accessed, and there are no
    // extended attributes (for which it would ask at every write).

    fn access(&self, _: &Request, _: INodeNo, _: AccessFlags, reply: ReplyEmpty) {
        reply.error(Errno::ENOSYS);
    }

    fn getxattr(&self, _: &Request, _: INodeNo, _: &OsStr, _: u32, reply: ReplyXattr) {
        reply.error(Errno::ENOSYS);
    }

    fn listxattr(&self, _: &Request, _: INodeNo, _: u32, reply: ReplyXattr) {
        reply.error(Errno::ENOSYS);
    }

    fn setxattr(
        &self,
        _: &Request,
        _: INodeNo,
        _: &OsStr,
        _: &[u8],
        _: i32,
        _: u32,
        reply: ReplyEmpty,
    ) {
        reply.error(Errno::ENOSYS);
    }

    fn removexattr(&self, _: &Request, _: INodeNo, _: &OsStr, reply: ReplyEmpty) {
        reply.error(Errno::ENOSYS);
    }

    // So it is with these: the kernel, or the program, goes by reads and writes.

    fn lseek(&self, _: &Request, _: INodeNo, _: FileHandle, _: i64, _: i32, reply: ReplyLseek) {
        reply.error(Errno::ENOSYS);
    }

    fn fallocate(
        &self,
        _: &Request,
        _: INodeNo,
        _: FileHandle,
        _: u64,
        _: u64,
        _: i32,
        reply: ReplyEmpty,
    ) {
        reply.error(Errno::ENOSYS);
    }

    fn copy_file_range(
        &self,
        _: &Request,
        _: INodeNo,
        _: FileHandle,
        _: u64,
        _: INodeNo,
        _: FileHandle,
        _: u64,
        _: u64,
        _: CopyFileRangeFlags,
        reply: ReplyWrite,
    ) {
        reply.error(Errno::ENOSYS);
    }

    fn ioctl(
        &self,
        _: &Request,
        _: INodeNo,
        _: FileHandle,
        _: IoctlFlags,
        _: u32,
        _: &[u8],
        _: u32,
        reply: ReplyIoctl,
    ) {
        reply.error(Errno::ENOTTY);
    }

    // Nothing but files and directories can stand in a backup.

    fn mknod(
        &self,
        _: &Request,
        _: INodeNo,
        _: &OsStr,
        _mode: u32,
        _umask: u32,
        _: u32,
        reply: ReplyEntry,
    ) {
        reply.error(Errno::EPERM);
    }

    fn symlink(&self, _: &Request, _: INodeNo, _: &OsStr, _: &Path, reply: ReplyEntry) {
        reply.error(Errno::EPERM);
    }

    fn link(&self, _: &Request, _: INodeNo, _: INodeNo, _: &OsStr, reply: ReplyEntry) {
        reply.error(Errno::EPERM);
    }
}
