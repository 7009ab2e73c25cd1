//! The engine `probackup` with a real program where one is on `PATH`, else with the stand-in; through a real mount.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "tests")]

mod bench;

use std::collections::BTreeSet;
use std::time::Duration;

use agent_api::{BackupMode, ErrorKind, Phase};
use bench::{Bench, copied};
use catalog::keys;
use support::os::Scratch;
use support::postgres::{Cluster, ClusterOptions, Installation};
use support::probackup::{Kind, ProbackupUnderTest, What};

/// The PostgreSQL that a `pg_probackup` was built for; the stand-in takes any.
fn installation(program: &ProbackupUnderTest) -> Installation {
    let What::Real(version) = program.what() else {
        return Installation::newest();
    };
    let (_, major) = version.split_once("(PostgreSQL ").unwrap();
    let major: String = major.chars().take_while(char::is_ascii_digit).collect();
    let major: u32 = major.parse().unwrap();
    let mut all = Installation::all().into_iter();
    all.find(|found| found.major == major)
        .expect("its PostgreSQL")
}

fn cluster(scratch: &Scratch, program: &ProbackupUnderTest) -> Cluster {
    let options = ClusterOptions {
        data_checksums: true,
        ..ClusterOptions::default()
    };
    let cluster = Cluster::create(
        &installation(program),
        &scratch.directory("source"),
        options,
    );
    cluster.start();
    cluster
}

#[tokio::test(flavor = "multi_thread")]
async fn a_full_and_two_increments_stream_into_the_bucket() {
    let program = ProbackupUnderTest::find(Kind::Pg);
    let scratch = Scratch::new("pbfull");
    let Some(bench) = Bench::new("probackup_full", cluster(&scratch, &program), &program).await
    else {
        return;
    };
    bench
        .cluster
        .execute("CREATE TABLE t AS SELECT g, md5(g::text) FROM generate_series(1, 200000) g")
        .await;
    // Or the increment has the table again, for its hint bits.
    bench.cluster.execute("VACUUM (FREEZE) t").await;
    let full = bench.back_up(BackupMode::Full, &[]).await;
    let probackup = full.node.probackup.clone().unwrap();
    assert_eq!(
        (probackup.program.as_str(), probackup.mode),
        ("pg_probackup", BackupMode::Full)
    );
    assert_eq!(
        (probackup.version.as_str(), probackup.parent),
        ("2.5.16", None)
    );
    assert!(full.node.backup_label.contains("START WAL LOCATION"));
    let (files, bytes) = copied(&full.node);
    assert!(files > 500 && bytes > 10 << 20, "{files} {bytes}");
    bench.assert_clean().await;
    let mut chain = vec![full];
    for round in 0..2 {
        let rows =
            format!("INSERT INTO t SELECT g, 'round {round}' FROM generate_series(1, 1000) g");
        bench.cluster.execute(&rows).await;
        let delta = bench.back_up(BackupMode::Delta, &chain).await;
        let probackup = delta.node.probackup.clone().unwrap();
        let before = chain.last().unwrap();
        let parent = probackup.parent.unwrap();
        assert_eq!(parent.backup_id, before.backup_id);
        assert_eq!(
            Some(parent.id),
            before.node.probackup.as_ref().map(|it| it.id.clone())
        );
        let packed: u64 = delta.node.packs.iter().map(|pack| pack.size).sum();
        let full: u64 = chain[0].node.packs.iter().map(|pack| pack.size).sum();
        assert!(packed < full / 2, "{packed} of {full}");
        bench.assert_clean().await;
        chain.push(delta);
    }
    // Each segment once, whichever way it came: nothing in the archive that is no segment of the node's.
    let prefix = keys::epoch_prefix(bench.node, &bench.epoch);
    let archive: Vec<_> = bench
        .store
        .keys()
        .into_iter()
        .map(|key| key.to_string())
        .collect();
    let archive: BTreeSet<_> = archive
        .iter()
        .filter_map(|key| key.strip_prefix(prefix.as_str()))
        .collect();
    for link in &chain {
        for wal in &link.node.probackup.as_ref().unwrap().wal {
            assert!(
                archive.contains(format!("{}.zst", wal.segment).as_str()),
                "{wal:?} {archive:?}"
            );
        }
    }
}

