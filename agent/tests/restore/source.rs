//! A database that is copied by hand into a store, as plainly as can be: the restore under test must not
//! depend on the engine that makes backups.

use std::fs;
use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use agent_api::RestoreSpec;
use agent_wal::control::ControlFile;
use agent_wal::{Lsn, SegmentName};
use async_trait::async_trait;
use catalog::ids::{BackupId, EpochId};
use catalog::keys;
use catalog::model::{Attachment, AttachmentRole, NodeBackup, NodePoint, Tablespace};
use catalog::repo::{Catalog, NewEpoch, NewNode};
use catalog::wal;
use jiff::Timestamp;
use pipeline::budget::Budget;
use pipeline::index::{FilePacker, IndexBuilder};
use pipeline::meter::Meter;
use pipeline::pack::{EntryKind, IndexEntry, IndexInfo, PackInfo, PackOptions, PackSet};
use pipeline::store::{Key, ObjectStore, StoreError};
use pipeline::throttle::Throttle;
use pipeline::upload::{UploadJournal, Uploader};
use serde_json::Value;
use support::memory_store::MemoryStore;
use support::postgres::{Cluster, query_one};
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

#[derive(Debug)]
struct NoJournal;

#[async_trait]
impl UploadJournal for NoJournal {
    async fn intend(&self, _: &Key) -> Result<(), StoreError> {
        Ok(())
    }
}

/// A node in a repository in memory.
pub(crate) struct Source {
    pub(crate) store: Arc<MemoryStore>,
    pub(crate) uploader: Uploader,
    pub(crate) backup: BackupId,
    pub(crate) node: Uuid,
    epoch: EpochId,
    pub(crate) control: ControlFile,
    major: u32,
}

/// A copy whose WAL and point are still to come.
pub(crate) struct Copy {
    pub(crate) tablespaces: Vec<Tablespace>,
    pub(crate) attachments: Vec<Attachment>,
    pub(crate) packs: Vec<PackInfo>,
    pub(crate) index: IndexInfo,
    pub(crate) plain_bytes: u64,
    pub(crate) start: Lsn,
    pub(crate) stop: Value,
}

impl Source {
    /// Registers the cluster in a new repository.
    pub(crate) async fn register(cluster: &Cluster) -> Self {
        let control = fs::read(cluster.data_directory().join("global/pg_control")).unwrap();
        let control = ControlFile::parse(&control).unwrap();
        let store = Arc::new(MemoryStore::default());
        let operation = Uuid::new_v4();
        let dynamic: Arc<dyn ObjectStore> = Arc::<MemoryStore>::clone(&store);
        let catalog = Catalog::open_or_create(Arc::clone(&dynamic), operation)
            .await
            .unwrap();
        let node = NewNode {
            system_identifier: control.system_identifier,
            host: "source".into(),
            port: cluster.port(),
        };
        let node = catalog
            .register_node(node, operation)
            .await
            .unwrap()
            .node_id;
        let epoch = NewEpoch {
            node_id: node,
            parent: None,
            timeline: control.timeline,
            machine_id: "m".into(),
            data_directory: cluster.data_directory().display().to_string(),
            host: "source".into(),
            port: cluster.port(),
        };
        let epoch = catalog.start_epoch(epoch, operation).await.unwrap().epoch;
        let uploader = Uploader::new(
            dynamic,
            Budget::new(64 << 20),
            Throttle::new(None),
            Arc::new(NoJournal),
            Arc::new(Meter::default()),
            CancellationToken::new(),
        );
        Self {
            store,
            uploader: uploader.unwrap(),
            backup: BackupId::generate(Timestamp::now(), true),
            node,
            epoch,
            control,
            major: cluster.installation().major,
        }
    }

