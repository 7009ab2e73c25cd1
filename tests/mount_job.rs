//! The main job with a probackup, as a user runs it: two real databases under load, a FULL and an increment through the
//! mount straight into a bucket, the databases destroyed, both backups brought back on a host that has nothing. Meanwhile the kernel
//! tells where agents and their children write.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    reason = "a panic is a failed test, with its reason"
)]

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::time::Duration;

use catalog::model::{Manifest, Point};
use serde_json::Value;
use support::bucket::Bucket;
use support::fleet::Fleet;
use support::fuse;
use support::load::{self, Ledger, Load};
use support::os;
use support::postgres::{self, ClusterOptions, Installation};
use support::probackup::{Kind, ProbackupUnderTest};
use support::strace::{self, Watch};

/// What agents and their children may write to while a backup runs, and how much of it: everything else is staging.
fn backup_allows(fleet: &Fleet, path: &str) -> Option<u64> {
    let log = fleet.hosts.iter().any(|host| {
        let log = host.root.join("agent.log");
        log.display().to_string() == path
    });
    // What is shipped, noted for the agent's next start: some hundred bytes, again and again.
    let state = fleet
        .hosts
        .iter()
        .any(|host| Path::new(path).starts_with(host.root.join("state")));
    match path {
        _ if log || state => Some(1 << 20),
        "/dev/null" => Some(u64::MAX),
        _ if is_no_file(path) || in_mount(fleet, path) => Some(u64::MAX),
        // Who we are in the mount's own namespace.
        _ if path.starts_with("/proc/") => Some(4096),
        _ => None,
    }
}

/// Sockets, pipes, the descriptors of the kernel, and the device that mounts speak through.
fn is_no_file(path: &str) -> bool {
    let kinds = [
        "socket:",
        "pipe:",
        "anon_inode:",
        "TCP",
        "UNIX",
        "NETLINK",
        "UDP",
    ];
    path == "/dev/fuse" || kinds.iter().any(|kind| path.starts_with(kind))
}

/// What the restored server, a child of the agent, makes for itself: shared memory, and locks of its sockets.
fn of_the_server(path: &str) -> bool {
    let name = Path::new(path)
        .file_name()
        .unwrap_or_default()
        .to_string_lossy();
    path.starts_with("/dev/shm/PostgreSQL.") || name.starts_with(".s.PGSQL.")
}

/// The agents' mounts are below their temporary directory.
fn in_mount(fleet: &Fleet, path: &str) -> bool {
    Path::new(path)
        .strip_prefix(fleet.temporary())
        .is_ok_and(|below| {
            below
                .components()
                .any(|part| part.as_os_str() == "backups" || part.as_os_str() == "wal")
        })
}

/// Paths that are not allowed, with the bytes written to them.
fn staged(
    written: &BTreeMap<String, u64>,
    allows: impl Fn(&str) -> Option<u64>,
) -> Vec<(String, u64)> {
    let wrong = |(path, bytes): &(&String, &u64)| allows(path).is_none_or(|most| **bytes > most);
    let found = written.iter().filter(wrong);
    found.map(|(path, bytes)| (path.clone(), *bytes)).collect()
}

struct Job {
    fleet: Fleet,
    bucket: Bucket,
    program: ProbackupUnderTest,
    /// What builds on the FULL, in order.
    increments: &'static [&'static str],
    wal: &'static str,
}

impl Job {
    async fn new(kind: Kind) -> Self {
        let program = match kind {
            Kind::Pg => ProbackupUnderTest::find(kind),
            // The real one works on openGauss only.
            Kind::Gs => ProbackupUnderTest::stand_in(kind),
        };
        let bucket = Bucket::double().await;
        let mut fleet = Fleet::new("mount", &bucket.config());
        let path = program.path().display().to_string();
        for name in ["node1", "node2"] {
            let options = ClusterOptions {
                data_checksums: true,
                ..ClusterOptions::default()
            };
            let installation = Installation::newest();
            let number =
                fleet.add_database_with(name, &installation, options, &["--probackup", &path]);
            let host = &fleet.hosts[number];
            let space = host.root.join("space");
            fs::create_dir(&space).unwrap();
            os::give(&space);
            load::prepare(host.cluster.as_ref().unwrap(), &space, false).await;
        }
        // A PAGE reads WAL that is shipped all the time.
        let (increments, wal): (&[_], _) = match kind {
            Kind::Pg => (&["DELTA", "PAGE"], "continuous"),
            Kind::Gs => (&["PTRACK"], "backup"),
        };
        Self {
            fleet,
            bucket,
            program,
            increments,
            wal,
        }
    }

    fn watch(&self, what: &str) -> Vec<Watch> {
        let hosts = self.fleet.hosts.iter().enumerate();
        hosts
            .map(|(number, host)| {
                let place = self.fleet.path().join(format!("{what}-{number}"));
                Watch::attach(host.agent.pid(), &place)
            })
            .collect()
    }

