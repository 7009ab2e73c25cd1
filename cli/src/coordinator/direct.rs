//! A list of nodes and nothing that ties them together: the proof is on the nodes themselves.

use std::sync::Arc;
use std::time::{Duration, Instant};

use agent_api::{ApiError, ErrorKind, Look, MarkRequest, MarkResult, Observed};
use catalog::ids::PointId;
use catalog::model::{Consistency, Extra, InDoubt, Proof};
use jiff::Timestamp;
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

use super::obstacle::Obstacle;
use super::proof::{self, Node, Proved, Unproved, restore_point};
use super::{Coordinator, Moment, Occasion, PointArgs};
use crate::agents::{Agent, pause};
use crate::failure::{Failure, Result};
use crate::operations::{self, Operation, all_or_cancel};
use crate::printer::{Printer, duration};

/// A step of a proof that takes longer has missed its moment.
const STEP: Duration = Duration::from_secs(5);
/// A restore point that is not on disk by then is made again. Nothing is held still meanwhile.
const FLUSH: Duration = Duration::from_mins(1);
/// Attempts at restore points that prove nothing, each under a new name; more, while a database may be coming back.
const TRIES: u32 = 3;
/// Pause between them.
const PAUSE: Duration = Duration::from_secs(2);

/// Marks all nodes at the same time, with no lock, and proves what it can.
#[derive(Debug)]
pub(crate) struct Direct<'a> {
    args: &'a PointArgs,
    printer: &'a Printer,
}

impl<'a> Direct<'a> {
    /// A coordinator that follows `args` and tells of what it cannot prove through `printer`.
    pub(crate) fn new(args: &'a PointArgs, printer: &'a Printer) -> Self {
        Self { args, printer }
    }

    /// Why the point is no better than per node: said, or with `--require-cluster` the end.
    fn gave_up(&self, unproved: &Unproved) -> Result<String> {
        let why = unproved.to_string();
        let next = if unproved.obstacle.has_prepared() {
            "end these transactions, or give `--accept-in-doubt` to have those listed that nobody ends"
        } else if unproved.obstacle.is_for_long() {
            "end what is in the way, then run the command again"
        } else {
            "run the command when there is less work, or with a longer `--point-timeout`"
        };
        if self.args.requires_cluster() {
            let kind = match &unproved.obstacle {
                Obstacle::Failed { error, .. } => error.kind,
                _ => ErrorKind::Conflict,
            };
            let failure = Failure::new(kind, why).next(next);
            return Err(match unproved.obstacle.node() {
                Some(node) => failure.on(node),
                None => failure,
            });
        }
        let message = format!("the point is consistent per node only: {why}; {next}");
        self.printer.warning(None, &message);
        Ok(why)
    }

    /// Restore points on all nodes that prove nothing about each other.
    async fn mark_all(
        &self,
        copies: &[Operation],
        cancel: &CancellationToken,
    ) -> Result<(PointId, Timestamp, Vec<MarkResult>)> {
        let (mut tries, until) = (0, Instant::now() + self.args.timeout(Occasion::Nodes));
        loop {
            tries += 1;
            let created = Timestamp::now();
            let point = PointId::generate(created);
            let request = MarkRequest {
                restore_point: restore_point(&point),
            };
            let marked = all_or_cancel(copies, cancel, |copy, cancel| {
                let request = request.clone();
                async move {
                    let marked = copy.agent().mark(copy.id(), &request, &cancel).await?;
                    let flushed = OnAgent::of(copy).flush(request.restore_point).await;
                    flushed.map_err(|error| Failure::from(error).on(copy.agent().name()))?;
                    Ok(marked)
                }
            });
            match marked.await {
                Ok(marks) => return Ok((point, created, marks)),
                Err(failure) if failure.is_permanent() => return Err(failure),
                Err(failure) if tries >= TRIES && !(failure.passing && Instant::now() < until) => {
                    return Err(failure);
                }
                Err(failure) => {
                    let message = format!("no point at attempt {tries}: {failure}");
                    self.printer.warning(failure.node.as_deref(), &message);
                    pause(PAUSE, cancel).await?;
                }
            }
        }
    }
}

