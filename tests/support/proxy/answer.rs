//! What DistSQL does.

use std::time::Duration;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;

use super::delay::Step;
use super::distsql::DistSql;
use super::execute::{Context, Reply};
use super::instance::Instance;
use super::metadata;
use super::registry::{TableRule, take};
use super::wire::{self, Refusal};
use super::{Clock, ClusterState, Transaction, Version};

/// How long LOCK and UNLOCK wait for the internal mutex unless they say.
const USUAL_PATIENCE: u64 = 3000;

/// An answer made of texts.
pub(super) fn rows(columns: &[&str], rows: &[Vec<String>]) -> Reply {
    let row = |values: &Vec<String>| {
        let values: Vec<_> = values.iter().map(Some).collect();
        wire::row(&values)
    };
    Reply {
        columns: Some(wire::columns(columns)),
        rows: rows.iter().map(row).collect(),
        tag: format!("SELECT {}", rows.len()),
        ..Reply::default()
    }
}

/// Runs one statement.
pub(super) async fn run(context: &Context, statement: &DistSql) -> Result<Reply, Refusal> {
    let proxy = &context.proxy;
    match statement {
        DistSql::Lock { state, timeout } => lock(proxy, *state, patience(*timeout)).await,
        DistSql::Unlock { timeout } => unlock(proxy, patience(*timeout)).await,
        // Of an instance that nobody knows: nothing is written, and a proxy that is cut off says so, too.
        DistSql::Label => Ok(Reply::success()),
        DistSql::ShowComputeNodes => {
            proxy.in_touch().await;
            Ok(compute_nodes(proxy))
        }
        DistSql::ShowComputeNodeInfo => Ok(compute_node(proxy)),
        DistSql::ShowComputeNodeMode => {
            let columns = ["type", "repository", "props"];
            let props = r#"{"namespace":"stand_in","server-lists":"in this process"}"#;
            let row = ["Cluster", "ZooKeeper", props].map(str::to_owned).to_vec();
            Ok(rows(&columns, &[row]))
        }
        DistSql::ShowStorageUnits(name) => storage_units(context, name.as_deref()),
        DistSql::ShowTransactionRule => {
            let kind = match proxy.registry.shared().transaction {
                Transaction::Local => "LOCAL",
                Transaction::Xa => "XA",
            };
            let row = [kind, "Atomikos", ""].map(str::to_owned).to_vec();
            Ok(rows(&["default_type", "provider_type", "props"], &[row]))
        }
        DistSql::ShowClockRule => Ok(clock_rule(proxy)),
        DistSql::ExportMetadata => {
            let document = STANDARD.encode(metadata::export(proxy));
            Ok(exported(proxy, "cluster_info", document))
        }
        DistSql::ExportStorageNodes(name) => {
            let document = metadata::export_nodes(proxy, name.as_deref())?;
            Ok(exported(proxy, "storage_nodes", document))
        }
        DistSql::ImportMetadata(text) => {
            proxy.connected()?;
            metadata::import(proxy, text).await?;
            Ok(Reply::success())
        }
        DistSql::Refresh(name) => refresh(context, name.as_deref()).await,
        change => alter(context, change).await,
    }
}

fn patience(timeout: Option<u64>) -> Duration {
    Duration::from_millis(timeout.unwrap_or(USUAL_PATIENCE))
}

async fn lock(proxy: &Instance, state: ClusterState, patience: Duration) -> Result<Reply, Refusal> {
    let registry = &proxy.registry;
    let late = registry.faults.delay_lock.lock().expect("no panic").take();
    if let Some(late) = late {
        tokio::time::sleep(late).await;
        proxy.thawed().await;
    }
    let locked = switch(proxy, state, patience, Step::Lock, || {
        // By what this proxy knows: another one's LOCK of a moment ago is written over.
        match proxy.seen() {
            ClusterState::Ok => Ok(()),
            _ => Err(Refusal::system("Cluster is already locked.")),
        }
    });
    locked.await?;
    Ok(Reply {
        hang_up: take(&registry.faults.lose_lock_replies),
        ..Reply::success()
    })
}

async fn unlock(proxy: &Instance, patience: Duration) -> Result<Reply, Refusal> {
    let check = || match proxy.seen() {
        ClusterState::Ok => Err(Refusal::system("Cluster is not locked.")),
        _ => Ok(()),
    };
    check()?;
    if !take(&proxy.registry.faults.ignore_unlocks) {
        switch(proxy, ClusterState::Ok, patience, Step::Unlock, check).await?;
    }
    Ok(Reply::success())
}

/// Writes the state under the internal mutex; without the mutex it does nothing, and nobody is told. Where the registry is not
/// reached, it is done when it is reached again, however late: the request lies there.
async fn switch(
    proxy: &Instance,
    state: ClusterState,
    patience: Duration,
    step: Step,
    check: impl Fn() -> Result<(), Refusal>,
) -> Result<(), Refusal> {
    proxy.in_touch().await;
    let takes = proxy.delayer.of(step);
    let (before, after) = (takes.mul_f64(0.6), takes.mul_f64(0.4));
    let work = async {
        check()?;
        tokio::time::sleep(before).await;
        proxy.thawed().await;
        proxy.in_touch().await;
        proxy.registry.write(state, after);
        tokio::time::sleep(after).await;
        Ok(())
    };
    proxy
        .registry
        .exclusively(patience, work)
        .await
        .unwrap_or(Ok(()))
}

