//! LOCK, UNLOCK, and the probe.

use std::time::{Duration, Instant};

use futures_util::FutureExt as _;

use crate::farm::{Farm, LOCK, MOMENT, PROBE, UNLOCK, forbidden, ok, refused};

const NOT_LOCKED: &str = "Cluster is not locked.";

pub(crate) async fn probe_of_an_open_cluster_does_nothing(farm: &mut Farm) {
    for i in 0..2 {
        let reply = ok(&mut farm.postgres(i).await, PROBE).await;
        assert_eq!(reply.tags(), ["SUCCESS"]);
        assert_eq!(reply.ready(), Some('I'));
        assert!(reply.columns().is_empty());
    }
    let listed = ok(&mut farm.postgres(0).await, "SHOW COMPUTE NODES").await;
    assert!(
        listed
            .rows()
            .iter()
            .all(|row| row[7].as_deref() == Some("")),
        "{listed:?}"
    );
    assert_eq!(farm.state(), "OK");
}

pub(crate) async fn unlock_of_an_open_cluster_is_refused(farm: &mut Farm) {
    let (code, text) = refused(&mut farm.postgres(0).await, UNLOCK).await;
    assert_eq!((code.as_str(), text.as_str()), ("58000", NOT_LOCKED));
}

pub(crate) async fn without_timeout_it_fails(farm: &mut Farm) {
    let mut session = farm.postgres(0).await;
    for sql in [LOCK, UNLOCK] {
        let sql = sql.split(" TIMEOUT").next().unwrap();
        let (code, text) = refused(&mut session, sql).await;
        assert_eq!(code, "58000");
        let cause = "Unknown exception.\nMore details: java.lang.NumberFormatException: Cannot parse null string";
        assert!(text.starts_with(cause), "{text}");
    }
    assert_eq!(farm.state(), "OK");
}

pub(crate) async fn other_forms_are_no_grammar(farm: &mut Farm) {
    let mut session = farm.postgres(0).await;
    let (code, text) = refused(&mut session, "LOCK CLUSTER WITH WRITE TIMEOUT 1000").await;
    assert_eq!(code, "99999");
    let cause = "You have an error in your SQL syntax: LOCK CLUSTER WITH WRITE TIMEOUT 1000";
    assert!(text.starts_with(cause), "{text}");
    let other = LOCK.replace("WRITE", "NOSUCH");
    let (code, text) = refused(&mut session, &other).await;
    assert_eq!(code, "58000");
    assert!(
        text.contains("SPI-00001") && text.contains("with type 'NOSUCH'"),
        "{text}"
    );
}

pub(crate) async fn not_within_a_transaction(farm: &mut Farm) {
    let mut session = farm.bank(0).await;
    assert_eq!(ok(&mut session, "BEGIN").await.ready(), Some('T'));
    let reply = session.query(LOCK).await.unwrap();
    let text =
        "Unsupported SQL operation: Non-query DistSQL is not supported within a transaction.";
    assert_eq!(reply.error(), Some(("0A000", text)));
    assert_eq!(reply.ready(), Some('E'));
    let reply = ok(&mut session, "ROLLBACK").await;
    assert_eq!((reply.tags(), reply.ready()), (vec!["ROLLBACK"], Some('I')));
    assert_eq!(farm.state(), "OK");
}

pub(crate) async fn through_one_proxy_for_all(farm: &mut Farm) {
    let (mut first, mut second) = (farm.postgres(0).await, farm.postgres(1).await);
    assert_eq!(ok(&mut first, LOCK).await.tags(), ["SUCCESS"]);
    assert_eq!(farm.state(), "READ_ONLY");
    for i in 0..2 {
        farm.until(i, true, MOMENT).await;
    }
    for session in [&mut first, &mut second] {
        assert_eq!(
            refused(session, LOCK).await,
            forbidden("READ_ONLY", "LockClusterStatement")
        );
        assert_eq!(
            refused(session, PROBE).await,
            forbidden("READ_ONLY", "LabelComputeNodeStatement")
        );
    }
    assert_eq!(ok(&mut second, UNLOCK).await.tags(), ["SUCCESS"]);
    for i in 0..2 {
        farm.until(i, false, MOMENT).await;
    }
    for session in [&mut first, &mut second] {
        let (code, text) = refused(session, UNLOCK).await;
        assert_eq!((code.as_str(), text.as_str()), ("58000", NOT_LOCKED));
    }
}

