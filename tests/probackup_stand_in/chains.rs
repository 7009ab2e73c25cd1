//! FULL and increments of a working cluster, restored and started: sums right, checksums right, and each program reads what
//! the other wrote.

use std::path::{Path, PathBuf};
use std::process::Stdio;

use support::os;
use support::postgres::{ClusterOptions, connect, query_one};
use support::probackup::{Kind, ProbackupUnderTest};
use support::skip;

use crate::world::{INSTANCE, Ran, World, control, increment, run};

fn restore(
    world: &World,
    program: &ProbackupUnderTest,
    catalog: &Path,
    id: &str,
    more: &[String],
) -> (PathBuf, Ran) {
    let to = world
        .scratch
        .path()
        .join("node")
        .join(format!("restored-{id}-{:08x}", rand::random::<u32>()));
    let mut command = program.command();
    command
        .args([
            "restore",
            "--instance",
            INSTANCE,
            "-i",
            id,
            "--no-sync",
            "-j",
            "2",
        ])
        .args(more);
    let ran = run(command.arg("-B").arg(catalog).arg("-D").arg(&to));
    (to, ran)
}

/// Starts a restored directory, asks for one value, stops it, checks its checksums.
async fn ask(world: &World, data: &Path, sql: &str) -> String {
    let socket = world.scratch.path().join("node");
    let port = os::free_port();
    let bindir = &world.cluster.installation().bindir;
    let mut start = os::command(bindir.join("pg_ctl"));
    start
        .args(["start", "-w", "-t", "60", "-D"])
        .arg(data)
        .arg("-l")
        .arg(data.with_extension("log"));
    let options = format!(
        "-c listen_addresses= -c port={port} -c unix_socket_directories={}",
        socket.display()
    );
    start
        .args(["-o", &options])
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null());
    let log = || std::fs::read_to_string(data.with_extension("log")).unwrap_or_default();
    assert!(start.status().expect("pg_ctl").success(), "{}", log());
    let client = connect(&socket, port, "postgres").await;
    let answer = query_one(&client, sql).await;
    drop(client);
    let mut stop = os::command(bindir.join("pg_ctl"));
    run(stop.args(["stop", "-w", "-m", "fast", "-D"]).arg(data)).ok();
    let mut check = os::command(bindir.join("pg_checksums"));
    run(check.arg("--check").arg("-D").arg(data)).ok();
    answer
}

/// Money is moved, not made: whatever a copy holds, it holds whole transactions.
const SUMS: &str = "SELECT (SELECT sum(abalance) FROM pgbench_accounts) = (SELECT sum(delta) FROM pgbench_history) \
     AND (SELECT sum(abalance) FROM pgbench_accounts) = (SELECT sum(tbalance) FROM pgbench_tellers) \
     AND (SELECT sum(abalance) FROM pgbench_accounts) = (SELECT sum(bbalance) FROM pgbench_branches)";

/// FULL and two increments under load; between them tables go, shrink and grow.
async fn chain_under_load(
    world: &World,
    program: &ProbackupUnderTest,
    catalog: &Path,
) -> Vec<String> {
    let mode = increment(program.kind());
    let mut load = world.load(60);
    world.cluster.execute("CREATE TABLE shrinks AS SELECT n, repeat('x', 500) FROM generate_series(1, 5000) n; \
        CREATE TABLE goes AS SELECT n FROM generate_series(1, 5000) n; CREATE UNLOGGED TABLE volatile (n int); \
        INSERT INTO volatile VALUES (1); CREATE TABLE unchanged AS SELECT n FROM generate_series(1, 9000) n").await;
    let full = world.backup(program, catalog, "FULL");
    world
        .cluster
        .execute(
            "DELETE FROM shrinks WHERE n > 1000; DROP TABLE goes; \
        CREATE TABLE comes AS SELECT n FROM generate_series(1, 3000) n",
        )
        .await;
    world.cluster.execute("VACUUM shrinks").await;
    let first = world.backup(program, catalog, mode);
    world
        .cluster
        .execute("INSERT INTO comes SELECT n FROM generate_series(3001, 4000) n; TRUNCATE shrinks")
        .await;
    let second = world.backup(program, catalog, mode);
    load.kill().expect("pgbench ends");
    load.wait().expect("pgbench ends");
    vec![full, first, second]
}

/// Restores each backup of a chain and looks at it.
async fn look(world: &World, program: &ProbackupUnderTest, catalog: &Path, chain: &[String]) {
    let expected = ["5000|0|0", "1000|3000|1", "0|4000|1"];
    for (id, expected) in chain.iter().zip(expected) {
        let (data, ran) = restore(world, program, catalog, id, &[]);
        ran.ok();
        let tables = "SELECT (SELECT count(*) FROM shrinks) || '|' || coalesce((xpath('/row/c/text()', \
            query_to_xml('SELECT count(*) AS c FROM ' || coalesce(to_regclass('comes')::text, '(SELECT 1 WHERE false) x'), \
            false, true, '')))[1]::text, '0') || '|' || CASE WHEN to_regclass('goes') IS NULL THEN 1 ELSE 0 END";
        let asked = format!(
            "SELECT ({SUMS})::text || '|' || (SELECT count(*) FROM unchanged) || '|' || (SELECT count(*) FROM volatile) || '|' || ({tables})"
        );
        assert_eq!(
            ask(world, &data, &asked).await,
            format!("true|9000|0|{expected}"),
            "{id}"
        );
        std::fs::remove_dir_all(&data).expect("room");
    }
}

