//! Who takes part in a point, and by which rules: traits, so that a model can take their place.

use std::time::Duration;

use agent_api::{ApiError, LockOutcome};
use tokio_util::sync::CancellationToken;

use super::clock::Clock;
use super::told::{State, Teller, Told};
use crate::coordinator::proof::{self, Node};

/// How long a proxy may try to lock or unlock. Its lock waits for a mutex of its own.
pub(super) const MUTEX: Duration = Duration::from_secs(1);
/// How long an answer to a probe is waited for.
pub(super) const PROBE: Duration = Duration::from_millis(500);
/// Pauses between probes of one proxy: the first and the longest.
pub(super) const PROBES: (Duration, Duration) =
    (Duration::from_millis(1), Duration::from_millis(5));

/// Why a proxy did not do what it was asked.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum ProxyError {
    /// It said no, in these words: nothing was done.
    Refused(String),
    /// It did not answer, or the answer was lost. It may have done it, and may still do it.
    Unheard(String),
}

impl ProxyError {
    /// What went wrong.
    pub(super) fn into_words(self) -> String {
        match self {
            Self::Refused(words) | Self::Unheard(words) => words,
        }
    }
}

/// What `LOCK CLUSTER` is answered.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum LockReply {
    /// Success, which proves nothing: see [`Gate`].
    Said,
    /// The cluster is locked already, in the proxy's words: it has not locked.
    AlreadyLocked(String),
}

/// Whether a proxy lets writes pass.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Gate {
    /// It does.
    Open,
    /// It refuses them.
    Locked,
}

/// A proxy.
pub(super) trait Proxy {
    /// What it is called in messages.
    fn name(&self) -> String;

    /// Sees that there is a session, and logs in again if there is none. Takes seconds at most.
    ///
    /// # Errors
    /// Why it cannot be reached.
    fn ready(&self) -> impl Future<Output = Result<(), String>>;

    /// `LOCK CLUSTER`. The proxy tries for `wait`; the answer is waited for `deadline`.
    fn lock(
        &self,
        wait: Duration,
        deadline: Duration,
    ) -> impl Future<Output = Result<LockReply, ProxyError>>;

    /// `UNLOCK CLUSTER`. Whether it took, only [`Proxy::probe`] says.
    fn unlock(
        &self,
        wait: Duration,
        deadline: Duration,
    ) -> impl Future<Output = Result<(), ProxyError>>;

    /// Whether writes pass, asked without writing anything.
    fn probe(&self, deadline: Duration) -> impl Future<Output = Result<Gate, ProxyError>>;

    /// The cluster's commit sequence number.
    fn csn(&self, deadline: Duration) -> impl Future<Output = Result<Option<String>, ProxyError>>;
}

/// An agent that unlocks the cluster if it is not told in time that it need not.
pub(super) trait Watchdog {
    /// What it is called in messages.
    fn name(&self) -> String;

    /// From now on it fires after `deadline`. If that fails, it may be armed all the same.
    fn arm(&self, attempt: u32, deadline: Duration) -> impl Future<Output = Result<(), ApiError>>;

    /// Says what became of the lock. Whether it rests now; one that has fired goes on for a while.
    fn disarm(
        &self,
        attempt: u32,
        lock: LockOutcome,
    ) -> impl Future<Output = Result<bool, ApiError>>;

    /// Whether it rests: it will not unlock anything unless it is armed again.
    fn rests(&self) -> impl Future<Output = Result<bool, ApiError>>;
}

/// Who takes part, and by which rules.
#[derive(Debug)]
pub(super) struct Parties<P, W, N, C> {
    /// Every proxy that is known, reachable or not.
    pub(super) proxies: Vec<P>,
    /// The agents that watch.
    pub(super) watchdogs: Vec<W>,
    /// The data nodes.
    pub(super) nodes: Vec<N>,
    /// D: how long a try may take from arming to unlocked.
    pub(super) deadline: Duration,
    /// What D is measured by.
    pub(super) clock: C,
    /// Whether there is a commit sequence number.
    pub(super) has_csn: bool,
    /// The proof's.
    pub(super) proof: proof::Rules,
    /// Who is told where it stands.
    pub(super) teller: Teller,
    /// Somebody asks for it to stop.
    pub(super) cancel: CancellationToken,
}

/// What a proxy was seen to do under the lock.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Seen {
    /// It lets writes pass.
    Open,
    /// It refuses them.
    Refusing,
    /// It cannot be reached, and proves nothing.
    Unreachable(String),
}

impl<P: Proxy, W: Watchdog, N: Node, C: Clock> Parties<P, W, N, C> {
    /// Each proxy that cannot be reached, with the reason.
    pub(super) fn unreachable(&self, seen: &[Seen]) -> Vec<(String, String)> {
        let each = self.proxies.iter().zip(seen);
        let unreachable = each.filter_map(|(proxy, seen)| match seen {
            Seen::Unreachable(why) => Some((proxy.name(), why.clone())),
            Seen::Open | Seen::Refusing => None,
        });
        unreachable.collect()
    }

    pub(super) fn named(&self, seen: &[Seen], wanted: &Seen) -> Vec<String> {
        let each = self.proxies.iter().zip(seen);
        let these = each.filter(|(_, seen)| *seen == wanted);
        these.map(|(proxy, _)| proxy.name()).collect()
    }

    /// Names of the proxies that refused writes.
    pub(super) fn refusing(&self, seen: &[Seen]) -> Vec<String> {
        self.named(seen, &Seen::Refusing)
    }

    pub(super) async fn unless_cancelled<T>(&self, work: impl Future<Output = T>) -> Option<T> {
        self.cancel.run_until_cancelled(work).await
    }

    pub(super) fn enter(&self, state: State, attempt: u32) {
        self.teller.tell(Told::State { state, attempt });
    }
}
