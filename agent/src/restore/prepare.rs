//! The copy from the bucket into the workspace, made ready for recovery.

use std::collections::BTreeSet;
use std::fs::{self, File, OpenOptions, Permissions};
use std::io::{self, Write as _};
use std::os::unix::fs::{OpenOptionsExt as _, PermissionsExt as _, symlink};
use std::path::{Component, Path, PathBuf};

use agent_api::{ApiError, ErrorKind, RestoreSpec};
use pipeline::pack::{EntryKind, IndexEntry};

use super::attached::{self, ATTACHMENTS, Attached};
use super::errors::local;
use super::files::sync;
use super::journal::Places;
use super::recoverer::Recoverer;
use super::target::Plan;
use super::{prove, tablespaces};

/// Says where entries of the index go.
#[derive(Debug, Clone)]
pub(super) struct Placer {
    data: PathBuf,
    tablespaces: PathBuf,
    config: PathBuf,
    oids: BTreeSet<u32>,
    recoverer: Recoverer,
}

impl Placer {
    pub(super) fn new(places: &Places, spec: &RestoreSpec, recoverer: Recoverer) -> Self {
        Self {
            data: places.data.clone(),
            tablespaces: places.tablespaces.clone(),
            config: places.config.clone(),
            oids: spec.node.tablespaces.iter().map(|it| it.oid).collect(),
            recoverer,
        }
    }

    /// Where `entry` goes; `None`: nowhere.
    ///
    /// # Errors
    /// Why an entry like this must not be restored.
    pub(super) fn place(&self, entry: &IndexEntry) -> Result<Option<PathBuf>, String> {
        let path = Path::new(&entry.path);
        if !path
            .components()
            .all(|part| matches!(part, Component::Normal(_)))
        {
            return Err(format!("`{}` is not a relative path", entry.path));
        }
        if let EntryKind::Symlink { target } = &entry.kind {
            stays_inside(path, target)?;
            // Its content is never copied, so a link to it would have nothing to lead to.
            if entry.path == self.recoverer.wal_directory() {
                return Ok(None);
            }
        }
        if self.recoverer.never().contains(&entry.path.as_str()) {
            return Ok(None);
        }
        if let Ok(below) = path.strip_prefix(ATTACHMENTS) {
            return Ok((below != Path::new("")).then(|| self.config.join(below)));
        }
        if let Ok(below) = path.strip_prefix("pg_tblspc") {
            let mut parts = below.components();
            let first = parts
                .next()
                .map(|part| part.as_os_str().to_string_lossy().parse());
            if let Some(Ok(oid)) = first
                && self.oids.contains(&oid)
            {
                return Ok(Some(
                    tablespaces::location(&self.tablespaces, oid).join(parts),
                ));
            }
        }
        Ok(Some(self.data.join(path)))
    }
}

/// A link of a copy leads to another place of the copy, never to the host's.
fn stays_inside(path: &Path, target: &str) -> Result<(), String> {
    let mut depth = path.components().count().saturating_sub(1);
    for part in Path::new(target).components() {
        match part {
            Component::Normal(_) => depth += 1,
            Component::CurDir => {}
            Component::ParentDir if depth > 0 => depth -= 1,
            _ => {
                return Err(format!(
                    "the link `{}` leads out, to `{target}`",
                    path.display()
                ));
            }
        }
    }
    Ok(())
}

/// Makes the directories that extraction needs beside the data directory's own.
pub(super) fn make_room(places: &Places, spec: &RestoreSpec) -> Result<(), ApiError> {
    for attachment in &spec.node.attachments {
        let path = attached::location(&places.config, &attachment.path)?;
        let directory = path.parent().unwrap_or(&places.config);
        fs::create_dir_all(directory).map_err(|error| local(directory, &error))?;
    }
    Ok(())
}

/// Makes an extracted copy ready for recovery. Returns its configuration files and warnings.
pub(super) fn finish(
    places: &Places,
    plan: &Plan,
    spec: &RestoreSpec,
) -> Result<(Attached, Vec<String>), ApiError> {
    let data = &places.data;
    let version_file = data.join("PG_VERSION");
    let version = fs::read_to_string(&version_file).map_err(|e| local(&version_file, &e))?;
    let expected = plan.recoverer.version();
    if version.trim() != expected {
        let message = format!(
            "PG_VERSION of the copy says {}, the manifest {expected}",
            version.trim()
        );
        return Err(ApiError::new(ErrorKind::Damaged, message));
    }
    let control = prove::read_control(data).map_err(|error| {
        ApiError::new(
            ErrorKind::Damaged,
            format!("the copy's pg_control: {error}"),
        )
    })?;
    prove::check_copy(&control, spec)?;
    check_label(spec, plan.recoverer)?;
    let map = tablespaces::rewritten_map(&spec.node, &places.tablespaces)?;
    let (attached, warnings) = attached::settle(&spec.node, &places.config, data)?;
    furnish(places, spec, plan.recoverer, map.as_deref()).map_err(|error| local(data, &error))?;
    Ok((attached, warnings))
}

