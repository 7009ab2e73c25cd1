//! Who copies beside the shipping, and who must not ship: a probackup, and the agent of a copied machine.

use std::fs;
use std::time::{Duration, Instant};

use support::fleet::Host;
use support::fuse;
use support::os;
use support::postgres::{self, Installation};
use support::probackup::{Kind, ProbackupUnderTest};
use support::skip::skip;

use crate::scene::Scene;

/// `pg_probackup` copies while the agent ships; the points behind its backup are reached by what was shipped.
#[tokio::test(flavor = "multi_thread")]
async fn a_point_behind_a_copy_of_probackup_is_reached() {
    if let Err(why) = fuse::ready() {
        return skip("a_point_behind_a_copy_of_probackup_is_reached", &why);
    }
    let program = ProbackupUnderTest::find(Kind::Pg);
    let path = program.path().display().to_string();
    let flags = ["--probackup", path.as_str()];
    let mut scene = Scene::new("wal-probackup", 1, false, &flags).await;
    insert(&scene, 1000).await;
    let backup = scene.back_up_by(&["--engine", "probackup", "-b", "FULL"]);
    scene.until_state("running").await;
    insert(&scene, 500).await;
    // One that copies changed pages only: it ends at a point of its own, and both lead further.
    let increment = scene.back_up_by(&["--engine", "probackup", "-b", "DELTA"]);
    insert(&scene, 250).await;
    scene.fleet.restart_agent(0);
    scene.until_state("running").await;
    let point = scene.run(&["point", "create"]).good().result();
    assert_eq!(point["base"], increment.as_str(), "{point}");
    insert(&scene, 5).await;
    scene.until_shipped().await;
    assert!(scene.contiguous().await.is_empty());
    let point = point["point_id"].as_str().unwrap().to_owned();
    for base in [&increment, &backup] {
        let data = scene.restored(&["--point", &point, "--id", base], &flags);
        let (socket, port) = postgres::running(&data);
        let client = postgres::connect(&socket, port, "postgres").await;
        let rows = postgres::query_one(&client, "SELECT count(*) FROM numbers").await;
        assert_eq!(rows, "1750", "{base}");
        drop(client);
        let mut stop = os::command(Installation::newest().bindir.join("pg_ctl"));
        stop.args(["stop", "-w", "-m", "immediate", "-D"])
            .arg(&data);
        assert!(stop.output().unwrap().status.success());
    }
}

async fn insert(scene: &Scene, rows: u32) {
    let sql = format!(
        "INSERT INTO numbers (filler) SELECT repeat('x', 100) FROM generate_series(1, {rows})"
    );
    scene.database().execute(&sql).await;
}

/// A machine is copied with all its disks: database, slot, and what the agent remembers. The copy's agent writes nothing into
/// the original's epoch, and the original goes on.
#[tokio::test(flavor = "multi_thread")]
async fn the_agent_of_a_copied_machine_ships_nothing() {
    let mut scene = Scene::new("wal-copied", 1, false, &[]).await;
    scene.back_up();
    scene.until_state("running").await;
    let original = &scene.fleet.hosts[0];
    let flags: Vec<_> = original.flags.clone();
    let database = scene.database();
    database.stop("fast");
    let root = scene.fleet.path().join("copy");
    fs::create_dir(&root).unwrap();
    os::give(&root);
    let copy = database.copied_to(&root);
    let remembered = original.root.join("state");
    let mut cp = os::command("cp");
    let copied = cp.arg("-a").arg(&remembered).arg(&root).output().unwrap();
    assert!(copied.status.success(), "{copied:?}");
    database.start();
    copy.start();
    let words: Vec<_> = flags.iter().map(String::as_str).collect();
    let agent = scene.fleet.start_agent("copy", &root, Some(&copy), &words);
    let name = "copy".to_owned();
    scene.fleet.hosts.push(Host {
        name,
        root,
        cluster: Some(copy),
        agent,
        flags,
    });
    let refused = scene.until_on(1, "it is refused", |status| status["state"] == "refused");
    let refused = refused.await;
    let why = refused["last_error"].as_str().unwrap();
    assert!(why.contains("nothing was written"), "{why}");
    let copy = scene.fleet.hosts[1].cluster.as_ref().unwrap();
    let slots = "SELECT count(*) FROM pg_replication_slots";
    // The slot goes right after it is said.
    let until = Instant::now() + Duration::from_mins(1);
    while copy.query_one("postgres", slots).await != "0" {
        assert!(Instant::now() < until, "it is still there");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    for _ in 0..3 {
        copy.execute("SELECT pg_logical_emit_message(false, 'copy', repeat('z', 1 << 20))")
            .await;
    }
    assert_eq!(copy.query_one("postgres", slots).await, "0");
    // It stays so over a restart.
    scene.fleet.restart_agent(1);
    let again = scene.status_on(1).0;
    assert_eq!(again["state"], "refused", "{again}");
    scene.write(3).await;
    scene.until_shipped().await;
    assert!(scene.contiguous().await.is_empty());
}
