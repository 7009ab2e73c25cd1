//! One entry of an index as a stream of plain bytes.

use std::collections::VecDeque;
use std::sync::Arc;

use bytes::Bytes;
use futures_util::StreamExt as _;
use futures_util::stream::BoxStream;

use super::Downloader;
use super::pack::PackReader;
use crate::budget::Reserve;
use crate::error::PipelineError;
use crate::extract::Slice;
use crate::extract::slices_of;
use crate::frame::FrameDecoder;
use crate::pack::{EntryKind, Extent, IndexEntry, PackInfo};
use crate::store::Key;

impl Downloader {
    /// The plain bytes of one file of an index, in order, each frame verified before it is shown. Fetches
    /// frame by frame; meant for looking at single files, not for restoring all of them. Takes one part
    /// (8 MiB) of the budget while it is read.
    ///
    /// # Errors
    /// [`PipelineError::Setup`] if the entry is no file or the budget has no room.
    pub fn file_reader(
        &self,
        entry: &IndexEntry,
        packs: &[(Key, PackInfo)],
    ) -> Result<BoxStream<'static, Result<Bytes, PipelineError>>, PipelineError> {
        let EntryKind::File { extents, .. } = &entry.kind else {
            let what = format!("`{}` is not a file", entry.path);
            return Err(PipelineError::Setup(what));
        };
        let reading = Reading {
            downloader: self.clone(),
            path: entry.path.clone(),
            packs: packs.to_vec(),
            reserve: Reserve::new(&self.budget, 1, 0, "reading a file")?,
            extents: extents.clone().into(),
            slices: VecDeque::new(),
            pack: None,
            decoder: Some(FrameDecoder::new()?),
        };
        let next = |mut reading: Reading| async move {
            let bytes = reading.next().await?;
            Ok(bytes.map(|bytes| (bytes, reading)))
        };
        Ok(futures_util::stream::try_unfold(reading, next).boxed())
    }
}

struct Reading {
    downloader: Downloader,
    path: String,
    packs: Vec<(Key, PackInfo)>,
    reserve: Reserve,
    extents: VecDeque<Extent>,
    slices: VecDeque<Slice>,
    pack: Option<(u32, Arc<PackReader>)>,
    /// Absent only while a frame is decoded.
    decoder: Option<FrameDecoder>,
}

impl Reading {
    async fn next(&mut self) -> Result<Option<Bytes>, PipelineError> {
        loop {
            if let Some(slice) = self.slices.pop_front() {
                return self.read(slice).await.map(Some);
            }
            let Some(extent) = self.extents.pop_front() else {
                return Ok(None);
            };
            let pack = self.open(extent.pack).await?;
            self.slices = slices_of(&pack, &self.path, 0, 0, &extent)?.into();
        }
    }

    async fn open(&mut self, number: u32) -> Result<Arc<PackReader>, PipelineError> {
        if let Some((open, pack)) = &self.pack
            && *open == number
        {
            return Ok(Arc::clone(pack));
        }
        let found = self.packs.iter().find(|(_, info)| info.number == number);
        let (key, info) = found.ok_or_else(|| {
            let what = format!("`{}` names pack {number}, which does not exist", self.path);
            PipelineError::Setup(what)
        })?;
        let pack = PackReader::open(&self.downloader, key, info).await?;
        self.pack = Some((number, Arc::clone(&pack)));
        Ok(pack)
    }

    async fn read(&mut self, slice: Slice) -> Result<Bytes, PipelineError> {
        let Some((_, pack)) = &self.pack else {
            return Err(PipelineError::Cancelled);
        };
        let pack = Arc::clone(pack);
        let mut buffer = self.reserve.buffer(&self.downloader.cancel).await?;
        pack.fetch(&(slice.frame..slice.frame + 1), &mut buffer)
            .await?;
        let mut decoder = match self.decoder.take() {
            Some(decoder) => decoder,
            None => FrameDecoder::new()?,
        };
        let task = tokio::task::spawn_blocking(move || {
            let plain = pack.decode(slice.frame, slice.frame, buffer.as_ref(), &mut decoder);
            let plain = plain.map(|plain| Bytes::copy_from_slice(slice.of(plain)));
            (plain, decoder)
        });
        let panicked = |_| PipelineError::Panicked {
            thread: "decoding a frame".into(),
        };
        let (plain, decoder) = task.await.map_err(panicked)?;
        self.decoder = Some(decoder);
        plain
    }
}
