//! Prints what is told, from a thread of its own: who holds the lock never waits for a reader.

use std::time::{Duration, Instant};

use serde_json::json;
use tokio::sync::mpsc;
use tokio::task::JoinHandle;
use tokio::time::timeout;

use super::told::{State, Told};
use crate::printer::Printer;

/// What is in the way without a lock is told at most this often.
const EVERY: Duration = Duration::from_secs(5);
/// How long the rest is waited for at the end.
const REST: Duration = Duration::from_secs(2);

/// What the lock is for, in events and words.
#[derive(Debug, Clone, Copy)]
pub(super) struct Purpose {
    /// Name of the event of a state.
    state: &'static str,
    /// Name of the event of a try in vain.
    tried: &'static str,
    /// What there is not, after a try in vain.
    none: &'static str,
}

/// A point.
pub(super) const POINT: Purpose = Purpose {
    state: "point-state",
    tried: "point-try",
    none: "no point",
};

/// The switch of a restore.
pub(super) const SWITCH: Purpose = Purpose {
    state: "switch-state",
    tried: "switch-try",
    none: "no lock",
};

/// The thread.
#[derive(Debug)]
pub(super) struct Printing(JoinHandle<()>);

impl Printing {
    pub(super) fn start(
        mut told: mpsc::Receiver<Told>,
        purpose: Purpose,
        printer: &Printer,
    ) -> Self {
        let printer = printer.clone();
        Self(tokio::task::spawn_blocking(move || {
            let mut last = Last::default();
            while let Some(told) = told.blocking_recv() {
                last.print(told, purpose, &printer);
            }
        }))
    }

    /// Waits until all is printed.
    pub(super) async fn end(self) {
        if timeout(REST, self.0).await.is_err() {
            tracing::info!("nobody reads what is told about the point");
        }
    }
}

#[derive(Default)]
struct Last {
    state: Option<State>,
    in_the_way: Option<Instant>,
    unreachable: Vec<(String, String)>,
}

impl Last {
    fn print(&mut self, told: Told, purpose: Purpose, printer: &Printer) {
        match told {
            Told::State { state, attempt } => {
                // While it waits for a quiet moment it looks four times a second.
                let before = matches!(state, State::Settle | State::Quiet);
                if before && self.state == Some(State::Quiet) {
                    return;
                }
                self.state = Some(state);
                tracing::info!(attempt, state = state.name(), event = purpose.state);
                let fields = json!({"state": state.name(), "try": attempt});
                printer.event(purpose.state, fields, None);
            }
            Told::Setback {
                attempt,
                held,
                words,
            } => {
                let recently = self.in_the_way.is_some_and(|at| at.elapsed() < EVERY);
                if held.is_none() && recently {
                    return;
                }
                self.in_the_way = Some(Instant::now());
                let held_ms = held.map(super::millis);
                let text = match held_ms {
                    None => format!("{} yet: {words}", purpose.none),
                    Some(ms) => {
                        format!(
                            "{} at try {attempt}, locked for {ms} ms: {words}",
                            purpose.none
                        )
                    }
                };
                let fields = json!({"try": attempt, "held_ms": held_ms, "message": words});
                printer.event(purpose.tried, fields, Some(&text));
            }
            Told::Unreachable { proxies } if proxies != self.unreachable => {
                for (proxy, why) in &proxies {
                    let message = format!(
                        "this proxy cannot be reached, and proves nothing of writes through it ({why}); what the data nodes say holds for them too"
                    );
                    printer.warning(Some(proxy), &message);
                }
                self.unreachable = proxies;
            }
            Told::Unreachable { .. } => {}
        }
    }
}
