//! One node, a clone, in place.

use serde_json::Value;

use crate::scene::{Client, Scene, beside};

#[tokio::test(flavor = "multi_thread")]
async fn one_node_goes_back_and_the_other_never_notices() {
    let scene = Scene::new(2, &[]).await;
    let backup = scene.backed_up().await;
    let before = scene.rows(1).await;
    let client = Client::of(scene.database(1));
    let run = scene
        .restored(&backup, &["--node", &backup.nodes[0]])
        .good();
    let plan = run
        .stdout
        .lines()
        .find(|line| line.contains(r#""event":"plan""#))
        .unwrap();
    let plan: Value = serde_json::from_str(plan).unwrap();
    assert_eq!(plan["left_out"][0], backup.nodes[1].as_str(), "{plan}");
    assert_eq!(run.result()["nodes"].as_array().unwrap().len(), 1);
    scene.assert_at_the_point(&[0]).await;
    client.assert_undisturbed().await;
    assert_eq!(scene.rows(1).await, before);
    scene.assert_nothing_left(1);
    let untouched = backup.nodes[1].parse().unwrap();
    assert_eq!(
        scene.catalog().await.epochs(untouched).await.unwrap().len(),
        1
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn a_clone_is_a_node_of_its_own_and_both_are_backed_up() {
    let mut scene = Scene::new(1, &[]).await;
    let backup = scene.backed_up().await;
    let before = scene.rows(0).await;
    let client = Client::of(scene.database(0));
    let host = scene.fleet.add_host("clone", &[]);
    let root = scene.fleet.hosts[host].root.clone();
    let (agent, directory) = (scene.agent(host).to_owned(), root.display().to_string());
    let map = format!("{}={agent}", backup.nodes[0]);
    let mut restore = scene.fleet.command(&[
        "restore", "--id", &backup.id, "--clone", "--yes", "--output", "json",
    ]);
    restore.args(["--nodes", &agent, "--target-dir", &directory, "--map", &map]);
    let run = support::fleet::wait(restore, std::time::Duration::from_mins(3)).good();
    let made = &run.result()["nodes"][0];
    let clone = made["node_id"].as_str().unwrap().to_owned();
    assert_ne!(clone, backup.nodes[0]);
    assert_eq!(made["source"], backup.nodes[0].as_str());
    let original = backup.nodes[0].parse().unwrap();
    let epochs = scene.catalog().await.epochs(original).await.unwrap();
    assert_eq!(epochs.len(), 1, "the original goes on in its epoch");

    // An agent beside the clone: same system identifier, its own node and its own WAL.
    let data = made["data_directory"].as_str().unwrap().to_owned();
    let port = made["port"].to_string();
    let bindir = scene
        .database(0)
        .installation()
        .bindir
        .display()
        .to_string();
    // Its socket is where the source's configuration has it, and that place is still there.
    let sockets = scene.database(0).socket_directory().display().to_string();
    let flags = [
        "--pg-host",
        &sockets,
        "--pgdata",
        &data,
        "--pg-port",
        &port,
        "--pg-bindir",
        &bindir,
    ];
    let beside_it = scene
        .fleet
        .start_agent("beside the clone", &root, None, &flags);
    let nodes = format!("{},{}", scene.agent(0), beside_it.address);
    let both = scene
        .fleet
        .run(&["backup", "--nodes", &nodes, "--output", "json"]);
    let both = both.good().result();
    let mut ids: Vec<_> = both["nodes"]
        .as_array()
        .unwrap()
        .iter()
        .map(|it| it["node_id"].as_str().unwrap())
        .collect();
    ids.sort_unstable();
    let mut wanted = [backup.nodes[0].as_str(), clone.as_str()];
    wanted.sort_unstable();
    assert_eq!(ids, wanted);
    client.assert_undisturbed().await;
    assert_eq!(scene.rows(0).await, before);
}

#[tokio::test(flavor = "multi_thread")]
async fn in_place_leaves_nothing_of_what_was_there() {
    let scene = Scene::new(2, &[]).await;
    let backup = scene.backed_up().await;
    let run = scene.restored(&backup, &["--in-place"]).good();
    let plan = run
        .stdout
        .lines()
        .find(|line| line.contains(r#""event":"plan""#))
        .unwrap();
    let plan: Value = serde_json::from_str(plan).unwrap();
    assert_eq!(plan["way_back"], false, "{plan}");
    scene.assert_at_the_point(&[0, 1]).await;
    for number in 0..2 {
        assert_eq!(beside(&scene.data(number), "").len(), 0);
    }
    let nodes = scene.nodes();
    let _ = scene.fleet.run(&["backup", "--nodes", &nodes]).good();
}
