//! A small repository with everything in it that a repository can have, written by the real catalog and pipeline.

use std::collections::{BTreeMap, HashMap};
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use catalog::ids::{BackupId, EpochId, PointId};
use catalog::journal::{OperationJournal, OperationStart};
use catalog::keys;
use catalog::lease::LeaseRequest;
use catalog::mirror::Mirror;
use catalog::model::{Holder, LeaseScope, OperationEvent, PromotedNode, Tombstone, Verdict};
use catalog::repo::{NewEpoch, NewNode};
use catalog::verify::{Depth, Report, Scope, Verify};
use catalog::wal::{WalFile, WalName, put_segment};
use catalog::{Catalog, CatalogError};
use jiff::Timestamp;
use pipeline::budget::Budget;
use pipeline::download::Downloader;
use pipeline::index::{FilePacker, IndexBuilder};
use pipeline::meter::Meter;
use pipeline::pack::{EntryKind, IndexEntry, IndexInfo, KeyOf, PackInfo, PackOptions, PackSet};
use pipeline::store::{Key, ObjectStore};
use pipeline::throttle::Throttle;
use pipeline::upload::Uploader;
use serde_json::json;
use support::memory_store::MemoryStore;
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

/// Bytes of a WAL segment, the least there is.
pub(crate) const SEGMENT: u64 = 1 << 20;
/// The last segment before the name's middle part counts on, with segments of 1 MiB.
const EDGE: u64 = 0xFFF;

pub(crate) type Files = BTreeMap<String, Vec<u8>>;

/// The repository, and what went into it.
pub(crate) struct World {
    pub(crate) store: Arc<MemoryStore>,
    /// The complete backups, the older first.
    pub(crate) backups: Vec<BackupId>,
    pub(crate) files: BTreeMap<(BackupId, Uuid), Files>,
    pub(crate) wal: HashMap<WalFile, Bytes>,
    /// The store just before the newest complete backup's point, and just after that backup's end; the clock stands.
    pub(crate) commit: Option<(Arc<MemoryStore>, Arc<MemoryStore>)>,
}

struct Builder {
    store: Arc<MemoryStore>,
    shared: Arc<dyn ObjectStore>,
    catalog: Catalog,
    world: World,
    seed: u64,
}

#[derive(Clone)]
struct Place {
    node: Uuid,
    system: u64,
    epoch: EpochId,
    timeline: u32,
    /// Timeline, first and last number of the segments that a backup here needs.
    wal: Vec<(EpochId, u32, u64, u64)>,
}

fn noise(seed: u64, length: usize) -> Vec<u8> {
    let mut state = seed.wrapping_mul(2).wrapping_add(0x9E37_79B9_7F4A_7C15) | 1;
    let mut bytes = Vec::with_capacity(length + 8);
    while bytes.len() < length {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        bytes.extend_from_slice(&state.wrapping_mul(0x2545_F491_4F6C_DD1D).to_le_bytes());
    }
    bytes.truncate(length);
    bytes
}

pub(crate) fn holder(command: &str) -> Holder {
    Holder {
        host: "ops1".into(),
        user: "dba".into(),
        pid: 4711,
        command: command.into(),
    }
}

fn lsn(number: u64, offset: u64) -> String {
    let at = number * SEGMENT + offset;
    format!("{:X}/{:X}", at >> 32, at & 0xFFFF_FFFF)
}

pub(crate) fn downloader(store: &Arc<dyn ObjectStore>) -> Downloader {
    Downloader::new(
        Arc::clone(store),
        Budget::new(64 << 20),
        Throttle::new(None),
        Arc::<Meter>::default(),
        CancellationToken::new(),
    )
}

/// Verifies what is in a store.
pub(crate) async fn verify(
    store: &Arc<dyn ObjectStore>,
    scope: Scope,
    depth: Depth,
    mirror: Option<Mirror>,
) -> Result<Report, CatalogError> {
    let verify = Verify {
        scope,
        depth,
        jobs: 2,
        downloader: downloader(store),
        mirror,
    };
    verify.run(&|_| {}).await
}

