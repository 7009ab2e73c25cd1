//! The copying threads: each takes the next file of one list, smallest first.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use super::content::Entry;
use super::copy::{self, Rules};
use super::faults::Faults;
use super::header_map::HeaderMap;
use super::log::Log;
use super::walk::Source;
use super::{Failure, Kind};

/// Path of pg_control in a data directory.
pub(super) const PG_CONTROL: &str = "global/pg_control";
/// How often backup_content.control is rewritten during a copy.
const REWRITE: Duration = Duration::from_mins(1);

/// What is copied, from where, how.
pub(super) struct Transfer<'a> {
    pub(super) kind: Kind,
    pub(super) log: Log,
    pub(super) faults: &'a Faults,
    /// The backup's directory.
    pub(super) backup: &'a Path,
    /// In the order of the copy.
    pub(super) sources: &'a [Source],
    /// The parent's list, if there is a parent.
    pub(super) parent: Option<HashMap<(String, u32), Entry>>,
    pub(super) rules: Rules,
    pub(super) threads: usize,
    /// gs_probackup 6.0.2 prints its progress to standard output.
    pub(super) progress: bool,
}

/// Where a file of a backup lies in it.
pub(super) fn place(backup: &Path, entry: &Entry) -> PathBuf {
    let root = match entry.external {
        0 => backup.join("database"),
        number => backup
            .join("external_directories")
            .join(format!("externaldir{number}")),
    };
    root.join(&entry.path)
}

/// What the threads share. An entry is `None` while its file is not copied, and for ever if it has gone.
struct Shared {
    next: AtomicUsize,
    done: AtomicUsize,
    /// A thread failed: the others stop before their next file.
    failed: AtomicBool,
    entries: Mutex<Vec<Option<Entry>>>,
    headers: Mutex<HeaderMap>,
}

impl Transfer<'_> {
    /// Copies all; `rewrite` is called about once a minute with what is copied so far. Returns the entries of the
    /// files that were there, in the order of the sources, and the header map, still open.
    pub(super) fn run(
        &self,
        rewrite: &mut dyn FnMut(&[Entry]) -> Result<(), Failure>,
    ) -> Result<(Vec<Entry>, HeaderMap), Failure> {
        let shared = Shared {
            next: AtomicUsize::new(0),
            done: AtomicUsize::new(0),
            failed: AtomicBool::new(false),
            entries: Mutex::new(vec![None; self.sources.len()]),
            headers: Mutex::new(HeaderMap::new(
                self.kind,
                self.backup.join("page_header_map"),
            )),
        };
        let mut result = Ok(());
        std::thread::scope(|scope| {
            let workers: Vec<_> = (0..self.threads.max(1))
                .map(|_| scope.spawn(|| self.work(&shared)))
                .collect();
            let mut written = Instant::now();
            while workers.iter().any(|worker| !worker.is_finished()) {
                std::thread::park_timeout(Duration::from_millis(20));
                if self.progress {
                    self.show(shared.done.load(Ordering::Relaxed));
                }
                if self.kind == Kind::Pg && written.elapsed() > REWRITE {
                    let entries = self.so_far(&shared);
                    if let Err(e) = rewrite(&entries) {
                        shared.failed.store(true, Ordering::Relaxed);
                        result = Err(e);
                    }
                    written = Instant::now();
                }
            }
            for worker in workers {
                let ended = worker
                    .join()
                    .unwrap_or_else(|_| Err(Failure::new("a thread panicked")));
                if let Err(e) = ended
                    && result.is_ok()
                {
                    result = Err(e);
                }
            }
        });
        result?;
        let entries = shared.entries.into_inner().unwrap_or_default();
        let headers = shared.headers.into_inner();
        let headers = headers.map_err(|_| Failure::new("a thread panicked"))?;
        Ok((entries.into_iter().flatten().collect(), headers))
    }

    /// The list as it stands: what is not copied yet is in it with size 0.
    fn so_far(&self, shared: &Shared) -> Vec<Entry> {
        let entries = shared.entries.lock().expect("no panic under it");
        let both = self.sources.iter().zip(entries.iter());
        both.map(|(source, entry)| entry.clone().unwrap_or_else(|| source.entry.clone()))
            .collect()
    }

    fn show(&self, done: usize) {
        use std::io::Write as _;
        let percent = done * 100 / self.sources.len().max(1);
        let bar = "=".repeat(percent / 2);
        let text = format!(
            "Progress: [{bar:50}] {percent}% ({done}/{}, done_files/total_files). backup file \r",
            self.sources.len()
        );
        let _ = std::io::stdout().write_all(text.as_bytes());
        let _ = std::io::stdout().flush();
    }

    fn work(&self, shared: &Shared) -> Result<(), Failure> {
        let result = self.take_files(shared);
        if result.is_err() {
            shared.failed.store(true, Ordering::Relaxed);
        }
        result
    }

    fn take_files(&self, shared: &Shared) -> Result<(), Failure> {
        while !shared.failed.load(Ordering::Relaxed) {
            let at = shared.next.fetch_add(1, Ordering::Relaxed);
            let Some(source) = self.sources.get(at) else {
                break;
            };
            let entry = if source.entry.is_directory() {
                Some(source.entry.clone())
            } else {
                self.faults.before_file()?;
                self.file(source, shared)?
            };
            shared.entries.lock().expect("no panic under it")[at] = entry;
            if !source.entry.is_directory() {
                self.count(shared)?;
            }
        }
        Ok(())
    }

    /// Two steps of the faults: after the first file, and in the middle.
    fn count(&self, shared: &Shared) -> Result<(), Failure> {
        let done = shared.done.fetch_add(1, Ordering::Relaxed) + 1;
        if done == 1 {
            self.faults.reach("copying", self.log)?;
        }
        let files = self
            .sources
            .iter()
            .filter(|source| !source.entry.is_directory());
        if done == files.count() / 2 {
            self.faults.reach("half", self.log)?;
        }
        Ok(())
    }

    fn file(&self, source: &Source, shared: &Shared) -> Result<Option<Entry>, Failure> {
        let is_control = source.entry.path == PG_CONTROL && source.entry.external == 0;
        let to = place(self.backup, &source.entry);
        let forget = self.faults.forgets(&source.entry.path);
        if is_control {
            // pg_probackup copies it last, by itself.
            return match self.kind {
                Kind::Pg => Ok(None),
                Kind::Gs => copy::pg_control(source, &to, forget).map(Some),
            };
        }
        let rules = Rules {
            forget,
            ..self.rules
        };
        let key = (source.entry.path.clone(), source.entry.external);
        let parent = self.parent.as_ref().and_then(|parent| parent.get(&key));
        if !source.entry.is_data {
            return copy::other_file(source, parent, &to, rules);
        }
        let Some((mut entry, pages)) = copy::data_file(source, parent, &to, rules)? else {
            return Ok(None);
        };
        if !pages.is_empty() {
            let mut headers = shared.headers.lock().expect("no panic under it");
            let length = u64::try_from(entry.size).unwrap_or(0);
            entry.headers = Some(headers.add(&pages, length, self.log)?);
        }
        Ok(Some(entry))
    }
}
