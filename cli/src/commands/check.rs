//! `gs_pitr check`: find out whether backups and restores will work, and what to mend.

mod certificates;
mod nodes;
mod proxies;
mod race;
mod report;
mod store;

use clap::Args;
use serde_json::json;
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

use crate::agents;
use crate::cluster::{ProxyAccess, ProxyArgs};
use crate::failure::{Failure, Result};
use crate::operations::Live;
use crate::printer::Printer;
use crate::settings::values::Address;
use crate::settings::{NodesArgs, Options, Settings};
use crate::signals;
use report::Report;

/// What no check can see, whatever it is given.
const NEVER_CHECKED: [&str; 3] = [
    "that a backup restores: only a restore shows that (gs_pitr restore, into a fresh directory)",
    "bandwidth, and whether the store and the network hold out for as long as a backup takes",
    "hosts that have no agent in `--nodes`: standbys, cluster managers and proxies there, and new hosts of a restore",
];

/// What the proxies would say.
const ONLY_A_PROXY_KNOWS: &str = "whether `--nodes` names every data node of the cluster";

/// `gs_pitr check`
#[derive(Debug, Args)]
pub(crate) struct CheckArgs {
    #[command(flatten)]
    nodes: NodesArgs,
    #[command(flatten)]
    proxy: ProxyArgs,
}

impl CheckArgs {
    /// What the command's own flags say.
    pub(crate) fn options(&self) -> Options {
        Options::from(&self.nodes).combine(Options::from(&self.proxy))
    }
}

/// Runs the command.
pub(crate) async fn run(args: &CheckArgs, settings: &Settings, printer: &Printer) -> Result<()> {
    let access = args.proxy.access(settings, printer)?;
    if !settings.has_nodes() && !settings.has_repo() && access.is_none() {
        let failure =
            Failure::usage("there is nothing to check: neither agents nor a repository are given");
        return Err(failure.next(
            "give `--nodes HOST:PORT,...` (or the cluster's proxy with `--host`) and `--repo s3://BUCKET/PREFIX`",
        ));
    }
    let (live, cancel, operation) = (Live::default(), CancellationToken::new(), Uuid::now_v7());
    let work = checked(operation, access.as_ref(), settings, printer, &cancel);
    signals::guarded(operation, settings, printer, &live, &cancel, work).await
}

async fn checked(
    operation: Uuid,
    access: Option<&ProxyAccess>,
    settings: &Settings,
    printer: &Printer,
    cancel: &CancellationToken,
) -> Result<()> {
    let mut report = Report::new(printer);
    // A wrong setting is no finding.
    let named = if settings.has_nodes() {
        settings.nodes()?.to_vec()
    } else {
        Vec::new()
    };
    if !named.is_empty() || access.is_some() {
        report.all(None, certificates::ours(settings));
    }
    let addresses = match access {
        Some(access) => {
            let found = proxies::examine(access, settings, printer, &mut report, cancel);
            let found = found.await;
            cancelled(cancel)?;
            all_of(named, found)
        }
        None if named.is_empty() => {
            report.not_checked("the nodes: no `--nodes` is given, and no proxy with `--host`");
            named
        }
        None => named,
    };
    let agents = match agents::all(&addresses, settings, printer) {
        Ok(agents) => agents,
        Err(failure) => {
            report.not_checked("the agents: what they are asked with cannot be used");
            report.failure(None, "agents", failure);
            Vec::new()
        }
    };
    let mut store = store::Store::begin(operation, settings, agents.len(), &mut report).await;
    let examined = tokio::select! {
        examined = examine(&agents, settings, &mut store, &mut report) => examined,
        () = cancel.cancelled() => Err(Failure::cancelled()),
    };
    // Also when it was cancelled: what it wrote is of no use to anybody.
    let left = store.clean_up(&mut report).await;
    examined?;
    for words in NEVER_CHECKED {
        report.not_checked(words);
    }
    if access.is_none() {
        report.not_checked(ONLY_A_PROXY_KNOWS);
    }
    report.conclude(left)?;
    let (ok, warnings) = report.counts();
    let fields = json!({
        "ok": ok, "warnings": warnings, "failures": 0, "findings": report.lines(),
        "not_checked": report.unchecked(), "left": left,
    });
    printer.result("check", fields);
    Ok(())
}

fn cancelled(cancel: &CancellationToken) -> Result<()> {
    if cancel.is_cancelled() {
        return Err(Failure::cancelled());
    }
    Ok(())
}

/// The agents that are named and those that were found, each once.
fn all_of(named: Vec<Address>, found: Vec<Address>) -> Vec<Address> {
    let mut all = named;
    for address in found {
        if !all.contains(&address) {
            all.push(address);
        }
    }
    all
}

async fn examine(
    agents: &[std::sync::Arc<agents::Agent>],
    settings: &Settings,
    store: &mut store::Store,
    report: &mut Report,
) -> Result<()> {
    let hosts = nodes::examine(agents, settings, store, report).await;
    store.probe(report).await;
    nodes::compare(&hosts, store, report).await;
    race::run(&hosts, settings, store, report).await;
    Ok(())
}
