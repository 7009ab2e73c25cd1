//! `make bench`, second part: one node of 1.5 GB that compresses about 2:1, into a real MinIO over TLS and back, against
//! `pg_basebackup -Ft | zstd -1 -T2 | mc pipe` and its restore; interleaved, in the same run.
#![allow(
    clippy::print_stdout,
    clippy::expect_used,
    clippy::unwrap_used,
    clippy::cast_precision_loss,
    reason = "it prints its figures, and a step that fails ends it with its reason"
)]

use std::collections::BTreeMap;
use std::fs;
use std::io::{BufRead as _, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use serde_json::Value;
use support::bench::{fill, goal, median, ready_mc, shell};
use support::fleet::{Fleet, wait};
use support::minio::{self, Minio};
use support::os;
use support::postgres::{Cluster, ClusterOptions, Installation};

const ROUNDS: usize = 3;
/// About 136 bytes a row with its header, in the table; the index on the uuid adds to it.
const ROWS: u64 = 9_400_000;

/// What one run cost.
#[derive(Debug, Clone, Copy, Default)]
struct Cost {
    wall: f64,
    /// CPU seconds of the tool itself.
    cpu: f64,
    /// CPU seconds of MinIO meanwhile.
    store_cpu: f64,
}

/// User and system CPU seconds of a process, or, `children`, of all that it has waited for.
fn cpu_seconds(pid: &str, children: bool) -> f64 {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).expect("a running process");
    let fields: Vec<&str> = stat
        .rsplit_once(')')
        .expect("a name")
        .1
        .split_whitespace()
        .collect();
    let first = if children { 13 } else { 11 };
    let ticks = |index: usize| fields[index].parse::<f64>().expect("a number");
    // USER_HZ is 100 on every Linux that Rust runs on.
    (ticks(first) + ticks(first + 1)) / 100.0
}

/// Runs `work` and says what it cost: our children's CPU, and that of the agents named.
fn measure(minio: &Minio, agents: &[u32], work: impl FnOnce()) -> Cost {
    let all = || {
        let agents: f64 = agents
            .iter()
            .map(|pid| cpu_seconds(&pid.to_string(), false))
            .sum();
        (
            agents + cpu_seconds("self", true),
            cpu_seconds(&minio.pid().to_string(), false),
        )
    };
    let (before, begun) = (all(), Instant::now());
    work();
    let (wall, after) = (begun.elapsed().as_secs_f64(), all());
    Cost {
        wall,
        cpu: after.0 - before.0,
        store_cpu: after.1 - before.1,
    }
}

/// The peer: what an administrator would write in one line.
struct Pipe<'a> {
    mc: String,
    cluster: &'a Cluster,
    bucket: String,
}

impl Pipe<'_> {
    fn new<'a>(mc: &Path, minio: &Minio, cluster: &'a Cluster, directory: &Path) -> Pipe<'a> {
        Pipe {
            mc: ready_mc(mc, minio, directory),
            cluster,
            bucket: minio.bucket().to_owned(),
        }
    }

    fn back_up(&self) {
        let dump = format!(
            "'{}/pg_basebackup' -h '{}' -p {} -U postgres -Ft -D - -X fetch -c fast",
            self.cluster.installation().bindir.display(),
            self.cluster.socket_directory().display(),
            self.cluster.port()
        );
        shell(
            &format!(
                "{dump} | zstd -1 -T2 -q | {} pipe b/{}/base.tar.zst",
                self.mc, self.bucket
            ),
            &[],
        );
    }

    fn restore(&self, target: &Path) {
        let target = target.display();
        let fetch = format!("{} cat b/{}/base.tar.zst", self.mc, self.bucket);
        shell(
            &format!(
                "mkdir '{target}'; {fetch} | zstd -d -q | tar -x -C '{target}'; find '{target}' -type f -print0 | xargs -0 sync"
            ),
            &[],
        );
    }
}

/// Runs a restore; seconds from its first `fetching` to its first `recovering`: the part that the peer's restore does too.
fn fetch_seconds(mut command: Command) -> f64 {
    let mut child = command.stdout(Stdio::piped()).spawn().expect("gs_pitr");
    let lines = BufReader::new(child.stdout.take().expect("its output")).lines();
    let mut entered = BTreeMap::new();
    let mut last = String::new();
    for line in lines.map_while(Result::ok) {
        let event: Value = serde_json::from_str(&line).expect("JSON");
        if let Some(phase) = event["phase"].as_str() {
            entered.entry(phase.to_owned()).or_insert_with(Instant::now);
        }
        last = line;
    }
    assert!(child.wait().expect("gs_pitr ends").success(), "{last}");
    (entered["recovering"] - entered["fetching"]).as_secs_f64()
}

