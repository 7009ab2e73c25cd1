//! What the manifest and the point say of a node.

use std::collections::BTreeMap;

use agent_api::BackupSpec;
use agent_wal::{Lsn, SegmentName};
use catalog::model::{Extra, NodeBackup, Probackup, Tablespace};
use jiff::Timestamp;
use pipeline::pack::{IndexInfo, PackInfo};

use super::node::Node;

/// A copy that is whole in the bucket, all but its WAL.
#[derive(Debug)]
pub struct CopyInBucket {
    /// Start of the backup.
    pub start: Lsn,
    /// Its end.
    pub stop: Lsn,
    /// Timeline of both.
    pub timeline: u32,
    /// When it began.
    pub started: Timestamp,
    /// When it ended.
    pub completed: Timestamp,
    /// `backup_label`
    pub backup_label: String,
    /// `tablespace_map`, if there is one.
    pub tablespace_map: Option<String>,
    /// Tablespaces outside the data directory.
    pub tablespaces: Vec<Tablespace>,
    /// Files.
    pub files: u64,
    /// Bytes read.
    pub plain_bytes: u64,
    /// Pages that are damaged on the source, `path block`.
    pub corrupt_pages: Vec<String>,
    /// Links out of the data directory that were followed.
    pub links: BTreeMap<String, String>,
    /// What the index holds if a probackup made it.
    pub probackup: Option<Probackup>,
    /// The packs.
    pub packs: Vec<PackInfo>,
    /// The index.
    pub index: IndexInfo,
}

impl CopyInBucket {
    /// The first WAL segment it needs.
    #[must_use]
    pub fn first_segment(&self, node: &Node) -> SegmentName {
        SegmentName::of_lsn(self.timeline, self.start, node.segment_size())
    }

    /// The node's part of the manifest; `wal_last` is the last segment in the bucket.
    #[must_use]
    pub fn describe(&self, spec: &BackupSpec, node: &Node, wal_last: SegmentName) -> NodeBackup {
        let size = node.segment_size();
        let wal_first = self.first_segment(node);
        let packed: u64 = self.packs.iter().map(|pack| pack.size).sum();
        let mut extra = Extra::new();
        if !self.links.is_empty() {
            extra.insert("links".into(), self.links.clone().into_iter().collect());
        }
        NodeBackup {
            node_id: spec.node_id,
            attempt: spec.attempt,
            epoch: spec.epoch.clone(),
            host: host_name(),
            port: node.facts.port,
            system_identifier: node.control.system_identifier,
            flavour: node.facts.flavour.name().into(),
            server_version_num: node.facts.server_version_num,
            control_version: node.control.control_version,
            catalog_version: node.control.catalog_version,
            wal_segment_size: size.bytes(),
            data_checksums: node.facts.data_checksums,
            timeline: self.timeline,
            start_lsn: self.start.to_string(),
            stop_lsn: self.stop.to_string(),
            started: self.started,
            completed: self.completed,
            data_directory: node.facts.data_directory.clone(),
            tablespaces: self.tablespaces.clone(),
            backup_label: self.backup_label.clone(),
            tablespace_map: self.tablespace_map.clone(),
            argv: node.argv.clone(),
            attachments: node.attachments.clone(),
            wal_first: wal_first.format(size),
            wal_last: wal_last.format(size),
            stored_bytes: packed + self.index.size,
            packs: self.packs.clone(),
            index: self.index.clone(),
            files: self.files,
            plain_bytes: self.plain_bytes,
            corrupt_pages: self.corrupt_pages.clone(),
            probackup: self.probackup.clone(),
            extra,
        }
    }
}

fn host_name() -> String {
    rustix::system::uname()
        .nodename()
        .to_string_lossy()
        .into_owned()
}
