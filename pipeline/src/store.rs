//! The seam to object storage: what `gs_pitr` needs of a store, and how a store says no.

use std::fmt;
use std::ops::Range;
use std::sync::Arc;
use std::time::SystemTime;

use async_trait::async_trait;
use bytes::{Bytes, BytesMut};
use futures_util::StreamExt as _;
use futures_util::stream::BoxStream;

pub mod s3;
mod version;

pub use version::{Hold, ObjectVersion, Undeleted, VersionId};

/// The name of an object, relative to the repository's prefix.
///
/// Never empty, never begins or ends with `/`, has no empty, `.` or `..` component, at most 900 bytes.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Key(Arc<str>);

/// A string that cannot be a [`Key`].
#[derive(Debug, thiserror::Error)]
#[error("`{0}` is not a valid object key")]
pub struct InvalidKey(pub String);

impl Key {
    /// Checks `name` and makes it a key.
    ///
    /// # Errors
    /// [`InvalidKey`] if `name` breaks one of the rules of the type.
    pub fn new(name: impl Into<String>) -> Result<Self, InvalidKey> {
        let name = name.into();
        let bad_part = |part: &str| part.is_empty() || part == "." || part == "..";
        if name.len() > 900 || name.chars().any(char::is_control) || name.split('/').any(bad_part) {
            return Err(InvalidKey(name));
        }
        Ok(Self(name.into()))
    }

    /// The key as it stands after the prefix.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for Key {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl fmt::Debug for Key {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Key({})", self.0)
    }
}

/// A SHA-256 digest.
pub type Sha256Digest = [u8; 32];

/// What a store says of an object.
#[derive(Debug, Clone)]
pub struct ObjectMeta {
    /// The object's key.
    pub key: Key,
    /// Stored size in bytes.
    pub size: u64,
    /// The store's entity tag, without quotes.
    pub etag: Option<String>,
    /// SHA-256 the store keeps of the object, in its own words: base64, for a multipart object
    /// followed by `-` and the number of parts. Only answers to `head` and writes have it.
    pub checksum: Option<String>,
    /// When the store says the object was last written.
    pub last_modified: Option<SystemTime>,
}

/// The answer to a `get`: the object's description and its bytes, as they arrive.
pub struct ObjectBody {
    /// Size of the WHOLE object in bytes, also when only a range was asked for.
    pub size: u64,
    /// The bytes asked for. Ends with an error, never silently, if fewer arrive.
    pub stream: BoxStream<'static, Result<Bytes, StoreError>>,
}

impl fmt::Debug for ObjectBody {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ObjectBody")
            .field("size", &self.size)
            .finish_non_exhaustive()
    }
}

impl ObjectBody {
    /// Collects the bytes in memory; `limit` is the most that the caller has room for, in bytes.
    ///
    /// # Errors
    /// What the stream ends with, or [`StoreError::Corrupt`] if there is more than `limit`.
    pub async fn collect(mut self, key: &Key, limit: usize) -> Result<Bytes, StoreError> {
        let mut all = BytesMut::new();
        while let Some(chunk) = self.stream.next().await {
            let chunk = chunk?;
            if all.len() + chunk.len() > limit {
                let message = format!("object is larger than the {limit} bytes expected");
                return Err(StoreError::Corrupt(Detail::new(
                    "get",
                    key.as_str(),
                    message,
                )));
            }
            all.extend_from_slice(&chunk);
        }
        Ok(all.freeze())
    }
}

/// The store's name for a multipart upload under way.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct UploadId(pub String);

/// A part that the store has confirmed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Part {
    /// 1 to 10,000.
    pub number: u32,
    /// Size in bytes (0 if the store did not say).
    pub size: u64,
    /// The store's entity tag for the part.
    pub etag: String,
    /// SHA-256 of the part's bytes; for a part just sent, the one we computed and the store confirmed.
    pub sha256: Option<Sha256Digest>,
}

/// What failed, where, in the server's own words.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Detail {
    /// The call, such as `put`, `get`, `head`, `upload part`.
    pub operation: &'static str,
    /// The key or prefix it was about.
    pub key: String,
    /// The server's own words (code and message), or the client's if the server was not reached.
    pub message: String,
}

impl Detail {
    /// A detail of `operation` on `key`.
    pub fn new(operation: &'static str, key: &str, message: impl Into<String>) -> Box<Self> {
        Box::new(Self {
            operation,
            key: key.to_owned(),
            message: message.into(),
        })
    }
}

impl fmt::Display for Detail {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} `{}`: {}", self.operation, self.key, self.message)
    }
}

