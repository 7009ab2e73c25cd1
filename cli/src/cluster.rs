//! A ShardingSphere cluster as its proxies tell of it: the proxies, the data nodes behind them, and the nodes' agents.
//!
//! Proxies are those that the operator names and those that these list. Nothing is concluded from one that cannot be
//! reached: it may be gone, or write on, cut off from all others. It is named, and left for whoever makes a
//! point to deal with: the proof is on the data nodes.

mod agents;
mod args;
mod known;
pub(crate) mod metadata;
mod nodes;
mod password;
mod proxies;

use std::collections::BTreeSet;
use std::time::Duration;

use agent_api::{ErrorKind, Secret};
use agent_sql::proxy::{Clock, ProxyConnection, ProxyOptions};
use agent_sql::{Password, SqlError};
use tokio_util::sync::CancellationToken;

pub(crate) use args::{FormerArgs, ProxyAccess, ProxyArgs};
pub(crate) use known::Known;
pub(crate) use nodes::places;
pub(crate) use password::private as private_file;
pub(crate) use proxies::Reached;

use crate::failure::{Failure, Result};
use crate::printer::Printer;
use crate::settings::Settings;
use crate::settings::values::Address;

/// For connecting to a proxy and logging in: it answers in milliseconds, or something is in the way.
pub(crate) const CONNECT: Duration = Duration::from_secs(5);
/// For a question to a proxy. It asks ZooKeeper, and may have been idle for long.
pub(crate) const ASK: Duration = Duration::from_secs(15);

/// One proxy.
#[derive(Debug, Clone)]
pub(crate) struct Proxy {
    /// Where it is reached from here.
    pub(crate) address: Address,
    /// How.
    pub(crate) options: ProxyOptions,
    /// The session, if it could be reached.
    pub(crate) connection: Option<ProxyConnection>,
    /// Why it could not.
    pub(crate) unreachable: Option<String>,
    /// Whether the operator names it.
    pub(crate) configured: bool,
    /// Whether another proxy, or it itself, lists it: one that is not listed may be cut off from the registry.
    pub(crate) listed: bool,
    /// Version of ShardingSphere, if it is listed with one.
    pub(crate) version: Option<String>,
}

/// One data node that is a primary.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct ClusterNode {
    /// Where it is, as the proxies have it; a loopback address is one of the proxy's host.
    pub(crate) listed: Address,
    /// Logical databases with a storage unit there, sorted.
    pub(crate) databases: Vec<String>,
    /// Its agent.
    pub(crate) agent: Address,
}

/// A data node that is left out, because what is in it is on its primary too.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Replica {
    /// Where it is, as the proxies have it.
    pub(crate) listed: Address,
    /// Logical databases with a storage unit there, sorted.
    pub(crate) databases: Vec<String>,
}

/// The cluster.
#[derive(Debug, Clone)]
pub(crate) struct Cluster {
    /// All proxies that are known, those that the operator names first. At least one is reached.
    pub(crate) proxies: Vec<Proxy>,
    /// Data nodes to be backed up, each with an agent of its own.
    pub(crate) nodes: Vec<ClusterNode>,
    /// Data nodes that are left out.
    pub(crate) replicas: Vec<Replica>,
    /// Where all data nodes are, as the proxies have them.
    pub(crate) listed: BTreeSet<Address>,
    /// What gives commits their numbers.
    pub(crate) clock: Clock,
}

/// What the agents have to answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Purpose {
    /// Every data node's database answers, and is the one that the proxies use.
    Backup,
    /// A database may be down: it is to be replaced.
    Restore,
}

impl Cluster {
    /// Finds proxies, data nodes and agents, and tells of what is left out or cannot be reached.
    ///
    /// # Errors
    /// If no proxy can be reached or one refuses the user; a data node without an agent, or with an agent of another
    /// database, by name; a cancellation.
    pub(crate) async fn discover(
        access: &ProxyAccess,
        purpose: Purpose,
        settings: &Settings,
        printer: &Printer,
        cancel: &CancellationToken,
    ) -> Result<Self> {
        let work = async {
            let reached = Reached::find(access, cancel).await?;
            reached.tell(printer);
            let cluster = Self::behind(reached, access, purpose, settings, printer, cancel).await?;
            cluster.tell(printer);
            Ok(cluster)
        };
        tokio::select! {
            found = work => found,
            () = cancel.cancelled() => Err(Failure::cancelled()),
        }
    }

