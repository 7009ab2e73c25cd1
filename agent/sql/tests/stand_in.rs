//! The client of a ShardingSphere-Proxy against the tests' stand-in for one: its front ends, its releases, its faults.

#![allow(
    clippy::unwrap_used,
    reason = "a panic is a failed test, with its reason"
)]

use std::time::{Duration, Instant};

use agent_sql::proxy::{
    self, Effect, Gate, LockReply, ProxyConnection, ProxyOptions, ProxyTls, UnlockReply, effect,
};
use agent_sql::{Password, SqlError};
use support::proxy::{
    Clock, ClusterState, DataNode, Delays, Frontend, ProxyFarm, ProxyFarmOptions, Version,
};
use tokio_util::sync::CancellationToken;

/// For what is answered at once, on any machine.
const PATIENT: Duration = Duration::from_secs(15);
/// For what is not answered.
const SOON: Duration = Duration::from_millis(300);

fn options(port: u16) -> ProxyOptions {
    ProxyOptions {
        port,
        password: Some(Password::new("root")),
        ..ProxyOptions::default()
    }
}

async fn log_in(farm: &ProxyFarm, proxy: usize) -> ProxyConnection {
    ProxyConnection::connect(&options(farm.port(proxy)), CancellationToken::new())
        .await
        .unwrap()
}

/// Nodes that nobody speaks to here.
fn nodes() -> Vec<DataNode> {
    let node = |port| DataNode {
        host: "127.0.0.1".to_owned(),
        port,
        user: "ss".to_owned(),
        password: "hidden".to_owned(),
        database: format!("bank_{port}"),
    };
    vec![node(1), node(2)]
}

async fn until(connection: &ProxyConnection, open: bool) {
    let begun = Instant::now();
    loop {
        let gate = connection.probe(PATIENT).await.unwrap();
        if matches!(gate, Gate::Open) == open {
            return;
        }
        assert!(begun.elapsed() < 2 * PATIENT, "still {gate:?}");
    }
}

#[tokio::test]
async fn a_lock_is_taken_seen_and_taken_off_by_every_front_end_and_release() {
    for frontend in [
        Frontend::PostgresMd5,
        Frontend::PostgresCleartext,
        Frontend::OpenGaussSha256,
    ] {
        for version in [Version::V5_5_1, Version::V5_5_2, Version::V5_5_3] {
            let farm = ProxyFarm::start(ProxyFarmOptions {
                frontend,
                version,
                delays: Delays::Measured,
                ..ProxyFarmOptions::default()
            });
            let (first, second) = (log_in(&farm, 0).await, log_in(&farm, 1).await);
            assert_eq!(first.probe(PATIENT).await.unwrap(), Gate::Open);
            let reply = first.unlock(PATIENT, PATIENT).await.unwrap();
            assert_eq!(reply, UnlockReply::NotLocked);
            let reply = first.lock(PATIENT, PATIENT).await.unwrap();
            assert_eq!(reply, LockReply::Said, "{frontend:?} {version:?}");
            until(&first, false).await;
            until(&second, false).await;
            assert_eq!(farm.state(), ClusterState::ReadOnly);
            let reply = second.lock(PATIENT, PATIENT).await.unwrap();
            assert!(matches!(reply, LockReply::AlreadyLocked(_)), "{reply:?}");
            let reply = second.unlock(PATIENT, PATIENT).await.unwrap();
            assert_eq!(reply, UnlockReply::Said);
            until(&first, true).await;
            until(&second, true).await;
        }
    }
}

