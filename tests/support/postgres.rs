//! Real PostgreSQL clusters on loopback, each in a directory of its own.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use tokio_postgres::{Client, NoTls, SimpleQueryMessage};

use crate::os;

/// Programs of one PostgreSQL version.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Installation {
    /// Directory with `initdb`, `pg_ctl`, `postgres`.
    pub bindir: PathBuf,
    /// Major version.
    pub major: u32,
}

impl Installation {
    /// What lies in `bindir`, if its `postgres` runs and says a version.
    pub fn at(bindir: &Path) -> Option<Self> {
        let output = Command::new(bindir.join("postgres"))
            .arg("--version")
            .output()
            .ok()?;
        let text = String::from_utf8(output.stdout).ok()?;
        let version = text
            .split_whitespace()
            .find(|word| word.starts_with(|c: char| c.is_ascii_digit()))?;
        let major = version.split('.').next()?.parse().ok()?;
        Some(Self {
            bindir: bindir.to_owned(),
            major,
        })
    }

    /// All that can be found: `GS_PITR_TEST_PG_BINDIRS` (separated by `:`), Debian's and Red Hat's places, by major.
    pub fn all() -> Vec<Self> {
        let mut found = Self::found();
        found.dedup_by_key(|installation| installation.major);
        found
    }

    fn found() -> Vec<Self> {
        let mut candidates: Vec<PathBuf> = Vec::new();
        if let Some(listed) = std::env::var_os("GS_PITR_TEST_PG_BINDIRS") {
            candidates.extend(std::env::split_paths(&listed));
        }
        for entry in fs::read_dir("/usr/lib/postgresql")
            .into_iter()
            .flatten()
            .flatten()
        {
            candidates.push(entry.path().join("bin"));
        }
        for entry in fs::read_dir("/usr").into_iter().flatten().flatten() {
            if entry.file_name().to_string_lossy().starts_with("pgsql-") {
                candidates.push(entry.path().join("bin"));
            }
        }
        let mut found: Vec<_> = candidates.iter().filter_map(|dir| Self::at(dir)).collect();
        found.retain(|installation| installation.major >= 12);
        found.sort_by_key(|installation| installation.major);
        found
    }

    /// The newest there is that has the client programs too.
    ///
    /// # Panics
    /// If there is none: `make test` installs one.
    pub fn newest() -> Self {
        let mut found = Self::found();
        found.retain(|installation| installation.bindir.join("pg_amcheck").exists());
        found
            .pop()
            .expect("PostgreSQL 14 or later with its client programs: run `make setup`")
    }
}

/// How a cluster is made.
#[derive(Debug, Clone, Default)]
pub struct ClusterOptions {
    /// `initdb --data-checksums`.
    pub data_checksums: bool,
    /// Settings beyond the defaults, name and value.
    pub settings: Vec<(String, String)>,
    /// Configuration outside the data directory, as Debian does.
    pub config_outside: bool,
    /// Password of the superuser over TCP; the socket always trusts.
    pub password: Option<String>,
    /// WAL segment size in MiB; 0: the default, 16.
    pub wal_segment_mib: u32,
}

/// A cluster. It is stopped at once on drop.
#[derive(Debug)]
pub struct Cluster {
    installation: Installation,
    root: PathBuf,
    port: u16,
    options: ClusterOptions,
}

/// The superuser of every cluster.
pub const SUPERUSER: &str = "postgres";

fn run(command: &mut Command) {
    let output = command
        .stdin(Stdio::null())
        .output()
        .expect("the program can be run");
    assert!(
        output.status.success(),
        "{command:?} failed: {}{}",
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    );
}

impl Cluster {
    /// `initdb` into `root/data` (made here), with a free port. `root` must exist and belong to the database user.
    ///
    /// # Panics
    /// If that fails.
    pub fn create(installation: &Installation, root: &Path, options: ClusterOptions) -> Self {
        let cluster = Self {
            installation: installation.clone(),
            root: root.to_owned(),
            port: os::free_port(),
            options,
        };
        let mut initdb = os::command(installation.bindir.join("initdb"));
        initdb.arg("-D").arg(cluster.data_directory());
        initdb.args([
            "-U",
            SUPERUSER,
            "-A",
            "trust",
            "-E",
            "UTF8",
            "--locale=C",
            "--no-sync",
        ]);
        if cluster.options.data_checksums {
            initdb.arg("--data-checksums");
        } else if installation.major >= 18 {
            initdb.arg("--no-data-checksums");
        }
        if cluster.options.wal_segment_mib != 0 {
            initdb.arg(format!("--wal-segsize={}", cluster.options.wal_segment_mib));
        }
        let password_file = root.join("password");
        if let Some(password) = &cluster.options.password {
            fs::write(&password_file, password).expect("a password file");
            os::give(&password_file);
            initdb.arg("--pwfile").arg(&password_file);
        }
        run(initdb.current_dir(root));
        if cluster.options.password.is_some() {
            fs::remove_file(&password_file).expect("remove the password file");
        }
        cluster.configure();
        cluster
    }

