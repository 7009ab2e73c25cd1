//! `gs_pitr backup`: every node's copy and one point, then the manifest.

mod again;
mod commit;
mod ending;
mod kind;
pub(crate) mod nodes;

use std::collections::BTreeSet;
use std::sync::OnceLock;
use std::time::Duration;

use agent_api::{
    BackupSpec, ErrorKind, OperationSpec, OperationStatus, Pace, Phase, StartOperation, WalMode,
};
use catalog::ids::BackupId;
use catalog::journal::OperationJournal;
use catalog::model::{BackupMode, Engine, Manifest, Point};
use catalog::{Catalog, CatalogError};
use clap::Args;
use futures_util::future::join_all;
use jiff::Timestamp;
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

use crate::agents;
use crate::chain::chain_of;
use crate::cluster::{Cluster, Known, ProxyAccess, ProxyArgs, Purpose};
use crate::coordinator::direct::Direct;
use crate::coordinator::shardingsphere::{Budget, ShardingSphere, foreign};
use crate::coordinator::{Coordinator, Lock, Moment, Occasion, PointArgs};
use crate::failure::{Failure, Result};
use crate::journalled::{self, Journalled};
use crate::leased::Leased;
use crate::mirrored;
use crate::operations::{Live, Operation, all_or_cancel};
use crate::printer::Printer;
use crate::repo;
use crate::settings::values::{Address, NodeName};
use crate::settings::{LevelArgs, Options, Settings, TransferArgs};
use crate::shipping::Shipping;
use crate::signals;
pub(crate) use commit::{AGENT_FIELD, metadata};
use kind::Kind;
use nodes::Part;

/// Before a node's copy is made again: a database that was killed needs some time to come back.
const PAUSES: [Duration; 3] = [
    Duration::from_secs(1),
    Duration::from_secs(5),
    Duration::from_secs(30),
];
/// How often a copy is tried in a row; each try has a number of its own.
const TRIES: u32 = 4;

/// `gs_pitr backup`
#[derive(Debug, Args)]
pub(crate) struct BackupArgs {
    #[command(flatten)]
    transfer: TransferArgs,
    #[command(flatten)]
    proxy: ProxyArgs,
    /// FULL, or what changed since an earlier backup: PTRACK, DELTA or PAGE
    #[arg(
        short = 'b',
        long = "mode",
        alias = "dn-backup-mode",
        value_name = "MODE",
        default_value = "FULL",
        ignore_case = true,
        value_parser = modes()
    )]
    mode: BackupMode,
    /// The backup that an increment builds on [default: the newest that fits]
    #[arg(long, value_name = "ID")]
    parent: Option<String>,
    /// What makes the copies: a probackup, or the agents themselves
    #[arg(
        long,
        value_name = "ENGINE",
        value_enum,
        default_value = "auto",
        env = "GS_PITR_ENGINE",
        hide_env_values = true
    )]
    engine: EngineChoice,
    /// What becomes of the nodes' WAL after it: `continuous`: the agents ship it all the time from now on, so that points can
    /// follow; `backup`: it ends at this backup's point
    #[arg(
        long,
        value_name = "MODE",
        value_enum,
        default_value = "continuous",
        env = "GS_PITR_WAL",
        hide_env_values = true,
        hide_possible_values = true
    )]
    wal: WalChoice,
    /// A word or two about this backup
    #[arg(long, value_name = "TEXT")]
    label: Option<String>,
    #[command(flatten)]
    level: LevelArgs,
    /// How much of the processors of a data node the copy takes: `gentle`: while the database is at work, only what hardly makes it
    /// wait; `full`: all that there is
    #[arg(
        long,
        value_name = "PACE",
        value_enum,
        default_value = "gentle",
        env = "GS_PITR_PACE",
        hide_env_values = true,
        hide_possible_values = true
    )]
    pace: PaceChoice,
    /// Let the checkpoint at the start take its time, rather than hurry it
    #[arg(long)]
    spread_checkpoint: bool,
    /// This agent's database is the node registered as UUID, wherever it lived before
    #[arg(long, value_name = "HOST:PORT=UUID")]
    node_id: Vec<NodeName>,
    /// This agent's database is a new node, whatever it resembles
    #[arg(long, value_name = "HOST:PORT")]
    new_node: Vec<Address>,
    // Last, for its heading in the help.
    #[command(flatten)]
    point: PointArgs,
}

