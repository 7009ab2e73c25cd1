//! The agents, all at the same time: each is asked for itself, and none waits for another.

use std::sync::Arc;
use std::time::Duration;

use agent_api::{ApiError, CheckRequest, ErrorKind, Finding, NodeFacts};
use futures_util::StreamExt as _;
use futures_util::stream::FuturesOrdered;
use jiff::Timestamp;
use tokio::time::timeout;

use super::certificates;
use super::report::{Report, of_failure};
use super::store::{Store, participant};
use crate::agents::{Agent, Host};
use crate::commands::backup::nodes::{self, Choice, Told};
use crate::failure::Failure;
use crate::repo;
use crate::settings::Settings;

/// For one agent, all in all: its own deadlines are below this.
const AGENT: Duration = Duration::from_mins(4);

/// An agent that answered everything.
#[derive(Debug)]
pub(super) struct Examined {
    pub(super) host: Host,
    /// Whether its store took and gave back objects.
    pub(super) store_usable: bool,
}

/// Asks all agents, and reports each as soon as it and those before it have answered.
pub(super) async fn examine(
    agents: &[Arc<Agent>],
    settings: &Settings,
    store: &Store,
    report: &mut Report,
) -> Vec<Examined> {
    let asked = agents.iter().enumerate();
    let mut asked: FuturesOrdered<_> = asked
        .map(|(number, agent)| async move {
            let mut found = Vec::new();
            let examined = timeout(AGENT, one(agent, number, settings, store, &mut found)).await;
            let examined = examined.unwrap_or_else(|_| {
                let message = format!(
                    "it has not answered everything within {} s",
                    AGENT.as_secs()
                );
                Err(Failure::new(ErrorKind::AgentUnreachable, message))
            });
            (agent, found, examined)
        })
        .collect();
    let mut all = Vec::new();
    while let Some((agent, found, examined)) = asked.next().await {
        let name = agent.name();
        report.all(Some(&name), found);
        match examined {
            Ok(examined) => all.push(examined),
            Err(failure) => {
                report.failure(Some(&name), "agent", failure);
                report.not_checked(format!("the rest of {name}: its agent did not answer"));
            }
        }
    }
    all
}

async fn one(
    agent: &Arc<Agent>,
    number: usize,
    settings: &Settings,
    store: &Store,
    found: &mut Vec<Finding>,
) -> Result<Examined, Failure> {
    let client = agent.client();
    let before = Timestamp::now();
    let silent = settings.agent_timeout();
    let health = timeout(silent, client.health_and_certificate()).await;
    let (health, certificate) = health.unwrap_or_else(|_| {
        let message = format!(
            "no answer within {} s (`--agent-timeout`)",
            silent.as_secs()
        );
        Err(ApiError::new(ErrorKind::AgentUnreachable, message))
    })?;
    let after = Timestamp::now();
    let ours = env!("CARGO_PKG_VERSION");
    let words = format!(
        "pitr-agent {}, version {} of the API",
        health.version, health.api_version
    );
    found.push(if health.version == ours {
        Finding::fine("agent", words)
    } else {
        let mend = "install the same release of gs_pitr and pitr-agent";
        Finding::warning("agent", format!("{words}; this is gs_pitr {ours}"), mend)
    });
    found.extend(certificates::of_agent(
        certificate.as_deref(),
        &agent.address().host,
    ));
    // Its clock was read at some moment in between.
    let middle = before + after.duration_since(before) / 2;
    let apart = health.now.duration_since(middle).as_secs_f64();
    found.push(agent_api::clock("clock", "the agent's clock", apart));
    let facts = client.node().await?;
    let repository = match access(settings, store, &facts).await {
        Ok(access) => access,
        Err(failure) => {
            found.push(of_failure("store credentials", failure));
            None
        }
    };
    let request = CheckRequest {
        operation: store.operation(),
        participant: participant(number),
        repository,
    };
    let checked = client.check(&request).await.map_err(older)?;
    found.extend(checked.findings);
    Ok(Examined {
        host: Host {
            agent: Arc::clone(agent),
            facts,
        },
        store_usable: checked.store_usable,
    })
}

/// What the agent is told of the store, if that is to be asked.
async fn access(
    settings: &Settings,
    store: &Store,
    facts: &NodeFacts,
) -> Result<Option<agent_api::RepositoryAccess>, Failure> {
    if !store.is_given() {
        return Ok(None);
    }
    repo::access(settings, !facts.has_credentials)
        .await
        .map(Some)
}

/// An agent of the same API that has no check is of an older release.
fn older(error: ApiError) -> Failure {
    if error.kind == ErrorKind::NotFound {
        let message = "the agent is of an older release and cannot be checked";
        return Failure::new(ErrorKind::Incompatible, message)
            .next("install the same release of gs_pitr and pitr-agent");
    }
    error.into()
}

/// What is seen only of all nodes together, and of what the repository knows.
pub(super) async fn compare(all: &[Examined], store: &Store, report: &mut Report) {
    let hosts: Vec<Host> = all.iter().map(|examined| examined.host.clone()).collect();
    if hosts.len() > 1 {
        match nodes::no_database_twice(&hosts) {
            Ok(()) => report.fine(
                "nodes",
                format!("{} agents, each of another database", hosts.len()),
            ),
            Err(failure) => report.failure(None, "nodes", failure),
        }
    }
    let Some(catalog) = store.catalog() else {
        return;
    };
    for host in hosts.iter().filter(|host| host.facts.server.is_some()) {
        let name = host.agent.name();
        let finding = match nodes::choose(catalog, host, Told::default()).await {
            Ok(Choice::Known(node, epoch)) => {
                Finding::fine("identity", format!("node {node}, epoch {epoch}"))
            }
            Ok(Choice::Moved(node)) => Finding::fine("identity", format!("node {node}, moved")),
            Ok(Choice::New) => {
                Finding::fine("identity", "a new node: the next backup registers it")
            }
            Err(failure) => of_failure("identity", failure),
        };
        report.add(Some(&name), finding);
    }
}
