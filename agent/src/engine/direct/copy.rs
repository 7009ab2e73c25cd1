//! The copy itself: one thread walks, several read, verify and compress.
//!
//! A big file is cut in chunks that any thread takes, so that one big relation uses every core. Memory is one
//! buffer a thread and a bounded queue of names.

use std::collections::BTreeMap;
use std::fs::File;
use std::io;
use std::os::unix::fs::{FileExt as _, MetadataExt as _, PermissionsExt as _};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;

use agent_wal::BLOCK_SIZE;
use agent_wal::control::ControlFile;
use catalog::model::Attachment;
use crossbeam_channel::{Receiver, Sender, bounded};
use pipeline::index::{FileId, FilePacker, IndexBuilder};
use pipeline::pack::{EntryKind, IndexEntry, Lane};
use tokio::sync::oneshot;
use tokio_util::sync::CancellationToken;

use super::pages::{BadPage, PageCheck};
use super::walk::{Found, FoundFile, Source, walk};
use crate::engine::control::{self, CONTROL};
use crate::engine::copy_error::CopyError;
use crate::operation::Reporter;

/// Bytes of a file that one thread takes at a time.
const CHUNK: u64 = 16 << 20;
/// Bytes read by one system call; a whole number of pages.
const BUFFER: usize = 1 << 20;
/// Added to the nice value of the threads of a gentle copy.
const NICE: i32 = 10;
/// Names that wait for a thread.
const QUEUE: usize = 64;
/// Bad pages that are named; more are only counted.
const NAMED_PAGES: usize = 1000;

/// What to copy, and where to.
#[derive(Debug)]
pub struct CopyJob {
    /// The data directory.
    pub source: Source,
    /// Configuration from outside it.
    pub attachments: Vec<Attachment>,
    /// Whether pages carry checksums.
    pub data_checksums: bool,
    /// Blocks in a segment of a relation.
    pub segment_blocks: u32,
    /// The index.
    pub index: Arc<IndexBuilder>,
    /// For warnings.
    pub report: Reporter,
    /// Whether its threads come after others' that want the same core.
    pub gentle: bool,
    /// Ends the copy; also fired by the first thread that fails, so it must be the copy's own.
    pub cancel: CancellationToken,
}

/// What was copied.
#[derive(Debug, Default)]
pub struct Copied {
    /// Files.
    pub files: u64,
    /// Bytes read.
    pub plain_bytes: u64,
    /// Pages whose checksum stayed wrong, the first thousand.
    pub bad_pages: Vec<BadPage>,
    /// How many more there were.
    pub more_bad_pages: u64,
    /// Links out of the data directory that were followed, and where they led.
    pub links: BTreeMap<String, String>,
    /// The control file as it was copied, after everything else.
    pub control: Option<ControlFile>,
}

impl Copied {
    fn merge(&mut self, other: Self) {
        self.files += other.files;
        self.plain_bytes += other.plain_bytes;
        self.more_bad_pages += other.more_bad_pages;
        for page in other.bad_pages {
            self.bad_page(page);
        }
    }

    fn bad_page(&mut self, page: BadPage) {
        if self.bad_pages.len() < NAMED_PAGES {
            self.bad_pages.push(page);
        } else {
            self.more_bad_pages += 1;
        }
    }
}

/// Starts the copy: a thread that walks and one for each lane. The answer comes when all of them have ended.
/// Nothing comes if the walking thread panicked.
///
/// # Errors
/// If the thread cannot be started.
pub fn start(
    job: CopyJob,
    lanes: Vec<Lane>,
) -> io::Result<oneshot::Receiver<Result<Copied, CopyError>>> {
    let (answer, answered) = oneshot::channel();
    thread::Builder::new()
        .name("gs-walk".into())
        .spawn(move || {
            if job.gentle {
                give_way();
            }
            let result = copy(&job, lanes);
            // Nobody waits any more if the operation was dropped.
            let _ = answer.send(result);
        })?;
    Ok(answered)
}

/// Whoever else works on this machine comes first, the database above all. That is said for this thread (on Linux a nice value is a
/// thread's), and those it starts have it from this one; the threads that answer the client while the cluster is locked keep theirs.
fn give_way() {
    if let Err(error) = rustix::process::nice(NICE) {
        tracing::warn!("the copy does not give way to the database: {error}");
    }
}

