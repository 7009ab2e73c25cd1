//! Reading back what a store may or may not have done.

use std::ops::Range;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use bytes::Bytes;
use futures_util::StreamExt as _;
use sha2::{Digest as _, Sha256};

use super::supervisor::{Completed, Identity};
use crate::pack::PART_SIZE;
use crate::store::{Key, ObjectMeta, ObjectStore, Sha256Digest, StoreError};

/// S3's words for the SHA-256 of a multipart object: that of its parts' digests, and how many.
pub(super) fn composite(parts_sha256: &Sha256Digest, parts: usize) -> String {
    format!("{}-{parts}", BASE64.encode(parts_sha256))
}

/// Whether the object has exactly these bytes; `None` if there is no object.
pub(super) async fn same_bytes(
    store: &dyn ObjectStore,
    key: &Key,
    body: &Bytes,
) -> Result<Option<bool>, StoreError> {
    let Some(meta) = found(store.head(key).await)? else {
        return Ok(None);
    };
    if meta.size != body.len() as u64 {
        return Ok(Some(false));
    }
    // Always the bytes themselves: a store that keeps no checksum, or another kind, must not matter here.
    let Some(answer) = found(store.get(key, None).await)? else {
        return Ok(None);
    };
    let mut stream = answer.stream;
    let mut rest: &[u8] = body;
    while let Some(chunk) = stream.next().await {
        let Some(after) = rest.strip_prefix(&*chunk?) else {
            return Ok(Some(false));
        };
        rest = after;
    }
    Ok(Some(rest.is_empty()))
}

fn found<T>(answer: Result<T, StoreError>) -> Result<Option<T>, StoreError> {
    match answer {
        Ok(value) => Ok(Some(value)),
        Err(StoreError::NotFound(_)) => Ok(None),
        Err(error) => Err(error),
    }
}

/// Whether the object under `key` is the one whose parts we sent; `None` if there is no object.
pub(super) async fn is_ours(
    store: &dyn ObjectStore,
    key: &Key,
    sent: &Completed,
    parts: usize,
    identity: &Identity,
) -> Result<Option<bool>, StoreError> {
    let Some(meta) = found(store.head(key).await)? else {
        return Ok(None);
    };
    if meta.size != sent.size {
        return Ok(Some(false));
    }
    if let Some(same) = checksum_matches(&meta, &sent.parts_sha256, parts) {
        return Ok(Some(same));
    }
    let same = match identity {
        Identity::Head(head) => {
            let range = 0..head.len() as u64;
            digest_of(store, key, Some(range), head.len()).await? == digest_of_parts(&[head])
        }
        Identity::Whole => digest_of(store, key, None, PART_SIZE).await? == sent.parts_sha256,
    };
    Ok(Some(same))
}

/// What a store's own checksum says, if it gave one of the kind that we know.
pub(super) fn checksum_matches(
    meta: &ObjectMeta,
    parts_sha256: &Sha256Digest,
    parts: usize,
) -> Option<bool> {
    let checksum = meta.checksum.as_deref()?;
    // Without the number of parts it is of the whole object, which we did not hash.
    checksum
        .contains('-')
        .then(|| checksum == composite(parts_sha256, parts))
}

fn digest_of_parts(parts: &[&Bytes]) -> Sha256Digest {
    let mut all = Sha256::new();
    for part in parts {
        all.update(Sha256::digest(part));
    }
    all.finalize().into()
}

/// The composite SHA-256 of stored bytes in parts of `part_size`, read as a stream.
async fn digest_of(
    store: &dyn ObjectStore,
    key: &Key,
    range: Option<Range<u64>>,
    part_size: usize,
) -> Result<Sha256Digest, StoreError> {
    let mut stream = store.get(key, range).await?.stream;
    let (mut all, mut part, mut filled) = (Sha256::new(), Sha256::new(), 0);
    while let Some(chunk) = stream.next().await {
        let mut chunk = chunk?;
        while !chunk.is_empty() {
            let piece = chunk.split_to(chunk.len().min(part_size - filled));
            part.update(&piece);
            filled += piece.len();
            if filled == part_size {
                all.update(part.finalize_reset());
                filled = 0;
            }
        }
    }
    if filled > 0 {
        all.update(part.finalize());
    }
    Ok(all.finalize().into())
}
