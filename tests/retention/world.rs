//! Repositories made by the catalog's own calls, with packs and WAL that nobody reads.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use catalog::ids::{BackupId, EpochId, PointId};
use catalog::journal::{OperationJournal, OperationStart};
use catalog::model::{Holder, Manifest, Point};
use catalog::repo::{BackupState, Catalog, NewEpoch, NewNode};
use catalog::retention::apply::{self, Applied, Guard, Report};
use catalog::retention::plan::{self, GRACE, Plan, Rules};
use catalog::retention::{Holdings, Stored};
use catalog::{CatalogError, keys};
use jiff::{Timestamp, ToSpan as _};
use pipeline::store::{Key, ObjectStore, StoreError};
use serde_json::json;
use support::memory_store::MemoryStore;
use uuid::Uuid;

const SEGMENT: u64 = 16 << 20;
pub(crate) const DAY: Duration = Duration::from_hours(24);

/// How a backup ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum End {
    /// With its manifest.
    Complete,
    /// Its operation journals an error, and there is no manifest.
    Failed,
    /// Nobody says anything; its point may be there.
    Killed,
}

pub(crate) struct World {
    pub(crate) store: Arc<dyn ObjectStore>,
    pub(crate) memory: Arc<MemoryStore>,
    pub(crate) catalog: Catalog,
    pub(crate) nodes: Vec<(Uuid, EpochId)>,
    pub(crate) next_segment: u64,
    made: u32,
}

/// Who applies plans here: nobody else has the lease.
pub(crate) struct Free;

impl Guard for Free {
    type Error = CatalogError;

    async fn prove(&self) -> Result<(), CatalogError> {
        Ok(())
    }

    fn go_on(&self) -> Result<(), CatalogError> {
        Ok(())
    }
}

pub(crate) fn rules(keep_full: Option<u32>, keep_days: Option<u32>) -> Rules {
    Rules {
        keep_full,
        keep_days,
        grace: GRACE,
    }
}

pub(crate) fn holder() -> Holder {
    Holder {
        host: "h".into(),
        user: "u".into(),
        pid: 1,
        command: "gs_pitr".into(),
    }
}

pub(crate) fn segment(number: u64) -> String {
    format!("00000001{:08X}{:08X}", number >> 8, number & 0xff)
}

fn lsn(segment: u64, offset: u64) -> String {
    let at = segment * SEGMENT + offset;
    format!("{:X}/{:X}", at >> 32, at & 0xffff_ffff)
}

pub(crate) async fn put(store: &dyn ObjectStore, key: &Key, bytes: usize) {
    let body = Bytes::from(vec![7; bytes]);
    match store.put_if_absent(key, body).await {
        Ok(_) | Err(StoreError::AlreadyExists(_)) => {}
        Err(error) => panic!("{error}"),
    }
}

impl World {
    pub(crate) async fn new(memory: MemoryStore) -> Self {
        memory.stop_clock();
        let memory = Arc::new(memory);
        Self::on(Arc::clone(&memory) as Arc<dyn ObjectStore>, memory).await
    }

    /// On another store; the one in memory is then unused.
    pub(crate) async fn on(store: Arc<dyn ObjectStore>, memory: Arc<MemoryStore>) -> Self {
        let operation = Uuid::new_v4();
        let catalog = Catalog::open_or_create(Arc::clone(&store), operation)
            .await
            .unwrap();
        let mut nodes = Vec::new();
        for number in 1..=2 {
            let new = NewNode {
                system_identifier: number,
                host: format!("db{number}"),
                port: 5432,
            };
            let node = catalog.register_node(new, operation).await.unwrap().node_id;
            let epoch = NewEpoch {
                node_id: node,
                parent: None,
                timeline: 1,
                machine_id: "m".into(),
                data_directory: "/data".into(),
                host: "db".into(),
                port: 5432,
            };
            let epoch = catalog.start_epoch(epoch, operation).await.unwrap().epoch;
            nodes.push((node, epoch));
        }
        Self {
            store,
            memory,
            catalog,
            nodes,
            next_segment: 2,
            made: 0,
        }
    }

