//! One request to the store: frames out, verified and decompressed, into the cache.

use std::collections::VecDeque;
use std::ops::Range;
use std::sync::{Arc, Mutex, PoisonError};

use bytes::{Buf as _, Bytes};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, watch};

use super::ahead::{Access, Track, Want};
use super::cache::{Coming, FrameId, Outcome, Pressure};
use super::memory::Claim;
use super::tables::Table;
use super::{AHEAD_MAX, Shared};
use crate::error::PipelineError;
use crate::frame::FrameDecoder;
use crate::pack::FRAME_PLAIN_MAX;

/// Bytes between wanted frames that are fetched along, because another request costs more.
const GAP: u64 = 256 << 10;

/// The requests that may be under way, each with its buffers.
#[derive(Debug)]
pub(super) struct Hangar {
    seats: Arc<Semaphore>,
    kits: Mutex<Vec<Kit>>,
}

/// What one request needs beside the frames' own memory.
#[derive(Debug)]
struct Kit {
    decoder: FrameDecoder,
    /// The stored bytes of one frame.
    stored: Vec<u8>,
}

impl Hangar {
    pub(super) fn new(flights: usize) -> Self {
        Self {
            seats: Arc::new(Semaphore::new(flights)),
            kits: Mutex::default(),
        }
    }

    /// Waits until one more may begin. Those under way wait for nobody but the store.
    pub(super) async fn seat(&self) -> Result<OwnedSemaphorePermit, PipelineError> {
        let seat = Arc::clone(&self.seats).acquire_owned().await;
        // Nobody closes the semaphore.
        seat.map_err(|_| PipelineError::Cancelled)
    }

    /// One for reading ahead: the last one is left for who waits.
    fn spare(&self) -> Option<OwnedSemaphorePermit> {
        let seat = Arc::clone(&self.seats).try_acquire_owned().ok()?;
        (self.seats.available_permits() > 0).then_some(seat)
    }

    fn kit(&self) -> Result<Kit, PipelineError> {
        let kit = self
            .kits
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .pop();
        match kit {
            Some(kit) => Ok(kit),
            None => Ok(Kit {
                decoder: FrameDecoder::new()?,
                stored: Vec::new(),
            }),
        }
    }

    fn keep(&self, kit: Kit) {
        let mut kits = self.kits.lock().unwrap_or_else(PoisonError::into_inner);
        kits.push(kit);
    }
}

/// Frames of one pack that are announced and must come, or be taken back: also if the request panics.
struct Landing {
    shared: Arc<Shared>,
    frames: VecDeque<Expected>,
}

struct Expected {
    frame: FrameId,
    sender: watch::Sender<Option<Outcome>>,
    claim: Claim,
}

impl Landing {
    fn fail(&mut self, error: &PipelineError) {
        while let Some(expected) = self.frames.pop_front() {
            self.lose(&expected, error);
        }
    }

    /// Says why one frame does not come; whoever wants it later asks again.
    fn lose(&self, expected: &Expected, error: &PipelineError) {
        self.shared.cache().forget(expected.frame);
        // Nobody may be waiting.
        expected.sender.send_replace(Some(Err(error.clone())));
    }

    fn land(&mut self, expected: Expected, plain: Vec<u8>) {
        let Expected {
            frame,
            sender,
            claim,
        } = expected;
        let length = plain.len() as u64;
        let plain = Bytes::from_owner(Owned {
            plain,
            _claim: claim,
        });
        if self.shared.cache().put(frame, plain.clone()) {
            self.shared.downloader.meter.add_plain(length);
        }
        sender.send_replace(Some(Ok(plain)));
        self.shared.memory.arrived();
    }
}

impl Drop for Landing {
    fn drop(&mut self) {
        self.fail(&PipelineError::Panicked {
            thread: "fetching frames".into(),
        });
    }
}

/// A frame's bytes and the claim on their memory.
struct Owned {
    plain: Vec<u8>,
    _claim: Claim,
}

impl AsRef<[u8]> for Owned {
    fn as_ref(&self) -> &[u8] {
        &self.plain
    }
}

impl Shared {
    /// Fetches the frame of a read, and what is to come after it. `None` if another does already.
    pub(super) fn begin(
        self: &Arc<Self>,
        access: &Access,
        table: &Arc<Table>,
        claim: Claim,
        seat: OwnedSemaphorePermit,
    ) -> Option<Coming> {
        let (expected, want) = {
            let mut cache = self.cache();
            let expected = cache.expect(access.frame, true)?;
            (expected, cache.ahead.note(access, true))
        };
        let (sender, coming) = expected;
        let mut landing = Landing {
            shared: Arc::clone(self),
            frames: VecDeque::from([Expected {
                frame: access.frame,
                sender,
                claim,
            }]),
        };
        if let Some(want) = want {
            self.follow(&want, table, &mut landing);
        }
        self.launch(landing, table, seat);
        Some(coming)
    }

    /// Notes a read whose frame is here or on its way, and fetches what is to come after it.
    pub(super) fn ahead(self: &Arc<Self>, access: &Access, table: &Arc<Table>) {
        let Some(want) = self.cache().ahead.note(access, false) else {
            return;
        };
        let Some(seat) = self.hangar.spare() else {
            return;
        };
        let mut landing = Landing {
            shared: Arc::clone(self),
            frames: VecDeque::new(),
        };
        self.follow(&want, table, &mut landing);
        if !landing.frames.is_empty() {
            self.launch(landing, table, seat);
        }
    }

