//! Each data node's agent: there, and of this node's database and no other.
//!
//! What a database is, it says itself, where it lets us in as the proxies do: its system identifier must be the one that its
//! agent tells. Where it does not (a firewall, TLS), the agent's host and the database's port are all there is to compare.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use agent_api::{ErrorKind, NodeFacts};
use agent_sql::{ConnectOptions, Identity, NodeConnection};
use futures_util::future::join_all;
use tokio_util::sync::CancellationToken;

use super::nodes::Wanted;
use super::{ClusterNode, Purpose, Replica};
use crate::agents::{self, Agent};
use crate::failure::{Failure, Result};
use crate::printer::Printer;
use crate::settings::Settings;

/// For asking a database what it is.
const IDENTITY: Duration = Duration::from_secs(3);

/// The data nodes, sorted out.
#[derive(Debug, Default)]
pub(super) struct Found {
    pub(super) nodes: Vec<ClusterNode>,
    pub(super) replicas: Vec<Replica>,
}

/// What was learned of one data node.
struct Heard {
    node: Wanted,
    /// What its agent says, or why it says nothing.
    agent: Result<NodeFacts>,
    /// What its database says of itself; `None`: it could not be asked from here.
    identity: Option<Identity>,
}

/// What a data node is.
#[derive(Debug, PartialEq, Eq)]
enum Verdict {
    Primary,
    Replica,
}

/// Asks all agents and databases at the same time.
///
/// # Errors
/// Every data node that is refused, by name; a certificate's before any is asked; a cancellation.
pub(super) async fn matched(
    wanted: Vec<Wanted>,
    purpose: Purpose,
    settings: &Settings,
    printer: &Printer,
    cancel: &CancellationToken,
) -> Result<Found> {
    let addresses: Vec<_> = wanted.iter().map(|node| node.agent.clone()).collect();
    let agents = agents::all(&addresses, settings, printer)?;
    let asked = wanted.into_iter().zip(agents);
    let heard = join_all(asked.map(|(node, agent)| hear(node, agent, cancel))).await;
    if cancel.is_cancelled() {
        return Err(Failure::cancelled());
    }
    sorted(heard, purpose)
}

async fn hear(node: Wanted, agent: Arc<Agent>, cancel: &CancellationToken) -> Heard {
    let (facts, identity) = tokio::join!(agent.first_contact(cancel), identity(&node));
    Heard {
        node,
        agent: facts,
        identity,
    }
}

/// What the database at a data node's address says of itself, to whoever logs in as the proxies do.
async fn identity(node: &Wanted) -> Option<Identity> {
    let options = ConnectOptions {
        host: node.address.host.clone(),
        port: node.address.port,
        user: node.login.user.clone(),
        database: node.login.database.clone(),
        password: node.login.password.clone(),
        connect_timeout: IDENTITY,
        statement_deadline: IDENTITY,
        ..ConnectOptions::default()
    };
    let asked = async {
        let connection = NodeConnection::connect(&options, CancellationToken::new()).await?;
        connection.identity().await
    };
    match tokio::time::timeout(IDENTITY * 2, asked).await {
        Ok(Ok(identity)) => Some(identity),
        Ok(Err(error)) => {
            tracing::info!(node = %node.listed, %error, "a data node could not be asked what it is");
            None
        }
        Err(_) => None,
    }
}

/// Sorts data nodes into primaries and replicas.
fn sorted(heard: Vec<Heard>, purpose: Purpose) -> Result<Found> {
    let (mut found, mut refused) = (Found::default(), Vec::new());
    let mut places: Vec<(String, String)> = Vec::new();
    for heard in heard {
        let verdict = match verdict(&heard, purpose) {
            Ok(verdict) => verdict,
            Err(failure) => {
                refused.push(failure);
                continue;
            }
        };
        let Wanted {
            listed,
            databases,
            agent,
            ..
        } = heard.node;
        let databases: Vec<String> = databases.into_iter().collect();
        if verdict == Verdict::Replica {
            found.replicas.push(Replica { listed, databases });
            continue;
        }
        // A database that two storage units spell in two ways is one node.
        let place = heard.agent.ok().and_then(place_of);
        let twice = place.as_ref().and_then(|place| {
            let at = places.iter().position(|seen| seen == place)?;
            found.nodes.get_mut(at)
        });
        if let Some(first) = twice {
            let all: BTreeSet<String> = first.databases.drain(..).chain(databases).collect();
            first.databases = all.into_iter().collect();
            continue;
        }
        places.push(place.unwrap_or_else(|| (agent.to_string(), String::new())));
        found.nodes.push(ClusterNode {
            listed,
            databases,
            agent,
        });
    }
    if let Some(failure) = all_of(refused) {
        return Err(failure);
    }
    if found.nodes.is_empty() {
        let message = "every data node of the cluster is a replica: there is no primary to back up";
        return Err(Failure::new(ErrorKind::Database, message)
            .next("register the primaries' storage units, or promote one"));
    }
    Ok(found)
}

