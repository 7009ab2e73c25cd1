//! Records of the log, across pages and segments.
//!
//! Layouts: `src/include/access/xlogrecord.h`; the order of reading and the checks follow
//! `XLogDecodeNextRecord`, `src/backend/access/transam/xlogreader.c`.

mod decode;

use thiserror::Error;

use crate::bytes::{u32_at, u64_at};
use crate::flavour::Flavour;
use crate::wal_page::{PageHeader, PageRules};
use crate::{BLOCK_SIZE, Lsn, SegmentSize};

pub use crate::wal_page::PageFault;

const PAGE: u64 = BLOCK_SIZE as u64;

/// A record whose CRC was right.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Record {
    /// Where it begins.
    pub start: Lsn,
    /// Where it ends, as PostgreSQL counts: rounded up to 8 bytes. This is what functions that write a
    /// record return and what recovery to the record reaches.
    pub end: Lsn,
    /// Where the record before it begins.
    pub previous: Lsn,
    /// Resource manager.
    pub rmid: u8,
    /// The resource manager's kind of record in the high four bits, general flags in the low ones.
    pub info: u8,
    /// Transaction; 0: none.
    pub xid: u64,
    /// Timeline of the page on which it ends.
    pub timeline: u32,
    /// Who wrote it.
    pub flavour: Flavour,
    /// Its main data, without images and data of blocks. Of a record of openGauss that has blocks: empty.
    pub data: Vec<u8>,
}

/// What is wrong with a record.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
pub enum RecordFault {
    /// No possible length.
    #[error("it has length {0}")]
    Length(u32),
    /// It does not follow the record before it.
    #[error("it names {0} as the record before it")]
    Previous(Lsn),
    /// The CRC is wrong: the record was never written to its end, or is damaged.
    #[error("its CRC is wrong")]
    Crc,
    /// The CRC is right, its inner lengths are not.
    #[error("its {0} cannot be")]
    Layout(&'static str),
}

/// Why there is no further record.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
pub enum EndReason {
    /// Zeros where a record would begin: nothing was written after the last one.
    #[error("nothing was written there")]
    Nothing,
    /// The bytes given end there.
    #[error("the bytes end at {0}")]
    Cut(Lsn),
    /// A page cannot be one of this log.
    #[error("the page at {at} is not one of this log: {fault}")]
    Page {
        /// Its address.
        at: Lsn,
        /// What is wrong with it.
        fault: PageFault,
    },
    /// What begins there is no record.
    #[error("no record begins there: {0}")]
    Record(RecordFault),
    /// Reading was to begin where no record can begin.
    #[error("no record can begin there")]
    Position,
}

/// The end of the log as far as it can be read.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
#[error("the log ends at {lsn}: {reason}")]
pub struct EndOfWal {
    /// Where the first record that cannot be read begins.
    pub lsn: Lsn,
    /// Why it cannot.
    pub reason: EndReason,
}

/// The next step of reading.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Step {
    /// A record.
    Record(Record),
    /// The segment of this number has to be fed first.
    NeedSegment(u64),
    /// There is no further record. The same answer from here on.
    End(EndOfWal),
}

/// A segment that was not asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
pub enum FeedError {
    /// Another one is needed.
    #[error("segment {given} was given, segment {needed} is needed")]
    Number {
        /// Number of the segment given.
        given: u64,
        /// Number of the segment needed.
        needed: u64,
    },
    /// It is longer than a segment.
    #[error("a segment of {0} bytes was given")]
    Length(usize),
}

/// How to read.
#[derive(Debug, Clone)]
pub struct ReaderOptions {
    /// Segment size of the cluster.
    pub segment_size: SegmentSize,
    /// System identifier that every segment must have; `None`: any.
    pub system_identifier: Option<u64>,
    /// Timelines that pages may have; empty: any.
    pub timelines: Vec<u32>,
    /// Who must have written it; `None`: whoever wrote the first page.
    pub flavour: Option<Flavour>,
}

