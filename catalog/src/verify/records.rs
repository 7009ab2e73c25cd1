//! Every small object that is in scope, read once: its digest, and its body if it has a readable one.

use std::collections::{BTreeMap, BTreeSet};

use pipeline::error::PipelineError;
use pipeline::store::{Key, StoreError};
use serde::de::DeserializeOwned;
use uuid::Uuid;

use super::finding::{Finding, Severity};
use super::inventory::{Inventory, Kind};
use super::{Context, PARALLEL, Scope, each};
use crate::envelope::{self, MANIFEST_LIMIT, METADATA_LIMIT, OBJECT_LIMIT, sha256_hex};
use crate::error::CatalogError;
use crate::ids::{BackupId, EpochId, PointId};
use crate::keys;
use crate::model::{
    Decision, Epoch, Gap, Lease, LeaseScope, LogEntry, Manifest, ManifestState, Metadata, Node,
    OperationRecord, Pin, Point, Repository, Tombstone,
};

/// An object that is there.
#[derive(Debug)]
pub(super) struct Small<T> {
    pub(super) key: Key,
    /// Hex SHA-256 of the stored bytes; empty if they could not be had.
    pub(super) sha256: String,
    /// `None`: it is damaged, and that was found.
    pub(super) body: Option<T>,
}

/// What an operation left.
#[derive(Debug, Default)]
pub(super) struct Journal {
    pub(super) records: BTreeMap<u64, Small<OperationRecord>>,
    pub(super) decision: Option<Small<Decision>>,
    pub(super) pin: Option<Small<Pin>>,
}

/// All of them.
#[derive(Debug, Default)]
pub(super) struct Records {
    pub(super) repository: Option<Small<Repository>>,
    pub(super) log: BTreeMap<u64, Small<LogEntry>>,
    pub(super) nodes: BTreeMap<Uuid, Small<Node>>,
    pub(super) epochs: BTreeMap<(Uuid, EpochId), Small<Epoch>>,
    pub(super) gaps: BTreeMap<Key, Small<Gap>>,
    pub(super) points: BTreeMap<PointId, Small<Point>>,
    /// Without their documents, which may be large and say nothing here.
    pub(super) metadata: BTreeMap<PointId, Small<Metadata>>,
    pub(super) manifests: BTreeMap<BackupId, Small<Manifest>>,
    pub(super) tombstones: BTreeMap<BackupId, Small<Tombstone>>,
    pub(super) leases: BTreeMap<(&'static str, u64), Small<Lease>>,
    pub(super) operations: BTreeMap<Uuid, Journal>,
}

/// What a verification of one backup looks at.
#[derive(Debug, Default)]
struct Needed {
    backups: BTreeSet<BackupId>,
    nodes: BTreeSet<Uuid>,
    points: BTreeSet<PointId>,
}

impl Records {
    /// Reads them.
    ///
    /// # Errors
    /// As [`super::Verify::run`].
    pub(super) async fn load(
        context: &Context<'_>,
        inventory: &Inventory,
    ) -> Result<Self, CatalogError> {
        let mut records = Self::default();
        let key = keys::repository();
        if inventory.size(&key).is_some() {
            records.repository = read(context, key, OBJECT_LIMIT).await?;
        }
        let needed = match &context.verify.scope {
            Scope::All => None,
            Scope::Backup(id) => Some(records.load_chain(context, id).await?),
        };
        records
            .load_ledger(context, inventory, needed.as_ref())
            .await?;
        if needed.is_none() {
            records.load_operations(context, inventory).await?;
        }
        Ok(records)
    }

    /// The manifests of a backup and of those it builds on, and what they name.
    async fn load_chain(
        &mut self,
        context: &Context<'_>,
        id: &BackupId,
    ) -> Result<Needed, CatalogError> {
        let mut needed = Needed::default();
        let mut next = Some(id.clone());
        // A circle of parents ends at the first one seen twice.
        while let Some(id) = next.take().filter(|id| needed.backups.insert(id.clone())) {
            let found = read::<Manifest>(context, keys::manifest(&id), MANIFEST_LIMIT).await?;
            let Some(found) = found else {
                continue;
            };
            if let Some(manifest) = &found.body {
                next.clone_from(&manifest.parent);
                needed.points.extend(manifest.point.clone());
                needed
                    .nodes
                    .extend(manifest.nodes.iter().map(|node| node.node_id));
            }
            self.manifests.insert(id, found);
        }
        Ok(needed)
    }

