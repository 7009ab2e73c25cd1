//! What a verification says.

use std::collections::BTreeSet;

use pipeline::store::Key;
use serde::Serialize;
use uuid::Uuid;

use super::repair::Repair;
use crate::ids::BackupId;

/// How bad it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Severity {
    /// An object is missing, or its bytes are not what was written.
    Damage,
    /// A step is missing that a crash left out, and a repair takes it.
    Repairable,
    /// Nothing needs it: `prune` removes it.
    Orphan,
    /// Nothing is wrong with what is stored; somebody should know all the same.
    Note,
}

impl Severity {
    /// Its name, as in JSON.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Damage => "damage",
            Self::Repairable => "repairable",
            Self::Orphan => "orphan",
            Self::Note => "note",
        }
    }
}

/// One fact about one object.
#[derive(Debug, Clone, Serialize)]
pub struct Finding {
    /// How bad it is.
    pub severity: Severity,
    /// Key of the object, relative to the prefix.
    pub key: String,
    /// The backup it belongs to.
    pub backup: Option<BackupId>,
    /// The node it belongs to.
    pub node: Option<Uuid>,
    /// What is wrong.
    pub what: String,
    /// Files of the node whose bytes are concerned, some of them if there are many.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub files: Vec<String>,
    /// How many files are concerned.
    #[serde(skip_serializing_if = "is_zero")]
    pub files_total: u64,
    /// Backups that cannot be restored because of it.
    #[serde(rename = "unrestorable")]
    pub lost: BTreeSet<BackupId>,
    /// What to do about it.
    pub next: Option<String>,
}

#[expect(
    clippy::trivially_copy_pass_by_ref,
    reason = "the signature serde asks for"
)]
fn is_zero(value: &u64) -> bool {
    *value == 0
}

impl Finding {
    pub(super) fn new(severity: Severity, key: &Key, what: impl Into<String>) -> Self {
        Self {
            severity,
            key: key.as_str().to_owned(),
            backup: None,
            node: None,
            what: what.into(),
            files: Vec::new(),
            files_total: 0,
            lost: BTreeSet::new(),
            next: None,
        }
    }

    pub(super) fn damage(key: &Key, what: impl Into<String>) -> Self {
        Self::new(Severity::Damage, key, what)
    }

    pub(super) fn note(key: &Key, what: impl Into<String>) -> Self {
        Self::new(Severity::Note, key, what)
    }

    pub(super) fn of_backup(mut self, id: &BackupId) -> Self {
        self.backup = Some(id.clone());
        self
    }

    pub(super) fn of_node(mut self, node: Uuid) -> Self {
        self.node = Some(node);
        self
    }

    pub(super) fn losing<'a>(mut self, ids: impl IntoIterator<Item = &'a BackupId>) -> Self {
        self.lost.extend(ids.into_iter().cloned());
        self
    }

    pub(super) fn next(mut self, next: impl Into<String>) -> Self {
        self.next = Some(next.into());
        self
    }
}

/// All that was found.
#[derive(Debug, Default)]
pub struct Report {
    /// What was found, in the order in which it was.
    pub findings: Vec<Finding>,
    /// Backups that cannot be restored.
    pub unrestorable: BTreeSet<BackupId>,
    /// Backups that were verified, complete and not deleted.
    pub backups: BTreeSet<BackupId>,
    /// Objects that were looked at.
    pub objects: u64,
    /// Stored bytes of packs, indexes and WAL that were read.
    pub stored_bytes: u64,
    /// What a repair would do.
    pub repairs: Vec<Repair>,
}

impl Report {
    /// Whether something is damaged or cannot be restored.
    #[must_use]
    pub fn is_damaged(&self) -> bool {
        !self.unrestorable.is_empty() || self.count(Severity::Damage) > 0
    }

    /// How many findings are so bad.
    #[must_use]
    pub fn count(&self, severity: Severity) -> usize {
        let of = |finding: &&Finding| finding.severity == severity;
        self.findings.iter().filter(of).count()
    }
}
