//! One copy of a node, made by PostgreSQL's own tools, rolled forward from restore point to restore point: a point is
//! recovered to and looked at in about a second, however many there are.
//!
//! `pg_wal_replay_resume` takes no new target. So the copy stands at a point, open for reading, is stopped, and is
//! started with the next one.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::{Duration, Instant};

use catalog::ids::EpochId;
use catalog::wal::{self, WalFile};
use futures_util::future::join_all;
use pipeline::store::ObjectStore;
use tokio::process::Command;
use tokio_postgres::Client;
use uuid::Uuid;

use crate::os;
use crate::postgres::{self, Cluster, ClusterOptions};

/// Settings of a node that archives its WAL where a [`struct@Copy`] of it looks.
pub fn archiving() -> ClusterOptions {
    let pairs = [
        ("max_prepared_transactions", "50"),
        ("archive_mode", "on"),
        ("archive_command", "cp %p ../archive/%f"),
    ];
    ClusterOptions {
        settings: pairs
            .map(|(name, value)| (name.to_owned(), value.to_owned()))
            .to_vec(),
        ..ClusterOptions::default()
    }
}

/// Makes a directory of the database's user, unless it is there.
///
/// # Panics
/// If it cannot be made.
pub fn directory(path: &Path) {
    if !path.exists() {
        fs::create_dir(path).expect("a directory");
        os::give(path);
    }
}

/// The copy of a node, in `copy` beside its data; its WAL comes from `archive` there.
#[derive(Debug)]
pub struct Copy {
    root: PathBuf,
    bindir: PathBuf,
    data: PathBuf,
    port: u16,
}

impl Copy {
    /// Copies the node as it is now.
    ///
    /// # Panics
    /// If `pg_basebackup` fails.
    pub fn of(source: &Cluster) -> Self {
        let root = source.root();
        for name in ["archive", "copy"] {
            directory(&root.join(name));
        }
        let data = root.join("copy/data");
        let bindir = source.installation().bindir.clone();
        let mut command = os::command(bindir.join("pg_basebackup"));
        command
            .arg("-D")
            .arg(&data)
            .args(["-X", "none", "-c", "fast", "--no-sync"]);
        command
            .arg("-h")
            .arg(root)
            .args(["-p", &source.port().to_string(), "-U", "postgres"]);
        let output = command.current_dir(root).output().expect("pg_basebackup");
        assert!(output.status.success(), "{output:?}");
        Self {
            root: root.to_owned(),
            bindir,
            data,
            port: os::free_port(),
        }
    }

