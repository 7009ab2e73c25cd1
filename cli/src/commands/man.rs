//! `gs_pitr man`: the manual pages.

use std::path::{Path, PathBuf};

use clap::{Args, CommandFactory as _};

use crate::args::Cli;
use crate::failure::{Failure, Result};
use crate::printer::Printer;

/// `gs_pitr man`
#[derive(Debug, Args)]
pub(crate) struct ManArgs {
    /// Write one page a command into this directory, which exists
    #[arg(long, value_name = "DIR")]
    dir: Option<PathBuf>,
}

/// Runs the command.
pub(crate) fn run(args: &ManArgs, printer: &Printer) -> Result<()> {
    let stdout = Path::new("stdout");
    if let Some(dir) = &args.dir {
        return clap_mangen::generate_to(Cli::command(), dir)
            .map_err(|error| Failure::file(dir, "write pages into", &error));
    }
    let mut page = Vec::new();
    clap_mangen::Man::new(Cli::command())
        .render(&mut page)
        .map_err(|error| Failure::file(stdout, "write", &error))?;
    printer.raw(&String::from_utf8_lossy(&page));
    Ok(())
}
