//! The lock at the switch.

use std::time::Duration;

use support::bank::wire::Session;
use support::s3::{Operation, When};

use crate::metadata::{change, changed_since_the_point};
use crate::scene::{Scene, say, until_locked};

/// Under load: writes are refused from the lock on, and what is acknowledged afterwards is in the restored databases.
#[tokio::test(flavor = "multi_thread")]
async fn nobody_writes_to_what_is_thrown_away() {
    let mut scene = Scene::start("restore-locked").await;
    a_lock_that_cannot_be_had_is_found_out_first(&scene).await;
    let bank = scene.bank(1).await;
    let mut restore = scene.restoring(&[]);
    let locked = until_locked(&mut restore).await;
    let run = restore.end().await.good();
    bank.goes_on(20).await;
    scene.until_writes_pass(Duration::from_secs(10)).await;
    let diary = bank.close().await;
    say(&diary.describe());
    assert!(diary.refused > 0, "nobody was refused");
    scene.assert_kept(&diary, locked).await;

    let events: Vec<serde_json::Value> = run
        .stdout
        .lines()
        .map(|line| serde_json::from_str(line).unwrap())
        .collect();
    let place = |name: &str| events.iter().position(|event| event["event"] == name);
    let (plan, lock, decided, open) = (
        place("plan").unwrap(),
        place("locked").unwrap(),
        place("decided").unwrap(),
        place("unlocked").unwrap(),
    );
    assert!(plan < lock && lock < decided && decided < open, "{run:?}");
    assert_eq!(events[plan]["clients"]["locked"], true);
    let proxies = events[lock]["proxies"].as_array().unwrap();
    assert_eq!(proxies.len(), 2, "{proxies:?}");
    say(&format!("locked for {} ms", events[open]["held_ms"]));
    let operation = events[plan]["operation"].as_str().unwrap().parse().unwrap();
    let catalog = catalog::Catalog::open(scene.cluster.bucket.store())
        .await
        .unwrap();
    let journal = catalog.operation(operation).await.unwrap();
    assert_eq!(journal.may_lock_since(), None);

    changed_since_the_point(&mut scene).await;
}

/// Whoever locked is killed before the decision, which is never made: the agents unlock, and all goes back.
#[tokio::test(flavor = "multi_thread")]
async fn killed_under_the_lock_before_the_decision() {
    let scene = Scene::start("restore-killed").await;
    let server = scene.cluster.bucket.server();
    let held = server.hold(Operation::Put, When::Before, |key| {
        key.ends_with("/decision.json")
    });
    let mut restore = scene.restoring(&[]);
    until_locked(&mut restore).await;
    held.reached().await;
    restore.kill();
    held.cut();
    let refused = scene.passes().await.unwrap_err();
    assert!(refused.contains("cluster state"), "{refused}");
    let after = scene.until_writes_pass(Duration::from_secs(40)).await;
    say(&format!(
        "killed before the decision: writes passed after {after:?}"
    ));
    let left = scene.left().await;
    assert_eq!(scene.resume(&left).result()["outcome"], "rolled-back");
    scene.until_writes_pass(Duration::from_secs(10)).await;
}

/// And after it: what clients write from then on is not thrown away, whoever unlocks; and whoever ends the restore brings back the
/// proxies' metadata, as it was asked to.
#[tokio::test(flavor = "multi_thread")]
async fn killed_under_the_lock_after_the_decision() {
    let scene = Scene::start("restore-decided").await;
    let imports = !matches!(scene.cluster.proxies, support::sharded::Proxies::Real(_));
    if imports {
        change(&scene).await;
    }
    let bank = scene.bank(2).await;
    let asked: &[&str] = if imports { &["--import-metadata"] } else { &[] };
    let mut restore = scene.restoring(asked);
    let locked = until_locked(&mut restore).await;
    restore
        .until_event(|event| event["event"] == "decided")
        .await;
    restore.kill();
    let left = scene.left().await;
    let run = scene.resume(&left);
    assert_eq!(run.stdout.contains("\"event\":\"imported\""), imports);
    let resumed = run.result();
    assert_eq!(resumed["nodes"].as_array().unwrap().len(), 2, "{resumed}");
    scene.until_writes_pass(Duration::from_secs(10)).await;
    bank.goes_on(20).await;
    let diary = bank.close().await;
    say(&diary.describe());
    scene.assert_kept(&diary, locked).await;
}

/// Another's lock is found out before anything is copied; and it can be done without one.
async fn a_lock_that_cannot_be_had_is_found_out_first(scene: &Scene) {
    let access = scene.cluster.access(0, "postgres");
    let mut session = Session::open(&access).await.unwrap();
    let lock = r#"LOCK CLUSTER WITH LOCK_STRATEGY(TYPE(NAME="WRITE")) TIMEOUT 1000"#;
    session.query(lock).await.unwrap();
    let refused = scene.restoring(&[]).end().await;
    let error = &refused.result()["error"];
    assert_eq!(error["kind"], "conflict", "{refused:?}");
    assert_eq!(error["changed"], false);
    let next = error["next"].as_str().unwrap();
    assert!(next.contains("--lock never"), "{error}");
    assert!(!refused.stdout.contains("\"plan\""), "{refused:?}");
    let run = scene.restoring(&["--lock", "never"]).end().await.good();
    assert!(run.stdout.contains("as-asked"), "{run:?}");
    assert!(!run.stdout.contains("\"event\":\"locked\""), "{run:?}");
    session.query("UNLOCK CLUSTER TIMEOUT 1000").await.unwrap();
    scene.until_writes_pass(Duration::from_secs(10)).await;
}
