//! Points, one command each, and what is known of them: their records in the bucket say how long the lock was held, the commands'
//! events where the time went.

use std::collections::BTreeMap;
use std::io::{BufRead as _, BufReader};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use catalog::Catalog;
use catalog::model::LockRecord;
use catalog::repo::PointState;
use serde_json::Value;
use support::bench::median;
use support::sharded::ShardedCluster;
use tokio::time::sleep;

use super::figures::Figures;

/// States of a try under the lock, in their order.
const LOCKED: [&str; 6] = ["lock", "probe", "drain", "mark", "prove", "unlock"];

/// What is known of points of one kind.
pub(crate) struct Made {
    points: Vec<One>,
}

/// A point.
struct One {
    lock: LockRecord,
    /// Tries that held the lock and gave no point: how long each, and why not.
    thrown_away: Vec<(u64, String)>,
    /// How long each state of the last try took, in milliseconds.
    states: BTreeMap<String, f64>,
    /// The whole command, in seconds.
    wall: f64,
}

/// Makes a backup: points need one to begin from, and with it the agents begin to ship WAL.
pub(crate) fn prepare(cluster: &ShardedCluster) {
    let _ = cluster.run(&["--output", "json", "backup"]).good();
}

/// Runs a command to its end. Its lines, and when each came.
fn timed(mut command: Command) -> Vec<(Instant, Value)> {
    let mut child = command.stdout(Stdio::piped()).spawn().expect("gs_pitr");
    let lines = BufReader::new(child.stdout.take().expect("its output")).lines();
    let lines = lines
        .map_while(Result::ok)
        .map(|line| (Instant::now(), serde_json::from_str(&line).expect("JSON")));
    let lines: Vec<_> = lines.collect();
    let status = child.wait().expect("gs_pitr ends");
    assert!(status.success(), "{:?}", lines.last());
    lines
}

/// Makes so many points.
pub(crate) async fn make(cluster: &ShardedCluster, lock: &str, wanted: usize) -> Made {
    // The budget is for a day's work, and here one of minutes is done.
    let args = ["point", "create", "--lock", lock, "--lock-budget", "3600"];
    let args = [&["--output", "json"], &args[..]].concat();
    let mut runs = Vec::new();
    for _ in 0..wanted {
        // In step with nothing.
        sleep(Duration::from_millis(rand::random_range(0..100))).await;
        let (command, begun) = (cluster.command(&args), Instant::now());
        let run = tokio::task::spawn_blocking(move || timed(command));
        runs.push((run.await.expect("a run"), begun.elapsed().as_secs_f64()));
    }
    let store = cluster.bucket.store();
    let catalog = Catalog::open(store).await.expect("the repository");
    let points = catalog.points().await.expect("the points").into_iter();
    let records = points.map(|listed| match listed.state {
        PointState::Usable(point) => (listed.name, point.lock.expect("a record of its lock")),
        PointState::Unusable(error) => panic!("{}: {error}", listed.name),
    });
    let mut records: BTreeMap<_, _> = records.collect();
    let points = runs.into_iter().map(|(lines, wall)| {
        let id = lines
            .last()
            .and_then(|(_, result)| result["point_id"].as_str());
        let lock = records.remove(id.expect("an id"));
        One {
            lock: lock.expect("the point is in the bucket"),
            thrown_away: thrown_away(&lines),
            states: states(&lines),
            wall,
        }
    });
    Made {
        points: points.collect(),
    }
}

fn thrown_away(lines: &[(Instant, Value)]) -> Vec<(u64, String)> {
    let tries = lines.iter().filter_map(|(_, event)| {
        let held = event["held_ms"].as_u64()?;
        (event["event"] == "point-try").then(|| (held, event["message"].to_string()))
    });
    tries.collect()
}

fn states(lines: &[(Instant, Value)]) -> BTreeMap<String, f64> {
    let mut states = BTreeMap::new();
    let mut current: Option<(&str, Instant)> = None;
    let entered = lines
        .iter()
        .filter(|(_, event)| event["event"] == "point-state");
    for (at, event) in entered {
        if let Some((state, since)) = current.take() {
            states.insert(state.to_owned(), (*at - since).as_secs_f64() * 1e3);
        }
        current = event["state"].as_str().map(|state| (state, *at));
    }
    states
}

impl Made {
    /// Milliseconds for which writes were refused for a point, or may have been, all its tries together.
    pub(crate) fn locked(&self) -> Figures {
        let points = self.points.iter();
        points.map(|point| point.lock.held_ms as f64).collect()
    }

    /// Prints all that is known, and the load under which they were made.
    pub(crate) fn print(&self, title: &str, rate: f64) {
        let count = self.points.len();
        println!("\n{count} points, {title}, {rate:.0} commits/s meanwhile");
        let free = self.points.iter().filter(|point| point.lock.tries == 0);
        println!(
            "without a lock: {} of {count}; a command took {:.1} s (median)",
            free.count(),
            median(self.points.iter().map(|point| point.wall).collect()),
        );
        println!(
            "lock held, all tries of the point together    ms {}",
            self.locked().line()
        );
        let tries: u32 = self.points.iter().map(|point| point.lock.tries).sum();
        let again: Vec<_> = self
            .points
            .iter()
            .flat_map(|point| &point.thrown_away)
            .collect();
        println!(
            "tries with the lock: {tries}, {:.2} a point; thrown away: {}",
            f64::from(tries) / count as f64,
            again.len()
        );
        let mut why: BTreeMap<String, (usize, u64)> = BTreeMap::new();
        for (held, words) in again {
            // Which process it was makes no difference.
            let words = words.split(|c: char| c.is_ascii_digit());
            let words: Vec<_> = words.filter(|words| !words.is_empty()).collect();
            let words: String = words.join("#").chars().take(120).collect();
            let (times, longest) = why.entry(words).or_default();
            (*times, *longest) = (*times + 1, (*longest).max(*held));
        }
        for (words, (times, longest)) in why {
            println!("    {times} times, at most {longest} ms: {words}...");
        }
        for state in LOCKED {
            let took: Figures = self
                .points
                .iter()
                .filter_map(|point| point.states.get(state).copied())
                .collect();
            if took.count() > 0 {
                println!("    {state:<42} ms {}", took.line());
            }
        }
    }
}
