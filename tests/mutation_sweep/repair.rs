//! `verify --repair` without the command around it: what it adds, what it puts back, and what it leaves alone.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use bytes::Bytes;
use catalog::ids::BackupId;
use catalog::journal::{OperationJournal, OperationStart};
use catalog::lease::LeaseRequest;
use catalog::mirror::Mirror;
use catalog::model::{LeaseScope, LogAction, LogEntry, Manifest, Tombstone};
use catalog::repo::{NewEpoch, NewNode};
use catalog::verify::{
    Depth, Finding, Repair, Repaired, Report, Scope, Severity, put_back_repository,
};
use catalog::{Catalog, CatalogError, envelope, keys};
use jiff::Timestamp;
use pipeline::store::{Key, ObjectStore};
use support::faulty_store::FaultyStore;
use support::memory_store::MemoryStore;
use tempfile::TempDir;
use uuid::Uuid;

use super::fixture::{World, holder, verify};
use super::mutations::kind;

/// A backup that nobody has made yet.
const NEXT: &str = "20261125T040233Z-F-00000005";

pub(crate) fn shared(store: &Arc<MemoryStore>) -> Arc<dyn ObjectStore> {
    Arc::clone(store) as Arc<dyn ObjectStore>
}

pub(crate) async fn look(store: &Arc<MemoryStore>, mirror: Option<&Mirror>) -> Report {
    let (store, mirror) = (shared(store), mirror.cloned());
    verify(&store, Scope::All, Depth::Fast, mirror)
        .await
        .unwrap()
}

/// A mirror that has seen everything.
async fn mirror(world: &World) -> (TempDir, Mirror) {
    let home = tempfile::tempdir().unwrap();
    let catalog = Catalog::open(shared(&world.store)).await.unwrap();
    let mirror = Mirror::new(home.path(), catalog.repository().repository_id);
    mirror.sync(&catalog).await.unwrap();
    (home, mirror)
}

/// What the command does with a report.
async fn repair(
    store: &Arc<dyn ObjectStore>,
    report: &Report,
) -> Result<Vec<Repaired>, CatalogError> {
    let mut repairs: Vec<&Repair> = report.repairs.iter().collect();
    repairs.sort_by_key(|repair| !repair.is_put_back());
    for repair in repairs.iter().filter(|it| it.opens_repository()) {
        put_back_repository(&**store, repair).await?;
    }
    repairs.retain(|repair| !repair.opens_repository());
    if repairs.is_empty() {
        return Ok(Vec::new());
    }
    let catalog = Catalog::open(Arc::clone(store)).await?;
    let operation = Uuid::now_v7();
    let request = LeaseRequest {
        scope: LeaseScope::Maintain,
        operation,
        backup_id: None,
        holder: holder("gs_pitr verify --repair"),
        ttl: Duration::from_mins(1),
    };
    let mut lease = catalog.take_lease(request).await?.lease;
    let start = OperationStart {
        operation,
        kind: "verify".into(),
        backup_id: None,
        node_id: None,
        log_head: catalog.log_head().await?,
    };
    let journal = OperationJournal::start_by(Arc::clone(store), start, Some(holder("verify")));
    let journal = journal.await?;
    let mut done = Vec::new();
    for repair in repairs {
        lease.renew().await?;
        done.push(catalog.repair(repair, operation).await?);
    }
    journal.ended(None).await?;
    lease.release().await?;
    Ok(done)
}

/// The entries about an object.
fn entries(store: &MemoryStore, object: &Key) -> Vec<LogEntry> {
    let keys = store.keys().into_iter();
    let logs = keys.filter(|key| key.as_str().starts_with("log/"));
    let entries = logs.map(|key| {
        let bytes = store.bytes(key.as_str()).unwrap();
        envelope::open::<LogEntry>(&key, &bytes).unwrap()
    });
    entries
        .filter(|entry| entry.object == object.as_str())
        .collect()
}

/// The objects that the log is about, and its entries.
fn ledger(world: &World) -> BTreeMap<Key, Bytes> {
    let mut all = world.objects();
    all.retain(|key, _| {
        matches!(
            kind(key),
            "repository" | "log" | "node" | "epoch" | "point" | "manifest" | "tombstone"
        )
    });
    all
}

fn of<'a>(report: &'a Report, key: &Key) -> Vec<&'a Finding> {
    let findings = report.findings.iter();
    findings
        .filter(|finding| finding.key == key.as_str())
        .collect()
}

