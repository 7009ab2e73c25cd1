//! LOCK, UNLOCK, and what passes them. The texts are those of a running 5.5.2.

use std::time::{Duration, Instant};

use support::proxy::{ClusterState, Delays, ProxyFarm, ProxyFarmOptions, Version};
use tokio_postgres::Client;

use super::bank::*;

fn read_only(class: &str) -> (String, String) {
    let message =
        format!("The cluster state is READ_ONLY, can not support SQL statement '{class}'.");
    ("58000".to_owned(), message)
}

fn unavailable(class: &str) -> (String, String) {
    let (state, message) = read_only(class);
    (state, message.replace("READ_ONLY", "UNAVAILABLE"))
}

#[tokio::test]
async fn the_write_lock_refuses_changes_through_every_proxy_and_passes_the_rest() {
    let nodes = Nodes::start(2).await;
    let farm = ProxyFarm::start(nodes.options());
    let (first, second) = (client(&farm, 0).await, client(&farm, 1).await);
    run(&first, "INSERT INTO account VALUES (1, 100), (2, 100)").await;
    for client in [&first, &second] {
        assert!(run(client, PROBE).await.is_empty());
    }
    run(&first, LOCK).await;
    assert_eq!(farm.state(), ClusterState::ReadOnly);
    for client in [&first, &second] {
        for (sql, class) in [
            (LOCK, "LockClusterStatement"),
            (PROBE, "LabelComputeNodeStatement"),
            (
                "INSERT INTO account VALUES (9, 1)",
                "PostgreSQLInsertStatement",
            ),
            (
                "UPDATE account SET balance = 0 WHERE id = 1",
                "PostgreSQLUpdateStatement",
            ),
            ("DELETE FROM account", "PostgreSQLDeleteStatement"),
            ("CREATE TABLE x (id int)", "PostgreSQLCreateTableStatement"),
            ("TRUNCATE account", "PostgreSQLTruncateStatement"),
            ("PREPARE p AS SELECT 1", "PostgreSQLPrepareStatement"),
            ("EXECUTE p", "PostgreSQLExecuteStatement"),
            ("IMPORT METADATA 'e30='", "ImportMetaDataStatement"),
            ("DROP DATABASE bank", "PostgreSQLDropDatabaseStatement"),
            ("CREATE DATABASE b2", "PostgreSQLCreateDatabaseStatement"),
            (
                "REFRESH DATABASE METADATA bank",
                "RefreshDatabaseMetaDataStatement",
            ),
        ] {
            assert_eq!(refused(client, sql).await, read_only(class), "{sql}");
        }
        for sql in [
            "SELECT * FROM account ORDER BY id",
            "SELECT * FROM account WHERE id = 1 FOR UPDATE",
            "SELECT pg_current_xact_id()",
            "BEGIN",
            "COMMIT",
            "BEGIN",
            "ROLLBACK",
            "SET application_name = 'x'",
            "EXPLAIN ANALYZE UPDATE account SET balance = balance WHERE id = 1",
            "VACUUM account",
            "ANALYZE account",
            "SHOW COMPUTE NODES",
            "EXPORT METADATA",
            "EXPORT STORAGE NODES",
        ] {
            run(client, sql).await;
        }
    }
    run(&second, UNLOCK).await;
    let not_locked = ("58000".to_owned(), "Cluster is not locked.".to_owned());
    assert_eq!(refused(&first, UNLOCK).await, not_locked);
    for client in [&first, &second] {
        run(client, PROBE).await;
        run(
            client,
            "UPDATE account SET balance = balance + 1 WHERE id = 2",
        )
        .await;
    }
    assert_eq!(nodes.sum().await, 202);
}

