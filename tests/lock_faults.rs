//! Whoever fails while a cluster is locked for a point: writes pass again within five seconds and stay so, no point is stored
//! that was not proved, the copies are kept and the point made again, and the next backup is as good as any.
//!
//! On the stand-in and on real proxies alike.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    reason = "test code: a panic is a failed test, with its reason"
)]

#[allow(dead_code, reason = "it is that of `lock.rs`, which uses all of it")]
#[path = "lock/scene.rs"]
mod scene;

#[allow(dead_code, reason = "`lock.rs` and `discover.rs` use the rest")]
#[path = "lock_faults/hands.rs"]
mod hands;

#[path = "lock_faults/way.rs"]
mod way;

use std::time::{Duration, Instant};

use serde_json::Value;
use support::fleet::Run;
use support::running::Running;
use support::s3::{Operation, When};
use support::sharded::ShardedCluster;

use scene::{
    all_points_are_proved, backup, cluster, command, say, started, until_state, writes_pass,
};
use way::{Loss, Stage, Way};

/// A watchdog goes on for ten seconds after the outcome of LOCK is known.
const STAY: Duration = Duration::from_secs(12);
/// Writes pass again this soon, whether or not another try locks later.
const AGAIN: Duration = Duration::from_secs(5);
const ALWAYS: [&str; 2] = ["--lock", "always"];

/// A try that had the lock, or may have had it, and gave no point.
fn was_for_nothing(event: &Value) -> bool {
    event["event"] == "point-try" && !event["held_ms"].is_null()
}

/// The backup has become one nevertheless, with each node copied as often as `copies` says, and its point is proved. Another one is
/// as good.
async fn goes_on(cluster: &ShardedCluster, run: Run, copies: [usize; 2]) {
    say(&format!(
        "it ended with {}: {}",
        run.code,
        run.stdout.lines().last().unwrap_or_default()
    ));
    let run = run.good();
    copied(cluster, &run, copies);
    assert_eq!(all_points_are_proved(cluster).await, 1);
    let result = backup(cluster, &ALWAYS).good().result();
    assert_eq!(result["consistency"], "cluster");
    writes_pass(cluster, &[0, 1], Duration::from_secs(1)).await;
    assert_eq!(all_points_are_proved(cluster).await, 2);
}

/// The backup is one of the whole cluster, with each node copied as often as `copies` says.
fn copied(cluster: &ShardedCluster, run: &Run, copies: [usize; 2]) {
    let result = run.result();
    assert_eq!(result["consistency"], "cluster", "{result}");
    let made = |node: &str| {
        let lines = run.stdout.lines();
        let events = lines.filter_map(|line| serde_json::from_str::<Value>(line).ok());
        let is_one = |event: &Value| event["phase"] == "copied" && event["node"] == node;
        events.filter(is_one).count()
    };
    let nodes = [0, 1].map(|host| cluster.fleet.addresses(&[host]));
    assert_eq!(nodes.map(|node| made(&node)), copies, "{run:?}");
}

/// No copy is made again where agents ship WAL all the time: not if one dies under the lock, and not if it dies when the point stands and
/// its WAL is not in the bucket yet. A point without a copy outlives its agent, too.
async fn copies_are_kept_with_continuous_wal(cluster: &mut ShardedCluster) {
    let begun = |cluster: &ShardedCluster, what: &[&str]| {
        let args = [&["--output", "json"], what, &["--agent-timeout", "2"]].concat();
        Running::start(cluster.command(&[&args[..], &ALWAYS].concat()))
    };
    let mut running = begun(cluster, &["backup"]);
    until_state(&mut running, "probe").await;
    cluster.fleet.restart_agent(0);
    let run = running.end().await.good();
    copied(cluster, &run, [1, 1]);

    let running = begun(cluster, &["backup"]);
    let run = taken_up(cluster, running).await;
    copied(cluster, &run, [1, 1]);

    let running = begun(cluster, &["point", "create"]);
    let run = taken_up(cluster, running).await;
    assert_eq!(run.result()["consistency"], "cluster", "{run:?}");

    let verified = cluster.run(&["verify", "--all"]);
    assert_eq!(verified.code, 0, "{verified:?}");
    assert_eq!(all_points_are_proved(cluster).await, 5);
}

