//! `gs_pitr unlock`: clear a lock that is left on a cluster.
//!
//! The lock has no owner, no lease and no expiry: nobody can say whose it is. So what is known of operations that may have
//! taken it is shown first, and somebody has to agree.

mod known;
mod watchdogs;

use std::time::{Duration, Instant};

use agent_api::ErrorKind;
use agent_sql::SqlError;
use agent_sql::proxy::{Gate, ProxyConnection, UnlockReply};
use clap::Args;
use futures_util::future::join_all;
use serde::Serialize;
use serde_json::json;
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

use crate::cluster::{self, ProxyAccess, ProxyArgs, Reached};
use crate::failure::{Failure, Result};
use crate::operations::Live;
use crate::printer::{Printer, duration};
use crate::settings::values::Address;
use crate::settings::{Options, Settings};
use crate::{agents, consent, signals};

/// How long the proxies' registry may take to give the mutex that UNLOCK needs.
const MUTEX: Duration = Duration::from_secs(1);
/// For an UNLOCK or a probe.
const STEP: Duration = Duration::from_secs(5);
/// Proxies hear of an unlock within some 100 ms: between two rounds.
const PAUSE: Duration = Duration::from_millis(200);
/// Rounds in which every proxy takes writes before it is believed: a LOCK that is still on its way may land.
const ROUNDS: u32 = 3;
/// In all.
const LONGEST: Duration = Duration::from_mins(1);

/// `gs_pitr unlock`
#[derive(Debug, Args)]
pub(crate) struct UnlockArgs {
    #[command(flatten)]
    proxy: ProxyArgs,
}

impl UnlockArgs {
    /// What the command's own flags say.
    pub(crate) fn options(&self) -> Options {
        Options::from(&self.proxy)
    }
}

/// One proxy, as the result has it.
#[derive(Debug, Serialize)]
struct Shown {
    proxy: String,
    /// `open`, `locked` or `unreachable`.
    state: &'static str,
    /// What it says.
    words: Option<String>,
}

/// Runs the command.
pub(crate) async fn run(args: &UnlockArgs, settings: &Settings, printer: &Printer) -> Result<()> {
    let access = args.proxy.needed(settings, printer)?;
    let (live, cancel, operation) = (Live::default(), CancellationToken::new(), Uuid::now_v7());
    let work = work(&access, settings, printer, &cancel);
    signals::guarded(operation, settings, printer, &live, &cancel, work).await
}

async fn work(
    access: &ProxyAccess,
    settings: &Settings,
    printer: &Printer,
    cancel: &CancellationToken,
) -> Result<()> {
    let reached = Reached::find(access, cancel).await?;
    for (proxy, message) in reached.oddities() {
        printer.warning(proxy.as_deref(), &message);
    }
    let before = look(&reached).await?;
    let fields = json!({"proxies": before.iter().map(State::shown).collect::<Vec<_>>()});
    let lines: Vec<_> = before.iter().map(State::line).collect();
    printer.event("lock-state", fields, Some(&lines.join("\n")));
    if before
        .iter()
        .all(|state| matches!(state.gate, Ok(Gate::Open)))
    {
        printer.text("nothing is locked");
        let fields = json!({"outcome": "not-locked", "proxies": all(&before, &reached)});
        printer.result("unlock", fields);
        return Ok(());
    }
    watchdogs::tell(&reached, access, settings, printer, cancel).await?;
    known::tell(settings, printer, cancel).await?;
    let nobody = Failure::usage("the cluster stays locked: there is nobody to ask")
        .next("look at what is shown, then use `--yes`");
    let question =
        "Unlock the cluster? If whoever locked it is at work, what it makes is worth nothing then.";
    consent::agreed(question, nobody, settings, printer, cancel).await?;
    let begun = Instant::now();
    let after = unlocked(&reached, printer, cancel).await?;
    let took = begun.elapsed();
    let unreached = reached.proxies().len() - reached.connected().count();
    printer.text(&format!(
        "unlocked within {}: {} proxies take writes again",
        duration(took),
        after.len()
    ));
    if unreached > 0 {
        let message = format!(
            "{unreached} proxies were not reached, see above: run it again when they are back"
        );
        printer.warning(None, &message);
    }
    let fields = json!({
        "outcome": "unlocked", "unlock_ms": u64::try_from(took.as_millis()).unwrap_or(u64::MAX),
        "proxies": all(&after, &reached),
    });
    printer.result("unlock", fields);
    Ok(())
}

