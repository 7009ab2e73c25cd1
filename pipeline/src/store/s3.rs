//! The backend for S3 and what speaks its protocol, over `aws-sdk-s3`.
//!
//! Every object and part is sent with its SHA-256, which the store checks and signs for. Nothing is
//! overwritten: what makes an object carries `If-None-Match: *`. Repetitions are made here
//! (`attempts`), not by the SDK, because a reply that was lost changes what a later refusal means.
//! `HTTP_PROXY` and its kin are not read.

use std::fmt;
use std::future::Future;
use std::ops::Range;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use async_trait::async_trait;
use aws_sdk_s3::Client;
use aws_sdk_s3::config::http::HttpResponse;
use aws_sdk_s3::error::SdkError;
use aws_sdk_s3::primitives::{ByteStream, DateTime};
use aws_sdk_s3::types::{ChecksumAlgorithm, ChecksumMode};
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use bytes::Bytes;
use futures_util::stream::{self, BoxStream};
use futures_util::{StreamExt as _, TryStreamExt as _};
use sha2::{Digest as _, Sha256};

use self::attempts::{Effect, Policy};
use self::client::SignDigest;
pub use self::config::S3Config;
pub use self::credentials::CredentialSource;
use self::credentials::Provider;
use self::failure::{Failure, Subject};
use super::{
    Hold, Key, ObjectBody, ObjectMeta, ObjectStore, ObjectVersion, Part, Sha256Digest, StoreError,
    Undeleted, UploadId, VersionId,
};

mod attempts;
mod body;
mod client;
mod clock;
mod config;
mod credentials;
mod failure;
mod listing;
mod multipart;
mod versions;

/// Bodies above this many bytes are hashed off the I/O threads.
const HASH_INLINE: usize = 256 << 10;

/// A bucket, or the part of one below a prefix. Clones share connections.
#[derive(Clone)]
pub struct S3Store {
    shared: Arc<Shared>,
}

struct Shared {
    client: Client,
    config: S3Config,
    keys: Arc<Provider>,
    policy: Policy,
    https: bool,
}

impl fmt::Debug for S3Store {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("S3Store").field(&self.shared.config).finish()
    }
}

impl S3Store {
    /// Sets the client up. No request is sent, no file but the system's certificates is read.
    ///
    /// # Errors
    /// [`StoreError::Invalid`] if the configuration cannot be meant: no bucket, an endpoint that is no
    /// URL, a CA file without a certificate.
    pub fn new(mut config: S3Config) -> Result<Self, StoreError> {
        config.check()?;
        let keys = Arc::new(Provider::new(config.credentials.clone()));
        let client = client::client(&config, &keys)?;
        let policy = Policy {
            attempts: config.attempts.max(1),
            first_pause: config.first_pause,
            longest_pause: config.longest_pause,
        };
        let https = client::is_https(&config);
        Ok(Self {
            shared: Arc::new(Shared {
                client,
                config,
                keys,
                policy,
                https,
            }),
        })
    }

    /// What `key` is called in the bucket.
    fn name(&self, key: &str) -> String {
        match self.shared.config.prefix.as_str() {
            "" => key.to_owned(),
            prefix => format!("{prefix}/{key}"),
        }
    }

    /// The key of what is called `name` in the bucket; none if it is not below our prefix or no key.
    fn key_of(&self, name: &str) -> Option<Key> {
        let rest = match self.shared.config.prefix.as_str() {
            "" => name,
            prefix => name.strip_prefix(prefix)?.strip_prefix('/')?,
        };
        Key::new(rest).ok()
    }

    fn bucket(&self) -> &str {
        &self.shared.config.bucket
    }

    /// The time one attempt to send `bytes` may take.
    fn deadline(&self, bytes: usize) -> Duration {
        let config = &self.shared.config;
        let sending = bytes as u64 / config.slowest_upload.max(1);
        config.reply_timeout + Duration::from_secs(sending)
    }

