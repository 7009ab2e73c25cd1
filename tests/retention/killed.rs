//! Whoever prunes is killed at every call to the store, with and without that call's effect.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use catalog::Catalog;
use catalog::retention::Holdings;
use catalog::retention::apply;
use catalog::retention::plan::{self, GRACE, Plan};
use pipeline::store::ObjectStore;
use support::faulty_store::FaultyStore;
use support::memory_store::MemoryStore;
use uuid::Uuid;

use crate::world::{DAY, End, Free, World, rules};

/// Two that stay, two that go, an increment, and what failed and killed ones left.
async fn before(versioned: bool) -> World {
    let memory = if versioned {
        MemoryStore::versioned(None)
    } else {
        MemoryStore::default()
    };
    let mut world = World::new(memory).await;
    let first = world.full().await;
    world.backup(Some(&first), End::Complete, 1).await;
    world.gap();
    world.backup(None, End::Complete, 2).await;
    world.gap();
    world.backup(None, End::Killed, 1).await;
    world.advance(GRACE + DAY);
    world.gap();
    world.backup(None, End::Failed, 1).await;
    world.gap();
    world.full().await;
    world
}

/// What is left, but for the log: an entry may stand twice.
fn left(store: &MemoryStore) -> BTreeSet<String> {
    let keys = store
        .all_versions()
        .into_iter()
        .map(|it| it.key.to_string());
    keys.filter(|key| !key.starts_with("log/")).collect()
}

async fn once(store: &Arc<dyn ObjectStore>, plan: impl Fn(&Holdings) -> Plan) -> Option<()> {
    let catalog = Catalog::open(Arc::clone(store)).await.ok()?;
    let plan = plan(&Holdings::read(&catalog).await.ok()?);
    let applied = apply::apply(&catalog, &plan, Uuid::new_v4(), "test", &Free).await;
    applied.ok().map(|_| ())
}

async fn killed_everywhere(world: &World, plan: impl Fn(&Holdings) -> Plan) {
    let reference = Arc::new(world.memory.fork());
    let faulty = Arc::new(FaultyStore::before(Arc::clone(&reference)));
    once(&(Arc::clone(&faulty) as _), &plan).await.unwrap();
    let calls = faulty.calls.load(Ordering::SeqCst);
    let (wanted, mut stopped) = (left(&reference), 0);
    assert!(wanted.len() < left(&world.memory).len());
    for last_call_counts in [false, true] {
        for dies_at in 1..=calls {
            let memory = Arc::new(world.memory.fork());
            let faulty = Arc::new(FaultyStore::before(Arc::clone(&memory)));
            faulty.dies_at.store(dies_at, Ordering::SeqCst);
            faulty
                .last_call_counts
                .store(last_call_counts, Ordering::SeqCst);
            stopped += u32::from(once(&(faulty as _), &plan).await.is_none());
            let store = Arc::clone(&memory) as Arc<dyn ObjectStore>;
            let after = world.over(&store, &memory).await;
            after.assert_whole().await;
            once(&store, &plan).await.unwrap();
            after.assert_whole().await;
            let at = format!("killed at call {dies_at} of {calls}, done: {last_call_counts}");
            assert_eq!(left(&memory), wanted, "{at}");
            let rest = plan(&Holdings::read(&after.catalog).await.unwrap());
            assert!(rest.is_empty(), "{at}: {rest:?}");
        }
    }
    assert!(
        u64::from(stopped) > calls,
        "{stopped} of {calls} were stopped"
    );
}

#[tokio::test]
async fn a_prune_that_is_killed_anywhere_is_finished_by_the_next() {
    for versioned in [false, true] {
        let world = before(versioned).await;
        let rules = rules(Some(1), None);
        killed_everywhere(&world, |holdings| plan::prune(holdings, &rules)).await;
    }
}

#[tokio::test]
async fn a_deletion_that_is_killed_anywhere_is_finished_by_the_next() {
    let world = before(false).await;
    let names = world.names().await;
    let third = names[2].clone();
    killed_everywhere(&world, |holdings| {
        plan::delete(holdings, third.as_str(), false).unwrap()
    })
    .await;
}
