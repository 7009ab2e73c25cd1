//! A catalog that the real program writes into a plain directory, put into a store by hand: reading it back must not
//! depend on the engine that makes such copies.

use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;

use agent_api::{ChainLink, RestoreSpec};
use agent_wal::{Lsn, SegmentName};
use catalog::ids::BackupId;
use catalog::keys;
use catalog::model::{
    Attachment, AttachmentRole, BackupMode, NodeBackup, ParentCopy, Probackup, StreamedWal,
    Tablespace,
};
use jiff::Timestamp;
use pipeline::index::{FilePacker, IndexBuilder};
use pipeline::pack::{EntryKind, IndexEntry, PackOptions, PackSet};
use serde_json::json;
use support::os::Scratch;
use support::postgres::Cluster;

use crate::source::{Copy, Source, file};

/// A cluster, its catalog in a directory, and the repository in memory that gets what is in there.
pub(crate) struct Catalog<'a> {
    program: &'a Path,
    pub(crate) path: PathBuf,
    cluster: &'a Cluster,
    pub(crate) source: Source,
    /// The copies so far.
    pub(crate) chain: Vec<ChainLink>,
}

impl<'a> Catalog<'a> {
    pub(crate) async fn create(program: &'a Path, scratch: &Scratch, cluster: &'a Cluster) -> Self {
        let path = scratch.path().join("catalog");
        let catalog = Self {
            program,
            path,
            cluster,
            source: Source::register(cluster).await,
            chain: Vec::new(),
        };
        catalog.run(&["init"]);
        let data = cluster.data_directory().display().to_string();
        catalog.run(&["add-instance", "--instance", "node", "-D", &data]);
        catalog
    }

    fn run(&self, args: &[&str]) {
        let catalog = self.path.display().to_string();
        let output = Command::new(self.program)
            .args(args)
            .args(["-B", &catalog])
            .output()
            .unwrap();
        let said = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{args:?}: {said}");
    }

    /// Makes the next copy: a FULL first, then increments each on the one before. What a client would ask for to get it back is
    /// made by [`Self::spec`].
    pub(crate) async fn backup(&mut self, mode: BackupMode, outside: &[PathBuf]) {
        let before = self.ids();
        let (port, socket) = (
            self.cluster.port().to_string(),
            self.cluster.socket_directory().display().to_string(),
        );
        let mut command = Command::new(self.program);
        command
            .arg("backup")
            .arg("-B")
            .arg(&self.path)
            .args([
                "--instance",
                "node",
                "-b",
                mode.name(),
                "--stream",
                "--temp-slot",
                "-j",
                "2",
            ])
            .args([
                "--no-validate",
                "--no-sync",
                "-U",
                "postgres",
                "-d",
                "postgres",
            ])
            .args(["-h", &socket, "-p", &port]);
        let running = tokio::task::spawn_blocking(move || command.output().unwrap());
        // So that its stream has segments that are complete.
        while !running.is_finished() {
            let fill = "CREATE TABLE IF NOT EXISTS filler (i int); INSERT INTO filler VALUES (1)";
            self.cluster.execute(fill).await;
            self.cluster.execute("SELECT pg_switch_wal()").await;
            tokio::time::sleep(std::time::Duration::from_millis(100)).await;
        }
        let output = running.await.unwrap();
        let said = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{said}");
        let mut ids = self.ids();
        ids.retain(|id| !before.contains(id));
        let id = ids.pop().unwrap();
        self.source.backup = BackupId::generate(Timestamp::now(), mode == BackupMode::Full);
        let control = self.control(&id);
        let streamed = self.stream(&id, &control["stop-lsn"]).await;
        let attachments: Vec<Attachment> = outside
            .iter()
            .map(|path| Attachment {
                path: format!("attachments{}", path.display()),
                source: path.display().to_string(),
                role: AttachmentRole::Hba,
                extra: serde_json::Map::new(),
            })
            .collect();
        let copy = self.pack(&id, &control, &streamed, &attachments).await;
        let parent = self.chain.last().map(|link| ParentCopy {
            backup_id: link.backup_id.clone(),
            attempt: link.node.attempt,
            id: link.node.probackup.as_ref().unwrap().id.clone(),
        });
        let probackup = Probackup {
            program: "pg_probackup".into(),
            version: "2.5".into(),
            instance: "node".into(),
            id,
            mode,
            parent,
            external: Vec::new(),
            wal: streamed,
            extra: serde_json::Map::new(),
        };
        let spec = self
            .source
            .finish(self.cluster, copy, Path::new("/nowhere"))
            .await;
        let node = NodeBackup {
            probackup: Some(probackup),
            ..spec.node
        };
        self.chain.push(ChainLink {
            backup_id: self.source.backup.clone(),
            node,
        });
    }

    /// The order to bring copy `number` back at a point that is made now.
    pub(crate) async fn spec(&mut self, number: usize, target: &Path) -> RestoreSpec {
        let link = self.chain[number].clone();
        let node = &link.node;
        let copy = Copy {
            tablespaces: node.tablespaces.clone(),
            attachments: node.attachments.clone(),
            packs: node.packs.clone(),
            index: node.index.clone(),
            plain_bytes: node.plain_bytes,
            start: node.start_lsn.parse().unwrap(),
            stop: json!({ "lsn": node.stop_lsn, "labelfile": node.backup_label, "spcmapfile": node.tablespace_map }),
        };
        self.source.backup = link.backup_id.clone();
        let spec = self.source.finish(self.cluster, copy, target).await;
        RestoreSpec {
            chain: self.chain[..number].to_vec(),
            node: NodeBackup {
                probackup: node.probackup.clone(),
                ..spec.node
            },
            ..spec
        }
    }

