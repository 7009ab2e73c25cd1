//! Stores that break one promise each: every one is found, and by its name.

use std::ops::Range;
use std::time::SystemTime;

use async_trait::async_trait;
use bytes::Bytes;
use futures_util::StreamExt as _;
use futures_util::stream::{self, BoxStream};
use pipeline::probe::{self, ProbeError, ProbeKeys};
use pipeline::store::{
    Key, ObjectBody, ObjectMeta, ObjectStore, Part, Sha256Digest, StoreError, UploadId,
};
use sha2::{Digest as _, Sha256};
use support::memory_store::MemoryStore;

/// What a store does wrong.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Breach {
    None,
    /// Puts what is there already once more.
    Overwrites,
    /// Says that it is there, and puts it all the same.
    OverwritesInSilence,
    /// Keeps no checksum.
    NoChecksum,
    /// Keeps another one.
    OtherChecksum,
    /// Answers ranges with other bytes.
    Ranges,
    /// Does not list what was just written.
    Listing,
    /// Takes a part whatever its digest.
    AnyPart,
    /// Lists no uploads.
    NoUploads,
    /// Completes onto an object.
    CompletesTwice,
    /// Never answers to a list.
    Hangs,
}

#[derive(Debug)]
struct Store {
    inner: MemoryStore,
    breach: Breach,
}

impl Store {
    fn is(&self, breach: Breach) -> bool {
        self.breach == breach
    }
}

#[async_trait]
impl ObjectStore for Store {
    fn describe(&self) -> String {
        self.inner.describe()
    }

    async fn now(&self) -> Result<SystemTime, StoreError> {
        self.inner.now().await
    }

    async fn put_if_absent(&self, key: &Key, body: Bytes) -> Result<ObjectMeta, StoreError> {
        let put = self.inner.put_if_absent(key, body.clone()).await;
        if matches!(put, Err(StoreError::AlreadyExists(_)))
            && (self.is(Breach::Overwrites) || self.is(Breach::OverwritesInSilence))
        {
            self.inner.delete(std::slice::from_ref(key)).await?;
            let again = self.inner.put_if_absent(key, body).await;
            if self.is(Breach::Overwrites) {
                return again;
            }
        }
        put
    }

    async fn get(&self, key: &Key, range: Option<Range<u64>>) -> Result<ObjectBody, StoreError> {
        match range {
            Some(range) if self.is(Breach::Ranges) => {
                let moved = range.start + 1..range.end + 1;
                self.inner.get(key, Some(moved)).await
            }
            range => self.inner.get(key, range).await,
        }
    }

    async fn head(&self, key: &Key) -> Result<ObjectMeta, StoreError> {
        let mut meta = self.inner.head(key).await?;
        if self.is(Breach::NoChecksum) {
            meta.checksum = None;
        }
        if self.is(Breach::OtherChecksum) {
            meta.checksum = Some("AAAA".into());
        }
        Ok(meta)
    }

    fn list(&self, prefix: &str) -> BoxStream<'static, Result<ObjectMeta, StoreError>> {
        match self.breach {
            Breach::Listing => stream::empty().boxed(),
            Breach::Hangs => stream::pending().boxed(),
            _ => self.inner.list(prefix),
        }
    }

    async fn delete(&self, keys: &[Key]) -> Result<Vec<StoreError>, StoreError> {
        self.inner.delete(keys).await
    }

    async fn create_upload(&self, key: &Key) -> Result<UploadId, StoreError> {
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
        let digest = if self.is(Breach::AnyPart) {
            Sha256::digest(&body).into()
        } else {
            sha256
        };
        self.inner
            .upload_part(key, upload, number, body, digest)
            .await
    }

    async fn complete_if_absent(
        &self,
        key: &Key,
        upload: &UploadId,
        parts: &[Part],
    ) -> Result<ObjectMeta, StoreError> {
        if self.is(Breach::CompletesTwice) {
            self.inner.delete(std::slice::from_ref(key)).await?;
        }
        self.inner.complete_if_absent(key, upload, parts).await
    }

    async fn abort_upload(&self, key: &Key, upload: &UploadId) -> Result<(), StoreError> {
        self.inner.abort_upload(key, upload).await
    }

    async fn list_uploads(&self, key: &Key) -> Result<Vec<UploadId>, StoreError> {
        if self.is(Breach::NoUploads) {
            return Ok(Vec::new());
        }
        self.inner.list_uploads(key).await
    }

    async fn list_parts(&self, key: &Key, upload: &UploadId) -> Result<Vec<Part>, StoreError> {
        self.inner.list_parts(key, upload).await
    }
}

fn key(name: &str) -> Key {
    Key::new(name).unwrap()
}

/// The probes that failed, and how many were made.
async fn broken(breach: Breach) -> (Vec<(&'static str, ProbeError)>, usize) {
    let store = Store {
        inner: MemoryStore::default(),
        breach,
    };
    let keys = ProbeKeys {
        absent: key("probe/absent"),
        object: key("probe/object"),
        upload: key("probe/upload"),
    };
    let probes = probe::probe(&store, &keys).await;
    let made = probes.all.len();
    let failed = probes.all.into_iter();
    let failed = failed.filter_map(|probe| Some((probe.name, probe.result.err()?)));
    // Whatever was found, no upload is left under way.
    assert_eq!(
        store.inner.list_uploads(&keys.upload).await.unwrap(),
        [],
        "{breach:?}"
    );
    (failed.collect(), made)
}

#[tokio::test]
async fn every_breach_is_found_by_its_name() {
    let (none, made) = broken(Breach::None).await;
    assert!(none.is_empty(), "{none:?}");
    assert_eq!(made, 8);
    for (breach, name) in [
        (Breach::Overwrites, "create-if-absent"),
        (Breach::OverwritesInSilence, "create-if-absent"),
        (Breach::OtherChecksum, "checksums kept"),
        (Breach::Ranges, "reads and ranges"),
        (Breach::Listing, "listing"),
        (Breach::AnyPart, "parts"),
        (Breach::NoUploads, "parts"),
        (Breach::CompletesTwice, "complete-if-absent"),
    ] {
        let (found, _) = broken(breach).await;
        let first = found
            .first()
            .unwrap_or_else(|| panic!("{breach:?} is not found"));
        assert_eq!(first.0, name, "{breach:?}: {found:?}");
        assert!(
            matches!(first.1, ProbeError::Broken(_)),
            "{breach:?}: {found:?}"
        );
    }
    let (lacking, _) = broken(Breach::NoChecksum).await;
    assert!(
        matches!(
            lacking.as_slice(),
            [("checksums kept", ProbeError::Lacking(_))]
        ),
        "{lacking:?}"
    );
}

#[tokio::test]
async fn a_store_that_does_not_answer_is_given_up() {
    let (late, made) = broken(Breach::Hangs).await;
    assert!(
        matches!(late.as_slice(), [("listing", ProbeError::Late(_))]),
        "{late:?}"
    );
    assert_eq!(made, 8, "the others were asked all the same");
}

#[tokio::test]
async fn a_race_shows_a_store_that_overwrites() {
    for (breach, winners) in [(Breach::None, 1), (Breach::Overwrites, 4)] {
        let store = Store {
            inner: MemoryStore::default(),
            breach,
        };
        let bodies: Vec<_> = (0..4).map(|n| format!("body {n}")).collect();
        let answers = probe::race(&store, &key("probe/race"), &bodies).await;
        let won = answers.iter().filter(|answer| answer.is_ok()).count();
        assert_eq!(won, winners, "{breach:?}: {answers:?}");
    }
}
