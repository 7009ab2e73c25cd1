//! Ctrl-C, SIGTERM and SIGHUP while something long is under way.

use std::future::Future;
use std::time::Duration;

use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

use crate::failure::{Failure, Result};
use crate::operations::Live;
use crate::printer::{Printer, log_path};
use crate::settings::Settings;

/// How long a second Ctrl-C waits for the cluster to be unlocked.
const UNLOCK_WITHIN: Duration = Duration::from_secs(3);

fn listen(kind: SignalKind) -> Result<Signal> {
    signal(kind).map_err(|error| {
        let message = format!("cannot listen for signals: {error}");
        Failure::new(agent_api::ErrorKind::Internal, message)
    })
}

/// Runs `work` so that the first Ctrl-C or SIGTERM cancels `cancel` and waits, the second one ends it
/// there and says what is left, and SIGHUP takes it off its terminal.
///
/// # Errors
/// What `work` ends with, or a cancellation.
pub(crate) async fn guarded<T>(
    operation: Uuid,
    settings: &Settings,
    printer: &Printer,
    live: &Live,
    cancel: &CancellationToken,
    work: impl Future<Output = Result<T>>,
) -> Result<T> {
    let mut interrupt = listen(SignalKind::interrupt())?;
    let mut terminate = listen(SignalKind::terminate())?;
    let mut hangup = listen(SignalKind::hangup())?;
    let mut work = std::pin::pin!(work);
    loop {
        tokio::select! {
            outcome = &mut work => return outcome,
            _ = interrupt.recv() => {}
            _ = terminate.recv() => {}
            _ = hangup.recv() => {
                let path = log_path(&settings.home, operation);
                let message = match printer.detach(&path) {
                    Ok(()) => format!("the terminal has gone away; it goes on, process {}", std::process::id()),
                    Err(failure) => format!("the terminal has gone away and there is no log: {failure}"),
                };
                printer.warning(None, &message);
                continue;
            }
        }
        if cancel.is_cancelled() {
            // A lock is not left behind for the sake of some milliseconds; beyond that the watchdogs see to it.
            if timeout(UNLOCK_WITHIN, live.unlocked()).await.is_err() {
                let message =
                    "the cluster may still be locked; the agents unlock it within seconds";
                printer.warning(None, message);
            }
            return Err(left_behind(live));
        }
        cancel.cancel();
        let message = if live.is_decided() {
            "it is decided and goes forward, so it is not cancelled; once more to leave at once"
        } else {
            "cancelling in order; once more to leave at once"
        };
        printer.warning(None, message);
    }
}

/// What the second Ctrl-C answers.
fn left_behind(live: &Live) -> Failure {
    let left = live.names();
    let mut failure = Failure::cancelled();
    if !left.is_empty() {
        failure.message = format!(
            "left at once; these agents still have an operation under way: {}",
            left.join(", ")
        );
        let wait =
            "wait: each agent ends what nobody asks for after its `--orphan-timeout` (10 min)";
        let next = live.if_left().unwrap_or_else(|| wait.to_owned());
        failure = failure.changed_if(true).next(next);
    }
    failure
}