/// Stand-in only: it goes wrong on demand.
async fn with_fault(test: &str, fault: &str) -> Option<Bench> {
    let program = ProbackupUnderTest::stand_in(Kind::Pg);
    let scratch = Scratch::new(test);
    let mut bench = Bench::new(test, cluster(&scratch, &program), &program).await?;
    bench.keep(scratch);
    let fault = fault.replace("FILE", bench.path("pause").to_str().unwrap());
    let prelude = format!("export PROBACKUP_STAND_IN_FAULTS='{fault}'");
    bench.config.probackup = Some(bench.wrapper(program.path(), &prelude));
    bench.keep_program(program);
    Some(bench)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_copy_that_lacks_a_file_is_refused_by_its_name() {
    let Some(bench) = with_fault("pbforget", "forget=global/pg_filenode.map").await else {
        return;
    };
    let backup = bench.start(BackupMode::Full, &[]);
    let error = backup.end().await.unwrap_err();
    assert_eq!(error.kind, ErrorKind::Damaged, "{error}");
    assert!(error.message.contains("global/pg_filenode.map"), "{error}");
    bench.assert_clean().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_killed_program_ends_the_backup_and_leaves_nothing() {
    let Some(bench) = with_fault("pbkill", "half:kill").await else {
        return;
    };
    let error = bench.start(BackupMode::Full, &[]).end().await.unwrap_err();
    assert!(error.message.contains("signal 9"), "{error}");
    bench.assert_clean().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_cancel_in_the_middle_leaves_nothing() {
    let Some(bench) = with_fault("pbcancel", "half:pause=FILE").await else {
        return;
    };
    let backup = bench.start(BackupMode::Full, &[]);
    let reached = bench.path("pause.reached");
    while !reached.exists() {
        assert!(!backup.has_ended());
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    let begun = std::time::Instant::now();
    backup.cancel.cancel();
    let error = backup.end().await.unwrap_err();
    assert_eq!(error.kind, ErrorKind::Cancelled, "{error}");
    assert!(
        begun.elapsed() < Duration::from_secs(45),
        "{:?}",
        begun.elapsed()
    );
    bench.assert_clean().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_program_that_stands_still_is_ended() {
    let Some(mut bench) = with_fault("pbstall", "half:hang").await else {
        return;
    };
    bench.config.stall_timeout = Duration::from_secs(6);
    let backup = bench.start(BackupMode::Full, &[]);
    let log = std::sync::Arc::clone(&backup.log);
    let error = backup.end().await.unwrap_err();
    assert_eq!(error.kind, ErrorKind::Timeout, "{error}");
    assert!(error.message.contains("stood still"), "{error}");
    let warnings = log.status().warnings;
    assert!(
        warnings
            .iter()
            .any(|warning| warning.contains("no byte has moved")),
        "{warnings:?}"
    );
    bench.assert_clean().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_password_reaches_it_on_its_input_only() {
    let program = ProbackupUnderTest::find(Kind::Pg);
    let scratch = Scratch::new("pbpassword");
    let options = ClusterOptions {
        data_checksums: true,
        password: Some("se cret".into()),
        settings: vec![("listen_addresses".into(), "127.0.0.1".into())],
        ..ClusterOptions::default()
    };
    let cluster = Cluster::create(
        &installation(&program),
        &scratch.directory("source"),
        options,
    );
    cluster.start();
    let Some(mut bench) = Bench::new("probackup_password", cluster, &program).await else {
        return;
    };
    let hba = bench.cluster.data_directory().join("pg_hba.conf");
    let rules = std::fs::read_to_string(&hba).unwrap();
    std::fs::write(
        &hba,
        rules + "host replication all 127.0.0.1/32 scram-sha-256\n",
    )
    .unwrap();
    bench.cluster.execute("SELECT pg_reload_conf()").await;
    let file = bench.path("password");
    std::fs::write(&file, "se cret\n").unwrap();
    bench.config.pg_password_file = Some(file);
    bench.config.pg_host = "127.0.0.1".into();
    let seen = bench.path("seen");
    let prelude = format!(
        "tr '\\0' '\\n' </proc/$$/environ >>'{0}'; echo \"$@\" >>'{0}'",
        seen.display()
    );
    bench.config.probackup = Some(bench.wrapper(program.path(), &prelude));
    let backup = bench.start(BackupMode::Full, &[]);
    backup.reach(Phase::Copied).await;
    backup.cancel.cancel();
    backup.end().await.unwrap_err();
    let seen = std::fs::read_to_string(seen).unwrap();
    assert!(
        seen.contains("--stream") && !seen.contains("se cret"),
        "{seen}"
    );
    bench.assert_clean().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_cannot_work_is_refused_before_anything_starts() {
    let program = ProbackupUnderTest::stand_in(Kind::Pg);
    let scratch = Scratch::new("pbrefuse");
    let Some(bench) = Bench::new("probackup_refusals", cluster(&scratch, &program), &program).await
    else {
        return;
    };
    let full = bench.back_up(BackupMode::Full, &[]).await;
    let refused = async |mode, chain: &[_], words: &str| {
        let error = bench.start(mode, chain).end().await.unwrap_err();
        assert!(error.message.contains(words), "{words}: {error}");
        assert!(error.next.is_some() && !error.changed, "{error:?}");
    };
    refused(BackupMode::Delta, &[], "needs a backup to build on").await;
    let one = |change: &dyn Fn(&mut agent_api::ChainLink)| {
        let mut link = full.clone();
        change(&mut link);
        [link]
    };
    let direct = one(&|link| link.node.probackup = None);
    refused(BackupMode::Delta, &direct, "made by the engine `direct`").await;
    let other = one(&|link| link.node.timeline = 7);
    refused(BackupMode::Delta, &other, "is of timeline 7").await;
    let moved = one(&|link| link.node.data_directory = "/elsewhere".into());
    refused(BackupMode::Delta, &moved, "`/elsewhere`").await;
    let gs = one(&|link| link.node.probackup.as_mut().unwrap().program = "gs_probackup".into());
    refused(BackupMode::Delta, &gs, "was made by gs_probackup").await;
    let ahead = one(&|link| link.node.probackup.as_mut().unwrap().id = "ZZZZZZ".into());
    refused(BackupMode::Delta, &ahead, "clock").await;
    refused(
        BackupMode::Ptrack,
        std::slice::from_ref(&full),
        "extension `ptrack`",
    )
    .await;
    let words = "does not ship it all the time";
    refused(BackupMode::Page, std::slice::from_ref(&full), words).await;
    let pack = keys::pack(&full.backup_id, full.node.node_id, 1, 0);
    bench.store.tamper(&pack, None);
    refused(BackupMode::Delta, std::slice::from_ref(&full), "is damaged").await;
    let mut config = bench.config.clone();
    config.probackup = Some("/no/such/program".into());
    let error = bench
        .start_with(config, BackupMode::Full, &[])
        .end()
        .await
        .unwrap_err();
    assert!(error.message.contains("/no/such/program"), "{error}");
    bench.assert_clean().await;
}
