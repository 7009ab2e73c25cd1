//! Copies made by `gs_probackup` or `pg_probackup`, and what they build on.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use super::Extra;
use crate::ids::BackupId;

/// What makes the copy of a node.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Engine {
    /// The agent reads the data directory itself.
    Direct,
    /// `gs_probackup` or `pg_probackup` writes into the agent's mount.
    Probackup,
}

impl Engine {
    /// Its name, as in manifests.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Direct => "direct",
            Self::Probackup => "probackup",
        }
    }
}

impl fmt::Display for Engine {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// Whether a backup stands for itself, or how it finds what changed since its parent.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "UPPERCASE")]
pub enum BackupMode {
    /// Everything.
    Full,
    /// Pages that the server noted as changed.
    Ptrack,
    /// Pages whose LSN is newer; reads everything.
    Delta,
    /// Pages that archived WAL names.
    Page,
}

impl BackupMode {
    /// Its name, as in manifests and on probackup's command line.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Full => "FULL",
            Self::Ptrack => "PTRACK",
            Self::Delta => "DELTA",
            Self::Page => "PAGE",
        }
    }

    /// Whether it needs a parent.
    #[must_use]
    pub fn is_increment(self) -> bool {
        self != Self::Full
    }
}

impl fmt::Display for BackupMode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for BackupMode {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        [Self::Full, Self::Ptrack, Self::Delta, Self::Page]
            .into_iter()
            .find(|mode| mode.name().eq_ignore_ascii_case(text))
            .ok_or_else(|| format!("`{text}` is none of FULL, PTRACK, DELTA and PAGE"))
    }
}

/// What a copy's index holds if `gs_probackup` or `pg_probackup` made it: the files of a backup catalog with this one
/// backup in it, by their paths in that catalog (`backups/<instance>/<id>/...` and
/// `backups/<instance>/pg_probackup.conf`), all but the WAL named in `wal`. Attachments lie beside them.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Probackup {
    /// `gs_probackup` or `pg_probackup`.
    pub program: String,
    /// Its version, as it says.
    pub version: String,
    /// Instance in the catalog.
    pub instance: String,
    /// Its own id of the backup: the start in seconds since 1970, in base 36.
    pub id: String,
    /// What the copy is.
    pub mode: BackupMode,
    /// The copy that it builds on.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub parent: Option<ParentCopy>,
    /// Tablespaces that lie in it as external directories.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub external: Vec<External>,
    /// Files of the catalog that are WAL segments of the node's epoch, and lie in the bucket as such.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub wal: Vec<StreamedWal>,
    /// See [`Extra`].
    #[serde(flatten)]
    pub extra: Extra,
}

/// The copy that an increment builds on: the same node's in another backup.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ParentCopy {
    /// The backup.
    pub backup_id: BackupId,
    /// Which try of the node it is there.
    pub attempt: u32,
    /// Its id in the program's catalog.
    pub id: String,
}

/// A directory outside the data directory that the program was given with `-E`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct External {
    /// Number of its `externaldir`, from 1.
    pub number: u32,
    /// OID of the tablespace that it is.
    pub oid: u32,
    /// Absolute path on the source.
    pub location: String,
}

/// A WAL segment that a copy's own stream brought.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct StreamedWal {
    /// Its path in the catalog.
    pub path: String,
    /// Name of the segment in the node's epoch.
    pub segment: String,
    /// Plain bytes.
    pub size: u64,
}
