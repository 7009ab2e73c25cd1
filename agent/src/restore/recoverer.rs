//! Whose database is restored: names and ways of PostgreSQL and openGauss, each in one place.
//!
//! | | PostgreSQL | openGauss |
//! |---|---|---|
//! | recovery ends | after the point's record, on a new timeline when promoted | before it, on the same timeline: the first new record takes its place |
//! | and is proved by | a shutdown at the target | a pause there, then a shutdown |
//! | told by | argv, `recovery.signal` | `recovery.conf` |
//!
//! Sources for openGauss: `src/gausskernel/storage/access/transam/xlog.cpp` (`readRecoveryCommandFile`, `recoveryStopsHere`,
//! `recoveryPausesHere`), `src/bin/initdb/initdb.cpp` of release 5.0.0, and a running 5.0.0.

use std::fmt;
use std::path::Path;

use agent_api::{ApiError, ErrorKind, RestoreSpec};
use agent_wal::control::{ControlFile, DbState};
use agent_wal::{BLOCK_SIZE, Lsn, SegmentSize};
use catalog::model::NodeBackup;

/// What manifests call openGauss.
const OPENGAUSS: &str = "opengauss";
/// What they call PostgreSQL.
const POSTGRESQL: &str = "postgresql";
/// Oldest major of PostgreSQL that has `recovery.signal`.
const OLDEST_MAJOR: u32 = 12;
/// The major version that every openGauss says it has (9.2.4).
const OPENGAUSS_MAJOR: u32 = 9;
/// `PG_MAJORVERSION` of openGauss.
const OPENGAUSS_VERSION: &str = "9.2";
/// Bytes of the headers of a WAL page, and of the first one of a segment.
const PAGE_HEADER: u64 = 24;
const SEGMENT_HEADER: u64 = 40;

/// Directories that every PostgreSQL expects: the copy has those with content, and empty ones where it skipped it.
const POSTGRESQL_DIRECTORIES: [&str; 17] = [
    "pg_wal",
    "pg_wal/archive_status",
    "pg_commit_ts",
    "pg_dynshmem",
    "pg_logical",
    "pg_logical/mappings",
    "pg_logical/snapshots",
    "pg_multixact",
    "pg_notify",
    "pg_replslot",
    "pg_serial",
    "pg_snapshots",
    "pg_stat",
    "pg_stat_tmp",
    "pg_subtrans",
    "pg_tblspc",
    "pg_twophase",
];

/// The same of openGauss (`subdirs` of `gs_initdb`).
const OPENGAUSS_DIRECTORIES: [&str; 18] = [
    "pg_xlog",
    "pg_xlog/archive_status",
    "pg_clog",
    "pg_csnlog",
    "pg_errorinfo",
    "pg_llog",
    "pg_llog/mappings",
    "pg_llog/snapshots",
    "pg_logical",
    "pg_multixact",
    "pg_notify",
    "pg_replslot",
    "pg_serial",
    "pg_snapshots",
    "pg_stat_tmp",
    "pg_tblspc",
    "pg_twophase",
    "undo",
];

/// Files that a restore makes itself, or that must not be there; never taken from a copy.
const POSTGRESQL_NEVER: [&str; 7] = [
    "backup_label",
    "tablespace_map",
    "postmaster.pid",
    "postmaster.opts",
    "recovery.signal",
    "standby.signal",
    "backup_manifest",
];

const OPENGAUSS_NEVER: [&str; 8] = [
    "backup_label",
    "tablespace_map",
    "postmaster.pid",
    "postmaster.opts",
    "recovery.conf",
    "recovery.done",
    "probackup_recovery.conf",
    "redo.state",
];

/// What recovery leaves behind. `postmaster.opts` has our private command line; the server writes its own at each start.
const POSTGRESQL_LEFT: [&str; 5] = [
    "recovery.signal",
    "standby.signal",
    "backup_label.old",
    "tablespace_map.old",
    "postmaster.opts",
];

const OPENGAUSS_LEFT: [&str; 5] = [
    "recovery.conf",
    "recovery.done",
    "backup_label.old",
    "tablespace_map.old",
    "postmaster.opts",
];

/// A database server that can be restored.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Recoverer {
    /// PostgreSQL of a major version, 12 or later.
    PostgreSql(u32),
    /// openGauss.
    OpenGauss,
}

impl fmt::Display for Recoverer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::PostgreSql(major) => write!(f, "PostgreSQL {major}"),
            Self::OpenGauss => f.write_str("openGauss"),
        }
    }
}

