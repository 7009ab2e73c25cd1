//! The write-ahead log, control file and pages of PostgreSQL and openGauss, read byte by byte.
//!
//! Nothing here does I/O, allocates by a length that was not checked, or panics on any input. Layouts
//! are those of PostgreSQL 12 to 18, and of openGauss from 3.0 on, on little-endian 64-bit machines, with 8 KiB blocks in
//! both data and WAL; anything else is refused by name. Each layout names the source file it follows.
//!
//! - [`Lsn`], [`SegmentName`] and [`SegmentSize`] say where in the log something is, and in which file;
//! - [`control::ControlFile`] reads `global/pg_control`;
//! - [`segment::verify`] tells whether a file is the segment it claims to be, whole and unbroken;
//! - [`record::RecordReader`] reads the records from a position on, across pages and segments;
//! - [`kind`] tells what those records say that we need to know;
//! - [`page`] has the checksums and LSNs of data pages.

mod bytes;
pub mod control;
mod flavour;
pub mod kind;
mod lsn;
pub mod page;
pub mod record;
pub mod segment;
mod version;
mod wal_page;

pub use flavour::Flavour;
pub use lsn::{Lsn, ParseError, SegmentName, SegmentSize};
pub use version::Major;

/// Block size of data files and of WAL in bytes, the only one that is supported.
pub const BLOCK_SIZE: usize = 8192;
