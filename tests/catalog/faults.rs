//! A stand-in: a store whose replies get lost, or that is away, in front of a [`MemoryStore`].

use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::time::SystemTime;

use async_trait::async_trait;
use bytes::Bytes;
use futures_util::StreamExt as _;
use futures_util::stream::BoxStream;
use pipeline::store::{
    Detail, Key, ObjectBody, ObjectMeta, ObjectStore, Part, Sha256Digest, StoreError, UploadId,
};
use support::memory_store::MemoryStore;

#[derive(Debug, Default)]
pub(crate) struct Faulty {
    pub(crate) inner: Arc<MemoryStore>,
    /// So many of the next writes take effect, but their reply is lost.
    pub(crate) lost_replies: AtomicU32,
    /// So many of the next multipart uploads are completed, but their reply is lost.
    pub(crate) lost_completions: AtomicU32,
    /// So many of the next writes are lost on the way, and nobody knows.
    pub(crate) lost_writes: AtomicU32,
    /// No call gets through.
    pub(crate) down: AtomicBool,
}

fn take(count: &AtomicU32) -> bool {
    let less = |count: u32| count.checked_sub(1);
    let taken = count.fetch_update(Ordering::SeqCst, Ordering::SeqCst, less);
    taken.is_ok()
}

impl Faulty {
    fn up(&self, key: &str) -> Result<(), StoreError> {
        if self.down.load(Ordering::SeqCst) {
            return Err(StoreError::PermissionDenied(Detail::new(
                "any", key, "away",
            )));
        }
        Ok(())
    }

    fn unknown(key: &Key) -> StoreError {
        StoreError::UnknownOutcome(Detail::new("put", key.as_str(), "reply lost"))
    }
}

#[async_trait]
impl ObjectStore for Faulty {
    fn describe(&self) -> String {
        "memory with faults (a stand-in)".into()
    }

    async fn now(&self) -> Result<SystemTime, StoreError> {
        self.up("")?;
        self.inner.now().await
    }

    async fn put_if_absent(&self, key: &Key, body: Bytes) -> Result<ObjectMeta, StoreError> {
        self.up(key.as_str())?;
        if take(&self.lost_writes) {
            return Err(Self::unknown(key));
        }
        let done = self.inner.put_if_absent(key, body).await?;
        if take(&self.lost_replies) {
            return Err(Self::unknown(key));
        }
        // Lets others in between, so that races happen.
        tokio::task::yield_now().await;
        Ok(done)
    }

    async fn get(&self, key: &Key, range: Option<Range<u64>>) -> Result<ObjectBody, StoreError> {
        self.up(key.as_str())?;
        tokio::task::yield_now().await;
        self.inner.get(key, range).await
    }

    async fn head(&self, key: &Key) -> Result<ObjectMeta, StoreError> {
        self.up(key.as_str())?;
        self.inner.head(key).await
    }

    fn list(&self, prefix: &str) -> BoxStream<'static, Result<ObjectMeta, StoreError>> {
        if let Err(error) = self.up(prefix) {
            return futures_util::stream::iter([Err(error)]).boxed();
        }
        self.inner.list(prefix)
    }

    async fn delete(&self, keys: &[Key]) -> Result<Vec<StoreError>, StoreError> {
        self.inner.delete(keys).await
    }

    async fn create_upload(&self, key: &Key) -> Result<UploadId, StoreError> {
        self.up(key.as_str())?;
        self.inner.create_upload(key).await
    }

    async fn upload_part(
        &self,
        key: &Key,
        upload: &UploadId,
        number: u32,
        body: Bytes,
        sha256: Sha256Digest,
    ) -> Result<Part, StoreError> {
        self.up(key.as_str())?;
        self.inner
            .upload_part(key, upload, number, body, sha256)
            .await
    }

    async fn complete_if_absent(
        &self,
        key: &Key,
        upload: &UploadId,
        parts: &[Part],
    ) -> Result<ObjectMeta, StoreError> {
        self.up(key.as_str())?;
        let done = self.inner.complete_if_absent(key, upload, parts).await?;
        if take(&self.lost_completions) {
            return Err(Self::unknown(key));
        }
        Ok(done)
    }

    async fn abort_upload(&self, key: &Key, upload: &UploadId) -> Result<(), StoreError> {
        self.inner.abort_upload(key, upload).await
    }

    async fn list_uploads(&self, key: &Key) -> Result<Vec<UploadId>, StoreError> {
        self.inner.list_uploads(key).await
    }

    async fn list_parts(&self, key: &Key, upload: &UploadId) -> Result<Vec<Part>, StoreError> {
        self.inner.list_parts(key, upload).await
    }
}
