//! The CSN.

use std::time::{Duration, Instant};

use agent_sql::proxy::Clock;

use crate::farm::{Farm, MOMENT, ok};
use crate::metadata::exported;

/// The number that proxy `i` gives.
async fn csn(farm: &Farm, i: usize) -> i64 {
    let (document, _) = exported(&mut farm.postgres(i).await).await;
    let info = &document["snapshot_info"];
    assert!(info["create_time"].is_string(), "{info}");
    info["csn"]
        .as_str()
        .expect("text")
        .parse()
        .expect("a number")
}

async fn transfer(farm: &Farm, i: usize) {
    let mut session = farm.bank(i).await;
    for sql in [
        "BEGIN",
        "UPDATE account SET balance = balance - 1 WHERE id = 1",
        "UPDATE account SET balance = balance + 1 WHERE id = 2",
        "COMMIT",
    ] {
        ok(&mut session, sql).await;
    }
}

pub(crate) async fn the_rules_say_so(farm: &mut Farm) {
    for i in 0..2 {
        let mut session = farm.postgres(i).await;
        let reply = ok(&mut session, "SHOW GLOBAL CLOCK RULE").await;
        let row: Vec<_> = reply.rows()[0]
            .iter()
            .map(|value| value.as_deref().unwrap_or(""))
            .collect();
        assert_eq!(row[..3], ["TSO", "redis", "true"]);
        assert!(
            row[3].starts_with("{\"host\":\"127.0.0.1\",\"port\":"),
            "{row:?}"
        );
        let reply = ok(&mut session, "SHOW TRANSACTION RULE").await;
        assert_eq!(reply.rows()[0][0].as_deref(), Some("XA"));
    }
    let (document, _) = exported(&mut farm.postgres(0).await).await;
    let rules = document["meta_data"]["rules"].as_str().unwrap();
    assert!(
        rules.contains("- !GLOBAL_CLOCK\n  enabled: true\n"),
        "{rules}"
    );
    assert!(
        rules.contains("- !TRANSACTION\n  defaultType: XA\n"),
        "{rules}"
    );
}

/// By one at each COMMIT of an explicit transaction, for all proxies; autocommit does not count.
pub(crate) async fn csn_advances_at_commit(farm: &mut Farm) {
    let first = csn(farm, 0).await;
    assert!(first >= 2_147_483_647, "{first}");
    assert_eq!(csn(farm, 1).await, first);
    transfer(farm, 0).await;
    assert_eq!(
        (csn(farm, 0).await, csn(farm, 1).await),
        (first + 1, first + 1)
    );
    transfer(farm, 1).await;
    assert_eq!(
        (csn(farm, 0).await, csn(farm, 1).await),
        (first + 2, first + 2)
    );
    ok(
        &mut farm.bank(0).await,
        "INSERT INTO account VALUES (50, 1)",
    )
    .await;
    assert_eq!(csn(farm, 0).await, first + 2);
}

pub(crate) async fn the_client_reads_it(farm: &mut Farm) {
    let connection = farm.product(1).await;
    let clock = connection.clock(MOMENT).await.unwrap();
    assert_eq!(
        clock,
        Clock::Tso {
            provider: "redis".into()
        }
    );
    let metadata = connection.export_metadata(MOMENT).await.unwrap();
    assert_eq!(metadata.csn(), Some(csn(farm, 0).await.to_string()));
}

/// And worth nothing.
pub(crate) async fn a_local_one_is_each_proxy_s_own(farm: &mut Farm) {
    let sql = "ALTER GLOBAL CLOCK RULE (TYPE=\"TSO\", PROVIDER=\"local\", ENABLED=TRUE)";
    ok(&mut farm.postgres(0).await, sql).await;
    let begun = Instant::now();
    let local = Clock::Tso {
        provider: "local".into(),
    };
    for i in 0..2 {
        while farm.product(i).await.clock(MOMENT).await.unwrap() != local {
            assert!(
                begun.elapsed() < Duration::from_secs(30),
                "proxy {i} does not hear of the clock"
            );
            tokio::time::sleep(Duration::from_millis(200)).await;
        }
    }
    let before = (csn(farm, 0).await, csn(farm, 1).await);
    for _ in 0..3 {
        transfer(farm, 0).await;
    }
    assert_eq!(
        (csn(farm, 0).await, csn(farm, 1).await),
        (before.0 + 3, before.1)
    );
}
