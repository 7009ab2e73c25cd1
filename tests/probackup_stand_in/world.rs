//! One cluster, one catalog.

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use support::os::{self, Scratch};
use support::postgres::{Cluster, ClusterOptions, Installation, SUPERUSER};
use support::probackup::{Kind, ProbackupUnderTest};

/// The name of the instance in every catalog here.
pub(crate) const INSTANCE: &str = "node";

/// A running cluster with pgbench's tables, and room for catalogs beside it.
pub(crate) struct World {
    pub(crate) scratch: Scratch,
    pub(crate) cluster: Cluster,
}

/// What a command did.
#[derive(Debug)]
pub(crate) struct Ran {
    pub(crate) code: i32,
    pub(crate) stdout: String,
    pub(crate) stderr: String,
}

impl Ran {
    pub(crate) fn of(output: &Output) -> Self {
        Self {
            code: output.status.code().unwrap_or(-1),
            stdout: String::from_utf8_lossy(&output.stdout).into_owned(),
            stderr: String::from_utf8_lossy(&output.stderr).into_owned(),
        }
    }

    pub(crate) fn ok(self) -> Self {
        assert_eq!(self.code, 0, "{}{}", self.stdout, self.stderr);
        self
    }

    pub(crate) fn fails_with(self, text: &str) -> Self {
        assert_eq!(self.code, 1, "{}{}", self.stdout, self.stderr);
        assert!(self.stderr.contains(text), "{}", self.stderr);
        self
    }
}

pub(crate) fn run(command: &mut Command) -> Ran {
    let output = command.stdin(Stdio::null()).output();
    Ran::of(&output.unwrap_or_else(|e| panic!("{command:?}: {e}")))
}

impl World {
    pub(crate) fn new(name: &str, options: ClusterOptions) -> Self {
        let scratch = Scratch::new(name);
        let root = scratch.directory("node");
        let cluster = Cluster::create(&Installation::newest(), &root, options);
        cluster.start();
        let world = Self { scratch, cluster };
        run(world
            .client("pgbench")
            .args(["-i", "-s", "1", "-q", "postgres"]))
        .ok();
        world
    }

    /// With page checksums.
    pub(crate) fn checked(name: &str) -> Self {
        let data_checksums = true;
        Self::new(
            name,
            ClusterOptions {
                data_checksums,
                ..ClusterOptions::default()
            },
        )
    }

    /// A client program that knows where the server is.
    pub(crate) fn client(&self, program: &str) -> Command {
        let mut command = os::command(self.cluster.installation().bindir.join(program));
        command
            .env("PGHOST", self.cluster.socket_directory())
            .env("PGPORT", self.cluster.port().to_string())
            .env("PGUSER", SUPERUSER)
            .current_dir(self.scratch.path());
        command
    }

    /// A new catalog with this cluster in it.
    pub(crate) fn catalog(&self, program: &ProbackupUnderTest, name: &str) -> PathBuf {
        let catalog = self.scratch.directory(name).join("catalog");
        run(program.command().arg("init").arg("-B").arg(&catalog)).ok();
        let mut add = program.command();
        add.args(["add-instance", "--instance", INSTANCE])
            .arg("-B")
            .arg(&catalog);
        run(add.arg("-D").arg(self.cluster.data_directory())).ok();
        catalog
    }

    /// Arguments of a backup.
    pub(crate) fn backup_arguments(&self, catalog: &Path, mode: &str, threads: u32) -> Vec<String> {
        let socket = self.cluster.socket_directory().display().to_string();
        let (port, threads) = (self.cluster.port().to_string(), threads.to_string());
        let catalog = catalog.display().to_string();
        let words = [
            "backup",
            "-B",
            &catalog,
            "--instance",
            INSTANCE,
            "-b",
            mode,
            "--stream",
            "--no-validate",
            "--no-sync",
            "-j",
            &threads,
            "-h",
            &socket,
            "-p",
            &port,
            "-U",
            SUPERUSER,
            "-d",
            "postgres",
        ];
        words.map(str::to_owned).to_vec()
    }

    /// Makes a backup; its id.
    pub(crate) fn backup(
        &self,
        program: &ProbackupUnderTest,
        catalog: &Path,
        mode: &str,
    ) -> String {
        let before = ids(catalog);
        next_second();
        run(program
            .command()
            .args(self.backup_arguments(catalog, mode, 2)))
        .ok();
        let new: Vec<_> = ids(catalog)
            .into_iter()
            .filter(|id| !before.contains(id))
            .collect();
        let [id] = new.as_slice() else {
            panic!("one new backup, not {new:?}");
        };
        id.clone()
    }

    /// pgbench in the background, for about so many seconds.
    pub(crate) fn load(&self, seconds: u32) -> Child {
        let mut pgbench = self.client("pgbench");
        pgbench.args(["-n", "-c", "2", "-T", &seconds.to_string(), "postgres"]);
        pgbench
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null());
        pgbench.spawn().expect("pgbench")
    }
}

/// Ids are of one second, and `gs_probackup` refuses a second one.
pub(crate) fn next_second() {
    let now = || {
        let since = SystemTime::now().duration_since(UNIX_EPOCH);
        since.expect("a clock after 1970").as_secs()
    };
    let begun = now();
    while now() == begun {
        std::thread::park_timeout(Duration::from_millis(20));
    }
}

/// The mode of an increment.
pub(crate) fn increment(kind: Kind) -> &'static str {
    match kind {
        Kind::Gs => "PTRACK",
        Kind::Pg => "DELTA",
    }
}

/// Ids of the backups in a catalog, the oldest first.
pub(crate) fn ids(catalog: &Path) -> Vec<String> {
    let entries = std::fs::read_dir(catalog.join("backups").join(INSTANCE)).expect("the instance");
    let mut ids: Vec<_> = entries
        .map(|entry| entry.expect("an entry"))
        .filter(|entry| entry.path().is_dir())
        .map(|entry| entry.file_name().to_string_lossy().into_owned())
        .collect();
    ids.sort();
    ids
}

/// A value of a backup's backup.control.
pub(crate) fn control(catalog: &Path, id: &str, name: &str) -> String {
    let path = catalog
        .join("backups")
        .join(INSTANCE)
        .join(id)
        .join("backup.control");
    let text = std::fs::read_to_string(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
    let mut values = text.lines().filter_map(|line| line.split_once(" = "));
    let found = values.find(|(found, _)| *found == name);
    found
        .unwrap_or_else(|| panic!("no {name}: {text}"))
        .1
        .trim_matches('\'')
        .to_owned()
}