    /// The same repository through another store.
    pub(crate) async fn over(
        &self,
        store: &Arc<dyn ObjectStore>,
        memory: &Arc<MemoryStore>,
    ) -> Self {
        Self {
            store: Arc::clone(store),
            memory: Arc::clone(memory),
            catalog: Catalog::open(Arc::clone(store)).await.unwrap(),
            nodes: self.nodes.clone(),
            next_segment: self.next_segment,
            made: self.made,
        }
    }

    pub(crate) fn advance(&self, by: Duration) {
        self.memory.advance(by);
    }

    pub(crate) async fn now(&self) -> Timestamp {
        Timestamp::try_from(self.store.now().await.unwrap()).unwrap()
    }

    /// WAL between backups that never came to the bucket.
    pub(crate) fn gap(&mut self) {
        self.next_segment += 3;
    }

    /// A full backup that is complete.
    pub(crate) async fn full(&mut self) -> BackupId {
        self.backup(None, End::Complete, 1).await
    }

    /// A backup of `attempts` attempts of the first node.
    pub(crate) async fn backup(
        &mut self,
        parent: Option<&BackupId>,
        end: End,
        attempts: u32,
    ) -> BackupId {
        // Ids sort as they are made, whatever the clock does.
        self.made += 1;
        let now = self.now().await;
        let at = now
            .checked_add(i64::from(self.made).milliseconds())
            .unwrap();
        let stamp = at.strftime("%Y%m%dT%H%M%SZ");
        let kind = if parent.is_none() { 'F' } else { 'I' };
        let id: BackupId = format!("{stamp}-{kind}-{:08x}", self.made).parse().unwrap();
        let point: PointId = format!("{stamp}-P-{:08x}", self.made).parse().unwrap();
        let operation = Uuid::new_v4();
        let journal = self.journal(operation, &id, None).await;
        let (first, last) = (self.next_segment, self.next_segment + 2);
        self.next_segment = last + 1;
        for (place, (node, epoch)) in self.nodes.clone().into_iter().enumerate() {
            let attempts = if place == 0 { attempts } else { 1 };
            let part = self.journal(Uuid::new_v4(), &id, Some(node)).await;
            for attempt in 1..=attempts {
                let pack = |number| keys::pack(&id, node, attempt, number);
                part.intend_all(&[pack(0), pack(1), pack(2)]).await.unwrap();
                put(&*self.store, &pack(0), 1000).await;
                put(&*self.store, &pack(1), 700).await;
                // What is killed leaves an upload open.
                if end == End::Killed {
                    self.store.create_upload(&pack(2)).await.unwrap();
                }
                if end != End::Killed || place == 0 {
                    put(&*self.store, &keys::index(&id, node, attempt), 500).await;
                }
            }
            for number in first..=last {
                let name = segment(number).parse().unwrap();
                put(&*self.store, &keys::wal(node, &epoch, &name), 300).await;
            }
            if end != End::Killed {
                part.ended(None).await.unwrap();
            }
        }
        if end != End::Failed {
            let metadata = json!({
                "format": {"major": 1, "minor": 0}, "point_id": point, "source": "shardingsphere", "source_version": null,
                "taken": now, "document": "{}", "placeholders": [], "operation": operation, "nonce": Uuid::new_v4(),
            });
            let metadata = serde_json::from_value(metadata).unwrap();
            let metadata = self.catalog.put_metadata(&metadata).await.unwrap();
            let mut point = self.point(&point, operation, first, last, now);
            point.metadata = Some(metadata);
            self.catalog.put_point(&point).await.unwrap();
        }
        if end == End::Complete {
            let manifest =
                self.manifest(&id, parent, &point, operation, (first, last), attempts, at);
            self.catalog.commit_backup(&manifest).await.unwrap();
        }
        match end {
            End::Complete => journal.ended(None).await.unwrap(),
            End::Failed => journal.ended(Some("it failed")).await.unwrap(),
            End::Killed => {}
        }
        id
    }

    /// One more segment of WAL on each node, behind what there is.
    pub(crate) async fn ship(&mut self) -> u64 {
        let number = self.next_segment;
        self.next_segment += 1;
        for (node, epoch) in &self.nodes {
            let name = segment(number).parse().unwrap();
            put(&*self.store, &keys::wal(*node, epoch, &name), 300).await;
        }
        number
    }

