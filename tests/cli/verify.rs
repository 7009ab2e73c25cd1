//! `verify` as its users run it: damage in a bucket, and an object that somebody deleted.

use serde_json::Value;
use support::bucket::Bucket;
use support::fleet::{Fleet, Run};
use support::postgres::{ClusterOptions, Installation};

fn findings(run: &Run) -> Vec<Value> {
    let events = run
        .stdout
        .lines()
        .map(|line| serde_json::from_str::<Value>(line).unwrap());
    events.filter(|event| event["event"] == "finding").collect()
}

fn key_ending(bucket: &Bucket, end: &str) -> String {
    let keys = bucket.server().keys();
    keys.into_iter()
        .find(|key| key.ends_with(end))
        .unwrap_or_else(|| panic!("no key ends with {end}"))
}

#[tokio::test(flavor = "multi_thread")]
async fn damage_is_found_and_named_and_a_deleted_manifest_comes_back() {
    let bucket = Bucket::double().await;
    let mut fleet = Fleet::new("verify", &bucket.config());
    fleet.add_database("node 1", &Installation::newest(), ClusterOptions::default());
    let nodes = fleet.addresses(&[0]);
    let json = ["--output", "json"];
    let backup = fleet
        .run(&["backup", json[0], json[1], "--nodes", &nodes])
        .good()
        .result();
    let id = backup["backup_id"].as_str().unwrap();
    let node = backup["nodes"][0]["node_id"].as_str().unwrap();

    // What was just written is whole, in every way of asking.
    for how in [&["--all"][..], &["--all", "--fast"], &["--id", id]] {
        let run = fleet
            .run(&[&["verify", json[0], json[1]], how].concat())
            .good();
        assert!(findings(&run).is_empty(), "{run:?}");
        let result = run.result();
        assert_eq!(result["backups"], serde_json::json!([id]));
        assert_eq!(
            result["stored_bytes"].as_u64().unwrap() > 1 << 20,
            how.last() != Some(&"--fast")
        );
    }

    // One bit of a pack: the finding names backup, node and files; a restore refuses.
    let pack = key_ending(&bucket, "/pack-00000");
    let original = bucket.server().bytes(&pack).unwrap();
    assert!(bucket.server().flip_bit(&pack, original.len() as u64 * 4));
    let run = fleet.run(&["verify", "--all", json[0], json[1]]);
    assert_eq!(run.code, 9, "{run:?}");
    let found = findings(&run);
    assert_eq!(found.len(), 1, "{run:?}");
    assert!(pack.ends_with(found[0]["key"].as_str().unwrap()));
    assert_eq!(
        (found[0]["severity"].as_str(), found[0]["backup"].as_str()),
        (Some("damage"), Some(id))
    );
    assert_eq!(found[0]["node"].as_str(), Some(node));
    assert!(found[0]["files_total"].as_u64() > Some(0), "{run:?}");
    assert!(
        run.result()["error"]["message"]
            .as_str()
            .unwrap()
            .contains(id)
    );
    assert_eq!(fleet.run(&["verify", "--id", id]).code, 9);
    let _ = fleet.run(&["verify", "--all", "--fast"]).good();
    let target = fleet.hosts[0].root.clone();
    let target = target.to_str().unwrap();
    let restore = fleet.run(&[
        "restore",
        "--id",
        id,
        "--nodes",
        &nodes,
        "--target-dir",
        target,
        "--db-port",
        &format!("{node}={}", support::os::free_port()),
        "--yes",
    ]);
    assert_eq!(restore.code, 9, "{restore:?}");
    bucket.server().tamper(&pack, Some(original));

    // A manifest that somebody deleted is missed, because the log names it, and comes back from the mirror.
    let manifest = key_ending(&bucket, "/manifest.json");
    let taken = bucket.server().bytes(&manifest).unwrap();
    bucket.server().take(&manifest);
    // `show` brings the mirror up to date, and it must not forget the only copy.
    let _ = fleet.run(&["show"]).good();
    let run = fleet.run(&["verify", "--all", json[0], json[1]]);
    assert_eq!(run.code, 9, "{run:?}");
    let found = findings(&run);
    assert!(
        found
            .iter()
            .any(|it| manifest.ends_with(it["key"].as_str().unwrap())
                && it["unrestorable"][0] == *id),
        "{run:?}"
    );
    let unasked = fleet.run(&["verify", "--all", "--repair"]);
    assert_eq!(unasked.code, 2, "nobody agreed: {unasked:?}");
    assert!(bucket.server().bytes(&manifest).is_none());
    let repair = fleet.run(&["verify", "--all", "--repair", "--yes", json[0], json[1]]);
    assert_eq!(repair.code, 9, "it says what it found: {repair:?}");
    assert_eq!(repair.result()["error"]["changed"], true);
    assert_eq!(bucket.server().bytes(&manifest).unwrap(), taken);
    let run = fleet.run(&["verify", "--all", json[0], json[1]]).good();
    assert!(findings(&run).is_empty(), "{run:?}");
    let again = fleet.run(&["verify", "--all", "--repair"]).good();
    assert!(
        again.stdout.contains("nothing can be repaired"),
        "{again:?}"
    );
}
