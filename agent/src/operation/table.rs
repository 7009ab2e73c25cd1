//! All operations of the agent: started, found, told what to do, cancelled, forgotten.

use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use agent_api::{
    ApiError, BackupSpec, ErrorKind, OperationSpec, OperationStatus, Phase, Place, PointSpec,
    RepositoryAccess, RestoreSpec, StartOperation,
};
use catalog::ids::BackupId;
use catalog::model::Verdict;
use futures_util::future::BoxFuture;
use pipeline::budget::Budget;
use pipeline::meter::Meter;
use pipeline::store::ObjectStore;
use pipeline::throttle::Throttle;
use sha2::{Digest as _, Sha256};
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use uuid::Uuid;

use crate::config::Config;
use crate::operation::log::OperationLog;
use crate::operation::{BackupCommand, OperationContext, Reporter, RestoreCommand};
use crate::wal::gate::ArchiveGate;
use crate::wal::service::{OpenStore, WalService};

mod orders;
mod supervise;
mod validate;

/// Operations kept after their end.
const ENDED_KEPT: usize = 100;
/// Commands are sent one at a time; one may lie there while the engine is at something else.
const COMMANDS: usize = 1;

/// A point whose client is not heard of is given up so soon: the next one waits for it, and nothing is lost but a restore
/// point that nobody uses.
const POINT_ORPHAN: Duration = Duration::from_secs(30);

/// Who does the work: the real engines, or a test's.
pub trait Engines: Send + Sync + 'static {
    /// The repository's store. Sends no request.
    ///
    /// # Errors
    /// If the access cannot be used at all.
    fn store(&self, access: &RepositoryAccess) -> Result<Arc<dyn ObjectStore>, ApiError>;

    /// Runs a backup to its end.
    fn backup(
        &self,
        cx: OperationContext,
        spec: BackupSpec,
        commands: mpsc::Receiver<BackupCommand>,
    ) -> BoxFuture<'static, Result<(), ApiError>>;

    /// Runs a point to its end.
    fn point(
        &self,
        cx: OperationContext,
        spec: PointSpec,
        commands: mpsc::Receiver<BackupCommand>,
    ) -> BoxFuture<'static, Result<(), ApiError>>;

    /// Runs a restore to its end.
    fn restore(
        &self,
        cx: OperationContext,
        spec: RestoreSpec,
        commands: mpsc::Receiver<RestoreCommand>,
    ) -> BoxFuture<'static, Result<(), ApiError>>;
}

/// What no two operations may have at the same time.
#[derive(Debug, Clone)]
enum Claim {
    /// The node beside the agent, its files.
    Node,
    /// Its restore points: a point needs no file of it, so a backup may run meanwhile. One at a time, so that clients which
    /// are killed again and again do not use up its sessions.
    Points,
    /// A directory to restore into; `node`: it is the data directory of the node beside the agent.
    Target { path: PathBuf, node: bool },
}

impl Claim {
    /// Whether both cannot be had at once: a directory inside another's would be taken for its files.
    fn overlaps(&self, other: &Self) -> bool {
        match (self, other) {
            (Self::Node, Self::Node) | (Self::Points, Self::Points) => true,
            (Self::Node, Self::Points) | (Self::Points, Self::Node) => false,
            (Self::Target { path: a, .. }, Self::Target { path: b, .. }) => {
                a.starts_with(b) || b.starts_with(a)
            }
            (Self::Node | Self::Points, Self::Target { node, .. })
            | (Self::Target { node, .. }, Self::Node | Self::Points) => *node,
        }
    }
}

#[derive(Debug)]
enum Orders {
    /// Of a point too.
    Backup(mpsc::Sender<BackupCommand>),
    Restore(mpsc::Sender<RestoreCommand>),
}

/// One operation.
#[derive(Debug)]
pub struct Operation {
    id: Uuid,
    /// Of the request that started it, to know it again without keeping it.
    request: [u8; 32],
    claim: Claim,
    backup_id: Option<BackupId>,
    log: Arc<OperationLog>,
    cancel: CancellationToken,
    /// Why it was cancelled; the first reason counts.
    reason: Mutex<Option<ApiError>>,
    throttle: Throttle,
    orders: Orders,
    turn: tokio::sync::Mutex<orders::Turn>,
}

impl Operation {
    /// The operation's log.
    #[must_use]
    pub fn log(&self) -> &Arc<OperationLog> {
        &self.log
    }

