//! The host: room on its disks, programs, directories, what manages the database.

use std::fmt::Write as _;
use std::io;
use std::path::{Path, PathBuf};

use agent_api::{ApiError, ErrorKind, Finding};

use crate::catalog_fs::life::available;
use crate::config::Config;
use crate::engine::probackup::program::Program;
use crate::facts;
use crate::wal::hold::Room;

/// What a second copy needs beyond the databases' size: WAL until it has caught up.
const MARGIN_PERCENT: u64 = 10;

fn gib(bytes: u64) -> String {
    let tenths = bytes / ((1 << 30) / 10);
    if tenths < 10 {
        format!("{} MiB", bytes >> 20)
    } else {
        format!("{}.{} GiB", tenths / 10, tenths % 10)
    }
}

/// What can be said without a database.
pub(super) fn check(config: &Config) -> Vec<Finding> {
    vec![machine(), roots(config)]
}

fn machine() -> Finding {
    let name = "machine-id";
    let id = facts::machine_id();
    if id.starts_with("hostname:") {
        let message = format!(
            "there is no /etc/machine-id; the host is known as `{id}`, and a clone of the same name is not told apart"
        );
        return Finding::warning(name, message, "systemd-machine-id-setup");
    }
    Finding::fine(name, id)
}

fn roots(config: &Config) -> Finding {
    let name = "restore directories";
    if config.allow_roots.is_empty() {
        let message = "the agent may not restore anywhere: it was started without --allow-root";
        return Finding::warning(name, message, "start the agent with --allow-root DIR");
    }
    let roots = config.allow_roots.iter();
    let roots: Vec<_> = roots.map(|root| root.display().to_string()).collect();
    Finding::fine(name, roots.join(", "))
}

/// Program and mount of the engine `probackup`. A backup goes without; only where the program is there for it, or demanded,
/// it is worth a warning that it cannot be used.
pub(super) async fn probackup(config: &Config) -> Finding {
    let name = "engine probackup";
    let (program, mount) = tokio::join!(Program::find(config), available(&config.mount));
    match (program, mount) {
        (Ok(program), Ok(kind)) => {
            let message = format!(
                "`{}` {}, its catalog mounted as {}",
                program.path.display(),
                program.version,
                kind.name()
            );
            Finding::fine(name, message)
        }
        (Ok(program), Err(missing)) => {
            let message = format!(
                "`{}` is there and cannot be used: {}",
                program.path.display(),
                missing.why
            );
            Finding::warning(name, message, missing.mend())
        }
        (Err(error), _) if config.probackup.is_some() => {
            Finding::warning(name, error.message, error.next.unwrap_or_default())
        }
        (Err(error), _) => Finding::fine(name, format!("not used: {}", error.message)),
    }
}

/// Programs of the database's own major version: a restore needs them.
pub(super) async fn programs(config: &Config, major: u32) -> Finding {
    let name = "programs";
    let installed = facts::installed(config).await;
    match installed.get(&major) {
        Some(directory) => Finding::fine(
            name,
            format!("PostgreSQL {major} in {}", directory.display()),
        ),
        None => Finding::warning(
            name,
            format!(
                "no programs of PostgreSQL {major} were found: nothing can be restored on this host"
            ),
            format!(
                "start the agent with --pg-bindir, the directory of PostgreSQL {major}'s `postgres`"
            ),
        ),
    }
}

/// The data directory's parts and the tablespaces, read as the user that the agent is. Blocks.
pub(super) fn readable(pgdata: &Path, wal: &str, tablespaces: &[PathBuf]) -> Finding {
    let name = "data directory";
    let inside = ["base", "global", wal, "pg_tblspc"].map(|part| pgdata.join(part));
    for directory in inside.iter().chain(tablespaces) {
        if let Err(error) = std::fs::read_dir(directory) {
            let message = format!("cannot read `{}`: {error}", directory.display());
            let next = format!("run the agent as the user that owns `{}`", pgdata.display());
            let error = ApiError::new(ErrorKind::Database, message).next(next);
            return Finding::failure(name, error);
        }
    }
    let user = facts::os_user();
    let mut message = format!("`{}` can be read by `{user}`", pgdata.display());
    if !tablespaces.is_empty() {
        let _ = write!(message, ", and {} tablespaces", tablespaces.len());
    }
    Finding::fine(name, message)
}

