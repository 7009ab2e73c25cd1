//! Checks before a restore changes anything.

use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};

use agent_api::{ApiError, ErrorKind, Place, RestoreSpec};
use agent_wal::{Lsn, SegmentName, SegmentSize};
use rustix::fs::{Access, access};

use super::errors::local;
use super::files::{entries, is_absent_or_empty, is_mount_point, tree_bytes};
use super::inspect::{free_bytes, real_target, room};
use super::journal::Places;
use super::live::Live;
use super::recoverer::Recoverer;
use super::scan::KEPT;
use super::walserve::Needed;
use crate::config::Config;
use crate::facts;

/// Room beyond the files themselves: for the server's own, and so that the disk is not full to the brim.
const MARGIN: u64 = 64 << 20;
/// WAL segments that a recovery keeps in `pg_wal` between two restart points, and those in the spool.
const SEGMENTS_KEPT: u64 = 8;

/// A restore that can be done.
#[derive(Debug, Clone)]
pub(super) struct Plan {
    /// The data directory to be, its parent's links followed.
    pub(super) target: PathBuf,
    /// It is a mount point.
    pub(super) mount: bool,
    /// The database that is there.
    pub(super) live: Option<Live>,
    /// Whose database it is.
    pub(super) recoverer: Recoverer,
    /// Directory of its programs.
    pub(super) bindir: PathBuf,
    /// Size of WAL segments.
    pub(super) segment_size: SegmentSize,
    /// Where replay begins.
    pub(super) start: Lsn,
    /// Where the point's record ends.
    pub(super) end: Lsn,
    /// Where recovery ends, and the restored database goes on.
    pub(super) fork: Lsn,
    /// The WAL it needs.
    pub(super) needed: Needed,
}

impl Plan {
    /// The server's program.
    pub(super) fn server(&self) -> PathBuf {
        self.bindir.join(self.recoverer.server())
    }
}

/// Checks everything that can be checked without changing anything. What is at the target is not looked at if the
/// restore was begun before (`begun`): then its journal knows.
///
/// # Errors
/// The first thing that would keep the restore from ending well.
pub(super) async fn check(
    config: &Config,
    spec: &RestoreSpec,
    (target, mount): (PathBuf, bool),
    begun: bool,
) -> Result<Plan, ApiError> {
    let (segment_size, start, end, needed) = positions(spec)?;
    let recoverer = Recoverer::of(&spec.node)?;
    let fork = recoverer.fork(spec, end)?;
    let bindir = programs(config, recoverer).await?;
    let mut live = None;
    if !begun {
        live = check_place(&target, mount, spec, recoverer).await?;
        let segments = (needed.last.number + 1).saturating_sub(needed.first.number);
        let wal = segments.saturating_mul(segment_size.bytes());
        check_space(&target, mount, spec, wal)?;
    }
    if let Some(live) = &mut live {
        live.bindir.clone_from(&bindir);
    }
    Ok(Plan {
        target,
        mount,
        live,
        recoverer,
        bindir,
        segment_size,
        start,
        end,
        fork,
        needed,
    })
}

/// The target, its links followed, and whether it is a mount point. What is there is not looked at.
///
/// # Errors
/// If the agent may not restore there, or anywhere.
pub(super) fn path(config: &Config, spec: &RestoreSpec) -> Result<(PathBuf, bool), ApiError> {
    if rustix::process::geteuid().is_root() {
        return Err(ApiError::new(
            ErrorKind::Usage,
            "the agent runs as root, and database servers refuse to",
        )
        .next("run pitr-agent as the OS user that shall own the restored database"));
    }
    let target = check_path(config, spec)?;
    let mount = is_mount_point(&target).map_err(|error| local(&target, &error))?;
    Ok((target, mount))
}

fn damaged(message: String) -> ApiError {
    ApiError::new(ErrorKind::Damaged, message)
        .next("run `gs_pitr show ID`, and restore another backup")
}