    /// What the log is about, and the log.
    async fn load_ledger(
        &mut self,
        context: &Context<'_>,
        inventory: &Inventory,
        needed: Option<&Needed>,
    ) -> Result<(), CatalogError> {
        let (mut log, mut nodes, mut epochs) = (Vec::new(), Vec::new(), Vec::new());
        let (mut points, mut manifests, mut tombstones) = (Vec::new(), Vec::new(), Vec::new());
        let mut gaps = Vec::new();
        let mut metadata = Vec::new();
        for (key, kind) in inventory.iter() {
            let all = needed.is_none();
            let node = |node| needed.is_none_or(|needed| needed.nodes.contains(node));
            match kind {
                Kind::Log(seq) => log.push((seq, key.clone())),
                Kind::Node(id) if node(&id) => nodes.push((id, key.clone())),
                Kind::Epoch(id, epoch) if node(&id) => epochs.push(((id, epoch), key.clone())),
                Kind::Gap(id, ..) if node(&id) => gaps.push((key.clone(), key.clone())),
                Kind::Point(id) if needed.is_none_or(|needed| needed.points.contains(&id)) => {
                    points.push((id, key.clone()));
                }
                Kind::Metadata(id) if needed.is_none_or(|needed| needed.points.contains(&id)) => {
                    metadata.push((id, key.clone()));
                }
                Kind::Manifest(id) if all => manifests.push((id, key.clone())),
                Kind::Tombstone(id) if needed.is_none_or(|it| it.backups.contains(&id)) => {
                    tombstones.push((id, key.clone()));
                }
                _ => {}
            }
        }
        self.log = read_kind(context, log, OBJECT_LIMIT).await?;
        self.nodes = read_kind(context, nodes, OBJECT_LIMIT).await?;
        self.epochs = read_kind(context, epochs, OBJECT_LIMIT).await?;
        self.gaps = read_kind(context, gaps, OBJECT_LIMIT).await?;
        self.points = read_kind(context, points, OBJECT_LIMIT).await?;
        self.tombstones = read_kind(context, tombstones, OBJECT_LIMIT).await?;
        // One after the other: each may be of 32 MiB.
        for (id, key) in metadata {
            if let Some(mut found) = read::<Metadata>(context, key, METADATA_LIMIT).await? {
                if let Some(body) = &mut found.body {
                    body.document = String::new();
                }
                self.metadata.insert(id, found);
            }
        }
        let manifests = read_kind(context, manifests, MANIFEST_LIMIT).await?;
        self.manifests.extend(manifests);
        Ok(())
    }

    async fn load_operations(
        &mut self,
        context: &Context<'_>,
        inventory: &Inventory,
    ) -> Result<(), CatalogError> {
        let (mut leases, mut records) = (Vec::new(), Vec::new());
        let (mut decisions, mut pins) = (Vec::new(), Vec::new());
        for (key, kind) in inventory.iter() {
            let key = key.clone();
            match kind {
                Kind::Lease(scope, seq) => leases.push(((scope.name(), seq), key)),
                Kind::Record(operation, seq) => records.push(((operation, seq), key)),
                Kind::Decision(operation) => decisions.push((operation, key)),
                Kind::Pin(operation) => pins.push((operation, key)),
                _ => {}
            }
        }
        self.leases = read_kind(context, leases, OBJECT_LIMIT).await?;
        for ((operation, seq), record) in read_kind(context, records, OBJECT_LIMIT).await? {
            let journal = self.operations.entry(operation).or_default();
            journal.records.insert(seq, record);
        }
        for (operation, decision) in read_kind(context, decisions, OBJECT_LIMIT).await? {
            self.operations.entry(operation).or_default().decision = Some(decision);
        }
        for (operation, pin) in read_kind(context, pins, OBJECT_LIMIT).await? {
            self.operations.entry(operation).or_default().pin = Some(pin);
        }
        Ok(())
    }

    /// A manifest, if it can be read.
    pub(super) fn manifest(&self, id: &BackupId) -> Option<&Manifest> {
        self.manifests.get(id)?.body.as_ref()
    }

    /// Backups with a tombstone, whatever that contains, are deleted.
    pub(super) fn is_deleted(&self, id: &BackupId) -> bool {
        self.tombstones.contains_key(id)
    }

    /// Manifests of backups, fences and deleted ones left out.
    pub(super) fn complete(&self) -> impl Iterator<Item = (&BackupId, &Manifest)> {
        let manifests = self.manifests.iter();
        let manifests = manifests.filter_map(|(id, found)| Some((id, found.body.as_ref()?)));
        manifests.filter(|(id, manifest)| {
            manifest.state == ManifestState::Complete && !self.is_deleted(id)
        })
    }

