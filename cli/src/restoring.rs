//! A restore on all its agents: proved, decided, promoted, opened. Run by `restore`, and taken up again by
//! `operations resume` from whatever host.
//!
//! | killed | what is left | what becomes of it |
//! |---|---|---|
//! | before the decision | workspaces, and the old databases as they were | every agent goes back by itself |
//! | with the cluster locked, before the decision or after it | the lock too | agents that are armed as watchdogs unlock after half a minute |
//! | after `commit` | nodes in all states between proved and open | every agent goes forward by itself; epochs and the journal's end wait for a `resume` |

mod epochs;

use std::sync::Arc;
use std::time::Duration;

use agent_api::{
    ErrorKind, OldCluster, OpenRequest, OperationSpec, OperationStatus, Phase, RestoreSpec,
    Restored, StartOperation,
};
use catalog::Catalog;
use catalog::model::{PlannedNode, RestorePlan, Verdict};
use futures_util::future::join_all;
use serde_json::json;
use tokio::time::{Instant, sleep};
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

use crate::agents::Agent;
use crate::coordinator::shardingsphere::{Switch, SwitchLock};
use crate::failure::{Failure, Result};
use crate::leased::Leased;
use crate::operations::{Live, Operation, all_or_cancel};
use crate::printer::Printer;
use crate::repo;
use crate::settings::Settings;

/// How long the store may take to say what is decided, over all attempts.
const DECIDED_WITHIN: Duration = Duration::from_mins(2);
/// Pause between two of them.
const ASK_AGAIN: Duration = Duration::from_secs(1);

/// A restore under way.
#[derive(Debug)]
pub(crate) struct Restoring<'a> {
    /// The repository.
    pub(crate) catalog: &'a Catalog,
    /// The settings.
    pub(crate) settings: &'a Settings,
    /// Where it is told.
    pub(crate) printer: &'a Printer,
    /// The agents' operations.
    pub(crate) live: &'a Live,
    /// The restore.
    pub(crate) operation: Uuid,
    /// What it does.
    pub(crate) plan: &'a RestorePlan,
    /// How clients are kept out while databases are switched. `None`: nobody does.
    pub(crate) switch: Option<Switch<'a>>,
}

/// One node of it.
#[derive(Debug, Clone)]
pub(crate) struct Part {
    /// What becomes of the node.
    pub(crate) planned: PlannedNode,
    /// Its agent.
    pub(crate) agent: Arc<Agent>,
    /// Whether the agent is lent our credentials.
    pub(crate) lend: bool,
}

/// How far a node is when all go forward.
#[derive(Debug)]
pub(crate) enum Member {
    /// Its agent works on it.
    Working(Box<Operation>),
    /// It is promoted, and its agent has nothing left to do.
    Done,
}

/// A node that is open, or left stopped as was asked.
#[derive(Debug)]
pub(crate) struct Opened {
    /// The node.
    pub(crate) part: Part,
    /// What it is now; `None` if its agent has forgotten the operation since.
    pub(crate) restored: Option<Restored>,
    /// What was at its target before, if it is still there.
    pub(crate) old: Vec<OldCluster>,
}

/// The command that goes on with a restore.
pub(crate) fn resume(operation: Uuid) -> String {
    format!("gs_pitr operations resume {operation}")
}