    /// A point that was made on a backup, in one more segment.
    pub(crate) async fn later_point(&mut self, base: &BackupId) -> PointId {
        self.made += 1;
        let now = self.now().await;
        let stamp = now.strftime("%Y%m%dT%H%M%SZ");
        let id: PointId = format!("{stamp}-P-{:08x}", self.made).parse().unwrap();
        let last = self.ship().await;
        let mut point = self.point(&id, Uuid::new_v4(), last, last, now);
        point.base = Some(base.clone());
        self.catalog.put_point(&point).await.unwrap();
        id
    }

    pub(crate) async fn journal(
        &self,
        operation: Uuid,
        id: &BackupId,
        node: Option<Uuid>,
    ) -> OperationJournal {
        let start = OperationStart {
            operation,
            kind: "backup".into(),
            backup_id: Some(id.clone()),
            node_id: node,
            log_head: None,
        };
        OperationJournal::start(Arc::clone(&self.store), start)
            .await
            .unwrap()
    }

    fn point(&self, id: &PointId, operation: Uuid, first: u64, last: u64, at: Timestamp) -> Point {
        let nodes = self.nodes.iter().map(|(node, epoch)| {
            json!({
                "node_id": node, "epoch": epoch, "timeline": 1, "restore_point": format!("gs_pitr_{id}"),
                "record_lsn": lsn(last, 0x200), "end_lsn": lsn(last, 0x268), "made": at,
                "wal_first": segment(first), "wal_last": segment(last),
            })
        });
        let point = json!({
            "format": {"major": 1, "minor": 0}, "point_id": id, "created": at, "consistency": "per-node",
            "csn": null, "lock_ms": 0, "operation": operation, "nodes": nodes.collect::<Vec<_>>(),
            "nonce": Uuid::new_v4(),
        });
        serde_json::from_value(point).unwrap()
    }

    #[expect(clippy::too_many_arguments, reason = "the parts of one document")]
    fn manifest(
        &self,
        id: &BackupId,
        parent: Option<&BackupId>,
        point: &PointId,
        operation: Uuid,
        (first, last): (u64, u64),
        attempts: u32,
        at: Timestamp,
    ) -> Manifest {
        let pack = |number: u32, size: u64| {
            json!({
                "number": number, "size": size, "frames": 3, "plain_bytes": 4000,
                "parts_sha256": "a".repeat(64), "table_offset": 1, "table_sha256": "b".repeat(64),
            })
        };
        let mode = if parent.is_some() { "PTRACK" } else { "FULL" };
        let local = |id: &BackupId| id.as_str()[id.as_str().len() - 8..].to_owned();
        let link = parent.map(|it| json!({"backup_id": it, "attempt": 1, "id": local(it)}));
        let nodes = self.nodes.iter().enumerate().map(|(place, (node, epoch))| {
            json!({
                "probackup": {
                    "program": "gs_probackup", "version": "2.4.2", "instance": "node", "id": local(id), "mode": mode,
                    "parent": link,
                },
                "node_id": node, "attempt": if place == 0 { attempts } else { 1 }, "epoch": epoch,
                "host": "db1", "port": 5432, "system_identifier": "7", "flavour": "postgresql",
                "server_version_num": 150_020, "control_version": 1300, "catalog_version": 202_209_061,
                "wal_segment_size": SEGMENT, "data_checksums": true, "timeline": 1,
                "start_lsn": lsn(first, 0x28), "stop_lsn": lsn(last, 0x100), "started": at, "completed": at,
                "data_directory": "/data", "tablespaces": [], "backup_label": "", "tablespace_map": null,
                "argv": [], "attachments": [], "wal_first": segment(first), "wal_last": segment(last),
                "packs": [pack(0, 1000), pack(1, 700)],
                "index": {"size": 500, "sha256": "c".repeat(64), "footer_offset": 400, "entries": 10},
                "files": 9, "plain_bytes": 4000, "stored_bytes": 1500, "corrupt_pages": [],
            })
        });
        let manifest = json!({
            "format": {"major": 1, "minor": 0}, "backup_id": id, "state": "complete",
            "mode": mode, "engine": "probackup", "parent": parent,
            "label": null, "consistency": "per-node", "point": point, "started": at, "completed": at,
            "operation": operation, "writer": "test", "nodes": nodes.collect::<Vec<_>>(),
            "nonce": Uuid::new_v4(),
        });
        serde_json::from_value(manifest).unwrap()
    }

