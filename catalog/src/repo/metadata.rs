//! The proxies' metadata at a point.

use serde_json::Map;

use super::Catalog;
use crate::check;
use crate::envelope::{self, METADATA_LIMIT, sha256_hex};
use crate::error::CatalogError;
use crate::ids::PointId;
use crate::keys;
use crate::model::{Metadata, MetadataRef};
use crate::put::Outcome;

impl Catalog {
    /// Writes a point's metadata, before the point. The same again (equal to the nonce) counts as written. The log does
    /// not name it: the point does, by the reference that this answers, and the log names the point.
    ///
    /// # Errors
    /// [`CatalogError::Conflict`] if there is another of that point; [`CatalogError::Refused`] if it breaks a rule of the
    /// format or is too large; [`CatalogError::Store`]: it may stand, and does no harm.
    pub async fn put_metadata(&self, metadata: &Metadata) -> Result<MetadataRef, CatalogError> {
        let key = keys::metadata(&metadata.point_id);
        check::metadata(metadata, &metadata.point_id)
            .map_err(|why| CatalogError::refused(&key, why))?;
        match self.create(&key, metadata, METADATA_LIMIT).await? {
            (sealed, Outcome::Ours) => Ok(MetadataRef {
                size: sealed.bytes.len() as u64,
                sha256: sealed.sha256,
                extra: Map::new(),
            }),
            (_, Outcome::Theirs(_)) => {
                Err(CatalogError::conflict(&key, "another is of this point"))
            }
        }
    }

    /// Reads the metadata that a point names.
    ///
    /// # Errors
    /// [`CatalogError::Damaged`] if it is not the object that the point names; [`CatalogError::NewerFormat`];
    /// [`CatalogError::Store`].
    pub async fn metadata(
        &self,
        point: &PointId,
        named: &MetadataRef,
    ) -> Result<Metadata, CatalogError> {
        let key = keys::metadata(point);
        let stored = match self.fetch(&key, METADATA_LIMIT).await {
            Err(error) if error.is_absent() => {
                return Err(CatalogError::damaged(&key, "it is missing"));
            }
            stored => stored?,
        };
        if sha256_hex(&stored) != named.sha256 {
            return Err(CatalogError::damaged(
                &key,
                "it is not the one that its point names",
            ));
        }
        let metadata: Metadata = envelope::open(&key, &stored)?;
        check::metadata(&metadata, point).map_err(|why| CatalogError::damaged(&key, why))?;
        Ok(metadata)
    }
}
