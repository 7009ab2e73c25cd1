//! The journal of an operation.

use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use uuid::Uuid;

use crate::ids::BackupId;

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
    /// Random, see [`Repository::nonce`].
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
    },
    /// Multipart uploads of these keys may exist from now on.
    UploadsIntended {
        /// Keys relative to the prefix.
        keys: Vec<String>,
    },
    /// A node of a restore is promoted and stands in its place; it is opened when all are.
    NodePromoted(PromotedNode),
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
