//! Positions in the log, and the names and sizes of the files that hold it.

use std::fmt;
use std::str::FromStr;

use thiserror::Error;

/// A position in the write-ahead log: bytes since its beginning. Written as PostgreSQL writes it, `X/X`.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Lsn(pub u64);

impl Lsn {
    /// `InvalidXLogRecPtr`: no position.
    pub const INVALID: Self = Self(0);

    /// Whether it is a position at all.
    #[must_use]
    pub fn is_valid(self) -> bool {
        self != Self::INVALID
    }

    /// Bytes from `earlier` to here; 0 if `earlier` is not earlier.
    #[must_use]
    pub fn bytes_since(self, earlier: Self) -> u64 {
        self.0.saturating_sub(earlier.0)
    }
}

impl fmt::Display for Lsn {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:X}/{:X}", self.0 >> 32, self.0 & 0xFFFF_FFFF)
    }
}

/// A text that should be a position, a segment's name or a size, and is not.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
#[error("'{text}' is not {expected}")]
pub struct ParseError {
    text: String,
    expected: &'static str,
}

impl ParseError {
    fn new(text: &str, expected: &'static str) -> Self {
        Self {
            text: text.chars().take(64).collect(),
            expected,
        }
    }
}

/// Parses 1 to 8 hexadecimal digits; `from_str_radix` alone would also take a sign.
fn hex_u32(text: &str) -> Option<u32> {
    if text.is_empty() || text.len() > 8 || !text.bytes().all(|b| b.is_ascii_hexdigit()) {
        return None;
    }
    u32::from_str_radix(text, 16).ok()
}

impl FromStr for Lsn {
    type Err = ParseError;

    fn from_str(text: &str) -> Result<Self, ParseError> {
        text.split_once('/')
            .and_then(|(high, low)| Some((hex_u32(high)?, hex_u32(low)?)))
            .map(|(high, low)| Self(u64::from(high) << 32 | u64::from(low)))
            .ok_or_else(|| ParseError::new(text, "a WAL position (X/X)"))
    }
}

/// Size of a WAL segment in bytes: a power of two from 1 MiB to 1 GiB (`IsValidWalSegSize`).
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SegmentSize(u32);

impl SegmentSize {
    /// What PostgreSQL uses unless told otherwise.
    pub const DEFAULT: Self = Self(16 << 20);

    /// Checks a size in bytes.
    #[must_use]
    pub fn new(bytes: u64) -> Option<Self> {
        let bytes = u32::try_from(bytes).ok()?;
        (bytes.is_power_of_two() && ((1 << 20)..=(1 << 30)).contains(&bytes)).then_some(Self(bytes))
    }

    /// Size in bytes.
    #[must_use]
    pub fn bytes(self) -> u64 {
        u64::from(self.0)
    }

    /// The same, of a buffer that holds a whole segment.
    #[must_use]
    pub fn in_memory(self) -> usize {
        usize::try_from(self.0).unwrap_or(usize::MAX)
    }

    /// Segments in 4 GiB of WAL: the last eight digits of a name count up to it.
    fn per_id(self) -> u64 {
        (1 << 32) / self.bytes()
    }

    /// Number of the segment that holds the byte at `lsn`.
    #[must_use]
    pub fn number_of(self, lsn: Lsn) -> u64 {
        lsn.0 / self.bytes()
    }

    /// First byte of segment `number`.
    #[must_use]
    pub fn start_of(self, number: u64) -> Lsn {
        Lsn(number.saturating_mul(self.bytes()))
    }
}

/// Name of a WAL segment file.
///
/// The number counts segments from the beginning of the log, so it means something only together with
/// the cluster's [`SegmentSize`]; the name itself does too (`XLogFileName`, `xlog_internal.h`).
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SegmentName {
    /// Timeline.
    pub timeline: u32,
    /// Segments before it.
    pub number: u64,
}

impl SegmentName {
    /// The segment that holds the byte at `lsn`.
    #[must_use]
    pub fn of_lsn(timeline: u32, lsn: Lsn, size: SegmentSize) -> Self {
        Self {
            timeline,
            number: size.number_of(lsn),
        }
    }

    /// The segment that holds the last byte before `lsn`: the one a record that ends there ends in
    /// (`XLByteToPrevSeg`).
    #[must_use]
    pub fn before_lsn(timeline: u32, lsn: Lsn, size: SegmentSize) -> Self {
        Self::of_lsn(timeline, Lsn(lsn.0.saturating_sub(1)), size)
    }

    /// Parses a file name of 24 digits.
    ///
    /// # Errors
    /// [`ParseError`] if it is anything else (`.partial`, `.history` and backup labels are), or no
    /// name that a cluster of this segment size would give.
    pub fn parse(name: &str, size: SegmentSize) -> Result<Self, ParseError> {
        let bad = || ParseError::new(name, "the name of a WAL segment");
        // PostgreSQL knows upper case only (IsXLogFileName).
        if name.len() != 24
            || !name
                .bytes()
                .all(|b| b.is_ascii_digit() || (b'A'..=b'F').contains(&b))
        {
            return Err(bad());
        }
        let part = |at: usize| name.get(at..at + 8).and_then(hex_u32).ok_or_else(bad);
        let (timeline, id, segment) = (part(0)?, part(8)?, part(16)?);
        if timeline == 0 || u64::from(segment) >= size.per_id() {
            return Err(bad());
        }
        Ok(Self {
            timeline,
            number: u64::from(id) * size.per_id() + u64::from(segment),
        })
    }

