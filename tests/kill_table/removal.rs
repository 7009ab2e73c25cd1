//! `gs_pitr delete` and `gs_pitr prune`, killed at each of their steps. No agent and no database takes part in them.

use std::time::Instant;

use support::s3::{Hold, Operation, When};

use crate::table::{self, Row, Shown, Step, Victim};
use crate::world::{PATIENCE, World, words};
use support::running::Running;

/// What `delete` has just done.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Delete {
    Lease,
    Tombstone,
    Logged,
    Point,
    Objects,
}

impl Step for Delete {
    const COMMAND: &'static str = "delete";

    fn name(self) -> &'static str {
        match self {
            Self::Lease => "lease taken, no tombstone yet",
            Self::Tombstone => "tombstone written, nobody knows",
            Self::Logged => "deletion logged, nothing removed yet",
            Self::Point => "removal of its point logged, point there",
            Self::Objects => "copies removed, manifest there",
        }
    }
}

/// What `prune` has just done.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Prune {
    Lease,
    Fence,
    Tombstone,
    Garbage,
    Upload,
    Leases,
}

impl Step for Prune {
    const COMMAND: &'static str = "prune";

    fn name(self) -> &'static str {
        match self {
            Self::Lease => "lease taken, nothing fenced yet",
            Self::Fence => "dead backup fenced, nobody knows",
            Self::Tombstone => "old backup buried, nothing removed yet",
            Self::Garbage => "garbage of the dead backup removed, old backup there",
            Self::Upload => "objects removed, upload of the dead backup not aborted",
            Self::Leases => "upload aborted, old leases there",
        }
    }
}

const fn row<S: Copy>(step: S, victim: Victim, stands: bool) -> Row<S> {
    Row {
        step,
        victim,
        stands,
    }
}

/// Rows of `delete`; they stand if the backup is gone.
const DELETE: [Row<Delete>; 10] = [
    row(Delete::Lease, Victim::Cli, false),
    row(Delete::Lease, Victim::Store, true),
    row(Delete::Tombstone, Victim::Cli, true),
    row(Delete::Tombstone, Victim::Store, true),
    row(Delete::Logged, Victim::Cli, true),
    row(Delete::Logged, Victim::Store, true),
    row(Delete::Point, Victim::Cli, true),
    row(Delete::Point, Victim::Store, true),
    row(Delete::Objects, Victim::Cli, true),
    row(Delete::Objects, Victim::Store, true),
];

/// Rows of `prune`; they stand if the old backup is gone.
const PRUNE: [Row<Prune>; 11] = [
    row(Prune::Lease, Victim::Cli, false),
    row(Prune::Lease, Victim::Store, true),
    row(Prune::Fence, Victim::Cli, false),
    row(Prune::Tombstone, Victim::Cli, true),
    row(Prune::Tombstone, Victim::Store, true),
    row(Prune::Garbage, Victim::Cli, true),
    row(Prune::Garbage, Victim::Store, true),
    row(Prune::Upload, Victim::Cli, true),
    row(Prune::Upload, Victim::Store, true),
    row(Prune::Leases, Victim::Cli, true),
    row(Prune::Leases, Victim::Store, true),
];

/// Their names.
pub(crate) fn names() -> Vec<String> {
    let delete = DELETE.iter().map(Row::name);
    delete.chain(PRUNE.iter().map(Row::name)).collect()
}

/// Objects of a backup but for its manifest and its tombstone.
fn objects(world: &World, id: &str) -> Vec<String> {
    let mut keys = world.keys(&["backups/", id]);
    keys.retain(|key| !key.contains(".json"));
    keys
}

fn has(world: &World, id: &str, name: &str) -> bool {
    !world.keys(&["backups/", id, name]).is_empty()
}

