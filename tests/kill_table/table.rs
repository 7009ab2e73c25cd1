//! The names of all rows, and the list of them in the documentation.

use std::fmt;

/// Who is killed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Victim {
    /// `gs_pitr`, by SIGKILL.
    Cli,
    /// The first node's `pitr-agent`, by SIGKILL.
    Agent,
    /// The first node's database: SIGKILL to its postmaster, then it is started again.
    Database,
    /// The store: every connection is cut for a while.
    Store,
}

impl Victim {
    fn name(self) -> &'static str {
        match self {
            Self::Cli => "cli",
            Self::Agent => "agent",
            Self::Database => "database",
            Self::Store => "store",
        }
    }
}

/// One row.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Row<S> {
    /// Where the command is held.
    pub(crate) step: S,
    /// Who dies there.
    pub(crate) victim: Victim,
    /// Whether there is a new backup (a restored cluster, a deleted backup) after it, before any other command.
    pub(crate) stands: bool,
}

/// A step of a command.
pub(crate) trait Step: Copy {
    /// The command.
    const COMMAND: &'static str;
    /// The step's name: what has just come to be.
    fn name(self) -> &'static str;
}

impl<S: Step> Row<S> {
    /// Its name.
    pub(crate) fn name(&self) -> String {
        format!(
            "{}: {}: {}",
            S::COMMAND,
            self.step.name(),
            self.victim.name()
        )
    }
}

impl<S: Step> fmt::Display for Row<S> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.name())
    }
}

/// What a row has shown.
pub(crate) struct Shown {
    /// What was there when the victim was killed.
    pub(crate) before: String,
    /// What was there after the next commands.
    pub(crate) after: String,
}

/// Prints what the rows of a command have shown.
pub(crate) fn print(rows: &[(String, Shown, f64)]) {
    for (name, shown, seconds) in rows {
        println!(
            "| {name} | {} | {} | {seconds:.1} s",
            shown.before, shown.after
        );
    }
    println!("{} rows", rows.len());
}

/// The rows of a table that this run is to make, and how often each.
pub(crate) fn wanted<S: Step>(rows: &[Row<S>]) -> Vec<Row<S>> {
    let word = std::env::var("KILL_ROWS").unwrap_or_default();
    let times = std::env::var("KILL_TIMES").ok();
    let times = times.and_then(|times| times.parse().ok()).unwrap_or(1);
    let chosen = rows.iter().filter(|row| row.name().contains(&word));
    chosen
        .flat_map(|row| std::iter::repeat_n(*row, times))
        .collect()
}

#[test]
fn the_documentation_lists_every_row() {
    let names = |listed: Vec<String>| listed.into_iter().map(|name| format!("- {name}"));
    let rows = names(crate::backup::names()).chain(names(crate::restore::names()));
    let rows = rows.chain(names(crate::removal::names()));
    let rows: Vec<_> = rows.collect();
    let document = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/TESTING.md");
    let document = std::fs::read_to_string(document).expect("docs/TESTING.md");
    let begin = "<!-- kill table -->";
    let (_, rest) = document.split_once(begin).expect("the list's beginning");
    let (list, _) = rest.split_once("<!-- end -->").expect("the list's end");
    let listed: Vec<_> = list.lines().filter(|line| line.starts_with("- ")).collect();
    assert!(rows.len() >= 80, "only {} rows", rows.len());
    assert!(
        listed == rows,
        "docs/TESTING.md must list, between `{begin}` and `<!-- end -->`:\n{}",
        rows.join("\n")
    );
}
