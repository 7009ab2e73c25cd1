//! Beside others: what operations that died left is found, and what running ones make is nobody's finding.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use bytes::Bytes;
use catalog::ids::BackupId;
use catalog::journal::{OperationJournal, OperationStart};
use catalog::lease::{HeldLease, LeaseRequest};
use catalog::model::{
    LeaseScope, Manifest, MetadataAfter, OperationEvent, Place, PlannedNode, RestorePlan, Verdict,
};
use catalog::retention::Holdings;
use catalog::retention::apply::{self, Guard, Report as Removal};
use catalog::retention::plan::{self, GRACE, Rules};
use catalog::verify::{Depth, Report, Scope, Severity};
use catalog::{Catalog, CatalogError, keys};
use pipeline::store::{Key, ObjectStore};
use support::faulty_store::{FaultyStore, Meanwhile};
use support::memory_store::MemoryStore;
use uuid::Uuid;

use super::fixture::{World, holder, verify};
use super::repair::{assert_clean, assert_notes, look, shared};

const DAY: Duration = Duration::from_hours(24);

const BYTES: Bytes = Bytes::from_static(b"half of something");

fn key(name: &str) -> Key {
    Key::new(name).unwrap()
}

async fn open(store: &Arc<MemoryStore>) -> Catalog {
    Catalog::open(shared(store)).await.unwrap()
}

/// An operation under its lease, as a command begins one.
async fn begun(
    catalog: &Catalog,
    scope: LeaseScope,
    kind: &str,
    backup: Option<&BackupId>,
    operation: Uuid,
) -> (HeldLease, OperationJournal) {
    let request = LeaseRequest {
        scope,
        operation,
        backup_id: backup.filter(|_| scope == LeaseScope::Backup).cloned(),
        holder: holder(kind),
        ttl: Duration::from_mins(1),
    };
    let lease = catalog.take_lease(request).await.unwrap().lease;
    let start = OperationStart {
        operation,
        kind: kind.into(),
        backup_id: backup.cloned(),
        node_id: None,
        log_head: catalog.log_head().await.unwrap(),
    };
    let store = Arc::clone(catalog.store());
    let journal = OperationJournal::start_by(store, start, Some(holder(kind)));
    (lease, journal.await.unwrap())
}

/// An agent's part of a backup, with an upload under way.
async fn with_upload(store: &Arc<MemoryStore>, id: &BackupId, ended: bool) -> Key {
    let node = Uuid::now_v7();
    let part = OperationStart {
        operation: Uuid::now_v7(),
        kind: "backup".into(),
        backup_id: Some(id.clone()),
        node_id: Some(node),
        log_head: None,
    };
    let part = OperationJournal::start(shared(store), part).await.unwrap();
    let pack = keys::pack(id, node, 1, 99);
    part.intend_all(std::slice::from_ref(&pack)).await.unwrap();
    store.create_upload(&pack).await.unwrap();
    if ended {
        part.ended(None).await.unwrap();
    }
    pack
}

