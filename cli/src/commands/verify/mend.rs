//! `--repair`: the plan, a yes, the lease, and each repair said before and after it.

use std::sync::Arc;

use catalog::Catalog;
use catalog::model::LeaseScope;
use catalog::verify::{Repair, Repaired, Report};
use serde_json::json;

use super::Job;
use crate::consent;
use crate::failure::{Failure, Result};
use crate::journalled::{self, Journalled};
use crate::leased::Leased;
use crate::repo;

const COMMAND: &str = "gs_pitr verify --repair";

/// Mends what the report offers. Returns how much was done.
///
/// # Errors
/// That nobody agreed; a lease of somebody else; what the store says.
pub(super) async fn all(job: &Job<'_>, report: &Report) -> Result<usize> {
    if report.repairs.is_empty() {
        job.printer.text("nothing can be repaired");
        return Ok(0);
    }
    // What comes back first is what entries are about.
    let mut repairs: Vec<&Repair> = report.repairs.iter().collect();
    repairs.sort_by_key(|repair| !repair.is_put_back());
    agreed(job, &repairs).await?;
    // A repository without its first object cannot be opened, and nobody else can put it back either.
    let store = repo::store(job.settings)?;
    let mut done = 0;
    for repair in &repairs {
        if repair.opens_repository() {
            say(job, "repairing", repair, &repair.to_string());
            catalog::verify::put_back_repository(&*store, repair).await?;
            done += 1;
            say(job, "repaired", repair, "done");
        }
    }
    repairs.retain(|repair| !repair.opens_repository());
    if repairs.is_empty() {
        return Ok(done);
    }
    let catalog = Catalog::open(Arc::clone(&store)).await?;
    let (settings, printer, scope) = (job.settings, job.printer, LeaseScope::Maintain);
    let leased = Leased::take(
        &catalog,
        scope,
        job.operation,
        COMMAND,
        settings,
        printer,
        &job.cancel,
    );
    let leased = leased.await?;
    let journalled = Journalled {
        operation: job.operation,
        kind: "verify",
        backup: None,
        by: journalled::ourselves(COMMAND),
    };
    let mended = &mut done;
    let work = async |_: &_| each(job, &catalog, &leased, &repairs, mended).await;
    let outcome = journalled.run(&catalog, printer, None, work).await;
    let outcome = match outcome {
        Ok(()) => Ok(()),
        Err(failure) => Err(leased.explain(failure).await),
    };
    // Each repair is whole or not there: nothing has to be fenced.
    leased.release().await;
    let changed = done > 0;
    outcome.map_err(|failure| {
        failure
            .changed_if(changed)
            .next("run the command again: it goes on where this one stopped")
    })?;
    Ok(done)
}

async fn each(
    job: &Job<'_>,
    catalog: &Catalog,
    leased: &Leased,
    repairs: &[&Repair],
    done: &mut usize,
) -> Result<()> {
    for repair in repairs {
        if job.cancel.is_cancelled() {
            return Err(Failure::cancelled());
        }
        leased.prove().await?;
        say(job, "repairing", repair, &repair.to_string());
        let words = match catalog.repair(repair, job.operation).await? {
            Repaired::Done => {
                *done += 1;
                "done"
            }
            Repaired::NotNeeded => "not needed any more",
        };
        say(job, "repaired", repair, words);
    }
    Ok(())
}

fn say(job: &Job<'_>, event: &str, repair: &Repair, what: &str) {
    let fields = json!({"key": repair.key().as_str(), "what": what});
    job.printer.event(event, fields, Some(what));
}

async fn agreed(job: &Job<'_>, repairs: &[&Repair]) -> Result<()> {
    let lines: Vec<_> = repairs.iter().map(ToString::to_string).collect();
    let fields = json!({"repairs": lines});
    let text = format!("would repair:\n  {}", lines.join("\n  "));
    job.printer.event("plan", fields, Some(&text));
    let nobody = Failure::usage("nothing is repaired: there is nobody to ask").next("use `--yes`");
    let question = "Repair all of this?";
    consent::agreed(question, nobody, job.settings, job.printer, &job.cancel).await
}
