//! Two small databases with their agents and a bucket, and what must hold of them between rows.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;
use std::time::{Duration, Instant};

use catalog::Catalog;
use catalog::model::ManifestState;
use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;
use sha2::{Digest as _, Sha256};
use support::bucket::Bucket;
use support::fleet::{Fleet, Run};
use support::postgres::{ClusterOptions, Installation};
use support::s3::S3Server;
use uuid::Uuid;

use crate::table::Victim;
use support::running::Running;

/// Flags of the agents: nobody is waited for long.
const AGENT: [&str; 2] = ["--orphan-timeout", "5"];
/// Flags of each `gs_pitr` that talks to agents.
pub(crate) const PATIENCE: [&str; 4] = ["--agent-timeout", "2", "--lease-ttl", "5"];
/// How long a store that is killed stays away.
const STORE_AWAY: Duration = Duration::from_secs(1);
/// How long what is cleaned up by itself may take, and until when a command that is refused for another's
/// sake is repeated.
const SETTLE: Duration = Duration::from_mins(1);

/// Everything a row needs.
pub(crate) struct World {
    pub(crate) bucket: Bucket,
    pub(crate) fleet: Fleet,
    /// Ids of the nodes, by host.
    pub(crate) nodes: Vec<Uuid>,
    /// The prefix that its repository has in the bucket.
    pub(crate) prefix: String,
}

