//! A copy of made-up files through the pipeline and back, and a store that misbehaves on demand.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, SystemTime};

use async_trait::async_trait;
use bytes::Bytes;
use futures_util::StreamExt as _;
use futures_util::stream::BoxStream;
use pipeline::PipelineError;
use pipeline::budget::Budget;
use pipeline::download::Downloader;
use pipeline::extract::{ExtractOptions, Extracted, extract};
use pipeline::index::{FilePacker, Index, IndexBuilder};
use pipeline::meter::Meter;
use pipeline::pack::{
    EntryKind, IndexEntry, IndexInfo, KeyOf, Lane, PackInfo, PackOptions, PackSet,
};
use pipeline::retry::RetryPolicy;
use pipeline::store::{
    Detail, Key, ObjectBody, ObjectMeta, ObjectStore, Part, Sha256Digest, StoreError, UploadId,
};
use pipeline::throttle::Throttle;
use pipeline::upload::{UploadJournal, Uploader};
use support::memory_store::MemoryStore;
use tokio_util::sync::CancellationToken;

pub(crate) const MIB: usize = 1 << 20;
/// The least that one lane and an uploader need, see the test that says so.
pub(crate) const LEAST: usize = 8 * MIB + 14 * MIB;
pub(crate) const QUICK: RetryPolicy = RetryPolicy {
    attempts: 4,
    first_pause: Duration::from_millis(1),
    longest_pause: Duration::from_millis(4),
};

/// Bytes that do not compress, the same for the same seed.
pub(crate) fn noise(seed: u64, length: usize) -> Vec<u8> {
    let mut state = seed.wrapping_mul(2).wrapping_add(0x9E37_79B9_7F4A_7C15) | 1;
    let mut bytes = Vec::with_capacity(length + 8);
    while bytes.len() < length {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        bytes.extend_from_slice(&state.wrapping_mul(0x2545_F491_4F6C_DD1D).to_le_bytes());
    }
    bytes.truncate(length);
    bytes
}

/// A stand-in: a store in memory that can fail, lose replies and break bodies off.
#[derive(Debug, Default)]
pub(crate) struct Faulty {
    pub(crate) inner: MemoryStore,
    /// Every part from this number on is refused for good; 0: none.
    pub(crate) refuse_from_part: AtomicUsize,
    /// The next so many parts fail in a way that passes.
    pub(crate) flaky_parts: AtomicUsize,
    pub(crate) lose_complete_reply: AtomicBool,
    pub(crate) lose_create_reply: AtomicBool,
    pub(crate) lose_put_reply: AtomicBool,
    pub(crate) no_checksums: AtomicBool,
    /// Completion finds an object of somebody else.
    pub(crate) foreign_object: AtomicBool,
    /// Bodies end with an error after so many bytes; 0: never.
    pub(crate) break_after: AtomicUsize,
    /// How many more bodies break off.
    pub(crate) breaks: AtomicUsize,
    pub(crate) part_takes_ms: AtomicU64,
    pub(crate) parts_received: AtomicUsize,
    in_flight: AtomicUsize,
    pub(crate) most_in_flight: AtomicUsize,
    pub(crate) intended: Mutex<BTreeSet<Key>>,
}

fn lost(operation: &'static str, key: &Key) -> StoreError {
    StoreError::UnknownOutcome(Detail::new(operation, key.as_str(), "the reply was lost"))
}

fn away(operation: &'static str, key: &Key) -> StoreError {
    StoreError::Unavailable(Detail::new(operation, key.as_str(), "connection reset"))
}

impl Faulty {
    fn meta(&self, meta: ObjectMeta) -> ObjectMeta {
        let checksum = meta
            .checksum
            .filter(|_| !self.no_checksums.load(Ordering::SeqCst));
        ObjectMeta { checksum, ..meta }
    }
}

#[async_trait]
impl UploadJournal for Faulty {
    async fn intend(&self, key: &Key) -> Result<(), StoreError> {
        self.intended.lock().unwrap().insert(key.clone());
        Ok(())
    }
}

#[async_trait]
impl ObjectStore for Faulty {
    fn describe(&self) -> String {
        "memory that misbehaves (a stand-in)".into()
    }

    async fn now(&self) -> Result<SystemTime, StoreError> {
        self.inner.now().await
    }

    async fn put_if_absent(&self, key: &Key, body: Bytes) -> Result<ObjectMeta, StoreError> {
        let meta = self.inner.put_if_absent(key, body).await?;
        if self.lose_put_reply.swap(false, Ordering::SeqCst) {
            return Err(lost("put", key));
        }
        Ok(self.meta(meta))
    }

    async fn get(&self, key: &Key, range: Option<Range<u64>>) -> Result<ObjectBody, StoreError> {
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
        Ok(self.meta(self.inner.head(key).await?))
    }

