//! A stand-in: a store in memory that can fail, lose replies, break bodies off, and be gone from a certain call on.

use std::collections::BTreeSet;
use std::ops::Range;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, SystemTime};

use async_trait::async_trait;
use bytes::Bytes;
use futures_util::StreamExt as _;
use futures_util::stream::BoxStream;
use pipeline::store::{
    Detail, Hold, Key, ObjectBody, ObjectMeta, ObjectStore, ObjectVersion, Part, Sha256Digest,
    StoreError, Undeleted, UploadId, VersionId,
};
use pipeline::upload::UploadJournal;

use crate::memory_store::MemoryStore;

/// A stand-in: a store in memory that can fail, lose replies and break bodies off.
#[derive(Debug, Default)]
pub struct FaultyStore {
    /// What is behind it.
    pub inner: Arc<MemoryStore>,
    /// So many of the next writes take effect, but their reply is lost.
    pub lost_replies: AtomicU32,
    /// So many of the next multipart uploads are completed, but their reply is lost.
    pub lost_completions: AtomicU32,
    /// So many of the next writes are lost on the way, and nobody knows.
    pub lost_writes: AtomicU32,
    /// So many of the next calls are answered with 503.
    pub busy: AtomicU32,
    /// No call gets through.
    pub down: AtomicBool,
    /// From the call of this number on none gets through: what a store sees of somebody who is killed. 0: never.
    pub dies_at: AtomicU64,
    /// Whether the call at which that begins takes effect, though nobody hears of it.
    pub last_call_counts: AtomicBool,
    /// What others do just before a call.
    pub meanwhile: Mutex<Option<Meanwhile>>,
    /// Calls so far.
    pub calls: AtomicU64,
    /// Uploads are refused (by a panic) that were not journalled before.
    pub journal_first: AtomicBool,
    /// Every part from this number on is refused for good; 0: none.
    pub refuse_from_part: AtomicUsize,
    /// The next so many parts fail in a way that passes.
    pub flaky_parts: AtomicUsize,
    /// The next upload is created, but its reply is lost.
    pub lose_create_reply: AtomicBool,
    /// Answers have no checksums.
    pub no_checksums: AtomicBool,
    /// Completion finds an object of somebody else.
    pub foreign_object: AtomicBool,
    /// Bodies end with an error after so many bytes; 0: never.
    pub break_after: AtomicUsize,
    /// How many more bodies break off.
    pub breaks: AtomicUsize,
    /// How long a part takes, in milliseconds.
    pub part_takes_ms: AtomicU64,
    /// Parts that arrived.
    pub parts_received: AtomicUsize,
    in_flight: AtomicUsize,
    /// Most bytes of parts on their way at the same time.
    pub most_in_flight: AtomicUsize,
    /// Keys that were journalled.
    pub intended: Mutex<BTreeSet<Key>>,
}

/// What others do just before the call of a number.
pub struct Meanwhile {
    /// The number, from 1.
    pub call: u64,
    /// What they do.
    pub act: Box<dyn FnOnce() + Send>,
}

impl std::fmt::Debug for Meanwhile {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "before call {}", self.call)
    }
}

fn lost(operation: &'static str, key: &Key) -> StoreError {
    StoreError::UnknownOutcome(Detail::new(operation, key.as_str(), "the reply was lost"))
}

fn away(operation: &'static str, key: &Key) -> StoreError {
    StoreError::Unavailable(Detail::new(operation, key.as_str(), "connection reset"))
}

fn take(count: &AtomicU32) -> bool {
    let less = |count: u32| count.checked_sub(1);
    let taken = count.fetch_update(Ordering::SeqCst, Ordering::SeqCst, less);
    taken.is_ok()
}

impl FaultyStore {
    /// In front of a store that has something in it.
    #[must_use]
    pub fn before(inner: Arc<MemoryStore>) -> Self {
        Self {
            inner,
            ..Self::default()
        }
    }

    fn gone(key: &str) -> StoreError {
        StoreError::PermissionDenied(Detail::new("any", key, "away"))
    }

