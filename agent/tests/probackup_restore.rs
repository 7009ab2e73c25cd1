//! Copies of a probackup come back: its catalog read out of the bucket, and restored by itself through a mount.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::print_stderr,
    clippy::too_many_lines,
    dead_code,
    reason = "test code: a panic is a failed test, a story is read from top to bottom, and not all of what tests share is used"
)]

#[path = "probackup_restore/asked.rs"]
mod asked;
#[path = "probackup_restore/catalog.rs"]
mod catalog_in_a_directory;
#[path = "restore/run.rs"]
mod run;
#[path = "restore/source.rs"]
mod source;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::time::Duration;
use std::{env, fs};

use agent_api::{ErrorKind, Phase, RestoreSpec, Restored};
use asked::asked_in_a_mount;
use bytes::Bytes;
use catalog::model::BackupMode;
use catalog_in_a_directory::Catalog;
use pipeline::budget::Budget;
use pipeline::download::Downloader;
use pipeline::meter::Meter;
use pipeline::throttle::Throttle;
use pitr_agent::catalog_fs::stored::Stored;
use pitr_agent::catalog_fs::{FsError, Lower, LowerKind};
use run::{Run, names};
use support::os::{self, Scratch};
use support::postgres::{self, Cluster, ClusterOptions, Installation};
use support::probackup::{Kind, ProbackupUnderTest};
use support::skip;
use tokio::sync::oneshot;
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;

/// Where the re-executed test finds the program.
const PROBACKUP: &str = "GS_PITR_TEST_PROBACKUP";

/// A server, and a program that copies it.
struct Tools {
    installation: Installation,
    probackup: PathBuf,
    agent: PathBuf,
}

/// Runs `body` as a user that databases accept.
fn with_tools<F: Future<Output = ()>>(test: &str, body: impl FnOnce(Tools) -> F) {
    if let Err(why) = support::fuse::ready() {
        return skip(test, &why);
    }
    if os::database_user().is_some() {
        let found = ProbackupUnderTest::find(Kind::Pg);
        return run::run_again(test, Some((PROBACKUP, found.path().as_os_str())));
    }
    let found = env::var_os(PROBACKUP).map(PathBuf::from);
    let itself = found.is_none().then(|| ProbackupUnderTest::find(Kind::Pg));
    let probackup = found.or_else(|| Some(itself.as_ref()?.path().to_owned()));
    let probackup = probackup.unwrap();
    let version = Command::new(&probackup).arg("--version").output().unwrap();
    let version = String::from_utf8_lossy(&version.stdout).into_owned();
    // The real one copies only the server that it was built for.
    let fits =
        |major| version.contains("stand-in") || version.contains(&format!("(PostgreSQL {major}."));
    let mut installed = Installation::all().into_iter().rev();
    let Some(installation) = installed.find(|it| fits(it.major)) else {
        return skip(test, &format!("no server here for {version}"));
    };
    run::on_this_user(|agent| {
        body(Tools {
            installation,
            probackup,
            agent,
        })
    });
}

fn options() -> ClusterOptions {
    let settings = [("wal_keep_size", "1GB"), ("autovacuum", "off")];
    ClusterOptions {
        settings: settings.map(|(k, v)| (k.into(), v.into())).to_vec(),
        data_checksums: true,
        ..ClusterOptions::default()
    }
}

async fn ask(lower: &dyn Lower, id: u64, offset: u64, length: usize) -> Result<Bytes, FsError> {
    let (sender, answer) = oneshot::channel();
    let done = move |read| drop(sender.send(read));
    lower.read(id, offset, length, Box::new(done));
    answer.await.unwrap()
}

/// Files below a directory, by their paths.
fn files(root: &Path) -> BTreeMap<String, Vec<u8>> {
    let (mut files, mut rest) = (BTreeMap::new(), vec![root.to_owned()]);
    while let Some(directory) = rest.pop() {
        for entry in fs::read_dir(directory).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                rest.push(path);
            } else {
                let name = path.strip_prefix(root).unwrap().to_str().unwrap();
                files.insert(name.to_owned(), fs::read(&path).unwrap());
            }
        }
    }
    files
}