    pub(crate) fn ids(&self) -> Vec<String> {
        let directory = self.path.join("backups/node");
        let entries = fs::read_dir(directory).unwrap().map(|entry| entry.unwrap());
        let directories = entries.filter(|entry| entry.file_type().unwrap().is_dir());
        directories
            .map(|entry| entry.file_name().into_string().unwrap())
            .collect()
    }

    fn control(&self, id: &str) -> std::collections::BTreeMap<String, String> {
        let path = self.path.join("backups/node").join(id);
        let text = fs::read_to_string(path.join("backup.control")).unwrap();
        text.lines()
            .filter_map(|line| line.split_once(" = "))
            .map(|(name, value)| (name.to_owned(), value.to_owned()))
            .collect()
    }

    /// Puts the complete segments of a copy's stream where the node's WAL is.
    async fn stream(&self, id: &str, stop: &str) -> Vec<StreamedWal> {
        let control = &self.source.control;
        let stop: Lsn = stop.parse().unwrap();
        let last = SegmentName::before_lsn(control.timeline, stop, control.wal_segment_size);
        let last = last.format(control.wal_segment_size);
        let path = format!("backups/node/{id}/database/pg_wal");
        let mut streamed = Vec::new();
        for entry in fs::read_dir(self.path.join(&path)).unwrap() {
            let segment = entry.unwrap().file_name().into_string().unwrap();
            if segment.len() != 24 || segment >= last {
                continue;
            }
            self.source.put_wal(self.cluster, &segment).await;
            streamed.push(StreamedWal {
                path: format!("{path}/{segment}"),
                segment,
                size: control.wal_segment_size.bytes(),
            });
        }
        streamed.sort_by(|a, b| a.path.cmp(&b.path));
        streamed
    }

    async fn pack(
        &self,
        id: &str,
        control: &std::collections::BTreeMap<String, String>,
        streamed: &[StreamedWal],
        attachments: &[Attachment],
    ) -> Copy {
        let (backup, node) = (self.source.backup.clone(), self.source.node);
        let key_of = Arc::new(move |number| keys::pack(&backup, node, 1, number));
        let options = PackOptions {
            lanes: 1,
            ..PackOptions::default()
        };
        let (set, lanes) = PackSet::new(&self.source.uploader, key_of, options).unwrap();
        let builder = Arc::new(IndexBuilder::new());
        let lane = lanes.into_iter().next().unwrap();
        let mut packer = FilePacker::new(lane, Arc::clone(&builder));
        let (root, own) = (self.path.clone(), format!("backups/node/{id}"));
        let left_out: Vec<String> = streamed.iter().map(|wal| wal.path.clone()).collect();
        let (index, outside) = (Arc::clone(&builder), attachments.to_vec());
        let packing = tokio::task::spawn_blocking(move || {
            let mut bytes = 0;
            for directory in ["backups", "backups/node", &own] {
                add_directory(&root, directory, &index);
            }
            let conf = "backups/node/pg_probackup.conf";
            file(&root.join(conf), conf, &mut packer, &index, &mut bytes);
            let mut rest = vec![own];
            while let Some(directory) = rest.pop() {
                for entry in fs::read_dir(root.join(&directory)).unwrap() {
                    let name = entry.unwrap().file_name().into_string().unwrap();
                    let path = format!("{directory}/{name}");
                    if root.join(&path).is_dir() {
                        add_directory(&root, &path, &index);
                        rest.push(path);
                    } else if !left_out.contains(&path) && name != "backup.pid" {
                        file(&root.join(&path), &path, &mut packer, &index, &mut bytes);
                    }
                }
            }
            for attachment in &outside {
                let (at, path) = (Path::new(&attachment.source), &attachment.path);
                file(at, path, &mut packer, &index, &mut bytes);
            }
            packer.finish().unwrap();
            bytes
        });
        let plain_bytes = packing.await.unwrap();
        let key = keys::index(&self.source.backup, self.source.node, 1);
        let database = self.path.join("backups/node").join(id).join("database");
        let text = |name: &str| fs::read_to_string(database.join(name)).unwrap_or_default();
        let map = text("tablespace_map");
        let tablespaces = map.lines().filter_map(|line| {
            let (oid, location) = line.split_once(' ')?;
            Some(Tablespace {
                oid: oid.parse().ok()?,
                location: location.to_owned(),
                extra: serde_json::Map::new(),
            })
        });
        Copy {
            tablespaces: tablespaces.collect(),
            attachments: attachments.to_vec(),
            packs: set.finish().await.unwrap(),
            index: builder.write(&self.source.uploader, key).await.unwrap(),
            plain_bytes,
            start: control["start-lsn"].parse().unwrap(),
            stop: json!({ "lsn": control["stop-lsn"], "labelfile": text("backup_label"), "spcmapfile": map }),
        }
    }
}

fn add_directory(root: &Path, path: &str, index: &IndexBuilder) {
    let mode = fs::metadata(root.join(path)).unwrap().permissions().mode();
    let entry = IndexEntry {
        path: path.to_owned(),
        mode: mode & 0o7777,
        mtime: None,
        kind: EntryKind::Directory,
    };
    index.add(entry).unwrap();
}
