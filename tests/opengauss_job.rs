//! The main job on a real openGauss, as a user runs it: two databases, a FULL and a PTRACK through the mount straight into a
//! bucket, the databases destroyed, both backups brought back on a host that has nothing. Runs where openGauss's programs are on
//! `PATH`; some minutes.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    reason = "a panic is a failed test, with its reason"
)]

use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::thread;
use std::time::{Duration, Instant};

use agent_sql::{ConnectOptions, NodeConnection, Password, SqlError};
use serde_json::Value;
use support::bucket::Bucket;
use support::fleet::Fleet;
use support::opengauss::{self, OpenGauss};
use support::skip::skip;
use support::{fuse, os};
use tokio_util::sync::CancellationToken;

const TEST: &str = "two_real_opengauss_come_back_from_a_full_and_a_ptrack";
const NAMES: [&str; 2] = ["one", "two"];

/// What an agent logs in with.
fn password_file(fleet: &Fleet) -> String {
    let file = fleet.path().join("password");
    if !file.exists() {
        fs::write(&file, opengauss::PASSWORD).unwrap();
        fs::set_permissions(&file, fs::Permissions::from_mode(0o600)).unwrap();
        os::give(&file);
    }
    file.display().to_string()
}

fn archive_socket(fleet: &Fleet, name: &str) -> PathBuf {
    fleet.temporary().join(format!("of-{name}/archive.sock"))
}

fn add_agent(fleet: &mut Fleet, name: &str, port: u16, pgdata: Option<&Path>) {
    let (password, port) = (password_file(fleet), port.to_string());
    let socket = archive_socket(fleet, name).display().to_string();
    let pgdata = pgdata.map(|path| path.display().to_string());
    let mut flags = vec!["--pg-host", "127.0.0.1", "--pg-user", opengauss::USER];
    flags.extend(["--pg-password-file", &password, "--pg-port", &port]);
    flags.extend(["--archive-socket", &socket]);
    if let Some(pgdata) = &pgdata {
        flags.extend(["--pgdata", pgdata]);
    }
    fleet.add_agent(name, &flags);
}

fn sources(fleet: &mut Fleet, programs: &Path, sockets: &Path) -> Vec<OpenGauss> {
    // openGauss takes tablespaces at paths of letters, digits, `-` and `_` only.
    let directories = NAMES.map(|name| fleet.path().join(format!("of-{name}")));
    let agent = fleet.programs().join("pitr-agent");
    let create = |number: usize| {
        let (name, root) = (NAMES[number], &directories[number]);
        fs::create_dir(root).unwrap();
        os::give(root);
        let space = root.join("space");
        fs::create_dir(&space).unwrap();
        os::give(&space);
        let asks = archive_socket(fleet, name);
        let server = OpenGauss::create(programs, &root.join("data"), sockets, (&agent, &asks));
        server.sql(&format!(
            "create tablespace sp location '{}'",
            space.display()
        ));
        server.sql("create table t(i int primary key, v text)");
        server.sql("create table s(i int) tablespace sp");
        server
    };
    let servers: Vec<_> = thread::scope(|scope| {
        let making = [0, 1].map(|number| scope.spawn(move || create(number)));
        making.map(|one| one.join().unwrap()).into()
    });
    for (name, server) in NAMES.iter().zip(&servers) {
        add_agent(fleet, name, server.port, Some(&server.data));
    }
    servers
}

