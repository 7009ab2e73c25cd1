//! The walk through a data directory that is in use.
//!
//! Whatever disappears while we look was dropped after the backup began: WAL replay drops it again, or never
//! misses it. Paths in what is found are relative, with `/`, as they stand in the index.

use std::collections::BTreeSet;
use std::fs::{self, Metadata};
use std::io;
use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};

use catalog::model::{Extra, Tablespace};

use super::exclude::{self, Fork, RelationFile};
use crate::engine::attachments::ATTACHMENTS;
use crate::engine::control::CONTROL;
use crate::engine::copy_error::CopyError;

/// What is walked.
#[derive(Debug, Clone)]
pub struct Source {
    /// Absolute path of the data directory.
    pub pgdata: PathBuf,
    /// Name of this version's directory in each tablespace, such as `PG_15_202209061`.
    pub version_directory: String,
    /// Tablespaces that were there when the backup began.
    pub tablespaces: TablespaceList,
    /// `stats_temp_directory` (up to PostgreSQL 14), relative to the data directory, where it is inside it.
    pub stats_temp: Option<String>,
}

/// The entries of `pg_tblspc`.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct TablespaceList {
    /// Symbolic links to somewhere else.
    pub linked: Vec<Tablespace>,
    /// Real directories (`allow_in_place_tablespaces`).
    pub in_place: Vec<u32>,
}

impl TablespaceList {
    /// Reads `pg_tblspc`.
    ///
    /// # Errors
    /// If it cannot be read, or a location is not UTF-8.
    pub fn read(pgdata: &Path) -> Result<Self, CopyError> {
        let directory = pgdata.join("pg_tblspc");
        let mut list = Self::default();
        for name in names(&directory, "pg_tblspc")? {
            let Ok(oid) = name.parse::<u32>() else {
                continue;
            };
            let path = directory.join(&name);
            let Some(metadata) = present(&path, fs::symlink_metadata(&path))? else {
                continue;
            };
            if metadata.is_dir() {
                list.in_place.push(oid);
            } else if metadata.is_symlink()
                && let Some(target) = present(&path, fs::read_link(&path))?
            {
                let location = utf8(&target)?.to_owned();
                list.linked.push(Tablespace {
                    oid,
                    location,
                    extra: Extra::new(),
                });
            }
        }
        list.linked.sort_by_key(|tablespace| tablespace.oid);
        list.in_place.sort_unstable();
        Ok(list)
    }
}

/// A regular file to copy.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FoundFile {
    /// Path in the index.
    pub path: String,
    /// Where it is.
    pub source: PathBuf,
    /// Bytes, when it was seen.
    pub size: u64,
    /// Permission bits.
    pub mode: u32,
    /// Modification time, seconds since 1970.
    pub mtime: i64,
    /// If its pages may carry checksums: which segment of its relation it is.
    pub segment: Option<u32>,
}

/// One thing that was found.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Found {
    /// A directory; comes before what is in it.
    Directory {
        /// Path in the index.
        path: String,
        /// Permission bits.
        mode: u32,
        /// Modification time, seconds since 1970.
        mtime: i64,
    },
    /// A link that stays within the data directory; its target is relative.
    Link {
        /// Path in the index.
        path: String,
        /// Where it leads.
        target: String,
        /// Modification time, seconds since 1970.
        mtime: i64,
    },
    /// A link that leads out of the data directory: what it leads to follows under the link's path.
    Outside {
        /// Path in the index.
        path: String,
        /// Where it leads.
        target: String,
    },
    /// A file.
    File(FoundFile),
    /// Something that is left out, and why the operator should know.
    LeftOut(String),
}

/// What kind of directory it is; decides which names mean something in it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Place {
    Root,
    Global,
    /// `base`, or the version's directory of a tablespace: has a directory for each database.
    Databases,
    Database,
    Tablespaces,
    Other,
}

/// Walks `source` and hands everything that is to be copied to `sink`, except [`CONTROL`].
///
/// # Errors
/// What `sink` returns; a directory that cannot be read; a name that is not UTF-8.
pub fn walk(
    source: &Source,
    sink: &mut dyn FnMut(Found) -> Result<(), CopyError>,
) -> Result<(), CopyError> {
    let root = fs::canonicalize(&source.pgdata).map_err(|e| CopyError::read(&source.pgdata, e))?;
    let mut elsewhere = BTreeSet::new();
    for tablespace in &source.tablespaces.linked {
        if let Ok(location) = fs::canonicalize(&tablespace.location) {
            elsewhere.insert(location);
        }
    }
    let mut walker = Walker {
        source,
        sink,
        elsewhere,
        trail: vec![root.clone()],
        root,
    };
    walker.directory(&source.pgdata, "", Place::Root)
}

