//! What `EXPORT METADATA` gives, kept without its secrets.
//!
//! It is JSON, and what matters in it are strings of YAML in which a proxy writes properties as they are, unquoted: a value
//! may be `a: b`, `x #y` or `0123`, and means all of its line. So lines are looked at and no YAML is parsed: what is no
//! secret stays as it was, byte for byte, and each secret is replaced by `${gs_pitr:<name>}`. Putting the secrets back
//! gives the document again.

mod fill;
mod inline;
mod outline;
mod properties;
mod yaml;

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;

use agent_api::Secret;
use agent_sql::proxy::ExportedMetadata;
use serde_json::{Value, json};

use crate::failure::{Failure, Result};
pub(crate) use fill::Known;
pub(crate) use outline::{Change, Difference, Differences};

/// Fields that change from one export to the next though nothing has changed.
const PASSING: [&str; 2] = ["snapshot_info", "create_time"];
/// Below it every key is the name of a database, and says nothing of its value.
const DATABASES: &str = "databases";

/// An export. Passwords are in it: it is never printed, logged or stored.
#[derive(Clone, PartialEq, Eq)]
pub(crate) struct MetadataExport {
    document: Value,
}

impl fmt::Debug for MetadataExport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("MetadataExport(..)")
    }
}

/// An export as it may be stored.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Redacted {
    /// JSON, with a placeholder where a secret was.
    pub(crate) document: String,
    /// Names of the placeholders, in the order of the document.
    pub(crate) placeholders: Vec<String>,
}

impl MetadataExport {
    /// Reads an export.
    ///
    /// # Errors
    /// If it is no JSON object. Nothing of it is in the error.
    pub(crate) fn read(exported: &ExportedMetadata) -> Result<Self> {
        Self::parse(&exported.json)
    }

    fn parse(json: &str) -> Result<Self> {
        if let Ok(document @ Value::Object(_)) = serde_json::from_str(json) {
            return Ok(Self { document });
        }
        let message = "what the proxy exports as metadata is no JSON object";
        Err(Failure::new(agent_api::ErrorKind::Database, message))
    }

    /// Whether both say the same of databases, rules and properties, secrets included. When they were made, and the number
    /// that commits had come to, counts for nothing; nor does the order, in which two real proxies 5.5.2 differed.
    pub(crate) fn same_as(&self, other: &Self) -> bool {
        fn lasting(document: &Value) -> BTreeMap<&String, Value> {
            let fields = document.as_object().into_iter().flatten();
            fields
                .filter(|(key, _)| !PASSING.contains(&key.as_str()))
                .map(|(key, value)| (key, outline::sorted(value)))
                .collect()
        }
        lasting(&self.document) == lasting(&other.document)
            && outline::differences(&self.document, &other.document).is_empty()
    }

    /// The document without its secrets.
    pub(crate) fn redacted(&self) -> Redacted {
        let (document, secrets) = self.split();
        Redacted {
            document: document.to_string(),
            placeholders: secrets.all.into_iter().map(|(name, _)| name).collect(),
        }
    }

    /// The document, and what was taken out of it.
    fn split(&self) -> (Value, Secrets) {
        let (mut document, mut secrets) = (self.document.clone(), Secrets::default());
        redact(&mut document, "", false, &mut secrets);
        (document, secrets)
    }
}

/// The properties of the whole cluster, as IMPORT METADATA takes them.
#[derive(Clone)]
pub(crate) struct Properties(String);

/// A logical database, as IMPORT METADATA takes it. Passwords are in it.
#[derive(Clone)]
pub(crate) struct Database {
    /// Its name.
    pub(crate) name: String,
    /// Tables that its rules name.
    pub(crate) tables: BTreeSet<String>,
    yaml: String,
}

impl Database {
    /// The document to import: of this database alone. Rules of the whole cluster, users among them, stay as they are; so do its
    /// properties, if those that are there are given.
    pub(crate) fn document(&self, properties: &Properties) -> String {
        let databases = json!({&self.name: self.yaml});
        let props = &properties.0;
        json!({"meta_data": {"databases": databases, "props": props, "rules": ""}}).to_string()
    }
}

impl MetadataExport {
    /// Reads what is kept with a point.
    ///
    /// # Errors
    /// If it is no JSON object.
    pub(crate) fn stored(document: &str) -> Result<Self> {
        Self::parse(document)
    }

    /// The properties of the whole cluster. Every import needs them, as it replaces them all.
    ///
    /// # Errors
    /// Why no database can be imported where they are so.
    pub(crate) fn properties(&self) -> std::result::Result<Properties, String> {
        let props = self.document["meta_data"]["props"].as_str();
        properties::importable(props.unwrap_or_default()).map(Properties)
    }