    /// Counts a call. An error: it does not get through. `false`: it does, and its answer does not.
    fn call(&self, key: &str) -> Result<bool, StoreError> {
        let number = self.calls.fetch_add(1, Ordering::SeqCst) + 1;
        let due = |meanwhile: &mut Meanwhile| meanwhile.call == number;
        let due = self.meanwhile.lock().unwrap().take_if(due);
        if let Some(meanwhile) = due {
            (meanwhile.act)();
        }
        if self.down.load(Ordering::SeqCst) {
            return Err(Self::gone(key));
        }
        if take(&self.busy) {
            let detail = Detail::new("any", key, "503 Slow Down");
            return Err(StoreError::Unavailable(detail));
        }
        let dies_at = self.dies_at.load(Ordering::SeqCst);
        let last = number == dies_at && self.last_call_counts.load(Ordering::SeqCst);
        if dies_at > 0 && number >= dies_at && !last {
            return Err(Self::gone(key));
        }
        Ok(!last)
    }

    fn meta(&self, meta: ObjectMeta) -> ObjectMeta {
        let checksum = meta
            .checksum
            .filter(|_| !self.no_checksums.load(Ordering::SeqCst));
        ObjectMeta { checksum, ..meta }
    }
}

#[async_trait]
impl UploadJournal for FaultyStore {
    async fn intend(&self, key: &Key) -> Result<(), StoreError> {
        self.intended.lock().unwrap().insert(key.clone());
        Ok(())
    }
}

#[async_trait]
impl ObjectStore for FaultyStore {
    fn describe(&self) -> String {
        "memory that misbehaves (a stand-in)".into()
    }

    async fn now(&self) -> Result<SystemTime, StoreError> {
        self.call("")?;
        self.inner.now().await
    }

    async fn put_if_absent(&self, key: &Key, body: Bytes) -> Result<ObjectMeta, StoreError> {
        let heard = self.call(key.as_str())?;
        if take(&self.lost_writes) {
            return Err(lost("put", key));
        }
        let meta = self.inner.put_if_absent(key, body).await?;
        if take(&self.lost_replies) {
            return Err(lost("put", key));
        }
        if !heard {
            return Err(Self::gone(key.as_str()));
        }
        // Lets others in between, so that races happen.
        tokio::task::yield_now().await;
        Ok(self.meta(meta))
    }

    async fn get(&self, key: &Key, range: Option<Range<u64>>) -> Result<ObjectBody, StoreError> {
        self.call(key.as_str())?;
        tokio::task::yield_now().await;
        let body = self.inner.get(key, range).await?;
        let limit = self.break_after.load(Ordering::SeqCst);
        let take = |left: usize| left.checked_sub(1);
        let ordering = Ordering::SeqCst;
        if limit == 0 || self.breaks.fetch_update(ordering, ordering, take).is_err() {
            return Ok(body);
        }
        let size = body.size;
        let all = body.collect(key, usize::MAX).await?;
        let mut chunks = vec![Ok(all.slice(..limit.min(all.len())))];
        if all.len() > limit {
            chunks.push(Err(away("get", key)));
        }
        let stream = futures_util::stream::iter(chunks).boxed();
        Ok(ObjectBody { size, stream })
    }

    async fn head(&self, key: &Key) -> Result<ObjectMeta, StoreError> {
        self.call(key.as_str())?;
        Ok(self.meta(self.inner.head(key).await?))
    }