    /// Copies this cluster, which must be stopped, file by file into `root`: same system identifier, same port on
    /// another address of loopback and in another socket directory. The copy is not started.
    ///
    /// # Panics
    /// If it runs, has its configuration outside, or cannot be copied.
    #[must_use]
    pub fn copied_to(&self, root: &Path) -> Self {
        assert!(self.pid().is_none() && !self.options.config_outside);
        let copy = Self {
            installation: self.installation.clone(),
            root: root.to_owned(),
            port: self.port,
            options: self.options.clone(),
        };
        let mut cp = os::command("cp");
        run(cp.arg("-a").arg(self.data_directory()).arg(root));
        let conf = copy.data_directory().join("postgresql.conf");
        let own = format!(
            "listen_addresses = '127.0.0.2'\nunix_socket_directories = '{}'\n",
            root.display()
        );
        let stock = fs::read_to_string(&conf).expect("postgresql.conf");
        fs::write(&conf, stock + &own).expect("postgresql.conf");
        copy
    }

    fn configure(&self) {
        let data = self.data_directory();
        let mut text = format!(
            "port = {}\nlisten_addresses = '127.0.0.1'\nunix_socket_directories = '{}'\nwal_level = replica\n\
             max_wal_senders = 10\nmax_replication_slots = 10\nfsync = on\nshared_buffers = 64MB\nmax_connections = 60\n\
             logging_collector = off\nlog_line_prefix = '%m [%p] %a '\nautovacuum_naptime = 5s\n",
            self.port,
            self.root.display()
        );
        for (name, value) in &self.options.settings {
            text += &format!("{name} = '{}'\n", value.replace('\'', "''"));
        }
        let directory = if self.options.config_outside {
            let directory = self.root.join("etc");
            fs::create_dir(&directory).expect("a configuration directory");
            fs::create_dir(directory.join("conf.d")).expect("conf.d");
            for name in ["postgresql.conf", "pg_hba.conf", "pg_ident.conf"] {
                fs::copy(data.join(name), directory.join(name)).expect("copy");
                fs::remove_file(data.join(name)).expect("remove");
            }
            fs::write(directory.join("conf.d/extra.conf"), "work_mem = '5MB'\n")
                .expect("extra.conf");
            text += &format!(
                "data_directory = '{}'\nhba_file = '{dir}/pg_hba.conf'\nident_file = '{dir}/pg_ident.conf'\n\
                 external_pid_file = '{}/external.pid'\ninclude_dir = 'conf.d'\n",
                data.display(),
                self.root.display(),
                dir = directory.display()
            );
            directory
        } else {
            data
        };
        let conf = directory.join("postgresql.conf");
        let stock = fs::read_to_string(&conf).expect("postgresql.conf");
        fs::write(&conf, stock + &text).expect("postgresql.conf");
        if self.options.password.is_some() {
            let hba = "local all all trust\nlocal replication all trust\nhost all all 127.0.0.1/32 scram-sha-256\n";
            fs::write(directory.join("pg_hba.conf"), hba).expect("pg_hba.conf");
        }
        if self.options.config_outside {
            let mut all = vec![
                directory.clone(),
                directory.join("conf.d"),
                directory.join("conf.d/extra.conf"),
            ];
            all.extend(
                ["postgresql.conf", "pg_hba.conf", "pg_ident.conf"]
                    .map(|name| directory.join(name)),
            );
            for path in &all {
                os::give(path);
            }
        }
    }

    /// The directory that holds everything of the cluster, its socket too.
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// `PGDATA`.
    pub fn data_directory(&self) -> PathBuf {
        self.root.join("data")
    }

    /// Where its unix socket lies.
    pub fn socket_directory(&self) -> &Path {
        &self.root
    }

    /// The port.
    pub fn port(&self) -> u16 {
        self.port
    }

