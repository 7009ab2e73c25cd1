//! Multipart uploads.

use aws_sdk_s3::primitives::ByteStream;
use aws_sdk_s3::types::{CompletedMultipartUpload, CompletedPart};
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use bytes::Bytes;
use sha2::{Digest as _, Sha256};

use super::attempts::Effect;
use super::client::SignDigest;
use super::failure::Subject;
use super::{S3Store, compare, plain_etag};
use crate::store::{Key, ObjectMeta, Part, Sha256Digest, StoreError, UploadId};

impl S3Store {
    pub(super) async fn send_part(
        &self,
        key: &Key,
        upload: &UploadId,
        number: u32,
        body: Bytes,
        sha256: Sha256Digest,
    ) -> Result<Part, StoreError> {
        let subject = Subject {
            operation: "upload part",
            key: key.as_str(),
        };
        let checksum = BASE64.encode(sha256);
        let part_number = s3_number(subject, number)?;
        let deadline = self.deadline(body.len());
        let answer = self
            .run(subject, Effect::Repeatable, deadline, || {
                let call = self
                    .shared
                    .client
                    .upload_part()
                    .bucket(self.bucket())
                    .key(self.name(key.as_str()))
                    .upload_id(&upload.0)
                    .part_number(part_number)
                    .checksum_sha256(&checksum)
                    .body(ByteStream::from(body.clone()))
                    .customize();
                if self.shared.https {
                    call.disable_payload_signing().send()
                } else {
                    call.interceptor(SignDigest(hex::encode(sha256))).send()
                }
            })
            .await?;
        compare(subject, &checksum, answer.checksum_sha256())?;
        let Some(etag) = plain_etag(answer.e_tag()) else {
            let words = "the answer has no entity tag";
            return Err(StoreError::Invalid(subject.detail(words)));
        };
        Ok(Part {
            number,
            size: body.len() as u64,
            etag,
            sha256: Some(sha256),
        })
    }

    pub(super) async fn complete(
        &self,
        key: &Key,
        upload: &UploadId,
        parts: &[Part],
    ) -> Result<ObjectMeta, StoreError> {
        let subject = Subject {
            operation: "complete upload",
            key: key.as_str(),
        };
        let mut named = CompletedMultipartUpload::builder();
        for part in parts {
            named = named.parts(
                CompletedPart::builder()
                    .part_number(s3_number(subject, part.number)?)
                    .e_tag(&part.etag)
                    .set_checksum_sha256(part.sha256.map(|digest| BASE64.encode(digest)))
                    .build(),
            );
        }
        let named = named.build();
        let deadline = self.shared.config.complete_timeout;
        let answer = self
            .run(subject, Effect::Conditional, deadline, || {
                self.shared
                    .client
                    .complete_multipart_upload()
                    .bucket(self.bucket())
                    .key(self.name(key.as_str()))
                    .upload_id(&upload.0)
                    .if_none_match("*")
                    .multipart_upload(named.clone())
                    .send()
            })
            .await?;
        // A store may begin with 200 and end with an error; without an entity tag nothing was made.
        let Some(etag) = plain_etag(answer.e_tag()) else {
            let words = "the answer has no entity tag";
            return Err(StoreError::UnknownOutcome(subject.detail(words)));
        };
        let theirs = answer.checksum_sha256();
        if let (Some(ours), Some(theirs)) = (composite(parts), theirs) {
            // Some leave the number of parts out.
            let bare = ours.split('-').next().unwrap_or(&ours);
            compare(subject, bare, theirs.split('-').next())?;
        }
        Ok(ObjectMeta {
            key: key.clone(),
            size: parts.iter().map(|part| part.size).sum(),
            etag: Some(etag),
            checksum: theirs.map(str::to_owned),
            last_modified: None,
        })
    }

