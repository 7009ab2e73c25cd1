//! What can be mended without a doubt: entries that the log lacks, and missing objects that the local mirror still has.
//!
//! Nothing is ever overwritten: an object that is there and damaged stays for a person to look at.

use std::fmt;

use bytes::Bytes;
use pipeline::store::{Key, ObjectStore, StoreError};
use uuid::Uuid;

use super::inventory::Kind;
use crate::envelope::{self, MANIFEST_LIMIT, OBJECT_LIMIT, sha256_hex};
use crate::error::CatalogError;
use crate::keys;
use crate::model::{LogAction, Manifest, ManifestState};
use crate::put::{self, Outcome};
use crate::repo::Catalog;

/// One thing that can be mended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Repair {
    /// An entry is added to the log for an object that is there.
    LogEntry {
        /// The object.
        key: Key,
        /// SHA-256 (hex) of its stored bytes.
        sha256: String,
    },
    /// A missing object is created again from the mirror's bytes, whose SHA-256 is the one that the log names.
    PutBack {
        /// The object.
        key: Key,
        /// Its stored bytes.
        bytes: Bytes,
    },
}

/// What became of a [`Repair`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Repaired {
    /// It was done.
    Done,
    /// It was not needed any more: somebody did it meanwhile, or the object has gone.
    NotNeeded,
}

impl fmt::Display for Repair {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::LogEntry { key, .. } => write!(f, "add a log entry for `{key}`"),
            Self::PutBack { key, .. } => write!(f, "put `{key}` back from the local mirror"),
        }
    }
}

impl Repair {
    /// The object that it is about.
    #[must_use]
    pub fn key(&self) -> &Key {
        match self {
            Self::LogEntry { key, .. } | Self::PutBack { key, .. } => key,
        }
    }

    /// Whether it brings `repository.json` back, without which there is no catalog to mend anything else:
    /// see [`put_back_repository`].
    #[must_use]
    pub fn opens_repository(&self) -> bool {
        self.is_put_back() && *self.key() == keys::repository()
    }

    /// Whether it has to come first: an entry belongs after those that were lost.
    #[must_use]
    pub fn is_put_back(&self) -> bool {
        matches!(self, Self::PutBack { .. })
    }
}

/// Puts `repository.json` back. It was written once and never changes, so no lease is needed, and none could be had.
///
/// # Errors
/// As [`Catalog::repair`]; [`CatalogError::Refused`] for any other repair.
pub async fn put_back_repository(
    store: &dyn ObjectStore,
    repair: &Repair,
) -> Result<(), CatalogError> {
    let Repair::PutBack { key, bytes } = repair else {
        return Err(CatalogError::refused(
            repair.key(),
            "it is no missing object",
        ));
    };
    if !repair.opens_repository() {
        return Err(CatalogError::refused(key, "it is put back under a lease"));
    }
    create(store, key, bytes).await.map(drop)
}

async fn create(
    store: &dyn ObjectStore,
    key: &Key,
    bytes: &Bytes,
) -> Result<Repaired, CatalogError> {
    let theirs = match envelope::fetch(store, key, MANIFEST_LIMIT).await {
        Ok(there) => there,
        Err(error) if error.is_absent() => {
            match put::create(store, key, bytes, MANIFEST_LIMIT).await? {
                Outcome::Ours => return Ok(Repaired::Done),
                Outcome::Theirs(theirs) => theirs,
            }
        }
        Err(error) => return Err(error),
    };
    if theirs == *bytes {
        return Ok(Repaired::NotNeeded);
    }
    Err(CatalogError::conflict(key, "another object is there now"))
}

/// What the log calls the creation of an object. A manifest that is a fence is no backup: an entry that calls it one
/// would have everybody look for a backup that never was.
fn creation(key: &Key, stored: &[u8]) -> Result<LogAction, CatalogError> {
    Ok(match Kind::of(key) {
        Kind::Repository => LogAction::RepositoryCreated,
        Kind::Node(_) => LogAction::NodeRegistered,
        Kind::Epoch(..) => LogAction::EpochOpened,
        Kind::Point(_) => LogAction::PointCreated,
        Kind::Manifest(_) => match envelope::open::<Manifest>(key, stored)?.state {
            ManifestState::Complete => LogAction::BackupCommitted,
            ManifestState::Abandoned => LogAction::BackupAbandoned,
        },
        Kind::Tombstone(_) => LogAction::BackupDeleted,
        Kind::Gap(..) => LogAction::GapDeclared,
        _ => {
            let what = "the log has no entries of such objects";
            return Err(CatalogError::refused(key, what));
        }
    })
}

impl Catalog {
    /// Mends one thing. Hold the lease `maintain`, and do those first that put something back.
    ///
    /// # Errors
    /// [`CatalogError::Conflict`] if another object is there now; [`CatalogError::Store`]: it may have been done,
    /// and may be done again.
    pub async fn repair(&self, repair: &Repair, operation: Uuid) -> Result<Repaired, CatalogError> {
        match repair {
            Repair::LogEntry { key, sha256 } => self.add_entry(key, sha256, operation).await,
            Repair::PutBack { key, bytes } => self.put_back(key, bytes).await,
        }
    }

    async fn add_entry(
        &self,
        key: &Key,
        sha256: &str,
        operation: Uuid,
    ) -> Result<Repaired, CatalogError> {
        let limit = match Kind::of(key) {
            Kind::Manifest(_) => MANIFEST_LIMIT,
            _ => OBJECT_LIMIT,
        };
        let action = match self.fetch(key, limit).await {
            Ok(stored) if sha256_hex(&stored) == sha256 => creation(key, &stored)?,
            Ok(_) => {
                return Err(CatalogError::conflict(
                    key,
                    "it has changed since it was verified",
                ));
            }
            Err(error) if error.is_absent() => return Ok(Repaired::NotNeeded),
            Err(error) => return Err(error),
        };
        // Its writer may have been slow and not dead: the newest entries are looked at again.
        if self.is_logged(key).await? {
            return Ok(Repaired::NotNeeded);
        }
        self.append_log(action, key, sha256, operation).await?;
        Ok(Repaired::Done)
    }

    async fn put_back(&self, key: &Key, bytes: &Bytes) -> Result<Repaired, CatalogError> {
        if let Kind::Manifest(id) = Kind::of(key) {
            match self.store().head(&keys::tombstone(&id)).await {
                Ok(_) => return Ok(Repaired::NotNeeded),
                Err(StoreError::NotFound(_)) => {}
                Err(error) => return Err(error.into()),
            }
        }
        create(&**self.store(), key, bytes).await
    }
}
