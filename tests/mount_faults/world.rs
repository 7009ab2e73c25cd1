//! A database with its agent, a bucket, and a probackup that takes orders.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;
use support::bucket::Bucket;
use support::fleet::{Agent, Fleet, Run, built_program};
use support::postgres::{Cluster, ClusterOptions, Installation};
use support::probackup::{Kind, ProbackupUnderTest, What, faults};
use support::running::Running;
use support::s3::S3Server;
use support::{fuse, os, skip};

/// How long what is cleaned up by itself may take.
const SETTLE: Duration = Duration::from_mins(1);
/// Bytes that no compression makes fewer: more than two parts.
const INCOMPRESSIBLE: &str = "CREATE TABLE big (b bytea); ALTER TABLE big ALTER b SET STORAGE EXTERNAL; \
     INSERT INTO big SELECT (SELECT string_agg(decode(md5(random()::text || g || i), 'hex'), '') \
     FROM generate_series(1, 500) i) FROM generate_series(1, 2600) g; CHECKPOINT";

/// Everything that a fault needs.
pub(crate) struct World {
    pub(crate) bucket: Bucket,
    pub(crate) fleet: Fleet,
    /// Where orders to the program lie, and what it answers.
    orders: PathBuf,
    /// The program as it is started.
    program: PathBuf,
    more: Vec<&'static str>,
}

/// A program that waits in the middle of its work, and the client that waits for it.
pub(crate) struct Paused {
    pub(crate) running: Running,
    file: PathBuf,
}

impl Paused {
    /// Lets the program go on, and all that come after it.
    pub(crate) fn go_on(&self) {
        fs::write(&self.file, "").unwrap();
    }

    /// Kills the client, and lets the program go on.
    pub(crate) fn kill_client(self) {
        self.running.kill();
        fs::write(&self.file, "").unwrap();
    }
}

/// Waits until it is so.
pub(crate) async fn until(what: &str, mut is_so: impl FnMut() -> bool) {
    let begun = Instant::now();
    while !is_so() {
        assert!(begun.elapsed() < SETTLE, "not so: {what}");
        tokio::time::sleep(Duration::from_millis(30)).await;
    }
}

pub(crate) fn signal(pid: u32, signal: Signal) {
    let pid = Pid::from_raw(pid.try_into().unwrap()).unwrap();
    kill_process(pid, signal).expect("the process is there");
}

impl World {
    /// With the stand-in, and `flags` for the agent; `None`, and said, where there is no FUSE.
    pub(crate) async fn new(test: &str, flags: &[&str]) -> Option<Self> {
        Self::with(test, flags, ProbackupUnderTest::stand_in(Kind::Pg)).await
    }

    /// With the real program if `PATH` has one for this PostgreSQL.
    pub(crate) async fn with_real(test: &str, flags: &[&str]) -> Option<Self> {
        let major = format!("PostgreSQL {}", Installation::newest().major);
        let real = ProbackupUnderTest::real(Kind::Pg)
            .filter(|it| matches!(it.what(), What::Real(version) if version.contains(&major)));
        let program = real.unwrap_or_else(|| ProbackupUnderTest::stand_in(Kind::Pg));
        Self::with(test, flags, program).await
    }

    async fn with(test: &str, flags: &[&str], program: ProbackupUnderTest) -> Option<Self> {
        if let Err(why) = fuse::ready() {
            skip(test, &why);
            return None;
        }
        println!("{program}");
        let bucket = Bucket::double().await;
        let mut fleet = Fleet::new("faults", &bucket.config());
        let scratch = fleet.path().join("orders");
        fs::create_dir(&scratch).unwrap();
        os::give(&scratch);
        let (program, script) = install(&program, &fleet, &scratch);
        let script = script.display().to_string();
        let flags = [&["--probackup", &script], flags].concat();
        let options = ClusterOptions::default();
        let host = fleet.add_database_with("a", &Installation::newest(), options, &flags);
        let database = fleet.hosts[host].cluster.as_ref().unwrap();
        database.execute(INCOMPRESSIBLE).await;
        Some(Self {
            bucket,
            fleet,
            orders: scratch,
            program,
            more: Vec::new(),
        })
    }

