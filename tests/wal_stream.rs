//! WAL that is shipped all the time, from real databases under load: the agent killed for a while, the database restarted, the
//! store down, the hold limit reached, the slot dropped by somebody, 64 MB segments. After each of them the bucket's segments
//! follow each other, or a gap that is written down lies between them; and backups restore.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    reason = "a panic is a failed test, with its reason"
)]

#[path = "wal_stream/copies.rs"]
mod copies;
#[path = "wal_stream/scene.rs"]
mod scene;

use std::time::Duration;

use scene::{Scene, Writer};

/// How long something is away.
fn a_while() -> Duration {
    let seconds = std::env::var("GS_PITR_AWAY_SECONDS").ok();
    let seconds = seconds.and_then(|text| text.parse().ok());
    Duration::from_secs(seconds.unwrap_or(6))
}

#[tokio::test(flavor = "multi_thread")]
async fn it_survives_the_agent_the_database_and_the_store() {
    let mut scene = Scene::new("wal-survives", 1, false, &[]).await;
    let writer = Writer::start(scene.database());
    let first = scene.back_up();
    let status = scene.until_state("running").await;
    assert_eq!(status["wants_base"], false, "{status}");
    let slot = status["slot"].as_str().expect("a slot").to_owned();
    assert_eq!(scene.slots().await, slot);

    // The agent is gone for a while. The slot holds what is written meanwhile.
    scene.fleet.hosts[0].agent.kill();
    tokio::time::sleep(a_while()).await;
    assert_eq!(scene.slots().await, slot);
    scene.fleet.restart_agent(0);
    scene.until_shipped().await;
    assert!(scene.contiguous().await.is_empty());
    assert_eq!(scene.slots().await, slot, "its own slot is not swept");

    // The database is killed, and comes back after a while.
    scene.database().stop("immediate");
    scene
        .until("it says that the database is away", |status| {
            status["state"] == "waiting" && status["error_kind"] == "database"
        })
        .await;
    tokio::time::sleep(a_while() / 2).await;
    scene.database().start();
    scene.until_shipped().await;
    assert!(scene.contiguous().await.is_empty());

    // The store is down.
    scene.server.set_down(true);
    scene
        .until("it says that the store is down", |status| {
            status["state"] == "waiting" && status["error_kind"] == "store-unavailable"
        })
        .await;
    tokio::time::sleep(a_while()).await;
    scene.server.set_down(false);
    scene.until_shipped().await;
    assert!(scene.contiguous().await.is_empty());

    // A second backup joins.
    let second = scene.back_up();
    assert!(writer.stop().await > 0);
    scene.until_shipped().await;
    assert!(scene.contiguous().await.is_empty(), "{}", scene.log());
    scene.restores(&first);
    scene.restores(&second);

    // Stopped, nothing is left. Asked again, nothing happens.
    for _ in 0..2 {
        let stopped = scene.run(&["wal", "stop"]).good();
        assert_eq!(stopped.result()["nodes"][0]["state"], "off");
        assert_eq!(scene.slots().await, "");
    }
    let (status, code) = scene.status();
    assert_eq!((status["state"].as_str(), code), (Some("off"), 0));
}

#[tokio::test(flavor = "multi_thread")]
async fn credentials_that_were_lent_have_to_be_lent_again() {
    let mut scene = Scene::new("wal-lent", 1, true, &[]).await;
    scene.back_up();
    scene.until_state("running").await;
    scene.fleet.restart_agent(0);
    let status = scene
        .until("it waits for credentials", |status| {
            status["error_kind"] == "store-denied"
        })
        .await;
    assert_eq!(status["state"], "waiting");
    assert!(
        status["next"].as_str().unwrap().contains("wal start"),
        "{status}"
    );
    assert_eq!(scene.status().1, 4);
    let state = scene.fleet.hosts[0].root.join("state");
    for entry in std::fs::read_dir(state).expect("the state directory") {
        let text = std::fs::read_to_string(entry.unwrap().path()).unwrap();
        assert!(!text.contains("stand-in-secret"), "{text}");
    }
    scene.write(3).await;
    let _ = scene.run(&["wal", "start"]).good();
    scene.until_shipped().await;
    assert!(scene.contiguous().await.is_empty());
    // A backup lends them just as well.
    scene.fleet.restart_agent(0);
    scene.write(3).await;
    scene.back_up();
    scene.until_shipped().await;
    assert!(scene.contiguous().await.is_empty());
}