/// A statement of ours that waits for a lock is cut off, and its session goes on: the server ends the connection that the request to
/// cancel came by.
async fn a_statement_is_cut_off(server: &OpenGauss) {
    let options = ConnectOptions {
        host: "127.0.0.1".to_owned(),
        port: server.port,
        user: opengauss::USER.to_owned(),
        password: Some(Password::new(opengauss::PASSWORD.to_owned())),
        ..ConnectOptions::default()
    };
    let cancel = CancellationToken::new();
    let node = NodeConnection::connect(&options, CancellationToken::new());
    let node = node.await.unwrap();
    let lock = "set xc_maintenance_mode = on; begin; lock table pg_tablespace; select pg_sleep(10)";
    let mut locker = server.begin_sql(lock);
    let held = "select count(*) from pg_locks where relation = 'pg_tablespace'::regclass and mode = 'AccessExclusiveLock' and granted";
    while server.sql(held) != "1" {
        assert!(locker.try_wait().unwrap().is_none(), "it was not locked");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    let waiting = node.with_cancel(cancel.clone());
    let (cut, ()) = tokio::join!(waiting.tablespaces(), async {
        tokio::time::sleep(Duration::from_millis(300)).await;
        cancel.cancel();
    });
    assert!(matches!(cut, Err(SqlError::Cancelled { .. })), "{cut:?}");
    assert!(
        locker.try_wait().unwrap().is_none(),
        "it waited for the lock"
    );
    assert!(!node.is_lost());
    assert!(!node.in_recovery().await.unwrap());
    // This one waits for the lock to go: nothing late ends it.
    assert!(!node.tablespaces().await.unwrap().is_empty());
    assert!(locker.wait().unwrap().success());
}

/// Rows `from..=to` in both tables of both.
fn insert(servers: &[OpenGauss], from: u32, to: u32) {
    for server in servers {
        let of = format!("generate_series({from}, {to}) g");
        server.sql(&format!("insert into t select g, md5(g::text) from {of}"));
        server.sql(&format!("insert into s select g from {of}"));
    }
}

/// A fleet asks for the other engine, unless it is told.
fn backup_words<'a>(nodes: &'a str, mode: &'a str) -> Vec<&'a str> {
    let mut words = vec!["backup", "--nodes", nodes, "-b", mode, "--output", "json"];
    words.extend(["--engine", "probackup", "--agent-timeout", "5"]);
    // The FULL ships its own WAL; from the increment on the agents ship it all the time.
    let wal = if mode == "FULL" {
        "backup"
    } else {
        "continuous"
    };
    words.extend(["--wal", wal]);
    words
}

/// The first node's agent gets a SIGKILL while `gs_probackup` copies. openGauss keeps the `tablespace_map` of that backup, and
/// refuses one start because of it.
async fn killed_in_the_copy(fleet: &mut Fleet, servers: &[OpenGauss]) {
    let nodes = fleet.addresses(&[0, 1]);
    let mut command = fleet.command(&backup_words(&nodes, "PTRACK"));
    let client = command
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn();
    let mut client = client.unwrap();
    let label = servers[0].data.join("backup_label");
    let begun = Instant::now();
    while !label.exists() {
        assert!(begun.elapsed() < Duration::from_mins(1), "no backup mode");
        assert!(client.try_wait().unwrap().is_none(), "it ended before");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    fleet.hosts[0].agent.kill();
    let output = client.wait_with_output().unwrap();
    assert!(!output.status.success(), "{output:?}");
    fleet.restart_agent(0);
    assert!(servers[0].data.join("tablespace_map").exists());
}

fn back_up(fleet: &Fleet, mode: &str) -> Value {
    let nodes = fleet.addresses(&[0, 1]);
    let result = fleet.run(&backup_words(&nodes, mode)).good().result();
    assert_eq!(result["mode"], mode, "{result}");
    assert_eq!(result["engine"], "probackup", "{result}");
    // Nobody wrote at that moment.
    assert_eq!(result["consistency"], "cluster", "{result}");
    result
}

/// At which try the copies of [`NAMES`] were good.
fn attempts(fleet: &Fleet, backup: &Value) -> [u64; 2] {
    let id = backup["backup_id"].as_str().unwrap();
    let shown = fleet.run(&["show", id, "--output", "json"]).good().result();
    let nodes = shown["backups"][0]["nodes"].as_array().unwrap();
    NAMES.map(|name| {
        let of = |node: &&Value| {
            let directory = node["data_directory"].as_str().unwrap();
            directory.contains(&format!("of-{name}/"))
        };
        nodes.iter().find(of).unwrap()["attempt"].as_u64().unwrap()
    })
}

/// How WAL of a node is shipped, by its agent.
fn shipping(fleet: &Fleet, host: usize) -> Value {
    let nodes = fleet.addresses(&[host]);
    let run = fleet.run(&["wal", "status", "--nodes", &nodes, "--output", "json"]);
    serde_json::from_str(run.stdout.lines().next().unwrap()).unwrap()
}

/// Waits until all WAL that is whole is in the bucket.
async fn until_shipped(fleet: &Fleet, host: usize) {
    let begun = Instant::now();
    loop {
        let status = shipping(fleet, host);
        if status["state"] == "running" && status["lag_bytes"].as_u64().unwrap() < 16 << 20 {
            assert!(
                status["gap"].is_null() && status["wants_base"] == false,
                "{status}"
            );
            return;
        }
        let log = || fleet.hosts[host].agent.log();
        assert!(
            begun.elapsed() < Duration::from_mins(2),
            "{status}\n{}",
            log()
        );
        tokio::time::sleep(Duration::from_millis(500)).await;
    }
}

/// Segments that the archiver was not told to let go of.
fn kept(server: &OpenGauss) -> usize {
    let marks = fs::read_dir(server.data.join("pg_xlog/archive_status")).unwrap();
    let names = marks.map(|entry| entry.unwrap().file_name().into_string().unwrap());
    let ready = |name: &String| Path::new(name).extension().is_some_and(|it| it == "ready");
    names.filter(ready).count()
}

/// WAL goes on being shipped: over the death of an agent, during which the archiver keeps what was written, to a point
/// without a backup. Returns it.
async fn a_point_later(fleet: &mut Fleet, servers: &[OpenGauss]) -> String {
    for host in [0, 1] {
        until_shipped(fleet, host).await;
    }
    fleet.hosts[0].agent.kill();
    for (from, to) in [(101_101, 101_200), (101_201, 101_300)] {
        insert(servers, from, to);
        servers[0].sql("select pg_switch_xlog()");
    }
    // The archiver tries three times, a second apart.
    tokio::time::sleep(Duration::from_secs(5)).await;
    // Nothing is held on a disk that is nearly full.
    let disk = rustix::fs::statvfs(&servers[0].data).unwrap();
    if disk.f_bavail > disk.f_blocks / 9 {
        assert!(kept(&servers[0]) >= 2, "let go without an agent");
    }
    fleet.restart_agent(0);
    // What the client had lent ended with the agent.
    let first = fleet.addresses(&[0]);
    let _ = fleet.run(&["wal", "start", "--nodes", &first]).good();
    until_shipped(fleet, 0).await;
    insert(servers, 101_301, 101_400);
    let nodes = fleet.addresses(&[0, 1]);
    let made = fleet.run(&["point", "create", "--nodes", &nodes, "--output", "json"]);
    let point = made.good().result();
    assert_eq!(point["consistency"], "cluster", "{point}");
    point["point_id"].as_str().unwrap().to_owned()
}

/// Restores to the last host what `which` says, on the nodes of `backup`, and holds what is there against `rows`.
fn comes_back(
    fleet: &Fleet,
    (which, id): (&str, &str),
    backup: &Value,
    rows: u32,
    (programs, sockets): (&Path, &Path),
) {
    let host = fleet.hosts.last().unwrap();
    let target = host.root.join(id);
    fs::create_dir(&target).unwrap();
    os::give(&target);
    let target_text = target.display().to_string();
    let mut args = vec!["restore", "--yes", "--output", "json", which, id];
    args.extend(["--nodes", &host.agent.address, "--target-dir", &target_text]);
    let nodes = backup["nodes"].as_array().unwrap();
    let (mut words, mut servers) = (Vec::new(), Vec::new());
    for node in nodes {
        let node_id = node["node_id"].as_str().unwrap();
        let port = opengauss::free_ports();
        words.push(("--map", format!("{node_id}={}", host.agent.address)));
        words.push(("--db-port", format!("{node_id}={port}")));
        servers.push((target.join(node_id), port));
    }
    for (flag, value) in &words {
        args.extend([flag, value.as_str()]);
    }
    let result = fleet.run(&args).good().result();
    assert_eq!(result["consistency"], "cluster", "{result}");
    for (data, port) in servers {
        let server = OpenGauss::there(programs, &data, sockets, port);
        let want = format!("{rows}|{rows}");
        assert_eq!(server.sql("select count(*), max(i) from t"), want);
        assert_eq!(server.sql("select count(*), max(i) from s"), want);
        assert_eq!(server.sql("select pg_is_in_recovery()"), "f");
        server.stop();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn two_real_opengauss_come_back_from_a_full_and_a_ptrack() {
    let programs = match opengauss::programs() {
        Ok(found) => found,
        Err(why) => return skip(TEST, why),
    };
    if let Err(why) = fuse::ready() {
        return skip(TEST, &why);
    }
    let bucket = Bucket::best().await;
    {
        let mut fleet = Fleet::new("og", &bucket.config());
        fleet.agents = opengauss::environment(&programs);
        let sockets = fleet.path().join("sock");
        fs::create_dir(&sockets).unwrap();
        os::give(&sockets);
        let servers = sources(&mut fleet, &programs, &sockets);
        let nodes = fleet.addresses(&[0, 1]);
        let _ = fleet.run(&["check", "--nodes", &nodes]).good();
        a_statement_is_cut_off(&servers[0]).await;

        insert(&servers, 1, 100_000);
        let full = back_up(&fleet, "FULL");
        insert(&servers, 100_001, 101_000);
        killed_in_the_copy(&mut fleet, &servers).await;
        let increment = back_up(&fleet, "PTRACK");
        assert_eq!(increment["parent"], full["backup_id"]);
        // By itself: the first try is refused, which ends the backup mode that was left.
        assert_eq!(attempts(&fleet, &increment), [2, 1]);
        // After both points.
        insert(&servers, 101_001, 101_100);
        let point = a_point_later(&mut fleet, &servers).await;
        insert(&servers, 101_401, 101_500);
        let _ = fleet.run(&["verify", "--all"]).good();

        for host in &fleet.hosts {
            let log = host.agent.log();
            assert!(!log.contains(opengauss::PASSWORD), "{log}");
        }
        for server in servers {
            server.stop();
            let root = server.data.parent().unwrap().to_owned();
            fs::remove_dir_all(root).unwrap();
        }
        let _ = fleet.destroy();
        add_agent(&mut fleet, "new", opengauss::free_ports(), None);
        let how = (&*programs, &*sockets);
        let id = |backup: &Value| backup["backup_id"].as_str().unwrap().to_owned();
        let which = ("--point", point.as_str());
        comes_back(&fleet, which, &increment, 101_400, how);
        comes_back(&fleet, ("--id", &id(&increment)), &increment, 101_000, how);
        comes_back(&fleet, ("--id", &id(&full)), &full, 100_000, how);
    }
    let mounts = fs::read_to_string("/proc/self/mounts").unwrap();
    assert!(!mounts.contains("/gsp-og-"), "{mounts}");
}