/// Room for the WAL that a backup holds back. Blocks.
pub(super) fn room_for_wal(config: &Config, pgdata: &Path, wal: &str) -> Finding {
    let name = "room for WAL";
    let wal = pgdata.join(wal);
    let room = match Room::of(&wal) {
        Ok(room) => room,
        Err(error) => return unknown_room(name, &wal, &error),
    };
    let hold = config
        .wal_hold
        .map_or(room.free / 4, |own| own.min(room.free / 4));
    let (free, total) = (gib(room.free), gib(room.total));
    if room.free < room.total / 10 {
        let message = format!(
            "{free} of {total} are free where pg_wal is: a backup is given up as soon as its WAL has to wait"
        );
        return Finding::warning(
            name,
            message,
            "make room on the file system of pg_wal: at least 10 % free",
        );
    }
    let message = format!(
        "{free} of {total} are free; a backup may hold back {}",
        gib(hold)
    );
    Finding::fine(name, message)
}

/// Room for a second copy beside the first, so that a restore has a way back. Blocks.
pub(super) fn room_for_a_copy(pgdata: &Path, size: u64) -> Finding {
    let name = "room for a restore";
    let room = match Room::of(pgdata) {
        Ok(room) => room,
        Err(error) => return unknown_room(name, pgdata, &error),
    };
    let needed = size + size / 100 * MARGIN_PERCENT;
    let (free, needs) = (gib(room.free), gib(needed));
    if room.free < needed {
        let missing = gib(needed - room.free);
        let message = format!(
            "a second copy needs about {needs}, and {free} are free beside the data directory: the node can be restored \
             over itself only in place, without a way back"
        );
        let mend = format!(
            "make {missing} more room on the file system of `{}`",
            pgdata.display()
        );
        return Finding::warning(name, message, mend);
    }
    Finding::fine(
        name,
        format!("a second copy needs about {needs}, {free} are free"),
    )
}

fn unknown_room(name: &str, path: &Path, error: &io::Error) -> Finding {
    let message = format!(
        "the free space at `{}` cannot be seen: {error}",
        path.display()
    );
    Finding::warning(name, message, "look at it with df")
}

#[cfg(test)]
mod tests {
    use agent_api::Level;

    use super::*;

    #[test]
    fn a_copy_that_does_not_fit_is_told_with_what_is_missing() {
        let directory = tempfile::tempdir().unwrap();
        let fits = room_for_a_copy(directory.path(), 1 << 20);
        assert_eq!(fits.level, Level::Ok, "{fits:?}");
        let huge = room_for_a_copy(directory.path(), 1 << 60);
        assert_eq!(huge.level, Level::Warning, "{huge:?}");
        assert!(huge.mend.unwrap().contains("GiB"));
        let gone = room_for_a_copy(&directory.path().join("gone"), 1);
        assert_eq!(gone.level, Level::Warning, "{gone:?}");
    }

    #[test]
    fn what_cannot_be_read_is_named() {
        let directory = tempfile::tempdir().unwrap();
        let found = readable(directory.path(), "pg_wal", &[]);
        assert_eq!(found.kind, Some(ErrorKind::Database), "{found:?}");
        assert!(found.message.contains("base"), "{found:?}");
        for part in ["base", "global", "pg_wal", "pg_tblspc"] {
            std::fs::create_dir(directory.path().join(part)).unwrap();
        }
        assert_eq!(readable(directory.path(), "pg_wal", &[]).level, Level::Ok);
        let space = directory.path().join("space");
        let found = readable(directory.path(), "pg_wal", &[space]);
        assert!(found.message.contains("space"), "{found:?}");
    }

    #[test]
    fn sizes_for_people() {
        assert_eq!(gib(512 << 20), "512 MiB");
        assert_eq!(gib(3 << 30), "3.0 GiB");
    }
}
