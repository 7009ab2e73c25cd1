//! Points on agents that may be lost meanwhile: made ready for, and shipped.
//!
//! A point that was proved is worth waiting for: what it needs is on the nodes' disks, and the agents' own shipping goes on with it after
//! a restart. So an agent that is away is waited for, and what a restarted one has lost is taken up again by another operation.
//!
//! | what | what becomes of it |
//! |---|---|
//! | an agent is away | it is waited for, `--point-timeout` at the most; the others go on, and wait for it |
//! | it is back, and knows the operation | it goes on |
//! | it was restarted, or has given the operation up | a point's operation takes its place, for the restore point that stands |
//! | the same, and the WAL was shipped for this backup only | nothing holds the WAL any more: the backup fails |
//! | shipping itself fails | that is the end: waiting mends nothing |

use std::sync::Arc;
use std::time::Duration;

use agent_api::{
    CopyMade, ErrorKind, MarkResult, OperationSpec, OperationStatus, Phase, PointSpec,
    StartOperation,
};
use catalog::ids::EpochId;
use catalog::model::NodeBackup;
use jiff::{SignedDuration, Timestamp};
use serde_json::json;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

use crate::agents::{Agent, pause};
use crate::failure::{Failure, Result};
use crate::operations::{Live, Operation, Standing};
use crate::printer::Printer;
use crate::repo;
use crate::settings::Settings;

/// How long another point of the node is waited for: its client may be dead, and its agent notices that after 30 s.
const OTHERS_WITHIN: Duration = Duration::from_secs(45);
const OTHERS_PAUSE: Duration = Duration::from_secs(1);
/// Between looks whether an agent is back.
const PAUSE: Duration = Duration::from_secs(1);
/// How often one operation is taken up again: what is lost more often is no accident.
const AGAIN: u32 = 5;

/// A node of a point.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Stand<'a> {
    /// Its agent.
    pub(crate) agent: &'a Arc<Agent>,
    /// Its id.
    pub(crate) node: Uuid,
    /// Its open epoch.
    pub(crate) epoch: &'a EpochId,
    /// Whether the agent has to be lent credentials.
    pub(crate) lend: bool,
}

/// How operations of points are begun, and how long agents are waited for.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Shipping<'a> {
    /// The settings.
    pub(crate) settings: &'a Settings,
    /// What this program must not leave behind.
    pub(crate) live: &'a Live,
    /// Who is told.
    pub(crate) printer: &'a Printer,
    /// How long an agent that is lost is waited for.
    pub(crate) patience: Duration,
}

