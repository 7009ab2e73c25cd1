//! `gs_pitr delete`: delete one backup.

use clap::Args;

use crate::failure::{Failure, Result};
use crate::printer::Printer;
use crate::settings::{Options, Settings};

/// `gs_pitr delete`
#[derive(Debug, Args)]
pub(crate) struct DeleteArgs {}

impl DeleteArgs {
    /// What the command's own flags say.
    pub(crate) fn options(&self) -> Options {
        Options::default()
    }
}

/// Runs the command.
pub(crate) async fn run(args: &DeleteArgs, settings: &Settings, printer: &Printer) -> Result<()> {
    let _ = (args, settings, printer);
    Err(Failure::usage("not built yet"))
}
