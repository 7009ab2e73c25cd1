//! EXPORT and IMPORT of the cluster's metadata.

use std::fmt::Write as _;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Instant;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use serde::Serialize;
use serde_json::{Value, json};

use super::distsql;
use super::instance::Instance;
use super::node::Pool;
use super::registry::{Database, TableRule};
use super::wire::Refusal;
use super::yaml::{self, Entry};
use super::{Clock, ClusterState, DataNode, Transaction};

/// Without this property every database that is imported is taken for one of `MySQL`.
const PROTOCOL: &str = "  proxy-frontend-database-protocol-type: ";

/// A time as Java's `LocalDateTime` writes it.
pub(super) fn now() -> String {
    jiff::Zoned::now().datetime().to_string()
}

/// The document of EXPORT METADATA, before base64.
pub(super) fn export(proxy: &Instance) -> String {
    let shared = proxy.registry.shared();
    let databases: serde_json::Map<String, Value> = shared
        .databases
        .iter()
        .filter(|(_, database)| !database.units.is_empty())
        .map(|(name, database)| {
            let yaml = database_yaml(name, database, proxy.index > 0, proxy.again);
            (name.clone(), yaml.into())
        })
        .collect();
    let mut users = String::new();
    for (name, password) in &shared.users {
        let _ = write!(
            users,
            "  - admin: true\n    password: {password}\n    user: {name}@%\n"
        );
    }
    let kind = match shared.transaction {
        Transaction::Local => "LOCAL",
        Transaction::Xa => "XA",
    };
    let (provider, enabled) = match shared.clock {
        Clock::Off => ("local", false),
        Clock::TsoLocal => ("local", true),
        Clock::TsoRedis => ("redis", true),
    };
    let rules = format!(
        "rules:\n- !AUTHORITY\n  privilege:\n    type: ALL_PERMITTED\n  users:\n{users}- !TRANSACTION\n  defaultType: {kind}\n  \
         providerType: Atomikos\n- !GLOBAL_CLOCK\n  enabled: {enabled}\n  provider: {provider}\n  type: TSO\n- !LOGGING {{}}\n"
    );
    let mut document = json!({
        "meta_data": { "databases": databases, "props": shared.props, "rules": rules }
    });
    let csn = match shared.clock {
        Clock::Off => None,
        Clock::TsoRedis => Some(&proxy.registry.csn),
        Clock::TsoLocal => Some(&proxy.csn),
    };
    if let Some(csn) = csn {
        let csn = csn.load(Ordering::Relaxed).to_string();
        let time = jiff::Zoned::now().strftime("%Y-%m-%d %H:%M:%S").to_string();
        document["snapshot_info"] = json!({ "csn": csn, "create_time": time });
    }
    document.to_string()
}

/// As it is, passwords unquoted. `backwards`: two real proxies had units and tables in different orders, the same every time.
fn database_yaml(name: &str, database: &Database, backwards: bool, again: bool) -> String {
    let mut units: Vec<_> = database.units.iter().collect();
    let mut rules: Vec<_> = database.rules.iter().collect();
    if backwards {
        units.reverse();
        rules.reverse();
    }
    let mut text = format!("databaseName: {name}\ndataSources:\n");
    for (unit, node) in units {
        let DataNode {
            host,
            port,
            database,
            user,
            password,
        } = node;
        let _ = write!(
            text,
            "  {unit}:\n    password: {password}\n    url: jdbc:postgresql://{host}:{port}/{database}\n    username: {user}\n"
        );
        if again {
            text.push_str("    readOnly: false\n");
        }
    }
    if rules.is_empty() {
        return text;
    }
    let units: Vec<_> = database.units.keys().map(String::as_str).collect();
    text.push_str("rules:\n- !SHARDING\n  autoTables:\n");
    for (table, rule) in &rules {
        let _ = write!(
            text,
            "    {table}:\n      actualDataSources: {}\n      logicTable: {table}\n      shardingStrategy:\n        standard:\n          \
             shardingAlgorithmName: {table}_mod\n          shardingColumn: {}\n",
            units.join(","),
            rule.column
        );
    }
    text.push_str("  shardingAlgorithms:\n");
    for (table, rule) in &rules {
        let count = &rule.sharding_count;
        let _ = write!(
            text,
            "    {table}_mod:\n      props:\n        sharding-count: '{count}'\n      type: mod\n"
        );
    }
    text
}

/// One of `EXPORT STORAGE NODES`.
#[derive(Debug, Serialize)]
struct StorageNode<'a> {
    ip: &'a str,
    port: String,
    username: &'a str,
    password: &'a str,
    database: &'a str,
}