/// It is read when others have taken everything else, and are not about to give it back.
async fn wal_with_memory_of_its_own(
    downloader: &Downloader,
    repository: &catalog::Catalog,
    catalog: &Catalog<'_>,
    expected: &BTreeMap<String, Vec<u8>>,
) {
    let budget = downloader.budget();
    let own = budget.part(16 << 20, "a test").unwrap();
    let stored = Stored::load(downloader, repository, &catalog.chain, 2, Some(own));
    let stored = stored.await.unwrap();
    let _rest = budget.reserve(budget.free_bytes(), "the rest").unwrap();
    let lower = stored.lower();
    let mut segments = 0;
    for entry in &stored.entries {
        if let LowerKind::File { size, id } = entry.kind
            && entry.path.contains("/pg_wal/0")
        {
            let size = usize::try_from(size).unwrap();
            let bytes = timeout(Duration::from_secs(30), ask(&*lower, id, 0, size)).await;
            let bytes = bytes.expect("it waits for memory").unwrap();
            assert!(bytes == expected[&entry.path], "{}", entry.path);
            segments += 1;
        }
    }
    assert!(segments > 1, "{segments} segments");
}

fn downloader(catalog: &Catalog<'_>, memory: usize) -> (Downloader, Arc<Meter>) {
    let meter = Arc::<Meter>::default();
    let store = Arc::clone(&catalog.source.store);
    let downloader = Downloader::new(
        store,
        Budget::new(memory),
        Throttle::new(None),
        Arc::clone(&meter),
        CancellationToken::new(),
    );
    (downloader, meter)
}

#[test]
fn a_chain_is_shown_as_it_was_written() {
    with_tools("a_chain_is_shown_as_it_was_written", |tools| async move {
        let scratch = Scratch::new("ch");
        let cluster = Cluster::create(&tools.installation, &scratch.directory("s"), options());
        cluster.start();
        let mut catalog = Catalog::create(&tools.probackup, &scratch, &cluster).await;
        catalog.backup(BackupMode::Full, &[]).await;
        cluster
            .execute("CREATE TABLE t AS SELECT g FROM generate_series(1, 200000) g")
            .await;
        let outside = cluster.data_directory().join("pg_hba.conf");
        catalog.backup(BackupMode::Delta, &[outside]).await;

        let memory = 64 << 20;
        let (downloader, meter) = downloader(&catalog, memory);
        let store = Arc::clone(&catalog.source.store);
        let repository = catalog::Catalog::open(store).await.unwrap();
        let load = |chain: Vec<_>| {
            let (downloader, repository) = (&downloader, &repository);
            async move { Stored::load(downloader, repository, &chain, 4, None).await }
        };
        let stored = load(catalog.chain.clone()).await.unwrap();
        let (mut expected, lower) = (files(&catalog.path), stored.lower());
        expected.retain(|path, _| !path.ends_with("/backup.pid"));
        let mut shown = BTreeMap::new();
        for entry in &stored.entries {
            let LowerKind::File { size, id } = entry.kind else {
                assert!(catalog.path.join(&entry.path).is_dir(), "{}", entry.path);
                continue;
            };
            let mut bytes = Vec::new();
            while (bytes.len() as u64) < size {
                let offset = bytes.len() as u64;
                let part = ask(&*lower, id, offset, 128 << 10).await.unwrap();
                assert!(!part.is_empty(), "{} ends early", entry.path);
                bytes.extend_from_slice(&part);
            }
            assert!(ask(&*lower, id, size, 1).await.unwrap().is_empty());
            let twice = shown.insert(entry.path.clone(), bytes);
            assert!(twice.is_none(), "{} is there twice", entry.path);
        }
        let names = |files: &BTreeMap<String, Vec<u8>>| files.keys().cloned().collect::<Vec<_>>();
        assert_eq!(names(&shown), names(&expected));
        assert!(shown == expected, "some file has other bytes");
        let streamed =
            |link: &agent_api::ChainLink| link.node.probackup.as_ref().unwrap().wal.len();
        let streamed: usize = catalog.chain.iter().map(streamed).sum();
        assert!(streamed > 0, "no WAL was streamed");
        assert!(meter.plain_bytes() > 0 && stored.lower.trouble().is_none());
        let conf = stored.file("backups/node/pg_probackup.conf").await.unwrap();
        assert_eq!(conf.unwrap(), expected["backups/node/pg_probackup.conf"]);
        assert!(stored.file("backups/node/nothing").await.unwrap().is_none());
        assert_eq!(ask(&*lower, 1 << 39, 0, 1).await, Err(FsError::NotFound));

        // Chains that are none.
        let mut other = catalog.chain.clone();
        other.remove(0);
        let error = load(other).await.unwrap_err();
        assert_eq!(error.kind, ErrorKind::Damaged);
        assert!(
            error.message.contains("which was not given"),
            "{}",
            error.message
        );
        let mut other = catalog.chain.clone();
        other.swap(0, 1);
        assert!(load(other).await.is_err());
        let mut other = catalog.chain.clone();
        other[0].node.attempt = 2;
        assert!(load(other).await.is_err());
        let mut other = catalog.chain.clone();
        other[0].node.probackup = None;
        let error = load(other).await.unwrap_err();
        assert!(
            error.message.contains("not made by a probackup"),
            "{}",
            error.message
        );

        drop((stored, lower));
        wal_with_memory_of_its_own(&downloader, &repository, &catalog, &expected).await;
        // A frame of the parent that is not what was written.
        let key = catalog::keys::pack(&catalog.chain[0].backup_id, catalog.source.node, 1, 0);
        let mut bytes = catalog.source.store.bytes(key.as_str()).unwrap().to_vec();
        let middle = bytes.len() / 2;
        bytes[middle] ^= 1;
        catalog.source.store.tamper(&key, Some(bytes.into()));
        let stored = load(catalog.chain.clone()).await.unwrap();
        let lower = stored.lower();
        let mut refused = 0;
        for entry in &stored.entries {
            if let LowerKind::File { size, id } = entry.kind {
                match ask(&*lower, id, 0, usize::try_from(size).unwrap()).await {
                    Ok(bytes) => assert!(bytes == expected[&entry.path], "{}", entry.path),
                    Err(error) => {
                        assert_eq!(error, FsError::Io);
                        refused += 1;
                    }
                }
            }
        }
        let trouble = stored.lower.trouble().unwrap();
        assert_eq!(trouble.kind, ErrorKind::Damaged);
        assert!(
            refused > 0 && trouble.message.contains(key.as_str()),
            "{trouble:?}"
        );
    });
}

