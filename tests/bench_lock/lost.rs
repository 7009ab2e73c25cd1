//! Commits a second while a backup runs, against those while none does.
//!
//! All of it shares one machine here: nodes, proxies, clients, agents and the store. A machine that is full has nothing left for a backup,
//! and nobody backs up then; so what counts is measured at half of what the machine can do, by clients that think between two
//! transfers. What a full one loses is printed too.

use std::fs;
use std::time::{Duration, Instant};

use support::bank::{Bank, BankOptions, Mix};
use support::bench::{fill, goal, median};
use support::sharded::ShardedCluster;
use tokio::time::sleep;

use super::figures::Figures;
use super::load::shift;

/// About 0.5 GB on each node.
const ROWS: u64 = 3_100_000;
/// Windows with a backup, each between two without.
const ROUNDS: usize = 3;
/// As if nothing was set: the test cluster's commands are otherwise run at full pace.
const DEFAULT: &[&str] = &["--pace", "gentle"];
/// A window without a backup.
const WINDOW: Duration = Duration::from_secs(6);
/// After a backup, before the next window.
const REST: Duration = Duration::from_secs(1);
/// How long the machine's most is looked for.
const MOST: Duration = Duration::from_secs(4);
const CLIENTS: Mix = Mix {
    simple: 8,
    prepared: 6,
    batch: 0,
    autocommit: 2,
    one_node: 0,
    two_phase: 0,
};
const COUNT: f64 = 16.0;

/// What was counted in a window.
#[derive(Debug, Clone, Copy)]
struct Window {
    seconds: f64,
    /// Commits a second.
    rate: f64,
    /// The machine's cores at work, in percent.
    busy: f64,
}

/// A window that is open.
struct Open {
    begun: Instant,
    commits: u64,
    ticks: (f64, f64),
}

impl Open {
    fn now(bank: &Bank) -> Self {
        Self {
            begun: Instant::now(),
            commits: bank.so_far(),
            ticks: ticks(),
        }
    }

    fn close(self, bank: &Bank) -> Window {
        let seconds = self.begun.elapsed().as_secs_f64();
        let (idle, all) = ticks();
        Window {
            seconds,
            rate: (bank.so_far() - self.commits) as f64 / seconds,
            busy: 100.0 - 100.0 * (idle - self.ticks.0) / (all - self.ticks.1),
        }
    }
}

/// Ticks of all cores since the machine started: idle ones, and all.
fn ticks() -> (f64, f64) {
    let stat = fs::read_to_string("/proc/stat").expect("the kernel's counters");
    let first = stat.lines().next().expect("a line");
    let ticks = first.split_whitespace().skip(1).take(8);
    let ticks: Vec<f64> = ticks.map(|it| it.parse().expect("a number")).collect();
    // Idle, and waiting for a disk.
    (ticks[3] + ticks[4], ticks.iter().sum())
}

fn open(cluster: &ShardedCluster, pause: Duration) -> Bank {
    Bank::open(
        &cluster.ways(),
        &BankOptions {
            seed: rand::random(),
            mix: CLIENTS,
            pause,
            passing_pause: pause,
            shift: shift(),
        },
    )
}

async fn without(bank: &Bank, for_this: Duration) -> Window {
    let window = Open::now(bank);
    sleep(for_this).await;
    window.close(bank)
}

/// A whole command.
async fn with(cluster: &ShardedCluster, bank: &Bank, flags: &[&str]) -> (Window, u64) {
    let command = cluster.command(&[&["--output", "json", "backup"], flags].concat());
    let window = Open::now(bank);
    let run =
        tokio::task::spawn_blocking(|| support::fleet::wait(command, Duration::from_mins(15)));
    let run = run.await.expect("a run").good();
    let window = window.close(bank);
    let held = run.result()["lock"]["held_ms"].as_u64();
    (window, held.expect("a record of its lock"))
}

