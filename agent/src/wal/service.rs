//! WAL that is shipped all the time: after its first backup a node's agent sends every segment, whatever becomes of the
//! client, of the agent itself, of the database or of the store.
//!
//! One node, one epoch, one repository. What is on is remembered in a small file (`saved`), so that a restarted agent
//! goes on where it was. WAL is held by a permanent slot of the service's own (PostgreSQL) or by the database's archiver, which
//! asks the agent (openGauss). When too much would be held, or WAL was lost, the stretch ends in a gap: the hold is let go,
//! the gap is written down in the bucket, and a new stretch begins where the database stands then (`run`).
//!
//! Killed here: the file says what was on, the slot holds what is not in the bucket. Wrong bytes: every segment is checked
//! before it is sent, and one that the bucket has with other content ends the service in `refused`. Slow: the rule of
//! [`hold`](super::hold) decides, every two seconds.

mod begin;
mod run;
mod saved;
mod shown;
mod stream;
mod way;

use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use agent_api::{
    ApiError, Credentials, ErrorKind, RepositoryAccess, StartWal, WalState, WalStatus,
};
use catalog::ids::EpochId;
use pipeline::budget::Budget;
use pipeline::store::ObjectStore;
use tokio::sync::Notify;
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

use self::run::Run;
use self::saved::{Place, Refused, Saved};
use self::shown::Shown;
use self::stream::StreamSide;
pub use self::stream::WalStream;
pub(crate) use self::stream::flushed;
use self::way::SetAside;
use crate::config::Config;
use crate::engine::slot;
use crate::wal::gate::{ArchiveGate, Held};

/// How long a task that was told to end is waited for.
const STOP_GRACE: Duration = Duration::from_secs(30);
/// How long a backup waits for the service to begin.
const BEGIN: Duration = Duration::from_mins(1);
/// For what must not hold up a restore.
const QUICK: Duration = Duration::from_secs(40);
/// What is done about WAL that ended in a gap.
const NEW_BASE: &str = "gs_pitr backup: only a new base joins the WAL that is shipped now";

/// Opens the store of a repository. Sends no request.
pub type OpenStore =
    Arc<dyn Fn(&RepositoryAccess) -> Result<Arc<dyn ObjectStore>, ApiError> + Send + Sync>;

/// The service. Clones share it.
#[derive(Clone)]
pub struct WalService {
    shared: Arc<Shared>,
    /// The repository as the client of an operation named it, with what it lends.
    client: Option<RepositoryAccess>,
}

struct Shared {
    config: Arc<Config>,
    budget: Budget,
    gate: ArchiveGate,
    open: OpenStore,
    place: Place,
    state: Mutex<State>,
    /// Somebody lent credentials, or changed a limit.
    woken: Notify,
    /// A base backup joined the stretch.
    based: Arc<Notify>,
    /// One order at a time.
    turn: tokio::sync::Mutex<()>,
}

#[derive(Default)]
struct State {
    saved: Option<Saved>,
    lent: Option<Credentials>,
    /// Counts what was lent.
    lendings: u64,
    side: Option<StreamSide>,
    /// The hold on an archiver.
    held: Option<Held>,
    memory: SetAside,
    shown: Shown,
    running: Option<Running>,
    /// No more orders: the agent ends.
    closed: bool,
}

struct Running {
    cancel: CancellationToken,
    task: JoinHandle<()>,
}

impl fmt::Debug for WalService {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("WalService")
            .field("state", &self.status().state)
            .finish_non_exhaustive()
    }
}

impl Shared {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Keeps what is remembered; a disk that takes nothing does not end the shipping.
    async fn keep(&self) {
        let saved = self.state().saved.clone();
        let (Some(saved), place) = (saved, self.place.clone()) else {
            return;
        };
        let kept = tokio::task::spawn_blocking(move || place.write(&saved)).await;
        if let Ok(Err(error)) = kept {
            let path = self.place.path().display();
            tracing::error!(
                "cannot write {path}: {error}; a restarted agent would not know what it shipped"
            );
        }
    }
}