fn next<'a>(report: &'a Report, key: &Key) -> &'a str {
    let findings = of(report, key);
    let next = findings.iter().find_map(|finding| finding.next.as_deref());
    next.unwrap_or_else(|| panic!("{key}: {findings:#?}"))
}

#[track_caller]
pub(crate) fn assert_clean(report: &Report, at: &str) {
    assert!(report.findings.is_empty(), "{at}: {:#?}", report.findings);
    assert!(report.repairs.is_empty() && report.unrestorable.is_empty());
}

/// Nothing but notes: those tell of the one who was killed.
#[track_caller]
pub(crate) fn assert_notes(report: &Report, at: &str) {
    let worse = |finding: &&Finding| finding.severity != Severity::Note;
    let worse: Vec<_> = report.findings.iter().filter(worse).collect();
    assert!(worse.is_empty(), "{at}: {worse:#?}");
    assert!(report.repairs.is_empty() && report.unrestorable.is_empty());
}

/// The bytes of the newest backup's copies under another name, with a manifest that names them.
fn copy_backup(world: &World, store: &MemoryStore, to: &BackupId) -> Manifest {
    let from = world.backups.last().unwrap();
    let below = format!("backups/{from}/");
    for (key, bytes) in world.objects() {
        let rest = key.as_str().strip_prefix(&below);
        if let Some(rest) = rest.filter(|rest| rest.contains('/')) {
            let key = Key::new(format!("backups/{to}/{rest}")).unwrap();
            store.tamper(&key, Some(bytes));
        }
    }
    let key = keys::manifest(from);
    let bytes = store.bytes(key.as_str()).unwrap();
    let mut manifest: Manifest = envelope::open(&key, &bytes).unwrap();
    (manifest.backup_id, manifest.nonce) = (to.clone(), Uuid::new_v4());
    manifest.operation = Uuid::now_v7();
    manifest
}

/// What is written before its log entry.
#[derive(Debug, Clone, Copy)]
enum Made {
    Node,
    Epoch,
    Point,
    Manifest,
    Fence,
    Tombstone,
}

impl Made {
    const ALL: [(Self, LogAction); 6] = [
        (Self::Node, LogAction::NodeRegistered),
        (Self::Epoch, LogAction::EpochOpened),
        (Self::Point, LogAction::PointCreated),
        (Self::Manifest, LogAction::BackupCommitted),
        (Self::Fence, LogAction::BackupAbandoned),
        (Self::Tombstone, LogAction::BackupDeleted),
    ];

    /// Makes one in a repository in which `manifest` could be committed next.
    async fn make(
        self,
        store: Arc<dyn ObjectStore>,
        manifest: &Manifest,
    ) -> Result<(), CatalogError> {
        let catalog = Catalog::open(store).await?;
        let operation = Uuid::now_v7();
        match self {
            Self::Node => {
                let node = NewNode {
                    system_identifier: 7_000_000_000_000_000_009,
                    host: "db9".into(),
                    port: 5432,
                };
                catalog.register_node(node, operation).await.map(drop)
            }
            Self::Epoch => {
                let epoch = NewEpoch {
                    node_id: manifest.nodes[0].node_id,
                    parent: None,
                    timeline: 7,
                    machine_id: "m9".into(),
                    data_directory: "/data9".into(),
                    host: "db9".into(),
                    port: 5432,
                };
                catalog.start_epoch(epoch, operation).await.map(drop)
            }
            Self::Point => {
                let mut point = catalog.point(manifest.point.as_ref().unwrap()).await?;
                let id = manifest.backup_id.as_str().replace("-F-", "-P-");
                (point.point_id, point.nonce) = (id.parse().unwrap(), Uuid::new_v4());
                // The metadata are the other point's.
                point.metadata = None;
                catalog.put_point(&point).await
            }
            Self::Manifest => catalog.commit_backup(manifest).await?.logged.map(drop),
            Self::Fence => {
                let id = "20261126T040233Z-F-00000006".parse().unwrap();
                catalog.abandon(&id, operation).await.map(drop)
            }
            Self::Tombstone => {
                let tombstone = Tombstone {
                    backup_id: "20261121T040233Z-F-00000001".parse().unwrap(),
                    manifest_sha256: None,
                    operation,
                    reason: "delete".into(),
                    at: Timestamp::now(),
                    nonce: Uuid::new_v4(),
                    extra: serde_json::Map::new(),
                };
                catalog.bury(&tombstone).await?.logged.unwrap().map(drop)
            }
        }
    }
}

