//! Request and response bodies.

use std::collections::BTreeMap;
use std::fmt;

use catalog::ids::{BackupId, EpochId};
pub use catalog::model::{BackupMode, Engine, Place};
use catalog::model::{NodeBackup, NodePoint, Tablespace, Verdict};
use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use uuid::Uuid;

use crate::error::ApiError;
use crate::pace::Pace;
use crate::repository::RepositoryAccess;
use crate::wal::WalMode;

mod places;

pub use places::*;

/// Version of this API; both sides refuse another one.
pub const API_VERSION: u32 = 1;

/// `GET /v1/health`.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Health {
    /// [`API_VERSION`] of the agent.
    pub api_version: u32,
    /// The agent's version.
    pub version: String,
    /// The agent's clock (UTC).
    pub now: Timestamp,
    /// When the agent started (UTC).
    pub started: Timestamp,
}

/// `GET /v1/node`: the host, and its database if one answers.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct NodeFacts {
    /// Host name.
    pub host: String,
    /// `/etc/machine-id`, or a stable substitute.
    pub machine_id: String,
    /// OS user the agent runs as.
    pub os_user: String,
    /// Where it may restore to.
    pub allow_roots: Vec<String>,
    /// `PGDATA` it was told.
    pub pgdata: Option<String>,
    /// Port it was told the database listens on (or a restored one shall).
    pub pg_port: Option<u16>,
    /// PostgreSQL majors it has programs for, with their directories.
    pub installed: BTreeMap<u32, String>,
    /// Whether it has S3 credentials of its own.
    pub has_credentials: bool,
    /// Whether it was given commands of the host's own to start and to stop the database.
    #[serde(default)]
    pub own_commands: bool,
    /// The database, if it answers.
    pub server: Option<ServerFacts>,
    /// Why it does not.
    pub server_error: Option<ApiError>,
    /// What manages the database beside the agent.
    #[serde(default)]
    pub managers: Vec<Manager>,
    /// The engine `probackup` on this host; `None`: an agent that knows none.
    #[serde(default)]
    pub probackup: Option<ProbackupFacts>,
}

/// What a host has for the engine `probackup`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ProbackupFacts {
    /// Absolute path of `gs_probackup` or `pg_probackup`; `None`: there is none.
    pub program: Option<String>,
    /// Its version, as it says.
    pub version: Option<String>,
    /// How a catalog would be mounted: `root`, `fusermount3` or `namespace`; `None`: not at all.
    pub mount: Option<String>,
    /// Why the engine cannot be used here, and what would help; `None`: it can.
    pub missing: Option<String>,
}

/// What a running database says of itself.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct ServerFacts {
    /// System identifier.
    pub system_identifier: u64,
    /// `server_version_num`.
    pub server_version_num: u32,
    /// Data directory.
    pub data_directory: String,
    /// Port it listens on.
    pub port: u16,
    /// `postgresql` or `opengauss`.
    #[serde(default = "postgresql")]
    pub flavour: String,
    /// WAL segment size in bytes.
    pub wal_segment_size: u64,
    /// Timeline.
    pub timeline: u32,
    /// Whether it is a standby.
    pub in_recovery: bool,
    /// Whether pages carry checksums.
    pub data_checksums: bool,
    /// Sum of all databases' sizes in bytes; 0 if the database did not say within 5 s.
    pub size_bytes: u64,
    /// Tablespaces outside the data directory.
    pub tablespaces: Vec<Tablespace>,
    /// Standbys and other receivers of its WAL that are connected.
    #[serde(default)]
    pub standbys: Vec<Standby>,
}

/// A receiver of a database's WAL, as `pg_stat_replication` has it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Standby {
    /// `application_name`
    pub application: String,
    /// `client_addr`; `None`: over the socket.
    pub address: Option<String>,
    /// `state`
    pub state: String,
}

/// Something that starts or moves the database by itself, and would fight a restore over it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Manager {
    /// `patroni`, `repmgrd`, `systemd`, ...
    pub name: String,
    /// How it was recognised.
    pub evidence: String,
    /// What to do about it before a restore over the running database.
    pub next: String,
}