    async fn back_up(&self, mode: &str) -> (Manifest, Point) {
        let nodes = self.fleet.addresses(&[0, 1]);
        let args = [
            "backup",
            "--nodes",
            &nodes,
            "-b",
            mode,
            "--engine",
            "probackup",
            // The load leaves nothing of the machine, and a gentle copy would wait for it.
            "--pace",
            "full",
            "--output",
            "json",
        ];
        let quick = ["--point-timeout", "2", "--wal", self.wal];
        let result = self
            .fleet
            .run(&[&args[..], &quick].concat())
            .good()
            .result();
        assert_eq!(
            (&result["engine"], &result["mode"]),
            (&"probackup".into(), &mode.into())
        );
        self.bucket
            .recorded(result["backup_id"].as_str().unwrap())
            .await
    }

    /// Restores on a host that has nothing but the program; returns each node's data directory.
    fn restore(&mut self, backup: &Manifest, more: &[&str]) -> (Vec<PathBuf>, Value) {
        let target = self
            .fleet
            .path()
            .join(format!("target {}", backup.backup_id));
        fs::create_dir(&target).unwrap();
        os::give(&target);
        let root = target.display().to_string();
        let path = self.program.path().display().to_string();
        let mut hosts = Vec::new();
        for name in ["a", "b"] {
            let name = format!("{name} {}", backup.backup_id);
            let flags = ["--allow-root", &root, "--probackup", &path];
            hosts.push(self.fleet.add_host(&name, &flags));
        }
        let watches: Vec<_> = hosts
            .iter()
            .map(|host| {
                let place = self.fleet.path().join(format!("trace of {host}"));
                Watch::attach(self.fleet.hosts[*host].agent.pid(), &place)
            })
            .collect();
        let maps: Vec<_> = backup
            .nodes
            .iter()
            .zip(&hosts)
            .map(|(node, host)| {
                format!("{}={}", node.node_id, self.fleet.hosts[*host].agent.address)
            })
            .collect();
        let (nodes, id) = (self.fleet.addresses(&hosts), backup.backup_id.to_string());
        let mut args = vec![
            "restore",
            "--id",
            &id,
            "--nodes",
            &nodes,
            "--target-dir",
            &root,
        ];
        args.extend([
            "--output", "json", "--yes", "--map", &maps[0], "--map", &maps[1],
        ]);
        args.extend(more);
        let result = self.fleet.run(&args).good().result();
        for watch in watches {
            let allows = |path: &str| {
                let below = Path::new(path).starts_with(&target);
                let below = (below || of_the_server(path)).then_some(u64::MAX);
                below.or_else(|| backup_allows(&self.fleet, path))
            };
            let staged = staged(&watch.written(), allows);
            assert!(staged.is_empty(), "a restore wrote elsewhere: {staged:?}");
        }
        let entries = result["nodes"].as_array().unwrap();
        let directory = |entry: &Value| PathBuf::from(entry["data_directory"].as_str().unwrap());
        (entries.iter().map(directory).collect(), result)
    }
}

/// Holds the restored nodes against what was acknowledged.
async fn check(
    ledgers: &BTreeMap<u16, Ledger>,
    (manifest, point): &(Manifest, Point),
    result: &Value,
) {
    for entry in result["nodes"].as_array().unwrap() {
        let source = entry["source"]
            .as_str()
            .unwrap_or_else(|| panic!("{entry}"));
        let node = manifest
            .nodes
            .iter()
            .find(|it| it.node_id.to_string() == source)
            .unwrap();
        let marked = point
            .nodes
            .iter()
            .find(|it| it.node_id == node.node_id)
            .unwrap();
        let data = PathBuf::from(entry["data_directory"].as_str().unwrap());
        let (socket, port) = postgres::running(&data);
        let client = postgres::connect(&socket, port, "shop db").await;
        let (stop, end) = (load::lsn(&node.stop_lsn), load::lsn(&marked.end_lsn));
        let verdict = ledgers[&node.port].check(&client, stop, end).await;
        let verdict = verdict.unwrap_or_else(|why| panic!("{}: {why}", node.node_id));
        assert!(verdict.required > 0, "the load proves nothing: {verdict:?}");
        drop(client);
        stop_server(&data);
        checksums(&data);
    }
}

fn stop_server(data: &Path) {
    let bindir = Installation::newest().bindir;
    let mut stop = os::command(bindir.join("pg_ctl"));
    let stop = stop
        .args(["stop", "-w", "-m", "fast", "-D"])
        .arg(data)
        .output()
        .unwrap();
    assert!(stop.status.success(), "{stop:?}");
}