fn compute_nodes(proxy: &Instance) -> Reply {
    let mut columns = vec![
        "instance_id",
        "instance_type",
        "host",
        "port",
        "status",
        "mode_type",
        "worker_id",
        "labels",
        "version",
    ];
    if proxy.version != Version::V5_5_1 {
        columns.push("database_name");
    }
    let listed = proxy.registry.members().into_iter().map(|member| {
        let mut row = vec![
            member.id,
            "PROXY".to_owned(),
            proxy.registry.host.clone(),
            member.port.to_string(),
            "OK".to_owned(),
            "Cluster".to_owned(),
            member.worker.to_string(),
            String::new(),
            proxy.version.release().to_owned(),
            String::new(),
        ];
        row.truncate(columns.len());
        row
    });
    let listed: Vec<_> = listed.collect();
    rows(&columns, &listed)
}

fn compute_node(proxy: &Instance) -> Reply {
    let columns = [
        "instance_id",
        "host",
        "port",
        "status",
        "mode_type",
        "worker_id",
        "labels",
        "version",
    ];
    let row = [
        &proxy.id,
        &proxy.registry.host,
        &proxy.port.to_string(),
        "OK",
        "Cluster",
        &proxy.index.to_string(),
        "",
        proxy.version.release(),
    ];
    rows(&columns, &[row.map(str::to_owned).to_vec()])
}

fn storage_units(context: &Context, name: Option<&str>) -> Result<Reply, Refusal> {
    let columns = [
        "name",
        "type",
        "host",
        "port",
        "db",
        "connection_timeout_milliseconds",
        "idle_timeout_milliseconds",
        "max_lifetime_milliseconds",
        "max_pool_size",
        "min_pool_size",
        "read_only",
        "other_attributes",
    ];
    let current = context.client.database.as_deref().unwrap_or("postgres");
    let name = name.unwrap_or(current);
    let database = context.proxy.registry.database(name);
    if database.is_none() && name != "postgres" {
        let message = format!("database \"{name}\" does not exist");
        return Err(Refusal::fatal("3D000", message));
    }
    let units = database.map(|database| database.units).unwrap_or_default();
    let units: Vec<Vec<String>> = units
        .into_iter()
        .map(|(unit, node)| {
            let port = node.port.to_string();
            let first = [
                unit.as_str(),
                "PostgreSQL",
                &node.host,
                &port,
                &node.database,
            ];
            let pool = ["30000", "60000", "2100000", "50", "1", "false"];
            let others = r#"{"healthCheckProperties":{},"autoCommit":true}"#;
            let all = first.into_iter().chain(pool).chain([others]);
            all.map(str::to_owned).collect()
        })
        .collect();
    Ok(rows(&columns, &units))
}

fn clock_rule(proxy: &Instance) -> Reply {
    let (provider, enabled, props) = match proxy.registry.shared().clock {
        Clock::Off => ("local", "false", ""),
        Clock::TsoLocal => ("local", "true", ""),
        Clock::TsoRedis => ("redis", "true", r#"{"host":"127.0.0.1","port":6379}"#),
    };
    let row = ["TSO", provider, enabled, props]
        .map(str::to_owned)
        .to_vec();
    rows(&["type", "provider", "enable", "props"], &[row])
}

fn exported(proxy: &Instance, column: &str, document: String) -> Reply {
    let row = vec![proxy.id.clone(), metadata::now(), document];
    rows(&["id", "create_time", column], &[row])
}

async fn refresh(context: &Context, name: Option<&str>) -> Result<Reply, Refusal> {
    let proxy = &context.proxy;
    proxy.connected()?;
    if proxy.delayer.is_real() {
        tokio::time::sleep(Duration::from_secs(3)).await;
    }
    let current = context.client.database.as_deref().unwrap_or("postgres");
    let name = name.unwrap_or(current);
    if let Some(database) = proxy.registry.shared().databases.get_mut(name) {
        database.has_tables = true;
    }
    for instance in proxy.registry.instances() {
        instance
            .unknown_tables
            .lock()
            .expect("no panic")
            .remove(name);
    }
    Ok(Reply::success())
}

/// Rules and storage units.
async fn alter(context: &Context, change: &DistSql) -> Result<Reply, Refusal> {
    let proxy = &context.proxy;
    proxy.connected()?;
    if let DistSql::AlterTransactionRule(kind) = change {
        if proxy.delayer.is_real() {
            tokio::time::sleep(Duration::from_secs(2)).await;
        }
        proxy.registry.shared().transaction = *kind;
        return Ok(Reply::success());
    }
    let mut shared = proxy.registry.shared();
    if let DistSql::AlterClockRule(clock) = change {
        shared.clock = *clock;
        return Ok(Reply::success());
    }
    if let DistSql::SetVariable(name, value) = change {
        shared.props = metadata::with_property(&shared.props, name, value);
        return Ok(Reply::success());
    }
    let name = context.client.database.as_deref().unwrap_or("postgres");
    let database = shared.databases.get_mut(name);
    let none = || Refusal::fatal("3D000", format!("database \"{name}\" does not exist"));
    let database = database.ok_or_else(none)?;
    match change {
        DistSql::RegisterStorageUnits(units) => database.units.extend(units.iter().cloned()),
        DistSql::ShardingTableRules(rules) => {
            for (table, column, count) in rules {
                let rule = TableRule {
                    column: column.clone(),
                    sharding_count: count.clone(),
                };
                database.rules.insert(table.clone(), rule);
            }
        }
        DistSql::DropShardingTableRule(table) => drop(database.rules.remove(table)),
        _ => {}
    }
    Ok(Reply::success())
}
