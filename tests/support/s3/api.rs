//! What each request does.

use std::io;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use bytes::Bytes;
use futures_util::StreamExt as _;
use futures_util::stream;
use hyper::{HeaderMap, StatusCode};
use s3s::dto::{
    AbortMultipartUploadInput, AbortMultipartUploadOutput, ChecksumAlgorithm, ChecksumType,
    CompleteMultipartUploadInput, CompleteMultipartUploadOutput, CreateMultipartUploadInput,
    CreateMultipartUploadOutput, DeleteObjectsInput, DeleteObjectsOutput, DeletedObject, ETag,
    GetObjectInput, GetObjectOutput, HeadObjectInput, HeadObjectOutput, IfNoneMatch,
    ListMultipartUploadsInput, ListMultipartUploadsOutput, ListObjectsV2Input, ListObjectsV2Output,
    ListPartsInput, ListPartsOutput, MultipartUpload, Object, Part, PutObjectInput,
    PutObjectOutput, StreamingBlob, UploadPartInput, UploadPartOutput,
};
use s3s::{S3, S3Error, S3Request, S3Response, S3Result, s3_error};
use sha2::{Digest as _, Sha256};

use super::bucket::{Object as Stored, StoredPart, custom, etag};
use super::faults::{Fault, Operation};
use super::holds::{Fate, When};
use super::{Cut, State};

/// Bytes handed to a connection at a time.
const PIECE: usize = 256 << 10;
/// The largest body of one request, in bytes.
const LARGEST_BODY: i64 = 5 << 30;

/// The implementation of the operations.
pub(super) struct Api(pub(super) Arc<State>);

/// What is left of a fault once a request has begun, and what it is about, for holds.
struct Pass {
    state: Arc<State>,
    operation: Operation,
    key: String,
    fault: Option<Fault>,
    cut: Cut,
}

impl Pass {
    /// Sends the answer to what has taken effect, unless the fault is that it is lost.
    async fn end<T>(self, output: T) -> S3Result<S3Response<T>> {
        let held = self
            .state
            .holds
            .meet(self.operation, When::After, &self.key);
        if held.await == Fate::Cut {
            self.cut.ask();
        }
        match self.fault {
            Some(Fault::CutAfter) => self.cut.ask(),
            Some(Fault::FailAfter) => {
                return Err(s3_error!(
                    InternalError,
                    "We encountered an internal error."
                ));
            }
            _ => {}
        }
        Ok(S3Response::new(output))
    }
}

impl Api {
    /// Checks bucket and region, and lets a fault happen that comes before any effect.
    async fn begin<T: Sync>(
        &self,
        operation: Operation,
        bucket: &str,
        key: &str,
        request: &S3Request<T>,
    ) -> S3Result<Pass> {
        let signed_for = request.region.as_ref().map_or("", |region| region.as_str());
        if signed_for != self.0.region {
            return Err(S3Error::with_message(
                s3s::S3ErrorCode::AuthorizationHeaderMalformed,
                format!(
                    "The authorization header is malformed; the region '{signed_for}' is wrong; \
                     expecting '{}'",
                    self.0.region
                ),
            ));
        }
        if bucket != self.0.bucket_name {
            return Err(s3_error!(
                NoSuchBucket,
                "The specified bucket does not exist"
            ));
        }
        let cut = request.extensions.get::<Cut>().cloned().unwrap_or_default();
        if self.0.holds.meet(operation, When::Before, key).await == Fate::Cut {
            cut.ask();
            return Err(s3_error!(InternalError, "cut"));
        }
        let fault = self.0.faults.befall(operation);
        match &fault {
            Some(Fault::Refuse(status, code)) => {
                let status = StatusCode::from_u16(*status).unwrap_or(StatusCode::BAD_REQUEST);
                return Err(custom(status, code, "a fault that a test asked for"));
            }
            Some(Fault::CutBefore) => {
                cut.ask();
                return Err(s3_error!(InternalError, "cut"));
            }
            Some(Fault::Stall(time)) => tokio::time::sleep(*time).await,
            _ => {}
        }
        Ok(Pass {
            state: Arc::clone(&self.0),
            operation,
            key: key.to_owned(),
            fault,
            cut,
        })
    }
}

