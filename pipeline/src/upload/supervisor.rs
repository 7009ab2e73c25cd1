//! The task that owns one upload.

use std::time::Duration;

use bytes::Bytes;
use sha2::{Digest as _, Sha256};
use tokio::sync::mpsc;
use tokio::task::JoinSet;

use super::readback::{checksum_matches, composite, is_ours};
use super::{CLEAN_UP_DEADLINE, Put, Uploader, put_with};
use crate::error::{Fault, PipelineError};
use crate::retry::{or_cancelled, repeatable, transient};
use crate::store::{Detail, Key, Part, Retry, Sha256Digest, StoreError, UploadId};

/// How long after a cancel an answer is waited for that says what there is to clean up.
const LAST_ANSWER: Duration = Duration::from_secs(5);
/// S3's limit.
const MOST_PARTS: u32 = 10_000;

/// How an object of unknown origin is told from ours when the store keeps no checksum.
#[derive(Debug, Clone)]
pub(crate) enum Identity {
    /// Its first bytes hold a nonce.
    Head(Bytes),
    /// By all its bytes.
    Whole,
}

/// A full part on its way, or the last one.
#[derive(Debug)]
pub(crate) struct PartMessage {
    pub(crate) body: Bytes,
    pub(crate) sha256: Sha256Digest,
    pub(crate) last: bool,
}

/// An object that is in the store.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Completed {
    pub(crate) size: u64,
    pub(crate) parts_sha256: Sha256Digest,
}

/// One object to be made of the parts that come through a channel.
#[derive(Debug)]
pub(crate) struct UploadJob {
    pub(crate) uploader: Uploader,
    pub(crate) key: Key,
    pub(crate) identity: Identity,
    /// Told of an error at once, before anything is cleaned up.
    pub(crate) fault: Option<Fault>,
}

impl UploadJob {
    /// Runs until the object is there, or nothing is under way any more.
    ///
    /// # Errors
    /// Why there is no object. `Cancelled` if the channel closed before the last part.
    pub(crate) async fn run(
        self,
        mut parts: mpsc::Receiver<PartMessage>,
    ) -> Result<Completed, PipelineError> {
        let outcome = self.make(&mut parts).await;
        self.report(&outcome);
        outcome
    }

    fn report(&self, outcome: &Result<Completed, PipelineError>) {
        if let (Err(error), Some(fault)) = (outcome, &self.fault) {
            fault.fail(error.clone());
        }
    }

    async fn make(
        &self,
        parts: &mut mpsc::Receiver<PartMessage>,
    ) -> Result<Completed, PipelineError> {
        let cancel = &self.uploader.cancel;
        let first = or_cancelled(cancel, parts.recv()).await?;
        let first = first.ok_or(PipelineError::Cancelled)?;
        if first.last {
            return self.put(first).await;
        }
        let journal = &self.uploader.journal;
        let intend = || journal.intend(&self.key);
        self.uploader.retry.run(cancel, repeatable, intend).await?;
        let upload = self.create().await?;
        let mut sent = Sent::default();
        let outcome = match self.send(first, parts, &upload, &mut sent).await {
            Ok(()) => self.complete(&upload, &sent).await,
            Err(error) => Err(error),
        };
        if outcome.is_err() {
            self.report(&outcome);
            // Every task that holds a part is ended first: a part that arrives after an abort would stay in
            // the store.
            sent.tasks.shutdown().await;
            self.abort(&upload).await;
        }
        outcome
    }

    async fn put(&self, only: PartMessage) -> Result<Completed, PipelineError> {
        let Uploader {
            store,
            throttle,
            cancel,
            meter,
            retry,
            ..
        } = &self.uploader;
        let size = only.body.len() as u64;
        let put = async {
            throttle.take(size).await;
            put_with(&**store, &self.key, only.body, *retry).await
        };
        let put = or_cancelled(cancel, put).await??;
        if put == Put::Created {
            meter.add_stored(size);
        }
        Ok(Completed {
            size,
            parts_sha256: Sha256::digest(only.sha256).into(),
        })
    }