impl World {
    pub(crate) async fn verify(&self, depth: Depth) -> Report {
        self.verify_as(Scope::All, depth).await
    }

    pub(crate) async fn verify_as(&self, scope: Scope, depth: Depth) -> Report {
        self.try_verify(scope, depth).await.unwrap()
    }

    pub(crate) async fn try_verify(
        &self,
        scope: Scope,
        depth: Depth,
    ) -> Result<Report, CatalogError> {
        let shared = Arc::clone(&self.store) as Arc<dyn ObjectStore>;
        verify(&shared, scope, depth, None).await
    }

    /// The same again, to do things to.
    pub(crate) fn fork(&self) -> Arc<MemoryStore> {
        Arc::new(self.store.fork())
    }

    /// Everything that is stored, by key.
    pub(crate) fn objects(&self) -> BTreeMap<Key, Bytes> {
        let keys = self.store.keys().into_iter();
        keys.map(|key| {
            let bytes = self.store.bytes(key.as_str()).unwrap();
            (key, bytes)
        })
        .collect()
    }

    /// Two nodes, two backups with points and WAL over an edge of the names, the second one in an epoch with a parent; a
    /// deleted backup, an abandoned one, restores that went forward and back, and all that operators leave.
    pub(crate) async fn build() -> Self {
        Self::builder().await.0.world
    }

    /// One more backup, of one node, that the WAL of its own epoch is enough for. No older point can be reached from it.
    pub(crate) async fn build_longer() -> Self {
        let (mut builder, [_, mut place]) = Self::builder().await;
        let id = "20261127T040233Z-F-00000007";
        builder.segments(&place.epoch, place.node, 1, 4, 5).await;
        place.wal = vec![(place.epoch.clone(), 1, 4, 5)];
        let last = builder.backup(Uuid::now_v7(), id, &[place]).await;
        builder.world.backups.push(last);
        builder.world
    }

    async fn builder() -> (Builder, [Place; 2]) {
        let store = Arc::new(MemoryStore::default());
        let shared = Arc::clone(&store) as Arc<dyn ObjectStore>;
        let first = Uuid::now_v7();
        let catalog = Catalog::open_or_create(Arc::clone(&shared), first)
            .await
            .unwrap();
        let world = Self {
            store: Arc::clone(&store),
            backups: Vec::new(),
            files: BTreeMap::new(),
            wal: HashMap::new(),
            commit: None,
        };
        let mut builder = Builder {
            store,
            shared,
            catalog,
            world,
            seed: 1,
        };
        let places = builder.run(first).await;
        (builder, places)
    }
}

impl Builder {
    async fn run(&mut self, first: Uuid) -> [Place; 2] {
        let mut one = self.node(first, 7_000_000_000_000_000_001, 1).await;
        let two = self.node(first, 7_000_000_000_000_000_002, 1).await;
        self.segments(&one.epoch, one.node, 1, EDGE - 1, EDGE + 1)
            .await;
        self.segments(&two.epoch, two.node, 1, 2, 3).await;
        let both = [one.clone(), two.clone()];
        let backup = self
            .backup(first, "20261121T040233Z-F-00000001", &both)
            .await;
        self.world.backups.push(backup.clone());

        let restored = Uuid::now_v7();
        one = self.restored(restored, &backup, &one).await;
        self.rolled_back(&backup).await;
        self.segments(&one.epoch, one.node, 2, EDGE + 2, EDGE + 2)
            .await;
        self.history(&one).await;
        let both = [one.clone(), two];
        let second = self
            .backup(Uuid::now_v7(), "20261122T040233Z-F-00000002", &both)
            .await;
        self.world.backups.push(second);

        let third = self
            .backup(Uuid::now_v7(), "20261123T040233Z-F-00000003", &both[1..])
            .await;
        self.deleted(&third).await;
        self.abandoned("20261124T040233Z-F-00000004").await;
        both
    }

