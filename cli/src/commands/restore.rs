//! `gs_pitr restore`: every node of a backup in a fresh directory, proved to be at its point before any
//! of them is opened.

mod plan;

use std::fmt::Write as _;
use std::path::PathBuf;
use std::sync::Arc;

use agent_api::{OpenRequest, OperationSpec, Phase, Place, RestoreSpec, Restored, StartOperation};
use catalog::Catalog;
use catalog::ids::BackupId;
use catalog::journal::OperationJournal;
use catalog::model::{Consistency, Verdict};
use catalog::repo::NewEpoch;
use clap::Args;
use futures_util::future::join_all;
use serde_json::json;
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

use crate::agents;
use crate::failure::{Failure, Result};
use crate::journalled::{self, Journalled};
use crate::operations::{Live, Operation, all_or_cancel};
use crate::printer::Printer;
use crate::repo;
use crate::settings::values::Address;
use crate::settings::{Options, Settings, TransferArgs};
use crate::signals;
use plan::Step;

/// `gs_pitr restore`
#[derive(Debug, Args)]
pub(crate) struct RestoreArgs {
    /// The backup's id, or the beginning of one that is unique
    #[arg(long)]
    id: String,
    #[command(flatten)]
    transfer: TransferArgs,
    /// NODE goes to this agent; NODE is a node's id, the beginning of one, or its source's host:port
    #[arg(long, value_name = "NODE=HOST:PORT", value_parser = pair::<Address>)]
    map: Vec<(String, Address)>,
    /// Directory on the agents' hosts; each node goes to `DIR/<node-id>`
    #[arg(long, value_name = "DIR")]
    target_dir: PathBuf,
    /// Port of the restored database [default: the one its agent was told, or the source's]
    #[arg(long, value_name = "NODE=PORT", value_parser = pair::<std::num::NonZeroU16>)]
    db_port: Vec<(String, std::num::NonZeroU16)>,
    /// Leave the restored databases stopped
    #[arg(long)]
    no_start: bool,
}

/// Reads `NODE=VALUE`.
fn pair<T: std::str::FromStr>(text: &str) -> Result<(String, T), String>
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

/// What the result says of the backup.
struct Head {
    backup: BackupId,
    point: Option<String>,
    consistency: Consistency,
}

/// Runs the command.
pub(crate) async fn run(args: &RestoreArgs, settings: &Settings, printer: &Printer) -> Result<()> {
    // Asked before the first request: what nobody can agree to need not be planned.
    if !settings.yes() && !Printer::can_ask() {
        let message = "`--yes` is missing, and there is no terminal to ask for a yes at";
        return Err(Failure::usage(message).next("run it again with `--yes`"));
    }
    check_target(&args.target_dir)?;
    let (live, cancel) = (Live::default(), CancellationToken::new());
    let job = Job {
        args,
        settings,
        printer,
        live: &live,
        cancel: cancel.clone(),
        operation: Uuid::now_v7(),
    };
    signals::guarded(job.operation, settings, printer, &live, &cancel, job.run()).await
}

