//! A restore by hand: extract, put `backup_label` and `tablespace_map` back, recover to the restore point.

use std::fmt::Write as _;
use std::fs;
use std::os::unix::fs::{PermissionsExt as _, symlink};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::time::Duration;

use agent_api::BackupSpec;
use catalog::keys;
use catalog::model::{NodeBackup, NodePoint};
use catalog::wal::{WalFile, list_segments, read_segment};
use pipeline::budget::Budget;
use pipeline::download::Downloader;
use pipeline::extract::ExtractOptions;
use pipeline::index::Index;
use pipeline::meter::Meter;
use pipeline::pack::IndexEntry;
use pipeline::store::ObjectStore;
use pipeline::throttle::Throttle;
use support::memory_store::MemoryStore;
use support::os;
use support::postgres::{Cluster, Installation};
use tokio_util::sync::CancellationToken;

/// A recovered database. It is stopped on drop.
pub(crate) struct Restored {
    pub(crate) root: PathBuf,
    pub(crate) port: u16,
    installation: Installation,
}

pub(crate) async fn recover(
    store: &Arc<MemoryStore>,
    spec: &BackupSpec,
    node: &NodeBackup,
    point: &NodePoint,
    source: &Cluster,
    root: &Path,
) -> Restored {
    let data = root.join("data");
    extract(store, spec, node, &data, root).await;
    fs::write(data.join("backup_label"), &node.backup_label).unwrap();
    let mut map = String::new();
    for tablespace in &node.tablespaces {
        let place = root.join(format!("space {}", tablespace.oid));
        symlink(&place, data.join(format!("pg_tblspc/{}", tablespace.oid))).unwrap();
        writeln!(map, "{} {}", tablespace.oid, place.display()).unwrap();
    }
    let lines = node.tablespace_map.as_deref().unwrap_or_default().lines();
    assert_eq!(lines.count(), node.tablespaces.len());
    fs::write(data.join("tablespace_map"), map).unwrap();

    let archive = root.join("archive");
    fs::create_dir(&archive).unwrap();
    let mut names = Vec::new();
    for listed in list_segments(&**store, spec.node_id, &spec.epoch)
        .await
        .unwrap()
    {
        let file = WalFile {
            node: spec.node_id,
            epoch: spec.epoch.clone(),
            name: listed.name,
        };
        let bytes = read_segment(&**store, &file, 16 << 20).await.unwrap();
        names.push(file.name.as_str().to_owned());
        fs::write(archive.join(file.name.as_str()), bytes).unwrap();
    }
    assert_eq!(names.first(), Some(&node.wal_first));
    assert!(names.contains(&point.wal_last));
    assert_eq!(node.wal_last, point.wal_last);

    let port = os::free_port();
    let settings = format!(
        "port = {port}\nlisten_addresses = ''\nunix_socket_directories = '{root}'\nmax_connections = 60\n\
         max_wal_senders = 10\nrestore_command = 'cp \"{archive}/%f\" \"%p\"'\nrecovery_target_name = '{point}'\n\
         recovery_target_timeline = '{timeline}'\nrecovery_target_action = 'promote'\n",
        root = root.display(),
        archive = archive.display(),
        point = point.restore_point,
        timeline = point.timeline,
    );
    fs::write(data.join("postgresql.conf"), settings).unwrap();
    fs::write(data.join("pg_hba.conf"), "local all all trust\n").unwrap();
    fs::write(data.join("pg_ident.conf"), "").unwrap();
    fs::write(data.join("recovery.signal"), "").unwrap();
    give_all(root);
    let installation = source.installation().clone();
    let log = root.join("server.log");
    let started = os::command(installation.bindir.join("pg_ctl"))
        .args(["start", "-w", "-t", "120", "-D"])
        .arg(&data)
        .arg("-l")
        .arg(&log)
        .current_dir(root)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .status()
        .unwrap();
    let read = || fs::read_to_string(&log).unwrap_or_default();
    assert!(started.success(), "{}", read());
    // Before that it is only a standby that answers.
    for _ in 0..600 {
        if read().contains("ready to accept connections") {
            break;
        }
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    let log = read();
    assert!(log.contains("recovery stopping at restore point"), "{log}");
    Restored {
        root: root.to_owned(),
        port,
        installation,
    }
}

async fn extract(
    store: &Arc<MemoryStore>,
    spec: &BackupSpec,
    node: &NodeBackup,
    data: &Path,
    root: &Path,
) {
    let downloader = Downloader::new(
        Arc::clone(store) as Arc<dyn ObjectStore>,
        Budget::new(64 << 20),
        Throttle::new(None),
        Arc::new(Meter::default()),
        CancellationToken::new(),
    );
    let key = keys::index(&spec.backup_id, spec.node_id, spec.attempt);
    let index = Index::open_with(downloader.clone(), key, &node.index).unwrap();
    let key_of = |number| keys::pack(&spec.backup_id, spec.node_id, spec.attempt, number);
    let packs: Vec<_> = node
        .packs
        .iter()
        .map(|pack| (key_of(pack.number), pack.clone()))
        .collect();
    fs::create_dir(data).unwrap();
    fs::set_permissions(data, fs::Permissions::from_mode(0o700)).unwrap();
    let map = |entry: &IndexEntry| {
        for tablespace in &node.tablespaces {
            let prefix = format!("pg_tblspc/{}", tablespace.oid);
            if let Some(rest) = entry.path.strip_prefix(&prefix) {
                let place = format!("space {}{rest}", tablespace.oid);
                return Ok(Some(root.join(place)));
            }
        }
        Ok(Some(data.join(&entry.path)))
    };
    let options = ExtractOptions::default();
    let extracted = pipeline::extract::extract(&downloader, &index, &packs, options, map).await;
    assert_eq!(extracted.unwrap().files, node.files);
}

fn give_all(path: &Path) {
    os::give(path);
    if fs::symlink_metadata(path).unwrap().is_dir() {
        for entry in fs::read_dir(path).unwrap() {
            let path = entry.unwrap().path();
            if !path.is_symlink() {
                give_all(&path);
            }
        }
    }
}

impl Restored {
    fn client(&self, program: &str) -> Command {
        let mut command = os::command(self.installation.bindir.join(program));
        command.arg("-h").arg(&self.root);
        command.args(["-p", &self.port.to_string(), "-U", "postgres"]);
        command.current_dir(&self.root);
        command
    }

    /// Every index against its heap, every page's checksum read on the way.
    pub(crate) fn amcheck(&self, database: &str) {
        let output = self
            .client("pg_amcheck")
            .args(["--heapallindexed", "-d", database])
            .output()
            .unwrap();
        assert!(output.status.success(), "{output:?}");
        assert_eq!(output.stdout, b"", "{output:?}");
    }
}

impl Restored {
    fn stop(&self) {
        let _ = os::command(self.installation.bindir.join("pg_ctl"))
            .args(["stop", "-m", "fast", "-w", "-D"])
            .arg(self.root.join("data"))
            .output();
    }

    /// Stops it and verifies every page.
    pub(crate) fn checksums(&self) {
        self.stop();
        let output = os::command(self.installation.bindir.join("pg_checksums"))
            .arg("--check")
            .arg(self.root.join("data"))
            .output()
            .unwrap();
        assert!(output.status.success(), "{output:?}");
    }
}

impl Drop for Restored {
    fn drop(&mut self) {
        self.stop();
    }
}
