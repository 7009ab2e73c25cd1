//! A stand-in: an [`ObjectStore`] in memory, for tests of what is above the store.
//!
//! It answers as S3 does and passes the same conformance suite as the real backend.

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime};

use async_trait::async_trait;
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use bytes::Bytes;
use futures_util::StreamExt as _;
use futures_util::stream::BoxStream;
use pipeline::store::{
    Detail, Hold, Key, ObjectBody, ObjectMeta, ObjectStore, ObjectVersion, Part, Sha256Digest,
    StoreError, Undeleted, UploadId, VersionId,
};
use sha2::{Digest as _, Sha256};

use self::versions::Versioning;

mod versions;

#[derive(Debug, Clone)]
struct Object {
    body: Bytes,
    checksum: String,
    written: SystemTime,
    version: u64,
    locked: Option<SystemTime>,
}

#[derive(Debug, Clone)]
struct Upload {
    key: Key,
    parts: BTreeMap<u32, (Bytes, Part)>,
}

#[derive(Debug, Clone, Default)]
struct State {
    objects: BTreeMap<Key, Object>,
    uploads: BTreeMap<String, Upload>,
    next_upload: u64,
    versioning: Versioning,
    /// How far the store's clock is ahead of this machine's, or where it stands still.
    ahead: Duration,
    stopped: Option<SystemTime>,
}

impl State {
    fn now(&self) -> SystemTime {
        self.stopped.unwrap_or_else(SystemTime::now) + self.ahead
    }

    fn object(&mut self, body: Bytes, checksum: String) -> Object {
        let written = self.now();
        Object {
            body,
            checksum,
            written,
            version: self.versioning.next(),
            locked: self.versioning.lock.map(|lock| written + lock),
        }
    }
}

/// The store. Share it by `Arc`.
#[derive(Debug, Default)]
pub struct MemoryStore {
    state: Mutex<State>,
}

impl MemoryStore {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The stored bytes of an object.
    pub fn bytes(&self, key: &str) -> Option<Bytes> {
        let key = Key::new(key).ok()?;
        self.state()
            .objects
            .get(&key)
            .map(|object| object.body.clone())
    }

    /// Every key there is.
    pub fn keys(&self) -> Vec<Key> {
        self.state().objects.keys().cloned().collect()
    }

    /// Replaces or, with `None`, removes an object behind the product's back: damage for tests.
    pub fn tamper(&self, key: &Key, body: Option<Bytes>) {
        let mut state = self.state();
        match body {
            Some(body) => {
                let checksum = BASE64.encode(Sha256::digest(&body));
                let object = state.object(body, checksum);
                state.objects.insert(key.clone(), object);
            }
            None => {
                state.objects.remove(key);
            }
        }
    }

    /// Stops the store's clock where it is: from now on only [`MemoryStore::advance`] moves it.
    pub fn stop_clock(&self) {
        let mut state = self.state();
        state.stopped.get_or_insert_with(SystemTime::now);
    }

    /// Puts the store's clock forward.
    pub fn advance(&self, by: Duration) {
        self.state().ahead += by;
    }

    /// Another store with the same in it.
    #[must_use]
    pub fn fork(&self) -> Self {
        let state = Mutex::new(self.state().clone());
        Self { state }
    }

    /// Makes this store what another one is.
    pub fn become_as(&self, other: &Self) {
        let state = other.state().clone();
        *self.state() = state;
    }

    /// How many multipart uploads have neither been completed nor aborted.
    pub fn uploads_under_way(&self) -> usize {
        self.state().uploads.len()
    }
}

fn meta(key: &Key, object: &Object) -> ObjectMeta {
    ObjectMeta {
        key: key.clone(),
        size: object.body.len() as u64,
        etag: Some(object.checksum.clone()),
        checksum: Some(object.checksum.clone()),
        last_modified: Some(object.written),
    }
}

fn not_found(operation: &'static str, key: &Key, code: &str) -> StoreError {
    StoreError::NotFound(Detail::new(operation, key.as_str(), code))
}

