//! WAL segments and timeline histories as objects of their own.
//!
//! An object is standard zstd frames of at most 1 MiB of plain bytes each, so that `zstd -d` gives the
//! file back, and a skippable frame at its end that says which file it is and carries the SHA-256 of all
//! that is stored before that digest.

mod name;
mod read;
mod trailer;
mod write;

use std::fmt;

use futures_util::TryStreamExt as _;
use pipeline::store::{Key, ObjectStore, StoreError};
use uuid::Uuid;

pub use name::WalName;
pub use read::{get_segment, read_segment};
pub use write::put_segment;

use crate::error::CatalogError;
use crate::ids::EpochId;
use crate::keys;
use crate::model::Epoch;

/// Most plain bytes of a WAL file: PostgreSQL's largest segment, 1 GiB.
pub const WAL_FILE_LIMIT: u64 = 1 << 30;

/// One WAL file of one epoch of a node.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct WalFile {
    /// The node.
    pub node: Uuid,
    /// The epoch that wrote it.
    pub epoch: EpochId,
    /// Its name.
    pub name: WalName,
}

impl WalFile {
    /// The key of its object.
    #[must_use]
    pub fn key(&self) -> Key {
        keys::wal(self.node, &self.epoch, &self.name)
    }
}

impl fmt::Display for WalFile {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{} of node {} epoch {}",
            self.name, self.node, self.epoch
        )
    }
}

/// A WAL file that is in the bucket, verified.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StoredWal {
    /// Plain bytes of the file.
    pub plain_bytes: u64,
    /// Stored bytes of its object.
    pub stored_bytes: u64,
    /// Hex SHA-256 of the plain bytes.
    pub plain_sha256: String,
}

/// A WAL file as a listing has it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ListedWal {
    /// Its name.
    pub name: WalName,
    /// Stored bytes of its object.
    pub stored_bytes: u64,
}

/// The WAL files of an epoch, by name. Keys that are reserved for other things are left out.
///
/// # Errors
/// [`CatalogError::Store`].
pub async fn list_segments(
    store: &dyn ObjectStore,
    node: Uuid,
    epoch: &EpochId,
) -> Result<Vec<ListedWal>, CatalogError> {
    let prefix = keys::epoch_prefix(node, epoch);
    let mut listing = store.list(&prefix);
    let mut found = Vec::new();
    while let Some(object) = listing.try_next().await? {
        let name = object.key.as_str().strip_prefix(&prefix);
        let name = name.and_then(|name| name.strip_suffix(".zst"));
        if let Some(Ok(name)) = name.map(str::parse) {
            let stored_bytes = object.size;
            found.push(ListedWal { name, stored_bytes });
        }
    }
    Ok(found)
}

/// Whether the object of a WAL file is there. `false` is proved: the store was asked twice, by name and
/// by a listing, and has the epoch that the file would belong to. (The answer to the first question
/// is the same when the whole bucket is gone.)
///
/// # Errors
/// [`CatalogError::Store`] if the store cannot say; [`CatalogError::NotFound`] if it has no such epoch.
pub async fn exists(store: &dyn ObjectStore, file: &WalFile) -> Result<bool, CatalogError> {
    let key = file.key();
    match store.head(&key).await {
        Ok(_) => return Ok(true),
        Err(StoreError::NotFound(_)) => {}
        Err(error) => return Err(error.into()),
    }
    let mut listing = store.list(key.as_str());
    while let Some(object) = listing.try_next().await? {
        if object.key == key {
            return Ok(true);
        }
    }
    match store.head(&keys::epoch(file.node, &file.epoch)).await {
        Ok(_) => Ok(false),
        Err(StoreError::NotFound(_)) => Err(CatalogError::NotFound {
            what: "epoch",
            id: file.epoch.to_string(),
            nearest: Vec::new(),
        }),
        Err(error) => Err(error.into()),
    }
}

/// Finds a WAL file for a recovery in the epoch `chain[0]`, whose parent is `chain[1]`, and so on
/// (see [`crate::repo::Catalog::epoch_chain`]). A parent is asked only for timelines older than
/// the one on which its child opened: what it wrote on younger ones is not the child's history. A child that opened on its
/// parent's own timeline, as openGauss does, has segments of the same names with other content: there no parent is
/// ever asked, and none has to be, because the first backup of an epoch begins after its fork.
///
/// `None` is proved, see [`exists`].
///
/// # Errors
/// As [`exists`]. Nothing of this may be told to a recovering database as the end of WAL.
pub async fn find_wal(
    store: &dyn ObjectStore,
    chain: &[Epoch],
    name: &WalName,
) -> Result<Option<WalFile>, CatalogError> {
    for epoch in chain {
        let file = WalFile {
            node: epoch.node_id,
            epoch: epoch.epoch.clone(),
            name: name.clone(),
        };
        if exists(store, &file).await? {
            return Ok(Some(file));
        }
        if name.timeline() >= epoch.timeline {
            return Ok(None);
        }
    }
    Ok(None)
}