struct Walker<'a> {
    source: &'a Source,
    sink: &'a mut dyn FnMut(Found) -> Result<(), CopyError>,
    /// The data directory without links.
    root: PathBuf,
    /// Locations of tablespaces: met inside the data directory, their content is not copied twice.
    elsewhere: BTreeSet<PathBuf>,
    /// Directories that links have led into, without links: no link is followed back into one.
    trail: Vec<PathBuf>,
}

impl Walker<'_> {
    fn directory(&mut self, at: &Path, path: &str, place: Place) -> Result<(), CopyError> {
        let names = names(at, path)?;
        let unlogged = match place {
            Place::Database => unlogged(&names),
            _ => BTreeSet::new(),
        };
        for name in &names {
            if exclude::is_skipped(name) || self.is_left_out(name, place, &unlogged) {
                continue;
            }
            let below = join(path, name);
            if place == Place::Root && name == ATTACHMENTS {
                return Err(CopyError::Refused(format!(
                    "`{}` has a name that backups use for files from outside the data directory: rename it",
                    at.join(name).display()
                )));
            }
            self.entry(&at.join(name), below, name, place)?;
        }
        Ok(())
    }

    fn is_left_out(&self, name: &str, place: Place, unlogged: &BTreeSet<String>) -> bool {
        match place {
            Place::Database => {
                exclude::is_temporary_relation(name)
                    || RelationFile::parse(name).is_some_and(|file| {
                        file.fork != Fork::Init && unlogged.contains(file.relation)
                    })
            }
            // One that appeared since the backup began: all of it is in the WAL.
            Place::Tablespaces => name
                .parse()
                .is_ok_and(|oid| !self.source.tablespaces.has(oid)),
            _ => false,
        }
    }

    fn entry(
        &mut self,
        at: &Path,
        path: String,
        name: &str,
        place: Place,
    ) -> Result<(), CopyError> {
        let Some(metadata) = present(at, fs::symlink_metadata(at))? else {
            return Ok(());
        };
        let is_tablespace = place == Place::Tablespaces && name.parse::<u32>().is_ok();
        if metadata.is_symlink() {
            if is_tablespace {
                return self.tablespace(at, &path);
            }
            return self.link(at, path, name, place);
        }
        if metadata.is_dir() {
            if is_tablespace {
                return self.tablespace(at, &path);
            }
            return self.found_directory(at, &path, name, place, &metadata);
        }
        self.found_file(at, path, name, place, &metadata)
    }

    fn found_directory(
        &mut self,
        at: &Path,
        path: &str,
        name: &str,
        place: Place,
        metadata: &Metadata,
    ) -> Result<(), CopyError> {
        (self.sink)(directory_entry(path.to_owned(), metadata))?;
        let emptied = (place == Place::Root && exclude::is_emptied(name))
            || self.source.stats_temp.as_deref() == Some(path)
            || self.is_a_tablespace(at);
        if emptied {
            return Ok(());
        }
        self.directory(at, path, below(place, name))
    }

    fn is_a_tablespace(&self, at: &Path) -> bool {
        !self.elsewhere.is_empty()
            && fs::canonicalize(at).is_ok_and(|real| self.elsewhere.contains(&real))
    }

    fn found_file(
        &mut self,
        at: &Path,
        path: String,
        name: &str,
        place: Place,
        metadata: &Metadata,
    ) -> Result<(), CopyError> {
        // Sockets, pipes and devices: nothing of the database's, and reading one could block for ever.
        if !metadata.is_file() || path == CONTROL {
            return Ok(());
        }
        let segment = match place {
            Place::Database | Place::Global => RelationFile::parse(name).map(|file| file.segment),
            _ => None,
        };
        (self.sink)(Found::File(FoundFile {
            path,
            source: at.to_owned(),
            size: metadata.len(),
            mode: metadata.permissions().mode() & 0o7777,
            mtime: metadata.mtime(),
            segment,
        }))
    }

    /// Of a tablespace only this version's directory is ours; others may belong to another major.
    fn tablespace(&mut self, at: &Path, path: &str) -> Result<(), CopyError> {
        let Some(metadata) = present(at, fs::metadata(at))? else {
            return Ok(());
        };
        (self.sink)(directory_entry(path.to_owned(), &metadata))?;
        let version = &self.source.version_directory;
        let (at, path) = (at.join(version), join(path, version));
        let Some(metadata) = present(&at, fs::metadata(&at))? else {
            return Ok(());
        };
        (self.sink)(directory_entry(path.clone(), &metadata))?;
        self.directory(&at, &path, Place::Databases)
    }

    fn link(&mut self, at: &Path, path: String, name: &str, place: Place) -> Result<(), CopyError> {
        let Some(target) = present(at, fs::read_link(at))? else {
            return Ok(());
        };
        let target = utf8(&target)?.to_owned();
        let Some(metadata) = present(at, fs::metadata(at))? else {
            let what = format!("`{path}` is a link to `{target}`, which does not exist");
            return (self.sink)(Found::LeftOut(what));
        };
        let real = fs::canonicalize(at).map_err(|e| CopyError::read(at, e))?;
        if place == Place::Root && exclude::is_emptied(name) {
            return (self.sink)(directory_entry(path, &metadata));
        }
        if real.starts_with(&self.root) {
            // Kept as a link, but never as one to the source's own directory: a restored copy must not
            // reach into the live one.
            let mtime = fs::symlink_metadata(at).map_or(0, |metadata| metadata.mtime());
            let target = self.relative_target(at, &real)?;
            return (self.sink)(Found::Link {
                path,
                target,
                mtime,
            });
        }
        if self.trail.iter().any(|seen| seen.starts_with(&real)) {
            let what = format!("`{path}` is a link to `{target}`, which it is in");
            return (self.sink)(Found::LeftOut(what));
        }
        (self.sink)(Found::Outside {
            path: path.clone(),
            target,
        })?;
        if !metadata.is_dir() {
            return self.found_file(at, path, name, place, &metadata);
        }
        self.trail.push(real);
        let walked = self.found_directory(at, &path, name, place, &metadata);
        self.trail.pop();
        walked
    }

    fn relative_target(&self, at: &Path, real: &Path) -> Result<String, CopyError> {
        let parent = at.parent().unwrap_or(at);
        let parent = fs::canonicalize(parent).map_err(|e| CopyError::read(parent, e))?;
        let Ok(parent) = parent.strip_prefix(&self.root) else {
            return Err(CopyError::Refused(format!(
                "`{}` is a link from outside the data directory back into it",
                at.display()
            )));
        };
        let real = real.strip_prefix(&self.root).unwrap_or(real);
        let shared = parent
            .components()
            .zip(real.components())
            .take_while(|(a, b)| a == b)
            .count();
        let mut target: PathBuf = parent
            .components()
            .skip(shared)
            .map(|_| Path::new(".."))
            .collect();
        target.extend(real.components().skip(shared));
        if target.as_os_str().is_empty() {
            target.push(".");
        }
        Ok(utf8(&target)?.to_owned())
    }
}

