//! What `delete` and `prune` share: a plan is made, shown, agreed to, made again under the lease, and applied.

mod words;

use std::sync::Mutex;
use std::sync::PoisonError;
use std::time::{Duration, Instant};

use agent_api::{ErrorKind, Progress};
use catalog::Catalog;
use catalog::model::LeaseScope;
use catalog::retention::Holdings;
use catalog::retention::apply::{self, Applied, Guard, Report};
use catalog::retention::plan::Plan;
use serde_json::{Value, json};
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

use crate::consent;
use crate::failure::{Failure, Result};
use crate::journalled::{self, Journalled};
use crate::leased::Leased;
use crate::operations::Live;
use crate::printer::{NodeBar, Printer};
use crate::settings::Settings;
use crate::{mirrored, repo, signals};

/// At most one progress event in this time.
const PROGRESS_EVERY: Duration = Duration::from_secs(1);
/// How often it is planned again because something changed meanwhile.
const PLANS: u32 = 5;

/// One removal.
pub(crate) struct Removal<'a> {
    /// `delete` or `prune`.
    pub(crate) command: &'static str,
    /// What is asked, if somebody can be.
    pub(crate) question: &'a str,
    /// Only show the plan.
    pub(crate) dry_run: bool,
    /// The settings.
    pub(crate) settings: &'a Settings,
    /// Where it is said.
    pub(crate) printer: &'a Printer,
    /// Makes the plan.
    pub(crate) plan: &'a dyn Fn(&Holdings) -> Result<Plan>,
}

impl Removal<'_> {
    /// Runs it.
    ///
    /// # Errors
    /// What the plan refuses; a lease of somebody else; what the store says; that nobody agreed.
    pub(crate) async fn run(&self) -> Result<()> {
        let (operation, cancel) = (Uuid::now_v7(), CancellationToken::new());
        let live = Live::default();
        let (settings, printer) = (self.settings, self.printer);
        let work = self.work(operation, &cancel);
        signals::guarded(operation, settings, printer, &live, &cancel, work).await
    }

    async fn work(&self, operation: Uuid, cancel: &CancellationToken) -> Result<()> {
        let catalog = repo::open(self.settings).await?;
        let plan = unless(cancel, self.planned(&catalog)).await?;
        let held = unless(cancel, async { Ok(apply::holds(&catalog, &plan).await?) }).await?;
        let fields = words::plan_fields(&plan, &held);
        let text = words::plan_text(&plan, &held, self.command);
        if self.dry_run {
            self.printer.text(&text);
            let fields = json!({"applied": false, "plan": fields});
            self.printer.result(self.command, fields);
            return Ok(());
        }
        self.printer.event("plan", fields.clone(), Some(&text));
        if plan.is_empty() {
            return self.tell(&catalog, &Report::default(), &fields).await;
        }
        self.agreed(cancel).await?;
        let report = self.leased(&catalog, operation, cancel, &plan).await?;
        self.tell(&catalog, &report, &fields).await
    }

    async fn planned(&self, catalog: &Catalog) -> Result<Plan> {
        (self.plan)(&Holdings::read(catalog).await?)
    }

    async fn agreed(&self, cancel: &CancellationToken) -> Result<()> {
        let nobody = Failure::usage("nothing is deleted: there is nobody to ask")
            .next("use `--yes`, or `--dry-run` to see the plan only");
        consent::agreed(self.question, nobody, self.settings, self.printer, cancel).await
    }

    async fn leased(
        &self,
        catalog: &Catalog,
        operation: Uuid,
        cancel: &CancellationToken,
        shown: &Plan,
    ) -> Result<Report> {
        let command = format!("gs_pitr {}", self.command);
        let (settings, printer, scope) = (self.settings, self.printer, LeaseScope::Maintain);
        let taken = Leased::take(
            catalog, scope, operation, &command, settings, printer, cancel,
        );
        let leased = taken.await?;
        let journalled = Journalled {
            operation,
            kind: self.command,
            backup: None,
            by: journalled::ourselves(&command),
        };
        let steps = Steps {
            leased: &leased,
            cancel,
            printer,
            bar: printer.bar(self.command),
            last: Mutex::default(),
        };
        let work = async |_: &_| self.applied(catalog, operation, &steps, shown).await;
        let outcome = journalled.run(catalog, printer, None, work).await;
        let outcome = match outcome {
            Ok(report) => Ok(report),
            Err(failure) => Err(leased.explain(failure).await),
        };
        let report = steps
            .last
            .into_inner()
            .unwrap_or_else(PoisonError::into_inner)
            .report;
        let changed =
            report.versions > 0 || !report.deleted.is_empty() || !report.fenced.is_empty();
        drop(steps.bar);
        // Whatever it left is for the next run; nothing of it has to be fenced.
        leased.release().await;
        outcome.map_err(|failure| {
            failure
                .changed_if(changed)
                .next("run the command again: it goes on where this one stopped")
        })
    }

    async fn applied(
        &self,
        catalog: &Catalog,
        operation: Uuid,
        steps: &Steps<'_>,
        shown: &Plan,
    ) -> Result<Report> {
        let mut fenced = Vec::new();
        for _ in 0..PLANS {
            let plan = unless(steps.cancel, self.planned(catalog)).await?;
            self.still_agreed(shown, &plan)?;
            steps.total(&plan);
            match apply::apply(catalog, &plan, operation, self.command, steps).await? {
                Applied::Done(mut report) => {
                    report.fenced.splice(..0, fenced);
                    if let Some(error) = &report.refused {
                        return Err(Failure::from(error.clone()));
                    }
                    return Ok(report);
                }
                Applied::Changed { report, why } => {
                    fenced.extend(report.fenced);
                    let message = format!("{why}: the plan is made again");
                    self.printer.warning(None, &message);
                }
            }
        }
        let message = format!("the bucket changed {PLANS} times while this was planned");
        Err(Failure::new(ErrorKind::Conflict, message))
    }

    /// Whoever answered a question agreed to what was shown, and to no other backup.
    fn still_agreed(&self, shown: &Plan, now: &Plan) -> Result<()> {
        let before = |id| shown.removed.iter().any(|it| it.id == id);
        let new = now.removed.iter().find(|it| !before(it.id.clone()));
        match new {
            Some(new) if !self.settings.yes() => {
                let message = format!("backup {} would go too, and was not in the plan", new.id);
                Err(Failure::new(ErrorKind::Conflict, message).next("run the command again"))
            }
            _ => Ok(()),
        }
    }

    async fn tell(&self, catalog: &Catalog, report: &Report, plan: &Value) -> Result<()> {
        for id in &report.read {
            let message = format!(
                "backup {id} is deleted, but its bytes, all points and all WAL stay for now: somebody still reads it; `gs_pitr prune` removes them later"
            );
            self.printer.warning(None, &message);
        }
        if !report.deleted.is_empty() || report.points > 0 {
            mirrored::refresh(catalog, self.settings, self.printer).await;
        }
        self.printer.text(&words::report_text(report));
        let mut fields = words::report_fields(report);
        fields["applied"] = json!(true);
        fields["plan"] = plan.clone();
        self.printer.result(self.command, fields);
        Ok(())
    }
}

