//! How that repository comes to be: operation after operation, as the real ones write them.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use catalog::Catalog;
use catalog::ids::{BackupId, EpochId, PointId};
use catalog::journal::{OperationJournal, OperationStart};
use catalog::keys;
use catalog::lease::LeaseRequest;
use catalog::model::{Gap, LeaseScope, OperationEvent, PromotedNode, Tombstone, Verdict};
use catalog::repo::{NewEpoch, NewNode};
use catalog::wal::{WalFile, WalName, put_segment};
use jiff::Timestamp;
use pipeline::budget::Budget;
use pipeline::index::{FilePacker, IndexBuilder};
use pipeline::pack::{EntryKind, IndexEntry, IndexInfo, KeyOf, PackInfo, PackOptions, PackSet};
use pipeline::store::ObjectStore;
use pipeline::throttle::Throttle;
use pipeline::upload::Uploader;
use serde_json::json;
use support::files::{Files, noise};
use support::memory_store::MemoryStore;
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

use super::fixture::{SEGMENT, World, holder};

/// The last segment before the name's middle part counts on, with segments of 1 MiB.
const EDGE: u64 = 0xFFF;

pub(crate) struct Builder {
    pub(crate) store: Arc<MemoryStore>,
    pub(crate) shared: Arc<dyn ObjectStore>,
    pub(crate) catalog: Catalog,
    pub(crate) world: World,
    pub(crate) seed: u64,
}

#[derive(Clone)]
pub(crate) struct Place {
    pub(crate) node: Uuid,
    pub(crate) system: u64,
    pub(crate) epoch: EpochId,
    pub(crate) timeline: u32,
    /// Timeline, first and last number of the segments that a backup here needs.
    pub(crate) wal: Vec<(EpochId, u32, u64, u64)>,
}

fn lsn(number: u64, offset: u64) -> String {
    let at = number * SEGMENT + offset;
    format!("{:X}/{:X}", at >> 32, at & 0xFFFF_FFFF)
}

impl Builder {
    pub(crate) async fn run(&mut self, first: Uuid) -> [Place; 2] {
        let mut one = self.node(first, 7_000_000_000_000_000_001, 1).await;
        let two = self.node(first, 7_000_000_000_000_000_002, 1).await;
        self.segments(&one.epoch, one.node, 1, EDGE - 1, EDGE + 1)
            .await;
        self.segments(&two.epoch, two.node, 1, 2, 3).await;
        self.gap(&two, 5, 9).await;
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
        self.world.backups.push(second.clone());
        for (number, day) in [(1, 25), (2, 26)] {
            let point = format!("202611{day}T040233Z-P-0000000{number}");
            self.point(&point, &second, &both, number).await;
        }

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

    pub(crate) async fn segments(
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

    /// Writes down that segments are missing.
    async fn gap(&self, place: &Place, from: u64, to: u64) {
        let gap = Gap {
            node_id: place.node,
            epoch: place.epoch.clone(),
            timeline: place.timeline,
            from: lsn(from, 0),
            to: lsn(to, 0),
            reason: "too much was held back".into(),
            at: Timestamp::now(),
            nonce: Uuid::new_v4(),
            extra: serde_json::Map::new(),
        };
        let declared = self.catalog.declare_gap(&gap, Uuid::now_v7()).await;
        declared.unwrap();
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

    pub(crate) async fn backup(&mut self, operation: Uuid, id: &str, places: &[Place]) -> BackupId {
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
            "format": format, "point_id": point, "source": "shardingsphere", "source_version": "5.5.2", "taken": now,
            "document": "{\"meta_data\":{\"props\":\"\"}}", "placeholders": [],
            "operation": operation, "nonce": Uuid::new_v4(),
        });
        let metadata = self
            .catalog
            .put_metadata(&serde_json::from_value(body).unwrap())
            .await
            .unwrap();
        let body = json!({
            "format": format, "point_id": point, "created": now, "consistency": "per-node", "csn": "4711",
            "lock_ms": 12, "metadata": metadata, "operation": operation, "nodes": marks, "nonce": nonce,
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

    /// A point that was made on a backup, in the `number`th segment behind it.
    async fn point(&mut self, id: &str, base: &BackupId, places: &[Place], number: u64) {
        let (operation, id): (_, PointId) = (Uuid::now_v7(), id.parse().unwrap());
        self.journal(operation, "point", None, None).await;
        let mut marks = Vec::new();
        for place in places {
            let (epoch, timeline, _, last) = place.wal.last().unwrap().clone();
            let last = last + number;
            self.segments(&epoch, place.node, timeline, last, last)
                .await;
            let name = WalName::segment(timeline, last, SEGMENT).unwrap();
            marks.push(json!({
                "node_id": place.node, "epoch": epoch, "timeline": timeline, "restore_point": format!("gs_pitr_{id}"),
                "record_lsn": lsn(last, 0x2000), "end_lsn": lsn(last, 0x2068), "made": Timestamp::now(),
                "wal_first": name.as_str(), "wal_last": name.as_str(),
            }));
        }
        let body = json!({
            "format": {"major": 1, "minor": 0}, "point_id": id, "created": Timestamp::now(), "consistency": "cluster",
            "csn": "4712", "lock_ms": 0, "label": "every hour", "base": base, "operation": operation, "nodes": marks,
            "nonce": Uuid::new_v4(),
        });
        self.catalog
            .put_point(&serde_json::from_value(body).unwrap())
            .await
            .unwrap();
        self.end(operation, None).await;
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
