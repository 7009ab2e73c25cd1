//! Whoever reads a backup, and whoever completes one, while another deletes.

use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use catalog::CatalogError;
use catalog::ids::BackupId;
use catalog::lease::{HeldLease, LeaseRequest};
use catalog::model::LeaseScope;
use catalog::retention::apply::{self, Applied, Guard};
use catalog::retention::plan::{self, Keep, Refused};
use support::memory_store::MemoryStore;
use tokio::sync::Mutex;
use uuid::Uuid;

use crate::world::{DAY, End, Free, World, holder, rules};

async fn lease(world: &World, scope: LeaseScope, backup: Option<&BackupId>) -> HeldLease {
    let request = LeaseRequest {
        scope,
        operation: Uuid::new_v4(),
        backup_id: backup.cloned(),
        holder: holder(),
        ttl: Duration::from_mins(1),
    };
    world.catalog.take_lease(request).await.unwrap().lease
}

#[tokio::test]
async fn a_backup_that_is_read_stays() {
    let mut world = World::new(MemoryStore::default()).await;
    let read = world.full().await;
    world.gap();
    world.full().await;
    let reader = lease(&world, LeaseScope::Restore, None).await;
    let operation = reader.lease().operation;
    world
        .catalog
        .pin(operation, std::slice::from_ref(&read))
        .await
        .unwrap();
    let refused = plan::delete(&world.holdings().await, read.as_str(), false).unwrap_err();
    assert_eq!(refused, Refused::Read(read.clone(), operation));
    let plan = world.plan(&rules(Some(1), None)).await;
    assert!(plan.removed.is_empty());
    assert!(
        plan.kept
            .iter()
            .any(|kept| kept.id == read && kept.why == Keep::Read)
    );
    reader.release().await.unwrap();
    let plan = world.plan(&rules(Some(1), None)).await;
    assert_eq!(plan.removed.len(), 1);
}

#[tokio::test]
async fn a_reader_that_comes_before_the_tombstone_changes_the_plan() {
    let mut world = World::new(MemoryStore::default()).await;
    let read = world.full().await;
    world.gap();
    world.full().await;
    let plan = world.plan(&rules(Some(1), None)).await;
    let reader = lease(&world, LeaseScope::Restore, None).await;
    let operation = reader.lease().operation;
    world
        .catalog
        .pin(operation, std::slice::from_ref(&read))
        .await
        .unwrap();
    let before = world.keys("").await;
    let applied = apply::apply(&world.catalog, &plan, Uuid::new_v4(), "test", &Free).await;
    assert!(matches!(applied.unwrap(), Applied::Changed { .. }));
    assert_eq!(world.keys("").await, before);
}

/// Pins a backup after the deleter has looked for pins, and before its tombstone.
struct Slipping<'a> {
    world: &'a World,
    read: BackupId,
    reader: Mutex<Option<HeldLease>>,
    proofs: AtomicU32,
}

impl Guard for Slipping<'_> {
    type Error = CatalogError;

    async fn prove(&self) -> Result<(), CatalogError> {
        if self.proofs.fetch_add(1, Ordering::SeqCst) == 0 {
            let reader = lease(self.world, LeaseScope::Restore, None).await;
            let operation = reader.lease().operation;
            let pinned = self
                .world
                .catalog
                .pin(operation, std::slice::from_ref(&self.read));
            pinned.await.expect("there is no tombstone yet");
            *self.reader.lock().await = Some(reader);
        }
        Ok(())
    }

    fn go_on(&self) -> Result<(), CatalogError> {
        Ok(())
    }
}

