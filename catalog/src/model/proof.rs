//! How it was proved that a point cuts no transaction in half, or why it was not.

use serde::{Deserialize, Serialize};
use uuid::Uuid;

use crate::model::Extra;

/// What was done to prove a point. A point of a single node has none: there is nothing to cut.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Proof {
    /// How often it was tried, from reading the first snapshots on.
    pub attempts: u32,
    /// Where it stands: milliseconds from asking for the first snapshot to the answer with the last one, by
    /// the operator's clock.
    pub window_ms: Option<u64>,
    /// Why it does not stand: what was in the way, with node, pid or gid, age and application.
    pub unproved: Option<String>,
    /// Prepared transactions that were in doubt and accepted: the point holds them prepared, and what becomes
    /// of them is to be decided after a restore.
    #[serde(default)]
    pub in_doubt: Vec<InDoubt>,
    /// See [`Extra`].
    #[serde(flatten)]
    pub extra: Extra,
}

/// A prepared transaction that nobody had ended.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct InDoubt {
    /// The node it is prepared on.
    pub node_id: Uuid,
    /// Its global identifier, as given to `PREPARE TRANSACTION`.
    pub gid: String,
    /// Its database.
    pub database: String,
    /// Who prepared it.
    pub owner: String,
    /// How long it had been prepared, in milliseconds.
    pub age_ms: u64,
    /// See [`Extra`].
    #[serde(flatten)]
    pub extra: Extra,
}
