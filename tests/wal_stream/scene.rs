//! A database whose agent ships its WAL all the time, and a store that can fail.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use catalog::Catalog;
use catalog::ids::EpochId;
use catalog::model::Gap;
use catalog::wal::list_segments;
use pipeline::store::s3::CredentialSource;
use serde_json::Value;
use support::fleet::{Fleet, Run};
use support::load::lsn;
use support::os;
use support::postgres::{Cluster, ClusterOptions, Installation};
use support::s3::{self, Options, S3Server};
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

const MIB: u64 = 1 << 20;
/// For anything that is waited for.
const SOON: Duration = Duration::from_secs(90);

/// A database with its agent, and a store that can fail.
pub(crate) struct Scene {
    pub(crate) server: S3Server,
    pub(crate) fleet: Fleet,
    /// Bytes of a segment.
    segment: u64,
}

impl Scene {
    /// `lent`: the agent has no credentials of its own.
    pub(crate) async fn new(name: &str, segment_mib: u32, lent: bool, flags: &[&str]) -> Self {
        let server = s3::start(Options::default()).await.expect("a store");
        let mut fleet = Fleet::new(name, &server.config());
        let settings = [("max_wal_size", "64MB"), ("min_wal_size", "32MB")];
        let small = settings.map(|(name, value)| (name.to_owned(), value.to_owned()));
        let settings = if segment_mib <= 16 {
            small.to_vec()
        } else {
            Vec::new()
        };
        let with = ClusterOptions {
            wal_segment_mib: segment_mib,
            settings,
            ..ClusterOptions::default()
        };
        let file = fleet.path().join("s3.ini");
        let mut flags: Vec<&str> = flags.to_vec();
        let file_text = file.display().to_string();
        if !lent {
            credentials(&file, &server);
            flags.extend(["--s3-credentials-file", &file_text]);
        }
        fleet.add_database_with("node", &Installation::newest(), with, &flags);
        let scene = Self {
            server,
            fleet,
            segment: u64::from(segment_mib) * MIB,
        };
        let database = scene.database();
        database
            .execute("CREATE TABLE numbers (number bigserial PRIMARY KEY, filler text)")
            .await;
        scene
    }

    pub(crate) fn database(&self) -> &Cluster {
        self.fleet.hosts[0].cluster.as_ref().expect("a database")
    }

    pub(crate) fn run(&self, args: &[&str]) -> Run {
        let nodes = self.fleet.addresses(&[0]);
        let args: Vec<_> = args
            .iter()
            .copied()
            .chain(["--nodes", &nodes, "--output", "json"])
            .collect();
        self.fleet.run(&args)
    }

    /// A backup after which WAL is shipped all the time; its id.
    pub(crate) fn back_up(&self) -> String {
        self.back_up_by(&[])
    }

    /// The same, asked for with these words too.
    pub(crate) fn back_up_by(&self, words: &[&str]) -> String {
        let run = self.run(&[&["backup", "--wal", "continuous"], words].concat());
        let run = run.good();
        assert!(!run.stdout.contains("is not shipped"), "{run:?}");
        let id = run.result()["backup_id"].as_str().map(str::to_owned);
        id.expect("a backup")
    }

    /// What the agent says of its shipping, and the exit code of the question.
    pub(crate) fn status(&self) -> (Value, i32) {
        self.status_on(0)
    }

    /// The same of another host's agent.
    pub(crate) fn status_on(&self, host: usize) -> (Value, i32) {
        let nodes = self.fleet.addresses(&[host]);
        let args = ["wal", "status", "--nodes", &nodes, "--output", "json"];
        let run = self.fleet.run(&args);
        let line = run.stdout.lines().next().expect("a line").to_owned();
        let status: Value = serde_json::from_str(&line).expect("JSON");
        assert_eq!(status["event"], "wal", "{run:?}");
        (status, run.code)
    }

    /// Waits until the status is as wanted.
    pub(crate) async fn until(&self, what: &str, is_so: impl Fn(&Value) -> bool) -> Value {
        self.until_on(0, what, is_so).await
    }

    /// The same of another host's agent.
    pub(crate) async fn until_on(
        &self,
        host: usize,
        what: &str,
        is_so: impl Fn(&Value) -> bool,
    ) -> Value {
        let begun = Instant::now();
        loop {
            let (status, _) = self.status_on(host);
            if is_so(&status) {
                return status;
            }
            assert!(
                begun.elapsed() < SOON,
                "waited for: {what}: {status}\n{}",
                self.fleet.hosts[host].agent.log()
            );
            tokio::time::sleep(Duration::from_millis(300)).await;
        }
    }

    pub(crate) async fn until_state(&self, state: &str) -> Value {
        self.until(state, |status| status["state"] == state).await
    }

    /// Waits until everything that the database has written by now is in the bucket.
    pub(crate) async fn until_shipped(&self) -> Value {
        let database = self.database();
        let position = "SELECT pg_walfile_name_offset(pg_switch_wal()) IS NOT NULL";
        database
            .execute("SELECT pg_logical_emit_message(false, 'x', 'y')")
            .await;
        database.query_one("postgres", position).await;
        let flushed = database
            .query_one("postgres", "SELECT pg_current_wal_flush_lsn()")
            .await;
        // The segment that is being written then is not whole.
        let wanted = lsn(&flushed) / self.segment * self.segment;
        self.until("all of it shipped", |status| {
            let shipped = status["shipped_to"].as_str();
            shipped.is_some_and(|shipped| lsn(shipped) >= wanted)
        })
        .await
    }

