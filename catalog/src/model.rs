//! The bodies of the repository's JSON objects, format version 1 (docs/FORMAT.md).
//!
//! Every struct keeps the fields it does not know in `extra`, so that what an older program passes on
//! loses nothing. Operation records are the exception: they are read and never passed on.

use jiff::Timestamp;
use pipeline::pack::{IndexInfo, PackInfo};
use serde::{Deserialize, Serialize};
use uuid::Uuid;

use crate::ids::{BackupId, EpochId, PointId};
pub use crate::model::lock::LockRecord;
pub use crate::model::metadata::{Metadata, MetadataRef};
pub use crate::model::operation::{
    MetadataAfter, OperationEvent, OperationRecord, Place, PlannedNode, PromotedNode, RestorePlan,
};
pub use crate::model::order::{
    Decision, Holder, Lease, LeaseScope, LeaseState, Pin, Tombstone, Verdict,
};
pub use crate::model::probackup::{
    BackupMode, Engine, External, ParentCopy, Probackup, StreamedWal,
};
pub use crate::model::proof::{InDoubt, Proof};

mod lock;
mod metadata;
mod operation;
mod order;
mod probackup;
mod proof;

/// Fields of a newer minor version, kept as they are.
pub type Extra = serde_json::Map<String, serde_json::Value>;

/// The format this program writes, and the newest `major` it reads.
pub const FORMAT: FormatVersion = FormatVersion { major: 1, minor: 0 };

/// The format of the repository. A reader refuses a newer `major`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct FormatVersion {
    /// Changes when an older reader would go wrong.
    pub major: u32,
    /// Changes when fields are added.
    pub minor: u32,
}

/// `repository.json`: written once.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Repository {
    /// The repository's format.
    pub format: FormatVersion,
    /// Names the repository for ever, whatever its bucket is called.
    pub repository_id: Uuid,
    /// When it was created (UTC).
    pub created: Timestamp,
    /// How object bodies are encrypted; `None`: not at all.
    pub encryption: Option<serde_json::Value>,
    /// Random, so that a lost reply can be told from another's write.
    pub nonce: Uuid,
    /// See [`Extra`].
    #[serde(flatten)]
    pub extra: Extra,
}

/// `nodes/<node-id>.json`: a data node, registered once. Where it lives now stands in its newest epoch.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Node {
    /// The node's name for ever.
    pub node_id: Uuid,
    /// PostgreSQL's system identifier. NOT unique: cloned images share it.
    #[serde(with = "crate::decimal")]
    pub system_identifier: u64,
    /// Host name at registration.
    pub host: String,
    /// Database port at registration.
    pub port: u16,
    /// When it was registered (UTC).
    pub registered: Timestamp,
    /// Random, see [`Repository::nonce`].
    pub nonce: Uuid,
    /// See [`Extra`].
    #[serde(flatten)]
    pub extra: Extra,
}

/// `wal/<node-id>/<epoch>/epoch.json`: one unbroken stretch of a node's life on one machine and timeline
/// ancestry. A restore opens the next one.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Epoch {
    /// The node.
    pub node_id: Uuid,
    /// The epoch's own name.
    pub epoch: EpochId,
    /// The epoch this one continues; `None` for the first.
    pub parent: Option<EpochId>,
    /// Where it left its parent, `X/X`; `None` for the first.
    pub fork_lsn: Option<String>,
    /// Timeline at the opening.
    pub timeline: u32,
    /// `/etc/machine-id` of the host.
    pub machine_id: String,
    /// Absolute path of the data directory.
    pub data_directory: String,
    /// Host name.
    pub host: String,
    /// Database port.
    pub port: u16,
    /// When it was opened (UTC).
    pub opened: Timestamp,
    /// The operation that opened it; `None`: a program that did not note it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub operation: Option<Uuid>,
    /// Random, see [`Repository::nonce`].
    pub nonce: Uuid,
    /// See [`Extra`].
    #[serde(flatten)]
    pub extra: Extra,
}

/// `wal/<node-id>/<epoch>/gap-<from>-<to>.json`: WAL of the epoch that is missing in the bucket, and that nobody has any
/// more. A backup from before it leads to no point behind it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Gap {
    /// The node.
    pub node_id: Uuid,
    /// The epoch.
    pub epoch: EpochId,
    /// Timeline of the WAL behind it.
    pub timeline: u32,
    /// End of the WAL before it, `X/X`.
    pub from: String,
    /// Where WAL goes on, `X/X`.
    pub to: String,
    /// Why, for people.
    pub reason: String,
    /// When it came to be, by the agent's clock (UTC).
    pub at: Timestamp,
    /// Random, see [`Repository::nonce`].
    pub nonce: Uuid,
    /// See [`Extra`].
    #[serde(flatten)]
    pub extra: Extra,
}