impl Coordinator for Direct<'_> {
    async fn mark(&self, copies: &[Operation], cancel: &CancellationToken) -> Result<Moment> {
        // Every moment of a single node is consistent.
        let mut proof = None;
        if copies.len() > 1 {
            let rules = self.args.rules(Occasion::Nodes);
            let nodes: Vec<_> = copies.iter().map(OnAgent::of).collect();
            let proved = tokio::select! {
                proved = proof::prove(&nodes, &rules) => proved,
                () = cancel.cancelled() => return Err(Failure::cancelled()),
            };
            match proved {
                Ok(proved) => return Ok(moment(proved, copies)),
                Err(Unproved {
                    obstacle: obstacle @ Obstacle::Lost { .. },
                    ..
                }) => return Err(lost(&obstacle)),
                Err(unproved) => {
                    proof = Some(Proof {
                        attempts: unproved.attempts,
                        window_ms: None,
                        unproved: Some(self.gave_up(&unproved)?),
                        in_doubt: Vec::new(),
                        extra: Extra::new(),
                    });
                }
            }
        }
        let (point, created, marks) = self.mark_all(copies, cancel).await?;
        let consistency = match proof {
            Some(_) => Consistency::PerNode,
            None => Consistency::Cluster,
        };
        Ok(Moment {
            point,
            created,
            consistency,
            csn: None,
            lock_ms: 0,
            lock: None,
            metadata: None,
            proof,
            marks,
        })
    }
}

/// No waiting gives a point of this node.
fn lost(obstacle: &Obstacle) -> Failure {
    let kind = match obstacle {
        Obstacle::Lost { error, .. } => error.kind,
        _ => ErrorKind::Internal,
    };
    let failure = Failure::new(kind, format!("no point: {obstacle}"));
    let failure = failure.next("look at the agent's log on that host, then run the command again");
    match obstacle.node() {
        Some(node) => failure.on(node),
        None => failure,
    }
}

/// A point that is proved.
pub(super) fn moment(proved: Proved, copies: &[Operation]) -> Moment {
    let in_doubt = proved.in_doubt.into_iter().filter_map(|(number, holder)| {
        let prepared = holder.prepared?;
        Some(InDoubt {
            node_id: copies.get(number)?.node(),
            gid: prepared.gid,
            database: holder.database.unwrap_or_default(),
            owner: prepared.owner,
            age_ms: holder.age_ms.unwrap_or_default(),
            extra: Extra::new(),
        })
    });
    let window = proved.window.as_micros().div_ceil(1000);
    Moment {
        point: proved.point,
        created: proved.created,
        consistency: Consistency::Cluster,
        csn: None,
        lock_ms: 0,
        lock: None,
        metadata: None,
        proof: Some(Proof {
            attempts: proved.attempts,
            window_ms: Some(u64::try_from(window).unwrap_or(u64::MAX)),
            unproved: None,
            in_doubt: in_doubt.collect(),
            extra: Extra::new(),
        }),
        marks: proved.marks,
    }
}

impl std::fmt::Display for Unproved {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let (attempts, tried) = (self.attempts, duration(self.tried));
        match attempts {
            0 => write!(f, "no quiet moment within {tried}: {}", self.obstacle),
            1 => write!(f, "1 attempt within {tried}; {}", self.obstacle),
            _ => write!(f, "{attempts} attempts within {tried}; {}", self.obstacle),
        }
    }
}

/// A node by its operation on its agent.
#[derive(Debug, Clone)]
pub(super) struct OnAgent {
    agent: Arc<Agent>,
    operation: Uuid,
}

impl OnAgent {
    pub(super) fn of(operation: &Operation) -> Self {
        Self {
            agent: Arc::clone(operation.agent()),
            operation: operation.id(),
        }
    }
}

impl Node for OnAgent {
    fn name(&self) -> String {
        self.agent.name()
    }

    async fn observe(&self, look: Look) -> Result<Observed, ApiError> {
        in_time(STEP, self.agent.observe(self.operation, look)).await
    }

    async fn mark(&self, restore_point: String) -> Result<MarkResult, ApiError> {
        let request = MarkRequest { restore_point };
        in_time(STEP, self.agent.mark_once(self.operation, &request)).await
    }

    async fn flush(&self, restore_point: String) -> Result<(), ApiError> {
        let request = MarkRequest { restore_point };
        in_time(FLUSH, self.agent.flush(self.operation, &request)).await
    }

    async fn lost(&self) -> Option<ApiError> {
        operations::lost(&self.agent, self.operation).await
    }
}

async fn in_time<T>(
    limit: Duration,
    step: impl Future<Output = Result<T, ApiError>>,
) -> Result<T, ApiError> {
    let late = || {
        let message = format!("no answer within {} s", limit.as_secs());
        ApiError::new(ErrorKind::Timeout, message)
    };
    tokio::time::timeout(limit, step)
        .await
        .unwrap_or_else(|_| Err(late()))
}
