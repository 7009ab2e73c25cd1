//! What is said to a real PostgreSQL over SQL, and what is read of its files, agree with each other.
//!
//! The first test runs once for each PostgreSQL that `Installation::all` finds; list others in
//! `GS_PITR_TEST_PG_BINDIRS`.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    reason = "a panic is a failed test, with its reason"
)]

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use agent_sql::{ConnectOptions, NodeConnection, Password, Severity, SqlError, WalStatus};
use agent_wal::control::{ControlFile, DbState};
use agent_wal::kind::{create_tablespace, restore_point};
use agent_wal::page::{PageCheck, check};
use agent_wal::record::{EndReason, ReaderOptions, Record, RecordReader, Step};
use agent_wal::segment::{Expected, SegmentError, verify};
use agent_wal::{BLOCK_SIZE, Lsn, Major, SegmentName, SegmentSize};
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
                major: Major::new(major),
            };
            let verified = verify(&self.segment(number).unwrap(), &expected).unwrap();
            assert_eq!(verified.major.number(), major);
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
        major: None,
    };
    let error = verify(&recycled, &expected).unwrap_err();
    assert!(
        matches!(error, SegmentError::Broken { offset: 0, end } if matches!(end.reason, EndReason::Page { .. })),
        "{error}"
    );
}

#[tokio::test]
async fn passwords_and_ways_in() {
    let scratch = Scratch::new("login");
    let with = ClusterOptions {
        password: Some("s3cret 'quoted'".to_owned()),
        ..ClusterOptions::default()
    };
    let cluster = start(&Installation::newest(), &scratch, with);
    let tcp = |password: Option<&str>| ConnectOptions {
        host: "127.0.0.1".to_owned(),
        password: password.map(Password::new),
        ..options(&cluster)
    };
    let connect = async |options: ConnectOptions| {
        let node = NodeConnection::connect(&options, CancellationToken::new()).await;
        node.map(|node| node.version_num())
    };
    assert!(connect(tcp(Some("s3cret 'quoted'"))).await.is_ok());
    for wrong in [Some("wrong"), None] {
        let error = connect(tcp(wrong)).await.unwrap_err();
        assert!(
            matches!(&error, SqlError::WrongPassword { user, .. } if user == SUPERUSER),
            "{error}"
        );
        assert!(!format!("{error} {error:?}").contains("s3cret"));
    }
    assert!(!format!("{:?}", tcp(Some("s3cret"))).contains("s3cret"));

    let error = connect(ConnectOptions {
        database: "absent".to_owned(),
        ..options(&cluster)
    })
    .await;
    assert!(matches!(error, Err(SqlError::Refused { .. })), "{error:?}");
    let nobody = ConnectOptions {
        port: support::os::free_port(),
        ..options(&cluster)
    };
    let error = connect(nobody.clone()).await;
    assert!(
        matches!(error, Err(SqlError::Unreachable { .. })),
        "{error:?}"
    );
    let error = connect(ConnectOptions {
        host: "127.0.0.1".to_owned(),
        ..nobody
    })
    .await;
    assert!(
        matches!(error, Err(SqlError::Unreachable { .. })),
        "{error:?}"
    );

    // Something that accepts and says nothing.
    let silent = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let mute = ConnectOptions {
        port: silent.local_addr().unwrap().port(),
        connect_timeout: Duration::from_millis(300),
        ..tcp(None)
    };
    let error = connect(mute.clone()).await;
    assert!(
        matches!(error, Err(SqlError::Unreachable { .. })),
        "{error:?}"
    );
    let cancelled = CancellationToken::new();
    cancelled.cancel();
    let error = NodeConnection::connect(&mute, cancelled).await.map(|_| ());
    assert!(
        matches!(error, Err(SqlError::Cancelled { .. })),
        "{error:?}"
    );

    // A stream that somebody else opened.
    let socket = cluster
        .socket_directory()
        .join(format!(".s.PGSQL.{}", cluster.port()));
    let stream = tokio::net::UnixStream::connect(socket).await.unwrap();
    let node = NodeConnection::over(stream, &options(&cluster), CancellationToken::new()).await;
    assert!(!node.unwrap().in_recovery().await.unwrap());
}