/// The label says where replay begins, so it must be that of this copy.
fn check_label(spec: &RestoreSpec, recoverer: Recoverer) -> Result<(), ApiError> {
    let node = &spec.node;
    let start = format!("START WAL LOCATION: {} ", node.start_lsn);
    let timeline = format!("START TIMELINE: {}", node.timeline);
    let label = &node.backup_label;
    // openGauss's label, as old as 9.2, has the timeline only in the name of the first segment.
    let on_timeline = match recoverer {
        Recoverer::PostgreSql(_) => label.lines().any(|line| line == timeline),
        Recoverer::OpenGauss => label.contains(&format!("(file {:08X}", node.timeline)),
    };
    if label.starts_with(&start) && on_timeline {
        return Ok(());
    }
    let message = format!(
        "backup_label of node {} is not that of a copy begun at {} on timeline {}",
        node.node_id, node.start_lsn, node.timeline
    );
    Err(ApiError::new(ErrorKind::Damaged, message))
}

fn furnish(
    places: &Places,
    spec: &RestoreSpec,
    recoverer: Recoverer,
    map: Option<&str>,
) -> io::Result<()> {
    let data = &places.data;
    // A cluster with group access (initdb -g) keeps it.
    let group = fs::metadata(data.join("global"))?.permissions().mode() & 0o050 != 0;
    let (directories, files) = if group {
        (0o750, 0o640)
    } else {
        (0o700, 0o600)
    };
    for name in recoverer.directories() {
        let path = data.join(name);
        match fs::create_dir(&path) {
            Err(e) if e.kind() != io::ErrorKind::AlreadyExists => return Err(e),
            _ => fs::set_permissions(&path, Permissions::from_mode(directories))?,
        }
        sync(&path)?;
    }
    for tablespace in &spec.node.tablespaces {
        let link = data.join("pg_tblspc").join(tablespace.oid.to_string());
        symlink(
            tablespaces::location(&places.tablespaces, tablespace.oid),
            link,
        )?;
    }
    sync(&data.join("pg_tblspc"))?;
    sync(&data.join(recoverer.wal_directory()))?;
    for name in recoverer.never() {
        super::files::remove_file(&data.join(name))?;
    }
    write_synced(&data.join("backup_label"), &spec.node.backup_label, files)?;
    if let Some(map) = map {
        write_synced(&data.join("tablespace_map"), map, files)?;
    }
    if let Some(signal) = recoverer.signal() {
        write_synced(&data.join(signal), "", files)?;
    }
    fs::set_permissions(data, Permissions::from_mode(directories))?;
    File::open(data)?.sync_all()
}

/// Takes away the copy of a tablespace that replay has made anew at another place: a backup that began
/// while it was created has it, and nothing leads there any more.
pub(super) fn drop_replaced(places: &Places, spec: &RestoreSpec) -> io::Result<()> {
    for tablespace in &spec.node.tablespaces {
        let ours = tablespaces::location(&places.tablespaces, tablespace.oid);
        let link = places
            .data
            .join("pg_tblspc")
            .join(tablespace.oid.to_string());
        if fs::read_link(&link).is_ok_and(|to| to != ours) {
            fs::remove_dir_all(&ours)?;
        }
    }
    Ok(())
}

fn write_synced(path: &Path, text: &str, mode: u32) -> io::Result<()> {
    let mut options = OpenOptions::new();
    let mut file = options.create_new(true).write(true).mode(mode).open(path)?;
    file.write_all(text.as_bytes())?;
    file.sync_all()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(path: &str, link: Option<&str>) -> IndexEntry {
        IndexEntry {
            path: path.to_owned(),
            mode: 0o600,
            mtime: None,
            kind: match link {
                Some(target) => EntryKind::Symlink {
                    target: target.to_owned(),
                },
                None => EntryKind::Directory,
            },
        }
    }

    #[test]
    fn every_entry_has_its_place() {
        let placer = Placer {
            data: "/w/data".into(),
            tablespaces: "/r/n.tablespaces".into(),
            config: "/r/n.config".into(),
            oids: BTreeSet::from([16385]),
            recoverer: Recoverer::PostgreSql(15),
        };
        for (path, place) in [
            ("base/5/1259", Some("/w/data/base/5/1259")),
            ("pg_tblspc", Some("/w/data/pg_tblspc")),
            ("pg_tblspc/16385", Some("/r/n.tablespaces/16385")),
            (
                "pg_tblspc/16385/PG_15_1/5/1",
                Some("/r/n.tablespaces/16385/PG_15_1/5/1"),
            ),
            (
                "pg_tblspc/16399/PG_15_1",
                Some("/w/data/pg_tblspc/16399/PG_15_1"),
            ),
            ("attachments/etc/a.conf", Some("/r/n.config/etc/a.conf")),
            ("attachments", None),
            ("recovery.signal", None),
        ] {
            assert_eq!(
                placer.place(&entry(path, None)).unwrap(),
                place.map(PathBuf::from),
                "{path}"
            );
        }
        assert!(placer.place(&entry("../x", None)).is_err());
        assert_eq!(placer.place(&entry("pg_wal", Some("x"))), Ok(None));
        assert!(placer.place(&entry("a/b", Some("../c"))).unwrap().is_some());
        assert!(placer.place(&entry("a/b", Some("../../c"))).is_err());
        assert!(placer.place(&entry("log", Some("/var/log"))).is_err());
    }
}
