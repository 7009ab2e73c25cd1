//! Which registered node each agent's database is.

use agent_api::{ErrorKind, ServerFacts};
use catalog::Catalog;
use catalog::ids::EpochId;
use catalog::repo::{KnownNode, NewEpoch, NewNode, NodeIdentity, NodeMatch};
use uuid::Uuid;

use super::BackupArgs;
use crate::agents::Host;
use crate::failure::{Failure, Result};
use crate::settings::values::{Address, NodeName};
use crate::shipping::Stand;
use crate::unfinished;

/// One node of a backup, or of a point.
#[derive(Debug)]
pub(crate) struct Part {
    /// Its agent and what it says.
    pub(crate) host: Host,
    /// Its id.
    pub(crate) node: Uuid,
    /// Its open epoch.
    pub(crate) epoch: EpochId,
}

impl Part {
    /// As its point is made.
    pub(crate) fn stand(&self) -> Stand<'_> {
        Stand {
            agent: &self.host.agent,
            node: self.node,
            epoch: &self.epoch,
            lend: !self.host.facts.has_credentials,
        }
    }
}

/// What the operator says about which node is which.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Told<'a> {
    /// `--node-id`
    pub(crate) node_id: &'a [NodeName],
    /// `--new-node`
    pub(crate) new_node: &'a [Address],
}

/// What is to be done so that an agent's database is a node.
#[derive(Debug)]
pub(crate) enum Choice {
    /// It is this one, where it has lived.
    Known(Uuid, EpochId),
    /// It is this one, and lives elsewhere now.
    Moved(Uuid),
    /// It has never been seen.
    New,
}

impl Choice {
    /// Whether nothing has to be registered for it.
    pub(super) fn is_known(&self) -> bool {
        matches!(self, Self::Known(..))
    }
}

/// Refuses choices that name no agent of `--nodes`, or one twice.
pub(super) fn check_choices(args: &BackupArgs, addresses: &[Address]) -> Result<()> {
    let named = args
        .node_id
        .iter()
        .map(|choice| ("--node-id", &choice.address));
    let new = args.new_node.iter().map(|address| ("--new-node", address));
    let mut seen: Vec<&Address> = Vec::new();
    for (flag, address) in named.chain(new) {
        if !addresses.contains(address) {
            let message = format!("`{flag} {address}` is not one of the agents that are backed up");
            return Err(Failure::usage(message));
        }
        if seen.contains(&address) {
            let message = format!("`--node-id` and `--new-node` name `{address}` more than once");
            return Err(Failure::usage(message));
        }
        seen.push(address);
    }
    Ok(())
}

fn server(host: &Host) -> Result<&ServerFacts> {
    let name = host.agent.name();
    match (&host.facts.server, &host.facts.server_error) {
        (Some(server), _) => Ok(server),
        (None, Some(error)) => Err(Failure::from(error.clone()).on(name)),
        (None, None) => {
            let message = format!("the agent at {name} knows of no database");
            let failure = Failure::new(ErrorKind::Database, message).on(name);
            Err(failure.next("start the agent with `--pgdata`, and the database"))
        }
    }
}

/// Refuses what can be seen to go wrong before anything is written: no database, a standby, the same
/// database twice.
pub(crate) fn check_hosts(hosts: &[Host]) -> Result<()> {
    for host in hosts {
        let server = server(host)?;
        let name = host.agent.name();
        if server.in_recovery {
            let message = format!("the database of the agent at {name} is a standby");
            let failure = Failure::new(ErrorKind::Database, message).on(name);
            return Err(failure.next("name the agent of its primary in `--nodes`"));
        }
    }
    no_database_twice(hosts)
}

/// Refuses agents of one and the same database. Those without one are passed over.
pub(crate) fn no_database_twice(hosts: &[Host]) -> Result<()> {
    let mut seen: Vec<(&str, &str, &Host)> = Vec::new();
    for host in hosts {
        let Ok(server) = server(host) else {
            continue;
        };
        let name = host.agent.name();
        let place = (
            host.facts.machine_id.as_str(),
            server.data_directory.as_str(),
        );
        if let Some((.., other)) = seen.iter().find(|seen| (seen.0, seen.1) == place) {
            let message = format!(
                "the agents at {} and {name} are of the same database, `{}`",
                other.agent.name(),
                server.data_directory
            );
            return Err(Failure::usage(message).next("name each database once in `--nodes`"));
        }
        seen.push((place.0, place.1, host));
    }
    Ok(())
}

