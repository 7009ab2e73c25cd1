//! One try with the lock.
//!
//! | state | what is done | goes on when |
//! |---|---|---|
//! | quiet | every proxy is probed; the nodes are asked who holds a transaction id | writes pass: nobody has locked; nobody holds one for long |
//! | arm | the watchdogs arm with D on their own clocks | all of them have |
//! | lock | `LOCK CLUSTER` through one proxy | it is answered |
//! | probe | every proxy that can be reached, until it refuses | all refuse |
//! | drain | S1, then N1, again and again | nobody holds an id |
//! | mark | the restore points, and beside them the commit sequence number | they are made |
//! | prove | N2, then S2 | nobody holds an id, and S1 = S2; if not, it drains again, as long as that is less than another lock would cost |
//! | unlock | `UNLOCK CLUSTER`, and every proxy until writes pass; again until it took | they pass |
//! | disarm | the watchdogs are told what became of the lock | |
//!
//! From `lock` on there is one way out, and it leads through `unlock` and `disarm`: from a failure, from a cancellation, and at three
//! quarters of D, so that the rest is left for unlocking. If this program dies, the watchdogs take it. What was never locked by us
//! is not unlocked: the way out begins where `LOCK` may have been heard, and ends where the lock has been seen to be gone.
//!
//! `quiet` and `arm` are in [`super::arming`], `unlock` and `disarm` in [`super::unlocking`]; all between is here.

use std::time::Duration;

use futures_util::future::join_all;

use super::clock::Clock;
use super::parties::{
    Gate, LockReply, MUTEX, PROBE, PROBES, Parties, Proxy, ProxyError, Seen, Watchdog,
};
use super::setback::Setback;
use super::told::State;
use super::unlocking::{Hold, Sent};
use crate::coordinator::obstacle::Obstacle;
use crate::coordinator::proof::{self, Node, Proved};

/// Pauses between looks at the nodes: the first and the longest.
const LOOKS: (Duration, Duration) = (Duration::from_millis(1), Duration::from_millis(8));
/// A proof that does not stand is tried again under the same lock for so long at least: about what LOCK and UNLOCK take where proxies are
/// quick.
const WORTHWHILE: Duration = Duration::from_millis(50);

/// A point, with the commit sequence number.
pub(super) type Point = (Proved, Option<String>);

/// What a try came to.
#[derive(Debug)]
pub(super) struct Tried<T = Point> {
    /// What was wanted under the lock, or why there is none.
    pub(super) outcome: Result<T, Setback>,
    /// How long writes were refused, or may have been. `None`: there was no lock of ours.
    pub(super) held: Option<Duration>,
    /// Whether writes have been seen to pass since, through every proxy that could be reached.
    pub(super) open: bool,
    /// What each proxy was seen to do under the lock, in their order.
    pub(super) seen: Vec<Seen>,
}

/// Where a try is, for when its time is up.
struct Progress {
    state: State,
    obstacle: Option<Obstacle>,
}

impl<P: Proxy, W: Watchdog, N: Node, C: Clock> Parties<P, W, N, C> {
    /// Makes one try. It returns when writes have been seen to pass again, or after half a minute of unlocking in vain. Drop it only with the
    /// whole process: then the watchdogs unlock.
    pub(super) async fn attempt(&self, attempt: u32) -> Tried {
        let (mut hold, until) = match self.armed_for(attempt).await {
            Ok(ready) => ready,
            Err(never) => return never,
        };
        let outcome = match self.lock(&mut hold, until).await {
            Ok(()) => self.under_lock(&mut hold, until, attempt).await,
            Err(setback) => Err(setback),
        };
        self.released(attempt, hold, outcome).await
    }

    /// `LOCK CLUSTER`.
    pub(super) async fn lock(&self, hold: &mut Hold, until: Duration) -> Result<(), Setback> {
        let proxy = &self.proxies[hold.via];
        let left = until.saturating_sub(self.clock.now());
        let (sent, setback) = match proxy.lock(MUTEX.min(left / 2), left).await {
            Ok(LockReply::Said) => {
                hold.sent = Sent::Answered;
                return Ok(());
            }
            Ok(LockReply::AlreadyLocked(said)) => {
                let proxy = proxy.name();
                (Sent::Refused, Setback::Foreign { proxy, said })
            }
            Err(ProxyError::Refused(said)) => {
                let proxy = proxy.name();
                (Sent::Refused, Setback::Refused { proxy, said })
            }
            Err(ProxyError::Unheard(why)) => {
                hold.seen[hold.via] = Seen::Unreachable(why.clone());
                let proxy = proxy.name();
                (Sent::Unheard, Setback::Unheard { proxy, why })
            }
        };
        hold.sent = sent;
        Err(setback)
    }

