//! `gs_pitr restore`: every node of a backup, at its own point or at a later one, where it lives or in a fresh directory, proved to be at its point
//! before any of them takes the place of what is there.

mod locking;
mod metadata;
mod places;
mod plan;
mod report;
mod target;
mod words;

use std::collections::BTreeMap;
use std::num::NonZeroU16;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use agent_api::{ErrorKind, Secret};
use catalog::Catalog;
use catalog::journal::OperationJournal;
use catalog::model::{LeaseScope, MetadataAfter, OperationEvent, RestorePlan};
use clap::Args;
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

use crate::agents;
use crate::cluster::{Cluster, ProxyAccess, ProxyArgs, Purpose};
use crate::commands::metadata::SecretsArgs;
use crate::consent;
use crate::coordinator::shardingsphere::Switch;
use crate::failure::{Failure, Result};
use crate::journalled::{self, Journalled};
use crate::leased::Leased;
use crate::operations::Live;
use crate::printer::Printer;
use crate::repo;
use crate::restoring::{Opened, Restoring};
use crate::settings::values::Address;
use crate::settings::{Options, Settings, TransferArgs};
use crate::{signals, unfinished};
pub(crate) use locking::{Clients, LockArgs, Open};
pub(crate) use metadata::{IMPORTED, metadata};
use plan::{Plan, Planner};
pub(crate) use report::report;
use target::TargetArgs;

/// `gs_pitr restore`
#[derive(Debug, Args)]
#[expect(clippy::struct_excessive_bools, reason = "each is a flag of its own")]
pub(crate) struct RestoreArgs {
    #[command(flatten)]
    what: TargetArgs,
    #[command(flatten)]
    transfer: TransferArgs,
    /// Only this node of the backup; NODE is a node's id, the beginning of one, or its source's host:port
    #[arg(long, value_name = "NODE")]
    node: Vec<String>,
    /// NODE goes to this agent
    #[arg(long, value_name = "NODE=HOST:PORT", value_parser = pair::<Address>)]
    map: Vec<(String, Address)>,
    /// Fresh directory on the agents' hosts: each node goes to `DIR/<node-id>` [default: over the databases
    /// where they live]
    #[arg(long, value_name = "DIR")]
    target_dir: Option<PathBuf>,
    /// Port of the restored database [default: the one that is there, or that its agent was told, or the source's]
    #[arg(long, value_name = "NODE=PORT", value_parser = pair::<NonZeroU16>)]
    db_port: Vec<(String, NonZeroU16)>,
    /// Leave the restored databases stopped
    #[arg(long)]
    no_start: bool,
    /// The restored databases are new nodes beside the originals
    #[arg(long, requires = "target_dir")]
    clone: bool,
    /// Remove what is there before the copy is made, for want of room: there is no way back
    #[arg(long, conflicts_with_all = ["target_dir", "discard_old"])]
    in_place: bool,
    /// Remove what was there as soon as all nodes are open
    #[arg(long, conflicts_with = "target_dir")]
    discard_old: bool,
    /// The cluster manager that is found beside a database is paused or stopped, and leaves it alone
    #[arg(long)]
    manager_paused: bool,
    /// Allow a running database to be stopped before the decision, where the backup's WAL creates a tablespace in a
    /// directory that it uses
    #[arg(long)]
    stop_early: bool,
    #[command(flatten)]
    lock: LockArgs,
    /// Then drop the databases that differ from the point's at the proxies, and import those of the point
    #[arg(long, conflicts_with_all = ["target_dir", "no_start"])]
    import_metadata: bool,
    #[command(flatten)]
    secrets: SecretsArgs,
    #[command(flatten)]
    proxy: ProxyArgs,
}

/// Reads `NODE=VALUE`.
pub(crate) fn pair<T: std::str::FromStr>(text: &str) -> Result<(String, T), String>
where
    T::Err: std::fmt::Display,
{
    match text.rsplit_once('=') {
        Some((node, value)) if !node.is_empty() => match value.parse() {
            Ok(value) => Ok((node.to_owned(), value)),
            Err(error) => Err(format!("`{value}`: {error}")),
        },
        _ => Err("it is not of the form NODE=VALUE".into()),
    }
}

impl RestoreArgs {
    /// What the command's own flags say.
    pub(crate) fn options(&self) -> Options {
        Options::from(&self.transfer).combine(Options::from(&self.proxy))
    }