#[tokio::test]
async fn deadlines_and_cancellation_leave_a_session_that_works() {
    let scratch = Scratch::new("late");
    // A checkpoint that nobody hurries takes its time if there is something to write.
    let with = settings(&[("checkpoint_completion_target", "0.9")]);
    let cluster = start(&Installation::newest(), &scratch, with);
    let node = log_in(&cluster).await;
    cluster
        .execute("CREATE TABLE t AS SELECT g, repeat('x', 200) FROM generate_series(1, 50000) g")
        .await;
    let after = Duration::from_millis(300);
    let error = node.start_backup("slow", false, after).await.unwrap_err();
    assert!(matches!(error, SqlError::Timeout { .. }), "{error}");
    assert!(!node.is_lost());
    assert!(!node.in_recovery().await.unwrap());

    let cancel = CancellationToken::new();
    let cancellable = node.with_cancel(cancel.clone());
    let begun = Instant::now();
    let (result, ()) = tokio::join!(
        cancellable.start_backup("slow", false, Duration::from_mins(5)),
        async {
            tokio::time::sleep(Duration::from_millis(200)).await;
            cancel.cancel();
        }
    );
    assert!(
        matches!(result, Err(SqlError::Cancelled { .. })),
        "{result:?}"
    );
    assert!(begun.elapsed() < Duration::from_secs(5));
    // The same session, under a token that is not cancelled.
    assert!(cancellable.insert_lsn().await.is_err());
    node.start_backup("fast", true, Duration::from_mins(1))
        .await
        .unwrap();
    node.stop_backup().await.unwrap();
    let error = node.stop_backup().await.unwrap_err();
    assert!(
        matches!(&error, SqlError::Server { sqlstate, .. } if sqlstate == "55000"),
        "{error}"
    );
}

#[tokio::test]
async fn a_lost_session_is_noticed_at_once() {
    let scratch = Scratch::new("gone");
    let cluster = start(&Installation::newest(), &scratch, ClusterOptions::default());
    let node = log_in(&cluster).await;
    node.start_backup("doomed", true, Duration::from_mins(1))
        .await
        .unwrap();
    let waiting = node.clone();
    let waiting = tokio::spawn(async move { waiting.wait_lost().await });
    cluster
        .execute("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name = 'wal_and_sql'")
        .await;
    let lost = tokio::time::timeout(Duration::from_secs(5), waiting)
        .await
        .unwrap()
        .unwrap();
    assert!(lost.session_is_gone(), "{lost}");
    let error = node.stop_backup().await.unwrap_err();
    assert!(error.session_is_gone(), "{error}");
    assert!(node.is_lost());

    let node = log_in(&cluster).await;
    cluster.stop("immediate");
    let error = node.flush_lsn().await.unwrap_err();
    assert!(error.session_is_gone(), "{error}");
}

/// Each refusal comes with a line that mends it.
#[tokio::test]
async fn preflight_says_what_is_missing_and_what_mends_it() {
    let scratch = Scratch::new("fit");
    let with = ClusterOptions {
        data_checksums: true,
        ..settings(&[("max_slot_wal_keep_size", "1GB")])
    };
    let cluster = start(&Installation::newest(), &scratch, with);
    assert_eq!(log_in(&cluster).await.preflight().await.unwrap(), []);
    cluster.execute("CREATE ROLE \"plain user\" LOGIN").await;
    let plain = ConnectOptions {
        user: "plain user".to_owned(),
        ..options(&cluster)
    };
    let node = NodeConnection::connect(&plain, CancellationToken::new())
        .await
        .unwrap();
    let error = node.server_facts().await.unwrap_err();
    assert!(
        matches!(&error, SqlError::Privilege { grant, .. } if grant == "GRANT pg_monitor TO \"plain user\";"),
        "{error}"
    );
    let error = node.create_restore_point("p").await.unwrap_err();
    assert!(matches!(error, SqlError::Privilege { .. }), "{error}");
    assert!(node.create_slot("s").await.is_err());
    let findings = node.preflight().await.unwrap();
    assert_eq!(findings.len(), 6, "{findings:?}");
    for finding in findings {
        assert_eq!(finding.severity, Severity::Refusal);
        cluster.execute(&finding.mend.unwrap()).await;
    }
    assert_eq!(node.preflight().await.unwrap(), []);
    // What was granted is enough for a whole backup.
    let facts = node.server_facts().await.unwrap();
    assert!(!facts.files.sources_complete || facts.files.sources.len() > 1);
    assert!(node.size_bytes().await.unwrap() > 0);
    node.create_slot("s").await.unwrap();
    node.start_backup("l", true, Duration::from_mins(1))
        .await
        .unwrap();
    node.create_restore_point("p").await.unwrap();
    node.stop_backup().await.unwrap();
    let switched = node.switch_wal().await.unwrap();
    node.advance_slot("s", switched).await.unwrap();
    node.drop_slot("s").await.unwrap();
}