/// What one proxy says when it is asked to write.
struct State<'a> {
    address: &'a Address,
    gate: std::result::Result<Gate, SqlError>,
}

impl State<'_> {
    fn shown(&self) -> Shown {
        let (state, words) = match &self.gate {
            Ok(Gate::Open) => ("open", None),
            Ok(Gate::Locked(words)) => ("locked", Some(words.clone())),
            Err(error) => ("unreachable", Some(error.to_string())),
        };
        Shown {
            proxy: self.address.to_string(),
            state,
            words,
        }
    }

    fn line(&self) -> String {
        let shown = self.shown();
        let words = shown.words.map(|words| format!(": {words}"));
        let (proxy, state) = (shown.proxy, shown.state);
        format!("proxy {proxy}  {state}{}", words.unwrap_or_default())
    }
}

/// All proxies for the result, those too that were never reached.
fn all(states: &[State<'_>], reached: &Reached) -> Vec<Shown> {
    let unreached = reached.proxies().iter().filter_map(|proxy| {
        Some(Shown {
            proxy: proxy.address.to_string(),
            state: "unreachable",
            words: Some(proxy.unreachable.clone()?),
        })
    });
    states.iter().map(State::shown).chain(unreached).collect()
}

/// Asks every proxy that is reached whether it takes writes.
///
/// # Errors
/// If none answers.
async fn look(reached: &Reached) -> Result<Vec<State<'_>>> {
    let asked = reached.connected().map(|(proxy, connection)| async move {
        State {
            address: &proxy.address,
            gate: connection.probe(STEP).await,
        }
    });
    let states = join_all(asked).await;
    let silent =
        |state: &State<'_>| Some(cluster::of_proxy(state.address, state.gate.as_ref().err()?));
    if states.iter().all(|state| state.gate.is_err())
        && let Some(failure) = states.iter().find_map(silent)
    {
        return Err(failure);
    }
    Ok(states)
}

/// Sends UNLOCK through one proxy after the other until all take writes, and go on to.
async fn unlocked<'a>(
    reached: &'a Reached,
    printer: &Printer,
    cancel: &CancellationToken,
) -> Result<Vec<State<'a>>> {
    let until = Instant::now() + LONGEST;
    let (mut open, mut sent) = (0, 0);
    loop {
        let states = look(reached).await?;
        // One that no longer answers is as one that was never reached: it has been named, or is in the result.
        let locked = states.iter().find_map(|state| match &state.gate {
            Ok(Gate::Locked(words)) => Some((state.address, words.clone())),
            _ => None,
        });
        let Some((address, words)) = locked else {
            open += 1;
            if open == ROUNDS {
                return Ok(states);
            }
            agents::pause(PAUSE, cancel).await.map_err(halfway)?;
            continue;
        };
        open = 0;
        if Instant::now() >= until {
            let message = format!(
                "proxy {address} still refuses writes {} after the first of {sent} UNLOCK: {words}",
                duration(LONGEST)
            );
            let next = "look at ZooKeeper: whoever holds its node `lock/global/locks/cluster_lock` keeps UNLOCK from taking; then run it again";
            return Err(Failure::new(ErrorKind::Timeout, message)
                .on(address.to_string())
                .changed_if(true)
                .next(next));
        }
        // Through the proxy that refuses first: one that is behind the others sees an open cluster and does nothing.
        let others = reached
            .connected()
            .filter(|(proxy, _)| proxy.address != *address);
        let first = reached
            .connected()
            .filter(|(proxy, _)| proxy.address == *address);
        for (proxy, connection) in first.chain(others) {
            sent += 1;
            if unlock_through(&proxy.address, connection, printer).await {
                break;
            }
        }
        agents::pause(PAUSE, cancel).await.map_err(halfway)?;
    }
}

/// One UNLOCK. Whether it may have taken.
async fn unlock_through(
    address: &Address,
    connection: &ProxyConnection,
    printer: &Printer,
) -> bool {
    match connection.unlock(MUTEX, STEP).await {
        Ok(UnlockReply::Said) => true,
        Ok(UnlockReply::NotLocked) => false,
        Err(error) => {
            let message = format!("UNLOCK is not known to have taken: {error}");
            printer.warning(Some(&address.to_string()), &message);
            false
        }
    }
}

/// A cancellation when something may have been sent.
fn halfway(failure: Failure) -> Failure {
    failure
        .changed_if(true)
        .next("run it again: it was cancelled before the proxies were seen to take writes")
}
