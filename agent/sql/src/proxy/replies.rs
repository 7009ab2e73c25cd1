//! What a proxy tells of its cluster.

use std::fmt;
use std::time::Duration;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use serde::Deserialize;
use serde_json::Value;

use super::ProxyConnection;
use crate::connect::Password;
use crate::error::SqlError;
use crate::session::only;
use crate::text::Row;

/// A row of SHOW COMPUTE NODES.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ComputeNode {
    /// Its id in the cluster.
    pub instance_id: String,
    /// `PROXY`, or `JDBC`: a program with ShardingSphere in it, which no lock stops.
    pub kind: String,
    /// Address of its interface, as it sees it itself, even where it listens elsewhere.
    pub host: String,
    /// Port; 0: it has none.
    pub port: u16,
    /// `OK` or `CIRCUIT_BREAK`; says nothing of the lock. A dead one stays `OK` for 40 s.
    pub status: String,
    /// `Cluster` or `Standalone`.
    pub mode: String,
    /// Release; empty if it is not told.
    pub version: String,
}

/// What EXPORT METADATA said: passwords of databases and of the proxy's users are in it.
#[derive(Clone, PartialEq, Eq)]
pub struct ExportedMetadata {
    /// The document, decoded.
    pub json: String,
}

impl fmt::Debug for ExportedMetadata {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "ExportedMetadata({} bytes)", self.json.len())
    }
}

impl ExportedMetadata {
    /// The clock's number, if the cluster has a clock. Not unique: it repeats, and starts again with a new clock.
    #[must_use]
    pub fn csn(&self) -> Option<String> {
        let document: Value = serde_json::from_str(&self.json).ok()?;
        match document.get("snapshot_info")?.get("csn")? {
            Value::String(text) if !text.is_empty() => Some(text.clone()),
            Value::Number(number) => Some(number.to_string()),
            _ => None,
        }
    }
}

/// A data node, as EXPORT STORAGE NODES has it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StorageNode {
    /// Logical database that it belongs to; empty if that is not told.
    pub logical_database: String,
    /// Host, as the proxy reaches it.
    pub host: String,
    /// Port.
    pub port: u16,
    /// User, of the first of its storage units.
    pub user: String,
    /// Its password, for asking the node what it is.
    pub password: Option<Password>,
    /// Database on the node, of the first of its storage units.
    pub database: String,
    /// Remark; empty: none.
    pub remark: String,
}

/// A row of SHOW STORAGE UNITS.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StorageUnit {
    /// Its name.
    pub name: String,
    /// `PostgreSQL`, `openGauss`, ...
    pub kind: String,
    /// Host, as the proxy reaches it.
    pub host: String,
    /// Port.
    pub port: u16,
    /// Database on the node.
    pub database: String,
}

/// Where the cluster's CSN comes from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Clock {
    /// There is none.
    Off,
    /// A time-stamp oracle.
    Tso {
        /// `redis`: one for all. `local`: each proxy counts for itself, and its number is worth nothing.
        provider: String,
    },
    /// The proxy does not say, or names a kind that is not known.
    Unknown,
}

impl ProxyConnection {
    /// `SHOW COMPUTE NODES`: the instances of the cluster that ZooKeeper knows.
    ///
    /// # Errors
    /// Those of a call.
    pub async fn compute_nodes(&self, deadline: Duration) -> Result<Vec<ComputeNode>, SqlError> {
        let rows = self.ask("SHOW COMPUTE NODES", "SHOW COMPUTE NODES", deadline);
        rows.await?.iter().map(compute_node).collect()
    }

    /// `EXPORT METADATA`.
    ///
    /// # Errors
    /// Those of a call.
    pub async fn export_metadata(&self, deadline: Duration) -> Result<ExportedMetadata, SqlError> {
        let what = "EXPORT METADATA";
        let row = only(what, self.ask(what, what, deadline).await?)?;
        let text = row.text(2)?.trim();
        // In clear before 5.4.
        if text.starts_with('{') {
            let json = text.to_owned();
            return Ok(ExportedMetadata { json });
        }
        let json = STANDARD
            .decode(text)
            .ok()
            .and_then(|bytes| String::from_utf8(bytes).ok())
            .filter(|json| json.trim_start().starts_with('{'));
        json.map(|json| ExportedMetadata { json })
            .ok_or_else(|| SqlError::Answer {
                what,
                // Never the text itself: passwords are in it.
                answer: format!("{} bytes that are neither JSON nor its base64", text.len()),
            })
    }

    /// `EXPORT STORAGE NODES`: the data nodes of all logical databases, each once a database.
    ///
    /// # Errors
    /// Those of a call.
    pub async fn export_storage_nodes(
        &self,
        deadline: Duration,
    ) -> Result<Vec<StorageNode>, SqlError> {
        let what = "EXPORT STORAGE NODES";
        let row = only(what, self.ask(what, what, deadline).await?)?;
        storage_nodes(what, row.text(2)?)
    }

