//! Before the decision every node goes back: the databases answer all the time, and have every row.

use std::time::Duration;

use catalog::model::Verdict;
use rustix::process::Signal;
use support::s3::{Operation, When};

use crate::scene::{Client, SLOW, Scene};

/// Waits until nothing of a restore is left beside any database.
async fn until_nothing_is_left(scene: &Scene, numbers: &[usize]) {
    for _ in 0..60 {
        let left = numbers
            .iter()
            .any(|it| !crate::scene::beside(&scene.data(*it), "").is_empty());
        if !left {
            return;
        }
        tokio::time::sleep(Duration::from_millis(500)).await;
    }
    for number in numbers {
        scene.assert_nothing_left(*number);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_agent_that_dies_before_the_decision_takes_all_nodes_back() {
    let mut scene = Scene::new(3, &[]).await;
    let backup = scene.backed_up().await;
    let before = scene.all_rows().await;
    let clients: Vec<_> = (0..3).map(|it| Client::of(scene.database(it))).collect();
    let agents: Vec<_> = (0..3).map(|it| scene.agent(it).to_owned()).collect();
    let agents: Vec<_> = agents.iter().map(String::as_str).collect();
    let mut running = scene.restoring(&backup, &[SLOW[0], SLOW[1], "--agent-timeout", "2"]);
    running.until("fetching", &agents).await;
    assert_eq!(
        crate::scene::beside(&scene.data(1), "restore").len(),
        1,
        "the copy is being made"
    );
    scene.fleet.hosts[1].agent.kill();
    let run = running.end().await;
    let error = run.result()["error"].clone();
    assert_eq!(
        (&error["kind"], &error["node"]),
        (&"agent-unreachable".into(), &agents[1].into()),
        "{run:?}"
    );
    scene.assert_decided(Verdict::Rollback).await;
    until_nothing_is_left(&scene, &[0, 2]).await;
    // The dead agent's copy goes when somebody ends the restore.
    scene.fleet.restart_agent(1);
    let next = error["next"].as_str().unwrap().to_owned();
    let operation = scene.operation();
    assert_eq!(
        next,
        format!("gs_pitr operations resume {operation}"),
        "{run:?}"
    );
    let resumed = scene.resumed_elsewhere(operation, &[]).await.good();
    assert_eq!(resumed.result()["outcome"], "rolled-back");
    until_nothing_is_left(&scene, &[0, 1, 2]).await;
    for client in clients {
        client.assert_undisturbed().await;
    }
    assert_eq!(scene.all_rows().await, before);
    let again = scene.resumed_elsewhere(operation, &[]).await.good();
    assert_eq!(again.result()["outcome"], "ended");
    let _ = scene.restored(&backup, &[]).good();
    scene.assert_at_the_point(&[0, 1, 2]).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn ctrl_c_before_the_decision_takes_all_nodes_back() {
    let scene = Scene::new(2, &[]).await;
    let backup = scene.backed_up().await;
    let before = scene.all_rows().await;
    let clients: Vec<_> = (0..2).map(|it| Client::of(scene.database(it))).collect();
    let mut running = scene.restoring(&backup, &SLOW);
    running
        .until("fetching", &[scene.agent(0), scene.agent(1)])
        .await;
    running.signal(Signal::INT);
    let run = running.end().await;
    assert_eq!(run.code, 130, "{run:?}");
    assert_eq!(run.result()["error"]["changed"], false, "{run:?}");
    scene.assert_decided(Verdict::Rollback).await;
    for number in 0..2 {
        scene.assert_nothing_left(number);
    }
    for client in clients {
        client.assert_undisturbed().await;
    }
    assert_eq!(scene.all_rows().await, before);
    // It gave its lease back: the next one need not wait.
    let _ = scene.restored(&backup, &[]).good();
    scene.assert_at_the_point(&[0, 1]).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn agents_without_a_client_go_back_by_themselves() {
    let scene = Scene::new(2, &["--client-timeout", "3"]).await;
    let backup = scene.backed_up().await;
    let before = scene.all_rows().await;
    let clients: Vec<_> = (0..2).map(|it| Client::of(scene.database(it))).collect();
    // One is proved already and waits, the other still fetches: both notice.
    let mut running = scene.restoring(&backup, &[]);
    let held = scene
        .bucket
        .server()
        .hold(Operation::Put, When::Before, |key| {
            key.ends_with("/decision.json")
        });
    running
        .until("proved", &[scene.agent(0), scene.agent(1)])
        .await;
    let decision = held.reached().await;
    let said = running.kill();
    held.cut();
    assert!(
        scene.bucket.server().bytes(&decision).is_none(),
        "nothing was decided: {said}"
    );
    until_nothing_is_left(&scene, &[0, 1]).await;
    for client in clients {
        client.assert_undisturbed().await;
    }
    scene.assert_decided(Verdict::Rollback).await;
    assert_eq!(scene.all_rows().await, before);
    let operation = scene.operation();
    let resumed = scene.resumed_elsewhere(operation, &[]).await.good();
    assert_eq!(resumed.result()["outcome"], "rolled-back");
    assert_eq!(scene.all_rows().await, before);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_restore_that_died_undecided_is_taken_back_by_a_resume() {
    let scene = Scene::new(2, &[]).await;
    let backup = scene.backed_up().await;
    let before = scene.all_rows().await;
    let clients: Vec<_> = (0..2).map(|it| Client::of(scene.database(it))).collect();
    let mut running = scene.restoring(&backup, &SLOW);
    running
        .until("fetching", &[scene.agent(0), scene.agent(1)])
        .await;
    running.kill();
    let operation = scene.operation();
    let resumed = scene.resumed_elsewhere(operation, &[]).await.good();
    assert_eq!(resumed.result()["outcome"], "rolled-back");
    scene.assert_decided(Verdict::Rollback).await;
    for number in 0..2 {
        scene.assert_nothing_left(number);
    }
    for client in clients {
        client.assert_undisturbed().await;
    }
    assert_eq!(scene.all_rows().await, before);
}
