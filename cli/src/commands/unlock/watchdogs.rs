//! What the agents' watchdogs say: one that is armed belongs to somebody who is about to lock or has locked, one that has fired unlocks.

use std::time::Duration;

use agent_api::{WatchdogState, WatchdogStatus};
use futures_util::future::join_all;
use serde_json::{Value, json};
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;

use crate::agents::{self, Agent};
use crate::cluster::{self, ProxyAccess, Reached};
use crate::failure::{Failure, Result};
use crate::printer::{Printer, duration};
use crate::settings::Settings;
use crate::settings::values::Address;

/// For all of it: a lock is held meanwhile, and an agent that is down must not keep it there.
const PATIENCE: Duration = Duration::from_secs(5);

/// Shows the watchdogs of the data nodes' agents. What cannot be had is said, and keeps nobody from unlocking.
///
/// # Errors
/// A cancellation.
pub(super) async fn tell(
    reached: &Reached,
    access: &ProxyAccess,
    settings: &Settings,
    printer: &Printer,
    cancel: &CancellationToken,
) -> Result<()> {
    let asked = async {
        let addresses = timeout(PATIENCE, addresses(reached, access, settings)).await;
        let addresses = addresses.map_err(|_| late())??;
        let agents = agents::all(&addresses, settings, printer)?;
        Ok::<_, Failure>(join_all(agents.iter().map(|agent| ask(agent))).await)
    };
    let asked = tokio::select! {
        asked = asked => asked,
        () = cancel.cancelled() => return Err(Failure::cancelled()),
    };
    match asked {
        Ok(asked) => {
            let fields = json!({"agents": asked.iter().map(Asked::shown).collect::<Vec<_>>()});
            let lines: Vec<_> = asked.iter().flat_map(Asked::lines).collect();
            printer.event("watchdogs", fields, Some(&lines.join("\n")));
        }
        Err(failure) => {
            let message = format!("the agents were not asked about watchdogs: {failure}");
            printer.warning(None, &message);
        }
    }
    Ok(())
}

/// The agents of `--nodes`, or those that are behind the proxies.
async fn addresses(
    reached: &Reached,
    access: &ProxyAccess,
    settings: &Settings,
) -> Result<Vec<Address>> {
    if settings.has_nodes() {
        return Ok(settings.nodes()?.to_vec());
    }
    cluster::agents_behind(reached, access).await
}

fn late() -> Failure {
    let message = format!("no proxy listed its nodes within {} s", PATIENCE.as_secs());
    Failure::new(agent_api::ErrorKind::Timeout, message)
}

/// An agent, and what it said.
struct Asked {
    agent: String,
    watchdogs: Result<Vec<WatchdogStatus>, String>,
}

async fn ask(agent: &Agent) -> Asked {
    let asked = timeout(PATIENCE, agent.client().watchdogs()).await;
    Asked {
        agent: agent.name(),
        watchdogs: match asked {
            Ok(Ok(watchdogs)) => Ok(watchdogs),
            Ok(Err(error)) => Err(error.to_string()),
            Err(_) => Err("no answer in time".to_owned()),
        },
    }
}

impl Asked {
    fn shown(&self) -> Value {
        match &self.watchdogs {
            Ok(watchdogs) => json!({"agent": self.agent, "watchdogs": watchdogs}),
            Err(error) => json!({"agent": self.agent, "error": error}),
        }
    }

    fn lines(&self) -> Vec<String> {
        let agent = &self.agent;
        match &self.watchdogs {
            Err(error) => vec![format!("agent {agent}  not known: {error}")],
            Ok(watchdogs) if watchdogs.is_empty() => vec![format!("agent {agent}  no watchdog")],
            Ok(watchdogs) => {
                let line = |it| format!("agent {agent}  {}", line(it));
                watchdogs.iter().map(line).collect()
            }
        }
    }
}

/// One watchdog in words.
fn line(watchdog: &WatchdogStatus) -> String {
    let state = match &watchdog.state {
        WatchdogState::Ready => "rests: somebody makes a point, or did".to_owned(),
        WatchdogState::Armed { attempt, left_ms } => format!(
            "ARMED for try {attempt}: somebody locks; it unlocks in {}",
            span(*left_ms)
        ),
        WatchdogState::Fired {
            attempt,
            since_ms,
            unlocks,
            ..
        } => format!(
            "HAS FIRED for try {attempt}, {} ago: it unlocks, {unlocks} times so far",
            span(*since_ms)
        ),
        WatchdogState::Settled { attempt, .. } => {
            format!("rests: it had fired for try {attempt}")
        }
    };
    let proxies = watchdog.proxies.iter();
    let proxies: Vec<_> = proxies.map(|proxy| proxy.address.to_string()).collect();
    format!(
        "watchdog {}  {state}  ({})",
        watchdog.id,
        proxies.join(", ")
    )
}

fn span(ms: u64) -> String {
    duration(Duration::from_millis(ms))
}
