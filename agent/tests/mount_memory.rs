//! What serving a mount costs: resident memory at its peak, and what is stored and sent of zeros.
//!
//! Each figure is that of a process that does nothing else: this binary started again. The program that writes into the mount,
//! and reads what comes back, is another such process, and the bucket is in this one.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::print_stdout,
    reason = "test code: a panic is a failed test, and the figures are printed"
)]

#[path = "mount_memory/program.rs"]
mod program;
#[path = "mount_memory/server.rs"]
mod server;

use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

use program::Work;
use support::os::Scratch;
use support::s3::{self, Operation, Options, S3Server};
use support::{fleet, fuse, skip};

/// What a server's memory may be at its peak, in MiB: its budget of 128 and what no budget counts (names and extents, the S3
/// client, the program itself, what the allocator keeps), and a zstd context of 4 MiB for each lane.
const PEAK: u64 = 256 + 4 * server::LANES as u64;
/// Requests with bytes that writing `global/pg_dw_0` may take, the catalog's own included: 256 MiB that are not zeros would be 32 parts.
const ZEROS_SENT: usize = 24;
/// A server that takes longer hangs.
const PATIENCE: Duration = Duration::from_mins(4);

/// What a server said at its end.
#[derive(Debug)]
struct Figures {
    /// Resident memory at its peak, in MiB.
    peak: u64,
    /// Requests that brought bytes to the bucket.
    sent: usize,
    /// Bytes of its packs.
    stored: u64,
}

/// Not a test: what the tests below start again as a process that serves a mount.
#[test]
fn a_server() {
    if let Some(order) = server::Order::from_environment() {
        server::serve(&order);
    }
}

/// Not a test: the program that uses the mount.
#[test]
fn a_program() {
    program::run_if_asked();
}

/// Requests that brought bytes to the bucket.
fn sent(bucket: &S3Server) -> usize {
    bucket.calls(Operation::Put) + bucket.calls(Operation::UploadPart)
}

/// Plays the server's part in a process of its own.
fn serve(bucket: &S3Server, scratch: &Scratch, what: &str, work: Work) -> Figures {
    let mut command = Command::new(std::env::current_exe().unwrap());
    command
        .args(["--exact", "a_server", "--nocapture", "--test-threads=1"])
        .envs(server::Order::environment(
            what,
            work,
            &bucket.endpoint(),
            scratch.path(),
        ))
        .current_dir("/")
        .stdin(Stdio::null());
    let before = sent(bucket);
    let run = fleet::wait(command, PATIENCE).good();
    let figure = |name: &str| {
        let line = run.stdout.lines().find_map(|line| line.split_once(name));
        let number = line.and_then(|(_, rest)| rest.trim().parse().ok());
        number.unwrap_or_else(|| panic!("no {name}: {run:?}"))
    };
    let figures = Figures {
        peak: figure("PEAK MIB "),
        sent: sent(bucket) - before,
        stored: figure("STORED BYTES "),
    };
    println!("{what} {work:?}: {figures:?}");
    assert!(
        figures.peak <= PEAK,
        "{what} {work:?} took {} MiB at its peak, {PEAK} are allowed",
        figures.peak
    );
    figures
}

/// Writes, and reads back from the bucket in another process.
async fn there_and_back(test: &str, work: Work) -> Option<(Figures, Figures)> {
    if let Err(why) = fuse::ready() {
        skip(test, &why);
        return None;
    }
    let bucket = s3::start(Options::default()).await.unwrap();
    let scratch = Scratch::new("memory");
    let figures = tokio::task::spawn_blocking(move || {
        let written = serve(&bucket, &scratch, "write", work);
        let read = serve(&bucket, &scratch, "read", work);
        no_mount_below(scratch.path());
        (written, read)
    });
    Some(figures.await.unwrap())
}

fn no_mount_below(path: &Path) {
    let table = std::fs::read_to_string("/proc/self/mounts").unwrap();
    assert!(!table.contains(path.to_str().unwrap()), "{table}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_hundred_thousand_small_files_stay_within_the_budget() {
    let test = "a_hundred_thousand_small_files_stay_within_the_budget";
    there_and_back(test, Work::Small).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn one_file_of_4_gib_stays_within_the_budget() {
    let test = "one_file_of_4_gib_stays_within_the_budget";
    if let Some((written, _)) = there_and_back(test, Work::Large).await {
        let random = program::RANDOM_IN_LARGE;
        assert!(
            (random..random + (random >> 4)).contains(&written.stored),
            "{written:?}: the zeros between {random} random bytes are not free"
        );
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_hundred_wal_segments_during_a_copy_stay_within_the_budget() {
    let test = "a_hundred_wal_segments_during_a_copy_stay_within_the_budget";
    there_and_back(test, Work::Wal).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn pg_dw_0_stores_and_sends_next_to_nothing() {
    let test = "pg_dw_0_stores_and_sends_next_to_nothing";
    if let Some((written, _)) = there_and_back(test, Work::DoubleWrite).await {
        assert!(
            written.stored < program::DOUBLE_WRITE / 100,
            "{written:?} of {} bytes",
            program::DOUBLE_WRITE
        );
        assert!(written.sent <= ZEROS_SENT, "{written:?}");
    }
}
