//! Proxies that freeze, die, or lose sight of ZooKeeper.

use std::time::{Duration, Instant};

use support::raw::Raw;

use crate::farm::{Farm, LISTED, LOCK, MOMENT, PROBE, UNLOCK, ok};

async fn listed(farm: &Farm, by: usize) -> Vec<u16> {
    let reply = ok(&mut farm.postgres(by).await, "SHOW COMPUTE NODES").await;
    let ports = reply
        .rows()
        .into_iter()
        .map(|row| row[3].as_ref().unwrap().parse().unwrap());
    ports.collect()
}

/// Waits until `by` does not list proxy `gone` any more.
async fn until_unlisted(farm: &Farm, by: usize, gone: usize) {
    let begun = Instant::now();
    while listed(farm, by).await.contains(&farm.port(gone)) {
        assert!(begun.elapsed() < LISTED, "proxy {gone} stays listed");
        tokio::time::sleep(Duration::from_millis(500)).await;
    }
    println!(
        "  proxy {gone} is not listed any more after {} s",
        begun.elapsed().as_secs()
    );
}

/// Connections are accepted, nothing is answered, the others go on; and what it missed it sees a moment later.
pub(crate) async fn a_frozen_proxy_answers_later(farm: &mut Farm) {
    let mut old = farm.postgres(1).await;
    farm.freeze(1);
    let new = farm.log_in(1, "postgres");
    let silent = tokio::time::timeout(Duration::from_secs(2), Raw::log_in(&new)).await;
    assert!(silent.is_err(), "{silent:?}");
    assert!(listed(farm, 0).await.contains(&farm.port(1)));
    ok(&mut farm.postgres(0).await, LOCK).await;
    farm.until(0, true, MOMENT).await;
    let asked = old.query(PROBE);
    tokio::pin!(asked);
    assert!(
        tokio::time::timeout(Duration::from_secs(2), &mut asked)
            .await
            .is_err()
    );
    farm.thaw(1);
    // It answers; by what it knows, which may be out of date for a moment.
    tokio::time::timeout(MOMENT, asked)
        .await
        .expect("an answer")
        .expect("an answer");
    farm.until(1, true, MOMENT).await;
    ok(&mut farm.postgres(1).await, UNLOCK).await;
}

/// It does not know of the lock, and nobody tells it.
pub(crate) async fn a_cut_off_proxy_goes_on_writing(farm: &mut Farm) {
    let mut session = farm.bank(1).await;
    farm.cut_off(1);
    ok(&mut farm.postgres(0).await, LOCK).await;
    farm.until(0, true, MOMENT).await;
    let update = "UPDATE account SET balance = balance + 1 WHERE id = 1";
    ok(&mut session, update).await;
    // The probe is told so, and nobody is told who else there is.
    ok(&mut farm.postgres(1).await, PROBE).await;
    let mut other = farm.postgres(1).await;
    let asked = other.query("SHOW COMPUTE NODES");
    let silent = tokio::time::timeout(Duration::from_secs(5), asked).await;
    assert!(silent.is_err(), "{silent:?}");
    drop(other);
    until_unlisted(farm, 0, 1).await;
    ok(&mut session, update).await;
    ok(&mut farm.postgres(1).await, PROBE).await;
    assert_eq!(farm.sum().await, 802);
    farm.reconnect(1);
    // Back in sight of ZooKeeper it hears of the lock.
    let heard = farm.until(1, true, LISTED).await;
    println!(
        "  it refuses {} ms after the way was mended",
        heard.as_millis()
    );
    ok(&mut farm.postgres(0).await, UNLOCK).await;
    farm.until(1, false, LISTED).await;
}

/// It is not answered, its client goes, and it locks when the way is mended, long after its TIMEOUT.
pub(crate) async fn a_lock_through_a_cut_off_proxy_lands_late(farm: &mut Farm) {
    let mut session = farm.postgres(1).await;
    farm.cut_off(1);
    let silent = tokio::time::timeout(Duration::from_secs(6), session.query(LOCK)).await;
    assert!(silent.is_err(), "{silent:?}");
    drop(session);
    assert_eq!(farm.state(), "OK");
    assert_eq!(farm.probe(0).await, None);
    farm.reconnect(1);
    for i in 0..2 {
        farm.until(i, true, MOMENT).await;
    }
    ok(&mut farm.postgres(0).await, UNLOCK).await;
    for i in 0..2 {
        farm.until(i, false, MOMENT).await;
    }
}

/// Which stays listed for a while.
pub(crate) async fn the_lock_outlives_its_proxy(farm: &mut Farm) {
    ok(&mut farm.postgres(0).await, LOCK).await;
    farm.until(1, true, MOMENT).await;
    farm.kill(0);
    assert!(listed(farm, 1).await.contains(&farm.port(0)));
    assert!(farm.probe(1).await.is_some());
    until_unlisted(farm, 1, 0).await;
    assert!(farm.probe(1).await.is_some());
    assert_eq!(farm.state(), "READ_ONLY");
    farm.restart(0).await;
    farm.until(0, true, MOMENT).await;
    ok(&mut farm.postgres(0).await, UNLOCK).await;
    farm.until(1, false, MOMENT).await;
}

pub(crate) async fn the_lock_outlives_all_proxies(farm: &mut Farm) {
    ok(&mut farm.postgres(0).await, LOCK).await;
    farm.until(1, true, MOMENT).await;
    for i in 0..2 {
        farm.kill(i);
    }
    for i in 0..2 {
        farm.restart(i).await;
    }
    for i in 0..2 {
        farm.until(i, true, MOMENT).await;
    }
    ok(&mut farm.postgres(1).await, UNLOCK).await;
    for i in 0..2 {
        farm.until(i, false, MOMENT).await;
        ok(&mut farm.bank(i).await, "SELECT count(*) FROM account").await;
    }
}
