//! Who may do what, and what was decided: leases, decisions, pins, tombstones.

use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use uuid::Uuid;

use super::Extra;
use crate::ids::BackupId;

/// What a lease is about.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum LeaseScope {
    /// Backups.
    Backup,
    /// Restores.
    Restore,
    /// Deletion and repair.
    Maintain,
}

impl LeaseScope {
    /// Its name, as in keys and JSON.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Backup => "backup",
            Self::Restore => "restore",
            Self::Maintain => "maintain",
        }
    }
}

/// Who holds a lease, in a person's words.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Holder {
    /// Host name.
    pub host: String,
    /// OS user.
    pub user: String,
    /// Process id.
    pub pid: u32,
    /// What it runs, such as `gs_pitr backup`.
    pub command: String,
}

/// Whether the object holds the lease or ends it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum LeaseState {
    /// Held until its time to live is over, counted from the object's own date in the store.
    Held,
    /// Given back.
    Released,
}

/// `lease/<scope>/<seq>.json`: the newest one says who operates. A renewal is a new object.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Lease {
    /// What it is about.
    pub scope: LeaseScope,
    /// From 1; ten digits in the key.
    pub seq: u64,
    /// The operation that holds it.
    pub operation: Uuid,
    /// The backup it makes (scope `backup`): who takes the lease over fences this one.
    pub backup_id: Option<BackupId>,
    /// Who that is.
    pub holder: Holder,
    /// Held or given back.
    pub state: LeaseState,
    /// Milliseconds it lives without a renewal, from the date that the STORE gives the object.
    pub ttl_ms: u64,
    /// When it was taken, by the holder's clock (UTC); renewals keep it. Only for people.
    pub taken: Timestamp,
    /// When this object was written, by the holder's clock (UTC). Only for people.
    pub at: Timestamp,
    /// Head of the log when it was written: sequence number and SHA-256 (hex).
    pub log_head: Option<(u64, String)>,
    /// Random, so that a lost reply can be told from another's write.
    pub nonce: Uuid,
    /// Fields of a newer minor version.
    #[serde(flatten)]
    pub extra: Extra,
}

/// What becomes of a restore on all its nodes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Verdict {
    /// Every node is proved; every node goes forward.
    Commit,
    /// Every node goes back.
    Rollback,
}

/// `operations/<operation-id>/decision.json`: created if absent, so that there is one, and all obey it.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Decision {
    /// The restore.
    pub operation: Uuid,
    /// Forward or back.
    pub verdict: Verdict,
    /// Who decided, in a person's words.
    pub by: String,
    /// Why, of a rollback.
    pub reason: Option<String>,
    /// By the decider's clock (UTC).
    pub at: Timestamp,
    /// Random, see [`Lease::nonce`].
    pub nonce: Uuid,
    /// Fields of a newer minor version.
    #[serde(flatten)]
    pub extra: Extra,
}

/// `operations/<operation-id>/pin.json`: backups that a running restore (or increment) still reads.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Pin {
    /// The operation that reads.
    pub operation: Uuid,
    /// What it reads.
    pub backups: Vec<BackupId>,
    /// By the operator's clock (UTC).
    pub at: Timestamp,
    /// Random, see [`Lease::nonce`].
    pub nonce: Uuid,
    /// Fields of a newer minor version.
    #[serde(flatten)]
    pub extra: Extra,
}

/// `backups/<backup-id>/deleted.json`: from here on the backup does not exist, whatever is left of it. It stays
/// for ever, so that a writer that wakes up late finds it.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Tombstone {
    /// The backup.
    pub backup_id: BackupId,
    /// SHA-256 (hex) of the stored bytes of its manifest, if that could be read.
    pub manifest_sha256: Option<String>,
    /// The operation that deleted it.
    pub operation: Uuid,
    /// `delete`, `prune`, ...
    pub reason: String,
    /// By the operator's clock (UTC).
    pub at: Timestamp,
    /// Random, see [`Lease::nonce`].
    pub nonce: Uuid,
    /// Fields of a newer minor version.
    #[serde(flatten)]
    pub extra: Extra,
}
