//! What a watchdog does next. No clock, no socket: it is told the time and the answers, and says which calls to make.
//!
//! ```text
//! ready ──arm──> armed ──disarm: known──> ready
//!                  │ deadline, disarm: unknown, agent stopped
//!                  v
//!                fired   every proxy: probe; locked -> UNLOCK, probe again
//!                  │ writes have passed for 10 s after LOCK's outcome was told, or for 60 s
//!                  v
//!                settled ──arm──> armed
//! ```

use std::time::{Duration, Instant};

use agent_api::watchdog::{OPEN_WHEN_KNOWN, OPEN_WHEN_UNKNOWN};
use agent_api::{LockOutcome, ProxyAddress, WatchdogState, WatchedProxy};

/// For how long a proxy may try to get the cluster's mutex for UNLOCK.
pub(super) const UNLOCK_WAIT: Duration = Duration::from_secs(1);
/// Longest wait for the answer to UNLOCK.
pub(super) const UNLOCK_DEADLINE: Duration = Duration::from_millis(1500);
/// Longest wait for the answer to a probe.
pub(super) const PROBE_DEADLINE: Duration = Duration::from_secs(1);
/// Pause between two looks at a proxy, when nothing is wrong.
const PING: Duration = Duration::from_secs(5);
/// The same at one that refuses the log-in: another password will not come.
const REFUSED_PAUSE: Duration = Duration::from_secs(30);
/// Pause between two looks at a proxy that lets writes pass, after firing.
const OPEN_PAUSE: Duration = Duration::from_millis(250);
/// Pause before a proxy that is locked, or that did not answer, is tried again after firing.
const AGAIN: Duration = Duration::from_millis(50);
/// The same, when it has not answered several times in a row.
const AGAIN_LATER: Duration = Duration::from_secs(1);
/// Failures in a row after which a proxy is tried less often.
const FEW: u32 = 5;
/// UNLOCKs in a row that did nothing, after which they are sent less often.
const FEW_IN_VAIN: u32 = 20;
/// What a proxy said counts for so long.
const FRESH: Duration = Duration::from_secs(3);
/// For how long writes must have passed when the agent is being stopped: it cannot wait for a minute.
const OPEN_WHEN_STOPPED: Duration = Duration::from_secs(5);
/// When it gives up: no proxy has let it unlock all this time.
const GIVE_UP: Duration = Duration::from_hours(1);

/// A call to make.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Call {
    /// Whether writes pass.
    Probe,
    /// UNLOCK CLUSTER.
    Unlock,
}

/// A call to make at a proxy.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Order {
    /// Which proxy.
    pub(super) proxy: usize,
    /// What to say.
    pub(super) call: Call,
}

/// What came of a call.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Answer {
    /// Writes pass there; to an UNLOCK: it is not locked.
    Open,
    /// Writes are refused there.
    Locked,
    /// UNLOCK was answered `SUCCESS`: nothing is proved.
    Said,
    /// It failed.
    Failed {
        /// Why, without the proxy's address.
        message: String,
        /// The log-in was refused.
        refused: bool,
    },
}

/// Something for the agent's log.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Notice {
    /// It fired.
    Fired {
        /// The attempt.
        attempt: u32,
        /// Why.
        why: &'static str,
    },
    /// It unlocks through this proxy.
    Unlocks {
        /// Which.
        proxy: ProxyAddress,
        /// How many times in vain before.
        in_vain: u32,
    },
    /// It has settled.
    Settled(WatchdogState),
}

/// Why an order of the client is refused.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Refused {
    /// It does not go with the state.
    Conflict(String),
    /// No proxy has a session; each with its reason.
    Nobody(String),
}

/// A proxy, as it is known.
#[derive(Debug)]
struct Proxy {
    address: ProxyAddress,
    connected: bool,
    busy: Option<Call>,
    /// What to say next, and when.
    next: Call,
    at: Instant,
    /// Whether it refuses writes, and when it said so.
    locked: Option<(bool, Instant)>,
    error: Option<String>,
    /// Calls that failed, in a row.
    failures: u32,
    /// UNLOCKs that were answered with success, and it was still locked.
    in_vain: u32,
    /// It has been asked once.
    answered: bool,
}

#[derive(Debug)]
struct Rescue {
    attempt: u32,
    since: Instant,
    /// What became of LOCK, and when that was told.
    lock: Option<(LockOutcome, Instant)>,
    /// Since when writes pass.
    open_since: Option<Instant>,
    unlocks: u64,
    last_error: Option<String>,
}

#[derive(Debug)]
enum Phase {
    Ready,
    Armed {
        attempt: u32,
        until: Instant,
    },
    Fired(Rescue),
    Settled {
        attempt: u32,
        unlocks: u64,
        open_after: Option<Duration>,
        last_error: Option<String>,
    },
}

