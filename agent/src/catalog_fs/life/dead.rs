//! Mounts of agents that were killed.
//!
//! Their server is gone, so whoever touches one gets 'Transport endpoint is not connected'. They are told by their names alone:
//! the process that made them is not there any more.

use std::fs;
use std::path::{Path, PathBuf};

use rustix::process::geteuid;

use super::device::{self, Detach};
use super::place::Place;
use super::table;

/// Detaches mounts below `runtime` whose agents are gone, and removes their directories. Says of each what was done. Never
/// fails: what cannot be done is said, too.
pub async fn detach_dead(runtime: &Path) -> Vec<String> {
    let mut told = Vec::new();
    // Links followed, as in the mount table.
    let Ok(runtime) = runtime.canonicalize() else {
        return told;
    };
    let uid = geteuid();
    for entry in table::all() {
        let ours = uid.is_root() || entry.user == Some(uid.as_raw());
        let directory = entry
            .point
            .parent()
            .filter(|directory| directory.parent() == Some(&runtime));
        let Some(directory) = directory.filter(|_| ours) else {
            continue;
        };
        if Place::of_the_dead(directory.to_owned()).is_none() {
            continue;
        }
        let path = entry.point.display();
        match device::detach(&entry.point, Detach::Lazily).await {
            Ok(()) => told.push(format!("detached `{path}`, the mount of an agent that was killed")),
            // Another agent was faster.
            Err(_) if !table::mounted(&entry.point) => {}
            Err(why) => told.push(format!(
                "cannot detach `{path}`, the mount of an agent that was killed: {why}; `umount -l {path}` as root does it"
            )),
        }
    }
    for place in directories(&runtime)
        .into_iter()
        .filter_map(Place::of_the_dead)
    {
        if !table::mounted(place.point()) {
            place.remove();
        }
    }
    told
}

fn directories(runtime: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(runtime).into_iter().flatten().flatten();
    // Of others' directories (in /tmp) we could remove nothing.
    entries
        .map(|entry| entry.path())
        .filter(|path| owned(path))
        .collect()
}

fn owned(path: &Path) -> bool {
    use std::os::unix::fs::MetadataExt as _;

    let is_ours = || {
        // Not a mount point: those lie one level below.
        let metadata = fs::symlink_metadata(path).ok()?;
        Some(metadata.is_dir() && metadata.uid() == geteuid().as_raw())
    };
    Place::of_the_dead(path.to_owned()).is_some() && is_ours() == Some(true)
}