async fn restores(kind: Kind) {
    let program = ProbackupUnderTest::stand_in(kind);
    let world = World::checked("chain");
    let catalog = world.catalog(&program, "chain");
    let chain = chain_under_load(&world, &program, &catalog).await;
    let list = catalog
        .join("backups")
        .join(INSTANCE)
        .join(&chain[2])
        .join("backup_content.control");
    let list = std::fs::read_to_string(list).expect("the list");
    assert!(
        list.matches("\"size\":\"-1\"").count() > 500,
        "an increment leaves out what is as it was"
    );
    look(&world, &program, &catalog, &chain).await;
    run(program
        .command()
        .args(["validate", "--instance", INSTANCE, "-B"])
        .arg(&catalog))
    .ok();
    assert_eq!(control(&catalog, &chain[2], "status"), "OK");
    // Not into a directory that holds something; not a backup that is not there.
    let mut command = program.command();
    command
        .args(["restore", "--instance", INSTANCE, "-B"])
        .arg(&catalog);
    run(command.arg("-D").arg(world.cluster.data_directory()))
        .fails_with("Restore destination is not empty");
    restore(&world, &program, &catalog, "ZZZZZZ", &[])
        .1
        .fails_with("Requested backup ZZZZZZ is not found.");
    // A FULL takes its children with it.
    run(program
        .command()
        .args(["delete", "--instance", INSTANCE, "-i", &chain[0], "-B"])
        .arg(&catalog))
    .ok();
    assert_eq!(crate::world::ids(&catalog), Vec::<String>::new());
}

#[tokio::test(flavor = "multi_thread")]
async fn as_gs_probackup_it_restores_what_it_copied() {
    restores(Kind::Gs).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn as_pg_probackup_it_restores_what_it_copied() {
    restores(Kind::Pg).await;
}

/// The formats are the real ones: each program restores and validates what the other wrote.
#[tokio::test(flavor = "multi_thread")]
async fn a_real_pg_probackup_and_the_stand_in_read_each_other() {
    let Some(real) = ProbackupUnderTest::real(Kind::Pg) else {
        skip(
            "a_real_pg_probackup_and_the_stand_in_read_each_other",
            "no pg_probackup on PATH",
        );
        return;
    };
    println!("{real}");
    let ours = ProbackupUnderTest::stand_in(Kind::Pg);
    let world = World::checked("both");
    for (name, writer, reader) in [("ours", &ours, &real), ("real", &real, &ours)] {
        let catalog = world.catalog(writer, name);
        world
            .cluster
            .execute("DROP TABLE IF EXISTS shrinks, goes, volatile, unchanged, comes")
            .await;
        let chain = chain_under_load(&world, writer, &catalog).await;
        run(reader
            .command()
            .args(["validate", "--instance", INSTANCE, "-B"])
            .arg(&catalog))
        .ok();
        look(&world, reader, &catalog, &chain).await;
        // And a chain of both: an increment of the reader on the writer's.
        let mixed = world.backup(reader, &catalog, "DELTA");
        assert_eq!(control(&catalog, &mixed, "parent-backup-id"), chain[2]);
        let (data, ran) = restore(&world, writer, &catalog, &mixed, &[]);
        ran.ok();
        assert_eq!(
            ask(&world, &data, &format!("SELECT ({SUMS})::text")).await,
            "true"
        );
    }
}

/// `pg_probackup` follows tablespaces; `gs_probackup` has to be told with -E, and says nothing if it is not.
#[tokio::test(flavor = "multi_thread")]
async fn tablespaces_go_where_they_are_mapped() {
    for kind in [Kind::Pg, Kind::Gs] {
        let program = ProbackupUnderTest::stand_in(kind);
        let data_checksums = true;
        let world = World::new(
            "spaces",
            ClusterOptions {
                data_checksums,
                ..ClusterOptions::default()
            },
        );
        let space = world.scratch.directory("space");
        let to = world.scratch.directory("elsewhere").join("space");
        world
            .cluster
            .execute(&format!(
                "CREATE TABLESPACE s LOCATION '{}'",
                space.display()
            ))
            .await;
        world
            .cluster
            .execute(
                "CREATE TABLE outside TABLESPACE s AS SELECT n FROM generate_series(1, 7000) n",
            )
            .await;
        let catalog = world.catalog(&program, "catalog");
        let mut arguments = world.backup_arguments(&catalog, "FULL", 2);
        if kind == Kind::Gs {
            arguments.extend(["-E".to_owned(), space.display().to_string()]);
        }
        run(program.command().args(&arguments)).ok();
        let id = crate::world::ids(&catalog).pop().expect("a backup");
        let mapping = format!("{}={}", space.display(), to.display());
        let mut more = vec!["-T".to_owned(), mapping.clone()];
        if kind == Kind::Gs {
            restore(&world, &program, &catalog, &id, &more)
                .1
                .fails_with("you must specify --external-mapping");
            more.push(format!("--external-mapping={mapping}"));
        }
        let (data, ran) = restore(&world, &program, &catalog, &id, &more);
        ran.ok();
        assert_eq!(
            ask(&world, &data, "SELECT count(*) FROM outside").await,
            "7000",
            "{kind:?}"
        );
        assert!(
            std::fs::read_dir(&to)
                .expect("the tablespace")
                .next()
                .is_some()
        );
    }
}
