//! Operations on agents: started, watched, and ended in order whatever happens.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use agent_api::{ApiError, ErrorKind, EventKind, OperationStatus, Phase, Progress, StartOperation};
use catalog::model::NodeBackup;
use futures_util::StreamExt as _;
use futures_util::future::join_all;
use serde_json::json;
use tokio::task::JoinHandle;
use tokio::time::{Instant, sleep, timeout};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use uuid::Uuid;

use crate::agents::{Agent, Events};
use crate::failure::{Failure, Result};
use crate::printer::{NodeBar, Printer};

/// A status is asked for at least this often, so that a connection that died silently is noticed.
const STATUS_EVERY: Duration = Duration::from_secs(10);
/// Pause before the event stream is opened again.
const REOPEN_AFTER: Duration = Duration::from_millis(500);
/// Progress lines for machines come at most this often per node.
const PROGRESS_EVERY: Duration = Duration::from_secs(1);
/// Every operation is asked about this often, also while nobody watches it: its agent must not take it for
/// one without a client.
const SIGN_OF_LIFE: Duration = Duration::from_secs(1);
/// How long an agent is waited for that is to say whether it knows an operation.
const TELL_WITHIN: Duration = Duration::from_secs(5);
/// How long an agent has to end an operation that was cancelled.
const END_WITHIN: Duration = Duration::from_mins(1);

/// Operations that have been started and not yet been seen to end.
#[derive(Debug, Clone, Default)]
pub(crate) struct Live {
    operations: Arc<Mutex<BTreeMap<Uuid, Arc<Agent>>>>,
    /// What to do about them if this program leaves at once.
    if_left: Arc<Mutex<Option<String>>>,
    /// Whether it is too late to cancel them.
    decided: Arc<AtomicBool>,
    /// Tasks that may have locked the cluster, and unlock it when they are told to stop.
    lockers: TaskTracker,
}

/// Signs of life to agents, until it is dropped.
#[derive(Debug)]
pub(crate) struct SignsOfLife(tokio::task::JoinHandle<()>);

impl Drop for SignsOfLife {
    fn drop(&mut self) {
        self.0.abort();
    }
}

