//! Which node goes where: found out and checked before anything is changed.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::num::NonZeroU16;

use agent_api::ErrorKind;
use catalog::Catalog;
use catalog::ids::BackupId;
use catalog::model::{NodeBackup, NodePoint};
use catalog::repo::Restorable;
use serde_json::{Value, json};

use super::RestoreArgs;
use crate::agents::Host;
use crate::commands::backup::AGENT_FIELD;
use crate::failure::{Failure, Result};
use crate::printer::bytes;
use crate::settings::values::Address;

/// One node and its new place.
#[derive(Debug, Clone)]
pub(super) struct Step {
    /// The backup it is from.
    pub(super) backup: BackupId,
    /// The node's copy.
    pub(super) node: NodeBackup,
    /// The node's part of the point.
    pub(super) point: NodePoint,
    /// Where it goes.
    pub(super) host: Host,
    /// Its data directory there.
    pub(super) target: String,
    /// Its port there.
    pub(super) port: u16,
}

/// Source of a node as people know it.
fn source(node: &NodeBackup) -> String {
    Address {
        host: node.host.clone(),
        port: node.port,
    }
    .to_string()
}

fn source_agent(node: &NodeBackup) -> Option<&str> {
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
fn told<T: Clone>(
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

/// The only host that is where the node came from.
fn where_it_was(node: &NodeBackup, hosts: &[Host]) -> Option<usize> {
    let is = |host: &Host| {
        let address = host.agent.address();
        let server = host.facts.server.as_ref().map(|server| server.port);
        let same_port = server.or(host.facts.pg_port) == Some(node.port);
        let same_host = host.facts.host == node.host || address.host == node.host;
        source_agent(node) == Some(address.to_string().as_str()) || (same_host && same_port)
    };
    let mut found = (0..hosts.len()).filter(|place| is(&hosts[*place]));
    match (found.next(), found.next()) {
        (Some(place), None) => Some(place),
        _ => None,
    }
}

/// Finds a place for every node, and refuses what cannot work. Nothing is changed.
pub(super) fn make(found: Restorable, hosts: &[Host], args: &RestoreArgs) -> Result<Vec<Step>> {
    let (backup, nodes) = (found.manifest.backup_id, found.manifest.nodes);
    let maps = told(&nodes, "--map", &args.map)?;
    let ports = told(&nodes, "--db-port", &args.db_port)?;
    let mut places = Vec::new();
    for (node, map) in nodes.iter().zip(&maps) {
        let place = match map {
            Some(address) => Some(agent(hosts, address)?),
            None => where_it_was(node, hosts),
        };
        let place = place.ok_or_else(|| unmapped(node))?;
        if map.is_none() && places.contains(&place) {
            return Err(unmapped(node));
        }
        places.push(place);
    }
    if let Some(idle) = (0..hosts.len()).find(|place| !places.contains(place)) {
        let name = hosts[idle].agent.name();
        let message = format!("the agent at {name} would get no node");
        let next = format!("leave it out of `--nodes`, or give it one: `--map NODE={name}`");
        return Err(Failure::usage(message).next(next));
    }
    let mut points: BTreeMap<_, _> = found
        .point
        .nodes
        .into_iter()
        .map(|point| (point.node_id, point))
        .collect();
    let mut steps = Vec::new();
    for ((node, place), port) in nodes.into_iter().zip(&places).zip(ports) {
        let Some(point) = points.remove(&node.node_id) else {
            let message = format!("the point has nothing on node {}", node.node_id);
            return Err(Failure::new(ErrorKind::Damaged, message));
        };
        let host = hosts[*place].clone();
        let alone = places.iter().filter(|other| *other == place).count() == 1;
        let told = host.facts.pg_port.filter(|_| alone);
        steps.push(Step {
            backup: backup.clone(),
            port: port.map(NonZeroU16::get).or(told).unwrap_or(node.port),
            target: args
                .target_dir
                .join(node.node_id.to_string())
                .display()
                .to_string(),
            node,
            point,
            host,
        });
    }
    for (place, step) in steps.iter().enumerate() {
        check(step, &steps[..place], args)?;
    }
    Ok(steps)
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

fn unmapped(node: &NodeBackup) -> Failure {
    let (id, source) = (node.node_id, source(node));
    let message = format!(
        "no agent of `--nodes`, or more than one, is where node {id} came from ({source}), so only you know where it goes"
    );
    Failure::usage(message).next(format!(
        "add `--map {source}=HOST:PORT`, or `--map {id}=HOST:PORT`"
    ))
}

fn check(step: &Step, before: &[Step], args: &RestoreArgs) -> Result<()> {
    let name = step.host.agent.name();
    let facts = &step.host.facts;
    let major = step.node.server_version_num / 10_000;
    if !facts.installed.contains_key(&major) {
        let has: Vec<_> = facts.installed.keys().map(ToString::to_string).collect();
        let has = if has.is_empty() {
            "none".to_owned()
        } else {
            has.join(", ")
        };
        let message = format!(
            "node {} is of PostgreSQL {major}, and the agent at {name} has programs of: {has}",
            step.node.node_id
        );
        let next =
            format!("install PostgreSQL {major} there, or start the agent with its `--pg-bindir`");
        return Err(Failure::new(ErrorKind::Incompatible, message)
            .on(name)
            .next(next));
    }
    let same_port = before
        .iter()
        .find(|other| other.host.facts.machine_id == facts.machine_id && other.port == step.port);
    if let Some(other) = same_port {
        let message = format!(
            "nodes {} and {} would both listen on port {} of {}",
            other.node.node_id, step.node.node_id, step.port, facts.host
        );
        let next = format!(
            "give one of them another port: `--db-port {}=PORT`",
            step.node.node_id
        );
        return Err(Failure::usage(message).next(next));
    }
    if let Some(server) = &facts.server
        && server.port == step.port
        && !args.no_start
    {
        let message = format!(
            "port {} of {} is taken by the running database in `{}`",
            step.port, facts.host, server.data_directory
        );
        let failure = Failure::new(ErrorKind::Conflict, message).on(name);
        return Err(failure.next(format!(
            "stop that database, use `--no-start`, or choose a port: `--db-port {}=PORT`",
            step.node.node_id
        )));
    }
    Ok(())
}

/// Makes sure that the catalog will take the epochs that the restored nodes open: to find out after
/// the promotion would be too late.
pub(super) async fn check_catalog(catalog: &Catalog, steps: &[Step]) -> Result<()> {
    for step in steps {
        let (node, epoch) = (step.node.node_id, &step.point.epoch);
        let named = |failure: Failure| failure.on(source(&step.node));
        catalog
            .node(node)
            .await
            .map_err(|error| named(error.into()))?;
        let epochs = catalog
            .epochs(node)
            .await
            .map_err(|error| named(error.into()))?;
        if !epochs.iter().any(|known| known.epoch == *epoch) {
            let message = format!("epoch {epoch} of node {node} is missing in the repository");
            return Err(named(Failure::new(ErrorKind::Damaged, message)));
        }
    }
    Ok(())
}

/// The plan for people.
pub(super) fn text(steps: &[Step], args: &RestoreArgs, head: &str) -> String {
    let mut text = format!("plan: restore {head}");
    for step in steps {
        let _ = write!(
            text,
            "\n  node {} ({}, PostgreSQL {}, {})\n    to agent {} on {}: directory {}, port {}\n    recovered to {} at {}, timeline {}",
            step.node.node_id,
            source(&step.node),
            step.node.server_version_num / 10_000,
            bytes(step.node.plain_bytes),
            step.host.agent.name(),
            step.host.facts.host,
            step.target,
            step.port,
            step.point.restore_point,
            step.point.end_lsn,
            step.point.timeline,
        );
    }
    text.push_str(if args.no_start {
        "\n  promoted and left stopped; nothing else on these hosts is changed"
    } else {
        "\n  promoted and left running; nothing else on these hosts is changed"
    });
    text
}

/// The plan for machines.
pub(super) fn fields(steps: &[Step], args: &RestoreArgs) -> Value {
    let steps: Vec<_> = steps
        .iter()
        .map(|step| {
            json!({
                "node_id": step.node.node_id,
                "source": source(&step.node),
                "node": step.host.agent.name(),
                "host": step.host.facts.host,
                "data_directory": step.target,
                "port": step.port,
                "plain_bytes": step.node.plain_bytes,
                "restore_point": step.point.restore_point,
                "lsn": step.point.end_lsn,
                "timeline": step.point.timeline,
            })
        })
        .collect();
    json!({"start": !args.no_start, "nodes": steps})
}