/// Reads a body and checks it against the SHA-256 the client names, if it does.
async fn receive(
    body: Option<StreamingBlob>,
    length: Option<i64>,
    named: Option<&str>,
    headers: &HeaderMap,
) -> S3Result<(Bytes, [u8; 32])> {
    let length = length.unwrap_or(0);
    if !(0..=LARGEST_BODY).contains(&length) {
        return Err(s3_error!(EntityTooLarge));
    }
    let mut all = Vec::with_capacity(usize::try_from(length).unwrap_or(0));
    if let Some(mut body) = body {
        while let Some(chunk) = body.next().await {
            let words = "the body is not the one that was signed, or ended early";
            let chunk = chunk
                .map_err(|_| custom(StatusCode::BAD_REQUEST, "XAmzContentSHA256Mismatch", words))?;
            all.extend_from_slice(&chunk);
        }
    }
    if all.len() as u64 != length.unsigned_abs() {
        return Err(s3_error!(IncompleteBody));
    }
    let named: Option<[u8; 32]> = match named {
        None => None,
        Some(named) => {
            let digest = BASE64
                .decode(named)
                .ok()
                .and_then(|digest| digest.try_into().ok());
            Some(digest.ok_or_else(|| s3_error!(InvalidRequest, "not a SHA-256 in base64"))?)
        }
    };
    // What `s3s` has verified as part of the signature need not be hashed again.
    let signed = headers
        .get("x-amz-content-sha256")
        .map(hyper::http::HeaderValue::as_bytes);
    if let Some(named) = named
        && signed == Some(hex::encode(named).as_bytes())
    {
        return Ok((all.into(), named));
    }
    let digest: [u8; 32] = Sha256::digest(&all).into();
    if named.is_some_and(|named| named != digest) {
        return Err(custom(
            StatusCode::BAD_REQUEST,
            "XAmzContentChecksumMismatch",
            "The provided 'x-amz-checksum' header does not match what was computed.",
        ));
    }
    Ok((all.into(), digest))
}

fn only_new(condition: Option<&IfNoneMatch>) -> S3Result<bool> {
    match condition {
        None => Ok(false),
        Some(condition) if condition.is_any() => Ok(true),
        Some(_) => Err(s3_error!(NotImplemented, "only If-None-Match: *")),
    }
}

/// Cuts `found` to a page; true if there is more.
fn page<T>(found: &mut Vec<T>, asked: Option<i32>, most: usize) -> bool {
    let asked = asked.and_then(|n| usize::try_from(n).ok()).unwrap_or(most);
    let more = found.len() > asked.min(most);
    found.truncate(asked.min(most));
    more
}

fn signed(n: u64) -> i64 {
    i64::try_from(n).unwrap_or(i64::MAX)
}

#[async_trait]
impl S3 for Api {
    async fn put_object(
        &self,
        mut req: S3Request<PutObjectInput>,
    ) -> S3Result<S3Response<PutObjectOutput>> {
        let (body, length) = (req.input.body.take(), req.input.content_length);
        let named = req.input.checksum_sha256.as_deref();
        let (body, digest) = receive(body, length, named, &req.headers).await?;
        let pass = self
            .begin(Operation::Put, &req.input.bucket, &req.input.key, &req)
            .await?;
        let only_new = only_new(req.input.if_none_match.as_ref())?;
        let object = Stored::whole(body, &digest);
        let output = PutObjectOutput {
            e_tag: Some(ETag::Strong(object.etag.clone())),
            checksum_sha256: named.map(|_| object.checksum.clone()),
            ..PutObjectOutput::default()
        };
        self.0.bucket().put(&req.input.key, object, only_new)?;
        pass.end(output).await
    }

