//! The way out of the lock: the states `unlock` and `disarm`. It begins where `LOCK` may have been heard, and ends where the lock has been
//! seen to be gone, or after half a minute; nothing cancels it.

use std::time::Duration;

use agent_api::LockOutcome;
use futures_util::StreamExt as _;
use futures_util::future::join_all;
use futures_util::stream::FuturesUnordered;

use super::arming::SETTLING;
use super::attempt::Tried;
use super::clock::Clock;
use super::parties::{Gate, MUTEX, PROBE, PROBES, Parties, Proxy, ProxyError, Seen, Watchdog};
use super::setback::Setback;
use super::told::State;
use crate::coordinator::proof::Node;

/// An UNLOCK that is not answered within this is sent through the next proxy too.
const NEXT_PROXY: Duration = Duration::from_millis(150);
/// UNLOCK is sent again if writes do not pass after this.
const AGAIN: Duration = Duration::from_millis(300);
/// A new session for unlocking may take this long.
const RECONNECT: Duration = Duration::from_millis(700);
/// A lock that nobody has seen may still appear: followers are some tenths of a second late.
const LINGER: Duration = Duration::from_millis(500);
/// How long unlocking is tried.
const PATIENCE: Duration = Duration::from_secs(30);
/// How long a watchdog is told what became of the lock.
const TELL: Duration = Duration::from_secs(5);

/// What is known of our `LOCK CLUSTER`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Sent {
    /// It was answered with success.
    Answered,
    /// There was no answer: it may have locked, and still may.
    Unheard,
    /// It was refused.
    Refused,
}

/// A lock that we have, or may have. It goes to [`Parties::released`], whatever happens.
#[must_use]
pub(super) struct Hold {
    /// The proxy that was asked.
    pub(super) via: usize,
    since: Duration,
    pub(super) sent: Sent,
    pub(super) seen: Vec<Seen>,
    /// Whether each proxy could be reached before.
    there: Vec<bool>,
    /// Proxies that were seen to refuse only when the lock was taken back.
    late: Vec<bool>,
    /// Whether a proxy that refused has been seen open since: the lock is gone, whatever others show.
    gone: bool,
    /// When the last proxy was seen to let writes pass again.
    opened: Option<Duration>,
}

impl Hold {
    /// When LOCK was sent, or about to be.
    pub(super) fn since(&self) -> Duration {
        self.since
    }

    /// One that is about to be asked for, through proxy `via`; what is known of each proxy is `seen`.
    pub(super) fn coming(via: usize, since: Duration, seen: Vec<Seen>) -> Self {
        Self {
            via,
            since,
            sent: Sent::Unheard,
            there: seen.iter().map(|seen| *seen == Seen::Open).collect(),
            late: vec![false; seen.len()],
            seen,
            gone: false,
            opened: None,
        }
    }

    fn was_seen(&self) -> bool {
        self.seen.contains(&Seen::Refusing) || self.late.contains(&true)
    }
}

impl<P: Proxy, W: Watchdog, N: Node, C: Clock> Parties<P, W, N, C> {
    /// The one way out: unlocks, unless `LOCK` was refused, and tells the watchdogs.
    pub(super) async fn released<T>(
        &self,
        attempt: u32,
        mut hold: Hold,
        outcome: Result<T, Setback>,
    ) -> Tried<T> {
        if hold.sent == Sent::Refused {
            self.disarm(attempt, LockOutcome::Refused).await;
            return Tried {
                outcome,
                held: None,
                open: true,
                seen: hold.seen,
            };
        }
        self.enter(State::Unlock, attempt);
        let open = self.unlock(&mut hold).await;
        let opened = hold.opened.unwrap_or_else(|| self.clock.now());
        let refused_for = opened.saturating_sub(hold.since);
        self.enter(State::Disarm, attempt);
        self.disarmed(attempt, &hold, open).await;
        Tried {
            outcome,
            held: Some(refused_for),
            open,
            seen: hold.seen,
        }
    }

    /// Unlocks, until writes pass through every proxy that can be reached. Whether they do. Nothing cancels it.
    async fn unlock(&self, hold: &mut Hold) -> bool {
        let until = self.clock.now() + PATIENCE;
        let (mut open_since, mut first, mut locked) = (None, true, true);
        let mut via = hold.via;
        loop {
            // From the moment the lock was seen to be gone, a proxy that refuses is late, or somebody else's lock is there.
            if locked && !hold.gone {
                self.send_unlock(via).await;
                // One that has not heard of the lock says that there is none, and a cut one may not hear of it for long.
                via += 1;
            }
            let gates = self.gates(hold, std::mem::take(&mut first)).await;
            locked = gates.contains(&Some(Gate::Locked)) || !gates.contains(&Some(Gate::Open));
            let now = self.clock.now();
            if locked {
                open_since = None;
            } else {
                let since = *open_since.get_or_insert(now);
                // One that lets writes pass may be cut off, and have heard neither of the lock nor of its end.
                if hold.gone || now.saturating_sub(since) >= LINGER {
                    return true;
                }
            }
            if now >= until {
                return false;
            }
            self.clock.sleep(PROBES.1).await;
        }
    }

