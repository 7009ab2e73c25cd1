//! Create-if-absent of small objects, its outcome found out and not hoped for.

use bytes::Bytes;
use pipeline::error::PipelineError;
use pipeline::store::{Key, ObjectStore, StoreError};
use pipeline::upload::put_verified;

use crate::envelope;
use crate::error::CatalogError;

/// What became of a write.
#[derive(Debug)]
pub(crate) enum Outcome {
    /// The object is there with our bytes.
    Ours,
    /// The object is there with these bytes of somebody else; ours are nowhere.
    Theirs(Bytes),
}

/// Creates an object, and reads it back wherever the store's answer leaves open whose it is. The body
/// has to carry a nonce: equal bytes are then ours.
///
/// # Errors
/// [`CatalogError::Refused`] if it is larger than `limit`, which no reader would accept;
/// [`CatalogError::Store`]: if that is `UnknownOutcome`, the object may stand.
pub(crate) async fn create(
    store: &dyn ObjectStore,
    key: &Key,
    body: &Bytes,
    limit: usize,
) -> Result<Outcome, CatalogError> {
    if body.len() > limit {
        let what = format!("{} bytes are more than the {limit} it may have", body.len());
        return Err(CatalogError::refused(key, what));
    }
    match put_verified(store, key, body.clone()).await {
        Ok(_) => Ok(Outcome::Ours),
        Err(PipelineError::Store(StoreError::AlreadyExists(_))) => {
            Ok(Outcome::Theirs(envelope::fetch(store, key, limit).await?))
        }
        Err(error) => Err(error.into()),
    }
}
