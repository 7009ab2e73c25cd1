//! `pitr-agent wal-put` as the `archive_command` of a real server: what is held stays on its disk, what is not goes.
//!
//! openGauss is what it is for; PostgreSQL's archiver keeps the same contract with its command.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    reason = "a panic is a failed test, with its reason"
)]

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use agent_wal::{Lsn, SegmentName, SegmentSize};
use pitr_agent::wal::gate::ArchiveGate;
use support::os::{self, Scratch};
use support::postgres::{Cluster, ClusterOptions, Installation};
use uuid::Uuid;

const SIZE: u64 = 16 << 20;
/// An archiver that was told no three times sleeps for a minute, unless a new segment wakes it.
const SOON: Duration = Duration::from_secs(90);

/// The program, where the database's user can run it.
fn program(scratch: &Scratch) -> PathBuf {
    // That user may not be able to reach the build directory.
    let program = scratch.directory("bin").join("pitr-agent");
    std::fs::copy(env!("CARGO_BIN_EXE_pitr-agent"), &program).unwrap();
    program
}

fn name(segment: u64) -> String {
    let size = SegmentSize::new(SIZE).unwrap();
    SegmentName::of_lsn(1, Lsn(segment * SIZE), size).format(size)
}

fn is_there(cluster: &Cluster, segment: u64) -> bool {
    cluster
        .data_directory()
        .join("pg_wal")
        .join(name(segment))
        .exists()
}

/// Whether the server considers it archived, or has removed it since.
fn let_go(cluster: &Cluster, segment: u64) -> bool {
    let status = cluster.data_directory().join("pg_wal/archive_status");
    !status.join(format!("{}.ready", name(segment))).exists()
}

async fn current(cluster: &Cluster) -> u64 {
    let lsn = cluster
        .query_one("postgres", "SELECT pg_current_wal_insert_lsn()")
        .await;
    lsn.parse::<Lsn>().unwrap().0 / SIZE
}

/// Fills a segment, as far as the server is concerned.
async fn switch(cluster: &Cluster) {
    cluster
        .execute("SELECT pg_logical_emit_message(false, 'x', 'y')")
        .await;
    cluster
        .query_one("postgres", "SELECT pg_switch_wal()")
        .await;
}

async fn until(what: &str, mut is_so: impl FnMut() -> bool) {
    let begun = Instant::now();
    while !is_so() {
        assert!(begun.elapsed() < SOON, "waited for: {what}");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

fn start(scratch: &Scratch, socket: &Path) -> Cluster {
    let command = format!(
        "{} wal-put --socket {} %p %f",
        program(scratch).display(),
        socket.display()
    );
    let settings = [
        ("archive_mode", "on"),
        ("archive_command", &command),
        ("max_wal_size", "32MB"),
        ("min_wal_size", "32MB"),
    ];
    let settings = settings.map(|(name, value)| (name.to_owned(), value.to_owned()));
    let with = ClusterOptions {
        settings: settings.to_vec(),
        ..ClusterOptions::default()
    };
    let cluster = Cluster::create(&Installation::newest(), &scratch.directory("pg"), with);
    cluster.start();
    cluster
}

#[tokio::test]
async fn a_server_keeps_what_is_held_and_lets_go_of_the_rest() {
    let scratch = Scratch::new("hold");
    let own = scratch.directory("agent");
    let socket = own.join("archive.sock");
    let cluster = start(&scratch, &socket);

    // No agent: nothing is held.
    let first = current(&cluster).await;
    switch(&cluster).await;
    until("an archiver that meets no agent", || {
        let_go(&cluster, first)
    })
    .await;
    assert!(
        cluster.log().contains("is not held"),
        "the server's log says it"
    );

    // An agent that holds nothing.
    let gate = ArchiveGate::default();
    serve(&gate, &socket);
    let second = current(&cluster).await;
    switch(&cluster).await;
    until("an agent that holds nothing", || let_go(&cluster, second)).await;

    // A hold: checkpoints that would remove everything leave it.
    let size = SegmentSize::new(SIZE).unwrap();
    let held = gate.hold(Uuid::now_v7(), size);
    let from = current(&cluster).await;
    held.handle().advance(Lsn(from * SIZE));
    for _ in 0..6 {
        switch(&cluster).await;
    }
    for _ in 0..2 {
        cluster.execute("CHECKPOINT").await;
    }
    for segment in from..from + 6 {
        assert!(
            is_there(&cluster, segment) && !let_go(&cluster, segment),
            "{segment}"
        );
    }

    // What is shipped goes, the rest stays.
    held.handle().advance(Lsn((from + 2) * SIZE));
    switch(&cluster).await;
    until("what was shipped", || let_go(&cluster, from + 1)).await;
    assert!(let_go(&cluster, from));
    assert!(!let_go(&cluster, from + 2));
    cluster.execute("CHECKPOINT").await;
    until("the removal of what was shipped", || {
        !is_there(&cluster, from)
    })
    .await;
    assert!(is_there(&cluster, from + 2));

    // The end of the hold.
    drop(held);
    switch(&cluster).await;
    until("the rest", || let_go(&cluster, from + 6)).await;
    for segment in from..from + 6 {
        assert!(let_go(&cluster, segment), "{segment}");
    }
}

/// Serves in this process, for the database's user.
fn serve(gate: &ArchiveGate, socket: &Path) {
    let own = socket.parent().unwrap();
    // The directory was made for the database's user; the socket is this process's, which may be root.
    if let Some(user) = os::database_user() {
        std::os::unix::fs::chown(own, Some(0), Some(0)).unwrap();
        gate.serve(socket).unwrap();
        std::os::unix::fs::chown(own, Some(user.uid), Some(user.gid)).unwrap();
        os::give(socket);
    } else {
        gate.serve(socket).unwrap();
    }
}