    async fn node(&mut self, operation: Uuid, system: u64, timeline: u32) -> Place {
        let node = NewNode {
            system_identifier: system,
            host: "db1".into(),
            port: 5432,
        };
        let node = self
            .catalog
            .register_node(node, operation)
            .await
            .unwrap()
            .node_id;
        let epoch = self.epoch(operation, node, None, timeline).await;
        let wal = if system % 2 == 1 {
            (epoch.clone(), 1, EDGE - 1, EDGE + 1)
        } else {
            (epoch.clone(), 1, 2, 3)
        };
        Place {
            node,
            system,
            epoch,
            timeline,
            wal: vec![wal],
        }
    }

    async fn epoch(
        &self,
        operation: Uuid,
        node: Uuid,
        parent: Option<(EpochId, String)>,
        timeline: u32,
    ) -> EpochId {
        let epoch = NewEpoch {
            node_id: node,
            parent,
            timeline,
            machine_id: "m1".into(),
            data_directory: "/data".into(),
            host: "db1".into(),
            port: 5432,
        };
        self.catalog
            .start_epoch(epoch, operation)
            .await
            .unwrap()
            .epoch
    }

    async fn journal(
        &self,
        operation: Uuid,
        kind: &str,
        backup: Option<&BackupId>,
        node: Option<Uuid>,
    ) -> OperationJournal {
        let start = OperationStart {
            operation,
            kind: kind.into(),
            backup_id: backup.cloned(),
            node_id: node,
            log_head: self.catalog.log_head().await.unwrap(),
        };
        let by = node.is_none().then(|| holder(&format!("gs_pitr {kind}")));
        OperationJournal::start_by(Arc::clone(&self.shared), start, by)
            .await
            .unwrap()
    }

    fn uploader(&self, journal: OperationJournal) -> Uploader {
        Uploader::new(
            Arc::clone(&self.shared),
            Budget::new(64 << 20),
            Throttle::new(None),
            Arc::new(journal),
            Arc::default(),
            CancellationToken::new(),
        )
        .unwrap()
    }

    async fn lease(
        &self,
        scope: LeaseScope,
        operation: Uuid,
        backup: Option<&BackupId>,
    ) -> catalog::lease::HeldLease {
        let request = LeaseRequest {
            scope,
            operation,
            backup_id: backup.cloned(),
            holder: holder(scope.name()),
            ttl: Duration::from_mins(1),
        };
        let mut lease = self.catalog.take_lease(request).await.unwrap().lease;
        lease.renew().await.unwrap();
        lease
    }

    async fn segments(
        &mut self,
        epoch: &EpochId,
        node: Uuid,
        timeline: u32,
        first: u64,
        last: u64,
    ) {
        let operation = Uuid::now_v7();
        let journal = self.journal(operation, "wal", None, Some(node)).await;
        let uploader = self.uploader(journal);
        for number in first..=last {
            let name = WalName::segment(timeline, number, SEGMENT).unwrap();
            self.seed += 1;
            let mut plain = noise(self.seed, 3000);
            plain.resize(usize::try_from(SEGMENT).unwrap(), 0);
            self.put_wal(&uploader, node, epoch, name, plain.into())
                .await;
        }
        self.end(operation, None).await;
    }

    async fn put_wal(
        &mut self,
        uploader: &Uploader,
        node: Uuid,
        epoch: &EpochId,
        name: WalName,
        plain: Bytes,
    ) {
        let file = WalFile {
            node,
            epoch: epoch.clone(),
            name,
        };
        put_segment(uploader, &file, 1, &plain[..]).await.unwrap();
        self.world.wal.insert(file, plain);
    }

    async fn history(&mut self, place: &Place) {
        let operation = Uuid::now_v7();
        let journal = self.journal(operation, "wal", None, Some(place.node)).await;
        let uploader = self.uploader(journal);
        let plain = Bytes::from_static(b"1\t0/10000000\tno recovery target specified\n");
        self.put_wal(
            &uploader,
            place.node,
            &place.epoch,
            WalName::history(2),
            plain,
        )
        .await;
        self.end(operation, None).await;
    }