    async fn create(&self) -> Result<UploadId, PipelineError> {
        let Uploader {
            store,
            cancel,
            retry,
            ..
        } = &self.uploader;
        let mut attempt = 1;
        loop {
            let error = match self.create_once().await? {
                Ok(upload) => return Ok(upload),
                Err(error) => error,
            };
            if error.retry() == Retry::ReadBack {
                self.sweep().await;
            }
            if error.retry() == Retry::Permanent || attempt >= retry.attempts {
                return Err(error.into());
            }
            tracing::info!(store = store.describe(), %error, "an upload's creation is repeated");
            or_cancelled(cancel, tokio::time::sleep(retry.pause(attempt))).await?;
            attempt += 1;
        }
    }

    /// Asks once. A cancel does not just drop the question: the store may be creating the upload now, and
    /// nobody would know its name.
    async fn create_once(&self) -> Result<Result<UploadId, StoreError>, PipelineError> {
        let create = self.uploader.store.create_upload(&self.key);
        tokio::pin!(create);
        if let Ok(answer) = or_cancelled(&self.uploader.cancel, &mut create).await {
            return Ok(answer);
        }
        match tokio::time::timeout(LAST_ANSWER, create).await {
            Ok(Ok(upload)) => self.abort(&upload).await,
            Ok(Err(error)) if error.retry() != Retry::ReadBack => {}
            Ok(Err(_)) | Err(_) => self.sweep().await,
        }
        Err(PipelineError::Cancelled)
    }

    /// Aborts whatever a lost reply may have left under our key. The key is of this attempt only, so
    /// nothing else is under way there.
    async fn sweep(&self) {
        let store = &self.uploader.store;
        let work = async {
            match store.list_uploads(&self.key).await {
                Ok(uploads) => {
                    for upload in uploads {
                        self.abort(&upload).await;
                    }
                }
                Err(error) => {
                    tracing::warn!(key = %self.key, %error, "an upload may be left under way");
                }
            }
        };
        if tokio::time::timeout(CLEAN_UP_DEADLINE, work).await.is_err() {
            tracing::warn!(key = %self.key, "an upload may be left under way: no answer in time");
        }
    }

    async fn send(
        &self,
        first: PartMessage,
        parts: &mut mpsc::Receiver<PartMessage>,
        upload: &UploadId,
        sent: &mut Sent,
    ) -> Result<(), PipelineError> {
        let cancel = &self.uploader.cancel;
        let mut ended = first.last;
        self.spawn(first, upload, sent)?;
        while !ended || !sent.tasks.is_empty() {
            tokio::select! {
                biased;
                () = cancel.cancelled() => return Err(PipelineError::Cancelled),
                Some(done) = sent.tasks.join_next() => {
                    let part = done.map_err(|_| PipelineError::Panicked {
                        thread: "upload part".into(),
                    })??;
                    sent.parts.push(part);
                }
                message = parts.recv(), if !ended => {
                    let message = message.ok_or(PipelineError::Cancelled)?;
                    ended = message.last;
                    self.spawn(message, upload, sent)?;
                }
            }
        }
        sent.parts.sort_unstable_by_key(|part| part.number);
        Ok(())
    }

    fn spawn(
        &self,
        message: PartMessage,
        upload: &UploadId,
        sent: &mut Sent,
    ) -> Result<(), PipelineError> {
        sent.count += 1;
        if sent.count > MOST_PARTS {
            let what = format!("`{}` would have more than {MOST_PARTS} parts", self.key);
            return Err(PipelineError::Setup(what));
        }
        sent.size += message.body.len() as u64;
        sent.digests.update(message.sha256);
        sent.tasks.spawn(send_part(
            self.uploader.clone(),
            self.key.clone(),
            upload.clone(),
            sent.count,
            message,
        ));
        Ok(())
    }

