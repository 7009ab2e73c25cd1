//! Is this file the segment that it claims to be, whole and unbroken?

use thiserror::Error;

use crate::bytes::{all_zero, array, u16_at, u32_at};
use crate::flavour::Flavour;
use crate::record::{EndOfWal, EndReason, ReaderOptions, Record, RecordReader, Step};
use crate::{BLOCK_SIZE, Lsn, SegmentName, SegmentSize, kind, wal_page};

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
    /// Who must have written it; `None`: any that we know.
    pub flavour: Option<Flavour>,
}

/// What a segment is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Verified {
    /// Who wrote it.
    pub flavour: Flavour,
    /// Records that begin and end in it.
    pub records: u64,
    /// Where the first record begins that begins in it.
    pub first_record: Option<Lsn>,
    /// Where the server went on in the next segment, if it did so before the end of this one; the rest has no records.
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
            flavour: expected.flavour,
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
    let Some(flavour) = reader.flavour() else {
        return Err(broken(
            EndOfWal {
                lsn: start,
                reason: EndReason::Cut(start),
            },
            start,
        ));
    };
    if let Some(at) = seen.switched
        && !nothing_after(segment, at, start, flavour)
    {
        return Err(SegmentError::AfterSwitch(at));
    }
    Ok(Verified {
        flavour,
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

/// Whether no record follows the switch that ends at `at`.
fn nothing_after(segment: &[u8], at: Lsn, start: Lsn, flavour: Flavour) -> bool {
    let offset = usize::try_from(at.bytes_since(start)).unwrap_or(usize::MAX);
    let Some(rest) = segment.get(offset..) else {
        return false;
    };
    if !flavour.layout().headers_after_switch {
        return all_zero(rest);
    }
    let (of_page, pages) = rest.split_at(rest.len() % BLOCK_SIZE);
    let mut address = Lsn(at.0.next_multiple_of(BLOCK_SIZE as u64));
    all_zero(of_page)
        && pages.chunks(BLOCK_SIZE).all(|page| {
            let empty = wal_page::is_empty(page, address, flavour);
            address.0 += BLOCK_SIZE as u64;
            empty
        })
}

/// A switch's record may begin in the segment before and end in this one, which is then empty but for its last bytes, a
/// multiple of 8. Where it ends, if that is what this is.
fn switched_across(segment: &[u8], end: &EndOfWal, seen: &Seen, start: Lsn) -> Option<Lsn> {
    const LONG_HEADER: usize = 40;
    /// `xl_info` and `xl_rmid`, counted from the end of a record without data.
    const KIND_FROM_END: usize = 8;
    let rest = usize::try_from(u32_at(segment, 16)?).ok()?;
    let nothing = end.reason == EndReason::Nothing && seen.records == 0;
    let tail = LONG_HEADER + rest;
    let of_record = Flavour::of_page_magic(u16_at(segment, 0)?)?
        .layout()
        .record_header;
    let part = rest.is_multiple_of(8) && (KIND_FROM_END..of_record).contains(&rest);
    if !nothing || !part || end.lsn.bytes_since(start) != tail as u64 {
        return None;
    }
    let [info, rmid] = array(segment, tail - KIND_FROM_END)?;
    kind::is_switch_kind(rmid, info).then_some(end.lsn)
}