/// Through one proxy: the second is refused, by one of two texts.
pub(crate) async fn one_of_two_at_once(farm: &mut Farm) {
    let (mut first, mut second) = (farm.postgres(0).await, farm.postgres(0).await);
    let (first, second) = tokio::join!(first.query(LOCK), second.query(LOCK));
    let replies = [first.unwrap(), second.unwrap()];
    let said = replies.iter().filter(|reply| reply.tags() == ["SUCCESS"]);
    let errors: Vec<_> = replies.iter().filter_map(|reply| reply.error()).collect();
    assert!(
        said.count() + errors.len() == 2 && errors.len() <= 1,
        "{replies:?}"
    );
    for (code, text) in errors {
        let words = text == "Cluster is already locked." || text.contains("READ_ONLY");
        assert!(code == "58000" && words, "{text}");
    }
    assert_eq!(farm.state(), "READ_ONLY");
    // One UNLOCK is enough.
    farm.until(0, true, MOMENT).await;
    ok(&mut farm.postgres(0).await, UNLOCK).await;
    farm.until(0, false, MOMENT).await;
}

pub(crate) async fn others_follow_within_a_moment(farm: &mut Farm) {
    let (mut locked, mut opened) = (Vec::new(), Vec::new());
    for round in 0..10 {
        let mut session = farm.postgres(round % 2).await;
        ok(&mut session, LOCK).await;
        for i in 0..2 {
            locked.push(farm.until(i, true, MOMENT).await.as_millis());
        }
        ok(&mut session, UNLOCK).await;
        for i in 0..2 {
            opened.push(farm.until(i, false, MOMENT).await.as_millis());
        }
    }
    locked.sort_unstable();
    opened.sort_unstable();
    println!(
        "  after the reply, log-in included: refused after {locked:?} ms, open after {opened:?} ms"
    );
}

pub(crate) async fn it_outlives_its_session(farm: &mut Farm) {
    let mut session = farm.postgres(0).await;
    ok(&mut session, LOCK).await;
    drop(session);
    tokio::time::sleep(Duration::from_secs(2)).await;
    for i in 0..2 {
        farm.until(i, true, MOMENT).await;
    }
    assert_eq!(farm.state(), "READ_ONLY");
    ok(&mut farm.postgres(1).await, UNLOCK).await;
}

/// Nobody takes back what was asked for.
pub(crate) async fn it_lands_without_its_client(farm: &mut Farm) {
    let mut session = farm.postgres(0).await;
    // Sent, and not waited for.
    let asked = session.query(LOCK).now_or_never();
    assert!(asked.is_none(), "it was answered at once: {asked:?}");
    drop(session);
    for i in 0..2 {
        farm.until(i, true, MOMENT).await;
    }
    ok(&mut farm.postgres(1).await, UNLOCK).await;
    farm.until(0, false, MOMENT).await;
}

/// Says a statement that waits for the mutex in vain: about as long as it says itself.
async fn in_vain(farm: &Farm, sql: &str) {
    let sql = sql.replace("3000", "1500");
    let mut session = farm.postgres(0).await;
    let begun = Instant::now();
    assert_eq!(ok(&mut session, &sql).await.tags(), ["SUCCESS"]);
    assert!(
        begun.elapsed() >= Duration::from_millis(1400),
        "{:?}",
        begun.elapsed()
    );
}

pub(crate) async fn without_the_mutex_lock_does_nothing(farm: &mut Farm) {
    let held = farm.hold_mutex();
    in_vain(farm, LOCK).await;
    assert_eq!(farm.state(), "OK");
    assert_eq!(farm.probe(0).await, None);
    drop(held);
    ok(&mut farm.postgres(0).await, LOCK).await;
    farm.until(0, true, MOMENT).await;
}

pub(crate) async fn without_the_mutex_unlock_does_nothing(farm: &mut Farm) {
    ok(&mut farm.postgres(0).await, LOCK).await;
    farm.until(0, true, MOMENT).await;
    let held = farm.hold_mutex();
    in_vain(farm, UNLOCK).await;
    assert_eq!(farm.state(), "READ_ONLY");
    assert!(farm.probe(0).await.is_some());
    drop(held);
    ok(&mut farm.postgres(0).await, UNLOCK).await;
    farm.until(0, false, MOMENT).await;
}
