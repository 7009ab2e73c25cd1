//! Reading an index back.

use std::io;
use std::sync::{Arc, Mutex, PoisonError};

use async_compression::tokio::bufread::ZstdDecoder;
use async_compression::zstd::DParameter;
use futures_util::StreamExt as _;
use futures_util::stream::BoxStream;
use sha2::{Digest as _, Sha256};
use tokio::io::{AsyncBufRead, AsyncBufReadExt as _, AsyncReadExt as _, BufReader};
use tokio_util::io::StreamReader;
use tokio_util::sync::CancellationToken;

use super::{Footer, check_path};
use crate::budget::Budget;
use crate::download::{Downloader, Ranged};
use crate::error::PipelineError;
use crate::meter::Meter;
use crate::pack::{EntryKind, IndexEntry, IndexInfo};
use crate::store::{Key, ObjectStore};
use crate::throttle::Throttle;

/// Longest line that is read: 1 GiB files in chunks of 16 MiB have lines of some KiB.
const LINE_MAX: u64 = 64 << 20;
/// Largest zstd window that our blocks can ask for (8 MiB): a damaged one may ask for gigabytes.
const WINDOW_LOG_MAX: u32 = 23;

type Lines = Box<dyn AsyncBufRead + Send + Unpin>;

/// A stored index.
#[derive(Debug, Clone)]
pub struct Index {
    downloader: Downloader,
    key: Key,
    info: IndexInfo,
}

impl Index {
    /// The index under `key` that the manifest describes as `info`. Nothing is read yet.
    ///
    /// # Errors
    /// [`PipelineError::Damaged`] if `info` cannot be true.
    pub fn open(
        store: &Arc<dyn ObjectStore>,
        key: Key,
        info: &IndexInfo,
    ) -> Result<Self, PipelineError> {
        // It is streamed: no budget is needed, and nobody but the consumer slows it down.
        let downloader = Downloader::new(
            Arc::clone(store),
            Budget::new(0),
            Throttle::new(None),
            Arc::<Meter>::default(),
            CancellationToken::new(),
        );
        Self::open_with(downloader, key, info)
    }

    /// The same through a downloader: with its throttle, counters and token.
    ///
    /// # Errors
    /// As [`Self::open`].
    pub fn open_with(
        downloader: Downloader,
        key: Key,
        info: &IndexInfo,
    ) -> Result<Self, PipelineError> {
        if info.footer_offset >= info.size {
            let what = format!(
                "its description cannot be true: {} bytes, footer at {}",
                info.size, info.footer_offset
            );
            return Err(PipelineError::damaged(&key, what));
        }
        Ok(Self {
            downloader,
            key,
            info: info.clone(),
        })
    }

    /// Its key.
    #[must_use]
    pub fn key(&self) -> &Key {
        &self.key
    }

    /// The entries, sorted by path, as they arrive.
    ///
    /// The object as a whole is verified when the stream ends: an entry counts for good only then. Each one
    /// has a relative path without `..`, and comes once.
    #[must_use]
    pub fn entries(&self) -> BoxStream<'static, Result<IndexEntry, PipelineError>> {
        let reading = Reading::new(self.clone());
        let next = |mut reading: Reading| async move {
            let entry = reading.next().await?;
            Ok(entry.map(|entry| (entry, reading)))
        };
        futures_util::stream::try_unfold(reading, next).boxed()
    }
}

struct Reading {
    index: Index,
    sha256: Arc<Mutex<Sha256>>,
    lines: Lines,
    line: Vec<u8>,
    last: Option<String>,
    count: u64,
    ended: bool,
}

impl Reading {
    fn new(index: Index) -> Self {
        let sha256 = Arc::default();
        let lines = lines(&index, 0..index.info.footer_offset, &sha256);
        Self {
            index,
            sha256,
            lines,
            line: Vec::new(),
            last: None,
            count: 0,
            ended: false,
        }
    }

    fn damaged(&self, what: impl Into<String>) -> PipelineError {
        PipelineError::damaged(&self.index.key, what)
    }

    fn explain(&self, error: io::Error) -> PipelineError {
        match error.downcast::<PipelineError>() {
            Ok(error) => error,
            Err(error) => self.damaged(format!("zstd cannot decode it: {error}")),
        }
    }

