//! Restore against real servers: a copy made by hand comes back at its point, or not at all.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::print_stderr,
    clippy::too_many_lines,
    reason = "test code: a panic is a failed test, and a story is read from top to bottom"
)]

#[path = "restore/run.rs"]
mod run;
#[path = "restore/source.rs"]
mod source;

use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::time::Duration;

use agent_api::{ErrorKind, Phase, RestoreSpec, Restored};
use catalog::model::{AttachmentRole, Verdict};
use run::{Run, as_database_user, decide, names};
use source::Source;
use support::os::Scratch;
use support::postgres::{self, Cluster, ClusterOptions, Installation};

fn settings(major: u32) -> Vec<(String, String)> {
    let keep = if major == 12 {
        ("wal_keep_segments", "64")
    } else {
        ("wal_keep_size", "1GB")
    };
    // Things that would hurt a private start, or must be as large as at the source.
    [
        keep,
        ("max_prepared_transactions", "7"),
        ("archive_mode", "on"),
        ("archive_command", "false"),
    ]
    .map(|(name, value)| (name.to_owned(), value.to_owned()))
    .to_vec()
}

async fn stop(restored: &Restored, bindir: &Path) {
    let mut command = tokio::process::Command::new(bindir.join("pg_ctl"));
    command.args(["stop", "-w", "-m", "fast", "-D", &restored.data_directory]);
    assert!(command.output().await.unwrap().status.success());
}

/// The main job on one node: tablespaces, one of them created after the copy, attached configuration.
async fn comes_back(installation: &Installation, program: &Path) {
    let scratch = Scratch::new("rs");
    let (root, restored_root) = (scratch.directory("s"), scratch.directory("it's a 100% r"));
    let (space, late) = (scratch.directory("space"), scratch.directory("late"));
    let options = ClusterOptions {
        settings: settings(installation.major),
        config_outside: true,
        ..ClusterOptions::default()
    };
    let cluster = Cluster::create(installation, &root, options);
    cluster.start();
    let sql = format!("CREATE TABLESPACE early LOCATION '{}'", space.display());
    cluster.execute(&sql).await;
    cluster.execute("CREATE TABLE t (i int) TABLESPACE early; INSERT INTO t SELECT generate_series(1, 1000)").await;
    cluster
        .execute("CREATE UNLOGGED TABLE u AS SELECT 1 AS i")
        .await;
    let source = Source::register(&cluster).await;
    let etc = root.join("etc");
    let copy = source
        .copy(
            &cluster,
            &[
                (&etc.join("postgresql.conf"), AttachmentRole::Config),
                (&etc.join("pg_hba.conf"), AttachmentRole::Hba),
                (&etc.join("pg_ident.conf"), AttachmentRole::Ident),
                (&etc.join("conf.d/extra.conf"), AttachmentRole::Included),
            ],
        )
        .await;
    cluster
        .execute("INSERT INTO t SELECT generate_series(1001, 1500)")
        .await;
    cluster
        .execute(&format!(
            "CREATE TABLESPACE late LOCATION '{}'",
            late.display()
        ))
        .await;
    cluster
        .execute("CREATE TABLE l TABLESPACE late AS SELECT generate_series(1, 77) AS i")
        .await;
    cluster
        .execute("BEGIN; INSERT INTO t VALUES (9999); PREPARE TRANSACTION 'p'")
        .await;
    let target = restored_root.join("node");
    let spec = source.finish(&cluster, copy, &target).await;

    let bindir = &installation.bindir;
    let mut run = Run::start(&source.store, &spec, bindir, program);
    let error = {
        let failing =
            std::mem::replace(&mut run, Run::start(&source.store, &spec, bindir, program));
        failing.fails().await
    };
    // Of two at the same time one is refused; both stop at the late tablespace, which is still in use.
    assert!(
        matches!(error.kind, ErrorKind::Target | ErrorKind::Conflict),
        "{error:?}"
    );
    let error = run.fails().await;
    assert!(
        matches!(error.kind, ErrorKind::Target | ErrorKind::Conflict),
        "{error:?}"
    );
    assert!(
        names(&restored_root).is_empty(),
        "{:?}",
        names(&restored_root)
    );
    assert_eq!(
        cluster
            .query_one("postgres", "SELECT count(*) FROM l")
            .await,
        "77"
    );

    cluster.stop("fast");
    for directory in [&root, &space, &late] {
        fs::remove_dir_all(directory).unwrap();
    }
    let mut run = Run::start(&source.store, &spec, bindir, program);
    run.reach(Phase::Proved).await;
    assert!(
        !target.exists(),
        "nothing stands at the target before it is whole"
    );
    let restored = run.promote(true).await;
    assert_eq!(restored.recovered_to, spec.point.end_lsn);
    assert_eq!(restored.fork_lsn, spec.point.end_lsn);
    assert_eq!(restored.timeline, spec.point.timeline + 1);
    assert!(restored.running);
    assert_eq!(
        names(&restored_root),
        ["node", "node.config", "node.log", "node.tablespaces"]
    );
    let mode = fs::metadata(&target).unwrap().permissions().mode() & 0o777;
    assert_eq!(mode, 0o700);
    for name in [
        "recovery.signal",
        "backup_label",
        "backup_label.old",
        "tablespace_map.old",
    ] {
        assert!(!target.join(name).exists(), "{name}");
    }
    let oid = spec.node.tablespaces[0].oid.to_string();
    let link = fs::read_link(target.join("pg_tblspc").join(&oid)).unwrap();
    assert_eq!(link, restored_root.join("node.tablespaces").join(&oid));

    let pid_file = fs::read_to_string(target.join("postmaster.pid")).unwrap();
    let socket = PathBuf::from(pid_file.lines().nth(4).unwrap());
    let client = postgres::connect(&socket, restored.port, "postgres").await;
    for (query, answer) in [
        ("SELECT count(*) FROM t", "1500"),
        ("SELECT count(*) FROM l", "77"),
        ("SELECT count(*) FROM u", "0"),
        ("SELECT gid FROM pg_prepared_xacts", "p"),
        (
            "SELECT count(*) FROM pg_class WHERE relname = 'after_the_point'",
            "0",
        ),
        ("SELECT pg_is_in_recovery()", "f"),
        ("SHOW restore_command", ""),
        ("SHOW recovery_target_name", ""),
        ("SHOW archive_mode", "on"),
        ("SHOW autovacuum", "on"),
    ] {
        assert_eq!(postgres::query_one(&client, query).await, answer, "{query}");
    }
    assert_eq!(postgres::query_one(&client, "SHOW work_mem").await, "7MB");
    let hba = postgres::query_one(&client, "SHOW hba_file").await;
    assert!(
        Path::new(&hba).starts_with(restored_root.join("node.config")),
        "{hba}"
    );
    let warnings = run.log.status().warnings;
    for expected in [
        late.to_str().unwrap(),
        "archive_mode",
        "unix_socket_directories",
    ] {
        assert!(
            warnings.iter().any(|warning| warning.contains(expected)),
            "{expected}: {warnings:?}"
        );
    }
    drop(client);
    stop(&restored, bindir).await;
}