/// A watchdog's mind.
#[derive(Debug)]
pub(super) struct Machine {
    proxies: Vec<Proxy>,
    phase: Phase,
    last_attempt: Option<u32>,
    stopping: bool,
    notices: Vec<Notice>,
}

impl Machine {
    /// One that is ready and has asked nobody yet.
    pub(super) fn new(proxies: &[ProxyAddress], now: Instant) -> Self {
        let proxy = |address: &ProxyAddress| Proxy {
            address: address.clone(),
            connected: false,
            busy: None,
            next: Call::Probe,
            at: now,
            locked: None,
            error: None,
            failures: 0,
            in_vain: 0,
            answered: false,
        };
        Self {
            proxies: proxies.iter().map(proxy).collect(),
            phase: Phase::Ready,
            last_attempt: None,
            stopping: false,
            notices: Vec::new(),
        }
    }

    /// Arms it for `attempt`.
    pub(super) fn arm(
        &mut self,
        now: Instant,
        attempt: u32,
        deadline: Duration,
    ) -> Result<(), Refused> {
        self.advance(now);
        let refused = |why: String| Err(Refused::Conflict(why));
        match &self.phase {
            Phase::Armed { attempt: same, .. } if *same == attempt => return Ok(()),
            Phase::Armed { attempt, .. } => {
                return refused(format!("it is armed for attempt {attempt}"));
            }
            Phase::Fired(rescue) => {
                let other = rescue.attempt;
                return refused(format!(
                    "it has fired for attempt {other}, and is not settled"
                ));
            }
            Phase::Ready | Phase::Settled { .. } => {}
        }
        if self.stopping {
            return refused("the agent is being stopped".to_owned());
        }
        if self.last_attempt.is_some_and(|last| attempt <= last) {
            return refused(format!("attempt {attempt} is over"));
        }
        if !self.proxies.iter().any(|proxy| proxy.connected) {
            let told: Vec<_> = self.proxies.iter().map(Proxy::trouble).collect();
            return Err(Refused::Nobody(told.join("; ")));
        }
        self.last_attempt = Some(attempt);
        let until = now + deadline;
        self.phase = Phase::Armed { attempt, until };
        Ok(())
    }

    /// Starts the clock of `attempt` anew; arms it, if it is not armed.
    pub(super) fn renew(
        &mut self,
        now: Instant,
        attempt: u32,
        deadline: Duration,
    ) -> Result<(), Refused> {
        self.arm(now, attempt, deadline)?;
        self.phase = Phase::Armed {
            attempt,
            until: now + deadline,
        };
        Ok(())
    }

    /// The client says that `attempt` is over, and what became of its lock.
    pub(super) fn disarm(
        &mut self,
        now: Instant,
        attempt: u32,
        lock: LockOutcome,
    ) -> Result<(), Refused> {
        self.advance(now);
        let new = self.last_attempt.is_none_or(|last| attempt > last);
        match &mut self.phase {
            Phase::Armed { attempt: armed, .. } if *armed == attempt => {
                if lock == LockOutcome::Unknown {
                    self.fire(now, attempt, "its client does not know what became of LOCK");
                } else {
                    self.phase = Phase::Ready;
                }
            }
            Phase::Fired(rescue) if rescue.attempt == attempt && lock != LockOutcome::Unknown => {
                rescue.lock.get_or_insert((lock, now));
            }
            Phase::Fired(rescue) if rescue.attempt == attempt => {}
            Phase::Armed { .. } | Phase::Fired(_) if new => {
                let why = format!("attempt {attempt} comes before the one under way is over");
                return Err(Refused::Conflict(why));
            }
            Phase::Ready | Phase::Settled { .. } if new => {
                // Its arming may still be on the way, and would find nobody to disarm it.
                self.last_attempt = Some(attempt);
                if lock == LockOutcome::Unknown {
                    self.fire(now, attempt, "its client does not know what became of LOCK");
                }
            }
            _ => {}
        }
        self.advance(now);
        Ok(())
    }

    /// The agent is being stopped.
    pub(super) fn stop(&mut self, now: Instant) {
        self.stopping = true;
        self.advance(now);
        if let Phase::Armed { attempt, .. } = self.phase {
            self.fire(now, attempt, "the agent is being stopped");
        }
    }

    /// Whether it is neither armed nor at work.
    pub(super) fn is_quiet(&self) -> bool {
        matches!(self.phase, Phase::Ready | Phase::Settled { .. })
    }

    /// Whether every proxy has been asked once.
    pub(super) fn has_asked_all(&self) -> bool {
        self.proxies.iter().all(|proxy| proxy.answered)
    }