impl Recoverer {
    /// The server that a copy is one of.
    ///
    /// # Errors
    /// [`ErrorKind::Incompatible`] for one that cannot be restored.
    pub(super) fn of(node: &NodeBackup) -> Result<Self, ApiError> {
        let major = node.server_version_num / 10_000;
        match node.flavour.as_str() {
            OPENGAUSS => Ok(Self::OpenGauss),
            POSTGRESQL if major >= OLDEST_MAJOR => Ok(Self::PostgreSql(major)),
            POSTGRESQL => Err(ApiError::new(
                ErrorKind::Incompatible,
                format!(
                    "the copy is one of PostgreSQL {major}; {OLDEST_MAJOR} and later can be restored"
                ),
            )),
            other => Err(ApiError::new(
                ErrorKind::Incompatible,
                format!("the copy is one of `{other}`, which this version does not know"),
            )
            .next("restore with the version of gs_pitr that made it, or a later one")),
        }
    }

    /// The server that a major version is one of.
    pub(super) fn of_major(major: u32) -> Self {
        match major {
            OPENGAUSS_MAJOR => Self::OpenGauss,
            major => Self::PostgreSql(major),
        }
    }

    /// The server whose `PG_VERSION` this is.
    pub(super) fn of_version_file(text: &str) -> Option<Self> {
        match text.trim() {
            OPENGAUSS_VERSION => Some(Self::OpenGauss),
            major => major.parse().ok().map(Self::PostgreSql),
        }
    }

    /// Major version, as facts have it.
    pub(super) fn major(self) -> u32 {
        match self {
            Self::PostgreSql(major) => major,
            Self::OpenGauss => OPENGAUSS_MAJOR,
        }
    }

    /// What `PG_VERSION` says, and names of a tablespace's directories begin with.
    pub(super) fn version(self) -> String {
        match self {
            Self::PostgreSql(major) => major.to_string(),
            Self::OpenGauss => OPENGAUSS_VERSION.to_owned(),
        }
    }

    /// Name of this server's directory in a tablespace. That of openGauss ends in the node's name.
    pub(super) fn version_directory(self, catalog_version: u32, node_name: Option<&str>) -> String {
        let version = self.version();
        match node_name {
            Some(name) if self == Self::OpenGauss => {
                format!("PG_{version}_{catalog_version}_{name}")
            }
            _ => format!("PG_{version}_{catalog_version}"),
        }
    }