    /// `SHOW STORAGE UNITS` of a logical database.
    ///
    /// # Errors
    /// Those of a call; [`SqlError::BadName`] for a name that cannot be quoted.
    pub async fn storage_units(
        &self,
        logical_database: &str,
        deadline: Duration,
    ) -> Result<Vec<StorageUnit>, SqlError> {
        let what = "SHOW STORAGE UNITS";
        let sql = format!("{what} FROM {}", quoted(logical_database)?);
        let rows = self.ask(what, &sql, deadline).await?;
        let unit = |row: &Row| {
            Ok(StorageUnit {
                name: row.text(0)?.to_owned(),
                kind: text(row, 1)?,
                host: text(row, 2)?,
                port: row.value(3)?,
                database: text(row, 4)?,
            })
        };
        rows.iter().map(unit).collect()
    }

    /// `SHOW GLOBAL CLOCK RULE`.
    ///
    /// # Errors
    /// Those of a call. A proxy that does not know the statement is [`Clock::Unknown`].
    pub async fn clock(&self, deadline: Duration) -> Result<Clock, SqlError> {
        let what = "SHOW GLOBAL CLOCK RULE";
        let rows = match self.ask(what, what, deadline).await {
            Err(SqlError::Server { .. }) => return Ok(Clock::Unknown),
            rows => rows?,
        };
        let Some(row) = rows.first() else {
            return Ok(Clock::Unknown);
        };
        let (kind, provider, enabled) = (text(row, 0)?, text(row, 1)?, text(row, 2)?);
        Ok(match enabled.as_str() {
            "false" => Clock::Off,
            "true" if kind.eq_ignore_ascii_case("TSO") => Clock::Tso { provider },
            _ => Clock::Unknown,
        })
    }
}

/// A logical database's name: the grammar takes backquotes, and has no way to write one inside.
fn quoted(name: &str) -> Result<String, SqlError> {
    if name.is_empty() || name.contains(|c: char| c == '`' || c.is_control()) {
        return Err(SqlError::BadName {
            what: "logical database",
            value: name.to_owned(),
            reason: "it is empty, or has a backquote or control characters",
        });
    }
    Ok(format!("`{name}`"))
}

/// Column `at`; empty if it is NULL or not there.
fn text(row: &Row, at: usize) -> Result<String, SqlError> {
    if at >= row.row.len() {
        return Ok(String::new());
    }
    Ok(row.optional(at)?.unwrap_or_default().to_owned())
}

fn compute_node(row: &Row) -> Result<ComputeNode, SqlError> {
    Ok(ComputeNode {
        instance_id: row.text(0)?.to_owned(),
        kind: text(row, 1)?,
        host: row.text(2)?.to_owned(),
        // -1: an instance inside a program has none.
        port: row.text(3)?.parse().unwrap_or(0),
        status: text(row, 4)?,
        mode: text(row, 5)?,
        version: text(row, 8)?,
    })
}

/// A node as it is exported. Fields that are not told are empty.
#[derive(Deserialize)]
struct Exported {
    ip: String,
    port: Value,
    #[serde(default)]
    username: Option<String>,
    #[serde(default)]
    password: Option<String>,
    #[serde(default)]
    database: Option<String>,
    #[serde(default)]
    remark: Option<String>,
}

/// Reads `{"storage_nodes": {DATABASE: [NODE, ..], ..}}`, and the older list without databases.
fn storage_nodes(what: &'static str, json: &str) -> Result<Vec<StorageNode>, SqlError> {
    // What serde says of a wrong type may show a value, and passwords are among them.
    let bad = |answer: String| SqlError::Answer { what, answer };
    let mut document: Value = serde_json::from_str(json)
        .map_err(|_| bad(format!("{} bytes that are no JSON", json.len())))?;
    let by_database = match document.get_mut("storage_nodes").map(Value::take) {
        Some(Value::Object(databases)) => databases.into_iter().collect(),
        Some(list @ Value::Array(_)) => vec![(String::new(), list)],
        _ => return Err(bad("JSON without `storage_nodes`".to_owned())),
    };
    let mut nodes = Vec::new();
    for (logical_database, list) in by_database {
        let list: Vec<Exported> = serde_json::from_value(list).map_err(|_| {
            bad(format!(
                "the nodes of database {logical_database:?} are not told as they should be"
            ))
        })?;
        for node in list {
            let port = match &node.port {
                Value::String(text) => text.trim().parse().ok(),
                Value::Number(number) => number.as_u64().and_then(|it| u16::try_from(it).ok()),
                _ => None,
            };
            let port = port.ok_or_else(|| bad(format!("node {} has no port", node.ip)))?;
            nodes.push(StorageNode {
                logical_database: logical_database.clone(),
                host: node.ip,
                port,
                user: node.username.unwrap_or_default(),
                password: node.password.map(Password::new),
                database: node.database.unwrap_or_default(),
                remark: node.remark.unwrap_or_default(),
            });
        }
    }
    Ok(nodes)
}