    /// The operation as it stands.
    #[must_use]
    pub fn status(&self) -> OperationStatus {
        OperationStatus {
            backup_id: self.backup_id.clone(),
            ..self.log.status()
        }
    }

    /// Asks it to stop, for `reason`; nothing happens if it has ended. It ends soon after.
    pub fn cancel(&self, reason: ApiError) {
        if self.log.has_ended() {
            return;
        }
        tracing::warn!(operation = %self.id, "cancelling: {reason}");
        self.reason
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .get_or_insert(reason);
        self.cancel.cancel();
    }

    /// As [`Self::cancel`], unless it has to go forward.
    ///
    /// # Errors
    /// [`ErrorKind::Conflict`] if `commit` is decided about a restore.
    pub fn ask_to_cancel(&self, reason: ApiError) -> Result<(), ApiError> {
        if self.is_restore() && self.status().decision == Some(Verdict::Commit) {
            let message = format!(
                "operation {} cannot be cancelled: it is decided that every node goes forward",
                self.id
            );
            return Err(ApiError::new(ErrorKind::Conflict, message));
        }
        self.cancel(reason);
        Ok(())
    }

    fn is_restore(&self) -> bool {
        matches!(self.orders, Orders::Restore(_))
    }

    /// Whether it has ended early and the same request goes on with it: a restore that is decided.
    fn goes_on(&self) -> bool {
        let status = self.status();
        self.is_restore()
            && status.decision == Some(Verdict::Commit)
            && matches!(status.phase, Phase::Failed | Phase::Cancelled)
    }

    /// Changes its bandwidth limit (bytes a second).
    ///
    /// # Errors
    /// [`ErrorKind::Usage`] for a limit of 0.
    pub fn set_bandwidth(&self, rate: Option<u64>) -> Result<(), ApiError> {
        validate::bandwidth(rate)?;
        self.throttle.set_rate(rate);
        Ok(())
    }
}

/// All operations. Clones share them.
#[derive(Clone)]
pub struct OperationTable {
    shared: Arc<Shared>,
}

struct Shared {
    config: Arc<Config>,
    budget: Budget,
    engines: Arc<dyn Engines>,
    gate: ArchiveGate,
    wal: WalService,
    tasks: TaskTracker,
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    /// In the order of their starts.
    operations: Vec<Arc<Operation>>,
    closed: bool,
}

impl State {
    fn find(&self, id: Uuid) -> Option<&Arc<Operation>> {
        self.operations.iter().find(|operation| operation.id == id)
    }

    /// Whether the request is that of an operation there is; else whether it may start.
    fn admit(
        &self,
        id: Uuid,
        request: [u8; 32],
        claim: &Claim,
    ) -> Result<Option<Arc<Operation>>, ApiError> {
        let conflict = |message: String| ApiError::new(ErrorKind::Conflict, message);
        if let Some(known) = self.find(id).filter(|known| !known.goes_on()) {
            if known.request == request {
                return Ok(Some(Arc::clone(known)));
            }
            let message = format!("operation {id} was started with another request");
            return Err(conflict(message).next("use a new operation id"));
        }
        if self.closed {
            return Err(conflict("the agent is being stopped".to_owned()));
        }
        let in_the_way =
            |other: &&Arc<Operation>| !other.log.has_ended() && other.claim.overlaps(claim);
        let Some(other) = self.operations.iter().find(in_the_way) else {
            return Ok(None);
        };
        let status = other.status();
        let what = match claim {
            Claim::Node => "a backup of this node".to_owned(),
            Claim::Points => "a point of this node".to_owned(),
            Claim::Target { path, .. } => format!("a restore into {}", path.display()),
        };
        let message = format!(
            "{what} cannot begin: a {} is under way, operation {}, begun {}, {}",
            status.kind, other.id, status.started, status.phase
        );
        let error = conflict(message).next("wait until it ends, or cancel it");
        Err(match (claim, &other.claim) {
            // A point is over in moments, or given up soon.
            (Claim::Points, Claim::Points) => error.passing(),
            _ => error,
        })
    }

    fn forget_old(&mut self) {
        let ended = |operation: &Arc<Operation>| operation.log.has_ended();
        let count = self.operations.iter().filter(|o| ended(o)).count();
        let mut surplus = count.saturating_sub(ENDED_KEPT);
        self.operations.retain(|operation| {
            let forget = surplus > 0 && ended(operation);
            surplus -= usize::from(forget);
            !forget
        });
    }
}

