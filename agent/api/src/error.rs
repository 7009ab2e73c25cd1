//! Errors by what the operator can do about them; both programs and the exit codes use these kinds.

use std::fmt;

use serde::{Deserialize, Serialize};

/// What kind of thing went wrong. The exit codes of both programs follow from it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum ErrorKind {
    /// A bug or something nobody foresaw.
    Internal,
    /// The command line or the configuration is wrong.
    Usage,
    /// The bucket cannot be reached or does not exist.
    StoreUnavailable,
    /// The store refuses our credentials or an action.
    StoreDenied,
    /// An agent cannot be reached.
    AgentUnreachable,
    /// A certificate is missing, expired, unknown or of the wrong kind.
    Certificate,
    /// The database is not there, refuses the log-in or lacks a privilege or setting.
    Database,
    /// No backup, point, node or operation of that name.
    NotFound,
    /// Stored bytes are missing or are not what was written.
    Damaged,
    /// The target is not empty, not allowed, or has no room.
    Target,
    /// Another major version of PostgreSQL or a newer format.
    Incompatible,
    /// Something else is under way or was there first.
    Conflict,
    /// Somebody asked for it to stop.
    Cancelled,
    /// It took longer than it may.
    Timeout,
    /// A recovery ended anywhere else than at its point.
    Recovery,
}

impl ErrorKind {
    /// Exit code of a program that ends with this kind (0 is success).
    #[must_use]
    pub fn exit_code(self) -> u8 {
        match self {
            Self::Internal => 1,
            Self::Usage => 2,
            Self::StoreUnavailable => 3,
            Self::StoreDenied => 4,
            Self::AgentUnreachable => 5,
            Self::Certificate => 6,
            Self::Database => 7,
            Self::NotFound => 8,
            Self::Damaged => 9,
            Self::Target => 10,
            Self::Incompatible => 11,
            Self::Conflict => 12,
            Self::Timeout => 13,
            Self::Recovery => 14,
            Self::Cancelled => 130,
        }
    }
}

/// What failed, in words a person can act on.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ApiError {
    /// The kind.
    pub kind: ErrorKind,
    /// What failed and why, one or two sentences, the server's own words included. Never a secret.
    pub message: String,
    /// Whether anything was changed on the node, the database or in the bucket and is still there.
    pub changed: bool,
    /// The next command to run, or the setting to mend.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub next: Option<String>,
    /// Whether it may pass by itself, so that the same again may go well: the database was restarted.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub passing: bool,
}

impl ApiError {
    /// An error that changed nothing.
    #[must_use]
    pub fn new(kind: ErrorKind, message: impl Into<String>) -> Self {
        Self {
            kind,
            message: message.into(),
            changed: false,
            next: None,
            passing: false,
        }
    }

    /// Adds what to do next.
    #[must_use]
    pub fn next(mut self, next: impl Into<String>) -> Self {
        self.next = Some(next.into());
        self
    }

    /// Says that it may pass by itself.
    #[must_use]
    pub fn passing(mut self) -> Self {
        self.passing = true;
        self
    }

    /// Says that something was changed and is still there.
    #[must_use]
    pub fn changed(mut self) -> Self {
        self.changed = true;
        self
    }
}

impl fmt::Display for ApiError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)
    }
}

impl std::error::Error for ApiError {}
