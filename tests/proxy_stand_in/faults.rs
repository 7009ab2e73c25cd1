//! Faults on demand.

use std::time::{Duration, Instant};

use support::proxy::{ClusterState, Delays, ProxyFarm, ProxyFarmOptions};

use super::bank::*;

fn farm() -> ProxyFarm {
    ProxyFarm::start(ProxyFarmOptions {
        listed_after_kill: Duration::from_secs(3),
        listed_after_cut: Duration::from_secs(3),
        ..ProxyFarmOptions::default()
    })
}

async fn listed(farm: &ProxyFarm) -> Vec<u16> {
    let client = client_in(farm, 0, "postgres").await;
    let rows = run(&client, "SHOW COMPUTE NODES").await;
    let mut ports: Vec<u16> = rows.iter().map(|row| row[3].parse().unwrap()).collect();
    assert!(rows.iter().all(|row| row[4] == "OK"));
    ports.sort_unstable();
    ports
}

fn both(farm: &ProxyFarm) -> Vec<u16> {
    let mut ports = vec![farm.port(0), farm.port(1)];
    ports.sort_unstable();
    ports
}

#[tokio::test]
async fn a_killed_proxy_stays_listed_for_a_while_and_comes_back_on_its_port() {
    let farm = farm();
    let client = client_in(&farm, 1, "postgres").await;
    farm.kill(1);
    assert_eq!(ask(&client, PROBE).await.unwrap_err().0, "lost");
    assert!(
        config(&farm, 1, "postgres")
            .connect(tokio_postgres::NoTls)
            .await
            .is_err()
    );
    assert_eq!(listed(&farm).await, both(&farm));
    until("it is listed no more", async || {
        listed(&farm).await == [farm.port(0)]
    })
    .await;
    farm.restart(1);
    assert_eq!(listed(&farm).await, both(&farm));
    run(&client_in(&farm, 1, "postgres").await, PROBE).await;
}

#[tokio::test]
async fn a_proxy_that_is_cut_off_goes_on_writing_under_the_lock() {
    let nodes = Nodes::start(1).await;
    let farm = ProxyFarm::start(ProxyFarmOptions {
        listed_after_cut: Duration::from_secs(2),
        ..nodes.options()
    });
    let (first, second) = (client(&farm, 0).await, client(&farm, 1).await);
    farm.cut_off(1);
    run(&first, LOCK).await;
    refused(&first, "INSERT INTO account VALUES (1, 1)").await;
    run(&second, "INSERT INTO account VALUES (1, 1)").await;
    // Which the probe is told, too.
    run(&second, PROBE).await;
    assert_eq!(listed(&farm).await, both(&farm));
    until("it is listed no more", async || {
        listed(&farm).await == [farm.port(0)]
    })
    .await;
    farm.reconnect(1);
    assert_eq!(listed(&farm).await, both(&farm));
    refused(&second, "INSERT INTO account VALUES (2, 1)").await;
}

#[tokio::test]
async fn a_frozen_proxy_accepts_and_answers_nothing() {
    let farm = farm();
    let (first, second) = (
        client_in(&farm, 0, "postgres").await,
        client_in(&farm, 1, "postgres").await,
    );
    farm.freeze(1);
    let silence = Duration::from_millis(200);
    let probe = second.simple_query(PROBE);
    tokio::pin!(probe);
    assert!(tokio::time::timeout(silence, &mut probe).await.is_err());
    let newcomer = config(&farm, 1, "postgres");
    let connecting = newcomer.connect(tokio_postgres::NoTls);
    assert!(tokio::time::timeout(silence, connecting).await.is_err());
    run(&first, LOCK).await;
    assert_eq!(farm.seen(1), Some(ClusterState::Ok), "it sees nothing");
    farm.thaw(1);
    let _ = probe.await;
    until("it sees the lock", async || {
        farm.seen(1) == Some(ClusterState::ReadOnly)
    })
    .await;
    refused(&second, PROBE).await;
}

#[tokio::test]
async fn a_lock_whose_reply_is_lost_is_there() {
    let farm = farm();
    let client = client_in(&farm, 0, "postgres").await;
    farm.lose_next_lock_reply();
    assert_eq!(ask(&client, LOCK).await.unwrap_err().0, "lost");
    assert_eq!(farm.state(), ClusterState::ReadOnly);
    let client = client_in(&farm, 0, "postgres").await;
    run(&client, UNLOCK).await;
    run(&client, LOCK).await;
}

#[tokio::test]
async fn a_lock_lands_late_though_its_client_has_gone() {
    let farm = farm();
    let client = client_in(&farm, 0, "postgres").await;
    farm.delay_next_lock(Duration::from_secs(2));
    let started = Instant::now();
    let locking = client.simple_query(LOCK);
    assert!(
        tokio::time::timeout(Duration::from_millis(100), locking)
            .await
            .is_err()
    );
    drop(client);
    assert_eq!(farm.state(), ClusterState::Ok);
    until("it lands", async || farm.state() == ClusterState::ReadOnly).await;
    assert!(started.elapsed() >= Duration::from_millis(1990));
}

#[tokio::test]
async fn an_unlock_can_be_told_to_do_nothing() {
    let farm = farm();
    let client = client_in(&farm, 0, "postgres").await;
    run(&client, LOCK).await;
    farm.ignore_unlocks(2);
    for state in [
        ClusterState::ReadOnly,
        ClusterState::ReadOnly,
        ClusterState::Ok,
    ] {
        run(&client, UNLOCK).await;
        assert_eq!(farm.state(), state);
    }
}

#[tokio::test]
async fn a_killed_proxy_can_leave_half_a_local_transaction() {
    let nodes = Nodes::start(1).await;
    let farm = ProxyFarm::start(ProxyFarmOptions {
        delays: Delays::Measured,
        ..nodes.options()
    });
    run(
        &client(&farm, 0).await,
        "INSERT INTO account VALUES (1, 100), (2, 100)",
    )
    .await;
    for round in 0..400 {
        let work = transfers(client(&farm, 0).await).await;
        tokio::time::sleep(Duration::from_millis(round % 13)).await;
        farm.kill(0);
        work.await.unwrap();
        if nodes.sum().await != 200 {
            return;
        }
        farm.restart(0);
    }
    panic!("never caught between two commits");
}
