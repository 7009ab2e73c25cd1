//! What a verification found, in words and as fields.

use std::fmt::Write as _;

use catalog::ids::BackupId;
use catalog::verify::{Finding, Report, Severity};
use serde_json::{Value, json};

use crate::printer::bytes;

const SEVERITIES: [Severity; 4] = [
    Severity::Damage,
    Severity::Repairable,
    Severity::Orphan,
    Severity::Note,
];

/// One finding, on some lines.
pub(super) fn finding(finding: &Finding) -> String {
    let mut text = format!(
        "{}: {}\n  {}",
        finding.severity.name(),
        finding.key,
        finding.what
    );
    if let Some(backup) = &finding.backup {
        let _ = write!(text, "\n  backup: {backup}");
    }
    if let Some(node) = &finding.node {
        let _ = write!(text, "\n  node: {node}");
    }
    if !finding.files.is_empty() {
        let _ = write!(
            text,
            "\n  files ({}): {}",
            finding.files_total,
            finding.files.join(", ")
        );
        if finding.files_total > finding.files.len() as u64 {
            text.push_str(", ...");
        }
    }
    if !finding.lost.is_empty() {
        let _ = write!(text, "\n  cannot be restored: {}", list(&finding.lost));
    }
    if let Some(next) = &finding.next {
        let _ = write!(text, "\n  next: {next}");
    }
    text
}

fn list<'a>(ids: impl IntoIterator<Item = &'a BackupId>) -> String {
    let ids: Vec<_> = ids.into_iter().map(BackupId::as_str).collect();
    ids.join(", ")
}

/// The whole, on one line or two.
pub(super) fn summary(report: &Report, fast: bool) -> String {
    let mut text = format!(
        "{} backups, {} objects",
        report.backups.len(),
        report.objects
    );
    if fast {
        text.push_str("; packs, indexes and WAL were only looked for (--fast)");
    } else {
        let _ = write!(text, ", {} read", bytes(report.stored_bytes));
    }
    if report.findings.is_empty() {
        text.push_str(": nothing was found");
        return text;
    }
    let counts = SEVERITIES.map(|severity| (report.count(severity), severity.name()));
    let counts = counts.iter().filter(|(count, _)| *count > 0);
    let counts: Vec<_> = counts
        .map(|(count, name)| format!("{count} {name}"))
        .collect();
    let _ = write!(text, ": {}", counts.join(", "));
    text
}

/// What the error says.
pub(super) fn damage(report: &Report) -> String {
    let count = report.count(Severity::Damage);
    let mut text = match count {
        1 => "1 finding is damage".to_owned(),
        count => format!("{count} findings are damage"),
    };
    if report.unrestorable.is_empty() {
        text.push_str("; every backup can be restored");
    } else {
        let _ = write!(text, "; cannot be restored: {}", list(&report.unrestorable));
    }
    text
}

/// The same for machines.
pub(super) fn fields(report: &Report) -> Value {
    let counts =
        SEVERITIES.map(|severity| (severity.name().to_owned(), report.count(severity).into()));
    json!({
        "backups": report.backups,
        "unrestorable": report.unrestorable,
        "objects": report.objects,
        "stored_bytes": report.stored_bytes,
        "findings": serde_json::Map::from_iter(counts),
        "repairable": report.repairs.iter().map(ToString::to_string).collect::<Vec<_>>(),
    })
}