    /// Makes attempts of a call that sends no body to speak of.
    async fn run<T, E, F, A>(
        &self,
        subject: Subject<'_>,
        effect: Effect,
        deadline: Duration,
        attempt: A,
    ) -> Result<T, StoreError>
    where
        E: aws_sdk_s3::error::ProvideErrorMetadata + std::error::Error + 'static,
        A: Fn() -> F,
        F: Future<Output = Result<T, SdkError<E, HttpResponse>>>,
    {
        let Shared { policy, keys, .. } = &*self.shared;
        let attempt = || async { attempt().await.map_err(|error| subject.failure(&error)) };
        policy.run(subject, effect, deadline, keys, attempt).await
    }

    /// A call that only reads, or may be repeated as if it did.
    async fn ask<T, E, F, A>(&self, subject: Subject<'_>, attempt: A) -> Result<T, StoreError>
    where
        E: aws_sdk_s3::error::ProvideErrorMetadata + std::error::Error + 'static,
        A: Fn() -> F,
        F: Future<Output = Result<T, SdkError<E, HttpResponse>>>,
    {
        self.run(subject, Effect::Repeatable, self.deadline(0), attempt)
            .await
    }

    /// The store's own words on why `head` failed: answers to HEAD have no body to hold them.
    async fn words_for_head(&self, subject: Subject<'_>, silent: Failure) -> Failure {
        let answer = self
            .shared
            .client
            .get_object()
            .bucket(self.bucket())
            .key(self.name(subject.key))
            .range("bytes=0-0")
            .send()
            .await;
        match answer {
            Ok(_) => silent,
            Err(error) => subject.failure(&error),
        }
    }

    async fn get_range(&self, key: &Key, range: Option<&str>) -> Result<Got, StoreError> {
        let subject = Subject {
            operation: "get",
            key: key.as_str(),
        };
        let answer = self
            .ask(subject, || {
                self.shared
                    .client
                    .get_object()
                    .bucket(self.bucket())
                    .key(self.name(key.as_str()))
                    .set_range(range.map(str::to_owned))
                    .send()
            })
            .await?;
        let length = answer.content_length.and_then(|n| u64::try_from(n).ok());
        let size = match (&answer.content_range, range) {
            // `bytes 0-7/1234`
            (Some(stated), _) => stated.rsplit('/').next().and_then(|n| n.parse().ok()),
            (None, None) => length,
            (None, Some(_)) => None,
        };
        let (Some(length), Some(size)) = (length, size) else {
            let words = "the answer does not say how long it is";
            return Err(StoreError::Invalid(subject.detail(words)));
        };
        Ok(Got {
            body: answer.body,
            length,
            size,
        })
    }
}

/// The answer to a `get` before its bytes.
struct Got {
    body: ByteStream,
    /// Bytes announced.
    length: u64,
    /// Bytes of the whole object.
    size: u64,
}

/// SHA-256 of a body, off the I/O threads if it is large.
async fn sha256(body: &Bytes) -> Sha256Digest {
    if body.len() > HASH_INLINE {
        let large = body.clone();
        if let Ok(digest) = tokio::task::spawn_blocking(move || Sha256::digest(&large).into()).await
        {
            return digest;
        }
    }
    Sha256::digest(body).into()
}

/// Compares the checksum a store answered, if it did, with ours.
fn compare(subject: Subject<'_>, ours: &str, theirs: Option<&str>) -> Result<(), StoreError> {
    match theirs {
        Some(theirs) if theirs != ours => {
            let words = format!("the store has SHA-256 {theirs}, sent was {ours}");
            Err(StoreError::Corrupt(subject.detail(words)))
        }
        _ => Ok(()),
    }
}

fn plain_etag(etag: Option<&str>) -> Option<String> {
    etag.map(|etag| etag.trim_matches('"').to_owned())
}

fn time(time: Option<&DateTime>) -> Option<SystemTime> {
    time.and_then(|&time| SystemTime::try_from(time).ok())
}

#[async_trait]
impl ObjectStore for S3Store {
    fn describe(&self) -> String {
        let config = &self.shared.config;
        let slash = if config.prefix.is_empty() { "" } else { "/" };
        let place = match &config.endpoint {
            Some(endpoint) => format!("at {endpoint}"),
            None => format!("in {}", client::region(config)),
        };
        format!("s3://{}{slash}{} {place}", config.bucket, config.prefix)
    }

