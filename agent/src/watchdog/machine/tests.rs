//! The machine against a model of a cluster, in a time of its own.
//!
//! The model's proxies follow the cluster's state late, freeze, die, are cut off from it; the cluster's mutex may be held by somebody, so that
//! UNLOCK says success and does nothing; LOCK lands when the test says.

mod world;

use proptest::prelude::*;

use super::*;
use world::{D, Event, Health, World, open_after};

#[test]
fn one_that_is_disarmed_in_time_unlocks_nothing() {
    let mut world = World::new(2);
    world.arm(1);
    world.plan(1100, Event::Lands);
    world.plan(1200, Event::OthersUnlock);
    world.plan(2999, Event::Tells(LockOutcome::Released));
    world.run(120_000);
    assert_eq!(world.state(), WatchdogState::Ready);
    assert!(world.unlocks_sent.is_empty());
    // The same deadline again finds nothing to fire for.
    world.arm(2);
}

#[test]
fn one_that_is_renewed_fires_a_deadline_after_the_last_time() {
    let mut world = World::new(1);
    let (base, deadline) = (world.base, Duration::from_millis(D));
    world.arm(1);
    for step in 1..10 {
        let now = base + deadline / 2 * step;
        world.machine.renew(now, 1, deadline).unwrap();
        // A request that was on its way for long does not shorten it.
        world.machine.arm(now, 1, deadline / 4).unwrap();
    }
    let last = base + deadline / 2 * 9;
    let just_before = world
        .machine
        .state(last + deadline.saturating_sub(Duration::from_millis(1)));
    assert_eq!(
        just_before,
        WatchdogState::Armed {
            attempt: 1,
            left_ms: 1
        }
    );
    // Once it has fired nobody holds it back.
    assert!(world.machine.renew(last + deadline, 1, deadline).is_err());
    let fired = world.machine.state(last + deadline);
    assert!(matches!(fired, WatchdogState::Fired { attempt: 1, .. }));
    // An attempt that is over is not renewed either.
    let mut world = World::new(1);
    world.arm(1);
    let now = world.base;
    world.machine.disarm(now, 1, LockOutcome::Released).unwrap();
    assert!(world.machine.renew(now, 1, deadline).is_err());
}

#[test]
fn one_that_is_not_disarmed_fires_at_its_deadline() {
    let mut world = World::new(2);
    world.arm(1);
    world.plan(1010, Event::Lands);
    world.run(2999);
    assert!(matches!(
        world.state(),
        WatchdogState::Armed {
            attempt: 1,
            left_ms: 1
        }
    ));
    assert!(world.unlocks_sent.is_empty() && world.locked);
    world.run(3000 + 100);
    assert!(!world.locked);
    assert!(!world.changes.last().unwrap().1);
    world.run(3000 + 59_000);
    assert!(matches!(
        world.state(),
        WatchdogState::Fired { attempt: 1, .. }
    ));
    world.run(3000 + 61_000);
    assert!(open_after(&world.state()).unwrap() < 100);
    world.arm(2);
}

#[test]
fn a_disarm_after_the_deadline_comes_too_late_even_if_nobody_has_looked_at_the_clock() {
    let mut world = World::new(1);
    world.arm(1);
    let late = world.at(world.now + D);
    world
        .machine
        .disarm(late, 1, LockOutcome::Released)
        .unwrap();
    assert!(matches!(
        world.machine.state(late),
        WatchdogState::Fired { attempt: 1, .. }
    ));
}

#[test]
fn a_lock_that_lands_late_is_taken_off_again() {
    for lands in [3001, 3500, 10_000, 40_000, 62_000] {
        let mut world = World::new(2);
        world.arm(1);
        world.plan(lands, Event::Lands);
        world.run(lands + 500);
        assert!(!world.locked, "{lands}");
        assert!(!world.unlocks_sent.is_empty());
        world.run(130_000);
        assert!(!world.locked);
        open_after(&world.state()).unwrap();
    }
}

#[test]
fn an_unlock_that_does_nothing_is_repeated() {
    let mut world = World::new(2);
    world.arm(1);
    world.plan(1010, Event::Lands);
    world.mutex_until = 8000;
    world.run(7999);
    assert!(world.locked);
    world.run(8000 + 1500);
    assert!(!world.locked);
    assert!(world.unlocks_sent.len() > 3);
}

