//! `gs_pitr restore`: every node of a backup where it lives or in a fresh directory, proved to be at its point
//! before any of them takes the place of what is there.

mod places;
mod plan;
mod report;
mod words;

use std::num::NonZeroU16;
use std::path::{Path, PathBuf};

use catalog::Catalog;
use catalog::journal::OperationJournal;
use catalog::model::{LeaseScope, OperationEvent, RestorePlan};
use clap::Args;
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

use crate::agents;
use crate::consent;
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
use plan::{Plan, Planner};
pub(crate) use report::report;

/// `gs_pitr restore`
#[derive(Debug, Args)]
#[expect(clippy::struct_excessive_bools, reason = "each is a flag of its own")]
pub(crate) struct RestoreArgs {
    /// The backup's id, or the beginning of one that is unique
    #[arg(long)]
    id: String,
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
        Options::from(&self.transfer)
    }
}

/// What every step needs.
struct Job<'a> {
    args: &'a RestoreArgs,
    settings: &'a Settings,
    printer: &'a Printer,
    live: &'a Live,
    cancel: CancellationToken,
    operation: Uuid,
}

/// Runs the command.
pub(crate) async fn run(args: &RestoreArgs, settings: &Settings, printer: &Printer) -> Result<()> {
    consent::possible(settings)?;
    if let Some(target) = &args.target_dir {
        check_target(target)?;
    }
    let (live, cancel) = (Live::default(), CancellationToken::new());
    let job = Job {
        args,
        settings,
        printer,
        live: &live,
        cancel: cancel.clone(),
        operation: Uuid::now_v7(),
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
        let addresses = self.settings.nodes()?;
        repo::store(self.settings)?;
        let prepared = async {
            let catalog = repo::open(self.settings).await?;
            let id = catalog.resolve_backup_id(&self.args.id).await?;
            let found = catalog.restorable(&id).await?;
            catalog.check_logged(&found).await?;
            Ok::<_, Failure>((catalog, found))
        };
        let (catalog, found) = self.unless_cancelled(prepared).await?;
        let hosts = agents::connect(addresses, self.settings, self.printer, &self.cancel).await?;
        let planner = Planner {
            args: self.args,
            catalog: &catalog,
            hosts: &hosts,
            operation: self.operation,
            cancel: &self.cancel,
        };
        let plan = self.unless_cancelled(planner.make(found)).await?;
        let nodes: Vec<_> = plan.steps.iter().map(|step| step.becomes).collect();
        self.unless_cancelled(unfinished::refuse(&catalog, &nodes))
            .await?;
        self.agreed(&plan).await?;
        self.leased(&catalog, &plan).await
    }

    /// Shows the plan and has it confirmed.
    async fn agreed(&self, plan: &Plan) -> Result<()> {
        let fields = words::fields(plan, self.args);
        let text = words::text(plan, self.args);
        self.printer.event("plan", fields, Some(&text));
        let question = if self.args.in_place {
            "Stop and REMOVE these databases, and restore in their place? There is no way back."
        } else {
            "Restore all of this?"
        };
        agreed(question, self.settings, self.printer, &self.cancel).await
    }

    /// Takes the lease, so that nobody else restores meanwhile.
    async fn leased(&self, catalog: &Catalog, plan: &Plan) -> Result<()> {
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
        let outcome = self.journalled(catalog, plan, &document, &leased).await;
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
        };
        let work = async |journal: &OperationJournal| {
            let begun = async {
                catalog
                    .pin(self.operation, std::slice::from_ref(&plan.backup))
                    .await?;
                let event = OperationEvent::RestorePlanned(document.clone());
                journal.record(event).await?;
                Ok::<_, Failure>(())
            };
            self.unless_cancelled(begun).await?;
            let parts = plan.parts(document, self.args, self.settings);
            restoring.run(parts, leased, &self.cancel).await
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
