//! `gs_pitr backup`, killed at each of its steps.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Instant;

use support::s3::{Hold, Operation, When};

use crate::table::{self, Row, Shown, Step, Victim};
use crate::world::World;
use support::running::Running;

/// What has just come to be when the victim dies.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum At {
    Registered,
    Slot,
    Upload,
    Pack,
    Copied,
    Shipping,
    Shipped,
    Point,
    Manifest,
    Logged,
}

impl Step for At {
    const COMMAND: &'static str = "backup";

    fn name(self) -> &'static str {
        match self {
            Self::Registered => "node registered, no epoch yet",
            Self::Slot => "slot and backup mode, no upload yet",
            Self::Upload => "multipart upload under way",
            Self::Pack => "pack complete, no index yet",
            Self::Copied => "one node copied, the other not",
            Self::Shipping => "restore point made, its WAL not shipped",
            Self::Shipped => "all nodes shipped, no point yet",
            Self::Point => "point written, no manifest yet",
            Self::Manifest => "manifest written, nobody knows",
            Self::Logged => "log entry written, nobody knows",
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

/// The rows.
const ROWS: [Row<At>; 32] = {
    use Victim::{Agent, Cli, Database, Store};
    [
        row(At::Registered, Cli, false),
        row(At::Registered, Store, true),
        row(At::Slot, Cli, false),
        row(At::Slot, Agent, false),
        row(At::Slot, Database, true),
        row(At::Slot, Store, true),
        row(At::Upload, Cli, false),
        row(At::Upload, Agent, false),
        row(At::Upload, Database, true),
        row(At::Upload, Store, true),
        row(At::Pack, Cli, false),
        row(At::Pack, Agent, false),
        row(At::Pack, Database, true),
        row(At::Pack, Store, true),
        row(At::Copied, Cli, false),
        row(At::Copied, Agent, false),
        row(At::Copied, Database, true),
        row(At::Shipping, Cli, false),
        row(At::Shipping, Agent, false),
        row(At::Shipping, Database, true),
        row(At::Shipping, Store, true),
        row(At::Shipped, Cli, false),
        row(At::Shipped, Agent, true),
        row(At::Shipped, Database, true),
        row(At::Shipped, Store, true),
        row(At::Point, Cli, false),
        row(At::Point, Agent, true),
        row(At::Point, Store, true),
        row(At::Manifest, Cli, true),
        row(At::Manifest, Agent, true),
        row(At::Manifest, Store, true),
        row(At::Logged, Cli, true),
    ]
};

/// Their names.
pub(crate) fn names() -> Vec<String> {
    ROWS.iter().map(Row::name).collect()
}

fn hold(world: &World, step: At) -> Hold {
    let server = world.server();
    let first = world.nodes[0].to_string();
    let (put, before, after) = (Operation::Put, When::Before, When::After);
    match step {
        At::Registered => server.hold(put, before, |key| key.ends_with("/epoch.json")),
        At::Slot => server.hold(Operation::CreateUpload, before, move |key| {
            key.contains(&first) && key.ends_with("/pack-00000")
        }),
        At::Upload => server.hold(Operation::Complete, before, move |key| {
            key.contains(&first) && key.ends_with("/pack-00000")
        }),
        At::Pack => server.hold(put, before, move |key| {
            key.contains(&first) && key.ends_with("/index")
        }),
        At::Copied => {
            let second = world.nodes[1].to_string();
            server.hold(put, before, move |key| {
                key.contains(&second) && key.ends_with("/index")
            })
        }
        At::Shipping => server.hold(put, before, move |key| {
            key.contains("/wal/") && key.contains(&first) && !key.contains(".json")
        }),
        At::Shipped => server.hold(put, before, |key| key.contains("/points/")),
        At::Point => server.hold(put, before, |key| key.ends_with("/manifest.json")),
        At::Manifest => server.hold(put, after, |key| key.ends_with("/manifest.json")),
        At::Logged => {
            // The first entry is the point's.
            let seen = Arc::new(AtomicUsize::new(0));
            server.hold(put, after, move |key| {
                key.contains("/log/") && seen.fetch_add(1, Ordering::SeqCst) > 0
            })
        }
    }
}

/// Asserts that the step's effect is there, and says it in words.
async fn effect(world: &World, step: At, id: &str, running: &mut Running) -> String {
    let first = world.nodes[0].to_string();
    let of_backup = format!("backups/{id}/");
    let one = |parts: &[&str]| {
        let found = world.keys(parts);
        assert!(
            !found.is_empty(),
            "nothing like {parts:?}: {:?}",
            world.keys(&[])
        );
        found.last().cloned().unwrap_or_default()
    };
    let none = |parts: &[&str]| assert_eq!(world.keys(parts), Vec::<String>::new());
    let slot = async {
        let slots = world.slots(0).await;
        assert!(slots.starts_with("gs_pitr_"), "no slot: `{slots}`");
        slots
    };
    match step {
        At::Registered => {
            none(&["/epoch.json"]);
            one(&["nodes/"])
        }
        At::Slot => {
            // All of a small node fits into the first part, so its backup mode may be over before anything is sent.
            let sessions = world.sessions(0).await;
            assert!(sessions.contains("gs_pitr"), "no session of ours");
            none(&[&of_backup, &first]);
            format!("{}; sessions {sessions}", slot.await)
        }
        At::Upload => {
            let uploads = world.server().upload_keys();
            let key = uploads.iter().find(|key| key.contains(&of_backup));
            let key = key.unwrap_or_else(|| panic!("no upload: {uploads:?}"));
            none(&[&of_backup, &first]);
            format!("{}; upload of {key}", slot.await)
        }
        At::Pack => {
            none(&[&of_backup, &first, "/index"]);
            format!(
                "{}; {}",
                slot.await,
                one(&[&of_backup, &first, "/pack-00000"])
            )
        }
        At::Copied => {
            let agent = &world.fleet.hosts[0].agent.address;
            running.until("copied", &[agent]).await;
            none(&[&of_backup, &world.nodes[1].to_string(), "/index"]);
            format!("{}; {}", slot.await, one(&[&of_backup, &first, "/index"]))
        }
        At::Shipping => {
            let agent = &world.fleet.hosts[0].agent.address;
            running.until("shipping", &[agent]).await;
            none(&[&of_backup, "/manifest.json"]);
            format!("{}; phase shipping", slot.await)
        }
        At::Shipped => {
            for host in &world.fleet.hosts {
                running.until("shipped", &[&host.agent.address]).await;
            }
            assert_eq!(world.slots(0).await, "", "its WAL is in the bucket");
            none(&[&of_backup, "/manifest.json"]);
            one(&["wal/", &first, ".zst"])
        }
        At::Point => {
            none(&[&of_backup, "/manifest.json"]);
            one(&["points/"])
        }
        At::Manifest => one(&[&of_backup, "/manifest.json"]),
        At::Logged => format!(
            "{}; {}",
            one(&[&of_backup, "/manifest.json"]),
            one(&["log/"])
        ),
    }
}

async fn play(world: &mut World, row: Row<At>) -> Shown {
    let gate = hold(world, row.step);
    let mut running = world.start_backup();
    let held = gate.reached().await;
    let started = running
        .until_event(|event| event["event"] == "started")
        .await;
    let id = started["backup_id"].as_str().unwrap().to_owned();
    let before = effect(world, row.step, &id, &mut running).await;
    let what = format!("{row}: held at {held}; there is {before}");
    println!("{what}");
    let ended = match row.victim {
        Victim::Cli => {
            running.kill();
            gate.cut();
            None
        }
        Victim::Agent => {
            world.fleet.hosts[0].agent.kill();
            gate.cut();
            if row.step == At::Shipping {
                // It is waited for; when it is back, it has nothing of this backup any more.
                world.revive(Victim::Agent);
            }
            Some(running)
        }
        Victim::Database => {
            world.kill_database().await;
            gate.release();
            Some(running)
        }
        Victim::Store => {
            world.server().set_down(true);
            gate.cut();
            world.kill_store().await;
            world.revive(Victim::Store);
            Some(running)
        }
    };
    let mut how = "killed".to_owned();
    if let Some(running) = ended {
        let run = running.end().await;
        let error = run.result()["error"].clone();
        how = format!(
            "code {} {}",
            run.code,
            error["kind"].as_str().unwrap_or_default()
        );
        assert_eq!(run.code == 0, row.stands, "{what}: {run:?}");
    }
    world.revive(row.victim);
    let complete = world.listed("complete");
    assert_eq!(complete.contains(&id), row.stands, "{what}: {complete:?}");
    let next = world.backup_again().await;
    let next = next["backup_id"].as_str().unwrap().to_owned();
    world.prune().await;
    world.assert_clean().await;
    let listed = world.listed("complete");
    assert!(listed.contains(&next), "{listed:?} lacks {next}");
    assert_eq!(listed.contains(&id), row.stands, "{what}: {listed:?}");
    Shown {
        before,
        after: format!(
            "{how}; {} backups listed, all whole; nothing left",
            listed.len()
        ),
    }
}

/// Rows of one fleet run one after the other; two fleets halve the time.
async fn run(name: &str, rows: &[Row<At>]) {
    let rows = table::wanted(rows);
    if rows.is_empty() {
        return;
    }
    let mut world = World::new(name).await;
    let mut shown = Vec::new();
    for (number, row) in rows.into_iter().enumerate() {
        let begun = Instant::now();
        // A repository of its own for the first backup of all: in the other one both databases are known.
        world.prefix = match row.step {
            At::Registered => format!("clusters/new-{number}"),
            _ => "clusters/one".into(),
        };
        let outcome = play(&mut world, row).await;
        shown.push((row.name(), outcome, begun.elapsed().as_secs_f64()));
        println!("{row}: {}", shown.last().unwrap().1.after);
    }
    world.prefix = "clusters/one".into();
    world.assert_restores().await;
    table::print(&shown);
}

#[tokio::test(flavor = "multi_thread")]
async fn backup_rows_of_the_copy() {
    run("kb", &ROWS[..14]).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn backup_rows_of_the_commit() {
    run("kc", &ROWS[14..]).await;
}