/// `POST /v1/operations`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct StartOperation {
    /// Chosen by the client: sending the same request again finds the same operation.
    pub operation: Uuid,
    /// The repository.
    pub repository: RepositoryAccess,
    /// What to do.
    pub spec: OperationSpec,
    /// Upload or download limit in bytes a second; `None`: none.
    pub bandwidth: Option<u64>,
}

/// What to do.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "kebab-case")]
pub enum OperationSpec {
    /// Copy this node.
    Backup(BackupSpec),
    /// Make a restore point on this node, in the WAL that its agent ships all the time.
    Point(PointSpec),
    /// Bring a node back on this host.
    Restore(Box<RestoreSpec>),
}

/// Copy this node into the repository. The client has registered node and epoch before.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct BackupSpec {
    /// The backup it becomes a part of.
    pub backup_id: BackupId,
    /// The node's id.
    pub node_id: Uuid,
    /// The node's open epoch.
    pub epoch: EpochId,
    /// Which try of this node it is, from 1.
    pub attempt: u32,
    /// Files read and compressed at the same time.
    pub jobs: u32,
    /// zstd level, 1 to 19.
    pub level: i32,
    /// The operator's label, shown in the database's own view of the backup.
    pub label: Option<String>,
    /// Whether the checkpoint at the start hurries.
    pub fast_checkpoint: bool,
    /// What makes the copy.
    #[serde(default = "direct")]
    pub engine: Engine,
    /// Whether it stands for itself.
    #[serde(default = "full")]
    pub mode: BackupMode,
    /// What an increment builds on: from the FULL to the parent itself. Empty: a FULL.
    #[serde(default)]
    pub chain: Vec<ChainLink>,
    /// What becomes of the node's WAL after it.
    #[serde(default, skip_serializing_if = "WalMode::is_backup")]
    pub wal: WalMode,
    /// Whether the copy leaves the processors to the database.
    #[serde(default, skip_serializing_if = "Pace::is_gentle")]
    pub pace: Pace,
}

/// Make a restore point and see it into the bucket. Nothing is copied: the agent's continuous WAL of this node and epoch has
/// to be running, and the point can be reached from a backup that this WAL joins.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PointSpec {
    /// The node's id.
    pub node_id: Uuid,
    /// The node's open epoch.
    pub epoch: EpochId,
    /// The copy that the point is of, if it was made by an operation that its agent has lost. Then the point lies behind it, and
    /// says of the WAL what that operation would have said.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub copy: Option<CopyMade>,
    /// A restore point on disk, made by an operation that its agent has lost: it is shipped, rather than another one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub marked: Option<MarkResult>,
}

/// A copy that is whole in the bucket, all but its WAL.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CopyMade {
    /// Timeline that it was made on.
    pub timeline: u32,
    /// The first WAL segment that it needs.
    pub wal_first: String,
    /// Its end, `X/X`.
    pub stop_lsn: String,
}

/// One node's copy in another backup, verified by the client against that backup's manifest.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ChainLink {
    /// The backup.
    pub backup_id: BackupId,
    /// The node's part of its manifest.
    pub node: NodeBackup,
}

fn postgresql() -> String {
    "postgresql".into()
}

fn direct() -> Engine {
    Engine::Direct
}

fn full() -> BackupMode {
    BackupMode::Full
}

/// Bring one node's copy back and recover it to a point.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RestoreSpec {
    /// The backup.
    pub backup_id: BackupId,
    /// The node's part of the backup's manifest, verified by the client against the manifest's hash.
    pub node: NodeBackup,
    /// What the copy builds on, from the FULL to its parent; empty: it stands for itself.
    #[serde(default)]
    pub chain: Vec<ChainLink>,
    /// The node's part of the point.
    pub point: NodePoint,
    /// The client's restore, of which this is one node's part: its decision is
    /// `operations/<restore>/decision.json`.
    pub restore: Uuid,
    /// Every node of that restore: all are promoted before any is opened.
    pub nodes: Vec<Uuid>,
    /// Data directory to be: absolute, its parent exists. Tablespaces go to `<target>.tablespaces/<oid>`,
    /// configuration from outside the data directory to `<target>.config/`.
    pub target: String,
    /// What is at the target.
    pub place: Place,
    /// Port of the restored database; `None`: the source's.
    pub port: Option<u16>,
    /// Ranges fetched and decompressed at the same time.
    pub jobs: u32,
    /// Whether an agent that goes forward without its client starts the database in the end. The client's own word
    /// on it comes with `open`.
    #[serde(default = "yes")]
    pub start: bool,
    /// Whether the database at the target may be stopped before the decision where replay would write into one of its
    /// tablespaces. If not, such a restore is refused.
    #[serde(default)]
    pub stop_early: bool,
}

