//! `gs_pitr prune`: remove old backups by a retention, and what dead ones left.

use std::time::Duration;

use catalog::retention::plan::{self, GRACE, Rules};
use clap::Args;

use crate::failure::Result;
use crate::printer::Printer;
use crate::removal::Removal;
use crate::settings::{Options, RetentionArgs, Settings};

/// `gs_pitr prune`
#[derive(Debug, Args)]
pub(crate) struct PruneArgs {
    #[command(flatten)]
    retention: RetentionArgs,
    /// How long what an operation left is kept, if it did not say how it ended [default: 24h]
    #[arg(long, value_name = "SPAN", value_parser = span)]
    grace: Option<Duration>,
    /// Show what would be deleted, and delete nothing
    #[arg(long)]
    dry_run: bool,
}

impl PruneArgs {
    /// What the command's own flags say.
    pub(crate) fn options(&self) -> Options {
        Options::from(&self.retention)
    }
}

/// Reads a span of time.
///
/// # Errors
/// If it is none.
pub(crate) fn span(text: &str) -> Result<Duration, String> {
    let span: Result<jiff::SignedDuration, _> = text.parse();
    let span = span.ok().and_then(|span| Duration::try_from(span).ok());
    span.ok_or_else(|| "write it like `24h`, `90m` or `30s`".to_owned())
}

/// Runs the command.
pub(crate) async fn run(args: &PruneArgs, settings: &Settings, printer: &Printer) -> Result<()> {
    let rules = Rules {
        keep_full: settings.keep_full(),
        keep_days: settings.keep_days(),
        grace: args.grace.unwrap_or(GRACE),
    };
    let removal = Removal {
        command: "prune",
        question: "Delete all of this for good?",
        dry_run: args.dry_run,
        settings,
        printer,
        plan: &|holdings| Ok(plan::prune(holdings, &rules)),
    };
    removal.run().await
}