    /// Waits until the source has archived all WAL that it has written so far.
    ///
    /// # Panics
    /// If that takes a minute.
    pub async fn archived(&self, source: &Cluster) {
        let segment = "SELECT pg_walfile_name(pg_switch_wal())";
        let last = source.query_one("postgres", segment).await;
        let size = "SELECT setting::bigint FROM pg_settings WHERE name = 'wal_segment_size'";
        let size: u64 = source
            .query_one("postgres", size)
            .await
            .parse()
            .expect("a size");
        let file = self.root.join("archive").join(&last);
        let deadline = Instant::now() + Duration::from_mins(1);
        let whole = || fs::metadata(&file).is_ok_and(|file| file.len() == size);
        while !whole() {
            assert!(
                Instant::now() < deadline,
                "{last} is not archived: {}",
                source.log()
            );
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    }

    /// Fills the archive with what a bucket has of the node's WAL, from where the last call ended. Returns the newest
    /// segment's name.
    ///
    /// # Panics
    /// If the bucket has none, or a damaged one.
    pub async fn fetch(&self, store: &dyn ObjectStore, node: Uuid, epoch: &EpochId) -> String {
        let listed = wal::list_segments(store, node, epoch)
            .await
            .expect("the bucket's WAL");
        let mut last = String::new();
        for name in listed
            .into_iter()
            .map(|listed| listed.name)
            .filter(|name| !name.is_history())
        {
            last = name.as_str().to_owned();
            let path = self.root.join("archive").join(&last);
            if path.exists() {
                continue;
            }
            let file = WalFile {
                node,
                epoch: epoch.clone(),
                name,
            };
            let mut sink = tokio::fs::File::create(&path)
                .await
                .expect("a file of the archive");
            let got = wal::get_segment(store, &file, &mut sink).await;
            got.unwrap_or_else(|error| panic!("{file}: {error}"));
            os::give(&path);
        }
        assert!(
            !last.is_empty(),
            "the bucket has no WAL of node {node}, epoch {epoch}"
        );
        last
    }

    /// Throws away WAL that is older than what the copy will start from.
    ///
    /// # Panics
    /// If that cannot be known.
    pub fn forget(&self) {
        let mut control = std::process::Command::new(self.bindir.join("pg_controldata"));
        let output = control
            .arg(&self.data)
            .env("LC_ALL", "C")
            .output()
            .expect("pg_controldata");
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        let line = text
            .lines()
            .find(|line| line.starts_with("Latest checkpoint's REDO WAL file"));
        let first = line
            .and_then(|line| line.split_whitespace().last())
            .expect("the REDO WAL file")
            .to_owned();
        for entry in fs::read_dir(self.root.join("archive"))
            .expect("the archive")
            .flatten()
        {
            if entry.file_name().to_string_lossy().as_ref() < first.as_str() {
                fs::remove_file(entry.path()).expect("an old segment goes");
            }
        }
    }

    async fn pg_ctl(&self, args: &[&str]) {
        let mut command = Command::from(os::command(self.bindir.join("pg_ctl")));
        command
            .args(args)
            .args(["-w", "-t", "60", "-D"])
            .arg(&self.data);
        command.current_dir(&self.root);
        command
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null());
        let status = command.status().await.expect("pg_ctl");
        assert!(status.success(), "pg_ctl {args:?}: {}", self.log());
    }

    fn log(&self) -> String {
        fs::read_to_string(self.root.join("copy.log")).unwrap_or_default()
    }

    /// Recovers to a restore point, and stays there, open for reading.
    ///
    /// # Panics
    /// If it is not reached within a minute.
    pub async fn reach(&self, point: &str, database: &str) -> Client {
        let settings = format!(
            "restore_command = 'cp {root}/archive/%f %p'\nrecovery_target_name = '{point}'\n\
             recovery_target_action = pause\nhot_standby = on\narchive_mode = off\nport = {}\n\
             listen_addresses = ''\nunix_socket_directories = '{root}/copy'\nfsync = off\n",
            self.port,
            root = self.root.display(),
        );
        for (name, text) in [
            ("postgresql.auto.conf", settings.as_str()),
            ("recovery.signal", ""),
        ] {
            fs::write(self.data.join(name), text).expect("a file");
            os::give(&self.data.join(name));
        }
        let log = self.root.join("copy.log").display().to_string();
        self.pg_ctl(&["start", "-l", &log]).await;
        let client = postgres::connect(&self.root.join("copy"), self.port, database).await;
        let state = "SELECT pg_get_wal_replay_pause_state()";
        let deadline = Instant::now() + Duration::from_mins(1);
        while postgres::query_one(&client, state).await != "paused" {
            assert!(
                Instant::now() < deadline,
                "`{point}` is not reached: {}",
                self.log()
            );
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        client
    }

    /// Stops it where it is.
    ///
    /// # Panics
    /// If it does not stop.
    pub async fn leave(&self) {
        self.pg_ctl(&["stop", "-m", "fast"]).await;
    }
}

/// All copies at a restore point, at the same time.
pub async fn reach(copies: &[Copy], point: &str, database: &str) -> Vec<Client> {
    join_all(copies.iter().map(|copy| copy.reach(point, database))).await
}

/// Ends sessions that [`reach`] opened, and stops all copies.
pub async fn leave(copies: &[Copy], sessions: Vec<Client>) {
    drop(sessions);
    join_all(copies.iter().map(Copy::leave)).await;
}