    async fn complete(&self, upload: &UploadId, sent: &Sent) -> Result<Completed, PipelineError> {
        let Uploader {
            store,
            cancel,
            retry,
            ..
        } = &self.uploader;
        let done = Completed {
            size: sent.size,
            parts_sha256: sent.digests.clone().finalize().into(),
        };
        let mut attempt = 1;
        loop {
            let call = || store.complete_if_absent(&self.key, upload, &sent.parts);
            let error = match retry.run(cancel, transient, call).await {
                Ok(meta) => {
                    let count = sent.parts.len();
                    if checksum_matches(&meta, &done.parts_sha256, count) == Some(false) {
                        let what = format!(
                            "the store says its checksum is {}, we sent {}",
                            meta.checksum.unwrap_or_default(),
                            composite(&done.parts_sha256, count),
                        );
                        return Err(PipelineError::damaged(&self.key, what));
                    }
                    return Ok(done);
                }
                Err(PipelineError::Store(error)) => error,
                Err(error) => return Err(error),
            };
            let (unknown, resolve) = match &error {
                StoreError::UnknownOutcome(_) => (true, true),
                StoreError::AlreadyExists(_) | StoreError::NotFound(_) => (false, true),
                _ => (false, false),
            };
            if !resolve {
                return Err(error.into());
            }
            let look = || is_ours(&**store, &self.key, &done, sent.parts.len(), &self.identity);
            match retry.run(cancel, repeatable, look).await? {
                Some(true) => {
                    // Ours. If it is there although our upload still stands, that one must go.
                    self.abort(upload).await;
                    return Ok(done);
                }
                Some(false) => {
                    let what = format!("another object is there ({})", error.detail().message);
                    let detail = Detail::new("complete upload", self.key.as_str(), what);
                    return Err(StoreError::AlreadyExists(detail).into());
                }
                None if unknown && attempt < retry.attempts => {}
                None => return Err(error.into()),
            }
            or_cancelled(cancel, tokio::time::sleep(retry.pause(attempt))).await?;
            attempt += 1;
        }
    }

    /// Aborts, and asks until the store says that nothing is left. Not ended by the token: this is what
    /// a cancel waits for.
    async fn abort(&self, upload: &UploadId) {
        let Uploader { store, retry, .. } = &self.uploader;
        let cancel = tokio_util::sync::CancellationToken::new();
        let work = async {
            for _ in 0..retry.attempts.max(2) {
                let call = || store.abort_upload(&self.key, upload);
                retry.run(&cancel, repeatable, call).await?;
                if store.list_parts(&self.key, upload).await.is_err() {
                    // Gone, or we may not look; the store has taken the abort either way.
                    return Ok(());
                }
                // A part was still arriving.
                tokio::time::sleep(retry.pause(1)).await;
            }
            let what = format!("upload of `{}` still stands after several aborts", self.key);
            Err(PipelineError::Deadline { what })
        };
        let outcome = tokio::time::timeout(CLEAN_UP_DEADLINE, work).await;
        let error = match outcome {
            Ok(Ok(())) => return,
            Ok(Err(error)) => error.to_string(),
            Err(_) => "no answer in time".into(),
        };
        tracing::warn!(key = %self.key, upload = %upload.0, error, "an upload may be left under way");
    }
}

/// What has been sent of one upload.
#[derive(Default)]
struct Sent {
    tasks: JoinSet<Result<Part, PipelineError>>,
    parts: Vec<Part>,
    digests: Sha256,
    size: u64,
    count: u32,
}

async fn send_part(
    uploader: Uploader,
    key: Key,
    upload: UploadId,
    number: u32,
    message: PartMessage,
) -> Result<Part, PipelineError> {
    let PartMessage { body, sha256, .. } = message;
    let size = body.len() as u64;
    or_cancelled(&uploader.cancel, uploader.throttle.take(size)).await?;
    // Bytes changed on the way are worth another try, those changed in memory fail each time.
    let again = |error: &StoreError| repeatable(error) || matches!(error, StoreError::Corrupt(_));
    let call = || {
        let body = body.clone();
        uploader
            .store
            .upload_part(&key, &upload, number, body, sha256)
    };
    let part = uploader.retry.run(&uploader.cancel, again, call).await?;
    let other_hash = part.sha256.is_some_and(|confirmed| confirmed != sha256);
    if other_hash || part.number != number || (part.size != 0 && part.size != size) {
        let what = format!("part {number}: the store confirmed something else than was sent");
        return Err(PipelineError::damaged(&key, what));
    }
    uploader.meter.add_stored(size);
    Ok(part)
}
