//! `gs_pitr operations`: list what ran, show one operation, or finish one that was left.

mod detail;
mod discard;
mod list;
mod reach;
mod resume;

use clap::{Args, Subcommand};

pub(crate) use list::{Shown, State, leases, shown};

use super::metadata::SecretsArgs;
use super::restore::LockArgs;
use crate::cluster::ProxyArgs;
use crate::exit;
use crate::failure::Result;
use crate::printer::Printer;
use crate::settings::values::Address;
use crate::settings::{NodesArgs, Options, Settings};

/// `gs_pitr operations`
#[derive(Debug, Args)]
#[command(args_conflicts_with_subcommands = true)]
pub(crate) struct OperationsArgs {
    /// The operation's id, or the beginning of one that is unique; without it, all are listed
    id: Option<String>,
    #[command(flatten)]
    nodes: NodesArgs,
    /// List so many, the newest
    #[arg(long, value_name = "N", default_value_t = 20, conflicts_with = "id")]
    limit: usize,
    #[command(subcommand)]
    action: Option<Action>,
}

/// What to do with one.
#[derive(Debug, Subcommand)]
enum Action {
    /// Bring a restore that was left to its end: forward if that is decided, else back
    #[command(after_long_help = exit::help("
        gs_pitr operations resume 019f2b6c
        gs_pitr operations resume 019f2b6c --nodes db1:18081,db2:18080 --yes
        gs_pitr operations resume 019f2b6c --without 5b21"))]
    Resume(Box<ResumeArgs>),
    /// Remove what was at the targets before a restore
    #[command(after_long_help = exit::help("
        gs_pitr operations discard 019f2b6c"))]
    Discard(DiscardArgs),
}

/// `gs_pitr operations resume`
#[derive(Debug, Args)]
pub(crate) struct ResumeArgs {
    /// The operation's id, or the beginning of one that is unique
    id: String,
    #[command(flatten)]
    nodes: NodesArgs,
    /// NODE's agent has this address now; NODE is a node's id, or the beginning of one
    #[arg(long, value_name = "NODE=HOST:PORT", value_parser = super::restore::pair::<Address>)]
    map: Vec<(String, Address)>,
    /// NODE is lost for good: open the others without it, if the restore is decided to go forward
    #[arg(long, value_name = "NODE")]
    without: Vec<String>,
    #[command(flatten)]
    lock: LockArgs,
    #[command(flatten)]
    secrets: SecretsArgs,
    #[command(flatten)]
    proxy: ProxyArgs,
}

/// `gs_pitr operations discard`
#[derive(Debug, Args)]
pub(crate) struct DiscardArgs {
    /// The operation's id, or the beginning of one that is unique
    id: String,
    #[command(flatten)]
    nodes: NodesArgs,
    /// NODE's agent has this address now; NODE is a node's id, or the beginning of one
    #[arg(long, value_name = "NODE=HOST:PORT", value_parser = super::restore::pair::<Address>)]
    map: Vec<(String, Address)>,
}

impl OperationsArgs {
    /// What the command's own flags say.
    pub(crate) fn options(&self) -> Options {
        match &self.action {
            None => Options::from(&self.nodes),
            Some(Action::Resume(args)) => {
                Options::from(&args.nodes).combine(Options::from(&args.proxy))
            }
            Some(Action::Discard(args)) => Options::from(&args.nodes),
        }
    }

    /// The command's name as it stands in results.
    pub(crate) fn name(&self) -> &'static str {
        match &self.action {
            None => "operations",
            Some(Action::Resume(_)) => "operations resume",
            Some(Action::Discard(_)) => "operations discard",
        }
    }
}

/// Runs the command.
pub(crate) async fn run(
    args: &OperationsArgs,
    settings: &Settings,
    printer: &Printer,
) -> Result<()> {
    match (&args.action, &args.id) {
        (Some(Action::Resume(args)), _) => resume::run(args, settings, printer).await,
        (Some(Action::Discard(args)), _) => discard::run(args, settings, printer).await,
        (None, Some(id)) => detail::run(id, settings, printer).await,
        (None, None) => list::run(args.limit, settings, printer).await,
    }
}
