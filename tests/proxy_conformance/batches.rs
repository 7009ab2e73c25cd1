//! Three and more executions of one statement before one Sync pass the lock.

use support::raw::{Heard, Raw, Reply};

use crate::farm::{Farm, LOCK, MOMENT, forbidden, ok};

const INSERT: &str = "INSERT INTO account VALUES ($1, 1)";
const INT4: u32 = 23;

async fn locked(farm: &Farm) -> Raw {
    let session = farm.bank(1).await;
    ok(&mut farm.postgres(0).await, LOCK).await;
    farm.until(1, true, MOMENT).await;
    session
}

async fn insert(session: &mut Raw, from: i64, count: usize, types: &[u32]) -> Reply {
    let rows: Vec<[i64; 1]> = (from..).take(count).map(|id| [id]).collect();
    let rows: Vec<&[i64]> = rows.iter().map(<[i64; 1]>::as_slice).collect();
    session
        .batch(INSERT, types, &rows)
        .await
        .expect("an answer")
}

pub(crate) async fn one_and_two_are_refused(farm: &mut Farm) {
    let mut session = locked(farm).await;
    for count in [1, 2] {
        let reply = insert(&mut session, 1001, count, &[INT4]).await;
        let (code, text) = forbidden("READ_ONLY", &farm.class("Insert"));
        assert_eq!(reply.error(), Some((code.as_str(), text.as_str())));
        // Not even ParseComplete.
        assert!(
            matches!(reply.0.as_slice(), [Heard::Error(_), Heard::Ready('I')]),
            "{reply:?}"
        );
    }
    assert_eq!(farm.rows(1001, 1010).await, 0);
}

pub(crate) async fn three_pass(farm: &mut Farm) {
    let mut session = locked(farm).await;
    let reply = insert(&mut session, 1001, 3, &[INT4]).await;
    let once = [Heard::Other('2'), Heard::Tag("INSERT 0 1".into())];
    let mut expected = vec![Heard::Other('1')];
    for _ in 0..3 {
        expected.extend(once.clone());
    }
    expected.push(Heard::Ready('I'));
    assert_eq!(reply.0, expected);
    assert_eq!(farm.rows(1001, 1003).await, 3);
}

pub(crate) async fn three_in_a_transaction_pass(farm: &mut Farm) {
    let mut session = locked(farm).await;
    ok(&mut session, "BEGIN").await;
    let sql = "UPDATE account SET balance = balance + 1 WHERE id = $1";
    let reply = session
        .batch(sql, &[INT4], &[&[1], &[2], &[3]])
        .await
        .unwrap();
    assert_eq!(reply.tags(), ["UPDATE 1"; 3]);
    assert_eq!(reply.ready(), Some('T'));
    assert_eq!(ok(&mut session, "COMMIT").await.tags(), ["COMMIT"]);
    assert_eq!(farm.sum().await, 803);
}

/// Parse that leaves it to the server to find the type of the sharding column: it fails, and not for the lock.
pub(crate) async fn without_types_they_fail_otherwise(farm: &mut Farm) {
    let mut session = locked(farm).await;
    let reply = insert(&mut session, 1001, 3, &[]).await;
    let (_, text) = reply.error().expect("it fails");
    assert!(!text.contains("cluster state"), "{text}");
    println!("  {:?}", reply.error());
    assert_eq!(farm.rows(1001, 1010).await, 0);
}
