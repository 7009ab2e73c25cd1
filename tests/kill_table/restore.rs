//! `gs_pitr restore` over two running databases, killed at each of its steps: both are old afterwards, or both are new.

use std::fs;
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};
use support::s3::{Hold, Operation, When};

use crate::table::{self, Row, Shown, Step, Victim};
use crate::world::{PATIENCE, World, words};
use support::running::Running;

/// Flags of the agents: a client that is silent for 3 s is gone.
const AGENT: [&str; 4] = ["--orphan-timeout", "5", "--client-timeout", "3"];
/// How long databases may take to come back.
const SETTLE: Duration = Duration::from_mins(1);

/// What has just come to be when the victim dies.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum At {
    Lease,
    Workspace,
    Fetched,
    Proved,
    Decided,
    Promoting,
    Promoted,
    Opened,
}

impl Step for At {
    const COMMAND: &'static str = "restore";

    fn name(self) -> &'static str {
        match self {
            Self::Lease => "lease taken, no pin yet",
            Self::Workspace => "workspace made, nothing fetched yet",
            Self::Fetched => "copy fetched, its WAL not yet",
            Self::Proved => "all nodes proved, nothing decided yet",
            Self::Decided => "commit decided, nobody knows",
            Self::Promoting => "private server promoting beside the database",
            Self::Promoted => "all nodes in place, not written down yet",
            Self::Opened => "all nodes open, no epoch yet",
        }
    }
}

const fn row(step: At, victim: Victim, stands: bool) -> Row<At> {
    Row {
        step,
        victim,
        stands,
    }
}

/// The rows; they stand if all nodes are new in the end.
const ROWS: [Row<At>; 27] = {
    use Victim::{Agent, Cli, Database, Store};
    [
        row(At::Lease, Cli, false),
        row(At::Lease, Store, true),
        row(At::Workspace, Cli, false),
        row(At::Workspace, Agent, false),
        row(At::Workspace, Database, true),
        row(At::Workspace, Store, true),
        row(At::Fetched, Cli, false),
        row(At::Fetched, Agent, false),
        row(At::Fetched, Database, true),
        row(At::Fetched, Store, true),
        row(At::Proved, Cli, false),
        row(At::Proved, Agent, true),
        row(At::Proved, Database, true),
        row(At::Proved, Store, true),
        row(At::Decided, Cli, true),
        row(At::Decided, Agent, true),
        row(At::Decided, Database, true),
        row(At::Decided, Store, true),
        row(At::Promoting, Cli, true),
        row(At::Promoting, Agent, true),
        row(At::Promoting, Database, true),
        row(At::Promoting, Store, true),
        row(At::Promoted, Cli, true),
        row(At::Promoted, Agent, true),
        row(At::Promoted, Store, true),
        row(At::Opened, Cli, true),
        row(At::Opened, Store, true),
    ]
};

/// Their names.
pub(crate) fn names() -> Vec<String> {
    ROWS.iter().map(Row::name).collect()
}

fn hold(world: &World, step: At) -> Hold {
    let server = world.server();
    let first = world.nodes[0].to_string();
    let (before, after) = (When::Before, When::After);
    match step {
        At::Lease => server.hold(Operation::Put, before, |key| key.ends_with("/pin.json")),
        At::Workspace => server.hold(Operation::Get, before, move |key| {
            key.contains(&first) && key.ends_with("/index")
        }),
        At::Fetched => server.hold(Operation::Get, before, move |key| {
            let wal = key.contains("/wal/") && key.contains(&first);
            wal && !key.contains(".json") && !key.contains(".history")
        }),
        // Which timeline comes next, only a server asks that promotes.
        At::Promoting => server.hold(Operation::Get, before, move |key| {
            key.contains(&first) && key.ends_with(".history.zst")
        }),
        At::Proved => server.hold(Operation::Put, before, |key| {
            key.ends_with("/decision.json")
        }),
        At::Decided => server.hold(Operation::Put, after, |key| key.ends_with("/decision.json")),
        At::Promoted => {
            // After the command's own two records, start and plan, come those of the nodes.
            server.hold(Operation::Put, before, |key| {
                key.contains("/operations/") && key.ends_with("/000003.json")
            })
        }
        At::Opened => server.hold(Operation::Put, before, |key| key.ends_with("/epoch.json")),
    }
}

