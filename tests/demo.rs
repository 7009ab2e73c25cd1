//! `make demo`: the main job, step by step, for a person to watch: a sharded cluster as `make cluster` starts it, clients at work, a
//! backup, a point, everything destroyed, and all of it back from the bucket alone.
#![allow(
    clippy::print_stdout,
    clippy::expect_used,
    clippy::unwrap_used,
    reason = "it talks to a person; a step that fails ends it with its reason"
)]

use std::fs;
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use catalog::Catalog;
use catalog::model::Point;
use jiff::Timestamp;
use serde_json::Value;
use support::bank::{self, Bank, Diary, Window};
use support::bucket::Bucket;
use support::fleet::Fleet;
use support::os;
use support::postgres::{self, Installation};
use support::sharded::{SHARD, ShardedCluster};
use support::shown;

/// The label of the point that is restored.
const LABEL: &str = "before the disaster";
/// How long clients work on between two steps.
const MEANWHILE: Duration = Duration::from_secs(2);

struct Guide {
    begun: Instant,
    step: u32,
}

impl Guide {
    fn step(&mut self, what: &str) {
        self.step += 1;
        let seconds = self.begun.elapsed().as_secs_f64();
        println!("\n{}. {what}  [{seconds:.0} s]", self.step);
        flush();
    }
}

fn say(what: &str) {
    println!("   {what}");
    flush();
}

/// Before another program writes to it.
fn flush() {
    std::io::stdout().flush().expect("standard output");
}

/// Runs `gs_pitr` so that a person sees it, and fails with it.
fn show(mut command: Command) {
    let words = command
        .get_args()
        .map(|arg| quote(&arg.to_string_lossy()))
        .collect::<Vec<_>>();
    say(&format!("$ gs_pitr {}", words.join(" ")));
    let status = command.status().expect("gs_pitr runs");
    assert!(status.success(), "gs_pitr ended with {status}");
}

fn quote(arg: &str) -> String {
    if arg.contains(' ') {
        format!("'{arg}'")
    } else {
        arg.to_owned()
    }
}

/// A point that clients know of.
struct Made {
    point: Point,
    /// When `gs_pitr` had said so.
    told: Timestamp,
}

/// Makes the point that is restored later, while clients work.
async fn point(cluster: &ShardedCluster) -> Made {
    show(cluster.command(&["point", "create", "--label", LABEL]));
    let told = Timestamp::now();
    let listed = cluster
        .run(&["point", "list", "--output", "json"])
        .good()
        .result();
    let all = listed["points"].as_array().expect("points");
    let ours = all.iter().find(|point| point["label"] == LABEL);
    let id = ours.expect("our point")["point_id"]
        .as_str()
        .expect("an id");
    let catalog = Catalog::open(cluster.bucket.store()).await;
    let catalog = catalog.expect("the repository");
    let point = catalog.point(&id.parse().expect("an id")).await;
    Made {
        point: point.expect("the point"),
        told,
    }
}

/// The only backup.
async fn nodes_of_backup(cluster: &ShardedCluster) -> Vec<(String, u16)> {
    let shown = cluster.run(&["show", "--output", "json"]).good().result();
    let id = |value: &Value| value["id"].as_str().expect("an id").to_owned();
    let (manifest, _) = cluster.bucket.recorded(&id(&shown["backups"][0])).await;
    let nodes = manifest.nodes.iter();
    nodes
        .map(|node| (node.node_id.to_string(), node.port))
        .collect()
}

/// All that runs is killed, and all that it wrote to a disk is deleted. What is left are certificates, and the bucket.
fn destroy(cluster: ShardedCluster) -> (Fleet, Bucket) {
    let ShardedCluster {
        proxies,
        mut fleet,
        bucket,
        ..
    } = cluster;
    drop(proxies);
    for gone in fleet.destroy() {
        say(&format!("gone: {}", gone.display()));
    }
    (fleet, bucket)
}

