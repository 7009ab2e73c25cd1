//! Under load, without faults.

use std::time::Duration;

use serde_json::Value;
use support::bank::{Bank, BankOptions, Mix};

use super::scene::{all_points_are_proved, backup, cluster, say, writes_pass};

/// How its bank works.
pub(crate) fn options(mix: Mix) -> BankOptions {
    BankOptions {
        seed: 6,
        mix,
        pause: Duration::from_millis(20),
        passing_pause: Duration::from_millis(200),
        shift: 1,
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_backup_locks_for_a_blink_and_proves_its_point() {
    let cluster = cluster("lock-load").await;
    let mix = Mix {
        simple: 2,
        prepared: 2,
        autocommit: 1,
        batch: 1,
        ..Mix::default()
    };
    let bank = Bank::open(&cluster.ways(), &options(mix));
    bank.goes_on(20).await;
    let always = backup(&cluster, &["--lock", "always"]).good();
    let result = always.result();
    say(&format!("always: {} {}", result["lock"], result["proof"]));
    assert_eq!(result["consistency"], "cluster");
    let lock = &result["lock"];
    assert_eq!(lock["mode"], "always");
    assert!(lock["tries"].as_u64().unwrap() >= 1, "{lock}");
    assert_eq!(lock["proxies"].as_array().unwrap().len(), 2, "{lock}");
    let held = result["lock_ms"].as_u64().unwrap();
    assert!(
        held > 0 && held <= lock["held_ms"].as_u64().unwrap(),
        "{lock}"
    );
    assert!(held < 3000, "{held} ms");
    writes_pass(&cluster, &[0, 1], Duration::from_secs(1)).await;

    // The journal says that a lock was to be taken, and that it is gone.
    let started: Value = serde_json::from_str(
        always
            .stdout
            .lines()
            .find(|line| line.contains("\"started\""))
            .unwrap(),
    )
    .unwrap();
    let catalog = catalog::Catalog::open(cluster.bucket.store())
        .await
        .unwrap();
    let id = started["operation"].as_str().unwrap().parse().unwrap();
    let journal = catalog.operation(id).await.unwrap();
    assert_eq!(journal.may_lock_since(), None);
    let text = format!("{journal:?}");
    assert!(
        text.contains("LockIntended") && text.contains("open: true"),
        "{text}"
    );

    // What the proxies know is kept, without a password.
    let point = result["point"].as_str().unwrap().parse().unwrap();
    let point = catalog.point(&point).await.unwrap();
    let named = point.metadata.as_ref().unwrap();
    let metadata = catalog.metadata(&point.point_id, named).await.unwrap();
    assert!(metadata.document.contains("bank"), "{metadata:?}");
    assert!(!metadata.document.contains(support::sharded::NODE_PASSWORD));

    let diary = bank.close().await;
    say(&diary.describe());
    assert_eq!(all_points_are_proved(&cluster).await, 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_quiet_cluster_needs_no_lock() {
    let cluster = cluster("lock-auto").await;
    for mode in ["auto", "never"] {
        let result = backup(&cluster, &["--lock", mode]).good().result();
        assert_eq!(result["consistency"], "cluster", "{mode}");
        assert_eq!(result["lock"]["tries"], 0, "{mode}");
        assert_eq!(result["lock_ms"], 0, "{mode}");
    }
    assert_eq!(all_points_are_proved(&cluster).await, 2);
}
