//! Watchdogs of the real program, before proxies that are stood in for.

use std::time::{Duration, Instant};

use agent_api::{
    ArmWatchdog, ErrorKind, LockOutcome, ProxyAddress, Secret, StartWatchdog, WatchdogState,
    WatchdogTls,
};
use agent_sql::Password;
use agent_sql::proxy::{Effect, ProxyConnection, ProxyOptions, effect};
use support::proxy::{ClusterState, Frontend, ProxyFarm, ProxyFarmOptions, ProxyUser};
use tokio_util::sync::CancellationToken;

use super::*;

const PASSWORD: &str = "n0t-t0-be-seen";
const SECOND: Duration = Duration::from_secs(1);
/// What is promised: writes pass again within so long.
const PROMISED: Duration = Duration::from_secs(5);

fn farm(frontend: Frontend) -> ProxyFarm {
    ProxyFarm::start(ProxyFarmOptions {
        frontend,
        proxies: 3,
        users: vec![ProxyUser {
            name: "root".to_owned(),
            password: PASSWORD.to_owned(),
        }],
        ..ProxyFarmOptions::default()
    })
}

fn watchdog(farm: &ProxyFarm) -> StartWatchdog {
    let proxy = |index| ProxyAddress {
        host: "127.0.0.1".to_owned(),
        port: farm.port(index),
    };
    StartWatchdog {
        id: Uuid::now_v7(),
        proxies: (0..farm.proxies()).map(proxy).collect(),
        user: "root".to_owned(),
        password: Some(Secret(PASSWORD.to_owned())),
        database: "postgres".to_owned(),
        tls: WatchdogTls::Off,
    }
}

async fn session(farm: &ProxyFarm, proxy: usize) -> ProxyConnection {
    let options = ProxyOptions {
        port: farm.port(proxy),
        password: Some(Password::new(PASSWORD)),
        ..ProxyOptions::default()
    };
    ProxyConnection::connect(&options, CancellationToken::new())
        .await
        .unwrap()
}

/// On any machine.
async fn lock(farm: &ProxyFarm, proxy: usize) {
    let session = session(farm, proxy).await;
    session.lock(SECOND, 15 * SECOND).await.unwrap();
}

