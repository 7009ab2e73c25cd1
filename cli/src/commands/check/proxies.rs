//! The proxies, and what they say of the data nodes.

use std::result::Result as StdResult;

use agent_api::{ErrorKind, Finding};
use agent_sql::SqlError;
use agent_sql::proxy::{Clock, Gate};
use futures_util::future::join_all;
use tokio_util::sync::CancellationToken;

use super::report::{Report, of_failure};
use crate::cluster::{self, ASK, Cluster, Proxy, ProxyAccess, Purpose, Reached};
use crate::failure::Failure;
use crate::printer::Printer;
use crate::settings::Settings;
use crate::settings::values::Address;

/// Examines them; the agents of the data nodes, as far as all have one.
pub(super) async fn examine(
    access: &ProxyAccess,
    settings: &Settings,
    printer: &Printer,
    report: &mut Report,
    cancel: &CancellationToken,
) -> Vec<Address> {
    let reached = match Reached::find(access, cancel).await {
        Ok(reached) => reached,
        Err(failure) => {
            let node = failure.node.clone();
            report.failure(node.as_deref(), "proxy", failure);
            report.not_checked("the data nodes: no proxy says which there are");
            return Vec::new();
        }
    };
    let asked = reached.connected().map(|(proxy, connection)| async move {
        let gate = connection.probe(ASK).await;
        (
            proxy,
            connection.export_metadata(ASK).await.map(|_| ()),
            gate,
        )
    });
    for (proxy, exported, gate) in join_all(asked).await {
        let name = proxy.address.to_string();
        report.add(Some(&name), logged_in(proxy));
        report.add(Some(&name), privileges(&proxy.address, exported));
        report.add(Some(&name), state(&proxy.address, gate));
    }
    for (proxy, message) in reached.oddities() {
        let mend = "a point is made all the same: the proof is on the data nodes; but see to it";
        report.add(proxy.as_deref(), Finding::warning("proxy", message, mend));
    }
    report.add(None, clock(&reached).await);
    let cluster = Cluster::behind(reached, access, Purpose::Backup, settings, printer, cancel);
    match cluster.await {
        Ok(cluster) => {
            let message = format!(
                "{} data nodes, each with its agent; {} replicas are left out",
                cluster.nodes.len(),
                cluster.replicas.len()
            );
            report.fine("data nodes", message);
            cluster.agents()
        }
        Err(failure) => {
            let node = failure.node.clone();
            report.failure(node.as_deref(), "data nodes", failure);
            report.not_checked("the agents: not every data node has one that is its own");
            Vec::new()
        }
    }
}

fn logged_in(proxy: &Proxy) -> Finding {
    let version = proxy.version.as_deref();
    let version = version.map_or_else(
        || "a version that it does not tell".to_owned(),
        |version| format!("version {version}"),
    );
    Finding::fine("log-in", format!("ShardingSphere-Proxy, {version}"))
}

/// What makes a point has to export and to lock.
fn privileges(address: &Address, exported: StdResult<(), SqlError>) -> Finding {
    match exported {
        Ok(()) => Finding::fine("privileges", "it exports metadata and storage nodes"),
        Err(error) => of_failure("privileges", cluster::of_proxy(address, &error)),
    }
}

/// The probe is a statement of the kind that a lock refuses, so it shows that the user may give such ones, too.
fn state(address: &Address, gate: StdResult<Gate, SqlError>) -> Finding {
    match gate {
        Ok(Gate::Open) => Finding::fine("state", "open: it takes writes and administration"),
        Ok(Gate::Locked(words)) => {
            let message = format!("locked, it refuses writes: {words}");
            let failure = Failure::new(ErrorKind::Conflict, message);
            of_failure(
                "state",
                failure.next("if no backup or point is being made: gs_pitr unlock"),
            )
        }
        Err(error) => of_failure("state", cluster::of_proxy(address, &error)),
    }
}

async fn clock(reached: &Reached) -> Finding {
    let clock = match reached.clock().await {
        Ok(clock) => clock,
        Err(failure) => return of_failure("global clock", failure),
    };
    if let Some(why) = cluster::clock_refused(&clock) {
        return Finding::warning(
            "global clock",
            why,
            "ALTER GLOBAL CLOCK RULE, provider `redis`",
        );
    }
    match clock {
        Clock::Tso { provider } => Finding::fine(
            "global clock",
            format!("TSO.{provider}: points get its CSN"),
        ),
        Clock::Off => Finding::fine("global clock", "none: points get no CSN"),
        Clock::Unknown => Finding::fine("global clock", "not told: points get no CSN"),
    }
}
