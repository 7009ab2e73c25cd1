//! Points that are reached, and points that are not any more.

use catalog::keys;
use pipeline::store::Key;
use serde_json::Value;

use crate::scene::{Scene, id, say};

fn key_of_wal(point: &Value, node: usize) -> String {
    let node = &point["nodes"][node];
    let (id, epoch, name) = (
        node["node_id"].as_str().unwrap(),
        node["epoch"].as_str().unwrap(),
        node["wal_last"].as_str().unwrap(),
    );
    let epoch = epoch.parse().unwrap();
    keys::wal(id.parse().unwrap(), &epoch, &name.parse().unwrap()).to_string()
}

/// One backup and four points under transfers: restored by id, by time, with the base forced, and as clones; each has
/// exactly the rows from before it, and no half transfer.
#[tokio::test(flavor = "multi_thread")]
async fn one_backup_and_many_points() {
    let mut scene = Scene::start("points").await;
    say(scene.bucket.describe());
    scene.moment(1).await;
    let load = scene.load().await;
    let backup = scene.backup();
    let mut points = Vec::new();
    let mut between = Vec::new();
    for number in 2..=4 {
        scene.moment(number).await;
        let point = scene.point(&format!("round {number}"));
        assert_eq!(point["consistency"], "cluster", "{point}");
        assert_eq!(point["base"], backup.as_str(), "{point}");
        points.push(point);
        between.push(jiff::Timestamp::now());
    }
    scene.moment(5).await;
    say(&format!("{} transactions", load.stop().await));
    for (listed, made) in scene.points()[1..].iter().zip(&points) {
        assert_eq!(id(listed), id(made));
        assert_eq!(listed["base"], backup.as_str(), "{listed}");
        assert_eq!(listed["label"], made["label"]);
    }
    let shown = scene.ask(&["show", &backup]).good().result();
    assert_eq!(shown["backups"][0]["other_points"]["count"], 3, "{shown}");

    scene.restored(&["--id", &backup], 1).await;
    scene.restored(&["--point", id(&points[1])], 3).await;
    scene
        .restored(&["--time", &between[0].to_string()], 2)
        .await;
    let forced = ["--point", id(&points[2]), "--id", &backup, "--clone"];
    scene.restored(&forced, 4).await;

    // Before all points, and after a backup that is not there: refused before anybody is asked for anything.
    let too_early = scene.ask(&[
        "restore",
        "--time",
        "2020-01-01T00:00:00Z",
        "--nodes",
        "127.0.0.1:1",
        "--yes",
    ]);
    assert_eq!(too_early.code, 8, "{too_early:?}");
    let words = too_early.result()["error"]["message"]
        .as_str()
        .unwrap()
        .to_owned();
    assert!(words.contains("no point of the whole cluster"), "{words}");
    assert!(words.contains("after: point"), "{words}");
    let unknown = scene.ask(&["restore", "--csn", "12", "--nodes", "127.0.0.1:1", "--yes"]);
    assert_eq!(unknown.code, 8, "{unknown:?}");

    let verified = scene.ask(&["verify", "--all"]).good().result();
    let counts = &verified["findings"];
    say(&format!("verify: {counts}"));
}

/// A segment that is missing cuts later points off; a new backup makes points reachable again; prune keeps what kept
/// backups lead to, and drops the rest.
#[tokio::test(flavor = "multi_thread")]
async fn a_hole_cuts_points_off_and_prune_keeps_what_is_reached() {
    let mut scene = Scene::start("holes").await;
    scene.moment(1).await;
    let first = scene.backup();
    let mut points = Vec::new();
    for number in 2..=4 {
        scene.moment(number).await;
        points.push(scene.point("before the hole"));
    }
    // The WAL of the second point is lost, on one node.
    let lost = Key::new(key_of_wal(&points[1], 0)).unwrap();
    scene
        .bucket
        .store()
        .delete(std::slice::from_ref(&lost))
        .await
        .unwrap();
    let listed = scene.points();
    let reached: Vec<bool> = listed.iter().map(|it| it["base"].is_string()).collect();
    assert_eq!(reached, [true, true, false, false], "{listed:#?}");
    let why = listed[3]["unreachable"].as_str().unwrap();
    assert!(why.contains(&first) && why.contains("missing"), "{why}");
    let refused = scene.ask(&[
        "restore",
        "--point",
        id(&points[2]),
        "--nodes",
        "127.0.0.1:1",
        "--yes",
    ]);
    assert_eq!(refused.code, 8, "{refused:?}");
    let error = refused.result()["error"].clone();
    let nearest = format!("gs_pitr restore --point {}", id(&points[0]));
    assert_eq!(error["next"], nearest.as_str(), "{error}");
    assert_eq!(error["changed"], false);
    let damaged = scene.ask(&["verify", "--all", "--fast"]);
    assert_eq!(damaged.code, 9, "{damaged:?}");
    assert!(damaged.stdout.contains(lost.as_str()), "{damaged:?}");

    let second = scene.backup();
    scene.moment(5).await;
    let after = scene.point("after the hole");
    assert_eq!(after["base"], second.as_str());
    // As clones: the sources go on in their epochs.
    scene
        .restored(&["--point", id(&points[0]), "--clone"], 2)
        .await;

    let args = ["prune", "--keep-full", "1", "--yes"];
    let pruned = scene.ask(&args).good().result();
    assert_eq!(pruned["deleted"], serde_json::json!([first]), "{pruned}");
    // The first backup's own point goes with it. Those that were made on it are too young to be judged: they say why they
    // cannot be reached.
    let left = scene.points();
    assert_eq!(left.len(), 5, "{left:#?}");
    for cut_off in &left[..3] {
        let why = cut_off["unreachable"].as_str().unwrap();
        assert!(why.contains(&first), "{why}");
    }
    for reached in &left[3..] {
        assert_eq!(reached["base"], second.as_str(), "{reached}");
    }
    assert_eq!(id(&left[4]), id(&after));
    let verified = scene.ask(&["verify", "--all"]);
    assert_eq!(verified.code, 0, "{verified:?}");
    // What was shipped since belongs to the next point: prune has left it.
    scene.moment(6).await;
    let next = scene.point("after prune");
    assert_eq!(next["base"], second.as_str());
    scene.restored(&["--point", id(&next)], 6).await;
}

/// Without a backup of all its nodes there is no point, and nothing is marked.
#[tokio::test(flavor = "multi_thread")]
async fn a_point_needs_a_backup() {
    let scene = Scene::start("no base").await;
    let refused = scene.run(&["point", "create"]);
    assert_eq!(refused.code, 8, "there is no repository: {refused:?}");
    let one = scene.fleet.addresses(&[0]);
    let args = [
        "backup",
        "--wal",
        "continuous",
        "--nodes",
        &one,
        "--output",
        "json",
    ];
    let _ = scene.fleet.run(&args).good();
    let refused = scene.run(&["point", "create"]);
    assert_eq!(refused.code, 12, "{refused:?}");
    let error = refused.result()["error"].clone();
    assert!(
        error["next"].as_str().unwrap().contains("gs_pitr backup"),
        "{error}"
    );
    // Of the node that has one it can be made.
    let args = ["point", "create", "--nodes", &one, "--output", "json"];
    let made = scene.fleet.run(&args).good().result();
    assert_eq!(made["consistency"], "cluster");
}
