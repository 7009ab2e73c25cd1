//! The switch against real servers: a restore takes the place of a database, or leaves it as it was.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::print_stderr,
    clippy::too_many_lines,
    reason = "test code: a panic is a failed test, and a story is read from top to bottom"
)]

#[path = "switch/over.rs"]
mod over;
#[path = "restore/run.rs"]
mod run;
#[path = "restore/source.rs"]
mod source;

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use agent_api::{ApiError, ErrorKind, Phase, Place, RestoreSpec, RestoreState};
use catalog::model::Verdict;
use over::{Over, hashes, in_place, replace};
use pitr_agent::config::Config;
use pitr_agent::restore;
use run::{Run, as_database_user, decide, names};
use rustix::process::{Pid, Signal, kill_process};
use support::os::{self, Scratch};
use support::postgres;
use uuid::Uuid;

#[test]
fn a_running_database_is_replaced_and_its_bytes_are_kept() {
    let name = "a_running_database_is_replaced_and_its_bytes_are_kept";
    as_database_user(name, |program| async move {
        let scratch = Scratch::new("sw");
        let over = Over::new(&scratch, program, false, replace).await;
        let wrong = RestoreSpec {
            place: replace(7),
            ..over.anew()
        };
        let error = over.run(&wrong).fails().await;
        assert_eq!(error.kind, ErrorKind::Target);
        assert!(error.message.contains("system identifier") && !error.changed);

        let spec = over.anew();
        let mut run = over.run(&spec);
        run.reach(Phase::Proved).await;
        // It serves until the decision, and a second restore is refused.
        assert_eq!(over.rows("l").await, "50001");
        let error = over.run(&over.anew()).fails().await;
        assert_eq!(error.kind, ErrorKind::Conflict, "{error:?}");
        let undecided = run.order_promotion().await.unwrap_err();
        assert!(undecided.message.contains("nothing is decided"));
        let pid = over.cluster.pid();
        let restored = run.promote(true).await;
        assert_eq!(restored.port, over.cluster.port());
        assert_ne!(over.cluster.pid(), pid);
        assert_eq!(over.rows("l").await, "1");
        assert_eq!(over.rows("t").await, "1000");

        // The old one is whole: started by itself it has all its rows.
        let old = over.old(spec.restore);
        assert_eq!(over.left(), [old.file_name().unwrap().to_str().unwrap()]);
        let config = over.config();
        let here = restore::here(&config, |_| false);
        assert!(here.unfinished.is_empty());
        assert_eq!(here.old.len(), 1);
        assert_eq!(here.old[0].restore, spec.restore);
        over.stop();
        let port = os::free_port();
        let started = os::command(over.bindir().join("pg_ctl"))
            .args(["start", "-w", "-D"])
            .arg(&old)
            .args(["-l", "/dev/null", "-o"])
            .arg(format!("-c data_directory={} -p {port}", old.display()))
            .stdout(std::process::Stdio::null())
            .status();
        assert!(started.unwrap().success());
        let (socket, port) = postgres::running(&old);
        let client = postgres::connect(&socket, port, "postgres").await;
        let rows = postgres::query_one(&client, "SELECT count(*) FROM l").await;
        assert_eq!(rows, "50001");
        drop(client);
        let refused = restore::discard(&config, spec.restore).await.unwrap_err();
        assert_eq!(refused.kind, ErrorKind::Conflict);
        let stopped = os::command(over.bindir().join("pg_ctl"))
            .args(["stop", "-w", "-m", "fast", "-D"])
            .arg(&old)
            .output();
        assert!(stopped.unwrap().status.success());
        // Discarded on order, and only what is marked.
        let other = restore::discard(&config, Uuid::now_v7()).await.unwrap();
        assert!(other.removed.is_empty() && old.exists());
        restore::discard(&config, spec.restore).await.unwrap();
        assert!(over.left().is_empty());
    });
}