    pub(super) async fn abort(&self, key: &Key, upload: &UploadId) -> Result<(), StoreError> {
        let subject = Subject {
            operation: "abort upload",
            key: key.as_str(),
        };
        let answer = self
            .ask(subject, || {
                self.shared
                    .client
                    .abort_multipart_upload()
                    .bucket(self.bucket())
                    .key(self.name(key.as_str()))
                    .upload_id(&upload.0)
                    .send()
            })
            .await;
        match answer {
            Ok(_) | Err(StoreError::NotFound(_)) => Ok(()),
            Err(error) => Err(error),
        }
    }

    pub(super) async fn uploads_of(&self, key: &Key) -> Result<Vec<UploadId>, StoreError> {
        let subject = Subject {
            operation: "list uploads",
            key: key.as_str(),
        };
        let name = self.name(key.as_str());
        let (mut found, mut key_marker, mut upload_marker) = (Vec::new(), None, None);
        loop {
            let answer = self
                .ask(subject, || {
                    self.shared
                        .client
                        .list_multipart_uploads()
                        .bucket(self.bucket())
                        .prefix(&name)
                        .set_key_marker(key_marker.clone())
                        .set_upload_id_marker(upload_marker.clone())
                        .send()
                })
                .await?;
            let of_key = answer
                .uploads()
                .iter()
                .filter(|upload| upload.key() == Some(&name));
            found.extend(
                of_key.filter_map(|upload| upload.upload_id().map(|id| UploadId(id.to_owned()))),
            );
            let next = (answer.next_key_marker, answer.next_upload_id_marker);
            // The exact key comes first among those it begins; what follows it is not asked for.
            let past = next.0.as_ref().is_none_or(|next| *next > name);
            if answer.is_truncated != Some(true) || past || next == (key_marker, upload_marker) {
                return Ok(found);
            }
            (key_marker, upload_marker) = next;
        }
    }

    pub(super) async fn parts_of(
        &self,
        key: &Key,
        upload: &UploadId,
    ) -> Result<Vec<Part>, StoreError> {
        let subject = Subject {
            operation: "list parts",
            key: key.as_str(),
        };
        let (mut found, mut marker) = (Vec::new(), None);
        loop {
            let answer = self
                .ask(subject, || {
                    self.shared
                        .client
                        .list_parts()
                        .bucket(self.bucket())
                        .key(self.name(key.as_str()))
                        .upload_id(&upload.0)
                        .set_part_number_marker(marker.clone())
                        .send()
                })
                .await?;
            found.extend(answer.parts().iter().map(|part| {
                Part {
                    number: part
                        .part_number()
                        .and_then(|n| u32::try_from(n).ok())
                        .unwrap_or(0),
                    size: part.size().and_then(|n| u64::try_from(n).ok()).unwrap_or(0),
                    etag: plain_etag(part.e_tag()).unwrap_or_default(),
                    sha256: part.checksum_sha256().and_then(decode),
                }
            }));
            let next = answer.next_part_number_marker;
            if answer.is_truncated != Some(true) || next.is_none() || next == marker {
                return Ok(found);
            }
            marker = next;
        }
    }
}

fn s3_number(subject: Subject<'_>, number: u32) -> Result<i32, StoreError> {
    let in_range = i32::try_from(number).ok();
    in_range
        .filter(|n| (1..=10_000).contains(n))
        .ok_or_else(|| {
            let words = format!("part {number} is not between 1 and 10000");
            StoreError::Invalid(subject.detail(words))
        })
}

fn decode(checksum: &str) -> Option<Sha256Digest> {
    BASE64.decode(checksum).ok()?.try_into().ok()
}

/// S3's checksum of an object of parts: base64 of the SHA-256 of the parts' digests, `-`, their number.
fn composite(parts: &[Part]) -> Option<String> {
    let mut all = Sha256::new();
    for part in parts {
        all.update(part.sha256?);
    }
    Some(format!("{}-{}", BASE64.encode(all.finalize()), parts.len()))
}