    async fn end(&self, operation: Uuid, error: Option<&str>) {
        let journal = OperationJournal::join(Arc::clone(&self.shared), operation);
        journal.ended(error).await.unwrap();
    }

    async fn backup(&mut self, operation: Uuid, id: &str, places: &[Place]) -> BackupId {
        let id: BackupId = id.parse().unwrap();
        let lease = self.lease(LeaseScope::Backup, operation, Some(&id)).await;
        self.journal(operation, "backup", Some(&id), None).await;
        let (mut nodes, mut marks) = (Vec::new(), Vec::new());
        let point: PointId = id.as_str().replace("-F-", "-P-").parse().unwrap();
        for place in places {
            let part = Uuid::now_v7();
            let journal = self
                .journal(part, "backup", Some(&id), Some(place.node))
                .await;
            let uploader = self.uploader(journal);
            let (packs, index, files) = self.copy(&uploader, &id, place.node).await;
            self.end(part, None).await;
            nodes.push(described(place, &packs, &index, &files));
            let (_, timeline, _, last) = place.wal.last().unwrap();
            let wal_last = WalName::segment(*timeline, *last, SEGMENT).unwrap();
            marks.push(json!({
                "node_id": place.node, "epoch": place.epoch, "timeline": place.timeline,
                "restore_point": format!("gs_pitr_{point}"),
                "record_lsn": lsn(*last, 0x2000), "end_lsn": lsn(*last, 0x2068), "made": Timestamp::now(),
                "wal_first": nodes.last().unwrap()["wal_first"], "wal_last": wal_last.as_str(),
            }));
            self.world.files.insert((id.clone(), place.node), files);
        }
        let before = self.standing();
        let format = json!({"major": 1, "minor": 0});
        let (now, nonce) = (Timestamp::now(), Uuid::new_v4());
        let body = json!({
            "format": format, "point_id": point, "created": now, "consistency": "per-node", "csn": "4711",
            "lock_ms": 12, "operation": operation, "nodes": marks, "nonce": nonce,
        });
        self.catalog
            .put_point(&serde_json::from_value(body).unwrap())
            .await
            .unwrap();
        let body = json!({
            "format": format, "backup_id": id, "state": "complete", "mode": "FULL", "engine": "direct",
            "parent": null, "label": "nightly", "consistency": "per-node", "point": point, "started": now,
            "completed": now, "operation": operation, "writer": "gs_pitr 0.1.0", "nodes": nodes, "nonce": nonce,
        });
        let manifest = serde_json::from_value(body).unwrap();
        self.catalog
            .commit_backup(&manifest)
            .await
            .unwrap()
            .logged
            .unwrap();
        self.end(operation, None).await;
        lease.release().await.unwrap();
        if places.len() == 2 {
            self.world.commit = Some((before, self.standing()));
        }
        id
    }

    /// The store as it is now.
    fn standing(&self) -> Arc<MemoryStore> {
        let fork = self.store.fork();
        fork.stop_clock();
        Arc::new(fork)
    }

