//! `gs_pitr completions SHELL`: a script that completes this program's command line.

use clap::{Args, CommandFactory as _};
use clap_complete::Shell;

use crate::args::Cli;
use crate::printer::Printer;

/// `gs_pitr completions`
#[derive(Debug, Args)]
pub(crate) struct CompletionsArgs {
    /// The shell
    shell: Shell,
}

/// Runs the command.
pub(crate) fn run(args: &CompletionsArgs, printer: &Printer) {
    let mut script = Vec::new();
    clap_complete::generate(args.shell, &mut Cli::command(), "gs_pitr", &mut script);
    printer.raw(&String::from_utf8_lossy(&script));
}