/// Runs `work` until it is to stop.
async fn unless<T>(cancel: &CancellationToken, work: impl Future<Output = Result<T>>) -> Result<T> {
    tokio::select! {
        outcome = work => outcome,
        () = cancel.cancelled() => Err(Failure::cancelled()),
    }
}

/// Proves, stops and tells, while a plan is applied.
struct Steps<'a> {
    leased: &'a Leased,
    cancel: &'a CancellationToken,
    printer: &'a Printer,
    bar: NodeBar,
    last: Mutex<Last>,
}

#[derive(Default)]
struct Last {
    report: Report,
    bytes_total: u64,
    versions_total: usize,
    said: Option<Instant>,
}

impl Steps<'_> {
    fn total(&self, plan: &Plan) {
        let mut last = self.last.lock().unwrap_or_else(PoisonError::into_inner);
        (last.bytes_total, last.versions_total) = (plan.bytes(), plan.versions());
        self.bar.says("deleting");
    }
}

impl Guard for Steps<'_> {
    type Error = Failure;

    async fn prove(&self) -> Result<()> {
        self.leased.prove().await
    }

    fn go_on(&self) -> Result<()> {
        if self.cancel.is_cancelled() {
            return Err(Failure::cancelled());
        }
        Ok(())
    }

    fn progress(&self, report: &Report) {
        let mut last = self.last.lock().unwrap_or_else(PoisonError::into_inner);
        last.report = report.clone();
        self.bar.progress(&Progress {
            bytes_total: last.bytes_total,
            bytes_done: report.bytes,
            ..Progress::default()
        });
        if last
            .said
            .is_some_and(|said| said.elapsed() < PROGRESS_EVERY)
        {
            return;
        }
        last.said = Some(Instant::now());
        let fields = json!({"progress": {
            "bytes_total": last.bytes_total,
            "bytes_done": report.bytes,
            "objects_total": last.versions_total,
            "objects_done": report.versions,
        }});
        self.printer.event("progress", fields, None);
    }
}
