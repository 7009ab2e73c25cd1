//! `gs_pitr check` with real databases, agents and stores: what is well, what is not, and what mends it.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    reason = "a panic is a failed test, with its reason"
)]

#[path = "check/promises.rs"]
mod promises;

use std::os::unix::fs::symlink;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use futures_util::TryStreamExt as _;
use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;
use support::bucket::Bucket;
use support::fleet::{Fleet, Run};
use support::postgres::{ClusterOptions, Installation};
use support::s3::{Fault, Operation};

fn fit() -> ClusterOptions {
    ClusterOptions {
        data_checksums: true,
        settings: vec![("max_slot_wal_keep_size".into(), "1GB".into())],
        ..ClusterOptions::default()
    }
}

fn check(fleet: &Fleet, more: &[&str]) -> Run {
    let args: Vec<_> = ["check", "--output", "json"]
        .iter()
        .chain(more)
        .copied()
        .collect();
    fleet.run(&args)
}

/// All findings of a run.
fn findings(run: &Run) -> Vec<Value> {
    let events = run
        .stdout
        .lines()
        .map(|line| serde_json::from_str::<Value>(line).expect("JSON"));
    events.filter(|event| event["event"] == "checked").collect()
}

/// The findings of that name made at `node`, or here.
fn found<'a>(all: &'a [Value], node: Option<&str>, name: &str) -> Vec<&'a Value> {
    let here = |line: &&Value| line["node"].as_str() == node && line["name"] == name;
    all.iter().filter(here).collect()
}

fn only<'a>(all: &'a [Value], node: Option<&str>, name: &str) -> &'a Value {
    let found = found(all, node, name);
    assert_eq!(found.len(), 1, "{name} at {node:?} in {all:#?}");
    found[0]
}

