//! What a plan lets go and what it keeps.

use std::time::Duration;

use catalog::keys;
use catalog::model::{Extra, Gap};
use catalog::retention::plan::{self, GRACE, Keep, Refused, Rules, Why};
use proptest::prelude::*;
use support::memory_store::MemoryStore;
use uuid::Uuid;

use crate::world::{DAY, End, World, names, put, rules, segment};

fn run<T>(work: impl Future<Output = T>) -> T {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build();
    runtime.unwrap().block_on(work)
}

#[tokio::test]
async fn the_newest_full_backups_stay_with_their_increments_and_parents() {
    let mut world = World::new(MemoryStore::default()).await;
    let first = world.full().await;
    world.gap();
    let second = world.full().await;
    let on_second = world.backup(Some(&second), End::Complete, 1).await;
    world.gap();
    let third = world.full().await;
    let plan = world.plan(&rules(Some(2), None)).await;
    let removed: Vec<_> = plan.removed.iter().map(|it| (&it.id, it.why)).collect();
    assert_eq!(removed, [(&first, Why::Retention)]);
    let kept: Vec<_> = plan.kept.iter().map(|it| (&it.id, it.why)).collect();
    let all = Keep::KeepFull;
    assert_eq!(kept, [(&second, all), (&on_second, all), (&third, all)]);
    // Its point and the WAL before the others' go with it: 3 segments on each of 2 nodes.
    assert_eq!((plan.points.len(), plan.wal.len()), (1, 6));
    let report = world.apply(&plan).await;
    assert_eq!(report.deleted, std::slice::from_ref(&first));
    assert_eq!(world.names().await, [second, on_second, third]);
    world.assert_whole().await;
    let left = world.keys(&format!("backups/{first}/")).await;
    assert_eq!(
        left.into_iter().collect::<Vec<_>>(),
        [keys::tombstone(&first).to_string()]
    );
    assert!(world.plan(&rules(Some(2), None)).await.is_empty());
}

#[tokio::test]
async fn young_backups_stay_and_a_young_increment_keeps_its_parent() {
    let mut world = World::new(MemoryStore::default()).await;
    let old = world.full().await;
    let base = world.full().await;
    world.advance(DAY * 5);
    let increment = world.backup(Some(&base), End::Complete, 1).await;
    world.advance(DAY * 5);
    let newest = world.full().await;
    let plan = world.plan(&rules(None, Some(7))).await;
    let kept: Vec<_> = plan.kept.iter().map(|it| (&it.id, it.why)).collect();
    let (days, parent) = (Keep::KeepDays, Keep::Parent);
    assert_eq!(kept, [(&base, parent), (&increment, days), (&newest, days)]);
    assert_eq!(plan.removed[0].id, old);
    // A point that a kept backup's WAL leads to stays, though its own backup goes: here none does.
    world.apply(&plan).await;
    world.assert_whole().await;
}

#[tokio::test]
async fn the_last_good_backup_stays_whatever_the_rules_say() {
    let mut world = World::new(MemoryStore::default()).await;
    let good = world.full().await;
    world.gap();
    let damaged = world.full().await;
    let pack = world.keys(&format!("backups/{damaged}/")).await;
    let pack = pack.iter().find(|key| key.ends_with("pack-00001")).unwrap();
    world
        .memory
        .tamper(&pipeline::store::Key::new(pack.clone()).unwrap(), None);
    world.advance(DAY * 100);
    let plan = world.plan(&rules(None, Some(1))).await;
    let kept: Vec<_> = plan.kept.iter().map(|it| (&it.id, it.why)).collect();
    assert_eq!(kept, [(&good, Keep::LastGood)]);
    // One that lacks something is not counted among the newest, and not deleted while older ones stay.
    let plan = world.plan(&rules(Some(1), None)).await;
    assert!(plan.removed.is_empty(), "{plan:?}");
    let holdings = world.holdings().await;
    let refused = plan::delete(&holdings, good.as_str(), false).unwrap_err();
    assert_eq!(refused, Refused::LastGood(good.clone()));
    assert!(plan::delete(&holdings, good.as_str(), true).is_ok());
    assert!(plan::delete(&holdings, damaged.as_str(), false).is_ok());
    // With no good one left none goes.
    let index = world.keys(&format!("backups/{good}/")).await;
    let index = index.iter().find(|key| key.ends_with("index")).unwrap();
    world
        .memory
        .tamper(&pipeline::store::Key::new(index.clone()).unwrap(), None);
    let plan = world.plan(&rules(Some(1), Some(1))).await;
    assert!(plan.removed.is_empty(), "{plan:?}");
}

