//! A watchdog at work: the machine's calls made, each under a deadline, and the clock.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use agent_api::WatchdogState;
use agent_sql::SqlError;
use agent_sql::proxy::{Gate, UnlockReply};
use tokio::task::JoinSet;

use super::Entry;
use super::door::Door;
use super::machine::{Answer, Call, Notice, Order, PROBE_DEADLINE, UNLOCK_DEADLINE, UNLOCK_WAIT};

/// A log-in and a call together; whatever a door does, it has this long.
const CALL: Duration = Duration::from_secs(4);
/// Of UNLOCKs that did nothing, every so many-th is logged.
const LOGGED: u32 = 50;

/// Runs until the watchdog is deleted or forgotten.
pub(super) async fn run(entry: &Arc<Entry>) {
    let mut calls: JoinSet<Answer> = JoinSet::new();
    let mut asked = HashMap::new();
    loop {
        let (orders, wake, notices) = {
            let mut machine = entry.machine();
            let (orders, wake) = machine.next(Instant::now());
            (orders, wake, machine.notices())
        };
        log(entry, notices);
        // Whoever waits for a state looks again: it may have changed by the clock alone.
        entry.progress.send_replace(());
        for order in orders {
            if let Some(door) = entry.doors.get(order.proxy) {
                let call = calls.spawn(make(Arc::clone(door), order));
                asked.insert(call.id(), order.proxy);
            }
        }
        tokio::select! {
            biased;
            () = entry.end.cancelled() => break,
            Some(done) = calls.join_next_with_id(), if !calls.is_empty() => {
                let (id, answer) = match done {
                    Ok((id, answer)) => (id, answer),
                    Err(error) => {
                        let message = format!("a bug in the agent: {error}");
                        (error.id(), Answer::Failed { message, refused: false })
                    }
                };
                if let Some(proxy) = asked.remove(&id) {
                    let connected = entry.doors.get(proxy).is_some_and(|door| door.is_connected());
                    entry.machine().answered(Instant::now(), proxy, answer, connected);
                }
            }
            () = entry.told.notified() => {}
            () = tokio::time::sleep_until(wake.into()) => {}
        }
        if entry.is_forgotten() {
            tracing::info!(watchdog = %entry.request.id, "forgotten: nobody has asked about it for long");
            break;
        }
    }
    calls.shutdown().await;
    for door in &entry.doors {
        door.close();
    }
}

/// Makes one call.
async fn make(door: Arc<dyn Door>, order: Order) -> Answer {
    let call = async {
        match order.call {
            Call::Probe => match door.probe(PROBE_DEADLINE).await? {
                Gate::Open => Ok(Answer::Open),
                Gate::Locked(_) => Ok(Answer::Locked),
            },
            Call::Unlock => match door.unlock(UNLOCK_WAIT, UNLOCK_DEADLINE).await? {
                UnlockReply::Said => Ok(Answer::Said),
                UnlockReply::NotLocked => Ok(Answer::Open),
            },
        }
    };
    match tokio::time::timeout(CALL, call).await {
        Ok(Ok(answer)) => answer,
        Ok(Err(error)) => Answer::Failed {
            refused: is_refused(&error),
            message: error.to_string(),
        },
        Err(_) => {
            door.close();
            Answer::Failed {
                message: format!("no answer within {CALL:?}"),
                refused: false,
            }
        }
    }
}

/// The log-in will not go better next time.
fn is_refused(error: &SqlError) -> bool {
    matches!(
        error,
        SqlError::WrongPassword { .. } | SqlError::Refused { .. } | SqlError::Setting { .. }
    )
}

fn log(entry: &Entry, notices: Vec<Notice>) {
    let watchdog = entry.request.id;
    for notice in notices {
        match notice {
            Notice::Fired { attempt, why } => {
                tracing::warn!(%watchdog, attempt, "unlocking the cluster: {why}");
            }
            Notice::Unlocks { proxy, in_vain } if in_vain % LOGGED == 0 => {
                tracing::warn!(%watchdog, %proxy, in_vain, "UNLOCK CLUSTER");
            }
            Notice::Unlocks { proxy, in_vain } => {
                tracing::debug!(%watchdog, %proxy, in_vain, "UNLOCK CLUSTER");
            }
            Notice::Settled(WatchdogState::Settled {
                attempt,
                unlocks,
                open_after_ms: None,
                last_error: Some(error),
            }) => tracing::error!(%watchdog, attempt, unlocks, "{error}"),
            Notice::Settled(state) => tracing::info!(%watchdog, "settled: {state:?}"),
        }
    }
}