fn row(name: &str, costs: &[Cost]) {
    let walls: Vec<String> = costs
        .iter()
        .map(|cost| format!("{:.1}", cost.wall))
        .collect();
    println!(
        "{name:<34} wall s {:<18} median {:>5.1}   tool CPU s {:>5.1}   MinIO CPU s {:>5.1}",
        walls.join(" / "),
        median(costs.iter().map(|cost| cost.wall).collect()),
        median(costs.iter().map(|cost| cost.cpu).collect()),
        median(costs.iter().map(|cost| cost.store_cpu).collect()),
    );
}

async fn bench(mc: PathBuf, minio: Minio) {
    let installation = Installation::newest();
    let mut fleet = Fleet::new("bench", &minio.config());
    fleet.add_database(
        "node",
        &installation,
        ClusterOptions {
            data_checksums: true,
            ..ClusterOptions::default()
        },
    );
    let restored = fleet.path().join("restored");
    fs::create_dir(&restored).expect("a directory");
    os::give(&restored);
    let root = restored.display().to_string();
    fleet.add_host("other", &["--allow-root", &root]);
    let size = fill(fleet.hosts[0].cluster.as_ref().expect("a database"), ROWS).await;
    println!(
        "one node, PostgreSQL {}, {:.2} GB; MinIO over TLS; {ROUNDS} rounds, interleaved",
        installation.major,
        size as f64 / 1e9
    );

    let cluster = fleet.hosts[0].cluster.as_ref().expect("a database");
    let pipe = Pipe::new(&mc, &minio, cluster, fleet.path());
    let agents = [fleet.hosts[0].agent.pid(), fleet.hosts[1].agent.pid()];
    let (from, to) = (fleet.addresses(&[0]), fleet.addresses(&[1]));
    let (mut theirs, mut ours) = (
        (Vec::new(), Vec::new()),
        (Vec::new(), Vec::new(), Vec::new()),
    );
    let mut stored = 0;
    for round in 0..ROUNDS {
        // One each: the restored node is the one that lives on, and the source would be asked about.
        let repository = format!("s3://{}/round-{round}", minio.bucket());
        theirs.0.push(measure(&minio, &[], || pipe.back_up()));
        let mut id = String::new();
        ours.0.push(measure(&minio, &agents, || {
            let mut command = fleet.command(&["backup", "--nodes", &from, "--output", "json"]);
            command.env("GS_PITR_REPO", &repository);
            let result = wait(command, Duration::from_mins(3)).good().result();
            result["backup_id"]
                .as_str()
                .expect("an id")
                .clone_into(&mut id);
            stored = result["nodes"][0]["stored_bytes"].as_u64().expect("bytes");
        }));
        let target = fleet.path().join(format!("pipe-{round}"));
        theirs
            .1
            .push(measure(&minio, &[], || pipe.restore(&target)));
        fs::remove_dir_all(&target).expect("the peer's copy goes");
        let target = format!("{root}/{round}");
        fs::create_dir(&target).expect("a directory");
        os::give(Path::new(&target));
        let mut fetched = 0.0;
        ours.2.push(measure(&minio, &agents, || {
            let map = format!("127.0.0.1:{}={to}", cluster.port());
            let args = [
                "restore",
                "--id",
                &id,
                "--nodes",
                &to,
                "--map",
                &map,
                "--target-dir",
                &target,
                "--no-start",
                "--yes",
                "--output",
                "json",
            ];
            let mut command = fleet.command(&args);
            command.env("GS_PITR_REPO", &repository);
            fetched = fetch_seconds(command);
        }));
        ours.1.push(Cost {
            wall: fetched,
            ..*ours.2.last().expect("just pushed")
        });
        fs::remove_dir_all(&target).expect("our copy goes");
    }
    row("backup  pg_basebackup|zstd|mc pipe", &theirs.0);
    row("backup  gs_pitr", &ours.0);
    row("restore mc cat|zstd -d|tar, synced", &theirs.1);
    row("restore gs_pitr, fetched, synced", &ours.1);
    row("restore gs_pitr, proved, promoted", &ours.2);
    println!("stored by gs_pitr: {:.0} MB", stored as f64 / 1e6);
    let ratio =
        |a: &[Cost], b: &[Cost]| median(a.iter().zip(b).map(|(a, b)| a.wall / b.wall).collect());
    goal("backup_vs_pipe", ratio(&ours.0, &theirs.0), 0.8);
    goal("restore_vs_pipe", ratio(&ours.1, &theirs.1), 0.8);
    let rss = fleet
        .hosts
        .iter()
        .map(|host| host.agent.peak_rss_mib())
        .max()
        .unwrap_or(0);
    goal("agent_rss_mib", rss as f64, 256.0);
}

fn main() {
    let runtime = tokio::runtime::Runtime::new().expect("a runtime");
    runtime.block_on(async {
        let zstd = Command::new("zstd").arg("--version").output().is_ok();
        match (minio::client_binary(), minio::start(true).await) {
            (Some(mc), Some(minio)) if zstd => bench(mc, minio).await,
            _ => support::skip(
                "bench-node",
                "it needs the programs minio, mc (go install) and zstd",
            ),
        }
    });
    runtime.shutdown_timeout(Duration::from_secs(5));
}
