//! The exit codes, from the one list of error kinds that both programs share.

use std::fmt::Write as _;

use agent_api::ErrorKind;

/// Every kind, in the order of the exit codes.
pub(crate) const KINDS: [ErrorKind; 15] = [
    ErrorKind::Internal,
    ErrorKind::Usage,
    ErrorKind::StoreUnavailable,
    ErrorKind::StoreDenied,
    ErrorKind::AgentUnreachable,
    ErrorKind::Certificate,
    ErrorKind::Database,
    ErrorKind::NotFound,
    ErrorKind::Damaged,
    ErrorKind::Target,
    ErrorKind::Incompatible,
    ErrorKind::Conflict,
    ErrorKind::Timeout,
    ErrorKind::Recovery,
    ErrorKind::Cancelled,
];

/// The kind's name as it stands in `"error":{"kind":...}`.
pub(crate) fn name(kind: ErrorKind) -> String {
    match serde_json::to_value(kind) {
        Ok(serde_json::Value::String(name)) => name,
        _ => format!("{kind:?}"),
    }
}

/// What a kind means to the person who reads the table.
pub(crate) fn meaning(kind: ErrorKind) -> &'static str {
    match kind {
        ErrorKind::Internal => "a bug, or something nobody foresaw",
        ErrorKind::Usage => "the command line or the configuration is wrong",
        ErrorKind::StoreUnavailable => "the bucket cannot be reached or does not exist",
        ErrorKind::StoreDenied => "the store refuses the credentials or an action",
        ErrorKind::AgentUnreachable => "an agent cannot be reached",
        ErrorKind::Certificate => "a certificate is missing, expired, unknown or of the wrong kind",
        ErrorKind::Database => {
            "the database is not there, refuses us, or lacks a privilege or setting"
        }
        ErrorKind::NotFound => "no backup, point, node or operation of that name",
        ErrorKind::Damaged => "stored bytes are missing or are not what was written",
        ErrorKind::Target => "the restore target is not empty, not allowed, or has no room",
        ErrorKind::Incompatible => "another major version of PostgreSQL, or a newer format",
        ErrorKind::Conflict => "something else is under way or was there first",
        ErrorKind::Timeout => "it took longer than it may",
        ErrorKind::Recovery => "a recovery ended anywhere else than at its point",
        ErrorKind::Cancelled => "somebody asked for it to stop",
    }
}

/// The table as the end of every `--help`, after the command's own `examples`.
pub(crate) fn help(examples: &str) -> String {
    let mut text = String::from("Examples:\n");
    for line in examples.trim().lines() {
        let line = line.trim();
        // What begins with a flag goes on from the line before.
        let indent = if line.starts_with("--") { 6 } else { 2 };
        let _ = writeln!(text, "{:indent$}{line}", "");
    }
    text.push_str("\nExit codes:\n    0  ok                 it did what was asked\n");
    for kind in KINDS {
        let (code, name) = (kind.exit_code(), name(kind));
        let _ = writeln!(text, "  {code:>3}  {name:<17}  {}", meaning(kind));
    }
    text.truncate(text.trim_end().len());
    text
}

/// The table in Markdown, for docs/CLI.md.
#[cfg(test)]
fn markdown() -> String {
    let mut text = String::from("| code | kind | meaning |\n|---|---|---|\n");
    text.push_str("| 0 | `ok` | it did what was asked |\n");
    for kind in KINDS {
        let (code, name) = (kind.exit_code(), name(kind));
        let _ = writeln!(text, "| {code} | `{name}` | {} |", meaning(kind));
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn codes_are_distinct_and_in_order() {
        let codes: Vec<u8> = KINDS.iter().map(|kind| kind.exit_code()).collect();
        assert!(codes.is_sorted_by(|a, b| a < b), "{codes:?}");
    }

    #[test]
    fn the_documentation_has_the_same_table() {
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../docs/CLI.md");
        let text = std::fs::read_to_string(path).unwrap();
        assert!(
            text.contains(&markdown()),
            "docs/CLI.md lacks:\n{}",
            markdown()
        );
    }
}
