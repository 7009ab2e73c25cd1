//! What the program leaves that is its own, taken away; and all the rest, on disk.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Write as _};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;

use catalog::model::NodeBackup;
use tokio_util::sync::CancellationToken;

use super::AUTO_CONF;
use super::listed::Original;
use crate::restore::files::{remove_file, remove_tree};
use crate::restore::journal::Places;
use crate::restore::recoverer::Recoverer;
use crate::restore::tablespaces;

/// What either program may write for a recovery of its own making, or for its own use.
const ITS_OWN: [&str; 8] = [
    "recovery.conf",
    "recovery.done",
    "recovery.signal",
    "standby.signal",
    "probackup_recovery.conf",
    "postgresql.auto.conf.tmp",
    "database_map",
    "tablespace_map",
];

/// Threads that flush. They mostly wait, and a file system flushes several files at once for the price of one.
const FLUSHERS: usize = 8;

/// Why what the program has made cannot be used.
#[derive(Debug)]
pub(super) enum Unclean {
    Io {
        path: PathBuf,
        source: io::Error,
    },
    /// It would lead the server out of the copy.
    Link {
        path: PathBuf,
        to: PathBuf,
    },
    Cancelled,
}

fn at(path: &Path) -> impl FnOnce(io::Error) -> Unclean {
    let path = path.to_owned();
    move |source| Unclean::Io { path, source }
}

/// Takes away its WAL, its settings for recovery and its links to tablespaces: ours are made as for any other copy.
pub(super) fn remove_its_own(
    places: &Places,
    node: &NodeBackup,
    recoverer: Recoverer,
    auto_conf: &Original,
) -> Result<(), Unclean> {
    let data = &places.data;
    let wal = data.join(recoverer.wal_directory());
    remove_tree(&wal).map_err(at(&wal))?;
    for name in ITS_OWN {
        let path = data.join(name);
        remove_file(&path).map_err(at(&path))?;
    }
    for tablespace in &node.tablespaces {
        let link = data.join("pg_tblspc").join(tablespace.oid.to_string());
        let ours = tablespaces::location(&places.tablespaces, tablespace.oid);
        match fs::read_link(&link) {
            Ok(to) if to == ours => remove_file(&link).map_err(at(&link))?,
            Ok(to) => return Err(Unclean::Link { path: link, to }),
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return Err(at(&link)(error)),
        }
    }
    let path = data.join(AUTO_CONF);
    remove_file(&path).map_err(at(&path))?;
    if let Original::Bytes(bytes) = auto_conf {
        let write = || {
            let mut options = OpenOptions::new();
            let mut file = options
                .create_new(true)
                .write(true)
                .mode(0o600)
                .open(&path)?;
            file.write_all(bytes)
        };
        write().map_err(at(&path))?;
    }
    Ok(())
}

/// Flushes every file, then every directory, the deepest first. No link may lead out of the roots.
pub(super) fn flush(roots: &[PathBuf], cancel: &CancellationToken) -> Result<(), Unclean> {
    let (mut files, mut directories) = (Vec::new(), roots.to_vec());
    let mut next = 0;
    while let Some(directory) = directories.get(next).cloned() {
        next += 1;
        let entries = fs::read_dir(&directory).map_err(at(&directory))?;
        for entry in entries {
            let entry = entry.map_err(at(&directory))?;
            let (path, kind) = (entry.path(), entry.file_type().map_err(at(&directory))?);
            if kind.is_dir() {
                directories.push(path);
            } else if kind.is_symlink() {
                let to = fs::read_link(&path).map_err(at(&path))?;
                if !roots.iter().any(|root| to.starts_with(root)) {
                    return Err(Unclean::Link { path, to });
                }
            } else {
                files.push(path);
            }
        }
    }
    flush_all(&files, cancel)?;
    // Parents were found before their children.
    for directory in directories.iter().rev() {
        let synced = File::open(directory).and_then(|directory| directory.sync_all());
        synced.map_err(at(directory))?;
    }
    Ok(())
}

fn flush_all(files: &[PathBuf], cancel: &CancellationToken) -> Result<(), Unclean> {
    let next = AtomicUsize::new(0);
    let failed: Mutex<Option<Unclean>> = Mutex::new(None);
    let fail = |error| {
        // So that the others end too.
        next.store(files.len(), Ordering::Relaxed);
        if let Ok(mut failed) = failed.lock() {
            failed.get_or_insert(error);
        }
    };
    let work = || {
        while let Some(path) = files.get(next.fetch_add(1, Ordering::Relaxed)) {
            if cancel.is_cancelled() {
                return fail(Unclean::Cancelled);
            }
            let synced = File::open(path).and_then(|file| file.sync_all());
            if let Err(error) = synced {
                return fail(at(path)(error));
            }
        }
    };
    thread::scope(|scope| {
        for _ in 0..FLUSHERS.min(files.len()) {
            scope.spawn(work);
        }
    });
    match failed.into_inner() {
        Ok(Some(error)) => Err(error),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use super::*;

    #[test]
    fn links_may_not_lead_out() {
        let (root, elsewhere) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        fs::create_dir(root.path().join("a")).unwrap();
        fs::write(root.path().join("a/file"), "x").unwrap();
        let roots = [root.path().to_owned()];
        let cancel = CancellationToken::new();
        flush(&roots, &cancel).unwrap();
        symlink(root.path().join("a"), root.path().join("in")).unwrap();
        flush(&roots, &cancel).unwrap();
        let out = root.path().join("a/out");
        symlink(elsewhere.path(), &out).unwrap();
        let error = flush(&roots, &cancel).unwrap_err();
        assert!(matches!(error, Unclean::Link { path, .. } if path == out));
        fs::remove_file(root.path().join("a/out")).unwrap();
        cancel.cancel();
        assert!(matches!(flush(&roots, &cancel), Err(Unclean::Cancelled)));
    }
}
