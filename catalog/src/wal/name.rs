//! Names of WAL files, as PostgreSQL spells them.

use std::fmt;
use std::str::FromStr;

use crate::ids::InvalidId;

/// A WAL file that the repository keeps: a segment (`000000010000000A000000FF`) or a timeline history
/// (`00000002.history`).
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct WalName(String);

impl WalName {
    /// The name as PostgreSQL spells it.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// Whether it is a timeline history.
    #[must_use]
    pub fn is_history(&self) -> bool {
        self.0.ends_with(".history")
    }

    /// The timeline it belongs to.
    #[must_use]
    pub fn timeline(&self) -> u32 {
        u32::from_str_radix(&self.0[..8], 16).unwrap_or_default()
    }

    /// The segment of `number`, counted from the beginning of the log, on a timeline; `size` is the cluster's
    /// segment size in bytes, a power of two from 1 MiB to 1 GiB.
    #[must_use]
    pub fn segment(timeline: u32, number: u64, size: u64) -> Option<Self> {
        let per_id = (1_u64 << 32).checked_div(size)?;
        let (id, rest) = (number.checked_div(per_id)?, number % per_id);
        format!("{timeline:08X}{id:08X}{rest:08X}").parse().ok()
    }

    /// The timeline history of `timeline`.
    #[must_use]
    pub fn history(timeline: u32) -> Self {
        Self(format!("{timeline:08X}.history"))
    }

    /// Segments before it, in a cluster with this segment size; `None` for a history, or a name that no such
    /// cluster gives.
    #[must_use]
    pub fn number(&self, size: u64) -> Option<u64> {
        if self.is_history() {
            return None;
        }
        let part = |range: std::ops::Range<usize>| u64::from_str_radix(self.0.get(range)?, 16).ok();
        let per_id = (1_u64 << 32).checked_div(size)?;
        let (id, rest) = (part(8..16)?, part(16..24)?);
        (rest < per_id).then_some(id * per_id + rest)
    }

    /// The next `count` names of segments if these are of 16 MiB: a guess, good enough to announce
    /// uploads that may follow. Empty for a history.
    #[must_use]
    pub(crate) fn following(&self, count: u64) -> Vec<Self> {
        let number = |text: &str| u64::from_str_radix(text, 16).unwrap_or_default();
        if self.is_history() {
            return Vec::new();
        }
        let here = number(&self.0[8..16]) * 0x100 + number(&self.0[16..]);
        (here + 1..=here + count)
            .filter(|next| next >> 40 == 0)
            .map(|next| {
                Self(format!(
                    "{}{:08X}{:08X}",
                    &self.0[..8],
                    next >> 8,
                    next & 0xff
                ))
            })
            .collect()
    }
}

impl fmt::Display for WalName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl FromStr for WalName {
    type Err = InvalidId;

    fn from_str(text: &str) -> Result<Self, InvalidId> {
        let digits = text.strip_suffix(".history");
        let (digits, length) = digits.map_or((text, 24), |digits| (digits, 8));
        let hex = digits
            .bytes()
            .all(|byte| matches!(byte, b'0'..=b'9' | b'A'..=b'F'));
        if digits.len() == length && hex {
            Ok(Self(text.to_owned()))
        } else {
            Err(InvalidId::new("WAL file", text, "000000010000000A000000FF"))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_segments_and_histories_are_names() {
        for good in ["000000010000000A000000FF", "0000000A.history"] {
            assert_eq!(good.parse::<WalName>().unwrap().as_str(), good);
        }
        for bad in [
            "",
            ".history",
            "000000010000000a000000ff",
            "000000010000000A000000F",
            "000000010000000A000000FF.partial",
            "000000010000000A000000FF.00000028.backup",
            "000000010000000A000000FF.history",
            "../../repository.json",
            "00000001é",
        ] {
            assert!(bad.parse::<WalName>().is_err(), "{bad}");
        }
    }

    #[test]
    fn numbers_depend_on_the_size() {
        for size in [1 << 20, 16 << 20, 1 << 30] {
            for number in [0, 1, 3, 255, 4096, 1_000_000] {
                let name = WalName::segment(7, number, size).unwrap();
                assert_eq!((name.timeline(), name.number(size)), (7, Some(number)));
            }
        }
        let name: WalName = "00000001000000000000000F".parse().unwrap();
        assert_eq!(name.number(1 << 30), None, "4 segments of 1 GiB end an id");
        assert_eq!(WalName::history(2).number(1 << 20), None);
        assert_eq!(WalName::segment(1, 1, 0), None);
    }

    #[test]
    fn names_follow_each_other() {
        let name: WalName = "00000003000000A9000000FE".parse().unwrap();
        let next: Vec<_> = name.following(2).iter().map(ToString::to_string).collect();
        assert_eq!(
            next,
            ["00000003000000A9000000FF", "00000003000000AA00000000"]
        );
        assert_eq!(name.timeline(), 3);
        assert!(
            "00000003.history"
                .parse::<WalName>()
                .unwrap()
                .following(9)
                .is_empty()
        );
    }
}