impl Live {
    fn all(&self) -> MutexGuard<'_, BTreeMap<Uuid, Arc<Agent>>> {
        self.operations
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }

    /// Runs what may lock the cluster, and unlocks it before it ends, in a task that nobody drops.
    pub(crate) fn unlocks_itself<T: Send + 'static>(
        &self,
        task: impl Future<Output = T> + Send + 'static,
    ) -> JoinHandle<T> {
        self.lockers.spawn(task)
    }

    /// Waits until those have ended that may have locked the cluster. They have been told to stop.
    pub(crate) async fn unlocked(&self) {
        self.lockers.close();
        self.lockers.wait().await;
    }

    /// Sets what to do about them if this program leaves at once.
    pub(crate) fn set_if_left(&self, next: impl Into<String>) {
        let mut if_left = self.if_left.lock().unwrap_or_else(PoisonError::into_inner);
        *if_left = Some(next.into());
    }

    /// From now on they are not cancelled any more.
    pub(crate) fn set_decided(&self, next: impl Into<String>) {
        self.set_if_left(next);
        self.decided.store(true, Ordering::Relaxed);
    }

    /// Whether it is too late to cancel them.
    pub(crate) fn is_decided(&self) -> bool {
        self.decided.load(Ordering::Relaxed)
    }

    /// What to do about them if this program leaves at once.
    pub(crate) fn if_left(&self) -> Option<String> {
        let if_left = self.if_left.lock().unwrap_or_else(PoisonError::into_inner);
        if_left.clone()
    }

    /// Shows every agent that its operation still has a client, while others are waited for.
    pub(crate) fn signs_of_life(&self) -> SignsOfLife {
        let live = self.clone();
        SignsOfLife(tokio::spawn(async move {
            let never = CancellationToken::new();
            loop {
                sleep(SIGN_OF_LIFE).await;
                let all = live.all().clone();
                // What an agent answers, or that it does not, is seen by those who watch.
                let asked = all.iter().map(|(operation, agent)| {
                    let asked = agent.status_now(*operation, &never);
                    async { drop(timeout(SIGN_OF_LIFE, asked).await) }
                });
                join_all(asked).await;
            }
        }))
    }

    fn ended(&self, operation: Uuid) {
        self.all().remove(&operation);
    }

    /// The agents they are on.
    pub(crate) fn names(&self) -> Vec<String> {
        let mut names: Vec<_> = self.all().values().map(|agent| agent.name()).collect();
        names.sort();
        names.dedup();
        names
    }

    /// Cancels all of them and waits until each agent says that its own has ended. Returns those that
    /// did not.
    pub(crate) async fn cancel_all(&self, printer: &Printer) -> Vec<String> {
        self.cancel_where(printer, |_| true).await;
        self.names()
    }

    /// Cancels an operation that another began, and waits for its end. Whether it has ended.
    pub(crate) async fn cancel_stray(agent: &Agent, operation: Uuid) -> bool {
        timeout(END_WITHIN, cancel(agent, operation))
            .await
            .is_ok_and(|ended| ended)
    }

    /// Cancels those on one agent. Whether all of them have ended.
    pub(crate) async fn cancel_on(&self, agent: &Arc<Agent>, printer: &Printer) -> bool {
        let on = |other: &Arc<Agent>| Arc::ptr_eq(other, agent);
        self.cancel_where(printer, on).await;
        !self.all().values().any(on)
    }

    async fn cancel_where(&self, printer: &Printer, of: impl Fn(&Arc<Agent>) -> bool) {
        let all = self.all().clone().into_iter();
        let all: Vec<_> = all.filter(|(_, agent)| of(agent)).collect();
        let ends = all.into_iter().map(|(operation, agent)| async move {
            if timeout(END_WITHIN, cancel(&agent, operation)).await.is_ok_and(|ended| ended) {
                self.ended(operation);
            } else {
                let message = "did not confirm that it has stopped; it ends by itself when nobody asks for it";
                printer.warning(Some(&agent.name()), message);
            }
        });
        join_all(ends).await;
    }
}

/// Why an operation that a restore point is wanted of is no more: its agent was restarted and has forgotten it, or it has ended.
/// `None`: it is there, or nobody can tell. Takes seconds at most.
pub(crate) async fn lost(agent: &Agent, operation: Uuid) -> Option<ApiError> {
    let never = CancellationToken::new();
    let asked = timeout(TELL_WITHIN, agent.status_now(operation, &never)).await;
    let error = match asked.ok()?.ok()? {
        None => {
            let message = "the agent was restarted and has lost its operation";
            ApiError::new(ErrorKind::AgentUnreachable, message)
        }
        Some(status) if status.phase.is_end() => status.error.unwrap_or_else(|| {
            let message = format!("its operation has ended as `{}`", status.phase);
            ApiError::new(ErrorKind::Conflict, message)
        }),
        Some(_) => return None,
    };
    Some(error)
}

/// Cancels one operation and waits for its end.
async fn cancel(agent: &Agent, operation: Uuid) -> bool {
    let never = CancellationToken::new();
    let mut status = match agent.cancel(operation, &never).await {
        Ok(status) => status,
        // Started or not: an agent that does not know it has nothing to end.
        Err(failure) => return failure.kind == ErrorKind::NotFound,
    };
    while !status.phase.is_end() {
        sleep(REOPEN_AFTER / 2).await;
        match agent.status(operation, &never).await {
            Ok(now) => status = now,
            Err(_) => return false,
        }
    }
    true
}

/// How an operation stands, as far as its agent says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Standing {
    /// It is under way, or done.
    Goes,
    /// The agent does not answer.
    Away,
    /// The agent was restarted, or has given it up.
    Lost,
    /// It has failed.
    Failed,
}

/// One operation on one agent, as this program watches it.
#[derive(Debug)]
pub(crate) struct Operation {
    agent: Arc<Agent>,
    id: Uuid,
    /// The node in events, where it is known.
    node: Uuid,
    live: Live,
    printer: Printer,
    bar: NodeBar,
    events: Option<Events>,
    after: u64,
    phase: Option<Phase>,
    warnings: usize,
    progress: (Progress, Option<Instant>),
    begun: Instant,
    copied: Option<Duration>,
    /// What its agent says of its copy, once that is whole and worth as much without the operation.
    copy: Option<Box<NodeBackup>>,
}