    /// What becomes of the proxies' metadata: those of another cluster, or of one that is stopped, are nobody's business.
    fn metadata_after(&self) -> MetadataAfter {
        if self.target_dir.is_some() || self.no_start {
            MetadataAfter::Leave
        } else if self.import_metadata {
            MetadataAfter::Import
        } else {
            MetadataAfter::Compare
        }
    }
}

/// What every step needs.
struct Job<'a> {
    args: &'a RestoreArgs,
    settings: &'a Settings,
    printer: &'a Printer,
    /// The way to the proxies, if they are known.
    access: Option<ProxyAccess>,
    live: &'a Live,
    cancel: CancellationToken,
    operation: Uuid,
    /// Of the proxies' metadata, by the names of their placeholders.
    secrets: BTreeMap<String, Secret>,
}

/// Runs the command.
pub(crate) async fn run(args: &RestoreArgs, settings: &Settings, printer: &Printer) -> Result<()> {
    consent::possible(settings)?;
    if let Some(target) = &args.target_dir {
        check_target(target)?;
    }
    let access = args.proxy.access(settings, printer)?;
    args.lock.check(access.is_some())?;
    if args.import_metadata && access.is_none() {
        let message = "`--import-metadata` needs a proxy that imports them, and none is given";
        return Err(Failure::usage(message).next("give `--host`"));
    }
    let secrets = args.secrets.read()?;
    if access.is_some() && settings.has_nodes() {
        let message = "`--nodes` names the agents: the proxies are not asked for them";
        printer.warning(None, message);
    }
    let (live, cancel) = (Live::default(), CancellationToken::new());
    let job = Job {
        args,
        settings,
        printer,
        access,
        live: &live,
        cancel: cancel.clone(),
        operation: Uuid::now_v7(),
        secrets,
    };
    let work = Box::pin(job.run());
    signals::guarded(job.operation, settings, printer, &live, &cancel, work).await
}

fn check_target(target: &Path) -> Result<()> {
    use std::path::Component::{Normal, RootDir};
    let plain = target
        .components()
        .all(|part| matches!(part, RootDir | Normal(_)));
    if !target.is_absolute() || !plain || target.to_str().is_none() {
        let message = format!(
            "`--target-dir {}` is not an absolute path without `..`; it is one on the agents' hosts",
            target.display()
        );
        return Err(Failure::usage(message));
    }
    Ok(())
}

