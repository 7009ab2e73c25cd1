//! What the bucket holds, as far as retention is concerned.

use std::collections::{BTreeMap, BTreeSet};

use futures_util::TryStreamExt as _;
use jiff::Timestamp;
use pipeline::store::{Key, UploadId, VersionId};
use uuid::Uuid;

use crate::check;
use crate::envelope::{self, MANIFEST_LIMIT};
use crate::error::CatalogError;
use crate::ids::{BackupId, EpochId, PointId};
use crate::journal;
use crate::keys;
use crate::lease::StandingLease;
use crate::model::{
    LeaseScope, LogAction, Manifest, ManifestState, OperationEvent, OperationRecord, Point,
};
use crate::repo::{Catalog, PointState, in_parallel};
use crate::retention::log;
use crate::wal::WalName;

/// One key with all its versions.
#[derive(Debug, Clone)]
pub struct Stored {
    /// The key.
    pub key: Key,
    /// Every version, and every marker of a deletion, with its size in bytes.
    pub versions: Vec<(Option<VersionId>, u64)>,
    /// Bytes of the version that readers get; `None`: a marker hides all of them.
    pub size: Option<u64>,
    /// When the newest version was written, by the store.
    pub newest: Timestamp,
}

impl Stored {
    /// Bytes of all versions.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        self.versions.iter().map(|(_, bytes)| bytes).sum()
    }
}

/// What a name below `backups/` is to retention.
#[derive(Debug)]
pub enum HeldState {
    /// A backup.
    Complete(Box<Manifest>),
    /// It has a tombstone. The manifest goes last, so while something is left it is mostly there.
    Deleted(Option<Box<Manifest>>),
    /// It was fenced.
    Abandoned,
    /// No manifest: it is being made, or died.
    Unfinished,
    /// Its manifest cannot be used, or is missing though it was there once: why.
    Unreadable(String),
}

/// One name below `backups/`.
#[derive(Debug)]
pub struct BackupHolding {
    /// Everything below its name.
    pub objects: Vec<Stored>,
    /// What it is.
    pub state: HeldState,
}

/// One point.
#[derive(Debug)]
pub struct PointHolding {
    /// Its object.
    pub stored: Stored,
    /// Its content, or why there is none.
    pub point: Result<Box<Point>, String>,
}

/// One WAL segment.
#[derive(Debug)]
pub struct WalHolding {
    /// Its name.
    pub name: WalName,
    /// Its object.
    pub stored: Stored,
}

/// One gap.
#[derive(Debug)]
pub struct GapHolding {
    /// Where WAL goes on behind it.
    pub to: u64,
    /// Its object.
    pub stored: Stored,
}

/// One operation's journal.
#[derive(Debug)]
pub struct OperationHolding {
    /// All of its objects.
    pub objects: Vec<Stored>,
    /// When its first record was written, by the store.
    pub started: Timestamp,
    /// When the newest was.
    pub newest: Timestamp,
    /// `backup`, `restore`, ...; `None` if its start cannot be read.
    pub kind: Option<String>,
    /// The backup concerned.
    pub backup: Option<BackupId>,
    /// The node concerned, if it is one agent's part.
    pub node: Option<Uuid>,
    /// Whether it journalled its end, and nothing after that.
    pub ended: bool,
    /// Why not all of it can be read.
    pub damaged: Option<String>,
    /// Multipart uploads that stand under the keys that it announced, if it has not ended.
    pub uploads: Vec<(Key, UploadId)>,
}

impl OperationHolding {
    /// Whether it makes this backup, or a part of it.
    #[must_use]
    pub fn makes(&self, id: &BackupId) -> bool {
        self.kind.as_deref() == Some("backup") && self.backup.as_ref() == Some(id)
    }
}

/// All of it, at one moment by the store's clock.
#[derive(Debug)]
pub struct Holdings {
    /// The moment.
    pub now: Timestamp,
    /// Names below `backups/`.
    pub backups: BTreeMap<String, BackupHolding>,
    /// Points by name.
    pub points: BTreeMap<String, PointHolding>,
    /// The proxies' metadata by the name of its point.
    pub metadata: BTreeMap<String, Stored>,
    /// Names of all points that have an object of any version, even one that is hidden.
    pub point_names: BTreeSet<String>,
    /// Segments by node and epoch, by name.
    pub wal: BTreeMap<(Uuid, EpochId), Vec<WalHolding>>,
    /// Gaps by node and epoch.
    pub gaps: BTreeMap<(Uuid, EpochId), Vec<GapHolding>>,
    /// Journals.
    pub operations: BTreeMap<Uuid, OperationHolding>,
    /// Lease objects of each scope, the oldest first.
    pub leases: Vec<Vec<Stored>>,
    /// Operations that hold a lease now.
    pub holders: BTreeSet<Uuid>,
    /// The backup that is being made under a lease; `Some(None)`: there is one, and it cannot be said which.
    pub in_making: Option<Option<BackupId>>,
    /// Backups that are read, and by which operation.
    pub pinned: BTreeMap<BackupId, Uuid>,
}

