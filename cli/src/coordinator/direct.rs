//! A list of nodes and nothing that ties them together: the proof is on the nodes themselves.

use std::time::Duration;

use agent_api::{ApiError, ErrorKind, Look, MarkRequest, MarkResult, Observed};
use catalog::ids::PointId;
use catalog::model::{Consistency, Extra, InDoubt, Proof};
use jiff::Timestamp;
use tokio_util::sync::CancellationToken;

use super::proof::{self, Node, Proved, Unproved, restore_point};
use super::{Coordinator, Moment, PointArgs};
use crate::agents::pause;
use crate::failure::{Failure, Result};
use crate::operations::{Operation, all_or_cancel};
use crate::printer::{Printer, duration};

/// A step of a proof that takes longer has missed its moment.
const STEP: Duration = Duration::from_secs(5);
/// Attempts at restore points that prove nothing, each under a new name.
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
        if self.args.require_cluster {
            let kind = match &unproved.obstacle {
                super::obstacle::Obstacle::Failed { error, .. } => error.kind,
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
        let mut tries = 0;
        loop {
            tries += 1;
            let created = Timestamp::now();
            let point = PointId::generate(created);
            let request = MarkRequest {
                restore_point: restore_point(&point),
            };
            let marked = all_or_cancel(copies, cancel, |copy, cancel| {
                let request = request.clone();
                async move { copy.agent().mark(copy.id(), &request, &cancel).await }
            });
            match marked.await {
                Ok(marks) => return Ok((point, created, marks)),
                Err(failure) if failure.is_permanent() || tries == TRIES => return Err(failure),
                Err(failure) => {
                    let message = format!("no point at attempt {tries} of {TRIES}: {failure}");
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
            let rules = self.args.rules();
            let proved = tokio::select! {
                proved = proof::prove(copies, &rules) => proved,
                () = cancel.cancelled() => return Err(Failure::cancelled()),
            };
            match proved {
                Ok(proved) => return Ok(moment(proved, copies)),
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
            proof,
            marks,
        })
    }
}

fn moment(proved: Proved, copies: &[Operation]) -> Moment {
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

impl Node for Operation {
    fn name(&self) -> String {
        self.agent().name()
    }

    async fn observe(&self, look: Look) -> Result<Observed, ApiError> {
        in_time(self.agent().observe(self.id(), look)).await
    }

    async fn mark(&self, restore_point: String) -> Result<MarkResult, ApiError> {
        let request = MarkRequest { restore_point };
        in_time(self.agent().mark_once(self.id(), &request)).await
    }
}

async fn in_time<T>(step: impl Future<Output = Result<T, ApiError>>) -> Result<T, ApiError> {
    let late = || {
        let message = format!("no answer within {} s", STEP.as_secs());
        ApiError::new(ErrorKind::Timeout, message)
    };
    tokio::time::timeout(STEP, step)
        .await
        .unwrap_or_else(|_| Err(late()))
}
