//! Points as a tool makes them that trusts the lock: it is taken, every proxy refuses, nobody holds a transaction id;
//! then the nodes are marked, 50 ms apart, and nothing is proved. Batches pass the lock: at least one of the points
//! cuts a transfer in half.

use std::time::{Duration, Instant};

use support::bank::wire::Session;
use support::bank::{Bank, BankOptions, Diary, Mix, Window, check};
use support::postgres::query_one;
use support::roll::{self, Copy};
use support::sharded::{SHARD, ShardedCluster, ShardedOptions};
use tokio_postgres::Client;

use crate::{say, seed};

const POINTS: usize = 60;
/// How long the lock may be held for one point.
const DRAIN: Duration = Duration::from_secs(1);

async fn said(session: &mut Session, sql: &str) {
    session
        .query(sql)
        .await
        .unwrap_or_else(|error| panic!("{sql}: {error}"));
}

/// Until each proxy refuses (or accepts) what writes nothing.
async fn until(sessions: &mut [Session], locked: bool) {
    let probe = "LABEL COMPUTE NODE \"gs_pitr_probe\" WITH probe";
    for session in sessions {
        let deadline = Instant::now() + Duration::from_secs(10);
        while session
            .query(probe)
            .await
            .is_err_and(|error| error.is_lock())
            != locked
        {
            assert!(Instant::now() < deadline, "a proxy is not locked: {locked}");
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
    }
}

/// Until nobody is seen to hold a transaction id, at one look at each node.
async fn drained(nodes: &[Client]) {
    let holders = "SELECT count(*) FROM pg_locks WHERE locktype = 'transactionid' AND mode = 'ExclusiveLock' AND granted";
    let deadline = Instant::now() + DRAIN;
    for node in nodes {
        while Instant::now() < deadline && query_one(node, holders).await != "0" {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    }
}

async fn mark(sessions: &mut [Session], nodes: &[Client], point: &str) {
    said(
        &mut sessions[0],
        "LOCK CLUSTER WITH LOCK_STRATEGY(TYPE(NAME=\"WRITE\")) TIMEOUT 3000",
    )
    .await;
    until(sessions, true).await;
    drained(nodes).await;
    let sql = format!("SELECT pg_create_restore_point('{point}')");
    for (number, node) in nodes.iter().enumerate() {
        if number > 0 {
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        query_one(node, &sql).await;
    }
    said(&mut sessions[0], "UNLOCK CLUSTER TIMEOUT 3000").await;
    until(sessions, false).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn without_the_proof_batches_break_a_point() {
    let cluster = ShardedCluster::start(ShardedOptions {
        name: "naive",
        settings: roll::archiving().settings,
        ..ShardedOptions::default()
    })
    .await;
    for database in cluster.databases() {
        roll::directory(&database.root().join("archive"));
    }
    let copies: Vec<_> = cluster.databases().into_iter().map(Copy::of).collect();
    let options = BankOptions {
        seed: seed(),
        mix: Mix {
            simple: 2,
            batch: 4,
            ..Mix::default()
        },
        pause: Duration::from_millis(20),
        passing_pause: Duration::from_millis(20),
        shift: 0,
    };
    let bank = Bank::open(&cluster.ways(), &options);
    bank.goes_on(50).await;
    let mut sessions = Vec::new();
    for number in 0..cluster.proxy_count() {
        sessions.push(
            Session::open(&cluster.access(number, "postgres"))
                .await
                .unwrap(),
        );
    }
    let mut nodes = Vec::new();
    for database in cluster.databases() {
        nodes.push(database.connect(SHARD).await);
    }
    let mut points = Vec::new();
    for number in 0..POINTS {
        let point = format!("naive {number}");
        mark(&mut sessions, &nodes, &point).await;
        bank.goes_on(5).await;
        points.push(point);
    }
    let diary = bank.close().await;
    say(&diary.describe());
    for (copy, database) in copies.iter().zip(cluster.databases()) {
        copy.archived(database).await;
    }
    let begun = Instant::now();
    for (number, point) in points.iter().enumerate() {
        let at = roll::reach(&copies, point, SHARD).await;
        let found = check(&at, &Diary::default(), Window::ANY).await;
        roll::leave(&copies, at).await;
        if let Err(wrong) = found {
            let took = begun.elapsed();
            say(&format!(
                "point {} of {POINTS}, found in {took:.1?}: {wrong}",
                number + 1
            ));
            return;
        }
    }
    panic!("{POINTS} points without a proof under batches, and none of them is broken");
}