#[test]
fn the_program_shows_and_validates_a_stored_chain() {
    let test = "the_program_shows_and_validates_a_stored_chain";
    with_tools(test, |tools| async move {
        let scratch = Scratch::new("pv");
        let runtime_dir = scratch.directory("run");
        let cluster = Cluster::create(&tools.installation, &scratch.directory("s"), options());
        cluster.start();
        let mut catalog = Catalog::create(&tools.probackup, &scratch, &cluster).await;
        catalog.backup(BackupMode::Full, &[]).await;
        cluster
            .execute("CREATE TABLE t AS SELECT g FROM generate_series(1, 100000) g")
            .await;
        catalog.backup(BackupMode::Delta, &[]).await;
        let copies = catalog
            .chain
            .iter()
            .map(|link| link.node.probackup.as_ref());
        let ids: Vec<_> = copies.map(|copy| copy.unwrap().id.clone()).collect();
        // Neither is what the mount shows the directory that they were made in, nor its WAL the server's.
        fs::rename(&catalog.path, scratch.path().join("away")).unwrap();
        cluster.stop("fast");

        let (said, trouble) = asked_in_a_mount(&tools, &catalog, &runtime_dir).await;
        assert_eq!(trouble, None);
        assert_eq!(said.len(), 3);
        for (code, words) in &said {
            assert_eq!(*code, Some(0), "{words}");
            assert!(
                !words.contains("WARNING") && !words.contains("ERROR"),
                "{words}"
            );
        }
        let shown: serde_json::Value = serde_json::from_str(&said[0].1).unwrap();
        assert_eq!(shown[0]["instance"], "node");
        let backups = shown[0]["backups"].as_array().unwrap();
        let mut found: Vec<_> = backups
            .iter()
            .map(|backup| {
                let field = |name: &str| backup[name].as_str().unwrap().to_owned();
                (field("id"), field("backup-mode"), field("status"))
            })
            .collect();
        found.sort();
        let due = |number: usize, mode: &str| {
            (
                ids[number].clone(),
                mode.to_owned(),
                found[number].2.clone(),
            )
        };
        assert_eq!(found, [due(0, "FULL"), due(1, "DELTA")]);
        // `DONE`: made with --no-validate, and not validated since.
        assert!(
            found
                .iter()
                .all(|backup| ["OK", "DONE"].contains(&&*backup.2)),
            "{found:?}"
        );
        assert_eq!(
            backups.iter().find(|it| it["id"] == ids[1]).unwrap()["parent-backup-id"],
            ids[0]
        );
        for (id, (_, words)) in ids.iter().zip(&said[1..]) {
            for line in [
                format!("Backup {id} data files are valid"),
                format!("Backup {id} WAL segments are valid"),
                format!("Backup {id} is valid."),
            ] {
                assert!(words.contains(&line), "{line}? {words}");
            }
        }

        // One frame of the FULL is not what was written: neither it nor what builds on it is valid.
        let key = catalog::keys::pack(&catalog.chain[0].backup_id, catalog.source.node, 1, 0);
        let mut bytes = catalog.source.store.bytes(key.as_str()).unwrap().to_vec();
        let middle = bytes.len() / 2;
        bytes[middle] ^= 1;
        catalog.source.store.tamper(&key, Some(bytes.into()));
        let (said, trouble) = asked_in_a_mount(&tools, &catalog, &runtime_dir).await;
        let trouble = trouble.unwrap();
        assert_eq!(trouble.kind, ErrorKind::Damaged);
        assert!(trouble.message.contains(key.as_str()), "{trouble:?}");
        assert_eq!(said[0].0, Some(0), "{}", said[0].1);
        for (code, words) in &said[1..] {
            assert!(*code != Some(0), "{words}");
            assert!(!words.contains("is valid."), "{words}");
        }
        assert!(said[1].1.contains("Input/output error"), "{}", said[1].1);
        assert_eq!(names(&runtime_dir), Vec::<String>::new());
    });
}