/// Where an agent's database is.
fn place_of(facts: NodeFacts) -> Option<(String, String)> {
    let directory = facts.server.map(|server| server.data_directory);
    Some((facts.machine_id, directory.or(facts.pgdata)?))
}

/// One failure of several, which names all.
fn all_of(mut refused: Vec<Failure>) -> Option<Failure> {
    if refused.is_empty() {
        return None;
    }
    let mut first = refused.remove(0);
    for other in &refused {
        first.message = format!("{}; {}", first.message, other.message);
    }
    Some(first)
}

/// What a data node is, or why it is refused.
fn verdict(heard: &Heard, purpose: Purpose) -> Result<Verdict> {
    let node = &heard.node;
    let (listed, agent) = (&node.listed, &node.agent);
    let standby = heard.identity.as_ref().is_some_and(|it| it.in_recovery);
    let facts = match &heard.agent {
        Ok(facts) => facts,
        Err(_) if standby => return Ok(Verdict::Replica),
        Err(failure) => return Err(without_agent(node, failure)),
    };
    let refuse =
        |kind: ErrorKind, message: String| Failure::new(kind, message).on(listed.to_string());
    let elsewhere = format!("say where its agent is: `--agents {listed}=HOST:PORT`");
    let Some(server) = &facts.server else {
        return match purpose {
            Purpose::Restore if facts.pg_port.is_none_or(|port| port == node.address.port) => {
                Ok(Verdict::Primary)
            }
            Purpose::Restore => {
                let port = facts.pg_port.unwrap_or_default();
                let message = format!(
                    "the agent at {agent} is of a database on port {port}, and data node {listed} is another"
                );
                Err(refuse(ErrorKind::Usage, message).next(elsewhere))
            }
            Purpose::Backup => Err(without_database(node, facts)),
        };
    };
    if let Some(identity) = &heard.identity
        && identity.system_identifier != server.system_identifier
    {
        let message = format!(
            "the agent at {agent} is of a database with system identifier {}, and data node {listed} has {}: it is another database",
            server.system_identifier, identity.system_identifier
        );
        return Err(refuse(ErrorKind::Conflict, message).next(elsewhere));
    }
    // Behind a port that is forwarded it has another one: then somebody has to say so, and the identifier has to agree.
    let vouched = node.told && heard.identity.is_some();
    if server.port != node.address.port && !vouched {
        let message = format!(
            "the agent at {agent} is of the database on port {}, and data node {listed} is another",
            server.port
        );
        return Err(refuse(ErrorKind::Conflict, message).next(elsewhere));
    }
    if server.in_recovery || standby {
        return Ok(Verdict::Replica);
    }
    Ok(Verdict::Primary)
}

fn without_agent(node: &Wanted, failure: &Failure) -> Failure {
    let (listed, agent) = (&node.listed, &node.agent);
    if failure.kind == ErrorKind::Cancelled {
        return failure.clone();
    }
    let message = format!(
        "data node {listed} has no agent that answers at {agent}: {}",
        failure.message
    );
    let next = match failure.kind {
        ErrorKind::AgentUnreachable => format!(
            "start pitr-agent beside it, or say where its agent is: `--agents {listed}=HOST:PORT`, or `--agent-port PORT` for all"
        ),
        _ => failure.next.clone().unwrap_or_default(),
    };
    Failure::new(failure.kind, message)
        .on(listed.to_string())
        .next(next)
}

fn without_database(node: &Wanted, facts: &NodeFacts) -> Failure {
    let (listed, agent) = (&node.listed, &node.agent);
    let why = facts.server_error.as_ref();
    let words = why.map_or("it was told of none", |error| error.message.as_str());
    let kind = why.map_or(ErrorKind::Database, |error| error.kind);
    let message = format!("the agent at {agent} of data node {listed} has no database: {words}");
    let next = why.and_then(|error| error.next.clone());
    let next = next.unwrap_or_else(|| "start the agent with `--pgdata`, and the database".into());
    Failure::new(kind, message)
        .on(listed.to_string())
        .next(next)
}

#[cfg(test)]
mod tests;
