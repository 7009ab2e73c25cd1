//! The main job, as a user runs it: three real databases under load, one backup straight into a bucket, the databases destroyed,
//! every one back from the bucket alone, recovered to its restore point.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    reason = "a panic is a failed test, with its reason"
)]

use std::fs;
use std::io::{BufRead as _, BufReader, Read as _};
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::{Duration, Instant};

use catalog::model::{Manifest, NodeBackup, NodePoint, Point};
use serde_json::Value;
use support::bucket::Bucket;
use support::fleet::{Fleet, Run};
use support::load::{self, Ledger, Load, Verdict};
use support::os;
use support::postgres::{self, Cluster, ClusterOptions, Installation};

/// Sends a signal to a process of ours.
fn signal(pid: u32, signal: rustix::process::Signal) {
    let pid = rustix::process::Pid::from_raw(pid.try_into().expect("a pid")).expect("a pid");
    rustix::process::kill_process(pid, signal).expect("the process is there");
}

/// Runs the backup while the first node's agent is held still, from the moment it copies until the last node has
/// ended its copy and `between` is done: so what `between` does comes after that copy and before the point.
async fn backup_with_pause(fleet: &Fleet, between: impl Future<Output = ()>) -> Run {
    let nodes = fleet.addresses(&[0, 1, 2]);
    let args = [
        "backup",
        "--nodes",
        &nodes,
        "--output",
        "json",
        "--label",
        "main job",
        "--point-timeout",
        "3",
    ];
    let mut command = fleet.command(&args);
    let mut child = command
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("gs_pitr");
    let (lines, mut seen) = tokio::sync::mpsc::channel::<String>(10_000);
    let stdout = BufReader::new(child.stdout.take().expect("its output"));
    std::thread::spawn(move || {
        for line in stdout.lines().map_while(Result::ok) {
            if lines.blocking_send(line).is_err() {
                return;
            }
        }
    });
    let (held, last) = (fleet.hosts[0].agent.pid(), &fleet.hosts[2].agent.address);
    let (mut stdout, mut between, mut stopped) = (String::new(), Some(between), false);
    let deadline = Instant::now() + Duration::from_mins(4);
    while let Ok(Some(line)) = tokio::time::timeout(Duration::from_mins(2), seen.recv()).await {
        assert!(
            Instant::now() < deadline,
            "the backup takes too long: {stdout}"
        );
        stdout.push_str(&line);
        stdout.push('\n');
        let event: Value = serde_json::from_str(&line).expect("every line is JSON");
        let phase_of = |address: &str| event["phase"].as_str().filter(|_| event["node"] == address);
        if !stopped && phase_of(&fleet.hosts[0].agent.address) == Some("copying") {
            signal(held, rustix::process::Signal::STOP);
            stopped = true;
        }
        if stopped
            && phase_of(last) == Some("copied")
            && let Some(between) = between.take()
        {
            between.await;
            signal(held, rustix::process::Signal::CONT);
        }
    }
    let status = child.wait().expect("gs_pitr ends");
    let mut stderr = String::new();
    child
        .stderr
        .take()
        .expect("its errors")
        .read_to_string(&mut stderr)
        .expect("text");
    let run = Run {
        code: status.code().unwrap_or(-1),
        stdout,
        stderr,
    };
    assert!(
        between.is_none(),
        "the last node never said `copied` while the first was held: {run:?}"
    );
    run
}

fn amcheck(installation: &Installation, socket: &Path, port: u16) {
    let mut command = os::command(installation.bindir.join("pg_amcheck"));
    command
        .arg("-h")
        .arg(socket)
        .args(["-p", &port.to_string(), "-U", postgres::SUPERUSER]);
    command.args(["--heapallindexed", "--database", "shop db"]);
    let output = command.output().expect("pg_amcheck");
    let words = String::from_utf8_lossy(&output.stdout);
    assert!(
        output.status.success() && words.is_empty(),
        "pg_amcheck: {words}{}",
        String::from_utf8_lossy(&output.stderr)
    );
}

fn checksums(installation: &Installation, data: &Path) {
    let mut command = os::command(installation.bindir.join("pg_checksums"));
    let output = command
        .arg("--check")
        .arg("-D")
        .arg(data)
        .output()
        .expect("pg_checksums");
    assert!(
        output.status.success(),
        "{}{}",
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    );
}

