//! A cluster with two nodes and two proxies of either kind, and a few words about it.

use std::process::Command;
use std::time::{Duration, Instant};

use serde_json::Value;
use support::bank::wire::{Session, WireError};
use support::fleet::Run;
use support::proxy::ClusterState;
use support::running::Running;
use support::sharded::{Proxies, ShardedCluster, ShardedOptions};

/// Writes pass again this soon after whatever happened.
const AGAIN: Duration = Duration::from_secs(5);
/// A commit that waits for its disk says nothing of a lock until then.
const PATIENCE: Duration = Duration::from_secs(45);
/// Leases of what was killed have run out this soon: their five seconds, and a clock's doubt.
const LEASES: Duration = Duration::from_secs(30);
/// A command, and what it needs to get over a predecessor that died.
const BACKUP: [&str; 11] = [
    "--output",
    "json",
    "backup",
    "--wal",
    "backup",
    "--agent-timeout",
    "5",
    "--lease-ttl",
    "5",
    "-j",
    "2",
];

#[expect(clippy::print_stdout, reason = "shown by --nocapture and on failure")]
pub(crate) fn say(text: &str) {
    println!("{text}");
}

pub(crate) async fn cluster(name: &'static str) -> ShardedCluster {
    let options = ShardedOptions {
        name,
        ..ShardedOptions::default()
    };
    ShardedCluster::start(options).await
}

/// A backup with more arguments, under way.
pub(crate) fn started(cluster: &ShardedCluster, more: &[&str]) -> Running {
    Running::start(command(cluster, more))
}

/// A backup with more arguments, not yet started.
pub(crate) fn command(cluster: &ShardedCluster, more: &[&str]) -> Command {
    let args: Vec<&str> = BACKUP.iter().chain(more).copied().collect();
    cluster.command(&args)
}

/// A backup with more arguments, to its end.
pub(crate) fn backup(cluster: &ShardedCluster, more: &[&str]) -> Run {
    let args: Vec<&str> = BACKUP.iter().chain(more).copied().collect();
    cluster.run(&args)
}

/// Reads on until the point's making enters a state.
pub(crate) async fn until_state(running: &mut Running, state: &str) {
    let is_it = |event: &Value| event["event"] == "point-state" && event["state"] == state;
    running.until_event(is_it).await;
}

/// Whether a write passes; the error of one that does not, if there was an answer.
async fn passes(cluster: &ShardedCluster, proxy: usize) -> Result<(), Option<WireError>> {
    let access = &cluster.ways().proxies[proxy];
    let write = async {
        let mut session = Session::open(access).await?;
        session
            .query("UPDATE account SET balance = balance WHERE id = 0")
            .await
    };
    match tokio::time::timeout(Duration::from_secs(2), write).await {
        Ok(Ok(_)) => Ok(()),
        Ok(Err(error)) => Err(Some(error)),
        Err(_) => Err(None),
    }
}

/// Writes pass through `proxies` within five seconds from now, and from then on, for `stay` at least. Until then they may be refused
/// again: a LOCK that was sent before whatever happened may land after it.
pub(crate) async fn writes_pass(cluster: &ShardedCluster, proxies: &[usize], stay: Duration) {
    let begun = Instant::now();
    let mut open_since: Option<Instant> = None;
    'looks: loop {
        let mut refused = None;
        for proxy in proxies {
            match passes(cluster, *proxy).await {
                Ok(()) => {}
                Err(None) if begun.elapsed() < PATIENCE => {
                    say("a write got no answer");
                    continue 'looks;
                }
                Err(why) => refused = Some(format!("{why:?}")),
            }
        }
        match (refused, open_since) {
            (None, None) => open_since = Some(Instant::now()),
            (None, Some(since)) if since.elapsed() >= stay => break,
            (None, Some(_)) => {}
            (Some(why), None) => {
                assert!(begun.elapsed() < AGAIN, "writes are still refused: {why}");
            }
            (Some(why), Some(_)) if begun.elapsed() < AGAIN => {
                say(&format!(
                    "refused once more after {:?}: {why}",
                    begun.elapsed()
                ));
                open_since = None;
            }
            (Some(why), Some(since)) => {
                panic!("writes passed, and {:?} later not: {why}", since.elapsed());
            }
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    match &cluster.proxies {
        Proxies::StandIn(farm) => assert_eq!(farm.state(), ClusterState::Ok),
        Proxies::Real(real) => assert_eq!(real.state(), "OK"),
    }
    let after = open_since.map(|at| at - begun);
    say(&format!("writes passed again after {after:?}"));
}

/// Waits until the leases of commands that were killed have run out: nobody gave them back.
pub(crate) async fn until_leases_end(cluster: &ShardedCluster) {
    let begun = Instant::now();
    loop {
        let shown = cluster.run(&["--output", "json", "operations"]).good();
        let result = shown.result();
        let operations = result["operations"].as_array().expect("a list");
        if operations.iter().all(|it| it["state"] != "running") {
            break;
        }
        assert!(begun.elapsed() < LEASES, "{result}");
        tokio::time::sleep(Duration::from_millis(200)).await;
    }
}

/// Every point in the bucket is one of the whole cluster, and proved.
pub(crate) async fn all_points_are_proved(cluster: &ShardedCluster) -> usize {
    let catalog = catalog::Catalog::open(cluster.bucket.store())
        .await
        .unwrap();
    let points = catalog.points().await.unwrap();
    for listed in &points {
        let catalog::repo::PointState::Usable(point) = &listed.state else {
            panic!("{listed:?}");
        };
        assert_eq!(point.consistency, catalog::model::Consistency::Cluster);
        let proof = point.proof.as_ref().unwrap();
        assert!(
            proof.unproved.is_none() && proof.window_ms.is_some(),
            "{proof:?}"
        );
    }
    points.len()
}
