//! `gs_pitr verify`: read stored bytes back and find every damage.

use clap::Args;

use crate::failure::{Failure, Result};
use crate::printer::Printer;
use crate::settings::{Options, Settings};

/// `gs_pitr verify`
#[derive(Debug, Args)]
pub(crate) struct VerifyArgs {}

impl VerifyArgs {
    /// What the command's own flags say.
    pub(crate) fn options(&self) -> Options {
        Options::default()
    }
}

/// Runs the command.
pub(crate) async fn run(args: &VerifyArgs, settings: &Settings, printer: &Printer) -> Result<()> {
    let _ = (args, settings, printer);
    Err(Failure::usage("not built yet"))
}
