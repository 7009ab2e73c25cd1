//! A tablespace that was created between the copy and the point lies at a path that the live database uses: replay
//! would write into its files.

use std::path::{Path, PathBuf};
use std::time::Duration;

use rustix::process::Signal;
use support::os;
use support::s3::{Operation, When};

use crate::scene::{Backup, Client, SLOW, Scene, beside};

/// Every file below a directory with its content.
fn files(directory: &Path) -> Vec<(PathBuf, Vec<u8>)> {
    let mut all = Vec::new();
    for entry in std::fs::read_dir(directory).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            all.extend(files(&path));
        } else {
            let content = std::fs::read(&path).unwrap();
            all.push((path, content));
        }
    }
    all.sort();
    all
}

/// A backup of one node; between its copy and its point a tablespace comes to be, which is filled afterwards.
async fn scene() -> (Scene, Backup, PathBuf) {
    let scene = Scene::new(1, &[]).await;
    let space = scene.fleet.hosts[0].root.join("new space");
    std::fs::create_dir(&space).unwrap();
    os::give(&space);
    // The files are read, and the copy is not yet at its end.
    let server = scene.bucket.server();
    let held = server.hold(Operation::Put, When::Before, |key| key.ends_with("/index"));
    let created = async {
        held.reached().await;
        let database = scene.database(0);
        let place = space.display();
        database
            .execute(&format!("CREATE TABLESPACE new_space LOCATION '{place}'"))
            .await;
        let sql = "CREATE TABLE s WITH (autovacuum_enabled = off) TABLESPACE new_space AS SELECT g AS id FROM generate_series(1, 1000) g";
        database.execute(sql).await;
        held.release();
    };
    let (backup, ()) = tokio::join!(scene.backed_up(), created);
    let database = scene.database(0);
    let sql = "INSERT INTO s SELECT g FROM generate_series(1001, 9000) g";
    database.execute(sql).await;
    // The database itself must have no reason left to touch these files: no flags or hints to set.
    for sql in ["VACUUM (FREEZE) s", "CHECKPOINT"] {
        database.execute(sql).await;
    }
    (scene, backup, space)
}

async fn sum(scene: &Scene) -> String {
    let sql = "SELECT count(*) || ' ' || sum(id) FROM s";
    scene.database(0).query_one("postgres", sql).await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_restore_that_would_write_into_a_live_tablespace_is_refused() {
    let (scene, backup, space) = scene().await;
    let (sums, content) = (sum(&scene).await, files(&space));
    assert!(
        content
            .iter()
            .map(|(_, content)| content.len())
            .sum::<usize>()
            > 200_000
    );

    let client = Client::of(scene.database(0));
    let refused = scene.restored(&backup, &[]);
    assert_ne!(refused.code, 0, "{refused:?}");
    let error = refused.result()["error"].clone();
    assert!(
        error["next"].as_str().unwrap().contains("--stop-early"),
        "{refused:?}"
    );
    client.assert_undisturbed().await;
    assert_eq!(
        (sum(&scene).await, files(&space)),
        (sums.clone(), content.clone())
    );
    scene.assert_nothing_left(0);
}

#[tokio::test(flavor = "multi_thread")]
async fn stopped_early_it_goes_back_on_ctrl_c_and_forward_when_decided() {
    let (scene, backup, space) = scene().await;
    let (rows, sums, content) = (scene.rows(0).await, sum(&scene).await, files(&space));
    let mut running = scene.restoring(&backup, &["--stop-early", SLOW[0], SLOW[1]]);
    running.until("fetching", &[scene.agent(0)]).await;
    // What comes right before the decision.
    let server = scene.bucket.server();
    let held = server.hold(Operation::Put, When::Before, |key| {
        key.contains("lease/restore/")
    });
    running.until("proved", &[scene.agent(0)]).await;
    assert!(
        scene.database(0).pid().is_none(),
        "it is stopped while replay writes there"
    );
    running.signal(Signal::INT);
    tokio::time::sleep(Duration::from_millis(500)).await;
    held.release();
    let run = running.end().await;
    assert_eq!(run.code, 130, "{run:?}");
    assert_eq!(scene.rows(0).await, rows, "it runs again: {run:?}");
    assert_eq!(sum(&scene).await, sums);
    assert!(
        files(&space) == content,
        "the live files are not byte for byte as they were"
    );
    scene.assert_nothing_left(0);

    let _ = scene.restored(&backup, &["--stop-early"]).good();
    scene.assert_at_the_point(&[0]).await;
    assert_eq!(sum(&scene).await, "1000 500500");
    assert_eq!(beside(&scene.data(0), "old-").len(), 1);
}