/// Reads the WAL positions of copy and point, and compares what they say of each other.
fn positions(spec: &RestoreSpec) -> Result<(SegmentSize, Lsn, Lsn, Needed), ApiError> {
    let (node, point) = (&spec.node, &spec.point);
    let lsn = |what: &str, text: &str| {
        text.parse::<Lsn>()
            .map_err(|error| damaged(format!("{what} of node {}: {error}", node.node_id)))
    };
    let start = lsn("start of the copy", &node.start_lsn)?;
    let stop = lsn("end of the copy", &node.stop_lsn)?;
    let end = lsn("the point", &point.end_lsn)?;
    let size = SegmentSize::new(node.wal_segment_size)
        .ok_or_else(|| damaged(format!("{} is no WAL segment size", node.wal_segment_size)))?;
    if node.node_id != point.node_id {
        return Err(damaged(format!(
            "the point is one of node {}, the copy one of node {}",
            point.node_id, node.node_id
        )));
    }
    if !(start < stop && stop <= end) {
        return Err(damaged(format!(
            "the point at {end} cannot be reached from a copy made from {start} to {stop}"
        )));
    }
    if node.epoch != point.epoch || node.timeline != point.timeline {
        return Err(ApiError::new(
            ErrorKind::Incompatible,
            format!(
                "the point lies on timeline {} of epoch {}, the copy on timeline {} of epoch {}: this version \
                 restores a copy to points of its own epoch and timeline",
                point.timeline, point.epoch, node.timeline, node.epoch
            ),
        ));
    }
    let needed = Needed {
        first: SegmentName::of_lsn(node.timeline, start, size),
        last: SegmentName::before_lsn(point.timeline, end, size),
        size,
    };
    Ok((size, start, end, needed))
}

fn refuse(target: &Path, why: impl std::fmt::Display) -> ApiError {
    ApiError::new(
        ErrorKind::Target,
        format!("the target {} {why}", target.display()),
    )
}

/// The path itself, whatever is there.
fn check_path(config: &Config, spec: &RestoreSpec) -> Result<PathBuf, ApiError> {
    let asked = Path::new(&spec.target);
    let target = match spec.place {
        Place::Fresh => config.allowed_target(asked)?,
        Place::Replace { .. } | Place::InPlace { .. } => real_target(config, asked)?,
    };
    let text = target.to_str().unwrap_or("\n");
    // PostgreSQL's tablespace_map escapes differently from version to version.
    if text.contains(|c: char| c.is_control() || c == '\\') {
        return Err(refuse(
            asked,
            "has a name with a backslash or control character, or none in UTF-8",
        ));
    }
    Ok(target)
}

/// What is at the target must be what the client says. Returns the database that is there.
async fn check_place(
    target: &Path,
    mount: bool,
    spec: &RestoreSpec,
    recoverer: Recoverer,
) -> Result<Option<Live>, ApiError> {
    let parent = target.parent().unwrap_or(Path::new("/"));
    if !fs::metadata(parent)
        .map_err(|error| local(parent, &error))?
        .is_dir()
    {
        return Err(refuse(target, "has a parent that is not a directory"));
    }
    let place = room(target, mount);
    access(place, Access::WRITE_OK | Access::EXEC_OK)
        .map_err(|error| local(place, &error.into()))
        .map_err(|error| error.next("give the agent's user the right to write there"))?;
    if mount && !is_own(target)? {
        return Err(
            refuse(target, "is a mount point that belongs to another user")
                .next("give it to the user that the agent runs as"),
        );
    }
    let system_identifier = match spec.place {
        Place::Fresh => {
            check_empty(target, mount, spec)?;
            return Ok(None);
        }
        Place::Replace { system_identifier } | Place::InPlace { system_identifier } => {
            system_identifier
        }
    };
    let Some(live) = Live::look(target).await? else {
        return Err(refuse(target, "has no database; nothing was changed")
            .next("check the target, or restore as into an empty directory"));
    };
    if live.system_identifier != system_identifier {
        let why = format!(
            "has the database with system identifier {}, and the one to be replaced has {system_identifier}; nothing \
             was changed",
            live.system_identifier
        );
        return Err(refuse(target, why).next("check which agent and which directory is meant"));
    }
    if live.major != recoverer.major() {
        let why = format!(
            "has a database of {}, the copy is one of {recoverer}",
            Recoverer::of_major(live.major)
        );
        return Err(refuse(target, why));
    }
    if !is_own(target)? {
        return Err(refuse(
            target,
            "belongs to another user than the agent runs as",
        ));
    }
    check_one_file_system(target)?;
    Ok(Some(live))
}