/// Whether a manifest is a backup or the fence of a dead one.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum ManifestState {
    /// A backup that restores.
    Complete,
    /// A fence: whoever was writing this backup has lost.
    Abandoned,
}

/// What a point proves.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Consistency {
    /// Each node is consistent in itself; nothing is proved across nodes.
    PerNode,
    /// No transaction is on one node and missing on another.
    Cluster,
}

/// `backups/<backup-id>/manifest.json`: THE commit point of a backup.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Manifest {
    /// Format the backup's objects are written in.
    pub format: FormatVersion,
    /// The backup.
    pub backup_id: BackupId,
    /// Complete, or a fence.
    pub state: ManifestState,
    /// [`BackupMode`] by name.
    pub mode: String,
    /// [`Engine`] by name.
    pub engine: String,
    /// The backup that it builds on; `None`: a FULL. Without it, and all before it, it cannot be restored.
    pub parent: Option<BackupId>,
    /// The operator's words.
    pub label: Option<String>,
    /// What its point proves.
    pub consistency: Consistency,
    /// Why it proves no more, see [`Proof::unproved`].
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub unproved: Option<String>,
    /// The point that belongs to it.
    pub point: Option<PointId>,
    /// When the operator began (UTC).
    pub started: Timestamp,
    /// When all copies and WAL were in the bucket (UTC).
    pub completed: Timestamp,
    /// Operation that wrote it.
    pub operation: Uuid,
    /// Program and version.
    pub writer: String,
    /// The copies, one a node.
    pub nodes: Vec<NodeBackup>,
    /// Random, see [`Repository::nonce`].
    pub nonce: Uuid,
    /// See [`Extra`].
    #[serde(flatten)]
    pub extra: Extra,
}

/// A tablespace outside the data directory.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Tablespace {
    /// The tablespace's OID.
    pub oid: u32,
    /// Absolute path on the source.
    pub location: String,
    /// See [`Extra`].
    #[serde(flatten)]
    pub extra: Extra,
}

/// The copy of one node.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct NodeBackup {
    /// The node.
    pub node_id: Uuid,
    /// Which try of this node it is, from 1; part of the keys.
    pub attempt: u32,
    /// Epoch whose WAL belongs to the copy.
    pub epoch: EpochId,
    /// Host name of the source.
    pub host: String,
    /// Port of the source's database.
    pub port: u16,
    /// PostgreSQL's system identifier.
    #[serde(with = "crate::decimal")]
    pub system_identifier: u64,
    /// `postgresql` or `opengauss`.
    pub flavour: String,
    /// `server_version_num`, such as 150020.
    pub server_version_num: u32,
    /// `pg_control_version`.
    pub control_version: u32,
    /// `catalog_version_no`, part of tablespace directory names.
    pub catalog_version: u32,
    /// WAL segment size in bytes.
    pub wal_segment_size: u64,
    /// Whether data pages carry checksums.
    pub data_checksums: bool,
    /// Timeline of the copy.
    pub timeline: u32,
    /// Start of the backup, `X/X`: replay begins at the checkpoint named in `backup_label`.
    pub start_lsn: String,
    /// End of the backup, `X/X`: consistent from here on.
    pub stop_lsn: String,
    /// When the copy began (UTC).
    pub started: Timestamp,
    /// When it ended (UTC).
    pub completed: Timestamp,
    /// Absolute path of the source's data directory.
    pub data_directory: String,
    /// Tablespaces outside the data directory.
    pub tablespaces: Vec<Tablespace>,
    /// `backup_label` as the server gave it.
    pub backup_label: String,
    /// `tablespace_map` as the server gave it, if there are tablespaces.
    pub tablespace_map: Option<String>,
    /// Settings the server was started with (its `postmaster.opts`), without the program.
    pub argv: Vec<String>,
    /// Configuration files outside the data directory that travel as index entries.
    pub attachments: Vec<Attachment>,
    /// First WAL segment that the copy needs (file name).
    pub wal_first: String,
    /// Last WAL segment in the bucket for it (file name).
    pub wal_last: String,
    /// Sizes and digests of the pack objects, by number.
    pub packs: Vec<PackInfo>,
    /// Size and digest of the index object.
    pub index: IndexInfo,
    /// Files in the copy.
    pub files: u64,
    /// Bytes read from the node.
    pub plain_bytes: u64,
    /// Bytes in packs and index.
    pub stored_bytes: u64,
    /// Pages whose checksum was wrong on the source, `path block`; the copy has them as they are.
    pub corrupt_pages: Vec<String>,
    /// What the index holds if it is the catalog of a `gs_probackup`; `None`: the data directory's own files.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub probackup: Option<Probackup>,
    /// See [`Extra`].
    #[serde(flatten)]
    pub extra: Extra,
}

