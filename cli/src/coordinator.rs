//! Who makes the nodes agree on one moment.
//!
//! A backup copies nodes without asking anybody; only the point needs somebody who knows what holds the
//! cluster together. [`direct::Direct`] knows nothing but the list of nodes: it waits for a moment in which
//! nobody has anything under way, and has the nodes prove it ([`proof`]). [`shardingsphere`] makes that moment with a lock,
//! around the same proof.

mod args;
pub(crate) mod direct;
pub mod obstacle;
pub mod proof;
pub(crate) mod shardingsphere;

use agent_api::MarkResult;
use catalog::ids::PointId;
use catalog::model::{Consistency, LockRecord, Metadata, Proof};
use jiff::Timestamp;
use tokio_util::sync::CancellationToken;

use crate::failure::Result;
use crate::operations::Operation;

pub(crate) use args::{Lock, Occasion, PointArgs};

/// A restore point on every node.
#[derive(Debug)]
pub(crate) struct Moment {
    /// The point it becomes.
    pub(crate) point: PointId,
    /// When it was begun (UTC).
    pub(crate) created: Timestamp,
    /// What it proves.
    pub(crate) consistency: Consistency,
    /// The cluster's commit sequence number, where there is one.
    pub(crate) csn: Option<String>,
    /// How long the cluster was locked, in milliseconds.
    pub(crate) lock_ms: u64,
    /// What it took to hold the cluster still, if that was asked of proxies.
    pub(crate) lock: Option<LockRecord>,
    /// What the proxies know of databases and rules, the same before and after the point: to be written before it.
    pub(crate) metadata: Option<Metadata>,
    /// What was done to prove it.
    pub(crate) proof: Option<Proof>,
    /// What each node made, in the order of the operations.
    pub(crate) marks: Vec<MarkResult>,
}

/// Makes points.
pub(crate) trait Coordinator {
    /// Makes a restore point on every node whose copy waits for one. A moment that fails is retried
    /// under a new name; the copies stay.
    ///
    /// # Errors
    /// Why there is no point, with the node that refused it; a cancellation.
    fn mark(
        &self,
        copies: &[Operation],
        cancel: &CancellationToken,
    ) -> impl Future<Output = Result<Moment>>;
}
