//! One copy of each node, made by PostgreSQL's own tools, rolled forward from restore point to restore point.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::{Duration, Instant};

use futures_util::future::join_all;
use support::os;
use support::postgres::{self, Cluster, ClusterOptions};
use tokio_postgres::Client;

use crate::transfers;

/// Settings of a node whose WAL a copy can follow.
pub(crate) fn options() -> ClusterOptions {
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
pub(crate) fn directory(path: &Path) {
    if !path.exists() {
        fs::create_dir(path).expect("a directory");
        os::give(path);
    }
}

#[derive(Debug)]
pub(crate) struct Copy<'a> {
    source: &'a Cluster,
    data: PathBuf,
    port: u16,
}

impl<'a> Copy<'a> {
    /// Copies the node as it is now.
    pub(crate) fn of(source: &'a Cluster) -> Self {
        let root = source.root();
        for name in ["archive", "copy"] {
            directory(&root.join(name));
        }
        let data = root.join("copy/data");
        let mut command = os::command(source.installation().bindir.join("pg_basebackup"));
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
        let port = os::free_port();
        Self { source, data, port }
    }

    /// Waits until all WAL written so far is in the archive.
    pub(crate) async fn archived(&self) {
        let segment = "SELECT pg_walfile_name(pg_switch_wal())";
        let last = self.source.query_one("postgres", segment).await;
        let file = self.source.root().join("archive").join(&last);
        let deadline = Instant::now() + Duration::from_mins(1);
        let whole = || fs::metadata(&file).is_ok_and(|file| file.len() == 16 << 20);
        while !whole() {
            assert!(
                Instant::now() < deadline,
                "{last} is not archived: {}",
                self.source.log()
            );
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    }

    fn pg_ctl(&self, args: &[&str]) {
        let mut command = os::command(self.source.installation().bindir.join("pg_ctl"));
        command
            .args(args)
            .args(["-w", "-t", "60", "-D"])
            .arg(&self.data);
        command.current_dir(self.source.root());
        command
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null());
        let status = command.status().expect("pg_ctl");
        let log = || fs::read_to_string(self.source.root().join("copy.log")).unwrap_or_default();
        assert!(status.success(), "pg_ctl {args:?}: {}", log());
    }

    /// Recovers to a restore point and stays there, open for reading.
    async fn reach(&self, point: &str) -> Client {
        let root = self.source.root();
        let settings = format!(
            "restore_command = 'cp {root}/archive/%f %p'\nrecovery_target_name = '{point}'\n\
             recovery_target_action = pause\nhot_standby = on\narchive_mode = off\nport = {}\n\
             unix_socket_directories = '{root}/copy'\nfsync = off\n",
            self.port,
            root = root.display(),
        );
        for (name, text) in [
            ("postgresql.auto.conf", settings.as_str()),
            ("recovery.signal", ""),
        ] {
            fs::write(self.data.join(name), text).expect("a file");
            os::give(&self.data.join(name));
        }
        let log = root.join("copy.log").display().to_string();
        self.pg_ctl(&["start", "-l", &log]);
        let client = postgres::connect(&root.join("copy"), self.port, "postgres").await;
        let state = "SELECT pg_get_wal_replay_pause_state()";
        let deadline = Instant::now() + Duration::from_mins(1);
        while postgres::query_one(&client, state).await != "paused" {
            assert!(Instant::now() < deadline, "`{point}` is not reached");
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        client
    }
}

/// What all copies have together at a restore point.
pub(crate) async fn at_point(
    copies: &[Copy<'_>],
    point: &str,
    proved: bool,
) -> Result<usize, String> {
    let nodes = join_all(copies.iter().map(|copy| copy.reach(point))).await;
    let found = if proved {
        transfers::check_proved(&nodes).await
    } else {
        transfers::check(&nodes).await
    };
    drop(nodes);
    for copy in copies {
        copy.pg_ctl(&["stop", "-m", "fast"]);
    }
    found
}
