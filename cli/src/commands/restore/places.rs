//! Which agent a node of a backup goes to.

use agent_api::ErrorKind;
use catalog::Catalog;
use catalog::model::{Epoch, NodeBackup};

use super::RestoreArgs;
use crate::agents::Host;
use crate::commands::backup::AGENT_FIELD;
use crate::failure::{Failure, Result};
use crate::settings::values::Address;

/// Source of a node as people know it.
pub(super) fn source(node: &NodeBackup) -> String {
    Address {
        host: node.host.clone(),
        port: node.port,
    }
    .to_string()
}

pub(super) fn source_agent(node: &NodeBackup) -> Option<&str> {
    node.extra.get(AGENT_FIELD)?.as_str()
}

fn all_sources(nodes: &[NodeBackup]) -> String {
    let all: Vec<_> = nodes
        .iter()
        .map(|node| format!("{} ({})", node.node_id, source(node)))
        .collect();
    all.join(", ")
}

/// The place of the node that `text` names: an id, the beginning of one, `host:port` of its source or
/// of its source's agent.
fn find(nodes: &[NodeBackup], flag: &str, text: &str) -> Result<usize> {
    const SHORTEST_PREFIX: usize = 4;
    let lower = text.to_ascii_lowercase();
    let names = |node: &NodeBackup| {
        let id = node.node_id.to_string();
        // The host of its agent's address is often what people call the source.
        let agent: Option<Address> = source_agent(node).and_then(|agent| agent.parse().ok());
        let by_agent = agent.map(|agent| Address {
            port: node.port,
            ..agent
        });
        id == lower
            || (lower.len() >= SHORTEST_PREFIX && id.starts_with(&lower))
            || source(node) == text
            || by_agent.is_some_and(|address| address.to_string() == text)
            || source_agent(node) == Some(text)
    };
    let mut found = (0..nodes.len()).filter(|place| names(&nodes[*place]));
    match (found.next(), found.next()) {
        (Some(place), None) => Ok(place),
        (None, _) => {
            let message = format!(
                "`{flag}`: the backup has no node `{text}`; it has {}",
                all_sources(nodes)
            );
            Err(Failure::new(ErrorKind::NotFound, message))
        }
        (Some(_), Some(_)) => {
            let message = format!(
                "`{flag}`: `{text}` is more than one of {}",
                all_sources(nodes)
            );
            Err(Failure::usage(message).next("use node ids"))
        }
    }
}

/// What the operator says of each node; `None` where nothing is said.
pub(super) fn told<T: Clone>(
    nodes: &[NodeBackup],
    flag: &str,
    choices: &[(String, T)],
) -> Result<Vec<Option<T>>> {
    let mut told: Vec<Option<T>> = vec![None; nodes.len()];
    for (text, value) in choices {
        let place = find(nodes, flag, text)?;
        if told[place].replace(value.clone()).is_some() {
            let message = format!("`{flag}` names node {} twice", nodes[place].node_id);
            return Err(Failure::usage(message));
        }
    }
    Ok(told)
}

/// The one of `hosts` that `is` right for a node.
fn only(hosts: &[Host], is: impl Fn(&Host) -> bool) -> Option<usize> {
    let mut found = (0..hosts.len()).filter(|place| is(&hosts[*place]));
    match (found.next(), found.next()) {
        (Some(place), None) => Some(place),
        _ => None,
    }
}

/// The only host where the node lives by its newest epoch.
fn where_it_lives(home: Option<&Epoch>, hosts: &[Host]) -> Option<usize> {
    let home = home?;
    only(hosts, |host| {
        host.facts.machine_id == home.machine_id
            && host.data_directory() == Some(home.data_directory.as_str())
    })
}

/// The only host that is where the node came from.
fn where_it_was(node: &NodeBackup, hosts: &[Host]) -> Option<usize> {
    let is = |host: &Host| {
        let address = host.agent.address();
        let server = host.facts.server.as_ref().map(|server| server.port);
        let same_port = server.or(host.facts.pg_port) == Some(node.port);
        let same_host = host.facts.host == node.host || address.host == node.host;
        source_agent(node) == Some(address.to_string().as_str()) || (same_host && same_port)
    };
    only(hosts, is)
}

/// The nodes' newest epochs: where they live.
pub(super) async fn homes(catalog: &Catalog, nodes: &[NodeBackup]) -> Result<Vec<Option<Epoch>>> {
    let mut homes = Vec::new();
    for node in nodes {
        let home = catalog.open_epoch(node.node_id).await;
        homes.push(home.map_err(|error| Failure::from(error).on(source(node)))?);
    }
    Ok(homes)
}

/// Leaves the nodes that `--node` names; all, if it names none.
pub(super) fn chosen(nodes: Vec<NodeBackup>, args: &RestoreArgs) -> Result<Vec<NodeBackup>> {
    if args.node.is_empty() {
        return Ok(nodes);
    }
    let mut keep = vec![false; nodes.len()];
    for text in &args.node {
        keep[find(&nodes, "--node", text)?] = true;
    }
    let nodes = nodes.into_iter().zip(keep);
    Ok(nodes
        .filter_map(|(node, keep)| keep.then_some(node))
        .collect())
}

/// The place of each node's agent in `hosts`.
pub(super) fn choose(
    nodes: &[NodeBackup],
    homes: &[Option<Epoch>],
    hosts: &[Host],
    args: &RestoreArgs,
) -> Result<Vec<usize>> {
    let maps = told(nodes, "--map", &args.map)?;
    let mut places: Vec<usize> = Vec::new();
    for ((node, home), map) in nodes.iter().zip(homes).zip(&maps) {
        let lives = || where_it_lives(home.as_ref(), hosts);
        let place = match map {
            Some(address) => Some(agent(hosts, address)?),
            // Over a database only where the repository knows that this node lives.
            None if args.target_dir.is_none() => lives(),
            None => where_it_was(node, hosts).or_else(lives),
        };
        let place = place.ok_or_else(|| unmapped(node, home.as_ref(), args))?;
        let twice = places.contains(&place) && (map.is_none() || args.target_dir.is_none());
        if twice {
            return Err(unmapped(node, home.as_ref(), args));
        }
        places.push(place);
    }
    let idle = (0..hosts.len()).find(|place| !places.contains(place));
    if let Some(idle) = idle.filter(|_| args.node.is_empty()) {
        let name = hosts[idle].agent.name();
        let message = format!("the agent at {name} would get no node");
        let next = format!("leave it out of `--nodes`, or give it one: `--map NODE={name}`");
        return Err(Failure::usage(message).next(next));
    }
    Ok(places)
}

fn agent(hosts: &[Host], address: &Address) -> Result<usize> {
    let place = hosts
        .iter()
        .position(|host| host.agent.address() == address);
    place.ok_or_else(|| {
        let message = format!("`--map` names the agent {address}, which `--nodes` does not");
        Failure::usage(message)
    })
}

fn unmapped(node: &NodeBackup, home: Option<&Epoch>, args: &RestoreArgs) -> Failure {
    let (id, source) = (node.node_id, source(node));
    let where_from = match home.filter(|_| args.target_dir.is_none()) {
        Some(home) => format!(
            "node {id} ({source}) lives, in `{}` on {}:{}",
            home.data_directory, home.host, home.port
        ),
        None => format!("node {id} came from ({source})"),
    };
    let message = format!(
        "no agent of `--nodes`, or more than one, is where {where_from}, so only you know where it goes"
    );
    Failure::usage(message).next(format!(
        "add `--map {source}=HOST:PORT`, or `--map {id}=HOST:PORT`"
    ))
}
