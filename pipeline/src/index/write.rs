//! Sorting, checking and storing an index.

use std::io;

use sha2::{Digest as _, Sha256};
use tokio::sync::mpsc;
use zstd::bulk::Compressor;
use zstd::zstd_safe::CParameter;

use super::{BLOCK_PLAIN, Block, Footer, Item, Kind, Placed, State};
use crate::error::PipelineError;
use crate::pack::{EntryKind, Extent, IndexEntry, IndexInfo};
use crate::store::Key;
use crate::threads;
use crate::upload::Uploader;

/// zstd's level for indexes: they are small, and read often.
const LEVEL: i32 = 3;

/// Stored blocks between the thread that makes them and the upload.
const CHANNEL: usize = 2;

pub(super) async fn write(
    state: State,
    uploader: &Uploader,
    key: Key,
) -> Result<IndexInfo, PipelineError> {
    let (blocks, mut made) = mpsc::channel(CHANNEL);
    let maker = threads::spawn("index", move || Maker::new(blocks)?.run(state))?;
    let mut object = uploader.object(key);
    while let Some(block) = made.recv().await {
        object.write(&block).await?;
    }
    let (footer_offset, entries) = maker.join().await??;
    let stored = object.finish().await?;
    Ok(IndexInfo {
        size: stored.size,
        sha256: stored.sha256,
        footer_offset,
        entries,
        extra: serde_json::Map::new(),
    })
}

/// Makes stored blocks on a thread of its own.
struct Maker {
    compressor: Compressor<'static>,
    blocks: mpsc::Sender<Vec<u8>>,
    plain: Vec<u8>,
    first: String,
    offset: u64,
    footer: Footer,
}

fn codec(error: &io::Error) -> PipelineError {
    PipelineError::codec("index", error)
}

fn json(error: &serde_json::Error) -> PipelineError {
    PipelineError::Setup(format!("index: {error}"))
}

impl Maker {
    fn new(blocks: mpsc::Sender<Vec<u8>>) -> Result<Self, PipelineError> {
        let mut compressor = Compressor::new(LEVEL).map_err(|error| codec(&error))?;
        let checksum = compressor.set_parameter(CParameter::ChecksumFlag(true));
        checksum.map_err(|error| codec(&error))?;
        Ok(Self {
            compressor,
            blocks,
            plain: Vec::with_capacity(BLOCK_PLAIN),
            first: String::new(),
            offset: 0,
            footer: Footer::default(),
        })
    }

    /// Returns the footer's offset and the number of entries.
    fn run(mut self, state: State) -> Result<(u64, u64), PipelineError> {
        let State { items, mut placed } = state;
        placed.sort_unstable_by_key(|placed| (placed.file, placed.file_offset));
        let mut order: Vec<u32> = (0..).take(items.len()).collect();
        order.sort_unstable_by_key(|&id| items.get(id as usize).map(|item| &item.path));
        let mut last: Option<&str> = None;
        for id in order {
            let Some(item) = items.get(id as usize) else {
                continue;
            };
            if item.kind == Kind::Forgotten || item.path.is_empty() {
                continue;
            }
            if last == Some(&item.path) {
                let what = format!("`{}` was given to the index twice", item.path);
                return Err(PipelineError::Setup(what));
            }
            last = Some(&item.path);
            self.line(&entry(id, item, &placed)?)?;
        }
        self.flush()?;
        let offset = self.offset;
        let mut footer = serde_json::to_vec(&self.footer).map_err(|error| json(&error))?;
        footer.push(b'\n');
        self.store(&footer)?;
        Ok((offset, self.footer.entries))
    }

    fn line(&mut self, entry: &IndexEntry) -> Result<(), PipelineError> {
        let line = serde_json::to_vec(entry).map_err(|error| json(&error))?;
        if self.plain.len() + line.len() >= BLOCK_PLAIN {
            self.flush()?;
        }
        if self.plain.is_empty() {
            self.first.clone_from(&entry.path);
        }
        self.plain.extend_from_slice(&line);
        self.plain.push(b'\n');
        self.footer.entries += 1;
        Ok(())
    }

    fn flush(&mut self) -> Result<(), PipelineError> {
        if self.plain.is_empty() {
            return Ok(());
        }
        let plain = std::mem::take(&mut self.plain);
        let offset = self.offset;
        let sha256 = self.store(&plain)?;
        self.footer.blocks.push(Block {
            first: std::mem::take(&mut self.first),
            offset,
            stored: self.offset - offset,
            plain: plain.len() as u64,
            sha256,
        });
        self.plain = plain;
        self.plain.clear();
        Ok(())
    }

    fn store(&mut self, plain: &[u8]) -> Result<String, PipelineError> {
        let stored = self
            .compressor
            .compress(plain)
            .map_err(|error| codec(&error))?;
        let sha256 = hex::encode(Sha256::digest(&stored));
        self.offset += stored.len() as u64;
        // Closed only if the upload failed, and that error is the one that is shown.
        let sent = self.blocks.blocking_send(stored);
        sent.map_err(|_| PipelineError::Cancelled)?;
        Ok(sha256)
    }
}

/// The entry of an item; `placed` is sorted by file and place in it.
fn entry(id: u32, item: &Item, placed: &[Placed]) -> Result<IndexEntry, PipelineError> {
    let kind = match &item.kind {
        Kind::Directory => EntryKind::Directory,
        Kind::Symlink(target) => EntryKind::Symlink {
            target: target.to_string(),
        },
        Kind::File(size) => EntryKind::File {
            size: *size,
            extents: extents(id, item, *size, placed)?,
        },
        Kind::Open | Kind::Forgotten => {
            let what = format!("`{}` was not closed", item.path);
            return Err(PipelineError::Setup(what));
        }
    };
    Ok(IndexEntry {
        path: item.path.to_string(),
        mode: item.mode,
        mtime: item.mtime,
        kind,
    })
}

fn extents(
    id: u32,
    item: &Item,
    size: u64,
    placed: &[Placed],
) -> Result<Vec<Extent>, PipelineError> {
    let first = placed.partition_point(|placed| placed.file < id);
    let of_file = placed.get(first..).unwrap_or_default();
    let of_file = of_file.iter().take_while(|placed| placed.file == id);
    let (mut end, mut extents) = (0, Vec::new());
    for placed in of_file {
        if placed.file_offset != end {
            let what = format!(
                "`{}`: bytes placed at {} where {end} was due",
                item.path, placed.file_offset
            );
            return Err(PipelineError::Setup(what));
        }
        end += placed.extent.length;
        extents.push(placed.extent);
    }
    if end != size {
        let what = format!("`{}`: {end} bytes were placed, it has {size}", item.path);
        return Err(PipelineError::Setup(what));
    }
    Ok(extents)
}
