//! What is in a data directory, and what of it is copied (`dir_list_file`, `dir_check_file`).

use std::collections::HashSet;
use std::fs;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};

use super::content::Entry;
use super::{Failure, Kind};

/// Directories that are copied without their content, wherever they are.
const EMPTY: [&str; 10] = [
    "pg_wal",
    "pg_xlog",
    "pg_stat_tmp",
    "pgsql_tmp",
    "pg_replslot",
    "pg_dynshmem",
    "pg_notify",
    "pg_serial",
    "pg_snapshots",
    "pg_subtrans",
];
/// Files that are not copied.
const LEFT_OUT: [&str; 10] = [
    "postgresql.auto.conf.tmp",
    "current_logfiles.tmp",
    "recovery.conf",
    "postmaster.pid",
    "postmaster.opts",
    "probackup_recovery.conf",
    "recovery.signal",
    "standby.signal",
    "backup_label",
    "tablespace_map",
];

/// A file or directory to copy.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Source {
    /// As it will stand in backup_content.control; its size is set when it is copied.
    pub(super) entry: Entry,
    /// Where it is.
    pub(super) path: PathBuf,
    /// Bytes it had when it was listed.
    pub(super) bytes: u64,
    /// Seconds since 1970 of its last change.
    pub(super) changed: i64,
}

/// Name of a relation's file: its number, fork (`""`: the main one) and segment.
fn relation(name: &str) -> Option<(u32, &str, u32)> {
    let end = name
        .find(|c: char| !c.is_ascii_digit())
        .unwrap_or(name.len());
    let (number, rest) = name.split_at(end);
    if number.starts_with('0') {
        return None;
    }
    let number = number.parse().ok()?;
    let (fork, segment) = match rest.split_once('.') {
        Some((fork, segment)) => (fork, segment.parse().ok()?),
        None => (rest, 0),
    };
    matches!(fork, "" | "_vm" | "_fsm" | "_init").then_some((number, fork, segment))
}

/// Whether relations live in this directory, and of which database.
fn place(path: &str) -> Option<u32> {
    let mut parts = path.split('/');
    match parts.next()? {
        "global" => Some(0),
        "base" => parts.next()?.parse().ok(),
        "pg_tblspc" => parts.nth(2)?.parse().ok(),
        _ => None,
    }
}

struct Walk<'a> {
    kind: Kind,
    /// `PG_15_202209061`.
    tablespace: &'a str,
    external: u32,
    found: Vec<Source>,
}

impl Walk<'_> {
    fn directory(&mut self, directory: &Path, below: &str) -> Result<(), Failure> {
        // It may have gone: a database was dropped.
        let Ok(entries) = fs::read_dir(directory) else {
            return Ok(());
        };
        for entry in entries {
            let entry = entry.map_err(|e| Failure::call("read directory", directory, e))?;
            let name = entry.file_name().to_string_lossy().into_owned();
            // Links are followed, as the real programs do; gone or dangling is not there.
            let Ok(facts) = fs::metadata(entry.path()) else {
                continue;
            };
            if name.starts_with('.') || !(facts.is_dir() || facts.is_file()) {
                continue;
            }
            let path = if below.is_empty() {
                name.clone()
            } else {
                format!("{below}/{name}")
            };
            if self.external == 0 && self.is_left_out(&path, &name, facts.is_dir()) {
                continue;
            }
            let database = place(below);
            let relation = database.and_then(|_| relation(&name));
            let database = place(&path).or(database).unwrap_or(0);
            let is_data = self.external == 0
                && facts.is_file()
                && relation.is_some_and(|(_, fork, _)| fork.is_empty());
            self.found.push(Source {
                entry: Entry {
                    path: path.clone(),
                    mode: facts.mode(),
                    is_data,
                    compress: "none".to_owned(),
                    external: self.external,
                    database: if self.external == 0 { database } else { 0 },
                    segment: relation.map_or(0, |(_, _, segment)| segment),
                    ..Entry::default()
                },
                path: entry.path(),
                bytes: facts.len(),
                changed: facts.mtime(),
            });
            if facts.is_dir() && !self.stays_empty(&path, &name) {
                self.directory(&entry.path(), &path)?;
            }
        }
        Ok(())
    }

    fn is_left_out(&self, path: &str, name: &str, is_directory: bool) -> bool {
        if is_directory {
            // Of a tablespace only this server's own directory; nothing of its name anywhere else.
            let in_tablespace = path.starts_with("pg_tblspc/") && path.split('/').count() == 3;
            return (in_tablespace && name != self.tablespace)
                || (!in_tablespace && name == self.tablespace);
        }
        let temporary = || {
            let mut bytes = name.bytes();
            bytes.next() == Some(b't') && bytes.next().is_some_and(|b| b.is_ascii_digit())
        };
        let below = path.rsplit_once('/').map_or("", |(below, _)| below);
        LEFT_OUT.contains(&path)
            || (place(below).is_some() && (name == "pg_internal.init" || temporary()))
    }

    fn stays_empty(&self, path: &str, name: &str) -> bool {
        if self.external != 0 {
            return false;
        }
        // gs_probackup does not look into tablespaces outside the data directory: they are for `-E`.
        let tablespace =
            self.kind == Kind::Gs && path.starts_with("pg_tblspc/") && path.split('/').count() == 2;
        let in_tablespace = path.starts_with("pg_tblspc/");
        tablespace || path == "log" || (!in_tablespace && EMPTY.contains(&name))
    }
}