fn checksums(data: &Path) {
    let bindir = Installation::newest().bindir;
    let mut command = os::command(bindir.join("pg_checksums"));
    let output = command.arg("--check").arg("-D").arg(data).output().unwrap();
    assert!(output.status.success(), "{output:?}");
}

async fn job(kind: Kind) {
    let mut job = Job::new(kind).await;
    let ledgers = job.fleet.path().join("ledgers");
    fs::create_dir(&ledgers).unwrap();
    let clusters = job
        .fleet
        .hosts
        .iter()
        .map(|host| host.cluster.as_ref().unwrap());
    let loads: Vec<_> = clusters
        .map(|cluster| (cluster.port(), Load::start(cluster, &ledgers, 2)))
        .collect();
    let watches = job.watch("backups");
    let mut chain = vec![job.back_up("FULL").await];
    for mode in job.increments {
        chain.push(job.back_up(mode).await);
    }
    for watch in watches {
        let staged = staged(&watch.written(), |path| backup_allows(&job.fleet, path));
        assert!(staged.is_empty(), "a backup was staged: {staged:?}");
    }
    tokio::time::sleep(Duration::from_secs(1)).await;
    let mut ledgers = BTreeMap::new();
    for (port, load) in loads {
        ledgers.insert(port, load.stop().await);
    }
    let (full, newest) = (&chain[0], &chain[chain.len() - 1]);
    for link in chain.windows(2) {
        let (parent, increment) = (&link[0].0, &link[1].0);
        assert_eq!(increment.parent.as_ref(), Some(&parent.backup_id));
        for (whole, part) in full.0.nodes.iter().zip(&increment.nodes) {
            let (whole, part) = (whole.plain_bytes, part.plain_bytes);
            assert!(part < whole, "an increment of {part} bytes on {whole}");
        }
    }
    job.fleet.destroy();
    let (_, result) = job.restore(&newest.0, &[]);
    check(&ledgers, newest, &result).await;
    let (_, result) = job.restore(&full.0, &["--clone"]);
    check(&ledgers, full, &result).await;
    assert_eq!(
        job.bucket.uploads_under_way().unwrap_or(0),
        0,
        "uploads left"
    );
    let mounts = fs::read_to_string("/proc/self/mounts").unwrap();
    let ours = mounts
        .lines()
        .find(|line| line.contains(&job.fleet.path().display().to_string()));
    assert_eq!(ours, None, "a mount was left");
}

fn possible(test: &str) -> bool {
    let why = match fuse::ready() {
        Err(why) => why,
        Ok(()) if !strace::available() => "no strace that may attach".to_owned(),
        Ok(()) => return true,
    };
    support::skip(test, &why);
    false
}

#[tokio::test(flavor = "multi_thread")]
async fn full_delta_and_page_come_back_and_nothing_is_staged() {
    if possible("full_delta_and_page_come_back_and_nothing_is_staged") {
        job(Kind::Pg).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn full_and_ptrack_come_back_and_nothing_is_staged() {
    if possible("full_and_ptrack_come_back_and_nothing_is_staged") {
        job(Kind::Gs).await;
    }
}

/// The same watch finds a single byte that a program puts elsewhere before it does its work.
#[tokio::test(flavor = "multi_thread")]
async fn one_staged_byte_is_found() {
    if !possible("one_staged_byte_is_found") {
        return;
    }
    let bucket = Bucket::double().await;
    let mut fleet = Fleet::new("staged", &bucket.config());
    let program = ProbackupUnderTest::find(Kind::Pg);
    let place = fleet.path().join("staging program");
    fs::create_dir(&place).unwrap();
    let (wrapper, byte) = (place.join("pg_probackup"), fleet.temporary().join("a byte"));
    let script = format!(
        "#!/bin/sh\nprintf x > '{}'\nexec '{}' \"$@\"\n",
        byte.display(),
        program.path().display()
    );
    fs::write(&wrapper, script).unwrap();
    fs::set_permissions(&wrapper, fs::Permissions::from_mode(0o755)).unwrap();
    let path = wrapper.display().to_string();
    let installation = Installation::newest();
    fleet.add_database_with(
        "node",
        &installation,
        ClusterOptions::default(),
        &["--probackup", &path],
    );
    let watch = Watch::attach(fleet.hosts[0].agent.pid(), &fleet.path().join("trace"));
    let nodes = fleet.addresses(&[0]);
    let args = [
        "backup",
        "--nodes",
        &nodes,
        "--engine",
        "probackup",
        "--output",
        "json",
    ];
    let _ = fleet.run(&args).good();
    let staged = staged(&watch.written(), |path| backup_allows(&fleet, path));
    let names: Vec<_> = staged.iter().map(|(path, _)| path.as_str()).collect();
    assert_eq!(names, [byte.display().to_string()], "{staged:?}");
}