/// How long clients think, on average half of it, so that they come to `wanted` commits a second.
async fn think_time(cluster: &ShardedCluster, wanted: f64) -> Duration {
    let mut pause = 2.0 * COUNT / wanted;
    for _ in 0..2 {
        let bank = open(cluster, Duration::from_secs_f64(pause));
        bank.goes_on(50).await;
        let seen = without(&bank, Duration::from_secs(2)).await.rate;
        bank.close().await;
        let works = COUNT / seen - pause / 2.0;
        pause = 2.0 * (COUNT / wanted - works).max(0.0);
    }
    Duration::from_secs_f64(pause)
}

/// Windows with and without, in turns. The share of commits that each backup cost, in percent.
async fn rounds(
    cluster: &ShardedCluster,
    pause: Duration,
    rounds: usize,
    flags: &[&str],
) -> Vec<f64> {
    let bank = open(cluster, pause);
    bank.goes_on(100).await;
    let mut before = without(&bank, WINDOW).await;
    let (mut quiet, mut loaded, mut held) = (vec![before], Vec::new(), Vec::new());
    let mut lost = Vec::new();
    for _ in 0..rounds {
        let (during, lock) = with(cluster, &bank, flags).await;
        sleep(REST).await;
        let after = without(&bank, WINDOW).await;
        lost.push(100.0 - 200.0 * during.rate / (before.rate + after.rate));
        loaded.push(during);
        held.push(lock as f64);
        quiet.push(after);
        before = after;
        sleep(REST).await;
    }
    print("without a backup", &quiet);
    print("with a backup", &loaded);
    let each: Vec<_> = lost.iter().map(|lost| format!("{lost:.1}")).collect();
    let held: Figures = held.into_iter().collect();
    println!(
        "lost in each round: {} %; lock held: median {:.0}, at most {:.0} ms",
        each.join(", "),
        held.p(50),
        held.p(100)
    );
    println!("clients: {}", bank.close().await.describe());
    lost
}

fn print(what: &str, windows: &[Window]) {
    let each: Vec<_> = windows.iter().map(|it| format!("{:.0}", it.rate)).collect();
    let of = |figure: fn(&Window) -> f64| median(windows.iter().map(figure).collect());
    println!(
        "{what:<18} commits/s {:<40} median {:>5.0}   window {:.1} s   cores busy {:.0} %",
        each.join(" / "),
        of(|window| window.rate),
        of(|window| window.seconds),
        of(|window| window.busy),
    );
}

/// Both loads, with their figures.
pub(crate) async fn bench(cluster: &ShardedCluster) {
    let mut size = 0;
    for database in cluster.databases() {
        size += fill(database, ROWS).await;
    }
    // The first backup has more to do: it registers the nodes.
    let _ = cluster.run(&["--output", "json", "backup"]).good();
    let bank = open(cluster, Duration::ZERO);
    bank.goes_on(100).await;
    let most = without(&bank, MOST).await;
    bank.close().await;
    let pause = think_time(cluster, most.rate / 2.0).await;
    println!(
        "\ncommits while a backup of {:.2} GB runs, {}, bucket: {}",
        size as f64 / 1e9,
        cluster.describe(),
        cluster.bucket.describe()
    );
    println!(
        "{COUNT} clients come to {:.0} commits/s at most (cores busy {:.0} %); thinking for up to {:.0} ms:",
        most.rate,
        most.busy,
        pause.as_secs_f64() * 1e3
    );
    let lost = rounds(cluster, pause, ROUNDS, DEFAULT).await;
    goal("tps_lost_percent", median(lost), 5.0);
    println!("\nfor comparison, `--pace full`:");
    let fast = rounds(cluster, pause, ROUNDS, &["--pace", "full"]).await;
    println!("it loses {:.1} % (median)", median(fast));
    println!("\nfor comparison, clients that do not think:");
    let full = rounds(cluster, Duration::ZERO, 1, DEFAULT).await;
    println!("a full machine loses {:.1} %", median(full));
}
