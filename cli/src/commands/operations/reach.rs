//! The agents of a restore that was left: found again by what they say, wherever they listen now.

use std::sync::Arc;

use agent_api::{ErrorKind, OperationStatus, RestoresHere};
use catalog::model::{PlannedNode, RestorePlan};
use futures_util::future::join_all;
use tokio_util::sync::CancellationToken;

use crate::agents::{self, Agent, Host};
use crate::failure::{Failure, Result};
use crate::printer::Printer;
use crate::settings::Settings;
use crate::settings::values::Address;

/// An agent that answers, and what it says of its restores.
#[derive(Debug)]
pub(super) struct Found {
    pub(super) host: Host,
    pub(super) restores: RestoresHere,
    statuses: Vec<OperationStatus>,
}

/// A node of the plan, and its agent if that is found.
#[derive(Debug)]
pub(super) struct Reached<'a> {
    pub(super) planned: &'a PlannedNode,
    pub(super) found: Result<Arc<Found>>,
}

impl Reached<'_> {
    /// How the node's operation stands on its agent; `None` if the agent does not know it.
    pub(super) fn status(&self) -> Option<&OperationStatus> {
        let found = self.found.as_ref().ok()?;
        let is = |status: &&OperationStatus| status.operation == self.planned.operation;
        found.statuses.iter().find(is)
    }
}

/// Asks the agents of a plan. Those at the journalled addresses, those that `maps` names, and those of `--nodes`
/// are asked; a node's agent is the one that is mapped, else the one that knows its operation, else the one at the
/// journalled address if it is still that host.
///
/// # Errors
/// The command line's.
pub(super) async fn reach<'a>(
    plan: &'a RestorePlan,
    maps: &[(String, Address)],
    settings: &Settings,
    printer: &Printer,
    cancel: &CancellationToken,
) -> Result<Vec<Reached<'a>>> {
    let mut mapped = Vec::new();
    for (text, address) in maps {
        mapped.push((find(plan, "--map", text)?, address.clone()));
    }
    let journalled = plan.nodes.iter().filter_map(|node| node.agent.parse().ok());
    let told = mapped.iter().map(|(_, address)| address.clone());
    let mut addresses: Vec<Address> = journalled.chain(told).collect();
    addresses.extend(settings.some_nodes().iter().cloned());
    addresses.sort();
    addresses.dedup();
    let agents = agents::all(&addresses, settings, printer)?;
    let asked = join_all(agents.iter().map(|agent| ask(agent, cancel))).await;
    let mut all: Vec<(&Address, Result<Arc<Found>>)> = Vec::new();
    for (address, found) in addresses.iter().zip(asked) {
        all.push((address, found.map(Arc::new)));
    }
    let reached = plan.nodes.iter().enumerate().map(|(place, planned)| {
        let map = mapped.iter().find(|(mapped, _)| *mapped == place);
        let found = match map {
            Some((_, address)) => at(&all, address),
            None => knows(&all, planned).unwrap_or_else(|| still_there(&all, planned)),
        };
        Reached { planned, found }
    });
    Ok(reached.collect())
}

/// The place in the plan of the node that `flag` names with `text`.
///
/// # Errors
/// If that is none, or more than one.
pub(super) fn find(plan: &RestorePlan, flag: &str, text: &str) -> Result<usize> {
    let lower = text.to_ascii_lowercase();
    let is = |node: &PlannedNode| {
        let ids = [node.node_id, node.becomes].map(|id| id.to_string());
        ids.iter().any(|id| id.starts_with(&lower))
    };
    let mut found = (0..plan.nodes.len()).filter(|place| is(&plan.nodes[*place]));
    if let (Some(place), None) = (found.next(), found.next()) {
        return Ok(place);
    }
    let ids = plan.nodes.iter().map(|node| node.becomes.to_string());
    let ids: Vec<_> = ids.collect();
    let message = format!("`{flag}`: `{text}` is not one of {}", ids.join(", "));
    Err(Failure::usage(message))
}

async fn ask(agent: &Arc<Agent>, cancel: &CancellationToken) -> Result<Found> {
    let facts = agent.first_contact(cancel).await?;
    let host = Host {
        agent: Arc::clone(agent),
        facts,
    };
    Ok(Found {
        restores: agent.restores(cancel).await?,
        statuses: agent.operations(cancel).await?,
        host,
    })
}

type Asked<'a> = (&'a Address, Result<Arc<Found>>);

fn at(all: &[Asked<'_>], address: &Address) -> Result<Arc<Found>> {
    match all.iter().find(|(at, _)| *at == address) {
        Some((_, found)) => found.clone(),
        None => Err(Failure::usage(format!("`{address}` was not asked"))),
    }
}

/// The agent that knows the node's operation: running, ended or interrupted.
fn knows(all: &[Asked<'_>], planned: &PlannedNode) -> Option<Result<Arc<Found>>> {
    let it = planned.operation;
    let knows = |found: &Found| {
        let unfinished = &found.restores.unfinished;
        found.statuses.iter().any(|status| status.operation == it)
            || unfinished.iter().any(|restore| restore.operation == it)
    };
    let mut found = all.iter().filter_map(|(_, found)| found.as_ref().ok());
    found
        .find(|found| knows(found))
        .map(|found| Ok(Arc::clone(found)))
}

/// The agent at the journalled address, or else the only one of the same host that is told the same place.
fn still_there(all: &[Asked<'_>], planned: &PlannedNode) -> Result<Arc<Found>> {
    let there: Option<Address> = planned.agent.parse().ok();
    let there = there.and_then(|address| all.iter().find(|(at, _)| **at == address));
    let same_host = |found: &Found| found.host.facts.machine_id == planned.machine_id;
    if let Some((_, Ok(found))) = there
        && same_host(found)
    {
        return Ok(Arc::clone(found));
    }
    let reached = all.iter().filter_map(|(_, found)| found.as_ref().ok());
    let same = |found: &&Arc<Found>| {
        same_host(found) && found.host.data_directory() == Some(planned.target.as_str())
    };
    let mut same = reached.filter(same);
    if let (Some(found), None) = (same.next(), same.next()) {
        return Ok(Arc::clone(found));
    }
    let failure = if let Some((_, Err(failure))) = there {
        failure.clone()
    } else {
        let message = format!(
            "the agent of node {} is not found: it was at {} on {}",
            planned.becomes, planned.agent, planned.host
        );
        Failure::new(ErrorKind::AgentUnreachable, message)
    };
    let next = format!(
        "start that agent; if it listens elsewhere now: `--map {}=HOST:PORT`",
        planned.becomes
    );
    Err(Failure {
        next: Some(next),
        ..failure
    }
    .on(planned.agent.clone()))
}
