//! A copy of manifests and points on the local disk, so that they can be looked at without the bucket.
//!
//! It is a convenience: no decision rests on it, it may be deleted at any time, and a file of it that is
//! not exactly what the bucket has is written again. Files are the stored bytes as they are, so that a
//! newer program's fields survive.
//!
//! Beside that it keeps the log and every object that the log names, each as it was when it was first seen: from
//! there [`crate::verify`] puts back what the bucket has lost.

mod ledger;

use std::collections::{BTreeMap, HashSet};
use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::{self, Read as _, Write as _};
use std::os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};

use bytes::Bytes;
use futures_util::StreamExt as _;
use pipeline::store::Key;
use serde::de::DeserializeOwned;
use uuid::Uuid;

use crate::check;
use crate::envelope::{self, MANIFEST_LIMIT, OBJECT_LIMIT};
use crate::error::CatalogError;
use crate::ids::{BackupId, PointId};
use crate::keys;
use crate::model::{Manifest, Point};
use crate::repo::Catalog;

/// Begins the names of files that are being written.
const TEMPORARY: &str = ".tmp-";
/// How often a file is written again that somebody took for a dead process's before it was locked.
const TRIES: u32 = 3;
/// Objects fetched at the same time.
const PARALLEL: usize = 8;

/// The mirror of one repository.
#[derive(Debug, Clone)]
pub struct Mirror {
    directory: PathBuf,
}

/// What a [`Mirror::sync`] did.
#[derive(Debug, Default)]
pub struct MirrorReport {
    /// Files written.
    pub written: usize,
    /// Files that were right already.
    pub kept: usize,
    /// Files removed because the bucket no longer has their object.
    pub removed: usize,
    /// Objects of the bucket that are not mirrored because they cannot be used.
    pub unusable: Vec<CatalogError>,
}

/// One object to be mirrored.
struct Wanted {
    key: Key,
    size: u64,
    limit: usize,
}

impl Mirror {
    /// The mirror of `repository` below `home` (`~/.gs_pitr`). Nothing is read or made yet.
    #[must_use]
    pub fn new(home: &Path, repository: Uuid) -> Self {
        Self {
            directory: home.join("repositories").join(repository.to_string()),
        }
    }

    /// Where it is.
    #[must_use]
    pub fn directory(&self) -> &Path {
        &self.directory
    }

    /// Makes the mirror what the bucket has. Directories are made with mode 0700, files with 0600 and
    /// replaced as a whole.
    ///
    /// # Errors
    /// [`CatalogError::Store`]; [`CatalogError::Mirror`]. What was done until then is right.
    pub async fn sync(&self, catalog: &Catalog) -> Result<MirrorReport, CatalogError> {
        let mut report = MirrorReport::default();
        let backups = wanted_backups(catalog).await?;
        self.sync_folder(catalog, "backups", backups, &mut report)
            .await?;
        let points = wanted_points(catalog).await?;
        self.sync_folder(catalog, "points", points, &mut report)
            .await?;
        self.sync_ledger(catalog).await?;
        Ok(report)
    }

