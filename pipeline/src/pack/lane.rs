//! One thread's way into the packs.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use bytes::Bytes;
use sha2::{Digest as _, Sha256};
use tokio::sync::{mpsc, oneshot};

use super::set::Shared;
use super::{FRAMES_MAX, PackInfo, format};
use crate::budget::{PartBuffer, Reserve};
use crate::error::PipelineError;
use crate::frame::{FRAME_STORED_MAX, FrameEncoder, FrameStamp, stored_bound};
use crate::meter::Meter;
use crate::pace::{self, Pace};
use crate::store::Key;
use crate::upload::{CHANNEL, Identity, PartMessage, UploadJob};

/// Writes frames into packs, one after the other. For ONE std thread (not a tokio worker): its methods
/// compress and hash on the caller's thread, and block while the memory budget is used up, until the
/// set's token is cancelled or an upload fails.
#[derive(Debug)]
pub struct Lane {
    shared: Arc<Shared>,
    reserve: Reserve,
    encoder: FrameEncoder,
    /// For a frame that might not fit in what is left of a part.
    scratch: Vec<u8>,
    open: Option<OpenPack>,
    pace: Pace,
    /// The thread's processor time when its last frame was paid for.
    paid: Option<Duration>,
    finished: bool,
}

/// What the lane knows of its pack when it is done with it: all but the hash over the parts.
type Draft = PackInfo;

#[derive(Debug)]
struct OpenPack {
    number: u32,
    header: Vec<u8>,
    entries: Vec<u8>,
    frames: u32,
    stored: u64,
    plain: u64,
    part: Option<PartBuffer>,
    part_sha256: Sha256,
    parts: mpsc::Sender<PartMessage>,
    draft: oneshot::Sender<Draft>,
}

impl Lane {
    pub(super) fn new(shared: Arc<Shared>, reserve: Reserve, encoder: FrameEncoder) -> Self {
        shared.open_lanes.fetch_add(1, Ordering::AcqRel);
        Self {
            shared,
            reserve,
            encoder,
            scratch: Vec::new(),
            open: None,
            pace: Pace::default(),
            paid: None,
            finished: false,
        }
    }

    /// Lets it take of the processors what `pace` allows: all that its thread does counts, the reading too.
    pub fn set_pace(&mut self, pace: Pace) {
        self.pace = pace;
    }

    /// Writes one frame of 1 byte to [`super::FRAME_PLAIN_MAX`] plain bytes; returns its pack and its place there.
    ///
    /// # Errors
    /// The first error of the whole set, [`PipelineError::Cancelled`], or [`PipelineError::Setup`] for
    /// a frame of no or too many bytes. The set is stopped then.
    pub fn write(&mut self, plain: &[u8]) -> Result<(u32, u32), PipelineError> {
        self.shared.fault.check()?;
        let written = self.write_frame(plain);
        let place = written.map_err(|error| self.shared.fault.instead_of(error))?;
        self.pay();
        Ok(place)
    }

    /// Waits until the pace allows what the thread did since it was here last. Whoever ends the set ends the waiting, and the next frame
    /// says so.
    fn pay(&mut self) {
        let now = pace::thread_time();
        let taken = now.saturating_sub(self.paid.replace(now).unwrap_or(now));
        if !self.pace.spend(taken) {
            return;
        }
        let cancel = self.shared.fault.token();
        let paid = async {
            tokio::select! {
                () = self.pace.pay(taken) => {}
                () = cancel.cancelled() => {}
            }
        };
        self.shared.runtime.block_on(paid);
    }

    /// The counters of the operation.
    #[must_use]
    pub fn meter(&self) -> &Meter {
        self.shared.uploader.meter()
    }

    /// Ends the lane's pack. Its upload goes on; [`super::PackSet::finish`] waits for it.
    ///
    /// # Errors
    /// As [`Self::write`].
    pub fn finish(mut self) -> Result<(), PipelineError> {
        self.shared.fault.check()?;
        let closed = self.close_pack();
        closed.map_err(|error| self.shared.fault.instead_of(error))?;
        self.finished = true;
        Ok(())
    }

    fn write_frame(&mut self, plain: &[u8]) -> Result<(u32, u32), PipelineError> {
        if plain.is_empty() {
            return Err(PipelineError::Setup(
                "a frame of 0 bytes was asked for".into(),
            ));
        }
        let bound = stored_bound(plain.len());
        if self
            .open
            .as_ref()
            .is_some_and(|pack| self.is_full(pack, bound))
        {
            self.close_pack()?;
        }
        let mut pack = match self.open.take() {
            Some(pack) => pack,
            None => self.open_pack()?,
        };
        let mut part = pack.take_part(self)?;
        // Straight into the part if it surely fits there; only the frame across two parts is copied.
        let stamp = if part.room().len() >= bound {
            let fed = part.len();
            let hash = &mut pack.part_sha256;
            let stamp = self
                .encoder
                .encode_into_part(plain, part.room(), hash, fed)?;
            part.advance(stamp.stored_len as usize);
            pack.stored += u64::from(stamp.stored_len);
            pack.part = Some(part);
            stamp
        } else {
            pack.part = Some(part);
            self.scratch.resize(FRAME_STORED_MAX, 0);
            let stamp = self.encoder.encode(plain, &mut self.scratch)?;
            let stored = self.scratch.get(..stamp.stored_len as usize);
            pack.append(stored.unwrap_or_default(), self)?;
            stamp
        };
        let place = pack.count(&stamp);
        self.shared
            .uploader
            .meter()
            .add_plain(u64::from(stamp.plain_len));
        self.open = Some(pack);
        Ok(place)
    }