fn check_target(target: &std::path::Path) -> Result<()> {
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
        let (catalog, found) = tokio::select! {
            prepared = prepared => prepared?,
            () = self.cancel.cancelled() => return Err(Failure::cancelled()),
        };
        let hosts = agents::connect(addresses, self.settings, self.printer, &self.cancel).await?;
        let head = Head {
            backup: found.manifest.backup_id.clone(),
            point: found.manifest.point.as_ref().map(ToString::to_string),
            consistency: found.manifest.consistency,
        };
        let steps = plan::make(found, &hosts, self.args)?;
        plan::check_catalog(&catalog, &steps).await?;
        self.agreed(&head, &steps).await?;
        self.in_repository(&catalog, &head, &steps).await
    }

    /// Shows the plan and has it confirmed.
    async fn agreed(&self, head: &Head, steps: &[Step]) -> Result<()> {
        let mut fields = plan::fields(steps, self.args);
        fields["backup_id"] = json!(head.backup);
        fields["point"] = json!(head.point);
        let text = plan::text(steps, self.args, head.backup.as_str());
        self.printer.event("plan", fields, Some(&text));
        if self.settings.yes() {
            return Ok(());
        }
        let printer = self.printer.clone();
        let question = "Restore all of this?";
        let asked = tokio::task::spawn_blocking(move || printer.confirm(question));
        let answer = tokio::select! {
            answer = asked => answer.ok().flatten(),
            () = self.cancel.cancelled() => return Err(Failure::cancelled()),
        };
        match answer {
            Some(true) => Ok(()),
            Some(false) => Err(Failure::cancelled().next("answer `yes`, or use `--yes`")),
            None => Err(Failure::usage("there is nobody to ask").next("use `--yes`")),
        }
    }

    async fn in_repository(&self, catalog: &Catalog, head: &Head, steps: &[Step]) -> Result<()> {
        let journalled = Journalled {
            operation: self.operation,
            kind: "restore",
            backup: Some(&head.backup),
            by: journalled::ourselves("gs_pitr restore"),
        };
        let work =
            async |_: &OperationJournal| self.proved_and_promoted(catalog, head, steps).await;
        journalled.run(catalog, self.printer, None, work).await
    }

    async fn proved_and_promoted(
        &self,
        catalog: &Catalog,
        head: &Head,
        steps: &[Step],
    ) -> Result<()> {
        let proved = all_or_cancel(steps, &self.cancel, |step, cancel| async move {
            self.proved(step, steps, &cancel).await
        });
        let proved = match proved.await {
            Ok(_) if self.cancel.is_cancelled() => Err(Failure::cancelled()),
            outcome => outcome,
        };
        let proved = match proved {
            Ok(proved) => proved,
            Err(failure) => {
                let left = self.live.cancel_all(self.printer).await;
                return Err(failure.changed_if(!left.is_empty()));
            }
        };
        let by = "gs_pitr restore";
        let decided = catalog
            .decide(self.operation, Verdict::Commit, by, None)
            .await;
        let decided = match decided {
            Ok(decision) if decision.verdict == Verdict::Commit => Ok(()),
            Ok(decision) => {
                let message = format!("the restore was given up by {}", decision.by);
                Err(Failure::new(agent_api::ErrorKind::Conflict, message))
            }
            Err(error) => Err(Failure::from(error)),
        };
        if let Err(failure) = decided {
            let left = self.live.cancel_all(self.printer).await;
            return Err(failure.changed_if(!left.is_empty()));
        }
        let text = "all nodes are proved to be at the point; promoting";
        self.printer
            .event("decided", json!({"backup_id": head.backup}), Some(text));
        self.promoted(catalog, head, steps, proved).await
    }

    async fn proved(
        &self,
        step: &Step,
        steps: &[Step],
        cancel: &CancellationToken,
    ) -> Result<Operation> {
        let lend = !step.host.facts.has_credentials;
        let request = StartOperation {
            operation: Uuid::now_v7(),
            repository: repo::access(self.settings, lend).await?,
            bandwidth: self.settings.bandwidth(),
            spec: OperationSpec::Restore(Box::new(RestoreSpec {
                backup_id: step.backup.clone(),
                node: step.node.clone(),
                point: step.point.clone(),
                restore: self.operation,
                nodes: steps.iter().map(|step| step.node.node_id).collect(),
                target: step.target.clone(),
                place: Place::Fresh,
                port: Some(step.port),
                jobs: self.settings.jobs(),
                start: !self.args.no_start,
                stop_early: false,
            })),
        };
        let (agent, node) = (&step.host.agent, step.node.node_id);
        let (live, printer) = (self.live, self.printer);
        let mut operation = Operation::start(agent, node, &request, live, printer, cancel).await?;
        operation.reach(Phase::Proved, cancel).await?;
        Ok(operation)
    }

    /// Promotes all nodes, and opens them when all are promoted. From here on every node goes forward: one that
    /// fails takes none back.
    async fn promoted(
        &self,
        catalog: &Catalog,
        head: &Head,
        steps: &[Step],
        mut operations: Vec<Operation>,
    ) -> Result<()> {
        let never = CancellationToken::new();
        let promoted = join_all(operations.iter_mut().map(|operation| async {
            let (agent, id) = (Arc::clone(operation.agent()), operation.id());
            agent.promote(id, &never).await?;
            operation.reach(Phase::Promoted, &never).await
        }));
        let failures = promoted.await.into_iter().zip(steps);
        let failures = failures.filter_map(|(outcome, step)| {
            let failure = outcome.err()?;
            Some(failure.on(step.host.agent.name()))
        });
        if let Some(failure) = self.first(failures.collect(), &[]) {
            return Err(failure);
        }
        let runs = operations.into_iter().zip(steps).map(|(operation, step)| {
            let never = &never;
            async move { self.open(catalog, operation, step, never).await }
        });
        let (mut done, mut failures) = (Vec::new(), Vec::new());
        for (outcome, step) in join_all(runs).await.into_iter().zip(steps) {
            match outcome {
                Ok(restored) => done.push((step, restored)),
                Err(failure) => failures.push(failure.on(step.host.agent.name())),
            }
        }
        if let Some(failure) = self.first(failures, &done) {
            return Err(failure);
        }
        report(head, &done, self.printer);
        Ok(())
    }

    /// The failure to return, with what was done all the same; the others become warnings.
    fn first(&self, mut failures: Vec<Failure>, done: &[(&Step, Restored)]) -> Option<Failure> {
        let mut failure = failures.pop()?;
        let nodes: Vec<_> = done
            .iter()
            .map(|(step, _)| step.node.node_id.to_string())
            .collect();
        if !nodes.is_empty() {
            let message = format!(
                "{}; these nodes are open: {}",
                failure.message,
                nodes.join(", ")
            );
            failure.message = message;
        }
        for other in failures {
            self.printer.warning(other.node.as_deref(), &other.message);
        }
        Some(failure.changed_if(true).next(
            "look at that node's agent and log; its directory holds the proved copy and is not removed",
        ))
    }

    async fn open(
        &self,
        catalog: &Catalog,
        mut operation: Operation,
        step: &Step,
        never: &CancellationToken,
    ) -> Result<Restored> {
        let request = OpenRequest {
            start: !self.args.no_start,
        };
        operation
            .agent()
            .open(operation.id(), &request, never)
            .await?;
        let status = operation.reach(Phase::Done, never).await?;
        let restored = status.restored.ok_or_else(|| {
            let message = "the agent says that the restore is done, and not what it is";
            Failure::new(agent_api::ErrorKind::Internal, message)
        })?;
        let epoch = NewEpoch {
            node_id: step.node.node_id,
            parent: Some((step.point.epoch.clone(), restored.fork_lsn.clone())),
            timeline: restored.timeline,
            machine_id: step.host.facts.machine_id.clone(),
            data_directory: restored.data_directory.clone(),
            host: step.host.facts.host.clone(),
            port: restored.port,
        };
        catalog
            .start_epoch(epoch, self.operation)
            .await
            .map_err(|error| {
                let failure = Failure::from(error);
                let message = format!(
                    "the node is restored, but its new epoch could not be written: {}",
                    failure.message
                );
                let next = format!(
                    "nothing is lost; its next backup asks for `--node-id {}={}`",
                    step.host.agent.name(),
                    step.node.node_id
                );
                Failure {
                    message,
                    next: Some(next),
                    ..failure
                }
            })?;
        Ok(restored)
    }
}

/// Tells what was brought back.
fn report(head: &Head, done: &[(&Step, Restored)], printer: &Printer) {
    let mut text = format!("restored {}", head.backup);
    let mut nodes = Vec::new();
    for (step, restored) in done {
        let state = if restored.running {
            "running"
        } else {
            "stopped"
        };
        let _ = write!(
            text,
            "\n  {} on {}, port {}, {state}\n    directory {}\n    recovered to {}\n    started by: {}",
            step.node.node_id,
            step.host.facts.host,
            restored.port,
            restored.data_directory,
            restored.recovered_to,
            restored.start_command.join(" "),
        );
        nodes.push(json!({
            "node_id": step.node.node_id,
            "host": step.host.facts.host,
            "port": restored.port,
            "data_directory": restored.data_directory,
            "recovered_to": restored.recovered_to,
            "timeline": restored.timeline,
            "running": restored.running,
            "start_command": restored.start_command,
        }));
    }
    printer.text(&text);
    let fields = json!({
        "backup_id": head.backup,
        "consistency": head.consistency,
        "point": head.point,
        "nodes": nodes,
    });
    printer.result("restore", fields);
}
