//! All nodes back to the point, over the databases that run.

use std::path::Path;
use std::time::Duration;

use catalog::model::Verdict;
use serde_json::Value;
use support::bucket::Bucket;
use support::fleet::Fleet;
use support::load::{self, Load};
use support::os;
use support::postgres::{ClusterOptions, Installation};

use crate::scene::{Scene, beside};

async fn three_under_load() -> Scene {
    let bucket = Bucket::double().await;
    let mut fleet = Fleet::new("switch", &bucket.config());
    let installation = Installation::newest();
    for (name, config_outside) in [("node one", true), ("node2", false), ("node3", false)] {
        let options = ClusterOptions {
            data_checksums: true,
            config_outside,
            ..ClusterOptions::default()
        };
        fleet.add_database(name, &installation, options);
    }
    for host in &fleet.hosts {
        let space = host.root.join("old space");
        std::fs::create_dir(&space).unwrap();
        os::give(&space);
        load::prepare(host.cluster.as_ref().unwrap(), &space, false).await;
    }
    Scene { fleet, bucket }
}

fn node<'a>(result: &'a Value, id: &str) -> &'a Value {
    let mut nodes = result["nodes"].as_array().unwrap().iter();
    nodes.find(|node| node["node_id"] == id).unwrap()
}

#[expect(
    clippy::too_many_lines,
    reason = "one life of one cluster, step by step"
)]
#[tokio::test(flavor = "multi_thread")]
async fn a_running_cluster_goes_back_to_the_point_and_goes_on_under_new_epochs() {
    let scene = three_under_load().await;
    let ledgers = scene.fleet.path().join("ledgers");
    std::fs::create_dir(&ledgers).unwrap();
    let loads: Vec<_> = (0..3)
        .map(|it| Load::start(scene.database(it), &ledgers, 2))
        .collect();
    tokio::time::sleep(Duration::from_secs(1)).await;
    let nodes = scene.nodes();
    let made = scene
        .fleet
        .run(&["backup", "--nodes", &nodes, "--output", "json"]);
    let made = made.good().result();
    tokio::time::sleep(Duration::from_secs(1)).await;
    let mut ledger = Vec::new();
    for load in loads {
        ledger.push(load.stop().await);
    }
    let (manifest, point) = scene
        .bucket
        .recorded(made["backup_id"].as_str().unwrap())
        .await;
    let backup = crate::scene::Backup {
        id: manifest.backup_id.to_string(),
        nodes: (0..3)
            .map(|it| {
                let port = scene.database(it).port();
                let node = manifest.nodes.iter().find(|node| node.port == port);
                node.unwrap().node_id.to_string()
            })
            .collect(),
    };

    let run = scene.restored(&backup, &[]).good();
    let result = run.result();
    for (number, ledger) in ledger.iter().enumerate() {
        let (id, data) = (&backup.nodes[number], scene.data(number));
        let restored = node(&result, id);
        assert_eq!(restored["running"], true, "{restored}");
        assert_eq!(
            Path::new(restored["data_directory"].as_str().unwrap()),
            data
        );
        assert_eq!(restored["port"], scene.database(number).port());
        let old = beside(&data, "old-");
        assert_eq!(old.len(), 1, "{old:?}");
        assert!(
            restored["old"]
                .as_array()
                .unwrap()
                .iter()
                .any(|it| Path::new(it.as_str().unwrap()) == old[0]),
            "{restored}"
        );
        let client = scene.database(number).connect("shop db").await;
        let copy = manifest
            .nodes
            .iter()
            .find(|node| node.node_id.to_string() == *id)
            .unwrap();
        let end = point
            .nodes
            .iter()
            .find(|node| node.node_id.to_string() == *id)
            .unwrap();
        let (stop, end) = (load::lsn(&copy.stop_lsn), load::lsn(&end.end_lsn));
        let verdict = ledger.check(&client, stop, end).await.unwrap();
        assert!(verdict.required > 0 && verdict.forbidden > 0, "{verdict:?}");
        let epochs = scene.catalog().await.epochs(copy.node_id).await.unwrap();
        assert_eq!(epochs.len(), 2);
        assert_eq!(
            (epochs[1].timeline, epochs[1].parent.as_ref()),
            (2, Some(&copy.epoch))
        );
    }
    scene.assert_decided(Verdict::Commit).await;
    let operation = scene.operation().to_string();
    let listed = scene.operations();
    let shown = listed
        .iter()
        .find(|it| it["operation"] == operation.as_str())
        .unwrap();
    assert_eq!(
        (&shown["state"], &shown["decision"]),
        (&"ended".into(), &"commit".into())
    );

    // The nodes are known again without a question, and what they write now restores as well.
    let again = scene
        .fleet
        .run(&["backup", "--nodes", &nodes, "--output", "json"]);
    let again = again.good().result();
    for id in &backup.nodes {
        node(&again, id);
    }
    let second = crate::scene::Backup {
        id: again["backup_id"].as_str().unwrap().to_owned(),
        nodes: backup.nodes.clone(),
    };
    for number in 0..3 {
        let client = scene.database(number).connect("shop db").await;
        client.batch_execute("DELETE FROM accounts").await.unwrap();
    }
    let _ = scene.restored(&second, &["--discard-old"]).good();
    for number in 0..3 {
        let sql = "SELECT sum(balance)::text FROM accounts";
        assert_eq!(
            scene.database(number).query_one("shop db", sql).await,
            "20000000"
        );
        // The first restore's old directory stays, the second one's is gone.
        assert_eq!(beside(&scene.data(number), "old-").len(), 1);
    }

    let discard = scene.fleet.run(&[
        "operations",
        "discard",
        &operation,
        "--yes",
        "--output",
        "json",
    ]);
    let discard = discard.good().result();
    assert_eq!(discard["nodes"].as_array().unwrap().len(), 3, "{discard}");
    for number in 0..3 {
        scene.assert_nothing_left(number);
    }
    let twice = scene.fleet.run(&[
        "operations",
        "discard",
        &operation,
        "--yes",
        "--output",
        "json",
    ]);
    assert_eq!(twice.good().result()["nodes"].as_array().unwrap().len(), 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn the_plan_says_what_is_there_and_what_becomes_of_it() {
    let scene = Scene::new(2, &[]).await;
    let backup = scene.backed_up().await;
    let nodes = scene.nodes();
    let mut refused = scene
        .fleet
        .command(&["restore", "--id", &backup.id, "--nodes", &nodes]);
    refused.args(["--output", "json"]);
    let refused = support::fleet::wait(refused, Duration::from_mins(1));
    assert_eq!(refused.result()["error"]["kind"], "usage", "{refused:?}");

    let elsewhere = scene.restored(&backup, &["--node", "nobody:1"]);
    assert_eq!(
        elsewhere.result()["error"]["kind"],
        "not-found",
        "{elsewhere:?}"
    );
    // Over another node's database: its system identifier says so.
    let map = format!("{}={}", backup.nodes[0], scene.agent(1));
    let other = scene.restored(&backup, &["--node", &backup.nodes[0], "--map", &map]);
    let error = other.result()["error"].clone();
    assert_eq!(
        (&error["kind"], &error["changed"]),
        (&"target".into(), &false.into()),
        "{other:?}"
    );
    assert!(
        error["message"].as_str().unwrap().contains("another one"),
        "{error}"
    );

    let run = scene.restored(&backup, &["--no-start"]).good();
    let plan = run
        .stdout
        .lines()
        .find(|line| line.contains(r#""event":"plan""#))
        .unwrap();
    let plan: Value = serde_json::from_str(plan).unwrap();
    for number in 0..2 {
        let mut planned = plan["nodes"].as_array().unwrap().iter();
        let planned = planned
            .find(|it| it["node_id"] == backup.nodes[number].as_str())
            .unwrap();
        assert_eq!(planned["place"]["place"], "replace", "{planned}");
        assert_eq!(planned["there"]["running"], true, "{planned}");
        assert_eq!(planned["there"]["port"], scene.database(number).port());
        assert_eq!(planned["there"]["kept"], true);
        assert!(planned["free_bytes"].as_u64().unwrap() > 0);
        assert!(
            scene.database(number).pid().is_none(),
            "it was to be left stopped"
        );
        scene.database(number).start();
    }
    scene.assert_at_the_point(&[0, 1]).await;
}

/// The runbook's way back after a restore that should not have been.
#[tokio::test(flavor = "multi_thread")]
async fn what_was_there_is_put_back_by_hand_and_backed_up_again() {
    let scene = Scene::new(1, &[]).await;
    let backup = scene.backed_up().await;
    let before = scene.rows(0).await;
    let _ = scene.restored(&backup, &[]).good();
    scene.assert_at_the_point(&[0]).await;
    let data = scene.data(0);
    let old = beside(&data, "old-").remove(0);
    scene.database(0).stop("fast");
    std::fs::rename(&data, data.with_extension("wrong")).unwrap();
    std::fs::rename(&old, &data).unwrap();
    scene.database(0).start();
    assert_eq!(scene.rows(0).await, before);

    let nodes = scene.nodes();
    let again = scene
        .fleet
        .run(&["backup", "--nodes", &nodes, "--output", "json"]);
    let again = again.good().result();
    assert_eq!(again["nodes"][0]["node_id"], backup.nodes[0].as_str());
    let node = backup.nodes[0].parse().unwrap();
    let epochs = scene.catalog().await.epochs(node).await.unwrap();
    let timelines: Vec<_> = epochs.iter().map(|epoch| epoch.timeline).collect();
    assert_eq!(
        timelines,
        [1, 2, 1],
        "its WAL is not that of the restored database"
    );
}