    async fn now(&self) -> Result<SystemTime, StoreError> {
        self.date().await
    }

    async fn put_if_absent(&self, key: &Key, body: Bytes) -> Result<ObjectMeta, StoreError> {
        let subject = Subject {
            operation: "put",
            key: key.as_str(),
        };
        let digest = sha256(&body).await;
        let checksum = BASE64.encode(digest);
        let deadline = self.deadline(body.len());
        let answer = self
            .run(subject, Effect::Conditional, deadline, || {
                let call = self
                    .shared
                    .client
                    .put_object()
                    .bucket(self.bucket())
                    .key(self.name(key.as_str()))
                    .if_none_match("*")
                    .checksum_sha256(&checksum)
                    .body(ByteStream::from(body.clone()))
                    .customize();
                // The checksum is among the signed headers: over TLS that is enough, and spares the
                // store from hashing twice.
                if self.shared.https {
                    call.disable_payload_signing().send()
                } else {
                    call.interceptor(SignDigest(hex::encode(digest))).send()
                }
            })
            .await?;
        compare(subject, &checksum, answer.checksum_sha256())?;
        Ok(ObjectMeta {
            key: key.clone(),
            size: body.len() as u64,
            etag: plain_etag(answer.e_tag()),
            checksum: answer.checksum_sha256,
            last_modified: None,
        })
    }

    async fn get(&self, key: &Key, range: Option<Range<u64>>) -> Result<ObjectBody, StoreError> {
        let wait = self.shared.config.reply_timeout;
        let Some(range) = range else {
            let got = self.get_range(key, None).await?;
            return Ok(ObjectBody {
                size: got.size,
                stream: body::checked(key.clone(), got.body, got.length, wait),
            });
        };
        let past_end = |size: u64| {
            let words = format!(
                "bytes {}..{} of an object of {size}",
                range.start, range.end
            );
            let subject = Subject {
                operation: "get",
                key: key.as_str(),
            };
            Err(StoreError::Corrupt(subject.detail(words)))
        };
        // HTTP has no way to ask for no bytes.
        if range.start >= range.end {
            let size = self.head(key).await?.size;
            if range.start > range.end || range.end > size {
                return past_end(size);
            }
            let stream = stream::empty().boxed();
            return Ok(ObjectBody { size, stream });
        }
        let asked = format!("bytes={}-{}", range.start, range.end - 1);
        let got = self.get_range(key, Some(&asked)).await?;
        // A store cuts a range that ends past the end, and says so only in its length.
        if range.end > got.size || got.length != range.end - range.start {
            return past_end(got.size);
        }
        Ok(ObjectBody {
            size: got.size,
            stream: body::checked(key.clone(), got.body, got.length, wait),
        })
    }

    async fn head(&self, key: &Key) -> Result<ObjectMeta, StoreError> {
        let subject = Subject {
            operation: "head",
            key: key.as_str(),
        };
        let Shared { policy, keys, .. } = &*self.shared;
        let attempt = || async {
            let answer = self
                .shared
                .client
                .head_object()
                .bucket(self.bucket())
                .key(self.name(key.as_str()))
                .checksum_mode(ChecksumMode::Enabled)
                .send()
                .await;
            match answer {
                Ok(answer) => Ok(answer),
                Err(error) => {
                    let silent = error
                        .raw_response()
                        .is_some_and(|raw| raw.headers().get("x-minio-error-code").is_none());
                    let failure = subject.failure(&error);
                    if silent {
                        Err(self.words_for_head(subject, failure).await)
                    } else {
                        Err(failure)
                    }
                }
            }
        };
        let answer = policy
            .run(subject, Effect::Repeatable, self.deadline(0), keys, attempt)
            .await?;
        let Some(size) = answer.content_length().and_then(|n| u64::try_from(n).ok()) else {
            let words = "the answer does not say how long the object is";
            return Err(StoreError::Invalid(subject.detail(words)));
        };
        Ok(ObjectMeta {
            key: key.clone(),
            size,
            etag: plain_etag(answer.e_tag()),
            checksum: answer.checksum_sha256().map(str::to_owned),
            last_modified: time(answer.last_modified()),
        })
    }