    /// All that is done while the cluster is locked, until time is up or somebody cancels it.
    async fn under_lock(
        &self,
        hold: &mut Hold,
        until: Duration,
        attempt: u32,
    ) -> Result<Point, Setback> {
        let mut progress = Progress {
            state: State::Probe,
            obstacle: None,
        };
        let asked = hold.since();
        let work = self.still(asked, &mut hold.seen, &mut progress, attempt);
        let left = until.saturating_sub(self.clock.now());
        let done = self.unless_cancelled(self.clock.within(left, work)).await;
        match done.ok_or(Setback::Cancelled)? {
            Some(outcome) => outcome,
            None if progress.state == State::Probe => Err(Setback::NotFollowed {
                proxies: self.named(&hold.seen, &Seen::Open),
            }),
            None => Err(Setback::Late {
                state: progress.state,
                obstacle: progress.obstacle,
            }),
        }
    }

    /// Probe, drain, mark, prove. `asked`: when LOCK was sent.
    async fn still(
        &self,
        asked: Duration,
        seen: &mut [Seen],
        progress: &mut Progress,
        attempt: u32,
    ) -> Result<Point, Setback> {
        self.refused_by_all(seen, attempt).await?;
        // Another lock would refuse clients for as long as this one took to come, and for about as long while it goes.
        let came = self.clock.now().saturating_sub(asked);
        let again_until = self.clock.now() + WORTHWHILE.max(2 * came);
        loop {
            let drained = self.drained(progress, attempt).await?;
            self.gets_to(progress, State::Mark, attempt);
            let marked = proof::marked(&self.nodes, drained, self.csn()).await?;
            self.gets_to(progress, State::Prove, attempt);
            match proof::proved(&self.nodes, &self.proof, marked, attempt).await {
                Ok(proved) => return Ok(proved),
                // Whoever passes the lock came in between. Another lock would cost the clients more than another look.
                Err(obstacle) if !obstacle.is_for_long() && self.clock.now() < again_until => {}
                Err(obstacle) => return Err(obstacle.into()),
            }
        }
    }

    fn gets_to(&self, progress: &mut Progress, state: State, attempt: u32) {
        progress.state = state;
        self.enter(state, attempt);
    }

    /// S1, then N1, again and again until nobody holds an id.
    async fn drained(
        &self,
        progress: &mut Progress,
        attempt: u32,
    ) -> Result<proof::Drained, Setback> {
        self.gets_to(progress, State::Drain, attempt);
        let mut pause = LOOKS.0;
        loop {
            match proof::drained(&self.nodes, &self.proof).await {
                Ok(drained) => {
                    progress.obstacle = None;
                    return Ok(drained);
                }
                Err(obstacle) if obstacle.is_failure() => return Err(obstacle.into()),
                Err(obstacle) => progress.obstacle = Some(obstacle),
            }
            self.clock.sleep(pause).await;
            pause = (pause * 2).min(LOOKS.1);
        }
    }

    /// Probes every proxy that can be reached until it refuses writes.
    async fn refused_by_all(&self, seen: &mut [Seen], attempt: u32) -> Result<(), Setback> {
        self.enter(State::Probe, attempt);
        let each = self.proxies.iter().zip(&mut *seen);
        join_all(each.map(|(proxy, seen)| refuses(proxy, seen, &self.clock))).await;
        if seen.contains(&Seen::Refusing) {
            return Ok(());
        }
        let proxies = self.unreachable(seen);
        Err(Setback::NoProxy { proxies })
    }

    /// As [`Self::refused_by_all`], until `until` or a cancellation.
    pub(super) async fn probed(
        &self,
        hold: &mut Hold,
        until: Duration,
        attempt: u32,
    ) -> Result<(), Setback> {
        let left = until.saturating_sub(self.clock.now());
        let probes = self.refused_by_all(&mut hold.seen, attempt);
        let done = self.unless_cancelled(self.clock.within(left, probes)).await;
        match done.ok_or(Setback::Cancelled)? {
            Some(outcome) => outcome,
            None => Err(Setback::NotFollowed {
                proxies: self.named(&hold.seen, &Seen::Open),
            }),
        }
    }

    /// The commit sequence number, from the first proxy that tells it.
    pub(super) async fn csn(&self) -> Result<Option<String>, Obstacle> {
        if !self.has_csn {
            return Ok(None);
        }
        let mut last = None;
        for proxy in &self.proxies {
            match proxy.csn(self.deadline / 2).await {
                Ok(csn) => return Ok(csn),
                Err(error) => last = Some((proxy.name(), error.into_words())),
            }
        }
        let (node, why) = last.unwrap_or_default();
        let message = format!("the commit sequence number could not be read: {why}");
        let error = agent_api::ApiError::new(agent_api::ErrorKind::Database, message);
        Err(Obstacle::Failed { node, error })
    }
}

/// Asks until it refuses writes, or is lost.
async fn refuses(proxy: &impl Proxy, seen: &mut Seen, clock: &impl Clock) {
    let mut pause = PROBES.0;
    while *seen == Seen::Open {
        match proxy.probe(PROBE).await {
            Ok(Gate::Locked) => *seen = Seen::Refusing,
            Ok(Gate::Open) => clock.sleep(pause).await,
            Err(error) => *seen = Seen::Unreachable(error.into_words()),
        }
        pause = (pause * 2).min(PROBES.1);
    }
}