    async fn sync_folder(
        &self,
        catalog: &Catalog,
        folder: &'static str,
        wanted: BTreeMap<String, Wanted>,
        report: &mut MirrorReport,
    ) -> Result<(), CatalogError> {
        let directory = self.directory.join(folder);
        let names: HashSet<String> = wanted.keys().cloned().collect();
        let (place, keep) = (directory.clone(), names.clone());
        report.removed += on_disk(move || prepare(&place, &keep)).await?;

        let mut fetched = futures_util::stream::iter(wanted)
            .map(|(name, object)| {
                let path = directory.join(&name);
                async move { (name, Self::sync_file(catalog, path, object).await) }
            })
            .buffer_unordered(PARALLEL);
        while let Some((name, result)) = fetched.next().await {
            match result {
                Ok(true) => report.written += 1,
                Ok(false) => report.kept += 1,
                Err(error) if error.is_of_object() => {
                    report.unusable.push(error);
                    let path = directory.join(&name);
                    report.removed += usize::from(on_disk(move || remove(&path)).await?);
                }
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    /// Whether the file had to be written.
    async fn sync_file(
        catalog: &Catalog,
        path: PathBuf,
        object: Wanted,
    ) -> Result<bool, CatalogError> {
        let Wanted { key, size, limit } = object;
        let (local, its_key) = (path.clone(), key.clone());
        let right = on_disk(move || {
            // Objects are written once: the right size and a right hash inside make it the same.
            let stored = read(&local, limit).ok();
            let stored = stored.filter(|stored| stored.len() as u64 == size);
            Ok(stored.is_some_and(|stored| envelope::verify(&its_key, &stored).is_ok()))
        });
        if right.await? {
            return Ok(false);
        }
        let stored = catalog.fetch(&key, limit).await?;
        envelope::verify(&key, &stored)?;
        on_disk(move || write(&path, &stored)).await?;
        Ok(true)
    }

    /// The mirrored manifests, by id and so by time; files that are not right are left out. Fences
    /// are among them: look at their state.
    ///
    /// # Errors
    /// [`CatalogError::Mirror`] if the directory cannot be read; a missing one is an empty mirror.
    pub async fn backups(&self) -> Result<Vec<Manifest>, CatalogError> {
        self.read_all("backups", MANIFEST_LIMIT, |name, manifest: &Manifest| {
            let id = name.parse::<BackupId>();
            id.is_ok_and(|id| check::manifest(manifest, &id).is_ok())
        })
        .await
    }

    /// The mirrored points, as [`Mirror::backups`].
    ///
    /// # Errors
    /// As [`Mirror::backups`].
    pub async fn points(&self) -> Result<Vec<Point>, CatalogError> {
        self.read_all("points", OBJECT_LIMIT, |name, point: &Point| {
            let id = name.parse::<PointId>();
            id.is_ok_and(|id| check::point(point, &id).is_ok())
        })
        .await
    }

    async fn read_all<T: DeserializeOwned + Send + 'static>(
        &self,
        folder: &'static str,
        limit: usize,
        right: fn(&str, &T) -> bool,
    ) -> Result<Vec<T>, CatalogError> {
        let directory = self.directory.join(folder);
        on_disk(move || {
            let mut all = Vec::new();
            for name in names(&directory)? {
                let path = directory.join(&name);
                let Some(id) = name.strip_suffix(".json") else {
                    continue;
                };
                let (Ok(stored), Ok(key)) = (read(&path, limit), Key::new(name.as_str())) else {
                    continue;
                };
                match envelope::open::<T>(&key, &stored) {
                    Ok(body) if right(id, &body) => all.push(body),
                    _ => tracing::debug!(path = %path.display(), "mirror file is ignored"),
                }
            }
            Ok(all)
        })
        .await
    }
}

/// Manifests, by file name; those of deleted backups are not wanted.
async fn wanted_backups(catalog: &Catalog) -> Result<BTreeMap<String, Wanted>, CatalogError> {
    let (mut wanted, mut deleted) = (BTreeMap::new(), Vec::new());
    for object in catalog.list(keys::BACKUPS).await? {
        let rest = object.key.as_str().strip_prefix(keys::BACKUPS);
        let parts = rest.and_then(|rest| rest.split_once('/'));
        let Some((Ok(id), file)) = parts.map(|(id, file)| (id.parse::<BackupId>(), file)) else {
            continue;
        };
        let name = format!("{id}.json");
        match file {
            "deleted.json" => deleted.push(name),
            "manifest.json" => {
                let object = Wanted {
                    size: object.size,
                    limit: MANIFEST_LIMIT,
                    key: object.key,
                };
                wanted.insert(name, object);
            }
            _ => {}
        }
    }
    for name in deleted {
        wanted.remove(&name);
    }
    Ok(wanted)
}

/// Points, by file name.
async fn wanted_points(catalog: &Catalog) -> Result<BTreeMap<String, Wanted>, CatalogError> {
    let listed = catalog.list(keys::POINTS).await?;
    let wanted = listed.into_iter().filter_map(|object| {
        let name = object.key.as_str().strip_prefix(keys::POINTS)?.to_owned();
        name.strip_suffix(".json")?.parse::<PointId>().ok()?;
        let object = Wanted {
            size: object.size,
            limit: OBJECT_LIMIT,
            key: object.key,
        };
        Some((name, object))
    });
    Ok(wanted.collect())
}

/// Runs file system calls where they may block.
async fn on_disk<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, CatalogError> + Send + 'static,
) -> Result<T, CatalogError> {
    match tokio::task::spawn_blocking(work).await {
        Ok(result) => result,
        Err(error) => Err(failed(Path::new(""))(io::Error::other(error))),
    }
}

fn failed(path: &Path) -> impl Fn(io::Error) -> CatalogError {
    |source| CatalogError::Mirror {
        path: path.to_owned(),
        source,
    }
}

/// Makes a directory and removes from it what is not in `keep`. Returns how many files it removed.
fn prepare(directory: &Path, keep: &HashSet<String>) -> Result<usize, CatalogError> {
    let made = DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(directory);
    made.map_err(failed(directory))?;
    let mut removed = 0;
    for name in names(directory)? {
        let path = directory.join(&name);
        if name.starts_with(TEMPORARY) {
            if is_abandoned(&path) && remove(&path)? {
                tracing::info!(path = %path.display(), "removed what a killed command left in the mirror");
            }
        } else if !keep.contains(&name) {
            removed += usize::from(remove(&path)?);
        }
    }
    Ok(removed)
}

/// Whether the process that was writing it is dead: a living one has it locked.
fn is_abandoned(path: &Path) -> bool {
    File::open(path).is_ok_and(|file| file.try_lock().is_ok())
}

/// Names in a directory, sorted; none if it does not exist.
fn names(directory: &Path) -> Result<Vec<String>, CatalogError> {
    let entries = match fs::read_dir(directory) {
        Ok(entries) => entries,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(failed(directory)(error)),
    };
    let mut names = Vec::new();
    for entry in entries {
        let entry = entry.map_err(failed(directory))?;
        names.extend(entry.file_name().into_string());
    }
    names.sort();
    Ok(names)
}

/// Whether there was a file to remove.
fn remove(path: &Path) -> Result<bool, CatalogError> {
    match fs::remove_file(path) {
        Ok(()) => Ok(true),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
        Err(error) => Err(failed(path)(error)),
    }
}

/// A file's bytes, if there are at most `limit`.
fn read(path: &Path, limit: usize) -> io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    File::open(path)?
        .take(limit as u64 + 1)
        .read_to_end(&mut bytes)?;
    if bytes.len() > limit {
        return Err(io::ErrorKind::FileTooLarge.into());
    }
    Ok(bytes)
}

/// Replaces a file as a whole: killed at any moment, the old one or the new one is there.
fn write(path: &Path, bytes: &Bytes) -> Result<(), CatalogError> {
    let mut tries = 1;
    loop {
        let temporary = path.with_file_name(format!("{TEMPORARY}{}", Uuid::new_v4()));
        let written = write_locked(&temporary, bytes).and_then(|lock| {
            fs::rename(&temporary, path)?;
            drop(lock);
            Ok(())
        });
        match written {
            Ok(()) => return Ok(()),
            // Another command removed it in the moment before it was locked.
            Err(error) if error.kind() == io::ErrorKind::NotFound && tries < TRIES => tries += 1,
            Err(error) => {
                let _ = fs::remove_file(&temporary);
                return Err(failed(path)(error));
            }
        }
    }
}

/// Writes a new file, locked as long as what is returned lives.
fn write_locked(path: &Path, bytes: &[u8]) -> io::Result<File> {
    let mut options = OpenOptions::new();
    let mut file = options
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(path)?;
    file.lock()?;
    file.write_all(bytes)?;
    // Without this a crash may leave an empty file under the final name; it would be written again.
    file.sync_all()?;
    Ok(file)
}