#[test]
fn a_node_comes_back_at_its_point_with_every_major() {
    as_database_user(
        "a_node_comes_back_at_its_point_with_every_major",
        |program| async move {
            for installation in Installation::all() {
                eprintln!("PostgreSQL {}", installation.major);
                comes_back(&installation, &program).await;
            }
        },
    );
}

/// A small node, copied, with WAL of several segments up to its point.
async fn small(scratch: &Scratch) -> (Cluster, Source, RestoreSpec, PathBuf) {
    let installation = Installation::newest();
    let options = ClusterOptions {
        settings: settings(installation.major),
        wal_segment_mib: 1,
        ..ClusterOptions::default()
    };
    let cluster = Cluster::create(&installation, &scratch.directory("s"), options);
    cluster.start();
    let source = Source::register(&cluster).await;
    let copy = source.copy(&cluster, &[]).await;
    cluster
        .execute("CREATE TABLE t AS SELECT generate_series(1, 100000) AS i")
        .await;
    let root = scratch.directory("r");
    let spec = source.finish(&cluster, copy, &root.join("node")).await;
    (cluster, source, spec, root)
}

/// A database with nothing special.
fn started(installation: &Installation, scratch: &Scratch) -> Cluster {
    let options = ClusterOptions {
        settings: settings(installation.major),
        ..ClusterOptions::default()
    };
    let cluster = Cluster::create(installation, &scratch.directory("s"), options);
    cluster.start();
    cluster
}

#[test]
fn a_point_is_reached_after_a_checkpoint_with_nothing_between() {
    let name = "a_point_is_reached_after_a_checkpoint_with_nothing_between";
    as_database_user(name, |program| async move {
        let scratch = Scratch::new("rs");
        let installation = Installation::newest();
        let cluster = started(&installation, &scratch);
        let source = Source::register(&cluster).await;
        let copy = source.copy(&cluster, &[]).await;
        // From here to the point no record touches a page: a server that is shut down there notes the checkpoint's end.
        cluster.execute("CHECKPOINT").await;
        let root = scratch.directory("r");
        let spec = source.finish(&cluster, copy, &root.join("node")).await;
        let mut run = Run::start(&source.store, &spec, &installation.bindir, &program);
        run.reach(Phase::Proved).await;
        let restored = run.promote(false).await;
        assert_eq!(restored.fork_lsn, spec.point.end_lsn);
    });
}

