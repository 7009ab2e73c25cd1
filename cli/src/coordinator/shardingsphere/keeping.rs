//! The lock for as long as a restore switches databases: taken before that is decided, kept while this program lives, given back when
//! all nodes are open.
//!
//! | what happens | who unlocks |
//! |---|---|
//! | all nodes are open, or it is known that they will not be | this program |
//! | it is dropped, or cancelled while it is being taken | the task that holds it |
//! | this program dies | the watchdogs, `silence` after they last heard of it |
//! | no watchdog hears of it any more | this program, before they do |
//! | it takes for ever | this program, after ten minutes |

use std::sync::Arc;
use std::time::Duration;

use agent_api::{ApiError, ErrorKind};
use agent_sql::proxy::Gate;
use catalog::Catalog;
use catalog::journal::OperationJournal;
use catalog::model::OperationEvent;
use futures_util::future::join_all;
use serde_json::json;
use tokio::sync::oneshot;
use tokio::task::JoinHandle;
use tokio::time::Instant;
use tokio_util::sync::{CancellationToken, DropGuard};
use uuid::Uuid;

use super::attempt::Tried;
use super::clock::{Clock as _, Monotonic};
use super::ended::{self, Took};
use super::parties::{Parties, Watchdog as _};
use super::printing::{self, Printing};
use super::real::{self, InAgent};
use super::setback::Setback;
use super::told::{State, Teller};
use super::{Real, known, millis};
use crate::agents::{Agent, pause};
use crate::cluster::{ProxyAccess, Reached};
use crate::coordinator::proof;
use crate::failure::{Failure, Result};
use crate::operations::Live;
use crate::printer::{Printer, duration};

/// Nobody is kept out for longer.
const LONGEST: Duration = Duration::from_mins(10);
/// Pauses between tries, the first and the longest.
const PAUSES: (Duration, Duration) = (Duration::from_millis(500), Duration::from_secs(10));
/// For a probe of a proxy while nothing is at stake.
const PROBE: Duration = Duration::from_secs(5);
/// What to do without the lock.
const WITHOUT: &str =
    "to go on without the lock, with clients kept away by other means: `--lock never`";

/// How a cluster is locked while its databases are switched.
#[derive(Debug, Clone)]
pub(crate) struct Switch<'a> {
    /// The way to the proxies.
    pub(crate) access: &'a ProxyAccess,
    /// The watchdogs unlock when they have not heard of this program for so long.
    pub(crate) silence: Duration,
    /// How long it is tried to lock. Another's lock is a matter of seconds; watchdogs of a program that died take a minute and more.
    pub(crate) patience: Duration,
    /// Agents that may unlock if this program dies.
    pub(crate) agents: Vec<Arc<Agent>>,
    /// Where it is noted that the cluster may be locked.
    pub(crate) catalog: &'a Catalog,
    /// The restore.
    pub(crate) operation: Uuid,
    /// What this program must not leave behind.
    pub(crate) live: &'a Live,
    /// Who is told.
    pub(crate) printer: &'a Printer,
}

/// The lock. Dropping it unlocks too, without telling anybody.
#[derive(Debug)]
#[must_use]
pub(crate) struct SwitchLock {
    /// Cancelled, it unlocks.
    end: DropGuard,
    task: JoinHandle<Came>,
    watchdogs: Vec<InAgent>,
    journal: OperationJournal,
    took: Took,
    printing: Printing,
    printer: Printer,
}

type Came = Tried<()>;

