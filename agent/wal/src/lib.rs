//! PostgreSQL's write-ahead log, control file and pages, read byte by byte.
//!
//! Nothing here does I/O, allocates by a length that was not checked, or panics on any input. Layouts
//! are those of PostgreSQL 12 to 18 on little-endian 64-bit machines, with 8 KiB blocks in both data
//! and WAL; anything else is refused by name. Each layout names the PostgreSQL source file it follows.
//!
//! - [`Lsn`], [`SegmentName`], [`SegmentSize`]: positions in the log and the files that hold them
//! - [`control::ControlFile`]: `global/pg_control`
//! - [`segment::verify`]: is this file the segment it claims to be, whole and unbroken?
//! - [`record::RecordReader`]: the records from a position on, across pages and segments
//! - [`kind`]: what the records say that we need to know
//! - [`page`]: checksums and LSNs of data pages

mod bytes;
pub mod control;
mod lsn;
mod version;

pub use lsn::{Lsn, ParseError, SegmentName, SegmentSize};
pub use version::Major;

/// Block size of data files and of WAL in bytes, the only one that is supported.
pub const BLOCK_SIZE: usize = 8192;
