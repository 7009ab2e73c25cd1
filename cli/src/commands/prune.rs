//! `gs_pitr prune`: remove old backups by a retention, and what dead ones left.

use clap::Args;

use crate::failure::{Failure, Result};
use crate::printer::Printer;
use crate::settings::{Options, Settings};

/// `gs_pitr prune`
#[derive(Debug, Args)]
pub(crate) struct PruneArgs {}

impl PruneArgs {
    /// What the command's own flags say.
    pub(crate) fn options(&self) -> Options {
        Options::default()
    }
}

/// Runs the command.
pub(crate) async fn run(args: &PruneArgs, settings: &Settings, printer: &Printer) -> Result<()> {
    let _ = (args, settings, printer);
    Err(Failure::usage("not built yet"))
}
