//! Tries, until one gives a point.

use std::time::Duration;

use rand::rngs::StdRng;
use rand::{RngExt as _, SeedableRng as _};
use tokio::time::Instant;

use super::attempt::Tried;
use super::budget::Budget;
use super::clock::Clock;
use super::parties::{Parties, Proxy, Watchdog};
use super::setback::Setback;
use super::told::Told;
use crate::coordinator::proof::{self, Node, Proved};

/// Pause before what was in the way is looked at again, where there was no lock.
const LOOK_AGAIN: Duration = Duration::from_millis(250);
/// Pauses after a lock that was for nothing: the first and the longest.
const BACK_OFF: (Duration, Duration) = (Duration::from_millis(250), Duration::from_secs(15));

/// How a point is to be made.
#[derive(Debug, Clone, Copy)]
pub(super) struct Order {
    /// Locks after the first one.
    pub(super) retries: u32,
    /// For everything together.
    pub(super) timeout: Duration,
    /// How long another's lock is waited for.
    pub(super) foreign: Duration,
}

/// What it took so far.
#[derive(Debug, Clone, Default)]
pub(super) struct Spent {
    /// Number of the last try; watchdogs want each to be greater than any before.
    pub(super) attempt: u32,
    /// How often `LOCK CLUSTER` was sent.
    pub(super) locks: u32,
    /// How long writes were refused, or may have been, in all tries.
    pub(super) held: Duration,
    /// And in the last one.
    pub(super) last: Duration,
    /// Whether writes have not been seen to pass since.
    pub(super) shut: bool,
    /// Proxies that refused writes before the point was made.
    pub(super) refusing: Vec<String>,
    /// Proxies that could not be reached.
    pub(super) unreachable: Vec<String>,
}

/// A point.
#[derive(Debug)]
pub(super) struct Made {
    /// Its restore points.
    pub(super) proved: Proved,
    /// The commit sequence number.
    pub(super) csn: Option<String>,
}

impl<P: Proxy, W: Watchdog, N: Node, C: Clock> Parties<P, W, N, C> {
    /// Tries with the lock, by `order`, until a point stands; `seed` is for the pauses.
    pub(super) async fn make(
        &self,
        order: &Order,
        budget: &Budget,
        spent: &mut Spent,
        seed: u64,
    ) -> Result<Made, Setback> {
        let begun = self.clock.now();
        let most = spent.locks.saturating_add(order.retries);
        let mut jitter = StdRng::seed_from_u64(seed);
        let (mut back_off, mut foreign_since) = (BACK_OFF.0, None);
        loop {
            if !budget.allows(self.deadline, Instant::now()) {
                let cap_ms = budget.cap_ms();
                return Err(Setback::Budget { cap_ms });
            }
            spent.attempt += 1;
            let attempt = spent.attempt;
            let tried = self.attempt(attempt).await;
            spent.add(self, &tried);
            budget.spend(tried.held.unwrap_or_default(), Some(Instant::now()));
            let setback = match self.on_disk(tried.outcome).await {
                Ok(made) => return Ok(made),
                Err(setback) => setback,
            };
            self.setback(attempt, tried.held, &setback);
            let wait = if tried.held.is_none() {
                LOOK_AGAIN
            } else {
                back_off = (back_off * 2).min(BACK_OFF.1);
                back_off / 2
            };
            let wait = wait.mul_f64(jitter.random_range(0.5..1.5));
            if let Setback::Foreign { .. } = setback {
                foreign_since.get_or_insert(self.clock.now());
            } else {
                foreign_since = None;
            }
            let now = self.clock.now();
            let too_long = now.saturating_sub(begun) + wait > order.timeout
                || foreign_since
                    .is_some_and(|since| now.saturating_sub(since) + wait > order.foreign);
            if !tried.open || too_long || spent.locks > most || setback.is_final() {
                return Err(setback);
            }
            if self
                .unless_cancelled(self.clock.sleep(wait))
                .await
                .is_none()
            {
                return Err(Setback::Cancelled);
            }
        }
    }

    /// A point that a crash of no node loses any more; if a node failed for good, that. Nothing is locked.
    async fn on_disk(
        &self,
        outcome: Result<(Proved, Option<String>), Setback>,
    ) -> Result<Made, Setback> {
        let obstacle = match outcome {
            Ok((proved, csn)) => {
                let flushed = self.unless_cancelled(proof::flushed(&self.nodes, &proved));
                match flushed.await.ok_or(Setback::Cancelled)? {
                    Ok(()) => return Ok(Made { proved, csn }),
                    Err(obstacle) => obstacle,
                }
            }
            Err(Setback::Nodes(obstacle)) => obstacle,
            Err(setback) => return Err(setback),
        };
        let told = self.unless_cancelled(proof::or_lost(&self.nodes, obstacle));
        Err(told.await.ok_or(Setback::Cancelled)?.into())
    }

    /// The proof alone.
    pub(super) async fn without_lock(
        &self,
        retries: u32,
        timeout: Duration,
    ) -> Result<Made, Setback> {
        let rules = proof::Rules {
            retries,
            timeout,
            ..self.proof
        };
        let proving = proof::prove_with(&self.nodes, &rules, || self.csn());
        match self.unless_cancelled(proving).await {
            None => Err(Setback::Cancelled),
            Some(Ok((proved, csn))) => Ok(Made { proved, csn }),
            Some(Err(unproved)) => Err(unproved.obstacle.into()),
        }
    }

    /// Tells why a try gave no point.
    pub(super) fn setback(&self, attempt: u32, held: Option<Duration>, setback: &Setback) {
        self.teller.tell(Told::Setback {
            attempt,
            held,
            words: setback.to_string(),
        });
    }
}

impl Spent {
    fn add<P: Proxy, W: Watchdog, N: Node, C: Clock>(
        &mut self,
        parties: &Parties<P, W, N, C>,
        tried: &Tried,
    ) {
        self.locks += u32::from(tried.held.is_some());
        self.last = tried.held.unwrap_or_default();
        self.held += self.last;
        self.shut = !tried.open;
        self.refusing = parties.refusing(&tried.seen);
        let unreachable = parties.unreachable(&tried.seen);
        self.unreachable = unreachable.into_iter().map(|(name, _)| name).collect();
    }
}