    fn list(&self, prefix: &str) -> BoxStream<'static, Result<ObjectMeta, StoreError>> {
        self.inner.list(prefix)
    }

    async fn delete(&self, keys: &[Key]) -> Result<Vec<StoreError>, StoreError> {
        self.inner.delete(keys).await
    }

    async fn create_upload(&self, key: &Key) -> Result<UploadId, StoreError> {
        assert!(
            self.intended.lock().unwrap().contains(key),
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
        if self.foreign_object.load(Ordering::SeqCst) {
            self.inner
                .tamper(key, Some(Bytes::from_static(b"somebody else's")));
        }
        let meta = self.inner.complete_if_absent(key, upload, parts).await?;
        if self.lose_complete_reply.swap(false, Ordering::SeqCst) {
            return Err(lost("complete upload", key));
        }
        Ok(self.meta(meta))
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

/// Everything around one copy.
#[derive(Clone)]
pub(crate) struct World {
    pub(crate) store: Arc<Faulty>,
    pub(crate) budget: Budget,
    pub(crate) throttle: Throttle,
    pub(crate) cancel: CancellationToken,
}

pub(crate) struct Copy {
    pub(crate) packs: Vec<(Key, PackInfo)>,
    pub(crate) index: (Key, IndexInfo),
}

pub(crate) type FileSet = BTreeMap<String, Vec<u8>>;

pub(crate) fn pack_key(number: u32) -> Key {
    Key::new(format!("copy/pack-{number:05}")).unwrap()
}

impl World {
    pub(crate) fn new(budget: usize) -> Self {
        Self {
            store: Arc::default(),
            budget: Budget::new(budget),
            throttle: Throttle::new(None),
            cancel: CancellationToken::new(),
        }
    }

    pub(crate) fn uploader(&self) -> Uploader {
        let store = Arc::clone(&self.store);
        let uploader = Uploader::new(
            Arc::clone(&store) as _,
            self.budget.clone(),
            self.throttle.clone(),
            store,
            Arc::<Meter>::default(),
            self.cancel.clone(),
        );
        uploader.unwrap().with_retry(QUICK)
    }

    pub(crate) fn downloader(&self) -> Downloader {
        let store = Arc::clone(&self.store);
        let meter = Arc::<Meter>::default();
        let (budget, throttle) = (self.budget.clone(), self.throttle.clone());
        Downloader::new(store, budget, throttle, meter, self.cancel.clone()).with_retry(QUICK)
    }

    pub(crate) fn packs(
        &self,
        options: PackOptions,
    ) -> Result<(PackSet, Vec<Lane>), PipelineError> {
        let key_of: KeyOf = Arc::new(pack_key);
        PackSet::new(&self.uploader(), key_of, options)
    }

    /// Copies `files`, each cut in pieces of `piece` bytes that go to the lanes in turn.
    pub(crate) async fn copy(
        &self,
        files: &FileSet,
        options: PackOptions,
        piece: usize,
    ) -> Result<Copy, PipelineError> {
        let (set, lanes) = self.packs(options)?;
        let index = Arc::new(IndexBuilder::new());
        let mut shares: Vec<Vec<_>> = lanes.iter().map(|_| Vec::new()).collect();
        let mut turn = 0;
        for directory in directories(files) {
            let (mode, mtime, kind) = (0o700, None, EntryKind::Directory);
            let path = directory;
            index.add(IndexEntry {
                path,
                mode,
                mtime,
                kind,
            })?;
        }
        for (path, bytes) in files {
            let id = index.file(path, 0o640, Some(1_700_000_000))?;
            index.close_file(id, bytes.len() as u64);
            for (number, part) in bytes.chunks(piece).enumerate() {
                let offset = (number * piece) as u64;
                shares[turn % options.lanes].push((id, offset, part.to_vec()));
                turn += 1;
            }
        }
        let threads: Vec<_> = lanes
            .into_iter()
            .zip(shares)
            .map(|(lane, share)| {
                let mut packer = FilePacker::new(lane, Arc::clone(&index));
                tokio::task::spawn_blocking(move || {
                    for (id, offset, part) in share {
                        packer.chunk(id, offset, &part)?;
                    }
                    packer.finish()
                })
            })
            .collect();
        for thread in threads {
            thread.await.unwrap()?;
        }
        let packs = set.finish().await?;
        let key = Key::new("copy/index").unwrap();
        let info = index.write(&self.uploader(), key.clone()).await?;
        let packs = packs.into_iter().map(|info| (pack_key(info.number), info));
        Ok(Copy {
            packs: packs.collect(),
            index: (key, info),
        })
    }

    pub(crate) async fn extract(
        &self,
        copy: &Copy,
        target: &Path,
        jobs: usize,
    ) -> Result<Extracted, PipelineError> {
        let downloader = self.downloader();
        let (key, info) = copy.index.clone();
        let index = Index::open_with(downloader.clone(), key, &info)?;
        let options = ExtractOptions { jobs, times: true };
        let map = |entry: &IndexEntry| Ok(Some(target.join(&entry.path)));
        extract(&downloader, &index, &copy.packs, options, map).await
    }
}

/// The directories that paths lie in.
pub(crate) fn directories(files: &FileSet) -> BTreeSet<String> {
    let mut directories = BTreeSet::new();
    for path in files.keys() {
        for (at, _) in path.match_indices('/') {
            directories.insert(path[..at].to_owned());
        }
    }
    directories
}

/// The files below `root`.
pub(crate) fn read_tree(root: &Path) -> FileSet {
    let mut files = FileSet::new();
    let mut rest = vec![root.to_owned()];
    while let Some(directory) = rest.pop() {
        for entry in std::fs::read_dir(directory).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                rest.push(path);
            } else {
                let name = path
                    .strip_prefix(root)
                    .unwrap()
                    .to_str()
                    .unwrap()
                    .to_owned();
                files.insert(name, std::fs::read(path).unwrap());
            }
        }
    }
    files
}

pub(crate) fn run<F: Future>(future: F) -> F::Output {
    let mut builder = tokio::runtime::Builder::new_multi_thread();
    let runtime = builder.worker_threads(2).enable_all().build().unwrap();
    let output = runtime.block_on(future);
    runtime.shutdown_timeout(Duration::from_secs(5));
    output
}

/// Waits for what happens in the background, far longer than it takes.
pub(crate) async fn eventually(what: &str, mut happened: impl FnMut() -> bool) {
    for _ in 0..2000 {
        if happened() {
            return;
        }
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    panic!("{what} did not happen in 10 s");
}