#[tokio::test]
async fn preflight_refuses_settings_that_break_backups() {
    let scratch = Scratch::new("unfit");
    let with = settings(&[
        ("wal_level", "minimal"),
        ("max_wal_senders", "0"),
        ("fsync", "off"),
        ("full_page_writes", "off"),
        ("max_replication_slots", "0"),
    ]);
    let cluster = start(&Installation::newest(), &scratch, with);
    let findings = log_in(&cluster).await.preflight().await.unwrap();
    for (severity, what) in [
        (Severity::Refusal, "wal_level"),
        (Severity::Refusal, "fsync"),
        (Severity::Refusal, "full_page_writes"),
        (Severity::Refusal, "replication slots"),
        (Severity::Warning, "max_slot_wal_keep_size"),
        (Severity::Warning, "checksums"),
    ] {
        let found = findings
            .iter()
            .any(|f| f.severity == severity && f.what.contains(what) && f.mend.is_some());
        assert!(found, "{what}: {findings:?}");
    }
    assert_eq!(findings.len(), 6, "{findings:?}");
}

#[tokio::test]
async fn names_slots_and_files() {
    let scratch = Scratch::new("names");
    let with = ClusterOptions {
        config_outside: true,
        ..settings(&[("max_replication_slots", "1")])
    };
    let cluster = start(&Installation::newest(), &scratch, with);
    let node = log_in(&cluster).await;
    let long = "x".repeat(64);
    for bad in ["", &long, "é", "a\nb"] {
        let error = node.create_restore_point(bad).await.unwrap_err();
        assert!(matches!(error, SqlError::BadName { .. }), "{error}");
    }
    node.create_restore_point("it's \\ \"63\"").await.unwrap();
    node.create_slot("a").await.unwrap();
    let error = node.create_slot("a").await.unwrap_err();
    assert!(
        matches!(&error, SqlError::Server { sqlstate, .. } if sqlstate == "42710"),
        "{error}"
    );
    let error = node.create_slot("b").await.unwrap_err();
    assert!(
        matches!(
            error,
            SqlError::Setting {
                name: "max_replication_slots",
                ..
            }
        ),
        "{error}"
    );
    assert!(node.slot("b").await.unwrap().is_none());

    let files = node.server_facts().await.unwrap().files;
    let etc = cluster.root().join("etc");
    assert_eq!(Path::new(&files.config_file), etc.join("postgresql.conf"));
    assert_eq!(Path::new(&files.hba_file), etc.join("pg_hba.conf"));
    assert_eq!(Path::new(&files.ident_file), etc.join("pg_ident.conf"));
    let pid_file = cluster.root().join("external.pid");
    assert_eq!(files.external_pid_file.as_deref(), pid_file.to_str());
    assert_eq!(
        files.unix_socket_directories,
        [cluster.root().to_str().unwrap()]
    );
    assert_eq!(files.data_directory_mode, 0o700);
    assert!(files.sources_complete);
    for name in ["postgresql.conf", "conf.d/extra.conf"] {
        let path = etc.join(name).to_str().unwrap().to_owned();
        assert!(files.sources.contains(&path), "{:?}", files.sources);
    }
    assert_eq!(files.stats_temp_directory.is_some(), node.major() < 15);
}