async fn until(what: &str, within: Duration, mut holds: impl FnMut() -> bool) {
    let begun = Instant::now();
    while !holds() {
        assert!(begun.elapsed() < within, "{what} has not come");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

#[tokio::test]
async fn a_client_that_goes_away_leaves_no_lock() {
    for frontend in [Frontend::PostgresMd5, Frontend::OpenGaussSha256] {
        let farm = farm(frontend);
        let agent = insecure();
        let client = client(&agent, &Transport::InsecureHttp);
        let request = watchdog(&farm);
        let status = client.watchdog_start(&request).await.unwrap();
        assert_eq!(status.state, WatchdogState::Ready);
        assert!(status.proxies.iter().all(|it| it.connected), "{status:?}");
        let armed = client
            .watchdog_arm(request.id, &ArmWatchdog::of(1, 5 * SECOND))
            .await
            .unwrap();
        assert!(matches!(
            armed.state,
            WatchdogState::Armed { attempt: 1, .. }
        ));
        let listed = client.watchdogs().await.unwrap();
        assert_eq!(listed.len(), 1);
        assert_eq!(
            (listed[0].id, listed[0].last_attempt),
            (request.id, Some(1))
        );
        assert!(!listed[0].state.is_quiet(), "{listed:?}");
        let begun = Instant::now();
        lock(&farm, 0).await;
        assert_eq!(farm.state(), ClusterState::ReadOnly);
        // The one that locked freezes, another one dies, and UNLOCK does nothing at first.
        farm.freeze(0);
        farm.kill(1);
        farm.ignore_unlocks(2);
        let open = || farm.state() == ClusterState::Ok;
        until("the unlocking", 5 * SECOND + PROMISED, open).await;
        assert!(begun.elapsed() >= SECOND);
        let status = client.watchdog(request.id).await.unwrap();
        let WatchdogState::Fired {
            attempt: 1,
            unlocks,
            last_error,
            ..
        } = status.state
        else {
            panic!("{status:?}");
        };
        assert!(unlocks >= 3);
        let last_error = last_error.unwrap();
        assert!(last_error.contains("127.0.0.1"), "{last_error}");
        let error = client.watchdog_end(request.id).await.unwrap_err();
        assert_eq!(error.kind, ErrorKind::Conflict);
        agent.wait_for_log("UNLOCK CLUSTER").await;
        assert!(!agent.log().contains(PASSWORD));
    }
}

#[tokio::test]
async fn a_lock_that_lands_after_it_fired_is_taken_off() {
    let farm = farm(Frontend::PostgresMd5);
    let agent = insecure();
    let client = client(&agent, &Transport::InsecureHttp);
    let request = watchdog(&farm);
    client.watchdog_start(&request).await.unwrap();
    client
        .watchdog_arm(request.id, &ArmWatchdog::of(1, Duration::from_millis(500)))
        .await
        .unwrap();
    farm.delay_next_lock(2 * SECOND);
    let late = session(&farm, 1).await;
    let error = late.lock(SECOND / 2, SECOND / 2).await.unwrap_err();
    assert_eq!(effect(&error), Effect::Unknown, "{error}");
    let status = client
        .watchdog_disarm(request.id, 1, LockOutcome::Unknown)
        .await
        .unwrap();
    assert!(!status.state.is_quiet(), "{status:?}");
    until("the late lock", PROMISED, || farm.locks() > 0).await;
    let open = || farm.state() == ClusterState::Ok;
    until("the unlocking", PROMISED, open).await;
}

#[tokio::test]
async fn an_agent_that_is_stopped_unlocks_first() {
    let farm = farm(Frontend::PostgresMd5);
    let mut agent = insecure();
    let client = client(&agent, &Transport::InsecureHttp);
    let request = watchdog(&farm);
    client.watchdog_start(&request).await.unwrap();
    client
        .watchdog_arm(request.id, &ArmWatchdog::of(1, 600 * SECOND))
        .await
        .unwrap();
    lock(&farm, 2).await;
    assert_eq!(farm.state(), ClusterState::ReadOnly);
    assert_eq!(agent.stop().await, Some(0));
    assert_eq!(farm.state(), ClusterState::Ok);
}

#[tokio::test]
async fn who_is_disarmed_unlocks_nothing_and_can_be_ended() {
    let farm = farm(Frontend::PostgresCleartext);
    let agent = insecure();
    let client = client(&agent, &Transport::InsecureHttp);
    let request = watchdog(&farm);
    client.watchdog_start(&request).await.unwrap();
    // The same again is the same.
    client.watchdog_start(&request).await.unwrap();
    client
        .watchdog_arm(request.id, &ArmWatchdog::of(1, 3 * SECOND))
        .await
        .unwrap();
    lock(&farm, 0).await;
    let status = client
        .watchdog_disarm(request.id, 1, LockOutcome::Released)
        .await
        .unwrap();
    assert_eq!(status.state, WatchdogState::Ready);
    tokio::time::sleep(4 * SECOND).await;
    assert_eq!(farm.state(), ClusterState::ReadOnly);
    client.watchdog_end(request.id).await.unwrap();
    let error = client.watchdog(request.id).await.unwrap_err();
    assert_eq!(error.kind, ErrorKind::NotFound);
}

#[tokio::test]
async fn proxies_that_cannot_be_used_are_named() {
    let farm = farm(Frontend::OpenGaussSha256);
    let agent = insecure();
    let client = client(&agent, &Transport::InsecureHttp);
    farm.kill(1);
    let request = watchdog(&farm);
    let status = client.watchdog_start(&request).await.unwrap();
    let seen: Vec<_> = status.proxies.iter().map(|it| it.connected).collect();
    assert_eq!(seen, [true, false, true]);
    let dead = status.proxies[1].error.clone().unwrap();
    assert!(dead.contains("refused"), "{dead}");
    // One is enough.
    client
        .watchdog_arm(request.id, &ArmWatchdog::of(1, SECOND))
        .await
        .unwrap();
    client
        .watchdog_disarm(request.id, 1, LockOutcome::NotSent)
        .await
        .unwrap();

    let wrong = StartWatchdog {
        id: Uuid::now_v7(),
        password: Some(Secret("wrong".to_owned())),
        ..request
    };
    let status = client.watchdog_start(&wrong).await.unwrap();
    let error = status.proxies[0].error.clone().unwrap();
    assert!(error.contains("password"), "{error}");
    let error = client
        .watchdog_arm(wrong.id, &ArmWatchdog::of(1, SECOND))
        .await
        .unwrap_err();
    assert_eq!(error.kind, ErrorKind::Database, "{error}");
}
