//! One operation: its records, its plan, and what its agents say now.

use std::fmt::Write as _;

use agent_api::OperationStatus;
use catalog::model::{OperationEvent, OperationRecord, Place, RestorePlan};
use catalog::repo::JournalledOperation;
use futures_util::future::join_all;
use serde_json::{Value, json};
use tokio_util::sync::CancellationToken;

use super::list::{self, Shown, State, moment, verdict};
use super::reach;
use crate::agents;
use crate::failure::Result;
use crate::printer::Printer;
use crate::repo;
use crate::settings::Settings;

/// Runs `gs_pitr operations ID`.
pub(super) async fn run(id: &str, settings: &Settings, printer: &Printer) -> Result<()> {
    let catalog = repo::open(settings).await?;
    let id = catalog.resolve_operation_id(id).await?;
    let journal = catalog.operation(id).await?;
    let leases = list::leases(&catalog).await?;
    let shown = list::shown(&catalog, &journal, &leases).await?;
    let live = live(&journal, &shown, settings, printer).await?;
    let mut text = head(&shown);
    if let Some(plan) = journal.plan() {
        planned(&mut text, plan);
    }
    for record in &journal.records {
        let _ = write!(text, "\n{}  {}", moment(Some(record.at)), words(record));
    }
    for (name, said) in &live {
        let _ = write!(text, "\nagent {name}: {}", answer(said));
    }
    if let Some(next) = &shown.next {
        let _ = write!(text, "\nnext: {next}");
    }
    printer.text(&text);
    let agents: Vec<_> = live
        .iter()
        .map(|(name, said)| match said {
            Ok(status) => json!({"node": name, "status": status.as_ref().map(status_fields)}),
            Err(why) => json!({"node": name, "error": why}),
        })
        .collect();
    let fields = json!({
        "operation": shown,
        "plan": journal.plan(),
        "records": journal.records,
        "agents": agents,
    });
    printer.result("operations", fields);
    Ok(())
}

/// What an agent says of its part; why it does not.
type Said = std::result::Result<Option<OperationStatus>, String>;

/// Asks the agents of an operation that has not ended.
async fn live(
    journal: &JournalledOperation,
    shown: &Shown,
    settings: &Settings,
    printer: &Printer,
) -> Result<Vec<(String, Said)>> {
    if matches!(shown.state, State::Ended | State::Failed) {
        return Ok(Vec::new());
    }
    let never = CancellationToken::new();
    if let Some(plan) = journal.plan() {
        let reached = reach::reach(plan, &[], settings, printer, &never).await?;
        let said = reached.iter().map(|node| match &node.found {
            Ok(found) => (found.host.agent.name(), Ok(node.status().cloned())),
            Err(failure) => (node.planned.agent.clone(), Err(failure.message.clone())),
        });
        return Ok(said.collect());
    }
    // Agents of a backup are not journalled; those that are named are asked.
    let Some(backup) = journal.backup() else {
        return Ok(Vec::new());
    };
    let agents = settings.some_nodes();
    if agents.is_empty() {
        return Ok(Vec::new());
    }
    let agents = agents::all(agents, settings, printer)?;
    let said = agents.iter().map(|agent| async {
        let said = match agent.operations(&never).await {
            Ok(all) => Ok(all
                .into_iter()
                .rfind(|it| it.backup_id.as_ref() == Some(backup))),
            Err(failure) => Err(failure.message),
        };
        (agent.name(), said)
    });
    Ok(join_all(said).await)
}

fn status_fields(status: &OperationStatus) -> Value {
    json!({
        "operation": status.operation,
        "phase": status.phase,
        "started": status.started,
        "ended": status.ended,
        "progress": status.progress,
        "warnings": status.warnings,
        "error": status.error,
    })
}

fn answer(said: &Said) -> String {
    match said {
        Ok(Some(status)) => match &status.error {
            Some(error) => format!("{}: {error}", status.phase),
            None => status.phase.to_string(),
        },
        Ok(None) => "knows nothing of it".to_owned(),
        Err(why) => why.clone(),
    }
}

fn head(shown: &Shown) -> String {
    let word = |text: &Option<String>| text.clone().unwrap_or_else(|| "-".to_owned());
    let mut text = format!("operation {}", shown.operation);
    let rows = [
        ("kind", word(&shown.kind)),
        ("state", shown.state.name().to_owned()),
        ("decided", verdict(shown.decision).to_owned()),
        ("begun", moment(shown.begun)),
        ("last record", moment(shown.last)),
        ("by", word(&shown.by)),
        ("backup", word(&shown.backup_id)),
        ("why", word(&shown.why)),
    ];
    for (name, value) in rows {
        if value != "-" {
            let _ = write!(text, "\n  {name:<12} {value}");
        }
    }
    text
}

fn planned(text: &mut String, plan: &RestorePlan) {
    for node in &plan.nodes {
        let place = match node.place {
            Place::Fresh => "a fresh directory",
            Place::Replace { .. } => "over the database there",
            Place::InPlace { .. } => "in place of the database there, which is removed first",
        };
        let _ = write!(
            text,
            "\n  node {}: agent {} on {}, {} ({place}), port {}",
            node.becomes, node.agent, node.host, node.target, node.port
        );
    }
}

fn words(record: &OperationRecord) -> String {
    match &record.event {
        OperationEvent::Started { kind, .. } => format!("{kind} begun"),
        OperationEvent::UploadsIntended { keys } => format!("{} uploads announced", keys.len()),
        OperationEvent::RestorePlanned(plan) => format!("planned, {} nodes", plan.nodes.len()),
        OperationEvent::NodePromoted(node) => format!(
            "node {} promoted to timeline {} at {}",
            node.node_id, node.timeline, node.fork_lsn
        ),
        OperationEvent::NodeGivenUp { node_id } => {
            format!("node {node_id} given up: the others are opened without it")
        }
        OperationEvent::LockIntended { proxies } => {
            format!("about to lock the cluster through {}", proxies.join(", "))
        }
        OperationEvent::LockEnded {
            tries,
            held_ms,
            open,
        } => {
            let open = if *open {
                ""
            } else {
                ", not seen to be unlocked"
            };
            format!("locked {tries} times, {held_ms} ms in all{open}")
        }
        OperationEvent::MetadataReplaced { databases, .. } => {
            format!(
                "about to import databases of the proxies: {}",
                databases.join(", ")
            )
        }
        OperationEvent::Ended { error: None } => "ended well".to_owned(),
        OperationEvent::Ended { error: Some(error) } => format!("ended: {error}"),
        _ => "something that a newer version knows".to_owned(),
    }
}