    /// Everything that the log names, by key: the digest of what is there, and the action that made it.
    pub(super) fn ledger_objects(&self) -> BTreeMap<&Key, &str> {
        fn both<T>(small: &Small<T>) -> (&Key, &str) {
            (&small.key, &small.sha256)
        }
        let mut all: BTreeMap<&Key, &str> = BTreeMap::new();
        all.extend(self.repository.iter().map(both));
        all.extend(self.nodes.values().map(both));
        all.extend(self.epochs.values().map(both));
        all.extend(self.gaps.values().map(both));
        all.extend(self.points.values().map(both));
        all.extend(self.manifests.values().map(both));
        all.extend(self.tombstones.values().map(both));
        all
    }

    /// How many objects were read.
    pub(super) fn count(&self) -> u64 {
        let of_operation = |journal: &Journal| {
            let once = [journal.decision.is_some(), journal.pin.is_some()];
            journal.records.len() + once.into_iter().filter(|there| *there).count()
        };
        let operations: usize = self.operations.values().map(of_operation).sum();
        let ledger = self.ledger_objects().len() + self.metadata.len();
        let count = ledger + self.log.len() + self.leases.len() + operations;
        count as u64
    }
}

/// Name of a scope's objects, for their keys.
pub(super) fn scope_of(name: &str) -> LeaseScope {
    let all = [
        LeaseScope::Backup,
        LeaseScope::Restore,
        LeaseScope::Maintain,
    ];
    all.into_iter()
        .find(|scope| scope.name() == name)
        .unwrap_or(LeaseScope::Maintain)
}

async fn read_kind<K: Ord, T: DeserializeOwned>(
    context: &Context<'_>,
    keys: Vec<(K, Key)>,
    limit: usize,
) -> Result<BTreeMap<K, Small<T>>, CatalogError> {
    let read = each(keys, PARALLEL, |(name, key)| async move {
        let found = read(context, key, limit).await?;
        Ok(found.map(|found| (name, found)))
    });
    Ok(read.await?.into_iter().flatten().collect())
}

/// Reads an object; `None` if it has gone since it was listed, which the log explains or does not.
async fn read<T: DeserializeOwned>(
    context: &Context<'_>,
    key: Key,
    limit: usize,
) -> Result<Option<Small<T>>, CatalogError> {
    if context.verify.downloader.cancel().is_cancelled() {
        return Err(PipelineError::Cancelled.into());
    }
    let stored = match envelope::fetch(&*context.store, &key, limit).await {
        Ok(stored) => stored,
        Err(error) if error.is_absent() => return Ok(None),
        Err(error) => {
            let what = context.of_object(error).await?;
            context.add(Finding::damage(&key, what));
            let (sha256, body) = (String::new(), None);
            return Ok(Some(Small { key, sha256, body }));
        }
    };
    let sha256 = sha256_hex(&stored);
    let body = match envelope::open(&key, &stored) {
        Ok(body) => Some(body),
        Err(error @ CatalogError::NewerFormat { .. }) if key == keys::repository() => {
            return Err(error);
        }
        Err(CatalogError::NewerFormat { major, .. }) => {
            let what = format!("it has format {major}, which this program cannot verify");
            let finding = Finding::new(Severity::Note, &key, what);
            context.add(finding.next("verify with a newer gs_pitr"));
            None
        }
        Err(error) => {
            let what = context.of_object(error).await?;
            context.add(Finding::damage(&key, what));
            None
        }
    };
    Ok(Some(Small { key, sha256, body }))
}

impl Context<'_> {
    /// What an error says of the one object that was asked for. A store that hands out others and not this one
    /// has lost it, whatever it calls that.
    ///
    /// # Errors
    /// The error, if it is not about the object.
    pub(super) async fn of_object(&self, error: CatalogError) -> Result<String, CatalogError> {
        match error {
            CatalogError::Damaged { what, .. } => Ok(what),
            CatalogError::NewerFormat { .. } => Ok(error.to_string()),
            CatalogError::Store(StoreError::NotFound(_)) => Ok("it is missing".to_owned()),
            CatalogError::Store(StoreError::Corrupt(detail)) => Ok(detail.message.clone()),
            CatalogError::Store(StoreError::Unavailable(_) | StoreError::Throttled(_))
            | CatalogError::Pipeline(PipelineError::Deadline { .. }) => {
                match self.store.head(&keys::repository()).await {
                    Ok(_) | Err(StoreError::NotFound(_)) => {
                        Ok(format!("the store does not hand it out: {error}"))
                    }
                    Err(_) => Err(error),
                }
            }
            error => Err(error),
        }
    }
}