#[tokio::test]
async fn without_rules_only_garbage_goes() {
    let mut world = World::new(MemoryStore::default()).await;
    let kept = world.backup(None, End::Complete, 2).await;
    world.gap();
    let failed = world.backup(None, End::Failed, 1).await;
    world.gap();
    let killed = world.backup(None, End::Killed, 1).await;
    let plan = world.plan(&rules(None, None)).await;
    // It failed and said so; the other one may be under way. What WAL that one needs is not known.
    let dead: Vec<_> = plan.dead.iter().map(|it| &it.id).collect();
    assert_eq!(dead, [&failed]);
    let litter = names(&plan.litter);
    assert_eq!(litter.len(), 3, "the first attempt of one node: {litter:?}");
    assert!(plan.removed.is_empty() && plan.wal.is_empty() && plan.uploads.is_empty());
    assert!(
        plan.notes.iter().any(|note| note.contains(killed.as_str())),
        "{:?}",
        plan.notes
    );
    let report = world.apply(&plan).await;
    assert_eq!(report.fenced, [failed]);
    world.assert_whole().await;
    world.advance(GRACE + Duration::from_secs(1));
    let plan = world.plan(&rules(None, None)).await;
    let dead: Vec<_> = plan.dead.iter().map(|it| &it.id).collect();
    assert_eq!(dead, [&killed]);
    assert_eq!(
        (plan.uploads.len(), plan.points.len(), plan.wal.len()),
        (2, 1, 12)
    );
    world.apply(&plan).await;
    assert_eq!(world.memory.uploads_under_way(), 0);
    assert_eq!(world.names().await, [kept]);
    world.assert_whole().await;
    assert!(world.plan(&rules(None, None)).await.is_empty());
}

#[tokio::test]
async fn journals_and_leases_go_when_they_are_old() {
    let mut world = World::new(MemoryStore::default()).await;
    world.full().await;
    for _ in 0..20 {
        let request = catalog::lease::LeaseRequest {
            scope: catalog::model::LeaseScope::Maintain,
            operation: Uuid::new_v4(),
            backup_id: None,
            holder: crate::world::holder(),
            ttl: Duration::from_mins(1),
        };
        let taken = world.catalog.take_lease(request).await.unwrap();
        taken.lease.release().await.unwrap();
    }
    let plan = world.plan(&rules(None, None)).await;
    assert_eq!(
        (plan.journals.len(), plan.leases.len()),
        (0, 40 - plan::LEASES)
    );
    world.advance(plan::JOURNALS + DAY);
    let plan = world.plan(&rules(None, None)).await;
    let journals = world.keys("operations/").await.len();
    assert_eq!(plan.journals.len(), journals);
    world.apply(&plan).await;
    assert!(world.keys("operations/").await.is_empty());
    assert_eq!(world.keys("lease/").await.len(), plan::LEASES);
    world.assert_whole().await;
    assert!(world.plan(&rules(None, None)).await.is_empty());
}

#[tokio::test]
async fn what_cannot_be_read_is_left_alone_with_all_wal() {
    let mut world = World::new(MemoryStore::default()).await;
    let first = world.full().await;
    world.gap();
    let second = world.full().await;
    world.gap();
    let third = world.full().await;
    // A manifest that the log knows and the bucket has lost is no dead backup.
    world.memory.tamper(&keys::manifest(&second), None);
    world.advance(DAY * 100);
    let plan = world.plan(&rules(Some(1), None)).await;
    assert!(
        plan.dead.is_empty() && plan.wal.is_empty() && plan.points.is_empty(),
        "{plan:?}"
    );
    assert_eq!(plan.removed.len(), 1);
    assert_eq!(plan.removed[0].id, first);
    assert!(plan.notes.iter().any(|note| note.contains(second.as_str())));
    world.apply(&plan).await;
    // Told to, it goes, and then the WAL can be judged again.
    world.delete(&second).await;
    let plan = world.plan(&rules(Some(1), None)).await;
    assert_eq!((plan.points.len(), plan.wal.len()), (2, 12));
    world.apply(&plan).await;
    assert_eq!(world.names().await, [third]);
    world.assert_whole().await;
}

