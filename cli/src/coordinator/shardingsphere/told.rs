//! What a point's making tells while it is under way. Nothing is printed by who holds the lock: a reader that does not read would hold
//! it with him.

use std::time::Duration;

use tokio::sync::mpsc;

/// Where it stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) enum State {
    /// It looks for what will not be gone in a moment.
    Quiet,
    /// The watchdogs arm.
    Arm,
    /// `LOCK CLUSTER` is sent.
    Lock,
    /// Every proxy is asked until it refuses.
    Probe,
    /// S1 and N1, until nobody holds an id.
    Drain,
    /// The restore points.
    Mark,
    /// N2 and S2.
    Prove,
    /// All proxies refuse writes, and are to go on with it.
    Keep,
    /// `UNLOCK CLUSTER`, and every proxy is asked until writes pass.
    Unlock,
    /// The watchdogs are told.
    Disarm,
    /// It waits until watchdogs that have fired rest.
    Settle,
}

impl State {
    /// Its name in events.
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Quiet => "quiet",
            Self::Arm => "arm",
            Self::Lock => "lock",
            Self::Probe => "probe",
            Self::Drain => "drain",
            Self::Mark => "mark",
            Self::Prove => "prove",
            Self::Keep => "keep",
            Self::Unlock => "unlock",
            Self::Disarm => "disarm",
            Self::Settle => "settle",
        }
    }
}

/// What is told.
#[derive(Debug, Clone)]
pub(super) enum Told {
    /// A state was entered.
    State {
        /// Which.
        state: State,
        /// Number of the try.
        attempt: u32,
    },
    /// A try gave no point.
    Setback {
        /// Number of the try.
        attempt: u32,
        /// How long writes were refused, or may have been; `None`: there was no lock.
        held: Option<Duration>,
        /// Why.
        words: String,
    },
    /// Proxies that cannot be reached prove nothing.
    Unreachable {
        /// Each with the reason.
        proxies: Vec<(String, String)>,
    },
}

/// Tells without ever waiting: what does not fit is not told.
#[derive(Debug, Clone)]
pub(super) struct Teller(mpsc::Sender<Told>);

impl Teller {
    /// One that tells the other end.
    pub(super) fn new() -> (Self, mpsc::Receiver<Told>) {
        let (sender, receiver) = mpsc::channel(256);
        (Self(sender), receiver)
    }

    pub(super) fn tell(&self, what: Told) {
        // Nobody listens, or too slowly: the work is not worth less.
        drop(self.0.try_send(what));
    }
}