#[tokio::test]
async fn the_read_write_lock_passes_next_to_nothing() {
    let nodes = Nodes::start(1).await;
    let farm = ProxyFarm::start(nodes.options());
    let (first, second) = (
        client(&farm, 0).await,
        client_in(&farm, 1, "postgres").await,
    );
    run(&first, "BEGIN").await;
    run(&second, LOCK_ALL).await;
    assert_eq!(farm.state(), ClusterState::Unavailable);
    for (sql, class) in [
        (PROBE, "LabelComputeNodeStatement"),
        ("SELECT * FROM account", "PostgreSQLSelectStatement"),
        ("SET x = 1", "PostgreSQLSetStatement"),
        ("COMMIT", "PostgreSQLCommitStatement"),
        ("ROLLBACK", "PostgreSQLRollbackStatement"),
        ("DROP DATABASE bank", "PostgreSQLDropDatabaseStatement"),
    ] {
        assert_eq!(refused(&first, sql).await, unavailable(class), "{sql}");
    }
    // Connecting works.
    let third = client(&farm, 0).await;
    for sql in [
        "SHOW COMPUTE NODES",
        "EXPORT METADATA",
        "SHOW STORAGE UNITS",
        UNLOCK,
    ] {
        run(&third, sql).await;
    }
    run(&first, "COMMIT").await;
}

#[tokio::test]
async fn a_refused_statement_leaves_its_transaction_and_the_half_is_committed() {
    let nodes = Nodes::start(1).await;
    let farm = ProxyFarm::start(nodes.options());
    let (careless, other) = (client(&farm, 0).await, client(&farm, 1).await);
    run(&careless, "INSERT INTO account VALUES (1, 100), (2, 100)").await;
    run(&careless, "BEGIN").await;
    run(
        &careless,
        "UPDATE account SET balance = balance - 5 WHERE id = 1",
    )
    .await;
    run(&other, LOCK).await;
    let sql = "UPDATE account SET balance = balance + 5 WHERE id = 2";
    assert_eq!(
        refused(&careless, sql).await,
        read_only("PostgreSQLUpdateStatement")
    );
    assert_eq!(
        run(&careless, "SELECT balance FROM account WHERE id = 1").await,
        [["95"]]
    );
    run(&careless, "COMMIT").await;
    assert_eq!(nodes.sum().await, 195);
}

#[tokio::test]
async fn in_a_transaction_the_lock_is_no_statement() {
    let farm = ProxyFarm::start(ProxyFarmOptions::default());
    let client = client_in(&farm, 0, "postgres").await;
    run(&client, "BEGIN").await;
    let message =
        "Unsupported SQL operation: Non-query DistSQL is not supported within a transaction.";
    assert_eq!(
        refused(&client, LOCK).await,
        ("0A000".to_owned(), message.to_owned())
    );
    run(&client, "SHOW COMPUTE NODES").await;
    run(&client, "ROLLBACK").await;
    run(&client, LOCK).await;
}

#[tokio::test]
async fn each_release_has_its_own_forms() {
    let bare = r#"LOCK CLUSTER WITH LOCK_STRATEGY(TYPE(NAME="WRITE"))"#;
    for version in [Version::V5_5_1, Version::V5_5_2, Version::V5_5_3] {
        let farm = ProxyFarm::start(ProxyFarmOptions {
            version,
            ..ProxyFarmOptions::default()
        });
        let client = client_in(&farm, 0, "postgres").await;
        let nodes = run(&client, "SHOW COMPUTE NODES").await;
        if version == Version::V5_5_1 {
            let (state, message) = refused(&client, LOCK).await;
            assert_eq!(state, "99999");
            assert!(message.starts_with("You have an error in your SQL syntax: "));
            assert_eq!(nodes[0].len(), 9);
        } else {
            run(&client, LOCK).await;
            run(&client, UNLOCK).await;
            assert_eq!(nodes[0].len(), 10);
        }
        if version == Version::V5_5_2 {
            let message = "Unknown exception.\nMore details: java.lang.NumberFormatException: Cannot parse null string";
            for sql in [bare, "UNLOCK CLUSTER"] {
                assert_eq!(
                    refused(&client, sql).await,
                    ("58000".into(), message.into())
                );
            }
        } else {
            run(&client, bare).await;
            run(&client, "UNLOCK CLUSTER").await;
        }
        assert_eq!(farm.state(), ClusterState::Ok);
    }
}

