//! What is said to a real PostgreSQL over SQL, and what is read of its files, agree with each other.
//!
//! The first test runs once for each PostgreSQL that `Installation::all` finds; list others in
//! `GS_PITR_TEST_PG_BINDIRS`.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    reason = "a panic is a failed test, with its reason"
)]

#[path = "wal_and_sql/sessions.rs"]
mod sessions;

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use agent_sql::{ConnectOptions, NodeConnection, WalStatus};
use agent_wal::control::{ControlFile, DbState};
use agent_wal::kind::{create_tablespace, restore_point};
use agent_wal::page::{PageCheck, check};
use agent_wal::record::{EndReason, ReaderOptions, Record, RecordReader, Step};
use agent_wal::segment::{Expected, SegmentError, verify};
use agent_wal::{BLOCK_SIZE, Flavour, Lsn, Major, SegmentName, SegmentSize};
use support::os::Scratch;
use support::postgres::{Cluster, ClusterOptions, Installation, SUPERUSER};
use tokio_util::sync::CancellationToken;

fn options(cluster: &Cluster) -> ConnectOptions {
    ConnectOptions {
        host: cluster.socket_directory().to_str().unwrap().to_owned(),
        port: cluster.port(),
        user: SUPERUSER.to_owned(),
        application_name: "wal_and_sql".to_owned(),
        ..ConnectOptions::default()
    }
}

async fn log_in(cluster: &Cluster) -> NodeConnection {
    NodeConnection::connect(&options(cluster), CancellationToken::new())
        .await
        .unwrap()
}

fn start(installation: &Installation, scratch: &Scratch, with: ClusterOptions) -> Cluster {
    let root = scratch.directory(&format!("pg{}", installation.major));
    let cluster = Cluster::create(installation, &root, with);
    cluster.start();
    cluster
}

fn settings(pairs: &[(&str, &str)]) -> ClusterOptions {
    ClusterOptions {
        settings: pairs
            .iter()
            .map(|(name, value)| ((*name).to_owned(), (*value).to_owned()))
            .collect(),
        ..ClusterOptions::default()
    }
}

/// The log of a cluster as its files have it.
struct Log {
    directory: PathBuf,
    size: SegmentSize,
}

impl Log {
    fn of(cluster: &Cluster, size: u64) -> Self {
        Self {
            directory: cluster.data_directory().join("pg_wal"),
            size: SegmentSize::new(size).unwrap(),
        }
    }

    fn segment(&self, number: u64) -> Option<Vec<u8>> {
        let name = SegmentName {
            timeline: 1,
            number,
        };
        fs::read(self.directory.join(name.format(self.size))).ok()
    }

    /// All records from the first that begins on the page of `near` on, and where they end.
    fn read(&self, near: Lsn) -> (Vec<Record>, Step) {
        let mut reader = RecordReader::near(near, ReaderOptions::new(self.size));
        let mut records = Vec::new();
        loop {
            let step = reader.step_with(|number| Ok::<_, ()>(self.segment(number)));
            match step.unwrap() {
                Step::Record(record) => records.push(record),
                end => return (records, end),
            }
        }
    }

    /// Verifies the segments that end at or before `flushed`.
    fn verify(&self, from: Lsn, flushed: Lsn, system_identifier: u64, major: u32) -> usize {
        let complete = self.size.number_of(from)..self.size.number_of(flushed);
        let count = complete.clone().count();
        for number in complete {
            let name = SegmentName {
                timeline: 1,
                number,
            };
            let expected = Expected {
                system_identifier,
                segment_size: self.size,
                name,
                timelines: vec![1],
                flavour: Major::new(major).map(Flavour::PostgreSql),
            };
            let verified = verify(&self.segment(number).unwrap(), &expected).unwrap();
            assert_eq!(
                Some(verified.flavour),
                Major::new(major).map(Flavour::PostgreSql)
            );
        }
        count
    }
}

/// Pages of all relations of a stopped cluster by what their checksums say.
fn page_checks(directory: &Path, counts: &mut BTreeMap<&'static str, usize>) {
    for entry in fs::read_dir(directory).unwrap() {
        let path = entry.unwrap().path();
        let name = path.file_name().unwrap().to_str().unwrap().to_owned();
        if path.is_dir() {
            page_checks(&path, counts);
        } else if name.starts_with(|c: char| c.is_ascii_digit()) {
            let bytes = fs::read(&path).unwrap();
            let (pages, rest) = bytes.as_chunks::<BLOCK_SIZE>();
            assert!(rest.is_empty());
            for (block, page) in (0u32..).zip(pages) {
                let what = match check(page, block) {
                    PageCheck::New => "new",
                    PageCheck::Good => "good",
                    PageCheck::Bad { .. } => panic!("{} block {block}", path.display()),
                };
                *counts.entry(what).or_default() += 1;
                let elsewhere = check(page, block + 1);
                assert_eq!(elsewhere == PageCheck::New, what == "new");
                assert_ne!(elsewhere, PageCheck::Good);
            }
        }
    }
}

