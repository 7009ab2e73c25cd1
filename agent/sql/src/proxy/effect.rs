//! What a failed call may have done, from its error.

use crate::error::SqlError;

/// What became of a statement that failed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Effect {
    /// It was not sent, or the proxy has said that it does not do it: it has done nothing and will do nothing.
    None,
    /// Nobody knows: it may have been done, or may still be.
    Unknown,
}

/// What the statement that failed with `error` may have done.
///
/// An error of the proxy counts as a refusal only if it is one that is given before anything is done. Another one may come from the
/// cluster's store in the middle of it: a write to ZooKeeper whose answer was lost may have been made.
#[must_use]
pub fn effect(error: &SqlError) -> Effect {
    match error {
        SqlError::Unreachable { .. }
        | SqlError::WrongPassword { .. }
        | SqlError::Refused { .. }
        | SqlError::Privilege { .. }
        | SqlError::Setting { .. }
        | SqlError::Unsupported { .. }
        | SqlError::BadName { .. } => Effect::None,
        SqlError::Server {
            sqlstate, message, ..
        } if is_refusal(sqlstate, message) => Effect::None,
        SqlError::Server { .. }
        | SqlError::Lost { .. }
        | SqlError::Timeout { .. }
        | SqlError::Cancelled { .. }
        | SqlError::Answer { .. } => Effect::Unknown,
    }
}

fn is_refusal(sqlstate: &str, message: &str) -> bool {
    let before = [
        // Not permitted, no such user, within a transaction, not in this mode.
        "42501", "28000", "0A000", "44000",
    ];
    before.contains(&sqlstate)
        || is_syntax(sqlstate, message)
        || says_locked(message)
        || says_not_locked(message)
        || has(message, "cluster mode")
        // 5.5.2 and its missing TIMEOUT: met while the statement is read.
        || has(message, "NumberFormatException")
}

/// The proxy's grammar does not know the statement.
pub(super) fn is_syntax(sqlstate: &str, message: &str) -> bool {
    matches!(sqlstate, "42601" | "42000") || has(message, "error in your sql syntax")
}

/// The cluster is locked. By words: SQLSTATEs are the same for everything, and differ between releases.
pub(super) fn says_locked(message: &str) -> bool {
    [
        "cluster is already locked",
        "read_only",
        "readonly",
        "read-only",
        "read only",
    ]
    .iter()
    .any(|words| has(message, words))
        // The other lock, READ_WRITE, and whatever state a later release may have.
        || ["cluster state is", "cluster status is"].iter().any(|words| has(message, words))
}

/// The cluster is not locked.
pub(super) fn says_not_locked(message: &str) -> bool {
    has(message, "cluster is not locked")
}

/// Case does not count; `words` are in lower case, or a Java name.
fn has(message: &str, words: &str) -> bool {
    message
        .to_ascii_lowercase()
        .contains(&words.to_ascii_lowercase())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn server(sqlstate: &str, message: &str) -> SqlError {
        SqlError::Server {
            what: "LOCK CLUSTER",
            sqlstate: sqlstate.to_owned(),
            message: message.to_owned(),
        }
    }

    #[test]
    fn a_refusal_is_known_and_anything_else_is_not() {
        for (sqlstate, message) in [
            (
                "58000",
                "The cluster state is READ_ONLY, can not support SQL statement 'LockClusterStatement'.",
            ),
            ("58000", "Cluster is already locked."),
            ("HY000", "Cluster is not locked."),
            (
                "99999",
                "You have an error in your SQL syntax: LOCK CLUSTER ...",
            ),
            ("44000", "Mode must be 'cluster'."),
            (
                "58000",
                "Unknown exception. More details: java.lang.NumberFormatException: Cannot parse null string",
            ),
            (
                "0A000",
                "Non-query DistSQL is not supported within a transaction",
            ),
        ] {
            assert_eq!(
                effect(&server(sqlstate, message)),
                Effect::None,
                "{message}"
            );
        }
        for (sqlstate, message) in [
            ("58000", "Cluster repository persist error."),
            ("58000", "Unknown exception. More details: null"),
            ("58000", ""),
        ] {
            let error = server(sqlstate, message);
            assert_eq!(effect(&error), Effect::Unknown, "{message}");
        }
    }
}