/// All of a data directory that is copied, by path. `tablespace` is the server's directory in a tablespace.
pub(super) fn data_directory(
    kind: Kind,
    data: &Path,
    tablespace: &str,
) -> Result<Vec<Source>, Failure> {
    let mut walk = Walk {
        kind,
        tablespace,
        external: 0,
        found: Vec::new(),
    };
    walk.directory(data, "")?;
    let mut found = walk.found;
    // Of an unlogged relation only its empty form: every fork but `_init` goes.
    let directory = |path: &str| path.rsplit_once('/').map_or("", |(d, _)| d).to_owned();
    let unlogged: HashSet<(String, u32)> = found
        .iter()
        .filter_map(|source| {
            let below = directory(&source.entry.path);
            place(&below)?;
            let (number, fork, _) = relation(source.entry.name())?;
            (fork == "_init").then_some((below, number))
        })
        .collect();
    found.retain(|source| match relation(source.entry.name()) {
        Some((number, fork, _)) if fork != "_init" => {
            !unlogged.contains(&(directory(&source.entry.path), number))
        }
        _ => true,
    });
    found.sort_by(|a, b| a.entry.path.cmp(&b.entry.path));
    Ok(found)
}

/// All of an external directory, `number` counted from 1.
pub(super) fn external(directory: &Path, number: u32) -> Result<Vec<Source>, Failure> {
    if !directory.is_dir() {
        return Err(Failure::new(format!(
            " --external-dirs option \"{}\": directory or symbolic link expected",
            directory.display()
        )));
    }
    let mut walk = Walk {
        kind: Kind::Pg,
        tablespace: "",
        external: number,
        found: Vec::new(),
    };
    walk.directory(directory, "")?;
    walk.found.sort_by(|a, b| a.entry.path.cmp(&b.entry.path));
    Ok(walk.found)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_of_relations() {
        assert_eq!(relation("16384"), Some((16384, "", 0)));
        assert_eq!(relation("16384.12"), Some((16384, "", 12)));
        assert_eq!(relation("16384_vm"), Some((16384, "_vm", 0)));
        assert_eq!(relation("16384_fsm.1"), Some((16384, "_fsm", 1)));
        for other in [
            "PG_VERSION",
            "pg_filenode.map",
            "t3_16384",
            "0123",
            "12x",
            "",
        ] {
            assert_eq!(relation(other), None, "{other}");
        }
        assert_eq!(place("base/5"), Some(5));
        assert_eq!(place("pg_tblspc/16400/PG_15_1/5"), Some(5));
        assert_eq!(place("pg_xact"), None);
    }
}