#[async_trait]
impl ObjectStore for MemoryStore {
    fn describe(&self) -> String {
        "memory (a stand-in)".into()
    }

    async fn now(&self) -> Result<SystemTime, StoreError> {
        let now = self.state().now();
        // A `Date` has whole seconds.
        let whole = now.duration_since(SystemTime::UNIX_EPOCH);
        Ok(SystemTime::UNIX_EPOCH + Duration::from_secs(whole.unwrap_or_default().as_secs()))
    }

    async fn put_if_absent(&self, key: &Key, body: Bytes) -> Result<ObjectMeta, StoreError> {
        let mut state = self.state();
        if state.objects.contains_key(key) {
            return Err(StoreError::AlreadyExists(Detail::new(
                "put",
                key.as_str(),
                "PreconditionFailed",
            )));
        }
        let checksum = BASE64.encode(Sha256::digest(&body));
        // A real store does not hold on to the sender's buffers.
        let object = state.object(Bytes::copy_from_slice(&body), checksum);
        let answer = meta(key, &object);
        state.objects.insert(key.clone(), object);
        Ok(answer)
    }

    async fn get(&self, key: &Key, range: Option<Range<u64>>) -> Result<ObjectBody, StoreError> {
        let body = match self.state().objects.get(key) {
            Some(object) => object.body.clone(),
            None => return Err(not_found("get", key, "NoSuchKey")),
        };
        let size = body.len() as u64;
        let range = range.unwrap_or(0..size);
        if range.start > range.end || range.end > size {
            return Err(StoreError::Corrupt(Detail::new(
                "get",
                key.as_str(),
                "InvalidRange",
            )));
        }
        #[expect(
            clippy::cast_possible_truncation,
            reason = "both are at most body.len()"
        )]
        let body = body.slice(range.start as usize..range.end as usize);
        let chunks: Vec<_> = body
            .chunks(64 << 10)
            .map(|chunk| Ok(body.slice_ref(chunk)))
            .collect();
        Ok(ObjectBody {
            size,
            stream: futures_util::stream::iter(chunks).boxed(),
        })
    }

    async fn head(&self, key: &Key) -> Result<ObjectMeta, StoreError> {
        let state = self.state();
        let object = state
            .objects
            .get(key)
            .ok_or_else(|| not_found("head", key, "NoSuchKey"))?;
        Ok(meta(key, object))
    }

    fn list(&self, prefix: &str) -> BoxStream<'static, Result<ObjectMeta, StoreError>> {
        let state = self.state();
        let found: Vec<_> = state
            .objects
            .iter()
            .filter(|(key, _)| key.as_str().starts_with(prefix))
            .map(|(key, object)| Ok(meta(key, object)))
            .collect();
        futures_util::stream::iter(found).boxed()
    }

    async fn delete(&self, keys: &[Key]) -> Result<Vec<StoreError>, StoreError> {
        let mut state = self.state();
        for key in keys {
            state.hide(key);
        }
        Ok(Vec::new())
    }

    fn list_versions(&self, prefix: &str) -> BoxStream<'static, Result<ObjectVersion, StoreError>> {
        let found = self.state().versions(prefix).into_iter().map(Ok);
        futures_util::stream::iter(found.collect::<Vec<_>>()).boxed()
    }

    async fn delete_versions(
        &self,
        versions: &[(Key, Option<VersionId>)],
    ) -> Result<Vec<Undeleted>, StoreError> {
        let mut state = self.state();
        let mut left = Vec::new();
        for (key, version) in versions {
            match version {
                None => state.hide(key),
                Some(version) => left.extend(state.delete_version(key, version).err()),
            }
        }
        Ok(left)
    }

    async fn holds_objects(&self) -> Result<bool, StoreError> {
        Ok(self.state().versioning.lock.is_some())
    }

    async fn hold(
        &self,
        key: &Key,
        version: Option<&VersionId>,
    ) -> Result<Option<Hold>, StoreError> {
        let state = self.state();
        Ok(version.and_then(|version| state.hold(key, version)))
    }

    async fn create_upload(&self, key: &Key) -> Result<UploadId, StoreError> {
        let mut state = self.state();
        state.next_upload += 1;
        let id = format!("upload-{:06}", state.next_upload);
        state.uploads.insert(
            id.clone(),
            Upload {
                key: key.clone(),
                parts: BTreeMap::new(),
            },
        );
        Ok(UploadId(id))
    }

    async fn upload_part(
        &self,
        key: &Key,
        upload: &UploadId,
        number: u32,
        body: Bytes,
        sha256: Sha256Digest,
    ) -> Result<Part, StoreError> {
        let received: Sha256Digest = Sha256::digest(&body).into();
        if received != sha256 {
            let message = "XAmzContentChecksumMismatch";
            return Err(StoreError::Corrupt(Detail::new(
                "upload part",
                key.as_str(),
                message,
            )));
        }
        let mut state = self.state();
        let found = state
            .uploads
            .get_mut(&upload.0)
            .filter(|found| found.key == *key);
        let found = found.ok_or_else(|| not_found("upload part", key, "NoSuchUpload"))?;
        let part = Part {
            number,
            size: body.len() as u64,
            etag: hex::encode(&received[..16]),
            sha256: Some(received),
        };
        // A real store does not hold on to the sender's buffers.
        let body = Bytes::copy_from_slice(&body);
        found.parts.insert(number, (body, part.clone()));
        Ok(part)
    }

    async fn complete_if_absent(
        &self,
        key: &Key,
        upload: &UploadId,
        parts: &[Part],
    ) -> Result<ObjectMeta, StoreError> {
        const OPERATION: &str = "complete upload";
        let mut state = self.state();
        let found = state
            .uploads
            .get(&upload.0)
            .filter(|found| found.key == *key);
        let found = found.ok_or_else(|| not_found(OPERATION, key, "NoSuchUpload"))?;
        if state.objects.contains_key(key) {
            let message = "PreconditionFailed";
            return Err(StoreError::AlreadyExists(Detail::new(
                OPERATION,
                key.as_str(),
                message,
            )));
        }
        let invalid = |code: &str| StoreError::Invalid(Detail::new(OPERATION, key.as_str(), code));
        let (mut body, mut digests) = (Vec::new(), Sha256::new());
        for (place, part) in parts.iter().enumerate() {
            let (bytes, stored) = found
                .parts
                .get(&part.number)
                .ok_or_else(|| invalid("InvalidPart"))?;
            if stored.etag != part.etag {
                return Err(invalid("InvalidPart"));
            }
            if bytes.len() < 5 << 20 && place + 1 < parts.len() {
                return Err(invalid("EntityTooSmall"));
            }
            body.extend_from_slice(bytes);
            digests.update(Sha256::digest(bytes));
        }
        let checksum = format!("{}-{}", BASE64.encode(digests.finalize()), parts.len());
        let object = state.object(body.into(), checksum);
        let answer = meta(key, &object);
        state.uploads.remove(&upload.0);
        state.objects.insert(key.clone(), object);
        Ok(answer)
    }

    async fn abort_upload(&self, _key: &Key, upload: &UploadId) -> Result<(), StoreError> {
        self.state().uploads.remove(&upload.0);
        Ok(())
    }

    async fn list_uploads(&self, key: &Key) -> Result<Vec<UploadId>, StoreError> {
        let state = self.state();
        let of_key = state
            .uploads
            .iter()
            .filter(|(_, upload)| upload.key == *key);
        Ok(of_key.map(|(id, _)| UploadId(id.clone())).collect())
    }

    async fn list_parts(&self, key: &Key, upload: &UploadId) -> Result<Vec<Part>, StoreError> {
        let state = self.state();
        let found = state
            .uploads
            .get(&upload.0)
            .filter(|found| found.key == *key);
        let found = found.ok_or_else(|| not_found("list parts", key, "NoSuchUpload"))?;
        Ok(found.parts.values().map(|(_, part)| part.clone()).collect())
    }
}
