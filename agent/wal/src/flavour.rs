//! Whose files they are, and what differs between them.

use std::fmt;

use crate::version::Major;

/// `XLOG_PAGE_MAGIC` of openGauss from 1.0 to 7.0 (`src/include/access/xlog_basic.h`): the same in all of them.
const OPENGAUSS_MAGIC: u16 = 0xD074;

/// Which server wrote a log.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Flavour {
    /// PostgreSQL of a major version.
    PostgreSql(Major),
    /// openGauss. Its log does not say which release.
    OpenGauss,
}

/// What differs in the log of the two. Pages have the same headers, records the same order of fields.
#[derive(Debug)]
pub(crate) struct Layout {
    /// `XLP_ALL_FLAGS`: flags that a page may have.
    pub(crate) page_flags: u16,
    /// Bytes of `XLogRecord`, with its CRC as the last four.
    pub(crate) record_header: usize,
    /// Longest record in bytes.
    pub(crate) longest_record: u32,
    /// Bytes of a transaction's number, at `XID` in the header.
    pub(crate) xid: Xid,
    /// Offset of `xl_prev` in a record.
    pub(crate) previous: usize,
    /// Offset of `xl_info` in a record; `xl_rmid` is behind it.
    pub(crate) info: usize,
    /// Whether pages behind a switch have headers; else they are all zero.
    pub(crate) headers_after_switch: bool,
}

/// Where a record has its transaction, and how wide it is.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Xid {
    /// 32 bits at this offset.
    Narrow(usize),
    /// 64 bits at this offset.
    Wide(usize),
}

/// `xlog_internal.h` and `xlogrecord.h`. `CopyXLogRecordToWAL` of 12 and later clears the headers after a switch.
const POSTGRESQL: Layout = Layout {
    page_flags: 0x000F,
    record_header: 24,
    longest_record: 0x3FFF_FFFF, // MaxAllocSize
    xid: Xid::Narrow(4),
    previous: 8,
    info: 16,
    headers_after_switch: false,
};

/// `xlog_basic.h`: `xl_term` lies between length and transaction, `xl_bucket_id` behind `xl_rmid`. A switch writes out
/// the pages that `AdvanceXLInsertBuffer` prepared, with their headers.
const OPENGAUSS: Layout = Layout {
    page_flags: 0x0007,
    record_header: 32,
    longest_record: 0x3FFF_E000 - 1, // below XLogRecordMaxSize
    xid: Xid::Wide(8),
    previous: 16,
    info: 24,
    headers_after_switch: true,
};

impl Flavour {
    /// Whose WAL pages begin with this magic.
    #[must_use]
    pub fn of_page_magic(magic: u16) -> Option<Self> {
        if magic == OPENGAUSS_MAGIC {
            return Some(Self::OpenGauss);
        }
        Major::of_page_magic(magic).map(Self::PostgreSql)
    }

    pub(crate) fn layout(self) -> &'static Layout {
        match self {
            Self::PostgreSql(_) => &POSTGRESQL,
            Self::OpenGauss => &OPENGAUSS,
        }
    }
}

impl fmt::Display for Flavour {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::PostgreSql(major) => write!(f, "PostgreSQL {major}"),
            Self::OpenGauss => f.write_str("openGauss"),
        }
    }
}
