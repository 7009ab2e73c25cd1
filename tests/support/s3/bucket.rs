//! The stand-in's memory: one bucket, its objects and the uploads under way.
//!
//! One lock around each change makes conditional writes atomic.

use std::collections::BTreeMap;
use std::time::SystemTime;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use bytes::Bytes;
use hyper::StatusCode;
use s3s::dto::CompletedPart;
use s3s::{S3Error, S3ErrorCode, S3Result, s3_error};
use sha2::{Digest as _, Sha256};

/// The least size of a part that is not the last, in bytes.
const SMALLEST_PART: usize = 5 << 20;

/// An object at rest. A multipart object keeps its parts as they came: nothing is copied.
#[derive(Debug, Clone)]
pub(super) struct Object {
    pub(super) chunks: Vec<Bytes>,
    pub(super) size: u64,
    pub(super) etag: String,
    /// Base64 of the SHA-256; for a multipart object of the parts' digests, then `-` and their number.
    pub(super) checksum: String,
    pub(super) written: SystemTime,
}

/// A part at rest.
#[derive(Debug, Clone)]
pub(super) struct StoredPart {
    pub(super) body: Bytes,
    pub(super) etag: String,
    pub(super) digest: [u8; 32],
    pub(super) written: SystemTime,
}

#[derive(Debug)]
pub(super) struct Upload {
    pub(super) key: String,
    pub(super) parts: BTreeMap<i32, StoredPart>,
    pub(super) started: SystemTime,
}

/// The bucket.
#[derive(Debug, Default)]
pub(super) struct Bucket {
    pub(super) objects: BTreeMap<String, Object>,
    pub(super) uploads: BTreeMap<String, Upload>,
    next_upload: u64,
}

/// An entity tag that is no MD5, as that of an encrypted object in S3.
pub(super) fn etag(digest: &[u8; 32]) -> String {
    hex::encode(&digest[..16])
}

/// An error of S3's that has no constant of its own.
pub(super) fn custom(status: StatusCode, code: &'static str, message: &'static str) -> S3Error {
    let code = S3ErrorCode::from_bytes(code.as_bytes()).unwrap_or(S3ErrorCode::InternalError);
    let mut error = S3Error::with_message(code, message);
    error.set_status_code(status);
    error
}

impl Object {
    pub(super) fn whole(body: Bytes, digest: &[u8; 32]) -> Self {
        Self {
            size: body.len() as u64,
            chunks: vec![body],
            etag: etag(digest),
            checksum: BASE64.encode(digest),
            written: SystemTime::now(),
        }
    }

    /// The bytes from `start` to `end` in pieces of at most `piece` bytes.
    pub(super) fn slice(&self, start: u64, end: u64, piece: usize) -> Vec<Bytes> {
        let (mut pieces, mut at) = (Vec::new(), 0_u64);
        for chunk in &self.chunks {
            let length = chunk.len() as u64;
            let from = start.clamp(at, at + length) - at;
            let to = end.clamp(at, at + length) - at;
            at += length;
            let within = |n: u64| usize::try_from(n).expect("within a chunk");
            let mut rest = chunk.slice(within(from)..within(to));
            while !rest.is_empty() {
                pieces.push(rest.split_to(piece.min(rest.len())));
            }
        }
        pieces
    }
}

impl Bucket {
    pub(super) fn put(&mut self, key: &str, object: Object, only_new: bool) -> S3Result<()> {
        self.check_new(key, only_new)?;
        self.objects.insert(key.to_owned(), object);
        Ok(())
    }

    pub(super) fn object(&self, key: &str) -> S3Result<&Object> {
        let found = self.objects.get(key);
        found.ok_or_else(|| s3_error!(NoSuchKey, "The specified key does not exist."))
    }

    pub(super) fn create_upload(&mut self, key: &str) -> String {
        self.next_upload += 1;
        let id = format!("upload-{:08}", self.next_upload);
        let upload = Upload {
            key: key.to_owned(),
            parts: BTreeMap::new(),
            started: SystemTime::now(),
        };
        self.uploads.insert(id.clone(), upload);
        id
    }

    pub(super) fn upload(&mut self, key: &str, id: &str) -> S3Result<&mut Upload> {
        let found = self.uploads.get_mut(id).filter(|found| found.key == key);
        found.ok_or_else(|| {
            s3_error!(
                NoSuchUpload,
                "The specified multipart upload does not exist. The upload ID may be invalid, or \
                 the upload may have been aborted or completed."
            )
        })
    }

    /// As MinIO does it: the condition is looked at before the upload is.
    pub(super) fn complete(
        &mut self,
        key: &str,
        id: &str,
        named: &[CompletedPart],
        only_new: bool,
    ) -> S3Result<Object> {
        self.check_new(key, only_new)?;
        let object = self.upload(key, id)?.assemble(named)?;
        self.uploads.remove(id);
        self.objects.insert(key.to_owned(), object.clone());
        Ok(object)
    }

    fn check_new(&self, key: &str, only_new: bool) -> S3Result<()> {
        if only_new && self.objects.contains_key(key) {
            return Err(s3_error!(
                PreconditionFailed,
                "At least one of the pre-conditions you specified did not hold"
            ));
        }
        Ok(())
    }
}

impl Upload {
    fn assemble(&self, named: &[CompletedPart]) -> S3Result<Object> {
        if named.is_empty() {
            return Err(s3_error!(MalformedXML, "no part is named"));
        }
        let (mut chunks, mut all, mut before) = (Vec::new(), Sha256::new(), 0);
        for (place, part) in named.iter().enumerate() {
            let number = part.part_number.unwrap_or_default();
            if number <= before {
                return Err(s3_error!(
                    InvalidPartOrder,
                    "parts are not in ascending order"
                ));
            }
            before = number;
            let stored = self.parts.get(&number).filter(|stored| {
                let etag = part.e_tag.as_ref().map(s3s::dto::ETag::value);
                let checksum = part.checksum_sha256.as_deref();
                etag == Some(&stored.etag)
                    && checksum == Some(BASE64.encode(stored.digest).as_str())
            });
            let stored = stored.ok_or_else(|| {
                s3_error!(
                    InvalidPart,
                    "One or more of the specified parts could not be found. The part may not have \
                     been uploaded, or its entity tag or checksum is another."
                )
            })?;
            if stored.body.len() < SMALLEST_PART && place + 1 < named.len() {
                return Err(s3_error!(
                    EntityTooSmall,
                    "a part other than the last is too small"
                ));
            }
            all.update(stored.digest);
            chunks.push(stored.body.clone());
        }
        let digest: [u8; 32] = all.finalize().into();
        Ok(Object {
            size: chunks.iter().map(|chunk| chunk.len() as u64).sum(),
            chunks,
            etag: format!("{}-{}", etag(&digest), named.len()),
            checksum: format!("{}-{}", BASE64.encode(digest), named.len()),
            written: SystemTime::now(),
        })
    }
}
