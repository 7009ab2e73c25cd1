//! Objects into the store: one PUT for what fits in a part, else a multipart upload with many parts in
//! flight, limited by the byte budget only.
//!
//! A task owns each upload from before it exists until it is completed or aborted. The writer only
//! sends it finished parts. So whatever becomes of the writer (an error, a cancel, a drop, a panic of its
//! thread), the task sees the end of its channel and aborts. Only the end of the process leaves an
//! upload behind, and that one stands in the journal.

mod readback;
mod supervisor;
mod writer;

use std::fmt::Debug;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use bytes::Bytes;
use tokio_util::sync::CancellationToken;

use crate::budget::{Budget, Reserve};
use crate::error::PipelineError;
use crate::meter::Meter;
use crate::retry::{RetryPolicy, repeatable};
use crate::store::{Key, ObjectStore, Retry, StoreError};
use crate::throttle::Throttle;

pub(crate) use supervisor::{Completed, Identity, PartMessage, UploadJob};
pub(crate) use writer::CHANNEL;
pub use writer::{ObjectWriter, StoredObject};

/// Where the keys of uploads are written down before the uploads are created, so that a sweeper can find
/// those that a killed process left.
#[async_trait]
pub trait UploadJournal: Send + Sync + Debug {
    /// Makes it durable that an upload of `key` is about to be created.
    ///
    /// # Errors
    /// What the store says. The upload is not created then.
    async fn intend(&self, key: &Key) -> Result<(), StoreError>;
}

/// Longest time that cleaning up after one upload may take.
pub(crate) const CLEAN_UP_DEADLINE: Duration = Duration::from_mins(1);

/// What every upload of one operation shares. Clones are cheap and share the budget's reserve.
#[derive(Debug, Clone)]
pub struct Uploader {
    pub(crate) store: Arc<dyn ObjectStore>,
    pub(crate) budget: Budget,
    pub(crate) throttle: Throttle,
    pub(crate) journal: Arc<dyn UploadJournal>,
    pub(crate) meter: Arc<Meter>,
    pub(crate) cancel: CancellationToken,
    pub(crate) retry: RetryPolicy,
    reserve: Reserve,
}

impl Uploader {
    /// An uploader; takes one part (8 MiB) of the budget for good, so that its object writers always get
    /// on, if slowly.
    ///
    /// # Errors
    /// [`PipelineError::Setup`] if the budget has no room for that.
    pub fn new(
        store: Arc<dyn ObjectStore>,
        budget: Budget,
        throttle: Throttle,
        journal: Arc<dyn UploadJournal>,
        meter: Arc<Meter>,
        cancel: CancellationToken,
    ) -> Result<Self, PipelineError> {
        let reserve = Reserve::new(&budget, 1, 0, "an uploader")?;
        Ok(Self {
            store,
            budget,
            throttle,
            journal,
            meter,
            cancel,
            retry: RetryPolicy::default(),
            reserve,
        })
    }

    /// The same with another patience.
    #[must_use]
    pub fn with_retry(self, retry: RetryPolicy) -> Self {
        Self { retry, ..self }
    }

    /// The same, ended by another token.
    pub(crate) fn with_cancel(&self, cancel: CancellationToken) -> Self {
        Self {
            cancel,
            ..self.clone()
        }
    }

    /// The store that it writes to.
    #[must_use]
    pub fn store(&self) -> &Arc<dyn ObjectStore> {
        &self.store
    }

    /// The counters that it moves.
    #[must_use]
    pub fn meter(&self) -> &Arc<Meter> {
        &self.meter
    }

    /// Begins an object. Call within a tokio runtime. Nothing reaches the store before the first part is
    /// full or the object is finished.
    #[must_use]
    pub fn object(&self, key: Key) -> ObjectWriter {
        ObjectWriter::new(self, &self.reserve, key)
    }
}

/// What [`put_verified`] found.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Put {
    /// This call created the object.
    Created,
    /// The object was there with exactly these bytes, perhaps because a reply was lost.
    AlreadyOurs,
}

/// Creates `key` with `body` if it is absent; whatever the store answers, the object then has these
/// bytes, or this is an error. Repeats what can be repeated, for well below a minute.
///
/// # Errors
/// [`StoreError::AlreadyExists`] in [`PipelineError::Store`] if the object has other content; else what
/// the store says.
pub async fn put_verified(
    store: &dyn ObjectStore,
    key: &Key,
    body: Bytes,
) -> Result<Put, PipelineError> {
    put_with(store, key, body, RetryPolicy::default()).await
}

pub(crate) async fn put_with(
    store: &dyn ObjectStore,
    key: &Key,
    body: Bytes,
    retry: RetryPolicy,
) -> Result<Put, PipelineError> {
    // Ended by dropping this future.
    let cancel = CancellationToken::new();
    let mut attempt = 1;
    loop {
        let Err(error) = store.put_if_absent(key, body.clone()).await else {
            return Ok(Put::Created);
        };
        let exists = matches!(error, StoreError::AlreadyExists(_));
        if exists || error.retry() == Retry::ReadBack {
            let look = || readback::same_bytes(store, key, &body);
            match retry.run(&cancel, repeatable, look).await? {
                Some(true) => return Ok(Put::AlreadyOurs),
                Some(false) if exists => return Err(error.into()),
                Some(false) => {
                    let what = "the object exists with other content";
                    let detail = crate::store::Detail::new("put", key.as_str(), what);
                    return Err(StoreError::AlreadyExists(detail).into());
                }
                // Lost on the way there, or deleted meanwhile: nothing is there, so try again.
                None => {}
            }
        } else if !repeatable(&error) {
            return Err(error.into());
        }
        if attempt >= retry.attempts {
            return Err(error.into());
        }
        tokio::time::sleep(retry.pause(attempt)).await;
        attempt += 1;
    }
}
