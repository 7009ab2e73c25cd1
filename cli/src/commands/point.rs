//! `gs_pitr point`: moments to recover to, made without copying anything.

mod base;
mod create;
mod every;
mod found;
mod list;
mod making;

use clap::Subcommand;

use crate::exit;
use crate::failure::Result;
use crate::printer::Printer;
use crate::settings::{Options, Settings};
use create::CreateArgs;
use list::ListArgs;

/// `gs_pitr point`
#[derive(Debug, Subcommand)]
pub(crate) enum PointCommand {
    /// Make a point that a backup can be recovered to, without copying anything
    #[command(after_long_help = exit::help("
        gs_pitr point create --nodes db1:18080,db2:18080 --label 'before the migration'
        gs_pitr point create --nodes db1:18080,db2:18080 --every 5m --output json"))]
    Create(Box<CreateArgs>),
    /// List the points, each with the backup that leads to it, or why none does
    #[command(after_long_help = exit::help("
        gs_pitr point list
        gs_pitr point list --unreachable
        gs_pitr point list --from '2026-11-21 04:00' --to 2026-11-21T06:00:00Z --output json"))]
    List(ListArgs),
}

impl PointCommand {
    /// Its name as it stands in results.
    pub(crate) fn name(&self) -> &'static str {
        match self {
            Self::Create(_) => create::COMMAND,
            Self::List(_) => list::COMMAND,
        }
    }

    /// What the command's own flags say.
    pub(crate) fn options(&self) -> Options {
        match self {
            Self::Create(args) => args.options(),
            Self::List(_) => Options::default(),
        }
    }
}

/// Runs the command.
pub(crate) async fn run(
    command: &PointCommand,
    settings: &Settings,
    printer: &Printer,
) -> Result<()> {
    match command {
        PointCommand::Create(args) => create::run(args, settings, printer).await,
        PointCommand::List(args) => list::run(args, settings, printer).await,
    }
}
