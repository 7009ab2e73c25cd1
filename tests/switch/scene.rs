//! Databases with agents, a backup of them, and what has been written since.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use catalog::Catalog;
use catalog::model::{Decision, Verdict};
use serde_json::Value;
use support::bucket::Bucket;
use support::fleet::{Fleet, Run};
use support::postgres::{self, Cluster, ClusterOptions, Installation};
use support::running::Running;
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

/// Slow enough that copies are still being fetched when something happens to them.
pub(crate) const SLOW: [&str; 2] = ["--bandwidth", "256KiB"];

/// All of a test.
pub(crate) struct Scene {
    pub(crate) fleet: Fleet,
    pub(crate) bucket: Bucket,
}

/// A backup as a test needs it.
pub(crate) struct Backup {
    pub(crate) id: String,
    /// Node ids, by host.
    pub(crate) nodes: Vec<String>,
}

impl Scene {
    /// So many databases with a table of 3000 rows each; their agents get `flags`.
    pub(crate) async fn new(databases: usize, flags: &[&str]) -> Self {
        let bucket = Bucket::double().await;
        let mut fleet = Fleet::new("switch", &bucket.config());
        let installation = Installation::newest();
        for number in 1..=databases {
            let (name, options) = (format!("node{number}"), ClusterOptions::default());
            fleet.add_database_with(&name, &installation, options, flags);
        }
        let scene = Self { fleet, bucket };
        for number in 0..databases {
            let sql = "CREATE TABLE t (id int PRIMARY KEY, body text); \
                       INSERT INTO t SELECT g, md5(g::text) FROM generate_series(1, 3000) g";
            scene.database(number).execute(sql).await;
        }
        scene
    }

    pub(crate) fn database(&self, number: usize) -> &Cluster {
        self.fleet.hosts[number]
            .cluster
            .as_ref()
            .expect("a database")
    }

    pub(crate) fn data(&self, number: usize) -> PathBuf {
        self.database(number).data_directory()
    }

    pub(crate) fn agent(&self, number: usize) -> &str {
        &self.fleet.hosts[number].agent.address
    }

    fn all(&self) -> Vec<usize> {
        (0..self.fleet.hosts.len()).collect()
    }

    /// All agents, as `--nodes` wants them.
    pub(crate) fn nodes(&self) -> String {
        self.fleet.addresses(&self.all())
    }

    /// Backs up all databases; then each gets rows that the backup does not have.
    pub(crate) async fn backed_up(&self) -> Backup {
        let nodes = self.nodes();
        let args = ["backup", "--nodes", &nodes, "--output", "json"];
        let made = Running::start(self.fleet.command(&args)).end().await;
        let made = made.good().result();
        let of = |number: &usize| {
            let port = self.database(*number).port();
            let mut nodes = made["nodes"].as_array().expect("nodes").iter();
            let node = nodes.find(|node| node["port"] == port).expect("the node");
            node["node_id"].as_str().expect("an id").to_owned()
        };
        let backup = Backup {
            id: made["backup_id"].as_str().expect("an id").to_owned(),
            nodes: self.all().iter().map(of).collect(),
        };
        for number in self.all() {
            let sql = "INSERT INTO t SELECT g, 'later' FROM generate_series(4001, 4100) g; \
                       UPDATE t SET body = 'changed' WHERE id % 10 = 0";
            self.database(number).execute(sql).await;
        }
        backup
    }

    /// The arguments of a restore of `backup`.
    pub(crate) fn restore(&self, backup: &Backup, more: &[&str]) -> Command {
        let nodes = self.nodes();
        let args = ["restore", "--id", &backup.id, "--nodes", &nodes];
        let mut command = self.fleet.command(&args);
        command.args(["--yes", "--output", "json", "--lease-ttl", "5"]);
        command.args(more);
        command
    }

    /// Runs a restore to its end.
    pub(crate) fn restored(&self, backup: &Backup, more: &[&str]) -> Run {
        support::fleet::wait(self.restore(backup, more), Duration::from_mins(4))
    }

    /// Starts a restore.
    pub(crate) fn restoring(&self, backup: &Backup, more: &[&str]) -> Running {
        Running::start(self.restore(backup, more))
    }

    /// A digest of every row of `t` on a database.
    pub(crate) async fn rows(&self, number: usize) -> String {
        self.database(number).query_one("postgres", ROWS).await
    }

    /// Digests of all databases.
    pub(crate) async fn all_rows(&self) -> Vec<String> {
        let mut rows = Vec::new();
        for number in self.all() {
            rows.push(self.rows(number).await);
        }
        rows
    }

    /// Every database has exactly the rows of the backup.
    pub(crate) async fn assert_at_the_point(&self, numbers: &[usize]) {
        for number in numbers {
            let sql = "SELECT count(*) || ' ' || bool_and(body = md5(id::text)) FROM t";
            let found = self.database(*number).query_one("postgres", sql).await;
            assert_eq!(found, "3000 true", "node {number}");
        }
    }