    /// Its programs.
    pub fn installation(&self) -> &Installation {
        &self.installation
    }

    /// The server's log.
    pub fn log(&self) -> String {
        fs::read_to_string(self.root.join("server.log")).unwrap_or_default()
    }

    fn pg_ctl(&self, verb: &str) -> Command {
        let mut command = os::command(self.installation.bindir.join("pg_ctl"));
        command
            .arg(verb)
            .arg("-w")
            .args(["-t", "60"])
            .current_dir(&self.root);
        command.arg("-D").arg(self.data_directory());
        command
    }

    /// Starts the server and waits until it answers.
    ///
    /// # Panics
    /// If it does not, with the server's log.
    pub fn start(&self) {
        let mut command = self.pg_ctl("start");
        command.arg("-l").arg(self.root.join("server.log"));
        if self.options.config_outside {
            let conf = self.root.join("etc/postgresql.conf");
            command
                .arg("-o")
                .arg(format!("-c config_file='{}'", conf.display()));
        }
        // Not output(): the server inherits the pipes and would keep them open.
        let status = command
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .status();
        assert!(
            status.expect("pg_ctl can be run").success(),
            "no start: {}",
            self.log()
        );
    }

    /// Stops the server: `smart`, `fast` or `immediate`.
    ///
    /// # Panics
    /// If it does not stop.
    pub fn stop(&self, mode: &str) {
        run(self.pg_ctl("stop").args(["-m", mode]));
    }

    /// Process id of the postmaster, if it runs.
    pub fn pid(&self) -> Option<u32> {
        let text = fs::read_to_string(self.data_directory().join("postmaster.pid")).ok()?;
        text.lines().next()?.trim().parse().ok()
    }

    /// Connects over the unix socket as superuser.
    ///
    /// # Panics
    /// If that fails within 10 s.
    pub async fn connect(&self, database: &str) -> Client {
        connect(&self.root, self.port, database).await
    }

    /// Runs statements in `postgres`.
    ///
    /// # Panics
    /// If one fails.
    pub async fn execute(&self, sql: &str) {
        let client = self.connect("postgres").await;
        client
            .batch_execute(sql)
            .await
            .unwrap_or_else(|e| panic!("{sql}: {e:?}"));
    }

    /// First column of the first row of a query in `database`, as text.
    ///
    /// # Panics
    /// If it fails or answers nothing.
    pub async fn query_one(&self, database: &str, sql: &str) -> String {
        query_one(&self.connect(database).await, sql).await
    }
}

impl Drop for Cluster {
    fn drop(&mut self) {
        if self.pid().is_some() {
            let _ = self.pg_ctl("stop").args(["-m", "immediate"]).output();
        }
    }
}

/// Connects over a unix socket as superuser.
///
/// # Panics
/// If that fails within 10 s.
pub async fn connect(socket_directory: &Path, port: u16, database: &str) -> Client {
    let mut config = tokio_postgres::Config::new();
    config
        .host_path(socket_directory)
        .port(port)
        .user(SUPERUSER)
        .dbname(database);
    config.connect_timeout(Duration::from_secs(10));
    let connected = tokio::time::timeout(Duration::from_secs(10), config.connect(NoTls)).await;
    let (client, connection) = connected
        .expect("the database answers in time")
        .unwrap_or_else(|e| panic!("port {port} in {}: {e:?}", socket_directory.display()));
    tokio::spawn(connection);
    client
}

/// Socket directory and port of the server that runs in `data`, by its `postmaster.pid`.
///
/// # Panics
/// If none does.
pub fn running(data: &Path) -> (PathBuf, u16) {
    let file = data.join("postmaster.pid");
    let text = fs::read_to_string(&file).unwrap_or_else(|e| panic!("{}: {e}", file.display()));
    let lines: Vec<_> = text.lines().map(str::trim).collect();
    let port = lines[3].parse().unwrap_or_else(|_| panic!("{text}"));
    (lines[4].into(), port)
}

/// First column of the first row, as text.
///
/// # Panics
/// If the query fails or answers nothing.
pub async fn query_one(client: &Client, sql: &str) -> String {
    let answer = client
        .simple_query(sql)
        .await
        .unwrap_or_else(|e| panic!("{sql}: {e:?}"));
    let row = answer.iter().find_map(|message| match message {
        SimpleQueryMessage::Row(row) => row.get(0),
        _ => None,
    });
    row.unwrap_or_else(|| panic!("{sql}: no row")).to_owned()
}
