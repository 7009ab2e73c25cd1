//! Who reads on, and how far ahead of that to fetch.

use std::time::{Duration, Instant};

use super::cache::FrameId;
use super::files::{Place, RandomFile};
use super::tables::Spot;
use super::{AHEAD_MAX, frames_of};
use crate::pack::FRAME_PLAIN_MAX;

/// Most readers that are told apart.
const STREAMS: usize = 64;
/// One that has not read for so long takes no share of the memory.
const ACTIVE: Duration = Duration::from_secs(2);
const UNIT: u64 = FRAME_PLAIN_MAX as u64;

/// Along what somebody reads. Places on it are bytes: of the file, or 1 MiB for each frame of the pack.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Track {
    /// A file of more than one frame.
    File(RandomFile),
    /// Files within single frames of a pack.
    Pack(u32),
}

/// A read within one frame.
#[derive(Debug, Clone, Copy)]
pub(super) struct Access {
    pub(super) frame: FrameId,
    pub(super) track: Track,
    /// Whether it asks for the frame's last byte.
    pub(super) to_end: bool,
    /// Where on the track it begins.
    from: u64,
    /// Where on the track the frame ends.
    to: u64,
}

impl Access {
    pub(super) fn new(file: RandomFile, place: &Place, spot: &Spot, offset: u64, end: u64) -> Self {
        let (track, from, to) = if place.alone {
            let from = u64::from(spot.frame) * UNIT;
            (Track::Pack(place.pack), from, from + UNIT)
        } else {
            (Track::File(file), offset, offset + spot.length)
        };
        Self {
            frame: FrameId {
                pack: place.pack,
                frame: spot.frame,
            },
            track,
            to_end: spot.last && end >= offset + spot.length,
            from,
            to,
        }
    }
}

/// What to fetch for a reader.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Want {
    pub(super) track: Track,
    /// Where on the track.
    pub(super) from: u64,
    pub(super) frames: usize,
}

#[derive(Debug)]
struct Stream {
    track: Track,
    /// Everything before is fetched, or on its way, or was.
    edge: u64,
    /// Frames to fetch next time.
    window: usize,
    touched: Instant,
}

impl Stream {
    /// Whether a read goes on with this one: near its edge, a few frames left out or not.
    fn goes_on(&self, access: &Access) -> bool {
        let near = UNIT * (self.window as u64 + 1);
        self.track == access.track
            && access.from <= self.edge + near
            && access.to + 2 * near >= self.edge
    }
}

/// The readers that were seen lately.
#[derive(Debug)]
pub(super) struct Ahead {
    streams: Vec<Stream>,
    /// Frames that fit in memory.
    capacity: usize,
}

impl Ahead {
    pub(super) fn new(capacity: usize) -> Self {
        Self {
            streams: Vec::new(),
            capacity,
        }
    }

    /// Frames that one reader may be ahead by; it has as many again behind them.
    fn most(&self) -> usize {
        let active = |stream: &&Stream| stream.touched.elapsed() < ACTIVE;
        let active = self.streams.iter().filter(active).count().max(1);
        (self.capacity / (2 * active)).clamp(1, frames_of(AHEAD_MAX))
    }

    /// Notes a read, and says what to fetch now. What becomes of that is to be told by [`Self::reached`].
    /// `missed`: its own frame was neither here nor on its way.
    pub(super) fn note(&mut self, access: &Access, missed: bool) -> Option<Want> {
        let most = self.most();
        let found = self.streams.iter_mut().find(|it| it.goes_on(access));
        let Some(stream) = found else {
            self.begin(access);
            return None;
        };
        stream.touched = Instant::now();
        if missed {
            stream.edge = stream.edge.max(access.to);
        }
        let has = stream.edge.saturating_sub(access.to);
        if 2 * has >= UNIT * stream.window as u64 {
            return None;
        }
        let frames = stream.window.min(most);
        stream.window = (2 * frames).min(most);
        Some(Want {
            track: stream.track,
            from: stream.edge.max(access.to),
            frames,
        })
    }

    fn begin(&mut self, access: &Access) {
        // A file has one reader: it went elsewhere.
        if let Track::File(_) = access.track {
            self.streams.retain(|stream| stream.track != access.track);
        }
        if self.streams.len() >= STREAMS {
            let oldest = self.streams.iter().enumerate();
            let oldest = oldest.min_by_key(|(_, stream)| stream.touched);
            if let Some((place, _)) = oldest {
                self.streams.swap_remove(place);
            }
        }
        self.streams.push(Stream {
            track: access.track,
            edge: access.to,
            window: 1,
            touched: Instant::now(),
        });
    }

    /// How far along the track a [`Want`] was followed.
    pub(super) fn reached(&mut self, want: &Want, edge: u64) {
        let stream = |stream: &&mut Stream| {
            stream.track == want.track && stream.edge <= want.from && stream.edge + UNIT > want.from
        };
        if let Some(stream) = self.streams.iter_mut().find(stream) {
            stream.edge = edge;
        }
    }

    /// A frame was fetched ahead and let go unread: whoever reads along its pack is not as straight as it looked.
    pub(super) fn wasted(&mut self, frame: FrameId) {
        for stream in &mut self.streams {
            if stream.track == Track::Pack(frame.pack) {
                stream.window = 1;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn access(frame: u32, track: Track) -> Access {
        let from = u64::from(frame) * UNIT;
        Access {
            frame: FrameId { pack: 0, frame },
            track,
            to_end: false,
            from,
            to: from + UNIT,
        }
    }

    /// Reads frames, and says what was to be fetched ahead of each.
    fn wants(ahead: &mut Ahead, track: Track, frames: &[u32]) -> Vec<(u64, usize)> {
        let mut wants = Vec::new();
        for frame in frames {
            // Twice each: readers take less than a frame at a time.
            for _ in 0..2 {
                if let Some(want) = ahead.note(&access(*frame, track), false) {
                    ahead.reached(&want, want.from + UNIT * want.frames as u64);
                    wants.push((want.from / UNIT, want.frames));
                }
            }
        }
        wants
    }

    #[test]
    fn the_window_grows_for_who_reads_on() {
        let track = Track::Pack(0);
        let mut ahead = Ahead::new(1000);
        let frames: Vec<u32> = (0..21).collect();
        let expected = [(1, 1), (2, 2), (4, 4), (8, 8), (16, 8), (24, 8)];
        assert_eq!(wants(&mut ahead, track, &frames), expected);
        // There and back again: it begins anew, and carefully.
        assert_eq!(wants(&mut ahead, track, &[0, 1]), [(1, 1), (2, 2)]);
        // With little memory for many, one frame each.
        let mut ahead = Ahead::new(4);
        assert_eq!(
            wants(&mut ahead, track, &[0, 1, 2, 3]),
            [(1, 1), (2, 2), (4, 2)]
        );
    }

    #[test]
    fn who_jumps_about_gets_little_ahead() {
        let mut ahead = Ahead::new(1000);
        let frames = [500, 20, 90, 300, 7, 700];
        for (want, frame) in wants(&mut ahead, Track::Pack(0), &frames)
            .into_iter()
            .zip(frames)
        {
            assert_eq!(want, (u64::from(frame) + 1, 1));
        }
    }
}
