//! `make demo`: the main job, step by step, for a person to watch.
#![allow(
    clippy::print_stdout,
    clippy::expect_used,
    clippy::unwrap_used,
    reason = "it talks to a person; a step that fails ends it with its reason"
)]

use std::fs;
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::{Duration, Instant};

use catalog::model::{Manifest, NodeBackup};
use serde_json::Value;
use support::bucket::Bucket;
use support::fleet::Fleet;
use support::load::{self, Ledger, Load};
use support::os;
use support::postgres::{self, Cluster, ClusterOptions, Installation};

struct Guide {
    begun: Instant,
    step: u32,
}

impl Guide {
    fn step(&mut self, what: &str) {
        self.step += 1;
        println!(
            "\n{}. {what}  [{:.0} s]",
            self.step,
            self.begun.elapsed().as_secs_f64()
        );
        std::io::stdout().flush().expect("standard output");
    }
}

fn say(what: &str) {
    println!("   {what}");
}

/// Runs `gs_pitr` so that a person sees it, and fails with it.
fn show(fleet: &Fleet, args: &[&str]) {
    println!(
        "   $ gs_pitr {}",
        args.iter()
            .map(|arg| quote(arg))
            .collect::<Vec<_>>()
            .join(" ")
    );
    let status = fleet.command(args).status().expect("gs_pitr runs");
    assert!(status.success(), "gs_pitr ended with {status}");
}

fn quote(arg: &str) -> String {
    if arg.contains(' ') {
        format!("'{arg}'")
    } else {
        arg.to_owned()
    }
}

fn cluster(fleet: &Fleet, number: usize) -> &Cluster {
    fleet.hosts[number].cluster.as_ref().expect("a database")
}

/// The newest backup's id, by `gs_pitr show`.
fn newest(fleet: &Fleet) -> String {
    let listed = fleet.run(&["show", "--output", "json"]).good();
    let line = listed.stdout.lines().last().expect("a line").to_owned();
    let listed: Value = serde_json::from_str(&line).expect("JSON");
    let backup = listed["backups"]
        .as_array()
        .and_then(|all| all.last())
        .expect("a backup");
    backup["id"].as_str().expect("an id").to_owned()
}

/// Starts the databases, agents and tables.
async fn bring_up(bucket: &Bucket, installation: &Installation) -> Fleet {
    let mut fleet = Fleet::new("demo", &bucket.config());
    for name in ["shard 1", "shard 2", "shard 3"] {
        let options = ClusterOptions {
            data_checksums: true,
            ..ClusterOptions::default()
        };
        let number = fleet.add_database(name, installation, options);
        let host = &fleet.hosts[number];
        let space = host.root.join("space");
        fs::create_dir(&space).expect("a tablespace");
        os::give(&space);
        load::prepare(cluster(&fleet, number), &space, false).await;
        let port = cluster(&fleet, number).port();
        say(&format!(
            "{name}: port {port}, agent on {}",
            host.agent.address
        ));
    }
    fleet
}

fn node_at(manifest: &Manifest, port: u16) -> &NodeBackup {
    manifest
        .nodes
        .iter()
        .find(|node| node.port == port)
        .expect("the node")
}

/// Adds three hosts and restores on them. Returns where to.
async fn restore(mut fleet: Fleet, manifest: &Manifest, ports: &[u16]) -> (Fleet, PathBuf) {
    let target = fleet.path().join("restored");
    fs::create_dir(&target).expect("target");
    os::give(&target);
    let directory = target.display().to_string();
    for name in ["new host 1", "new host 2", "new host 3"] {
        fleet.add_host(name, &["--allow-root", &directory]);
    }
    let id = manifest.backup_id.to_string();
    let mut args = ["restore", "--id", &id, "--target-dir", &directory, "--yes"]
        .map(str::to_owned)
        .to_vec();
    args.extend(["--nodes".to_owned(), fleet.addresses(&[0, 1, 2])]);
    for (port, host) in ports.iter().zip(&fleet.hosts) {
        let node = node_at(manifest, *port).node_id;
        args.extend(["--map".to_owned(), format!("{node}={}", host.agent.address)]);
    }
    let shown = tokio::task::spawn_blocking(move || {
        show(&fleet, &args.iter().map(String::as_str).collect::<Vec<_>>());
        fleet
    });
    (shown.await.expect("the restore"), target)
}