/// The document of EXPORT STORAGE NODES: the first unit of each address.
pub(super) fn export_nodes(proxy: &Instance, only: Option<&str>) -> Result<String, Refusal> {
    let shared = proxy.registry.shared();
    if let Some(name) = only
        && !shared.databases.contains_key(name)
    {
        let cause = "java.lang.IllegalArgumentException: database";
        return Err(Refusal::unknown(&format!("{cause} {name} is not existed")));
    }
    let mut all = serde_json::Map::new();
    for (name, database) in &shared.databases {
        if only.is_some_and(|only| only != name) || database.units.is_empty() {
            continue;
        }
        let mut nodes: Vec<StorageNode<'_>> = Vec::new();
        for node in database.units.values() {
            let port = node.port.to_string();
            if nodes
                .iter()
                .any(|known| known.ip == node.host && known.port == port)
            {
                continue;
            }
            nodes.push(StorageNode {
                ip: &node.host,
                port,
                username: &node.user,
                password: &node.password,
                database: &node.database,
            });
        }
        let nodes = serde_json::to_value(nodes).map_err(|e| Refusal::unknown(&e.to_string()))?;
        all.insert(name.clone(), nodes);
    }
    Ok(json!({ "storage_nodes": all }).to_string())
}

/// IMPORT METADATA.
pub(super) async fn import(proxy: &Arc<Instance>, text: &str) -> Result<(), Refusal> {
    let syntax = |cause: String| {
        Refusal::unknown(&format!(
            "com.fasterxml.jackson.core.JsonParseException: {cause}"
        ))
    };
    let document = STANDARD.decode(text).map_err(|e| syntax(e.to_string()))?;
    let document: Value = serde_json::from_slice(&document).map_err(|e| syntax(e.to_string()))?;
    let Some(metadata) = document.get("meta_data").and_then(Value::as_object) else {
        let cause = "Cannot invoke \"ExportedMetaData.getDatabases()\" because \"exportedMetaData\" is null";
        return Err(Refusal::unknown(&format!(
            "java.lang.NullPointerException: {cause}"
        )));
    };
    let yaml = |text: &str| {
        let damaged = |cause| {
            Refusal::unknown(&format!(
                "org.yaml.snakeyaml.scanner.ScannerException: {cause}"
            ))
        };
        yaml::flatten(text).map_err(damaged)
    };
    let mut databases = Vec::new();
    let exported = metadata.get("databases").and_then(Value::as_object);
    for text in exported
        .into_iter()
        .flatten()
        .filter_map(|(_, text)| text.as_str())
    {
        databases.push(yaml(text)?);
    }
    let rules = metadata.get("rules").and_then(Value::as_str).unwrap_or("");
    let rules = yaml(rules)?;
    // What is of the whole cluster comes first, its users among it, whatever becomes of the databases. Its properties are replaced by those of
    // the document, even if there are none.
    overwrite_users(proxy, &rules);
    let props = yaml(metadata.get("props").and_then(Value::as_str).unwrap_or(""))?;
    proxy.registry.shared().props = written(&props);
    for database in &databases {
        import_database(proxy, database).await?;
    }
    Ok(())
}

/// Properties as EXPORT writes them.
fn written(props: &[Entry]) -> String {
    let lines = props
        .iter()
        .filter_map(|(keys, value)| match keys.as_slice() {
            [props, key] if props == "props" => Some(format!("  {key}: {value}\n")),
            _ => None,
        });
    let lines: String = lines.collect();
    if lines.is_empty() {
        return lines;
    }
    format!("props:\n{lines}")
}

/// `props` with another value of one of them.
pub(super) fn with_property(props: &str, name: &str, value: &str) -> String {
    let own = format!("  {name}: ");
    let others = props
        .lines()
        .filter(|line| line.starts_with(' ') && !line.starts_with(&own));
    let mut text = "props:\n".to_owned();
    for line in others {
        text.push_str(line);
        text.push('\n');
    }
    let _ = writeln!(text, "{own}{value}");
    text
}

fn overwrite_users(proxy: &Instance, rules: &[Entry]) {
    let users = rules.iter().filter_map(|(keys, user)| {
        let (last, above) = keys.split_last()?;
        if last != "user" || keys.first()? != "rules" {
            return None;
        }
        let password = rules.iter().find(|(keys, _)| {
            keys.split_last()
                .is_some_and(|(l, a)| l == "password" && a == above)
        })?;
        let name = user.split('@').next()?.to_owned();
        Some((name, password.1.clone()))
    });
    let mut shared = proxy.registry.shared();
    users.for_each(|(name, password)| {
        shared.users.insert(name, password);
    });
}