impl OperationTable {
    /// An empty table.
    #[must_use]
    pub fn new(config: Arc<Config>, engines: Arc<dyn Engines>) -> Self {
        let budget = Budget::new(config.memory);
        let gate = ArchiveGate::default();
        let open: OpenStore = {
            let engines = Arc::clone(&engines);
            Arc::new(move |access| engines.store(access))
        };
        let wal = WalService::new(Arc::clone(&config), budget.clone(), gate.clone(), open);
        Self {
            shared: Arc::new(Shared {
                config,
                budget,
                engines,
                gate,
                wal,
                tasks: TaskTracker::new(),
                state: Mutex::default(),
            }),
        }
    }

    /// What the database's archiver is told about WAL that operations need.
    #[must_use]
    pub fn gate(&self) -> &ArchiveGate {
        &self.shared.gate
    }

    /// WAL that is shipped all the time.
    #[must_use]
    pub fn wal(&self) -> &WalService {
        &self.shared.wal
    }

    fn state(&self) -> MutexGuard<'_, State> {
        let state = self.shared.state.lock();
        state.unwrap_or_else(PoisonError::into_inner)
    }

    /// Starts an operation, or finds the one that the same request started before. Must be called
    /// within a tokio runtime.
    ///
    /// # Errors
    /// [`ErrorKind::Usage`] and [`ErrorKind::Target`] for a request that cannot be served,
    /// [`ErrorKind::Conflict`] if something is in its way, and what opening the store says.
    pub fn start(&self, mut request: StartOperation) -> Result<Arc<Operation>, ApiError> {
        let id = request.operation;
        let digest = digest(&request)?;
        validate::start(&request)?;
        let claim = self.claim(&mut request.spec)?;
        let known = self.state().admit(id, digest, &claim)?;
        if let Some(known) = known {
            return Ok(known);
        }
        let orphan_timeout = match request.spec {
            OperationSpec::Point(_) => self.shared.config.orphan_timeout.min(POINT_ORPHAN),
            _ => self.shared.config.orphan_timeout,
        };
        let store = self.shared.engines.store(&request.repository)?;
        self.shared.wal.lend(&request.repository);
        let mut state = self.state();
        // Asked again: the lock was not held while the store was opened.
        if let Some(known) = state.admit(id, digest, &claim)? {
            return Ok(known);
        }
        let (operation, run) = self.prepare(request, digest, claim, store);
        // One that goes on after it had ended takes the place of itself.
        state.operations.retain(|known| known.id != id);
        state.operations.push(Arc::clone(&operation));
        state.forget_old();
        drop(state);
        let supervised = supervise::supervise(Arc::clone(&operation), run, orphan_timeout);
        self.shared.tasks.spawn(supervised);
        Ok(operation)
    }

    /// What the operation claims; a restore's target becomes the path that was checked.
    fn claim(&self, spec: &mut OperationSpec) -> Result<Claim, ApiError> {
        let restore = match spec {
            OperationSpec::Backup(_) => return Ok(Claim::Node),
            OperationSpec::Point(_) => return Ok(Claim::Points),
            OperationSpec::Restore(restore) => restore,
        };
        let config = &self.shared.config;
        let target = match restore.place {
            Place::Fresh => config.allowed_target(restore.target.as_ref())?,
            Place::Replace { .. } | Place::InPlace { .. } => {
                crate::restore::real_target(config, restore.target.as_ref())?
            }
        };
        let text = target.to_str().ok_or_else(|| {
            let message = format!("the target {} is not UTF-8", target.display());
            ApiError::new(ErrorKind::Target, message)
        })?;
        text.clone_into(&mut restore.target);
        let pgdata = config.pgdata.as_ref();
        let node = pgdata.is_some_and(|pgdata| pgdata.canonicalize().is_ok_and(|it| it == target));
        Ok(Claim::Target { path: target, node })
    }

    fn prepare(
        &self,
        request: StartOperation,
        digest: [u8; 32],
        claim: Claim,
        store: Arc<dyn ObjectStore>,
    ) -> (Arc<Operation>, BoxFuture<'static, Result<(), ApiError>>) {
        let id = request.operation;
        let (kind, backup_id) = match &request.spec {
            OperationSpec::Backup(spec) => ("backup", Some(spec.backup_id.clone())),
            OperationSpec::Point(_) => ("point", None),
            OperationSpec::Restore(spec) => ("restore", Some(spec.backup_id.clone())),
        };
        let meter = Arc::new(Meter::default());
        let log = OperationLog::new(id, kind, Arc::clone(&meter));
        let cx = OperationContext {
            id,
            cancel: CancellationToken::new(),
            store,
            budget: self.shared.budget.clone(),
            throttle: Throttle::new(request.bandwidth),
            meter,
            report: Reporter::new(Arc::clone(&log)),
            config: Arc::clone(&self.shared.config),
            wal: self.shared.wal.for_client(request.repository.clone()),
            repository: Some(RepositoryAccess {
                credentials: None,
                ..request.repository
            }),
            gate: self.shared.gate.clone(),
        };
        let cancel = cx.cancel.clone();
        let throttle = cx.throttle.clone();
        let engines = &self.shared.engines;
        let (orders, run) = match request.spec {
            OperationSpec::Backup(spec) => {
                let (sender, commands) = mpsc::channel(COMMANDS);
                (Orders::Backup(sender), engines.backup(cx, spec, commands))
            }
            OperationSpec::Point(spec) => {
                let (sender, commands) = mpsc::channel(COMMANDS);
                (Orders::Backup(sender), engines.point(cx, spec, commands))
            }
            OperationSpec::Restore(spec) => {
                let (sender, commands) = mpsc::channel(COMMANDS);
                let run = engines.restore(cx, *spec, commands);
                (Orders::Restore(sender), run)
            }
        };
        let operation = Operation {
            id,
            request: digest,
            claim,
            backup_id,
            log,
            cancel,
            reason: Mutex::default(),
            throttle,
            orders,
            turn: tokio::sync::Mutex::default(),
        };
        (Arc::new(operation), run)
    }

    /// The operation, and notes that somebody asked about it.
    ///
    /// # Errors
    /// [`ErrorKind::NotFound`].
    pub fn get(&self, id: Uuid) -> Result<Arc<Operation>, ApiError> {
        let found = self.state().find(id).cloned();
        let operation = found.ok_or_else(|| {
            let message = format!(
                "the agent knows no operation {id}; it forgets them when it is restarted, which also \
                 ends those that were running"
            );
            ApiError::new(ErrorKind::NotFound, message)
        })?;
        operation.log.touch();
        Ok(operation)
    }

    /// Whether there is an operation of that id that has not ended.
    #[must_use]
    pub fn is_running(&self, id: Uuid) -> bool {
        let state = self.state();
        state.find(id).is_some_and(|known| !known.log.has_ended())
    }

    /// All operations, oldest first.
    #[must_use]
    pub fn list(&self) -> Vec<OperationStatus> {
        let operations = self.state().operations.clone();
        operations
            .iter()
            .map(|operation| operation.status())
            .collect()
    }

    /// Takes no new operation, cancels those that run, and waits at most `deadline` for their ends.
    /// Returns whether all have ended.
    pub async fn shut_down(&self, deadline: Duration) -> bool {
        let running = {
            let mut state = self.state();
            state.closed = true;
            state.operations.clone()
        };
        for operation in running {
            let reason = ApiError::new(ErrorKind::Cancelled, "the agent was stopped")
                .next("start the agent, then run the command again");
            operation.cancel(reason);
        }
        self.shared.tasks.close();
        let all = self.shared.tasks.wait();
        let ended = tokio::time::timeout(deadline, all).await.is_ok();
        // After those that follow it.
        self.shared.wal.shut_down().await;
        ended
    }
}

/// What a request is known by again. Without the credentials: they may be newer the second time, and no
/// trace of them is kept. A restore may be taken up from another host, which reaches the store by another name.
fn digest(request: &StartOperation) -> Result<[u8; 32], ApiError> {
    let mut request = request.clone();
    request.repository.credentials = None;
    if matches!(request.spec, OperationSpec::Restore(_)) {
        request.bandwidth = None;
        request.repository.endpoint = None;
        request.repository.ca_pem = None;
    }
    let bytes = serde_json::to_vec(&request)
        .map_err(|error| ApiError::new(ErrorKind::Internal, error.to_string()))?;
    Ok(Sha256::digest(bytes).into())
}

#[cfg(test)]
pub(crate) mod tests;
