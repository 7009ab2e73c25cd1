//! `gs_pitr check`: find out whether backups and restores will work, and what to mend.

mod certificates;
mod nodes;
mod race;
mod report;
mod store;

use clap::Args;
use serde_json::json;
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

use crate::agents;
use crate::failure::{Failure, Result};
use crate::operations::Live;
use crate::printer::Printer;
use crate::settings::{NodesArgs, Options, Settings};
use crate::signals;
use report::Report;

/// What no check can see, whatever it is given.
const NEVER_CHECKED: [&str; 4] = [
    "that a backup restores: only a restore shows that (gs_pitr restore, into a fresh directory)",
    "whether `--nodes` names every data node of the cluster",
    "bandwidth, and whether the store and the network hold out for as long as a backup takes",
    "hosts that have no agent in `--nodes`: standbys, cluster managers and proxies there, and new hosts of a restore",
];

/// `gs_pitr check`
#[derive(Debug, Args)]
pub(crate) struct CheckArgs {
    #[command(flatten)]
    nodes: NodesArgs,
}

impl CheckArgs {
    /// What the command's own flags say.
    pub(crate) fn options(&self) -> Options {
        Options::from(&self.nodes)
    }
}

/// Runs the command.
pub(crate) async fn run(_: &CheckArgs, settings: &Settings, printer: &Printer) -> Result<()> {
    if !settings.has_nodes() && !settings.has_repo() {
        let failure =
            Failure::usage("there is nothing to check: neither agents nor a repository are given");
        return Err(failure.next("give `--nodes HOST:PORT,...` and `--repo s3://BUCKET/PREFIX`"));
    }
    let (live, cancel, operation) = (Live::default(), CancellationToken::new(), Uuid::now_v7());
    let work = checked(operation, settings, printer, &cancel);
    signals::guarded(operation, settings, printer, &live, &cancel, work).await
}

async fn checked(
    operation: Uuid,
    settings: &Settings,
    printer: &Printer,
    cancel: &CancellationToken,
) -> Result<()> {
    let mut report = Report::new(printer);
    // A wrong setting is no finding.
    let addresses = if settings.has_nodes() {
        settings.nodes()?
    } else {
        report.not_checked("the nodes: no `--nodes` is given");
        &[]
    };
    if !addresses.is_empty() {
        report.all(None, certificates::ours(settings));
    }
    let agents = match agents::all(addresses, settings, printer) {
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
    report.conclude(left)?;
    let (ok, warnings) = report.counts();
    let fields = json!({
        "ok": ok, "warnings": warnings, "failures": 0, "findings": report.lines(),
        "not_checked": report.unchecked(), "left": left,
    });
    printer.result("check", fields);
    Ok(())
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
