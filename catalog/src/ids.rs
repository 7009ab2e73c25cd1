//! Names of backups, points and epochs: sortable, and safe as a part of a key or a path.

use std::fmt;
use std::str::FromStr;

use jiff::Timestamp;
use jiff::tz::TimeZone;
use serde::{Deserialize, Serialize};

/// A string that is not an id of its kind.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("`{text}` is not a {kind} id (one looks like `{example}`)")]
pub struct InvalidId {
    kind: &'static str,
    text: String,
    example: &'static str,
}

impl InvalidId {
    pub(crate) fn new(kind: &'static str, text: &str, example: &'static str) -> Self {
        Self {
            kind,
            text: text.to_owned(),
            example,
        }
    }
}

fn stamp(at: Timestamp) -> String {
    at.to_zoned(TimeZone::UTC)
        .strftime("%Y%m%dT%H%M%SZ")
        .to_string()
}

fn is_stamp(text: &str) -> bool {
    let shape = text.len() == 16 && text.as_bytes()[8] == b'T' && text.ends_with('Z');
    shape
        && text
            .bytes()
            .enumerate()
            .all(|(i, b)| matches!(i, 8 | 15) || b.is_ascii_digit())
}

fn is_hex(text: &str, length: usize) -> bool {
    text.len() == length && text.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f'))
}

macro_rules! id {
    ($name:ident, $kind:literal, $example:literal, $doc:literal) => {
        #[doc = $doc]
        #[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
        #[serde(try_from = "String", into = "String")]
        pub struct $name(String);

        impl $name {
            /// The id's text.
            #[must_use]
            pub fn as_str(&self) -> &str {
                &self.0
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&self.0)
            }
        }

        impl From<$name> for String {
            fn from(id: $name) -> Self {
                id.0
            }
        }

        impl TryFrom<String> for $name {
            type Error = InvalidId;

            fn try_from(text: String) -> Result<Self, InvalidId> {
                if Self::is_valid(&text) {
                    Ok(Self(text))
                } else {
                    Err(InvalidId::new($kind, &text, $example))
                }
            }
        }

        impl FromStr for $name {
            type Err = InvalidId;

            fn from_str(text: &str) -> Result<Self, InvalidId> {
                Self::try_from(text.to_owned())
            }
        }
    };
}

id!(
    BackupId,
    "backup",
    "20261121T040233Z-F-9f3c1a2b",
    "A backup: UTC second, kind (`F` full, `I` increment), 32 random bits. Sorts by time."
);
id!(
    PointId,
    "point",
    "20261121T040233Z-P-9f3c1a2b",
    "A consistent point: UTC second, `P`, 32 random bits. Sorts by time."
);
id!(
    EpochId,
    "epoch",
    "00000001-9f3c1a2b",
    "An epoch of a node: its timeline at the opening (8 hex digits), 32 random bits."
);

impl BackupId {
    /// A new id for a backup begun at `at`.
    #[must_use]
    pub fn generate(at: Timestamp, full: bool) -> Self {
        let kind = if full { 'F' } else { 'I' };
        Self(format!(
            "{}-{kind}-{:08x}",
            stamp(at),
            rand::random::<u32>()
        ))
    }

    fn is_valid(text: &str) -> bool {
        text.len() == 27
            && text.is_ascii()
            && is_stamp(&text[..16])
            && matches!(&text[16..19], "-F-" | "-I-")
            && is_hex(&text[19..], 8)
    }
}

impl PointId {
    /// A new id for a point made at `at`.
    #[must_use]
    pub fn generate(at: Timestamp) -> Self {
        Self(format!("{}-P-{:08x}", stamp(at), rand::random::<u32>()))
    }

    fn is_valid(text: &str) -> bool {
        text.len() == 27
            && text.is_ascii()
            && is_stamp(&text[..16])
            && &text[16..19] == "-P-"
            && is_hex(&text[19..], 8)
    }
}

impl EpochId {
    /// A new id for an epoch that opens on `timeline`.
    #[must_use]
    pub fn generate(timeline: u32) -> Self {
        Self(format!("{timeline:08x}-{:08x}", rand::random::<u32>()))
    }

    fn is_valid(text: &str) -> bool {
        text.len() == 17
            && text.is_ascii()
            && is_hex(&text[..8], 8)
            && text.as_bytes()[8] == b'-'
            && is_hex(&text[9..], 8)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn made_ids_are_valid_and_sort_by_time(a in 0_i64..4_000_000_000, b in 0_i64..4_000_000_000) {
            let at = |second| Timestamp::from_second(second).unwrap();
            let (first, second) = (BackupId::generate(at(a), true), BackupId::generate(at(b), false));
            prop_assert_eq!(&first.as_str().parse::<BackupId>().unwrap(), &first);
            if a != b {
                prop_assert_eq!(a < b, first < second);
            }
            let point = PointId::generate(at(a));
            prop_assert_eq!(&point.as_str().parse::<PointId>().unwrap(), &point);
            prop_assert!(point.as_str().parse::<BackupId>().is_err());
        }

        #[test]
        fn epoch_ids_begin_with_their_timeline(timeline in any::<u32>()) {
            let epoch = EpochId::generate(timeline);
            prop_assert_eq!(&epoch.as_str().parse::<EpochId>().unwrap(), &epoch);
            prop_assert_eq!(&epoch.as_str()[..8], format!("{timeline:08x}"));
        }

        #[test]
        fn no_text_makes_an_id_panic_or_leave_its_key(text in "\\PC{0,30}") {
            for valid in [
                BackupId::from_str(&text).is_ok(),
                PointId::from_str(&text).is_ok(),
                EpochId::from_str(&text).is_ok(),
            ] {
                prop_assert!(!valid || !text.contains(['/', '.']));
            }
        }

        #[test]
        fn a_changed_letter_is_no_id_or_another(at in 0_usize..27, letter in "[ -~]") {
            let id = BackupId::generate(Timestamp::UNIX_EPOCH, true);
            let mut text = id.to_string();
            text.replace_range(at..=at, &letter);
            prop_assert!(text.parse::<BackupId>().map_or(true, |other| (other == id) == (text == id.as_str())));
        }
    }
}