/// A backup as the engine makes it, and every figure of the server found again in its files.
#[tokio::test]
async fn what_the_server_says_is_what_its_files_say() {
    let scratch = Scratch::new("walsql");
    for installation in Installation::all() {
        let major = installation.major;
        let with = ClusterOptions {
            data_checksums: true,
            wal_segment_mib: 1,
            ..ClusterOptions::default()
        };
        let cluster = start(&installation, &scratch, with);
        let node = log_in(&cluster).await;
        assert_eq!(node.major(), major);
        let facts = node.server_facts().await.unwrap();
        assert_eq!(facts.wal_segment_size, 1 << 20);
        assert_eq!((facts.timeline, facts.in_recovery), (1, false));
        assert_eq!(facts.port, cluster.port());
        assert_eq!(Path::new(&facts.data_directory), cluster.data_directory());
        assert!(facts.data_checksums && facts.tablespaces.is_empty());
        assert!(node.size_bytes().await.unwrap() > 1 << 20);

        node.create_slot("gs_pitr_a").await.unwrap();
        let slot = node.slot("gs_pitr_a").await.unwrap().unwrap();
        let begin = node
            .start_backup("it's a label", true, Duration::from_mins(1))
            .await
            .unwrap();
        assert!(slot.holds(begin), "{slot:?} {begin}");
        assert_eq!(slot.wal_status.is_some(), major >= 13);

        let tablespace = scratch.directory(&format!("space of {major}"));
        let place = tablespace.to_str().unwrap();
        cluster
            .execute(
                "CREATE TABLE t AS SELECT g, repeat('x', 200) FROM generate_series(1, 20000) g",
            )
            .await;
        cluster
            .execute(&format!("CREATE TABLESPACE far LOCATION '{place}'"))
            .await;
        let before = node.insert_lsn().await.unwrap();
        let point = node.create_restore_point("gs_pitr_point").await.unwrap();
        let stopped = node.stop_backup().await.unwrap();
        let switched = node.switch_wal().await.unwrap();
        let position = node.wal_position().await.unwrap();
        assert!(begin < before && before < point && point < stopped.lsn && stopped.lsn <= switched);
        assert!(switched <= position.flush && position.flush <= position.insert);
        let label = String::from_utf8(stopped.label_file).unwrap();
        assert!(label.contains("LABEL: it's a label\n"), "{label}");
        assert!(
            label.contains(&format!("START WAL LOCATION: {begin} ")),
            "{label}"
        );
        // The tablespace is younger than the start of the backup.
        assert!(stopped.map_file.is_empty());
        let listed = node.tablespaces().await.unwrap();
        assert_eq!((listed.len(), listed[0].location.as_str()), (1, place));

        let log = Log::of(&cluster, facts.wal_segment_size);
        let (records, _) = log.read(begin);
        let found: Vec<_> = records
            .iter()
            .filter_map(|r| Some((r.start, r.end, restore_point(r)?.name)))
            .collect();
        assert_eq!(found.len(), 1, "{found:?}");
        assert!(before <= found[0].0, "{before} {found:?}");
        assert_eq!((found[0].1, found[0].2.as_str()), (point, "gs_pitr_point"));
        let created: Vec<_> = records.iter().filter_map(create_tablespace).collect();
        assert_eq!(created, [(listed[0].oid, tablespace.clone())]);
        let complete = log.verify(begin, position.flush, facts.system_identifier, major);
        assert!(complete >= 4, "{complete}");

        node.advance_slot("gs_pitr_a", switched).await.unwrap();
        node.advance_slot("gs_pitr_a", begin).await.unwrap();
        let slots = node.slots_like("gs_pitr_").await.unwrap();
        assert_eq!(slots.len(), 1);
        assert_eq!(slots[0].restart_lsn, Some(switched));
        assert!(slots[0].wal_status.is_none_or(WalStatus::is_held));
        assert!(node.slots_like("gs_pitr_b").await.unwrap().is_empty());
        assert!(node.drop_slot("gs_pitr_a").await.unwrap());
        assert!(!node.drop_slot("gs_pitr_a").await.unwrap());
        assert!(node.advance_slot("gs_pitr_a", switched).await.is_err());
        node.close();

        cluster.stop("fast");
        let control = fs::read(cluster.data_directory().join("global/pg_control")).unwrap();
        let control = ControlFile::parse(&control).unwrap();
        assert_eq!(control.state, DbState::ShutDown);
        assert_eq!(control.system_identifier, facts.system_identifier);
        assert_eq!(control.catalog_version, facts.catalog_version);
        // The last record is the shutdown checkpoint, which pg_control names; its redo is itself.
        let (records, end) = log.read(switched);
        let last = records.last().unwrap();
        assert_eq!((last.rmid, last.info & 0xF0), (0, 0));
        assert_eq!((control.checkpoint, control.redo), (last.start, last.start));
        assert!(
            matches!(&end, Step::End(end) if end.lsn == last.end),
            "{end:?}"
        );
        let mut counts = BTreeMap::new();
        page_checks(&cluster.data_directory().join("base"), &mut counts);
        page_checks(&cluster.data_directory().join("global"), &mut counts);
        assert!(counts["good"] > 1000, "{counts:?}");
    }
}