    /// Announces the frames of `want` as far as there is memory.
    fn follow(&self, want: &Want, table: &Table, landing: &mut Landing) {
        let mut edge = want.from;
        for (frame, end) in self.along(want, table) {
            if self.cache().has(frame) {
                edge = end;
                continue;
            }
            let Some(claim) = self.claim_by(Pressure::Ahead) else {
                break;
            };
            if let Some((sender, _)) = self.cache().expect(frame, false) {
                landing.frames.push_back(Expected {
                    frame,
                    sender,
                    claim,
                });
            }
            edge = end;
        }
        self.cache().ahead.reached(want, edge);
    }

    /// The frames of `want`, each with where it ends on the track. Only those of this pack: its table is at hand.
    fn along(&self, want: &Want, table: &Table) -> Vec<(FrameId, u64)> {
        let mut frames = Vec::with_capacity(want.frames);
        let (mut at, mut bytes) = (want.from, 0);
        while frames.len() < want.frames {
            let next = match want.track {
                Track::File(file) => self
                    .files
                    .place(file, at)
                    .filter(|place| place.pack == table.number)
                    .and_then(|place| table.locate(&place, at).ok())
                    .map(|spot| (spot.frame, at + spot.length)),
                Track::Pack(_) => {
                    let unit = FRAME_PLAIN_MAX as u64;
                    let frame = u32::try_from(at.div_ceil(unit)).ok();
                    frame.map(|frame| (frame, (u64::from(frame) + 1) * unit))
                }
            };
            let Some((frame, end)) = next else { break };
            let Some((_, stored)) = table.lengths(frame) else {
                break;
            };
            bytes += stored;
            if bytes > AHEAD_MAX {
                break;
            }
            let pack = table.number;
            frames.push((FrameId { pack, frame }, end));
            at = end;
        }
        frames
    }

    fn launch(&self, mut landing: Landing, table: &Arc<Table>, seat: OwnedSemaphorePermit) {
        let table = Arc::clone(table);
        self.runtime.spawn(async move {
            let shared = Arc::clone(&landing.shared);
            let flown = match shared.hangar.kit() {
                Ok(kit) => fly(&table, &mut landing, kit).await,
                Err(error) => Err(error),
            };
            match flown {
                Ok(kit) => shared.hangar.keep(kit),
                Err(error) => landing.fail(&error),
            }
            drop(seat);
        });
    }
}

/// The next frames that one range of the object gives, and that range.
fn run(table: &Table, frames: &VecDeque<Expected>) -> Result<(usize, Range<u64>), PipelineError> {
    let mut run: Option<Range<u64>> = None;
    let mut count = 0;
    for expected in frames {
        let frame = expected.frame.frame;
        let place = table.pack.place(&(frame..frame + 1))?;
        let near = |end: u64| (end..=end.saturating_add(GAP)).contains(&place.start);
        match &mut run {
            None => run = Some(place),
            Some(run) if near(run.end) => run.end = place.end,
            Some(_) => break,
        }
        count += 1;
    }
    Ok((count, run.unwrap_or_default()))
}

/// Brings in all frames of a landing.
async fn fly(table: &Table, landing: &mut Landing, mut kit: Kit) -> Result<Kit, PipelineError> {
    while !landing.frames.is_empty() {
        let (count, range) = run(table, &landing.frames)?;
        let mut at = range.start;
        let mut ranged = table.pack.ranged(range);
        let mut chunk = Bytes::new();
        for _ in 0..count {
            let Some(next) = landing.frames.front() else {
                break;
            };
            let frame = next.frame.frame;
            let place = table.pack.place(&(frame..frame + 1))?;
            kit.stored.clear();
            while at < place.end {
                if chunk.is_empty() {
                    let more = ranged.next().await?;
                    chunk = more.ok_or_else(|| table.pack.damaged("it ended early"))?;
                }
                let till = if at < place.start {
                    place.start
                } else {
                    place.end
                };
                let step = usize::try_from(till - at)
                    .unwrap_or(usize::MAX)
                    .min(chunk.len());
                if at < place.start {
                    chunk.advance(step);
                } else {
                    kit.stored.extend_from_slice(&chunk.split_to(step));
                }
                at += step as u64;
            }
            let (plain, used) = decode(table, frame, kit).await?;
            kit = used;
            // A damaged frame is no reason to withhold those behind it, which somebody else may be reading.
            match (landing.frames.pop_front(), plain) {
                (Some(expected), Ok(plain)) => landing.land(expected, plain),
                (Some(expected), Err(error)) => landing.lose(&expected, &error),
                (None, _) => {}
            }
        }
    }
    Ok(kit)
}

/// Verifies and decompresses, beside the threads that do I/O: the plain bytes, or what is wrong with the frame.
async fn decode(
    table: &Table,
    frame: u32,
    kit: Kit,
) -> Result<(Result<Vec<u8>, PipelineError>, Kit), PipelineError> {
    let pack = Arc::clone(&table.pack);
    let task = tokio::task::spawn_blocking(move || {
        let mut kit = kit;
        let stamp = pack.table().stamp(frame);
        let stamp = stamp.ok_or_else(|| pack.damaged(format!("it has no frame {frame}")))?;
        let mut plain = vec![0; stamp.plain_len as usize];
        let decoded = kit
            .decoder
            .decode_verified_into(&kit.stored, stamp, &mut plain);
        let decoded = decoded.map_err(|damage| pack.damaged(format!("frame {frame}: {damage}")));
        Ok((decoded.map(|()| plain), kit))
    });
    task.await.map_err(|_| PipelineError::Panicked {
        thread: "decoding a frame".into(),
    })?
}