impl State {
    /// Ends the stretch for whoever follows it.
    fn end(&mut self, why: &ApiError) {
        if let Some(side) = self.side.take() {
            side.end(why.clone());
        }
    }
}

impl WalService {
    /// A service that is off, until [`Self::resume`] or an order.
    #[must_use]
    pub fn new(config: Arc<Config>, budget: Budget, gate: ArchiveGate, open: OpenStore) -> Self {
        let place = Place::new(&config.state_dir, config.pg_port());
        Self {
            shared: Arc::new(Shared {
                config,
                budget,
                gate,
                open,
                place,
                state: Mutex::default(),
                woken: Notify::new(),
                based: Arc::default(),
                turn: tokio::sync::Mutex::default(),
            }),
            client: None,
        }
    }

    /// A service that ships nothing and has no way to: for operations that are run without an agent.
    #[must_use]
    pub fn none() -> Self {
        let open: OpenStore = Arc::new(|_| {
            let message = "there is no agent that could ship WAL";
            Err(ApiError::new(ErrorKind::Conflict, message))
        });
        let config = Arc::new(Config::default());
        let budget = Budget::new(config.memory);
        Self::new(config, budget, ArchiveGate::default(), open)
    }

    /// The service as one operation has it, whose client named the repository so.
    #[must_use]
    pub fn for_client(&self, repository: RepositoryAccess) -> Self {
        Self {
            shared: Arc::clone(&self.shared),
            client: Some(repository),
        }
    }

    /// Whether a slot is the service's own: it stays as long as the service is on.
    #[must_use]
    pub fn holds_slot(&self, name: &str) -> bool {
        let state = self.shared.state();
        let slot = state.saved.as_ref().and_then(|saved| saved.slot.as_deref());
        slot == Some(name)
    }

    /// Goes on with what was on when the agent ended. Call it within a runtime, before anybody can ask the archive gate.
    pub fn resume(&self) {
        let shared = &self.shared;
        let saved = match shared.place.read() {
            Ok(Some(saved)) => saved,
            Ok(None) => return,
            Err(error) => {
                let path = shared.place.path().display();
                let message = format!("cannot read {path}: {error}; WAL is not shipped");
                tracing::error!("{message}");
                let error = ApiError::new(ErrorKind::Internal, message);
                shared.state().shown.error =
                    Some(error.next("gs_pitr wal start, or gs_pitr backup"));
                return;
            }
        };
        tracing::info!(node = %saved.node, epoch = %saved.epoch, "WAL is shipped again");
        let mut state = shared.state();
        if let (None, Some(stretch)) = (&saved.slot, saved.stretch)
            && let Some(size) = stretch.size()
        {
            let held = shared.gate.hold(Uuid::now_v7(), size);
            held.handle().advance(stretch.shipped());
            state.held = Some(held);
        }
        let refused = saved.refused.is_some();
        state.saved = Some(saved);
        drop(state);
        if !refused {
            self.spawn();
        }
    }

    /// Follows an order. The same again changes nothing but what is lent and the limits, and takes a refusal back.
    ///
    /// # Errors
    /// [`ErrorKind::Conflict`] if it is on for something else and the order does not say `replace`;
    /// [`ErrorKind::Usage`] for one that cannot be followed, or if the agent cannot remember it.
    pub async fn start(&self, order: StartWal) -> Result<WalStatus, ApiError> {
        validate(&order)?;
        let _turn = self.shared.turn.lock().await;
        self.admitted(order, false).await?;
        Ok(self.status())
    }