impl Switch<'_> {
    /// Sees that the cluster could be locked now, and locks nothing. The proxies, by name.
    ///
    /// # Errors
    /// Why it could not.
    pub(crate) async fn possible(&self, cancel: &CancellationToken) -> Result<Vec<String>> {
        let possible = async {
            let reached = Reached::find(self.access, cancel).await?;
            for (proxy, connection) in reached.connected() {
                if let Ok(Gate::Locked(said)) = connection.probe(PROBE).await {
                    let known = known::holders(self.catalog, Some(self.operation)).await;
                    let message = format!("the cluster is locked already ({said}); {known}");
                    return Err(Failure::new(ErrorKind::Conflict, message)
                        .on(proxy.address.to_string())
                        .next("wait until it is released; if nobody holds it any more: gs_pitr unlock"));
                }
            }
            let watchdogs = real::watchdogs(&self.agents, self.access, &reached, self.printer);
            real::end(&watchdogs.await?).await;
            let names = reached
                .connected()
                .map(|(proxy, _)| proxy.address.to_string());
            Ok(names.collect())
        };
        let possible = cancel.run_until_cancelled(possible).await;
        possible
            .unwrap_or_else(|| Err(Failure::cancelled()))
            .map_err(without)
    }

    /// Locks the cluster. When it returns, every proxy that can be reached refuses writes.
    ///
    /// # Errors
    /// Why it could not be locked. Nothing is locked then.
    pub(crate) async fn locked(&self, cancel: &CancellationToken) -> Result<SwitchLock> {
        self.taken(cancel).await.map_err(without)
    }

    async fn taken(&self, cancel: &CancellationToken) -> Result<SwitchLock> {
        let reached = Reached::find(self.access, cancel).await?;
        let watchdogs = real::watchdogs(&self.agents, self.access, &reached, self.printer);
        let mut watchdogs = watchdogs.await?;
        for watchdog in &mut watchdogs {
            watchdog.alone = true;
        }
        let journal = OperationJournal::join(Arc::clone(self.catalog.store()), self.operation);
        let proxies = reached.proxies().iter();
        let proxies: Vec<_> = proxies.map(|proxy| proxy.address.to_string()).collect();
        let intended = OperationEvent::LockIntended {
            proxies: proxies.clone(),
        };
        journal.record(intended).await?;
        let (teller, told) = Teller::new();
        let printing = Printing::start(told, printing::SWITCH, self.printer);
        let begun = Instant::now();
        let (mut attempt, mut took, mut rest) = (0, Took::default(), PAUSES.0);
        let setback = loop {
            attempt += 1;
            let (task, end, held) = self.spawned(attempt, &reached, &watchdogs, &teller);
            if let Some(Ok(())) = cancel.run_until_cancelled(held).await {
                let text = "writes through the proxies are refused until all nodes are open";
                let fields = json!({"operation": self.operation, "proxies": proxies});
                self.printer.event("locked", fields, Some(text));
                return Ok(SwitchLock {
                    end,
                    task,
                    watchdogs,
                    journal,
                    took,
                    printing,
                    printer: self.printer.clone(),
                });
            }
            drop(end);
            let came = joined(task).await?;
            took.add(&came);
            let setback = came.outcome.err().unwrap_or(Setback::Cancelled);
            let patient =
                begun.elapsed() + rest < self.patience && came.open && !setback.is_final();
            if !patient || cancel.is_cancelled() {
                break setback;
            }
            parties(self.silence, &reached, &watchdogs, &teller)
                .setback(attempt, came.held, &setback);
            if pause(rest, cancel).await.is_err() {
                break Setback::Cancelled;
            }
            rest = (rest * 2).min(PAUSES.1);
        };
        drop(teller);
        took.ended(&journal, &watchdogs, self.printer).await;
        printing.end().await;
        Err(self.refused(&setback, took).await)
    }

    /// A task that locks, says so, and unlocks when it is told to end.
    fn spawned(
        &self,
        attempt: u32,
        reached: &Reached,
        watchdogs: &[InAgent],
        teller: &Teller,
    ) -> (JoinHandle<Came>, DropGuard, oneshot::Receiver<()>) {
        let (sender, held) = oneshot::channel();
        let parties = parties(self.silence, reached, watchdogs, teller);
        let end = parties.cancel.clone().drop_guard();
        let task = self
            .live
            .unlocks_itself(async move { Box::pin(parties.keep(attempt, sender)).await });
        (task, end, held)
    }

    async fn refused(&self, setback: &Setback, took: Took) -> Failure {
        if let Setback::Cancelled = setback {
            return Failure::cancelled().changed_if(!took.open);
        }
        let message = "the cluster could not be locked";
        let ours = (self.catalog, self.operation);
        ended::failure(setback, message, !took.open, ours).await
    }
}

/// Adds to a failure what is to be done without the lock.
fn without(failure: Failure) -> Failure {
    if failure.kind == ErrorKind::Cancelled {
        return failure;
    }
    let next = match failure.next {
        Some(next) => format!("{next}; {WITHOUT}"),
        None => WITHOUT.to_owned(),
    };
    Failure {
        next: Some(next),
        ..failure
    }
}