#[test]
fn an_agent_without_its_client_goes_back_or_forward_as_decided() {
    let name = "an_agent_without_its_client_goes_back_or_forward_as_decided";
    as_database_user(name, |program| async move {
        let scratch = Scratch::new("sw");
        let over = Over::new(&scratch, program, false, replace).await;
        let short = Config {
            client_timeout: Duration::from_secs(2),
            ..over.config()
        };
        over.cluster.stop("fast");
        let data = over.cluster.data_directory();
        let before = hashes(&data);

        // Nobody asks: rollback is written, and nothing of the restore is left.
        let spec = over.anew();
        let run = over.run_as(&spec, short.clone(), Uuid::new_v4());
        let error = run.fails().await;
        assert_eq!(error.kind, ErrorKind::Cancelled, "{error:?}");
        assert!(!error.changed && error.message.contains("nobody has asked"));
        let stands = decide(&over.source.store, spec.restore, Verdict::Commit).await;
        assert_eq!(stands.verdict, Verdict::Rollback);
        assert!(over.left().is_empty(), "{:?}", over.left());
        assert_eq!(hashes(&data), before);

        // A rollback that stands when the order to promote arrives is obeyed.
        let spec = over.anew();
        let mut run = over.run(&spec);
        run.reach(Phase::Proved).await;
        decide(&over.source.store, spec.restore, Verdict::Rollback).await;
        let refused = run.order_promotion().await.unwrap_err();
        assert_eq!(refused.kind, ErrorKind::Conflict);
        let error = run.fails().await;
        assert!(!error.changed, "{error:?}");
        assert!(over.left().is_empty());
        assert_eq!(hashes(&data), before);

        // Cancelled when it is proved: it makes sure that nobody can commit any more.
        let spec = over.anew();
        let mut run = over.run(&spec);
        run.reach(Phase::Proved).await;
        run.cancel.cancel();
        assert!(!run.fails().await.changed);
        let stands = decide(&over.source.store, spec.restore, Verdict::Commit).await;
        assert_eq!(stands.verdict, Verdict::Rollback);
        assert_eq!(hashes(&data), before);

        // `commit` stands and nobody gives orders: it promotes, waits for the other node, opens.
        let other = Uuid::new_v4();
        let mut spec = over.anew();
        spec.nodes.push(other);
        decide(&over.source.store, spec.restore, Verdict::Commit).await;
        let mut run = over.run_as(&spec, short, Uuid::new_v4());
        // Until it is proved somebody asks: what is not proved could only go back.
        loop {
            run.log.touch();
            if run.log.status().phase == Phase::Proved {
                break;
            }
            assert!(!run.task.is_finished(), "{:?}", run.log.status());
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        run.reach(Phase::Promoted).await;
        tokio::time::sleep(Duration::from_secs(4)).await;
        assert_eq!(run.log.status().phase, Phase::Promoted);
        let store: std::sync::Arc<dyn pipeline::store::ObjectStore> =
            std::sync::Arc::clone(&over.source.store) as _;
        let records = catalog::journal::records(&*store, spec.restore)
            .await
            .unwrap();
        let promoted = records.into_iter().find_map(|record| match record.event {
            catalog::model::OperationEvent::NodePromoted(node) => Some(node),
            _ => None,
        });
        let mut promoted = promoted.unwrap();
        assert_eq!(promoted.fork_lsn, spec.point.end_lsn);
        promoted.node_id = other;
        catalog::journal::OperationJournal::join(store, spec.restore)
            .record(catalog::model::OperationEvent::NodePromoted(promoted))
            .await
            .unwrap();
        run.task.await.unwrap().unwrap();
        assert_eq!(over.rows("l").await, "1");
        over.stop();
    });
}

#[test]
fn replayed_tablespaces_spare_the_database_that_uses_their_path() {
    let name = "replayed_tablespaces_spare_the_database_that_uses_their_path";
    as_database_user(name, |program| async move {
        let scratch = Scratch::new("sw");
        let over = Over::new(&scratch, program, true, replace).await;

        // Not allowed to stop it early: refused, and it serves on.
        let error = over.run(&over.anew()).fails().await;
        assert_eq!(error.kind, ErrorKind::Target, "{error:?}");
        assert!(error.message.contains("keeps one") && !error.changed);
        assert_eq!(over.rows("l").await, "50001");

        // Allowed, and rolled back: every byte is where it was, and it runs again.
        over.cluster.stop("fast");
        let before = (hashes(&over.cluster.data_directory()), hashes(&over.space));
        let mut spec = over.anew();
        spec.stop_early = true;
        let mut run = over.run(&spec);
        run.reach(Phase::Proved).await;
        assert_ne!(hashes(&over.space), before.1);
        run.cancel.cancel();
        assert!(!run.fails().await.changed);
        let after = (hashes(&over.cluster.data_directory()), hashes(&over.space));
        assert!(after == before, "the stopped database was changed");
        over.cluster.start();
        assert_eq!(over.rows("l").await, "50001");

        // Killed in the middle, while the running one is stopped for it: the agent's next start puts all back.
        let mut spec = over.anew();
        spec.stop_early = true;
        let mut run = over.run(&spec);
        run.reach(Phase::Recovering).await;
        assert!(over.cluster.pid().is_none());
        run.kill().await;
        assert!(restore::at_start(&over.config()).await.is_empty());
        assert!(over.left().is_empty(), "{:?}", over.left());
        assert_eq!(over.rows("l").await, "50001");

        // It goes through: the old rows are in the old directories.
        let mut spec = over.anew();
        spec.stop_early = true;
        let mut run = over.run(&spec);
        run.reach(Phase::Proved).await;
        assert!(over.cluster.pid().is_none());
        run.promote(true).await;
        assert_eq!(over.rows("l").await, "1");
        let old = over.old(spec.restore);
        let link = fs::read_dir(old.join("pg_tblspc"))
            .unwrap()
            .next()
            .unwrap()
            .unwrap()
            .path();
        let aside = fs::read_link(&link).unwrap();
        assert_eq!(aside.parent().unwrap(), over.space);
        let bytes: u64 = hashes(&aside)
            .keys()
            .map(|path| fs::metadata(path).map_or(0, |it| it.len()))
            .sum();
        assert!(bytes > 50_000 * 24, "{bytes}");
        over.stop();
        restore::discard(&over.config(), spec.restore)
            .await
            .unwrap();
        assert!(!aside.exists() && !old.exists());
        over.cluster.start();
        assert_eq!(over.rows("l").await, "1");
        over.stop();
    });
}

/// Waits until the journal in the workspace has `words`; false if the restore ends before.
async fn journal_says(run: &Run, work: &Path, words: &str) -> bool {
    loop {
        let text = fs::read_to_string(work.join("restore.json")).unwrap_or_default();
        if text.contains(words) {
            return true;
        }
        // Past it already: it was too short to be seen.
        if run.task.is_finished() || run.log.status().phase == Phase::Promoted {
            return false;
        }
        tokio::time::sleep(Duration::from_micros(200)).await;
    }
}

#[test]
fn an_agent_killed_at_any_stage_goes_on_where_it_was() {
    let name = "an_agent_killed_at_any_stage_goes_on_where_it_was";
    as_database_user(name, |program| async move {
        let scratch = Scratch::new("sw");
        let over = Over::new(&scratch, program, false, replace).await;
        let data = over.cluster.data_directory();
        let work = PathBuf::from(format!("{}.gs_pitr-restore", data.display()));
        let (spec, id) = (over.anew(), Uuid::new_v4());
        let mut run = over.run_as(&spec, over.config(), id);
        run.reach(Phase::Proved).await;
        run.kill().await;
        assert_eq!(over.rows("l").await, "50001");
        // Without credentials nobody knows what is decided: it stays, and is named.
        assert!(restore::at_start(&over.config()).await.is_empty());
        let here = restore::here(&over.config(), |_| false);
        assert_eq!(here.unfinished[0].state, RestoreState::Proved);
        assert_eq!(*here.unfinished[0].spec, spec);
        assert_eq!(here.unfinished[0].operation, id);

        let mut other = spec.clone();
        other.jobs += 1;
        let error = over.run_as(&other, over.config(), id).fails().await;
        assert_eq!(error.kind, ErrorKind::Conflict);

        let mut run = over.run_as(&spec, over.config(), id);
        run.reach(Phase::Proved).await;
        decide(&over.source.store, spec.restore, Verdict::Commit).await;
        run.order_promotion().await.unwrap();
        run.kill().await;
        let mut reached = Vec::new();
        // A database that does not stop keeps the first of these stages.
        let live = i32::try_from(over.cluster.pid().unwrap()).unwrap();
        let live = Pid::from_raw(live).unwrap();
        kill_process(live, Signal::STOP).unwrap();
        for stage in ["promoted", "out", "in", "in-place"] {
            let words = format!("\"stage\": \"{stage}\"");
            let run = over.run_as(&spec, over.config(), id);
            if journal_says(&run, &work, &words).await {
                reached.push(stage);
            }
            run.kill().await;
            if stage == "promoted" {
                kill_process(live, Signal::CONT).unwrap();
            }
            let text = fs::read_to_string(work.join("restore.json")).unwrap();
            if text.contains("in-place") {
                break;
            }
            // Another restore does not take it away.
            let error = over.run(&over.anew()).fails().await;
            assert_eq!(error.kind, ErrorKind::Conflict, "{stage}: {error:?}");
            if stage == "out" || stage == "in" {
                // The agent's start finishes by the journal alone what had begun.
                restore::at_start(&over.config()).await;
                let text = fs::read_to_string(work.join("restore.json")).unwrap();
                assert!(!text.contains(&words) || stage == "promoted", "{text}");
            }
        }
        assert!(reached.contains(&"promoted"), "{reached:?}");
        let mut run = over.run_as(&spec, over.config(), id);
        run.open(true).await;
        assert_eq!(over.rows("l").await, "1");
        assert_eq!(over.left().len(), 1);
        over.stop();
    });
}

#[test]
fn in_place_makes_room_first_and_says_that_there_is_no_way_back() {
    let name = "in_place_makes_room_first_and_says_that_there_is_no_way_back";
    as_database_user(name, |program| async move {
        let scratch = Scratch::new("sw");
        let over = Over::new(&scratch, program, true, in_place).await;
        let mut run = over.run(&over.anew());
        run.reach(Phase::Proved).await;
        let data = over.cluster.data_directory();
        assert!(!data.exists() && over.cluster.pid().is_none());
        let warnings = run.log.status().warnings;
        assert!(warnings.iter().any(|it| it.contains("no way back")));
        run.promote(true).await;
        assert_eq!(over.rows("l").await, "1");
        assert!(over.left().is_empty(), "{:?}", over.left());

        // Cancelled after that: it says what is gone.
        let mut run = over.run(&over.anew());
        run.reach(Phase::Proved).await;
        run.cancel.cancel();
        let error: ApiError = run.fails().await;
        assert!(
            error.changed && error.message.contains("is gone"),
            "{error:?}"
        );
        assert!(!data.exists() && over.left().is_empty());
    });
}

/// Mounts a file system of its own, as root; unmounted on drop.
struct Mount(PathBuf);

impl Mount {
    fn new(at: &Path) -> Result<Self, String> {
        let output = std::process::Command::new("mount")
            .args(["-t", "tmpfs", "-o", "size=600m", "tmpfs"])
            .arg(at)
            .output()
            .map_err(|error| format!("mount: {error}"))?;
        if !output.status.success() {
            return Err(String::from_utf8_lossy(&output.stderr).into_owned());
        }
        os::give(at);
        Ok(Self(at.to_owned()))
    }
}

impl Drop for Mount {
    fn drop(&mut self) {
        let _ = std::process::Command::new("umount")
            .arg("-l")
            .arg(&self.0)
            .status();
    }
}

const MOUNTED: &str = "GS_PITR_TEST_MOUNT";

#[test]
fn a_target_that_is_a_mount_point_keeps_everything_inside() {
    let name = "a_target_that_is_a_mount_point_keeps_everything_inside";
    let Some(mounted) = std::env::var_os(MOUNTED) else {
        if os::database_user().is_none() {
            return support::skip::skip(name, "only root can mount a file system");
        }
        let outside = Scratch::new("mnt");
        let at = outside.directory("r").join("node");
        fs::create_dir(&at).unwrap();
        let _mount = match Mount::new(&at) {
            Ok(mount) => mount,
            Err(why) => return support::skip::skip(name, &format!("no mount: {why}")),
        };
        // The test as the database user finds it in its environment.
        return run::run_again(name, Some((MOUNTED, at.as_os_str())));
    };
    let target = PathBuf::from(mounted);
    run::on_this_user(|program| async move {
        let scratch = Scratch::new("sw");
        let over = Over::new(&scratch, program, false, replace).await;
        let mut spec = over.anew();
        spec.target = target.to_str().unwrap().to_owned();
        spec.place = Place::Fresh;
        spec.port = Some(os::free_port());
        let config = Config {
            allow_roots: vec![target.parent().unwrap().canonicalize().unwrap()],
            ..over.config()
        };
        // Into an empty file system.
        let facts = restore::target_facts(&config, &spec.target).await.unwrap();
        assert!(facts.mount_point && facts.empty && facts.free_bytes > 1 << 20);
        let mut run = over.run_as(&spec, config.clone(), Uuid::new_v4());
        run.reach(Phase::Proved).await;
        assert_eq!(names(&target), [".gs_pitr-restore"]);
        run.promote(true).await;
        assert!(!target.join(".gs_pitr-restore").exists());
        let rows = async || {
            let (socket, port) = postgres::running(&target);
            let client = postgres::connect(&socket, port, "postgres").await;
            let rows = postgres::query_one(&client, "SELECT count(*) FROM l").await;
            client
                .simple_query("INSERT INTO l VALUES (2); CHECKPOINT")
                .await
                .unwrap();
            rows
        };
        assert_eq!(rows().await, "1");

        // Over what runs there, rolled back: it serves on.
        let replacing = |spec: &RestoreSpec| RestoreSpec {
            restore: Uuid::now_v7(),
            place: replace(spec.node.system_identifier),
            port: None,
            ..spec.clone()
        };
        let again = replacing(&spec);
        let mut run = over.run_as(&again, config.clone(), Uuid::new_v4());
        run.reach(Phase::Proved).await;
        run.cancel.cancel();
        assert!(!run.fails().await.changed);
        assert_eq!(rows().await, "2");
        assert!(
            !names(&target)
                .iter()
                .any(|name| name.contains("gs_pitr-restore"))
        );

        // And through: the old files lie inside, marked.
        let again = replacing(&spec);
        let mut run = over.run_as(&again, config.clone(), Uuid::new_v4());
        run.reach(Phase::Proved).await;
        run.promote(true).await;
        assert_eq!(rows().await, "1");
        let old = restore::here(&config, |_| false).old;
        assert_eq!(old.len(), 1);
        assert!(Path::new(&old[0].directories[0]).starts_with(&target));
        assert!(
            Path::new(&old[0].directories[0])
                .join("PG_VERSION")
                .exists()
        );
        let stopped = os::command(over.bindir().join("pg_ctl"))
            .args(["stop", "-w", "-m", "fast", "-D"])
            .arg(&target)
            .output();
        assert!(stopped.unwrap().status.success());
        let removed = restore::discard(&config, again.restore).await.unwrap();
        assert_eq!(removed.removed, old[0].directories);
    });
}