/// Brings up three databases of different kinds.
async fn sources(fleet: &mut Fleet, installation: &Installation) {
    let options = |config_outside, password: Option<&str>| ClusterOptions {
        data_checksums: true,
        config_outside,
        password: password.map(str::to_owned),
        ..ClusterOptions::default()
    };
    fleet.add_database("node one", installation, options(true, None));
    fleet.add_database("node2", installation, options(false, None));
    fleet.add_database("node3", installation, options(false, None));
    for (number, host) in fleet.hosts.iter().enumerate() {
        let space = host.root.join("old space");
        fs::create_dir(&space).expect("a tablespace");
        os::give(&space);
        load::prepare(
            host.cluster.as_ref().expect("a database"),
            &space,
            number == 0,
        )
        .await;
    }
}

/// Everything that the disaster leaves: the bucket's words, and what the clients know.
struct Backup {
    manifest: Manifest,
    point: Point,
    /// By host.
    ledgers: Vec<Ledger>,
    /// Ports of the databases, by host.
    ports: Vec<u16>,
    /// A tablespace made after the copy and before the point.
    new_space: PathBuf,
}

impl Backup {
    fn node(&self, number: usize) -> &NodeBackup {
        self.manifest
            .nodes
            .iter()
            .find(|node| node.port == self.ports[number])
            .expect("the node")
    }

    fn point_of(&self, number: usize) -> &NodePoint {
        let id = self.node(number).node_id;
        self.point
            .nodes
            .iter()
            .find(|entry| entry.node_id == id)
            .expect("its point")
    }
}

fn database(fleet: &Fleet, number: usize) -> &Cluster {
    fleet.hosts[number].cluster.as_ref().expect("a database")
}

/// A backup under load; the load ends some time after the point, so that there is something that must not come back.
async fn back_up(fleet: &Fleet, bucket: &Bucket) -> Backup {
    let directory = fleet.path().join("ledgers");
    fs::create_dir(&directory).expect("ledgers");
    let loads: Vec<_> = (0..3)
        .map(|number| Load::start(database(fleet, number), &directory, 3))
        .collect();
    let new_space = fleet.hosts[2].root.join("new space");
    fs::create_dir(&new_space).expect("new space");
    os::give(&new_space);
    let between = async {
        let place = new_space.display();
        let third = database(fleet, 2);
        third
            .execute(&format!(
                "CREATE TABLESPACE \"new space\" LOCATION '{place}'"
            ))
            .await;
        let client = third.connect("shop db").await;
        let sql = "CREATE TABLE late TABLESPACE \"new space\" AS SELECT g FROM generate_series(1, 3000) g";
        client
            .batch_execute(sql)
            .await
            .expect("a table in the new tablespace");
    };
    let result = backup_with_pause(fleet, between).await.good().result();
    assert_eq!(
        (&result["event"], &result["status"]),
        (&"result".into(), &"ok".into())
    );
    // Whether the load ever left a quiet moment is chance; one that is claimed must be proved.
    let proved = result["proof"]["window_ms"].is_u64();
    let claimed = if proved { "cluster" } else { "per-node" };
    assert_eq!(result["consistency"], claimed, "{result}");
    tokio::time::sleep(Duration::from_secs(2)).await;
    let mut ledgers = Vec::new();
    for load in loads {
        ledgers.push(load.stop().await);
    }
    for (number, host) in fleet.hosts.iter().enumerate() {
        let slots = "SELECT count(*) FROM pg_replication_slots";
        assert_eq!(
            database(fleet, number).query_one("postgres", slots).await,
            "0",
            "slots left on {}",
            host.name
        );
    }
    assert_eq!(bucket.uploads_under_way().unwrap_or(0), 0, "uploads left");
    let id = result["backup_id"].as_str().expect("an id");
    let (manifest, point) = bucket.recorded(id).await;
    let ports = (0..3)
        .map(|number| database(fleet, number).port())
        .collect();
    Backup {
        manifest,
        point,
        ledgers,
        ports,
        new_space,
    }
}