    /// What differs from `then`, which is kept without its secrets.
    pub(crate) fn since(&self, then: &Self) -> Differences {
        outline::differences(&then.document, &self.split().0)
    }

    /// Secrets that an import may need: those that are `told`, and those in here.
    pub(crate) fn known(&self, told: BTreeMap<String, Secret>) -> Known {
        let (_, secrets) = self.split();
        let databases = outline::databases(&self.document).into_values();
        Known {
            told,
            accounts: databases.flat_map(|yaml| fill::accounts(&yaml)).collect(),
            current: secrets.all.into_iter().collect(),
        }
    }

    /// A database, with its placeholders replaced. `None`: there is none of this name.
    ///
    /// # Errors
    /// Names of secrets that are not known.
    pub(crate) fn database(
        &self,
        name: &str,
        known: &Known,
    ) -> std::result::Result<Option<Database>, BTreeSet<String>> {
        let Some(yaml) = outline::databases(&self.document).remove(name) else {
            return Ok(None);
        };
        Ok(Some(Database {
            name: name.to_owned(),
            tables: outline::tables(&yaml),
            yaml: fill::importable(&yaml, known)?,
        }))
    }
}

/// What was taken out of a document.
#[derive(Default)]
struct Secrets {
    all: Vec<(String, Secret)>,
}

impl Secrets {
    /// Takes a value out; what stands there instead.
    fn take(&mut self, path: &str, value: &str) -> String {
        let plain = |c: char| c.is_ascii_alphanumeric() || "._-@%".contains(c);
        let path: String = path
            .chars()
            .map(|c| if plain(c) { c } else { '_' })
            .collect();
        let path = path.trim_matches('.');
        let taken = |name: &str| self.all.iter().any(|(other, _)| other == name);
        let mut name = path.to_owned();
        let mut number = 2;
        while name.is_empty() || taken(&name) {
            name = format!("{path}~{number}");
            number += 1;
        }
        let placeholder = placeholder(&name);
        self.all.push((name, Secret(value.to_owned())));
        placeholder
    }

    /// More of the value that was taken out last: it goes on in the next line.
    fn go_on(&mut self, more: &str) {
        if let Some((_, Secret(value))) = self.all.last_mut() {
            value.push_str(more);
        }
    }
}

/// What stands for a secret.
fn placeholder(name: &str) -> String {
    format!("${{gs_pitr:{name}}}")
}

/// Whether the name of a property says that its value is a secret.
fn speaks_of_a_secret(name: &str) -> bool {
    const WORDS: [&str; 13] = [
        "password",
        "passwd",
        "passphrase",
        "passwort",
        "pwd",
        "secret",
        "token",
        "credential",
        "privatekey",
        "accesskey",
        "apikey",
        // Encryption's `aes-key-value`, `rc4-key-value`, `sm4-key`.
        "keyvalue",
        "sm4key",
    ];
    let letters = name.chars().filter(|c| c.is_alphanumeric());
    let name: String = letters.flat_map(char::to_lowercase).collect();
    WORDS.iter().any(|word| name.contains(word)) || name.ends_with("salt")
}

/// Whether a value is written so that there is nothing to hide.
fn is_nothing(value: &str) -> bool {
    matches!(
        value.trim(),
        "" | "''" | "\"\"" | "null" | "~" | "{}" | "[]" | "-"
    )
}

/// Takes the secrets out of a value of the document. `secret`: its name speaks of one.
fn redact(value: &mut Value, path: &str, secret: bool, secrets: &mut Secrets) {
    match value {
        Value::String(text) if secret && !is_nothing(text) => *text = secrets.take(path, text),
        Value::String(text) => *text = yaml::redact(text, path, secrets),
        Value::Number(number) if secret => {
            let text = secrets.take(path, &number.to_string());
            *value = Value::String(text);
        }
        Value::Array(items) => {
            for (place, item) in items.iter_mut().enumerate() {
                redact(item, &format!("{path}.{place}"), secret, secrets);
            }
        }
        Value::Object(fields) => {
            let names = path == format!("meta_data.{DATABASES}") || path == DATABASES;
            for (key, field) in fields {
                let below = if path.is_empty() {
                    key.clone()
                } else {
                    format!("{path}.{key}")
                };
                let secret = secret || (!names && speaks_of_a_secret(key));
                redact(field, &below, secret, secrets);
            }
        }
        _ => {}
    }
}

#[cfg(test)]
mod tests;