impl Tools {
    fn restore(&self, catalog: &Catalog<'_>, spec: &RestoreSpec) -> Run {
        let spec = RestoreSpec {
            restore: uuid::Uuid::now_v7(),
            ..spec.clone()
        };
        let mut config = run::config(Path::new(&spec.target), &self.installation.bindir);
        config.probackup = Some(self.probackup.clone());
        config.mount.runner.clone_from(&self.agent);
        config.mount.runtime_dir = runtime(Path::new(&spec.target).parent().unwrap());
        fs::create_dir_all(&config.mount.runtime_dir).unwrap();
        Run::with(
            &catalog.source.store,
            &spec,
            config,
            &self.agent,
            uuid::Uuid::new_v4(),
        )
    }
}

/// Asks a restored database.
async fn query(restored: &Restored, query: &str) -> String {
    let directory = Path::new(&restored.data_directory);
    let pid_file = fs::read_to_string(directory.join("postmaster.pid")).unwrap();
    let socket = PathBuf::from(pid_file.lines().nth(4).unwrap());
    let client = postgres::connect(&socket, restored.port, "postgres").await;
    postgres::query_one(&client, query).await
}

async fn stop(restored: &Restored, bindir: &Path) {
    let mut command = tokio::process::Command::new(bindir.join("pg_ctl"));
    command.args(["stop", "-w", "-m", "fast", "-D", &restored.data_directory]);
    assert!(command.output().await.unwrap().status.success());
}

/// Mounts of this test's agent.
fn mounts(restored_root: &Path) -> Vec<String> {
    let table = fs::read_to_string("/proc/self/mounts").unwrap();
    let below = runtime(restored_root).display().to_string();
    let ours = table.lines().filter(|line| line.contains(&below));
    ours.map(str::to_owned).collect()
}

