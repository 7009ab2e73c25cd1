//! `gs_pitr delete` and `gs_pitr prune` as their users run them, with a real database.

use std::process::{Child, Stdio};
use std::time::Duration;

use catalog::Catalog;
use catalog::keys;
use futures_util::TryStreamExt as _;
use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;
use support::bucket::Bucket;
use support::fleet::{Fleet, Run};
use support::postgres::{ClusterOptions, Installation};
use support::s3::{Operation, When};

async fn fleet() -> (Bucket, Fleet) {
    let bucket = Bucket::double().await;
    let mut fleet = Fleet::new("retention", &bucket.config());
    fleet.add_database("one", &Installation::newest(), ClusterOptions::default());
    (bucket, fleet)
}

fn backup(fleet: &Fleet) -> String {
    let nodes = fleet.addresses(&[0]);
    let run = fleet
        .run(&["backup", "--nodes", &nodes, "--output", "json"])
        .good();
    run.result()["backup_id"].as_str().unwrap().to_owned()
}

fn json(fleet: &Fleet, args: &[&str]) -> Run {
    fleet.run(&[args, &["--output", "json"]].concat())
}

/// Ids of the backups with this status.
fn listed(fleet: &Fleet, status: &str) -> Vec<String> {
    let shown = json(fleet, &["show"]).good().result();
    let backups = shown["backups"].as_array().unwrap().iter();
    let with = backups.filter(|it| it["status"] == status);
    // By when they began: ids of one second are in no order.
    let begun = |it: &Value| -> Option<jiff::Timestamp> { it["started"].as_str()?.parse().ok() };
    let mut with: Vec<_> = with
        .map(|it| (begun(it), it["id"].as_str().unwrap().to_owned()))
        .collect();
    with.sort();
    with.into_iter().map(|(_, id)| id).collect()
}