/// The first node's agent is killed before the WAL of the point that is being made is in the bucket, and comes back when it is missed.
async fn taken_up(cluster: &mut ShardedCluster, mut running: Running) -> Run {
    until_state(&mut running, "arm").await;
    // Before anything of the point can be on its way.
    let is_segment = |key: &str| key.contains("/wal/") && !key.contains(".json");
    let server = cluster.bucket.server();
    let held = server.hold(Operation::Put, When::Before, is_segment);
    let agent = cluster.fleet.addresses(&[0]);
    running.until("shipping", &[&agent]).await;
    held.reached().await;
    cluster.fleet.hosts[0].agent.kill();
    held.cut();
    let waiting = running
        .until_event(|event| event["event"] == "waiting")
        .await;
    assert_eq!(waiting["node"], agent.as_str(), "{waiting}");
    say(&waiting.to_string());
    cluster.fleet.restart_agent(0);
    let run = running.end().await.good();
    assert!(run.stdout.contains(r#""event":"taken-up""#), "{run:?}");
    run
}

/// Its copy is made again, the other is kept.
#[tokio::test(flavor = "multi_thread")]
async fn an_agent_killed_under_the_lock() {
    let mut cluster = cluster("fault-agent").await;
    let mut running = started(&cluster, &ALWAYS);
    until_state(&mut running, "probe").await;
    cluster.fleet.hosts[0].agent.kill();
    say("the first node's agent is dead: a watchdog, too");
    hands::until_open(&cluster, 0..2, AGAIN).await;
    cluster.fleet.restart_agent(0);
    let run = running.end().await;
    writes_pass(&cluster, &[0, 1], STAY).await;
    goes_on(&cluster, run, [2, 1]).await;
    copies_are_kept_with_continuous_wal(&mut cluster).await;
}

/// Its restore point may be lost with it, and is made again under another name: both copies are kept.
#[tokio::test(flavor = "multi_thread")]
async fn a_data_node_killed_right_after_its_mark() {
    let cluster = cluster("fault-node").await;
    let mut running = started(&cluster, &ALWAYS);
    until_state(&mut running, "prove").await;
    hands::kill_database(cluster.database(0)).await;
    say("the first node's database is dead");
    // Its rows cannot be written; the lock is gone for those of the other, and for its own once it is back.
    hands::until_open(&cluster, 0..2, AGAIN).await;
    cluster.database(0).start();
    let run = running.end().await;
    writes_pass(&cluster, &[0, 1], STAY).await;
    goes_on(&cluster, run, [1, 1]).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_proxy_that_locked_is_killed() {
    let mut cluster = cluster("fault-proxy").await;
    let mut running = started(&cluster, &ALWAYS);
    until_state(&mut running, "probe").await;
    // The first try locks through the first proxy.
    hands::kill(&mut cluster, 0);
    say("the first proxy is dead");
    hands::until_open(&cluster, 1..2, AGAIN).await;
    cluster.restart_proxy(0).await;
    hands::until_open(&cluster, 0..2, AGAIN).await;
    let run = running.end().await;
    // The other proxy exports the same in another order.
    assert!(!run.stdout.contains("were changed"), "{run:?}");
    writes_pass(&cluster, &[0, 1], STAY).await;
    goes_on(&cluster, run, [1, 1]).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_proxy_frozen_under_the_lock() {
    let cluster = cluster("fault-frozen").await;
    let mut running = started(&cluster, &ALWAYS);
    until_state(&mut running, "probe").await;
    hands::freeze(&cluster, 1);
    hands::until_open(&cluster, 0..1, AGAIN).await;
    hands::thaw(&cluster, 1);
    hands::until_open(&cluster, 0..2, AGAIN).await;
    let run = running.end().await;
    writes_pass(&cluster, &[0, 1], STAY).await;
    goes_on(&cluster, run, [1, 1]).await;
}

/// It does not hear of the lock and writes on: a point is made without its word, or when it is back.
#[tokio::test(flavor = "multi_thread")]
async fn a_proxy_cut_off_before_the_lock() {
    let cluster = cluster("fault-cut").await;
    let mut running = started(&cluster, &ALWAYS);
    running
        .until_event(|event| event["event"] == "started")
        .await;
    hands::cut_off(&cluster, 1);
    let mut end = std::pin::pin!(running.end());
    let run = if let Ok(run) = tokio::time::timeout(Duration::from_secs(25), &mut end).await {
        say("it ended without the proxy");
        run
    } else {
        hands::reconnect(&cluster, 1);
        end.await
    };
    hands::reconnect(&cluster, 1);
    writes_pass(&cluster, &[0, 1], STAY).await;
    goes_on(&cluster, run, [1, 1]).await;
}

/// LOCK says SUCCESS and does nothing while somebody holds the cluster's internal mutex: that is seen.
#[tokio::test(flavor = "multi_thread")]
async fn a_lock_that_silently_does_nothing() {
    let cluster = cluster("fault-no-lock").await;
    let held = hands::hold_mutex(&cluster);
    let mut running = started(&cluster, &ALWAYS);
    let event = running.until_event(was_for_nothing).await;
    say(&event["message"].to_string());
    drop(held);
    let run = running.end().await.good();
    writes_pass(&cluster, &[0, 1], STAY).await;
    goes_on(&cluster, run, [1, 1]).await;
}

/// UNLOCK, too: it is sent again until writes pass.
#[tokio::test(flavor = "multi_thread")]
async fn an_unlock_that_silently_does_nothing() {
    let cluster = cluster("fault-no-unlock").await;
    let mut running = started(&cluster, &ALWAYS);
    until_state(&mut running, "probe").await;
    let held = hands::hold_mutex(&cluster);
    tokio::time::sleep(Duration::from_millis(2500)).await;
    drop(held);
    hands::until_open(&cluster, 0..2, AGAIN).await;
    let run = running.end().await;
    writes_pass(&cluster, &[0, 1], STAY).await;
    goes_on(&cluster, run, [1, 1]).await;
}

/// A backup that goes to its first proxy by a way of its own.
fn led(cluster: &ShardedCluster, way: &Way) -> Running {
    let mut command = command(cluster, &ALWAYS);
    way.lead(cluster, &mut command);
    Running::start(command)
}

/// The cluster is locked, and nobody heard it: that is a lock of ours.
#[tokio::test(flavor = "multi_thread")]
async fn the_reply_to_a_lock_is_lost() {
    let cluster = cluster("fault-reply").await;
    let mut way = Way::losing(cluster.proxy_port(0), Loss::Break).await;
    let running = led(&cluster, &way);
    way.until(Stage::Answered).await;
    let begun = Instant::now();
    hands::until_open(&cluster, 0..2, AGAIN).await;
    say(&format!(
        "the reply to LOCK was lost; open after {:?}",
        begun.elapsed()
    ));
    let run = running.end().await;
    assert!(run.stdout.contains("\"event\":\"point-try\""), "{run:?}");
    writes_pass(&cluster, &[0, 1], STAY).await;
    goes_on(&cluster, run, [1, 1]).await;
}

/// It has written the lock down, and says no more.
#[tokio::test(flavor = "multi_thread")]
async fn a_proxy_frozen_in_the_middle_of_a_lock() {
    let cluster = cluster("fault-middle").await;
    let mut way = Way::losing(cluster.proxy_port(0), Loss::Silence).await;
    let running = led(&cluster, &way);
    way.until(Stage::Sent).await;
    let begun = Instant::now();
    while !hands::is_locked(&cluster) {
        assert!(begun.elapsed() < AGAIN, "it never locked");
        tokio::task::yield_now().await;
    }
    hands::freeze(&cluster, 0);
    say(&format!("frozen {:?} after it was asked", begun.elapsed()));
    let begun = Instant::now();
    hands::until_open(&cluster, 1..2, AGAIN).await;
    say(&format!(
        "the other one is open after {:?}",
        begun.elapsed()
    ));
    hands::thaw(&cluster, 0);
    hands::until_open(&cluster, 0..2, AGAIN).await;
    let run = running.end().await;
    writes_pass(&cluster, &[0, 1], STAY).await;
    goes_on(&cluster, run, [1, 1]).await;
}
