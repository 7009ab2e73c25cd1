//! `POST /v1/check` and `POST /v1/check/race`: will a backup and a restore of this node work?

use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use uuid::Uuid;

use crate::error::{ApiError, ErrorKind};
use crate::types::RepositoryAccess;

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
    /// The store's clock (UTC), if it was asked and said so.
    pub store_now: Option<Timestamp>,
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