    fn is_full(&self, pack: &OpenPack, more: usize) -> bool {
        let table = (pack.header.len() + pack.entries.len() + 100) as u64;
        pack.frames >= FRAMES_MAX
            || pack.stored + more as u64 + table > self.shared.options.pack_size
    }

    fn open_pack(&self) -> Result<OpenPack, PipelineError> {
        let number = self.shared.begun.fetch_add(1, Ordering::AcqRel);
        let key = (self.shared.key_of)(number);
        let header = format::header(&key, rand::random());
        let (parts, received) = mpsc::channel(CHANNEL);
        let (draft, drafted) = oneshot::channel();
        let job = UploadJob {
            uploader: self.shared.uploader.clone(),
            key,
            identity: Identity::Head(Bytes::copy_from_slice(&header)),
            fault: Some(self.shared.fault.clone()),
        };
        let shared = Arc::clone(&self.shared);
        self.shared.tasks.spawn_on(
            async move {
                if let Err(error) = upload_pack(&shared, job, received, drafted).await {
                    shared.fault.fail(error);
                }
            },
            &self.shared.runtime,
        );
        let mut pack = OpenPack {
            number,
            header: header.clone(),
            entries: Vec::new(),
            frames: 0,
            stored: 0,
            plain: 0,
            part: None,
            part_sha256: Sha256::new(),
            parts,
            draft,
        };
        pack.append(&header, self)?;
        Ok(pack)
    }

    fn close_pack(&mut self) -> Result<(), PipelineError> {
        let Some(mut pack) = self.open.take() else {
            return Ok(());
        };
        let table_offset = pack.stored;
        let table = format::table(&pack.header, &pack.entries);
        pack.append(&table, self)?;
        let info = PackInfo {
            number: pack.number,
            size: pack.stored,
            frames: pack.frames,
            plain_bytes: pack.plain,
            parts_sha256: String::new(),
            table_offset,
            table_sha256: hex::encode(Sha256::digest(&table)),
            extra: serde_json::Map::new(),
        };
        let part = pack.take_part(self)?;
        pack.send(part, true)?;
        let sent = pack.draft.send(info);
        sent.map_err(|_| PipelineError::Cancelled)
    }
}

impl OpenPack {
    /// The part being filled, with room in it. A full one is sent first: this thread holds nothing while
    /// it waits for memory.
    fn take_part(&mut self, lane: &Lane) -> Result<PartBuffer, PipelineError> {
        match self.part.take() {
            Some(part) if !part.is_full() => return Ok(part),
            Some(full) => self.send(full, false)?,
            None => {}
        }
        let cancel = lane.shared.fault.token();
        lane.shared.runtime.block_on(lane.reserve.buffer(cancel))
    }

    fn append(&mut self, mut bytes: &[u8], lane: &Lane) -> Result<(), PipelineError> {
        while !bytes.is_empty() {
            let mut part = self.take_part(lane)?;
            let (now, later) = bytes.split_at(part.append(bytes));
            self.part_sha256.update(now);
            self.stored += now.len() as u64;
            self.part = Some(part);
            bytes = later;
        }
        Ok(())
    }

    fn count(&mut self, stamp: &FrameStamp) -> (u32, u32) {
        format::push_entry(&mut self.entries, stamp);
        self.plain += u64::from(stamp.plain_len);
        self.frames += 1;
        (self.number, self.frames - 1)
    }

    fn send(&mut self, part: PartBuffer, last: bool) -> Result<(), PipelineError> {
        let sha256 = self.part_sha256.finalize_reset().into();
        let body = part.freeze();
        let message = PartMessage { body, sha256, last };
        // Closed only if the upload ended early; it has reported why.
        let sent = self.parts.blocking_send(message);
        sent.map_err(|_| PipelineError::Cancelled)
    }
}

impl Drop for Lane {
    fn drop(&mut self) {
        self.shared.open_lanes.fetch_sub(1, Ordering::AcqRel);
        if self.finished {
            return;
        }
        let current = std::thread::current();
        let error = if std::thread::panicking() {
            let thread = current.name().unwrap_or("a thread with a lane").into();
            PipelineError::Panicked { thread }
        } else {
            PipelineError::Cancelled
        };
        self.shared.fault.fail(error);
    }
}

async fn upload_pack(
    shared: &Shared,
    job: UploadJob,
    parts: mpsc::Receiver<PartMessage>,
    draft: oneshot::Receiver<Draft>,
) -> Result<(), PipelineError> {
    let key: Key = job.key.clone();
    let done = job.run(parts).await?;
    // Sent right after the last part.
    let draft = draft.await.map_err(|_| PipelineError::Cancelled)?;
    let parts_sha256 = hex::encode(done.parts_sha256);
    let info = PackInfo {
        parts_sha256,
        ..draft
    };
    if info.size != done.size {
        let what = format!("{} bytes were written, {} sent", info.size, done.size);
        return Err(PipelineError::damaged(&key, what));
    }
    shared.done().push(info);
    Ok(())
}
