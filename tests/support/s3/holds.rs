//! Requests that a test holds in flight, so that something can happen exactly between two steps.

use std::fmt;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use tokio::sync::watch;

use super::faults::Operation;

/// How long a test waits for a request that it wants to hold.
const ARRIVES_WITHIN: Duration = Duration::from_secs(90);

/// Where a request is held.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum When {
    /// It has arrived and has had no effect.
    Before,
    /// It has had its effect; the client does not know yet.
    After,
}

/// What becomes of the requests at a gate.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Fate {
    Held,
    GoesOn,
    Cut,
}

type Matcher = dyn Fn(&str) -> bool + Send + Sync;

struct Gate {
    operation: Operation,
    when: When,
    matches: Box<Matcher>,
    fate: watch::Sender<Fate>,
    /// Keys of the requests that came to it.
    arrived: watch::Sender<Vec<String>>,
}

impl fmt::Debug for Gate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            operation, when, ..
        } = self;
        write!(f, "Gate({operation:?}, {when:?})")
    }
}

/// All gates that stand.
#[derive(Debug, Default)]
pub(super) struct Holds(Mutex<Vec<Arc<Gate>>>);

impl Holds {
    pub(super) fn add(
        &self,
        operation: Operation,
        when: When,
        matches: impl Fn(&str) -> bool + Send + Sync + 'static,
    ) -> Hold {
        let gate = Arc::new(Gate {
            operation,
            when,
            matches: Box::new(matches),
            fate: watch::Sender::new(Fate::Held),
            arrived: watch::Sender::default(),
        });
        let mut gates = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        gates.retain(|gate| *gate.fate.borrow() == Fate::Held);
        gates.push(Arc::clone(&gate));
        Hold(gate)
    }

    /// Waits at the first closed gate that a request comes to.
    pub(super) async fn meet(&self, operation: Operation, when: When, key: &str) -> Fate {
        let stands = |gate: &&Arc<Gate>| {
            gate.operation == operation
                && gate.when == when
                && *gate.fate.borrow() == Fate::Held
                && (gate.matches)(key)
        };
        let gate = {
            let gates = self.0.lock().unwrap_or_else(PoisonError::into_inner);
            gates.iter().find(stands).cloned()
        };
        let Some(gate) = gate else {
            return Fate::GoesOn;
        };
        let mut fate = gate.fate.subscribe();
        gate.arrived.send_modify(|keys| keys.push(key.to_owned()));
        let decided = fate.wait_for(|fate| *fate != Fate::Held).await;
        decided.map_or(Fate::GoesOn, |fate| *fate)
    }
}

/// A gate. Dropped, it lets everything go on.
#[derive(Debug)]
pub struct Hold(Arc<Gate>);

impl Hold {
    /// Waits until a request is held, and returns its key (keys of a deletion, one after the other).
    ///
    /// # Panics
    /// If none comes within 90 s.
    pub async fn reached(&self) -> String {
        self.reached_by(1).await.swap_remove(0)
    }

    /// Waits until so many requests have come, held or given up since, and returns their keys.
    ///
    /// # Panics
    /// If they do not come within 90 s.
    pub async fn reached_by(&self, count: usize) -> Vec<String> {
        let mut arrived = self.0.arrived.subscribe();
        let enough = arrived.wait_for(|keys| keys.len() >= count);
        let enough = tokio::time::timeout(ARRIVES_WITHIN, enough).await;
        let keys = enough.unwrap_or_else(|_| panic!("fewer than {count} came to {:?}", self.0));
        keys.expect("the gate is ours").clone()
    }

    /// Lets those held go on; nothing is held any more.
    pub fn release(self) {
        self.0.fate.send_replace(Fate::GoesOn);
    }

    /// Cuts the connections of those held: what had no effect yet never has. Nothing is held any more.
    pub fn cut(self) {
        self.0.fate.send_replace(Fate::Cut);
    }
}

impl Drop for Hold {
    fn drop(&mut self) {
        self.0.fate.send_if_modified(|fate| {
            let held = *fate == Fate::Held;
            if held {
                *fate = Fate::GoesOn;
            }
            held
        });
    }
}
