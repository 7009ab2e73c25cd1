//! Which tables a proxy knows. The real one reads them when it starts and learns of what is made through it; this one
//! also looks again when it is asked for another one.

use std::collections::{HashMap, HashSet};
use std::sync::{Arc, Mutex};

use super::DataNode;
use super::instance::Instance;
use super::route;
use super::statement::{Class, Statement};
use super::wire::{Body, Refusal};

/// Names by the first node of their logical database.
#[derive(Debug, Default)]
pub(super) struct Tables {
    known: Mutex<HashMap<DataNode, HashSet<String>>>,
}

impl Tables {
    fn knows(&self, node: &DataNode, table: &str) -> bool {
        let known = self.known.lock().expect("no panic");
        known.get(node).is_some_and(|tables| tables.contains(table))
    }
}

/// What is said of a table that is not known.
fn unknown(table: &str) -> Refusal {
    Refusal::new("42S02", format!("Table or view '{table}' does not exist."))
}

/// Refuses a statement about rows of a table that is not there, before any node hears of it.
pub(super) async fn check(
    proxy: &Arc<Instance>,
    statement: &Statement,
    database: &str,
) -> Result<(), Refusal> {
    let rows = matches!(
        statement.class,
        Class::Select | Class::Insert | Class::Update | Class::Delete
    );
    let Some(table) = route::table(statement).filter(|_| rows) else {
        return Ok(());
    };
    // IMPORT did not write them down.
    let lost = proxy
        .unknown_tables
        .lock()
        .expect("no panic")
        .contains(database);
    if lost {
        return Err(unknown(&table));
    }
    let found = proxy.registry.database(database);
    let Some(node) = found.and_then(|database| database.units.into_values().next()) else {
        return Ok(());
    };
    if proxy.tables.knows(&node, &table) {
        return Ok(());
    }
    let mut lease = proxy.pool_of(&node).take().await?;
    let sql = "SELECT relname FROM pg_class WHERE relkind IN ('r', 'p', 'v', 'm', 'f')";
    let answer = lease.simple(sql).await;
    lease.give_back();
    let names = answer?.rows.into_iter().filter_map(|row| {
        let value = Body(row).values().ok()?.into_iter().next()??;
        Some(String::from_utf8_lossy(&value).into_owned())
    });
    let names: HashSet<String> = names.collect();
    let there = names.contains(&table);
    let mut known = proxy.tables.known.lock().expect("no panic");
    known.insert(node, names);
    // What this session made and has not committed yet is seen by the node only.
    if there || proxy.made_tables.lock().expect("no panic").contains(&table) {
        return Ok(());
    }
    Err(unknown(&table))
}