#[tokio::test]
async fn deletion_is_refused_with_a_reason() {
    let mut world = World::new(MemoryStore::default()).await;
    let full = world.full().await;
    let increment = world.backup(Some(&full), End::Complete, 1).await;
    world.full().await;
    let dead = world.backup(None, End::Killed, 1).await;
    let holdings = world.holdings().await;
    let refused = |text: &str| plan::delete(&holdings, text, false).unwrap_err();
    assert_eq!(
        refused(full.as_str()),
        Refused::Increments(full.clone(), vec![increment.clone()])
    );
    assert_eq!(refused(dead.as_str()), Refused::Unfinished(dead.clone()));
    assert_eq!(refused("1999"), Refused::NotFound);
    assert!(matches!(refused("20"), Refused::Ambiguous(names) if names.len() == 4));
    world.delete(&increment).await;
    world.delete(&full).await;
    world.assert_whole().await;
    // Once more: nothing is left to do, and that is no error.
    let again = plan::delete(&world.holdings().await, full.as_str(), false).unwrap();
    assert!(again.is_empty(), "{again:?}");
}

#[tokio::test]
async fn a_deletion_takes_no_wal_but_its_own() {
    let mut world = World::new(MemoryStore::default()).await;
    let first = world.full().await;
    world.gap();
    let second = world.full().await;
    // WAL without a gap leads from here on to the third one's point.
    let third = world.full().await;
    world.gap();
    world.full().await;
    let plan = plan::delete(&world.holdings().await, third.as_str(), false).unwrap();
    assert!(
        plan.points.is_empty() && plan.wal.is_empty(),
        "{second} leads to its point: {plan:?}"
    );
    world.apply(&plan).await;
    let plan = plan::delete(&world.holdings().await, second.as_str(), false).unwrap();
    assert_eq!(
        (plan.points.len(), plan.wal.len()),
        (2, 12),
        "both points, and the WAL to them"
    );
    world.apply(&plan).await;
    world.assert_whole().await;
    assert!(world.names().await.contains(&first));
}

#[tokio::test]
async fn wal_since_the_start_of_what_is_under_way_stays() {
    let mut world = World::new(MemoryStore::default()).await;
    let old = world.full().await;
    world.gap();
    world.advance(DAY);
    world.full().await;
    world.gap();
    world.advance(DAY);
    let running = world.backup(None, End::Killed, 1).await;
    let wal = world.keys("wal/").await.len();
    let plan = world.plan(&rules(Some(1), None)).await;
    assert_eq!(plan.removed[0].id, old);
    assert_eq!(plan.wal.len(), 6, "only what is older than {running}");
    world.apply(&plan).await;
    assert_eq!(world.keys("wal/").await.len(), wal - 6);
}

#[tokio::test]
async fn keys_of_newer_versions_and_histories_stay() {
    let mut world = World::new(MemoryStore::default()).await;
    let first = world.full().await;
    let wal = world.keys("wal/").await;
    let folder = wal
        .iter()
        .find(|key| !key.ends_with("epoch.json"))
        .unwrap()
        .rsplit_once('/')
        .unwrap()
        .0;
    let kept = [
        format!("{folder}/00000002.history.zst"),
        format!("{folder}/{}.512.zst", segment(1)),
        format!("backups/{first}/a-newer-thing"),
        "something/else".to_owned(),
    ];
    for key in &kept {
        put(
            &*world.store,
            &pipeline::store::Key::new(key.clone()).unwrap(),
            10,
        )
        .await;
    }
    let gone = format!("{folder}/{}.zst", segment(1));
    put(
        &*world.store,
        &pipeline::store::Key::new(gone.clone()).unwrap(),
        10,
    )
    .await;
    world.advance(DAY * 100);
    let plan = world.plan(&rules(Some(1), Some(1))).await;
    assert_eq!(names(&plan.wal), [gone.as_str()]);
    world.apply(&plan).await;
    let left = world.keys("").await;
    assert!(kept.iter().all(|key| left.contains(key)), "{left:?}");
}