    async fn get_object(
        &self,
        req: S3Request<GetObjectInput>,
    ) -> S3Result<S3Response<GetObjectOutput>> {
        let pass = self
            .begin(Operation::Get, &req.input.bucket, &req.input.key, &req)
            .await?;
        let object = self.0.bucket().object(&req.input.key)?.clone();
        let (range, content_range) = match &req.input.range {
            None => (0..object.size, None),
            Some(range) => {
                let range = range.check(object.size).map_err(|_| {
                    s3_error!(InvalidRange, "The requested range is not satisfiable")
                })?;
                let text = format!("bytes {}-{}/{}", range.start, range.end - 1, object.size);
                (range, Some(text))
            }
        };
        let length = range.end - range.start;
        let end = match pass.fault {
            Some(Fault::Truncate(n) | Fault::Hang(n)) => range.start + n.min(length),
            _ => range.end,
        };
        let pieces = object.slice(range.start, end, PIECE);
        let pieces = stream::iter(pieces.into_iter().map(Ok::<_, io::Error>));
        let body = match pass.fault {
            Some(Fault::Truncate(_)) => {
                // Late enough for the head of the answer to be sent.
                let cut = stream::once(async {
                    tokio::time::sleep(Duration::from_millis(20)).await;
                    Err(io::Error::other("cut on demand"))
                });
                StreamingBlob::wrap(pieces.chain(cut))
            }
            Some(Fault::Hang(_)) => StreamingBlob::wrap(pieces.chain(stream::pending())),
            _ => StreamingBlob::wrap(pieces),
        };
        pass.end(GetObjectOutput {
            body: Some(body),
            content_length: Some(signed(length)),
            content_range,
            e_tag: Some(ETag::Strong(object.etag)),
            last_modified: Some(object.written.into()),
            ..GetObjectOutput::default()
        })
        .await
    }

    async fn head_object(
        &self,
        req: S3Request<HeadObjectInput>,
    ) -> S3Result<S3Response<HeadObjectOutput>> {
        let pass = self
            .begin(Operation::Head, &req.input.bucket, &req.input.key, &req)
            .await?;
        let object = self.0.bucket().object(&req.input.key)?.clone();
        let asked = req.input.checksum_mode.is_some();
        pass.end(HeadObjectOutput {
            content_length: Some(signed(object.size)),
            e_tag: Some(ETag::Strong(object.etag)),
            checksum_sha256: asked.then_some(object.checksum),
            last_modified: Some(object.written.into()),
            ..HeadObjectOutput::default()
        })
        .await
    }

    async fn list_objects_v2(
        &self,
        req: S3Request<ListObjectsV2Input>,
    ) -> S3Result<S3Response<ListObjectsV2Output>> {
        let prefix = req.input.prefix.clone().unwrap_or_default();
        let pass = self
            .begin(Operation::List, &req.input.bucket, &prefix, &req)
            .await?;
        if req.input.delimiter.is_some() {
            return Err(s3_error!(NotImplemented, "delimiter"));
        }
        let after = match &req.input.continuation_token {
            Some(token) => hex::decode(token)
                .ok()
                .and_then(|key| String::from_utf8(key).ok()),
            None => req.input.start_after.clone(),
        };
        let after = after.unwrap_or_default();
        let most = self.0.page_size;
        let mut found: Vec<_> = self
            .0
            .bucket()
            .objects
            .range(prefix.clone()..)
            .take_while(|(key, _)| key.starts_with(&prefix))
            .filter(|(key, _)| **key > after)
            .take(most + 1)
            .map(|(key, object)| Object {
                key: Some(key.clone()),
                size: Some(signed(object.size)),
                e_tag: Some(ETag::Strong(object.etag.clone())),
                last_modified: Some(object.written.into()),
                ..Object::default()
            })
            .collect();
        let more = page(&mut found, req.input.max_keys, most);
        let last = found.last().and_then(|object| object.key.as_ref());
        pass.end(ListObjectsV2Output {
            name: Some(req.input.bucket.clone()),
            next_continuation_token: last.filter(|_| more).map(hex::encode),
            key_count: i32::try_from(found.len()).ok(),
            contents: Some(found),
            is_truncated: Some(more),
            prefix: Some(prefix),
            ..ListObjectsV2Output::default()
        })
        .await
    }