    async fn copy(
        &mut self,
        uploader: &Uploader,
        id: &BackupId,
        node: Uuid,
    ) -> (Vec<PackInfo>, IndexInfo, Files) {
        self.seed += 10;
        let mut files = Files::new();
        // Frames of its own, a shared one, one over the edge of two, an empty file, holes.
        files.insert("base/5/1259".into(), noise(self.seed, 300_000));
        files.insert(
            "base/5/2619".into(),
            [noise(self.seed + 1, 5000), vec![0; 1_400_000]].concat(),
        );
        files.insert("base/5/PG_VERSION".into(), b"15\n".to_vec());
        files.insert("base/5/empty".into(), Vec::new());
        files.insert("global/pg_control".into(), noise(self.seed + 2, 8192));
        files.insert(
            "pg_tblspc/16400/PG_15_202209061/5/1".into(),
            noise(self.seed + 3, 9000 + usize::try_from(self.seed).unwrap()),
        );
        files.insert(
            "attachments/postgresql.conf".into(),
            format!("port = {}\n", self.seed).into_bytes(),
        );
        let (of, backup) = (node, id.clone());
        let key_of: KeyOf = Arc::new(move |number| keys::pack(&backup, of, 1, number));
        let options = PackOptions {
            lanes: 2,
            ..PackOptions::default()
        };
        let (set, lanes) = PackSet::new(uploader, key_of, options).unwrap();
        let index = Arc::new(IndexBuilder::new());
        for path in [
            "base",
            "base/5",
            "global",
            "pg_tblspc",
            "pg_tblspc/16400",
            "pg_tblspc/16400/PG_15_202209061",
        ] {
            let entry = IndexEntry {
                path: path.into(),
                mode: 0o700,
                mtime: None,
                kind: EntryKind::Directory,
            };
            index.add(entry).unwrap();
        }
        let mut shares: Vec<Vec<_>> = lanes.iter().map(|_| Vec::new()).collect();
        for (turn, (path, bytes)) in files.iter().enumerate() {
            let file = index.file(path, 0o600, Some(1_700_000_000)).unwrap();
            index.close_file(file, bytes.len() as u64);
            shares[turn % 2].push((file, bytes.clone()));
        }
        for (lane, share) in lanes.into_iter().zip(shares) {
            let mut packer = FilePacker::new(lane, Arc::clone(&index));
            let filled = tokio::task::spawn_blocking(move || {
                for (file, bytes) in share {
                    packer.chunk(file, 0, &bytes).unwrap();
                }
                packer.finish().unwrap();
            });
            filled.await.unwrap();
        }
        let packs = set.finish().await.unwrap();
        let info = index
            .write(uploader, keys::index(id, node, 1))
            .await
            .unwrap();
        (packs, info, files)
    }

    /// A restore of one node that went forward: its next epoch.
    async fn restored(&mut self, operation: Uuid, backup: &BackupId, place: &Place) -> Place {
        let lease = self.lease(LeaseScope::Restore, operation, None).await;
        let journal = self.journal(operation, "restore", Some(backup), None).await;
        self.catalog
            .pin(operation, std::slice::from_ref(backup))
            .await
            .unwrap();
        let by = "gs_pitr restore";
        self.catalog
            .decide(operation, Verdict::Commit, by, None)
            .await
            .unwrap();
        let fork = lsn(EDGE + 1, 0x3000);
        let promoted = PromotedNode {
            node_id: place.node,
            timeline: 2,
            fork_lsn: fork.clone(),
            machine_id: "m1".into(),
            data_directory: "/data".into(),
            host: "db1".into(),
            port: 5432,
        };
        journal
            .record(OperationEvent::NodePromoted(promoted))
            .await
            .unwrap();
        let parent = Some((place.epoch.clone(), fork));
        let epoch = self.epoch(operation, place.node, parent, 2).await;
        self.end(operation, None).await;
        lease.release().await.unwrap();
        let old = place.epoch.clone();
        Place {
            wal: vec![
                (old, 1, EDGE, EDGE + 1),
                (epoch.clone(), 2, EDGE + 2, EDGE + 2),
            ],
            epoch,
            timeline: 2,
            ..place.clone()
        }
    }

    async fn rolled_back(&mut self, backup: &BackupId) {
        let operation = Uuid::now_v7();
        let lease = self.lease(LeaseScope::Restore, operation, None).await;
        self.journal(operation, "restore", Some(backup), None).await;
        self.catalog
            .pin(operation, std::slice::from_ref(backup))
            .await
            .unwrap();
        let (by, why) = ("gs_pitr restore", Some("a node could not be proved"));
        self.catalog
            .decide(operation, Verdict::Rollback, by, why)
            .await
            .unwrap();
        self.end(operation, why).await;
        lease.release().await.unwrap();
    }

