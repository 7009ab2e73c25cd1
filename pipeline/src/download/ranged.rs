//! One byte range of one object, fetched again from where it broke off.

use std::ops::Range;
use std::time::Duration;

use bytes::Bytes;
use futures_util::StreamExt as _;

use super::Downloader;
use crate::error::PipelineError;
use crate::retry::{or_cancelled, repeatable};
use crate::store::{Key, ObjectBody, StoreError};

/// How long a body may stand still before it counts as broken off.
const STALL: Duration = Duration::from_mins(1);

/// A range being read.
#[derive(Debug)]
pub(crate) struct Ranged {
    downloader: Downloader,
    key: Key,
    rest: Range<u64>,
    /// Stored bytes that the whole object must have.
    size: u64,
    body: Option<ObjectBody>,
    breaks: u32,
}

impl Ranged {
    pub(crate) fn new(downloader: Downloader, key: Key, range: Range<u64>, size: u64) -> Self {
        Self {
            downloader,
            key,
            rest: range,
            size,
            body: None,
            breaks: 0,
        }
    }

    pub(crate) fn key(&self) -> &Key {
        &self.key
    }

    /// The next bytes; `None` exactly at the end of the range.
    ///
    /// # Errors
    /// [`PipelineError::Damaged`] if the object is missing, or is shorter or longer than it must be; else the store's
    /// last error after several attempts, or `Cancelled`.
    pub(crate) async fn next(&mut self) -> Result<Option<Bytes>, PipelineError> {
        loop {
            let mut body = match self.body.take() {
                Some(body) => body,
                // An empty range is asked for as well: the object must be there.
                None if self.breaks == 0 || !self.rest.is_empty() => self.open().await?,
                None => return Ok(None),
            };
            let cancel = &self.downloader.cancel;
            let chunk = tokio::time::timeout(STALL, body.stream.next());
            let error = match or_cancelled(cancel, chunk).await? {
                Ok(Some(Ok(chunk))) => {
                    self.body = Some(body);
                    if chunk.is_empty() {
                        continue;
                    }
                    return self.took(chunk).map(Some);
                }
                Ok(None) if self.rest.is_empty() => {
                    // So that another call does not ask the store again.
                    self.breaks = self.breaks.max(1);
                    return Ok(None);
                }
                Ok(None) => "the body ended early".to_owned(),
                Ok(Some(Err(error))) if repeatable(&error) => error.to_string(),
                Ok(Some(Err(error))) => return Err(self.explain(error)),
                Err(_) => format!("no bytes came for {} s", STALL.as_secs()),
            };
            self.broke(&error).await?;
        }
    }

    fn took(&mut self, chunk: Bytes) -> Result<Bytes, PipelineError> {
        let length = chunk.len() as u64;
        if length > self.rest.end - self.rest.start {
            return Err(PipelineError::damaged(
                &self.key,
                "more bytes came than were asked for",
            ));
        }
        self.rest.start += length;
        self.downloader.meter.add_stored(length);
        Ok(chunk)
    }

    async fn open(&mut self) -> Result<ObjectBody, PipelineError> {
        let Downloader {
            store,
            throttle,
            cancel,
            retry,
            ..
        } = &self.downloader;
        // Before the question, not while the answer flows: a body that is not read looks like a dead peer.
        let bytes = self.rest.end.saturating_sub(self.rest.start);
        or_cancelled(cancel, throttle.take(bytes)).await?;
        // A store refuses an empty range; the object's size is all there is to see then.
        let range = (!self.rest.is_empty()).then(|| self.rest.clone());
        let call = || store.get(&self.key, range.clone());
        let body = retry.run(cancel, repeatable, call).await;
        let body = body.map_err(|error| match error {
            PipelineError::Store(error) => self.explain(error),
            other => other,
        })?;
        if body.size != self.size {
            let what = format!("it has {} bytes, {} were written", body.size, self.size);
            return Err(PipelineError::damaged(&self.key, what));
        }
        Ok(body)
    }

    async fn broke(&mut self, error: &str) -> Result<(), PipelineError> {
        let Downloader { cancel, retry, .. } = &self.downloader;
        self.breaks += 1;
        if self.breaks >= retry.attempts {
            let what = format!(
                "`{}` broke off {} times, last: {error}",
                self.key, self.breaks
            );
            return Err(PipelineError::Deadline { what });
        }
        tracing::info!(key = %self.key, at = self.rest.start, error, "a body broke off");
        or_cancelled(cancel, tokio::time::sleep(retry.pause(self.breaks))).await
    }

    /// What the caller knows of the object, it was told by whoever wrote it.
    fn explain(&self, error: StoreError) -> PipelineError {
        match error {
            StoreError::NotFound(_) => PipelineError::damaged(&self.key, "the object is missing"),
            StoreError::Corrupt(detail) => PipelineError::damaged(&self.key, detail.message),
            other => other.into(),
        }
    }
}