#[test]
fn nothing_is_left_of_a_restore_that_fails() {
    as_database_user(
        "nothing_is_left_of_a_restore_that_fails",
        |program| async move {
            let scratch = Scratch::new("rs");
            let (cluster, source, spec, root) = small(&scratch).await;
            let bindir = cluster.installation().bindir.clone();
            let key = |name: &str| source.wal_file(name).key();
            let run = |spec: &RestoreSpec| Run::start(&source.store, spec, &bindir, &program);

            // Removed, cut short, changed: the WAL in the middle.
            let middle = key(&spec.node.wal_first);
            let whole = source.store.bytes(middle.as_str()).unwrap();
            let mut flipped = whole.to_vec();
            let at = flipped.len() / 2;
            flipped[at] ^= 1;
            for bad in [
                None,
                Some(whole.slice(..whole.len() - 1)),
                Some(flipped.into()),
            ] {
                source.store.tamper(&middle, bad);
                let error = run(&spec).fails().await;
                assert_eq!(error.kind, ErrorKind::Damaged, "{error:?}");
                assert!(!error.changed && names(&root).is_empty(), "{error:?}");
            }
            source.store.tamper(&middle, Some(whole));

            // Another name, another end, another version than the copy's.
            let mut other = spec.clone();
            other.point.restore_point = "another".into();
            assert_eq!(run(&other).fails().await.kind, ErrorKind::Damaged);
            let mut other = spec.clone();
            other.node.system_identifier += 1;
            assert_eq!(run(&other).fails().await.kind, ErrorKind::Damaged);
            let mut other = spec.clone();
            other.node.server_version_num = 110_000;
            assert_eq!(run(&other).fails().await.kind, ErrorKind::Incompatible);
            let mut other = spec.clone();
            other.node.server_version_num = 990_000;
            let error = run(&other).fails().await;
            assert!(error.next.unwrap().contains("postgresql-99"));
            let mut other = spec.clone();
            other.node.plain_bytes = 1 << 60;
            assert_eq!(run(&other).fails().await.kind, ErrorKind::Target);
            assert!(names(&root).is_empty());

            // A target that is not empty, and one that is a link.
            let target = Path::new(&spec.target);
            fs::create_dir(target).unwrap();
            fs::write(target.join("mine"), "x").unwrap();
            assert_eq!(run(&spec).fails().await.kind, ErrorKind::Target);
            assert_eq!(names(target), ["mine"]);
            fs::remove_dir_all(target).unwrap();
            std::os::unix::fs::symlink(scratch.path(), target).unwrap();
            assert_eq!(run(&spec).fails().await.kind, ErrorKind::Target);
            fs::remove_file(target).unwrap();
            assert!(names(&root).is_empty());
        },
    );
}

#[test]
fn what_a_dead_restore_left_is_taken_away_by_the_next() {
    let name = "what_a_dead_restore_left_is_taken_away_by_the_next";
    as_database_user(name, |program| async move {
        let scratch = Scratch::new("rs");
        let (cluster, source, spec, root) = small(&scratch).await;
        let bindir = cluster.installation().bindir.clone();
        for phase in [Phase::Fetching, Phase::Recovering, Phase::Proved] {
            let mut run = Run::start(&source.store, &spec, &bindir, &program);
            run.reach(phase).await;
            // Dropped at once, as by SIGKILL: it takes nothing away.
            run.kill().await;
            assert_eq!(names(&root), ["node.gs_pitr-restore"]);
        }
        let mut run = Run::start(&source.store, &spec, &bindir, &program);
        run.reach(Phase::Proved).await;
        run.promote(false).await;
        assert_eq!(names(&root), ["node"]);
    });
}

