//! `gs_pitr operations discard`: what was at the targets before a restore is removed.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::sync::Arc;

use agent_api::ErrorKind;
use catalog::model::RestorePlan;
use serde_json::json;
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

use super::DiscardArgs;
use super::reach::{self, Reached};
use crate::agents::Agent;
use crate::commands::restore::agreed;
use crate::consent;
use crate::failure::{Failure, Result};
use crate::operations::Live;
use crate::printer::Printer;
use crate::restoring::resume;
use crate::settings::Settings;
use crate::{repo, signals};

/// An agent, and the directories that it keeps.
type Kept = (Arc<Agent>, Vec<String>);

/// Runs the command.
pub(super) async fn run(args: &DiscardArgs, settings: &Settings, printer: &Printer) -> Result<()> {
    consent::possible(settings)?;
    let (live, cancel) = (Live::default(), CancellationToken::new());
    let work = work(args, settings, printer, &cancel);
    signals::guarded(Uuid::now_v7(), settings, printer, &live, &cancel, work).await
}

async fn work(
    args: &DiscardArgs,
    settings: &Settings,
    printer: &Printer,
    cancel: &CancellationToken,
) -> Result<()> {
    let (id, plan) = tokio::select! {
        found = ended(args, settings) => found?,
        () = cancel.cancelled() => return Err(Failure::cancelled()),
    };
    let reached = reach::reach(&plan, &args.map, settings, printer, cancel).await?;
    let (kept, away) = kept(id, reached);
    let mut text = format!("plan: remove what was there before the restore {id}");
    for (agent, directories) in kept.values() {
        for directory in directories {
            let _ = write!(text, "\n  on agent {}: {directory}", agent.name());
        }
    }
    if kept.is_empty() {
        text.push_str("\n  nothing is there");
    }
    let directories: Vec<_> = kept
        .values()
        .map(|(agent, all)| json!({"node": agent.name(), "directories": all}))
        .collect();
    printer.event(
        "plan",
        json!({"operation": id, "old": directories}),
        Some(&text),
    );
    if !kept.is_empty() {
        let question = "Remove all of this? There is no way back from the restore then.";
        agreed(question, settings, printer, cancel).await?;
    }
    removed(id, kept, away, printer, cancel).await
}

/// The restore, if it has come to its end.
async fn ended(args: &DiscardArgs, settings: &Settings) -> Result<(Uuid, RestorePlan)> {
    let catalog = repo::open(settings).await?;
    let id = catalog.resolve_operation_id(&args.id).await?;
    let journal = catalog.operation(id).await?;
    let Some(plan) = journal.plan() else {
        let message = format!("operation {id} is no restore, or never began");
        return Err(Failure::usage(message).next("gs_pitr operations"));
    };
    if journal.ended().is_some() {
        return Ok((id, plan.clone()));
    }
    let message =
        format!("the restore {id} has not ended, so what was there before is still its way back");
    Err(Failure::new(ErrorKind::Conflict, message).next(resume(id)))
}

/// What each agent keeps, and the failures of those that are away.
fn kept(id: Uuid, reached: Vec<Reached<'_>>) -> (BTreeMap<String, Kept>, Vec<Failure>) {
    let mut kept: BTreeMap<String, Kept> = BTreeMap::new();
    let mut away = Vec::new();
    for node in reached {
        let found = match node.found {
            Ok(found) => found,
            Err(failure) => {
                away.push(failure);
                continue;
            }
        };
        let old = found.restores.old.iter().filter(|old| old.restore == id);
        let directories: Vec<_> = old.flat_map(|old| old.directories.clone()).collect();
        if !directories.is_empty() {
            let agent = Arc::clone(&found.host.agent);
            kept.insert(agent.name(), (agent, directories));
        }
    }
    (kept, away)
}

async fn removed(
    id: Uuid,
    kept: BTreeMap<String, Kept>,
    mut failures: Vec<Failure>,
    printer: &Printer,
    cancel: &CancellationToken,
) -> Result<()> {
    let (mut text, mut all) = (
        format!("discarded what was there before the restore {id}"),
        Vec::new(),
    );
    for (name, (agent, _)) in kept {
        match agent.discard(id, cancel).await {
            Ok(discarded) => {
                for directory in &discarded.removed {
                    let _ = write!(text, "\n  removed on {name}: {directory}");
                }
                all.push(json!({"node": name, "removed": discarded.removed}));
            }
            Err(failure) => failures.push(failure),
        }
    }
    let mut failures = failures.into_iter();
    if let Some(first) = failures.next() {
        for other in failures {
            printer.warning(other.node.as_deref(), &other.message);
        }
        return Err(first.changed_if(!all.is_empty()));
    }
    printer.text(&text);
    printer.result("operations discard", json!({"operation": id, "nodes": all}));
    Ok(())
}