/// Why a store did not do what it was asked, by what the caller can do about it.
#[derive(Debug, Clone, thiserror::Error)]
pub enum StoreError {
    /// No object (or no upload) of that name.
    #[error("not found: {0}")]
    NotFound(Box<Detail>),
    /// No bucket of that name.
    #[error("the bucket does not exist: {0}")]
    NoSuchBucket(Box<Detail>),
    /// Create-if-absent found an object of that name. Whose it is must be read back.
    #[error("exists already: {0}")]
    AlreadyExists(Box<Detail>),
    /// The store knows us and says no.
    #[error("permission denied: {0}")]
    PermissionDenied(Box<Detail>),
    /// The credentials are missing, unknown, expired or wrong.
    #[error("credentials refused: {0}")]
    Unauthenticated(Box<Detail>),
    /// The request itself is wrong: region, endpoint, a setting the store does not support.
    #[error("request refused: {0}")]
    Invalid(Box<Detail>),
    /// The store asks us to slow down, after all attempts.
    #[error("throttled: {0}")]
    Throttled(Box<Detail>),
    /// The store was not reached or failed inside; nothing was written by this call.
    #[error("store unavailable: {0}")]
    Unavailable(Box<Detail>),
    /// The request was sent and its reply lost: it may or may not have taken effect. Read back.
    #[error("outcome unknown: {0}")]
    UnknownOutcome(Box<Detail>),
    /// Bytes or sizes are not what was written.
    #[error("corrupt: {0}")]
    Corrupt(Box<Detail>),
}

/// Whether doing the same again can help.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Retry {
    /// The same call would fail the same way.
    Permanent,
    /// The same call may succeed later.
    Transient,
    /// Find out first what the last call did.
    ReadBack,
}

impl StoreError {
    /// What failed, where, in whose words.
    #[must_use]
    pub fn detail(&self) -> &Detail {
        match self {
            Self::NotFound(detail)
            | Self::NoSuchBucket(detail)
            | Self::AlreadyExists(detail)
            | Self::PermissionDenied(detail)
            | Self::Unauthenticated(detail)
            | Self::Invalid(detail)
            | Self::Throttled(detail)
            | Self::Unavailable(detail)
            | Self::UnknownOutcome(detail)
            | Self::Corrupt(detail) => detail,
        }
    }

    /// Whether doing the same again can help.
    #[must_use]
    pub fn retry(&self) -> Retry {
        match self {
            Self::Throttled(_) | Self::Unavailable(_) => Retry::Transient,
            Self::UnknownOutcome(_) => Retry::ReadBack,
            _ => Retry::Permanent,
        }
    }
}