fn is_own(directory: &Path) -> Result<bool, ApiError> {
    let metadata = fs::metadata(directory).map_err(|error| local(directory, &error))?;
    Ok(metadata.uid() == rustix::process::geteuid().as_raw())
}

fn check_empty(target: &Path, mount: bool, spec: &RestoreSpec) -> Result<(), ApiError> {
    let places = Places::of(target, mount, spec.restore, false);
    for path in [&places.target, &places.tablespaces, &places.config] {
        if !is_absent_or_empty(path).map_err(|error| local(path, &error))? {
            return Err(refuse(
                path,
                "exists and is not an empty directory; nothing was changed",
            )
            .next("choose another --target-dir, or move what is there away"));
        }
    }
    Ok(())
}

/// A file system that is mounted within a data directory cannot be moved with it.
fn check_one_file_system(target: &Path) -> Result<(), ApiError> {
    let cannot = |error: io::Error| local(target, &error);
    let device = fs::metadata(target).map_err(cannot)?.dev();
    for name in entries(target).map_err(cannot)? {
        let path = target.join(name);
        if fs::symlink_metadata(&path).is_ok_and(|metadata| metadata.dev() != device) {
            return Err(refuse(
                &path,
                "is a mount point within the data directory, which cannot be replaced with it",
            )
            .next("restore into an empty directory, or unmount it"));
        }
    }
    Ok(())
}

fn check_space(
    target: &Path,
    mount: bool,
    spec: &RestoreSpec,
    all_wal: u64,
) -> Result<(), ApiError> {
    let mut free = free_bytes(room(target, mount))?;
    let wal = spec
        .node
        .wal_segment_size
        .saturating_mul(SEGMENTS_KEPT)
        .saturating_add(KEPT.min(all_wal));
    // An increment has its own pages only: all of its largest ancestor may be there beside them.
    let ancestors = spec.chain.iter().map(|link| link.node.plain_bytes);
    let files = spec
        .node
        .plain_bytes
        .saturating_add(ancestors.max().unwrap_or(0));
    let needed = files.saturating_add(wal).saturating_add(MARGIN);
    if free < needed && matches!(spec.place, Place::InPlace { .. }) {
        // What is there is removed first.
        free = free.saturating_add(tree_bytes(target).map_err(|error| local(target, &error))?);
    }
    if free >= needed {
        return Ok(());
    }
    let mib = |bytes: u64| bytes.div_ceil(1 << 20);
    Err(refuse(
        target,
        format!(
            "has {} MiB of room, {} MiB are needed ({} of them for WAL and as a margin)",
            free >> 20,
            mib(needed),
            mib(needed - files)
        ),
    )
    .next("make room, or choose another --target-dir"))
}

async fn programs(config: &Config, recoverer: Recoverer) -> Result<PathBuf, ApiError> {
    let mut found = facts::installed(config).await;
    if let Some(bindir) = found.remove(&recoverer.major()) {
        return Ok(bindir);
    }
    let there = if found.is_empty() {
        "no database server was found".to_owned()
    } else {
        let all: Vec<String> = found
            .iter()
            .map(|(major, bindir)| {
                format!("{} in {}", Recoverer::of_major(*major), bindir.display())
            })
            .collect();
        format!("found: {}", all.join(", "))
    };
    let how = match recoverer {
        Recoverer::PostgreSql(major) => format!(" (Debian: apt-get install postgresql-{major})"),
        Recoverer::OpenGauss => String::new(),
    };
    Err(ApiError::new(
        ErrorKind::Incompatible,
        format!("the copy is one of {recoverer}, which is not installed on this host ({there})"),
    )
    .next(format!(
        "install the server programs of {recoverer}{how}, or tell the agent where they are: --pg-bindir DIR"
    )))
}