/// Names beside a host's data directory that have `part` in them.
fn beside(world: &World, host: usize, part: &str) -> Vec<String> {
    let entries = fs::read_dir(&world.fleet.hosts[host].root).unwrap();
    let names = entries.map(|entry| entry.unwrap().file_name().into_string().unwrap());
    names.filter(|name| name.contains(part)).collect()
}

/// The private server of the first node's restore.
fn private_server(world: &World) -> Option<Pid> {
    let root = world.fleet.hosts[0].root.display().to_string();
    let mut processes = fs::read_dir("/proc").unwrap().flatten();
    processes.find_map(|entry| {
        let line = fs::read(entry.path().join("cmdline")).ok()?;
        let line = String::from_utf8_lossy(&line).into_owned();
        let program = line.split('\0').next()?;
        let its = program.ends_with("/postgres") && line.contains(&root);
        let its = its && line.contains(".gs_pitr-restore");
        let pid = entry.file_name().to_str()?.parse().ok()?;
        Pid::from_raw(pid).filter(|_| its)
    })
}

/// Whether the nodes have what was written after the backup: all or none, else it fails.
async fn are_old(world: &World) -> bool {
    let old = [is_old(world, 0).await, is_old(world, 1).await];
    assert_eq!(old[0], old[1], "one node is old and one is new");
    old[0]
}

/// Whether a node has it.
async fn is_old(world: &World, host: usize) -> bool {
    let until = Instant::now() + SETTLE;
    while !answers(world, host).await {
        let log = world.fleet.hosts[host].agent.log();
        assert!(
            Instant::now() < until,
            "host {host} does not come back: {log}"
        );
        tokio::time::sleep(Duration::from_millis(300)).await;
    }
    let later = world
        .ask(host, "SELECT count(*) FROM age WHERE word = 'later'")
        .await;
    let before = world
        .ask(host, "SELECT count(*) FROM age WHERE word = 'before'")
        .await;
    assert_eq!(before, "1", "host {host}");
    later == "1"
}

async fn answers(world: &World, host: usize) -> bool {
    let database = world.fleet.hosts[host].cluster.as_ref().unwrap();
    let mut config = tokio_postgres::Config::new();
    config
        .host_path(database.socket_directory())
        .port(database.port());
    config.user(support::postgres::SUPERUSER).dbname("postgres");
    let connected = config.connect(tokio_postgres::NoTls);
    matches!(
        tokio::time::timeout(Duration::from_secs(5), connected).await,
        Ok(Ok(_))
    )
}

/// Asserts that the step's effect is there, and says it in words.
async fn effect(world: &World, step: At, running: &mut Running, gate: &Hold, held: &str) -> String {
    let workspace = || {
        let found = beside(world, 0, ".gs_pitr-restore");
        assert!(!found.is_empty(), "no workspace");
        found.join(" ")
    };
    let phases = async |running: &mut Running, phase: &str| {
        for host in &world.fleet.hosts {
            running.until(phase, &[&host.agent.address]).await;
        }
    };
    let is_there = world.server().bytes(held).is_some();
    match step {
        At::Lease => {
            let lease = world.keys(&["lease/restore/"]).pop();
            let lease = lease.expect("a lease");
            assert!(beside(world, 0, ".gs_pitr-restore").is_empty());
            lease
        }
        At::Workspace => {
            let sockets = fs::read_dir(world.fleet.temporary()).unwrap().count();
            assert!(sockets > 0, "no directory for sockets");
            format!("{}; {sockets} socket directories", workspace())
        }
        At::Fetched => {
            let control = world.fleet.hosts[0]
                .root
                .join("data.gs_pitr-restore/data/global/pg_control");
            let until = Instant::now() + SETTLE;
            while !control.exists() {
                assert!(Instant::now() < until, "no {}", control.display());
                tokio::time::sleep(Duration::from_millis(50)).await;
            }
            format!("{}; its pg_control", workspace())
        }
        At::Promoting => {
            let server = private_server(world).expect("a private server");
            // The other node is not held, and may be in its place already, closed until this one is.
            assert!(is_old(world, 0).await);
            format!("{}; server {}", workspace(), server.as_raw_nonzero())
        }
        At::Proved => {
            phases(running, "proved").await;
            assert!(are_old(world).await && !is_there);
            format!("{}; phase proved on all", workspace())
        }
        At::Decided => {
            assert!(are_old(world).await && is_there);
            format!("{}; decision.json", workspace())
        }
        At::Promoted => {
            gate.reached_by(2).await;
            for host in [0, 1] {
                assert_eq!(beside(world, host, ".gs_pitr-old-").len(), 1);
                assert!(!answers(world, host).await, "open before all are in place");
            }
            beside(world, 0, ".gs_pitr-old-").join(" ")
        }
        At::Opened => {
            assert!(!are_old(world).await && !is_there);
            "both databases answer".to_owned()
        }
    }
}