async fn demo() {
    let mut guide = Guide {
        begun: Instant::now(),
        step: 0,
    };
    let bucket = Bucket::best().await;
    let installation = Installation::newest();
    println!(
        "gs_pitr demo: PostgreSQL {}, bucket on {}",
        installation.major,
        bucket.describe()
    );
    if let Some(user) = os::database_user() {
        println!(
            "you are root: databases and agents run as user id {}",
            user.uid
        );
    }

    guide.step("Three databases, an agent beside each; CLI and agents trust one CA made by `gs_pitr certs`");
    let fleet = bring_up(&bucket, &installation).await;

    guide.step("Clients write to all of them; after each acknowledged commit they sync a ledger outside the databases");
    let directory = fleet.path().join("ledgers");
    fs::create_dir(&directory).expect("ledgers");
    let loads: Vec<_> = (0..3)
        .map(|number| Load::start(cluster(&fleet, number), &directory, 2))
        .collect();
    tokio::time::sleep(Duration::from_secs(2)).await;

    guide.step("One backup of all three, straight into the bucket, while the clients go on");
    let nodes = fleet.addresses(&[0, 1, 2]);
    let shown = tokio::task::spawn_blocking(move || {
        show(
            &fleet,
            &[
                "backup",
                "--nodes",
                &nodes,
                "--label",
                "demo",
                "--point-timeout",
                "5",
            ],
        );
        fleet
    });
    let mut fleet = shown.await.expect("the backup");
    tokio::time::sleep(Duration::from_secs(1)).await;
    let mut ledgers: Vec<Ledger> = Vec::new();
    for load in loads {
        ledgers.push(load.stop().await);
    }
    let commits: usize = ledgers.iter().map(|ledger| ledger.entries.len()).sum();
    say(&format!(
        "{commits} commits were acknowledged before, during and after it"
    ));
    show(&fleet, &["show"]);

    guide.step("Disaster: databases and agents are killed, every one of their directories is deleted, the CLI's own state too");
    let id = newest(&fleet);
    let ports: Vec<u16> = (0..3)
        .map(|number| cluster(&fleet, number).port())
        .collect();
    for gone in fleet.destroy() {
        say(&format!("gone: {}", gone.display()));
    }

    guide.step("Three empty hosts; everything comes back from the bucket, to the restore point and no further");
    let (manifest, point) = bucket.recorded(&id).await;
    // Kept to the end: its directories go with it.
    let (_fleet, target) = restore(fleet, &manifest, &ports).await;

    guide.step("The proof: the restored databases against the ledgers");
    for (number, ledger) in ledgers.iter().enumerate() {
        let node = node_at(&manifest, ports[number]);
        let of_point = point
            .nodes
            .iter()
            .find(|entry| entry.node_id == node.node_id)
            .expect("its point");
        let data = target.join(node.node_id.to_string());
        prove(number, ledger, &data, (&node.stop_lsn, &of_point.end_lsn)).await;
        let mut stop = os::command(installation.bindir.join("pg_ctl"));
        stop.args(["stop", "-m", "fast", "-D"])
            .arg(&data)
            .stdout(Stdio::null());
        assert!(
            stop.status().expect("pg_ctl").success(),
            "the restored database stops"
        );
    }
    println!(
        "\nAll three are back, proved. {:.0} s in all.",
        guide.begun.elapsed().as_secs_f64()
    );
}

/// Holds one restored database against its ledger, and says what was found.
async fn prove(number: usize, ledger: &Ledger, data: &Path, (stop, end): (&str, &str)) {
    let (socket, port) = postgres::running(data);
    let client = postgres::connect(&socket, port, "shop db").await;
    let verdict = ledger.check(&client, load::lsn(stop), load::lsn(end)).await;
    let verdict = verdict.unwrap_or_else(|e| panic!("shard {}: {e}", number + 1));
    say(&format!(
        "shard {}: all {} commits acknowledged before the point are there ({} of them younger than the base copy), none of the \
         {} begun after it; the accounts' sum is exact",
        number + 1,
        verdict.required,
        verdict.from_wal,
        verdict.forbidden
    ));
}

fn main() {
    if std::env::args().len() > 1 {
        println!("takes no arguments; `make demo` builds what it needs first");
        return;
    }
    let runtime = tokio::runtime::Runtime::new().expect("a runtime");
    runtime.block_on(demo());
    runtime.shutdown_timeout(Duration::from_secs(5));
}
