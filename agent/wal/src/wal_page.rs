//! Headers of WAL pages: `XLogPageHeaderData` and `XLogLongPageHeaderData`, `src/include/access/xlog_internal.h`.
//!
//! openGauss has the same (`xlog_basic.h`), with one more field, `xlp_total_len`, in what is padding elsewhere.

use std::ops::RangeInclusive;

use thiserror::Error;

use crate::bytes::{all_zero, u16_at, u32_at, u64_at};
use crate::flavour::Flavour;
use crate::{BLOCK_SIZE, Lsn, SegmentSize};

/// Size of a header, `MAXALIGN`ed.
const SHORT: usize = 24;
/// Size of the header at the beginning of a segment.
const LONG: usize = 40;

/// `XLP_FIRST_IS_CONTRECORD`: the page begins with the rest of a record.
const CONTINUED: u16 = 1;
/// `XLP_LONG_HEADER`.
const HAS_LONG: u16 = 2;
/// `XLP_FIRST_IS_OVERWRITE_CONTRECORD`: the rest of the record before was lost in a crash. 4 is `XLP_BKP_REMOVABLE`.
const OVERWRITTEN: u16 = 8;

/// What is wrong with a page of WAL.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
pub enum PageFault {
    /// Another magic number than any known or than the pages before.
    #[error("it has magic {0:04X}")]
    Magic(u16),
    /// Unknown flags.
    #[error("it has flags {0:04X}")]
    Flags(u16),
    /// It was written for another place: the file was recycled, or is another one.
    #[error("it is the page of {0}")]
    Address(Lsn),
    /// It belongs to a timeline that it should not, or to one before the pages before it.
    #[error("it is of timeline {0}")]
    Timeline(u32),
    /// A segment begins without the long header, or the long header is in its middle.
    #[error("its kind of header is not the one of this place")]
    HeaderKind,
    /// It belongs to another cluster.
    #[error("it is of the cluster with system identifier {0}")]
    SystemIdentifier(u64),
    /// It was written with another segment size.
    #[error("it is of a cluster with segments of {0} bytes")]
    SegmentSize(u32),
    /// It was written with another WAL block size.
    #[error("it is of a cluster with WAL blocks of {0} bytes")]
    BlockSize(u32),
    /// It does not begin with as many bytes of the record before as are missing.
    #[error("it continues a record by {found} bytes, {expected} are missing")]
    Continuation {
        /// Bytes that are missing of the record before.
        expected: u32,
        /// Bytes that the page says it begins with.
        found: u32,
    },
}

/// What a page must be.
#[derive(Debug, Clone)]
pub(crate) struct PageRules {
    pub(crate) segment_size: SegmentSize,
    pub(crate) system_identifier: Option<u64>,
    /// Empty: any.
    pub(crate) timelines: Vec<u32>,
    /// From the first page on, that of all.
    pub(crate) flavour: Option<Flavour>,
    /// Timelines from that of the page before, as they only grow, to the last one allowed.
    pub(crate) timeline: RangeInclusive<u32>,
}

/// A header that obeys the rules.
#[derive(Debug, Clone, Copy)]
pub(crate) struct PageHeader {
    pub(crate) flavour: Flavour,
    pub(crate) timeline: u32,
    /// Bytes of the record before that the page begins with.
    pub(crate) continued: u32,
    pub(crate) overwritten: bool,
    /// Bytes of header.
    pub(crate) size: usize,
}

impl PageRules {
    /// Reads the header of the page at `address`.
    pub(crate) fn read(
        &self,
        page: &[u8; BLOCK_SIZE],
        address: Lsn,
    ) -> Result<PageHeader, PageFault> {
        let u16 = |at| u16_at(page, at).unwrap_or_default();
        let u32 = |at| u32_at(page, at).unwrap_or_default();
        let u64 = |at| u64_at(page, at).unwrap_or_default();

        let magic = u16(0);
        let flavour = Flavour::of_page_magic(magic)
            .filter(|flavour| self.flavour.is_none_or(|known| known == *flavour))
            .ok_or(PageFault::Magic(magic))?;
        let flags = u16(2);
        if flags & !flavour.layout().page_flags != 0 {
            return Err(PageFault::Flags(flags));
        }
        if u64(8) != address.0 {
            return Err(PageFault::Address(Lsn(u64(8))));
        }
        let timeline = u32(4);
        let allowed = self.timelines.is_empty() || self.timelines.contains(&timeline);
        if !allowed || !self.timeline.contains(&timeline) {
            return Err(PageFault::Timeline(timeline));
        }
        let long = flags & HAS_LONG != 0;
        if long != address.0.is_multiple_of(self.segment_size.bytes()) {
            return Err(PageFault::HeaderKind);
        }
        if long {
            if self.system_identifier.is_some_and(|known| known != u64(24)) {
                return Err(PageFault::SystemIdentifier(u64(24)));
            }
            if u64::from(u32(32)) != self.segment_size.bytes() {
                return Err(PageFault::SegmentSize(u32(32)));
            }
            if usize::try_from(u32(36)) != Ok(BLOCK_SIZE) {
                return Err(PageFault::BlockSize(u32(36)));
            }
        }
        let remaining = u32(16);
        // The flag says that there is something, the length says how much: neither without the other.
        if (flags & CONTINUED != 0) != (remaining != 0) {
            return Err(PageFault::Flags(flags));
        }
        Ok(PageHeader {
            flavour,
            timeline,
            continued: remaining,
            overwritten: flags & OVERWRITTEN != 0,
            size: if long { LONG } else { SHORT },
        })
    }
}

/// Whether a page was prepared and never written to: all zero, or behind its header.
pub(crate) fn is_empty(page: &[u8], address: Lsn, flavour: Flavour) -> bool {
    let Some((head, body)) = page.split_at_checked(SHORT) else {
        return false;
    };
    let magic = u16_at(head, 0).and_then(Flavour::of_page_magic);
    let flags = u16_at(head, 2).unwrap_or(CONTINUED);
    let prepared = magic == Some(flavour)
        && flags & !(flavour.layout().page_flags & !(CONTINUED | HAS_LONG)) == 0
        && u64_at(head, 8) == Some(address.0)
        && all_zero(&head[16..]);
    (prepared || all_zero(head)) && all_zero(body)
}
