//! `gs_pitr backup`: every node's copy and one point, then the manifest.

mod commit;
mod ending;
pub(crate) mod nodes;

use std::time::Duration;

use agent_api::{BackupSpec, ErrorKind, OperationSpec, OperationStatus, Phase, StartOperation};
use catalog::ids::BackupId;
use catalog::journal::OperationJournal;
use catalog::model::{Manifest, Point};
use catalog::{Catalog, CatalogError};
use clap::Args;
use futures_util::future::join_all;
use jiff::Timestamp;
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

use crate::agents;
use crate::coordinator::direct::Direct;
use crate::coordinator::{Coordinator, Moment, PointArgs};
use crate::failure::{Failure, Result};
use crate::journalled::{self, Journalled};
use crate::leased::Leased;
use crate::mirrored;
use crate::operations::{Live, Operation, all_or_cancel};
use crate::printer::Printer;
use crate::repo;
use crate::settings::values::{Address, NodeName};
use crate::settings::{LevelArgs, Options, Settings, TransferArgs};
use crate::signals;
pub(crate) use commit::AGENT_FIELD;
use nodes::Part;

/// Before a node's copy is made again: a database that was killed needs some time to come back.
const PAUSES: [Duration; 3] = [
    Duration::from_secs(1),
    Duration::from_secs(5),
    Duration::from_secs(30),
];

/// `gs_pitr backup`
#[derive(Debug, Args)]
pub(crate) struct BackupArgs {
    #[command(flatten)]
    transfer: TransferArgs,
    /// Kind of backup; only FULL for now
    #[arg(
        short = 'b',
        long = "mode",
        value_name = "MODE",
        default_value = "FULL",
        ignore_case = true
    )]
    mode: Mode,
    /// A word or two about this backup
    #[arg(long, value_name = "TEXT")]
    label: Option<String>,
    #[command(flatten)]
    level: LevelArgs,
    /// Let the checkpoint at the start take its time, rather than hurry it
    #[arg(long)]
    spread_checkpoint: bool,
    #[command(flatten)]
    point: PointArgs,
    /// This agent's database is the node registered as UUID, wherever it lived before
    #[arg(long, value_name = "HOST:PORT=UUID")]
    node_id: Vec<NodeName>,
    /// This agent's database is a new node, whatever it resembles
    #[arg(long, value_name = "HOST:PORT")]
    new_node: Vec<Address>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
#[value(rename_all = "UPPER")]
enum Mode {
    Full,
    #[value(hide = true)]
    Ptrack,
    #[value(hide = true)]
    Delta,
    #[value(hide = true)]
    Page,
}

impl BackupArgs {
    /// What the command's own flags say.
    pub(crate) fn options(&self) -> Options {
        Options::from(&self.transfer).combine(Options::from(&self.level))
    }
}

/// What every step needs.
struct Job<'a> {
    args: &'a BackupArgs,
    settings: &'a Settings,
    printer: &'a Printer,
    live: &'a Live,
    cancel: CancellationToken,
    operation: Uuid,
    backup: BackupId,
    started: Timestamp,
}

/// Runs the command.
pub(crate) async fn run(args: &BackupArgs, settings: &Settings, printer: &Printer) -> Result<()> {
    if args.mode != Mode::Full {
        let message = "only `-b FULL` can be made yet; increments are to come";
        return Err(Failure::usage(message).next("gs_pitr backup -b FULL"));
    }
    if args
        .label
        .as_deref()
        .is_some_and(|label| label.len() > 256 || label.contains(char::is_control))
    {
        return Err(Failure::usage(
            "`--label` is longer than 256 bytes or has control characters",
        ));
    }
    args.point.check()?;
    let (live, cancel, started) = (Live::default(), CancellationToken::new(), Timestamp::now());
    let job = Job {
        args,
        settings,
        printer,
        live: &live,
        cancel: cancel.clone(),
        operation: Uuid::now_v7(),
        backup: BackupId::generate(started, true),
        started,
    };
    // A node whose copy is done waits for the others, as long as they take.
    let _alive = live.signs_of_life();
    signals::guarded(job.operation, settings, printer, &live, &cancel, job.run()).await
}