    /// `UNLOCK CLUSTER` through the proxy that locked; if that does not answer soon, through the next ones too.
    async fn send_unlock(&self, via: usize) {
        let count = self.proxies.len();
        let calls = (0..count).map(|place| async move {
            let proxy = &self.proxies[(via + place) % count];
            // Even a pause of nothing would take a millisecond.
            if place > 0 {
                let turn = u32::try_from(place).unwrap_or(u32::MAX);
                self.clock.sleep(NEXT_PROXY * turn).await;
            }
            // What was dropped under way has ended its session.
            let ready = self.clock.within(RECONNECT, proxy.ready()).await;
            match ready {
                Some(Ok(())) => proxy.unlock(MUTEX, MUTEX * 3 / 2).await,
                _ => Err(ProxyError::Refused("there is no session".to_owned())),
            }
        });
        let mut calls: FuturesUnordered<_> = calls.collect();
        while let Some(answer) = calls.next().await {
            if answer.is_ok() {
                return;
            }
        }
    }

    /// What each proxy does with writes, after it had some time to let them pass. `None`: it cannot be reached. At `first` only those
    /// are asked that could be, so that nobody waits for the others.
    async fn gates(&self, hold: &mut Hold, first: bool) -> Vec<Option<Gate>> {
        let until = self.clock.now() + AGAIN;
        let each = self.proxies.iter().zip(&hold.there);
        let gates = each.map(async |(proxy, there)| {
            if first && !there {
                return (None, false, self.clock.now());
            }
            let (gate, refused) = passes(proxy, until, &self.clock).await;
            (gate, refused, self.clock.now())
        });
        let gates = join_all(gates).await;
        let known = hold.seen.iter().zip(&mut hold.late);
        for ((seen, late), (gate, refused, at)) in known.zip(&gates) {
            *late |= refused;
            if *gate == Some(Gate::Open) {
                hold.gone |= *seen == Seen::Refusing || *late;
                hold.opened = hold.opened.max(Some(*at));
            }
        }
        gates.into_iter().map(|(gate, _, _)| gate).collect()
    }

    /// Tells the watchdogs what became of the lock.
    async fn disarmed(&self, attempt: u32, hold: &Hold, open: bool) {
        match hold.sent {
            Sent::Answered if open && hold.gone => {
                self.disarm(attempt, LockOutcome::Released).await;
            }
            Sent::Answered if open && !hold.was_seen() => {
                // Nobody has ever seen it. Should it appear yet, they are there; and they need not wait for a whole minute.
                self.disarm(attempt, LockOutcome::Unknown).await;
                self.disarm(attempt, LockOutcome::Released).await;
            }
            // Nor is it known where those that refused cannot be reached, whatever others show.
            _ => self.disarm(attempt, LockOutcome::Unknown).await,
        }
    }

    pub(super) async fn disarm(&self, attempt: u32, lock: LockOutcome) {
        let disarm = async |watchdog: &W| {
            let until = self.clock.now() + TELL;
            // One that cannot be told fires, and rests after it has found nothing to unlock: that is waited for before the next try.
            while watchdog.disarm(attempt, lock).await.is_err() && self.clock.now() < until {
                self.clock.sleep(SETTLING).await;
            }
        };
        join_all(self.watchdogs.iter().map(disarm)).await;
    }
}

/// Asks until it lets writes pass, or `until`. What it did in the end (`None`: it cannot be reached), and whether it was seen to refuse.
async fn passes(proxy: &impl Proxy, until: Duration, clock: &impl Clock) -> (Option<Gate>, bool) {
    let (mut pause, mut refused) = (PROBES.0, false);
    loop {
        match proxy.probe(PROBE).await {
            Ok(Gate::Open) => return (Some(Gate::Open), refused),
            Ok(Gate::Locked) => {
                refused = true;
                if clock.now() >= until {
                    return (Some(Gate::Locked), refused);
                }
            }
            Err(_) => {
                let again = clock.within(RECONNECT, proxy.ready()).await;
                if !matches!(again, Some(Ok(()))) || clock.now() >= until {
                    return (None, refused);
                }
            }
        }
        clock.sleep(pause).await;
        pause = (pause * 2).min(PROBES.1);
    }
}