#[test]
fn a_node_comes_back_on_a_later_timeline() {
    as_database_user(
        "a_node_comes_back_on_a_later_timeline",
        |program| async move {
            let scratch = Scratch::new("rs");
            let installation = Installation::newest();
            let cluster = started(&installation, &scratch);
            cluster
                .execute("ALTER SYSTEM SET restore_command = 'false'")
                .await;
            cluster.stop("fast");
            fs::write(cluster.data_directory().join("recovery.signal"), "").unwrap();
            cluster.start();
            let in_recovery = async || {
                cluster
                    .query_one("postgres", "SELECT pg_is_in_recovery()")
                    .await
            };
            while in_recovery().await == "t" {
                tokio::time::sleep(Duration::from_millis(50)).await;
            }
            cluster.execute("CHECKPOINT").await;
            let source = Source::register(&cluster).await;
            let copy = source.copy(&cluster, &[]).await;
            let spec = source
                .finish(&cluster, copy, &scratch.directory("r").join("node"))
                .await;
            assert_eq!(spec.point.timeline, 2);
            let mut run = Run::start(&source.store, &spec, &installation.bindir, &program);
            run.reach(Phase::Proved).await;
            let restored = run.promote(false).await;
            assert_eq!(
                (restored.timeline, restored.fork_lsn),
                (3, spec.point.end_lsn.clone())
            );

            // Without the history of its timeline there is no way to the point, and it says so.
            fs::remove_dir_all(&spec.target).unwrap();
            source
                .store
                .tamper(&source.wal_file("00000002.history").key(), None);
            let error = Run::start(&source.store, &spec, &installation.bindir, &program)
                .fails()
                .await;
            assert_eq!(error.kind, ErrorKind::Recovery);
            assert!(error.message.contains("timeline 2"), "{error:?}");
        },
    );
}

#[test]
fn a_store_that_fails_during_recovery_opens_nothing() {
    as_database_user(
        "a_store_that_fails_during_recovery_opens_nothing",
        |program| async move {
            let scratch = Scratch::new("rs");
            let (cluster, source, spec, root) = small(&scratch).await;
            let bindir = cluster.installation().bindir.clone();
            let (config, operation) = (
                run::config(Path::new(&spec.target), &bindir),
                uuid::Uuid::new_v4(),
            );
            let mut run = Run::with(&source.store, &spec, config.clone(), &program, operation);
            run.reach(Phase::Proved).await;
            // Promotion asks for what comes after the point. Without the epoch's object nothing can be proved absent.
            let epoch = catalog::keys::epoch(spec.node.node_id, &spec.node.epoch);
            let whole = source.store.bytes(epoch.as_str()).unwrap();
            source.store.tamper(&epoch, None);
            decide(&source.store, run.restore, Verdict::Commit).await;
            run.order_promotion().await.unwrap();
            let error = run.fails().await;
            assert_eq!(error.kind, ErrorKind::Damaged, "{error:?}");
            // It is decided: nothing goes back, and nothing is at the target.
            assert!(error.changed && error.next.unwrap().contains("operations resume"));
            assert_eq!(names(&root), ["node.gs_pitr-restore"]);
            // The same operation goes on when the store is whole again.
            source.store.tamper(&epoch, Some(whole));
            let mut again = Run::with(&source.store, &spec, config, &program, operation);
            again.open(false).await;
            assert_eq!(names(&root), ["node"]);
        },
    );
}

#[test]
fn a_cancelled_restore_leaves_nothing_and_an_empty_target_is_used() {
    let name = "a_cancelled_restore_leaves_nothing_and_an_empty_target_is_used";
    as_database_user(name, |program| async move {
        let scratch = Scratch::new("rs");
        let (cluster, source, spec, root) = small(&scratch).await;
        let bindir = cluster.installation().bindir.clone();
        for phase in [Phase::Fetching, Phase::Recovering, Phase::Proved] {
            let mut run = Run::start(&source.store, &spec, &bindir, &program);
            run.reach(phase).await;
            run.cancel.cancel();
            let error = run.fails().await;
            assert_eq!(error.kind, ErrorKind::Cancelled, "{phase:?}: {error:?}");
            assert!(
                !error.changed && names(&root).is_empty(),
                "{phase:?}: {:?}",
                names(&root)
            );
        }
        fs::create_dir(&spec.target).unwrap();
        let mut run = Run::start(&source.store, &spec, &bindir, &program);
        run.reach(Phase::Proved).await;
        let restored = run.promote(false).await;
        assert!(!restored.running);
        assert_eq!(names(&root), ["node"]);
        assert!(!Path::new(&spec.target).join("postmaster.pid").exists());
        // The command that is handed out starts it.
        let (first, rest) = restored.start_command.split_first().unwrap();
        let status = std::process::Command::new(first)
            .args(rest)
            .stdout(std::process::Stdio::null())
            .status();
        assert!(status.unwrap().success());
        let client = postgres::connect(&scratch.path().join("s"), restored.port, "postgres").await;
        assert_eq!(
            postgres::query_one(&client, "SELECT count(*) FROM t").await,
            "100000"
        );
        stop(&restored, &bindir).await;
    });
}