    async fn delete_objects(
        &self,
        req: S3Request<DeleteObjectsInput>,
    ) -> S3Result<S3Response<DeleteObjectsOutput>> {
        let objects = &req.input.delete.objects;
        let keys: Vec<_> = objects.iter().map(|object| object.key.as_str()).collect();
        let pass = self
            .begin(Operation::Delete, &req.input.bucket, &keys.join(" "), &req)
            .await?;
        if objects.len() > 1000 {
            return Err(s3_error!(MalformedXML, "more than 1000 keys"));
        }
        {
            let mut bucket = self.0.bucket();
            for object in objects {
                bucket.objects.remove(&object.key);
            }
        }
        let quiet = req.input.delete.quiet == Some(true);
        let deleted = objects.iter().map(|object| DeletedObject {
            key: Some(object.key.clone()),
            ..DeletedObject::default()
        });
        pass.end(DeleteObjectsOutput {
            deleted: (!quiet).then(|| deleted.collect()),
            ..DeleteObjectsOutput::default()
        })
        .await
    }

    async fn create_multipart_upload(
        &self,
        req: S3Request<CreateMultipartUploadInput>,
    ) -> S3Result<S3Response<CreateMultipartUploadOutput>> {
        let input = &req.input;
        let pass = self
            .begin(Operation::CreateUpload, &input.bucket, &input.key, &req)
            .await?;
        let algorithm = input
            .checksum_algorithm
            .as_ref()
            .map(ChecksumAlgorithm::as_str);
        if algorithm != Some(ChecksumAlgorithm::SHA256) {
            return Err(s3_error!(NotImplemented, "only uploads with SHA256"));
        }
        let id = self.0.bucket().create_upload(&input.key);
        pass.end(CreateMultipartUploadOutput {
            bucket: Some(input.bucket.clone()),
            key: Some(input.key.clone()),
            upload_id: Some(id),
            checksum_algorithm: input.checksum_algorithm.clone(),
            checksum_type: Some(ChecksumType::from_static(ChecksumType::COMPOSITE)),
            ..CreateMultipartUploadOutput::default()
        })
        .await
    }

    async fn upload_part(
        &self,
        mut req: S3Request<UploadPartInput>,
    ) -> S3Result<S3Response<UploadPartOutput>> {
        let (body, length) = (req.input.body.take(), req.input.content_length);
        let named = req.input.checksum_sha256.as_deref();
        let (body, digest) = receive(body, length, named, &req.headers).await?;
        let input = &req.input;
        let pass = self
            .begin(Operation::UploadPart, &input.bucket, &input.key, &req)
            .await?;
        if named.is_none() {
            return Err(s3_error!(
                InvalidRequest,
                "the upload asks for SHA256 of every part"
            ));
        }
        if !(1..=10_000).contains(&input.part_number) {
            return Err(s3_error!(InvalidArgument, "part number"));
        }
        let part = StoredPart {
            body,
            etag: etag(&digest),
            digest,
            written: std::time::SystemTime::now(),
        };
        let output = UploadPartOutput {
            e_tag: Some(ETag::Strong(part.etag.clone())),
            checksum_sha256: Some(BASE64.encode(digest)),
            ..UploadPartOutput::default()
        };
        {
            let mut bucket = self.0.bucket();
            let upload = bucket.upload(&input.key, &input.upload_id)?;
            upload.parts.insert(input.part_number, part);
        }
        pass.end(output).await
    }

    async fn complete_multipart_upload(
        &self,
        req: S3Request<CompleteMultipartUploadInput>,
    ) -> S3Result<S3Response<CompleteMultipartUploadOutput>> {
        let input = &req.input;
        let pass = self
            .begin(Operation::Complete, &input.bucket, &input.key, &req)
            .await?;
        let only_new = only_new(input.if_none_match.as_ref())?;
        let named = input
            .multipart_upload
            .as_ref()
            .and_then(|named| named.parts.as_deref());
        let named = named.unwrap_or_default();
        let made = self
            .0
            .bucket()
            .complete(&input.key, &input.upload_id, named, only_new)?;
        pass.end(CompleteMultipartUploadOutput {
            bucket: Some(input.bucket.clone()),
            key: Some(input.key.clone()),
            e_tag: Some(ETag::Strong(made.etag)),
            checksum_sha256: Some(made.checksum),
            ..CompleteMultipartUploadOutput::default()
        })
        .await
    }