/// Shortens what makes a command with its flags.
pub(crate) fn words<'a>(first: &[&'a str], more: &[&'a str]) -> Vec<&'a str> {
    first.iter().chain(more).copied().collect()
}

impl World {
    /// Two databases, the first one large enough for multipart uploads, both in one backup already.
    pub(crate) async fn new(name: &str) -> Self {
        Self::with(name, &AGENT).await
    }

    /// The same, with `flags` for the agents.
    pub(crate) async fn with(name: &str, flags: &[&str]) -> Self {
        let bucket = Bucket::double().await;
        let mut fleet = Fleet::new(name, &bucket.config());
        for host in ["a", "b"] {
            let options = ClusterOptions {
                wal_segment_mib: 1,
                ..ClusterOptions::default()
            };
            fleet.add_database_with(host, &Installation::newest(), options, flags);
        }
        let first = fleet.hosts[0].cluster.as_ref().unwrap();
        // No compression makes random bytes fewer: more than one part of 8 MiB.
        first
            .execute(
                "CREATE TABLE big (b bytea); ALTER TABLE big ALTER b SET STORAGE EXTERNAL; \
                 INSERT INTO big SELECT (SELECT string_agg(decode(md5(random()::text || g || i), 'hex'), '') \
                 FROM generate_series(1, 500) i) FROM generate_series(1, 1300) g; CHECKPOINT",
            )
            .await;
        for host in &fleet.hosts {
            let database = host.cluster.as_ref().unwrap();
            database.execute("CREATE TABLE alive (n int)").await;
        }
        let mut world = Self {
            bucket,
            fleet,
            nodes: Vec::new(),
            prefix: "clusters/one".into(),
        };
        let made = world.backup_again().await;
        let ports = world
            .fleet
            .hosts
            .iter()
            .map(|host| host.cluster.as_ref().unwrap().port());
        let of = |port: u16| {
            let nodes = made["nodes"].as_array().unwrap();
            let node = nodes.iter().find(|node| node["port"] == port);
            let node = node.unwrap_or_else(|| panic!("{port} is not in {made}"));
            node["node_id"].as_str().unwrap().parse().unwrap()
        };
        world.nodes = ports.map(of).collect();
        world
    }

    pub(crate) fn server(&self) -> &S3Server {
        self.bucket.server()
    }

    /// The agents' addresses.
    pub(crate) fn addresses(&self) -> String {
        self.fleet.addresses(&[0, 1])
    }

    pub(crate) fn repository(&self) -> String {
        format!("s3://{}/{}", self.bucket.config().bucket, self.prefix)
    }

    /// Starts a command of this world's repository.
    pub(crate) fn start(&self, args: &[&str]) -> Running {
        let repository = self.repository();
        let more = ["--repo", repository.as_str(), "--output", "json"];
        Running::start(self.fleet.command(&words(args, &more)))
    }

    /// Runs one to its end.
    pub(crate) fn run(&self, args: &[&str]) -> Run {
        let repository = self.repository();
        let more = ["--repo", repository.as_str(), "--output", "json"];
        self.fleet.run(&words(args, &more))
    }

    /// The command every row of backup kills, and every row runs again.
    pub(crate) fn start_backup(&self) -> Running {
        let nodes = self.addresses();
        let args = ["backup", "--jobs", "1", "--nodes", &nodes];
        self.start(&words(&args, &PATIENCE))
    }

    /// Runs a command until nobody else is in its way any more: what died needs a moment to be noticed.
    pub(crate) async fn again(&self, args: &[&str]) -> Value {
        let run = self.until_free(args, None).await;
        run.good().result()
    }

    /// The same for a command that may also end with an error of `kind`; says which it was.
    pub(crate) async fn again_or(&self, args: &[&str], kind: &str) -> String {
        let run = self.until_free(args, Some(kind)).await;
        match run.code {
            0 => "done".to_owned(),
            _ => kind.to_owned(),
        }
    }

    async fn until_free(&self, args: &[&str], fine: Option<&str>) -> Run {
        let until = Instant::now() + SETTLE;
        loop {
            let run = self.run(&words(args, &PATIENCE));
            if run.code == 0 {
                return run;
            }
            let error = run.result()["error"].clone();
            if fine.is_some() && error["kind"].as_str() == fine {
                return run;
            }
            // The dead command's lease runs out; a dead agent's session ends.
            let waits = error["kind"] == "conflict";
            assert!(waits && Instant::now() < until, "{args:?}: {run:?}");
            tokio::time::sleep(Duration::from_millis(300)).await;
        }
    }

    /// The next backup.
    pub(crate) async fn backup_again(&self) -> Value {
        let nodes = self.addresses();
        self.again(&["backup", "--jobs", "1", "--nodes", &nodes])
            .await
    }

    /// What an operator does about garbage.
    pub(crate) async fn prune(&self) -> Value {
        self.again(&["prune", "--yes", "--grace", "1s"]).await
    }

    /// Ids of the backups that `show` lists with `status`.
    pub(crate) fn listed(&self, status: &str) -> BTreeSet<String> {
        let listed = self.run(&["show"]).good().result();
        let all = listed["backups"].as_array().unwrap().iter();
        let those = all.filter(|backup| backup["status"] == status);
        those
            .map(|backup| backup["id"].as_str().unwrap().to_owned())
            .collect()
    }

    /// Complete backups, the oldest first, each with its point. Ids do not say it: two may begin within a second.
    pub(crate) fn by_age(&self) -> Vec<(String, String)> {
        let listed = self.run(&["show"]).good().result();
        let all = listed["backups"].as_array().unwrap().iter();
        let text = |value: &Value| value.as_str().unwrap().to_owned();
        let those = all.filter(|backup| backup["status"] == "complete");
        let mut those: Vec<_> = those
            .map(|backup| {
                let begun: jiff::Timestamp = text(&backup["started"]).parse().unwrap();
                (begun, text(&backup["id"]), text(&backup["point"]))
            })
            .collect();
        those.sort();
        those
            .into_iter()
            .map(|(_, id, point)| (id, point))
            .collect()
    }

    /// Keys of objects below the repository that contain all of `parts`.
    pub(crate) fn keys(&self, parts: &[&str]) -> Vec<String> {
        let prefix = format!("{}/", self.prefix);
        let keys = self.server().keys().into_iter();
        let keys = keys.filter_map(|key| Some(key.strip_prefix(&prefix)?.to_owned()));
        keys.filter(|key| parts.iter().all(|part| key.contains(part)))
            .collect()
    }

    /// First column of the first row on a host's database.
    pub(crate) async fn ask(&self, host: usize, sql: &str) -> String {
        let database = self.fleet.hosts[host].cluster.as_ref().unwrap();
        database.query_one("postgres", sql).await
    }

    /// Names of our slots on a host.
    pub(crate) async fn slots(&self, host: usize) -> String {
        let sql = "SELECT coalesce(string_agg(slot_name, ' '), '') FROM pg_replication_slots";
        self.ask(host, sql).await
    }

    /// Names of our sessions on a host.
    pub(crate) async fn sessions(&self, host: usize) -> String {
        let sql = "SELECT coalesce(string_agg(application_name, ', '), '') FROM pg_stat_activity \
                   WHERE application_name LIKE 'gs_pitr%'";
        self.ask(host, sql).await
    }

    /// Kills the first node's database: SIGKILL to the postmaster, whose children notice.
    pub(crate) async fn kill_database(&self) {
        let database = self.fleet.hosts[0].cluster.as_ref().unwrap();
        let pid = database.pid().expect("it runs");
        let children = children(pid);
        kill_process(
            Pid::from_raw(pid.try_into().unwrap()).unwrap(),
            Signal::KILL,
        )
        .unwrap();
        let until = Instant::now() + SETTLE;
        while children
            .iter()
            .any(|child| Path::new("/proc").join(child).exists())
        {
            assert!(Instant::now() < until, "its processes do not end");
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        database.start();
    }

    /// Takes the store away for a moment.
    pub(crate) async fn kill_store(&self) {
        self.server().set_down(true);
        tokio::time::sleep(STORE_AWAY).await;
    }

    /// Starts again whatever the row has killed.
    pub(crate) fn revive(&mut self, victim: Victim) {
        match victim {
            Victim::Agent => self.fleet.restart_agent(0),
            Victim::Store => self.server().set_down(false),
            Victim::Cli | Victim::Database => {}
        }
    }

    /// Everything that must hold when nothing is under way and garbage was pruned.
    pub(crate) async fn assert_clean(&self) {
        for host in [0, 1] {
            self.settles(host).await;
            let written = self
                .ask(host, "INSERT INTO alive VALUES (1) RETURNING n")
                .await;
            assert_eq!(written, "1");
        }
        let left: Vec<_> = fs::read_dir(self.fleet.temporary()).unwrap().collect();
        assert!(left.is_empty(), "left in the temporary directory: {left:?}");
        self.assert_no_workspace();
        self.assert_no_process();
        self.assert_backups_whole().await;
        self.assert_no_garbage();
    }

    /// No upload is under way, and of a backup that is not listed there is at most its fence.
    fn assert_no_garbage(&self) {
        let uploads = self.server().upload_keys();
        assert!(uploads.is_empty(), "uploads are left: {uploads:?}");
        let complete = self.listed("complete");
        for key in self.keys(&["backups/"]) {
            let fence = key.ends_with("/manifest.json") || key.ends_with("/deleted.json");
            let id = key.split('/').nth(1).unwrap();
            assert!(fence || complete.contains(id), "{key} is left");
        }
    }

    async fn settles(&self, host: usize) {
        let until = Instant::now() + SETTLE;
        loop {
            let (slots, sessions) = (self.slots(host).await, self.sessions(host).await);
            if slots.is_empty() && sessions.is_empty() {
                return;
            }
            let log = self.fleet.hosts[host].agent.log();
            assert!(
                Instant::now() < until,
                "left: `{slots}`, `{sessions}`: {log}"
            );
            tokio::time::sleep(Duration::from_millis(200)).await;
        }
    }

    fn assert_no_workspace(&self) {
        for host in &self.fleet.hosts {
            for entry in fs::read_dir(&host.root).unwrap() {
                let name = entry.unwrap().file_name().into_string().unwrap();
                assert!(!name.contains(".gs_pitr-restore"), "{name} is left");
            }
        }
    }

    /// Only agents and databases that we know of run in our directories.
    fn assert_no_process(&self) {
        let hosts = self.fleet.hosts.iter();
        let databases = hosts.filter_map(|host| host.cluster.as_ref()?.pid());
        let databases: BTreeSet<_> = databases.map(|pid| pid.to_string()).collect();
        let agents = self.fleet.hosts.iter().map(|host| host.agent.pid());
        let agents: BTreeSet<_> = agents.map(|pid| pid.to_string()).collect();
        let ours = self.fleet.path().display().to_string();
        for entry in fs::read_dir("/proc").unwrap().flatten() {
            let pid = entry.file_name().into_string().unwrap();
            let line = fs::read(entry.path().join("cmdline")).unwrap_or_default();
            let line = String::from_utf8_lossy(&line).replace('\0', " ");
            if !line.contains(&ours) || databases.contains(&pid) || agents.contains(&pid) {
                continue;
            }
            // What a database has just forked has its command line until it gives itself a name.
            let stat = fs::read_to_string(entry.path().join("stat")).unwrap_or_default();
            let after_name = stat.rsplit_once(')').map_or("", |(_, rest)| rest);
            let parent = after_name.split_whitespace().nth(1).unwrap_or_default();
            assert!(
                stat.is_empty() || databases.contains(parent),
                "still runs: {pid} {line}"
            );
        }
    }

    async fn catalog(&self) -> Catalog {
        let mut config = self.bucket.config();
        config.prefix.clone_from(&self.prefix);
        let store = pipeline::store::s3::S3Store::new(config).unwrap();
        Catalog::open(std::sync::Arc::new(store)).await.unwrap()
    }

    /// The newest backup that is listed does restore: over both databases.
    pub(crate) async fn assert_restores(&self) {
        let (newest, _) = self.by_age().pop().expect("a backup");
        let nodes = self.addresses();
        let args = [
            "restore",
            "--id",
            &newest,
            "--nodes",
            &nodes,
            "--yes",
            "--discard-old",
        ];
        let restored = self.again(&args).await;
        assert_eq!(restored["backup_id"], newest.as_str(), "{restored}");
        for host in [0, 1] {
            let timeline = "SELECT timeline_id::text FROM pg_control_checkpoint()";
            assert_ne!(self.ask(host, timeline).await, "1", "it is not restored");
            self.ask(host, "SELECT count(*) FROM alive").await;
        }
        self.assert_clean().await;
    }

    /// Every listed backup has every object that its manifest and point name, with the bytes they should have.
    async fn assert_backups_whole(&self) {
        let catalog = self.catalog().await;
        for id in self.listed("complete") {
            let found = catalog.restorable(&id.parse().unwrap()).await.unwrap();
            assert_eq!(found.manifest.state, ManifestState::Complete);
            for node in &found.manifest.nodes {
                let place = format!(
                    "{}/backups/{id}/{}/{}",
                    self.prefix, node.node_id, node.attempt
                );
                let index = self.server().bytes(&format!("{place}/index"));
                let index = index.unwrap_or_else(|| panic!("{id} lacks its index"));
                assert_eq!(hex::encode(Sha256::digest(index)), node.index.sha256);
                for pack in &node.packs {
                    let key = format!("{place}/pack-{:05}", pack.number);
                    let bytes = self.server().bytes(&key);
                    let bytes = bytes.unwrap_or_else(|| panic!("{id} lacks {key}"));
                    assert_eq!(bytes.len() as u64, pack.size, "{key}");
                }
            }
            for node in &found.point.nodes {
                let wal = format!("{}/wal/{}/{}", self.prefix, node.node_id, node.epoch);
                for segment in [&node.wal_first, &node.wal_last] {
                    let key = format!("{wal}/{segment}.zst");
                    assert!(self.server().bytes(&key).is_some(), "{id} lacks {key}");
                }
            }
        }
    }
}

/// Process ids of a process's children, as text.
fn children(pid: u32) -> Vec<String> {
    let file = format!("/proc/{pid}/task/{pid}/children");
    let text = fs::read_to_string(file).unwrap_or_default();
    text.split_whitespace().map(str::to_owned).collect()
}
