//! What it took to hold a sharding cluster still for a point.

use jiff::Timestamp;
use serde::{Deserialize, Serialize};

use super::{Extra, Holder};

/// What locking the cluster for a point took.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct LockRecord {
    /// When the point's making began, by the operator's clock (UTC).
    pub at: Timestamp,
    /// `always`, `auto` or `never`, as it was asked for.
    #[serde(default)]
    pub mode: String,
    /// For how long writes were refused, or may have been, all tries together, in milliseconds: of each from sending LOCK until the
    /// last proxy took writes again.
    pub held_ms: u64,
    /// How often LOCK was sent.
    pub tries: u32,
    /// Proxies (`host:port`) that refused writes while the point was marked. None: it was made without the lock.
    #[serde(default)]
    pub proxies: Vec<String>,
    /// Proxies that were known and could not be asked: what they did meanwhile only the proof on the nodes shows.
    #[serde(default)]
    pub unreachable: Vec<String>,
    /// Who locked; `None`: a program that did not note it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub by: Option<Holder>,
    /// See [`Extra`].
    #[serde(flatten)]
    pub extra: Extra,
}