/// Who holds the lease of maintenance, by its newest object.
fn lease(world: &World) -> String {
    let newest = world.keys(&["lease/maintain/"]).pop();
    let newest = newest.expect("a lease");
    let bytes = world.server().bytes(&format!("{}/{newest}", world.prefix));
    let text = String::from_utf8(bytes.unwrap().to_vec()).unwrap();
    assert!(text.contains(r#""state":"held""#), "{newest}: {text}");
    newest
}

/// Kills at the hold, and says how the command ended.
async fn kill(world: &mut World, victim: Victim, running: Running, gate: Hold) -> String {
    match victim {
        Victim::Cli => {
            running.kill();
            gate.cut();
            "killed".to_owned()
        }
        Victim::Store => {
            world.server().set_down(true);
            gate.cut();
            world.kill_store().await;
            world.revive(victim);
            let run = running.end().await;
            assert_eq!(run.code, 0, "{run:?}");
            "code 0".to_owned()
        }
        Victim::Agent | Victim::Database => unreachable!("they take no part"),
    }
}

fn hold_delete(world: &World, step: Delete, id: &str) -> Hold {
    let (server, id) = (world.server(), id.to_owned());
    let (before, after) = (When::Before, When::After);
    match step {
        Delete::Lease => server.hold(Operation::Put, before, |key| {
            key.contains("/operations/") && key.ends_with("/000001.json")
        }),
        Delete::Tombstone => {
            server.hold(Operation::Put, after, |key| key.ends_with("/deleted.json"))
        }
        Delete::Logged => server.hold(Operation::Put, after, |key| key.contains("/log/")),
        Delete::Point => server.hold(Operation::Delete, before, |key| key.contains("/points/")),
        Delete::Objects => server.hold(Operation::Delete, after, move |key| {
            key.contains(&id) && key.contains("/pack-")
        }),
    }
}

async fn play_delete(world: &mut World, row: Row<Delete>) -> Shown {
    let _newer = world.backup_again().await;
    // The oldest: no other backup can be recovered to its point, so that goes too.
    let (id, point) = world.by_age().swap_remove(0);
    let logged = world.keys(&["log/"]).len();
    let copies = objects(world, &id);
    let gate = hold_delete(world, row.step, &id);
    let args = ["delete", "--id", &id, "--yes"];
    let running = world.start(&words(&args, &PATIENCE));
    let held = gate.reached().await;
    let buried = has(world, &id, "/deleted.json");
    let before = match row.step {
        Delete::Lease => {
            assert!(!buried);
            lease(world)
        }
        Delete::Tombstone => {
            assert!(buried);
            assert_eq!(world.keys(&["log/"]).len(), logged, "logged already");
            "deleted.json".to_owned()
        }
        Delete::Logged => {
            assert!(buried && world.keys(&["log/"]).len() == logged + 1);
            assert_eq!(objects(world, &id), copies);
            world.keys(&["log/"]).pop().unwrap()
        }
        Delete::Point => {
            assert!(buried && world.keys(&["log/"]).len() == logged + 2);
            let points = world.keys(&["points/", &point]);
            assert_eq!(points.len(), 1, "{points:?}");
            format!("{}; {}", world.keys(&["log/"]).pop().unwrap(), points[0])
        }
        Delete::Objects => {
            assert!(buried && has(world, &id, "/manifest.json"));
            assert!(objects(world, &id).is_empty() && !copies.is_empty());
            format!("no copies ({} objects before); manifest.json", copies.len())
        }
    };
    println!("{row}: held at {held}; there is {before}");
    let how = kill(world, row.victim, running, gate).await;
    let complete = world.listed("complete");
    assert_eq!(!complete.contains(&id), row.stands, "{row}: {complete:?}");
    // As an operator would: the same again, which finds the backup or does not.
    let again = world.again_or(&args, "not-found").await;
    world.prune().await;
    world.assert_clean().await;
    let listed = world.listed("complete");
    assert!(!listed.contains(&id), "{row}: {listed:?}");
    assert!(
        world.keys(&["points/", &point]).is_empty(),
        "{row}: its point is left"
    );
    Shown {
        before,
        after: format!("{how}; the same again: {again}; it is gone, nothing of it left"),
    }
}

fn hold_prune(world: &World, step: Prune, dead: &str) -> Hold {
    let (server, dead) = (world.server(), dead.to_owned());
    let (before, after) = (When::Before, When::After);
    match step {
        Prune::Lease => server.hold(Operation::Put, before, |key| {
            key.contains("/operations/") && key.ends_with("/000001.json")
        }),
        Prune::Fence => server.hold(Operation::Put, after, move |key| {
            key.contains(&dead) && key.ends_with("/manifest.json")
        }),
        Prune::Tombstone => {
            server.hold(Operation::Put, after, |key| key.ends_with("/deleted.json"))
        }
        Prune::Garbage => server.hold(Operation::Delete, after, move |key| key.contains(&dead)),
        Prune::Upload => server.hold(Operation::Abort, before, move |key| key.contains(&dead)),
        Prune::Leases => server.hold(Operation::Delete, before, |key| key.contains("/lease/")),
    }
}

/// A backup that died with an upload under way and objects in the bucket. `fenced`: only its agent was killed, and the
/// command has fenced it.
async fn dead_backup(world: &mut World, fenced: bool) -> String {
    let first = world.nodes[0].to_string();
    let second = world.fleet.hosts[1].agent.address.clone();
    let complete = world
        .server()
        .hold(Operation::Complete, When::Before, move |key| {
            key.contains(&first) && key.ends_with("/pack-00000")
        });
    let mut running = world.start_backup();
    running.until("copied", &[&second]).await;
    let key = complete.reached().await;
    let id = key
        .split("/backups/")
        .nth(1)
        .unwrap()
        .split('/')
        .next()
        .unwrap()
        .to_owned();
    world.fleet.hosts[0].agent.kill();
    complete.cut();
    if fenced {
        assert_ne!(running.end().await.code, 0);
    } else {
        running.kill();
        // The other node's part ends by itself, and the lease runs out.
        tokio::time::sleep(std::time::Duration::from_secs(8)).await;
    }
    world.fleet.restart_agent(0);
    assert!(
        world.server().upload_keys().contains(&key),
        "no upload is left"
    );
    assert!(!objects(world, &id).is_empty(), "no garbage");
    id
}

async fn play_prune(world: &mut World, row: Row<Prune>) -> Shown {
    let kept = world.backup_again().await;
    let kept = kept["backup_id"].as_str().unwrap().to_owned();
    // Afterwards: the next backup would fence it.
    let dead = dead_backup(world, row.step != Prune::Fence).await;
    let (oldest, _) = world.by_age().swap_remove(0);
    tokio::time::sleep(std::time::Duration::from_millis(1500)).await;
    let gate = hold_prune(world, row.step, &dead);
    let args = ["prune", "--yes", "--grace", "1s", "--keep-full", "1"];
    let running = world.start(&words(&args, &PATIENCE));
    let held = gate.reached().await;
    let (fenced, buried) = (
        has(world, &dead, "/manifest.json"),
        has(world, &oldest, "/deleted.json"),
    );
    let uploads = world.server().upload_keys();
    let under_way = uploads.iter().any(|key| key.contains(&dead));
    let before = match row.step {
        Prune::Lease => {
            assert!(!buried && under_way);
            lease(world)
        }
        Prune::Fence => {
            assert!(fenced && !buried && under_way && !objects(world, &dead).is_empty());
            format!("{dead}/manifest.json (abandoned)")
        }
        Prune::Tombstone => {
            assert!(buried && under_way && !objects(world, &oldest).is_empty());
            format!("{oldest}/deleted.json")
        }
        Prune::Garbage => {
            assert!(fenced && under_way && objects(world, &dead).is_empty());
            assert!(!objects(world, &oldest).is_empty());
            "no garbage; copies of the old backup".to_owned()
        }
        Prune::Upload => {
            assert!(under_way && objects(world, &oldest).is_empty());
            uploads.join(" ")
        }
        Prune::Leases => {
            let leases = world.keys(&["lease/backup/"]).len();
            assert!(!under_way && leases > 8, "{uploads:?}, {leases} leases");
            format!("no upload; {leases} lease objects")
        }
    };
    println!("{row}: held at {held}; there is {before}");
    let how = kill(world, row.victim, running, gate).await;
    let complete = world.listed("complete");
    assert_eq!(
        !complete.contains(&oldest),
        row.stands,
        "{row}: {complete:?}"
    );
    assert!(complete.contains(&kept), "{row}: {complete:?}");
    world.again(&args).await;
    world.assert_clean().await;
    let listed: Vec<_> = world.listed("complete").into_iter().collect();
    assert_eq!(listed, [kept], "{row}");
    Shown {
        before,
        after: format!("{how}; pruned by the next run; the newest backup is whole"),
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn delete_rows() {
    let rows = table::wanted(&DELETE);
    if rows.is_empty() {
        return;
    }
    let mut world = World::new("kd").await;
    let mut shown = Vec::new();
    for row in rows {
        let begun = Instant::now();
        let outcome = play_delete(&mut world, row).await;
        shown.push((row.name(), outcome, begun.elapsed().as_secs_f64()));
    }
    world.assert_restores().await;
    table::print(&shown);
}

#[tokio::test(flavor = "multi_thread")]
async fn prune_rows() {
    let rows = table::wanted(&PRUNE);
    if rows.is_empty() {
        return;
    }
    let mut world = World::new("kp").await;
    let mut shown = Vec::new();
    for row in rows {
        let begun = Instant::now();
        let outcome = play_prune(&mut world, row).await;
        shown.push((row.name(), outcome, begun.elapsed().as_secs_f64()));
    }
    world.assert_restores().await;
    table::print(&shown);
}
