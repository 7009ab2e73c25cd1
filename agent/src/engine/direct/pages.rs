//! Checksums of data pages, verified while they are copied.
//!
//! The server may write a page while we read it, so one bad reading proves nothing. A page that stays bad
//! either was changed since the backup began, then the WAL has its full image and repairs it, or
//! is damaged on the source, then the copy has it as it is and says so.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt as _;
use std::time::Duration;

use agent_wal::page::{self, Page};
use agent_wal::{BLOCK_SIZE, Lsn};
use tokio_util::sync::CancellationToken;

use crate::engine::pace::pause;

/// How often a bad page is read again, and how long we wait before.
const TRIES: u32 = 5;
const PAUSE: Duration = Duration::from_millis(10);

/// Pages of one segment of a relation.
#[derive(Debug, Clone, Copy)]
pub struct PageCheck {
    /// Blocks in each segment before this one: a page's checksum depends on its number in the relation.
    pub first_block: u32,
}

/// A page whose checksum stayed wrong.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BadPage {
    /// Path in the index.
    pub path: String,
    /// Block number in the relation.
    pub block: u32,
    /// What the page says was its last change.
    pub lsn: Lsn,
}

impl BadPage {
    /// Whether WAL from `start` on repairs it: it was being written while we read it. `insert` is where the
    /// WAL ended after that.
    #[must_use]
    pub fn is_torn(&self, start: Lsn, insert: Lsn) -> bool {
        (start..=insert).contains(&self.lsn)
    }
}

impl PageCheck {
    /// Verifies the pages in `bytes`, which `file` has at `offset` (a multiple of the block size). What a page
    /// looked like when it was last read replaces it in `bytes`. An incomplete page at the end is left alone:
    /// the file is being extended.
    ///
    /// # Errors
    /// If a page cannot be read again.
    pub fn verify(
        self,
        path: &str,
        file: &File,
        offset: u64,
        bytes: &mut [u8],
        cancel: &CancellationToken,
    ) -> io::Result<Vec<BadPage>> {
        let mut bad = Vec::new();
        let mut at = offset;
        let (pages, _incomplete) = bytes.as_chunks_mut::<BLOCK_SIZE>();
        for page in pages {
            let block = self.block(at);
            if !is_good(page, block) && !read_again(file, at, page, block, cancel)? {
                bad.push(BadPage {
                    path: path.to_owned(),
                    block,
                    lsn: page::lsn(page),
                });
            }
            at += BLOCK_SIZE as u64;
        }
        Ok(bad)
    }

    fn block(self, offset: u64) -> u32 {
        let within = u32::try_from(offset / BLOCK_SIZE as u64).unwrap_or(u32::MAX);
        self.first_block.wrapping_add(within)
    }
}

fn is_good(page: &Page, block: u32) -> bool {
    !matches!(page::check(page, block), page::PageCheck::Bad { .. })
}

fn read_again(
    file: &File,
    offset: u64,
    page: &mut Page,
    block: u32,
    cancel: &CancellationToken,
) -> io::Result<bool> {
    let mut again = [0; BLOCK_SIZE];
    for _ in 0..TRIES {
        if cancel.is_cancelled() {
            break;
        }
        pause(PAUSE);
        match file.read_exact_at(&mut again, offset) {
            Ok(()) => *page = again,
            // The relation was truncated meanwhile; so will replay.
            Err(e) if e.kind() == io::ErrorKind::UnexpectedEof => return Ok(true),
            Err(e) => return Err(e),
        }
        if is_good(page, block) {
            return Ok(true);
        }
    }
    Ok(false)
}

#[cfg(test)]
mod tests {
    use std::io::Write as _;

    use super::*;

    const BLOCK: u64 = BLOCK_SIZE as u64;

    fn page(block: u32, lsn: u64) -> Page {
        let mut page: Page = [7; BLOCK_SIZE];
        let (high, low) = ((lsn >> 32) as u32, (lsn & 0xFFFF_FFFF) as u32);
        page[..4].copy_from_slice(&high.to_le_bytes());
        page[4..8].copy_from_slice(&low.to_le_bytes());
        let sum = page::checksum(&page, block);
        page[8..10].copy_from_slice(&sum.to_le_bytes());
        page
    }

    fn verify(stored: &[u8], read: &mut [u8], offset: u64) -> Vec<BadPage> {
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(stored).unwrap();
        let check = PageCheck {
            first_block: 131_072,
        };
        let cancel = CancellationToken::new();
        check
            .verify("base/5/1.1", &file, offset, read, &cancel)
            .unwrap()
    }

    #[test]
    fn good_new_and_incomplete_pages_pass() {
        let mut all = page(131_072, 1).to_vec();
        all.extend_from_slice(&[0; BLOCK_SIZE]);
        all.extend_from_slice(&page(131_074, 3));
        all.extend_from_slice(&[9; 100]);
        assert!(verify(&all.clone(), &mut all, 0).is_empty());
    }

    #[test]
    fn a_page_that_was_being_written_is_read_again() {
        let stored = [page(131_072, 1), page(131_073, 2)].concat();
        let mut read = stored[BLOCK_SIZE..].to_vec();
        read[5000] = 0;
        assert!(verify(&stored, &mut read, BLOCK).is_empty());
        assert_eq!(read, stored[BLOCK_SIZE..], "the good reading is copied");
        // Cut off meanwhile.
        let mut read = stored[BLOCK_SIZE..].to_vec();
        read[5000] = 0;
        assert!(verify(&stored[..BLOCK_SIZE], &mut read, BLOCK).is_empty());
    }

    #[test]
    fn a_page_that_stays_bad_is_named() {
        let mut stored = [page(131_072, 1), page(131_073, 0x2_0000_0010)].concat();
        stored[BLOCK_SIZE + 5000] = 0;
        let bad = verify(&stored.clone(), &mut stored, 0);
        let expected = BadPage {
            path: "base/5/1.1".into(),
            block: 131_073,
            lsn: Lsn(0x2_0000_0010),
        };
        assert_eq!(bad, [expected]);
        assert!(bad[0].is_torn(Lsn(0x2_0000_0010), Lsn(0x2_0000_0010)));
        assert!(!bad[0].is_torn(Lsn(0x2_0000_0011), Lsn(0x3_0000_0000)));
        assert!(!bad[0].is_torn(Lsn(0), Lsn(0x2_0000_000F)));
    }
}
