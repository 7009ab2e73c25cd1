//! Who makes the nodes agree on one moment.
//!
//! A backup copies nodes without asking anybody; only the point needs somebody who knows what holds the
//! cluster together. [`direct::Direct`] knows nothing but the list of nodes: it waits for a moment in which
//! nobody has anything under way, and has the nodes prove it ([`proof`]). A coordinator of a ShardingSphere
//! cluster makes that moment with a lock, around the same proof.

pub(crate) mod direct;
pub mod obstacle;
pub mod proof;

use std::time::Duration;

use agent_api::MarkResult;
use catalog::ids::PointId;
use catalog::model::{Consistency, Proof};
use jiff::Timestamp;
use tokio_util::sync::CancellationToken;

use crate::failure::{Failure, Result};
use crate::operations::Operation;

/// How a point is made, as the command line has it.
#[derive(Debug, Clone, clap::Args)]
pub(crate) struct PointArgs {
    /// How the cluster is held still for its point; only `never` without a proxy
    #[arg(long, value_name = "WHEN", default_value = "never")]
    lock: Lock,
    /// Fail if no point of the whole cluster can be proved, rather than make one per node
    #[arg(long)]
    require_cluster: bool,
    /// Prove the point although transactions stay prepared, and list those in it
    #[arg(long)]
    accept_in_doubt: bool,
    /// Try so often again to prove the point, each time under a new name
    #[arg(long, value_name = "N", default_value_t = 500)]
    point_retries: u32,
    /// Try to prove the point for so long
    #[arg(long, value_name = "SECONDS", default_value_t = 30, value_parser = clap::value_parser!(u16).range(1..=3600))]
    point_timeout: u16,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
enum Lock {
    Never,
    #[value(hide = true)]
    Auto,
    #[value(hide = true)]
    Always,
}

impl PointArgs {
    /// Refuses what cannot be done yet.
    ///
    /// # Errors
    /// For a lock: only a proxy has one.
    pub(crate) fn check(&self) -> Result<()> {
        let lock = match self.lock {
            Lock::Never => return Ok(()),
            Lock::Auto => "auto",
            Lock::Always => "always",
        };
        let message = format!(
            "`--lock {lock}` needs a proxy that locks the cluster, which is to come; with `--nodes` there is none"
        );
        Err(Failure::usage(message).next("leave `--lock` away, or give `--lock never`"))
    }

    /// For the proof.
    fn rules(&self) -> proof::Rules {
        proof::Rules {
            retries: self.point_retries,
            timeout: Duration::from_secs(self.point_timeout.into()),
            accept_in_doubt: self.accept_in_doubt,
        }
    }
}

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
