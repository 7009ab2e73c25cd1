//! Watches one engine: progress, the orphan rule, cancellation that is not obeyed, panics.

use std::any::Any;
use std::sync::{Arc, PoisonError};
use std::time::Duration;

use agent_api::{ApiError, ErrorKind, Phase};
use futures_util::future::BoxFuture;
use tokio::task::JoinError;
use tokio::time::{Instant, MissedTickBehavior, interval, sleep_until};

use crate::operation::table::Operation;

/// How often progress is looked at.
const TICK: Duration = Duration::from_millis(500);
/// A cancelled engine has so long to clean up before it is dropped.
const CLEAN_UP: Duration = Duration::from_mins(2);

pub(super) async fn supervise(
    operation: Arc<Operation>,
    run: BoxFuture<'static, Result<(), ApiError>>,
    orphan_timeout: Duration,
) {
    // A task of its own, so that a panic ends the operation and not the agent.
    let mut task = tokio::spawn(run);
    let mut tick = interval(TICK);
    tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut give_up = None;
    let result = loop {
        let abandoned = async {
            match give_up {
                Some(at) => sleep_until(at).await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            result = &mut task => break result.unwrap_or_else(|error| Err(ended_badly(error))),
            () = abandoned => {
                task.abort();
                break Err(did_not_stop());
            }
            () = operation.cancel.cancelled(), if give_up.is_none() => {
                give_up = Some(Instant::now() + CLEAN_UP);
            }
            _ = tick.tick() => {
                operation.log.tick();
                cancel_orphan(&operation, orphan_timeout);
            }
        }
    };
    match result {
        Ok(()) => operation.log.end(Phase::Done, None),
        Err(error) => {
            let (phase, error) = verdict(&operation, error);
            operation.log.end(phase, Some(error));
        }
    }
}

fn cancel_orphan(operation: &Operation, timeout: Duration) {
    // A restore has to ask the bucket first, and does that itself.
    let Some((waited, phase)) = operation
        .log
        .forgotten_for()
        .filter(|_| !operation.is_restore())
    else {
        return;
    };
    if waited < timeout || operation.cancel.is_cancelled() {
        return;
    }
    let message = format!(
        "cancelled as an orphan: it was {phase} and waited for its client, and nobody asked about it for \
         {} s (--orphan-timeout, of a point 30 s at most)",
        timeout.as_secs()
    );
    operation.cancel(ApiError::new(ErrorKind::Timeout, message).next("run the command again"));
}

/// The phase an operation that failed ends in, and the error it shows: if it was cancelled, the reason
/// of that, with what the engine says of what is left.
fn verdict(operation: &Operation, error: ApiError) -> (Phase, ApiError) {
    let reason = operation
        .reason
        .lock()
        .unwrap_or_else(PoisonError::into_inner)
        .clone();
    let Some(mut shown) = reason else {
        return (Phase::Failed, error);
    };
    if error.kind != ErrorKind::Cancelled {
        shown.message = format!("{}; while it stopped: {}", shown.message, error.message);
    }
    shown.changed |= error.changed;
    shown.next = error.next.or(shown.next);
    (Phase::Cancelled, shown)
}

fn did_not_stop() -> ApiError {
    let message = format!(
        "did not stop within {} s of being cancelled and was dropped; what it was doing may be half done",
        CLEAN_UP.as_secs()
    );
    ApiError::new(ErrorKind::Internal, message).changed()
}

fn ended_badly(error: JoinError) -> ApiError {
    let what = match error.try_into_panic() {
        Ok(payload) => format!("panicked: {}", panic_words(payload.as_ref())),
        Err(error) => error.to_string(),
    };
    let message = format!("a bug in the agent: the operation {what}");
    ApiError::new(ErrorKind::Internal, message).changed()
}

fn panic_words(payload: &(dyn Any + Send)) -> &str {
    payload
        .downcast_ref::<&str>()
        .copied()
        .or_else(|| payload.downcast_ref::<String>().map(String::as_str))
        .unwrap_or("without a message")
}