    /// Every `gs_pitr` from now on has these flags too.
    pub(crate) fn always(mut self, flags: &[&'static str]) -> Self {
        self.more.extend(flags);
        self
    }

    pub(crate) fn server(&self) -> &S3Server {
        self.bucket.server()
    }

    pub(crate) fn agent(&self) -> &Agent {
        &self.fleet.hosts[0].agent
    }

    pub(crate) fn database(&self) -> &Cluster {
        self.fleet.hosts[0].cluster.as_ref().unwrap()
    }

    /// What the program does wrong from its next start on.
    pub(crate) fn order(&self, faults: &str) {
        fs::write(self.orders.join("orders"), format!("'{faults}'")).unwrap();
    }

    /// Starts a backup, and waits until the program comes to `step` and waits itself.
    pub(crate) async fn paused_at(&self, step: &str, more: &[&str]) -> Paused {
        let file = self.orders.join(format!("{:08x}", rand::random::<u32>()));
        self.order(&format!("{step}:pause={}", file.display()));
        let mut running = self.start(more);
        let reached = PathBuf::from(format!("{}.reached", file.display()));
        let begun = Instant::now();
        while !reached.exists() {
            if running.has_ended() || begun.elapsed() > SETTLE {
                let run = running.end().await;
                panic!("it never came to `{step}`: {run:?}: {}", self.agent().log());
            }
            tokio::time::sleep(Duration::from_millis(30)).await;
        }
        Paused { running, file }
    }

    /// Starts a backup.
    pub(crate) fn start(&self, more: &[&str]) -> Running {
        let nodes = self.fleet.addresses(&[0]);
        let args = [
            "backup",
            "--engine",
            "probackup",
            "--nodes",
            &nodes,
            "--output",
            "json",
        ];
        let args = [&args[..], &self.more, more].concat();
        Running::start(self.fleet.command(&args))
    }

    /// Makes one, whatever becomes of it.
    pub(crate) async fn backup(&self) -> Run {
        self.start(&[]).end().await
    }

    /// Ids of the backups that are some.
    pub(crate) fn listed(&self) -> BTreeSet<String> {
        let run = self.fleet.run(&["show", "--output", "json"]);
        let listed = run.result();
        // Before the first backup there is no repository.
        if listed["error"]["kind"] == "not-found" {
            return BTreeSet::new();
        }
        let _ = run.good();
        let all = listed["backups"].as_array().unwrap().iter();
        let those = all.filter(|backup| backup["status"] == "complete");
        those
            .map(|backup| backup["id"].as_str().unwrap().to_owned())
            .collect()
    }

    /// Process ids of the program.
    pub(crate) fn programs(&self) -> Vec<u32> {
        let program = self.program.display().to_string();
        let processes = fs::read_dir("/proc").unwrap().flatten();
        let pids = processes.filter_map(|it| it.file_name().to_str()?.parse::<u32>().ok());
        pids.filter(|pid| {
            let line = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
            line.split(|byte| *byte == 0).next() == Some(program.as_bytes())
        })
        .collect()
    }

    /// The one that makes the backup.
    pub(crate) fn child(&self) -> u32 {
        let pids = self.programs();
        assert_eq!(pids.len(), 1, "{pids:?}");
        pids[0]
    }

    /// Mounts of ours that this process sees.
    pub(crate) fn mounts(&self) -> Vec<PathBuf> {
        let table = fs::read_to_string("/proc/self/mounts").unwrap();
        let points = table.lines().filter_map(|line| line.split(' ').nth(1));
        let points = points.map(PathBuf::from);
        points
            .filter(|point| point.starts_with(self.fleet.path()))
            .collect()
    }

    /// Nobody has the database in backup mode, reads its log, or holds it.
    async fn database_is_free(&self) -> bool {
        let sql = "SELECT (SELECT count(*) FROM pg_replication_slots) + (SELECT count(*) FROM pg_stat_replication) \
                   + (SELECT count(*) FROM pg_stat_activity WHERE backend_type = 'client backend' \
                   AND pid <> pg_backend_pid())";
        self.database().query_one("postgres", sql).await == "0"
    }

    /// No process, no mount, no session, no slot, no file, no upload.
    pub(crate) async fn nothing_is_left(&self) {
        let begun = Instant::now();
        loop {
            let mounts = self.mounts();
            let programs = self.programs();
            let free = self.database_is_free().await;
            let files: Vec<_> = fs::read_dir(self.fleet.temporary()).unwrap().collect();
            let uploads = self.server().upload_keys();
            let nothing = mounts.is_empty() && programs.is_empty() && files.is_empty();
            if nothing && free && uploads.is_empty() {
                return;
            }
            assert!(
                begun.elapsed() < SETTLE,
                "left: mounts {mounts:?}, programs {programs:?}, files {files:?}, uploads {uploads:?}, database free: {free}: {}",
                self.agent().log()
            );
            tokio::time::sleep(Duration::from_millis(200)).await;
        }
    }

    /// The next backup is a good one, with every byte of it in the bucket.
    pub(crate) async fn next_one_works(&self) {
        self.order("");
        self.server().clear_faults();
        let begun = Instant::now();
        let run = loop {
            let run = self.backup().await;
            // A client that was killed is believed to live until its lease runs out.
            let waits = run.code != 0 && run.result()["error"]["kind"] == "conflict";
            if !waits || begun.elapsed() > SETTLE {
                break run;
            }
            tokio::time::sleep(Duration::from_millis(300)).await;
        };
        self.is_good(run).await;
    }

    /// It ended well, is listed and whole, and has left nothing.
    pub(crate) async fn is_good(&self, run: Run) -> Value {
        assert_eq!(run.code, 0, "{run:?}: {}", self.agent().log());
        let result = run.result();
        let id = result["backup_id"].as_str().unwrap();
        assert!(self.listed().contains(id), "{id} is not listed");
        let verified = self.fleet.run(&["verify", "--id", id, "--output", "json"]);
        let _ = verified.good();
        self.nothing_is_left().await;
        result
    }

    /// It did not end well, says all of `words`, is not listed, and has left nothing.
    pub(crate) async fn is_refused(&self, run: &Run, before: &BTreeSet<String>, words: &[&str]) {
        assert_ne!(run.code, 0, "{run:?}");
        for word in words {
            let said = run.stdout.contains(word) || run.stderr.contains(word);
            assert!(
                said,
                "`{word}` is not said: {run:?}\n{}",
                self.agent().log()
            );
        }
        assert_eq!(&self.listed(), before, "{run:?}");
        self.nothing_is_left().await;
    }

    /// What an operator does about what a killed process has left in the bucket.
    pub(crate) async fn prune(&self) {
        let begun = Instant::now();
        loop {
            let prune = ["prune", "--yes", "--grace", "1s", "--output", "json"];
            let run = self.fleet.run(&[&prune[..], &self.more].concat());
            let waits = run.code != 0 && run.result()["error"]["kind"] == "conflict";
            if !waits || begun.elapsed() > SETTLE {
                let _ = run.good();
                return;
            }
            tokio::time::sleep(Duration::from_millis(300)).await;
        }
    }
}

impl Drop for World {
    fn drop(&mut self) {
        // What a failed test has left must not stay in the machine's mount table.
        let left = self.mounts();
        if !left.is_empty() {
            self.fleet.hosts[0].agent.kill();
        }
        for point in left {
            let _ = Command::new("umount").arg("-l").arg(point).status();
        }
    }
}

/// Puts the program where the agent's user reaches it, and a script before it that brings it its orders. Returns both.
fn install(program: &ProbackupUnderTest, fleet: &Fleet, orders: &Path) -> (PathBuf, PathBuf) {
    let place = fleet.path().join("probackup");
    fs::create_dir(&place).unwrap();
    let own = if program.is_stand_in() {
        let own = place.join(program.kind().program());
        let built = built_program("probackup-stand-in");
        fs::hard_link(&built, &own)
            .or_else(|_| fs::copy(&built, &own).map(drop))
            .unwrap();
        own
    } else {
        program.path().to_owned()
    };
    let file = orders.join("orders");
    fs::write(&file, "''").unwrap();
    let script = place.join("with-orders");
    let text = format!(
        "#!/bin/sh\nread -r orders <{file}\neval \"{variable}=$orders\"\nexport {variable}\nexec {own} \"$@\"\n",
        file = file.display(),
        variable = faults::VARIABLE,
        own = own.display(),
    );
    fs::write(&script, text).unwrap();
    let mode = std::os::unix::fs::PermissionsExt::from_mode(0o755);
    fs::set_permissions(&script, mode).unwrap();
    (own, script)
}
