//! The log: unbroken, as long as others say, and true of every object that it names.

use std::collections::{BTreeMap, BTreeSet};

use bytes::Bytes;
use pipeline::store::Key;

use super::finding::{Finding, Severity};
use super::inventory::Kind;
use super::records::Records;
use super::repair::Repair;
use super::{Context, Scope};
use crate::envelope::{MANIFEST_LIMIT, OBJECT_LIMIT, sha256_hex};
use crate::error::CatalogError;
use crate::keys;
use crate::model::{LogAction, LogEntry, OperationEvent};

/// Checks it, and says what of it can be mended.
///
/// # Errors
/// [`CatalogError::Store`].
pub(super) async fn check(
    context: &Context<'_>,
    records: &Records,
) -> Result<Vec<Repair>, CatalogError> {
    let mut ledger = Ledger {
        context,
        records,
        witnesses: witnesses(context, records).await,
        whole: true,
        repairs: Vec::new(),
    };
    ledger.chain().await?;
    ledger.heads().await?;
    ledger.named_objects().await?;
    ledger.unnamed_objects().await?;
    ledger.repository().await?;
    ledger.by_hand().await;
    Ok(ledger.repairs)
}

struct Ledger<'a> {
    context: &'a Context<'a>,
    records: &'a Records,
    /// By number of the entry: the digest that somebody else names, and who.
    witnesses: BTreeMap<u64, Vec<(String, Key)>>,
    /// No entry is missing or unreadable, so what no entry names was never named.
    whole: bool,
    repairs: Vec<Repair>,
}

/// Who names which entry of the log.
async fn witnesses(context: &Context<'_>, records: &Records) -> BTreeMap<u64, Vec<(String, Key)>> {
    let mut all: BTreeMap<u64, Vec<(String, Key)>> = BTreeMap::new();
    let mut add = |(seq, sha256): &(u64, String), key: &Key| {
        let named = all.entry(*seq).or_default();
        named.push((sha256.clone(), key.clone()));
    };
    for lease in records.leases.values() {
        if let Some(head) = lease.body.as_ref().and_then(|body| body.log_head.as_ref()) {
            add(head, &lease.key);
        }
    }
    let journals = records.operations.values();
    for record in journals.flat_map(|journal| journal.records.values()) {
        if let Some(body) = &record.body
            && let OperationEvent::Started {
                log_head: Some(head),
                ..
            } = &body.event
        {
            add(head, &record.key);
        }
    }
    if let Some(mirror) = &context.verify.mirror
        && let Some(head) = mirror.log_head().await
    {
        add(&(head.seq, head.sha256), &keys::log(head.seq));
    }
    all
}