/// Whoever makes something is killed at every call to the store: what it left without an entry gets one, of its kind.
#[tokio::test(flavor = "multi_thread")]
async fn objects_without_an_entry_get_one_of_their_kind() {
    let world = World::build().await;
    let manifest = copy_backup(&world, &world.store, &NEXT.parse().unwrap());
    for (made, action) in Made::ALL {
        let mut mended = 0;
        for dies_at in 1.. {
            let memory = world.fork();
            let faulty = Arc::new(FaultyStore::before(Arc::clone(&memory)));
            faulty.dies_at.store(dies_at, Ordering::SeqCst);
            faulty.last_call_counts.store(true, Ordering::SeqCst);
            let _ = made.make(Arc::clone(&faulty) as _, &manifest).await;
            if faulty.calls.load(Ordering::SeqCst) < dies_at {
                break;
            }
            let report = look(&memory, None).await;
            let Some(lacking) = report.repairs.first() else {
                continue;
            };
            assert!(!report.is_damaged(), "{made:?}: {:#?}", report.findings);
            assert_eq!(report.repairs.len(), 1, "{made:?}: {:#?}", report.repairs);
            assert_eq!(report.count(Severity::Repairable), 1);
            let key = lacking.key().clone();
            let done = repair(&shared(&memory), &report).await.unwrap();
            assert_eq!(done, [Repaired::Done]);
            let entry = entries(&memory, &key).pop().unwrap();
            assert_eq!(entry.action, action, "{made:?}");
            let bytes = memory.bytes(key.as_str()).unwrap();
            assert_eq!(entry.object_sha256, envelope::sha256_hex(&bytes));
            let after = look(&memory, None).await;
            assert!(after.repairs.is_empty() && !after.is_damaged());
            assert_eq!(after.count(Severity::Repairable), 0);
            // The same once more changes nothing.
            let again = repair(&shared(&memory), &report).await.unwrap();
            assert_eq!(again, [Repaired::NotNeeded], "{made:?}");
            assert_eq!(entries(&memory, &key).len(), 1);
            mended += 1;
        }
        assert!(mended > 0, "{made:?} was never without its entry");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_missing_comes_back_from_the_mirror() {
    let world = World::build().await;
    let (_home, mirror) = mirror(&world).await;
    let mut kinds = BTreeMap::<&str, u32>::new();
    for (key, bytes) in ledger(&world) {
        let memory = world.fork();
        memory.tamper(&key, None);
        let without = look(&memory, None).await;
        assert!(without.is_damaged() && without.repairs.is_empty(), "{key}");
        assert!(
            next(&without, &key).contains("version or replica"),
            "{key}: {:#?}",
            without.findings
        );
        let report = look(&memory, Some(&mirror)).await;
        assert!(report.is_damaged(), "{key}");
        assert_eq!(of(&report, &key).len(), 1, "{:#?}", report.findings);
        assert!(next(&report, &key).contains("--repair"), "{key}");
        let lost: Vec<_> = report.repairs.iter().map(|it| it.key().as_str()).collect();
        assert_eq!(lost, [key.as_str()]);
        repair(&shared(&memory), &report).await.unwrap();
        assert_eq!(memory.bytes(key.as_str()).unwrap(), bytes, "{key}");
        let after = look(&memory, Some(&mirror)).await;
        assert_clean(&after, key.as_str());
        let again = repair(&shared(&memory), &report).await.unwrap();
        assert!(again.iter().all(|it| *it == Repaired::NotNeeded), "{key}");
        *kinds.entry(kind(&key)).or_default() += 1;
    }
    assert_eq!(kinds.len(), 7, "{kinds:?}");
}

/// All at once, as after a bucket was emptied by half.
#[tokio::test(flavor = "multi_thread")]
async fn everything_that_the_log_names_comes_back_at_once() {
    let world = World::build().await;
    let (_home, mirror) = mirror(&world).await;
    let memory = world.fork();
    let all = ledger(&world);
    for key in all.keys() {
        if kind(key) != "log" || key.as_str().ends_with("3.json") {
            memory.tamper(key, None);
        }
    }
    for round in 1..=3 {
        let report = look(&memory, Some(&mirror)).await;
        if report.repairs.is_empty() {
            assert!(round > 1);
            assert_clean(&report, "after all");
            break;
        }
        repair(&shared(&memory), &report).await.unwrap();
    }
    for (key, bytes) in all {
        assert_eq!(memory.bytes(key.as_str()), Some(bytes), "{key}");
    }
}

/// A deleted backup's manifest never comes back, though a mirror still has it and the tombstone is lost.
#[tokio::test(flavor = "multi_thread")]
async fn the_manifest_of_a_deleted_backup_does_not_come_back() {
    let world = World::build().await;
    let (_home, stale) = mirror(&world).await;
    let memory = world.fork();
    let id = &world.backups[0];
    let catalog = Catalog::open(shared(&memory)).await.unwrap();
    let tombstone = Tombstone {
        backup_id: id.clone(),
        manifest_sha256: None,
        operation: Uuid::now_v7(),
        reason: "delete".into(),
        at: Timestamp::now(),
        nonce: Uuid::new_v4(),
        extra: serde_json::Map::new(),
    };
    catalog
        .bury(&tombstone)
        .await
        .unwrap()
        .logged
        .unwrap()
        .unwrap();
    memory.tamper(&keys::manifest(id), None);
    for tombstone_too in [false, true] {
        if tombstone_too {
            memory.tamper(&keys::tombstone(id), None);
        }
        let report = look(&memory, Some(&stale)).await;
        assert!(report.repairs.is_empty(), "{:?}", report.repairs);
        assert!(!report.unrestorable.contains(id));
        assert!(of(&report, &keys::manifest(id)).is_empty());
        assert_eq!(report.is_damaged(), tombstone_too);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn other_bytes_than_those_that_the_log_names_do_not_come_back() {
    let world = World::build().await;
    let (_home, mirror) = mirror(&world).await;
    let all = ledger(&world);
    for (key, bytes) in &all {
        let file = key.as_str().replace('/', "+");
        let file = mirror.directory().join("ledger").join(file);
        // A right envelope of the same kind or, if there is only one, of another: another object all the same.
        let other = all.iter().find(|(other, _)| *other != key).unwrap().1;
        for wrong in [other.clone(), bytes.slice(1..)] {
            std::fs::write(&file, &wrong).unwrap();
            let memory = world.fork();
            memory.tamper(key, None);
            let report = look(&memory, Some(&mirror)).await;
            let put_back = report.repairs.iter().any(|it| it.key() == key);
            assert!(!put_back, "{key} would come back with other bytes");
            assert!(report.is_damaged());
            assert!(next(&report, key).contains("version or replica"), "{key}");
        }
        std::fs::write(&file, bytes).unwrap();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_there_and_damaged_is_left_to_a_person() {
    let world = World::build().await;
    let (_home, mirror) = mirror(&world).await;
    let all = ledger(&world);
    for (key, bytes) in &all {
        let mut flipped = bytes.to_vec();
        flipped[bytes.len() / 2] ^= 1;
        let sealed_other = all.iter().find(|(other, _)| *other != key).unwrap().1;
        for damaged in [Bytes::from(flipped), sealed_other.clone()] {
            let memory = world.fork();
            memory.tamper(key, Some(damaged.clone()));
            let without = look(&memory, None).await;
            assert!(without.is_damaged() && without.repairs.is_empty(), "{key}");
            let report = look(&memory, Some(&mirror)).await;
            assert!(report.is_damaged() && report.repairs.is_empty(), "{key}");
            let words = next(&report, key);
            assert!(words.contains("never overwritten"), "{key}: {words}");
            assert!(words.contains("--repair"), "{key}: {words}");
            assert!(next(&without, key).contains("version or replica"), "{key}");
            repair(&shared(&memory), &report).await.unwrap();
            assert_eq!(memory.bytes(key.as_str()).unwrap(), damaged, "{key}");
            // What it says helps.
            memory.tamper(key, None);
            let report = look(&memory, Some(&mirror)).await;
            repair(&shared(&memory), &report).await.unwrap();
            assert_clean(&look(&memory, Some(&mirror)).await, key.as_str());
        }
    }
}

/// Others are at work between the look and the repair.
#[tokio::test(flavor = "multi_thread")]
async fn what_has_changed_since_is_not_touched() {
    let world = World::build().await;
    let (_home, mirror) = mirror(&world).await;
    let key = keys::manifest(&world.backups[0]);
    let bytes = world.store.bytes(key.as_str()).unwrap();
    let other = world
        .store
        .bytes(keys::manifest(&world.backups[1]).as_str());
    let memory = world.fork();
    memory.tamper(&key, None);
    let report = look(&memory, Some(&mirror)).await;

    memory.tamper(&key, other.clone());
    let conflict = repair(&shared(&memory), &report).await;
    assert!(matches!(conflict, Err(CatalogError::Conflict { .. })));
    assert_eq!(memory.bytes(key.as_str()), other);
    memory.advance(Duration::from_mins(2));
    memory.tamper(&key, Some(bytes.clone()));
    let same = repair(&shared(&memory), &report).await.unwrap();
    assert_eq!(same, [Repaired::NotNeeded]);

    // An object without an entry.
    let catalog = Catalog::open(shared(&memory)).await.unwrap();
    let id: BackupId = NEXT.parse().unwrap();
    catalog.abandon(&id, Uuid::now_v7()).await.unwrap();
    let fence = keys::manifest(&id);
    let fenced = memory.bytes(fence.as_str()).unwrap();
    let missing = [Repair::LogEntry {
        key: fence.clone(),
        sha256: envelope::sha256_hex(&fenced),
    }];
    let report = Report {
        repairs: missing.to_vec(),
        ..Report::default()
    };
    let logged = repair(&shared(&memory), &report).await.unwrap();
    assert_eq!(logged, [Repaired::NotNeeded], "its writer was only slow");
    memory.tamper(&fence, Some(bytes));
    let conflict = repair(&shared(&memory), &report).await;
    assert!(matches!(conflict, Err(CatalogError::Conflict { .. })));
    memory.advance(Duration::from_mins(2));
    memory.tamper(&fence, None);
    let gone = repair(&shared(&memory), &report).await.unwrap();
    assert_eq!(gone, [Repaired::NotNeeded]);
}

/// Killed at every call to the store, with and without that call's effect, and run again.
#[tokio::test(flavor = "multi_thread")]
async fn a_repair_may_be_killed_anywhere() {
    let world = World::build().await;
    let (_home, mirror) = mirror(&world).await;
    let all = ledger(&world);
    let lost: Vec<&Key> = ["repository", "node", "epoch", "point", "manifest"]
        .into_iter()
        .map(|of| all.keys().find(|key| kind(key) == of).unwrap())
        .collect();
    let base = world.fork();
    // Nobody has logged this one.
    let fence = keys::manifest(&NEXT.parse().unwrap());
    let other = world.fork();
    let catalog = Catalog::open(shared(&other)).await.unwrap();
    let id = NEXT.parse().unwrap();
    catalog.abandon(&id, Uuid::now_v7()).await.unwrap();
    base.tamper(&fence, other.bytes(fence.as_str()));
    for key in &lost {
        base.tamper(key, None);
    }
    let report = look(&base, Some(&mirror)).await;
    assert_eq!(report.repairs.len(), lost.len() + 1, "{report:#?}");

    let faulty = Arc::new(FaultyStore::before(Arc::new(base.fork())));
    repair(&(Arc::clone(&faulty) as _), &report).await.unwrap();
    let calls = faulty.calls.load(Ordering::SeqCst);
    for last_call_counts in [false, true] {
        for dies_at in 1..=calls {
            let at = format!("killed at call {dies_at} of {calls}, done: {last_call_counts}");
            let memory = Arc::new(base.fork());
            let faulty = Arc::new(FaultyStore::before(Arc::clone(&memory)));
            faulty.dies_at.store(dies_at, Ordering::SeqCst);
            let counts = &faulty.last_call_counts;
            counts.store(last_call_counts, Ordering::SeqCst);
            let _ = repair(&(faulty as _), &report).await;
            // Until its lease has run out nobody else repairs.
            memory.advance(Duration::from_mins(2));
            let rest = look(&memory, Some(&mirror)).await;
            let left = rest.repairs.len();
            assert!(left <= report.repairs.len(), "{at}");
            repair(&shared(&memory), &rest).await.unwrap();
            assert_notes(&look(&memory, Some(&mirror)).await, &at);
            for key in &lost {
                assert_eq!(memory.bytes(key.as_str()), all.get(key).cloned(), "{at}");
            }
            let logged = entries(&memory, &fence);
            let actions: Vec<_> = logged.iter().map(|entry| &entry.action).collect();
            assert_eq!(actions, [&LogAction::BackupAbandoned], "{at}");
        }
    }
}
