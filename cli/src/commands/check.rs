//! `gs_pitr check`: find out whether backups and restores will work, and what to mend.

use clap::Args;

use crate::failure::{Failure, Result};
use crate::printer::Printer;
use crate::settings::{Options, Settings};

/// `gs_pitr check`
#[derive(Debug, Args)]
pub(crate) struct CheckArgs {}

impl CheckArgs {
    /// What the command's own flags say.
    pub(crate) fn options(&self) -> Options {
        Options::default()
    }
}

/// Runs the command.
pub(crate) async fn run(args: &CheckArgs, settings: &Settings, printer: &Printer) -> Result<()> {
    let _ = (args, settings, printer);
    Err(Failure::usage("not built yet"))
}
