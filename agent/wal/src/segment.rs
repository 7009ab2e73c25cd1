//! Is this file the segment that it claims to be, whole and unbroken?

use thiserror::Error;

use crate::bytes::{all_zero, array, u32_at};
use crate::kind;
use crate::record::{EndOfWal, EndReason, ReaderOptions, Record, RecordReader, Step};
use crate::version::Major;
use crate::{Lsn, SegmentName, SegmentSize};

/// What a segment must be.
#[derive(Debug, Clone)]
pub struct Expected {
    /// System identifier of the cluster.
    pub system_identifier: u64,
    /// Its segment size.
    pub segment_size: SegmentSize,
    /// Name of the file.
    pub name: SegmentName,
    /// Timelines its pages may have: the name's own, and those that it came from. Empty: any up to the name's own.
    pub timelines: Vec<u32>,
    /// Who must have written it; `None`: any version we know.
    pub major: Option<Major>,
}

/// What a segment is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Verified {
    /// Who wrote it.
    pub major: Major,
    /// Records that begin and end in it.
    pub records: u64,
    /// Where the first record begins that begins in it.
    pub first_record: Option<Lsn>,
    /// Where the server went on in the next segment, if it did so before the end of this one; the rest is zero.
    pub switched: Option<Lsn>,
}

/// Why it is not.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
pub enum SegmentError {
    /// It has another length.
    #[error("the segment has {found} bytes, not {expected}")]
    Length {
        /// Its bytes.
        found: usize,
        /// What they should be.
        expected: u64,
    },
    /// A page or record is not what it should be.
    #[error("the segment is not whole at offset {offset}: {end}")]
    Broken {
        /// Bytes from its beginning to the page or record.
        offset: u64,
        /// What is wrong there.
        end: EndOfWal,
    },
    /// Something is written after the record that ended it.
    #[error("the segment goes on after the switch to the next one at {0}")]
    AfterSwitch(Lsn),
}

/// Checks a whole segment: the long header, every page's magic, address, timeline and continuation, and every record
/// that lies in it with its CRC and its link to the one before. Records that cross its ends are checked by
/// whoever reads the segments in a row.
///
/// # Errors
/// [`SegmentError`], with the offset of the first page or record that is wrong.
pub fn verify(segment: &[u8], expected: &Expected) -> Result<Verified, SegmentError> {
    let size = expected.segment_size;
    if u64::try_from(segment.len()) != Ok(size.bytes()) {
        return Err(SegmentError::Length {
            found: segment.len(),
            expected: size.bytes(),
        });
    }
    let start = expected.name.start_lsn(size);
    let mut reader = RecordReader::near(
        start,
        ReaderOptions {
            segment_size: size,
            system_identifier: Some(expected.system_identifier),
            timelines: expected.timelines.clone(),
            major: expected.major,
        },
    );
    reader.limit_timeline(expected.name.timeline);
    let mut seen = Seen::default();
    loop {
        match reader.step() {
            Step::Record(record) => seen.record(&record),
            Step::NeedSegment(number) if number == expected.name.number => {
                // The only segment there is; its length was checked, so that it is taken.
                if reader.feed(number, segment).is_err() {
                    break;
                }
            }
            Step::NeedSegment(_) => break,
            Step::End(end) => {
                if let Some(at) = switched_across(segment, &end, &seen, start) {
                    seen.switched = Some(at);
                    break;
                }
                return Err(broken(end, start));
            }
        }
    }
    if let Some(at) = seen.switched {
        let offset = usize::try_from(at.bytes_since(start)).unwrap_or(usize::MAX);
        if !segment.get(offset..).is_some_and(all_zero) {
            return Err(SegmentError::AfterSwitch(at));
        }
    }
    let Some(major) = reader.major() else {
        return Err(broken(
            EndOfWal {
                lsn: start,
                reason: EndReason::Cut(start),
            },
            start,
        ));
    };
    Ok(Verified {
        major,
        records: seen.records,
        first_record: seen.first,
        switched: seen.switched,
    })
}

/// What was read so far.
#[derive(Default)]
struct Seen {
    records: u64,
    first: Option<Lsn>,
    switched: Option<Lsn>,
}

impl Seen {
    fn record(&mut self, record: &Record) {
        self.records += 1;
        self.first.get_or_insert(record.start);
        if kind::is_switch(record) {
            self.switched = Some(record.end);
        }
    }
}

fn broken(end: EndOfWal, start: Lsn) -> SegmentError {
    let at = match end.reason {
        EndReason::Page { at, .. } | EndReason::Cut(at) => at,
        EndReason::Nothing | EndReason::Record(_) | EndReason::Position => end.lsn,
    };
    SegmentError::Broken {
        offset: at.bytes_since(start),
        end,
    }
}

/// A switch's record may begin in the segment before and end in this one, which is then empty but for its last 8 or
/// 16 bytes. Where it ends, if that is what this is.
fn switched_across(segment: &[u8], end: &EndOfWal, seen: &Seen, start: Lsn) -> Option<Lsn> {
    const LONG_HEADER: usize = 40;
    /// `xl_info` and `xl_rmid`, counted from the end of a record without data.
    const KIND_FROM_END: usize = 8;
    let rest = usize::try_from(u32_at(segment, 16)?).ok()?;
    let nothing = end.reason == EndReason::Nothing && seen.records == 0;
    let tail = LONG_HEADER + rest;
    if !nothing || !matches!(rest, 8 | 16) || end.lsn.bytes_since(start) != tail as u64 {
        return None;
    }
    let [info, rmid] = array(segment, tail - KIND_FROM_END)?;
    kind::is_switch_kind(rmid, info).then_some(end.lsn)
}