/// Restores on three hosts that have no database. Returns where to, and the command's result.
fn restore(fleet: &mut Fleet, backup: &Backup) -> (PathBuf, Value) {
    // Only the parent of the new tablespace's literal path exists again.
    let parent = backup.new_space.parent().expect("a parent");
    fs::create_dir(parent).expect("its parent");
    os::give(parent);
    let target = fleet.path().join("restored here");
    fs::create_dir(&target).expect("target");
    os::give(&target);
    let (root, parent) = (target.display().to_string(), parent.display().to_string());
    for name in ["new1", "new2", "new3"] {
        fleet.add_host(name, &["--allow-root", &root, "--allow-root", &parent]);
    }
    let (nodes, id) = (
        fleet.addresses(&[0, 1, 2]),
        backup.manifest.backup_id.to_string(),
    );
    let map = |number: usize| {
        format!(
            "{}={}",
            backup.node(number).node_id,
            fleet.hosts[number].agent.address
        )
    };
    let maps = [map(0), map(1), map(2)];
    let mut args = vec![
        "restore",
        "--id",
        &id,
        "--nodes",
        &nodes,
        "--target-dir",
        &root,
        "--output",
        "json",
        "--yes",
    ];
    for map in &maps {
        args.extend(["--map", map]);
    }
    let restored = fleet.run(&args).good().result();
    assert_eq!(restored["status"], "ok");
    (target, restored)
}

/// Holds one restored node against all that is known of it.
async fn check(backup: &Backup, number: usize, target: &Path, restored: &Value) {
    let (node, of_point) = (backup.node(number), backup.point_of(number));
    let mut entries = restored["nodes"].as_array().expect("nodes").iter();
    let entry = entries
        .find(|entry| entry["node_id"] == node.node_id.to_string())
        .expect("its result");
    assert_eq!(entry["running"], true);
    assert_eq!(entry["recovered_to"], of_point.end_lsn);
    let data = PathBuf::from(entry["data_directory"].as_str().expect("a data directory"));
    assert_eq!(data, target.join(node.node_id.to_string()));
    let port: u16 = entry["port"]
        .as_u64()
        .expect("a port")
        .try_into()
        .expect("a port");
    let (socket, listening) = postgres::running(&data);
    assert_eq!(listening, port);
    let client = postgres::connect(&socket, port, "shop db").await;
    let (stop, end) = (load::lsn(&node.stop_lsn), load::lsn(&of_point.end_lsn));
    let verdict = backup.ledgers[number].check(&client, stop, end).await;
    let verdict = verdict.unwrap_or_else(|e| panic!("node {}: {e}", number + 1));
    assert!(
        verdict.required > 0 && verdict.forbidden > 0,
        "the load proves nothing: {verdict:?}"
    );
    report(number, &verdict);
    if number == 0 {
        assert_eq!(
            postgres::query_one(&client, "SHOW work_mem").await,
            "5MB",
            "configuration travels"
        );
        assert_eq!(
            postgres::query_one(&client, "SELECT count(*) FROM big").await,
            "2000"
        );
    }
    if number == 2 {
        assert!(
            verdict.from_wal > 0,
            "no row younger than the copy: {verdict:?}"
        );
        assert_eq!(
            postgres::query_one(&client, "SELECT count(*) FROM late").await,
            "3000"
        );
    }
    let sql = "SELECT pg_tablespace_location(oid) FROM pg_tablespace WHERE spcname = 'old space'";
    let place = postgres::query_one(&client, sql).await;
    assert!(
        Path::new(&place).starts_with(target),
        "`old space` is at {place}, not below the target"
    );
    let installation = Installation::newest();
    amcheck(&installation, &socket, port);
    drop(client);
    shut_down(&installation, &data);
    checksums(&installation, &data);
}

async fn main_job(bucket: Bucket) {
    let mut fleet = Fleet::new("main", &bucket.config());
    sources(&mut fleet, &Installation::newest()).await;
    let backup = back_up(&fleet, &bucket).await;
    fleet.destroy();
    let (target, restored) = restore(&mut fleet, &backup);
    for number in 0..3 {
        check(&backup, number, &target, &restored).await;
    }
}

fn shut_down(installation: &Installation, data: &Path) {
    let mut command = os::command(installation.bindir.join("pg_ctl"));
    let status = command
        .args(["stop", "-w", "-m", "fast", "-D"])
        .arg(data)
        .output()
        .expect("pg_ctl");
    assert!(
        status.status.success(),
        "the restored database stops: {status:?}"
    );
}

#[expect(clippy::print_stdout, reason = "shown by --nocapture and on failure")]
fn report(number: usize, verdict: &Verdict) {
    println!("node {}: {verdict:?}", number + 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn three_nodes_come_back_from_the_double() {
    main_job(Bucket::double().await).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn three_nodes_come_back_from_minio() {
    match Bucket::minio().await {
        Some(bucket) => main_job(bucket).await,
        None => support::skip::skip("three_nodes_come_back_from_minio", "no minio program"),
    }
}
