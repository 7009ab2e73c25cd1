//! The part of `gs_pitr show` about WAL that is shipped all the time: gaps as the bucket has them, and how far the agents are, if
//! some are given.

use std::collections::BTreeMap;
use std::fmt::Write as _;

use agent_api::{WalState, WalStatus};
use catalog::Catalog;
use catalog::ids::EpochId;
use catalog::model::Gap;
use futures_util::future::join_all;
use serde::Serialize;
use uuid::Uuid;

use super::Shown;
use crate::agents;
use crate::commands::wal::{lag, remarks};
use crate::failure::Result;
use crate::printer::{Printer, bytes};
use crate::settings::Settings;

/// One epoch of a node that has backups.
#[derive(Debug, Serialize)]
pub(super) struct ShownWal {
    node_id: Uuid,
    epoch: String,
    gaps: Vec<ShownGap>,
    /// Whether the newest gap has no base backup behind it.
    wants_base: bool,
    /// What its agent says; `null`: it was not asked, or ships nothing for this epoch.
    agent: Option<WalStatus>,
}

#[derive(Debug, Serialize)]
struct ShownGap {
    from: String,
    to: String,
    why: String,
    at: jiff::Timestamp,
}

/// Looks. Agents that do not answer are warned of.
pub(super) async fn look(
    catalog: &Catalog,
    backups: &[Shown],
    settings: &Settings,
    printer: &Printer,
) -> Result<Vec<ShownWal>> {
    // The newest base of each epoch.
    let mut bases: BTreeMap<(Uuid, String), u64> = BTreeMap::new();
    for backup in backups.iter().filter(|it| it.status == "complete") {
        for node in &backup.nodes {
            let base = bases.entry((node.node_id, node.epoch.clone())).or_default();
            *base = (*base).max(position(&node.start_lsn));
        }
    }
    let statuses = statuses(settings, printer).await;
    let mut all = Vec::new();
    for ((node_id, epoch), base) in bases {
        let Ok(id) = epoch.parse::<EpochId>() else {
            continue;
        };
        let gaps = catalog.gaps(node_id, &id).await?;
        let newest = gaps.iter().map(|gap| position(&gap.to)).max();
        let mut of_node = statuses.iter();
        let agent =
            of_node.find(|it| it.node_id == Some(node_id) && it.epoch.as_ref() == Some(&id));
        all.push(ShownWal {
            node_id,
            epoch,
            gaps: gaps.into_iter().map(shown).collect(),
            wants_base: newest.is_some_and(|newest| newest > base),
            agent: agent.cloned(),
        });
    }
    Ok(all)
}

fn shown(gap: Gap) -> ShownGap {
    ShownGap {
        from: gap.from,
        to: gap.to,
        why: gap.reason,
        at: gap.at,
    }
}

fn position(lsn: &str) -> u64 {
    let half = |digits: &str| u64::from_str_radix(digits, 16).ok();
    lsn.split_once('/')
        .and_then(|(high, low)| Some(half(high)? << 32 | half(low)?))
        .unwrap_or(0)
}

/// What the agents say that are given. The list of backups does not wait for one that is not there.
async fn statuses(settings: &Settings, printer: &Printer) -> Vec<WalStatus> {
    let addresses = settings.some_nodes();
    if addresses.is_empty() {
        return Vec::new();
    }
    let agents = match agents::all(addresses, settings, printer) {
        Ok(agents) => agents,
        Err(failure) => {
            printer.warning(None, &format!("the agents were not asked: {failure}"));
            return Vec::new();
        }
    };
    let asked = join_all(agents.iter().map(|agent| agent.client().wal())).await;
    let mut statuses = Vec::new();
    for (agent, asked) in agents.iter().zip(asked) {
        match asked {
            Ok(status) => statuses.push(status),
            Err(error) => printer.warning(Some(&agent.name()), &error.message),
        }
    }
    statuses
}

/// For people: only what is worth a line.
pub(super) fn text(all: &[ShownWal]) -> String {
    let mut text = String::new();
    for wal in all {
        let node = wal.node_id;
        for gap in &wal.gaps {
            let _ = write!(
                text,
                "\nWAL of node {node}: missing from {} to {} since {}: {}",
                gap.from,
                gap.to,
                gap.at.strftime("%F %TZ"),
                gap.why.replace(char::is_control, "?")
            );
        }
        if wal.wants_base {
            let _ = write!(
                text,
                "\nWAL of node {node}: no base backup joins what is shipped now; next: gs_pitr backup"
            );
        }
        if let Some(status) = wal.agent.as_ref().filter(|it| it.state != WalState::Off) {
            let held = status.held_bytes.map_or_else(|| "-".to_owned(), bytes);
            let _ = write!(
                text,
                "\nWAL of node {node}: {}, shipped to {}, {} behind, {held} held",
                status.state,
                status.shipped_to.as_deref().unwrap_or("-"),
                lag(status)
            );
            if status.state != WalState::Running {
                for line in remarks(status) {
                    let _ = write!(text, "\n  {line}");
                }
            }
        }
    }
    text
}