#[tokio::test]
async fn without_the_mutex_lock_and_unlock_say_success_and_do_nothing() {
    let farm = ProxyFarm::start(ProxyFarmOptions::default());
    let client = client_in(&farm, 0, "postgres").await;
    for (sql, state) in [(LOCK, ClusterState::Ok), (UNLOCK, ClusterState::ReadOnly)] {
        let held = farm.hold_mutex();
        let started = Instant::now();
        run(&client, sql).await;
        assert!(
            started.elapsed() >= Duration::from_millis(490),
            "it waits for its TIMEOUT"
        );
        assert_eq!(farm.state(), state);
        drop(held);
        run(&client, sql).await;
    }
    assert_eq!(farm.state(), ClusterState::Ok);
}

#[tokio::test]
async fn the_lock_survives_its_client_its_proxy_and_all_proxies() {
    let farm = ProxyFarm::start(ProxyFarmOptions::default());
    let client = client_in(&farm, 0, "postgres").await;
    run(&client, LOCK).await;
    drop(client);
    farm.kill(0);
    assert_eq!(farm.state(), ClusterState::ReadOnly);
    farm.kill(1);
    farm.restart(0);
    farm.restart(1);
    for i in 0..2 {
        let client = client_in(&farm, i, "postgres").await;
        assert_eq!(
            refused(&client, PROBE).await,
            read_only("LabelComputeNodeStatement")
        );
    }
    farm.force_state(ClusterState::Ok);
    run(&client_in(&farm, 1, "postgres").await, PROBE).await;
}

/// Medians and largest of some rounds, in milliseconds.
async fn measure(rounds: usize, mut round: impl AsyncFnMut() -> Duration) -> (f64, f64) {
    let mut took = Vec::new();
    for _ in 0..rounds {
        took.push(round().await.as_secs_f64() * 1000.0);
    }
    took.sort_by(f64::total_cmp);
    (took[rounds / 2], took[rounds - 1])
}

async fn probe_until(client: &Client, open: bool) {
    while ask(client, PROBE).await.is_ok() != open {}
}

#[tokio::test]
async fn the_delays_are_about_those_that_were_measured() {
    let farm = ProxyFarm::start(ProxyFarmOptions {
        delays: Delays::Measured,
        ..ProxyFarmOptions::default()
    });
    let first = client_in(&farm, 0, "postgres").await;
    let second = client_in(&farm, 1, "postgres").await;
    let mut unlock = Vec::new();
    let (median, largest) = measure(40, async || {
        let started = Instant::now();
        run(&first, LOCK).await;
        let took = started.elapsed();
        probe_until(&second, false).await;
        probe_until(&first, false).await;
        let started = Instant::now();
        run(&first, UNLOCK).await;
        unlock.push(started.elapsed());
        probe_until(&second, true).await;
        probe_until(&first, true).await;
        took
    })
    .await;
    // Only lower bounds: what a loaded machine adds is its own.
    assert!(median > 4.0 && largest > 7.0, "LOCK {median} {largest}");
    assert!(unlock.iter().max().unwrap() > &Duration::from_millis(9));
}

#[tokio::test]
async fn some_locks_are_answered_before_the_other_proxy_refuses() {
    let farm = ProxyFarm::start(ProxyFarmOptions {
        delays: Delays::Loaded,
        ..ProxyFarmOptions::default()
    });
    let first = client_in(&farm, 0, "postgres").await;
    let second = client_in(&farm, 1, "postgres").await;
    for _ in 0..200 {
        run(&first, LOCK).await;
        let late = farm.seen(1) == Some(ClusterState::Ok);
        probe_until(&second, false).await;
        // A proxy that has not heard of its own lock refuses to release it.
        probe_until(&first, false).await;
        run(&first, UNLOCK).await;
        probe_until(&second, true).await;
        probe_until(&first, true).await;
        if late {
            return;
        }
    }
    panic!("the other proxy always refused before");
}
