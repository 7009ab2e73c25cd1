//! Every key below the prefix, and what it is the key of.

use std::collections::BTreeMap;

use futures_util::TryStreamExt as _;
use pipeline::store::{Key, ObjectStore};
use uuid::Uuid;

use crate::error::CatalogError;
use crate::ids::{BackupId, EpochId, PointId};
use crate::keys;
use crate::model::LeaseScope;
use crate::wal::{WalFile, WalName};

/// What a key is the key of.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Kind {
    Repository,
    Log(u64),
    Lease(LeaseScope, u64),
    Node(Uuid),
    Epoch(Uuid, EpochId),
    /// What says that WAL is missing for good.
    Gap(Uuid, EpochId, u64, u64),
    Wal(WalFile),
    /// Reserved: the first bytes of a segment.
    PartialWal,
    Manifest(BackupId),
    Tombstone(BackupId),
    Index(BackupId, Uuid, u32),
    Pack(BackupId, Uuid, u32, u32),
    Point(PointId),
    Metadata(PointId),
    Record(Uuid, u64),
    Decision(Uuid),
    Pin(Uuid),
    /// What a check of the store writes and removes again.
    Probe(Uuid),
    /// No key of this format, or one that is not spelt as it must be.
    Unknown,
}

impl Kind {
    /// What `key` is. A key that reads like one of ours and is not spelt exactly so is unknown.
    pub(super) fn of(key: &Key) -> Self {
        match Self::read(key.as_str()) {
            Some((kind, canonical)) if canonical == *key => kind,
            _ => Self::Unknown,
        }
    }

    fn read(key: &str) -> Option<(Self, Key)> {
        let parts: Vec<&str> = key.split('/').collect();
        let json = |name: &str| name.strip_suffix(".json").map(str::to_owned);
        let read = match parts.as_slice() {
            [keys::REPOSITORY] => (Self::Repository, keys::repository()),
            ["log", name] => {
                let seq = json(name)?.parse().ok()?;
                (Self::Log(seq), keys::log(seq))
            }
            ["lease", scope, name] => {
                let all = [
                    LeaseScope::Backup,
                    LeaseScope::Restore,
                    LeaseScope::Maintain,
                ];
                let scope = all.into_iter().find(|it| it.name() == *scope)?;
                let seq = json(name)?.parse().ok()?;
                (Self::Lease(scope, seq), keys::lease(scope, seq))
            }
            ["nodes", name] => {
                let node = json(name)?.parse().ok()?;
                (Self::Node(node), keys::node(node))
            }
            ["points", name] => {
                let point: PointId = json(name)?.parse().ok()?;
                let key = keys::point(&point);
                (Self::Point(point), key)
            }
            ["metadata", name] => {
                let point: PointId = json(name)?.parse().ok()?;
                let key = keys::metadata(&point);
                (Self::Metadata(point), key)
            }
            ["wal", node, epoch, name] => Self::read_wal(node, epoch, name)?,
            ["backups", id, rest @ ..] => Self::read_backup(&id.parse().ok()?, rest)?,
            ["operations", operation, "probe", name] => {
                let operation = operation.parse().ok()?;
                let key = keys::probe(operation, name).ok()?;
                (Self::Probe(operation), key)
            }
            ["operations", operation, name] => {
                let operation = operation.parse().ok()?;
                match json(name)?.as_str() {
                    "decision" => (Self::Decision(operation), keys::decision(operation)),
                    "pin" => (Self::Pin(operation), keys::pin(operation)),
                    seq => {
                        let seq = seq.parse().ok()?;
                        let key = keys::operation_record(operation, seq);
                        (Self::Record(operation, seq), key)
                    }
                }
            }
            _ => return None,
        };
        Some(read)
    }

    fn read_wal(node: &str, epoch: &str, name: &str) -> Option<(Self, Key)> {
        let (node, epoch): (Uuid, EpochId) = (node.parse().ok()?, epoch.parse().ok()?);
        if name == "epoch.json" {
            let key = keys::epoch(node, &epoch);
            return Some((Self::Epoch(node, epoch), key));
        }
        if let Some(positions) = name.strip_prefix("gap-") {
            let (from, to) = positions.strip_suffix(".json")?.split_once('-')?;
            let (from, to) = (
                u64::from_str_radix(from, 16).ok()?,
                u64::from_str_radix(to, 16).ok()?,
            );
            let key = keys::gap(node, &epoch, from, to);
            return Some((Self::Gap(node, epoch, from, to), key));
        }
        let stem = name.strip_suffix(".zst")?;
        if let Ok(name) = stem.parse::<WalName>() {
            let file = WalFile { node, epoch, name };
            let key = file.key();
            return Some((Self::Wal(file), key));
        }
        let (name, length) = stem.rsplit_once('.')?;
        let (name, length) = (name.parse().ok()?, length.parse().ok()?);
        let key = keys::partial_wal(node, &epoch, &name, length);
        Some((Self::PartialWal, key))
    }

    fn read_backup(id: &BackupId, rest: &[&str]) -> Option<(Self, Key)> {
        let id = id.clone();
        match rest {
            ["manifest.json"] => {
                let key = keys::manifest(&id);
                Some((Self::Manifest(id), key))
            }
            ["deleted.json"] => {
                let key = keys::tombstone(&id);
                Some((Self::Tombstone(id), key))
            }
            [node, attempt, "index"] => {
                let (node, attempt) = (node.parse().ok()?, attempt.parse().ok()?);
                let key = keys::index(&id, node, attempt);
                Some((Self::Index(id, node, attempt), key))
            }
            [node, attempt, pack] => {
                let (node, attempt) = (node.parse().ok()?, attempt.parse().ok()?);
                let number = pack.strip_prefix("pack-")?.parse().ok()?;
                let key = keys::pack(&id, node, attempt, number);
                Some((Self::Pack(id, node, attempt, number), key))
            }
            _ => None,
        }
    }
}

/// The listing.
#[derive(Debug, Default)]
pub(super) struct Inventory {
    sizes: BTreeMap<Key, u64>,
}

impl Inventory {
    /// Lists everything.
    ///
    /// # Errors
    /// [`CatalogError::Store`].
    pub(super) async fn list(store: &dyn ObjectStore) -> Result<Self, CatalogError> {
        let mut sizes = BTreeMap::new();
        let mut listing = store.list("");
        while let Some(object) = listing.try_next().await? {
            sizes.insert(object.key, object.size);
        }
        Ok(Self { sizes })
    }

    pub(super) fn is_empty(&self) -> bool {
        self.sizes.is_empty()
    }

    /// Stored bytes of an object, if it was listed.
    pub(super) fn size(&self, key: &Key) -> Option<u64> {
        self.sizes.get(key).copied()
    }

    pub(super) fn iter(&self) -> impl Iterator<Item = (&Key, Kind)> {
        self.sizes.keys().map(|key| (key, Kind::of(key)))
    }
}
