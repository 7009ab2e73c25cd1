//! WAL that an agent ships all the time: bodies of `/v1/wal`.

use std::fmt;

use catalog::ids::EpochId;
use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use uuid::Uuid;

use crate::error::ErrorKind;
use crate::repository::RepositoryAccess;

/// What becomes of a node's WAL between backups.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum WalMode {
    /// It is shipped from the backup's start to its point, and no further.
    #[default]
    Backup,
    /// It is shipped all the time from this backup on.
    Continuous,
}

impl WalMode {
    /// Whether it is [`Self::Backup`]: agents that know no other one are not told of it.
    #[must_use]
    pub fn is_backup(&self) -> bool {
        *self == Self::Backup
    }
}

/// `PUT /v1/wal`: ship this node's WAL into this epoch until told otherwise. The same again changes nothing, but credentials
/// and limits that are newer count from then on.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct StartWal {
    /// The repository.
    pub repository: RepositoryAccess,
    /// The node.
    pub node_id: Uuid,
    /// Its open epoch.
    pub epoch: EpochId,
    /// zstd level, 1 to 19.
    #[serde(default = "one")]
    pub level: i32,
    /// Upload limit in bytes a second; `None`: none.
    #[serde(default)]
    pub bandwidth: Option<u64>,
    /// WAL that may be held back on the node, in bytes, beside the agent's own limit and the rule of a quarter of the free
    /// space.
    #[serde(default)]
    pub hold: Option<u64>,
    /// Whether what is on for another node, epoch or repository may be ended for this.
    #[serde(default)]
    pub replace: bool,
}

fn one() -> i32 {
    1
}

/// Whether WAL is shipped.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum WalState {
    /// Not on.
    Off,
    /// Shipping, without a gap since [`WalStatus::first`].
    Running,
    /// On, and something is in the way that may pass: [`WalStatus::last_error`] says what. WAL is held meanwhile, if the
    /// database runs.
    Waiting,
    /// WAL was let go before it was in the bucket; that is not written down there yet, or nothing was shipped since.
    Gap,
    /// On, and it writes nothing, because this database's WAL is not that epoch's, or the bucket has other WAL of the same
    /// names. Nothing is held.
    Refused,
}

impl WalState {
    /// Its name, as in JSON.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Off => "off",
            Self::Running => "running",
            Self::Waiting => "waiting",
            Self::Gap => "gap",
            Self::Refused => "refused",
        }
    }
}

impl fmt::Display for WalState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// WAL that is missing in the bucket, for good.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct WalGap {
    /// End of what is there before it.
    pub from: String,
    /// Where it goes on; `None`: not known yet.
    pub to: Option<String>,
    /// Why.
    pub why: String,
    /// When it came to be (UTC).
    pub at: Timestamp,
}

/// `GET /v1/wal`, and the answer to `PUT` and `DELETE`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct WalStatus {
    /// How it stands.
    pub state: WalState,
    /// The node.
    pub node_id: Option<Uuid>,
    /// The epoch.
    pub epoch: Option<EpochId>,
    /// Where it goes to, as a person writes it, without secrets.
    pub repository: Option<String>,
    /// The replication slot that holds WAL; `None`: none, or the database's archiver does.
    pub slot: Option<String>,
    /// First segment of the unbroken stretch that is being shipped.
    pub first: Option<String>,
    /// Everything from there to here is in the bucket.
    pub shipped_to: Option<String>,
    /// Everything before it is on the node's disk.
    pub flushed_to: Option<String>,
    /// Bytes between the two.
    pub lag_bytes: Option<u64>,
    /// For how long whole segments have been waiting to be shipped, in seconds; 0: none is.
    pub lag_seconds: Option<u64>,
    /// Bytes of WAL that are held back on the node.
    pub held_bytes: Option<u64>,
    /// When it was switched on (UTC).
    pub since: Option<Timestamp>,
    /// What is in the way, or was last.
    pub last_error: Option<String>,
    /// Its kind.
    #[serde(default)]
    pub error_kind: Option<ErrorKind>,
    /// What to do about it.
    pub next: Option<String>,
    /// The newest gap since the last base backup that the agent knows of: a new base is wanted.
    pub gap: Option<WalGap>,
    /// Whether a base backup is wanted, because WAL in the bucket has no base that it joins.
    #[serde(default)]
    pub wants_base: bool,
}

impl WalStatus {
    /// Of an agent that ships nothing.
    #[must_use]
    pub fn off() -> Self {
        Self {
            state: WalState::Off,
            node_id: None,
            epoch: None,
            repository: None,
            slot: None,
            first: None,
            shipped_to: None,
            flushed_to: None,
            lag_bytes: None,
            lag_seconds: None,
            held_bytes: None,
            since: None,
            last_error: None,
            error_kind: None,
            next: None,
            gap: None,
            wants_base: false,
        }
    }
}