/// Where its mounts are.
fn runtime(restored_root: &Path) -> PathBuf {
    restored_root.with_file_name("run")
}

#[test]
fn a_full_copy_and_an_increment_come_back_on_an_empty_host() {
    let test = "a_full_copy_and_an_increment_come_back_on_an_empty_host";
    with_tools(test, |tools| async move {
        let scratch = Scratch::new("pr");
        let (root, restored_root) = (scratch.directory("s"), scratch.directory("it's a=b r"));
        let space = scratch.directory("a=space");
        let cluster = Cluster::create(&tools.installation, &root, options());
        cluster.start();
        cluster
            .execute(&format!(
                "CREATE TABLESPACE early LOCATION '{}'",
                space.display()
            ))
            .await;
        for sql in [
            "CREATE TABLE t (i int, pad text) TABLESPACE early",
            "CREATE TABLE u (i int)",
            "INSERT INTO t SELECT g, repeat('x', 100) FROM generate_series(1, 50000) g",
            "ALTER SYSTEM SET work_mem = '7MB'",
            // What the program would take for settings of a recovery, and change.
            "ALTER SYSTEM SET log_line_prefix = 'restore_command %p '",
        ] {
            cluster.execute(sql).await;
        }
        let hba = cluster.data_directory().join("pg_hba.conf");
        let mut catalog = Catalog::create(&tools.probackup, &scratch, &cluster).await;
        catalog.backup(BackupMode::Full, &[]).await;
        cluster
            .execute("UPDATE t SET i = -i WHERE i % 1000 = 0")
            .await;
        cluster
            .execute("INSERT INTO u SELECT generate_series(1, 77)")
            .await;
        catalog.backup(BackupMode::Delta, &[hba]).await;
        cluster
            .execute("UPDATE t SET i = -i WHERE i % 777 = 0")
            .await;
        let old = catalog.spec(0, &restored_root.join("full")).await;
        let new = catalog.spec(1, &restored_root.join("delta")).await;
        let auto_conf = fs::read(cluster.data_directory().join("postgresql.auto.conf")).unwrap();
        let question = "SELECT count(*) || ' ' || sum(i) || ' ' || md5(string_agg(i || pad, ',' ORDER BY ctid)) FROM t";
        let answer = cluster.query_one("postgres", question).await;
        cluster.stop("fast");
        for directory in [&root, &space, &catalog.path] {
            fs::remove_dir_all(directory).unwrap();
        }
        assert_eq!((old.chain.len(), new.chain.len()), (0, 1));
        for spec in [old, new] {
            let mut run = tools.restore(&catalog, &spec);
            run.reach(Phase::Proved).await;
            assert_eq!(mounts(&restored_root), Vec::<String>::new());
            let status = run.log.status();
            assert!(status.progress.bytes_done > 0, "{:?}", status.progress);
            let restored = run.promote(true).await;
            assert_eq!(restored.recovered_to, spec.point.end_lsn);
            let data = Path::new(&restored.data_directory);
            assert_eq!(query(&restored, question).await, answer);
            assert_eq!(query(&restored, "SELECT count(*) FROM u").await, "77");
            assert_eq!(query(&restored, "SHOW work_mem").await, "7MB");
            assert_eq!(query(&restored, "SHOW restore_command").await, "");
            for name in [
                "recovery.signal",
                "backup_label",
                "database_map",
                "probackup_recovery.conf",
            ] {
                assert!(!data.join(name).exists(), "{name}");
            }
            assert_eq!(
                fs::read(data.join("postgresql.auto.conf")).unwrap(),
                auto_conf
            );
            let oid = spec.node.tablespaces[0].oid.to_string();
            let link = fs::read_link(data.join("pg_tblspc").join(&oid)).unwrap();
            let own = format!("{}.tablespaces", spec.target);
            assert_eq!(link, Path::new(&own).join(&oid));
            assert!(
                !space.exists(),
                "nothing is made where it was on the source"
            );
            stop(&restored, &tools.installation.bindir).await;
            let bindir = &tools.installation.bindir;
            let checked = Command::new(bindir.join("pg_checksums"))
                .arg("-D")
                .arg(data)
                .output();
            let checked = checked.unwrap();
            assert!(
                checked.status.success(),
                "{}",
                String::from_utf8_lossy(&checked.stderr)
            );
        }
    });
}