impl Restoring<'_> {
    /// Runs it from its start. Until all nodes are proved a failure or a cancellation takes all of them back;
    /// from the decision on every node goes forward.
    ///
    /// # Errors
    /// What it failed with. An [unfinished](Failure::unfinished) one has to be resumed.
    pub(crate) async fn run(
        &self,
        parts: Vec<(Part, RestoreSpec)>,
        leased: &Leased,
        cancel: &CancellationToken,
    ) -> Result<Vec<Opened>> {
        let _signs = self.live.signs_of_life();
        self.live.set_if_left(format!(
            "wait: nothing is decided, so every agent goes back after its `--client-timeout` (60 s); then `{}`",
            resume(self.operation)
        ));
        let proved = all_or_cancel(&parts, cancel, |(part, spec), cancel| async move {
            self.proved(part, spec, &cancel).await
        });
        let ready = match proved.await {
            Ok(operations) => self.locked(cancel).await.map(|lock| (operations, lock)),
            Err(failure) => Err(failure),
        };
        let (operations, lock) = match ready {
            Ok(ready) => ready,
            Err(failure) => return Err(self.back(leased.explain(failure).await).await),
        };
        // It may have been cancelled while the store was asked; the next step is the decision.
        let ready = match leased.prove().await {
            Ok(()) if cancel.is_cancelled() => Err(Failure::cancelled()),
            ready => ready,
        };
        if let Err(failure) = ready {
            release(lock).await;
            return Err(self.back(leased.explain(failure).await).await);
        }
        let parts: Vec<_> = parts.into_iter().map(|(part, _)| part).collect();
        let verdict = match self.decided(Verdict::Commit, None).await {
            Ok(verdict) => verdict,
            Err(failure) => {
                release(lock).await;
                return Err(failure);
            }
        };
        match verdict {
            Verdict::Commit => {
                let working = operations.into_iter().map(Box::new).map(Member::Working);
                let nodes = parts.into_iter().zip(working).collect();
                self.forward(nodes, Vec::new(), lock).await
            }
            Verdict::Rollback => {
                release(lock).await;
                let message = "somebody else decided that this restore goes back";
                let failure = Failure::new(ErrorKind::Conflict, message);
                Err(self.back(leased.explain(failure).await).await)
            }
        }
    }

    /// Keeps clients out from now on, if that is how databases are switched.
    ///
    /// # Errors
    /// That it cannot be done: then nothing is locked.
    pub(crate) async fn locked(&self, cancel: &CancellationToken) -> Result<Option<SwitchLock>> {
        match &self.switch {
            None => Ok(None),
            Some(switch) => switch.locked(cancel).await.map(Some),
        }
    }

    /// Has a node's copy made and proved.
    async fn proved(
        &self,
        part: &Part,
        spec: &RestoreSpec,
        cancel: &CancellationToken,
    ) -> Result<Operation> {
        let request = self.request(part, spec.clone()).await?;
        let (live, printer) = (self.live, self.printer);
        let node = part.planned.becomes;
        let mut operation =
            Operation::start(&part.agent, node, &request, live, printer, cancel).await?;
        operation.reach(Phase::Proved, cancel).await?;
        Ok(operation)
    }

    /// The order to begin, or to go on after the agent was restarted.
    pub(crate) async fn request(&self, part: &Part, spec: RestoreSpec) -> Result<StartOperation> {
        Ok(StartOperation {
            operation: part.planned.operation,
            repository: repo::access(self.settings, part.lend).await?,
            bandwidth: self.settings.bandwidth(),
            spec: OperationSpec::Restore(Box::new(spec)),
        })
    }

    /// Decides, unless it is decided. What is returned holds for everybody.
    ///
    /// # Errors
    /// That the store does not say. Then nobody knows it, and the agents find out by themselves.
    pub(crate) async fn decided(&self, verdict: Verdict, reason: Option<&str>) -> Result<Verdict> {
        let by = crate::journalled::ourselves("gs_pitr");
        let by = format!("{}@{} (pid {})", by.user, by.host, by.pid);
        let until = Instant::now() + DECIDED_WITHIN;
        loop {
            let decided = self.catalog.decide(self.operation, verdict, &by, reason);
            let failure = match decided.await {
                Ok(decision) => return Ok(decision.verdict),
                Err(error) => Failure::from(error),
            };
            if failure.is_permanent() || Instant::now() >= until {
                let message = format!(
                    "whether the restore is decided is not known: {}; its agents find out by themselves",
                    failure.message
                );
                return Err(self.left(Failure { message, ..failure }));
            }
            sleep(ASK_AGAIN).await;
        }
    }

    /// Takes every node back: the copies are removed, the old databases stay or run again. Only we could have
    /// committed, and did not try, so this holds even if the store does not take the decision.
    ///
    /// Returns what to tell of it.
    pub(crate) async fn back(&self, failure: Failure) -> Failure {
        let decided = self
            .decided(Verdict::Rollback, Some(&failure.message))
            .await;
        if let Err(error) = &decided {
            self.printer.warning(None, &error.message);
        }
        let left = self.live.cancel_all(self.printer).await;
        if left.is_empty() && decided.is_ok() {
            return failure;
        }
        let failure = failure.changed_if(!left.is_empty());
        self.left(failure)
    }

    /// A failure that leaves the restore for somebody to go on with.
    pub(crate) fn left(&self, failure: Failure) -> Failure {
        Failure {
            next: Some(resume(self.operation)),
            unfinished: true,
            ..failure
        }
    }

    /// Promotes every node, and when all are promoted opens them. One that fails takes none back. `away` are nodes whose
    /// agents cannot be told anything, each with whether it is promoted. `lock` is given back as soon as nothing more is opened.
    ///
    /// # Errors
    /// The first node's that failed, after all others have gone as far as they can.
    pub(crate) async fn forward(
        &self,
        mut nodes: Vec<(Part, Member)>,
        away: Vec<(Failure, bool)>,
        lock: Option<SwitchLock>,
    ) -> Result<Vec<Opened>> {
        self.live.set_decided(format!(
            "wait: it is decided, so every agent goes forward by itself; then `{}`",
            resume(self.operation)
        ));
        let text = "it is decided: all nodes go forward";
        let fields = json!({"backup_id": self.plan.backup_id, "operation": self.operation, "verdict": "commit"});
        self.printer.event("decided", fields, Some(text));
        let (later, lost): (Vec<_>, Vec<_>) = away.into_iter().partition(|(_, promoted)| *promoted);
        let lost = lost.into_iter().map(|(failure, _)| failure);
        let opened = match self.all_promoted(&mut nodes, lost).await {
            Ok(()) => Ok(self.all_opened(&mut nodes).await),
            Err(failure) => Err(failure),
        };
        release(lock).await;
        let opened = opened?;
        // A node that is promoted lives on its new timeline, open or not.
        let written = self.write_epochs().await;
        let (mut done, mut failures) = (Vec::new(), Vec::new());
        for (outcome, (part, _)) in opened.into_iter().zip(nodes) {
            match outcome {
                Ok(restored) => done.push((part, restored)),
                Err(failure) => failures.push(failure),
            }
        }
        failures.extend(written.err());
        failures.extend(later.into_iter().map(|(failure, _)| failure));
        self.none_of(failures, "all nodes are promoted and in their places")?;
        Ok(self.with_old(done).await)
    }

    async fn all_promoted(
        &self,
        nodes: &mut [(Part, Member)],
        lost: impl Iterator<Item = Failure>,
    ) -> Result<()> {
        let promoted = nodes.iter_mut().map(|(part, member)| async move {
            match member {
                Member::Working(operation) => promoted(operation)
                    .await
                    .map_err(|e| e.on(part.agent.name())),
                Member::Done => Ok(()),
            }
        });
        let failures = join_all(promoted).await.into_iter().filter_map(Result::err);
        self.none_of(
            failures.chain(lost),
            "not all nodes are promoted, so none is opened",
        )
    }

    async fn all_opened(&self, nodes: &mut [(Part, Member)]) -> Vec<Result<Option<Restored>>> {
        let opened = nodes.iter_mut().map(|(part, member)| async move {
            match member {
                Member::Working(operation) => {
                    let opened = self
                        .open(operation)
                        .await
                        .map_err(|e| e.on(part.agent.name()));
                    opened.map(|status| status.restored)
                }
                Member::Done => Ok(None),
            }
        });
        join_all(opened).await
    }

    async fn open(&self, operation: &mut Operation) -> Result<OperationStatus> {
        let never = CancellationToken::new();
        let request = OpenRequest {
            start: self.plan.start,
        };
        let (agent, id) = (Arc::clone(operation.agent()), operation.id());
        agent.open(id, &request, &never).await?;
        operation.reach(Phase::Done, &never).await
    }

    /// The first failure, if there is one, as the one to return; the others are told.
    ///
    /// # Errors
    /// That one; the restore is left for somebody to go on with.
    pub(crate) fn none_of(
        &self,
        failures: impl IntoIterator<Item = Failure>,
        how_far: &str,
    ) -> Result<()> {
        let mut failures = failures.into_iter();
        let Some(first) = failures.next() else {
            return Ok(());
        };
        for other in failures {
            self.printer.warning(other.node.as_deref(), &other.message);
        }
        let message = format!("{}; {how_far}", first.message);
        Err(self.left(Failure { message, ..first }.changed_if(true)))
    }

    /// Finds what was at the targets, and removes it if that was asked for.
    async fn with_old(&self, done: Vec<(Part, Option<Restored>)>) -> Vec<Opened> {
        let looked = done.into_iter().map(|(part, restored)| async move {
            let old = self.old(&part).await;
            let old = old.unwrap_or_else(|failure| {
                let message = format!("what was there before is not known: {failure}");
                self.printer.warning(Some(&part.agent.name()), &message);
                Vec::new()
            });
            Opened {
                part,
                restored,
                old,
            }
        });
        join_all(looked).await
    }

    async fn old(&self, part: &Part) -> Result<Vec<OldCluster>> {
        let never = CancellationToken::new();
        if self.plan.discard_old {
            let gone = part.agent.discard(self.operation, &never).await?;
            for directory in gone.removed {
                let message = format!("removed {directory}, which was there before");
                let fields = json!({"node": part.agent.name(), "directory": directory});
                self.printer.event("discarded", fields, Some(&message));
            }
        }
        let here = part.agent.restores(&never).await?;
        let ours =
            |old: &OldCluster| old.restore == self.operation && old.target == part.planned.target;
        Ok(here.old.into_iter().filter(ours).collect())
    }
}

/// Lets clients in again.
async fn release(lock: Option<SwitchLock>) {
    if let Some(lock) = lock {
        lock.release().await;
    }
}

/// Has one node promoted and put in its place.
async fn promoted(operation: &mut Operation) -> Result<()> {
    let never = CancellationToken::new();
    // One that was taken up again may be on its way there still.
    operation.reach(Phase::Proved, &never).await?;
    let (agent, id) = (Arc::clone(operation.agent()), operation.id());
    agent.promote(id, &never).await?;
    operation.reach(Phase::Promoted, &never).await?;
    Ok(())
}
