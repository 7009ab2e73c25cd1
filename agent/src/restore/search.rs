//! Finds what restores have left on the host: workspaces and old databases, below the roots the agent may restore to
//! and beside the database it was told.

use std::fs;
use std::path::{Path, PathBuf};

use crate::config::Config;

/// How deep below a root it looks, and at how many directories: targets lie near their roots, and a directory of
/// millions of files is not searched.
const LEVELS: u32 = 4;
const MOST: usize = 20_000;

/// Directories whose names say that they are a restore's. Whether they are is for their markers to say.
#[derive(Debug, Default)]
pub(super) struct Found {
    pub(super) workspaces: Vec<PathBuf>,
    pub(super) old: Vec<PathBuf>,
}

/// Looks for them.
pub(super) fn find(config: &Config) -> Found {
    let mut found = Found::default();
    let mut left = MOST;
    let roots = config.allow_roots.iter().cloned();
    let pgdata = config.pgdata.as_ref().and_then(|it| it.canonicalize().ok());
    let beside = pgdata.as_deref().and_then(Path::parent).map(Path::to_owned);
    for root in roots {
        search(&root, LEVELS, &mut left, &mut found);
    }
    if let Some(directory) = beside {
        search(&directory, 1, &mut left, &mut found);
    }
    for list in [&mut found.workspaces, &mut found.old] {
        list.sort();
        list.dedup();
    }
    found
}

fn search(directory: &Path, levels: u32, left: &mut usize, found: &mut Found) {
    // In a database only its own top is looked at: a mount point has them inside.
    let database = directory.join("PG_VERSION").exists();
    for entry in fs::read_dir(directory).into_iter().flatten().flatten() {
        if *left == 0 {
            return;
        }
        let is_directory = entry.file_type().is_ok_and(|kind| kind.is_dir());
        if !is_directory {
            continue;
        }
        *left -= 1;
        let path = entry.path();
        let name = entry.file_name();
        let name = name.to_string_lossy();
        if name.ends_with(".gs_pitr-restore") {
            found.workspaces.push(path);
        } else if name.contains(".gs_pitr-old-") {
            found.old.push(path);
        } else if levels > 0 && !database && !name.starts_with(".gs_pitr-") {
            search(&path, levels - 1, left, found);
        }
    }
}

/// Data directories of servers that run here, as far as their processes may be looked at.
pub(super) fn running_data_directories() -> Vec<PathBuf> {
    let processes = fs::read_dir("/proc").into_iter().flatten().flatten();
    let mut directories: Vec<PathBuf> = processes
        .filter_map(|process| fs::read_link(process.path().join("cwd")).ok())
        .filter(|cwd| cwd.join("global/pg_control").exists())
        .collect();
    directories.sort();
    directories.dedup();
    directories
}