    async fn abort_multipart_upload(
        &self,
        req: S3Request<AbortMultipartUploadInput>,
    ) -> S3Result<S3Response<AbortMultipartUploadOutput>> {
        let input = &req.input;
        let pass = self
            .begin(Operation::Abort, &input.bucket, &input.key, &req)
            .await?;
        {
            let mut bucket = self.0.bucket();
            bucket.upload(&input.key, &input.upload_id)?;
            bucket.uploads.remove(&input.upload_id);
        }
        pass.end(AbortMultipartUploadOutput::default()).await
    }

    async fn list_multipart_uploads(
        &self,
        req: S3Request<ListMultipartUploadsInput>,
    ) -> S3Result<S3Response<ListMultipartUploadsOutput>> {
        let input = &req.input;
        let prefix = input.prefix.clone().unwrap_or_default();
        let pass = self
            .begin(Operation::ListUploads, &input.bucket, &prefix, &req)
            .await?;
        // As MinIO: a prefix matches only the key that equals it.
        let after = (input.key_marker.clone(), input.upload_id_marker.clone());
        let mut found: Vec<_> = self
            .0
            .bucket()
            .uploads
            .iter()
            .filter(|(_, upload)| prefix.is_empty() || upload.key == prefix)
            .map(|(id, upload)| (upload.key.clone(), id.clone(), upload.started))
            .collect();
        found.sort();
        if let (Some(key), id) = after {
            let id = id.unwrap_or_default();
            found.retain(|entry| (entry.0.as_str(), entry.1.as_str()) > (&key, &id));
        }
        let more = page(&mut found, input.max_uploads, self.0.page_size);
        let last = found.last().filter(|_| more).cloned();
        let uploads = found.into_iter().map(|(key, id, started)| MultipartUpload {
            key: Some(key),
            upload_id: Some(id),
            initiated: Some(started.into()),
            ..MultipartUpload::default()
        });
        pass.end(ListMultipartUploadsOutput {
            bucket: Some(input.bucket.clone()),
            prefix: Some(prefix),
            uploads: Some(uploads.collect()),
            is_truncated: Some(more),
            next_key_marker: last.as_ref().map(|entry| entry.0.clone()),
            next_upload_id_marker: last.map(|entry| entry.1),
            ..ListMultipartUploadsOutput::default()
        })
        .await
    }

    async fn list_parts(
        &self,
        req: S3Request<ListPartsInput>,
    ) -> S3Result<S3Response<ListPartsOutput>> {
        let input = &req.input;
        let pass = self
            .begin(Operation::ListParts, &input.bucket, &input.key, &req)
            .await?;
        let after = input.part_number_marker.unwrap_or(0);
        let mut found = {
            let mut bucket = self.0.bucket();
            let upload = bucket.upload(&input.key, &input.upload_id)?;
            let found: Vec<_> = upload
                .parts
                .range(after + 1..)
                .map(|(number, part)| Part {
                    part_number: Some(*number),
                    size: i64::try_from(part.body.len()).ok(),
                    e_tag: Some(ETag::Strong(part.etag.clone())),
                    checksum_sha256: Some(BASE64.encode(part.digest)),
                    last_modified: Some(part.written.into()),
                    ..Part::default()
                })
                .collect();
            found
        };
        let more = page(&mut found, input.max_parts, self.0.page_size);
        let last = found.last().and_then(|part| part.part_number);
        pass.end(ListPartsOutput {
            bucket: Some(input.bucket.clone()),
            key: Some(input.key.clone()),
            upload_id: Some(input.upload_id.clone()),
            next_part_number_marker: last.filter(|_| more),
            is_truncated: Some(more),
            parts: Some(found),
            ..ListPartsOutput::default()
        })
        .await
    }
}