impl ReaderOptions {
    /// For a log of this segment size that may be anybody's.
    #[must_use]
    pub fn new(segment_size: SegmentSize) -> Self {
        Self {
            segment_size,
            system_identifier: None,
            timelines: Vec::new(),
            flavour: None,
        }
    }
}

/// Reads records in order, from segments that are fed in order as `B` (bytes of any kind; a short one is cut
/// off at its end). Memory: one segment and one record.
#[derive(Debug)]
pub struct RecordReader<B> {
    rules: PageRules,
    segment: Option<(u64, B)>,
    /// Next byte to read. At the beginning of a page: its header comes first.
    position: Lsn,
    /// The header of the page that is being read, and its address.
    page: Option<(Lsn, PageHeader)>,
    pending: Option<Pending>,
    seek: Option<Seek>,
    /// Where the last record begins; invalid: none was read yet.
    previous: Lsn,
    ended: Option<EndOfWal>,
}

/// A record that continues on the next page.
#[derive(Debug)]
struct Pending {
    start: Lsn,
    total: u32,
    bytes: Vec<u8>,
}

impl Pending {
    fn missing(&self) -> usize {
        usize::try_from(self.total)
            .unwrap_or(usize::MAX)
            .saturating_sub(self.bytes.len())
    }
}

/// Looking for the first record.
#[derive(Debug, Clone, Copy)]
enum Seek {
    /// At the first page: how much of it belongs to a record that began before is not known yet.
    Any,
    /// On pages that belong wholly to such a record: so much of it is still missing.
    Rest(u32),
}

impl<B: AsRef<[u8]>> RecordReader<B> {
    /// A reader whose first record begins exactly at `start`.
    #[must_use]
    pub fn new(start: Lsn, options: ReaderOptions) -> Self {
        Self {
            rules: PageRules {
                segment_size: options.segment_size,
                system_identifier: options.system_identifier,
                timelines: options.timelines,
                flavour: options.flavour,
                timeline: 1..=u32::MAX,
            },
            segment: None,
            position: start,
            page: None,
            pending: None,
            seek: None,
            previous: Lsn::INVALID,
            ended: None,
        }
    }

    /// A reader whose first record is the first that begins on the page of `near` or later
    /// (`XLogFindNextRecord`). Records before `near` on that page are read too.
    #[must_use]
    pub fn near(near: Lsn, options: ReaderOptions) -> Self {
        let mut reader = Self::new(Lsn(near.0 & !(PAGE - 1)), options);
        reader.seek = Some(Seek::Any);
        reader
    }

    /// Refuses pages of later timelines.
    pub(crate) fn limit_timeline(&mut self, last: u32) {
        self.rules.timeline = *self.rules.timeline.start()..=last;
    }

    /// Where reading stands: after the last record, and after the rest of a segment that was switched off.
    /// While a record is incomplete, that is within it.
    #[must_use]
    pub fn position(&self) -> Lsn {
        self.position
    }

    /// Who wrote the log, once a page was read.
    #[must_use]
    pub fn flavour(&self) -> Option<Flavour> {
        self.rules.flavour
    }

    /// Gives the segment that [`Step::NeedSegment`] asked for. The one before is dropped.
    ///
    /// # Errors
    /// [`FeedError`] if it is another one, or too long. The reader is as before.
    pub fn feed(&mut self, number: u64, bytes: B) -> Result<(), FeedError> {
        let needed = self.rules.segment_size.number_of(self.position);
        if number != needed {
            return Err(FeedError::Number {
                given: number,
                needed,
            });
        }
        let length = bytes.as_ref().len();
        if u64::try_from(length).is_ok_and(|length| length > self.rules.segment_size.bytes()) {
            return Err(FeedError::Length(length));
        }
        self.segment = Some((number, bytes));
        Ok(())
    }