    /// The server's program.
    pub(super) fn server(self) -> &'static str {
        match self {
            Self::PostgreSql(_) => "postgres",
            Self::OpenGauss => "gaussdb",
        }
    }

    /// The program that starts and stops it.
    pub(super) fn control_program(self) -> &'static str {
        match self {
            Self::PostgreSql(_) => "pg_ctl",
            Self::OpenGauss => "gs_ctl",
        }
    }

    /// The directory of its log.
    pub(super) fn wal_directory(self) -> &'static str {
        match self {
            Self::PostgreSql(_) => "pg_wal",
            Self::OpenGauss => "pg_xlog",
        }
    }

    /// Name of its setting for the directories of its socket.
    pub(super) fn socket_setting(self) -> &'static str {
        match self {
            Self::PostgreSql(_) => "unix_socket_directories",
            Self::OpenGauss => "unix_socket_directory",
        }
    }

    /// Directories that it expects in a data directory.
    pub(super) fn directories(self) -> &'static [&'static str] {
        match self {
            Self::PostgreSql(_) => &POSTGRESQL_DIRECTORIES,
            Self::OpenGauss => &OPENGAUSS_DIRECTORIES,
        }
    }

    /// Files that are never taken from a copy.
    pub(super) fn never(self) -> &'static [&'static str] {
        match self {
            Self::PostgreSql(_) => &POSTGRESQL_NEVER,
            Self::OpenGauss => &OPENGAUSS_NEVER,
        }
    }

    /// Files that a recovery leaves in the data directory.
    pub(super) fn left_behind(self) -> &'static [&'static str] {
        match self {
            Self::PostgreSql(_) => &POSTGRESQL_LEFT,
            Self::OpenGauss => &OPENGAUSS_LEFT,
        }
    }

    /// The file that makes it recover from the archive at its next start, if it is to be there before its settings are
    /// known. openGauss's has the settings in it, and is written before each start.
    pub(super) fn signal(self) -> Option<&'static str> {
        match self {
            Self::PostgreSql(_) => Some("recovery.signal"),
            Self::OpenGauss => None,
        }
    }

    /// Who comes in while it recovers: nobody on PostgreSQL. openGauss has to be asked whether it pauses: the agent's own
    /// user, by the private socket only; there that user is the initial one, who needs no password.
    pub(super) fn private_hba(self, os_user: &str) -> String {
        match self {
            Self::PostgreSql(_) => "local all all reject\n".to_owned(),
            Self::OpenGauss => format!(
                "local all \"{os_user}\" trust\nlocal all all reject\nhost all all 0.0.0.0/0 reject\nhost all all ::0/0 \
                 reject\n"
            ),
        }
    }

    /// Where recovery to a point ends, and the restored database goes on: at the end of the point's record, or at
    /// its start.
    ///
    /// # Errors
    /// [`ErrorKind::Damaged`] if the point's positions are none.
    pub(super) fn fork(self, spec: &RestoreSpec, end: Lsn) -> Result<Lsn, ApiError> {
        if let Self::PostgreSql(_) = self {
            return Ok(end);
        }
        let point = &spec.point;
        let record = point.record_lsn.parse::<Lsn>();
        record.ok().filter(|record| *record < end).ok_or_else(|| {
            let message = format!(
                "the record of point `{}` begins at `{}` and ends at {end}",
                point.restore_point, point.record_lsn
            );
            ApiError::new(ErrorKind::Damaged, message)
        })
    }

    /// Whether a recovery that was shut down stands exactly at `fork`.
    pub(super) fn stands_at(
        self,
        control: &ControlFile,
        fork: Lsn,
        timeline: u32,
        size: SegmentSize,
    ) -> bool {
        let reached = control.min_recovery_point;
        let right = match self {
            Self::PostgreSql(_) => reached == fork && control.min_recovery_timeline == timeline,
            // The end of the record before it: that is the page's beginning if it is the first on its page.
            Self::OpenGauss => reached == fork || reached == before_header(fork, size),
        };
        right && control.state == DbState::ShutDownInRecovery && control.timeline == timeline
    }

    /// Whether a server has ended its recovery from `timeline`, and is open.
    pub(super) fn is_open(self, control: &ControlFile, timeline: u32) -> bool {
        let goes_on = match self {
            Self::PostgreSql(_) => control.timeline > timeline,
            Self::OpenGauss => control.timeline == timeline,
        };
        control.state == DbState::InProduction && goes_on
    }

    /// Whether a copy that was proved, and perhaps tried to be promoted, can be promoted as it is.
    pub(super) fn may_be_promoted(self, data: &Path, control: &ControlFile, timeline: u32) -> bool {
        match self {
            Self::PostgreSql(_) => {
                data.join("recovery.signal").exists() && control.timeline == timeline
            }
            // A promotion may have overwritten the point's record before it was cut off: only what stands as it was
            // proved is taken up.
            Self::OpenGauss => control.state == DbState::ShutDownInRecovery,
        }
    }
}

/// The end of the last record before one that begins at `start`.
fn before_header(start: Lsn, size: SegmentSize) -> Lsn {
    let page = Lsn(start.0 - start.0 % BLOCK_SIZE as u64);
    let header = if page.0.is_multiple_of(size.bytes()) {
        SEGMENT_HEADER
    } else {
        PAGE_HEADER
    };
    if start.bytes_since(page) == header {
        page
    } else {
        start
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_record_at_the_beginning_of_a_page_follows_its_header() {
        let size = SegmentSize::DEFAULT;
        for (start, before) in [
            ("0/1308FB68", "0/1308FB68"),
            ("0/1308E018", "0/1308E000"),
            ("0/13000028", "0/13000000"),
            ("0/13000018", "0/13000018"),
            ("0/1308E028", "0/1308E028"),
        ] {
            let start: Lsn = start.parse().unwrap();
            assert_eq!(before_header(start, size).to_string(), before);
        }
    }

    #[test]
    fn the_version_file_tells_which_server_it_is() {
        assert_eq!(
            Recoverer::of_version_file("15\n"),
            Some(Recoverer::PostgreSql(15))
        );
        assert_eq!(
            Recoverer::of_version_file("9.2\n"),
            Some(Recoverer::OpenGauss)
        );
        assert_eq!(Recoverer::of_version_file("9.6\n"), None);
        for recoverer in [Recoverer::PostgreSql(12), Recoverer::OpenGauss] {
            let text = recoverer.version();
            assert_eq!(Recoverer::of_version_file(&text), Some(recoverer));
            assert_eq!(Recoverer::of_major(recoverer.major()), recoverer);
        }
        let name = Recoverer::OpenGauss.version_directory(201_611_171, Some("node1"));
        assert_eq!(name, "PG_9.2_201611171_node1");
        let name = Recoverer::PostgreSql(15).version_directory(202_209_061, None);
        assert_eq!(name, "PG_15_202209061");
    }
}
