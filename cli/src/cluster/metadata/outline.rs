//! What two exports differ in, setting by setting: the order of storage units in an export means nothing.

use std::collections::{BTreeMap, BTreeSet};

use serde_json::Value;

/// What now is against what was at a point.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Differences {
    /// Logical databases that differ, by name.
    pub(crate) databases: Vec<Difference>,
    /// Settings of the whole cluster (its rules, with users and privileges among them, and its properties) that are in one only.
    pub(crate) cluster: usize,
}

/// One logical database.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Difference {
    /// Its name.
    pub(crate) name: String,
    /// What differs.
    pub(crate) change: Change,
}

/// What differs of a logical database. Secrets are not in it: they are not stored, so they are not compared.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Change {
    /// It is not there any more.
    Missing,
    /// It was not there at the point.
    New,
    /// Its settings.
    Settings {
        /// Which only the backup has.
        then: Vec<String>,
        /// Which are there only now.
        now: Vec<String>,
    },
}

impl Differences {
    /// Whether there are none.
    pub(crate) fn is_empty(&self) -> bool {
        self.databases.is_empty() && self.cluster == 0
    }

    /// Databases that an import brings back, by name.
    pub(crate) fn to_import(&self) -> impl Iterator<Item = &str> {
        let wanted = self.databases.iter();
        let wanted = wanted.filter(|database| database.change != Change::New);
        wanted.map(|database| database.name.as_str())
    }
}

/// What a storage unit is anyway. A real proxy 5.5.2 exports it only once it was started anew, so that it tells nothing of the cluster.
const ANYWAY: (&str, &str) = ("readOnly", "false");

fn is_anyway(line: &str) -> bool {
    split(line.trim()) == Some(ANYWAY)
}

/// The settings that tell one database from another.
fn telling(yaml: &str) -> BTreeSet<String> {
    let mut all = settings(yaml);
    all.retain(|setting| {
        let unit = setting.strip_prefix("dataSources.");
        !unit.is_some_and(|rest| {
            rest.rsplit_once('.')
                .is_some_and(|(_, last)| is_anyway(last))
        })
    });
    all
}

/// Compares two documents without their secrets.
pub(super) fn differences(then: &Value, now: &Value) -> Differences {
    let (before, after) = (databases(then), databases(now));
    let names: BTreeSet<_> = before.keys().chain(after.keys()).collect();
    let databases = names.into_iter().filter_map(|name| {
        let change = match (before.get(name), after.get(name)) {
            (Some(_), None) => Change::Missing,
            (None, _) => Change::New,
            (Some(then), Some(now)) => {
                let (then, now) = (telling(then), telling(now));
                if then == now {
                    return None;
                }
                Change::Settings {
                    then: then.difference(&now).cloned().collect(),
                    now: now.difference(&then).cloned().collect(),
                }
            }
        };
        let name = name.clone();
        Some(Difference { name, change })
    });
    let databases = databases.collect();
    let of = |document: &Value, field: &str| {
        settings(document["meta_data"][field].as_str().unwrap_or_default())
    };
    let fields = ["rules", "props"].into_iter();
    let cluster = fields.map(|field| {
        let (then, now) = (of(then, field), of(now, field));
        then.symmetric_difference(&now).count()
    });
    Differences {
        databases,
        cluster: cluster.sum(),
    }
}

/// A document with the lines of each of its texts in order, but for what a storage unit is anyway.
pub(super) fn sorted(document: &Value) -> Value {
    match document {
        Value::String(text) => {
            let mut lines: Vec<&str> = text.lines().filter(|line| !is_anyway(line)).collect();
            lines.sort_unstable();
            lines.into()
        }
        Value::Object(fields) => {
            let fields = fields.iter();
            fields
                .map(|(key, value)| (key.clone(), sorted(value)))
                .collect()
        }
        other => other.clone(),
    }
}

/// The databases of a document, each with its YAML.
pub(super) fn databases(document: &Value) -> BTreeMap<String, String> {
    let all = document["meta_data"]["databases"].as_object();
    let all = all.into_iter().flatten();
    all.filter_map(|(name, yaml)| Some((name.clone(), yaml.as_str()?.to_owned())))
        .collect()
}

/// Every setting of a YAML text, as `path: value`.
pub(super) fn settings(yaml: &str) -> BTreeSet<String> {
    let mut all = BTreeSet::new();
    let mut above: Vec<(usize, String, bool)> = Vec::new();
    let mut items: BTreeMap<String, usize> = BTreeMap::new();
    let path = |above: &[(usize, String, bool)]| {
        let names: Vec<&str> = above.iter().map(|(_, name, _)| name.as_str()).collect();
        names.join(".")
    };
    for line in yaml.lines() {
        let mut body = line.trim();
        let mut column = line.len() - line.trim_start().len();
        while let Some(rest) = body.strip_prefix("- ") {
            above.retain(|(at, _, item)| *at < column || (*at == column && !item));
            let inner = rest.trim_start();
            let name = match inner.strip_prefix('!') {
                Some(tag) => tag.split_whitespace().next().unwrap_or_default().to_owned(),
                None if split(inner).is_none() => {
                    // A plain value: its place in the list means nothing.
                    all.insert(format!("{}: {}", path(&above), bare(inner)));
                    body = "";
                    break;
                }
                None => {
                    let number = items.entry(path(&above)).or_default();
                    *number += 1;
                    number.to_string()
                }
            };
            column += body.len() - inner.len();
            body = inner;
            if inner.starts_with('!') {
                body = inner.split_once(' ').map_or("", |(_, rest)| rest.trim());
            }
            above.push((column - 2, name, true));
        }
        let Some((key, value)) = split(body) else {
            continue;
        };
        above.retain(|(at, _, _)| *at < column);
        if value.is_empty() {
            above.push((column, key.to_owned(), false));
        } else {
            let place = path(&above);
            let dot = if place.is_empty() { "" } else { "." };
            all.insert(format!("{place}{dot}{key}: {}", bare(value)));
        }
    }
    all
}