#[tokio::test(flavor = "multi_thread")]
async fn too_much_held_is_let_go_and_a_new_base_joins_again() {
    let mut scene = Scene::new("wal-hold", 1, false, &["--wal-hold", "12"]).await;
    let first = scene.back_up();
    scene.until_state("running").await;
    scene.server.set_down(true);
    scene.write(20).await;
    let status = scene.until_state("gap").await;
    assert!(
        status["gap"]["why"].as_str().unwrap().contains("held back"),
        "{status}"
    );
    assert_eq!(scene.status().1, 9);
    // Nothing is held while the store is down.
    scene.write(20).await;
    assert_eq!(scene.slots().await, "");
    // The agent may be restarted in the meantime.
    scene.fleet.restart_agent(0);
    scene.until_state("gap").await;
    // Checkpoints remove what nobody holds.
    for _ in 0..3 {
        scene.database().execute("CHECKPOINT").await;
        scene.write(5).await;
    }
    scene.server.set_down(false);
    let status = scene.until_state("running").await;
    assert_eq!(status["wants_base"], true);
    assert!(
        status["next"].as_str().unwrap().contains("gs_pitr backup"),
        "{status}"
    );
    scene.until_shipped().await;
    let gaps = scene.contiguous().await;
    assert_eq!(gaps.len(), 1, "{gaps:?}");
    assert!(gaps[0].reason.contains("held back"), "{gaps:?}");

    let shown = scene
        .fleet
        .run(&["show", "--output", "json"])
        .good()
        .result();
    assert_eq!(shown["wal"][0]["wants_base"], true, "{shown}");
    let second = scene.back_up();
    let status = scene
        .until("the base is there", |status| status["wants_base"] == false)
        .await;
    assert!(status["gap"].is_null(), "{status}");
    assert_eq!(scene.status().1, 0);
    let shown = scene
        .fleet
        .run(&["show", "--output", "json"])
        .good()
        .result();
    assert_eq!(shown["wal"][0]["wants_base"], false, "{shown}");
    assert_eq!(shown["wal"][0]["gaps"].as_array().unwrap().len(), 1);
    let verified = scene.fleet.run(&["verify", "--all", "--output", "json"]);
    assert_eq!(verified.code, 0, "{verified:?}");
    scene.restores(&first);
    scene.restores(&second);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_slot_that_somebody_drops_is_a_gap_or_nothing_is_missing() {
    let scene = Scene::new("wal-dropped", 1, false, &[]).await;
    scene.back_up();
    let status = scene.until_state("running").await;
    let slot = status["slot"].as_str().unwrap().to_owned();
    let drop = format!("SELECT pg_drop_replication_slot('{slot}')");
    // Between two looks; the database still has all of it.
    scene.database().execute(&drop).await;
    scene
        .until("the slot is there again", |status| {
            status["state"] == "running"
        })
        .await;
    scene.write(3).await;
    scene.until_shipped().await;
    scene.contiguous().await;

    // While nothing can be shipped, and the database removes it.
    scene.server.set_down(true);
    scene.write(4).await;
    scene.database().execute(&drop).await;
    for _ in 0..4 {
        scene.write(30).await;
        scene.database().execute("CHECKPOINT").await;
    }
    scene.until_state("gap").await;
    scene.server.set_down(false);
    scene.until_state("running").await;
    scene.until_shipped().await;
    let gaps = scene.contiguous().await;
    assert!(
        gaps.iter()
            .any(|gap| gap.reason.contains("dropped the slot")),
        "{gaps:?}"
    );
    scene.back_up();
    scene.until_shipped().await;
    scene.contiguous().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn large_segments_are_shipped_within_the_budget() {
    let mut scene = Scene::new("wal-large", 64, false, &[]).await;
    let backup = scene.back_up();
    scene.write(80).await;
    scene.until_shipped().await;
    assert!(scene.contiguous().await.is_empty());
    let peak = scene.fleet.hosts[0].agent.peak_rss_mib();
    assert!(peak <= 320, "{peak} MiB");
    scene.restores(&backup);

    // A budget that they do not fit in is refused with the setting that helps.
    scene.fleet.hosts[0]
        .flags
        .extend(["--memory".to_owned(), "96".to_owned()]);
    scene.fleet.restart_agent(0);
    let status = scene
        .until("it says what is in the way", |status| {
            !status["last_error"].is_null()
        })
        .await;
    assert!(
        status["next"].as_str().unwrap().contains("--memory 192"),
        "{status}"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn a_restore_in_its_place_ends_it_and_the_next_backup_begins_anew() {
    let scene = Scene::new("wal-restored", 1, false, &[]).await;
    let backup = scene.back_up();
    scene.write(3).await;
    scene.until_shipped().await;
    let before = scene.status().0["epoch"].as_str().unwrap().to_owned();
    let restored = scene.run(&["restore", "--id", &backup, "--yes"]).good();
    assert!(restored.stdout.contains("shipped no more"), "{restored:?}");
    let (status, code) = scene.status();
    assert_eq!(
        (status["state"].as_str(), code),
        (Some("off"), 0),
        "{status}"
    );
    assert_eq!(scene.slots().await, "");
    scene.back_up();
    let status = scene.until_state("running").await;
    assert_ne!(status["epoch"].as_str().unwrap(), before);
    scene.write(3).await;
    scene.until_shipped().await;
    assert!(scene.contiguous().await.is_empty());
}