    /// The next record, or what is in its way.
    pub fn step(&mut self) -> Step {
        loop {
            if let Some(end) = self.ended {
                return Step::End(end);
            }
            let number = self.rules.segment_size.number_of(self.position);
            // Taken out, so that its bytes can be read while the reader changes.
            let segment = match self.segment.take() {
                Some(segment) if segment.0 == number => segment,
                other => {
                    self.segment = other;
                    return Step::NeedSegment(number);
                }
            };
            let advanced = self.advance(number, segment.1.as_ref());
            self.segment = Some(segment);
            match advanced {
                Ok(Some(record)) => return Step::Record(record),
                Ok(None) => {}
                Err(reason) => {
                    let lsn = self.pending.as_ref().map_or(self.position, |p| p.start);
                    self.ended = Some(EndOfWal { lsn, reason });
                }
            }
        }
    }

    /// As [`RecordReader::step`], with a callback that brings segments; `None` from it is handed on as
    /// [`Step::NeedSegment`].
    ///
    /// # Errors
    /// Whatever the callback returns.
    pub fn step_with<E>(
        &mut self,
        mut bring: impl FnMut(u64) -> Result<Option<B>, E>,
    ) -> Result<Step, E> {
        loop {
            let step = self.step();
            let Step::NeedSegment(number) = step else {
                return Ok(step);
            };
            let Some(bytes) = bring(number)? else {
                return Ok(step);
            };
            if self.feed(number, bytes).is_err() {
                // Too long: no page of it is read, so nothing is there.
                let at = self.position;
                self.ended = Some(EndOfWal {
                    lsn: at,
                    reason: EndReason::Cut(at),
                });
            }
        }
    }

    /// Reads on within one page.
    fn advance(&mut self, number: u64, segment: &[u8]) -> Result<Option<Record>, EndReason> {
        let address = Lsn(self.position.0 & !(PAGE - 1));
        let page = page_at(segment, self.rules.segment_size.start_of(number), address)
            .ok_or(EndReason::Cut(address))?;
        let header = self.header(page, address)?;
        if self.position == address {
            self.enter(address, header)?;
            return Ok(None);
        }
        let offset = usize::try_from(self.position.0 - address.0).unwrap_or(usize::MAX);
        if offset < header.size || !offset.is_multiple_of(8) {
            return Err(EndReason::Position);
        }
        let rest = page.get(offset..).ok_or(EndReason::Position)?;
        match self.pending.take() {
            Some(pending) => self.go_on(pending, rest, header),
            None => self.begin(rest, header),
        }
    }

    /// The checked header of the page.
    fn header(&mut self, page: &[u8; BLOCK_SIZE], at: Lsn) -> Result<PageHeader, EndReason> {
        if let Some((address, header)) = self.page
            && address == at
        {
            return Ok(header);
        }
        let header = self
            .rules
            .read(page, at)
            .map_err(|fault| EndReason::Page { at, fault })?;
        self.rules.flavour = Some(header.flavour);
        self.rules.timeline = header.timeline..=*self.rules.timeline.end();
        self.page = Some((at, header));
        Ok(header)
    }

    /// Goes past the header of a page, and past the rest of a record that is not wanted.
    fn enter(&mut self, at: Lsn, header: PageHeader) -> Result<(), EndReason> {
        let found = header.continued;
        let room = PAGE - header.size as u64;
        let body = Lsn(at.0 + header.size as u64);
        if header.overwritten {
            // CreateOverwriteContrecordRecord: what was pending was given up in a crash.
            self.pending = None;
            self.seek = None;
            self.position = body;
            return Ok(());
        }
        let expected = match (&self.pending, self.seek) {
            (Some(pending), _) => u32::try_from(pending.missing()).unwrap_or(u32::MAX),
            (None, Some(Seek::Any)) => found,
            (None, Some(Seek::Rest(rest))) => rest,
            (None, None) => 0,
        };
        if expected != found {
            let fault = PageFault::Continuation { expected, found };
            return Err(EndReason::Page { at, fault });
        }
        self.position = body;
        if self.seek.take().is_some() {
            let skipped = u64::from(found).next_multiple_of(8).min(room);
            self.position = Lsn(body.0 + skipped);
            if u64::from(found) > room {
                let rest = u64::from(found) - room;
                self.seek = Some(Seek::Rest(u32::try_from(rest).unwrap_or(u32::MAX)));
            }
        }
        Ok(())
    }