    /// What to say to whom now, and when to come back.
    pub(super) fn next(&mut self, now: Instant) -> (Vec<Order>, Instant) {
        self.advance(now);
        let (rescuing, unlocking) = match &self.phase {
            Phase::Fired(rescue) => (true, rescue.unlocks_are_meant()),
            _ => (false, false),
        };
        let mut orders = Vec::new();
        let mut unlocks = 0;
        for (index, proxy) in self.proxies.iter_mut().enumerate() {
            if proxy.busy.is_some() || proxy.at > now {
                continue;
            }
            let call = match proxy.next {
                Call::Unlock if rescuing && unlocking => Call::Unlock,
                _ => Call::Probe,
            };
            if call == Call::Unlock {
                unlocks += 1;
                self.notices.push(Notice::Unlocks {
                    proxy: proxy.address.clone(),
                    in_vain: proxy.in_vain,
                });
            }
            proxy.busy = Some(call);
            orders.push(Order { proxy: index, call });
        }
        if let Phase::Fired(rescue) = &mut self.phase {
            rescue.unlocks += unlocks;
        }
        (orders, self.wake(now))
    }

    /// What came of the order at `proxy`.
    pub(super) fn answered(&mut self, now: Instant, index: usize, answer: Answer, connected: bool) {
        let rescuing = matches!(self.phase, Phase::Fired(_));
        let Some(proxy) = self.proxies.get_mut(index) else {
            return;
        };
        let after_unlock = proxy.busy.take() == Some(Call::Unlock);
        proxy.answered = true;
        proxy.connected = connected;
        proxy.next = Call::Probe;
        let failed = matches!(answer, Answer::Failed { .. });
        proxy.failures = if failed { proxy.failures + 1 } else { 0 };
        let pause = match answer {
            Answer::Open => {
                proxy.error = None;
                proxy.in_vain = 0;
                proxy.locked = Some((false, now));
                if rescuing { OPEN_PAUSE } else { PING }
            }
            Answer::Locked => {
                proxy.error = None;
                proxy.locked = Some((true, now));
                proxy.next = Call::Unlock;
                match (rescuing, proxy.in_vain) {
                    (false, _) => PING,
                    (true, 0) => Duration::ZERO,
                    (true, 1..=FEW_IN_VAIN) => AGAIN,
                    (true, _) => AGAIN_LATER,
                }
            }
            Answer::Said => {
                // Until the next probe shows that it took.
                proxy.in_vain += 1;
                Duration::ZERO
            }
            Answer::Failed { message, refused } => {
                let told = format!("proxy {}: {message}", proxy.address);
                if let Phase::Fired(rescue) = &mut self.phase {
                    rescue.last_error = Some(told);
                }
                proxy.error = Some(message);
                proxy.locked = None;
                // A session that lives and a probe that fails otherwise: UNLOCK says too whether it is locked.
                if connected && !after_unlock {
                    proxy.next = Call::Unlock;
                }
                match (rescuing, refused, proxy.failures > FEW) {
                    (_, true, _) => REFUSED_PAUSE,
                    (true, _, false) => AGAIN,
                    (true, _, true) => AGAIN_LATER,
                    (false, ..) => PING,
                }
            }
        };
        proxy.at = now + pause;
        self.advance(now);
    }

    /// What is to be logged since it was asked last.
    pub(super) fn notices(&mut self) -> Vec<Notice> {
        std::mem::take(&mut self.notices)
    }

    /// The latest attempt.
    pub(super) fn last_attempt(&self) -> Option<u32> {
        self.last_attempt
    }

    /// Its proxies, as it sees them.
    pub(super) fn proxies(&self) -> Vec<WatchedProxy> {
        let shown = |proxy: &Proxy| WatchedProxy {
            address: proxy.address.clone(),
            connected: proxy.connected,
            locked: proxy.locked.map(|(locked, _)| locked),
            error: proxy.error.clone(),
        };
        self.proxies.iter().map(shown).collect()
    }

    /// Where it stands at `now`.
    pub(super) fn state(&mut self, now: Instant) -> WatchdogState {
        self.advance(now);
        match &self.phase {
            Phase::Ready => WatchdogState::Ready,
            Phase::Armed { attempt, until } => WatchdogState::Armed {
                attempt: *attempt,
                left_ms: millis(until.saturating_duration_since(now)),
            },
            Phase::Fired(rescue) => WatchdogState::Fired {
                attempt: rescue.attempt,
                since_ms: millis(now.saturating_duration_since(rescue.since)),
                unlocks: rescue.unlocks,
                last_error: rescue.last_error.clone(),
            },
            Phase::Settled { .. } => self.settled(),
        }
    }

    fn settled(&self) -> WatchdogState {
        let Phase::Settled {
            attempt,
            unlocks,
            open_after,
            last_error,
        } = &self.phase
        else {
            return WatchdogState::Ready;
        };
        WatchdogState::Settled {
            attempt: *attempt,
            unlocks: *unlocks,
            open_after_ms: open_after.map(millis),
            last_error: last_error.clone(),
        }
    }

