//! Data pages: is what was read a whole page?
//!
//! `src/include/storage/bufpage.h` (`PageHeaderData`) and `src/include/storage/checksum_impl.h`. Every byte of
//! the database passes through [`check`], so [`checksum()`] is written for vector units.

mod checksum;

use crate::BLOCK_SIZE;
use crate::Lsn;
use crate::bytes::{all_zero, u16_at, u32_at};

pub use checksum::checksum;

/// A data page.
pub type Page = [u8; BLOCK_SIZE];

/// Offset of `pd_checksum`.
const CHECKSUM_AT: usize = 8;

/// What a page's checksum says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PageCheck {
    /// All zero: the file was extended, nothing was written yet.
    New,
    /// The checksum is right.
    Good,
    /// The checksum is wrong: torn while it was read, in the wrong place, or damaged.
    Bad {
        /// In the page.
        stored: u16,
        /// Of the page.
        computed: u16,
    },
}

/// Checks a page of a cluster that has checksums. `block` is its number in the relation's fork, counted on across
/// the fork's files of 1 GiB.
///
/// Only a page that is zero throughout counts as new: PostgreSQL's own test (`pd_upper` = 0) would
/// accept a page whose beginning alone was lost.
#[must_use]
pub fn check(page: &Page, block: u32) -> PageCheck {
    let stored = u16_at(page, CHECKSUM_AT).unwrap_or_default();
    // A checksum is never 0, so most pages that are not new are told by these bytes alone.
    if stored == 0 && is_new(page) {
        return PageCheck::New;
    }
    let computed = checksum(page, block);
    if stored == computed {
        PageCheck::Good
    } else {
        PageCheck::Bad { stored, computed }
    }
}

/// Whether the page is zero throughout.
#[must_use]
pub fn is_new(page: &Page) -> bool {
    all_zero(page)
}

/// `pd_lsn`: end of the last WAL record that changed the page. Stored as two words, high one first.
#[must_use]
pub fn lsn(page: &Page) -> Lsn {
    let high = u32_at(page, 0).unwrap_or_default();
    let low = u32_at(page, 4).unwrap_or_default();
    Lsn(u64::from(high) << 32 | u64::from(low))
}