/// `--wal`
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
enum WalChoice {
    /// Shipped all the time
    Continuous,
    /// Up to the backup's point
    Backup,
}

/// `--pace`
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
enum PaceChoice {
    /// Behind the database
    Gentle,
    /// Beside it
    Full,
}

/// `--engine`
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
enum EngineChoice {
    /// Where all hosts have a probackup and FUSE, that; else the agents themselves
    Auto,
    /// `gs_probackup` or `pg_probackup`, through a mount that is a stream
    Probackup,
    /// The agents read the data directories (PostgreSQL only, FULL only)
    Direct,
}

fn modes() -> impl clap::builder::TypedValueParser<Value = BackupMode> {
    use clap::builder::TypedValueParser as _;
    clap::builder::PossibleValuesParser::new(["FULL", "PTRACK", "DELTA", "PAGE"])
        .try_map(|text| text.parse::<BackupMode>())
}

impl BackupArgs {
    /// What the command's own flags say.
    pub(crate) fn options(&self) -> Options {
        Options::from(&self.transfer)
            .combine(Options::from(&self.level))
            .combine(Options::from(&self.proxy))
    }
}

/// What every step needs.
struct Job<'a> {
    args: &'a BackupArgs,
    settings: &'a Settings,
    printer: &'a Printer,
    /// The way to the proxies; `None`: the agents of `--nodes`, which nothing ties together.
    access: Option<ProxyAccess>,
    live: &'a Live,
    cancel: CancellationToken,
    operation: Uuid,
    backup: BackupId,
    started: Timestamp,
    /// What is known of the proxies from a point that came to nothing.
    known: Known,
    /// The data nodes that the proxies listed at first.
    listed: OnceLock<BTreeSet<Address>>,
}

/// Runs the command.
pub(crate) async fn run(args: &BackupArgs, settings: &Settings, printer: &Printer) -> Result<()> {
    if args.parent.is_some() && !args.mode.is_increment() {
        let message = "`--parent` goes with an increment, and FULL is none";
        return Err(Failure::usage(message).next("use `-b PTRACK` or `-b DELTA`"));
    }
    check_label(args.label.as_deref())?;
    let access = args.proxy.access_to_all(settings, printer)?;
    args.point
        .check(Occasion::Backup.through(access.is_some()))?;
    let (live, cancel, started) = (Live::default(), CancellationToken::new(), Timestamp::now());
    let job = Job {
        args,
        settings,
        printer,
        access,
        live: &live,
        cancel: cancel.clone(),
        operation: Uuid::now_v7(),
        backup: BackupId::generate(started, !args.mode.is_increment()),
        started,
        known: Known::default(),
        listed: OnceLock::new(),
    };
    // A node whose copy is done waits for the others, as long as they take.
    let _alive = live.signs_of_life();
    signals::guarded(job.operation, settings, printer, &live, &cancel, job.run()).await
}

/// Refuses a label that is no short line.
pub(crate) fn check_label(label: Option<&str>) -> Result<()> {
    if label.is_some_and(|label| label.len() > 256 || label.contains(char::is_control)) {
        return Err(Failure::usage(
            "`--label` is longer than 256 bytes or has control characters",
        ));
    }
    Ok(())
}