impl TablespaceList {
    fn has(&self, oid: u32) -> bool {
        self.in_place.contains(&oid) || self.linked.iter().any(|linked| linked.oid == oid)
    }
}

fn below(place: Place, name: &str) -> Place {
    match (place, name) {
        (Place::Root, "base") => Place::Databases,
        (Place::Root, "global") => Place::Global,
        (Place::Root, "pg_tblspc") => Place::Tablespaces,
        (Place::Databases, name) if name.bytes().all(|b| b.is_ascii_digit()) => Place::Database,
        _ => Place::Other,
    }
}

fn directory_entry(path: String, metadata: &Metadata) -> Found {
    Found::Directory {
        path,
        mode: metadata.permissions().mode() & 0o7777,
        mtime: metadata.mtime(),
    }
}

/// Relations of a database's directory that have an init fork: unlogged ones, which a crash empties.
fn unlogged(names: &[String]) -> BTreeSet<String> {
    names
        .iter()
        .filter_map(|name| RelationFile::parse(name))
        .filter(|file| file.fork == Fork::Init)
        .map(|file| file.relation.to_owned())
        .collect()
}

/// The names in a directory, sorted; none if it is gone.
fn names(at: &Path, path: &str) -> Result<Vec<String>, CopyError> {
    let Some(entries) = present(at, fs::read_dir(at))? else {
        return Ok(Vec::new());
    };
    let mut names = Vec::new();
    for entry in entries {
        let name = entry.map_err(|e| CopyError::read(at, e))?.file_name();
        let name = name.into_string().map_err(|name| {
            let name = Path::new(path).join(name);
            CopyError::Name(name.display().to_string())
        })?;
        names.push(name);
    }
    names.sort_unstable();
    // A file that is removed and made again meanwhile may be listed twice.
    names.dedup();
    Ok(names)
}

/// `None` for what has been removed meanwhile.
fn present<T>(at: &Path, result: io::Result<T>) -> Result<Option<T>, CopyError> {
    match result {
        Ok(value) => Ok(Some(value)),
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(e) => Err(CopyError::read(at, e)),
    }
}

fn utf8(path: &Path) -> Result<&str, CopyError> {
    path.to_str()
        .ok_or_else(|| CopyError::Name(path.display().to_string()))
}

fn join(path: &str, name: &str) -> String {
    if path.is_empty() {
        name.to_owned()
    } else {
        format!("{path}/{name}")
    }
}

#[cfg(test)]
mod tests;
