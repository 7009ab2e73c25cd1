//! Proxies that go wrong, and locks that are not what they seem.

use std::time::{Duration, Instant};

use serde_json::Value;
use support::bank::{Bank, Mix};
use support::sharded::Proxies;
use support::skip;

use super::load::options;
use super::scene::{
    all_points_are_proved, backup, cluster, say, started, until_state, writes_pass,
};
use crate::hands;

/// A LOCK that is this late finds its program over with the try, and the watchdogs fired.
const LATE: Duration = Duration::from_secs(6);
/// Writes pass again this soon.
const AGAIN: Duration = Duration::from_secs(5);

/// A try that had the lock, or may have had it, and gave no point.
fn was_for_nothing(event: &Value) -> bool {
    event["event"] == "point-try" && !event["held_ms"].is_null()
}

#[tokio::test(flavor = "multi_thread")]
async fn anothers_lock_is_refused_and_left_alone() {
    let cluster = cluster("lock-foreign").await;
    hands::lock(&cluster).await;
    let begun = Instant::now();
    let run = backup(&cluster, &["--lock", "always"]);
    assert_eq!(run.code, 12, "{run:?}");
    assert!(
        begun.elapsed() < Duration::from_secs(30),
        "{:?}",
        begun.elapsed()
    );
    let result = run.result();
    let message = result["error"]["message"].as_str().unwrap();
    assert!(message.contains("locked"), "{message}");
    assert!(
        message.contains("no operation of this repository"),
        "{message}"
    );
    assert!(hands::is_locked(&cluster));

    // One that is taken while the nodes are copied, which takes its time.
    hands::unlock(&cluster).await;
    let args = [
        "--lock",
        "always",
        "--point-timeout",
        "4",
        "--bandwidth",
        "2MiB",
    ];
    let mut running = started(&cluster, &args);
    let copying = |event: &Value| event["event"] == "phase";
    running.until_event(copying).await;
    hands::lock(&cluster).await;
    let run = running.end().await;
    assert_eq!(run.code, 12, "{run:?}");
    assert!(hands::is_locked(&cluster));
    hands::unlock(&cluster).await;
    writes_pass(&cluster, &[0, 1], Duration::from_secs(1)).await;
    assert_eq!(all_points_are_proved(&cluster).await, 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_unlock_that_does_nothing_is_seen_and_repeated() {
    if support::real_proxy::home().is_some() {
        let name = "an_unlock_that_does_nothing_is_seen_and_repeated";
        skip(
            name,
            "real proxies cannot be told how often; `lock_faults.rs` has an UNLOCK of theirs that does nothing",
        );
        return;
    }
    let cluster = cluster("lock-unlock").await;
    let Proxies::StandIn(farm) = &cluster.proxies else {
        panic!("the stand-in");
    };
    farm.ignore_unlocks(2);
    let result = backup(&cluster, &["--lock", "always"]).good().result();
    say(&result["lock"].to_string());
    assert!(result["lock_ms"].as_u64().unwrap() >= 300, "{result}");
    writes_pass(&cluster, &[0, 1], Duration::from_secs(2)).await;
    assert_eq!(all_points_are_proved(&cluster).await, 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_frozen_proxy_holds_nobody() {
    let cluster = cluster("lock-frozen").await;
    let mut running = started(&cluster, &["--lock", "always"]);
    until_state(&mut running, "arm").await;
    hands::freeze(&cluster, 1);
    until_state(&mut running, "disarm").await;
    hands::until_open(&cluster, 0..1, AGAIN).await;
    hands::thaw(&cluster, 1);
    hands::until_open(&cluster, 0..2, AGAIN).await;
    let run = running.end().await.good();
    writes_pass(&cluster, &[0, 1], Duration::from_secs(3)).await;
    say(&run.result()["lock"].to_string());
    assert_eq!(all_points_are_proved(&cluster).await, 1);
}

/// It writes on whatever is locked. So it is named, and the proof has to do without it.
/// As a real one does: even the probe passes there.
#[tokio::test(flavor = "multi_thread")]
async fn a_proxy_that_is_cut_off_writes_on_and_no_point_is_made() {
    let cluster = cluster("lock-cut").await;
    let cut = format!("127.0.0.1:{}", cluster.proxy_port(1));
    hands::cut_off(&cluster, 1);
    // All that it lets pass meanwhile is in the way of the proof, and so of no harm.
    let bank = Bank::open(
        &cluster.ways(),
        &options(Mix {
            simple: 2,
            ..Mix::default()
        }),
    );
    bank.goes_on(10).await;
    let mut running = started(&cluster, &["--lock", "always"]);
    let event = running.until_event(was_for_nothing).await;
    let message = event["message"].as_str().unwrap();
    assert!(
        message.contains("writes went on under the lock"),
        "{message}"
    );
    assert!(message.contains(&cut), "{message}");
    assert_eq!(all_points_are_proved(&cluster).await, 0);
    hands::reconnect(&cluster, 1);
    let result = running.end().await.good().result();
    say(&result["lock"].to_string());
    say(&bank.close().await.describe());
    writes_pass(&cluster, &[0, 1], Duration::from_secs(2)).await;
    assert_eq!(all_points_are_proved(&cluster).await, 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_lock_that_lands_after_all_was_over_is_released() {
    let cluster = cluster("lock-late").await;
    if let Proxies::StandIn(farm) = &cluster.proxies {
        farm.delay_next_lock(LATE);
    }
    let mut running = started(&cluster, &["--lock", "always"]);
    until_state(&mut running, "lock").await;
    if let Proxies::Real(real) = &cluster.proxies {
        // It has been told, and ZooKeeper hears of it later.
        real.cut_off(0);
        tokio::time::sleep(LATE).await;
        assert!(!hands::is_locked(&cluster), "the LOCK was not late");
        real.reconnect(0);
    }
    let until = Instant::now() + Duration::from_secs(15);
    while !hands::was_locked(&cluster) {
        assert!(Instant::now() < until, "it never landed");
        tokio::time::sleep(Duration::from_millis(2)).await;
    }
    say("it landed");
    writes_pass(&cluster, &[0, 1], Duration::from_secs(20)).await;
    // No new lock before the watchdogs rest, a minute later; then the point is made.
    let _ = running.end().await.good();
    assert_eq!(all_points_are_proved(&cluster).await, 1);
    writes_pass(&cluster, &[0, 1], Duration::from_secs(1)).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_lock_that_does_nothing_is_seen() {
    let cluster = cluster("lock-mutex").await;
    let held = hands::hold_mutex(&cluster);
    let mut running = started(&cluster, &["--lock", "always"]);
    running.until_event(was_for_nothing).await;
    drop(held);
    writes_pass(&cluster, &[0, 1], Duration::from_secs(5)).await;
    let _ = running.end().await.good();
    assert_eq!(all_points_are_proved(&cluster).await, 1);
}
