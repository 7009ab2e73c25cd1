//! `POST /v1/check` and `POST /v1/check/race`: will a backup and a restore of this node work?

use serde::{Deserialize, Serialize};
use uuid::Uuid;

use crate::error::{ApiError, ErrorKind};
use crate::repository::RepositoryAccess;

/// What came of one thing that was looked at.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Level {
    /// It is as it should be.
    Ok,
    /// It works, and the operator should know.
    Warning,
    /// A backup or a restore will not work.
    Failure,
}

impl Level {
    /// Its name, as in JSON.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Ok => "ok",
            Self::Warning => "warning",
            Self::Failure => "failure",
        }
    }
}

/// One thing that was looked at.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Finding {
    /// What it is, in a word or the setting's name.
    pub name: String,
    /// What came of it.
    pub level: Level,
    /// What was found.
    pub message: String,
    /// Kind of a failure: the exit code follows from it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub kind: Option<ErrorKind>,
    /// Statement, setting or command that mends it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mend: Option<String>,
}

impl Finding {
    /// It is as it should be.
    #[must_use]
    pub fn fine(name: impl Into<String>, message: impl Into<String>) -> Self {
        Self {
            name: name.into(),
            level: Level::Ok,
            message: message.into(),
            kind: None,
            mend: None,
        }
    }

    /// It works, and the operator should know.
    #[must_use]
    pub fn warning(
        name: impl Into<String>,
        message: impl Into<String>,
        mend: impl Into<String>,
    ) -> Self {
        Self {
            level: Level::Warning,
            mend: Some(mend.into()),
            ..Self::fine(name, message)
        }
    }

    /// It does not work.
    #[must_use]
    pub fn failure(name: impl Into<String>, error: ApiError) -> Self {
        Self {
            level: Level::Failure,
            kind: Some(error.kind),
            mend: error.next,
            ..Self::fine(name, error.message)
        }
    }
}

/// Clocks further apart than so many seconds are told of.
const SKEW_WARNING: f64 = 5.0;
/// Further than that, times in the bucket and in certificates mean nothing.
const SKEW_FAILURE: f64 = 60.0;

/// What comes of the difference of two clocks, in seconds (the other's less ours); `other` is the other in words.
#[must_use]
pub fn clock(name: &str, other: &str, seconds: f64) -> Finding {
    let apart = seconds.abs();
    let way = if seconds < 0.0 { "behind" } else { "ahead of" };
    let mend = "run chronyd or another NTP client on both hosts";
    if apart <= SKEW_WARNING {
        return Finding::fine(name, format!("{other} and ours are {apart:.1} s apart"));
    }
    let message = format!("{other} is {apart:.1} s {way} ours");
    if apart <= SKEW_FAILURE {
        return Finding::warning(name, message, mend);
    }
    // Of all kinds, the one that such clocks meet first: certificates and signatures are not valid yet, or no more.
    Finding::failure(
        name,
        ApiError::new(ErrorKind::Certificate, message).next(mend),
    )
}

/// `POST /v1/check`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CheckRequest {
    /// Names the objects that the check writes: `operations/<operation>/probe/<participant>-...`.
    pub operation: Uuid,
    /// This agent's name in them: letters, digits and hyphens.
    pub participant: String,
    /// The store to ask; `None`: only the node.
    pub repository: Option<RepositoryAccess>,
}

/// Its answer.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct CheckReport {
    /// All that was looked at.
    pub findings: Vec<Finding>,
    /// Whether the store took and gave back objects: whether it is worth a race.
    pub store_usable: bool,
}

/// `POST /v1/check/race`: several creates of one object at once, from all hosts at once.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RaceRequest {
    /// The repository.
    pub repository: RepositoryAccess,
    /// As in [`CheckRequest`].
    pub operation: Uuid,
    /// Which race: all hosts create `operations/<operation>/probe/race-<round>`.
    pub round: u32,
    /// What each create writes, 1 to 16 of them.
    pub bodies: Vec<Uuid>,
}

/// Its answer.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RaceResult {
    /// The bodies whose creates were answered with success.
    pub won: Vec<Uuid>,
    /// How many were told that the object exists.
    pub lost: u32,
    /// What else came back.
    pub errors: Vec<String>,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn clocks_apart_are_told_and_refused() {
        for (seconds, level) in [
            (0.4, Level::Ok),
            (-5.0, Level::Ok),
            (5.1, Level::Warning),
            (-60.0, Level::Warning),
            (61.0, Level::Failure),
            (-4000.0, Level::Failure),
        ] {
            assert_eq!(
                clock("clock", "the store's", seconds).level,
                level,
                "{seconds}"
            );
        }
        assert!(
            clock("clock", "the store's", -9.0)
                .message
                .contains("behind")
        );
    }
}
