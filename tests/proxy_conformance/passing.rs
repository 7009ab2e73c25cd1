//! What each lock lets through.

use support::raw::Raw;

use crate::farm::{Farm, LOCK, LOCK_ALL, MOMENT, PROBE, UNLOCK, forbidden, ok, refused};

async fn locked(farm: &Farm, sql: &str) {
    ok(&mut farm.postgres(0).await, sql).await;
    for i in 0..2 {
        farm.until(i, true, MOMENT).await;
    }
}

pub(crate) async fn changes_are_refused(farm: &mut Farm) {
    let mut sessions = [farm.bank(0).await, farm.bank(1).await];
    locked(farm, LOCK).await;
    for session in &mut sessions {
        for (sql, class) in [
            ("INSERT INTO account VALUES (99, 1)", "Insert"),
            (
                "UPDATE account SET balance = balance WHERE id = 1",
                "Update",
            ),
            ("DELETE FROM account WHERE id = 99", "Delete"),
            ("CREATE TABLE x (id int)", "CreateTable"),
            ("ALTER TABLE account ADD COLUMN x int", "AlterTable"),
            ("DROP TABLE account", "DropTable"),
            ("CREATE INDEX x ON account (balance)", "CreateIndex"),
            ("TRUNCATE account", "Truncate"),
            ("CREATE DATABASE b2", "CreateDatabase"),
            ("DROP DATABASE bank", "DropDatabase"),
            ("PREPARE p AS SELECT 1", "Prepare"),
            ("EXECUTE p", "Execute"),
        ] {
            let class = farm.class(class);
            assert_eq!(
                refused(session, sql).await,
                forbidden("READ_ONLY", &class),
                "{sql}"
            );
        }
        for (sql, class) in [
            (PROBE, "LabelComputeNodeStatement"),
            ("IMPORT METADATA 'e30='", "ImportMetaDataStatement"),
            (
                "REFRESH DATABASE METADATA bank",
                "RefreshDatabaseMetaDataStatement",
            ),
        ] {
            assert_eq!(
                refused(session, sql).await,
                forbidden("READ_ONLY", class),
                "{sql}"
            );
        }
    }
    assert_eq!(farm.sum().await, 800);
}

async fn all(session: &mut Raw, statements: &[&str]) {
    for sql in statements {
        ok(session, sql).await;
    }
}

pub(crate) async fn the_rest_passes(farm: &mut Farm) {
    locked(farm, LOCK).await;
    let mut session = farm.bank(1).await;
    let statements = [
        "SELECT * FROM account ORDER BY id",
        "SELECT * FROM account WHERE id = 1 FOR UPDATE",
        "SELECT pg_current_xact_id()",
        "SET application_name = 'x'",
        "BEGIN",
        "COMMIT",
        "BEGIN",
        "ROLLBACK",
        "VACUUM account",
        "ANALYZE account",
        "SHOW COMPUTE NODES",
        "EXPORT METADATA",
        "EXPORT STORAGE NODES",
        "SHOW STORAGE UNITS FROM bank",
        "SHOW GLOBAL CLOCK RULE",
    ];
    all(&mut session, &statements).await;
    // Which is executed, by the first node at least.
    let update = "EXPLAIN ANALYZE UPDATE account SET balance = balance + 1 WHERE id = 2";
    ok(&mut session, update).await;
    println!(
        "  the sum after an UPDATE of one that was explained: {}",
        farm.sum().await
    );
}

pub(crate) async fn read_write_refuses_nearly_all(farm: &mut Farm) {
    let mut sessions = [farm.bank(0).await, farm.bank(1).await];
    locked(farm, LOCK_ALL).await;
    assert_eq!(farm.state(), "UNAVAILABLE");
    for session in &mut sessions {
        for (sql, class) in [
            ("SELECT * FROM account", "Select"),
            ("SET x = 1", "Set"),
            ("BEGIN", "BeginTransaction"),
            ("COMMIT", "Commit"),
            ("ROLLBACK", "Rollback"),
            ("INSERT INTO account VALUES (99, 1)", "Insert"),
            ("DROP DATABASE bank", "DropDatabase"),
        ] {
            let class = farm.class(class);
            assert_eq!(
                refused(session, sql).await,
                forbidden("UNAVAILABLE", &class),
                "{sql}"
            );
        }
        let probe = forbidden("UNAVAILABLE", "LabelComputeNodeStatement");
        assert_eq!(refused(session, PROBE).await, probe);
        let lock = forbidden("UNAVAILABLE", "LockClusterStatement");
        assert_eq!(refused(session, LOCK).await, lock);
    }
}

pub(crate) async fn read_write_passes_these(farm: &mut Farm) {
    locked(farm, LOCK_ALL).await;
    // Logging in, too.
    let mut session = farm.postgres(1).await;
    let statements = [
        "SHOW COMPUTE NODES",
        "EXPORT METADATA",
        "EXPORT STORAGE NODES",
        "SHOW STORAGE UNITS FROM bank",
        UNLOCK,
    ];
    all(&mut session, &statements).await;
    farm.until(0, false, MOMENT).await;
}

/// A transaction that holds a node's number can neither commit nor roll back: it holds it until its client goes.
pub(crate) async fn read_write_keeps_transactions_open(farm: &mut Farm) {
    let held = "SELECT count(*) FROM pg_locks JOIN pg_stat_activity USING (pid) \
                WHERE locktype = 'transactionid' AND mode = 'ExclusiveLock' AND granted AND backend_type = 'client backend'";
    let mut session = farm.bank(0).await;
    all(
        &mut session,
        &[
            "BEGIN",
            "UPDATE account SET balance = balance + 1 WHERE id = 2",
        ],
    )
    .await;
    assert_eq!(farm.ask(0, held).await, "1");
    locked(farm, LOCK_ALL).await;
    for sql in ["COMMIT", "ROLLBACK"] {
        refused(&mut session, sql).await;
    }
    assert_eq!(farm.ask(0, held).await, "1");
    drop(session);
    let begun = std::time::Instant::now();
    while farm.ask(0, held).await != "0" {
        assert!(begun.elapsed() < MOMENT);
        tokio::time::sleep(std::time::Duration::from_millis(50)).await;
    }
    assert_eq!(farm.sum().await, 800);
}
