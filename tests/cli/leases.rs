//! Two operators and one cluster: who is told what, who takes over, and who can commit.

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use rustix::process::Signal;
use serde_json::Value;
use support::bucket::Bucket;
use support::fleet::{Fleet, Run};
use support::s3::{Operation, When};

use super::life::{Running, SLOW, assert_no_slot, fleet};

/// Of the first: so long that another one is refused at least once before it has run out, on any machine.
const TTL: [&str; 2] = ["--lease-ttl", "12"];
/// How long a takeover is waited for at most.
const TAKEN_WITHIN: Duration = Duration::from_mins(1);

/// The id of the backup that a run began.
fn backup_id(stdout: &str) -> String {
    let mut lines = stdout
        .lines()
        .map(|line| serde_json::from_str::<Value>(line).unwrap());
    let started = lines.find(|line| line["event"] == "started").unwrap();
    started["backup_id"].as_str().unwrap().to_owned()
}

/// Backs up as soon as the lease of another has run out. Until then it is refused, and says until when.
async fn taking_over(fleet: &Fleet) -> Run {
    let begun = Instant::now();
    let nodes = fleet.addresses(&[0]);
    let mut refused = 0;
    loop {
        let run = fleet.run(&[
            "backup",
            "--output",
            "json",
            "--nodes",
            &nodes,
            "--lease-ttl",
            "5",
        ]);
        if run.code != 12 {
            assert!(refused > 0, "the lease of one who lives was taken: {run:?}");
            return run.good();
        }
        refused += 1;
        assert!(begun.elapsed() < TAKEN_WITHIN, "never taken over: {run:?}");
        tokio::time::sleep(Duration::from_millis(500)).await;
    }
}

/// What `show` says of each backup.
fn states(fleet: &Fleet) -> Vec<(String, String)> {
    let listed = fleet.run(&["show", "--output", "json"]).good().result();
    let backups = listed["backups"].as_array().unwrap().iter();
    let text = |value: &Value| value.as_str().unwrap().to_owned();
    let mut states: Vec<_> = backups
        .map(|backup| (text(&backup["id"]), text(&backup["status"])))
        .collect();
    states.sort();
    states
}

/// The predecessor's backup is fenced and the taker's complete, and the taker has said so.
fn assert_taken_over(fleet: &Fleet, before: &str, taker: &Run) {
    let said = taker.stdout.lines().find(|line| line.contains("took-over"));
    let said: Value = serde_json::from_str(said.unwrap()).unwrap();
    assert_eq!(said["backup_id"], before, "{taker:?}");
    assert_eq!(said["complete"], false, "{taker:?}");
    assert_eq!(said["holder"]["command"], "gs_pitr backup", "{taker:?}");
    let mut wanted = vec![
        (before.to_owned(), "abandoned".to_owned()),
        (backup_id(&taker.stdout), "complete".to_owned()),
    ];
    wanted.sort();
    assert_eq!(states(fleet), wanted);
}

async fn nodes_registered(bucket: &Bucket) -> usize {
    let catalog = catalog::Catalog::open(bucket.store()).await.unwrap();
    catalog.nodes().await.unwrap().len()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_second_backup_is_told_who_is_at_it() {
    let (bucket, fleet) = fleet(1).await;
    let agent = fleet.hosts[0].agent.address.clone();
    let mut first = Running::start(&fleet, &agent, &SLOW);
    first.until("copying", &[&agent]);
    let second = fleet.run(&["backup", "--output", "json", "--nodes", &agent]);
    assert_eq!(second.code, 12, "{second:?}");
    let error = &second.result()["error"];
    assert_eq!(error["kind"], "conflict", "{second:?}");
    assert_eq!(error["changed"], false, "{second:?}");
    let message = error["message"].as_str().unwrap();
    let pid = format!("(pid {}, `gs_pitr backup`)", first.pid());
    for part in [
        "the backup lease is held by",
        &pid,
        ", since 20",
        ", until 20",
    ] {
        assert!(message.contains(part), "{part}: {message}");
    }
    let next = error["next"].as_str().unwrap();
    assert!(next.contains("gs_pitr operations"), "{next}");
    let after = states(&fleet);
    // One that ends in order keeps nobody waiting, and the node is known once.
    first.signal(Signal::INT);
    let first = first.end();
    assert_eq!(first.code, 130);
    // The first may have put its first objects there meanwhile; the second nothing.
    let its_own = backup_id(&first.stdout);
    let foreign = after.iter().find(|(name, _)| *name != its_own);
    assert_eq!(foreign, None, "{after:?}");
    let nodes = ["backup", "--output", "json", "--nodes", &agent];
    let third = fleet.run(&nodes).good();
    assert!(!third.stdout.contains("took-over"), "{third:?}");
    assert_eq!(nodes_registered(&bucket).await, 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_killed_backup_left_is_fenced_and_ended_by_the_next() {
    let (_bucket, fleet) = fleet(1).await;
    let agent = fleet.hosts[0].agent.address.clone();
    let more = [SLOW[0], SLOW[1], TTL[0], TTL[1]];
    let mut killed = Running::start(&fleet, &agent, &more);
    killed.until("copying", &[&agent]);
    killed.signal(Signal::KILL);
    let killed = killed.end();
    let next = taking_over(&fleet).await;
    assert_taken_over(&fleet, &backup_id(&killed.stdout), &next);
    // Its agent was still copying, with a replication slot.
    assert!(
        next.stdout
            .contains("which is given up, was still copying there and was ended")
    );
    assert_no_slot(&fleet, 0).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn one_that_stood_still_while_it_committed_is_refused() {
    let (bucket, fleet) = fleet(1).await;
    let agent = fleet.hosts[0].agent.address.clone();
    let taken = AtomicBool::new(false);
    let first_manifest =
        move |key: &str| key.ends_with("/manifest.json") && !taken.swap(true, Ordering::SeqCst);
    let server = bucket.server();
    let hold = server.hold(Operation::Put, When::Before, first_manifest);
    let frozen = Running::start(&fleet, &agent, &TTL);
    let manifest = hold.reached().await;
    frozen.signal(Signal::STOP);
    let next = taking_over(&fleet).await;
    // The commit that was on its way arrives now, and its sender wakes up.
    hold.release();
    frozen.signal(Signal::CONT);
    let frozen = frozen.end();
    let id = backup_id(&frozen.stdout);
    assert!(manifest.contains(&id), "{manifest}");
    assert_eq!(frozen.code, 12, "{frozen:?}");
    let error = &frozen.result()["error"];
    let message = error["message"].as_str().unwrap();
    assert!(message.contains("was taken over by"), "{message}");
    assert_taken_over(&fleet, &id, &next);
}

#[tokio::test(flavor = "multi_thread")]
async fn one_that_stood_still_while_it_copied_learns_who_took_over() {
    let (_bucket, fleet) = fleet(1).await;
    let agent = fleet.hosts[0].agent.address.clone();
    let more = [SLOW[0], SLOW[1], TTL[0], TTL[1]];
    let mut frozen = Running::start(&fleet, &agent, &more);
    frozen.until("copying", &[&agent]);
    frozen.signal(Signal::STOP);
    let next = taking_over(&fleet).await;
    frozen.signal(Signal::CONT);
    let frozen = frozen.end();
    assert_eq!(frozen.code, 12, "{frozen:?}");
    let message = frozen.result()["error"]["message"].to_string();
    assert!(message.contains("was taken over by"), "{message}");
    assert_taken_over(&fleet, &backup_id(&frozen.stdout), &next);
}
