//! After the decision every node goes forward, whoever dies.

use catalog::model::Verdict;
use support::s3::{Operation, When};

use crate::scene::{Backup, Scene, beside};

/// A restore whose operator is killed when `commit` stands and it does not know that yet.
async fn killed_after_the_decision(scene: &Scene, backup: &Backup) {
    let held = scene
        .bucket
        .server()
        .hold(Operation::Put, When::After, |key| {
            key.ends_with("/decision.json")
        });
    let running = scene.restoring(backup, &[]);
    held.reached().await;
    running.kill();
    held.cut();
    scene.assert_decided(Verdict::Commit).await;
}

/// All nodes are at the point, and their epochs say so.
async fn assert_all_new(scene: &Scene, backup: &Backup) {
    scene.assert_at_the_point(&[0, 1]).await;
    for number in 0..2 {
        assert_eq!(beside(&scene.data(number), "old-").len(), 1);
        assert_eq!(
            beside(&scene.data(number), "").len(),
            1,
            "only that is left"
        );
        let node = backup.nodes[number].parse().unwrap();
        let epochs = scene.catalog().await.epochs(node).await.unwrap();
        assert_eq!(epochs.len(), 2, "one new epoch, however often it was tried");
        assert_eq!(epochs[1].timeline, 2);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_decided_restore_is_resumed_from_another_home() {
    let scene = Scene::new(2, &[]).await;
    let backup = scene.backed_up().await;
    killed_after_the_decision(&scene, &backup).await;
    let operation = scene.operation();
    let nodes = scene.nodes();
    // Nothing else is begun on these nodes until it is through.
    let refused = scene
        .fleet
        .run(&["backup", "--nodes", &nodes, "--output", "json"]);
    let error = refused.result()["error"].clone();
    assert_eq!(error["kind"], "conflict", "{refused:?}");
    assert_eq!(
        error["next"],
        format!("gs_pitr operations resume {operation}")
    );
    let refused = scene.restored(&backup, &[]);
    assert_eq!(refused.result()["error"]["kind"], "conflict", "{refused:?}");

    let resumed = scene.resumed_elsewhere(operation, &[]).await.good();
    assert_eq!(resumed.result()["nodes"].as_array().unwrap().len(), 2);
    assert_all_new(&scene, &backup).await;
    let again = scene.resumed_elsewhere(operation, &[]).await.good();
    assert_eq!(again.result()["outcome"], "ended");
    assert_all_new(&scene, &backup).await;
    let _ = scene
        .fleet
        .run(&["backup", "--nodes", &nodes, "--output", "json"])
        .good();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_decided_restore_is_resumed_although_an_agent_was_killed_too() {
    let mut scene = Scene::new(2, &[]).await;
    let backup = scene.backed_up().await;
    killed_after_the_decision(&scene, &backup).await;
    let operation = scene.operation();
    scene.fleet.hosts[1].agent.kill();
    let away = scene.resumed_elsewhere(operation, &[]).await;
    let error = away.result()["error"].clone();
    assert_eq!(error["kind"], "agent-unreachable", "{away:?}");
    assert_eq!(
        error["next"],
        format!("gs_pitr operations resume {operation}"),
        "{away:?}"
    );
    // It comes back under another address, which only the operator knows.
    let host = &scene.fleet.hosts[1];
    let agent = scene
        .fleet
        .start_agent(&host.name, &host.root, host.cluster.as_ref(), &[]);
    let address = agent.address.clone();
    scene.fleet.hosts[1].agent = agent;
    let resumed = scene
        .resumed_elsewhere(operation, &["--nodes", &address])
        .await
        .good();
    assert_eq!(resumed.result()["nodes"].as_array().unwrap().len(), 2);
    assert_all_new(&scene, &backup).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn agents_without_a_client_go_forward_by_themselves() {
    let scene = Scene::new(2, &["--client-timeout", "3"]).await;
    let backup = scene.backed_up().await;
    killed_after_the_decision(&scene, &backup).await;
    let is_left = || {
        let all = scene.operations();
        all.iter()
            .any(|it| it["kind"] == "restore" && it["state"] == "left")
    };
    let mut tries = 0;
    while beside(&scene.data(0), "restore").len() + beside(&scene.data(1), "restore").len() > 0 {
        tries += 1;
        assert!(tries < 120, "they do not go forward");
        tokio::time::sleep(std::time::Duration::from_millis(500)).await;
    }
    scene.assert_at_the_point(&[0, 1]).await;
    // Until its lease has run out, the dead operator counts as one that works.
    for _ in 0..60 {
        if is_left() {
            break;
        }
        tokio::time::sleep(std::time::Duration::from_millis(500)).await;
    }
    assert!(is_left(), "{:?}", scene.operations());
    // What only an operator does is left: the epochs, and the end of the journal.
    let operation = scene.operation();
    let _ = scene.resumed_elsewhere(operation, &[]).await.good();
    assert_all_new(&scene, &backup).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_node_that_is_lost_for_good_does_not_keep_the_others_closed() {
    let mut scene = Scene::new(2, &[]).await;
    let backup = scene.backed_up().await;
    killed_after_the_decision(&scene, &backup).await;
    let operation = scene.operation();
    let lost = backup.nodes[1].clone();
    scene.fleet.hosts[1].agent.kill();
    let all = ["--without", &backup.nodes[0], "--without", &lost];
    let refused = scene.resumed_elsewhere(operation, &all).await;
    assert_eq!(refused.result()["error"]["kind"], "usage", "{refused:?}");

    let without = ["--without", &lost[..8]];
    let resumed = scene.resumed_elsewhere(operation, &without).await.good();
    assert!(resumed.stdout.contains(&lost), "{resumed:?}");
    scene.assert_at_the_point(&[0]).await;
    let epochs = async |number: usize| {
        let node = backup.nodes[number].parse().unwrap();
        scene.catalog().await.epochs(node).await.unwrap().len()
    };
    assert_eq!((epochs(0).await, epochs(1).await), (2, 1));
    let again = scene.resumed_elsewhere(operation, &[]).await.good();
    assert_eq!(again.result()["outcome"], "ended");

    // It turns up again, with what it had of the restore, and is brought to the same point alone.
    let host = &scene.fleet.hosts[1];
    let agent = scene
        .fleet
        .start_agent(&host.name, &host.root, host.cluster.as_ref(), &[]);
    scene.fleet.hosts[1].agent = agent;
    assert_eq!(beside(&scene.data(1), "restore").len(), 1);
    let nodes = scene.agent(1).to_owned();
    let args = [
        "restore", "--id", &backup.id, "--node", &lost, "--nodes", &nodes,
    ];
    let mut alone = scene.fleet.command(&args);
    alone.args(["--yes", "--output", "json", "--lease-ttl", "5"]);
    let _ = support::fleet::wait(alone, std::time::Duration::from_mins(3)).good();
    scene.assert_at_the_point(&[0, 1]).await;
}