    /// Finds data nodes and agents behind proxies that are reached.
    ///
    /// # Errors
    /// As [`Self::discover`].
    pub(crate) async fn behind(
        reached: Reached,
        access: &ProxyAccess,
        purpose: Purpose,
        settings: &Settings,
        printer: &Printer,
        cancel: &CancellationToken,
    ) -> Result<Self> {
        let work = async {
            let clock = reached.clock().await?;
            let units = reached.storage_nodes().await?;
            let listed = nodes::places(&units);
            let wanted = nodes::of_units(&units, reached.host(), access)?;
            let found = agents::matched(wanted, purpose, settings, printer, cancel).await?;
            Ok(Self {
                proxies: reached.into_proxies(),
                nodes: found.nodes,
                replicas: found.replicas,
                listed,
                clock,
            })
        };
        tokio::select! {
            found = work => found,
            () = cancel.cancelled() => Err(Failure::cancelled()),
        }
    }

    /// Tells of what is left out.
    fn tell(&self, printer: &Printer) {
        for replica in &self.replicas {
            let (node, databases) = (&replica.listed, replica.databases.join(", "));
            let message = format!(
                "data node {node} (of {databases}) is a replica and is left out: its primary has all of it"
            );
            printer.warning(None, &message);
        }
        if let Some(why) = self.clock_refused() {
            printer.warning(None, &why);
        }
    }

    /// The agents, one a data node: what `--nodes` names without a proxy.
    pub(crate) fn agents(&self) -> Vec<Address> {
        self.nodes.iter().map(|node| node.agent.clone()).collect()
    }

    /// Why the cluster's clock is not used, if it has one that is none.
    pub(crate) fn clock_refused(&self) -> Option<String> {
        clock_refused(&self.clock)
    }
}

/// Where the agents of all data nodes are, replicas' too. None is asked.
///
/// # Errors
/// If no proxy lists its nodes; of a node whose agent cannot be told.
pub(crate) async fn agents_behind(reached: &Reached, access: &ProxyAccess) -> Result<Vec<Address>> {
    let units = reached.storage_nodes().await?;
    let wanted = nodes::of_units(&units, reached.host(), access)?;
    Ok(wanted.into_iter().map(|node| node.agent).collect())
}

/// Why a clock is not used, if it is one that is none: `TSO.local` is a counter of each proxy for itself.
pub(crate) fn clock_refused(clock: &Clock) -> Option<String> {
    match clock {
        Clock::Tso { provider } if provider.eq_ignore_ascii_case("local") => Some(
            "the cluster's global clock is TSO.local, a counter of each proxy for itself: points get no CSN; use the provider `redis`".to_owned(),
        ),
        _ => None,
    }
}

/// A secret for a log-in.
fn password_of(secret: &Secret) -> Password {
    Password::new(secret.0.clone())
}

/// A proxy's refusal or silence as a failure, by name.
pub(crate) fn of_proxy(proxy: &Address, error: &SqlError) -> Failure {
    let message = format!("proxy {proxy}: {error}");
    let failure = match error {
        SqlError::Cancelled { .. } => return Failure::cancelled(),
        SqlError::WrongPassword { .. } => Failure::new(ErrorKind::Database, message).next(
            "check `--username` and the password (`GS_PITR_PROXY_PASSWORD` or `--password-file`)",
        ),
        SqlError::Refused { .. } => {
            Failure::new(ErrorKind::Database, message).next("check `--username`")
        }
        SqlError::Unreachable { .. } | SqlError::Lost { .. } => {
            Failure::new(ErrorKind::Database, message)
                .next("check `--host` and `--port`, and that the proxy runs")
        }
        SqlError::Timeout { .. } => Failure::new(ErrorKind::Timeout, message)
            .next("look at the proxy and at its ZooKeeper, then run the command again"),
        _ => Failure::new(ErrorKind::Database, message).next("look at the proxy's log"),
    };
    failure.on(proxy.to_string())
}