    /// Writes so many MiB of WAL at once.
    pub(crate) async fn write(&self, mib: u64) {
        for _ in 0..mib {
            self.database()
                .execute("SELECT pg_logical_emit_message(false, 'x', repeat('y', 1 << 20))")
                .await;
        }
    }

    pub(crate) async fn catalog(&self) -> Catalog {
        let store = Arc::new(self.server.store().expect("a store"));
        Catalog::open(store).await.expect("a repository")
    }

    /// Checks that the segments of each epoch follow each other, or a gap that is written down lies between. Returns the gaps.
    pub(crate) async fn contiguous(&self) -> Vec<Gap> {
        let catalog = self.catalog().await;
        let mut all = Vec::new();
        for node in catalog.nodes().await.expect("nodes") {
            for epoch in catalog.epochs(node.node_id).await.expect("epochs") {
                all.extend(
                    self.contiguous_in(&catalog, node.node_id, &epoch.epoch)
                        .await,
                );
            }
        }
        all
    }

    async fn contiguous_in(&self, catalog: &Catalog, node: Uuid, epoch: &EpochId) -> Vec<Gap> {
        let segments = list_segments(&**catalog.store(), node, epoch)
            .await
            .expect("a listing");
        let mut numbers: Vec<u64> = segments
            .iter()
            .filter_map(|it| it.name.number(self.segment))
            .collect();
        numbers.sort_unstable();
        let gaps = catalog.gaps(node, epoch).await.expect("gaps");
        for pair in numbers.windows(2) {
            let (from, to) = ((pair[0] + 1) * self.segment, pair[1] * self.segment);
            let declared = gaps
                .iter()
                .any(|gap| lsn(&gap.from) <= from && to <= lsn(&gap.to));
            assert!(
                from == to || declared,
                "segments {} to {} are missing, and no gap says so: {gaps:?}",
                pair[0],
                pair[1]
            );
        }
        gaps
    }

    /// Brings a backup back beside the database.
    pub(crate) fn restores(&mut self, backup: &str) {
        self.restored(&["--id", backup, "--no-start"], &[]);
    }

    /// Restores what `which` says beside the database, by an agent with these flags; the new data directory.
    pub(crate) fn restored(&mut self, which: &[&str], flags: &[&str]) -> PathBuf {
        let shown = self.fleet.run(&["show", "--output", "json"]).good();
        let node = shown.result()["backups"][0]["nodes"][0]["node_id"].clone();
        let node = node.as_str().expect("a node").to_owned();
        let name = format!("fresh{}", self.fleet.hosts.len());
        let host = self.fleet.add_host(&name, flags);
        let address = self.fleet.addresses(&[host]);
        let target = self.fleet.hosts[host].root.join("restored");
        std::fs::create_dir(&target).expect("a target");
        os::give(&target);
        let target = target.display().to_string();
        let map = format!("{node}={address}");
        let mut args = vec!["restore", "--nodes", &address, "--target-dir", &target];
        args.extend(["--map", &map, "--clone", "--yes", "--output", "json"]);
        args.extend(which);
        let result = self.fleet.run(&args).good().result();
        let data = result["nodes"][0]["data_directory"].as_str();
        PathBuf::from(data.expect("a data directory"))
    }

    pub(crate) async fn slots(&self) -> String {
        let sql = "SELECT coalesce(string_agg(slot_name, ' '), '') FROM pg_replication_slots";
        self.database().query_one("postgres", sql).await
    }

    pub(crate) fn log(&self) -> String {
        self.fleet.hosts[0].agent.log()
    }
}

fn credentials(file: &Path, server: &S3Server) {
    let CredentialSource::Static {
        access_key_id,
        secret_access_key,
        ..
    } = server.config().credentials
    else {
        panic!("static credentials");
    };
    let text = format!(
        "[default]\naws_access_key_id = {access_key_id}\naws_secret_access_key = {secret_access_key}\n"
    );
    std::fs::write(file, text).expect("a file");
    let mode = std::os::unix::fs::PermissionsExt::from_mode(0o600);
    std::fs::set_permissions(file, mode).expect("chmod");
    os::give(file);
}

/// Somebody who writes all the time, also while the database is away.
pub(crate) struct Writer {
    stop: CancellationToken,
    task: JoinHandle<u64>,
}

impl Writer {
    pub(crate) fn start(database: &Cluster) -> Self {
        let stop = CancellationToken::new();
        let (socket, port) = (database.socket_directory().to_owned(), database.port());
        let ended = stop.clone();
        let task = tokio::spawn(async move {
            let mut written = 0;
            while !ended.is_cancelled() {
                let mut config = tokio_postgres::Config::new();
                config
                    .host_path(&socket)
                    .port(port)
                    .user(support::postgres::SUPERUSER)
                    .dbname("postgres");
                let Ok((client, connection)) = config.connect(tokio_postgres::NoTls).await else {
                    tokio::time::sleep(Duration::from_millis(100)).await;
                    continue;
                };
                let connection = tokio::spawn(connection);
                let sql = "INSERT INTO numbers (filler) SELECT repeat(md5(g::text), 30) \
                           FROM generate_series(1, 200) g";
                while !ended.is_cancelled() && client.batch_execute(sql).await.is_ok() {
                    written += 200;
                    tokio::time::sleep(Duration::from_millis(20)).await;
                }
                connection.abort();
            }
            written
        });
        Self { stop, task }
    }

    pub(crate) async fn stop(self) -> u64 {
        self.stop.cancel();
        self.task.await.expect("a writer")
    }
}