fn parties(silence: Duration, reached: &Reached, watchdogs: &[InAgent], teller: &Teller) -> Real {
    Parties {
        proxies: real::sessions(reached),
        watchdogs: watchdogs.to_vec(),
        // Whatever is under way on the nodes is cut off when they are stopped: nobody waits for it.
        nodes: Vec::new(),
        deadline: silence,
        clock: Monotonic::start(),
        has_csn: false,
        proof: proof::Rules {
            retries: 0,
            timeout: silence,
            accept_in_doubt: true,
        },
        teller: teller.clone(),
        cancel: CancellationToken::new(),
    }
}

async fn joined(task: JoinHandle<Came>) -> Result<Came> {
    let what = "the task that holds the cluster's lock";
    task.await.map_err(|error| ended::broke_off(what, &error))
}

impl Real {
    /// Locks, tells `sender`, keeps the lock until it is cancelled, and unlocks. An error after that was told says why the lock was
    /// given back before that.
    async fn keep(&self, attempt: u32, sender: oneshot::Sender<()>) -> Came {
        let (mut hold, until) = match self.armed_for(attempt).await {
            Ok(ready) => ready,
            Err(never) => return never,
        };
        let locked = async {
            self.lock(&mut hold, until).await?;
            self.probed(&mut hold, until, attempt).await
        };
        let outcome = match locked.await {
            Ok(()) if sender.send(()).is_ok() => self.kept(attempt).await,
            // Nobody waits for it any more.
            Ok(()) => Err(Setback::Cancelled),
            Err(setback) => Err(setback),
        };
        self.released(attempt, hold, outcome).await
    }

    async fn kept(&self, attempt: u32) -> std::result::Result<(), Setback> {
        self.enter(State::Keep, attempt);
        let begun = self.clock.now();
        // They were armed before the lock was sent, up to three quarters of their time ago.
        let silence = self.deadline;
        let mut heard = begun.saturating_sub(silence * 3 / 4);
        loop {
            let asked = self.clock.now();
            if asked.saturating_sub(begun) >= LONGEST {
                return Err(Setback::Late {
                    state: State::Keep,
                    obstacle: None,
                });
            }
            let renewals = join_all(self.watchdogs.iter().map(|watchdog| async move {
                let renewed = self
                    .clock
                    .within(silence / 8, watchdog.renew(attempt, silence));
                let silent = || ApiError::new(ErrorKind::Timeout, "no answer");
                let renewed = renewed.await.unwrap_or_else(|| Err(silent()));
                renewed.map_err(|error| (watchdog.name(), error))
            }));
            let Some(renewals) = self.unless_cancelled(renewals).await else {
                return Ok(());
            };
            let lost = if renewals.iter().any(std::result::Result::is_ok) {
                heard = asked;
                None
            } else {
                renewals.into_iter().find_map(std::result::Result::err)
            };
            // None of them would unlock if this program died.
            if let Some((agent, error)) = lost
                && self.clock.now().saturating_sub(heard) >= silence * 3 / 4
            {
                return Err(Setback::Watchdog { agent, error });
            }
            let pause = self.clock.sleep(silence / 6);
            if self.unless_cancelled(pause).await.is_none() {
                return Ok(());
            }
        }
    }
}

impl SwitchLock {
    /// Unlocks, and returns when writes have been seen to pass through every proxy that can be reached, or after half a minute of
    /// unlocking in vain: which is told.
    pub(crate) async fn release(self) {
        let Self {
            end,
            task,
            watchdogs,
            journal,
            mut took,
            printing,
            printer,
        } = self;
        drop(end);
        let came = match joined(task).await {
            Ok(came) => came,
            Err(failure) => return printer.warning(None, &failure.to_string()),
        };
        took.add(&came);
        if let Err(setback) = &came.outcome {
            let message = format!(
                "the cluster was unlocked before all nodes were open, so some writes may have failed at nodes that were not, or reached some nodes only: {setback}"
            );
            printer.warning(None, &message);
        }
        took.ended(&journal, &watchdogs, &printer).await;
        printing.end().await;
        if took.open {
            let held = came.held.unwrap_or_default();
            let text = format!(
                "writes pass through every proxy again; they were refused for {}",
                duration(held)
            );
            let fields = json!({"held_ms": millis(held)});
            printer.event("unlocked", fields, Some(&text));
        }
    }
}

impl Took {
    fn add(&mut self, tried: &Came) {
        self.locks += u32::from(tried.held.is_some());
        self.held += tried.held.unwrap_or_default();
        self.open = tried.open;
    }
}
