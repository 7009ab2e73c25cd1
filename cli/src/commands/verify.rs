//! `gs_pitr verify`: read stored bytes back and find every damage.

mod mend;
mod words;

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use agent_api::{ErrorKind, Progress};
use catalog::Catalog;
use catalog::mirror::Mirror;
use catalog::verify::{Depth, Event, Report, Scope, Verify};
use clap::Args;
use pipeline::budget::Budget;
use pipeline::download::Downloader;
use pipeline::meter::Meter;
use pipeline::store::ObjectStore;
use pipeline::throttle::Throttle;
use serde_json::json;
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

use crate::failure::{Failure, Result};
use crate::operations::Live;
use crate::printer::Printer;
use crate::settings::{Options, ReadArgs, Settings};
use crate::{mirrored, repo, signals};

/// Memory for the bytes on their way.
const BUDGET: usize = 128 << 20;
/// How often progress is shown.
const PROGRESS_EVERY: Duration = Duration::from_secs(1);

/// `gs_pitr verify`
#[derive(Debug, Args)]
pub(crate) struct VerifyArgs {
    /// Verify this backup and what it rests on; its id, or the beginning of one that is unique
    #[arg(
        long,
        value_name = "ID",
        conflicts_with = "all",
        required_unless_present = "all"
    )]
    id: Option<String>,
    /// Verify everything in the repository
    #[arg(long)]
    all: bool,
    /// Read small objects only; of packs, indexes and WAL look whether they are there
    #[arg(long)]
    fast: bool,
    /// Mend what can be mended without a doubt: missing log entries, and missing objects that the local mirror has
    #[arg(long)]
    repair: bool,
    #[command(flatten)]
    read: ReadArgs,
}

impl VerifyArgs {
    /// What the command's own flags say.
    pub(crate) fn options(&self) -> Options {
        Options::from(&self.read)
    }
}

/// What every step needs.
struct Job<'a> {
    args: &'a VerifyArgs,
    settings: &'a Settings,
    printer: &'a Printer,
    cancel: CancellationToken,
    operation: Uuid,
}

/// Runs the command.
pub(crate) async fn run(args: &VerifyArgs, settings: &Settings, printer: &Printer) -> Result<()> {
    let (live, cancel) = (Live::default(), CancellationToken::new());
    let job = Job {
        args,
        settings,
        printer,
        cancel: cancel.clone(),
        operation: Uuid::now_v7(),
    };
    signals::guarded(job.operation, settings, printer, &live, &cancel, job.run()).await
}

impl Job<'_> {
    async fn run(&self) -> Result<()> {
        let store = repo::store(self.settings)?;
        let place = store.describe();
        let at_store = |failure: Failure| failure.at_store(&place);
        let (scope, mirror) = tokio::select! {
            found = self.what(&store) => found.map_err(at_store)?,
            () = self.cancel.cancelled() => return Err(Failure::cancelled()),
        };
        let report = self
            .verified(&store, scope, mirror)
            .await
            .map_err(at_store)?;
        self.tell(&report);
        let mended = if self.args.repair {
            mend::all(self, &report).await?
        } else {
            0
        };
        self.end(&report, mended)
    }

    /// What is to be verified, and the mirror of this repository.
    async fn what(&self, store: &Arc<dyn ObjectStore>) -> Result<(Scope, Option<Mirror>)> {
        let opened = Catalog::open(Arc::clone(store)).await;
        let mirror = match &opened {
            Ok(catalog) => {
                let id = catalog.repository().repository_id;
                Some(Mirror::new(&self.settings.home, id))
            }
            // Damaged or lost: the mirror notes which place it is of.
            Err(_) => mirrored::find(self.settings).ok(),
        };
        let Some(id) = &self.args.id else {
            return Ok((Scope::All, mirror));
        };
        let id = match id.parse() {
            Ok(id) => id,
            Err(_) => opened?.resolve_backup_id(id).await?,
        };
        Ok((Scope::Backup(id), mirror))
    }

    async fn verified(
        &self,
        store: &Arc<dyn ObjectStore>,
        scope: Scope,
        mirror: Option<Mirror>,
    ) -> Result<Report> {
        let meter = Arc::<Meter>::default();
        let downloader = Downloader::new(
            Arc::clone(store),
            Budget::new(BUDGET),
            Throttle::new(self.settings.bandwidth()),
            Arc::clone(&meter),
            self.cancel.clone(),
        );
        let verify = Verify {
            scope,
            depth: if self.args.fast {
                Depth::Fast
            } else {
                Depth::Full
            },
            jobs: self.settings.jobs() as usize,
            downloader,
            mirror,
        };
        let total = AtomicU64::new(0);
        let watch = |event: Event<'_>| match event {
            Event::Planned { bytes } => total.store(bytes, Ordering::Relaxed),
            Event::Found(finding) => {
                self.printer.event("finding", json!(finding), None);
                self.printer.text(&words::finding(finding));
            }
        };
        tokio::select! {
            report = verify.run(&watch) => Ok(report?),
            () = self.show(&meter, &total) => Err(Failure::cancelled()),
        }
    }

    /// Shows how far it is, until it is cancelled.
    async fn show(&self, meter: &Meter, total: &AtomicU64) {
        let bar = self.printer.bar("verify");
        bar.says("reading");
        let mut said = None;
        while !self.cancel.is_cancelled() {
            tokio::select! {
                () = tokio::time::sleep(PROGRESS_EVERY) => {}
                () = self.cancel.cancelled() => {}
            }
            let (bytes_total, stored_bytes) = (total.load(Ordering::Relaxed), meter.stored_bytes());
            let progress = Progress {
                bytes_total,
                bytes_done: stored_bytes.min(bytes_total),
                stored_bytes,
                ..Progress::default()
            };
            bar.progress(&progress);
            if said != Some(stored_bytes) {
                said = Some(stored_bytes);
                self.printer
                    .event("progress", json!({"progress": progress}), None);
            }
        }
    }

    fn tell(&self, report: &Report) {
        let fields = words::fields(report);
        self.printer.event("verified", fields, None);
        self.printer.text(&words::summary(report, self.args.fast));
    }

    /// The last word: damage is a failure, whatever else is said.
    fn end(&self, report: &Report, mended: usize) -> Result<()> {
        if !report.is_damaged() {
            let mut fields = words::fields(report);
            fields["repaired"] = json!(mended);
            self.printer.result("verify", fields);
            return Ok(());
        }
        let failure = Failure::new(ErrorKind::Damaged, words::damage(report));
        let next = if mended > 0 {
            "verify once more: gs_pitr verify --all"
        } else if !self.args.repair && !report.repairs.is_empty() {
            "something of it can be mended: gs_pitr verify --all --repair"
        } else {
            "docs/OPERATIONS.md, `verify says damaged`; other backups: gs_pitr show"
        };
        Err(failure.changed_if(mended > 0).next(next))
    }
}