/// What a database's YAML says.
fn read_database(entries: &[Entry]) -> (Option<String>, Database) {
    let get = |path: &[&str]| {
        let found = entries.iter().find(|(keys, _)| keys == path);
        found.map(|(_, value)| value.clone())
    };
    let mut database = Database::new(Instant::now());
    database.has_tables = false;
    for (keys, value) in entries {
        let keys: Vec<&str> = keys.iter().map(String::as_str).collect();
        match keys.as_slice() {
            ["dataSources", unit, "url"] => {
                let Some((host, port, name)) = distsql::address(value) else {
                    continue;
                };
                let of = |key| get(&["dataSources", unit, key]).unwrap_or_default();
                let node = DataNode {
                    host,
                    port,
                    user: of("username"),
                    password: of("password"),
                    database: name,
                };
                database.units.insert((*unit).to_owned(), node);
            }
            [
                "rules",
                "!SHARDING",
                "autoTables",
                table,
                ..,
                "shardingColumn",
            ] => {
                let algorithm = format!("{table}_mod");
                let count = [
                    "rules",
                    "!SHARDING",
                    "shardingAlgorithms",
                    &algorithm,
                    "props",
                    "sharding-count",
                ];
                let rule = TableRule {
                    column: value.clone(),
                    sharding_count: get(&count).unwrap_or_else(|| "2".to_owned()),
                };
                database.rules.insert((*table).to_owned(), rule);
            }
            _ => {}
        }
    }
    (get(&["databaseName"]), database)
}

async fn import_database(proxy: &Arc<Instance>, entries: &[Entry]) -> Result<(), Refusal> {
    let (name, database) = read_database(entries);
    let name = name.ok_or_else(|| Refusal::new("3D000", "Database is required."))?;
    if proxy.registry.database(&name).is_some() {
        let message = format!("Database '{name}' already exists");
        return Err(Refusal::fatal("42P04", message));
    }
    if database.units.is_empty() {
        let message = format!("There is no storage unit in database '{name}'.");
        return Err(Refusal::new("42S02", message));
    }
    if !proxy.registry.shared().props.contains(PROTOCOL) {
        // It has made a database of MySQL, and looks for PostgreSQL's schemas.
        let empty = Database::new(Instant::now());
        proxy.registry.shared().databases.insert(name, empty);
        let cause = "java.lang.NullPointerException: Cannot invoke \
                     \"org.apache.shardingsphere.infra.metadata.database.schema.model.ShardingSphereSchema.getTable(String)\" \
                     because the return value of \
                     \"org.apache.shardingsphere.infra.metadata.database.ShardingSphereDatabase.getSchema(String)\" is null";
        return Err(Refusal::unknown(cause));
    }
    if fails(proxy, &name) {
        // It has made the database, and does not find it.
        let empty = Database::new(Instant::now());
        proxy.registry.shared().databases.insert(name, empty);
        let cause = "java.lang.NullPointerException: Cannot invoke \
                     \"org.apache.shardingsphere.infra.metadata.database.ShardingSphereDatabase.getResourceMetaData()\" \
                     because the return value of \
                     \"org.apache.shardingsphere.infra.metadata.ShardingSphereMetaData.getDatabase(String)\" is null";
        return Err(Refusal::unknown(cause));
    }
    for (unit, node) in &database.units {
        if let Err(refusal) = Pool::new(node.clone(), 1).take().await {
            let cause = refusal.message;
            let message = format!(
                "Storage units validate error, messages are: Storage unit name: '{unit}', error message is: Invalid data source `{unit}`, \
                 error message is: {cause}."
            );
            return Err(Refusal::new("08000", message));
        }
    }
    proxy
        .registry
        .shared()
        .databases
        .insert(name.clone(), database);
    for instance in proxy.registry.instances() {
        instance
            .closed_pools
            .lock()
            .expect("no panic")
            .remove(&name);
    }
    Ok(())
}

/// Whether it fails, as it often does after a DROP, and always did while everything was locked.
fn fails(proxy: &Instance, name: &str) -> bool {
    if proxy.seen() == ClusterState::Unavailable {
        return true;
    }
    let mut shared = proxy.registry.shared();
    match shared.failing_imports.get_mut(name) {
        Some(0) | None => {
            shared.failing_imports.remove(name);
            false
        }
        Some(left) => {
            *left -= 1;
            true
        }
    }
}