impl Holdings {
    /// Looks. The order matters, see the module.
    ///
    /// # Errors
    /// [`CatalogError::Damaged`] if a lease or a pin cannot be read: then nobody can say who operates;
    /// [`CatalogError::Store`].
    pub async fn read(catalog: &Catalog) -> Result<Self, CatalogError> {
        let now = timestamp(catalog.store().now().await?);
        let (wal, gaps) = wal(catalog, now).await?;
        // A point comes after its metadata, so what is listed here has its point in the listing after it.
        let metadata = by_name(catalog, keys::METADATA, now).await?;
        let point_names = by_name(catalog, keys::POINTS, now).await?;
        let point_names = point_names.into_keys().collect();
        let points = points(catalog, now).await?;
        let operations = operations(catalog, now).await?;
        let backups = backups(catalog, now).await?;
        let mut holders = BTreeSet::new();
        let mut leases = Vec::new();
        let mut in_making = None;
        for scope in [
            LeaseScope::Backup,
            LeaseScope::Restore,
            LeaseScope::Maintain,
        ] {
            leases.push(by_key(catalog, &keys::leases_prefix(scope), now).await?);
            if let Some(standing) = catalog.lease(scope).await?.filter(StandingLease::is_held) {
                holders.insert(standing.lease.operation);
                if scope == LeaseScope::Backup {
                    in_making = Some(standing.lease.backup_id);
                }
            }
        }
        let pins = catalog.pins().await?.into_iter().map(|live| live.pin);
        let pinned =
            pins.flat_map(|pin| pin.backups.into_iter().map(move |id| (id, pin.operation)));
        Ok(Self {
            now,
            backups,
            points,
            metadata,
            point_names,
            wal,
            gaps,
            operations,
            leases,
            holders,
            in_making,
            pinned: pinned.collect(),
        })
    }
}

fn timestamp(time: std::time::SystemTime) -> Timestamp {
    Timestamp::try_from(time).unwrap_or(Timestamp::MAX)
}

/// The keys below a prefix with all their versions. What has no date counts as written now.
async fn by_key(
    catalog: &Catalog,
    prefix: &str,
    now: Timestamp,
) -> Result<Vec<Stored>, CatalogError> {
    let mut all: BTreeMap<Key, Stored> = BTreeMap::new();
    let mut listing = catalog.store().list_versions(prefix);
    while let Some(found) = listing.try_next().await? {
        let written = found.last_modified.map_or(now, timestamp);
        let stored = all.entry(found.key.clone()).or_insert_with(|| Stored {
            key: found.key,
            versions: Vec::new(),
            size: None,
            newest: written,
        });
        stored.versions.push((found.version, found.size));
        stored.newest = stored.newest.max(written);
        if found.is_latest && !found.is_marker {
            stored.size = Some(found.size);
        }
    }
    Ok(all.into_values().collect())
}

type ByEpoch<T> = BTreeMap<(Uuid, EpochId), Vec<T>>;

/// What lies directly below a prefix, by name without `.json`.
async fn by_name(
    catalog: &Catalog,
    prefix: &str,
    now: Timestamp,
) -> Result<BTreeMap<String, Stored>, CatalogError> {
    let listed = by_key(catalog, prefix, now).await?.into_iter();
    let named = listed.filter_map(|stored| {
        let name = stored.key.as_str().strip_prefix(prefix)?;
        let name = name.strip_suffix(".json")?.to_owned();
        Some((name, stored))
    });
    Ok(named.collect())
}

