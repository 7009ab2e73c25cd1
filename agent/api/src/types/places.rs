//! What is at the places of restores, and what restores have left there.

use catalog::model::Verdict;
use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use uuid::Uuid;

use super::RestoreSpec;

/// `POST /v1/target`: what is at a place that somebody may want to restore to.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TargetRequest {
    /// The data directory to be, absolute.
    pub target: String,
}

/// What is at a target. Nothing is changed to find out.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct TargetFacts {
    /// The target, its parent's links followed.
    pub target: String,
    /// Nothing is there, or an empty directory (a file system's `lost+found` does not count).
    pub empty: bool,
    /// It is a mount point: workspace and old files live inside it.
    pub mount_point: bool,
    /// Bytes free for the agent's user where the copy would be made.
    pub free_bytes: u64,
    /// The database that is there.
    pub cluster: Option<ClusterFacts>,
}

/// A database, as its files say.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ClusterFacts {
    /// System identifier.
    pub system_identifier: u64,
    /// Major version.
    pub major: u32,
    /// Whether it runs.
    pub running: bool,
    /// Port it listens on, if it runs.
    pub port: Option<u16>,
    /// Places of its tablespaces outside the data directory.
    pub tablespaces: Vec<String>,
}

/// How far a restore had come that no agent works on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum RestoreState {
    /// Its copy is not whole.
    Making,
    /// Its copy is proved to be at the point.
    Proved,
    /// Its copy is promoted, beside the target.
    Promoted,
    /// It is being put in the place of what was at the target.
    Switching,
    /// It stands at the target, closed.
    InPlace,
}

/// `GET /v1/restores`: what restores have left on the host.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct RestoresHere {
    /// Restores that have not come to their end. One goes on if its `StartOperation` is sent again: same operation,
    /// same spec.
    pub unfinished: Vec<UnfinishedRestore>,
    /// What was at targets before.
    pub old: Vec<OldCluster>,
}

/// A restore that has not come to its end.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct UnfinishedRestore {
    /// The agent's operation.
    pub operation: Uuid,
    /// Whether an operation of this agent works on it now.
    pub running: bool,
    /// How far it is.
    pub state: RestoreState,
    /// What the agent knows to be decided.
    pub decision: Option<Verdict>,
    /// Whether a database was stopped for it, and is down.
    pub stopped_live: bool,
    /// What it is.
    pub spec: Box<RestoreSpec>,
}

/// What was at a target before a restore was put there.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct OldCluster {
    /// The restore that moved it aside.
    pub restore: Uuid,
    /// The target.
    pub target: String,
    /// Where it is now.
    pub directories: Vec<String>,
    /// When it was moved aside (UTC).
    pub since: Timestamp,
}

/// `POST /v1/discard`: remove what was at the target before a restore.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DiscardRequest {
    /// The client's restore ([`RestoreSpec::restore`]).
    pub restore: Uuid,
}

/// What was removed.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Discarded {
    /// Directories that are gone.
    pub removed: Vec<String>,
}
