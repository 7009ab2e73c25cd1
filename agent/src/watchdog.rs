//! Watchdogs: this agent unlocks the cluster when the client that locked it has gone silent ([`agent_api::watchdog`]).
//!
//! `machine` decides, `door` talks to a proxy, `run` joins both with the clock. A proxy that is frozen costs a call's deadline and
//! keeps no other proxy waiting; its session is given up then, and the next call opens another one.

mod door;
mod machine;
mod run;

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use agent_api::watchdog::{FORGOTTEN_AFTER, LONGEST_DEADLINE, MOST_PROXIES, MOST_WATCHDOGS};
use agent_api::{ApiError, ArmWatchdog, DisarmWatchdog, ErrorKind, StartWatchdog, WatchdogStatus};
use tokio::sync::{Notify, watch};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use uuid::Uuid;

use door::Door;
use machine::{Machine, Refused};

/// Longest wait for the first answers of all proxies.
const FIRST_ANSWERS: Duration = Duration::from_secs(6);
/// Longest wait for the tasks of watchdogs that are done, when the agent is stopped.
const LOG_OUT: Duration = Duration::from_secs(2);

/// Makes the doors of a new watchdog: one for each of its proxies, in their order.
type Doors = dyn Fn(&StartWatchdog) -> Vec<Arc<dyn Door>> + Send + Sync;

/// All watchdogs of the agent. Clones share them.
#[derive(Clone)]
pub struct Watchdogs {
    shared: Arc<Shared>,
}

struct Shared {
    doors: Box<Doors>,
    tasks: TaskTracker,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    entries: Vec<Arc<Entry>>,
    closed: bool,
}

/// One watchdog.
struct Entry {
    /// Holds the password: nothing prints it.
    request: StartWatchdog,
    doors: Vec<Arc<dyn Door>>,
    machine: Mutex<Machine>,
    /// The machine was told something: its task must ask it what to do.
    told: Notify,
    /// Changes whenever a proxy has answered.
    progress: watch::Sender<()>,
    /// When somebody last asked about it.
    touched: Mutex<Instant>,
    /// It is deleted.
    end: CancellationToken,
}

impl Default for Watchdogs {
    fn default() -> Self {
        Self::with_doors(door::real)
    }
}