#[test]
fn dead_and_frozen_proxies_keep_nobody_waiting() {
    for bad in [Health::Dead, Health::Frozen, Health::CutOff] {
        for when in [500, 1500, 2999, 3003] {
            let mut world = World::new(3);
            world.arm(1);
            world.plan(1010, Event::Lands);
            world.plan(1000 + when, Event::Becomes(0, bad));
            world.plan(1000 + when, Event::Becomes(2, bad));
            world.run(3000 + 100);
            assert!(!world.locked, "{bad:?} at {when}");
            let WatchdogState::Fired { .. } = world.state() else {
                panic!("{:?}", world.state());
            };
        }
    }
}

#[test]
fn a_proxy_that_comes_back_is_unlocked_through() {
    for bad in [Health::Dead, Health::Frozen] {
        let mut world = World::new(1);
        world.arm(1);
        world.plan(1010, Event::Lands);
        world.plan(1020, Event::Becomes(0, bad));
        world.run(200_000);
        assert!(world.locked && matches!(world.state(), WatchdogState::Fired { .. }));
        world.plan(200_000, Event::Becomes(0, Health::Up));
        world.run(205_000);
        assert!(!world.locked, "{bad:?}");
    }
}

#[test]
fn a_stopped_agent_unlocks_first() {
    let mut world = World::new(2);
    world.arm(1);
    world.plan(1010, Event::Lands);
    world.plan(1100, Event::Stops);
    world.run(1200);
    assert!(!world.locked);
    assert!(!world.machine.is_quiet());
    world.run(1100 + 6000);
    assert!(world.machine.is_quiet());
    let now = world.at(world.now);
    assert!(world.machine.arm(now, 2, Duration::from_secs(1)).is_err());
}

#[test]
fn another_watchdogs_unlock_is_as_good() {
    let mut world = World::new(2);
    world.arm(1);
    world.plan(1010, Event::Lands);
    world.plan(3001, Event::OthersUnlock);
    world.plan(3002, Event::Tells(LockOutcome::Released));
    world.run(3002 + 10_300);
    assert!(!world.locked);
    assert!(open_after(&world.state()).unwrap() < 100);
}

#[test]
fn the_outcome_shortens_the_watch() {
    let mut world = World::new(2);
    world.arm(1);
    world.plan(5000, Event::Tells(LockOutcome::Released));
    world.run(14_900);
    assert!(matches!(world.state(), WatchdogState::Fired { .. }));
    world.run(15_300);
    open_after(&world.state()).unwrap();
}

#[test]
fn a_lock_that_is_not_ours_stays() {
    for lock in [LockOutcome::NotSent, LockOutcome::Refused] {
        let mut world = World::new(2);
        world.arm(1);
        world.plan(3500, Event::Tells(lock));
        world.plan(4000, Event::Lands);
        world.run(200_000);
        assert!(world.locked, "{lock:?}");
        assert_eq!(open_after(&world.state()), None);
    }
}

#[test]
fn an_unknown_outcome_fires_at_once() {
    let mut world = World::new(2);
    world.arm(1);
    world.plan(1010, Event::Lands);
    world.plan(1100, Event::Tells(LockOutcome::Unknown));
    world.run(1200);
    assert!(!world.locked);
    assert!(matches!(
        world.state(),
        WatchdogState::Fired { attempt: 1, .. }
    ));
}

#[test]
fn attempts_come_in_turn_and_once() {
    let mut world = World::new(1);
    let second = Duration::from_secs(1);
    let now = world.at(world.now);
    world.arm(3);
    // The same again: the clock is not set anew.
    let later = now + second;
    world.machine.arm(later, 3, 9 * second).unwrap();
    assert!(matches!(
        world.machine.state(later),
        WatchdogState::Armed {
            attempt: 3,
            left_ms: 1000
        }
    ));
    assert!(matches!(
        world.machine.arm(later, 4, second),
        Err(Refused::Conflict(_))
    ));
    assert!(
        world
            .machine
            .disarm(later, 4, LockOutcome::NotSent)
            .is_err()
    );
    world
        .machine
        .disarm(later, 2, LockOutcome::NotSent)
        .unwrap();
    assert!(!world.machine.is_quiet());
    world
        .machine
        .disarm(later, 3, LockOutcome::NotSent)
        .unwrap();
    world
        .machine
        .disarm(later, 3, LockOutcome::NotSent)
        .unwrap();
    assert!(world.machine.is_quiet());
    assert!(world.machine.arm(later, 3, second).is_err());
    // Disarmed before its arming came: that comes too late.
    world
        .machine
        .disarm(later, 5, LockOutcome::NotSent)
        .unwrap();
    assert!(world.machine.arm(later, 5, second).is_err());
    world.machine.arm(later, 6, second).unwrap();
}