/// Every backup that the catalog lists as complete has its objects and its WAL.
async fn assert_whole(bucket: &Bucket) {
    let store = bucket.store();
    let catalog = Catalog::open(std::sync::Arc::clone(&store)).await.unwrap();
    let there: Vec<_> = store.list("").try_collect().await.unwrap();
    let has = |key: &pipeline::store::Key| there.iter().any(|object| object.key == *key);
    for listed in catalog.backups().await.unwrap() {
        let catalog::repo::BackupState::Complete(manifest) = listed.state else {
            continue;
        };
        let id = &manifest.backup_id;
        let point = catalog.restorable(id).await.unwrap().point;
        for node in &manifest.nodes {
            assert!(has(&keys::index(id, node.node_id, node.attempt)), "{id}");
            for pack in &node.packs {
                let key = keys::pack(id, node.node_id, node.attempt, pack.number);
                assert!(has(&key), "{id} lacks {key}");
            }
            let mark = point
                .nodes
                .iter()
                .find(|it| it.node_id == node.node_id)
                .unwrap();
            for name in [&node.wal_first, &node.wal_last, &mark.wal_last] {
                let key = keys::wal(node.node_id, &node.epoch, &name.parse().unwrap());
                assert!(has(&key), "{id} lacks {key}");
            }
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn backups_are_deleted_and_pruned_and_the_one_that_stays_restores() {
    let (bucket, mut fleet) = fleet().await;
    let ids: Vec<String> = (0..3).map(|_| backup(&fleet)).collect();
    // Nobody to ask: the plan is said, and nothing is done.
    let run = json(&fleet, &["delete", "--id", &ids[0]]);
    assert_eq!(run.code, 2, "{run:?}");
    assert!(run.stdout.contains(r#""event":"plan""#), "{run:?}");
    assert_eq!(run.result()["error"]["changed"], false, "{run:?}");
    let planned = json(&fleet, &["delete", "--id", &ids[0], "--dry-run"])
        .good()
        .result();
    assert_eq!(planned["applied"], false);
    let bytes = planned["plan"]["removed"][0]["bytes"].as_u64().unwrap();
    assert!(bytes > 1 << 20, "{planned}");
    assert_eq!(listed(&fleet, "complete").len(), 3);

    let deleted = json(&fleet, &["delete", "--id", &ids[0], "--yes"])
        .good()
        .result();
    assert_eq!(deleted["deleted"], serde_json::json!([ids[0]]), "{deleted}");
    assert!(deleted["bytes"].as_u64().unwrap() >= bytes, "{deleted}");
    assert_eq!(listed(&fleet, "complete"), ids[1..]);
    assert_eq!(listed(&fleet, "deleted"), ids[..1]);
    // Once more is no error.
    let again = json(&fleet, &["delete", "--id", &ids[0], "--yes"])
        .good()
        .result();
    assert_eq!(again["objects"], 0, "{again}");
    assert_whole(&bucket).await;

    let pruned = json(&fleet, &["prune", "--keep-full", "1", "--yes"])
        .good()
        .result();
    assert_eq!(pruned["deleted"], serde_json::json!([ids[1]]), "{pruned}");
    assert_eq!(pruned["plan"]["kept"][0]["why"], "keep-full", "{pruned}");
    assert_eq!(listed(&fleet, "complete"), ids[2..]);
    assert_whole(&bucket).await;
    let last = json(&fleet, &["delete", "--id", &ids[2], "--yes"]);
    assert_eq!(last.code, 12, "{last:?}");
    assert!(last.stdout.contains("--even-last-good"), "{last:?}");
    let text = fleet
        .run(&["prune", "--keep-full", "1", "--dry-run"])
        .good();
    assert!(text.stdout.contains("nothing to delete"), "{text:?}");

    let host = fleet.add_host("new", &[]);
    let (agent, target) = (
        fleet.hosts[host].agent.address.clone(),
        fleet.hosts[host].root.join("r"),
    );
    std::fs::create_dir(&target).unwrap();
    support::os::give(&target);
    let shown = json(&fleet, &["show", &ids[2]]).good().result();
    let map = format!(
        "{}={agent}",
        shown["backups"][0]["nodes"][0]["node_id"].as_str().unwrap()
    );
    let port = support::os::free_port();
    let port = format!(
        "{}={port}",
        shown["backups"][0]["nodes"][0]["node_id"].as_str().unwrap()
    );
    let restored = json(
        &fleet,
        &[
            "restore",
            "--id",
            &ids[2],
            "--nodes",
            &agent,
            "--map",
            &map,
            "--db-port",
            &port,
            "--target-dir",
            &target.display().to_string(),
            "--no-start",
            "--yes",
        ],
    );
    assert_eq!(restored.good().result()["backup_id"], ids[2].as_str());
}

fn spawn(fleet: &Fleet, args: &[&str]) -> Child {
    let mut command = fleet.command(args);
    command.stdout(Stdio::piped()).stderr(Stdio::piped());
    command.spawn().unwrap()
}

fn signal(pid: u32, signal: Signal) {
    let pid = Pid::from_raw(i32::try_from(pid).unwrap()).unwrap();
    kill_process(pid, signal).unwrap();
}

async fn end(child: Child) -> Run {
    let output = tokio::task::spawn_blocking(move || child.wait_with_output());
    let output = tokio::time::timeout(Duration::from_mins(2), output).await;
    let output = output.expect("it ends").unwrap().unwrap();
    Run {
        code: output.status.code().unwrap_or(-1),
        stdout: String::from_utf8_lossy(&output.stdout).into_owned(),
        stderr: String::from_utf8_lossy(&output.stderr).into_owned(),
    }
}

/// Prunes with next to no grace, until the one unfinished backup is fenced. Everybody who writes stands still.
async fn prune_until_fenced(fleet: &Fleet) -> Value {
    for _ in 0..20 {
        let args = ["prune", "--grace", "1s", "--lease-ttl", "5", "--yes"];
        let pruned = json(fleet, &args).good().result();
        if pruned["fenced"]
            .as_array()
            .is_some_and(|fenced| !fenced.is_empty())
        {
            return pruned;
        }
        tokio::time::sleep(Duration::from_secs(1)).await;
    }
    panic!("it was never fenced");
}

/// A writer stands still past its lease, in the middle of its copies or with its manifest on the way, while somebody
/// prunes; then it goes on. What it made is no backup, and what is listed has all of its objects.
async fn a_frozen_writer(at_manifest: bool) {
    let (bucket, fleet) = fleet().await;
    let good = backup(&fleet);
    let nodes = fleet.addresses(&[0]);
    let server = bucket.server();
    let hold = if at_manifest {
        server.hold(Operation::Put, When::Before, |key| {
            key.ends_with("/manifest.json")
        })
    } else {
        server.hold(Operation::Put, When::Before, |key| key.contains("/pack-"))
    };
    let agent = fleet.hosts[0].agent.pid();
    let args = [
        "backup",
        "--nodes",
        &nodes,
        "--lease-ttl",
        "5",
        "--output",
        "json",
    ];
    let writer = spawn(&fleet, &args);
    let key = hold.reached().await;
    for pid in [writer.id(), agent] {
        signal(pid, Signal::STOP);
    }
    let frozen = key
        .split("backups/")
        .nth(1)
        .unwrap()
        .split('/')
        .next()
        .unwrap()
        .to_owned();
    // The lease runs out, by the store's clock.
    tokio::time::sleep(Duration::from_secs(7)).await;
    let pruned = if at_manifest {
        // Cut off, so that the fence does not wait at the same gate: when the writer wakes up it tries again.
        hold.cut();
        prune_until_fenced(&fleet).await
    } else {
        let pruned = prune_until_fenced(&fleet).await;
        hold.release();
        pruned
    };
    assert_eq!(pruned["fenced"], serde_json::json!([frozen]), "{pruned}");
    let there_was_more = at_manifest;
    assert!(
        !there_was_more || pruned["objects"].as_u64().unwrap() > 0,
        "{pruned}"
    );
    assert_whole(&bucket).await;
    for pid in [agent, writer.id()] {
        signal(pid, Signal::CONT);
    }
    let run = end(writer).await;
    assert_ne!(run.code, 0, "{run:?}");
    assert_eq!(run.result()["status"], "error", "{run:?}");
    assert_eq!(listed(&fleet, "complete"), [good.as_str()]);
    assert!(listed(&fleet, "abandoned").contains(&frozen));
    assert_whole(&bucket).await;
    // It works on: the next backup is whole, and the next prune takes what the frozen one still wrote.
    let next = backup(&fleet);
    let _ = json(&fleet, &["prune", "--grace", "1s", "--yes"]).good();
    assert_eq!(listed(&fleet, "complete"), [good, next]);
    assert_whole(&bucket).await;
    let left: Vec<_> = bucket
        .store()
        .list(&format!("backups/{frozen}/"))
        .try_collect()
        .await
        .unwrap();
    assert_eq!(left.len(), 1, "only its fence: {left:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_writer_frozen_while_it_copies_leaves_no_wrong_backup() {
    a_frozen_writer(false).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_writer_frozen_at_its_manifest_leaves_no_wrong_backup() {
    a_frozen_writer(true).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_prune_stops_in_order_and_the_next_goes_on() {
    let (bucket, fleet) = fleet().await;
    let ids: Vec<String> = (0..2).map(|_| backup(&fleet)).collect();
    let hold = bucket
        .server()
        .hold(Operation::Delete, When::Before, |_| true);
    let args = ["prune", "--keep-full", "1", "--yes", "--output", "json"];
    let pruner = spawn(&fleet, &args);
    hold.reached().await;
    // One that prunes holds the lease of whoever deletes.
    let other = json(&fleet, &["prune", "--keep-full", "1", "--yes"]);
    assert_eq!(other.code, 12, "{other:?}");
    signal(pruner.id(), Signal::INT);
    tokio::time::sleep(Duration::from_millis(300)).await;
    hold.release();
    let run = end(pruner).await;
    assert_eq!(run.code, 130, "{run:?}");
    assert_eq!(run.result()["error"]["changed"], true, "{run:?}");
    assert_eq!(listed(&fleet, "complete"), ids[1..]);
    assert_eq!(listed(&fleet, "deleted"), ids[..1]);
    assert_whole(&bucket).await;
    let next = json(&fleet, &["prune", "--keep-full", "1", "--yes"])
        .good()
        .result();
    assert_eq!(next["plan"]["removed"][0]["why"], "leftover", "{next}");
    let left: Vec<_> = bucket
        .store()
        .list(&format!("backups/{}/", ids[0]))
        .try_collect()
        .await
        .unwrap();
    assert_eq!(left.len(), 1, "only its tombstone: {left:?}");
    assert_whole(&bucket).await;
}