#[tokio::test]
async fn points_stay_as_long_as_a_backup_leads_to_them_and_so_does_what_follows() {
    let mut world = World::new(MemoryStore::default()).await;
    let first = world.full().await;
    let on_first = world.later_point(&first).await;
    world.ship().await;
    world.ship().await;
    let plan = world.plan(&rules(Some(1), None)).await;
    assert!(
        plan.is_empty(),
        "the next point lies behind all this: {plan:?}"
    );
    world.gap();
    let second = world.full().await;
    let on_second = world.later_point(&second).await;
    let behind = world.later_point(&second).await;
    world.ship().await;
    // It may have come to be since the WAL was listed, so that its own is not in the listing.
    let plan = world.plan(&rules(Some(1), None)).await;
    assert_eq!((plan.removed.len(), plan.points.len()), (1, 1), "{plan:?}");
    world.advance(plan::MARGIN * 2);
    let plan = world.plan(&rules(Some(1), None)).await;
    let gone: Vec<_> = plan.points.iter().map(|it| it.id.clone()).collect();
    assert_eq!(
        gone.len(),
        2,
        "the first backup's own, and {on_first}: {gone:?}"
    );
    assert!(gone.contains(&on_first.to_string()));
    // Three segments of its own, the point's and two more, on two nodes.
    assert_eq!(plan.wal.len(), 12, "{:?}", names(&plan.wal));
    world.apply(&plan).await;
    world.assert_whole().await;
    let left = world.keys("points/").await;
    for point in [&on_second, &behind] {
        assert!(left.contains(keys::point(point).as_str()), "{left:?}");
    }
    assert_eq!(left.len(), 3);
    assert!(world.plan(&rules(Some(1), None)).await.is_empty());
    let reach = catalog::reach::Reach::read(&world.catalog).await.unwrap();
    let bases: Vec<_> = reach
        .survey()
        .map(|it| it.base.map(|base| base.backup_id.clone()))
        .collect();
    assert_eq!(bases, [Ok(second.clone()), Ok(second.clone()), Ok(second)]);
}

#[tokio::test]
async fn the_deletion_of_a_backup_takes_the_points_that_only_it_leads_to() {
    let mut world = World::new(MemoryStore::default()).await;
    let first = world.full().await;
    let early = world.later_point(&first).await;
    // WAL without a gap: what comes after the second backup is reached from both.
    let second = world.full().await;
    let late = world.later_point(&second).await;
    world.advance(plan::MARGIN * 2);
    let plan = plan::delete(&world.holdings().await, first.as_str(), false).unwrap();
    let lost: Vec<_> = plan.points.iter().map(|it| it.id.as_str()).collect();
    assert_eq!(lost.len(), 2, "its own and {early}: {lost:?}");
    assert!(!lost.contains(&late.as_str()));
    assert_eq!(plan.wal.len(), 8);
    world.apply(&plan).await;
    world.assert_whole().await;
    let reach = catalog::reach::Reach::read(&world.catalog).await.unwrap();
    let mut points = reach.survey();
    assert!(points.all(|it| it.base.is_ok_and(|base| base.backup_id == second)));
}

#[derive(Debug, Clone)]
enum Step {
    Point(usize),
    Backup(End, u32, bool),
    Increment(usize, End),
    Gap,
    Pass(u8),
    Delete(usize),
    Lose(usize),
}

fn step() -> impl Strategy<Value = Step> {
    let end = prop_oneof![4 => Just(End::Complete), 1 => Just(End::Failed), 1 => Just(End::Killed)];
    prop_oneof![
        5 => (end.clone(), 1..3_u32, any::<bool>()).prop_map(|(end, attempts, gap)| Step::Backup(end, attempts, gap)),
        2 => (0..8_usize, end).prop_map(|(on, end)| Step::Increment(on, end)),
        1 => Just(Step::Gap),
        3 => (0..8_usize).prop_map(Step::Point),
        3 => (0..40_u8).prop_map(Step::Pass),
        1 => (0..8_usize).prop_map(Step::Delete),
        1 => (0..8_usize).prop_map(Step::Lose),
    ]
}