    /// Deletes a backup as `prune` does: tombstone, copies, manifest.
    async fn deleted(&mut self, id: &BackupId) {
        let operation = Uuid::now_v7();
        let lease = self.lease(LeaseScope::Maintain, operation, None).await;
        self.journal(operation, "delete", Some(id), None).await;
        let manifest = self.store.bytes(keys::manifest(id).as_str()).unwrap();
        let tombstone = Tombstone {
            backup_id: id.clone(),
            manifest_sha256: Some(catalog::envelope::sha256_hex(&manifest)),
            operation,
            reason: "delete".into(),
            at: Timestamp::now(),
            nonce: Uuid::new_v4(),
            extra: serde_json::Map::new(),
        };
        self.catalog.bury(&tombstone).await.unwrap();
        let below = format!("backups/{id}/");
        let all = self
            .store
            .keys()
            .into_iter()
            .filter(|key| key.as_str().starts_with(&below));
        let gone: Vec<_> = all.filter(|key| *key != keys::tombstone(id)).collect();
        self.shared.delete(&gone).await.unwrap();
        self.world.files.retain(|(backup, _), _| backup != id);
        self.end(operation, None).await;
        lease.release().await.unwrap();
    }

    /// A backup that failed and was fenced.
    async fn abandoned(&mut self, id: &str) {
        let (operation, id): (_, BackupId) = (Uuid::now_v7(), id.parse().unwrap());
        let lease = self.lease(LeaseScope::Backup, operation, Some(&id)).await;
        self.journal(operation, "backup", Some(&id), None).await;
        self.catalog.abandon(&id, operation).await.unwrap();
        self.end(operation, Some("the agent died")).await;
        lease.release().await.unwrap();
    }
}

fn described(
    place: &Place,
    packs: &[PackInfo],
    index: &IndexInfo,
    files: &Files,
) -> serde_json::Value {
    let (_, oldest, first, _) = place.wal.first().unwrap();
    let (_, newest, _, last) = place.wal.last().unwrap();
    let name = |timeline, number| {
        WalName::segment(timeline, number, SEGMENT)
            .unwrap()
            .to_string()
    };
    let stored: u64 = packs.iter().map(|pack| pack.size).sum::<u64>() + index.size;
    json!({
        "node_id": place.node, "attempt": 1, "epoch": place.epoch, "host": "db1", "port": 5432,
        "system_identifier": place.system.to_string(), "flavour": "postgresql",
        "server_version_num": 150_020, "control_version": 1300, "catalog_version": 202_209_061,
        "wal_segment_size": SEGMENT, "data_checksums": true, "timeline": place.timeline,
        "start_lsn": lsn(*first, 0x28), "stop_lsn": lsn(*last, 0x1000),
        "started": Timestamp::now(), "completed": Timestamp::now(), "data_directory": "/data",
        "tablespaces": [{"oid": 16_400, "location": "/fast/ts"}],
        "backup_label": "START WAL LOCATION\n", "tablespace_map": "16400 /fast/ts\n", "argv": ["-D", "/data"],
        "attachments": [
            {"path": "attachments/postgresql.conf", "source": "/etc/postgresql.conf", "role": "config"},
        ],
        "wal_first": name(*oldest, *first), "wal_last": name(*newest, *last),
        "packs": packs, "index": index, "files": files.len(),
        "plain_bytes": files.values().map(Vec::len).sum::<usize>(), "stored_bytes": stored,
        "corrupt_pages": ["base/5/1259 3"], "agent": "db1:18080",
    })
}

/// Files below a directory.
pub(crate) fn read_tree(root: &Path) -> Files {
    let mut files = Files::new();
    let mut rest = vec![root.to_owned()];
    while let Some(directory) = rest.pop() {
        for entry in std::fs::read_dir(directory).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                rest.push(path);
            } else {
                let name = path
                    .strip_prefix(root)
                    .unwrap()
                    .to_str()
                    .unwrap()
                    .to_owned();
                files.insert(name, std::fs::read(path).unwrap());
            }
        }
    }
    files
}