/// A line's key and value.
pub(super) fn split(body: &str) -> Option<(&str, &str)> {
    if let Some((key, value)) = body.split_once(": ") {
        return Some((key, value.trim()));
    }
    body.strip_suffix(':').map(|key| (key, ""))
}

/// A value without the quotes around it.
fn bare(value: &str) -> &str {
    for quote in ['\'', '"'] {
        let inner = value.strip_prefix(quote);
        if let Some(inner) = inner.and_then(|rest| rest.strip_suffix(quote)) {
            return inner;
        }
    }
    value
}

/// Tables that the rules of a database's YAML name.
pub(super) fn tables(yaml: &str) -> BTreeSet<String> {
    let mut tables = BTreeSet::new();
    for setting in settings(yaml) {
        for place in ["rules.SHARDING.tables.", "rules.SHARDING.autoTables."] {
            if let Some(rest) = setting.strip_prefix(place) {
                tables.extend(rest.split('.').next().map(str::to_owned));
            }
        }
        if let Some(table) = setting.strip_prefix("rules.BROADCAST.tables: ") {
            tables.insert(table.to_owned());
        }
    }
    tables
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    const YAML: &str = "databaseName: bank\ndataSources:\n  ds_0:\n    password: ${gs_pitr:x}\n    url: jdbc:postgresql://h:1/b\n  ds_1:\n    url: jdbc:postgresql://h:2/b\nrules:\n\
        - !SHARDING\n  autoTables:\n    account:\n      actualDataSources: ds_0,ds_1\n      logicTable: account\n  shardingAlgorithms:\n    mod:\n      props:\n        sharding-count: '2'\n- !BROADCAST\n  tables:\n  - currency\n- !SINGLE\n  tables:\n  - ds_0.a\n  - ds_0.b\n";

    fn document(databases: &Value) -> Value {
        json!({"meta_data": {"databases": databases, "props": "props:\n  a: 1\n", "rules": ""}})
    }

    #[test]
    fn settings_have_paths_and_tables_are_found() {
        let all = settings(YAML);
        for expected in [
            "databaseName: bank",
            "dataSources.ds_1.url: jdbc:postgresql://h:2/b",
            "rules.SHARDING.autoTables.account.logicTable: account",
            "rules.SHARDING.shardingAlgorithms.mod.props.sharding-count: 2",
            "rules.BROADCAST.tables: currency",
            "rules.SINGLE.tables: ds_0.b",
        ] {
            assert!(all.contains(expected), "{expected} in {all:#?}");
        }
        let found: Vec<_> = tables(YAML).into_iter().collect();
        assert_eq!(found, ["account", "currency"]);
    }

    #[test]
    fn order_and_quotes_mean_nothing_and_the_rest_does() {
        let swapped = YAML
            .replace("ds_0:", "ds_x:")
            .replace("  ds_1:\n    url: jdbc:postgresql://h:2/b\n", "")
            .replace(
                "dataSources:\n",
                "dataSources:\n  ds_1:\n    url: jdbc:postgresql://h:2/b\n",
            )
            .replace("ds_x:", "ds_0:")
            .replace("'2'", "2");
        let (then, now) = (
            document(&json!({"bank": YAML})),
            document(&json!({"bank": swapped})),
        );
        assert!(differences(&then, &now).is_empty());
        // A proxy that was started anew says so of each storage unit, and of no rule.
        let said = YAML.replace(
            "  ds_1:\n",
            "    readOnly: false\n  ds_1:\n    readOnly: false\n",
        );
        let now = document(&json!({"bank": said}));
        assert!(differences(&then, &now).is_empty() && differences(&now, &then).is_empty());
        let said = said.replacen("false", "true", 1);
        assert!(!differences(&then, &document(&json!({"bank": said}))).is_empty());
        let said = YAML.replace("    mod:\n", "    mod:\n      readOnly: false\n");
        assert!(!differences(&then, &document(&json!({"bank": said}))).is_empty());
        let other = YAML.replace("h:2", "h:3");
        let now = document(&json!({"bank": other, "new": "databaseName: new\n"}));
        let then = document(&json!({"bank": YAML, "old": "databaseName: old\n"}));
        let found = differences(&then, &now);
        let names: Vec<_> = found.databases.iter().map(|it| it.name.as_str()).collect();
        assert_eq!(names, ["bank", "new", "old"]);
        let Change::Settings { then, now } = &found.databases[0].change else {
            panic!("{found:?}");
        };
        assert_eq!(then, &["dataSources.ds_1.url: jdbc:postgresql://h:2/b"]);
        assert_eq!(now, &["dataSources.ds_1.url: jdbc:postgresql://h:3/b"]);
        assert_eq!(found.to_import().collect::<Vec<_>>(), ["bank", "old"]);
    }
}