/// Sums up the sizes of what a walk finds: what there is to do, as far as it can be known before.
///
/// # Errors
/// As [`walk`]; [`CopyError::Cancelled`].
pub fn measure(source: &Source, cancel: &CancellationToken) -> Result<u64, CopyError> {
    let mut bytes = 0;
    walk(source, &mut |found| {
        if let Found::File(file) = found {
            bytes += file.size;
        }
        if cancel.is_cancelled() {
            return Err(CopyError::Cancelled);
        }
        Ok(())
    })?;
    Ok(bytes)
}

#[derive(Debug)]
enum Task {
    Whole(FoundFile),
    Chunk(Arc<BigFile>, u64),
}

/// A file that several threads copy.
#[derive(Debug)]
struct BigFile {
    path: String,
    file: File,
    check: Option<PageCheck>,
    id: FileId,
    /// Bytes when it was opened.
    size: u64,
    /// Chunks that are not done.
    left: AtomicU64,
    /// End of what was copied.
    end: AtomicU64,
}

fn copy(job: &CopyJob, lanes: Vec<Lane>) -> Result<Copied, CopyError> {
    let (tasks, queue) = bounded(QUEUE);
    let mut copied = Copied::default();
    let mut packers = Vec::new();
    let mut failures = Vec::new();
    thread::scope(|scope| {
        let mut threads = Vec::new();
        for (number, lane) in lanes.into_iter().enumerate() {
            let queue = queue.clone();
            let name = format!("gs-copy-{number}");
            let packer = FilePacker::new(lane, Arc::clone(&job.index));
            let started =
                thread::Builder::new()
                    .name(name.clone())
                    .spawn_scoped(scope, move || {
                        let _stop = StopOthers(job.cancel.clone());
                        Worker::new(job, packer).run(&queue)
                    });
            match started {
                Ok(thread) => threads.push((name, thread)),
                Err(source) => {
                    failures.push(CopyError::Thread { name, source });
                    job.cancel.cancel();
                }
            }
        }
        drop(queue);
        let fed = feed(job, &tasks, &mut copied);
        // The threads end when the queue is empty and closed.
        drop(tasks);
        if let Err(error) = fed {
            failures.push(error);
            job.cancel.cancel();
        }
        for (name, thread) in threads {
            match thread.join() {
                Ok(Ok((packer, part))) => {
                    copied.merge(part);
                    packers.push(packer);
                }
                Ok(Err(error)) => failures.push(error),
                Err(_) => failures.push(CopyError::Panicked(name)),
            }
        }
    });
    // The first failure cancels the rest: theirs say only that.
    failures.sort_by_key(CopyError::is_cancelled);
    if let Some(error) = failures.into_iter().next() {
        return Err(error);
    }
    copy_control(job, &mut packers, &mut copied)?;
    for packer in packers {
        packer.finish()?;
    }
    Ok(copied)
}

/// Cancels the others if its thread panics: they, and the walk, would go on for nothing.
struct StopOthers(CancellationToken);

impl Drop for StopOthers {
    fn drop(&mut self) {
        if thread::panicking() {
            self.0.cancel();
        }
    }
}

fn feed(job: &CopyJob, tasks: &Sender<Task>, copied: &mut Copied) -> Result<(), CopyError> {
    // A failed send means that all threads have ended, and one of them knows why.
    let send = |task| tasks.send(task).map_err(|_| CopyError::Cancelled);
    walk(&job.source, &mut |found| {
        if job.cancel.is_cancelled() {
            return Err(CopyError::Cancelled);
        }
        match found {
            Found::Directory { path, mode, mtime } => {
                job.index.add(IndexEntry {
                    path,
                    mode,
                    mtime: Some(mtime),
                    kind: EntryKind::Directory,
                })?;
            }
            Found::Link {
                path,
                target,
                mtime,
            } => {
                job.index.add(IndexEntry {
                    path,
                    mode: 0o777,
                    mtime: Some(mtime),
                    kind: EntryKind::Symlink { target },
                })?;
            }
            Found::Outside { path, target } => {
                let what = format!(
                    "`{path}` is a link to `{target}`; the backup has what it leads to in its place"
                );
                job.report.warning(what);
                copied.links.insert(path, target);
            }
            Found::LeftOut(what) => job.report.warning(format!("left out: {what}")),
            Found::File(file) if file.size > CHUNK => big_file(job, file, &send)?,
            Found::File(file) => send(Task::Whole(file))?,
        }
        Ok(())
    })?;
    feed_attachments(job, &send)
}

