//! `gs_pitr point create`: one point, or one every so often.

use std::fmt::Write as _;
use std::time::Duration;

use agent_api::ErrorKind;
use catalog::Catalog;
use catalog::journal::OperationJournal;
use catalog::model::Point;
use clap::Args;
use serde_json::{Value, json};
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

use super::every;
use super::found::Found;
use super::making::{Made, Maker};
use crate::cluster::{ProxyAccess, ProxyArgs};
use crate::commands::backup::check_label;
use crate::commands::prune::span;
use crate::coordinator::{Occasion, PointArgs};
use crate::failure::{Failure, Result};
use crate::journalled::{self, Journalled};
use crate::operations::Live;
use crate::printer::{Printer, duration};
use crate::settings::{NodesArgs, Options, Settings};
use crate::{mirrored, repo, signals};

/// The command's name in results.
pub(super) const COMMAND: &str = "point create";
/// Points closer together than this would be made of little but switches to new WAL segments.
const SHORTEST: Duration = Duration::from_secs(5);

/// `gs_pitr point create`
#[derive(Debug, Args)]
#[command(mut_arg("require_cluster", |arg| arg.hide(true)))]
pub(crate) struct CreateArgs {
    #[command(flatten)]
    nodes: NodesArgs,
    /// A word or two about this point
    #[arg(long, value_name = "TEXT")]
    pub(super) label: Option<String>,
    /// Go on, and make one so often, such as `5m`, until it is told to stop
    #[arg(long, value_name = "SPAN", value_parser = span)]
    pub(super) every: Option<Duration>,
    /// Make a point that is consistent per node only, if none of the whole cluster can be proved
    #[arg(long, conflicts_with = "require_cluster")]
    per_node: bool,
    #[command(flatten)]
    proxy: ProxyArgs,
    #[command(flatten)]
    point: PointArgs,
}

impl CreateArgs {
    /// What the command's own flags say.
    pub(super) fn options(&self) -> Options {
        Options::from(&self.nodes).combine(Options::from(&self.proxy))
    }

    /// How a point is made: of the whole cluster, unless something else was asked for.
    pub(super) fn point(&self) -> PointArgs {
        self.point.requiring_cluster(!self.per_node)
    }
}

/// Runs the command.
pub(super) async fn run(args: &CreateArgs, settings: &Settings, printer: &Printer) -> Result<()> {
    check_label(args.label.as_deref())?;
    if args.every.is_some_and(|every| every < SHORTEST) {
        let message = format!("`--every` is at least {}", duration(SHORTEST));
        return Err(Failure::usage(message));
    }
    let access = args.proxy.access_to_all(settings, printer)?;
    args.point
        .check(Occasion::Point.through(access.is_some()))?;
    let (live, cancel) = (Live::default(), CancellationToken::new());
    let operation = Uuid::now_v7();
    let job = Job {
        args,
        settings,
        printer,
        access,
        live: &live,
        cancel: &cancel,
    };
    // A node that is ready waits for the others.
    let _alive = live.signs_of_life();
    let work = Box::pin(job.run(operation));
    signals::guarded(operation, settings, printer, &live, &cancel, work).await
}

/// What every step needs.
struct Job<'a> {
    args: &'a CreateArgs,
    settings: &'a Settings,
    printer: &'a Printer,
    /// The way to the proxies; `None`: the agents of `--nodes`, which nothing ties together.
    access: Option<ProxyAccess>,
    live: &'a Live,
    cancel: &'a CancellationToken,
}

impl Job<'_> {
    async fn run(&self, operation: Uuid) -> Result<()> {
        repo::store(self.settings)?;
        let access = self.access.as_ref();
        let found = Found::find(access, self.settings, self.printer, self.cancel).await?;
        let catalog = self.unless_cancelled(repo::open(self.settings)).await?;
        // Of many points each is one line, and no more.
        let printer = match self.args.every {
            Some(_) => self.printer.without_steps(),
            None => self.printer.clone(),
        };
        let mut maker = Maker::new(
            &catalog,
            found,
            (self.args, access),
            self.settings,
            printer,
            self.live,
        );
        if let Some(span) = self.args.every {
            return every::run(&mut maker, span, operation, self.printer, self.cancel).await;
        }
        let made = self.one(&catalog, &mut maker, operation).await?;
        self.printer.text(&text(&made));
        mirrored::refresh(&catalog, self.settings, self.printer).await;
        self.printer.result(COMMAND, fields(&made));
        Ok(())
    }

    async fn one(&self, catalog: &Catalog, maker: &mut Maker<'_>, operation: Uuid) -> Result<Made> {
        let journalled = Journalled {
            operation,
            kind: "point",
            backup: None,
            by: journalled::ourselves("gs_pitr point create"),
        };
        let work =
            async |journal: &OperationJournal| maker.make(operation, journal, self.cancel).await;
        journalled.run(catalog, self.printer, None, work).await
    }

    async fn unless_cancelled<T>(&self, work: impl Future<Output = Result<T>>) -> Result<T> {
        tokio::select! {
            outcome = work => outcome,
            () = self.cancel.cancelled() => Err(Failure::cancelled()),
        }
    }
}

/// What was made, for people.
pub(super) fn text(made: &Made) -> String {
    let Point {
        point_id, lock_ms, ..
    } = &made.point;
    let mut text = format!(
        "point {point_id}, {}, on backup {}, restorable {} after it was made",
        consistency(&made.point),
        made.base,
        duration(made.lag)
    );
    if let Some(csn) = &made.point.csn {
        let _ = write!(text, ", CSN {csn}");
    }
    if *lock_ms > 0 {
        let _ = write!(text, ", locked for {lock_ms} ms");
    }
    text
}

/// What it proves, in words.
pub(super) fn consistency(point: &Point) -> &'static str {
    match point.consistency {
        catalog::model::Consistency::Cluster => "cluster",
        catalog::model::Consistency::PerNode => "per-node",
    }
}

/// What was made, for machines.
pub(super) fn fields(made: &Made) -> Value {
    let nodes = made.point.nodes.iter().map(|node| {
        json!({
            "node_id": node.node_id,
            "epoch": node.epoch,
            "lsn": node.end_lsn,
            "wal_last": node.wal_last,
        })
    });
    json!({
        "point_id": made.point.point_id,
        "label": made.point.label,
        "consistency": made.point.consistency,
        "csn": made.point.csn,
        "lock_ms": made.point.lock_ms,
        "proof": made.point.proof,
        "made": made.point.made(),
        "lag_ms": u64::try_from(made.lag.as_millis()).unwrap_or(u64::MAX),
        "base": made.base,
        "nodes": nodes.collect::<Vec<_>>(),
    })
}

/// Whether a failure is one that no waiting mends: then a service is configured wrongly, and better ends.
pub(super) fn is_for_good(failure: &Failure) -> bool {
    matches!(
        failure.kind,
        ErrorKind::Usage
            | ErrorKind::Certificate
            | ErrorKind::StoreDenied
            | ErrorKind::Incompatible
            | ErrorKind::NotFound
            | ErrorKind::Damaged
    )
}
