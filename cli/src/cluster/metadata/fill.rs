//! Secrets put back, and values written so that IMPORT reads what EXPORT meant.
//!
//! A proxy exports the properties of storage units as they are: `a: b`, `x #y` or `0123` for a password. Its IMPORT reads YAML. So what means all of
//! its line is put into quotes. Rules are written by a YAML writer, and stay as they are.

use std::collections::{BTreeMap, BTreeSet};

use agent_api::Secret;

use super::outline::split;

/// Properties of storage units that are text, whatever they look like.
const TEXTS: [&str; 3] = ["password", "url", "username"];
/// What a placeholder begins with.
const OPEN: &str = "${gs_pitr:";

/// Whose password it is.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Account {
    /// `host:port`
    address: String,
    user: String,
}

/// Secrets that are known, by what they may be found.
#[derive(Default)]
pub(crate) struct Known {
    /// Of a file, by the name of their placeholder.
    pub(super) told: BTreeMap<String, Secret>,
    /// Of storage units that are registered now.
    pub(super) accounts: BTreeMap<Account, Secret>,
    /// Others that the proxies know now, by the name of their placeholder.
    pub(super) current: BTreeMap<String, Secret>,
}

/// A database's YAML as IMPORT takes it.
///
/// # Errors
/// Names of placeholders for which no secret is known.
pub(super) fn importable(yaml: &str, known: &Known) -> Result<String, BTreeSet<String>> {
    let units = units(yaml);
    let mut missing = BTreeSet::new();
    let mut text = String::with_capacity(yaml.len());
    for (line, place) in places(yaml) {
        let unit = place.and_then(|unit| units.get(unit));
        let filled = fill(line, |name| {
            let account = unit.and_then(account).filter(|_| is_password(line));
            let found = known.told.get(name);
            let found = match account {
                Some(account) => found.or_else(|| known.accounts.get(&account)),
                None => found.or_else(|| known.current.get(name)),
            };
            if found.is_none() {
                missing.insert(name.to_owned());
            }
            found.map(|secret| secret.0.clone())
        });
        let indent = filled.len() - filled.trim_start().len();
        match split(filled.trim()) {
            Some((key, value)) if place.is_some() && TEXTS.contains(&key) && !value.is_empty() => {
                text.push_str(&filled[..indent]);
                text.push_str(&[key, ": ", &quoted(value)].concat());
            }
            _ => text.push_str(&filled),
        }
        text.push('\n');
    }
    if missing.is_empty() {
        Ok(text)
    } else {
        Err(missing)
    }
}

/// Passwords of the storage units of a YAML that has them.
pub(super) fn accounts(yaml: &str) -> Vec<(Account, Secret)> {
    let units = units(yaml).into_values();
    units
        .filter_map(|unit| Some((account(&unit)?, Secret(unit.get("password")?.clone()))))
        .collect()
}

fn account(unit: &BTreeMap<String, String>) -> Option<Account> {
    let (_, rest) = unit.get("url")?.split_once("://")?;
    let address = rest.split(['/', '?', ',']).next()?.to_ascii_lowercase();
    Some(Account {
        address,
        user: unit.get("username")?.clone(),
    })
}

fn is_password(line: &str) -> bool {
    split(line.trim()).is_some_and(|(key, _)| key == "password")
}

/// Every line, and the storage unit that it is a property of.
fn places(yaml: &str) -> impl Iterator<Item = (&str, Option<&str>)> {
    let (mut inside, mut unit) = (false, None);
    yaml.lines().map(move |line| {
        let indent = line.len() - line.trim_start().len();
        match indent {
            0 => (inside, unit) = (line.trim_end() == "dataSources:", None),
            1..=2 if inside => unit = line.trim().strip_suffix(':'),
            _ => {}
        }
        (line, unit.filter(|_| inside && indent > 2))
    })
}

/// Properties of the storage units, as they stand in the lines.
fn units(yaml: &str) -> BTreeMap<String, BTreeMap<String, String>> {
    let mut units: BTreeMap<String, BTreeMap<String, String>> = BTreeMap::new();
    for (line, unit) in places(yaml) {
        if let (Some(unit), Some((key, value))) = (unit, split(line.trim_start())) {
            let properties = units.entry(unit.to_owned()).or_default();
            properties.insert(key.to_owned(), value.to_owned());
        }
    }
    units
}

/// `line` with its placeholders replaced.
fn fill(line: &str, mut secret: impl FnMut(&str) -> Option<String>) -> String {
    let mut text = String::new();
    let mut rest = line;
    while let Some(at) = rest.find(OPEN) {
        let (before, after) = rest.split_at(at);
        let Some((name, behind)) = after[OPEN.len()..].split_once('}') else {
            break;
        };
        text.push_str(before);
        text.push_str(&secret(name).unwrap_or_default());
        rest = behind;
    }
    text.push_str(rest);
    text
}

/// A value that means what stands there.
pub(super) fn quoted(value: &str) -> String {
    format!("'{}'", value.replace('\'', "''"))
}

#[cfg(test)]
mod tests {
    use super::*;

    const THEN: &str = "databaseName: bank\ndataSources:\n  ds_0:\n    maxPoolSize: 50\n    password: ${gs_pitr:a.ds_0.password}\n    url: jdbc:postgresql://H:1/b?x=y\n    username: app\n\
        rules:\n- !ENCRYPT\n  encryptors:\n    aes:\n      props:\n        aes-key-value: ${gs_pitr:a.key}\n";
    const NOW: &str = "databaseName: other\ndataSources:\n  ds_9:\n    password: it's: x #y\n    url: jdbc:postgresql://h:1/c\n    username: app\n";

    #[test]
    fn passwords_come_from_the_same_account_and_are_quoted() {
        let mut known = Known::default();
        known.accounts.extend(accounts(NOW));
        let missing = importable(THEN, &known).unwrap_err();
        assert_eq!(missing.into_iter().collect::<Vec<_>>(), ["a.key"]);
        known.told.insert("a.key".into(), Secret("'k1'".into()));
        let text = importable(THEN, &known).unwrap();
        assert!(text.contains("\n    password: 'it''s: x #y'\n"), "{text}");
        assert!(
            text.contains("\n    url: 'jdbc:postgresql://H:1/b?x=y'\n"),
            "{text}"
        );
        assert!(text.contains("\n    maxPoolSize: 50\n"), "{text}");
        assert!(text.ends_with("        aes-key-value: 'k1'\n"), "{text}");
        // Another user's password is not this one's.
        let mut known = Known::default();
        known
            .accounts
            .extend(accounts(&NOW.replace("app", "admin")));
        assert_eq!(importable(THEN, &known).unwrap_err().len(), 2);
        // What is told goes before what is found.
        known.told.insert("a.key".into(), Secret("k".into()));
        known
            .told
            .insert("a.ds_0.password".into(), Secret("0123".into()));
        let text = importable(THEN, &known).unwrap();
        assert!(text.contains("password: '0123'\n"), "{text}");
    }
}
