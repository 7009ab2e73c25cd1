//! Ways to change what is stored.

use std::collections::BTreeMap;

use bytes::Bytes;
use pipeline::store::Key;
use serde_json::Value;
use sha2::{Digest as _, Sha256};

/// An object removed.
pub(crate) fn removal(key: &Key) -> Mutation {
    Mutation {
        kind: "delete",
        what: format!("removal of `{key}`"),
        changes: vec![(key.clone(), None)],
    }
}

/// How many others of its kind are put in an object's place.
const NEIGHBOURS: usize = 4;

/// One change.
#[derive(Clone)]
pub(crate) struct Mutation {
    /// What kind of change, for the count.
    pub(crate) kind: &'static str,
    /// What exactly.
    pub(crate) what: String,
    /// The objects it changes: new bytes, or `None` for gone.
    pub(crate) changes: Vec<(Key, Option<Bytes>)>,
}

impl std::fmt::Debug for Mutation {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}: {}", self.kind, self.what)
    }
}

/// What an object is, by its key.
pub(crate) fn kind(key: &Key) -> &'static str {
    let key = key.as_str();
    let name = key.rsplit('/').next().unwrap_or_default();
    match (key.split('/').next().unwrap_or_default(), name) {
        ("repository.json", _) => "repository",
        ("log", _) => "log",
        ("lease", _) => "lease",
        ("nodes", _) => "node",
        ("points", _) => "point",
        ("metadata", _) => "metadata",
        ("wal", "epoch.json") => "epoch",
        ("wal", name) if name.ends_with(".history.zst") => "history",
        ("wal", name) if name.starts_with("gap-") => "gap",
        ("wal", _) => "wal",
        ("backups", "manifest.json") => "manifest",
        ("backups", "deleted.json") => "tombstone",
        ("backups", "index") => "index",
        ("backups", _) => "pack",
        ("operations", "decision.json") => "decision",
        ("operations", "pin.json") => "pin",
        ("operations", _) => "record",
        _ => panic!("what is `{key}`?"),
    }
}

pub(crate) fn is_json(key: &Key) -> bool {
    let name = key.as_str();
    name.strip_suffix(".json").is_some()
}

fn change(
    kind: &'static str,
    what: impl Into<String>,
    key: &Key,
    bytes: impl Into<Bytes>,
) -> Mutation {
    let what = what.into();
    Mutation {
        kind,
        what: format!("{what} of `{key}`"),
        changes: vec![(key.clone(), Some(bytes.into()))],
    }
}

/// The objects of a repository that differ in more than values: of JSON objects with the same fields the first two.
pub(crate) fn typical(objects: &BTreeMap<Key, Bytes>) -> Vec<(&Key, &Bytes)> {
    let mut seen: BTreeMap<String, u32> = BTreeMap::new();
    let mut all = Vec::new();
    for (key, bytes) in objects {
        if is_json(key) {
            let body = body(bytes);
            let names: Vec<_> = body.as_object().unwrap().keys().cloned().collect();
            let of = format!(
                "{} {names:?} {} {}",
                kind(key),
                body["event"],
                body["state"]
            );
            let count = seen.entry(of).or_default();
            *count += 1;
            if *count > 2 {
                continue;
            }
        }
        all.push((key, bytes));
    }
    all
}

/// Changes that look at nothing but bytes.
pub(crate) fn of_bytes(key: &Key, bytes: &Bytes) -> Vec<Mutation> {
    let length = bytes.len();
    let mut positions = vec![
        0,
        1,
        7,
        8,
        30,
        40,
        length / 4,
        length / 2,
        length / 2 + 1,
        3 * length / 4,
    ];
    // Trailers, frame tables and footers are at the end.
    positions.extend(
        [1, 2, 20, 33, 40, 60, 78, 100, 130, 150, 184, 200]
            .iter()
            .filter_map(|back| length.checked_sub(*back)),
    );
    positions.retain(|at| *at < length);
    positions.sort_unstable();
    positions.dedup();
    let mut all = Vec::new();
    for (turn, at) in positions.into_iter().enumerate() {
        let mut flipped = bytes.to_vec();
        flipped[at] ^= 1 << (turn % 8);
        all.push(change(
            "flip",
            format!("bit {} of byte {at}", turn % 8),
            key,
            flipped,
        ));
    }
    for left in [length - 1, length / 2, 1, 0] {
        all.push(change(
            "cut",
            format!("the first {left} bytes"),
            key,
            bytes.slice(..left),
        ));
    }
    all.push(change(
        "cut",
        "all but the first byte",
        key,
        bytes.slice(1..),
    ));
    all.push(change(
        "append",
        "a zero byte more",
        key,
        [bytes, &[0][..]].concat(),
    ));
    all.push(change(
        "append",
        "a blank more",
        key,
        [bytes, &b" "[..]].concat(),
    ));
    all.push(change(
        "append",
        "the object twice",
        key,
        [&bytes[..], bytes].concat(),
    ));
    let mut middle = bytes.to_vec();
    middle.insert(length / 2, b'0');
    all.push(change("insert", "a byte in the middle", key, middle));
    all.push(removal(key));
    all
}