async fn wal(
    catalog: &Catalog,
    now: Timestamp,
) -> Result<(ByEpoch<WalHolding>, ByEpoch<GapHolding>), CatalogError> {
    let (mut all, mut gaps) = (ByEpoch::<WalHolding>::new(), ByEpoch::<GapHolding>::new());
    for stored in by_key(catalog, "wal/", now).await? {
        let mut parts = stored.key.as_str().split('/').skip(1);
        let (Some(node), Some(epoch), Some(file), None) =
            (parts.next(), parts.next(), parts.next(), parts.next())
        else {
            continue;
        };
        let (Ok(node), Ok(epoch)) = (node.parse::<Uuid>(), epoch.parse::<EpochId>()) else {
            continue;
        };
        if let Some(to) = end_of_gap(node, &epoch, &stored.key) {
            let of_epoch = gaps.entry((node, epoch)).or_default();
            of_epoch.push(GapHolding { to, stored });
            continue;
        }
        let name = file.strip_suffix(".zst").map(str::parse::<WalName>);
        if let Some(Ok(name)) = name
            && !name.is_history()
        {
            let of_epoch = all.entry((node, epoch)).or_default();
            of_epoch.push(WalHolding { name, stored });
        }
    }
    Ok((all, gaps))
}

/// Whether a key is one of a gap.
pub(super) fn is_gap(key: &Key) -> bool {
    let mut parts = key.as_str().split('/').skip(1);
    let (Some(node), Some(epoch)) = (parts.next(), parts.next()) else {
        return false;
    };
    match (node.parse(), epoch.parse()) {
        (Ok(node), Ok(epoch)) => end_of_gap(node, &epoch, key).is_some(),
        _ => false,
    }
}

/// Where the gap ends whose key this is; `None`: it is none.
fn end_of_gap(node: Uuid, epoch: &EpochId, key: &Key) -> Option<u64> {
    let positions = key.as_str().strip_prefix(&keys::gaps_prefix(node, epoch))?;
    let (from, to) = positions.strip_suffix(".json")?.split_once('-')?;
    let part = |text: &str| u64::from_str_radix(text, 16).ok();
    let (from, to) = (part(from)?, part(to)?);
    (keys::gap(node, epoch, from, to) == *key).then_some(to)
}

async fn points(
    catalog: &Catalog,
    now: Timestamp,
) -> Result<BTreeMap<String, PointHolding>, CatalogError> {
    let listed = by_key(catalog, keys::POINTS, now).await?;
    let mut objects: BTreeMap<_, _> = listed
        .into_iter()
        .map(|stored| (stored.key.clone(), stored))
        .collect();
    let mut all = BTreeMap::new();
    for listed in catalog.points().await? {
        let key = match listed.name.parse::<PointId>() {
            Ok(id) => keys::point(&id),
            Err(_) => continue,
        };
        // One that came to be since the first listing is for another time.
        let Some(stored) = objects.remove(&key) else {
            continue;
        };
        let point = match listed.state {
            PointState::Usable(point) => Ok(point),
            PointState::Unusable(error) if error.is_absent() => continue,
            PointState::Unusable(error) => Err(error.to_string()),
        };
        all.insert(listed.name, PointHolding { stored, point });
    }
    Ok(all)
}

async fn operations(
    catalog: &Catalog,
    now: Timestamp,
) -> Result<BTreeMap<Uuid, OperationHolding>, CatalogError> {
    let mut journals: BTreeMap<Uuid, Vec<Stored>> = BTreeMap::new();
    for stored in by_key(catalog, "operations/", now).await? {
        let id = stored.key.as_str().split('/').nth(1);
        if let Some(Ok(id)) = id.map(str::parse) {
            journals.entry(id).or_default().push(stored);
        }
    }
    let read = in_parallel(journals, |(id, objects)| async move {
        Ok((id, operation(catalog, id, objects, now).await?))
    });
    Ok(read.await?.into_iter().collect())
}

async fn operation(
    catalog: &Catalog,
    id: Uuid,
    objects: Vec<Stored>,
    now: Timestamp,
) -> Result<OperationHolding, CatalogError> {
    let store = catalog.store();
    let mut this = OperationHolding {
        started: objects.iter().map(|it| it.newest).min().unwrap_or(now),
        newest: objects.iter().map(|it| it.newest).max().unwrap_or(now),
        objects: Vec::new(),
        kind: None,
        backup: None,
        node: None,
        ended: false,
        damaged: None,
        uploads: Vec::new(),
    };
    let mut announced = BTreeSet::new();
    for object in objects.iter().filter(|object| object.size.is_some()) {
        let probe = object.key.as_str().starts_with(&keys::probes_prefix(id));
        if probe || object.key == keys::decision(id) || object.key == keys::pin(id) {
            continue;
        }
        match journal::record(&**store, &object.key).await {
            Ok(record) => take_in(&mut this, &mut announced, record),
            Err(error) if error.is_absent() => {}
            Err(error) if error.is_of_object() => this.damaged = Some(error.to_string()),
            Err(error) => return Err(error),
        }
    }
    if !this.ended {
        for key in announced {
            let uploads = store.list_uploads(&key).await?;
            let uploads = uploads.into_iter().map(|upload| (key.clone(), upload));
            this.uploads.extend(uploads);
        }
    }
    this.objects = objects;
    Ok(this)
}