impl Job<'_> {
    async fn run(&self) -> Result<()> {
        let cluster = self.cluster().await?;
        let addresses = match &cluster {
            Some(cluster) => {
                self.listed.get_or_init(|| cluster.listed.clone());
                cluster.agents()
            }
            None => self.settings.nodes()?.to_vec(),
        };
        nodes::check_choices(self.args, &addresses)?;
        repo::store(self.settings)?;
        let hosts = agents::connect(&addresses, self.settings, self.printer, &self.cancel).await?;
        nodes::check_hosts(&hosts)?;
        let engine = kind::engine(self.args, &hosts, self.printer)?;
        let catalog = self
            .unless_cancelled(repo::open_or_create(self.settings, self.operation))
            .await?;
        if let Some(cluster) = &cluster
            && self.args.point.lock(Occasion::Backup) != Lock::Never
        {
            foreign::refuse(&cluster.proxies, &catalog, self.operation, &self.cancel).await?;
        }
        let leased = self.leased(&catalog).await?;
        let outcome = self.under_lease(&catalog, hosts, engine, &leased).await;
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

    /// What the proxies tell of, if there are any.
    async fn cluster(&self) -> Result<Option<Cluster>> {
        let Some(access) = &self.access else {
            return Ok(None);
        };
        repo::store(self.settings)?;
        let (settings, printer) = (self.settings, self.printer);
        let found = Cluster::discover(access, Purpose::Backup, settings, printer, &self.cancel);
        found.await.map(Some)
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
        engine: Engine,
        leased: &Leased,
    ) -> Result<()> {
        ending::strays(catalog, &hosts, self.printer, &self.cancel).await;
        let choices = nodes::matched(catalog, &hosts, self.args).await?;
        if !choices.iter().all(nodes::Choice::is_known) {
            leased.prove().await?;
        }
        // From here on something may be left in the bucket, whatever happens.
        let outcome = self
            .in_repository(catalog, hosts, choices, engine, leased)
            .await;
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
        engine: Engine,
        leased: &Leased,
    ) -> Result<()> {
        let journalled = Journalled {
            operation: self.operation,
            kind: "backup",
            backup: Some(&self.backup),
            by: journalled::ourselves("gs_pitr backup"),
        };
        let text = format!("backup {} of {} nodes", self.backup, hosts.len());
        let work = async |journal: &OperationJournal| {
            let outcome = self
                .copy_and_commit(catalog, journal, hosts, choices, engine, leased)
                .await;
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
        journal: &OperationJournal,
        hosts: Vec<agents::Host>,
        choices: Vec<nodes::Choice>,
        engine: Engine,
        leased: &Leased,
    ) -> Result<()> {
        let parts = nodes::registered(catalog, hosts, choices, self.operation).await?;
        let kind = Kind {
            engine,
            mode: self.args.mode,
            parents: kind::parents(self.args, catalog, &parts).await?,
        };
        if !kind.parents.is_empty() {
            let read: Vec<_> = kind.parents.iter().map(|it| it.backup_id.clone()).collect();
            catalog.pin(self.operation, &read).await?;
        }
        let kind = &kind;
        let copies = all_or_cancel(&parts, &self.cancel, |part, cancel| async move {
            self.copied(part, kind, 1, &cancel).await
        });
        let mut copies = copies.await?;
        let moment = self
            .pointed(catalog, journal, &parts, kind, &mut copies)
            .await?;
        let shipped = self.shipped(&mut copies, &parts, &moment).await?;
        let documents = self.documents(&moment, &parts, kind, shipped)?;
        let manifest = self.committed(catalog, &moment, documents, leased).await?;
        let seconds: Vec<_> = copies.iter().map(Operation::copied).collect();
        self.released(copies).await;
        mirrored::refresh(catalog, self.settings, self.printer).await;
        commit::report(&manifest, &moment, &seconds, self.printer);
        Ok(())
    }

    /// The point, made as the nodes are held together.
    async fn moment(
        &self,
        catalog: &Catalog,
        journal: &OperationJournal,
        budget: &Budget,
        copies: &[Operation],
    ) -> Result<Moment> {
        let (args, printer) = (&self.args.point, self.printer);
        let Some(access) = &self.access else {
            return Direct::new(args, printer).mark(copies, &self.cancel).await;
        };
        let coordinator = ShardingSphere {
            args,
            occasion: Occasion::Backup,
            access,
            known: &self.known,
            listed: self.listed.get_or_init(BTreeSet::new),
            catalog,
            journal,
            operation: self.operation,
            by: &journalled::ourselves("gs_pitr backup"),
            budget,
            live: self.live,
            printer,
        };
        Box::pin(coordinator.mark(copies, &self.cancel)).await
    }

    /// One node's copy, made again alone if it failed for a reason that may have passed; several times, if that
    /// is one that passes by itself. Its tries have the numbers from `first` on.
    async fn copied(
        &self,
        part: &Part,
        kind: &Kind,
        first: u32,
        cancel: &CancellationToken,
    ) -> Result<Operation> {
        let agent = &part.host.agent;
        let mut number = first;
        for wait in PAUSES {
            let failure = match self.attempt(part, kind, number, cancel).await {
                Err(failure) if !failure.is_permanent() && !cancel.is_cancelled() => failure,
                outcome => return outcome,
            };
            if number > first && !failure.passing {
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
        self.attempt(part, kind, number, cancel).await
    }

    async fn attempt(
        &self,
        part: &Part,
        kind: &Kind,
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
                engine: kind.engine,
                mode: kind.mode,
                chain: chain_of(&kind.parents, part.node),
                wal: match self.args.wal {
                    WalChoice::Continuous => WalMode::Continuous,
                    WalChoice::Backup => WalMode::Backup,
                },
                pace: match self.args.pace {
                    PaceChoice::Gentle => Pace::Gentle,
                    PaceChoice::Full => Pace::Full,
                },
            }),
        };
        let (live, printer) = (self.live, self.printer);
        let mut copy = Operation::start(agent, part.node, &request, live, printer, cancel).await?;
        copy.reach(Phase::Copied, cancel).await?;
        Ok(copy)
    }

    /// Has every node's WAL sent up to its restore point. The point stands: agents that are lost now are waited for.
    async fn shipped(
        &self,
        copies: &mut [Operation],
        parts: &[Part],
        moment: &Moment,
    ) -> Result<Vec<OperationStatus>> {
        let shipping = &self.shipping();
        let nodes = copies.iter_mut().zip(parts).zip(&moment.marks);
        all_or_cancel(
            nodes,
            &self.cancel,
            |((copy, part), mark), cancel| async move {
                shipping.shipped(copy, part.stand(), mark, &cancel).await
            },
        )
        .await
    }

    fn shipping(&self) -> Shipping<'_> {
        Shipping {
            settings: self.settings,
            live: self.live,
            printer: self.printer,
            patience: self.args.point.timeout(self.occasion()),
        }
    }

    fn occasion(&self) -> Occasion {
        Occasion::Backup.through(self.access.is_some())
    }

    fn documents(
        &self,
        moment: &Moment,
        parts: &[Part],
        kind: &Kind,
        shipped: Vec<OperationStatus>,
    ) -> Result<(Point, Manifest)> {
        let label = self.args.label.clone();
        let head = commit::Head {
            operation: self.operation,
            backup: self.backup.clone(),
            started: self.started,
            label,
            engine: kind.engine,
            mode: kind.mode,
            parent: kind.parents.last().map(|it| it.backup_id.clone()),
        };
        commit::documents(head, moment, parts, shipped)
    }

    /// Writes point and manifest. From here on nothing is cancelled: half of it helps nobody, and each
    /// request has a deadline of its own.
    async fn committed(
        &self,
        catalog: &Catalog,
        moment: &Moment,
        (mut point, manifest): (Point, Manifest),
        leased: &Leased,
    ) -> Result<Manifest> {
        if self.cancel.is_cancelled() {
            return Err(Failure::cancelled());
        }
        leased.prove().await?;
        point.metadata = commit::metadata(catalog, moment, self.printer).await?;
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
pub(crate) fn agent_failed(agent: &agents::Agent, message: String) -> Failure {
    Failure::new(ErrorKind::Internal, message).on(agent.name())
}