fn orphans(report: &Report) -> BTreeMap<&str, &str> {
    let orphans = report.findings.iter();
    let orphans = orphans.filter(|it| it.severity == Severity::Orphan);
    orphans.map(|it| (&*it.key, &*it.what)).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn what_failed_attempts_left_is_found_and_no_damage() {
    let world = World::build().await;
    let (id, node) = (&world.backups[0], Uuid::now_v7());
    let named = world.objects().into_keys();
    let mut named = named.filter(|it| it.as_str().starts_with(&format!("backups/{id}/")));
    let pack = named
        .find(|it| it.as_str().ends_with("/pack-00000"))
        .unwrap();
    let (attempt, _) = pack.as_str().rsplit_once('/').unwrap();
    let (copy, _) = attempt.rsplit_once('/').unwrap();
    let never = "20261128T040233Z-F-00000008";
    let check = Uuid::now_v7();
    let left = [
        (format!("{attempt}/pack-00077"), "an attempt that failed"),
        (format!("{copy}/2/index"), "an attempt that failed"),
        (format!("{copy}/2/pack-00000"), "an attempt that failed"),
        (
            format!("backups/20261124T040233Z-F-00000004/{node}/1/index"),
            "given up",
        ),
        (
            format!("backups/20261123T040233Z-F-00000003/{node}/1/index"),
            "deleted",
        ),
        (
            format!("backups/{never}/{node}/1/pack-00000"),
            "never finished",
        ),
        (
            format!("wal/{node}/20261121T040233Z-0a0a0a0a/000000010000000000000001.zst"),
            "",
        ),
        (
            format!("operations/{check}/probe/one"),
            "check of the store",
        ),
        ("lost+found/thing".to_owned(), "no object of a repository"),
        ("log/1.json".to_owned(), "no object of a repository"),
        (
            format!("backups/{id}/manifest.json.bak"),
            "no object of a repository",
        ),
    ];
    for (name, why) in &left {
        let memory = world.fork();
        memory.tamper(&key(name), Some(BYTES));
        let report = look(&memory, None).await;
        let found = orphans(&report);
        assert_eq!(found.keys().copied().collect::<Vec<_>>(), [name.as_str()]);
        assert!(found[name.as_str()].contains(why), "{found:?}");
        assert!(report.findings.iter().all(|it| it.next.is_some()));
        assert_eq!(report.findings.len(), 1, "{:#?}", report.findings);
        assert!(!report.is_damaged() && report.repairs.is_empty());
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_check_that_runs_leaves_no_orphan() {
    let world = World::build().await;
    let memory = world.fork();
    let start = OperationStart {
        operation: Uuid::now_v7(),
        kind: "check".into(),
        backup_id: None,
        node_id: None,
        log_head: None,
    };
    let probe = keys::probe(start.operation, "one").unwrap();
    let journal = OperationJournal::start(shared(&memory), start);
    let journal = journal.await.unwrap();
    memory.tamper(&probe, Some(BYTES));
    assert_notes(&look(&memory, None).await, "while it runs");
    journal.ended(None).await.unwrap();
    let report = look(&memory, None).await;
    assert!(orphans(&report).contains_key(probe.as_str()));
    // It goes with the journal.
    memory.advance(40 * DAY);
    prune(
        &memory,
        Rules {
            keep_full: None,
            ..rules()
        },
        &Free,
    )
    .await
    .unwrap();
    assert_eq!(memory.bytes(probe.as_str()), None);
    assert_clean(&look(&memory, None).await, "after prune");
}

/// Uploads of a running operation are its own business; of one that is over they are found.
#[tokio::test(flavor = "multi_thread")]
async fn beside_a_running_backup_nothing_is_found_and_after_its_death_all_is() {
    let world = World::build().await;
    let (memory, finished) = world.commit.clone().unwrap();
    let id = &world.backups[1];
    let upload = with_upload(&memory, id, false).await;
    for depth in [Depth::Fast, Depth::Full] {
        let report = verify(&shared(&memory), Scope::All, depth, None).await;
        let report = report.unwrap();
        assert_clean(&report, "it runs");
        assert!(!report.backups.contains(id));
    }
    // Killed: the lease runs out.
    memory.advance(Duration::from_mins(2));
    let report = look(&memory, None).await;
    let found = orphans(&report);
    assert!(found[upload.as_str()].contains("under way"), "{found:?}");
    let below = format!("backups/{id}/");
    let copies = memory.keys().into_iter();
    let copies: Vec<_> = copies
        .filter(|it| it.as_str().starts_with(&below))
        .collect();
    for copy in &copies {
        assert!(found[copy.as_str()].contains("never finished"), "{found:?}");
    }
    assert!(copies.len() >= 4 && found.len() == copies.len() + 1);
    assert!(!report.is_damaged() && report.repairs.is_empty());
    assert!(report.findings.iter().all(|it| it.next.is_some()));

    // Finished, with the upload forgotten: it is found by the one that reads everything.
    let upload = with_upload(&finished, id, true).await;
    assert_clean(&look(&finished, None).await, "finished");
    let report = verify(&shared(&finished), Scope::All, Depth::Full, None).await;
    let report = report.unwrap();
    let found = orphans(&report);
    assert_eq!(found.keys().copied().collect::<Vec<_>>(), [upload.as_str()]);
    assert!(!report.is_damaged() && report.backups.contains(id));
}

/// The backup is finished at any moment of a verification.
#[tokio::test(flavor = "multi_thread")]
async fn a_backup_that_is_finished_meanwhile_is_no_finding() {
    let world = World::build().await;
    let (before, after) = world.commit.clone().unwrap();
    at_every_call(&before, &after, "finished").await;
}

/// Swaps the stores' contents before every call of a verification, one at a time.
async fn at_every_call(before: &Arc<MemoryStore>, after: &Arc<MemoryStore>, what: &str) {
    for depth in [Depth::Fast, Depth::Full] {
        let mut call = 1;
        loop {
            let memory = Arc::new(before.fork());
            let faulty = Arc::new(FaultyStore::before(Arc::clone(&memory)));
            let after = Arc::clone(after);
            let act = Box::new(move || memory.become_as(&after));
            *faulty.meanwhile.lock().unwrap() = Some(Meanwhile { call, act });
            let store = Arc::clone(&faulty) as Arc<dyn ObjectStore>;
            let report = verify(&store, Scope::All, depth, None).await.unwrap();
            let at = format!("{what} before call {call} ({depth:?})");
            assert!(!report.is_damaged(), "{at}: {:#?}", report.findings);
            assert_eq!(report.count(Severity::Repairable), 0, "{at}");
            if what == "finished" {
                assert_notes(&report, &at);
            }
            if faulty.calls.load(Ordering::SeqCst) < call {
                assert!(call > 50, "{call}");
                break;
            }
            call += if depth == Depth::Full { 3 } else { 1 };
        }
    }
}

/// Nobody else is there.
struct Free;

impl Guard for Free {
    type Error = CatalogError;

    async fn prove(&self) -> Result<(), CatalogError> {
        Ok(())
    }

    fn go_on(&self) -> Result<(), CatalogError> {
        Ok(())
    }
}

/// Stops when so much is done.
struct Stops {
    when: fn(&Removal) -> bool,
    stopped: AtomicBool,
}

impl Stops {
    fn when(when: fn(&Removal) -> bool) -> Self {
        let stopped = AtomicBool::new(false);
        Self { when, stopped }
    }
}

impl Guard for Stops {
    type Error = CatalogError;

    async fn prove(&self) -> Result<(), CatalogError> {
        Ok(())
    }

    fn go_on(&self) -> Result<(), CatalogError> {
        if self.stopped.load(Ordering::SeqCst) {
            return Err(pipeline::error::PipelineError::Cancelled.into());
        }
        Ok(())
    }

    fn progress(&self, report: &Removal) {
        self.stopped.store((self.when)(report), Ordering::SeqCst);
    }
}

fn rules() -> Rules {
    Rules {
        keep_full: Some(1),
        keep_days: None,
        grace: GRACE,
    }
}

/// `gs_pitr prune`, under its lease and with its journal.
async fn prune<G: Guard>(
    store: &Arc<MemoryStore>,
    rules: Rules,
    guard: &G,
) -> Result<(), G::Error> {
    let catalog = open(store).await;
    let (scope, operation) = (LeaseScope::Maintain, Uuid::now_v7());
    let (lease, journal) = begun(&catalog, scope, "prune", None, operation).await;
    let plan = plan::prune(&Holdings::read(&catalog).await?, &rules);
    apply::apply(&catalog, &plan, operation, "prune", guard).await?;
    journal.ended(None).await?;
    lease.release().await?;
    Ok(())
}

/// Between the tombstone and the last deletion; and at any moment of a verification that began before.
#[tokio::test(flavor = "multi_thread")]
async fn beside_a_prune_nothing_is_damaged() {
    let world = World::build_longer().await;
    // Points that may be newer than a listing of WAL are judged later.
    world.store.advance(plan::MARGIN * 2);
    let buried = world.fork();
    let guard = Stops::when(|report| !report.deleted.is_empty());
    assert!(prune(&buried, rules(), &guard).await.is_err());
    let is_there = |store: &MemoryStore, key: Key| store.bytes(key.as_str()).is_some();
    let gone = world.backups[..2].iter();
    let gone: Vec<_> = gone
        .filter(|id| is_there(&buried, keys::tombstone(id)))
        .collect();
    let [id] = gone[..] else { panic!("{gone:?}") };
    assert!(is_there(&buried, keys::manifest(id)));
    let pruned = world.fork();
    prune(&pruned, rules(), &Free).await.unwrap();
    assert!(!is_there(&pruned, keys::manifest(id)));
    assert!(pruned.keys().len() + 5 < world.store.keys().len());
    for depth in [Depth::Fast, Depth::Full] {
        let report = verify(&shared(&buried), Scope::All, depth, None).await;
        let report = report.unwrap();
        assert!(!report.is_damaged(), "{:#?}", report.findings);
        assert!(report.repairs.is_empty() && !report.backups.contains(id));
    }
    assert_clean(&look(&pruned, None).await, "pruned");
    at_every_call(&world.store, &buried, "buried").await;
    at_every_call(&world.store, &pruned, "pruned").await;
    // The metadata of a point have gone, and the point is still there.
    let half = world.fork();
    let guard = Stops::when(|report| report.versions > 0);
    assert!(prune(&half, rules(), &guard).await.is_err());
    let below = |store: &MemoryStore, prefix: &str| {
        let keys = store.keys().into_iter();
        keys.filter(|it| it.as_str().starts_with(prefix)).count()
    };
    assert_eq!(below(&half, "points/"), below(&world.store, "points/"));
    assert_eq!(
        below(&half, "metadata/") + 1,
        below(&world.store, "metadata/")
    );
    at_every_call(&world.store, &half, "half").await;
    // Both have gone, and the manifests are still there.
    let begun = world.fork();
    let guard = Stops::when(|report| report.versions > 1);
    assert!(prune(&begun, rules(), &guard).await.is_err());
    assert_eq!(below(&begun, "points/") + 1, below(&world.store, "points/"));
    assert!(is_there(&begun, keys::manifest(id)));
    at_every_call(&world.store, &begun, "begun").await;
    let later = Arc::new(buried.fork());
    later.advance(Duration::from_mins(2));
    prune(&later, rules(), &Free).await.unwrap();
    at_every_call(&buried, &later, "pruned after the tombstone").await;
}

/// A prune that is killed anywhere leaves orphans and no damage.
#[tokio::test(flavor = "multi_thread")]
async fn after_a_prune_that_was_killed_nothing_is_damaged() {
    let world = World::build_longer().await;
    world.store.advance(40 * DAY);
    let run = async |store: Arc<dyn ObjectStore>| {
        let catalog = Catalog::open(store).await?;
        let plan = plan::prune(&Holdings::read(&catalog).await?, &rules());
        apply::apply(&catalog, &plan, Uuid::now_v7(), "prune", &Free).await
    };
    let faulty = Arc::new(FaultyStore::before(world.fork()));
    run(Arc::clone(&faulty) as _).await.unwrap();
    let calls = faulty.calls.load(Ordering::SeqCst);
    for dies_at in 1..=calls {
        let memory = world.fork();
        let faulty = Arc::new(FaultyStore::before(Arc::clone(&memory)));
        faulty.dies_at.store(dies_at, Ordering::SeqCst);
        faulty.last_call_counts.store(true, Ordering::SeqCst);
        let _ = run(faulty as _).await;
        let report = look(&memory, None).await;
        let at = format!("killed at call {dies_at} of {calls}");
        assert!(!report.is_damaged(), "{at}: {:#?}", report.findings);
        assert!(report.repairs.len() <= 1, "{at}: {:#?}", report.repairs);
    }
}

/// Stores delete many objects in any order, so of an old journal anything may be left.
#[tokio::test(flavor = "multi_thread")]
async fn half_an_old_journal_is_no_damage() {
    let world = World::build().await;
    let memory = world.fork();
    let records = memory.keys().into_iter();
    let first = records.filter(|it| it.as_str().ends_with("/000001.json"));
    for first in first.filter(|it| it.as_str().starts_with("operations/")) {
        memory.tamper(&first, None);
    }
    assert!(look(&memory, None).await.is_damaged(), "they are young");
    memory.advance(40 * DAY);
    let report = look(&memory, None).await;
    assert!(!report.is_damaged(), "{:#?}", report.findings);
}

/// A restore of one backup, as the command journals it, to the end that `verdict` says.
async fn restored(store: &Arc<MemoryStore>, manifest: &Manifest, verdict: Verdict) {
    let catalog = open(store).await;
    let operation = Uuid::now_v7();
    let id = &manifest.backup_id;
    let (lease, journal) = begun(
        &catalog,
        LeaseScope::Restore,
        "restore",
        Some(id),
        operation,
    )
    .await;
    catalog
        .pin(operation, std::slice::from_ref(id))
        .await
        .unwrap();
    let nodes = manifest.nodes.iter().map(|copy| PlannedNode {
        node_id: copy.node_id,
        becomes: copy.node_id,
        epoch: copy.epoch.clone(),
        agent: "db1:18080".into(),
        host: "db1".into(),
        machine_id: "m1".into(),
        operation: Uuid::now_v7(),
        target: "/data".into(),
        place: Place::Fresh,
        port: 5432,
    });
    let plan = RestorePlan {
        backup_id: id.clone(),
        point_id: manifest.point.clone().unwrap(),
        consistency: manifest.consistency,
        start: true,
        discard_old: false,
        clone: false,
        metadata: MetadataAfter::Compare,
        nodes: nodes.collect(),
    };
    journal
        .record(OperationEvent::RestorePlanned(plan))
        .await
        .unwrap();
    let running = look(store, None).await;
    assert_clean(&running, "a restore runs");
    catalog
        .decide(operation, verdict, "dba@ops1 (pid 1)", None)
        .await
        .unwrap();
    assert_clean(&look(store, None).await, "a restore is decided");
    let error = (verdict == Verdict::Rollback).then_some("a node could not be proved");
    journal.ended(error).await.unwrap();
    lease.release().await.unwrap();
}

/// A life without accidents: backup, restores, a deletion and a prune, and the prune that takes the old journals.
#[tokio::test(flavor = "multi_thread")]
async fn a_healthy_life_has_no_finding() {
    let world = World::build_longer().await;
    // Points that may be newer than a listing of WAL are judged later.
    world.store.advance(plan::MARGIN * 2);
    let memory = world.fork();
    let catalog = open(&memory).await;
    let manifest = catalog.manifest(&world.backups[1]).await.unwrap();
    restored(&memory, &manifest, Verdict::Commit).await;
    restored(&memory, &manifest, Verdict::Rollback).await;
    assert_clean(&look(&memory, None).await, "after the restores");

    let (scope, operation) = (LeaseScope::Maintain, Uuid::now_v7());
    let gone = &world.backups[1];
    let (lease, journal) = begun(&catalog, scope, "delete", Some(gone), operation).await;
    let held = Holdings::read(&catalog).await.unwrap();
    let plan = plan::delete(&held, gone.as_str(), false).unwrap();
    apply::apply(&catalog, &plan, operation, "delete", &Free)
        .await
        .unwrap();
    journal.ended(None).await.unwrap();
    lease.release().await.unwrap();
    assert_clean(&look(&memory, None).await, "after the deletion");

    prune(&memory, rules(), &Free).await.unwrap();
    assert_clean(&look(&memory, None).await, "after the prune");
    let before = memory.keys().len();
    memory.advance(40 * DAY);
    prune(&memory, rules(), &Free).await.unwrap();
    assert!(memory.keys().len() < before, "old journals are gone");
    for depth in [Depth::Fast, Depth::Full] {
        let report = verify(&shared(&memory), Scope::All, depth, None).await;
        assert_clean(&report.unwrap(), "after the last prune");
    }
    assert!(
        memory
            .bytes(keys::manifest(&world.backups[2]).as_str())
            .is_some()
    );
}