fn yes() -> bool {
    true
}

/// Where an operation stands; of two phases of the same operation the later one is the greater.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Phase {
    /// Checks before anything is changed.
    Preparing,
    /// Backup: files go to the bucket.
    Copying,
    /// Backup: the copy is whole; waits for `mark`.
    Copied,
    /// Point: the node is ready; waits for `mark`.
    Ready,
    /// Backup, point: restore point made; waits for `ship` (or another `mark`).
    Marked,
    /// Backup, point: WAL up to the restore point goes to the bucket.
    Shipping,
    /// Backup, point: all is in the bucket and read back; waits for `release`.
    Shipped,
    /// Restore: files come from the bucket.
    Fetching,
    /// Restore: the database replays WAL, closed to everybody.
    Recovering,
    /// Restore: `pg_control` proves the point; waits for `promote`.
    Proved,
    /// Restore: the database is promoted, still closed, and put in its place.
    Promoting,
    /// Restore: promoted, in its place, closed; waits for `open`, which comes when all nodes are here.
    Promoted,
    /// Restore: the database is started for its clients.
    Opening,
    /// It has ended well.
    Done,
    /// It has ended with an error.
    Failed,
    /// It was cancelled.
    Cancelled,
}

impl Phase {
    /// Its name, as in JSON.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Preparing => "preparing",
            Self::Copying => "copying",
            Self::Copied => "copied",
            Self::Ready => "ready",
            Self::Marked => "marked",
            Self::Shipping => "shipping",
            Self::Shipped => "shipped",
            Self::Fetching => "fetching",
            Self::Recovering => "recovering",
            Self::Proved => "proved",
            Self::Promoting => "promoting",
            Self::Promoted => "promoted",
            Self::Opening => "opening",
            Self::Done => "done",
            Self::Failed => "failed",
            Self::Cancelled => "cancelled",
        }
    }

    /// Whether nothing more will happen.
    #[must_use]
    pub fn is_end(self) -> bool {
        matches!(self, Self::Done | Self::Failed | Self::Cancelled)
    }
}

impl fmt::Display for Phase {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// How far an operation is. All figures only grow.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Progress {
    /// Plain bytes expected in this phase; grows when more is found.
    pub bytes_total: u64,
    /// Plain bytes read (backup) or written (restore).
    pub bytes_done: u64,
    /// Bytes sent to or fetched from the bucket.
    pub stored_bytes: u64,
    /// Files done.
    pub files_done: u64,
    /// WAL segments sent or replayed.
    pub wal_segments: u64,
}

/// An operation as it stands.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct OperationStatus {
    /// Its id.
    pub operation: Uuid,
    /// `backup`, `point` or `restore`.
    pub kind: String,
    /// The backup that it is a part of, or restores.
    #[serde(default)]
    pub backup_id: Option<BackupId>,
    /// Where it stands.
    pub phase: Phase,
    /// When it began (UTC).
    pub started: Timestamp,
    /// When it ended (UTC).
    pub ended: Option<Timestamp>,
    /// How far it is.
    pub progress: Progress,
    /// Things the operator should know.
    pub warnings: Vec<String>,
    /// Why it failed.
    pub error: Option<ApiError>,
    /// Backup, from `shipped` on: the node's part of the manifest. Where the agent ships WAL all the time it is there from `copied` on,
    /// with a last segment that is not the last yet: the copy is worth as much without its operation then.
    pub backup: Option<Box<NodeBackup>>,
    /// Backup, point, from `shipped` on: the node's part of the point.
    pub point: Option<NodePoint>,
    /// Restore, from `promoted` on.
    pub restored: Option<Restored>,
    /// Restore: what the agent knows to be decided.
    #[serde(default)]
    pub decision: Option<Verdict>,
}