impl Job<'_> {
    async fn run(&self) -> Result<()> {
        if self.access.is_none() {
            self.settings.nodes()?;
        }
        repo::store(self.settings)?;
        let prepared = async {
            let catalog = repo::open(self.settings).await?;
            let what = &self.args.what;
            let chosen = what.choose(self.args, &catalog, self.printer).await?;
            catalog.check_logged(&chosen.found).await?;
            Ok::<_, Failure>((catalog, chosen))
        };
        let (catalog, chosen) = self.unless_cancelled(prepared).await?;
        let addresses = self.addresses().await?;
        let hosts = agents::connect(&addresses, self.settings, self.printer, &self.cancel).await?;
        let planner = Planner {
            args: self.args,
            catalog: &catalog,
            hosts: &hosts,
            operation: self.operation,
            cancel: &self.cancel,
        };
        let plan = self.unless_cancelled(planner.make(chosen)).await?;
        let nodes: Vec<_> = plan.steps.iter().map(|step| step.becomes).collect();
        self.unless_cancelled(unfinished::refuse(&catalog, &nodes))
            .await?;
        let switch = self.switch(&catalog, &plan);
        let clients = locking::clients(switch.as_ref().map_err(|why| *why), &self.cancel).await?;
        self.agreed(&plan, &clients).await?;
        self.leased(&catalog, &plan, switch.ok()).await
    }

    /// How clients are kept out while databases are switched, or why nobody does.
    fn switch<'b>(
        &'b self,
        catalog: &'b Catalog,
        plan: &Plan,
    ) -> std::result::Result<Switch<'b>, Open> {
        let args = self.args;
        if args.target_dir.is_some() {
            return Err(Open::Beside);
        }
        if args.lock.is_never() {
            return Err(Open::AsAsked);
        }
        let access = self.access.as_ref().ok_or(Open::NoProxy)?;
        if args.in_place {
            return Err(Open::Stopped);
        }
        let agents = plan.steps.iter().map(|step| Arc::clone(&step.host.agent));
        Ok(Switch {
            access,
            silence: self.args.lock.silence(),
            patience: locking::PATIENCE,
            agents: agents.collect(),
            catalog,
            operation: self.operation,
            live: self.live,
            printer: self.printer,
        })
    }

    /// The agents: of `--nodes`, or of the data nodes that the proxies tell of.
    async fn addresses(&self) -> Result<Vec<Address>> {
        let access = self.access.as_ref();
        let Some(access) = access.filter(|_| !self.settings.has_nodes()) else {
            return Ok(self.settings.nodes()?.to_vec());
        };
        let (settings, printer) = (self.settings, self.printer);
        let found = Cluster::discover(access, Purpose::Restore, settings, printer, &self.cancel);
        match found.await {
            Ok(cluster) => Ok(cluster.agents()),
            Err(failure) if failure.kind == ErrorKind::Cancelled => Err(failure),
            Err(failure) => {
                let next = "name the agents yourself, without the proxies: `--nodes HOST:PORT,...`";
                let next = match &failure.next {
                    Some(first) => format!("{first}; or {next}"),
                    None => next.to_owned(),
                };
                Err(Failure {
                    next: Some(next),
                    ..failure
                })
            }
        }
    }

    /// Shows the plan and has it confirmed.
    async fn agreed(&self, plan: &Plan, clients: &Clients) -> Result<()> {
        let fields = words::fields(plan, self.args, clients);
        let text = words::text(plan, self.args, clients);
        self.printer.event("plan", fields, Some(&text));
        let question = if self.args.in_place {
            "Stop and REMOVE these databases, and restore in their place? There is no way back."
        } else {
            "Restore all of this?"
        };
        agreed(question, self.settings, self.printer, &self.cancel).await
    }

    /// Takes the lease, so that nobody else restores meanwhile.
    async fn leased(
        &self,
        catalog: &Catalog,
        plan: &Plan,
        switch: Option<Switch<'_>>,
    ) -> Result<()> {
        let leased = Leased::take(
            catalog,
            LeaseScope::Restore,
            self.operation,
            "gs_pitr restore",
            self.settings,
            self.printer,
            &self.cancel,
        );
        let leased = leased.await?;
        let document = plan.document(self.args);
        let outcome = self
            .journalled(catalog, plan, &document, &leased, switch)
            .await;
        let open = outcome.as_ref().is_err_and(|failure| failure.unfinished);
        if open && !self.live.is_decided() {
            // It runs out, and whoever takes it over fences what is open.
            drop(leased);
        } else {
            leased.release().await;
        }
        let opened = outcome?;
        report("restore", &document, &opened, self.printer);
        Ok(())
    }

    async fn journalled(
        &self,
        catalog: &Catalog,
        plan: &Plan,
        document: &RestorePlan,
        leased: &Leased,
        switch: Option<Switch<'_>>,
    ) -> Result<Vec<Opened>> {
        let journalled = Journalled {
            operation: self.operation,
            kind: "restore",
            backup: Some(&plan.backup),
            by: journalled::ourselves("gs_pitr restore"),
        };
        let restoring = Restoring {
            catalog,
            settings: self.settings,
            printer: self.printer,
            live: self.live,
            operation: self.operation,
            plan: document,
            switch,
        };
        let work = async |journal: &OperationJournal| {
            let begun = async {
                catalog.pin(self.operation, &plan.reads()).await?;
                let event = OperationEvent::RestorePlanned(document.clone());
                journal.record(event).await?;
                Ok::<_, Failure>(())
            };
            self.unless_cancelled(begun).await?;
            let parts = plan.parts(document, self.args, self.settings);
            let opened = restoring.run(parts, leased, &self.cancel).await?;
            let (access, there) = (self.access.as_ref(), (catalog, journal));
            metadata(document, access, &self.secrets, there, self.printer).await?;
            Ok(opened)
        };
        journalled.run(catalog, self.printer, None, work).await
    }

    async fn unless_cancelled<T>(&self, work: impl Future<Output = Result<T>>) -> Result<T> {
        tokio::select! {
            outcome = work => outcome,
            () = self.cancel.cancelled() => Err(Failure::cancelled()),
        }
    }
}

/// Has `question` answered with yes, unless the settings do that.
///
/// # Errors
/// A cancellation, by an answer too; that there is nobody to ask.
pub(crate) async fn agreed(
    question: &'static str,
    settings: &Settings,
    printer: &Printer,
    cancel: &CancellationToken,
) -> Result<()> {
    let nobody = Failure::usage("there is nobody to ask").next("use `--yes`");
    consent::agreed(question, nobody, settings, printer, cancel).await
}
