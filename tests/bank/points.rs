//! Points made while clients work through both proxies: all of them are recovered to and compared.

use std::time::{Duration, Instant};

use catalog::Catalog;
use catalog::ids::PointId;
use catalog::model::{Manifest, Point};
use jiff::Timestamp;
use serde_json::Value;
use support::bank::{Bank, BankOptions, Diary, Mix, Verdict, Window, check};
use support::os;
use support::postgres::{self, Installation};
use support::roll::{self, Copy};
use support::sharded::{SHARD, ShardedCluster, ShardedOptions};
use uuid::Uuid;

use crate::{say, seed};

/// In CI. `BANK_ROUNDS` says otherwise.
const POINTS: usize = 30;
/// Points that are made before all of them are recovered to, so that WAL can go.
const BLOCK: usize = 30;
/// Attempts for one point; each of them is a `gs_pitr` of its own.
const ATTEMPTS: usize = 4;

/// A point, and when its client was told.
struct Made {
    id: PointId,
    told: Timestamp,
}

/// Everything that a block of points needs.
struct World {
    cluster: ShardedCluster,
    copies: Vec<Copy>,
    catalog: Catalog,
    manifest: Manifest,
    diary: Diary,
    options: BankOptions,
}

fn rounds() -> usize {
    let given = std::env::var("BANK_ROUNDS")
        .ok()
        .filter(|rounds| !rounds.is_empty());
    given.map_or(POINTS, |rounds| {
        rounds.parse().expect("BANK_ROUNDS is a number")
    })
}

impl World {
    /// A cluster whose clients work, and a backup made meanwhile: the first point.
    async fn new(seed: u64) -> (Self, Made) {
        let cluster = ShardedCluster::start(ShardedOptions {
            name: "bank",
            wal_segment_mib: 4,
            ..ShardedOptions::default()
        })
        .await;
        let options = BankOptions {
            seed,
            mix: Mix {
                simple: 3,
                prepared: 3,
                batch: 2,
                autocommit: 1,
                one_node: 1,
                two_phase: 1,
            },
            pause: Duration::from_millis(60),
            passing_pause: Duration::from_millis(600),
            shift: 0,
        };
        let bank = Bank::open(&cluster.ways(), &options);
        bank.goes_on(30).await;
        let result = cluster
            .run(&["backup", "--output", "json", "--require-cluster"])
            .good()
            .result();
        let told = Timestamp::now();
        bank.goes_on(30).await;
        let diary = bank.close().await;
        say(&format!("during the backup: {}", diary.describe()));
        let id = result["backup_id"].as_str().expect("an id");
        let (manifest, point) = cluster.bucket.recorded(id).await;
        let copies = cluster.databases().into_iter().map(Copy::of).collect();
        let world = Self {
            catalog: Catalog::open(cluster.bucket.store())
                .await
                .expect("the repository"),
            cluster,
            copies,
            manifest,
            diary,
            options,
        };
        let made = Made {
            id: point.point_id,
            told,
        };
        (world, made)
    }

    /// The node of the manifest that lives in database `number`, and its epoch.
    fn node(&self, point: &Point, number: usize) -> (Uuid, catalog::ids::EpochId) {
        let port = self.cluster.database(number).port();
        let node = self
            .manifest
            .nodes
            .iter()
            .find(|node| node.port == port)
            .expect("the node")
            .node_id;
        let of_point = point
            .nodes
            .iter()
            .find(|of_point| of_point.node_id == node)
            .expect("the node's mark");
        (node, of_point.epoch.clone())
    }

    /// Clients work, points are made.
    async fn make(&mut self, count: usize) -> Vec<Made> {
        self.options.shift += 1;
        let bank = Bank::open(&self.cluster.ways(), &self.options);
        let mut made = Vec::new();
        for number in 0..count {
            bank.goes_on(10).await;
            // Each third as by default: some tries without the lock, which busy clients make vain, come first.
            let lock = if number % 3 == 2 { "auto" } else { "always" };
            made.push(self.make_one(lock));
        }
        let diary = bank.close().await;
        say(&format!("{count} points made under {}", diary.describe()));
        self.diary.join(diary);
        made
    }

    fn make_one(&self, lock: &str) -> Made {
        for _ in 0..ATTEMPTS {
            let begun = Instant::now();
            let run = self.cluster.run(&[
                "point",
                "create",
                "--lock",
                lock,
                "--lock-budget",
                "3600",
                "--output",
                "json",
            ]);
            if run.code == 0 {
                let result = run.result();
                say(&format!(
                    "--lock {lock}, {:?}: {}",
                    begun.elapsed(),
                    brief(&result)
                ));
                let id = result["point_id"].as_str().expect("a point").parse();
                return Made {
                    id: id.expect("a point's id"),
                    told: Timestamp::now(),
                };
            }
            say(&format!("no point: {run:?}"));
        }
        panic!("no point in {ATTEMPTS} attempts");
    }

