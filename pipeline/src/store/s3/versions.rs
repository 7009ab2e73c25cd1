//! Versions of objects: listing them, deleting them for good, and what holds them back.

use aws_sdk_s3::types::{Delete, ObjectIdentifier, ObjectLockLegalHoldStatus};
use futures_util::StreamExt as _;
use futures_util::TryStreamExt as _;
use futures_util::stream::{self, BoxStream};

use super::failure::Subject;
use super::{S3Store, time};
use crate::store::{Hold, Key, ObjectStore as _, ObjectVersion, StoreError, Undeleted, VersionId};

/// Most keys in one request to delete: S3's limit.
const DELETE_AT_ONCE: usize = 1000;

/// Where a listing stands: the last key and version of the page before.
enum Next {
    First,
    From(Option<String>, Option<String>),
    End,
}

/// What a page brought.
enum Page {
    Versions(Vec<ObjectVersion>),
    /// The store has no such call: it keeps no versions.
    NoVersions,
}

impl S3Store {
    /// The versions below `prefix`.
    pub(super) fn versions(
        &self,
        prefix: &str,
    ) -> BoxStream<'static, Result<ObjectVersion, StoreError>> {
        let start = (self.clone(), prefix.to_owned(), Next::First);
        let pages = stream::try_unfold(start, |(store, prefix, next)| async move {
            let asked = match next {
                Next::End => return Ok(None),
                Next::First => store.version_page(&prefix, None, None).await,
                Next::From(key, version) => store.version_page(&prefix, key, version).await,
            };
            let (page, next) = asked?;
            Ok(Some((page, (store, prefix, next))))
        });
        let (store, prefix) = (self.clone(), prefix.to_owned());
        let versions = pages.map_ok(move |page| match page {
            Page::Versions(page) => stream::iter(page.into_iter().map(Ok)).boxed(),
            Page::NoVersions => store.list(&prefix).map_ok(ObjectVersion::only).boxed(),
        });
        versions.try_flatten().boxed()
    }

    async fn version_page(
        &self,
        prefix: &str,
        key: Option<String>,
        version: Option<String>,
    ) -> Result<(Page, Next), StoreError> {
        let subject = Subject {
            operation: "list versions",
            key: prefix,
        };
        let name = match self.shared.config.prefix.as_str() {
            "" => prefix.to_owned(),
            above => format!("{above}/{prefix}"),
        };
        let first = key.is_none();
        let answer = self
            .ask(subject, || {
                self.shared
                    .client
                    .list_object_versions()
                    .bucket(self.bucket())
                    .prefix(&name)
                    .set_key_marker(key.clone())
                    .set_version_id_marker(version.clone())
                    .send()
            })
            .await;
        let answer = match answer {
            Err(StoreError::Invalid(detail))
                if first && detail.message.starts_with("NotImplemented") =>
            {
                return Ok((Page::NoVersions, Next::End));
            }
            answer => answer?,
        };
        let mut page = Vec::with_capacity(answer.versions().len());
        for found in answer.versions() {
            let Some(key) = self.key_of(found.key().unwrap_or_default()) else {
                continue;
            };
            let Some(size) = found.size().and_then(|size| u64::try_from(size).ok()) else {
                let words = format!("`{key}` is listed without its size");
                return Err(StoreError::Invalid(subject.detail(words)));
            };
            page.push(ObjectVersion {
                key,
                version: found.version_id().map(|id| VersionId(id.to_owned())),
                size,
                last_modified: time(found.last_modified()),
                is_latest: found.is_latest() == Some(true),
                is_marker: false,
            });
        }
        for found in answer.delete_markers() {
            let Some(key) = self.key_of(found.key().unwrap_or_default()) else {
                continue;
            };
            page.push(ObjectVersion {
                key,
                version: found.version_id().map(|id| VersionId(id.to_owned())),
                size: 0,
                last_modified: time(found.last_modified()),
                is_latest: found.is_latest() == Some(true),
                is_marker: true,
            });
        }
        let next = if answer.is_truncated == Some(true) {
            if answer.next_key_marker.is_none() {
                let words = "there is more, and the answer does not say from where on";
                return Err(StoreError::Invalid(subject.detail(words)));
            }
            Next::From(answer.next_key_marker, answer.next_version_id_marker)
        } else {
            Next::End
        };
        Ok((Page::Versions(page), next))
    }

    pub(super) async fn delete_all(&self, keys: &[Key]) -> Result<Vec<StoreError>, StoreError> {
        let all: Vec<_> = keys.iter().map(|key| (key.clone(), None)).collect();
        let left = self.delete_each_version(&all).await?;
        Ok(left.into_iter().map(|left| left.error).collect())
    }

    pub(super) async fn delete_each_version(
        &self,
        versions: &[(Key, Option<VersionId>)],
    ) -> Result<Vec<Undeleted>, StoreError> {
        let mut left = Vec::new();
        for batch in versions.chunks(DELETE_AT_ONCE) {
            left.extend(self.delete_batch(batch).await?);
        }
        Ok(left)
    }

    async fn delete_batch(
        &self,
        batch: &[(Key, Option<VersionId>)],
    ) -> Result<Vec<Undeleted>, StoreError> {
        let subject = Subject {
            operation: "delete",
            key: batch.first().map_or("", |(key, _)| key.as_str()),
        };
        let invalid = |words: String| StoreError::Invalid(subject.detail(words));
        let objects: Result<Vec<_>, _> = batch
            .iter()
            .map(|(key, version)| {
                ObjectIdentifier::builder()
                    .key(self.name(key.as_str()))
                    .set_version_id(version.as_ref().map(|version| version.0.clone()))
                    .build()
            })
            .collect();
        let delete = Delete::builder()
            .set_objects(Some(objects.map_err(|error| invalid(error.to_string()))?))
            .quiet(true)
            .build()
            .map_err(|error| invalid(error.to_string()))?;
        let answer = self
            .ask(subject, || {
                self.shared
                    .client
                    .delete_objects()
                    .bucket(self.bucket())
                    .delete(delete.clone())
                    .send()
            })
            .await?;
        let left = answer.errors().iter().filter_map(|error| {
            let name = error.key().unwrap_or_default();
            let key = self.key_of(name);
            let subject = Subject {
                operation: "delete",
                key: key.as_ref().map_or(name, Key::as_str),
            };
            let (code, message) = (error.code(), error.message());
            let refused = subject.refused(code.unwrap_or_default(), message.unwrap_or_default());
            // MinIO's word for a version that is not there.
            let gone = code == Some("NoSuchVersion");
            let error_of = refused.filter(|_| !gone)?;
            let version = error.version_id().filter(|id| !id.is_empty());
            Some(Undeleted {
                // A refusal that names none of ours is about the batch.
                key: key.or_else(|| batch.first().map(|(key, _)| key.clone()))?,
                version: version.map(|id| VersionId(id.to_owned())),
                error: error_of,
            })
        });
        Ok(left.collect())
    }

    pub(super) async fn has_object_lock(&self) -> Result<bool, StoreError> {
        let subject = Subject {
            operation: "read object lock of",
            key: self.bucket(),
        };
        let answer = self
            .ask(subject, || {
                self.shared
                    .client
                    .get_object_lock_configuration()
                    .bucket(self.bucket())
                    .send()
            })
            .await;
        match answer {
            // Who may not ask of the bucket may yet ask of each object.
            Ok(_) | Err(StoreError::PermissionDenied(_)) => Ok(true),
            // `ObjectLockConfigurationNotFoundError`, or a store without such a call.
            Err(StoreError::NotFound(_) | StoreError::Invalid(_)) => Ok(false),
            Err(error) => Err(error),
        }
    }

    pub(super) async fn hold_of(
        &self,
        key: &Key,
        version: Option<&VersionId>,
    ) -> Result<Option<Hold>, StoreError> {
        let subject = Subject {
            operation: "head",
            key: key.as_str(),
        };
        let answer = self
            .ask(subject, || {
                self.shared
                    .client
                    .head_object()
                    .bucket(self.bucket())
                    .key(self.name(key.as_str()))
                    .set_version_id(version.map(|version| version.0.clone()))
                    .send()
            })
            .await?;
        let mode = answer.object_lock_mode();
        let until = time(answer.object_lock_retain_until_date()).filter(|_| mode.is_some());
        let legal = answer.object_lock_legal_hold_status() == Some(&ObjectLockLegalHoldStatus::On);
        if until.is_none() && !legal {
            return Ok(None);
        }
        let mode = mode.map_or_else(String::new, |mode| mode.as_str().to_owned());
        Ok(Some(Hold { until, mode, legal }))
    }
}