impl Operation {
    /// Starts an operation for `node` on `agent`.
    ///
    /// # Errors
    /// If the agent refuses it or does not answer.
    pub(crate) async fn start(
        agent: &Arc<Agent>,
        node: Uuid,
        request: &StartOperation,
        live: &Live,
        printer: &Printer,
        cancel: &CancellationToken,
    ) -> Result<Self> {
        let mut operation = Self::find(agent, node, request.operation, live, printer);
        let status = agent.start(request, cancel).await?;
        operation.saw(&status);
        Ok(operation)
    }

    /// Takes up an operation that was or will be started. Nothing is sent.
    pub(crate) fn find(
        agent: &Arc<Agent>,
        node: Uuid,
        id: Uuid,
        live: &Live,
        printer: &Printer,
    ) -> Self {
        // Known before it is sent: a lost reply may belong to an operation that runs.
        live.all().insert(id, Arc::clone(agent));
        Self {
            agent: Arc::clone(agent),
            id,
            node,
            live: live.clone(),
            printer: printer.clone(),
            bar: printer.bar(&agent.name()),
            events: None,
            after: 0,
            phase: None,
            warnings: 0,
            progress: (Progress::default(), None),
            begun: Instant::now(),
            copied: None,
            copy: None,
        }
    }

    /// Its id.
    pub(crate) fn id(&self) -> Uuid {
        self.id
    }

    /// The node it is about.
    pub(crate) fn node(&self) -> Uuid {
        self.node
    }

    /// The agent it is on.
    pub(crate) fn agent(&self) -> &Arc<Agent> {
        &self.agent
    }

    /// From the order until the copy was whole, by this machine's clock.
    pub(crate) fn copied(&self) -> Duration {
        self.copied.unwrap_or_default()
    }

    /// Whether it has made a copy, or stands for one that has.
    pub(crate) fn is_of_a_copy(&self) -> bool {
        self.copied.is_some()
    }

    /// Its copy, if that is worth as much without it: its WAL is shipped all the time.
    pub(crate) fn copy(&self) -> Option<&NodeBackup> {
        self.copy.as_deref()
    }

    /// Another operation takes its place, which its agent has lost. What is known of its copy stays.
    pub(crate) fn becomes(&mut self, next: Self) {
        self.live.ended(self.id);
        *self = Self {
            copied: self.copied,
            copy: self.copy.take(),
            ..next
        };
    }

    /// How it stands, asked once.
    pub(crate) async fn stands(&self, cancel: &CancellationToken) -> Standing {
        let asked = self.agent.status_now(self.id, cancel);
        match timeout(TELL_WITHIN, asked).await {
            Err(_) | Ok(Err(_)) => Standing::Away,
            Ok(Ok(None)) => Standing::Lost,
            Ok(Ok(Some(status))) => match status.phase {
                Phase::Cancelled => Standing::Lost,
                Phase::Failed => Standing::Failed,
                _ => Standing::Goes,
            },
        }
    }

    /// Watches it until it is in phase `wanted`, or beyond it.
    ///
    /// # Errors
    /// What it failed with; a cancellation; that the agent is lost.
    pub(crate) async fn reach(
        &mut self,
        wanted: Phase,
        cancel: &CancellationToken,
    ) -> Result<OperationStatus> {
        loop {
            let status = self.agent.status(self.id, cancel).await?;
            self.saw(&status);
            if status.phase == Phase::Done || (!status.phase.is_end() && status.phase >= wanted) {
                return Ok(status);
            }
            if status.phase.is_end() {
                return Err(self.ended_early(status));
            }
            tokio::select! {
                () = self.something_happens() => {}
                () = cancel.cancelled() => return Err(Failure::cancelled()),
            }
        }
    }