#[tokio::test]
async fn a_record_whose_rest_was_lost_in_a_crash_is_passed() {
    let scratch = Scratch::new("lost");
    let with = ClusterOptions {
        wal_segment_mib: 1,
        ..ClusterOptions::default()
    };
    let cluster = start(&Installation::newest(), &scratch, with);
    let node = log_in(&cluster).await;
    let log = Log::of(&cluster, 1 << 20);
    // Keeps the log although the crash's end is a checkpoint.
    node.create_slot("keep").await.unwrap();
    let begin = node.switch_wal().await.unwrap();
    let message = "SELECT pg_logical_emit_message(true, 'p', repeat('a', 5000000))";
    cluster.execute(message).await;
    let position = node.wal_position().await.unwrap();
    cluster.stop("immediate");
    // As after a power failure on a system that had not written the segments in order.
    let last = log.size.number_of(position.flush);
    for number in last - 2..=last + 3 {
        let name = SegmentName {
            timeline: 1,
            number,
        };
        let _ = fs::remove_file(log.directory.join(name.format(log.size)));
    }
    cluster.start();
    let node = log_in(&cluster).await;
    let point = node.create_restore_point("after").await.unwrap();
    let after = node.switch_wal().await.unwrap();
    let facts = node.server_facts().await.unwrap();
    let (records, _) = log.read(begin);
    assert!(!records.iter().any(|r| r.data.len() > 1_000_000));
    // XLOG_OVERWRITE_CONTRECORD stands where the lost part began.
    assert!(records.iter().any(|r| (r.rmid, r.info & 0xF0) == (0, 0xD0)));
    let end = records
        .iter()
        .find(|r| restore_point(r).is_some())
        .unwrap()
        .end;
    assert_eq!(end, point);
    let flushed = Lsn(after.0.next_multiple_of(1 << 20));
    let major = cluster.installation().major;
    assert!(log.verify(begin, flushed, facts.system_identifier, major) >= 3);
}

/// A recycled segment has the next name but an old content.
#[tokio::test]
async fn a_recycled_segment_is_not_taken_for_a_complete_one() {
    let scratch = Scratch::new("recycled");
    let with = ClusterOptions {
        wal_segment_mib: 1,
        ..settings(&[("min_wal_size", "8MB")])
    };
    let cluster = start(&Installation::newest(), &scratch, with);
    let node = log_in(&cluster).await;
    for _ in 0..4 {
        cluster
            .execute("SELECT pg_logical_emit_message(true, 'p', repeat('a', 700000)); CHECKPOINT")
            .await;
    }
    let facts = node.server_facts().await.unwrap();
    let log = Log::of(&cluster, 1 << 20);
    let next = log.size.number_of(node.insert_lsn().await.unwrap()) + 1;
    let recycled = log.segment(next).expect("a recycled segment");
    let expected = Expected {
        system_identifier: facts.system_identifier,
        segment_size: log.size,
        name: SegmentName {
            timeline: 1,
            number: next,
        },
        timelines: vec![1],
        flavour: None,
    };
    let error = verify(&recycled, &expected).unwrap_err();
    assert!(
        matches!(error, SegmentError::Broken { offset: 0, end } if matches!(end.reason, EndReason::Page { .. })),
        "{error}"
    );
}
