//! `gs_pitr operations`: list what ran, show one operation, or finish one that was left.

use clap::Args;

use crate::failure::{Failure, Result};
use crate::printer::Printer;
use crate::settings::{Options, Settings};

/// `gs_pitr operations`
#[derive(Debug, Args)]
pub(crate) struct OperationsArgs {}

impl OperationsArgs {
    /// What the command's own flags say.
    pub(crate) fn options(&self) -> Options {
        Options::default()
    }
}

/// Runs the command.
pub(crate) async fn run(
    args: &OperationsArgs,
    settings: &Settings,
    printer: &Printer,
) -> Result<()> {
    let _ = (args, settings, printer);
    Err(Failure::usage("not built yet"))
}