/// What `POST .../observe` is to look at.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Look {
    /// Who holds a transaction id.
    Holders,
    /// The transaction snapshot.
    Snapshot,
    /// Who holds a transaction id, and when that is known, the snapshot.
    HoldersThenSnapshot,
}

/// `POST .../observe`.
#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ObserveRequest {
    /// What to look at.
    pub look: Look,
}

/// What was seen of a node's transactions.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Observed {
    /// Who holds a transaction id; `None`: not asked for.
    pub holders: Option<XidHolders>,
    /// `None`: not asked for. Two that are equal, of one session, mean that no transaction with an id ended between them,
    /// unless it already held its id at the first and still does. PostgreSQL: `txid_current_snapshot()`; openGauss: its next id
    /// and its next commit number.
    pub snapshot: Option<String>,
    /// Grows when the agent had to log in again: the server may have been restarted in between.
    pub session: u64,
    /// When it was begun, by the node's clock (UTC).
    pub at: Timestamp,
    /// How long the database took, in microseconds.
    pub took_us: u64,
}

/// Transactions that hold an id.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct XidHolders {
    /// How many there are.
    pub total: u64,
    /// The oldest of them, at most 100, the oldest first.
    pub oldest: Vec<XidHolder>,
}

/// A transaction that holds an id: it has written, or is about to. Its statements are not told.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct XidHolder {
    /// Process that runs it; `None`: it is prepared.
    pub pid: Option<i64>,
    /// `application_name` of its session.
    pub application: Option<String>,
    /// `state` of its session.
    pub state: Option<String>,
    /// Its database.
    pub database: Option<String>,
    /// How long ago it began, or was prepared, in milliseconds; `None`: not known.
    pub age_ms: Option<u64>,
    /// What it is prepared as.
    pub prepared: Option<PreparedAs>,
}

/// A transaction of `PREPARE TRANSACTION` that waits for `COMMIT PREPARED` or `ROLLBACK PREPARED`.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct PreparedAs {
    /// Its global identifier.
    pub gid: String,
    /// Who prepared it.
    pub owner: String,
}

/// `POST .../mark`.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MarkRequest {
    /// Name of the restore point, at most 63 bytes of ASCII.
    pub restore_point: String,
}

/// The restore point that was made.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct MarkResult {
    /// Its name.
    pub restore_point: String,
    /// End of its record, `X/X`.
    pub end_lsn: String,
    /// Timeline.
    pub timeline: u32,
    /// By the node's clock (UTC).
    pub made: Timestamp,
}

/// `POST .../open`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct OpenRequest {
    /// Whether the database is started for its clients, or left shut down in its place.
    pub start: bool,
}

/// A node that was brought back.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Restored {
    /// Its data directory.
    pub data_directory: String,
    /// Minimum recovery point that `pg_control` had when recovery had ended, `X/X`.
    pub recovered_to: String,
    /// Timeline after promotion.
    pub timeline: u32,
    /// Where the new timeline begins, `X/X`.
    pub fork_lsn: String,
    /// Port it listens on.
    pub port: u16,
    /// Whether it is running.
    pub running: bool,
    /// Command that starts it, as argv.
    pub start_command: Vec<String>,
}

/// `POST .../bandwidth`.
#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Bandwidth {
    /// Bytes a second; `None`: no limit.
    pub bytes_per_second: Option<u64>,
}

/// One line of the event stream.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Event {
    /// From 1, growing, per operation. Progress is folded: a gap is progress that was overtaken before
    /// the reader asked.
    pub seq: u64,
    /// By the agent's clock (UTC).
    pub at: Timestamp,
    /// What happened.
    #[serde(flatten)]
    pub what: EventKind,
}

/// What happened.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(tag = "event", rename_all = "kebab-case")]
pub enum EventKind {
    /// It is further.
    Progress {
        /// How far.
        progress: Progress,
    },
    /// It entered a phase.
    Phase {
        /// Which.
        phase: Phase,
    },
    /// Something the operator should know.
    Warning {
        /// What.
        message: String,
    },
    /// It failed; the stream ends after this.
    Error {
        /// Why.
        error: ApiError,
    },
}
