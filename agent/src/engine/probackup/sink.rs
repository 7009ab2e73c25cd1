//! WAL segments that the program streamed: into the node's epoch, and back from there.

use std::io;
use std::ops::Range;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};

use agent_wal::SegmentName;
use agent_wal::segment::{self, Expected};
use bytes::Bytes;
use catalog::error::CatalogError;
use catalog::ids::EpochId;
use catalog::wal::{WalFile, get_segment, put_segment};
use futures_util::FutureExt as _;
use futures_util::future::BoxFuture;
use pipeline::upload::Uploader;
use sha2::{Digest as _, Sha256};
use tokio::io::AsyncWrite;
use uuid::Uuid;

use crate::catalog_fs::{Failure, WalSink};
use crate::engine::attempt::Attempt;
use crate::wal::known::KnownSegments;

/// Puts segments in the name of one node's epoch. Deadlines are the uploader's and the store's.
#[derive(Debug, Clone)]
pub(super) struct EpochSink {
    uploader: Uploader,
    node: Uuid,
    epoch: EpochId,
    level: i32,
    expected: Expected,
    known: Arc<KnownSegments>,
}

impl EpochSink {
    pub(super) fn new(attempt: &Attempt<'_>, first: SegmentName) -> Self {
        let (node, spec) = (attempt.node, attempt.spec);
        Self {
            uploader: attempt.uploader.clone(),
            node: spec.node_id,
            epoch: spec.epoch.clone(),
            level: spec.level,
            expected: Expected {
                system_identifier: node.control.system_identifier,
                segment_size: node.segment_size(),
                name: first,
                timelines: vec![first.timeline],
                flavour: None,
            },
            known: Arc::clone(&attempt.known),
        }
    }

    fn file(&self, segment: &str) -> Result<WalFile, Failure> {
        Ok(WalFile {
            node: self.node,
            epoch: self.epoch.clone(),
            name: segment.parse().map_err(|error| wrong(segment, error))?,
        })
    }

    async fn store(self, segment: String, bytes: Bytes) -> Result<(), Failure> {
        let size = self.expected.segment_size;
        let name = SegmentName::parse(&segment, size).map_err(|error| wrong(&segment, error))?;
        let expected = Expected {
            name,
            ..self.expected.clone()
        };
        // Some milliseconds of checksums: not on a thread that serves sockets.
        let checked = tokio::task::spawn_blocking({
            let bytes = bytes.clone();
            move || segment::verify(&bytes, &expected).map(|_| hex::encode(Sha256::digest(&bytes)))
        });
        let plain_sha256 = checked
            .await
            .map_err(|error| wrong(&segment, error))?
            .map_err(|error| {
                wrong(
                    &segment,
                    format!("what the program streamed is not the server's WAL: {error}"),
                )
            })?;
        match self.known.get(&segment) {
            Some(known) if known == plain_sha256 => return Ok(()),
            Some(_) => {
                return Err(wrong(
                    &segment,
                    "the program streamed other bytes than the server has in its own file",
                ));
            }
            None => {}
        }
        let file = self.file(&segment)?;
        let put = put_segment(&self.uploader, &file, self.level, &bytes[..]).await;
        put.map_err(|error| of_catalog(&segment, error))?;
        self.known.add(&segment, plain_sha256);
        Ok(())
    }

    async fn fetch(self, segment: String, range: Range<u64>) -> Result<Bytes, Failure> {
        let file = self.file(&segment)?;
        let mut window = Window {
            at: 0,
            range: range.clone(),
            bytes: Vec::new(),
        };
        let got = get_segment(&**self.uploader.store(), &file, &mut window).await;
        got.map_err(|error| of_catalog(&segment, error))?;
        if window.bytes.len() as u64 != range.end - range.start {
            return Err(wrong(&segment, "it is shorter than it was"));
        }
        Ok(window.bytes.into())
    }
}

impl WalSink for EpochSink {
    fn put(&self, segment: &str, bytes: Bytes) -> BoxFuture<'static, Result<(), Failure>> {
        self.clone().store(segment.to_owned(), bytes).boxed()
    }

    fn get(&self, segment: &str, range: Range<u64>) -> BoxFuture<'static, Result<Bytes, Failure>> {
        self.clone().fetch(segment.to_owned(), range).boxed()
    }
}

fn wrong(segment: &str, what: impl std::fmt::Display) -> Failure {
    Failure::Wal {
        segment: segment.to_owned(),
        what: what.to_string(),
    }
}

fn of_catalog(segment: &str, error: CatalogError) -> Failure {
    match error {
        CatalogError::Store(error) => Failure::Pipeline(error.into()),
        CatalogError::Pipeline(error) => Failure::Pipeline(error),
        error => wrong(segment, error),
    }
}

/// Keeps a part of what is written to it.
struct Window {
    at: u64,
    range: Range<u64>,
    bytes: Vec<u8>,
}

impl AsyncWrite for Window {
    fn poll_write(
        mut self: Pin<&mut Self>,
        _: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        let end = self.at + bytes.len() as u64;
        let from = self.range.start.clamp(self.at, end) - self.at;
        let to = self.range.end.clamp(self.at, end) - self.at;
        if let (Ok(from), Ok(to)) = (usize::try_from(from), usize::try_from(to)) {
            self.bytes.extend_from_slice(&bytes[from..to.max(from)]);
        }
        self.at = end;
        Poll::Ready(Ok(bytes.len()))
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }
}
