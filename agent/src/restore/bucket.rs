//! WAL of one node from the bucket, into files.

use std::path::Path;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::task::{Context, Poll};
use std::time::Duration;
use std::{fs, io};

use agent_api::{ApiError, ErrorKind};
use catalog::error::CatalogError;
use catalog::model::Epoch;
use catalog::wal;
use pipeline::store::{ObjectStore, StoreError};
use pipeline::throttle::Throttle;
use tokio::fs::File;
use tokio::io::AsyncWrite;
use tokio::time::sleep;

use super::errors::{local, of_catalog};
use super::walserve::WalSource;
use crate::walget::WalFile;

/// How long a fetch may go without a byte, the store's own attempts included.
const STALL: Duration = Duration::from_mins(3);

/// The WAL of an epoch and its parents.
#[derive(Debug)]
pub(super) struct BucketWal {
    pub(super) store: Arc<dyn ObjectStore>,
    /// The epoch, its parent, and so on.
    pub(super) chain: Vec<Epoch>,
    /// The operation's bandwidth.
    pub(super) throttle: Throttle,
}

impl WalSource for BucketWal {
    async fn fetch(&self, file: &WalFile, into: &Path) -> Result<Option<u64>, ApiError> {
        let fetched = self.fetch_file(file, into).await;
        if !matches!(fetched, Ok(Some(_))) {
            // Not verified: nobody may find it. The workspace goes too in the end.
            let _ = fs::remove_file(into);
        }
        fetched
    }
}

impl BucketWal {
    async fn fetch_file(&self, file: &WalFile, into: &Path) -> Result<Option<u64>, ApiError> {
        let Ok(name) = file.name().parse::<wal::WalName>() else {
            return Ok(None);
        };
        let Some(newest) = self.chain.first() else {
            return Err(ApiError::new(
                ErrorKind::Internal,
                "no epoch to fetch WAL from",
            ));
        };
        // Asked for directly, because it is nearly always there; absence is proved only then.
        let newest = wal::WalFile {
            node: newest.node_id,
            epoch: newest.epoch.clone(),
            name: name.clone(),
        };
        if let Some(size) = self.get(&newest, into).await? {
            return Ok(Some(size));
        }
        let found = wal::find_wal(self.store.as_ref(), &self.chain, &name).await;
        match found.map_err(|error| of_catalog(&error))? {
            None => Ok(None),
            Some(elsewhere) => match self.get(&elsewhere, into).await? {
                Some(size) => Ok(Some(size)),
                None => Err(ApiError::new(
                    ErrorKind::StoreUnavailable,
                    format!("the store lists `{}` and does not give it", elsewhere.key()),
                )),
            },
        }
    }

    /// Fetches an object into a synced file; `None` if the store says there is none.
    async fn get(&self, file: &wal::WalFile, into: &Path) -> Result<Option<u64>, ApiError> {
        let failed = |error: io::Error| local(into, &error);
        let mut options = File::options();
        options.create(true).truncate(true).write(true).mode(0o600);
        let moved = Arc::new(AtomicU64::new(0));
        let mut sink = Watched {
            file: options.open(into).await.map_err(failed)?,
            moved: Arc::clone(&moved),
        };
        let stored = tokio::select! {
            stored = wal::get_segment(self.store.as_ref(), file, &mut sink) => stored,
            () = stalled(&moved) => return Err(ApiError::new(
                ErrorKind::StoreUnavailable,
                format!("the store sent nothing of `{}` for {} s", file.key(), STALL.as_secs()),
            )),
        };
        let stored = match stored {
            Ok(stored) => stored,
            Err(CatalogError::Store(StoreError::NotFound(_))) => return Ok(None),
            Err(error) => return Err(of_catalog(&error)),
        };
        sink.file.sync_all().await.map_err(failed)?;
        self.throttle.take(stored.stored_bytes).await;
        Ok(Some(stored.plain_bytes))
    }
}

/// Ends when `moved` has not changed for [`STALL`].
async fn stalled(moved: &AtomicU64) {
    let mut seen = moved.load(Ordering::Relaxed);
    loop {
        sleep(STALL).await;
        let now = moved.load(Ordering::Relaxed);
        if now == seen {
            return;
        }
        seen = now;
    }
}

/// A file that counts what is written to it.
#[derive(Debug)]
struct Watched {
    file: File,
    moved: Arc<AtomicU64>,
}

impl AsyncWrite for Watched {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        let written = Pin::new(&mut self.file).poll_write(cx, bytes);
        if let Poll::Ready(Ok(count)) = &written {
            self.moved.fetch_add(*count as u64, Ordering::Relaxed);
        }
        written
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.file).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.file).poll_shutdown(cx)
    }
}