impl Watchdogs {
    /// None yet.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    fn with_doors(
        doors: impl Fn(&StartWatchdog) -> Vec<Arc<dyn Door>> + Send + Sync + 'static,
    ) -> Self {
        Self {
            shared: Arc::new(Shared {
                doors: Box::new(doors),
                tasks: TaskTracker::new(),
                state: Mutex::default(),
            }),
        }
    }

    /// Logs in to the proxies and stays there; answers when each has been tried, or after 6 s. Must be called within a tokio
    /// runtime.
    ///
    /// # Errors
    /// [`ErrorKind::Usage`] for a request that makes no sense, [`ErrorKind::Conflict`] if there are too many watchdogs, or one of
    /// this id with another request.
    pub async fn start(&self, request: StartWatchdog) -> Result<WatchdogStatus, ApiError> {
        validate(&request)?;
        let entry = self.admit(request)?;
        let mut progress = entry.progress.subscribe();
        let asked = async {
            while !entry.machine().has_asked_all() {
                if progress.changed().await.is_err() {
                    break;
                }
            }
        };
        // Who has not answered by then stands in the status as not connected.
        let _ = tokio::time::timeout(FIRST_ANSWERS, asked).await;
        Ok(entry.status())
    }

    fn admit(&self, request: StartWatchdog) -> Result<Arc<Entry>, ApiError> {
        let conflict = |message: String| Err(ApiError::new(ErrorKind::Conflict, message));
        let mut state = self.state();
        if let Some(known) = state.find(request.id) {
            if known.request != request {
                return conflict(format!(
                    "watchdog {} was started with another request",
                    request.id
                ));
            }
            known.touch();
            return Ok(Arc::clone(known));
        }
        if state.closed {
            return conflict("the agent is being stopped".to_owned());
        }
        if state.entries.len() >= MOST_WATCHDOGS {
            return conflict(format!(
                "the agent has {MOST_WATCHDOGS} watchdogs already; each is forgotten {} min after it was last \
                 asked about",
                FORGOTTEN_AFTER.as_secs() / 60
            ));
        }
        let now = Instant::now();
        let entry = Arc::new(Entry {
            doors: (self.shared.doors)(&request),
            machine: Mutex::new(Machine::new(&request.proxies, now)),
            told: Notify::new(),
            progress: watch::Sender::new(()),
            touched: Mutex::new(now),
            end: CancellationToken::new(),
            request,
        });
        state.entries.push(Arc::clone(&entry));
        drop(state);
        let (watchdogs, run) = (self.clone(), Arc::clone(&entry));
        self.shared.tasks.spawn(async move {
            run::run(&run).await;
            watchdogs.remove(run.request.id);
        });
        Ok(entry)
    }

    /// Arms it, or renews it: its deadline runs from now on.
    ///
    /// # Errors
    /// [`ErrorKind::NotFound`]; [`ErrorKind::Usage`] for a deadline of nothing or of more than ten minutes; [`ErrorKind::Conflict`]
    /// unless every earlier attempt is settled; [`ErrorKind::Database`] if it has a session with no proxy.
    pub fn arm(&self, id: Uuid, request: ArmWatchdog) -> Result<WatchdogStatus, ApiError> {
        let entry = self.entry(id)?;
        let deadline = Duration::from_millis(request.deadline_ms);
        if deadline.is_zero() || deadline > LONGEST_DEADLINE {
            let most = LONGEST_DEADLINE.as_millis();
            let message = format!(
                "a watchdog is armed for 1 to {most} ms, not for {}",
                request.deadline_ms
            );
            return Err(ApiError::new(ErrorKind::Usage, message));
        }
        if request.alone {
            self.others_rest(id)?;
        }
        let now = Instant::now();
        let armed = if request.renew {
            entry.machine().renew(now, request.attempt, deadline)
        } else {
            entry.machine().arm(now, request.attempt, deadline)
        };
        entry.told.notify_one();
        armed.map_err(|refused| refusal(id, refused))?;
        Ok(entry.status())
    }

    /// Refuses if another watchdog would, or does, take off whatever locks the cluster.
    fn others_rest(&self, id: Uuid) -> Result<(), ApiError> {
        let entries = self.state().entries.clone();
        let mut others = entries.iter().filter(|entry| entry.request.id != id);
        let Some(other) = others.find(|entry| !entry.machine().is_quiet()) else {
            return Ok(());
        };
        let message = format!(
            "watchdog {} of this agent, of another client, is armed or has fired: it would take the lock off",
            other.request.id
        );
        let error = ApiError::new(ErrorKind::Conflict, message);
        Err(error.next("wait until it rests; that takes a minute, and the time it is armed for"))
    }

    /// Disarms it, or tells one that has fired what became of the lock.
    ///
    /// # Errors
    /// [`ErrorKind::NotFound`]; [`ErrorKind::Conflict`] for an attempt that is not its turn.
    pub fn disarm(&self, id: Uuid, request: DisarmWatchdog) -> Result<WatchdogStatus, ApiError> {
        let entry = self.entry(id)?;
        let told = entry
            .machine()
            .disarm(Instant::now(), request.attempt, request.lock);
        entry.told.notify_one();
        told.map_err(|refused| refusal(id, refused))?;
        Ok(entry.status())
    }

    /// How it stands.
    ///
    /// # Errors
    /// [`ErrorKind::NotFound`].
    pub fn status(&self, id: Uuid) -> Result<WatchdogStatus, ApiError> {
        Ok(self.entry(id)?.status())
    }

    /// How all of them stand, the oldest first. It keeps none of them from being forgotten.
    #[must_use]
    pub fn list(&self) -> Vec<WatchdogStatus> {
        let entries = self.state().entries.clone();
        entries.iter().map(|entry| entry.status()).collect()
    }

    /// Logs out and forgets it.
    ///
    /// # Errors
    /// [`ErrorKind::NotFound`]; [`ErrorKind::Conflict`] while it is armed or at work.
    pub fn end(&self, id: Uuid) -> Result<WatchdogStatus, ApiError> {
        let entry = self.entry(id)?;
        let status = entry.status();
        if !status.state.is_quiet() {
            let message = format!("watchdog {id} is armed, or has fired and is not settled");
            let error = ApiError::new(ErrorKind::Conflict, message);
            return Err(error.next("disarm it, or wait until it is settled"));
        }
        self.remove(id);
        entry.end.cancel();
        Ok(status)
    }

    /// Takes no new ones; those that are armed fire now. Waits at most `deadline` until all have settled, and returns whether they have.
    pub async fn shut_down(&self, deadline: Duration) -> bool {
        let entries = {
            let mut state = self.state();
            state.closed = true;
            state.entries.clone()
        };
        for entry in &entries {
            entry.machine().stop(Instant::now());
            entry.told.notify_one();
        }
        let quiet = async {
            for entry in &entries {
                let mut progress = entry.progress.subscribe();
                while !entry.machine().is_quiet() {
                    if progress.changed().await.is_err() {
                        break;
                    }
                }
            }
        };
        let all = tokio::time::timeout(deadline, quiet).await.is_ok();
        for entry in &entries {
            entry.end.cancel();
        }
        self.shared.tasks.close();
        let _ = tokio::time::timeout(LOG_OUT, self.shared.tasks.wait()).await;
        all
    }

    fn state(&self) -> MutexGuard<'_, State> {
        let state = self.shared.state.lock();
        state.unwrap_or_else(PoisonError::into_inner)
    }

    /// The watchdog, and notes that somebody asked about it.
    fn entry(&self, id: Uuid) -> Result<Arc<Entry>, ApiError> {
        let found = self.state().find(id).cloned();
        let entry = found.ok_or_else(|| {
            let message = format!(
                "the agent knows no watchdog {id}; it forgets them when it is restarted, and {} min after they \
                 were last asked about",
                FORGOTTEN_AFTER.as_secs() / 60
            );
            ApiError::new(ErrorKind::NotFound, message)
        })?;
        entry.touch();
        Ok(entry)
    }

    fn remove(&self, id: Uuid) {
        self.state().entries.retain(|entry| entry.request.id != id);
    }
}