async fn keys(bucket: &Bucket) -> Vec<String> {
    let store = bucket.store();
    let listed = store.list("").map_ok(|meta| meta.key.to_string());
    listed.try_collect().await.expect("a listing")
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_well_is_said_and_nothing_is_left() {
    let bucket = Bucket::best().await;
    let mut fleet = Fleet::new("check", &bucket.config());
    let newest = Installation::newest();
    fleet.add_database("one", &newest, fit());
    fleet.add_database("two", &newest, fit());
    let nodes = fleet.addresses(&[0, 1]);

    let run = check(&fleet, &["--nodes", &nodes]).good();
    let all = findings(&run);
    let bad: Vec<_> = all
        .iter()
        .filter(|line| line["level"] == "failure")
        .collect();
    assert!(bad.is_empty(), "{bad:#?}");
    let one = &fleet.hosts[0].agent.address;
    for name in [
        "agent",
        "certificate",
        "clock",
        "database",
        "version",
        "role",
        "privileges",
        "wal_level",
        "fsync",
        "full_page_writes",
        "max_replication_slots",
        "max_slot_wal_keep_size",
        "data_checksums",
        "archiving",
        "replication slots",
        "standbys",
        "data directory",
        "room for WAL",
        "room for a restore",
        "cluster manager",
        "programs",
        "restore directories",
        "memory",
        "store credentials",
        "store reach",
        "store create-if-absent",
        "store checksums kept",
        "store reads and ranges",
        "store listing",
        "store parts",
        "store complete-if-absent",
        "store clock",
        "store deletion",
        "identity",
    ] {
        // The repository is not there yet, so nobody can be known in it.
        let expected = usize::from(name != "identity");
        let found = found(&all, Some(one), name);
        assert_eq!(found.len(), expected, "{name} in {all:#?}");
    }
    for name in [
        "certificate",
        "CA",
        "store create-if-absent",
        "store race",
        "store clean-up",
    ] {
        assert_eq!(only(&all, None, name)["level"], "ok", "{name}");
    }
    let result = run.result();
    assert_eq!(
        (&result["status"], &result["failures"]),
        (&"ok".into(), &0.into())
    );
    assert!(!result["not_checked"].as_array().expect("a list").is_empty());
    assert_eq!(keys(&bucket).await, Vec::<String>::new(), "nothing stays");

    // Afterwards the nodes are known, and their data is not touched by another check.
    let _ = fleet.run(&["backup", "--nodes", &nodes]).good();
    let before = keys(&bucket).await;
    let run = check(&fleet, &["--nodes", &nodes]).good();
    let all = findings(&run);
    let identity = only(&all, Some(one), "identity");
    assert!(
        identity["message"]
            .as_str()
            .expect("words")
            .contains("epoch"),
        "{identity}"
    );
    assert_eq!(only(&all, None, "repository")["level"], "ok");
    assert_eq!(keys(&bucket).await, before);

    // For people: one line each, and what was not looked at.
    let text = fleet.run(&["check", "--nodes", &nodes]).good();
    assert!(
        text.stdout
            .contains(&format!("ok       {one}  wal_level: replica")),
        "{text:?}"
    );
    assert!(
        text.stdout.contains("Not checked:") && text.stdout.contains("0 failures"),
        "{text:?}"
    );
}

/// A program of that name which does nothing. It is killed on drop.
struct Program(Child);

impl Program {
    fn named(fleet: &Fleet, name: &str) -> Self {
        let program = fleet.path().join(name);
        symlink("/bin/sleep", &program).expect("a program");
        let child = Command::new(&program)
            .arg("120")
            .stdin(Stdio::null())
            .spawn();
        Self(child.expect("it starts"))
    }
}

impl Drop for Program {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Makes a slot that a killed agent could have left.
const SLOT: &str = "SELECT pg_create_physical_replication_slot('gs_pitr_0123abcd')";

#[tokio::test(flavor = "multi_thread")]
async fn each_failure_comes_with_the_line_that_mends_it() {
    let bucket = Bucket::double().await;
    let mut fleet = Fleet::new("unfit", &bucket.config());
    let newest = Installation::newest();
    let mut options = fit();
    options.data_checksums = false;
    options.settings = vec![
        ("fsync".into(), "off".into()),
        ("wal_level".into(), "minimal".into()),
        ("max_wal_senders".into(), "0".into()),
    ];
    fleet.add_database("unfit", &newest, options);
    fleet.add_database("plain", &newest, fit());
    let plain = fleet.hosts[1].cluster.as_ref().expect("a database");
    plain.execute("CREATE ROLE plain LOGIN").await;
    plain.execute(SLOT).await;
    let root = fleet.hosts[1].root.clone();
    let agent = fleet.start_agent("plain", &root, Some(plain), &["--pg-user", "plain"]);
    let (unfit, plain) = (fleet.hosts[0].agent.address.clone(), agent.address.clone());
    let repmgrd = Program::named(&fleet, "repmgrd");

    let run = check(&fleet, &["--nodes", &format!("{unfit},{plain}")]);
    assert_eq!(run.code, 7, "{run:?}");
    let all = findings(&run);
    for (name, level, mend) in [
        ("fsync", "failure", "ALTER SYSTEM SET fsync = on"),
        (
            "wal_level",
            "failure",
            "ALTER SYSTEM SET wal_level = replica",
        ),
        ("data_checksums", "warning", "pg_checksums --enable"),
        (
            "max_slot_wal_keep_size",
            "warning",
            "ALTER SYSTEM SET max_slot_wal_keep_size",
        ),
        ("cluster manager", "warning", "repmgr service pause"),
    ] {
        let line = only(&all, Some(&unfit), name);
        assert_eq!(line["level"], level, "{line}");
        assert!(
            line["mend"].as_str().expect("a line").contains(mend),
            "{line}"
        );
    }
    assert!(
        only(&all, Some(&unfit), "cluster manager")["message"]
            .to_string()
            .contains("repmgrd")
    );
    // Every missing privilege has its statement, and they are enough.
    let missing = found(&all, Some(&plain), "privileges");
    assert_eq!(missing.len(), 6, "{missing:#?}");
    let cluster = fleet.hosts[1].cluster.as_ref().expect("a database");
    for line in missing {
        cluster
            .execute(line["mend"].as_str().expect("a statement"))
            .await;
    }
    let error = &run.result()["error"];
    assert_eq!(
        (&error["kind"], &error["changed"]),
        (&"database".into(), &false.into())
    );
    assert_eq!(error["node"], *unfit);

    drop(repmgrd);
    // Now that it may, the agent takes the slot away itself. It looks until it has, and no more.
    let begun = Instant::now();
    let slots = "SELECT count(*) FROM pg_replication_slots";
    while cluster.query_one("postgres", slots).await != "0" {
        assert!(
            begun.elapsed() < Duration::from_mins(1),
            "it is still there"
        );
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    cluster.execute(SLOT).await;
    let all = findings(&check(&fleet, &["--nodes", &plain]).good());
    assert_eq!(only(&all, Some(&plain), "privileges")["level"], "ok");
    assert_eq!(only(&all, Some(&plain), "cluster manager")["level"], "ok");
    let slot = only(&all, Some(&plain), "replication slots");
    assert_eq!(slot["level"], "warning", "{slot}");
    cluster
        .execute(slot["mend"].as_str().expect("a statement"))
        .await;
    let run = check(&fleet, &["--nodes", &plain]).good();
    assert_eq!(
        only(&findings(&run), Some(&plain), "replication slots")["level"],
        "ok"
    );

    // A backup refuses by the same words.
    let refused = fleet.run(&["backup", "--nodes", &unfit, "--output", "json"]);
    assert_eq!(refused.code, 7, "{refused:?}");
    let words = refused.result()["error"]["message"].to_string();
    assert!(
        words.contains("fsync is off") || words.contains("wal_level is minimal"),
        "{words}"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn an_agent_that_does_not_answer_keeps_nobody() {
    let bucket = Bucket::double().await;
    let mut fleet = Fleet::new("silent", &bucket.config());
    fleet.add_database("one", &Installation::newest(), fit());
    fleet.add_host("frozen", &[]);
    let (one, frozen) = (&fleet.hosts[0].agent, &fleet.hosts[1].agent);
    let closed = format!("127.0.0.1:{}", support::os::free_port());
    let pid = Pid::from_raw(frozen.pid().try_into().expect("a pid")).expect("a pid");
    kill_process(pid, Signal::STOP).expect("it stops");
    let nodes = format!("{closed},{},{}", frozen.address, one.address);
    let begun = Instant::now();
    let run = check(&fleet, &["--nodes", &nodes, "--agent-timeout", "3"]);
    let took = begun.elapsed();
    kill_process(pid, Signal::CONT).expect("it goes on");
    assert_eq!(run.code, 5, "{run:?}");
    assert!(took < Duration::from_mins(1), "{took:?}");
    let all = findings(&run);
    for silent in [&closed, &frozen.address] {
        let line = only(&all, Some(silent), "agent");
        assert_eq!(
            (&line["level"], &line["kind"]),
            (&"failure".into(), &"agent-unreachable".into())
        );
    }
    assert_eq!(only(&all, Some(&one.address), "wal_level")["level"], "ok");
    assert_eq!(only(&all, None, "store race")["level"], "ok");
    let unchecked = run
        .stdout
        .lines()
        .find(|line| line.contains("\"not-checked\""))
        .expect("said");
    assert!(
        unchecked.contains(&frozen.address) && unchecked.contains(&closed),
        "{unchecked}"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn the_store_alone() {
    let bucket = Bucket::double().await;
    let fleet = Fleet::new("store", &bucket.config());
    let run = check(&fleet, &[]).good();
    let all = findings(&run);
    assert!(all.iter().all(|line| line["node"].is_null()), "{all:#?}");
    assert!(
        run.stdout.contains("the nodes: no `--nodes` is given"),
        "{run:?}"
    );
    assert_eq!(keys(&bucket).await, Vec::<String>::new());

    // Who may not delete leaves what was written, says so, and hinders no backup.
    let server = bucket.server();
    server.inject_at(Operation::Delete, 0, 99, Fault::Refuse(403, "AccessDenied"));
    let run = check(&fleet, &[]).good();
    let all = findings(&run);
    let left = only(&all, None, "store clean-up");
    assert_eq!(left["level"], "warning", "{left}");
    assert!(
        left["message"]
            .as_str()
            .expect("words")
            .contains("operations/"),
        "{left}"
    );
    assert_eq!(run.result()["left"], true);
    let stay = keys(&bucket).await;
    assert!(
        !stay.is_empty() && stay.iter().all(|key| key.starts_with("operations/")),
        "{stay:?}"
    );
    let catalog = catalog::Catalog::open_or_create(bucket.store(), uuid::Uuid::now_v7()).await;
    let catalog = catalog.expect("a repository can still be made there");
    let ids = catalog.operation_ids().await.expect("operations");
    for id in ids.into_keys() {
        let operation = catalog.operation(id).await.expect("a journal");
        assert_eq!(operation.kind(), Some("check"));
        assert!(operation.ended().is_some());
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_the_store_refuses_has_its_exit_code() {
    let bucket = Bucket::double().await;
    let fleet = Fleet::new("refused", &bucket.config());
    let mut command = fleet.command(&["check", "--output", "json"]);
    command.env("AWS_SECRET_ACCESS_KEY", "not-the-secret");
    let run = support::fleet::wait(command, Duration::from_mins(2));
    assert_eq!(run.code, 4, "{run:?}");
    assert_eq!(
        only(&findings(&run), None, "store reach")["kind"],
        "store-denied"
    );

    let run = fleet.run(&[
        "check",
        "--repo",
        "s3://no-such-bucket/x",
        "--output",
        "json",
    ]);
    assert_eq!(run.code, 3, "{run:?}");
    let mut command = fleet.command(&["check"]);
    command.env_remove("GS_PITR_REPO");
    let run = support::fleet::wait(command, Duration::from_mins(1));
    assert_eq!(run.code, 2, "{run:?}");
    assert!(run.stderr.contains("nothing to check"), "{run:?}");
}
