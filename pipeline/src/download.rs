//! Objects out of the store: ranged, resumed where they break off, verified before they are used.

mod entry;
mod pack;
mod ranged;

use std::sync::Arc;

use bytes::Bytes;
use futures_util::StreamExt as _;
use futures_util::stream::BoxStream;
use sha2::{Digest as _, Sha256};
use tokio::io::AsyncBufRead;
use tokio_util::io::StreamReader;
use tokio_util::sync::CancellationToken;

use crate::budget::Budget;
use crate::error::PipelineError;
use crate::meter::Meter;
use crate::retry::RetryPolicy;
use crate::store::{Key, ObjectStore};
use crate::throttle::Throttle;

pub(crate) use pack::PackReader;
pub(crate) use ranged::Ranged;

/// What every download of one operation shares. Clones are cheap.
#[derive(Debug, Clone)]
pub struct Downloader {
    pub(crate) store: Arc<dyn ObjectStore>,
    pub(crate) budget: Budget,
    pub(crate) throttle: Throttle,
    pub(crate) meter: Arc<Meter>,
    pub(crate) cancel: CancellationToken,
    pub(crate) retry: RetryPolicy,
}

impl Downloader {
    /// A downloader.
    #[must_use]
    pub fn new(
        store: Arc<dyn ObjectStore>,
        budget: Budget,
        throttle: Throttle,
        meter: Arc<Meter>,
        cancel: CancellationToken,
    ) -> Self {
        Self {
            store,
            budget,
            throttle,
            meter,
            cancel,
            retry: RetryPolicy::default(),
        }
    }

    /// The same with another patience.
    #[must_use]
    pub fn with_retry(self, retry: RetryPolicy) -> Self {
        Self { retry, ..self }
    }

    /// The store it reads from.
    #[must_use]
    pub fn store(&self) -> &Arc<dyn ObjectStore> {
        &self.store
    }

    /// The whole memory budget, in bytes.
    #[must_use]
    pub fn budget_bytes(&self) -> usize {
        self.budget.total_bytes()
    }

    /// Fires when everything is to stop.
    #[must_use]
    pub fn cancel(&self) -> &CancellationToken {
        &self.cancel
    }

    /// For objects that are read by other means: waits until `bytes` may be fetched, under the same limit.
    ///
    /// # Errors
    /// [`PipelineError::Cancelled`].
    pub async fn admit(&self, bytes: u64) -> Result<(), PipelineError> {
        crate::retry::or_cancelled(&self.cancel, self.throttle.take(bytes)).await
    }

    /// For objects that are read by other means: counts `bytes` as fetched.
    pub fn count(&self, bytes: u64) {
        self.meter.add_stored(bytes);
    }

    /// For objects that are read by other means: counts `bytes` as decompressed.
    pub fn count_plain(&self, bytes: u64) {
        self.meter.add_plain(bytes);
    }

    /// The budget that pays for all buffers.
    #[must_use]
    pub fn budget(&self) -> &Budget {
        &self.budget
    }

    /// The same, ended by another token.
    pub(crate) fn with_cancel(&self, cancel: CancellationToken) -> Self {
        Self {
            cancel,
            ..self.clone()
        }
    }

    /// A small object of `size` bytes, whole and verified; its memory is taken from the budget and goes back
    /// with the last clone. `sha256` is hex, of all its bytes.
    ///
    /// # Errors
    /// [`PipelineError::Damaged`] if the object is missing or is not that one; [`PipelineError::Setup`] if it is
    /// larger than the whole budget; what the store says.
    pub async fn object(&self, key: &Key, size: u64, sha256: &str) -> Result<Bytes, PipelineError> {
        let capacity = usize::try_from(size).unwrap_or(usize::MAX);
        let lease = self.budget.acquire(capacity, &self.cancel).await?;
        let mut bytes = Vec::with_capacity(capacity);
        let mut stream = self.object_stream(key, size, sha256);
        while let Some(chunk) = stream.next().await {
            bytes.extend_from_slice(&chunk?);
        }
        Ok(Bytes::from_owner(Leased {
            bytes,
            _lease: lease,
        }))
    }

    /// The bytes of an object of `size` bytes as they arrive. The LAST item is an error if they were not those
    /// of `sha256` (hex): use nothing of it for good before the stream has ended well.
    #[must_use]
    pub fn object_stream(
        &self,
        key: &Key,
        size: u64,
        sha256: &str,
    ) -> BoxStream<'static, Result<Bytes, PipelineError>> {
        let ranged = Ranged::new(self.clone(), key.clone(), 0..size, size);
        let state = (ranged, Sha256::new(), sha256.to_owned(), false);
        let next = |(mut ranged, mut hash, wanted, ended): (Ranged, Sha256, String, bool)| async move {
            if ended {
                return Ok(None);
            }
            if let Some(chunk) = ranged.next().await? {
                hash.update(&chunk);
                return Ok(Some((chunk, (ranged, hash, wanted, false))));
            }
            if hex::encode(hash.finalize_reset()) != wanted {
                let what = "its SHA-256 is not the one recorded";
                return Err(PipelineError::damaged(ranged.key(), what));
            }
            Ok(None)
        };
        futures_util::stream::try_unfold(state, next).boxed()
    }

    /// [`Self::object_stream`] as a reader; its last read is the error. An `io::Error` of it holds the
    /// [`PipelineError`].
    #[must_use]
    pub fn object_reader(
        &self,
        key: &Key,
        size: u64,
        sha256: &str,
    ) -> impl AsyncBufRead + Send + Unpin + 'static {
        let stream = self.object_stream(key, size, sha256);
        StreamReader::new(stream.map(|chunk| chunk.map_err(std::io::Error::other)))
    }
}

/// Bytes that the budget pays for.
struct Leased {
    bytes: Vec<u8>,
    _lease: crate::budget::BudgetLease,
}

impl AsRef<[u8]> for Leased {
    fn as_ref(&self) -> &[u8] {
        &self.bytes
    }
}