    fn fire(&mut self, now: Instant, attempt: u32, why: &'static str) {
        for proxy in &mut self.proxies {
            // What it said before is of before.
            proxy.locked = None;
            proxy.next = Call::Probe;
            proxy.at = now;
            proxy.failures = 0;
            proxy.in_vain = 0;
        }
        self.notices.push(Notice::Fired { attempt, why });
        self.phase = Phase::Fired(Rescue {
            attempt,
            since: now,
            lock: None,
            open_since: None,
            unlocks: 0,
            last_error: None,
        });
    }

    /// What the passing of time alone brings about.
    fn advance(&mut self, now: Instant) {
        if let Phase::Armed { attempt, until } = self.phase
            && now >= until
        {
            self.fire(now, attempt, "it was not disarmed in time");
        }
        let open = self.writes_pass(now);
        let unlock_under_way = self.proxies.iter().any(|it| it.busy == Some(Call::Unlock));
        let Phase::Fired(rescue) = &mut self.phase else {
            return;
        };
        rescue.open_since = if open {
            rescue.open_since.or(Some(now))
        } else {
            None
        };
        // An UNLOCK that may still land must not meet the next attempt's lock.
        if unlock_under_way {
            return;
        }
        let Some(end) = rescue.end(now, self.stopping) else {
            return;
        };
        self.phase = Phase::Settled {
            attempt: rescue.attempt,
            unlocks: rescue.unlocks,
            open_after: match end {
                End::Open(since) => Some(since.saturating_duration_since(rescue.since)),
                End::NoLock | End::GaveUp => None,
            },
            last_error: match end {
                End::GaveUp => Some(format!(
                    "gave up after {} min; the cluster may be locked; last: {}",
                    GIVE_UP.as_secs() / 60,
                    rescue.last_error.as_deref().unwrap_or("no answer")
                )),
                End::Open(_) | End::NoLock => rescue.last_error.clone(),
            },
        };
        let settled = self.settled();
        self.notices.push(Notice::Settled(settled));
    }

    /// Somebody lets writes pass, and nobody is known to refuse them.
    fn writes_pass(&self, now: Instant) -> bool {
        let fresh = |at: Instant| now.saturating_duration_since(at) <= FRESH;
        let mut said = self.proxies.iter().filter_map(|proxy| proxy.locked);
        let refuses = said.clone().any(|(locked, _)| locked);
        !refuses && said.any(|(_, at)| fresh(at))
    }

    /// When to come back if nothing is answered before.
    fn wake(&self, now: Instant) -> Instant {
        let idle = self.proxies.iter().filter(|proxy| proxy.busy.is_none());
        let mut wake = idle.map(|proxy| proxy.at).min().unwrap_or(now + PING);
        match &self.phase {
            Phase::Armed { until, .. } => wake = wake.min(*until),
            Phase::Fired(rescue) => {
                if let Some(settles) = rescue.settles_at(self.stopping) {
                    wake = wake.min(settles);
                }
            }
            Phase::Ready | Phase::Settled { .. } => {}
        }
        // Never in the past, so that nobody spins on it.
        wake.clamp(now + Duration::from_millis(1), now + PING)
    }
}

/// How a rescue ends.
enum End {
    /// Writes pass since.
    Open(Instant),
    /// There is no lock of this attempt.
    NoLock,
    /// It could not unlock.
    GaveUp,
}

impl Rescue {
    /// UNLOCK takes off anybody's lock: it is not sent once it is known that there is none of this attempt.
    fn unlocks_are_meant(&self) -> bool {
        let told = self.lock.map(|(lock, _)| lock);
        !matches!(told, Some(LockOutcome::NotSent | LockOutcome::Refused))
    }

    /// When its rule is met, if writes go on passing.
    fn settles_at(&self, stopping: bool) -> Option<Instant> {
        let open = self.open_since?;
        if stopping {
            return Some(open + OPEN_WHEN_STOPPED);
        }
        Some(match self.lock {
            Some((_, told)) => open.max(told) + OPEN_WHEN_KNOWN,
            None => open + OPEN_WHEN_UNKNOWN,
        })
    }

    fn end(&self, now: Instant, stopping: bool) -> Option<End> {
        if !self.unlocks_are_meant() {
            return Some(End::NoLock);
        }
        if self.settles_at(stopping).is_some_and(|at| now >= at) {
            return self.open_since.map(End::Open);
        }
        (now.saturating_duration_since(self.since) >= GIVE_UP).then_some(End::GaveUp)
    }
}

impl Proxy {
    /// Why it has no session.
    fn trouble(&self) -> String {
        let why = self.error.as_deref().unwrap_or("has not answered yet");
        format!("proxy {}: {why}", self.address)
    }
}

fn millis(time: Duration) -> u64 {
    u64::try_from(time.as_millis()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests;