    /// Sees to it that the WAL of a backup's node is shipped all the time from before its beginning, and waits until it is. What
    /// is on already keeps its limits.
    ///
    /// # Errors
    /// Why it is not: then the backup has to ship its own.
    pub async fn start_for_backup(
        &self,
        node: Uuid,
        epoch: &EpochId,
        level: i32,
        bandwidth: Option<u64>,
    ) -> Result<WalStream, ApiError> {
        let Some(repository) = self.client.clone() else {
            return self.stream(node, epoch);
        };
        // The epoch was just seen to be the open one of this database: what is on for another one of this repository is over.
        let replace = {
            let state = self.shared.state();
            state
                .saved
                .as_ref()
                .is_some_and(|saved| saved.is_of(&repository))
        };
        let order = StartWal {
            repository,
            node_id: node,
            epoch: epoch.clone(),
            level,
            bandwidth,
            hold: None,
            replace,
        };
        {
            let _turn = self.shared.turn.lock().await;
            self.admitted(order, true).await?;
        }
        let begun = async {
            loop {
                match self.stream(node, epoch) {
                    Ok(stream) => return Ok(stream),
                    Err(error) if self.status().state == WalState::Refused => return Err(error),
                    Err(_) => tokio::time::sleep(Duration::from_millis(100)).await,
                }
            }
        };
        match tokio::time::timeout(BEGIN, begun).await {
            Ok(begun) => begun,
            Err(_) => self.stream(node, epoch),
        }
    }

    /// `keep`: what is on for the same keeps its limits.
    async fn admitted(&self, order: StartWal, keep: bool) -> Result<(), ApiError> {
        let shared = &self.shared;
        let known = {
            let state = shared.state();
            if state.closed {
                let message = "the agent is being stopped";
                return Err(ApiError::new(ErrorKind::Conflict, message));
            }
            state.saved.clone()
        };
        if let Some(known) = known {
            if known.is_for(&order) {
                return self.again(&known, &order, keep).await;
            }
            if !order.replace {
                return Err(occupied(&known));
            }
            self.end("another order takes its place").await?;
        }
        let lent = order.repository.credentials.clone();
        let lent = lent.filter(|_| shared.config.credentials.is_none());
        let saved = Saved::new(&order, lent.is_some());
        let (place, copy) = (shared.place.clone(), saved.clone());
        let kept = tokio::task::spawn_blocking(move || place.write(&copy)).await;
        kept.map_err(crate::engine::errors::internal)?
            .map_err(|error| {
                let message = format!(
                    "the agent cannot remember what it ships: {}: {error}",
                    shared.place.path().display()
                );
                ApiError::new(ErrorKind::Usage, message).next(
                    "start the agent with --state-dir, a directory that its user can write to",
                )
            })?;
        {
            let mut state = shared.state();
            state.saved = Some(saved);
            state.shown = Shown::default();
            state.lend(lent);
        }
        tracing::info!(node = %order.node_id, epoch = %order.epoch, "WAL is shipped all the time from now on");
        self.spawn();
        Ok(())
    }

    /// The order that is followed already.
    async fn again(&self, known: &Saved, order: &StartWal, keep: bool) -> Result<(), ApiError> {
        let shared = &self.shared;
        let lent = order.repository.credentials.clone();
        let lent = lent.filter(|_| shared.config.credentials.is_none());
        let change = |saved: &mut Saved| {
            if !keep {
                (saved.level, saved.bandwidth, saved.hold) =
                    (order.level, order.bandwidth, order.hold);
            }
            saved.repository = RepositoryAccess {
                credentials: None,
                ..order.repository.clone()
            };
            saved.lent = lent.is_some();
            saved.refused = None;
        };
        let mut new = known.clone();
        change(&mut new);
        let restart = new != *known;
        if restart {
            self.halt().await;
        }
        {
            let mut state = shared.state();
            if let Some(saved) = state.saved.as_mut().filter(|_| restart) {
                change(saved);
            }
            state.lend(lent);
        }
        if restart {
            shared.keep().await;
            self.spawn();
        }
        shared.woken.notify_one();
        Ok(())
    }

    /// Takes credentials that a client of the same repository lends, if it waits for some.
    pub fn lend(&self, repository: &RepositoryAccess) {
        let mut state = self.shared.state();
        let waits = state
            .saved
            .as_ref()
            .is_some_and(|saved| saved.lent && saved.is_of(repository));
        if waits && self.shared.config.credentials.is_none() && repository.credentials.is_some() {
            state.lend(repository.credentials.clone());
            drop(state);
            self.shared.woken.notify_one();
        }
    }