#[tokio::test]
async fn a_reader_that_slips_in_before_the_tombstone_keeps_the_bytes() {
    let mut world = World::new(MemoryStore::default()).await;
    let read = world.full().await;
    world.gap();
    world.full().await;
    let guard = Slipping {
        world: &world,
        read: read.clone(),
        reader: Mutex::default(),
        proofs: AtomicU32::new(0),
    };
    let plan = world.plan(&rules(Some(1), None)).await;
    let applied = apply::apply(&world.catalog, &plan, Uuid::new_v4(), "test", &guard).await;
    let Applied::Done(report) = applied.unwrap() else {
        panic!("the plan stands");
    };
    assert_eq!(
        (&report.deleted, &report.read),
        (&vec![read.clone()], &vec![read.clone()])
    );
    assert_eq!(report.versions, 0);
    assert_eq!(world.names().await.len(), 1);
    let there = world.keys("").await;
    for stored in plan.stored() {
        assert!(
            there.contains(stored.key.as_str()),
            "{} is gone",
            stored.key
        );
    }
    // As long as it is read it stays; then it goes.
    assert!(world.plan(&rules(Some(1), None)).await.is_empty());
    guard
        .reader
        .lock()
        .await
        .take()
        .unwrap()
        .release()
        .await
        .unwrap();
    let plan = world.plan(&rules(Some(1), None)).await;
    world.apply(&plan).await;
    assert_eq!(world.keys(&format!("backups/{read}/")).await.len(), 1);
    assert_eq!(world.keys("points/").await.len(), 1);
    world.assert_whole().await;
}

#[tokio::test]
async fn a_backup_that_is_made_under_a_lease_is_never_dead() {
    let mut world = World::new(MemoryStore::default()).await;
    world.full().await;
    let made = world.backup(None, End::Killed, 1).await;
    world.advance(DAY * 10);
    let maker = lease(&world, LeaseScope::Backup, Some(&made)).await;
    let plan = world.plan(&rules(None, None)).await;
    assert!(plan.is_empty(), "{plan:?}");
    assert!(plan.notes.iter().any(|note| note.contains("being made")));
    // Frozen past its lease and its grace it is dead, and what it does later is refused.
    world.advance(DAY * 2);
    let plan = world.plan(&rules(None, None)).await;
    assert_eq!(plan.dead.len(), 1);
    drop(maker);
}

#[tokio::test]
async fn a_backup_completed_after_the_plan_stays() {
    let mut world = World::new(MemoryStore::default()).await;
    let complete = world.full().await;
    // As if its manifest had come after the listing: the plan holds it for dead.
    let manifest = world.catalog.manifest(&complete).await.unwrap();
    let key = catalog::keys::manifest(&complete);
    let bytes = world.memory.bytes(key.as_str());
    world.memory.tamper(&key, None);
    let log = world.keys("log/").await;
    for entry in &log {
        world
            .memory
            .tamper(&pipeline::store::Key::new(entry.clone()).unwrap(), None);
    }
    let plan = world.plan(&rules(None, None)).await;
    assert_eq!(plan.dead.len(), 1, "{plan:?}");
    world.memory.tamper(&key, bytes);
    let applied = apply::apply(&world.catalog, &plan, Uuid::new_v4(), "test", &Free).await;
    assert!(matches!(applied.unwrap(), Applied::Changed { .. }));
    assert_eq!(
        world.catalog.manifest(&complete).await.unwrap().nonce,
        manifest.nonce
    );
    world.assert_whole().await;
}

#[tokio::test]
async fn a_writer_that_wakes_up_late_finds_the_fence_and_its_bytes_go() {
    let mut world = World::new(MemoryStore::default()).await;
    world.full().await;
    world.gap();
    let late = world.full().await;
    let manifest = world.catalog.manifest(&late).await.unwrap();
    // It never got to its manifest, and stood still past everything.
    let key = catalog::keys::manifest(&late);
    world.memory.tamper(&key, None);
    for entry in &world.keys("log/").await {
        world
            .memory
            .tamper(&pipeline::store::Key::new(entry.clone()).unwrap(), None);
    }
    world.advance(DAY * 2);
    let plan = world.plan(&rules(None, None)).await;
    world.apply(&plan).await;
    let committed = world.catalog.commit_backup(&manifest).await;
    // Its point is gone, or its manifest is refused: either way there is no such backup.
    assert!(committed.is_err(), "{committed:?}");
    let node = &manifest.nodes[0];
    let pack = catalog::keys::pack(&late, node.node_id, node.attempt, 2);
    crate::world::put(&*world.store, &pack, 100).await;
    assert_eq!(world.names().await.len(), 1);
    let plan = world.plan(&rules(None, None)).await;
    assert_eq!(crate::world::names(&plan.litter), [pack.as_str()]);
    world.apply(&plan).await;
    world.assert_whole().await;
}