/// A configuration file from outside the data directory.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Attachment {
    /// Its path in the index, below `attachments/`.
    pub path: String,
    /// Absolute path on the source.
    pub source: String,
    /// What it is.
    pub role: AttachmentRole,
    /// See [`Extra`].
    #[serde(flatten)]
    pub extra: Extra,
}

/// What a configuration file is to the server.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum AttachmentRole {
    /// `config_file`
    Config,
    /// `hba_file`
    Hba,
    /// `ident_file`
    Ident,
    /// Included by one of the others.
    Included,
}

/// `points/<point-id>.json`: one moment on every node, to recover to.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Point {
    /// Format of the object.
    pub format: FormatVersion,
    /// The point.
    pub point_id: PointId,
    /// When it was made (UTC).
    pub created: Timestamp,
    /// What it proves.
    pub consistency: Consistency,
    /// The cluster's commit sequence number, where there is one.
    pub csn: Option<String>,
    /// How long the cluster was locked, in milliseconds.
    pub lock_ms: u64,
    /// What was done to prove it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub proof: Option<Proof>,
    /// How the cluster was held still for it, if that was asked of a proxy.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub lock: Option<LockRecord>,
    /// The proxies' metadata at it; `None`: there were no proxies, or it could not be had.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub metadata: Option<MetadataRef>,
    /// The operator's words.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub label: Option<String>,
    /// Of a point that was made without a backup: the backup that it could be reached from then. `None`: it was made as a
    /// backup's own.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub base: Option<BackupId>,
    /// Operation that made it.
    pub operation: Uuid,
    /// One entry a node.
    pub nodes: Vec<NodePoint>,
    /// Random, see [`Repository::nonce`].
    pub nonce: Uuid,
    /// See [`Extra`].
    #[serde(flatten)]
    pub extra: Extra,
}

impl Point {
    /// When the last of its restore points was made, by the nodes' clocks (UTC): what is in it was committed by then.
    #[must_use]
    pub fn made(&self) -> Timestamp {
        let made = self.nodes.iter().map(|node| node.made);
        made.max().unwrap_or(self.created)
    }
}

/// The point on one node: a restore point record in its WAL.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct NodePoint {
    /// The node.
    pub node_id: Uuid,
    /// Epoch whose WAL holds the record.
    pub epoch: EpochId,
    /// Timeline of the record.
    pub timeline: u32,
    /// Name of the restore point.
    pub restore_point: String,
    /// Start of the record, `X/X`.
    pub record_lsn: String,
    /// End of the record, `X/X`: what `pg_create_restore_point` returns.
    pub end_lsn: String,
    /// When it was made, by the node's clock (UTC).
    pub made: Timestamp,
    /// First WAL segment that the bucket holds of this copy or stretch.
    pub wal_first: String,
    /// Segment that holds the end of the record.
    pub wal_last: String,
    /// See [`Extra`].
    #[serde(flatten)]
    pub extra: Extra,
}

/// What a log entry records.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum LogAction {
    /// The repository was created (entry 1).
    RepositoryCreated,
    /// A node was registered.
    NodeRegistered,
    /// An epoch was opened.
    EpochOpened,
    /// A point was written.
    PointCreated,
    /// A point is removed, because no backup leads to it any more.
    PointRemoved,
    /// A manifest was written.
    BackupCommitted,
    /// The manifest of a dead backup was written as a fence.
    BackupAbandoned,
    /// A backup was deleted.
    BackupDeleted,
    /// It was written down that WAL is missing for good.
    GapDeclared,
    /// What says so is removed, because no WAL before it is left.
    GapRemoved,
    /// What a newer minor version calls an action that this one does not know.
    #[serde(untagged)]
    Other(String),
}

/// `log/<seq>.json`: what was committed and removed, each entry naming the one before.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct LogEntry {
    /// From 1, without a gap; ten digits in the key.
    pub seq: u64,
    /// SHA-256 (hex) of the stored bytes of entry `seq - 1`; `None` for the first.
    pub previous: Option<String>,
    /// When (UTC).
    pub at: Timestamp,
    /// What happened.
    pub action: LogAction,
    /// Key of the object it happened to.
    pub object: String,
    /// SHA-256 (hex) of that object's stored bytes.
    pub object_sha256: String,
    /// Operation that did it.
    pub operation: Uuid,
    /// Random, see [`Repository::nonce`].
    pub nonce: Uuid,
    /// See [`Extra`].
    #[serde(flatten)]
    pub extra: Extra,
}
