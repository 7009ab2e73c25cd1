//! Transactions that meet the lock, and XA.

use std::time::{Duration, Instant};

use crate::farm::{Farm, LOCK, MOMENT, PROBE, forbidden, ok};

async fn half_a_transfer(farm: &Farm) -> support::raw::Raw {
    let mut session = farm.bank(1).await;
    ok(&mut session, "BEGIN").await;
    ok(
        &mut session,
        "UPDATE account SET balance = balance - 5 WHERE id = 1",
    )
    .await;
    ok(&mut farm.postgres(0).await, LOCK).await;
    farm.until(1, true, MOMENT).await;
    session
}

/// LOCK waits for nobody, and COMMIT of an open transaction changes the nodes under it.
pub(crate) async fn commit_passes(farm: &mut Farm) {
    let mut session = half_a_transfer(farm).await;
    let reply = ok(&mut session, "COMMIT").await;
    assert_eq!((reply.tags(), reply.ready()), (vec!["COMMIT"], Some('I')));
    assert_eq!(farm.sum().await, 795);
    assert!(farm.probe(1).await.is_some());
}

/// `E` is said, and yet the next statement is done, and COMMIT commits the half.
pub(crate) async fn a_refused_statement_does_not_abort(farm: &mut Farm) {
    let mut session = half_a_transfer(farm).await;
    let second = "UPDATE account SET balance = balance + 5 WHERE id = 2";
    let reply = session.query(second).await.unwrap();
    let (code, text) = forbidden("READ_ONLY", &farm.class("Update"));
    assert_eq!(reply.error(), Some((code.as_str(), text.as_str())));
    assert_eq!(reply.ready(), Some('E'));
    let reply = ok(&mut session, "SELECT count(*) FROM account").await;
    assert_eq!((reply.value(), reply.ready()), (Some("8"), Some('T')));
    let reply = ok(&mut session, "COMMIT").await;
    assert_eq!((reply.tags(), reply.ready()), (vec!["COMMIT"], Some('I')));
    assert_eq!(farm.sum().await, 795);

    // Straight from `E` as well.
    let mut session = farm.bank(0).await;
    ok(&mut session, "BEGIN").await;
    let reply = session
        .query("INSERT INTO account VALUES (20, 100)")
        .await
        .unwrap();
    assert_eq!(reply.ready(), Some('E'));
    assert_eq!(ok(&mut session, "COMMIT").await.tags(), ["COMMIT"]);
    assert!(session.query(PROBE).await.unwrap().error().is_some());
    assert_eq!(farm.rows(20, 20).await, 0);
}

/// Between PREPARE and COMMIT PREPARED, on both nodes, with gids of Atomikos.
pub(crate) async fn prepared_branches_are_seen(farm: &mut Farm) {
    let until = Instant::now() + Duration::from_mins(1);
    let load = async {
        let mut session = farm.bank(0).await;
        let mut count = 0_u32;
        while Instant::now() < until {
            for sql in [
                "BEGIN",
                "UPDATE account SET balance = balance - 1 WHERE id = 1",
                "UPDATE account SET balance = balance + 1 WHERE id = 2",
                "COMMIT",
            ] {
                // About one of some hundreds is refused by the clock.
                let reply = session.query(sql).await.unwrap();
                if reply.error().is_some() {
                    println!("  {sql}: {:?}", reply.error());
                    let _ = session.query("ROLLBACK").await;
                    break;
                }
            }
            count += 1;
        }
        count
    };
    let watch = async {
        let node = farm.nodes[0].connect("bank_0").await;
        while Instant::now() < until {
            let rows = node
                .query("SELECT gid FROM pg_prepared_xacts", &[])
                .await
                .unwrap();
            if let Some(row) = rows.first() {
                return row.get::<_, String>(0);
            }
        }
        panic!("no prepared branch was ever seen");
    };
    let gid = tokio::select! {
        gid = watch => gid,
        count = load => panic!("{count} transfers, and no prepared branch was seen"),
    };
    assert!(gid.starts_with("1096044365_"), "{gid}");
    assert_eq!(gid.split('_').count(), 3, "{gid}");
    // What was under way when its client went: committed or rolled back, nothing is left.
    let begun = Instant::now();
    while farm.ask(0, "SELECT count(*) FROM pg_prepared_xacts").await != "0" {
        assert!(begun.elapsed() < Duration::from_mins(1));
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
}