    async fn next(&mut self) -> Result<Option<IndexEntry>, PipelineError> {
        if self.ended {
            return Ok(None);
        }
        if !self.read_line().await? {
            self.ended = true;
            self.check_end().await?;
            return Ok(None);
        }
        let entry: IndexEntry = serde_json::from_slice(&self.line)
            .map_err(|error| self.damaged(format!("line {}: {error}", self.count + 1)))?;
        check_entry(&entry).map_err(|what| self.damaged(format!("`{}`: {what}", entry.path)))?;
        if self.last.as_deref() >= Some(&*entry.path) {
            return Err(self.damaged(format!("`{}` is out of order", entry.path)));
        }
        self.last = Some(entry.path.clone());
        self.count += 1;
        Ok(Some(entry))
    }

    /// Reads a line without its end; false at the end of the lines.
    async fn read_line(&mut self) -> Result<bool, PipelineError> {
        self.line.clear();
        let mut limited = (&mut self.lines).take(LINE_MAX);
        let read = limited.read_until(b'\n', &mut self.line).await;
        read.map_err(|error| self.explain(error))?;
        if self.line.is_empty() {
            return Ok(false);
        }
        if self.line.pop() != Some(b'\n') {
            return Err(self.damaged("a line has no end"));
        }
        Ok(true)
    }

    async fn check_end(&mut self) -> Result<(), PipelineError> {
        let IndexInfo {
            size,
            footer_offset,
            ..
        } = self.index.info;
        self.lines = lines(&self.index, footer_offset..size, &self.sha256);
        if !self.read_line().await? {
            return Err(self.damaged("it has no footer"));
        }
        let footer: Result<Footer, _> = serde_json::from_slice(&self.line);
        if self.read_line().await? {
            return Err(self.damaged("there is something after its footer"));
        }
        // The hash first: it says most plainly that these are not the bytes that were written.
        let sha256 = {
            let mut sha256 = self.sha256.lock().unwrap_or_else(PoisonError::into_inner);
            hex::encode(sha256.finalize_reset())
        };
        if sha256 != self.index.info.sha256 {
            return Err(self.damaged("its SHA-256 is not the manifest's"));
        }
        let footer = footer.map_err(|error| self.damaged(format!("footer: {error}")))?;
        if footer.entries != self.count || self.index.info.entries != self.count {
            return Err(self.damaged(format!(
                "it has {} entries, its footer says {}, the manifest {}",
                self.count, footer.entries, self.index.info.entries
            )));
        }
        let mut end = Some(0_u64);
        for block in &footer.blocks {
            end = end.filter(|end| *end == block.offset);
            end = end.and_then(|end| end.checked_add(block.stored));
        }
        if end != Some(footer_offset) {
            return Err(self.damaged("its footer does not describe its blocks"));
        }
        Ok(())
    }
}

fn check_entry(entry: &IndexEntry) -> Result<(), &'static str> {
    check_path(&entry.path)?;
    if entry.mode > 0o7777 {
        return Err("its mode has more than permission bits");
    }
    if let EntryKind::File { size, extents } = &entry.kind {
        let mut placed = Some(0_u64);
        for extent in extents {
            if extent.count == 0 || extent.length == 0 {
                return Err("an extent is empty");
            }
            placed = placed.and_then(|placed| placed.checked_add(extent.length));
        }
        if placed != Some(*size) {
            return Err("its extents have another length than the file");
        }
    }
    Ok(())
}

/// The plain lines of a range of the index; what arrives is hashed on its way.
fn lines(index: &Index, range: std::ops::Range<u64>, sha256: &Arc<Mutex<Sha256>>) -> Lines {
    let Index {
        downloader,
        key,
        info,
    } = index.clone();
    let sha256 = Arc::clone(sha256);
    let empty = range.is_empty();
    let ranged = Ranged::new(downloader, key, range, info.size);
    let next = move |mut ranged: Ranged| {
        let sha256 = Arc::clone(&sha256);
        async move {
            let chunk = if empty { None } else { ranged.next().await? };
            Ok(chunk.map(|chunk| {
                sha256
                    .lock()
                    .unwrap_or_else(PoisonError::into_inner)
                    .update(&chunk);
                (chunk, ranged)
            }))
        }
    };
    let stream = futures_util::stream::try_unfold(ranged, next).boxed();
    let stream = stream.map(|chunk: Result<_, PipelineError>| chunk.map_err(io::Error::other));
    let reader = StreamReader::new(stream);
    if empty {
        // An index of nothing has a footer only, and a decoder wants at least one frame.
        return Box::new(reader);
    }
    let limit = DParameter::window_log_max(WINDOW_LOG_MAX);
    let mut decoder = ZstdDecoder::with_params(reader, &[limit]);
    decoder.multiple_members(true);
    Box::new(BufReader::with_capacity(64 << 10, decoder))
}
