//! Watchdogs by the real clock, with doors of the test's own.

use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};

use agent_api::{LockOutcome, ProxyAddress, Secret, WatchdogState, WatchdogTls};
use agent_sql::SqlError;
use agent_sql::proxy::{Gate, UnlockReply};
use futures_util::future::BoxFuture;

use super::*;

/// Longest wait of these tests for anything.
const PATIENCE: Duration = Duration::from_secs(10);

/// A cluster of the test's.
#[derive(Debug, Default)]
struct Cluster {
    locked: AtomicBool,
    /// The proxy of port 2 never answers.
    second_hangs: AtomicBool,
    /// The proxy of port 3 has a bug that makes its caller panic.
    third_panics: AtomicBool,
    unlocks: AtomicU32,
}

struct TestDoor {
    cluster: Arc<Cluster>,
    port: u16,
}

impl TestDoor {
    async fn knock(&self) {
        let set = |it: &AtomicBool| it.load(Ordering::SeqCst);
        assert!(
            self.port != 3 || !set(&self.cluster.third_panics),
            "as told"
        );
        if self.port == 2 && set(&self.cluster.second_hangs) {
            std::future::pending::<()>().await;
        }
    }
}

impl Door for TestDoor {
    fn probe(&self, _: Duration) -> BoxFuture<'_, Result<Gate, SqlError>> {
        Box::pin(async {
            self.knock().await;
            Ok(if self.cluster.locked.load(Ordering::SeqCst) {
                Gate::Locked("READ_ONLY".to_owned())
            } else {
                Gate::Open
            })
        })
    }

    fn unlock(&self, _: Duration, _: Duration) -> BoxFuture<'_, Result<UnlockReply, SqlError>> {
        Box::pin(async {
            self.knock().await;
            self.cluster.unlocks.fetch_add(1, Ordering::SeqCst);
            Ok(if self.cluster.locked.swap(false, Ordering::SeqCst) {
                UnlockReply::Said
            } else {
                UnlockReply::NotLocked
            })
        })
    }

    fn is_connected(&self) -> bool {
        true
    }

    fn close(&self) {}
}

fn table() -> (Watchdogs, Arc<Cluster>) {
    let cluster = Arc::new(Cluster::default());
    let shared = Arc::clone(&cluster);
    let watchdogs = Watchdogs::with_doors(move |request| {
        let door = |proxy: &ProxyAddress| {
            Arc::new(TestDoor {
                cluster: Arc::clone(&shared),
                port: proxy.port,
            }) as Arc<dyn Door>
        };
        request.proxies.iter().map(door).collect()
    });
    (watchdogs, cluster)
}

fn request(ports: &[u16]) -> StartWatchdog {
    let proxy = |port: &u16| ProxyAddress {
        host: "127.0.0.1".to_owned(),
        port: *port,
    };
    StartWatchdog {
        id: Uuid::now_v7(),
        proxies: ports.iter().map(proxy).collect(),
        user: "root".to_owned(),
        password: Some(Secret("hidden".to_owned())),
        database: "postgres".to_owned(),
        tls: WatchdogTls::Off,
    }
}

fn arm(attempt: u32, deadline_ms: u64) -> ArmWatchdog {
    ArmWatchdog {
        attempt,
        deadline_ms,
        renew: false,
        alone: false,
    }
}