#[test]
fn one_without_any_session_is_not_armed() {
    let mut world = World::new(2);
    world.plan(2000, Event::Becomes(0, Health::Dead));
    world.plan(2000, Event::Becomes(1, Health::Dead));
    world.run(10_000);
    let now = world.at(world.now);
    let refused = world
        .machine
        .arm(now, 1, Duration::from_secs(1))
        .unwrap_err();
    let Refused::Nobody(why) = refused else {
        panic!("{refused:?}");
    };
    assert_eq!(why, "proxy p0:3307: nothing; proxy p1:3307: nothing");
}

#[test]
fn it_gives_up_after_an_hour_and_says_so() {
    let mut world = World::new(1);
    world.arm(1);
    world.plan(1010, Event::Lands);
    world.plan(1020, Event::Becomes(0, Health::Dead));
    world.run(3_700_000);
    let WatchdogState::Settled {
        open_after_ms: None,
        last_error: Some(error),
        ..
    } = world.state()
    else {
        panic!("{:?}", world.state());
    };
    assert!(
        error.contains("may be locked") && error.contains("p0:3307"),
        "{error}"
    );
}

#[derive(Debug, Clone)]
struct Scene {
    lands: Option<u64>,
    told: Option<u64>,
    mutex: (u64, u64),
    faults: Vec<(usize, Health, u64, u64)>,
    latency: u64,
    stops: Option<u64>,
}

fn scene() -> impl Strategy<Value = Scene> {
    let health = prop::sample::select(vec![Health::Dead, Health::Frozen, Health::CutOff]);
    let fault = (1_usize..3, health, 1000_u64..30_000, 10_u64..20_000);
    (
        prop::option::weighted(0.9, 1001_u64..20_000),
        prop::option::of(1001_u64..40_000),
        (0_u64..20_000, 0_u64..6000),
        prop::collection::vec(fault, 0..4),
        2_u64..200,
        prop::option::weighted(0.2, 1001_u64..30_000),
    )
        .prop_map(|(lands, told, mutex, faults, latency, stops)| Scene {
            lands,
            told,
            mutex,
            faults,
            latency,
            stops,
        })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]

    /// One proxy is well; whatever happens to the others: no lock of this attempt outlives the watchdog, and none that it may take off
    /// is held for long.
    #[test]
    fn no_lock_is_left(scene in scene()) {
        let mut world = World::new(3);
        world.latency = scene.latency;
        world.arm(1);
        if let Some(at) = scene.lands {
            world.plan(at, Event::Lands);
        }
        // A client that knows the outcome has seen the cluster open again.
        let released = scene.told.filter(|told| scene.lands.is_some_and(|lands| lands + 1000 < *told));
        if let Some(at) = scene.told {
            let lock = if released.is_some() { LockOutcome::Released } else { LockOutcome::Unknown };
            if released.is_some() && at < 1000 + D {
                world.plan(at - 500, Event::OthersUnlock);
            }
            world.plan(at, Event::Tells(lock));
        }
        for (proxy, health, from, length) in scene.faults {
            world.plan(from, Event::Becomes(proxy, health));
            world.plan(from + length, Event::Becomes(proxy, Health::Up));
        }
        if let Some(at) = scene.stops {
            world.plan(at, Event::Stops);
        }
        let mutex_end = scene.mutex.0 + scene.mutex.1;
        // Set when it begins: before it, UNLOCK works.
        world.run(scene.mutex.0);
        world.mutex_until = mutex_end;
        let stopped_before = |at| scene.stops.is_some_and(|stops| stops <= at);
        let disarmed = released.is_some_and(|at| at < 1000 + D && !stopped_before(at));
        world.run(1000 + D);
        let fires = !matches!(world.state(), WatchdogState::Ready);
        prop_assert_eq!(fires, !disarmed, "{:?}", world.state());
        world.run(150_000);
        prop_assert!(world.machine.is_quiet(), "{:?}", world.machine);
        if disarmed {
            prop_assert!(world.unlocks_sent.is_empty());
            return Ok(());
        }
        // A stopped agent cannot wait for a LOCK that lands later than it lives.
        if scene.stops.is_none() {
            prop_assert!(!world.locked);
        }
        let mut since = None;
        for (at, locked) in &world.changes {
            match (locked, since) {
                (true, _) => since = Some(*at),
                (false, Some(begun)) => {
                    let due = begun.max(1000 + D).max(mutex_end);
                    prop_assert!(*at <= due + 2500, "locked at {begun}, open at {at}: {:?}", world.changes);
                    since = None;
                }
                (false, None) => {}
            }
        }
    }
}