    /// Recovers the copies to each point in turn, from what the bucket has, and compares.
    async fn compare(&self, made: &[Made]) -> Vec<Verdict> {
        let store = self.cluster.bucket.store();
        let mut points = Vec::new();
        for made in made {
            points.push(self.catalog.point(&made.id).await.expect("the point"));
        }
        for (number, copy) in self.copies.iter().enumerate() {
            let last = points.last().expect("at least one");
            let (node, epoch) = self.node(last, number);
            copy.fetch(&*store, node, &epoch).await;
        }
        let (begun, mut verdicts) = (Instant::now(), Vec::new());
        for (point, made) in points.iter().zip(made) {
            let name = &point.nodes[0].restore_point;
            let at = roll::reach(&self.copies, name, SHARD).await;
            let found = check(&at, &self.diary, window(point, made)).await;
            roll::leave(&self.copies, at).await;
            verdicts.push(found.unwrap_or_else(|wrong| panic!("{name} was proved, and {wrong}")));
        }
        for copy in &self.copies {
            copy.forget();
        }
        say(&format!(
            "{} points recovered to and compared in {:.1?}",
            made.len(),
            begun.elapsed()
        ));
        verdicts
    }

    /// Restores a point by the program, on a host that has nothing, and compares.
    async fn restore(&mut self, host: usize, made: &Made) {
        let begun = Instant::now();
        let point = self.catalog.point(&made.id).await.expect("the point");
        let fleet = &self.cluster.fleet;
        let target = fleet.hosts[host].root.join(made.id.to_string());
        std::fs::create_dir(&target).unwrap();
        os::give(&target);
        let address = &fleet.hosts[host].agent.address;
        let (id, directory) = (made.id.to_string(), target.display().to_string());
        let mut args = [
            "restore",
            "--point",
            &id,
            "--nodes",
            address,
            "--target-dir",
            &directory,
            "--yes",
        ]
        .map(str::to_owned)
        .to_vec();
        let mut ports = Vec::new();
        for number in 0..self.copies.len() {
            let (node, _) = self.node(&point, number);
            let port = os::free_port();
            args.extend(["--map".to_owned(), format!("{node}={address}")]);
            args.extend(["--db-port".to_owned(), format!("{node}={port}")]);
            ports.push((target.join(node.to_string()), port));
        }
        let args: Vec<_> = args.iter().map(String::as_str).collect();
        let _ = fleet.run(&args).good();
        let mut nodes = Vec::new();
        for (data, port) in &ports {
            let (socket, listening) = postgres::running(data);
            assert_eq!(listening, *port);
            nodes.push(postgres::connect(&socket, *port, SHARD).await);
        }
        let found = check(&nodes, &self.diary, window(&point, made)).await;
        let verdict = found.unwrap_or_else(|wrong| panic!("{id} was restored, and {wrong}"));
        drop(nodes);
        for (data, _) in &ports {
            let mut command = os::command(Installation::newest().bindir.join("pg_ctl"));
            command
                .args(["stop", "-w", "-m", "immediate", "-D"])
                .arg(data);
            assert!(command.output().unwrap().status.success());
        }
        say(&format!(
            "restored {id} in {:.1?}: {verdict:?}",
            begun.elapsed()
        ));
    }
}

fn brief(result: &Value) -> String {
    let of = |name: &str| {
        result
            .get(name)
            .map(ToString::to_string)
            .unwrap_or_default()
    };
    format!(
        "{} locked {} ms, {}",
        of("point_id"),
        of("lock_ms"),
        of("proof")
    )
}

/// What was acknowledged before the proof began is in the point, what was begun after its client was told is not.
fn window(point: &Point, made: &Made) -> Window {
    Window {
        from: point.created,
        to: made.told,
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn every_point_is_one_moment() {
    let (wanted, seed) = (rounds(), seed());
    let (mut world, first) = World::new(seed).await;
    let host = world.cluster.fleet.add_host("beside", &[]);
    let (mut all, mut verdicts, mut xa) = (vec![first], Vec::new(), false);
    // The copies are younger than the backup's own point: that one is restored by the program below.
    while all.len() < wanted {
        let half = (wanted - all.len()).min(BLOCK).div_ceil(2);
        let mut block = world.make(half).await;
        xa = !xa;
        world.cluster.transactions(xa).await;
        block.extend(world.make((wanted - all.len() - half).min(half)).await);
        verdicts.extend(world.compare(&block).await);
        all.extend(block);
    }
    for verdict in verdicts.windows(2) {
        assert!(
            verdict[0].transfers <= verdict[1].transfers,
            "transfers were lost on the way"
        );
    }
    let (some, last) = (all.len() / 2, all.len() - 1);
    for number in [0, some, last] {
        world.restore(host, &all[number]).await;
    }
    let end = verdicts.last().expect("points");
    say(&format!(
        "{} points, none of them broken; {end:?}; {}",
        all.len(),
        world.diary.describe()
    ));
    assert!(end.required > 100, "too little was transferred");
}