/// Adds two hosts and restores on them. Returns the data directories.
fn restore(fleet: &mut Fleet, made: &Made, nodes: &[(String, u16)]) -> Vec<PathBuf> {
    let target = fleet.path().join("restored");
    fs::create_dir(&target).expect("target");
    os::give(&target);
    let directory = target.display().to_string();
    for name in ["new host 1", "new host 2"] {
        fleet.add_host(name, &["--allow-root", &directory]);
    }
    let id = made.point.point_id.to_string();
    let mut args = ["restore", "--point", &id, "--target-dir", &directory]
        .map(str::to_owned)
        .to_vec();
    args.extend(["--nodes".to_owned(), fleet.addresses(&[0, 1])]);
    for ((node, port), host) in nodes.iter().zip(&fleet.hosts) {
        args.extend(["--map".to_owned(), format!("{node}={}", host.agent.address)]);
        args.extend(["--db-port".to_owned(), format!("{node}={port}")]);
    }
    args.push("--yes".to_owned());
    let args: Vec<_> = args.iter().map(String::as_str).collect();
    show(fleet.command(&args));
    nodes.iter().map(|(node, _)| target.join(node)).collect()
}

/// Holds the restored databases against each other and against what the clients know, and says what was found.
async fn prove(data: &[PathBuf], diary: &Diary, made: &Made) {
    let (mut nodes, mut sum) = (Vec::new(), 0);
    for directory in data {
        let (socket, port) = postgres::running(directory);
        let node = postgres::connect(&socket, port, SHARD).await;
        let here = postgres::query_one(&node, "SELECT sum(balance) FROM account").await;
        say(&format!("127.0.0.1:{port}: {here} on its accounts"));
        sum += here.parse::<i64>().expect("a sum");
        nodes.push(node);
    }
    let window = Window {
        from: made.point.created,
        to: made.told,
    };
    let verdict = bank::check(&nodes, diary, window).await;
    let verdict = verdict.unwrap_or_else(|wrong| panic!("{wrong}"));
    say(&format!(
        "{sum} on all of them: not a coin more or less than at the beginning"
    ));
    say(&format!(
        "{} transfers, each of them whole; all {} that were acknowledged before the point are among them, and none of the {} that \
         were begun after it or rolled back",
        verdict.transfers, verdict.required, verdict.forbidden
    ));
}

fn stop(data: &Path) {
    let mut stop = os::command(Installation::newest().bindir.join("pg_ctl"));
    stop.args(["stop", "-m", "fast", "-D"])
        .arg(data)
        .stdout(Stdio::null());
    assert!(
        stop.status().expect("pg_ctl").success(),
        "the restored database stops"
    );
}

async fn demo() {
    let mut guide = Guide {
        begun: Instant::now(),
        step: 0,
    };
    println!("gs_pitr demo");
    if let Some(user) = os::database_user() {
        println!(
            "you are root: databases and agents run as user id {}",
            user.uid
        );
    }

    guide.step("A sharded cluster: CLI and agents trust one CA made by `gs_pitr certs`");
    let cluster = shown::cluster("demo").await;
    for line in shown::describe(&cluster) {
        say(&line);
    }

    guide.step("Clients move money between the shards, through both proxies and past them; a ledger has both sides of each transfer");
    let bank = Bank::open(&cluster.ways(), &shown::clients());
    bank.goes_on(10).await;

    guide.step("One backup of the whole cluster, straight into the bucket, by the command line of the Go tool; clients go on");
    let words = shown::go_tool_backup(&cluster);
    let words: Vec<_> = words.iter().map(String::as_str).collect();
    show(cluster.command(&words));
    tokio::time::sleep(MEANWHILE).await;

    guide.step("Later, a point: nothing is copied, the WAL is in the bucket already");
    let made = point(&cluster).await;
    tokio::time::sleep(MEANWHILE).await;
    let diary = bank.close().await;
    say(&format!(
        "{} transfers were acknowledged before, meanwhile and after it",
        diary.acknowledged(None)
    ));
    show(cluster.command(&["point", "list"]));

    guide.step("Disaster: proxies, databases and agents are killed, every one of their directories is deleted, the CLI's own state too");
    let nodes = nodes_of_backup(&cluster).await;
    let (mut fleet, _bucket) = destroy(cluster);

    guide.step(
        "Two empty hosts; everything comes back from the bucket, to the point and no further",
    );
    let data = restore(&mut fleet, &made, &nodes);

    guide.step("The proof: the restored databases against what the clients know");
    prove(&data, &diary, &made).await;
    for directory in &data {
        stop(directory);
    }
    println!(
        "\nAll is back, proved. {:.0} s in all. To try by hand: make cluster",
        guide.begun.elapsed().as_secs_f64()
    );
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