/// Each object swapped with, and replaced by, some others of its kind.
pub(crate) fn of_pairs(objects: &BTreeMap<Key, Bytes>) -> Vec<Mutation> {
    let all: Vec<_> = objects.iter().collect();
    let mut mutations = Vec::new();
    for (place, (one, its)) in all.iter().enumerate() {
        let others = all.iter().cycle().skip(place + 1).take(all.len() - 1);
        let others = others.filter(|(other, _)| kind(other) == kind(one));
        for (turn, (other, theirs)) in others.take(NEIGHBOURS).enumerate() {
            assert_ne!(its, theirs, "`{one}` and `{other}` are the same");
            mutations.push(change(
                "replace",
                format!("`{other}` in the place"),
                one,
                (*theirs).clone(),
            ));
            if turn == 0 {
                mutations.push(Mutation {
                    kind: "swap",
                    what: format!("`{one}` and `{other}` swapped"),
                    changes: vec![
                        ((*one).clone(), Some((*theirs).clone())),
                        ((*other).clone(), Some((*its).clone())),
                    ],
                });
            }
        }
    }
    mutations
}

/// The body between the envelope's fixed bytes, by hand.
fn body(bytes: &Bytes) -> Value {
    serde_json::from_slice(&bytes[8..bytes.len() - 77]).unwrap()
}

fn sealed(body: &Value, hash: Option<&[u8]>) -> Bytes {
    let body = body.to_string();
    let own = hex::encode(Sha256::digest(&body));
    let hash = hash.map_or(own, |hash| String::from_utf8(hash.to_vec()).unwrap());
    format!("{{\"body\":{body},\"sha256\":\"{hash}\"}}").into()
}

/// A field that was changed, and the mutation.
pub(crate) struct FieldChange {
    pub(crate) field: String,
    pub(crate) mutation: Mutation,
}

/// Every field of a JSON object changed and removed, one at a time; sealed again with a right hash, or not.
pub(crate) fn of_fields(key: &Key, bytes: &Bytes, seal_again: bool) -> Vec<FieldChange> {
    let whole = body(bytes);
    let mut paths = Vec::new();
    walk(&whole, &mut Vec::new(), &mut paths);
    let old_hash = &bytes[bytes.len() - 66..bytes.len() - 2];
    let hash = (!seal_again).then_some(old_hash);
    let kind = if seal_again {
        "field, sealed again"
    } else {
        "field"
    };
    let mut all = Vec::new();
    for path in paths {
        let field = format!("/{}", path.join("/"));
        // A hash that does not fit is wrong whatever was changed.
        let removed = removed(&whole, &path).filter(|_| seal_again);
        for changed in [changed(&whole, &field), removed].into_iter().flatten() {
            if changed == whole {
                continue;
            }
            let what = format!("field {field}");
            let mutation = change(kind, what, key, sealed(&changed, hash));
            // The numbers of a list's elements say nothing.
            let named: Vec<&str> = path
                .iter()
                .map(|part| {
                    if part.parse::<u32>().is_ok() {
                        "*"
                    } else {
                        part
                    }
                })
                .collect();
            all.push(FieldChange {
                field: named.join("."),
                mutation,
            });
        }
    }
    all
}

fn walk(value: &Value, path: &mut Vec<String>, all: &mut Vec<Vec<String>>) {
    if !path.is_empty() {
        all.push(path.clone());
    }
    let children: Vec<(String, &Value)> = match value {
        Value::Object(fields) => fields
            .iter()
            .map(|(name, value)| (name.clone(), value))
            .collect(),
        Value::Array(items) => items
            .iter()
            .enumerate()
            .map(|(at, value)| (at.to_string(), value))
            .collect(),
        _ => return,
    };
    for (name, child) in children {
        path.push(name);
        walk(child, path, all);
        path.pop();
    }
}

fn changed(whole: &Value, field: &str) -> Option<Value> {
    let mut whole = whole.clone();
    let value = whole.pointer_mut(field)?;
    *value = match &*value {
        Value::Null => "x".into(),
        Value::Bool(it) => (!it).into(),
        Value::Number(it) => (it.as_u64()? + 1).into(),
        Value::String(text) => other_text(text).into(),
        Value::Array(_) | Value::Object(_) => return None,
    };
    Some(whole)
}

/// As much like the text as can be: its last letter or digit is another of its kind.
fn other_text(text: &str) -> String {
    let mut letters: Vec<char> = text.chars().collect();
    for letter in letters.iter_mut().rev() {
        *letter = match *letter {
            '9' => '0',
            'f' | 'z' => 'a',
            'F' => 'A',
            digit @ ('0'..='8' | 'a'..='y' | 'A'..='E') => char::from(digit as u8 + 1),
            _ => continue,
        };
        return letters.into_iter().collect();
    }
    format!("{text}x")
}

fn removed(whole: &Value, path: &[String]) -> Option<Value> {
    let mut whole = whole.clone();
    let (last, parents) = path.split_last()?;
    let parent = parents
        .iter()
        .fold(String::new(), |pointer, part| format!("{pointer}/{part}"));
    match whole.pointer_mut(&parent)? {
        Value::Object(fields) => {
            fields.remove(last)?;
        }
        Value::Array(items) => {
            items.remove(last.parse().ok()?);
        }
        _ => return None,
    }
    Some(whole)
}