    pub(crate) async fn holdings(&self) -> Holdings {
        Holdings::read(&self.catalog).await.unwrap()
    }

    pub(crate) async fn plan(&self, rules: &Rules) -> Plan {
        plan::prune(&self.holdings().await, rules)
    }

    pub(crate) async fn apply(&self, plan: &Plan) -> Report {
        match apply::apply(&self.catalog, plan, Uuid::new_v4(), "test", &Free)
            .await
            .unwrap()
        {
            Applied::Done(report) => report,
            Applied::Changed { why, .. } => panic!("changed: {why}"),
        }
    }

    pub(crate) async fn delete(&self, id: &BackupId) -> Report {
        let plan = plan::delete(&self.holdings().await, id.as_str(), false).unwrap();
        self.apply(&plan).await
    }

    /// Backups that are listed as complete.
    pub(crate) async fn listed(&self) -> Vec<Manifest> {
        let listed = self.catalog.backups().await.unwrap().into_iter();
        let complete = listed.filter_map(|listed| match listed.state {
            BackupState::Complete(manifest) => Some(*manifest),
            _ => None,
        });
        complete.collect()
    }

    /// Their ids, in the order in which they were completed.
    pub(crate) async fn names(&self) -> Vec<BackupId> {
        let mut listed = self.listed().await;
        listed.sort_by_key(|manifest| manifest.completed);
        listed.into_iter().map(|it| it.backup_id).collect()
    }

    /// Every key below a prefix.
    pub(crate) async fn keys(&self, prefix: &str) -> BTreeSet<String> {
        use futures_util::TryStreamExt as _;
        let listed: Vec<_> = self.store.list(prefix).try_collect().await.unwrap();
        listed
            .into_iter()
            .map(|object| object.key.to_string())
            .collect()
    }

    /// Every listed backup has all of its objects, its point, and all WAL up to it.
    pub(crate) async fn assert_whole(&self) {
        let there = self.keys("").await;
        for manifest in self.listed().await {
            let id = &manifest.backup_id;
            let restorable = self.catalog.restorable(id).await.unwrap();
            for needed in needs(&manifest, &restorable.point) {
                assert!(there.contains(needed.as_str()), "{id} lacks {needed}");
            }
            if let Some(parent) = &manifest.parent {
                self.catalog.manifest(parent).await.unwrap();
            }
        }
    }
}

/// All keys that a recovery of a backup reads.
fn needs(manifest: &Manifest, point: &Point) -> Vec<Key> {
    let id = &manifest.backup_id;
    let mut keys = Vec::new();
    let metadata = point.metadata.as_ref();
    keys.extend(metadata.map(|_| keys::metadata(&point.point_id)));
    for copy in &manifest.nodes {
        let (node, attempt) = (copy.node_id, copy.attempt);
        keys.push(keys::index(id, node, attempt));
        keys.extend(
            copy.packs
                .iter()
                .map(|pack| keys::pack(id, node, attempt, pack.number)),
        );
        let mark = point
            .nodes
            .iter()
            .find(|mark| mark.node_id == node)
            .unwrap();
        let number = |name: &str| u64::from_str_radix(&name[8..], 16).unwrap();
        let numbered = |number: u64| format!("00000001{number:016X}");
        for place in number(&copy.wal_first)..=number(&mark.wal_last) {
            // With segments of 16 MiB a log file has 256 of them.
            if place & 0xffff_ffff < 0x100 {
                let name = numbered(place).parse().unwrap();
                keys.push(keys::wal(node, &copy.epoch, &name));
            }
        }
    }
    keys
}

pub(crate) fn names(stored: &[Stored]) -> Vec<&str> {
    stored.iter().map(|stored| stored.key.as_str()).collect()
}