fn big_file(
    job: &CopyJob,
    found: FoundFile,
    send: &dyn Fn(Task) -> Result<(), CopyError>,
) -> Result<(), CopyError> {
    let Some((file, size)) = open(&found.source)? else {
        return Ok(());
    };
    if size <= CHUNK {
        return send(Task::Whole(found));
    }
    let chunks = size.div_ceil(CHUNK);
    let big = Arc::new(BigFile {
        check: job.check(&found),
        file,
        id: job.index.file(&found.path, found.mode, Some(found.mtime))?,
        path: found.path,
        size,
        left: AtomicU64::new(chunks),
        end: AtomicU64::new(0),
    });
    for chunk in 0..chunks {
        send(Task::Chunk(Arc::clone(&big), chunk * CHUNK))?;
    }
    Ok(())
}

/// Attachments with the directories above them, which a reader of the index expects.
fn feed_attachments(
    job: &CopyJob,
    send: &dyn Fn(Task) -> Result<(), CopyError>,
) -> Result<(), CopyError> {
    let mut directories = std::collections::BTreeSet::new();
    for attachment in &job.attachments {
        let source = Path::new(&attachment.source);
        let metadata = source.metadata().map_err(|e| CopyError::read(source, e))?;
        for (end, _) in attachment.path.match_indices('/') {
            directories.insert(&attachment.path[..end]);
        }
        send(Task::Whole(FoundFile {
            path: attachment.path.clone(),
            source: source.to_owned(),
            size: metadata.len(),
            mode: metadata.permissions().mode() & 0o7777,
            mtime: metadata.mtime(),
            segment: None,
        }))?;
    }
    for directory in directories {
        job.index.add(IndexEntry {
            path: directory.to_owned(),
            mode: 0o700,
            mtime: None,
            kind: EntryKind::Directory,
        })?;
    }
    Ok(())
}

/// The control file comes last: what it says must not be older than any page of the copy.
fn copy_control(
    job: &CopyJob,
    packers: &mut [FilePacker],
    copied: &mut Copied,
) -> Result<(), CopyError> {
    let path = job.source.pgdata.join(CONTROL);
    let metadata = path.metadata().map_err(|e| CopyError::read(&path, e))?;
    let control = control::read(&job.source.pgdata)?;
    let packer = packers
        .first_mut()
        .ok_or_else(|| CopyError::Panicked("gs-copy".into()))?;
    let mode = metadata.permissions().mode() & 0o7777;
    let id = job.index.file(CONTROL, mode, Some(metadata.mtime()))?;
    packer.chunk(id, 0, &control.bytes)?;
    job.index.close_file(id, control.bytes.len() as u64);
    packer.meter().add_files(1);
    copied.files += 1;
    copied.plain_bytes += control.bytes.len() as u64;
    copied.control = Some(control.parsed);
    Ok(())
}

impl CopyJob {
    fn check(&self, found: &FoundFile) -> Option<PageCheck> {
        let segment = found.segment.filter(|_| self.data_checksums)?;
        Some(PageCheck {
            first_block: segment.wrapping_mul(self.segment_blocks),
        })
    }
}

/// Opens a file and says how long it is now; `None` if it is gone.
fn open(path: &Path) -> Result<Option<(File, u64)>, CopyError> {
    let file = match File::open(path) {
        Ok(file) => file,
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(e) => return Err(CopyError::read(path, e)),
    };
    let size = file.metadata().map_err(|e| CopyError::read(path, e))?.len();
    // Only a hint to the kernel; it may say no.
    let _ = rustix::fs::fadvise(&file, 0, None, rustix::fs::Advice::Sequential);
    Ok(Some((file, size)))
}

struct Worker<'a> {
    job: &'a CopyJob,
    packer: FilePacker,
    buffer: Vec<u8>,
    copied: Copied,
}