async fn take(world: &mut World, step: &Step) {
    let names = world.names().await;
    let nth = |place: usize| names.get(place % names.len().max(1)).cloned();
    match step {
        Step::Backup(end, attempts, gap) => {
            if *gap {
                world.gap();
            }
            world.backup(None, *end, *attempts).await;
        }
        Step::Increment(on, end) => {
            if let Some(parent) = nth(*on) {
                world.backup(Some(&parent), *end, 1).await;
            }
        }
        Step::Gap => world.gap(),
        Step::Point(on) => {
            if let Some(base) = nth(*on) {
                world.later_point(&base).await;
            }
        }
        Step::Pass(days) => world.advance(DAY * u32::from(*days)),
        Step::Delete(place) => {
            let holdings = world.holdings().await;
            if let Some(id) = nth(*place)
                && let Ok(plan) = plan::delete(&holdings, id.as_str(), false)
            {
                world.apply(&plan).await;
            }
        }
        // A tombstone and nothing more: whoever deleted was killed right after it.
        Step::Lose(place) => {
            if let Some(id) = nth(*place)
                && let Ok(plan) = plan::delete(&world.holdings().await, id.as_str(), false)
                && let Some(removed) = plan.removed.first()
            {
                put(&*world.store, &keys::tombstone(&removed.id), 5).await;
            }
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, max_shrink_iters: 200, failure_persistence: None, ..ProptestConfig::default() })]

    /// Whatever the catalog: what is kept has all it needs, the last good one is kept, and what was done
    /// once is done.
    #[test]
    fn kept_backups_lose_nothing_and_a_second_plan_is_empty(
        steps in proptest::collection::vec(step(), 1..14),
        keep_full in proptest::option::of(1..4_u32),
        keep_days in proptest::option::of(1..60_u32),
        grace in 0..3_u64,
    ) {
        run(async {
            let mut world = World::new(MemoryStore::default()).await;
            for step in &steps {
                take(&mut world, step).await;
                world.assert_whole().await;
            }
            let before = world.names().await;
            let newest = world.listed().await.into_iter().max_by_key(|it| it.completed);
            let newest = newest.map(|manifest| manifest.backup_id);
            let rules = Rules { keep_full, keep_days, grace: DAY * u32::try_from(grace).unwrap() };
            let plan = world.plan(&rules).await;
            let held_back = plan.notes.len();
            world.apply(&plan).await;
            world.assert_whole().await;
            let after = world.names().await;
            prop_assert!(newest.iter().all(|newest| after.contains(newest)), "{newest:?} went: {plan:?}");
            let expected: Vec<_> = plan.kept.iter().map(|kept| kept.id.clone()).collect();
            prop_assert_eq!(&after, &expected);
            let full = |id: &&catalog::ids::BackupId| id.as_str().contains("-F-");
            if let (Some(count), None) = (keep_full, keep_days) {
                let there = before.iter().filter(full).count();
                prop_assert!(after.iter().filter(full).count() >= there.min(count as usize));
            }
            if keep_full.is_none() && keep_days.is_none() {
                prop_assert_eq!(&before, &after);
            }
            let again = world.plan(&rules).await;
            prop_assert!(again.is_empty(), "{again:?}");
            prop_assert!(again.notes.len() <= held_back);
            // In the end, with all graces over, nothing is left but what is listed.
            world.advance(DAY * 70);
            let last = world.plan(&rules).await;
            world.apply(&last).await;
            world.assert_whole().await;
            prop_assert_eq!(world.memory.uploads_under_way(), 0);
            if world.names().await.is_empty() {
                let wal = world.keys("wal/").await;
                prop_assert!(wal.iter().all(|key| key.ends_with("epoch.json")), "{wal:?}");
                prop_assert!(world.keys("points/").await.is_empty());
            }
            Ok(())
        })?;
    }
}

#[tokio::test]
async fn what_follows_a_base_without_a_gap_stays_for_points_to_come() {
    let mut world = World::new(MemoryStore::default()).await;
    world.full().await;
    for _ in 0..4 {
        world.ship().await;
    }
    let from = world.next_segment;
    world.gap();
    let to = world.next_segment;
    for (node, epoch) in world.nodes.clone() {
        let gap = Gap {
            node_id: node,
            epoch,
            timeline: 1,
            from: format!("0/{:X}", from << 24),
            to: format!("0/{:X}", to << 24),
            reason: "too much was held".to_owned(),
            at: world.now().await,
            nonce: Uuid::new_v4(),
            extra: Extra::new(),
        };
        world
            .catalog
            .declare_gap(&gap, Uuid::now_v7())
            .await
            .unwrap();
    }
    // No base begins there: no point behind the gap can be reached by it.
    let lost = world.ship().await;
    world.advance(DAY);
    let plan = world.plan(&rules(None, None)).await;
    let gone = names(&plan.wal);
    assert_eq!(gone.len(), 2, "{gone:?}");
    assert!(
        gone.iter().all(|key| key.contains(&segment(lost))),
        "{gone:?}"
    );
    world.apply(&plan).await;

    // Another base, behind it: with the first one all before the gap goes. The gap itself goes with the log file it lies in.
    world.gap();
    world.full().await;
    world.ship().await;
    world.advance(DAY);
    let plan = world.plan(&rules(Some(1), None)).await;
    assert_eq!(plan.wal.len(), 2 * (3 + 4), "{:?}", names(&plan.wal));
    world.apply(&plan).await;
    world.assert_whole().await;
    assert_eq!(
        world
            .catalog
            .gaps(world.nodes[0].0, &world.nodes[0].1)
            .await
            .unwrap()
            .len(),
        1
    );
}