impl Ledger<'_> {
    fn last(&self) -> u64 {
        self.records.log.keys().next_back().copied().unwrap_or(0)
    }

    /// The digest that the next entry names of this one.
    fn named_by_next(&self, seq: u64) -> Option<&str> {
        self.entry(seq + 1)?.previous.as_deref()
    }

    fn entry(&self, seq: u64) -> Option<&LogEntry> {
        self.records.log.get(&seq)?.body.as_ref()
    }

    /// Every entry from 1 to the last, each naming the bytes of the one before.
    async fn chain(&mut self) -> Result<(), CatalogError> {
        for seq in 1..=self.last() {
            let Some(found) = self.records.log.get(&seq) else {
                self.missing(seq, "an entry of the log is missing").await?;
                continue;
            };
            let Some(body) = &found.body else {
                self.whole = false;
                continue;
            };
            if body.seq != seq {
                self.whole = false;
                let what = format!("it says it is entry {}", body.seq);
                self.context.add(Finding::damage(&found.key, what));
                continue;
            }
            if seq == 1 && body.previous.is_some() {
                let what = "it is the first entry, and names one before it";
                self.context.add(Finding::damage(&found.key, what));
            }
            if seq > 1 && body.previous.is_none() {
                let what = "it does not name the entry before it";
                self.context.add(Finding::damage(&found.key, what));
            }
            if let Some(named) = self.named_by_next(seq)
                && named != found.sha256
            {
                let next = seq + 1;
                let what = format!("entry {next} names other bytes of it: one of both was changed");
                self.context.add(Finding::damage(&found.key, what));
            }
        }
        Ok(())
    }

    /// What others say of the log is so.
    async fn heads(&mut self) -> Result<(), CatalogError> {
        let last = self.last();
        for (seq, named) in self.witnesses.clone() {
            let Some((sha256, witness)) = named.first() else {
                continue;
            };
            if seq > last {
                // Made after the listing, or gone.
                if self.context.verify.scope == Scope::All
                    && !self.context.is_there(&keys::log(seq)).await?
                {
                    let what =
                        format!("the log ends at entry {last}, and `{witness}` names this one");
                    self.missing(seq, &what).await?;
                }
                continue;
            }
            let Some(found) = self.records.log.get(&seq) else {
                continue;
            };
            if named.iter().all(|(named, _)| *named == found.sha256) {
                continue;
            }
            if self.named_by_next(seq) == Some(found.sha256.as_str()) {
                for (_, witness) in named.iter().filter(|(named, _)| *named != found.sha256) {
                    let what = format!(
                        "it names other bytes of log entry {seq} than are there, and entry {} agrees with those",
                        seq + 1
                    );
                    self.context.add(Finding::damage(witness, what));
                }
            } else if !self.context.is_named(&found.key) {
                let what = format!("`{witness}` names other bytes of it (SHA-256 {sha256})");
                self.context.add(Finding::damage(&found.key, what));
            }
        }
        Ok(())
    }

    async fn missing(&mut self, seq: u64, what: &str) -> Result<(), CatalogError> {
        let key = keys::log(seq);
        if self.context.is_there(&key).await? {
            return Ok(());
        }
        self.whole = false;
        let named = self.entry_digest(seq).map(str::to_owned);
        let finding = Finding::damage(&key, what);
        self.lost_object(key, named.as_deref(), finding).await;
        Ok(())
    }

    /// The digest that others name of an entry.
    fn entry_digest(&self, seq: u64) -> Option<&str> {
        let by_next = self.named_by_next(seq);
        by_next.or_else(|| Some(&self.witnesses.get(&seq)?.first()?.0))
    }

    /// What the mirror has of an object, if it is what was written.
    async fn kept(&self, key: &Key, sha256: Option<&str>) -> Option<Bytes> {
        let (mirror, sha256) = (self.context.verify.mirror.as_ref()?, sha256?);
        let kept = mirror.kept(key).await?;
        let limit = match Kind::of(key) {
            Kind::Manifest(_) => MANIFEST_LIMIT,
            _ => OBJECT_LIMIT,
        };
        (sha256_hex(&kept) == sha256 && kept.len() <= limit).then_some(kept)
    }

    /// A missing object whose digest is known can be put back from the mirror.
    async fn lost_object(&mut self, key: Key, sha256: Option<&str>, finding: Finding) {
        match self.kept(&key, sha256).await {
            Some(bytes) => {
                let next = "the local mirror has it: gs_pitr verify --all --repair";
                self.context.add(finding.next(next));
                self.repairs.push(Repair::PutBack { key, bytes });
            }
            None => self.context.add(finding.next(
                "bring it back from a version or replica of the bucket, or run `gs_pitr verify --all --repair` on a host whose `~/.gs_pitr` has seen it",
            )),
        }
    }

    /// Each entry's object is there with the bytes that it names.
    async fn named_objects(&mut self) -> Result<(), CatalogError> {
        let objects = self.records.ledger_objects();
        let mut named: BTreeMap<&str, Vec<&LogEntry>> = BTreeMap::new();
        let entries = self
            .records
            .log
            .values()
            .filter_map(|found| found.body.as_ref());
        for entry in entries {
            named.entry(&entry.object).or_default().push(entry);
        }
        let mut lost = Vec::new();
        for (name, entries) in named {
            let Ok(key) = Key::new(name) else {
                continue;
            };
            let there = objects.get(&key).copied();
            let same = |sha256: &str| entries.iter().any(|entry| entry.object_sha256 == sha256);
            match there {
                Some(sha256) if same(sha256) => {}
                Some(_) if self.context.is_named(&key) => {}
                Some(_) => {
                    let seq = entries.iter().map(|entry| entry.seq).max().unwrap_or(0);
                    let what = format!("it is not the object that log entry {seq} names");
                    self.context.add(Finding::damage(&key, what));
                }
                None => lost.extend(entries.last().map(|entry| (key, (*entry).clone()))),
            }
        }
        if lost.is_empty() {
            return Ok(());
        }
        // Who removes something says so first, perhaps since the listing.
        let since = self.since().await?;
        for (key, entry) in lost {
            let removed = since.iter().any(|newer| accounts_for(newer, &key));
            if !removed {
                self.absent(key, &entry).await?;
            }
        }
        Ok(())
    }

    async fn absent(&mut self, key: Key, entry: &LogEntry) -> Result<(), CatalogError> {
        if self.is_out_of_scope(&key) || self.is_explained(&key, entry) {
            return Ok(());
        }
        if let Kind::Manifest(id) = Kind::of(&key)
            && self.context.is_there(&keys::tombstone(&id)).await?
        {
            return Ok(());
        }
        if self.context.is_there(&key).await? {
            // Made after the listing.
            return Ok(());
        }
        let what = format!("it is missing; log entry {} names it", entry.seq);
        let mut finding = Finding::damage(&key, what);
        if let Kind::Manifest(id) = Kind::of(&key) {
            finding = finding.of_backup(&id).losing([&id]);
        }
        self.lost_object(key, Some(&entry.object_sha256), finding)
            .await;
        Ok(())
    }

    /// Of one backup only what it rests on was read.
    fn is_out_of_scope(&self, key: &Key) -> bool {
        let Scope::Backup(wanted) = &self.context.verify.scope else {
            return false;
        };
        match Kind::of(key) {
            Kind::Manifest(id) | Kind::Tombstone(id) => id != *wanted,
            Kind::Repository | Kind::Log(_) => false,
            // What the manifest names and is not there was found by looking at the manifest.
            _ => true,
        }
    }

    /// Whether a deletion accounts for it.
    fn is_explained(&self, key: &Key, entry: &LogEntry) -> bool {
        if let Kind::Manifest(id) = Kind::of(key)
            && self.records.is_deleted(&id)
        {
            return true;
        }
        let mut later = self.records.log.range(entry.seq..);
        later.any(|(_, found)| {
            let body = found.body.as_ref();
            body.is_some_and(|other| accounts_for(other, key))
        })
    }

    /// The first object, which the log's first entry names, if that is there.
    async fn repository(&self) -> Result<(), CatalogError> {
        let key = keys::repository();
        if self.records.repository.is_none()
            && !self.context.is_named(&key)
            && !self.context.is_there(&key).await?
        {
            let what = "it is missing, and other objects of a repository are there";
            let next = "bring it back from a version or replica of the bucket";
            self.context.add(Finding::damage(&key, what).next(next));
        }
        Ok(())
    }

    /// Objects that are there and are not what was written are never overwritten: says what a person can do.
    async fn by_hand(&self) {
        let objects = self.records.ledger_objects();
        let entries = self.records.log.values();
        let entries = entries.filter_map(|found| found.body.as_ref());
        let named: BTreeMap<&str, &str> = entries
            .map(|entry| (entry.object.as_str(), entry.object_sha256.as_str()))
            .collect();
        let mut words = BTreeMap::new();
        for name in self.context.without_next() {
            let Ok(key) = Key::new(name.as_str()) else {
                continue;
            };
            let (there, right) = match Kind::of(&key) {
                Kind::Log(seq) => {
                    let there = self.records.log.get(&seq);
                    (there.map(|it| it.sha256.as_str()), self.entry_digest(seq))
                }
                _ => (objects.get(&key).copied(), named.get(key.as_str()).copied()),
            };
            // What is as it was written says something wrong, and older bytes of it would say the same.
            if there.is_none() || there == right {
                continue;
            }
            let next = match self.kept(&key, right).await {
                Some(_) => {
                    "what is there is never overwritten: while nothing else runs, move it away by hand; then `gs_pitr verify --all --repair` puts the right one back from the local mirror"
                }
                None => {
                    "what is there is never overwritten: bring the right one back from a version or replica of the bucket"
                }
            };
            words.insert(name, next);
        }
        self.context.say_next(&words);
    }

    /// Objects without an entry: a crash between the two.
    async fn unnamed_objects(&mut self) -> Result<(), CatalogError> {
        if !self.whole {
            // The entry may be among those that are lost.
            return Ok(());
        }
        let entries = self
            .records
            .log
            .values()
            .filter_map(|found| found.body.as_ref());
        let mut named: BTreeSet<String> = entries.map(|entry| entry.object.clone()).collect();
        let objects = self.records.ledger_objects();
        let is_unnamed = |key: &Key, named: &BTreeSet<String>| !named.contains(key.as_str());
        if objects.keys().any(|key| is_unnamed(key, &named)) {
            let since = self.since().await?.into_iter();
            named.extend(since.map(|entry| entry.object));
        }
        for (key, sha256) in objects {
            if !is_unnamed(key, &named) || self.context.is_named(key) {
                continue;
            }
            let what = "the log does not name it: a crash between the object and its entry";
            let next = "gs_pitr verify --all --repair";
            let finding = Finding::new(Severity::Repairable, key, what).next(next);
            self.context.add(finding);
            let (key, sha256) = (key.clone(), sha256.to_owned());
            self.repairs.push(Repair::LogEntry { key, sha256 });
        }
        Ok(())
    }

    /// Entries that were written since the listing.
    async fn since(&self) -> Result<Vec<LogEntry>, CatalogError> {
        let mut entries = Vec::new();
        for seq in self.last() + 1.. {
            let key = keys::log(seq);
            match crate::envelope::fetch(&*self.context.store, &key, OBJECT_LIMIT).await {
                Ok(stored) => {
                    entries.extend(crate::envelope::open::<LogEntry>(&key, &stored).ok());
                }
                Err(error) if error.is_absent() => break,
                Err(error) => return Err(error),
            }
        }
        Ok(entries)
    }
}

/// Whether an entry says that the object of `key` is gone. That of a deletion names the tombstone, which stays.
fn accounts_for(entry: &LogEntry, key: &Key) -> bool {
    if !removes(&entry.action) {
        return false;
    }
    match Kind::of(key) {
        Kind::Tombstone(_) => false,
        Kind::Manifest(id) if entry.object == keys::tombstone(&id).as_str() => true,
        _ => entry.object == key.as_str(),
    }
}

/// Whether entries of this action say that their object is gone, by the name: newer versions have more of them.
fn removes(action: &LogAction) -> bool {
    let name = serde_json::to_value(action).ok();
    let name = name
        .as_ref()
        .and_then(|name| name.as_str())
        .unwrap_or_default();
    name.ends_with("-removed") || name.ends_with("-deleted")
}