async fn until(what: &str, mut holds: impl FnMut() -> bool) {
    let begun = Instant::now();
    while !holds() {
        assert!(begun.elapsed() < PATIENCE, "{what} has not come");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

#[tokio::test]
async fn one_that_wants_to_be_alone_waits_for_others_that_would_unlock() {
    let (watchdogs, _cluster) = table();
    let (first, second) = (request(&[1]), request(&[1]));
    watchdogs.start(first.clone()).await.unwrap();
    watchdogs.start(second.clone()).await.unwrap();
    let alone = ArmWatchdog {
        alone: true,
        ..arm(1, 60_000)
    };
    watchdogs.arm(first.id, arm(1, 60_000)).unwrap();
    let refused = watchdogs.arm(second.id, alone).unwrap_err();
    assert_eq!(refused.kind, ErrorKind::Conflict, "{refused}");
    let released = DisarmWatchdog {
        attempt: 1,
        lock: LockOutcome::Released,
    };
    watchdogs.disarm(first.id, released).unwrap();
    watchdogs.arm(second.id, alone).unwrap();
    // It is not in its own way.
    watchdogs.arm(second.id, alone).unwrap();
    watchdogs.disarm(second.id, released).unwrap();
}

#[tokio::test]
async fn a_silent_client_is_unlocked_for_and_a_hanging_proxy_is_not_waited_for() {
    let (watchdogs, cluster) = table();
    let request = request(&[1, 2, 3]);
    let status = watchdogs.start(request.clone()).await.unwrap();
    assert_eq!(status.state, WatchdogState::Ready);
    assert!(status.proxies.iter().all(|proxy| proxy.connected));
    cluster.second_hangs.store(true, Ordering::SeqCst);
    cluster.third_panics.store(true, Ordering::SeqCst);
    let begun = Instant::now();
    let armed = watchdogs.arm(request.id, arm(1, 300)).unwrap();
    let WatchdogState::Armed {
        attempt: 1,
        left_ms,
    } = armed.state
    else {
        panic!("{armed:?}");
    };
    assert!((1..=300).contains(&left_ms));
    cluster.locked.store(true, Ordering::SeqCst);
    let locked = || cluster.locked.load(Ordering::SeqCst);
    until("the unlocking", || !locked()).await;
    assert!(begun.elapsed() >= Duration::from_millis(300));
    // LOCK lands late.
    cluster.locked.store(true, Ordering::SeqCst);
    until("the second unlocking", || !locked()).await;
    let told = DisarmWatchdog {
        attempt: 1,
        lock: LockOutcome::Released,
    };
    let status = watchdogs.disarm(request.id, told).unwrap();
    let WatchdogState::Fired {
        attempt: 1,
        unlocks,
        last_error,
        ..
    } = status.state
    else {
        panic!("{status:?}");
    };
    assert!(unlocks >= 2);
    let last_error = last_error.unwrap();
    assert!(
        last_error.contains("127.0.0.1:3") && last_error.contains("as told"),
        "{last_error}"
    );
    for error in [
        watchdogs.arm(request.id, arm(2, 300)).unwrap_err(),
        watchdogs.end(request.id).unwrap_err(),
    ] {
        assert_eq!(error.kind, ErrorKind::Conflict);
    }
}

#[tokio::test]
async fn one_that_is_disarmed_unlocks_nothing() {
    let (watchdogs, cluster) = table();
    let request = request(&[1]);
    watchdogs.start(request.clone()).await.unwrap();
    watchdogs.arm(request.id, arm(1, 200)).unwrap();
    cluster.locked.store(true, Ordering::SeqCst);
    let told = DisarmWatchdog {
        attempt: 1,
        lock: LockOutcome::Released,
    };
    let status = watchdogs.disarm(request.id, told).unwrap();
    assert_eq!(status.state, WatchdogState::Ready);
    tokio::time::sleep(Duration::from_millis(400)).await;
    assert_eq!(cluster.unlocks.load(Ordering::SeqCst), 0);
    assert_eq!(
        watchdogs.end(request.id).unwrap().state,
        WatchdogState::Ready
    );
    let error = watchdogs.status(request.id).unwrap_err();
    assert_eq!(error.kind, ErrorKind::NotFound);
}

#[tokio::test]
async fn an_agent_that_is_stopped_unlocks_first() {
    let (watchdogs, cluster) = table();
    let request = request(&[1]);
    watchdogs.start(request.clone()).await.unwrap();
    watchdogs.arm(request.id, arm(1, 60_000)).unwrap();
    cluster.locked.store(true, Ordering::SeqCst);
    let begun = Instant::now();
    assert!(watchdogs.shut_down(PATIENCE).await);
    assert!(!cluster.locked.load(Ordering::SeqCst));
    // It looked for a while whether it stayed so.
    assert!(begun.elapsed() >= Duration::from_secs(5));
    let error = watchdogs.start(self::request(&[1])).await.unwrap_err();
    assert_eq!(error.kind, ErrorKind::Conflict);
}

#[tokio::test]
async fn an_agent_with_nothing_armed_stops_at_once() {
    let (watchdogs, _) = table();
    watchdogs.start(request(&[1, 2])).await.unwrap();
    let begun = Instant::now();
    assert!(watchdogs.shut_down(PATIENCE).await);
    // Not after the look at whether it stays open.
    assert!(begun.elapsed() < Duration::from_secs(4));
}

#[tokio::test]
async fn requests_that_make_no_sense_are_refused_and_there_are_few() {
    let (watchdogs, _) = table();
    let first = request(&[1]);
    watchdogs.start(first.clone()).await.unwrap();
    // The same again is the same.
    watchdogs.start(first.clone()).await.unwrap();
    let other = StartWatchdog {
        user: "somebody".to_owned(),
        ..first.clone()
    };
    let error = watchdogs.start(other).await.unwrap_err();
    assert_eq!(error.kind, ErrorKind::Conflict);
    assert!(!error.message.contains("hidden"));

    for ports in [&[][..], &[0], &[1, 1]] {
        let error = watchdogs.start(request(ports)).await.unwrap_err();
        assert_eq!(error.kind, ErrorKind::Usage, "{ports:?}");
    }
    for deadline in [0, 600_001, u64::MAX] {
        let error = watchdogs.arm(first.id, arm(1, deadline)).unwrap_err();
        assert_eq!(error.kind, ErrorKind::Usage, "{deadline}");
    }
    for _ in 1..MOST_WATCHDOGS {
        watchdogs.start(request(&[1])).await.unwrap();
    }
    let error = watchdogs.start(request(&[1])).await.unwrap_err();
    assert_eq!(error.kind, ErrorKind::Conflict);
    watchdogs.end(first.id).unwrap();
    watchdogs.start(request(&[1])).await.unwrap();
}