fn take_in(this: &mut OperationHolding, announced: &mut BTreeSet<Key>, record: OperationRecord) {
    match record.event {
        OperationEvent::Started {
            kind,
            backup_id,
            node_id,
            ..
        } => {
            this.kind = Some(kind);
            this.backup = backup_id;
            this.node = node_id;
        }
        OperationEvent::UploadsIntended { keys } => {
            announced.extend(keys.into_iter().filter_map(|key| Key::new(key).ok()));
            // It wrote on after its end: that was not one.
            this.ended = false;
        }
        OperationEvent::Ended { .. } => this.ended = true,
        _ => {}
    }
}

async fn backups(
    catalog: &Catalog,
    now: Timestamp,
) -> Result<BTreeMap<String, BackupHolding>, CatalogError> {
    let mut names: BTreeMap<String, Vec<Stored>> = BTreeMap::new();
    for stored in by_key(catalog, keys::BACKUPS, now).await? {
        if let Some(name) = stored.key.as_str().split('/').nth(1) {
            let name = name.to_owned();
            names.entry(name).or_default().push(stored);
        }
    }
    let read = in_parallel(names, |(name, objects)| async move {
        let state = state(catalog, &name, &objects).await?;
        Ok((name, BackupHolding { objects, state }))
    });
    let mut all: BTreeMap<_, _> = read.await?.into_iter().collect();
    let unfinished = |held: &BackupHolding| matches!(held.state, HeldState::Unfinished);
    if all.values().any(unfinished) {
        let committed = committed(catalog).await?;
        for (name, held) in &mut all {
            if matches!(held.state, HeldState::Unfinished) && committed.contains(name) {
                let why = "the log knows its manifest, and it is not there".to_owned();
                held.state = HeldState::Unreadable(why);
            }
        }
    }
    Ok(all)
}

async fn state(
    catalog: &Catalog,
    name: &str,
    objects: &[Stored],
) -> Result<HeldState, CatalogError> {
    let Ok(id) = name.parse::<BackupId>() else {
        return Ok(HeldState::Unreadable("its name is no backup id".to_owned()));
    };
    let find = |key: &Key| objects.iter().find(|object| object.key == *key);
    let deleted = find(&keys::tombstone(&id)).is_some_and(|object| object.size.is_some());
    let key = keys::manifest(&id);
    match find(&key) {
        None if deleted => return Ok(HeldState::Deleted(None)),
        None => return Ok(HeldState::Unfinished),
        Some(manifest) if manifest.size.is_none() && !deleted => {
            let why = "its manifest is hidden by the mark of a deletion".to_owned();
            return Ok(HeldState::Unreadable(why));
        }
        Some(_) => {}
    }
    let read = match catalog.fetch(&key, MANIFEST_LIMIT).await {
        Ok(stored) => envelope::open::<Manifest>(&key, &stored),
        Err(error) => Err(error),
    };
    let read = read.and_then(|manifest| {
        let checked = check::manifest(&manifest, &id);
        checked.map_err(|why| CatalogError::damaged(&key, why))?;
        Ok(manifest)
    });
    Ok(match read {
        Ok(manifest) if manifest.state == ManifestState::Abandoned => HeldState::Abandoned,
        Ok(manifest) if deleted => HeldState::Deleted(Some(Box::new(manifest))),
        Ok(manifest) => HeldState::Complete(Box::new(manifest)),
        Err(error) if !error.is_of_object() => return Err(error),
        Err(_) if deleted => HeldState::Deleted(None),
        Err(error) => HeldState::Unreadable(error.to_string()),
    })
}

/// Names of the backups that the log says were committed.
async fn committed(catalog: &Catalog) -> Result<BTreeSet<String>, CatalogError> {
    let entries = log::entries(catalog).await?.into_iter();
    let of_manifests = entries.filter(|entry| entry.action == LogAction::BackupCommitted);
    let names = of_manifests.filter_map(|entry| {
        let name = entry.object.strip_prefix(keys::BACKUPS)?;
        Some(name.strip_suffix("/manifest.json")?.to_owned())
    });
    Ok(names.collect())
}
