//! SIGKILL and Ctrl-C in each state.

use std::time::Duration;

use rustix::process::Signal;

use super::scene::{
    all_points_are_proved, backup, cluster, say, started, until_leases_end, until_state,
    writes_pass,
};

/// The states from arming on.
const STATES: [&str; 8] = [
    "arm", "lock", "probe", "drain", "mark", "prove", "unlock", "disarm",
];
/// How long nothing may lock again.
const STAY: Duration = Duration::from_secs(6);

#[tokio::test(flavor = "multi_thread")]
async fn killed_in_any_state_the_cluster_is_unlocked() {
    let cluster = cluster("lock-killed").await;
    for state in STATES {
        let mut running = started(&cluster, &["--lock", "always"]);
        until_state(&mut running, state).await;
        running.kill();
        say(&format!("killed at {state}"));
        // A watchdog's rule is met after a minute at most, but it finds nothing to unlock by then.
        writes_pass(&cluster, &[0, 1], STAY).await;
        until_leases_end(&cluster).await;
    }
    all_points_are_proved(&cluster).await;
    let result = backup(&cluster, &["--lock", "always"]).good().result();
    assert_eq!(result["consistency"], "cluster");
}

#[tokio::test(flavor = "multi_thread")]
async fn cancelled_under_the_lock_it_unlocks_first_and_says_for_how_long() {
    let cluster = cluster("lock-cancelled").await;
    // Somebody keeps a transaction open on a node from the moment of the lock: the drain waits.
    let mut running = started(&cluster, &["--lock", "always"]);
    until_state(&mut running, "arm").await;
    let client = cluster.database(0).connect(support::sharded::SHARD).await;
    client
        .batch_execute("BEGIN; UPDATE account SET balance = balance WHERE id = 0")
        .await
        .unwrap();
    until_state(&mut running, "drain").await;
    running.signal(Signal::INT);
    let run = running.end().await;
    client.batch_execute("ROLLBACK").await.unwrap();
    writes_pass(&cluster, &[0, 1], Duration::from_secs(3)).await;
    // The transaction may have come too late to be in the way: the point was made, and the cancel came behind it.
    let last = |what: &str| run.stdout.rfind(what);
    let made = last(r#""state":"disarm""#) > last(r#""event":"point-try""#);
    if run.code == 130 {
        let result = run.result();
        let message = result["error"]["message"].as_str().unwrap();
        let says = message.contains("the cluster was locked for");
        assert!(says || made, "{run:?}");
    } else {
        assert_eq!(run.code, 0, "{run:?}");
    }
    all_points_are_proved(&cluster).await;
}