    fn ended_early(&self, status: OperationStatus) -> Failure {
        let failure = match (status.error, status.phase) {
            (Some(error), _) => Failure::from(error),
            (None, Phase::Cancelled) => {
                let message = "the operation was cancelled on the agent's side";
                Failure::new(ErrorKind::Cancelled, message)
            }
            (None, phase) => {
                let message = format!("the operation ended as `{}`, unexpectedly", phase.name());
                Failure::new(ErrorKind::Internal, message)
            }
        };
        failure.on(self.agent.name())
    }

    /// Returns when there may be news beyond progress, which is shown as it comes.
    async fn something_happens(&mut self) {
        let until = Instant::now() + STATUS_EVERY;
        if self.events.is_none() {
            self.events = self.agent.events(self.id, self.after).await.ok();
            if self.events.is_none() {
                sleep(REOPEN_AFTER).await;
                return;
            }
        }
        loop {
            let Some(events) = &mut self.events else {
                return;
            };
            match tokio::time::timeout_at(until, events.next()).await {
                Ok(Some(Ok(event))) => {
                    self.after = event.seq;
                    match event.what {
                        EventKind::Progress { progress } => self.saw_progress(&progress),
                        EventKind::Phase { .. }
                        | EventKind::Warning { .. }
                        | EventKind::Error { .. } => return,
                    }
                }
                Ok(Some(Err(_)) | None) => {
                    self.events = None;
                    sleep(REOPEN_AFTER).await;
                    return;
                }
                Err(_) => return,
            }
        }
    }

    fn saw(&mut self, status: &OperationStatus) {
        let name = self.agent.name();
        for warning in status.warnings.iter().skip(self.warnings) {
            self.printer.warning(Some(&name), warning);
        }
        self.warnings = self.warnings.max(status.warnings.len());
        if self.copy.is_none() {
            self.copy.clone_from(&status.backup);
        }
        self.saw_progress(&status.progress);
        if self.phase != Some(status.phase) {
            self.phase = Some(status.phase);
            if status.phase == Phase::Copied {
                self.copied.get_or_insert_with(|| self.begun.elapsed());
            }
            self.bar.phase(status.phase);
            let phase = status.phase.name();
            let fields = json!({"node": name, "node_id": self.node, "phase": phase, "progress": status.progress});
            // Where bars are, they show it.
            let text = (!self.printer.has_bars()).then(|| format!("{name}: {phase}"));
            self.printer.event("phase", fields, text.as_deref());
        }
        if status.phase.is_end() {
            self.live.ended(self.id);
        }
    }

    fn saw_progress(&mut self, progress: &Progress) {
        self.bar.progress(progress);
        let (last, at) = &mut self.progress;
        if last == progress || at.is_some_and(|at| at.elapsed() < PROGRESS_EVERY) {
            return;
        }
        (*last, *at) = (*progress, Some(Instant::now()));
        let fields = json!({"node": self.agent.name(), "node_id": self.node, "progress": progress});
        self.printer.event("progress", fields, None);
    }
}

/// Runs `work` for every item at the same time. The first failure cancels the others, and is the one
/// that is returned after all have stopped.
pub(crate) async fn all_or_cancel<I, T, F, W>(
    items: I,
    cancel: &CancellationToken,
    work: W,
) -> Result<Vec<T>>
where
    I: IntoIterator,
    F: Future<Output = Result<T>>,
    W: Fn(I::Item, CancellationToken) -> F,
{
    let scope = cancel.child_token();
    let first: Mutex<Option<Failure>> = Mutex::new(None);
    let runs = items.into_iter().map(|item| {
        let run = work(item, scope.clone());
        let (scope, first) = (&scope, &first);
        async move {
            match run.await {
                Ok(value) => Some(value),
                Err(failure) => {
                    let mut first = first.lock().unwrap_or_else(PoisonError::into_inner);
                    first.get_or_insert(failure);
                    scope.cancel();
                    None
                }
            }
        }
    });
    let done = join_all(runs).await;
    match first.into_inner().unwrap_or_else(PoisonError::into_inner) {
        Some(failure) => Err(failure),
        None => Ok(done.into_iter().flatten().collect()),
    }
}