    fn list(&self, prefix: &str) -> BoxStream<'static, Result<ObjectMeta, StoreError>> {
        self.pages(prefix)
            .map_ok(|page| stream::iter(page.into_iter().map(Ok)))
            .try_flatten()
            .boxed()
    }

    async fn delete(&self, keys: &[Key]) -> Result<Vec<StoreError>, StoreError> {
        self.delete_all(keys).await
    }

    fn list_versions(&self, prefix: &str) -> BoxStream<'static, Result<ObjectVersion, StoreError>> {
        self.versions(prefix)
    }

    async fn delete_versions(
        &self,
        versions: &[(Key, Option<VersionId>)],
    ) -> Result<Vec<Undeleted>, StoreError> {
        self.delete_each_version(versions).await
    }

    async fn holds_objects(&self) -> Result<bool, StoreError> {
        self.has_object_lock().await
    }

    async fn hold(
        &self,
        key: &Key,
        version: Option<&VersionId>,
    ) -> Result<Option<Hold>, StoreError> {
        self.hold_of(key, version).await
    }

    async fn create_upload(&self, key: &Key) -> Result<UploadId, StoreError> {
        let subject = Subject {
            operation: "create upload",
            key: key.as_str(),
        };
        let answer = self
            .run(subject, Effect::Once, self.deadline(0), || {
                self.shared
                    .client
                    .create_multipart_upload()
                    .bucket(self.bucket())
                    .key(self.name(key.as_str()))
                    .checksum_algorithm(ChecksumAlgorithm::Sha256)
                    .send()
            })
            .await?;
        answer.upload_id.map(UploadId).ok_or_else(|| {
            let words = "the answer names no upload";
            StoreError::UnknownOutcome(subject.detail(words))
        })
    }

    async fn upload_part(
        &self,
        key: &Key,
        upload: &UploadId,
        number: u32,
        body: Bytes,
        sha256: Sha256Digest,
    ) -> Result<Part, StoreError> {
        self.send_part(key, upload, number, body, sha256).await
    }

    async fn complete_if_absent(
        &self,
        key: &Key,
        upload: &UploadId,
        parts: &[Part],
    ) -> Result<ObjectMeta, StoreError> {
        self.complete(key, upload, parts).await
    }

    async fn abort_upload(&self, key: &Key, upload: &UploadId) -> Result<(), StoreError> {
        self.abort(key, upload).await
    }

    async fn list_uploads(&self, key: &Key) -> Result<Vec<UploadId>, StoreError> {
        self.uploads_of(key).await
    }

    async fn list_parts(&self, key: &Key, upload: &UploadId) -> Result<Vec<Part>, StoreError> {
        self.parts_of(key, upload).await
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config(endpoint: &str) -> S3Config {
        S3Config {
            bucket: "bucket".into(),
            prefix: "/a/b/".into(),
            endpoint: Some(endpoint.into()),
            ..S3Config::default()
        }
    }

    #[tokio::test]
    async fn keys_lie_below_the_prefix() {
        let store = S3Store::new(config("http://localhost:1/")).unwrap();
        assert_eq!(store.name("c/d"), "a/b/c/d");
        assert_eq!(store.key_of("a/b/c/d"), Some(Key::new("c/d").unwrap()));
        assert_eq!(store.key_of("a/bc"), None);
        assert_eq!(store.describe(), "s3://bucket/a/b at http://localhost:1");
    }
}
