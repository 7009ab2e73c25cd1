//! Forward or back: what is decided about a restore, and what an agent does that hears nothing from its client.
//!
//! Before the decision an agent without a client decides `rollback` itself, if nobody has decided yet, and obeys what
//! stands. After `commit` it goes forward alone, some seconds after it last heard of its client. While the store does not answer nothing is decided: it waits.

use std::sync::Arc;
use std::time::Duration;

use agent_api::{ApiError, ErrorKind, RestoreSpec};
use catalog::error::CatalogError;
use catalog::journal::{self, OperationJournal};
use catalog::model::{Decision, OperationEvent, PromotedNode, Verdict};
use catalog::repo::Catalog;
use pipeline::store::ObjectStore;
use tokio::time::{Instant, sleep, timeout};
use uuid::Uuid;

use super::errors::of_catalog;
use crate::facts;
use crate::operation::Reporter;

/// How long the store may take for one small object, its own attempts included.
const ASK: Duration = Duration::from_mins(1);
/// Pauses between attempts, first and longest.
const PAUSES: (Duration, Duration) = (Duration::from_millis(500), Duration::from_secs(15));

/// A client that is silent for so long may be gone: it is looked then whether all is decided. Sooner than the cluster's lock, which that client
/// may have held, is taken off (15 s at least): what is written from then on must not go to a database that is to be replaced.
const LOOK: Duration = Duration::from_secs(5);

/// The restore's side of the bucket.
#[derive(Debug)]
pub(super) struct Judge {
    pub(super) catalog: Catalog,
    pub(super) store: Arc<dyn ObjectStore>,
    /// The client's restore.
    pub(super) restore: Uuid,
    pub(super) report: Reporter,
    /// A client that is silent for so long is gone.
    pub(super) client_timeout: Duration,
}

impl Judge {
    /// What is decided.
    pub(super) async fn decision(&self) -> Result<Option<Decision>, ApiError> {
        bounded(self.catalog.decision(self.restore)).await
    }

    /// Decides that all go back, unless it is decided already. What stands is returned.
    pub(super) async fn roll_back(&self, reason: &str) -> Result<Decision, ApiError> {
        let by = format!("pitr-agent on {}", facts::host_name());
        let decide = self
            .catalog
            .decide(self.restore, Verdict::Rollback, &by, Some(reason));
        bounded(decide).await
    }

    /// Whether the client has said nothing for so long that it may be gone.
    pub(super) fn is_silent(&self) -> bool {
        self.report.silent_for() >= LOOK
    }

    /// Whether nobody has asked about the operation for too long.
    pub(super) fn is_abandoned(&self) -> bool {
        self.report.silent_for() >= self.client_timeout
    }

    /// Waits until the client is gone and it is decided what then. If the client comes back before that, or the
    /// store does not answer, it goes on waiting.
    pub(super) async fn decided_alone(&self) -> Decision {
        let mut patience = Patience::default();
        let mut looked = Instant::now();
        loop {
            sleep(self.tick()).await;
            if self.is_silent() && looked.elapsed() >= LOOK {
                looked = Instant::now();
                if let Ok(Some(decision)) = self.decision().await {
                    return decision;
                }
            }
            if !self.is_abandoned() {
                continue;
            }
            let reason = format!(
                "nobody has asked about the restore on {} for {} s",
                facts::host_name(),
                self.report.silent_for().as_secs()
            );
            match self.roll_back(&reason).await {
                Ok(decision) => return decision,
                Err(error) => {
                    patience
                        .wait(&self.report, "nothing is decided yet", &error)
                        .await;
                }
            }
        }
    }

    /// How often it is looked whether the client is there.
    pub(super) fn tick(&self) -> Duration {
        (self.client_timeout / 4).min(Duration::from_secs(1))
    }