    fn list(&self, prefix: &str) -> BoxStream<'static, Result<ObjectMeta, StoreError>> {
        if let Err(error) = self.call(prefix) {
            return futures_util::stream::iter([Err(error)]).boxed();
        }
        self.inner.list(prefix)
    }

    async fn delete(&self, keys: &[Key]) -> Result<Vec<StoreError>, StoreError> {
        self.call("")?;
        self.inner.delete(keys).await
    }

    fn list_versions(&self, prefix: &str) -> BoxStream<'static, Result<ObjectVersion, StoreError>> {
        if let Err(error) = self.call(prefix) {
            return futures_util::stream::iter([Err(error)]).boxed();
        }
        self.inner.list_versions(prefix)
    }

    async fn delete_versions(
        &self,
        versions: &[(Key, Option<VersionId>)],
    ) -> Result<Vec<Undeleted>, StoreError> {
        let heard = self.call("")?;
        if heard {
            return self.inner.delete_versions(versions).await;
        }
        // Died within: the store had got as far as half of it.
        let half = &versions[..versions.len().div_ceil(2)];
        self.inner.delete_versions(half).await?;
        Err(Self::gone(""))
    }

    async fn holds_objects(&self) -> Result<bool, StoreError> {
        self.call("")?;
        self.inner.holds_objects().await
    }

    async fn hold(
        &self,
        key: &Key,
        version: Option<&VersionId>,
    ) -> Result<Option<Hold>, StoreError> {
        self.call(key.as_str())?;
        self.inner.hold(key, version).await
    }

    async fn create_upload(&self, key: &Key) -> Result<UploadId, StoreError> {
        self.call(key.as_str())?;
        assert!(
            !self.journal_first.load(Ordering::SeqCst)
                || self.intended.lock().unwrap().contains(key),
            "`{key}` was not journalled first"
        );
        let upload = self.inner.create_upload(key).await?;
        if self.lose_create_reply.swap(false, Ordering::SeqCst) {
            return Err(lost("create upload", key));
        }
        Ok(upload)
    }

    async fn upload_part(
        &self,
        key: &Key,
        upload: &UploadId,
        number: u32,
        body: Bytes,
        sha256: Sha256Digest,
    ) -> Result<Part, StoreError> {
        self.call(key.as_str())?;
        let length = body.len();
        let now = self.in_flight.fetch_add(length, Ordering::SeqCst) + length;
        self.most_in_flight.fetch_max(now, Ordering::SeqCst);
        let pause = self.part_takes_ms.load(Ordering::SeqCst);
        tokio::time::sleep(Duration::from_millis(pause)).await;
        self.in_flight.fetch_sub(length, Ordering::SeqCst);
        let refuse = self.refuse_from_part.load(Ordering::SeqCst);
        if refuse > 0 && number as usize >= refuse {
            let detail = Detail::new("upload part", key.as_str(), "AccessDenied");
            return Err(StoreError::PermissionDenied(detail));
        }
        let (take, ordering) = (|left: usize| left.checked_sub(1), Ordering::SeqCst);
        let part = self
            .inner
            .upload_part(key, upload, number, body, sha256)
            .await?;
        if self
            .flaky_parts
            .fetch_update(ordering, ordering, take)
            .is_ok()
        {
            return Err(lost("upload part", key));
        }
        self.parts_received.fetch_add(1, Ordering::SeqCst);
        Ok(part)
    }

    async fn complete_if_absent(
        &self,
        key: &Key,
        upload: &UploadId,
        parts: &[Part],
    ) -> Result<ObjectMeta, StoreError> {
        self.call(key.as_str())?;
        if self.foreign_object.load(Ordering::SeqCst) {
            self.inner
                .tamper(key, Some(Bytes::from_static(b"somebody else's")));
        }
        let meta = self.inner.complete_if_absent(key, upload, parts).await?;
        if take(&self.lost_completions) {
            return Err(lost("complete upload", key));
        }
        Ok(self.meta(meta))
    }

    async fn abort_upload(&self, key: &Key, upload: &UploadId) -> Result<(), StoreError> {
        self.call(key.as_str())?;
        self.inner.abort_upload(key, upload).await
    }

    async fn list_uploads(&self, key: &Key) -> Result<Vec<UploadId>, StoreError> {
        self.call(key.as_str())?;
        self.inner.list_uploads(key).await
    }

    async fn list_parts(&self, key: &Key, upload: &UploadId) -> Result<Vec<Part>, StoreError> {
        self.call(key.as_str())?;
        self.inner.list_parts(key, upload).await
    }
}
