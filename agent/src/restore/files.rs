//! What a restore does to files, each step durable before the next begins.

use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::{self, Write as _};
use std::os::unix::fs::{DirBuilderExt as _, MetadataExt as _, OpenOptionsExt as _};
use std::path::Path;
use std::time::Duration;

use serde::Serialize;

/// Names of ours in a data directory that is a mount point; never moved, never copied.
pub(super) const OURS: &str = ".gs_pitr-";
/// A file system's own, in its root.
pub(super) const LOST_FOUND: &str = "lost+found";

/// Whether there is nothing at `path`, or an empty directory (no link to one). What a file system has in its root
/// does not count, nor a workspace of ours.
pub(super) fn is_absent_or_empty(path: &Path) -> io::Result<bool> {
    match fs::symlink_metadata(path) {
        Ok(metadata) if metadata.is_dir() => Ok(entries(path)?.is_empty()),
        Ok(_) => Ok(false),
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(true),
        Err(e) => Err(e),
    }
}

/// The names in a directory that are not a file system's or a restore's.
pub(super) fn entries(directory: &Path) -> io::Result<Vec<std::ffi::OsString>> {
    let mut names = Vec::new();
    for entry in fs::read_dir(directory)? {
        let name = entry?.file_name();
        if name != LOST_FOUND && !name.to_string_lossy().starts_with(OURS) {
            names.push(name);
        }
    }
    names.sort();
    Ok(names)
}

/// Whether a directory is the root of a file system of its own.
pub(super) fn is_mount_point(directory: &Path) -> io::Result<bool> {
    let (here, above) = match (fs::metadata(directory), directory.parent()) {
        (Ok(here), Some(parent)) => (here, fs::metadata(parent)?),
        (Ok(_), None) => return Ok(true),
        (Err(e), _) if e.kind() == io::ErrorKind::NotFound => return Ok(false),
        (Err(e), _) => return Err(e),
    };
    Ok(here.dev() != above.dev())
}

/// Makes a directory that only we can open.
pub(super) fn directory(path: &Path) -> io::Result<()> {
    DirBuilder::new().mode(0o700).create(path)
}

fn private(path: &Path) -> io::Result<File> {
    let mut options = OpenOptions::new();
    options.create(true).truncate(true).write(true).mode(0o600);
    options.open(path)
}

/// Writes a file that only we can read.
pub(super) fn private_file(path: &Path, text: &str) -> io::Result<()> {
    let mut file = private(path)?;
    file.write_all(text.as_bytes())?;
    file.sync_all()
}

/// Writes `value` as JSON to `name` in `directory`: the old content or the new one, whenever the power fails.
pub(super) fn write_json(directory: &Path, name: &str, value: &impl Serialize) -> io::Result<()> {
    let new = directory.join(format!("{name}.new"));
    let mut text = serde_json::to_string_pretty(value)?;
    text.push('\n');
    private_file(&new, &text)?;
    fs::rename(&new, directory.join(name))?;
    sync(directory)
}

/// Makes the names in a directory durable.
pub(super) fn sync(directory: &Path) -> io::Result<()> {
    File::open(directory)?.sync_all()
}

/// Makes the names durable in the directory that `path` is in.
pub(super) fn sync_parent(path: &Path) -> io::Result<()> {
    sync(path.parent().unwrap_or(Path::new("/")))
}

fn absent_is_fine(result: io::Result<()>) -> io::Result<()> {
    match result {
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(()),
        result => result,
    }
}

/// Whether anything is at `path`, a dangling link too.
pub(super) fn exists(path: &Path) -> bool {
    fs::symlink_metadata(path).is_ok()
}

/// Removes a file, if it is there.
pub(super) fn remove_file(path: &Path) -> io::Result<()> {
    absent_is_fine(fs::remove_file(path))
}

/// Removes an empty directory, if it is there.
pub(super) fn remove_empty(path: &Path) -> io::Result<()> {
    absent_is_fine(fs::remove_dir(path))
}

/// Removes a directory with all that is in it (links are removed, not followed), if it is there.
///
/// More than once if something is made in it meanwhile: a write that was begun before its future was dropped,
/// or a process of a server that was stopped at once.
pub(super) fn remove_tree(path: &Path) -> io::Result<()> {
    for _ in 0..20 {
        match fs::remove_dir_all(path) {
            Err(e) if e.kind() == io::ErrorKind::DirectoryNotEmpty => {
                std::thread::park_timeout(Duration::from_millis(100));
            }
            removed => return absent_is_fine(removed),
        }
    }
    absent_is_fine(fs::remove_dir_all(path))
}

/// Bytes that the files below a directory take, links not followed.
pub(super) fn tree_bytes(directory: &Path) -> io::Result<u64> {
    let mut bytes = 0;
    for entry in fs::read_dir(directory)? {
        let entry = entry?;
        let metadata = match entry.metadata() {
            // A running server removes files all the time.
            Err(e) if e.kind() == io::ErrorKind::NotFound => continue,
            metadata => metadata?,
        };
        bytes += metadata.blocks() * 512;
        if metadata.is_dir() {
            bytes += tree_bytes(&entry.path())?;
        }
    }
    Ok(bytes)
}
