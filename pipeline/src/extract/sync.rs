//! Directories, links and empty files; and flushing everything to disk.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, DirBuilder, File};
use std::io;
use std::os::unix::fs::DirBuilderExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::thread;

use crossbeam_channel::{Receiver, Sender};

use super::PanicGuard;
use super::files::{create, set_attributes};
use crate::error::{Fault, PipelineError};
use crate::threads::{self, Worker};

/// Threads that flush. They mostly wait, and a file system flushes several files at once for the price of
/// one.
const SYNCERS: usize = 8;

/// Files that may wait to be flushed, each an open descriptor.
const WAITING: usize = 32;

type ToSync = (Arc<File>, PathBuf);

/// The way to the threads that flush files.
pub(super) struct Syncing {
    queue: Sender<ToSync>,
}

impl Syncing {
    /// Flushes a finished file soon. Waits if many wait already.
    pub(super) fn file(&self, file: Arc<File>, path: PathBuf) -> Result<(), PipelineError> {
        // Closed only if all of those threads stopped, and they have said why.
        let sent = self.queue.send((file, path));
        sent.map_err(|_| PipelineError::Cancelled)
    }
}

/// Starts the threads that flush; they end when [`Syncing`] is dropped and their queue is empty.
pub(super) fn start(fault: &Fault) -> Result<(Syncing, Vec<Worker<()>>), PipelineError> {
    let (queue, waiting) = crossbeam_channel::bounded(WAITING);
    let start = |number: usize| {
        let (waiting, fault) = (waiting.clone(), fault.clone());
        let name = format!("sync-{number}");
        let guard = PanicGuard(fault.clone(), name.clone());
        threads::spawn(&name, move || {
            let _guard = guard;
            flush(&waiting, &fault);
        })
    };
    let workers = (0..SYNCERS).map(start).collect::<Result<_, _>>()?;
    Ok((Syncing { queue }, workers))
}

fn flush(waiting: &Receiver<ToSync>, fault: &Fault) {
    // To the end even after an error, so that nobody waits for room in the queue.
    for (file, path) in waiting {
        if fault.token().is_cancelled() {
            continue;
        }
        if let Err(error) = file.sync_all() {
            fault.fail(PipelineError::sink(path, "fsync", error));
        }
    }
}

#[derive(Debug, Clone, Copy)]
struct Attributes {
    mode: u32,
    mtime: Option<i64>,
}

/// What is made besides files with bytes in them.
#[derive(Debug, Default)]
pub(super) struct Tree {
    directories: BTreeMap<PathBuf, Attributes>,
    links: BTreeMap<PathBuf, String>,
    empty: BTreeMap<PathBuf, Attributes>,
    /// Directories in which something is made.
    parents: BTreeSet<PathBuf>,
}

impl Tree {
    pub(super) fn directory(&mut self, path: PathBuf, mode: u32, mtime: Option<i64>) {
        self.parent_of(&path);
        self.directories.insert(path, Attributes { mode, mtime });
    }

    pub(super) fn link(&mut self, path: PathBuf, to: String) {
        self.parent_of(&path);
        self.links.insert(path, to);
    }

    pub(super) fn empty_file(&mut self, path: PathBuf, mode: u32, mtime: Option<i64>) {
        self.empty.insert(path, Attributes { mode, mtime });
    }

    pub(super) fn parent_of(&mut self, path: &Path) {
        if let Some(parent) = path.parent()
            && !self.parents.contains(parent)
        {
            self.parents.insert(parent.to_owned());
        }
    }

    pub(super) fn empty_files(&self) -> u64 {
        self.empty.len() as u64
    }

    pub(super) fn links(&self) -> impl Iterator<Item = &Path> {
        self.links.keys().map(PathBuf::as_path)
    }

    pub(super) fn paths(&self) -> impl Iterator<Item = &Path> {
        let named = self.directories.keys().chain(self.links.keys());
        named.chain(self.empty.keys()).map(PathBuf::as_path)
    }

    /// Makes it all, directories with mode 0700 for now so that they can be filled.
    pub(super) fn make(&self) -> Result<(), PipelineError> {
        for path in self.parents.iter().chain(self.directories.keys()) {
            make_directory(path)?;
        }
        for (path, to) in &self.links {
            let made = std::os::unix::fs::symlink(to, path);
            made.map_err(|error| PipelineError::sink(path, "make link", error))?;
        }
        Ok(())
    }

    /// Makes the empty files, gives directories their modes and flushes, deepest first.
    pub(super) fn finish(&self, times: bool) -> Result<(), PipelineError> {
        let paths: Vec<_> = self.empty.iter().collect();
        in_parallel(&paths, |(path, attributes)| {
            let make = || {
                let file = create(path)?;
                set_attributes(&file, attributes.mode, attributes.mtime.filter(|_| times))?;
                file.sync_all()
            };
            make().map_err(|error| PipelineError::sink(*path, "make empty file", error))
        })?;
        let mut levels: BTreeMap<usize, Vec<&Path>> = BTreeMap::new();
        let made: BTreeSet<&Path> = self
            .directories
            .keys()
            .chain(&self.parents)
            .map(PathBuf::as_path)
            .collect();
        for path in made {
            levels
                .entry(path.components().count())
                .or_default()
                .push(path);
        }
        for paths in levels.values().rev() {
            in_parallel(paths, |path| {
                let attributes = self.directories.get(*path);
                let finish = || {
                    let directory = File::open(path)?;
                    if let Some(Attributes { mode, mtime }) = attributes {
                        set_attributes(&directory, *mode, mtime.filter(|_| times))?;
                    }
                    directory.sync_all()
                };
                finish().map_err(|error| PipelineError::sink(*path, "fsync directory", error))
            })?;
        }
        Ok(())
    }
}

/// Makes a directory and those above it; one that exists is fine, a link to one is not.
fn make_directory(path: &Path) -> Result<(), PipelineError> {
    let made = DirBuilder::new().recursive(true).mode(0o700).create(path);
    let checked = made.and_then(|()| fs::symlink_metadata(path));
    match checked {
        Ok(found) if found.is_dir() => Ok(()),
        Ok(_) => {
            let error = io::Error::from(io::ErrorKind::NotADirectory);
            Err(PipelineError::sink(path, "make directory", error))
        }
        Err(error) => Err(PipelineError::sink(path, "make directory", error)),
    }
}

/// Runs `work` for each item on a few threads; the first error in the order of the threads.
fn in_parallel<T: Sync>(
    items: &[T],
    work: impl Fn(&T) -> Result<(), PipelineError> + Sync,
) -> Result<(), PipelineError> {
    let share = items.len().div_ceil(SYNCERS).max(1);
    let run = |share: &[T]| share.iter().try_for_each(&work);
    let run = &run;
    thread::scope(|scope| {
        let threads: Vec<_> = items
            .chunks(share)
            .map(|share| {
                let named = thread::Builder::new().name("sync-parallel".into());
                named.spawn_scoped(scope, move || run(share))
            })
            .collect();
        for started in threads {
            let started = started.map_err(|error| {
                PipelineError::Setup(format!("thread `sync-parallel`: {error}"))
            })?;
            let thread = "sync-parallel".into();
            started
                .join()
                .map_err(|_| PipelineError::Panicked { thread })??;
        }
        Ok(())
    })
}
