//! What was found, printed as it comes, and what the command ends with.

use agent_api::{ErrorKind, Finding, Level};
use serde::Serialize;
use serde_json::{Value, json};

use crate::failure::{Failure, Result};
use crate::printer::Printer;

/// One finding and where it was made.
#[derive(Debug, Serialize)]
pub(super) struct Line {
    /// The agent's address; `None`: here.
    node: Option<String>,
    #[serde(flatten)]
    finding: Finding,
}

/// All findings so far.
#[derive(Debug)]
pub(super) struct Report {
    printer: Printer,
    lines: Vec<Line>,
    unchecked: Vec<String>,
}

impl Report {
    pub(super) fn new(printer: &Printer) -> Self {
        Self {
            printer: printer.clone(),
            lines: Vec::new(),
            unchecked: Vec::new(),
        }
    }

    /// Adds a finding made at the agent `node`, or here.
    pub(super) fn add(&mut self, node: Option<&str>, finding: Finding) {
        let place = node.unwrap_or("here");
        let level = finding.level.name();
        let (name, message) = (&finding.name, &finding.message);
        self.printer
            .text(&format!("{level:<8} {place}  {name}: {message}"));
        if let Some(mend) = finding.mend.as_deref().filter(|mend| !mend.is_empty()) {
            self.printer.text(&format!("{:9}mend: {mend}", ""));
        }
        let line = Line {
            node: node.map(str::to_owned),
            finding,
        };
        self.printer.event("checked", json!(line), None);
        self.lines.push(line);
    }

    pub(super) fn all(&mut self, node: Option<&str>, findings: impl IntoIterator<Item = Finding>) {
        for finding in findings {
            self.add(node, finding);
        }
    }

    pub(super) fn fine(&mut self, name: &str, message: impl Into<String>) {
        self.add(None, Finding::fine(name, message));
    }

    pub(super) fn failure(&mut self, node: Option<&str>, name: &str, failure: Failure) {
        self.add(node, of_failure(name, failure));
    }

    /// Notes what could not be looked at, and why.
    pub(super) fn not_checked(&mut self, what: impl Into<String>) {
        self.unchecked.push(what.into());
    }

    pub(super) fn lines(&self) -> &[Line] {
        &self.lines
    }

    pub(super) fn unchecked(&self) -> &[String] {
        &self.unchecked
    }

    fn count(&self, level: Level) -> usize {
        let of = |line: &&Line| line.finding.level == level;
        self.lines.iter().filter(of).count()
    }

    /// How many are fine, and how many are warnings.
    pub(super) fn counts(&self) -> (usize, usize) {
        (self.count(Level::Ok), self.count(Level::Warning))
    }

    /// Says the end. `left`: whether something of the check stays in the bucket.
    ///
    /// # Errors
    /// The first failure, if there is one.
    pub(super) fn conclude(&self, left: bool) -> Result<()> {
        self.printer.text("\nNot checked:");
        for what in &self.unchecked {
            self.printer.text(&format!("  - {what}"));
        }
        let unchecked: Value = json!({"not_checked": self.unchecked});
        self.printer.event("not-checked", unchecked, None);
        let (ok, warnings) = self.counts();
        let failures = self.count(Level::Failure);
        let sum = format!("\n{ok} ok, {warnings} warnings, {failures} failures");
        self.printer.text(&sum);
        let first = self.lines.iter();
        let Some(first) = first
            .into_iter()
            .find(|line| line.finding.level == Level::Failure)
        else {
            return Ok(());
        };
        let found = &first.finding;
        let all = self.lines.len();
        let message = match failures {
            1 => format!(
                "1 of {all} checks failed: {}: {}",
                found.name, found.message
            ),
            _ => format!(
                "{failures} of {all} checks failed, first: {}: {}",
                found.name, found.message
            ),
        };
        let mut failure =
            Failure::new(found.kind.unwrap_or(ErrorKind::Internal), message).changed_if(left);
        failure.node.clone_from(&first.node);
        failure.next.clone_from(&found.mend);
        Err(failure)
    }
}

/// A failure as a finding.
pub(super) fn of_failure(name: &str, failure: Failure) -> Finding {
    let failure = failure.with_some_next();
    Finding {
        name: name.to_owned(),
        level: Level::Failure,
        message: failure.message,
        kind: Some(failure.kind),
        mend: failure.next,
    }
}