    /// Nothing that a restore makes stands beside this database.
    pub(crate) fn assert_nothing_left(&self, number: usize) {
        let left = beside(&self.data(number), "");
        assert!(left.is_empty(), "left on node {number}: {left:?}");
    }

    pub(crate) async fn catalog(&self) -> Catalog {
        Catalog::open(self.bucket.store())
            .await
            .expect("a repository")
    }

    /// The only restore there is.
    pub(crate) fn operation(&self) -> Uuid {
        let all = self.operations();
        let mut restores = all.iter().filter(|it| it["kind"] == "restore");
        let id = restores.next().expect("a restore")["operation"].as_str();
        assert!(restores.next().is_none(), "{all:?}");
        id.expect("an id").parse().expect("an id")
    }

    /// What is decided about the only restore.
    pub(crate) async fn decision(&self) -> Option<Decision> {
        let operation = self.operation();
        self.catalog()
            .await
            .decision(operation)
            .await
            .expect("readable")
    }

    pub(crate) async fn assert_decided(&self, verdict: Verdict) {
        let decision = self.decision().await.expect("a decision");
        assert_eq!(decision.verdict, verdict, "{decision:?}");
    }

    /// `gs_pitr operations`.
    pub(crate) fn operations(&self) -> Vec<Value> {
        let run = self.fleet.run(&["operations", "--output", "json"]).good();
        run.result()["operations"]
            .as_array()
            .expect("a list")
            .clone()
    }

    /// `gs_pitr operations resume` from a machine that has the certificates and nothing else, again and again
    /// until the dead one's lease has run out.
    pub(crate) async fn resumed_elsewhere(&self, operation: Uuid, more: &[&str]) -> Run {
        let elsewhere = self.fleet.path().join("elsewhere");
        let certs = elsewhere.join(".gs_pitr/certs");
        std::fs::create_dir_all(&certs).expect("another home");
        for name in ["operator.crt", "operator.key", "ca.crt"] {
            let from = self.fleet.home().join(".gs_pitr/certs").join(name);
            std::fs::copy(from, certs.join(name)).expect("a certificate");
        }
        let id = operation.to_string();
        for _ in 0..20 {
            let mut command = self.fleet.command(&["operations", "resume", &id]);
            command.args(["--yes", "--output", "json", "--lease-ttl", "5"]);
            command.args(more).env("HOME", &elsewhere);
            let run = support::fleet::wait(command, Duration::from_mins(3));
            let held = run.code == 12 && run.stdout.contains("is running");
            if !held {
                return run;
            }
            tokio::time::sleep(Duration::from_secs(1)).await;
        }
        panic!("the lease of the dead one never runs out");
    }
}

const ROWS: &str =
    "SELECT count(*) || ' ' || md5(string_agg(id || ':' || body, ',' ORDER BY id)) FROM t";

/// Names beside a data directory that begin with its own and go on with `.gs_pitr-<what>`.
pub(crate) fn beside(data: &Path, what: &str) -> Vec<PathBuf> {
    let start = format!(
        "{}.gs_pitr-{what}",
        data.file_name().unwrap().to_str().unwrap()
    );
    let all = std::fs::read_dir(data.parent().unwrap()).unwrap();
    let all = all.map(|entry| entry.unwrap().path());
    let mut all: Vec<_> = all
        .filter(|path| {
            path.file_name()
                .unwrap()
                .to_str()
                .unwrap()
                .starts_with(&start)
        })
        .collect();
    all.sort();
    all
}

/// Somebody who uses a database all the time, over one session.
pub(crate) struct Client {
    stop: CancellationToken,
    work: JoinHandle<(u64, Option<String>)>,
}

impl Client {
    pub(crate) fn of(database: &Cluster) -> Self {
        let stop = CancellationToken::new();
        let (socket, port) = (database.socket_directory().to_owned(), database.port());
        let stopped = stop.clone();
        let work = tokio::spawn(async move {
            let session = postgres::connect(&socket, port, "postgres").await;
            let mut answers = 0;
            while !stopped.is_cancelled() {
                if let Err(error) = session
                    .batch_execute("UPDATE t SET body = body WHERE id = 1")
                    .await
                {
                    return (answers, Some(format!("{error:?}")));
                }
                answers += 1;
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
            (answers, None)
        });
        Self { stop, work }
    }

    /// The database has answered all the time.
    pub(crate) async fn assert_undisturbed(self) {
        self.stop.cancel();
        let (answers, error) = self.work.await.expect("a client");
        assert_eq!(error, None, "after {answers} answers");
        assert!(answers > 10, "it hardly asked: {answers}");
    }
}
