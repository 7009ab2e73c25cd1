//! Whether the copy is the one that was asked for, and whole. Both programs end with exit code 0 for things that are wrong.

use std::io::Cursor;

use agent_api::{ApiError, ErrorKind};
use agent_sql::Flavour;
use bytes::Bytes;
use catalog::model::{External, Extra, Probackup, StreamedWal, Tablespace};
use jiff::Timestamp;

use super::arguments::INSTANCE;
use super::content::{self, ContentError};
use super::control::BackupControl;
use super::making::{Making, Said};
use super::preflight;
use super::program::Kind;
use crate::catalog_fs::{Sealed, SealedCopy};
use crate::engine::attempt::void;
use crate::engine::errors;
use crate::engine::manifest::CopyInBucket;

/// A copy that is what it should be.
#[derive(Debug)]
pub(super) struct Examined {
    id: String,
    control: BackupControl,
    backup_label: String,
    tablespace_map: Option<String>,
    tablespaces: Vec<Tablespace>,
    external: Vec<External>,
    wal: Vec<StreamedWal>,
    ended: Timestamp,
}

/// Holds the copy against what was ordered, and against the program's own list of it.
///
/// # Errors
/// The first thing that is wrong.
pub(super) async fn examine(
    making: &Making<'_>,
    sealed: &Sealed,
    said: &Said,
) -> Result<Examined, ApiError> {
    let base = format!("backups/{INSTANCE}/{}/", said.id);
    let control = needed(sealed, &base, "backup.control")?;
    let control = BackupControl::parse(&text("backup.control", &control)?)
        .map_err(|error| wrong(making, &error.to_string()))?;
    as_ordered(making, &control, said).map_err(|why| wrong(making, &why))?;
    whole(sealed, &base).map_err(|error| wrong(making, &error.to_string()))?;
    let label = needed(sealed, &base, "database/backup_label")?;
    let map = kept(sealed, &base, "database/tablespace_map")?;
    let map = match map {
        Some(bytes) => Some(text("tablespace_map", &bytes)?).filter(|map| !map.is_empty()),
        None => None,
    };
    Ok(Examined {
        id: said.id.clone(),
        backup_label: text("backup_label", &label)?,
        tablespaces: tablespaces(making, map.as_deref()).await?,
        tablespace_map: map,
        external: external(making, &control)?,
        control,
        wal: sealed.wal().to_vec(),
        ended: Timestamp::now(),
    })
}

/// What `backup.control` says against what was ordered.
fn as_ordered(making: &Making<'_>, control: &BackupControl, said: &Said) -> Result<(), String> {
    let (attempt, prepared) = (making.attempt, making.prepared);
    let node = attempt.node;
    if !control.is_good() {
        return Err(format!("its status is {}", control.status));
    }
    let parent = prepared.parent.as_ref().map(|parent| parent.id.as_str());
    let server = match node.sql.flavour() {
        Flavour::PostgreSql if prepared.program.kind == Kind::Pg => {
            Some(node.sql.major().to_string())
        }
        _ => None,
    };
    let same = |what: &str, wanted: &dyn std::fmt::Display, found: &dyn std::fmt::Display| {
        let (wanted, found) = (wanted.to_string(), found.to_string());
        if wanted == found {
            return Ok(());
        }
        Err(format!("its {what} is {found} instead of {wanted}"))
    };
    same("backup mode", &attempt.spec.mode, &control.mode)?;
    same(
        "parent",
        &parent.unwrap_or("none"),
        &control.parent.as_deref().unwrap_or("none"),
    )?;
    same("program version", &said.version, &control.program_version)?;
    same("timeline", &making.position.timeline, &control.timeline)?;
    if let Some(server) = server {
        same("server version", &server, &control.server_version)?;
    }
    if !control.stream || control.from_replica {
        return Err("it has no WAL of its own, or is a standby's".into());
    }
    if control.start < making.position.flush || control.stop < control.start {
        return Err(format!(
            "it goes from {} to {}, and the database was at {} when it began",
            control.start, control.stop, making.position.flush
        ));
    }
    Ok(())
}

/// The program's list of files against what is stored, both ways.
fn whole(sealed: &Sealed, base: &str) -> Result<(), ContentError> {
    let list = sealed.read(&format!("{base}backup_content.control"));
    let list = list.ok().flatten().ok_or_else(|| {
        std::io::Error::new(std::io::ErrorKind::NotFound, "there is none in memory")
    })?;
    let streamed = sealed.wal().iter().map(|wal| (wal.path.as_str(), wal.size));
    let stored = sealed
        .files()
        .chain(streamed)
        .filter_map(|(path, size)| Some((path.strip_prefix(base)?, size)))
        .collect();
    content::compare(Cursor::new(list), stored)?;
    Ok(())
}

