//! Errors by what the caller or the operator can do about them.

use std::time::Duration;

use thiserror::Error;
use tokio_postgres::error::{DbError, Severity};

use crate::dialect::{Dialect, Flavour};

/// Why a statement, or the log-in before it, did not succeed.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum SqlError {
    /// No server answers there, or it takes no connections now.
    #[error("no connection to the server at {target}: {message}")]
    Unreachable {
        /// Host and port, or socket.
        target: String,
        /// The system's or the server's words.
        message: String,
    },
    /// The password is wrong or missing.
    #[error("the server refuses the password of user {user:?}: {message}")]
    WrongPassword {
        /// Database user.
        user: String,
        /// The server's words.
        message: String,
    },
    /// The server refuses this user, host or database.
    #[error("the server refuses the log-in of user {user:?}: {message}")]
    Refused {
        /// Database user.
        user: String,
        /// The server's words.
        message: String,
    },
    /// The user lacks a privilege.
    #[error("{what} is not permitted: {message}; run as superuser: {grant}")]
    Privilege {
        /// What was tried.
        what: &'static str,
        /// The server's words.
        message: String,
        /// Statement that grants it.
        grant: String,
    },
    /// A setting of the server does not allow it.
    #[error("{name} is {value}, needed is {needed}")]
    Setting {
        /// Name of the setting.
        name: &'static str,
        /// Its value.
        value: String,
        /// Value that would do.
        needed: String,
    },
    /// This kind of server has nothing of the sort.
    #[error("{server} does not offer {what}: {instead}")]
    Unsupported {
        /// What was wanted.
        what: &'static str,
        /// The kind of server.
        server: Flavour,
        /// What to do instead.
        instead: &'static str,
    },
    /// A name or label that cannot be sent.
    #[error("{what} {value:?} is not usable: {reason}")]
    BadName {
        /// What it names.
        what: &'static str,
        /// The name.
        value: String,
        /// Why not.
        reason: &'static str,
    },
    /// The session is gone. Whatever lived in it (a backup) is gone with it.
    #[error("the session was lost during {what}: {message}")]
    Lost {
        /// What was under way.
        what: &'static str,
        /// What is known about it.
        message: String,
    },
    /// No answer in time. The statement may have taken effect.
    #[error("{what} got no answer within {after:?}")]
    Timeout {
        /// What was under way.
        what: &'static str,
        /// The deadline.
        after: Duration,
    },
    /// Somebody asked for it to stop. The statement may have taken effect.
    #[error("{what} was cancelled")]
    Cancelled {
        /// What was under way.
        what: &'static str,
    },
    /// The server says no for another reason.
    #[error("{what} failed: {message} (SQLSTATE {sqlstate})")]
    Server {
        /// What was tried.
        what: &'static str,
        /// SQLSTATE.
        sqlstate: String,
        /// The server's words, detail and hint included.
        message: String,
    },
    /// The server answered something this program does not understand.
    #[error("unexpected answer to {what}: {answer}")]
    Answer {
        /// What was asked.
        what: &'static str,
        /// What came back.
        answer: String,
    },
}

impl SqlError {
    /// Whether the session that it came from can still be used.
    #[must_use]
    pub fn session_is_gone(&self) -> bool {
        matches!(self, Self::Lost { .. })
    }

    /// Whether the statement may have taken effect, or may do so yet, although it failed.
    #[must_use]
    pub fn outcome_is_unknown(&self) -> bool {
        matches!(
            self,
            Self::Lost { .. } | Self::Timeout { .. } | Self::Cancelled { .. } | Self::Answer { .. }
        )
    }

    /// Of a failed log-in.
    pub(crate) fn of_login(error: &tokio_postgres::Error, user: &str, target: &str) -> Self {
        let user = user.to_owned();
        let target = target.to_owned();
        let Some(db) = error.as_db_error() else {
            let message = chain(error);
            // tokio-postgres has no public kind for "the server wants one, none was given".
            return if message.contains("password missing") {
                Self::WrongPassword { user, message }
            } else {
                Self::Unreachable { target, message }
            };
        };
        let message = words(db);
        match db.code().code() {
            "28P01" => Self::WrongPassword { user, message },
            // invalid_authorization_specification, no such database, no CONNECT privilege
            "28000" | "3D000" | "42501" => Self::Refused { user, message },
            _ => Self::Unreachable { target, message },
        }
    }

    /// Of a failed statement.
    pub(crate) fn of_statement(
        error: &tokio_postgres::Error,
        what: &'static str,
        user: &str,
        dialect: &dyn Dialect,
    ) -> Self {
        let Some(db) = error.as_db_error() else {
            return Self::Lost {
                what,
                message: chain(error),
            };
        };
        // FATAL and PANIC end the session: shutdown, crash of another backend, pg_terminate_backend,
        // idle timeouts.
        if matches!(
            db.parsed_severity(),
            Some(Severity::Fatal | Severity::Panic)
        ) {
            return Self::Lost {
                what,
                message: words(db),
            };
        }
        match db.code().code() {
            "42501" => Self::Privilege {
                what,
                message: words(db),
                grant: dialect.grant_for(db.message(), user),
            },
            code => Self::Server {
                what,
                sqlstate: code.to_owned(),
                message: words(db),
            },
        }
    }
}

/// Message, detail and hint on one line.
pub(crate) fn words(db: &DbError) -> String {
    let mut words = db.message().to_owned();
    for more in [db.detail(), db.hint()].into_iter().flatten() {
        words.push_str("; ");
        words.push_str(more);
    }
    words.replace('\n', " ")
}

/// An error and its causes on one line.
pub(crate) fn chain(error: &dyn std::error::Error) -> String {
    let mut words = error.to_string();
    let mut cause = error.source();
    while let Some(next) = cause {
        words.push_str(": ");
        words.push_str(&next.to_string());
        cause = next.source();
    }
    words
}