    /// The file name.
    #[must_use]
    pub fn format(self, size: SegmentSize) -> String {
        format!(
            "{:08X}{:08X}{:08X}",
            self.timeline,
            self.number / size.per_id(),
            self.number % size.per_id()
        )
    }

    /// First byte it holds.
    #[must_use]
    pub fn start_lsn(self, size: SegmentSize) -> Lsn {
        size.start_of(self.number)
    }

    /// First byte after it.
    #[must_use]
    pub fn end_lsn(self, size: SegmentSize) -> Lsn {
        size.start_of(self.number.saturating_add(1))
    }

    /// The next one on the same timeline.
    #[must_use]
    pub fn next(self) -> Self {
        Self {
            timeline: self.timeline,
            number: self.number.saturating_add(1),
        }
    }

    /// Name of the history file of a timeline (`TLHistoryFileName`).
    #[must_use]
    pub fn history_file(timeline: u32) -> String {
        format!("{timeline:08X}.history")
    }

    /// Timeline of a history file's name.
    #[must_use]
    pub fn parse_history_file(name: &str) -> Option<u32> {
        let digits = name.strip_suffix(".history")?;
        let timeline = (digits.len() == 8).then(|| hex_u32(digits))??;
        (timeline != 0 && Self::history_file(timeline) == name).then_some(timeline)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lsn_is_written_as_postgresql_writes_it() {
        assert_eq!(Lsn(0x16_B374_D848).to_string(), "16/B374D848");
        assert_eq!("16/B374D848".parse(), Ok(Lsn(0x16_B374_D848)));
        assert_eq!("0/0".parse(), Ok(Lsn::INVALID));
        assert_eq!("FFFFFFFF/ffffffff".parse(), Ok(Lsn(u64::MAX)));
        for bad in [
            "",
            "/",
            "1",
            "1/",
            "/1",
            "+1/1",
            "1/123456789",
            "1/1/1",
            " 1/1",
            "g/1",
        ] {
            assert!(bad.parse::<Lsn>().is_err(), "{bad:?}");
        }
    }

    #[test]
    fn names_follow_the_segment_size() {
        let mib = |n: u64| SegmentSize::new(n << 20).unwrap();
        // As pg_walfile_name() answers with --wal-segsize=16, 1 and 1024.
        for (size, lsn, name) in [
            (mib(16), "0/2021D08", "000000010000000000000002"),
            (mib(16), "1/FF000000", "0000000100000001000000FF"),
            (mib(1), "0/2021D08", "000000010000000000000020"),
            (mib(1), "2/FFF00000", "000000010000000200000FFF"),
            (mib(1024), "7/C0000000", "000000010000000700000003"),
        ] {
            let segment = SegmentName::of_lsn(1, lsn.parse().unwrap(), size);
            assert_eq!(segment.format(size), name);
            assert_eq!(SegmentName::parse(name, size), Ok(segment));
            assert!(segment.start_lsn(size) <= lsn.parse().unwrap());
            assert_eq!(segment.end_lsn(size), segment.next().start_lsn(size));
        }
        assert_eq!(
            SegmentName::before_lsn(3, Lsn(32 << 20), SegmentSize::DEFAULT).number,
            1
        );
    }

    #[test]
    fn other_files_are_no_segments() {
        for bad in [
            "",
            "00000001000000000000000",
            "0000000100000000000000020",
            "000000010000000000000100",
            "00000001000000000000000g",
            "00000001000000000000000a",
            "000000000000000000000001",
            "000000010000000000000002.partial",
            "00000002.history",
            "00000001000000000000é00",
        ] {
            assert!(
                SegmentName::parse(bad, SegmentSize::DEFAULT).is_err(),
                "{bad:?}"
            );
        }
        assert_eq!(
            SegmentName::parse_history_file("0000000A.history"),
            Some(10)
        );
        assert_eq!(SegmentName::parse_history_file("0000000a.history"), None);
        assert_eq!(SegmentName::parse_history_file("00000000.history"), None);
        assert_eq!(SegmentName::parse_history_file("1.history"), None);
    }

    #[test]
    fn segment_sizes_are_powers_of_two() {
        for good in [1u64 << 20, 16 << 20, 1 << 30] {
            assert_eq!(SegmentSize::new(good).map(SegmentSize::bytes), Some(good));
        }
        for bad in [0u64, 1, 1 << 19, 3 << 20, 1 << 31, 1 << 32, u64::MAX] {
            assert_eq!(SegmentSize::new(bad), None);
        }
    }
}