/// What `gs_pitr` needs of an object store, and no more.
///
/// Implementations retry inside what can be repeated safely, each attempt under a deadline, so that
/// no call hangs for ever. Every future may be dropped: the call's outcome is then unknown.
/// Nothing is ever overwritten through this trait.
#[async_trait]
pub trait ObjectStore: Send + Sync + fmt::Debug + 'static {
    /// The store in a person's words, such as `s3://bucket/prefix at https://host:9000`.
    fn describe(&self) -> String;

    /// The time by the store's own clock, as an answer to a request made now says it (the `Date` of its
    /// reply). Whole seconds, cut off, and a little older than the moment this returns: compare it only
    /// with [`ObjectMeta::last_modified`], never with a clock of this machine.
    ///
    /// # Errors
    /// If the store cannot be asked, or answers without a date.
    async fn now(&self) -> Result<SystemTime, StoreError>;

    /// Writes `body` under `key` only if there is no such object. The body's SHA-256 is sent along and
    /// the store's answer compared.
    ///
    /// # Errors
    /// [`StoreError::AlreadyExists`] if there is an object, also if it is ours and the reply to an
    /// earlier attempt was lost; [`StoreError::UnknownOutcome`] if the reply was lost. Both: read back.
    async fn put_if_absent(&self, key: &Key, body: Bytes) -> Result<ObjectMeta, StoreError>;

    /// Reads an object, or the half-open byte `range` of it.
    ///
    /// # Errors
    /// [`StoreError::NotFound`]; [`StoreError::Corrupt`] if the range begins or ends past the end.
    async fn get(&self, key: &Key, range: Option<Range<u64>>) -> Result<ObjectBody, StoreError>;

    /// Describes an object.
    ///
    /// # Errors
    /// [`StoreError::NotFound`] if there is none.
    async fn head(&self, key: &Key) -> Result<ObjectMeta, StoreError>;

    /// All objects whose key begins with `prefix` (any string; empty: all), in the order of their
    /// keys' bytes, fetched page by page as the stream is read. The stream ends after an error.
    ///
    /// No key may be another's followed by `/` and more: MinIO stores such an object and does not list it.
    fn list(&self, prefix: &str) -> BoxStream<'static, Result<ObjectMeta, StoreError>>;

    /// Deletes objects; one that does not exist counts as deleted. Returns those that could not be. A store
    /// that keeps versions only hides them: see [`ObjectStore::delete_versions`].
    ///
    /// # Errors
    /// If the request as a whole failed; some objects may have been deleted.
    async fn delete(&self, keys: &[Key]) -> Result<Vec<StoreError>, StoreError>;

    /// All versions, and all markers of deletions, of the objects whose key begins with `prefix`, keys in no
    /// particular order. Of a store that keeps no versions: what [`ObjectStore::list`] says. The stream ends
    /// after an error.
    fn list_versions(&self, prefix: &str) -> BoxStream<'static, Result<ObjectVersion, StoreError>> {
        let listed = self.list(prefix);
        listed.map(|object| object.map(ObjectVersion::only)).boxed()
    }

    /// Deletes versions (and markers) for good; what does not exist counts as deleted. A pair without a
    /// version is for stores that keep none. Returns those that were not deleted: something holds them, see
    /// [`ObjectStore::hold`], or the right to delete them is missing.
    ///
    /// # Errors
    /// If a request as a whole failed; some of the versions may have been deleted.
    async fn delete_versions(
        &self,
        versions: &[(Key, Option<VersionId>)],
    ) -> Result<Vec<Undeleted>, StoreError> {
        let keys: Vec<Key> = versions.iter().map(|(key, _)| key.clone()).collect();
        let left = self.delete(&keys).await?.into_iter();
        let left = left.filter_map(|error| {
            let key = keys.iter().find(|key| key.as_str() == error.detail().key);
            // A refusal that names none of them is about all.
            let key = key.or(keys.first())?.clone();
            let version = None;
            Some(Undeleted {
                key,
                version,
                error,
            })
        });
        Ok(left.collect())
    }

    /// Whether the store may hold objects back from deletion at all, so that it is worth asking for each.
    ///
    /// # Errors
    /// If the store cannot be asked.
    async fn holds_objects(&self) -> Result<bool, StoreError> {
        Ok(false)
    }

    /// What holds this version back from deletion, if anything does.
    ///
    /// # Errors
    /// [`StoreError::NotFound`] if there is no such version.
    async fn hold(
        &self,
        key: &Key,
        version: Option<&VersionId>,
    ) -> Result<Option<Hold>, StoreError> {
        self.head(key).await?;
        let _ = version;
        Ok(None)
    }

    /// Begins a multipart upload (SHA-256 of every part required).
    ///
    /// # Errors
    /// [`StoreError::UnknownOutcome`] if the reply was lost: an upload may stand under this key.
    async fn create_upload(&self, key: &Key) -> Result<UploadId, StoreError>;

    /// Sends part `number` (from 1; all but the last at least 5 MiB). May be repeated.
    ///
    /// # Errors
    /// [`StoreError::Corrupt`] if the store received other bytes than `sha256` names;
    /// [`StoreError::NotFound`] if there is no such upload.
    async fn upload_part(
        &self,
        key: &Key,
        upload: &UploadId,
        number: u32,
        body: Bytes,
        sha256: Sha256Digest,
    ) -> Result<Part, StoreError>;

    /// Makes the object of its parts, only if there is none under `key`. The upload stays, and is to be
    /// aborted, if this answers [`StoreError::AlreadyExists`].
    ///
    /// # Errors
    /// [`StoreError::AlreadyExists`], [`StoreError::UnknownOutcome`] and [`StoreError::NotFound`] (no
    /// such upload, perhaps because an earlier attempt completed it): read back.
    async fn complete_if_absent(
        &self,
        key: &Key,
        upload: &UploadId,
        parts: &[Part],
    ) -> Result<ObjectMeta, StoreError>;

    /// Ends an upload and frees its parts. One that does not exist counts as aborted.
    ///
    /// # Errors
    /// If the store cannot be asked or refuses.
    async fn abort_upload(&self, key: &Key, upload: &UploadId) -> Result<(), StoreError>;

    /// The uploads under way for exactly this key.
    ///
    /// # Errors
    /// If the store cannot be asked or refuses.
    async fn list_uploads(&self, key: &Key) -> Result<Vec<UploadId>, StoreError>;

    /// The parts the store has of an upload, by number.
    ///
    /// # Errors
    /// [`StoreError::NotFound`] if there is no such upload.
    async fn list_parts(&self, key: &Key, upload: &UploadId) -> Result<Vec<Part>, StoreError>;
}