#[tokio::test]
async fn what_the_cluster_is_made_of_is_read() {
    for (clock, expected) in [
        (Clock::Off, proxy::Clock::Off),
        (
            Clock::TsoRedis,
            proxy::Clock::Tso {
                provider: "redis".to_owned(),
            },
        ),
        (
            Clock::TsoLocal,
            proxy::Clock::Tso {
                provider: "local".to_owned(),
            },
        ),
    ] {
        let farm = ProxyFarm::start(ProxyFarmOptions {
            nodes: nodes(),
            clock,
            ..ProxyFarmOptions::default()
        });
        let connection = log_in(&farm, 0).await;
        let listed = connection.compute_nodes(PATIENT).await.unwrap();
        let mut ports: Vec<_> = listed.iter().map(|node| node.port).collect();
        ports.sort_unstable();
        let mut expected_ports = [farm.port(0), farm.port(1)];
        expected_ports.sort_unstable();
        assert_eq!(ports, expected_ports);
        assert!(
            listed
                .iter()
                .all(|node| node.kind == "PROXY" && node.version == "5.5.2")
        );
        let nodes = connection.export_storage_nodes(PATIENT).await.unwrap();
        let seen: Vec<_> = nodes
            .iter()
            .map(|node| (node.logical_database.as_str(), node.port))
            .collect();
        assert_eq!(seen, [("bank", 1), ("bank", 2)]);
        let units = connection.storage_units("bank", PATIENT).await.unwrap();
        assert_eq!(units.len(), 2);
        assert_eq!(units[1].database, "bank_2");
        assert_eq!(connection.clock(PATIENT).await.unwrap(), expected);
        let metadata = connection.export_metadata(PATIENT).await.unwrap();
        assert!(metadata.json.contains("dataSources"));
        assert_eq!(metadata.csn().is_some(), clock != Clock::Off);
    }
}

#[tokio::test]
async fn lost_replies_and_frozen_proxies_leave_the_outcome_open() {
    let farm = ProxyFarm::start(ProxyFarmOptions::default());
    let connection = log_in(&farm, 0).await;
    farm.lose_next_lock_reply();
    let error = connection.lock(SOON, 3 * SOON).await.unwrap_err();
    assert_eq!(effect(&error), Effect::Unknown, "{error}");
    let connection = log_in(&farm, 1).await;
    until(&connection, false).await;

    farm.freeze(1);
    let begun = Instant::now();
    let error = connection.unlock(SOON, SOON).await.unwrap_err();
    assert!(matches!(error, SqlError::Timeout { .. }), "{error}");
    assert!(begun.elapsed() < PATIENT);
    let impatient = ProxyOptions {
        connect_timeout: SOON,
        ..options(farm.port(1))
    };
    let error = ProxyConnection::connect(&impatient, CancellationToken::new())
        .await
        .map(|_| ())
        .unwrap_err();
    assert!(matches!(error, SqlError::Unreachable { .. }), "{error}");
    // What it was told before it froze it does when it thaws.
    farm.thaw(1);
    let other = log_in(&farm, 0).await;
    other.unlock(PATIENT, PATIENT).await.unwrap();
    until(&other, true).await;

    farm.kill(0);
    let error = other.probe(PATIENT).await.unwrap_err();
    assert!(
        matches!(error, SqlError::Lost { .. } | SqlError::Unreachable { .. }),
        "{error}"
    );
}

#[tokio::test]
async fn success_proves_nothing() {
    let farm = ProxyFarm::start(ProxyFarmOptions::default());
    let connection = log_in(&farm, 0).await;
    let held = farm.hold_mutex();
    let reply = connection.lock(SOON, PATIENT).await.unwrap();
    assert_eq!(reply, LockReply::Said);
    assert_eq!(connection.probe(PATIENT).await.unwrap(), Gate::Open);
    drop(held);
    connection.lock(SOON, PATIENT).await.unwrap();
    until(&connection, false).await;
    farm.ignore_unlocks(1);
    for reply in [UnlockReply::Said, UnlockReply::Said] {
        assert_eq!(connection.unlock(SOON, PATIENT).await.unwrap(), reply);
    }
    until(&connection, true).await;
}

#[tokio::test]
async fn its_tls_is_spoken() {
    let made = rcgen::generate_simple_self_signed(vec!["127.0.0.1".to_owned()]).unwrap();
    let pem = made.cert.pem();
    let farm = ProxyFarm::start(ProxyFarmOptions {
        frontend: Frontend::PostgresCleartext,
        tls: Some((pem.clone(), made.signing_key.serialize_pem())),
        ..ProxyFarmOptions::default()
    });
    for ca_pem in [None, Some(pem.into_bytes())] {
        let options = ProxyOptions {
            tls: ProxyTls::On { ca_pem },
            ..options(farm.port(0))
        };
        let connection = ProxyConnection::connect(&options, CancellationToken::new());
        let connection = connection.await.unwrap();
        assert_eq!(connection.probe(PATIENT).await.unwrap(), Gate::Open);
    }
}