#[test]
fn what_cannot_be_brought_back_changes_nothing() {
    with_tools(
        "what_cannot_be_brought_back_changes_nothing",
        |tools| async move {
            let scratch = Scratch::new("pn");
            let (root, restored_root) = (scratch.directory("s"), scratch.directory("r"));
            let cluster = Cluster::create(&tools.installation, &root, options());
            cluster.start();
            let mut catalog = Catalog::create(&tools.probackup, &scratch, &cluster).await;
            catalog.backup(BackupMode::Full, &[]).await;
            cluster
                .execute("CREATE TABLE t AS SELECT g FROM generate_series(1, 100000) g")
                .await;
            catalog.backup(BackupMode::Delta, &[]).await;
            let spec = catalog.spec(1, &restored_root.join("node")).await;
            let nothing = |why: &str| {
                assert_eq!(names(&restored_root), Vec::<String>::new(), "{why}");
                assert_eq!(mounts(&restored_root), Vec::<String>::new(), "{why}");
            };

            // Without its program.
            let missing = Tools {
                probackup: "/nowhere/pg_probackup".into(),
                installation: tools.installation.clone(),
                agent: tools.agent.clone(),
            };
            let error = missing.restore(&catalog, &spec).fails().await;
            assert_eq!(error.kind, ErrorKind::Incompatible);
            assert!(
                error.message.contains("pg_probackup")
                    && error.message.contains("nothing was changed"),
                "{error:?}"
            );
            assert!(error.next.unwrap().contains("--probackup"));
            nothing("no program");

            // A copy of the other program.
            let mut other = spec.clone();
            other.node.probackup.as_mut().unwrap().program = "gs_probackup".into();
            let error = tools.restore(&catalog, &other).fails().await;
            assert!(
                error.message.contains("only gs_probackup brings it back"),
                "{error:?}"
            );
            nothing("another program");

            // Without its parent.
            let mut other = spec.clone();
            other.chain.clear();
            let error = tools.restore(&catalog, &other).fails().await;
            assert_eq!(error.kind, ErrorKind::Damaged);
            nothing("no parent");

            // A label that is not the copy's.
            let mut other = spec.clone();
            other.node.backup_label.push_str("X: y\n");
            let error = tools.restore(&catalog, &other).fails().await;
            assert!(error.message.contains("backup_label"), "{error:?}");
            nothing("another label");

            // A damaged frame of the parent: named as such, whatever the program makes of it.
            let key = catalog::keys::pack(&catalog.chain[0].backup_id, catalog.source.node, 1, 0);
            let good = catalog.source.store.bytes(key.as_str()).unwrap();
            let mut bad = good.to_vec();
            for at in (100_000..bad.len() - 400_000).step_by(300_000) {
                bad[at] ^= 1;
            }
            catalog.source.store.tamper(&key, Some(bad.into()));
            let error = tools.restore(&catalog, &spec).fails().await;
            assert_eq!(error.kind, ErrorKind::Damaged, "{error:?}");
            assert!(error.message.contains(key.as_str()), "{error:?}");
            nothing("a damaged frame");
            catalog.source.store.tamper(&key, Some(good));

            // Cancelled while files come.
            let run = tools.restore(&catalog, &spec);
            while run.log.status().progress.bytes_done < 1 << 20 {
                assert!(!run.task.is_finished());
                tokio::time::sleep(std::time::Duration::from_millis(1)).await;
            }
            run.cancel.cancel();
            let error = run.fails().await;
            assert_eq!(error.kind, ErrorKind::Cancelled, "{error:?}");
            nothing("cancelled");

            // Nothing of all that is in the way.
            let mut run = tools.restore(&catalog, &spec);
            run.reach(Phase::Proved).await;
            let restored = run.promote(true).await;
            assert_eq!(query(&restored, "SELECT count(*) FROM t").await, "100000");
            stop(&restored, &tools.installation.bindir).await;
        },
    );
}