    /// Stops shipping for good, and lets go of WAL.
    ///
    /// # Errors
    /// If a slot could not be dropped; the service is off all the same, and the agent drops it later.
    pub async fn stop(&self) -> Result<WalStatus, ApiError> {
        let _turn = self.shared.turn.lock().await;
        self.end("it was told to stop").await?;
        Ok(self.status())
    }

    /// Stops for good because another history takes the database's place, so that not a byte of it gets into the old epoch.
    pub async fn end_of_epoch(&self, why: &str) {
        let _turn = self.shared.turn.lock().await;
        let ended = tokio::time::timeout(QUICK, self.end(why)).await;
        if let Err(why) = ended
            .map_err(|_| "no answer in time".to_owned())
            .and_then(|ended| ended.map_err(|e| e.message))
        {
            // It goes with the database that is replaced; should that come back, the agent drops it.
            tracing::warn!("the slot was not dropped: {why}");
        }
    }

    /// Ends the task and keeps everything for the next start of the agent.
    pub async fn shut_down(&self) {
        self.shared.state().closed = true;
        self.halt().await;
    }

    async fn end(&self, why: &str) -> Result<(), ApiError> {
        let shared = &self.shared;
        if shared.state().saved.is_none() {
            return Ok(());
        }
        self.halt().await;
        let saved = {
            let mut state = shared.state();
            let error = ApiError::new(
                ErrorKind::Conflict,
                format!("WAL is shipped no more: {why}"),
            );
            state.end(&error);
            state.held = None;
            state.memory = SetAside::default();
            state.shown = Shown::default();
            state.lent = None;
            state.saved.take()
        };
        tracing::info!("WAL is shipped no more: {why}");
        let place = shared.place.clone();
        let forgotten = tokio::task::spawn_blocking(move || place.forget()).await;
        if let Ok(Err(error)) = forgotten {
            tracing::error!("cannot remove {}: {error}", shared.place.path().display());
        }
        begin::let_go_of_archive(&shared.config);
        match saved.and_then(|saved| saved.slot) {
            Some(slot) => slot::drop_left(&shared.config, &slot).await,
            None => Ok(()),
        }
    }

    /// Ends the task.
    async fn halt(&self) {
        let running = self.shared.state().running.take();
        if let Some(Running { cancel, task }) = running {
            cancel.cancel();
            let abort = task.abort_handle();
            if tokio::time::timeout(STOP_GRACE, task).await.is_err() {
                abort.abort();
            }
        }
        self.shared.state().shown.running = false;
    }

    fn spawn(&self) {
        let cancel = CancellationToken::new();
        let run = Run::new(Arc::clone(&self.shared), cancel.clone());
        let task = tokio::spawn(run.run());
        self.shared.state().running = Some(Running { cancel, task });
    }
}

impl State {
    fn lend(&mut self, lent: Option<Credentials>) {
        if lent.is_some() {
            self.lent = lent;
            self.lendings += 1;
            // Whatever it was, it is tried anew.
            self.shown.error = None;
        }
    }

    /// Notes that it writes nothing from now on.
    fn refuse(&mut self, error: &ApiError) {
        self.end(error);
        if let Some(saved) = &mut self.saved {
            saved.break_off(&error.message);
            saved.refused = Some(Refused {
                why: error.message.clone(),
                next: error.next.clone(),
            });
        }
        self.shown.running = false;
    }
}

fn validate(order: &StartWal) -> Result<(), ApiError> {
    let usage = |message: &str| Err(ApiError::new(ErrorKind::Usage, message));
    if !(1..=19).contains(&order.level) {
        return usage("level: 1 to 19");
    }
    if order.bandwidth == Some(0) {
        return usage("bandwidth: at least 1 byte a second, or none");
    }
    if order.hold == Some(0) {
        return usage("hold: at least 1 byte, or none");
    }
    Ok(())
}

fn occupied(known: &Saved) -> ApiError {
    let message = format!(
        "the agent ships WAL of node {}, epoch {}, to {} already",
        known.node,
        known.epoch,
        known.place()
    );
    ApiError::new(ErrorKind::Conflict, message)
        .next("gs_pitr wal stop first, or gs_pitr wal start --replace")
}