impl State {
    fn find(&self, id: Uuid) -> Option<&Arc<Entry>> {
        self.entries.iter().find(|entry| entry.request.id == id)
    }
}

impl Entry {
    fn machine(&self) -> MutexGuard<'_, Machine> {
        self.machine.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn touch(&self) {
        *self.touched.lock().unwrap_or_else(PoisonError::into_inner) = Instant::now();
    }

    /// Whether nobody has asked about it for long, and nothing is at stake.
    fn is_forgotten(&self) -> bool {
        let touched = *self.touched.lock().unwrap_or_else(PoisonError::into_inner);
        touched.elapsed() >= FORGOTTEN_AFTER && self.machine().is_quiet()
    }

    fn status(&self) -> WatchdogStatus {
        let mut machine = self.machine();
        WatchdogStatus {
            id: self.request.id,
            state: machine.state(Instant::now()),
            proxies: machine.proxies(),
            last_attempt: machine.last_attempt(),
        }
    }
}

fn validate(request: &StartWatchdog) -> Result<(), ApiError> {
    let usage = |message: String| Err(ApiError::new(ErrorKind::Usage, message));
    let proxies = &request.proxies;
    if proxies.is_empty() || proxies.len() > MOST_PROXIES {
        let count = proxies.len();
        return usage(format!(
            "a watchdog has 1 to {MOST_PROXIES} proxies, not {count}"
        ));
    }
    for (index, proxy) in proxies.iter().enumerate() {
        if proxy.host.is_empty() || proxy.host.starts_with('/') || proxy.port == 0 {
            return usage(format!(
                "`{proxy}` is no address of a proxy: give HOST:PORT"
            ));
        }
        if proxies[..index].contains(proxy) {
            return usage(format!("the proxy {proxy} is given twice"));
        }
    }
    Ok(())
}

fn refusal(id: Uuid, refused: Refused) -> ApiError {
    match refused {
        Refused::Conflict(why) => {
            ApiError::new(ErrorKind::Conflict, format!("watchdog {id}: {why}"))
        }
        Refused::Nobody(why) => {
            let message = format!("the agent has a session with no proxy: {why}");
            let error = ApiError::new(ErrorKind::Database, message);
            error.next(
                "check from the agent's host that the proxies' addresses and password are right",
            )
        }
    }
}

#[cfg(test)]
mod tests;
