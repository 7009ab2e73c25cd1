//! How a copy shares its host with the database.

use serde::{Deserialize, Serialize};

/// How much of the processors a copy takes.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Pace {
    /// While the database is at work, no more than makes the others on its host wait a little longer.
    #[default]
    Gentle,
    /// All that there is.
    Full,
}

impl Pace {
    /// Whether it is [`Pace::Gentle`], which is not written down.
    #[must_use]
    pub fn is_gentle(&self) -> bool {
        *self == Self::Gentle
    }
}