impl Shipping<'_> {
    /// Makes a node ready for a restore point. `copy`: the point is of this copy, whose operation is lost.
    ///
    /// # Errors
    /// What the agent says; a cancellation.
    pub(crate) async fn ready(
        &self,
        stand: Stand<'_>,
        copy: Option<&NodeBackup>,
        cancel: &CancellationToken,
    ) -> Result<Operation> {
        self.begun(stand, copy, None, cancel).await
    }

    /// Has the WAL sent up to the restore point `mark`. When it returns, that is in the bucket, and of a backup the status has the whole of
    /// the node's part.
    ///
    /// # Errors
    /// What the agent says; that it was not back in time; a cancellation.
    pub(crate) async fn shipped(
        &self,
        operation: &mut Operation,
        stand: Stand<'_>,
        mark: &MarkResult,
        cancel: &CancellationToken,
    ) -> Result<OperationStatus> {
        let mut again = 0;
        loop {
            let sent = async {
                operation.agent().ship(operation.id(), cancel).await?;
                operation.reach(Phase::Shipped, cancel).await
            };
            let failure = match sent.await {
                Ok(status) => return Ok(whole(status, operation.copy())),
                Err(failure) => failure,
            };
            again += 1;
            if cancel.is_cancelled() || again > AGAIN {
                return Err(failure);
            }
            self.back(operation, stand, mark, failure, cancel).await?;
        }
    }

    /// Waits until the agent is back, and takes up what it has lost. An error is what it had `failed` with, if it is not back in time.
    async fn back(
        &self,
        operation: &mut Operation,
        stand: Stand<'_>,
        mark: &MarkResult,
        mut failed: Failure,
        cancel: &CancellationToken,
    ) -> Result<()> {
        let until = Instant::now() + self.patience;
        let mut told = false;
        loop {
            match operation.stands(cancel).await {
                Standing::Goes if is_silence(&failed) => return Ok(()),
                Standing::Goes | Standing::Failed => return Err(failed),
                Standing::Away => {}
                Standing::Lost => {
                    let copy = operation.copy().cloned();
                    if operation.is_of_a_copy() && copy.is_none() {
                        return Err(failed);
                    }
                    match self.begun(stand, copy.as_ref(), Some(mark), cancel).await {
                        Ok(next) => {
                            operation.becomes(next);
                            let name = stand.agent.name();
                            let text = format!("{name}: its WAL is shipped on, up to the point");
                            let fields = json!({"node": name, "node_id": stand.node});
                            self.printer.event("taken-up", fields, Some(&text));
                            return Ok(());
                        }
                        Err(failure) if is_for_good(&failure) => return Err(failure),
                        Err(failure) => failed = failure,
                    }
                }
            }
            let left = until.saturating_duration_since(Instant::now());
            if left < PAUSE {
                return Err(failed);
            }
            if !told {
                self.tell(stand, &failed, left);
                told = true;
            }
            pause(PAUSE, cancel).await?;
        }
    }

    /// Says who is waited for, and until when.
    fn tell(&self, stand: Stand<'_>, failed: &Failure, left: Duration) {
        let left = SignedDuration::try_from(left).unwrap_or(SignedDuration::MAX);
        let until = Timestamp::now()
            .saturating_add(left)
            .unwrap_or(Timestamp::MAX);
        let name = stand.agent.name();
        let until = until.strftime("%FT%TZ").to_string();
        let text = format!(
            "{name}: the point stands, and this agent is waited for until {until} to ship its WAL (--point-timeout): {}",
            failed.message
        );
        let fields =
            json!({"node": name, "node_id": stand.node, "until": until, "why": failed.message});
        self.printer.event("waiting", fields, Some(&text));
    }

    /// A point's operation on the agent, which waits for a restore point, or to ship `mark`. Another's point is waited for.
    async fn begun(
        &self,
        stand: Stand<'_>,
        copy: Option<&NodeBackup>,
        mark: Option<&MarkResult>,
        cancel: &CancellationToken,
    ) -> Result<Operation> {
        let request = StartOperation {
            operation: Uuid::now_v7(),
            repository: repo::access(self.settings, stand.lend).await?,
            bandwidth: None,
            spec: OperationSpec::Point(PointSpec {
                node_id: stand.node,
                epoch: stand.epoch.clone(),
                copy: copy.map(made),
                marked: mark.cloned(),
            }),
        };
        let (agent, live, printer) = (stand.agent, self.live, self.printer);
        let until = Instant::now() + OTHERS_WITHIN;
        let mut point = loop {
            let started =
                Operation::start(agent, stand.node, &request, live, printer, cancel).await;
            match started {
                Ok(point) => break point,
                Err(failure) if failure.passing && Instant::now() < until => {
                    tracing::info!(%failure, "trying again");
                    pause(OTHERS_PAUSE, cancel).await?;
                }
                Err(failure) => return Err(failure),
            }
        };
        point.reach(Phase::Ready, cancel).await?;
        Ok(point)
    }
}

/// What an agent is told of a copy that its operation is lost of.
fn made(copy: &NodeBackup) -> CopyMade {
    CopyMade {
        timeline: copy.timeline,
        wal_first: copy.wal_first.clone(),
        stop_lsn: copy.stop_lsn.clone(),
    }
}

/// The status of a point's operation that took the place of a copy's, as that one would have it.
fn whole(status: OperationStatus, copy: Option<&NodeBackup>) -> OperationStatus {
    let (None, Some(copy), Some(point)) = (&status.backup, copy, &status.point) else {
        return status;
    };
    let backup = NodeBackup {
        wal_last: point.wal_last.clone(),
        ..copy.clone()
    };
    OperationStatus {
        backup: Some(Box::new(backup)),
        ..status
    }
}

/// Whether nobody knows what became of an order.
fn is_silence(failure: &Failure) -> bool {
    matches!(
        failure.kind,
        ErrorKind::AgentUnreachable | ErrorKind::Timeout
    )
}

/// Whether no waiting makes an agent take an operation up.
fn is_for_good(failure: &Failure) -> bool {
    matches!(
        failure.kind,
        ErrorKind::Usage
            | ErrorKind::Certificate
            | ErrorKind::StoreDenied
            | ErrorKind::Damaged
            | ErrorKind::Incompatible
            | ErrorKind::Cancelled
    )
}