impl<'a> Worker<'a> {
    fn new(job: &'a CopyJob, packer: FilePacker) -> Self {
        Self {
            job,
            packer,
            buffer: vec![0; BUFFER],
            copied: Copied::default(),
        }
    }

    fn run(mut self, queue: &Receiver<Task>) -> Result<(FilePacker, Copied), CopyError> {
        for task in queue {
            if self.job.cancel.is_cancelled() {
                return Err(CopyError::Cancelled);
            }
            let done = match task {
                Task::Whole(found) => self.whole(&found),
                Task::Chunk(big, offset) => self.chunk(&big, offset),
            };
            if let Err(error) = done {
                self.job.cancel.cancel();
                return Err(error);
            }
        }
        Ok((self.packer, self.copied))
    }

    fn count_file(&mut self) {
        self.copied.files += 1;
        self.packer.meter().add_files(1);
    }

    fn whole(&mut self, found: &FoundFile) -> Result<(), CopyError> {
        let Some((file, size)) = open(&found.source)? else {
            return Ok(());
        };
        let index = &self.job.index;
        let id = index.file(&found.path, found.mode, Some(found.mtime))?;
        let check = self.job.check(found);
        let end = self.range(id, &found.path, &file, check, 0..size)?;
        self.job.index.close_file(id, end);
        self.count_file();
        Ok(())
    }

    fn chunk(&mut self, big: &BigFile, offset: u64) -> Result<(), CopyError> {
        let planned = big.size.min(offset + CHUNK);
        let mut end = self.range(big.id, &big.path, &big.file, big.check, offset..planned)?;
        if end < planned && planned < big.size {
            // Truncated meanwhile. The index has no holes, and other threads may still find bytes behind: zeros
            // take their place, as in a base backup by the server, and replay truncates again.
            self.zeros(big.id, end..planned)?;
            end = planned;
        }
        if end > offset {
            big.end.fetch_max(end, Ordering::AcqRel);
        }
        if big.left.fetch_sub(1, Ordering::AcqRel) == 1 {
            let index = &self.job.index;
            index.close_file(big.id, big.end.load(Ordering::Acquire));
            self.count_file();
        }
        Ok(())
    }

    /// Copies a range of a file as far as there are bytes; returns where they ended.
    fn range(
        &mut self,
        id: FileId,
        path: &str,
        file: &File,
        check: Option<PageCheck>,
        range: std::ops::Range<u64>,
    ) -> Result<u64, CopyError> {
        let mut at = range.start;
        while at < range.end {
            if self.job.cancel.is_cancelled() {
                return Err(CopyError::Cancelled);
            }
            let want = usize::try_from(range.end - at).map_or(BUFFER, |left| left.min(BUFFER));
            let got = read_full(file, &mut self.buffer[..want], at)
                .map_err(|e| CopyError::read(Path::new(path), e))?;
            let bytes = &mut self.buffer[..got];
            if let Some(check) = check {
                let bad = check
                    .verify(path, file, at, bytes, &self.job.cancel)
                    .map_err(|e| CopyError::read(Path::new(path), e))?;
                for page in bad {
                    self.copied.bad_page(page);
                }
            }
            if got > 0 {
                self.packer.chunk(id, at, bytes)?;
            }
            at += got as u64;
            self.copied.plain_bytes += got as u64;
            if got < want {
                break;
            }
        }
        Ok(at)
    }

    fn zeros(&mut self, id: FileId, range: std::ops::Range<u64>) -> Result<(), CopyError> {
        self.buffer.fill(0);
        let mut at = range.start;
        while at < range.end {
            let want = usize::try_from(range.end - at).map_or(BUFFER, |left| left.min(BUFFER));
            self.packer.chunk(id, at, &self.buffer[..want])?;
            at += want as u64;
        }
        Ok(())
    }
}

const _: () = assert!(BUFFER.is_multiple_of(BLOCK_SIZE) && CHUNK.is_multiple_of(BUFFER as u64));

/// Reads until `buffer` is full or the file ends.
fn read_full(file: &File, buffer: &mut [u8], offset: u64) -> io::Result<usize> {
    let mut got = 0;
    while got < buffer.len() {
        match file.read_at(&mut buffer[got..], offset + got as u64) {
            Ok(0) => break,
            Ok(more) => got += more,
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            Err(e) => return Err(e),
        }
    }
    Ok(got)
}