/// Finds out which node each host is. Nothing is written.
pub(super) async fn matched(
    catalog: &Catalog,
    hosts: &[Host],
    args: &BackupArgs,
) -> Result<Vec<Choice>> {
    let mut choices = Vec::new();
    let mut taken: Vec<(Uuid, String)> = Vec::new();
    for host in hosts {
        let name = host.agent.name();
        let said = Told {
            node_id: &args.node_id,
            new_node: &args.new_node,
        };
        let choice = choose(catalog, host, said)
            .await
            .map_err(|failure| failure.on(&*name))?;
        if let Choice::Known(node, _) | Choice::Moved(node) = &choice {
            if let Some((_, other)) = taken.iter().find(|(taken, _)| taken == node) {
                let message = format!("the agents at {other} and {name} are both node {node}");
                let next =
                    format!("tell them apart: `--new-node {name}` or `--node-id {name}=UUID`");
                return Err(Failure::new(ErrorKind::Conflict, message).next(next));
            }
            taken.push((*node, name));
        }
        choices.push(choice);
    }
    let nodes: Vec<_> = taken.into_iter().map(|(node, _)| node).collect();
    unfinished::refuse(catalog, &nodes).await?;
    Ok(choices)
}

/// Which node a host's database is. Nothing is written.
///
/// # Errors
/// If only the operator can know it, with what to say; what the catalog says.
pub(crate) async fn choose(catalog: &Catalog, host: &Host, said: Told<'_>) -> Result<Choice> {
    let server = server(host)?;
    let address = host.agent.address();
    let identity = NodeIdentity {
        system_identifier: server.system_identifier,
        machine_id: host.facts.machine_id.clone(),
        data_directory: server.data_directory.clone(),
    };
    if said.new_node.contains(address) {
        return Ok(Choice::New);
    }
    if let Some(choice) = said
        .node_id
        .iter()
        .find(|choice| choice.address == *address)
    {
        return told(catalog, choice.node, &identity).await;
    }
    match catalog.match_node(&identity).await? {
        // An older timeline than the epoch's: what was there before a restore was put back by hand. Its WAL
        // is not that of this epoch.
        NodeMatch::Known(known) if server.timeline < known.epoch.timeline => {
            Ok(Choice::Moved(known.node.node_id))
        }
        NodeMatch::Known(known) => Ok(Choice::Known(known.node.node_id, known.epoch.epoch)),
        NodeMatch::New => Ok(Choice::New),
        NodeMatch::Ambiguous(candidates) => Err(ambiguous(host, &candidates)),
    }
}

/// The operator says which node it is.
async fn told(catalog: &Catalog, node: Uuid, identity: &NodeIdentity) -> Result<Choice> {
    let registered = catalog.node(node).await?;
    if registered.system_identifier != identity.system_identifier {
        let message = format!(
            "node {node} has system identifier {}, this database {}",
            registered.system_identifier, identity.system_identifier
        );
        let next = "it is another database: use `--new-node`, or the id of its own node";
        return Err(Failure::new(ErrorKind::Conflict, message).next(next));
    }
    Ok(match catalog.open_epoch(node).await? {
        Some(epoch)
            if epoch.machine_id == identity.machine_id
                && epoch.data_directory == identity.data_directory =>
        {
            Choice::Known(node, epoch.epoch)
        }
        _ => Choice::Moved(node),
    })
}

fn ambiguous(host: &Host, candidates: &[KnownNode]) -> Failure {
    let name = host.agent.name();
    let known: Vec<_> = candidates.iter().map(ToString::to_string).collect();
    let message = format!(
        "the database of the agent at {name} has the system identifier of {}, but lives elsewhere; only you know whether it is that node, moved, or a copy of it",
        known.join(" and of ")
    );
    let id = candidates
        .first()
        .map_or_else(|| "UUID".to_owned(), |known| known.node.node_id.to_string());
    Failure::new(ErrorKind::Conflict, message).on(&*name).next(format!(
        "say `--node-id {name}={id}` if it is that node, `--new-node {name}` if it is another one"
    ))
}

/// Registers nodes and opens epochs as chosen.
pub(super) async fn registered(
    catalog: &Catalog,
    hosts: Vec<Host>,
    choices: Vec<Choice>,
    operation: Uuid,
) -> Result<Vec<Part>> {
    let mut parts = Vec::new();
    for (host, choice) in hosts.into_iter().zip(choices) {
        let server = server(&host)?;
        let node = match choice {
            Choice::Known(node, epoch) => {
                parts.push(Part { host, node, epoch });
                continue;
            }
            Choice::Moved(node) => node,
            Choice::New => {
                let new = NewNode {
                    system_identifier: server.system_identifier,
                    host: host.facts.host.clone(),
                    port: server.port,
                };
                catalog.register_node(new, operation).await?.node_id
            }
        };
        // A node that was moved by hand has no known place where its WAL left the old epoch, so its
        // new one stands for itself: a backup begins there, and none reaches across.
        let new = NewEpoch {
            node_id: node,
            parent: None,
            timeline: server.timeline,
            machine_id: host.facts.machine_id.clone(),
            data_directory: server.data_directory.clone(),
            host: host.facts.host.clone(),
            port: server.port,
        };
        let epoch = catalog.start_epoch(new, operation).await?.epoch;
        parts.push(Part { host, node, epoch });
    }
    Ok(parts)
}
