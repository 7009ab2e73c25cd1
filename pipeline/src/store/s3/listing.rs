//! Listing, page by page.

use futures_util::StreamExt as _;
use futures_util::TryStreamExt as _;
use futures_util::stream::{self, BoxStream};

use super::failure::Subject;
use super::{S3Store, plain_etag, time};
use crate::store::{Key, ObjectMeta, StoreError};

/// Where a listing stands.
struct Listing {
    store: S3Store,
    prefix: String,
    next: Next,
    last: Option<Key>,
}

enum Next {
    First,
    From(String),
    End,
}

impl S3Store {
    /// The objects below `prefix`, a page at a time.
    pub(super) fn pages(
        &self,
        prefix: &str,
    ) -> BoxStream<'static, Result<Vec<ObjectMeta>, StoreError>> {
        let listing = Listing {
            store: self.clone(),
            prefix: prefix.to_owned(),
            next: Next::First,
            last: None,
        };
        stream::try_unfold(listing, Listing::page)
            .into_stream()
            .boxed()
    }
}

impl Listing {
    async fn page(mut self) -> Result<Option<(Vec<ObjectMeta>, Self)>, StoreError> {
        let token = match &self.next {
            Next::First => None,
            Next::From(token) => Some(token.clone()),
            Next::End => return Ok(None),
        };
        let store = self.store.clone();
        let subject = Subject {
            operation: "list",
            key: &self.prefix,
        };
        let name = match store.shared.config.prefix.as_str() {
            "" => self.prefix.clone(),
            prefix => format!("{prefix}/{}", self.prefix),
        };
        let answer = store
            .ask(subject, || {
                store
                    .shared
                    .client
                    .list_objects_v2()
                    .bucket(store.bucket())
                    .prefix(&name)
                    .set_continuation_token(token.clone())
                    .send()
            })
            .await?;
        let mut page = Vec::with_capacity(answer.contents().len());
        for object in answer.contents() {
            let named = object.key().unwrap_or_default();
            // Markers of "directories" and the like: nothing of ours has such a name.
            let Some(key) = store.key_of(named) else {
                tracing::debug!(name = named, "listed, but not a key");
                continue;
            };
            let size = object.size().and_then(|size| u64::try_from(size).ok());
            let in_order = self.last.as_ref().is_none_or(|last| *last < key);
            let (Some(size), true) = (size, in_order) else {
                let words = format!("`{key}` is listed out of order or without its size");
                return Err(StoreError::Invalid(subject.detail(words)));
            };
            self.last = Some(key.clone());
            page.push(ObjectMeta {
                key,
                size,
                etag: plain_etag(object.e_tag()),
                checksum: None,
                last_modified: time(object.last_modified()),
            });
        }
        self.next = match answer.next_continuation_token {
            Some(token) if answer.is_truncated == Some(true) => Next::From(token),
            _ => Next::End,
        };
        Ok(Some((page, self)))
    }
}
