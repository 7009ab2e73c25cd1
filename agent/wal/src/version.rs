//! Which PostgreSQL wrote it.

use std::fmt;

/// A major version of PostgreSQL whose files we can read.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Major(u32);

/// `XLOG_PAGE_MAGIC` of the releases (`src/include/access/xlog_internal.h`). It never changes within a
/// major version once that is released.
const PAGE_MAGIC: [(u32, u16); 7] = [
    (12, 0xD101),
    (13, 0xD106),
    (14, 0xD10D),
    (15, 0xD110),
    (16, 0xD113),
    (17, 0xD116),
    (18, 0xD118),
];

impl Major {
    /// The major version of that number, if we know its formats.
    #[must_use]
    pub fn new(number: u32) -> Option<Self> {
        (12..=18).contains(&number).then_some(Self(number))
    }

    /// The major version of a `server_version_num`.
    #[must_use]
    pub fn of_version_num(version_num: u32) -> Option<Self> {
        Self::new(version_num / 10_000)
    }

    /// The major version whose WAL pages begin with this magic.
    #[must_use]
    pub fn of_page_magic(magic: u16) -> Option<Self> {
        PAGE_MAGIC
            .iter()
            .find(|(_, known)| *known == magic)
            .map(|(major, _)| Self(*major))
    }

    /// Its number.
    #[must_use]
    pub fn number(self) -> u32 {
        self.0
    }
}

impl fmt::Display for Major {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.0)
    }
}