async fn kill(world: &mut World, row: Row<At>, running: Running, gate: Hold) -> String {
    match row.victim {
        Victim::Cli => {
            running.kill();
            gate.cut();
            return "killed".to_owned();
        }
        Victim::Agent => {
            world.fleet.hosts[0].agent.kill();
            gate.cut();
        }
        Victim::Database if row.step == At::Promoting => {
            let server = private_server(world).expect("a private server");
            kill_process(server, Signal::KILL).unwrap();
            gate.release();
        }
        Victim::Database => {
            world.kill_database().await;
            gate.release();
        }
        Victim::Store => {
            world.server().set_down(true);
            gate.cut();
            world.kill_store().await;
            world.revive(Victim::Store);
        }
    }
    let run = running.end().await;
    let kind = run.result()["error"]["kind"].clone();
    // Its part is done by `operations resume`.
    let lost =
        row.victim == Victim::Agent || (row.step, row.victim) == (At::Promoting, Victim::Database);
    assert_eq!(run.code == 0, row.stands && !lost, "{row}: {run:?}");
    format!("code {} {}", run.code, kind.as_str().unwrap_or_default())
}

async fn play(world: &mut World, backup: &str, row: Row<At>) -> Shown {
    for host in [0, 1] {
        let sql = "INSERT INTO age SELECT 'later' WHERE NOT EXISTS (SELECT FROM age WHERE word = 'later')";
        let database = world.fleet.hosts[host].cluster.as_ref().unwrap();
        database.execute(sql).await;
    }
    let gate = hold(world, row.step);
    let nodes = world.addresses();
    let args = ["restore", "--id", backup, "--nodes", &nodes, "--yes"];
    let mut running = world.start(&words(&args, &PATIENCE));
    let held = gate.reached().await;
    let before = effect(world, row.step, &mut running, &gate, &held).await;
    println!("{row}: held at {held}; there is {before}");
    let started = running
        .until_event(|event| event["event"] == "started")
        .await;
    let operation = started["operation"].as_str().unwrap().to_owned();
    let how = kill(world, row, running, gate).await;
    world.revive(row.victim);
    let resumed = world
        .again(&["operations", "resume", &operation, "--yes"])
        .await;
    let outcome = resumed["outcome"].as_str().unwrap_or("forward").to_owned();
    assert_eq!(are_old(world).await, !row.stands, "{row}: {resumed}");
    if row.stands {
        world
            .again(&["operations", "discard", &operation, "--yes"])
            .await;
    }
    for host in [0, 1] {
        let old = beside(world, host, ".gs_pitr-old-");
        assert!(old.is_empty(), "{row}: {old:?} is left");
    }
    world.prune().await;
    world.assert_clean().await;
    let nodes = if row.stands { "new" } else { "old" };
    Shown {
        before,
        after: format!("{how}; resumed: {outcome}; all nodes {nodes}; nothing left"),
    }
}

/// Rows of one fleet run one after the other; two fleets halve the time.
async fn run(name: &str, rows: &[Row<At>]) {
    let rows = table::wanted(rows);
    if rows.is_empty() {
        return;
    }
    let mut world = World::with(name, &AGENT).await;
    for host in &world.fleet.hosts {
        let database = host.cluster.as_ref().unwrap();
        let sql = "CREATE TABLE age (word text); INSERT INTO age VALUES ('before')";
        database.execute(sql).await;
    }
    let backup = world.backup_again().await;
    let backup = backup["backup_id"].as_str().unwrap().to_owned();
    let mut shown = Vec::new();
    for row in rows {
        let begun = Instant::now();
        let outcome = play(&mut world, &backup, row).await;
        shown.push((row.name(), outcome, begun.elapsed().as_secs_f64()));
        println!("{row}: {}", shown.last().unwrap().1.after);
    }
    table::print(&shown);
}

#[tokio::test(flavor = "multi_thread")]
async fn restore_rows_to_the_decision() {
    run("kr", &ROWS[..14]).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn restore_rows_from_the_decision() {
    run("ks", &ROWS[14..]).await;
}