impl Job<'_> {
    async fn run(&self) -> Result<()> {
        let addresses = self.settings.nodes()?;
        nodes::check_choices(self.args, addresses)?;
        repo::store(self.settings)?;
        let hosts = agents::connect(addresses, self.settings, self.printer, &self.cancel).await?;
        nodes::check_hosts(&hosts)?;
        let catalog = self
            .unless_cancelled(repo::open_or_create(self.settings, self.operation))
            .await?;
        let leased = self.leased(&catalog).await?;
        let outcome = self.under_lease(&catalog, hosts, &leased).await;
        let outcome = match outcome {
            Err(failure) => Err(leased.explain(failure).await),
            Ok(()) => Ok(()),
        };
        // What is open runs out instead: whoever takes the lease over then fences it.
        if !outcome.as_ref().is_err_and(|failure| failure.unfinished) {
            leased.release().await;
        }
        outcome
    }

    /// Taken before nodes are matched and registered, so that two commands cannot register one database twice.
    async fn leased(&self, catalog: &Catalog) -> Result<Leased> {
        let (id, operation) = (&self.backup, self.operation);
        Leased::take_for_backup(
            catalog,
            id,
            operation,
            self.settings,
            self.printer,
            &self.cancel,
        )
        .await
    }

    async fn under_lease(
        &self,
        catalog: &Catalog,
        hosts: Vec<agents::Host>,
        leased: &Leased,
    ) -> Result<()> {
        ending::strays(catalog, &hosts, self.printer, &self.cancel).await;
        let choices = nodes::matched(catalog, &hosts, self.args).await?;
        if !choices.iter().all(nodes::Choice::is_known) {
            leased.prove().await?;
        }
        // From here on something may be left in the bucket, whatever happens.
        let outcome = self.in_repository(catalog, hosts, choices, leased).await;
        outcome.map_err(|failure| {
            failure.changed_if(true).next(
                "run the command again; what is left in the bucket is no backup and does no harm",
            )
        })
    }

    async fn in_repository(
        &self,
        catalog: &Catalog,
        hosts: Vec<agents::Host>,
        choices: Vec<nodes::Choice>,
        leased: &Leased,
    ) -> Result<()> {
        let journalled = Journalled {
            operation: self.operation,
            kind: "backup",
            backup: Some(&self.backup),
            by: journalled::ourselves("gs_pitr backup"),
        };
        let text = format!("backup {} of {} nodes", self.backup, hosts.len());
        let work = async |_: &OperationJournal| {
            let outcome = self.copy_and_commit(catalog, hosts, choices, leased).await;
            let Err(failure) = outcome else {
                return Ok(());
            };
            let left = self.live.cancel_all(self.printer).await;
            if !left.is_empty() {
                tracing::info!(?left, "operations left to end by themselves");
            }
            Err(ending::given_up(catalog, &self.backup, self.operation, failure).await)
        };
        journalled
            .run(catalog, self.printer, Some(&text), work)
            .await
    }

    async fn copy_and_commit(
        &self,
        catalog: &Catalog,
        hosts: Vec<agents::Host>,
        choices: Vec<nodes::Choice>,
        leased: &Leased,
    ) -> Result<()> {
        let parts = nodes::registered(catalog, hosts, choices, self.operation).await?;
        let copies = all_or_cancel(&parts, &self.cancel, |part, cancel| async move {
            self.copied(part, &cancel).await
        });
        let mut copies = copies.await?;
        let moment = Direct::new(&self.args.point, self.printer)
            .mark(&copies, &self.cancel)
            .await?;
        let shipped = self.shipped(&mut copies).await?;
        let documents = self.documents(&moment, &parts, shipped)?;
        let manifest = self.committed(catalog, documents, leased).await?;
        let seconds: Vec<_> = copies.iter().map(Operation::copied).collect();
        self.released(copies).await;
        mirrored::refresh(catalog, self.settings, self.printer).await;
        commit::report(&manifest, &moment, &seconds, self.printer);
        Ok(())
    }

    /// One node's copy, made again alone if it failed for a reason that may have passed; several times, if that
    /// is one that passes by itself.
    async fn copied(&self, part: &Part, cancel: &CancellationToken) -> Result<Operation> {
        let agent = &part.host.agent;
        let mut number = 1;
        for wait in PAUSES {
            let failure = match self.attempt(part, number, cancel).await {
                Err(failure) if !failure.is_permanent() && !cancel.is_cancelled() => failure,
                outcome => return outcome,
            };
            if number > 1 && !failure.passing {
                return Err(failure);
            }
            // An agent that was merely out of reach may still be copying.
            if !self.live.cancel_on(agent, self.printer).await {
                return Err(failure);
            }
            let message = format!("its copy failed and is made again: {failure}");
            self.printer.warning(Some(&agent.name()), &message);
            agents::pause(wait, cancel).await?;
            number += 1;
        }
        self.attempt(part, number, cancel).await
    }

    async fn attempt(
        &self,
        part: &Part,
        attempt: u32,
        cancel: &CancellationToken,
    ) -> Result<Operation> {
        let agent = &part.host.agent;
        let lend = !part.host.facts.has_credentials;
        let request = StartOperation {
            operation: Uuid::now_v7(),
            repository: repo::access(self.settings, lend).await?,
            bandwidth: self.settings.bandwidth(),
            spec: OperationSpec::Backup(BackupSpec {
                backup_id: self.backup.clone(),
                node_id: part.node,
                epoch: part.epoch.clone(),
                attempt,
                jobs: self.settings.jobs(),
                level: self.settings.level(),
                label: self.args.label.clone(),
                fast_checkpoint: !self.args.spread_checkpoint,
            }),
        };
        let (live, printer) = (self.live, self.printer);
        let mut copy = Operation::start(agent, part.node, &request, live, printer, cancel).await?;
        copy.reach(Phase::Copied, cancel).await?;
        Ok(copy)
    }

    /// Has every node's WAL sent up to its restore point.
    async fn shipped(&self, copies: &mut [Operation]) -> Result<Vec<OperationStatus>> {
        all_or_cancel(copies, &self.cancel, |copy, cancel| async move {
            copy.agent().ship(copy.id(), &cancel).await?;
            copy.reach(Phase::Shipped, &cancel).await
        })
        .await
    }

    fn documents(
        &self,
        moment: &Moment,
        parts: &[Part],
        shipped: Vec<OperationStatus>,
    ) -> Result<(Point, Manifest)> {
        let label = self.args.label.clone();
        let head = commit::Head {
            operation: self.operation,
            backup: self.backup.clone(),
            started: self.started,
            label,
        };
        commit::documents(head, moment, parts, shipped)
    }

    /// Writes point and manifest. From here on nothing is cancelled: half of it helps nobody, and each
    /// request has a deadline of its own.
    async fn committed(
        &self,
        catalog: &Catalog,
        (point, manifest): (Point, Manifest),
        leased: &Leased,
    ) -> Result<Manifest> {
        if self.cancel.is_cancelled() {
            return Err(Failure::cancelled());
        }
        leased.prove().await?;
        catalog.put_point(&point).await?;
        let committed = match catalog.commit_backup(&manifest).await {
            Ok(committed) => committed,
            // Somebody took our lease over between the proof and this: the lease says who.
            Err(error @ CatalogError::Abandoned { .. }) => {
                leased.prove().await?;
                return Err(Failure::new(ErrorKind::Conflict, error.to_string()));
            }
            Err(error) => return Err(error.into()),
        };
        if let Err(error) = committed.logged {
            let message =
                format!("the backup exists, but its log entry could not be written: {error}");
            self.printer.warning(None, &message);
        }
        Ok(manifest)
    }

    /// Lets every agent drop its WAL hold. The backup exists whatever comes of it.
    async fn released(&self, copies: Vec<Operation>) {
        let never = CancellationToken::new();
        let releases = copies.into_iter().map(|mut copy| {
            let never = &never;
            async move {
                let released = async {
                    copy.agent().release(copy.id(), never).await?;
                    copy.reach(Phase::Done, never).await
                };
                let released = tokio::time::timeout(self.settings.agent_timeout(), released).await;
                let why = match released {
                    Ok(Ok(_)) => return,
                    Ok(Err(failure)) => failure.message,
                    Err(_) => "it took too long".to_owned(),
                };
                let message = format!(
                    "the backup exists, but the agent did not confirm that it dropped its replication slot: {why}; it drops it by itself when nobody asks for it"
                );
                self.printer.warning(Some(&copy.agent().name()), &message);
            }
        });
        join_all(releases).await;
    }

    async fn unless_cancelled<T>(&self, work: impl Future<Output = Result<T>>) -> Result<T> {
        tokio::select! {
            outcome = work => outcome,
            () = self.cancel.cancelled() => Err(Failure::cancelled()),
        }
    }
}

/// A failure of the agent and not of us.
fn agent_failed(agent: &agents::Agent, message: String) -> Failure {
    Failure::new(ErrorKind::Internal, message).on(agent.name())
}