fn kept(sealed: &Sealed, base: &str, name: &str) -> Result<Option<Bytes>, ApiError> {
    sealed
        .read(&format!("{base}{name}"))
        .map_err(errors::internal)
}

fn needed(sealed: &Sealed, base: &str, name: &str) -> Result<Bytes, ApiError> {
    kept(sealed, base, name)?
        .ok_or_else(|| void(format!("the program ended well and left no `{name}`")))
}

fn text(what: &str, bytes: &[u8]) -> Result<String, ApiError> {
    String::from_utf8(bytes.to_vec()).map_err(|_| {
        let message = format!("{what} names a path that is not UTF-8");
        ApiError::new(ErrorKind::Database, message)
    })
}

fn wrong(making: &Making<'_>, why: &str) -> ApiError {
    let kind = making.prepared.program.kind;
    let message = format!("{kind} ended well, and its copy is not good: {why}");
    ApiError::new(ErrorKind::Damaged, message)
        .next("start a new backup; if it happens again, use `--engine direct` and report it")
}

/// The tablespaces of the copy: those that the server knew of when the backup began.
async fn tablespaces(making: &Making<'_>, map: Option<&str>) -> Result<Vec<Tablespace>, ApiError> {
    let known = &making.prepared.tablespaces;
    if making.prepared.program.kind == Kind::Pg {
        let mut found = Vec::new();
        for line in map.unwrap_or_default().lines() {
            let Some((oid, location)) = line.split_once(' ') else {
                continue;
            };
            let oid = oid.parse().map_err(errors::internal)?;
            // The map escapes what would break its lines; the link says it plainly.
            let linked = known.iter().find(|space| space.oid == oid);
            let location = linked.map_or(location, |space| &space.location).to_owned();
            found.push(Tablespace {
                oid,
                location,
                extra: Extra::new(),
            });
        }
        return Ok(found);
    }
    // gs_probackup was told which there are: one that came since is empty in the copy.
    let now = preflight::linked(making.attempt.node).await?;
    let mut now = now.outside.iter().chain(&now.inside);
    if let Some(new) = now.find(|space| !known.contains(space)) {
        let message = format!(
            "the tablespace {} (`{}`) was created during the copy",
            new.oid, new.location
        );
        return Err(void(message));
    }
    Ok(known.clone())
}

fn external(making: &Making<'_>, control: &BackupControl) -> Result<Vec<External>, ApiError> {
    let known = &making.prepared.tablespaces;
    let mut found = Vec::new();
    for (number, location) in (1..).zip(&control.external_dirs) {
        let space = known
            .iter()
            .find(|space| space.location.trim_end_matches('/') == location);
        let space = space.ok_or_else(|| {
            wrong(
                making,
                &format!("it has the external directory `{location}`, which was not asked for"),
            )
        })?;
        found.push(External {
            number,
            oid: space.oid,
            location: space.location.clone(),
        });
    }
    if making.prepared.program.kind == Kind::Gs && found.len() != known.len() {
        return Err(wrong(making, "a tablespace is missing in it"));
    }
    Ok(found)
}

impl Examined {
    /// The copy, now that it is in the bucket.
    pub(super) fn describe(self, making: &Making<'_>, copy: SealedCopy) -> CopyInBucket {
        let (attempt, prepared) = (making.attempt, making.prepared);
        let mut extra = Extra::new();
        if prepared.program.kind == Kind::Gs {
            // Its own version is the same in every release.
            extra.insert("build".into(), prepared.program.version.clone().into());
        }
        CopyInBucket {
            start: self.control.start,
            stop: self.control.stop,
            timeline: self.control.timeline,
            started: making.begun,
            completed: self.ended,
            backup_label: self.backup_label,
            tablespace_map: self.tablespace_map,
            tablespaces: self.tablespaces,
            files: copy.files,
            plain_bytes: copy.plain_bytes,
            corrupt_pages: Vec::new(),
            links: std::collections::BTreeMap::new(),
            probackup: Some(Probackup {
                program: prepared.program.kind.name().into(),
                version: self.control.program_version,
                instance: INSTANCE.into(),
                id: self.id,
                mode: attempt.spec.mode,
                parent: prepared.parent.clone(),
                external: self.external,
                wal: self.wal,
                extra,
            }),
            packs: copy.packs,
            index: copy.index,
        }
    }
}
