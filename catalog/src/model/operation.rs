//! The journal of an operation.

use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use uuid::Uuid;

use super::Consistency;
use super::order::Holder;
use crate::ids::{BackupId, EpochId, PointId};

/// `operations/<operation-id>/<seq>.json`: what ran and which uploads it may have begun.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct OperationRecord {
    /// The operation.
    pub operation: Uuid,
    /// From 1; six digits in the key.
    pub seq: u64,
    /// When (UTC).
    pub at: Timestamp,
    /// What.
    #[serde(flatten)]
    pub event: OperationEvent,
    /// Random, see [`Repository::nonce`](super::Repository::nonce).
    pub nonce: Uuid,
}

/// What an operation journals.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(tag = "event", rename_all = "kebab-case")]
pub enum OperationEvent {
    /// It began.
    Started {
        /// `backup`, `restore`, ...
        kind: String,
        /// The backup concerned.
        backup_id: Option<BackupId>,
        /// The node concerned, if it is one agent's part.
        node_id: Option<Uuid>,
        /// Head of the log when it began: sequence number and SHA-256 (hex).
        log_head: Option<(u64, String)>,
        /// Who runs it, where that is known.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        by: Option<Holder>,
    },
    /// Multipart uploads of these keys may exist from now on.
    UploadsIntended {
        /// Keys relative to the prefix.
        keys: Vec<String>,
    },
    /// What a restore will do, written before any agent begins: whoever resumes it needs nothing else.
    RestorePlanned(RestorePlan),
    /// A node of a restore is promoted and stands in its place; it is opened when all are.
    NodePromoted(PromotedNode),
    /// A node of a restore is lost for good: its operator has said so, and the others are opened without it.
    NodeGivenUp {
        /// The node of the backup.
        node_id: Uuid,
    },
    /// From now on it may hold the lock of the sharding cluster. Written before `LOCK CLUSTER` is sent for the first time.
    LockIntended {
        /// The proxies of the cluster, `host:port`.
        proxies: Vec<String>,
    },
    /// It holds no lock of the cluster any more, and takes none again unless it says so first.
    LockEnded {
        /// How often `LOCK CLUSTER` was sent.
        tries: u32,
        /// For how long writes were refused, or may have been, in milliseconds.
        held_ms: u64,
        /// Whether writes have been seen to pass since, through every proxy that could be reached.
        open: bool,
    },
    /// Logical databases of the proxies are about to be dropped and imported.
    MetadataReplaced {
        /// Their names.
        databases: Vec<String>,
        /// What the proxies knew before, all of it, as [`super::Metadata::document`] has it: without secrets.
        document: String,
    },
    /// It ended; `error` says why if it failed.
    Ended {
        /// The error's words.
        error: Option<String>,
    },
    /// An event that only a newer minor version knows.
    #[serde(other)]
    Unknown,
}

/// A node that a restore has promoted: what its new epoch is made of.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PromotedNode {
    /// The node.
    pub node_id: Uuid,
    /// Timeline after promotion.
    pub timeline: u32,
    /// Where the new timeline begins, `X/X`.
    pub fork_lsn: String,
    /// `/etc/machine-id` of the host.
    pub machine_id: String,
    /// Absolute path of the data directory.
    pub data_directory: String,
    /// Host name.
    pub host: String,
    /// Database port.
    pub port: u16,
}

/// What a restore finds at its target, and what becomes of that.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "place", rename_all = "kebab-case")]
pub enum Place {
    /// Nothing, or an empty directory.
    Fresh,
    /// The data directory of this database, running or not. It stays as it is until the decision, then it is
    /// stopped and moved aside whole.
    Replace {
        /// Its system identifier: any other database is refused.
        #[serde(with = "crate::decimal")]
        system_identifier: u64,
    },
    /// As `Replace`, but it is stopped and removed first, for want of room. There is no way back.
    InPlace {
        /// Its system identifier: any other database is refused.
        #[serde(with = "crate::decimal")]
        system_identifier: u64,
    },
}

/// The plan of a restore.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct RestorePlan {
    /// The backup that is restored.
    pub backup_id: BackupId,
    /// The point that its nodes are recovered to.
    pub point_id: PointId,
    /// What that point proves.
    pub consistency: Consistency,
    /// Whether the databases are started in the end.
    pub start: bool,
    /// Whether what was at the targets is removed when all nodes are open.
    pub discard_old: bool,
    /// Whether the restored databases are new nodes, and no continuation of those of the backup.
    pub clone: bool,
    /// What becomes of the proxies' metadata when all nodes are open. Older plans do not say.
    #[serde(default)]
    pub metadata: MetadataAfter,
    /// Every node of the restore.
    pub nodes: Vec<PlannedNode>,
}

/// What a restore does about the proxies' metadata when all nodes are open.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum MetadataAfter {
    /// Nothing: the databases are none of the cluster's, or are left stopped.
    #[default]
    Leave,
    /// They are held against those that were kept with the point, and what differs is told.
    Compare,
    /// Databases that differ are imported as they were at the point, too.
    Import,
}

/// One node of a restore's plan.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct PlannedNode {
    /// The node of the backup.
    pub node_id: Uuid,
    /// The node that it becomes: the same, or of a clone a new one, registered when it is promoted.
    pub becomes: Uuid,
    /// The node's epoch that the point lies in.
    pub epoch: EpochId,
    /// Address of its agent, `HOST:PORT`.
    pub agent: String,
    /// Name of the agent's host.
    pub host: String,
    /// `/etc/machine-id` of the agent's host.
    pub machine_id: String,
    /// The agent's own operation.
    pub operation: Uuid,
    /// Absolute path of the data directory to be.
    pub target: String,
    /// What is at the target.
    pub place: Place,
    /// Port of the restored database.
    pub port: u16,
}
