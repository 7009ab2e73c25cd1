//! Checks before a restore changes anything.

use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};

use agent_api::{ApiError, ErrorKind, RestoreSpec};
use agent_wal::{Lsn, SegmentName, SegmentSize};
use rustix::fs::{Access, access, statvfs};

use super::scan::KEPT;
use super::walserve::Needed;
use super::workspace::{Places, is_absent_or_empty};
use crate::config::Config;
use crate::facts;

/// Room beyond the files themselves: for the server's own, and so that the disk is not full to the brim.
const MARGIN: u64 = 64 << 20;
/// WAL segments that a recovery keeps in `pg_wal` between two restart points, and those in the spool.
const SEGMENTS_KEPT: u64 = 8;
/// Oldest major that has `recovery.signal`.
const OLDEST_MAJOR: u32 = 12;

/// A restore that can be done.
#[derive(Debug, Clone)]
pub(super) struct Plan {
    /// The data directory to be, its parent's links followed.
    pub(super) target: PathBuf,
    /// Major version.
    pub(super) major: u32,
    /// Directory of its programs.
    pub(super) bindir: PathBuf,
    /// Size of WAL segments.
    pub(super) segment_size: SegmentSize,
    /// Where replay begins.
    pub(super) start: Lsn,
    /// Where it ends.
    pub(super) end: Lsn,
    /// The WAL it needs.
    pub(super) needed: Needed,
}

impl Plan {
    /// Name of this version's directory in a tablespace.
    pub(super) fn version_directory(&self, spec: &RestoreSpec) -> String {
        format!("PG_{}_{}", self.major, spec.node.catalog_version)
    }
}

/// Checks everything that can be checked without changing anything.
///
/// # Errors
/// The first thing that would keep the restore from ending well.
pub(super) async fn check(config: &Config, spec: &RestoreSpec) -> Result<Plan, ApiError> {
    if rustix::process::geteuid().is_root() {
        return Err(ApiError::new(
            ErrorKind::Usage,
            "the agent runs as root, and PostgreSQL refuses to",
        )
        .next("run pitr-agent as the OS user that shall own the restored database"));
    }
    let (segment_size, start, end, needed) = positions(spec)?;
    let target = check_target(config, Path::new(&spec.target))?;
    let segments = (needed.last.number + 1).saturating_sub(needed.first.number);
    check_space(&target, spec, segments.saturating_mul(segment_size.bytes()))?;
    let major = spec.node.server_version_num / 10_000;
    let bindir = programs(config, major).await?;
    Ok(Plan {
        target,
        major,
        bindir,
        segment_size,
        start,
        end,
        needed,
    })
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

fn check_target(config: &Config, asked: &Path) -> Result<PathBuf, ApiError> {
    let target = config.allowed_target(asked)?;
    let text = target.to_str().unwrap_or("\n");
    // PostgreSQL's tablespace_map escapes differently from version to version.
    if text.contains(|c: char| c.is_control() || c == '\\') {
        return Err(refuse(
            asked,
            "has a name with a backslash or control character, or none in UTF-8",
        ));
    }
    let cannot = |path: &Path, error: io::Error| {
        ApiError::new(ErrorKind::Target, format!("{}: {error}", path.display()))
    };
    let parent = target.parent().unwrap_or(Path::new("/"));
    if !fs::metadata(parent)
        .map_err(|e| cannot(parent, e))?
        .is_dir()
    {
        return Err(refuse(asked, "has a parent that is not a directory"));
    }
    access(parent, Access::WRITE_OK | Access::EXEC_OK)
        .map_err(|e| cannot(parent, e.into()))
        .map_err(|e| e.next("give the agent's user the right to write there"))?;
    let places = Places::of(&target);
    for path in [&places.target, &places.tablespaces, &places.config] {
        // What a dead restore left there is marked, and taken away later.
        let marked = path != &places.target && places.work.exists();
        if !marked && !is_absent_or_empty(path).map_err(|e| cannot(path, e))? {
            return Err(refuse(
                path,
                "exists and is not an empty directory; nothing was changed",
            )
            .next("choose another --target-dir, or move what is there away"));
        }
    }
    if let Ok(metadata) = fs::metadata(&target) {
        let above = fs::metadata(parent).map_err(|e| cannot(parent, e))?;
        if metadata.dev() != above.dev() {
            return Err(refuse(
                asked,
                "is a mount point, which cannot be replaced in one step",
            )
            .next("choose a directory inside it"));
        }
    }
    Ok(target)
}

fn check_space(target: &Path, spec: &RestoreSpec, all_wal: u64) -> Result<(), ApiError> {
    let parent = target.parent().unwrap_or(Path::new("/"));
    let free = statvfs(parent).map_err(|error| refuse(parent, io::Error::from(error)))?;
    let free = free.f_bavail.saturating_mul(free.f_frsize);
    let wal = spec
        .node
        .wal_segment_size
        .saturating_mul(SEGMENTS_KEPT)
        .saturating_add(KEPT.min(all_wal));
    let needed = spec
        .node
        .plain_bytes
        .saturating_add(wal)
        .saturating_add(MARGIN);
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
            mib(needed - spec.node.plain_bytes)
        ),
    )
    .next("make room, or choose another --target-dir"))
}

async fn programs(config: &Config, major: u32) -> Result<PathBuf, ApiError> {
    if major < OLDEST_MAJOR {
        return Err(ApiError::new(
            ErrorKind::Incompatible,
            format!(
                "the copy is one of PostgreSQL {major}; {OLDEST_MAJOR} and later can be restored"
            ),
        ));
    }
    let mut found = facts::installed(config).await;
    if let Some(bindir) = found.remove(&major) {
        return Ok(bindir);
    }
    let there = if found.is_empty() {
        "no PostgreSQL was found".to_owned()
    } else {
        let all: Vec<String> = found
            .iter()
            .map(|(major, bindir)| format!("{major} in {}", bindir.display()))
            .collect();
        format!("found: {}", all.join(", "))
    };
    Err(ApiError::new(
        ErrorKind::Incompatible,
        format!("the copy is one of PostgreSQL {major}, which is not installed on this host ({there})"),
    )
    .next(format!(
        "install the server programs of PostgreSQL {major} (Debian: apt-get install postgresql-{major}), or \
         tell the agent where they are: --pg-bindir DIR"
    )))
}