    /// Writes down in the bucket that this node is promoted, unless that stands there. Tries until it does.
    pub(super) async fn promoted(&self, node: &PromotedNode) {
        let mut patience = Patience::default();
        loop {
            let written = async {
                let (known, _) = self.promoted_nodes().await?;
                if known.contains(&node.node_id) {
                    return Ok(());
                }
                let journal = OperationJournal::join(Arc::clone(&self.store), self.restore);
                bounded(journal.record(OperationEvent::NodePromoted(node.clone()))).await
            };
            match written.await {
                Ok(()) => return,
                Err(error) => {
                    let what = "that this node is promoted is not written down yet";
                    patience.wait(&self.report, what, &error).await;
                }
            }
        }
    }

    /// Waits until the client is gone and all nodes of the restore are promoted, or given up by an operator. One
    /// that is given up itself waits for ever: the others may have gone on without it.
    pub(super) async fn all_promoted_alone(&self, spec: &RestoreSpec) {
        let mut patience = Patience::default();
        loop {
            sleep(self.tick()).await;
            if !self.is_abandoned() {
                continue;
            }
            match self.promoted_nodes().await {
                Ok((_, given_up)) if given_up.contains(&spec.node.node_id) => {
                    self.report.warning(
                        "this node's operator has given it up, and the others were opened without it: it stays closed",
                    );
                    return std::future::pending().await;
                }
                Ok((promoted, given_up))
                    if spec
                        .nodes
                        .iter()
                        .all(|node| promoted.contains(node) || given_up.contains(node)) =>
                {
                    self.report.warning(
                        "the client is silent, and all nodes of the restore are promoted: going on without it",
                    );
                    return;
                }
                // Another node is not there yet; its agent says why.
                Ok(_) => sleep(PAUSES.1.min(self.client_timeout)).await,
                Err(error) => {
                    let what = "whether all nodes are promoted is not known";
                    patience.wait(&self.report, what, &error).await;
                }
            }
        }
    }

    /// Whether an operator has given `node` up.
    pub(super) async fn gave_up(&self, node: Uuid) -> Result<bool, ApiError> {
        Ok(self.promoted_nodes().await?.1.contains(&node))
    }

    /// The nodes that are promoted, and those that are given up.
    async fn promoted_nodes(&self) -> Result<(Vec<Uuid>, Vec<Uuid>), ApiError> {
        let records = bounded(journal::records(&*self.store, self.restore)).await?;
        let (mut promoted, mut given_up) = (Vec::new(), Vec::new());
        for record in records {
            match record.event {
                OperationEvent::NodePromoted(node) => promoted.push(node.node_id),
                OperationEvent::NodeGivenUp { node_id } => given_up.push(node_id),
                _ => {}
            }
        }
        Ok((promoted, given_up))
    }
}

/// An answer of the store within its time.
async fn bounded<T>(asked: impl Future<Output = Result<T, CatalogError>>) -> Result<T, ApiError> {
    if let Ok(answer) = timeout(ASK, asked).await {
        return answer.map_err(|error| of_catalog(&error));
    }
    let message = format!("the store did not answer within {} s", ASK.as_secs());
    Err(ApiError::new(ErrorKind::StoreUnavailable, message))
}

/// Growing pauses; the first failure is told.
#[derive(Debug, Default)]
pub(super) struct Patience {
    pause: Option<Duration>,
}

impl Patience {
    pub(super) async fn wait(&mut self, report: &Reporter, what: &str, error: &ApiError) {
        if self.pause.is_none() {
            report.warning(format!("{what}, trying again until it works: {error}"));
        }
        let pause = self
            .pause
            .map_or(PAUSES.0, |pause| (pause * 2).min(PAUSES.1));
        self.pause = Some(pause);
        sleep(pause.mul_f64(rand::random_range(0.5..1.0))).await;
    }
}

/// Why a restore goes back, in the operator's words.
pub(super) fn rolled_back(decision: &Decision) -> ApiError {
    let reason = decision.reason.as_deref().unwrap_or("no reason was given");
    let message = format!(
        "it was decided that the restore goes back, by {}: {reason}",
        decision.by
    );
    ApiError::new(ErrorKind::Cancelled, message).next("run the restore again")
}