    /// A record begins at the position; `rest` is what is left of the page.
    fn begin(&mut self, rest: &[u8], header: PageHeader) -> Result<Option<Record>, EndReason> {
        let total = u32_at(rest, 0).unwrap_or_default();
        if total == 0 {
            return Err(EndReason::Nothing);
        }
        let length = usize::try_from(total).unwrap_or(usize::MAX);
        let layout = header.flavour.layout();
        if length < layout.record_header || total > layout.longest_record {
            return Err(EndReason::Record(RecordFault::Length(total)));
        }
        let start = self.position;
        if let Some(bytes) = rest.get(..length) {
            return self.finish(start, bytes, length, header).map(Some);
        }
        let pending = Pending {
            start,
            total,
            bytes: rest.to_vec(),
        };
        self.wait(pending, rest.len(), header.flavour)?;
        Ok(None)
    }

    /// The record goes on at the position; `rest` is what is left of the page.
    fn go_on(
        &mut self,
        mut pending: Pending,
        rest: &[u8],
        header: PageHeader,
    ) -> Result<Option<Record>, EndReason> {
        let taken = pending.missing().min(rest.len());
        pending.bytes.extend_from_slice(&rest[..taken]);
        if pending.missing() > 0 {
            self.wait(pending, taken, header.flavour)?;
            return Ok(None);
        }
        let result = self.finish(pending.start, &pending.bytes, taken, header);
        if result.is_err() {
            // The end of the log is where this record began.
            self.pending = Some(pending);
        }
        result.map(Some)
    }

    /// Keeps an incomplete record. Its header is looked at as soon as it is there, so that a length that is
    /// garbage does not gather segments.
    fn wait(&mut self, pending: Pending, taken: usize, flavour: Flavour) -> Result<(), EndReason> {
        let checked = self.check_previous(pending.start, &pending.bytes, flavour);
        self.position.0 += taken as u64;
        self.pending = Some(pending);
        checked
    }

    /// The link to the record before, if `record` has it yet.
    fn check_previous(&self, start: Lsn, record: &[u8], flavour: Flavour) -> Result<(), EndReason> {
        let Some(previous) = u64_at(record, flavour.layout().previous).map(Lsn) else {
            return Ok(());
        };
        let right = if self.previous.is_valid() {
            previous == self.previous
        } else {
            previous < start
        };
        right
            .then_some(())
            .ok_or(EndReason::Record(RecordFault::Previous(previous)))
    }

    /// A record is whole; its last `taken` bytes are at the position.
    fn finish(
        &mut self,
        start: Lsn,
        bytes: &[u8],
        taken: usize,
        header: PageHeader,
    ) -> Result<Record, EndReason> {
        self.check_previous(start, bytes, header.flavour)?;
        let record = decode::record(bytes, header.flavour).map_err(EndReason::Record)?;
        // Page and segment sizes are multiples of 8, so rounding up never leaves the page.
        let end = Lsn((self.position.0 + taken as u64).next_multiple_of(8));
        let record = Record {
            start,
            end,
            timeline: header.timeline,
            ..record
        };
        self.previous = start;
        self.position = end;
        if crate::kind::is_switch(&record) {
            let segment = self.rules.segment_size.bytes();
            self.position = Lsn(end.0.next_multiple_of(segment));
        }
        Ok(record)
    }
}

/// The page at `address` in a segment that begins at `start`.
fn page_at(segment: &[u8], start: Lsn, address: Lsn) -> Option<&[u8; BLOCK_SIZE]> {
    let offset = usize::try_from(address.bytes_since(start)).ok()?;
    segment.get(offset..)?.first_chunk()
}
