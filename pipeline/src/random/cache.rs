//! Frames in memory and on their way, and which of them to let go.

use std::collections::HashMap;
use std::time::{Duration, Instant};

use bytes::Bytes;
use tokio::sync::watch;

use super::ahead::Ahead;
use crate::error::PipelineError;

/// One frame of one of the packs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) struct FrameId {
    /// Place of the pack among all of them.
    pub(super) pack: u32,
    pub(super) frame: u32,
}

/// How an awaited frame ended.
pub(super) type Outcome = Result<Bytes, PipelineError>;

/// A frame that is on its way.
#[derive(Debug, Clone)]
pub(super) struct Coming(watch::Receiver<Option<Outcome>>);

impl Coming {
    pub(super) async fn wait(mut self) -> Outcome {
        let arrived = self.0.wait_for(Option::is_some).await;
        let outcome = arrived.ok().and_then(|outcome| outcome.clone());
        // Dropped unsent by a panic only.
        outcome.unwrap_or_else(|| {
            Err(PipelineError::Panicked {
                thread: "fetching frames".into(),
            })
        })
    }
}

/// What there is of a frame.
#[derive(Debug)]
pub(super) enum Look {
    Here(Bytes),
    Coming(Coming),
    Absent,
}

/// Who needs memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Pressure {
    /// Somebody waits.
    Demand,
    /// Somebody may come.
    Ahead,
}

#[derive(Debug)]
enum Slot {
    Coming { coming: Coming, wanted: bool },
    Here(Held),
}

#[derive(Debug)]
struct Held {
    plain: Bytes,
    touched: Instant,
    /// Somebody has asked for it.
    read: bool,
    /// Its last byte was asked for: who reads on does not come back.
    finished: bool,
}

impl Held {
    /// The lowest goes first.
    fn worth(&self) -> u8 {
        match (self.read, self.finished) {
            (_, true) => 0,
            (true, false) => 1,
            (false, false) => 2,
        }
    }
}

/// A half-read frame that nobody has come back to for so long may go for one that is read ahead.
const LEFT: Duration = Duration::from_secs(2);

/// All of it, behind one lock that is never held while anything is waited for.
#[derive(Debug)]
pub(super) struct Cache {
    slots: HashMap<FrameId, Slot>,
    pub(super) ahead: Ahead,
    /// Frames that were counted, a bit each, by pack.
    counted: HashMap<u32, Vec<u64>>,
}

impl Cache {
    pub(super) fn new(capacity: usize) -> Self {
        Self {
            slots: HashMap::new(),
            ahead: Ahead::new(capacity),
            counted: HashMap::new(),
        }
    }

    /// `to_end`: its last byte is asked for.
    pub(super) fn look(&mut self, frame: FrameId, to_end: bool) -> Look {
        match self.slots.get_mut(&frame) {
            None => Look::Absent,
            Some(Slot::Coming { coming, wanted }) => {
                *wanted = true;
                Look::Coming(coming.clone())
            }
            Some(Slot::Here(held)) => {
                held.touched = Instant::now();
                held.read = true;
                held.finished |= to_end;
                Look::Here(held.plain.clone())
            }
        }
    }

    pub(super) fn has(&self, frame: FrameId) -> bool {
        self.slots.contains_key(&frame)
    }

    /// Notes that a frame is on its way; `None` if it is here or on its way already.
    pub(super) fn expect(
        &mut self,
        frame: FrameId,
        wanted: bool,
    ) -> Option<(watch::Sender<Option<Outcome>>, Coming)> {
        if self.has(frame) {
            return None;
        }
        let (sender, receiver) = watch::channel(None);
        let coming = Coming(receiver);
        let slot = Slot::Coming {
            coming: coming.clone(),
            wanted,
        };
        self.slots.insert(frame, slot);
        Some((sender, coming))
    }

    /// Takes a frame that has come. Whether for the first time.
    pub(super) fn put(&mut self, frame: FrameId, plain: Bytes) -> bool {
        let read = matches!(
            self.slots.get(&frame),
            Some(Slot::Coming { wanted: true, .. })
        );
        let held = Held {
            plain,
            touched: Instant::now(),
            read,
            finished: false,
        };
        self.slots.insert(frame, Slot::Here(held));
        let words = self.counted.entry(frame.pack).or_default();
        let (word, bit) = ((frame.frame / 64) as usize, 1_u64 << (frame.frame % 64));
        if words.len() <= word {
            words.resize(word + 1, 0);
        }
        let word = words.get_mut(word);
        word.is_some_and(|word| {
            let first = *word & bit == 0;
            *word |= bit;
            first
        })
    }

    /// A frame that does not come.
    pub(super) fn forget(&mut self, frame: FrameId) {
        self.slots.remove(&frame);
    }

    /// Takes out the frame that is worth least. Its memory goes back when nobody reads in it any more.
    pub(super) fn evict(&mut self, pressure: Pressure) -> Option<Bytes> {
        let held = self.slots.iter().filter_map(|(frame, slot)| match slot {
            Slot::Here(held) => Some((*frame, held)),
            Slot::Coming { .. } => None,
        });
        let may_go = |held: &Held| match pressure {
            Pressure::Demand => true,
            Pressure::Ahead => held.finished || (held.read && held.touched.elapsed() > LEFT),
        };
        let (frame, held) = held
            .filter(|(_, held)| may_go(held))
            .min_by_key(|(_, held)| (held.worth(), held.touched))?;
        if !held.read {
            self.ahead.wasted(frame);
        }
        match self.slots.remove(&frame) {
            Some(Slot::Here(held)) => Some(held.plain),
            _ => None,
        }
    }

    /// Takes out all that nobody has asked for in this time.
    pub(super) fn expire(&mut self, idle: Duration) -> Vec<Bytes> {
        let old = |slot: &Slot| matches!(slot, Slot::Here(held) if held.touched.elapsed() > idle);
        let expired = self.slots.extract_if(|_, slot| old(slot));
        let bytes = expired.filter_map(|(_, slot)| match slot {
            Slot::Here(held) => Some(held.plain),
            Slot::Coming { .. } => None,
        });
        bytes.collect()
    }
}
