//! One object written from async code.

use std::mem;

use sha2::{Digest as _, Sha256};
use tokio::sync::mpsc;
use tokio::task::JoinHandle;

use super::{Completed, Identity, PartMessage, UploadJob, Uploader};
use crate::budget::{PartBuffer, Reserve};
use crate::error::PipelineError;
use crate::frame::digest_beside;
use crate::store::Key;

/// Parts between a writer and its upload's task. The task takes them at once; the budget is the limit.
pub(crate) const CHANNEL: usize = 2;

/// An object that is in the store.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StoredObject {
    /// Stored bytes.
    pub size: u64,
    /// Hex SHA-256 of all its bytes.
    pub sha256: String,
    /// Hex SHA-256 over the digests of its 8 MiB parts, as S3 builds a composite checksum.
    pub parts_sha256: String,
}

/// Writes one object: what fits in a part by one PUT when it is finished, more as a multipart upload.
/// Dropped before it is finished, nothing is left of it.
#[derive(Debug)]
pub struct ObjectWriter {
    reserve: Reserve,
    cancel: tokio_util::sync::CancellationToken,
    parts: mpsc::Sender<PartMessage>,
    task: Option<JoinHandle<Result<Completed, PipelineError>>>,
    buffer: Option<PartBuffer>,
    whole: Sha256,
}

impl ObjectWriter {
    pub(super) fn new(uploader: &Uploader, reserve: &Reserve, key: Key) -> Self {
        let (parts, received) = mpsc::channel(CHANNEL);
        let job = UploadJob {
            uploader: uploader.clone(),
            key,
            identity: Identity::Whole,
            fault: None,
        };
        Self {
            reserve: reserve.clone(),
            cancel: uploader.cancel.clone(),
            parts,
            task: Some(tokio::spawn(job.run(received))),
            buffer: None,
            whole: Sha256::new(),
        }
    }

    /// Appends `bytes`. Waits while the memory budget is used up.
    ///
    /// # Errors
    /// Why the upload failed, or [`PipelineError::Cancelled`]. The writer is of no use then.
    pub async fn write(&mut self, mut bytes: &[u8]) -> Result<(), PipelineError> {
        while !bytes.is_empty() {
            let mut buffer = match self.buffer.take() {
                Some(full) if full.is_full() => {
                    // Sent only now that more is to come: the last part must be known as such.
                    self.send(full, false).await?;
                    self.reserve.buffer(&self.cancel).await?
                }
                Some(buffer) => buffer,
                None => self.reserve.buffer(&self.cancel).await?,
            };
            let taken = buffer.append(bytes);
            bytes = bytes.get(taken..).unwrap_or_default();
            self.buffer = Some(buffer);
        }
        Ok(())
    }

    async fn send(&mut self, buffer: PartBuffer, last: bool) -> Result<(), PipelineError> {
        let body = buffer.freeze();
        let mut whole = mem::take(&mut self.whole);
        // 10 ms for a full part: not on a thread that serves sockets.
        let hashed = tokio::task::spawn_blocking(move || {
            // Parts before this one were full: whole blocks.
            let sha256 = digest_beside(&body, &mut whole, 0);
            (whole, sha256, body)
        });
        let panicked = |_| PipelineError::Panicked {
            thread: "hash of a part".into(),
        };
        let (whole, sha256, body) = hashed.await.map_err(panicked)?;
        self.whole = whole;
        let message = PartMessage { body, sha256, last };
        if self.parts.send(message).await.is_ok() {
            return Ok(());
        }
        match self.outcome().await {
            Ok(_) => Err(PipelineError::Cancelled),
            Err(error) => Err(error),
        }
    }

    async fn outcome(&mut self) -> Result<Completed, PipelineError> {
        // Asked once: a writer whose upload failed is of no use.
        let task = self.task.take().ok_or(PipelineError::Cancelled)?;
        let joined = task.await;
        joined.map_err(|_| PipelineError::Panicked {
            thread: "upload".into(),
        })?
    }

    /// Sends what is left and waits until the object is in the store.
    ///
    /// # Errors
    /// Why there is no object; nothing is left under way then.
    pub async fn finish(mut self) -> Result<StoredObject, PipelineError> {
        let buffer = match self.buffer.take() {
            Some(buffer) => buffer,
            None => self.reserve.buffer(&self.cancel).await?,
        };
        self.send(buffer, true).await?;
        let done = self.outcome().await?;
        Ok(StoredObject {
            size: done.size,
            sha256: hex::encode(mem::take(&mut self.whole).finalize()),
            parts_sha256: hex::encode(done.parts_sha256),
        })
    }
}
