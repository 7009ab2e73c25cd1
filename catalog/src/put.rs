//! Create-if-absent of small objects, its outcome found out and not hoped for.

use bytes::Bytes;
use pipeline::store::{Key, ObjectStore, Retry, StoreError};

use crate::envelope;
use crate::error::CatalogError;

/// Tries of one write whose reply was lost, before its outcome is left unknown.
const TRIES: u32 = 3;

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
    let mut tries = 0;
    loop {
        tries += 1;
        let error = match store.put_if_absent(key, body.clone()).await {
            Ok(_) => return Ok(Outcome::Ours),
            Err(error) => error,
        };
        let exists = matches!(error, StoreError::AlreadyExists(_));
        if !exists && error.retry() != Retry::ReadBack {
            return Err(error.into());
        }
        match envelope::fetch(store, key, limit).await {
            Ok(stored) if stored == *body => return Ok(Outcome::Ours),
            Ok(stored) => return Ok(Outcome::Theirs(stored)),
            Err(CatalogError::Store(StoreError::NotFound(_))) if tries < TRIES => {}
            Err(CatalogError::Store(_)) => return Err(error.into()),
            Err(damaged) => return Err(damaged),
        }
    }
}
