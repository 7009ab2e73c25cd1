//! What is in the way of a proof is named, and what becomes of the backup.

use std::time::Duration;

use serde_json::Value;
use support::bucket::Bucket;
use support::fleet::{Fleet, Run};
use support::postgres::{Cluster, Installation, query_one};
use support::roll::{archiving, directory};

use crate::transfers::{self, run};

fn database(fleet: &Fleet, number: usize) -> &Cluster {
    fleet.hosts[number].cluster.as_ref().unwrap()
}

fn backup(fleet: &Fleet, more: &[&str]) -> Run {
    let nodes = fleet.addresses(&[0, 1]);
    let args = ["backup", "--nodes", &nodes, "--output", "json"];
    let args: Vec<_> = args.iter().chain(more).copied().collect();
    fleet.run(&args)
}

fn has(text: &str, words: &[&str]) {
    for word in words {
        assert!(text.contains(word), "`{word}` is not in: {text}");
    }
}

/// It is per node, and says why, wherever one looks.
fn unproved(fleet: &Fleet, run: Run, words: &[&str]) {
    let result = run.good().result();
    assert_eq!(result["consistency"], "per-node", "{result}");
    has(result["unproved"].as_str().unwrap(), words);
    let id = result["backup_id"].as_str().unwrap();
    has(&fleet.run(&["show", id]).good().stdout, words);
    let shown = fleet.run(&["show", "--output", "json"]).good().result();
    let listed = shown["backups"].as_array().unwrap().last().unwrap();
    has(listed["unproved"].as_str().unwrap(), words);
}

fn refused(run: &Run, words: &[&str]) {
    assert_eq!(run.code, 12, "{run:?}");
    let error = &run.result()["error"];
    has(error["message"].as_str().unwrap(), words);
    assert_eq!(error["kind"], "conflict");
}

async fn a_long_transaction(fleet: &Fleet) {
    let client = database(fleet, 1).connect("postgres").await;
    let begin =
        "SET application_name = 'month end'; BEGIN; UPDATE account SET balance = 0 WHERE id = 7";
    run(&client, begin).await.unwrap();
    let pid = query_one(&client, "SELECT pg_backend_pid()").await;
    let address = &fleet.hosts[1].agent.address;
    let words = [
        pid.as_str(),
        "month end",
        "idle in transaction",
        address,
        "has held a transaction id for",
    ];
    unproved(fleet, backup(fleet, &["--point-timeout", "2"]), &words);
    let strict = ["--point-timeout", "2", "--require-cluster"];
    let made = |fleet: &Fleet| -> usize {
        let shown = fleet.run(&["show", "--output", "json"]).good().result();
        let all = shown["backups"].as_array().unwrap();
        all.iter()
            .filter(|backup| backup["status"] == "complete")
            .count()
    };
    let before = made(fleet);
    let failed = backup(fleet, &strict);
    refused(&failed, &words);
    assert!(!failed.stdout.contains("UPDATE"), "a statement was told");
    assert_eq!(made(fleet), before, "no backup came of it");
    for number in 0..2 {
        let slots = "SELECT count(*) FROM pg_replication_slots";
        assert_eq!(
            database(fleet, number).query_one("postgres", slots).await,
            "0"
        );
    }
    run(&client, "ROLLBACK").await.unwrap();
    let result = backup(fleet, &strict).good().result();
    assert_eq!(result["consistency"], "cluster", "{result}");
    assert_eq!(result["unproved"], Value::Null);
}

async fn a_transaction_in_doubt(fleet: &Fleet) {
    let client = database(fleet, 0).connect("postgres").await;
    let sql = "BEGIN; UPDATE account SET balance = 0 WHERE id = 7; PREPARE TRANSACTION 'lost one'";
    run(&client, sql).await.unwrap();
    // Long enough to be in doubt.
    tokio::time::sleep(Duration::from_millis(5200)).await;
    let words = [
        "lost one",
        &fleet.hosts[0].agent.address,
        "has been prepared for",
    ];
    unproved(fleet, backup(fleet, &["--point-timeout", "1"]), &words);
    refused(
        &backup(fleet, &["--point-timeout", "1", "--require-cluster"]),
        &words,
    );
    let accepted = backup(fleet, &["--accept-in-doubt", "--require-cluster"]).good();
    let result = accepted.result();
    assert_eq!(result["consistency"], "cluster", "{result}");
    let listed = &result["proof"]["in_doubt"][0];
    assert_eq!(
        (&listed["gid"], &listed["database"]),
        (&"lost one".into(), &"postgres".into())
    );
    assert!(accepted.stdout.contains("in doubt on node"), "{accepted:?}");
    let id = result["backup_id"].as_str().unwrap();
    has(
        &fleet.run(&["show", id]).good().stdout,
        &["in doubt", "lost one"],
    );
    run(&client, "COMMIT PREPARED 'lost one'").await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_in_the_way_is_named() {
    let bucket = Bucket::double().await;
    let mut fleet = Fleet::new("obstacles", &bucket.config());
    for name in ["node1", "node2"] {
        let host = fleet.add_database(name, &Installation::newest(), archiving());
        directory(&fleet.hosts[host].root.join("archive"));
        transfers::prepare(database(&fleet, host)).await;
    }
    a_long_transaction(&fleet).await;
    a_transaction_in_doubt(&fleet).await;
    let one = fleet.addresses(&[0]);
    let args = ["backup", "--nodes", &one, "--output", "json"];
    let result = fleet.run(&args).good().result();
    assert_eq!(
        result["consistency"], "cluster",
        "a single node has nothing to cut"
    );
    let lock = fleet.run(&["backup", "--nodes", &one, "--lock", "always"]);
    assert_eq!(lock.code, 2, "{lock:?}");
    has(&lock.stderr, &["needs a proxy"]);
}