    /// Copies the running cluster, with the configuration files in `outside`.
    pub(crate) async fn copy(
        &self,
        cluster: &Cluster,
        outside: &[(&Path, AttachmentRole)],
    ) -> Copy {
        let session = cluster.connect("postgres").await;
        let old = self.major <= 14;
        let start = if old {
            "pg_start_backup('t', true, false)"
        } else {
            "pg_backup_start('t', true)"
        };
        let start = query_one(&session, &format!("SELECT {start}")).await;
        let data = cluster.data_directory();
        let attachments: Vec<Attachment> = outside
            .iter()
            .map(|(path, role)| Attachment {
                path: format!("attachments{}", path.display()),
                source: path.display().to_string(),
                role: *role,
                extra: serde_json::Map::new(),
            })
            .collect();
        let mut tablespaces = Vec::new();
        for entry in fs::read_dir(data.join("pg_tblspc")).unwrap() {
            let entry = entry.unwrap();
            tablespaces.push(Tablespace {
                oid: entry.file_name().to_str().unwrap().parse().unwrap(),
                location: fs::read_link(entry.path()).unwrap().display().to_string(),
                extra: serde_json::Map::new(),
            });
        }
        let (packs, index, plain_bytes) = self.pack(&data, &attachments).await;
        let stop = if old {
            "pg_stop_backup(false, false)"
        } else {
            "pg_backup_stop(false)"
        };
        let stop = query_one(
            &session,
            &format!("SELECT row_to_json(x)::text FROM {stop} x"),
        )
        .await;
        Copy {
            tablespaces,
            attachments,
            packs,
            index,
            plain_bytes,
            start: start.parse().unwrap(),
            stop: serde_json::from_str(&stop).unwrap(),
        }
    }

    async fn pack(
        &self,
        data: &Path,
        attachments: &[Attachment],
    ) -> (Vec<PackInfo>, IndexInfo, u64) {
        let (backup, node) = (self.backup.clone(), self.node);
        let key_of = Arc::new(move |number| keys::pack(&backup, node, 1, number));
        let options = PackOptions {
            lanes: 1,
            ..PackOptions::default()
        };
        let (set, lanes) = PackSet::new(&self.uploader, key_of, options).unwrap();
        let builder = Arc::new(IndexBuilder::new());
        let lane = lanes.into_iter().next().unwrap();
        let mut packer = FilePacker::new(lane, Arc::clone(&builder));
        let (data, attachments, index) =
            (data.to_owned(), attachments.to_vec(), Arc::clone(&builder));
        let packing = tokio::task::spawn_blocking(move || {
            let mut bytes = 0;
            walk(&data, "", &mut packer, &index, &mut bytes);
            for attachment in &attachments {
                file(
                    Path::new(&attachment.source),
                    &attachment.path,
                    &mut packer,
                    &index,
                    &mut bytes,
                );
            }
            // As the server writes it last, so it is read last.
            let control = data.join("global/pg_control");
            file(
                &control,
                "global/pg_control",
                &mut packer,
                &index,
                &mut bytes,
            );
            packer.finish().unwrap();
            bytes
        });
        let bytes = packing.await.unwrap();
        let packs = set.finish().await.unwrap();
        let key = keys::index(&self.backup, self.node, 1);
        (
            packs,
            builder.write(&self.uploader, key).await.unwrap(),
            bytes,
        )
    }

