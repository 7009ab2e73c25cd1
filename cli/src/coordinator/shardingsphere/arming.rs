//! The way to the lock: what is seen to before `LOCK CLUSTER` is sent, in the states `settle`, `quiet` and `arm`.

use std::time::Duration;

use agent_api::LockOutcome;
use futures_util::future::join_all;

use super::attempt::Tried;
use super::clock::Clock;
use super::parties::{Gate, PROBE, Parties, Proxy, Seen, Watchdog};
use super::setback::Setback;
use super::told::{State, Told};
use super::unlocking::Hold;
use crate::coordinator::proof::{self, Node};

/// How long watchdogs that have fired are waited for: a minute by their rule, and some more.
const SETTLE: Duration = Duration::from_secs(90);
/// Pause between looks at watchdogs.
pub(super) const SETTLING: Duration = Duration::from_millis(250);

impl<P: Proxy, W: Watchdog, N: Node, C: Clock> Parties<P, W, N, C> {
    /// All that comes before `LOCK CLUSTER`: the watchdogs are armed when it returns. The hold to come, and three quarters of D.
    pub(super) async fn armed_for<T>(&self, attempt: u32) -> Result<(Hold, Duration), Tried<T>> {
        let (seen, via) = match self.before(attempt).await {
            Ok(ready) => ready,
            Err((setback, seen)) => return Err(never_locked(setback, seen)),
        };
        self.enter(State::Arm, attempt);
        let until = self.clock.now() + self.deadline * 3 / 4;
        if let Err(setback) = self.armed(attempt).await {
            self.disarm(attempt, LockOutcome::NotSent).await;
            return Err(never_locked(setback, seen));
        }
        if self.cancel.is_cancelled() {
            self.disarm(attempt, LockOutcome::NotSent).await;
            return Err(never_locked(Setback::Cancelled, seen));
        }
        self.enter(State::Lock, attempt);
        Ok((Hold::coming(via, self.clock.now(), seen), until))
    }

    /// Sees that a try makes sense: earlier ones are over, nobody has locked, nothing is in the way that would last. What is
    /// known of each proxy, and the one to lock through.
    async fn before(&self, attempt: u32) -> Result<(Vec<Seen>, usize), (Setback, Vec<Seen>)> {
        self.enter(State::Settle, attempt);
        let settled = self.settled().await;
        settled.map_err(|setback| (setback, Vec::new()))?;
        self.enter(State::Quiet, attempt);
        let ready = self.unless_cancelled(join_all(self.proxies.iter().map(Proxy::ready)));
        let Some(ready) = ready.await else {
            return Err((Setback::Cancelled, Vec::new()));
        };
        let seen: Vec<_> = ready
            .into_iter()
            .map(|ready| ready.map_or_else(Seen::Unreachable, |()| Seen::Open))
            .collect();
        match self.quiet(attempt, seen.clone()).await {
            Ok(ready) => Ok(ready),
            Err(setback) => Err((setback, seen)),
        }
    }

    async fn quiet(
        &self,
        attempt: u32,
        mut seen: Vec<Seen>,
    ) -> Result<(Vec<Seen>, usize), Setback> {
        let probes = join_all(
            self.proxies
                .iter()
                .zip(&mut seen)
                .map(async |(proxy, seen)| {
                    if *seen != Seen::Open {
                        return None;
                    }
                    match proxy.probe(PROBE).await {
                        Ok(Gate::Open) => None,
                        Ok(Gate::Locked) => Some(Setback::Foreign {
                            proxy: proxy.name(),
                            said: "it refuses writes".to_owned(),
                        }),
                        Err(error) => {
                            *seen = Seen::Unreachable(error.into_words());
                            None
                        }
                    }
                }),
        );
        if let Some(foreign) = probes.await.into_iter().flatten().next() {
            return Err(foreign);
        }
        let unreachable = self.unreachable(&seen);
        let open: Vec<_> = (0..seen.len())
            .filter(|at| seen[*at] == Seen::Open)
            .collect();
        // Another one each time: one that hangs must not hang every try.
        let turn = usize::try_from(attempt.saturating_sub(1)).unwrap_or_default();
        let Some(via) = open.get(turn % open.len().max(1)).copied() else {
            return Err(Setback::NoProxy {
                proxies: unreachable,
            });
        };
        if !unreachable.is_empty() {
            self.teller.tell(Told::Unreachable {
                proxies: unreachable,
            });
        }
        let quiet = self.unless_cancelled(proof::quiet(&self.nodes, &self.proof));
        quiet.await.ok_or(Setback::Cancelled)??;
        Ok((seen, via))
    }

    /// All watchdogs rest: what they may still do would undo a new lock.
    async fn settled(&self) -> Result<(), Setback> {
        let until = self.clock.now() + SETTLE;
        for watchdog in &self.watchdogs {
            loop {
                let rests = match watchdog.rests().await {
                    Ok(true) => break,
                    Ok(false) => {
                        let message = "it has fired, and has not finished unlocking";
                        agent_api::ApiError::new(agent_api::ErrorKind::Conflict, message)
                    }
                    Err(error) => error,
                };
                if self.clock.now() >= until {
                    return Err(Setback::Watchdog {
                        agent: watchdog.name(),
                        error: rests,
                    });
                }
                let pause = self.unless_cancelled(self.clock.sleep(SETTLING));
                pause.await.ok_or(Setback::Cancelled)?;
            }
        }
        Ok(())
    }

    async fn armed(&self, attempt: u32) -> Result<(), Setback> {
        let arm = async |watchdog: &W| {
            let armed = watchdog.arm(attempt, self.deadline).await;
            armed.map_err(|error| Setback::Watchdog {
                agent: watchdog.name(),
                error,
            })
        };
        let all = join_all(self.watchdogs.iter().map(arm));
        let all = self.clock.within(self.deadline / 4, all);
        let late = Setback::Late {
            state: State::Arm,
            obstacle: None,
        };
        all.await.ok_or(late)?.into_iter().collect()
    }
}

fn never_locked<T>(setback: Setback, seen: Vec<Seen>) -> Tried<T> {
    Tried {
        outcome: Err(setback),
        held: None,
        open: true,
        seen,
    }
}
