//! A running database, and a restore over it.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use agent_api::{Place, RestoreSpec};
use pitr_agent::config::Config;
use sha2::{Digest as _, Sha256};
use support::os::{self, Scratch};
use support::postgres::{self, Cluster, ClusterOptions, Installation};
use uuid::Uuid;

use crate::run::{Run, names};
use crate::source::Source;

/// A database that runs, its copy, and what it has since then.
pub(crate) struct Over {
    pub(crate) cluster: Cluster,
    pub(crate) source: Source,
    pub(crate) spec: RestoreSpec,
    pub(crate) space: PathBuf,
    pub(crate) program: PathBuf,
}

impl Over {
    /// 1000 rows are in the copy, 50,000 more came after the point. With `late`, a tablespace is created
    /// between the copy and the point, and has the 50,000 rows.
    pub(crate) async fn new(
        scratch: &Scratch,
        program: PathBuf,
        late: bool,
        place: fn(u64) -> Place,
    ) -> Self {
        let installation = Installation::newest();
        let options = ClusterOptions {
            settings: vec![("wal_keep_size".to_owned(), "1GB".to_owned())],
            wal_segment_mib: 1,
            ..ClusterOptions::default()
        };
        let cluster = Cluster::create(&installation, &scratch.directory("s"), options);
        cluster.start();
        cluster
            .execute("CREATE TABLE t AS SELECT generate_series(1, 1000) AS i")
            .await;
        let source = Source::register(&cluster).await;
        let copy = source.copy(&cluster, &[]).await;
        let space = scratch.directory("space");
        let with = if late {
            let sql = format!("CREATE TABLESPACE late LOCATION '{}'", space.display());
            cluster.execute(&sql).await;
            "TABLESPACE late"
        } else {
            ""
        };
        cluster
            .execute(&format!("CREATE TABLE l (i int) {with}"))
            .await;
        cluster.execute("INSERT INTO l VALUES (1)").await;
        let mut spec = source
            .finish(&cluster, copy, &cluster.data_directory())
            .await;
        cluster
            .execute("INSERT INTO l SELECT generate_series(1, 50000); CHECKPOINT")
            .await;
        spec.place = place(spec.node.system_identifier);
        spec.port = None;
        Self {
            cluster,
            source,
            spec,
            space,
            program,
        }
    }

    pub(crate) fn bindir(&self) -> PathBuf {
        self.cluster.installation().bindir.clone()
    }

    pub(crate) fn config(&self) -> Config {
        crate::run::config(&self.cluster.data_directory(), &self.bindir())
    }

    pub(crate) fn run(&self, spec: &RestoreSpec) -> Run {
        self.run_as(spec, self.config(), Uuid::new_v4())
    }

    pub(crate) fn run_as(&self, spec: &RestoreSpec, config: Config, id: Uuid) -> Run {
        Run::with(&self.source.store, spec, config, &self.program, id)
    }

    /// The same restore again, under a new name.
    pub(crate) fn anew(&self) -> RestoreSpec {
        RestoreSpec {
            restore: Uuid::now_v7(),
            ..self.spec.clone()
        }
    }

    pub(crate) async fn rows(&self, table: &str) -> String {
        let data = self.cluster.data_directory();
        let (socket, port) = postgres::running(&data);
        assert_eq!(port, self.cluster.port());
        let client = postgres::connect(&socket, port, "postgres").await;
        postgres::query_one(&client, &format!("SELECT count(*) FROM {table}")).await
    }

    /// Where the old database is, by the name of its restore.
    pub(crate) fn old(&self, restore: Uuid) -> PathBuf {
        let text = restore.simple().to_string();
        let data = self.cluster.data_directory();
        PathBuf::from(format!(
            "{}.gs_pitr-old-{}",
            data.display(),
            &text[text.len() - 8..]
        ))
    }

    /// Names beside the data directory that a restore made.
    pub(crate) fn left(&self) -> Vec<String> {
        let data = self.cluster.data_directory();
        let mut names = names(data.parent().unwrap());
        names.retain(|name| name.contains("gs_pitr"));
        names
    }

    pub(crate) fn stop(&self) {
        let status = os::command(self.bindir().join("pg_ctl"))
            .args(["stop", "-w", "-m", "fast", "-D"])
            .arg(self.cluster.data_directory())
            .output();
        assert!(status.unwrap().status.success());
    }
}

/// Hashes of all files below a directory (and links, and names of directories).
pub(crate) fn hashes(directory: &Path) -> BTreeMap<PathBuf, String> {
    let mut found = BTreeMap::new();
    let mut queue = vec![directory.to_owned()];
    while let Some(at) = queue.pop() {
        for entry in fs::read_dir(&at).unwrap() {
            let path = entry.unwrap().path();
            let kind = fs::symlink_metadata(&path).unwrap();
            let what = if kind.is_symlink() {
                format!("-> {}", fs::read_link(&path).unwrap().display())
            } else if kind.is_dir() {
                queue.push(path.clone());
                String::new()
            } else {
                format!("{:x?}", Sha256::digest(fs::read(&path).unwrap()))
            };
            found.insert(path, what);
        }
    }
    found
}

pub(crate) fn replace(system_identifier: u64) -> Place {
    Place::Replace { system_identifier }
}

pub(crate) fn in_place(system_identifier: u64) -> Place {
    Place::InPlace { system_identifier }
}