    /// Makes a restore point and puts the WAL from the copy to it into the store; what a client would ask
    /// for then.
    pub(crate) async fn finish(&self, cluster: &Cluster, copy: Copy, target: &Path) -> RestoreSpec {
        let name = format!("gs_pitr_{}", Uuid::new_v4().simple());
        let session = cluster.connect("postgres").await;
        let end = query_one(
            &session,
            &format!("SELECT pg_create_restore_point('{name}')"),
        )
        .await;
        let end: Lsn = end.parse().unwrap();
        // More of it than the point needs, so that a recovery that does not stop is found out.
        cluster
            .execute("CREATE TABLE IF NOT EXISTS after_the_point (i int)")
            .await;
        query_one(&session, "SELECT pg_switch_wal()").await;
        cluster
            .execute("INSERT INTO after_the_point VALUES (1); CHECKPOINT")
            .await;
        let size = self.control.wal_segment_size;
        let timeline = self.control.timeline;
        let (first, last) = (
            SegmentName::of_lsn(timeline, copy.start, size),
            SegmentName::before_lsn(timeline, end, size),
        );
        for number in first.number..=last.number {
            let name = SegmentName { timeline, number }.format(size);
            self.put_wal(cluster, &name).await;
        }
        for entry in fs::read_dir(cluster.data_directory().join("pg_wal")).unwrap() {
            let name = entry.unwrap().file_name().into_string().unwrap();
            if name.ends_with(".history") {
                self.put_wal(cluster, &name).await;
            }
        }
        let text = |name: &str| copy.stop[name].as_str().unwrap_or_default().to_owned();
        let (wal_first, wal_last) = (first.format(size), last.format(size));
        let node = NodeBackup {
            node_id: self.node,
            attempt: 1,
            epoch: self.epoch.clone(),
            host: "source".into(),
            port: cluster.port(),
            system_identifier: self.control.system_identifier,
            flavour: "postgresql".into(),
            server_version_num: self.major * 10_000,
            control_version: self.control.control_version,
            catalog_version: self.control.catalog_version,
            wal_segment_size: size.bytes(),
            data_checksums: false,
            timeline,
            start_lsn: copy.start.to_string(),
            stop_lsn: text("lsn"),
            started: Timestamp::now(),
            completed: Timestamp::now(),
            data_directory: cluster.data_directory().display().to_string(),
            tablespaces: copy.tablespaces,
            backup_label: text("labelfile"),
            tablespace_map: Some(text("spcmapfile")).filter(|map| !map.is_empty()),
            argv: vec![
                "-D".into(),
                "/nowhere".into(),
                "-c".into(),
                "work_mem=7MB".into(),
            ],
            attachments: copy.attachments,
            wal_first: wal_first.clone(),
            wal_last: wal_last.clone(),
            packs: copy.packs,
            files: copy.index.entries,
            index: copy.index,
            plain_bytes: copy.plain_bytes,
            stored_bytes: 0,
            corrupt_pages: Vec::new(),
            probackup: None,
            extra: serde_json::Map::new(),
        };
        let point = NodePoint {
            node_id: self.node,
            epoch: self.epoch.clone(),
            timeline,
            restore_point: name,
            record_lsn: end.to_string(),
            end_lsn: end.to_string(),
            made: Timestamp::now(),
            wal_first,
            wal_last,
            extra: serde_json::Map::new(),
        };
        RestoreSpec {
            backup_id: self.backup.clone(),
            node,
            chain: Vec::new(),
            point,
            restore: uuid::Uuid::now_v7(),
            nodes: vec![self.node],
            target: target.display().to_string(),
            place: agent_api::Place::Fresh,
            port: Some(support::os::free_port()),
            jobs: 2,
            start: true,
            stop_early: false,
        }
    }

    pub(crate) async fn put_wal(&self, cluster: &Cluster, name: &str) {
        let path: PathBuf = cluster.data_directory().join("pg_wal").join(name);
        let plain = fs::read(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
        wal::put_segment(&self.uploader, &self.wal_file(name), 1, plain.as_slice())
            .await
            .unwrap();
    }

    /// One WAL file of the node.
    pub(crate) fn wal_file(&self, name: &str) -> wal::WalFile {
        wal::WalFile {
            node: self.node,
            epoch: self.epoch.clone(),
            name: name.parse().unwrap(),
        }
    }
}

fn walk(
    at: &Path,
    path: &str,
    packer: &mut FilePacker,
    index: &Arc<IndexBuilder>,
    bytes: &mut u64,
) {
    const EMPTIED: [&str; 5] = [
        "pg_wal",
        "pg_replslot",
        "pg_notify",
        "pg_subtrans",
        "pg_stat_tmp",
    ];
    for entry in fs::read_dir(at).unwrap() {
        let entry = entry.unwrap();
        let name = entry.file_name().into_string().unwrap();
        let below = if path.is_empty() {
            name.clone()
        } else {
            format!("{path}/{name}")
        };
        let Ok(metadata) = fs::metadata(entry.path()) else {
            continue;
        };
        if name.starts_with("postmaster.") || below == "global/pg_control" {
            continue;
        }
        if !metadata.is_dir() {
            file(&entry.path(), &below, packer, index, bytes);
            continue;
        }
        let directory = IndexEntry {
            path: below.clone(),
            mode: metadata.permissions().mode() & 0o7777,
            mtime: Some(metadata.mtime()),
            kind: EntryKind::Directory,
        };
        index.add(directory).unwrap();
        if !EMPTIED.contains(&below.as_str()) {
            walk(&entry.path(), &below, packer, index, bytes);
        }
    }
}

pub(crate) fn file(
    at: &Path,
    path: &str,
    packer: &mut FilePacker,
    index: &Arc<IndexBuilder>,
    bytes: &mut u64,
) {
    let Ok(content) = fs::read(at) else {
        return;
    };
    let mode = fs::metadata(at).map_or(0o600, |metadata| metadata.permissions().mode() & 0o7777);
    let id = index.file(path, mode, None).unwrap();
    packer.chunk(id, 0, &content).unwrap();
    index.close_file(id, content.len() as u64);
    *bytes += content.len() as u64;
}
