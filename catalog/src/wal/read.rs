//! WAL objects back to plain bytes.

use std::io;
use std::pin::Pin;
use std::task::{Context, Poll};

use async_compression::tokio::bufread::ZstdDecoder;
use async_compression::zstd::DParameter;
use bytes::Bytes;
use futures_util::stream::BoxStream;
use futures_util::{Stream, StreamExt as _};
use pipeline::store::{Key, ObjectStore, StoreError};
use sha2::{Digest as _, Sha256};
use tokio::io::{AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _};
use tokio_util::io::StreamReader;

use super::trailer::{TRAILER_LEN, Trailer};
use super::{StoredWal, WAL_FILE_LIMIT, WalFile};
use crate::error::CatalogError;

/// Our frames need 1 MiB; a hostile one shall not make us set aside 128 MiB.
const WINDOW_LOG_MAX: u32 = 23;

/// Writes the plain bytes of a WAL file into `sink` as they arrive, and flushes it. What it wrote is
/// verified ONLY if it returns `Ok`: commit (rename the file, answer success) after that, throw it away
/// otherwise. May be dropped at any time.
///
/// # Errors
/// [`CatalogError::Store`] (its `NotFound` proves nothing, see [`super::exists`]);
/// [`CatalogError::Damaged`] if a byte is wrong or the object is another file's;
/// [`CatalogError::Sink`] if `sink` fails.
pub async fn get_segment<W: AsyncWrite + Unpin>(
    store: &dyn ObjectStore,
    file: &WalFile,
    sink: &mut W,
) -> Result<StoredWal, CatalogError> {
    let key = file.key();
    let object = store.get(&key, None).await?;
    let stored_bytes = object.size;
    let Some(frames) = stored_bytes.checked_sub(TRAILER_LEN as u64) else {
        return Err(CatalogError::damaged(
            &key,
            "it is shorter than its trailer",
        ));
    };
    let source = Source::new(object.stream, frames);
    let window = DParameter::window_log_max(WINDOW_LOG_MAX);
    let mut decoder = ZstdDecoder::with_params(StreamReader::new(source), &[window]);
    decoder.multiple_members(true);

    let mut plain = Sha256::new();
    let mut plain_bytes = 0;
    let mut buffer = vec![0; 128 << 10];
    loop {
        let count = match decoder.read(&mut buffer).await {
            Ok(0) => break,
            Ok(count) => count,
            Err(error) => return Err(of_source(&key, error)),
        };
        plain_bytes += count as u64;
        if plain_bytes > WAL_FILE_LIMIT {
            return Err(CatalogError::damaged(&key, "it grows beyond any WAL file"));
        }
        plain.update(&buffer[..count]);
        let written = sink.write_all(&buffer[..count]).await;
        written.map_err(|source| CatalogError::sink(&key, source))?;
    }
    let source = decoder.into_inner().into_inner();
    let trailer = source.trailer(&key).await?;
    if trailer.file != *file {
        let what = format!("it holds {}", trailer.file);
        return Err(CatalogError::damaged(&key, what));
    }
    let plain_sha256: [u8; 32] = plain.finalize().into();
    if trailer.length != plain_bytes || trailer.plain_sha256 != plain_sha256 {
        return Err(CatalogError::damaged(
            &key,
            "its frames are not what its trailer says",
        ));
    }
    let flushed = sink.flush().await;
    flushed.map_err(|source| CatalogError::sink(&key, source))?;
    Ok(StoredWal {
        plain_bytes,
        stored_bytes,
        plain_sha256: hex::encode(plain_sha256),
    })
}

/// The plain bytes of a WAL file of at most `limit` bytes, verified.
///
/// # Errors
/// As [`get_segment`]; [`CatalogError::Damaged`] also if it has more than `limit` bytes.
pub async fn read_segment(
    store: &dyn ObjectStore,
    file: &WalFile,
    limit: usize,
) -> Result<Bytes, CatalogError> {
    let mut sink = Limited {
        plain: Vec::new(),
        limit,
    };
    match get_segment(store, file, &mut sink).await {
        Ok(_) => Ok(sink.plain.into()),
        Err(CatalogError::Sink { .. }) => {
            let what = format!("it has more than {limit} plain bytes");
            Err(CatalogError::damaged(&file.key(), what))
        }
        Err(error) => Err(error),
    }
}

/// A buffer that refuses to outgrow its limit.
struct Limited {
    plain: Vec<u8>,
    limit: usize,
}

impl AsyncWrite for Limited {
    fn poll_write(
        mut self: Pin<&mut Self>,
        _: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        if self.plain.len() + bytes.len() > self.limit {
            return Poll::Ready(Err(io::ErrorKind::FileTooLarge.into()));
        }
        self.plain.extend_from_slice(bytes);
        Poll::Ready(Ok(bytes.len()))
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }
}

/// The stored bytes: gives the frames to the decoder, hashed, and keeps the trailer back.
struct Source {
    stream: BoxStream<'static, Result<Bytes, StoreError>>,
    /// Bytes of frames that have not come yet.
    frames_left: u64,
    hash: Sha256,
    tail: Vec<u8>,
}

impl Source {
    fn new(stream: BoxStream<'static, Result<Bytes, StoreError>>, frames: u64) -> Self {
        Self {
            stream,
            frames_left: frames,
            hash: Sha256::new(),
            tail: Vec::with_capacity(TRAILER_LEN),
        }
    }

    /// Keeps what belongs to the trailer; more than a trailer is an error.
    fn keep(&mut self, bytes: &[u8]) -> io::Result<()> {
        if self.tail.len() + bytes.len() > TRAILER_LEN {
            return Err(io::Error::new(
                io::ErrorKind::InvalidData,
                "more bytes came than it has",
            ));
        }
        self.tail.extend_from_slice(bytes);
        Ok(())
    }

    /// Reads to the end and verifies the trailer.
    async fn trailer(mut self, key: &Key) -> Result<Trailer, CatalogError> {
        if self.frames_left > 0 {
            return Err(CatalogError::damaged(
                key,
                "it has bytes after its last frame",
            ));
        }
        while let Some(chunk) = self.stream.next().await {
            self.keep(&chunk?).map_err(|error| of_source(key, error))?;
        }
        Trailer::decode(key, &self.tail, self.hash)
    }
}

impl Stream for Source {
    type Item = io::Result<Bytes>;

    fn poll_next(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        let this = self.get_mut();
        loop {
            if this.frames_left == 0 {
                return Poll::Ready(None);
            }
            let mut chunk = match std::task::ready!(this.stream.poll_next_unpin(cx)) {
                None => {
                    let cut = io::Error::new(io::ErrorKind::UnexpectedEof, "it is cut short");
                    return Poll::Ready(Some(Err(cut)));
                }
                Some(Err(error)) => return Poll::Ready(Some(Err(io::Error::other(error)))),
                Some(Ok(chunk)) => chunk,
            };
            let frames = usize::try_from(this.frames_left)
                .unwrap_or(usize::MAX)
                .min(chunk.len());
            let rest = chunk.split_off(frames);
            this.frames_left -= frames as u64;
            this.hash.update(&chunk);
            if let Err(error) = this.keep(&rest) {
                return Poll::Ready(Some(Err(error)));
            }
            if !chunk.is_empty() {
                return Poll::Ready(Some(Ok(chunk)));
            }
        }
    }
}

/// What an error of the decoder is: the store's, carried through it, or damage.
fn of_source(key: &Key, error: io::Error) -> CatalogError {
    match error.downcast::<StoreError>() {
        Ok(error) => error.into(),
        Err(error) => CatalogError::damaged(key, error.to_string()),
    }
}
