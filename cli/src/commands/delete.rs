//! `gs_pitr delete`: delete one backup.

use agent_api::ErrorKind;
use catalog::retention::plan::{self, Refused};
use clap::Args;

use crate::failure::{Failure, Result};
use crate::printer::Printer;
use crate::removal::Removal;
use crate::settings::{Options, Settings};

/// `gs_pitr delete`
#[derive(Debug, Args)]
pub(crate) struct DeleteArgs {
    /// The backup's id, or the beginning of one that is unique
    #[arg(long, value_name = "ID")]
    id: String,
    /// Delete it even if it is the last good one, so that none is left
    #[arg(long)]
    even_last_good: bool,
    /// Show what would be deleted, and delete nothing
    #[arg(long)]
    dry_run: bool,
}

impl DeleteArgs {
    /// What the command's own flags say.
    #[expect(clippy::unused_self, reason = "every command has it")]
    pub(crate) fn options(&self) -> Options {
        Options::default()
    }
}

/// Runs the command.
pub(crate) async fn run(args: &DeleteArgs, settings: &Settings, printer: &Printer) -> Result<()> {
    let removal = Removal {
        command: "delete",
        question: "Delete this backup for good?",
        dry_run: args.dry_run,
        settings,
        printer,
        plan: &|holdings| {
            let plan = plan::delete(holdings, &args.id, args.even_last_good);
            plan.map_err(|refused| failure(&args.id, &refused))
        },
    };
    removal.run().await
}

fn failure(text: &str, refused: &Refused) -> Failure {
    let (kind, next) = match refused {
        Refused::NotFound => {
            let message = format!("no backup `{text}`");
            return Failure::new(ErrorKind::NotFound, message).next("gs_pitr show");
        }
        Refused::Foreign(_) => (ErrorKind::NotFound, "gs_pitr show".to_owned()),
        Refused::Ambiguous(_) => (ErrorKind::Usage, "give more of the id".to_owned()),
        Refused::Increments(_, children) => {
            let first = children.first().map(ToString::to_string);
            let next = format!("gs_pitr delete --id {}", first.unwrap_or_default());
            (ErrorKind::Conflict, next)
        }
        Refused::Read(_, operation) => (
            ErrorKind::Conflict,
            format!("wait for it: gs_pitr operations {operation}"),
        ),
        Refused::LastGood(_) => (
            ErrorKind::Conflict,
            "make another backup first, or give `--even-last-good`".to_owned(),
        ),
        Refused::Unfinished(_) => (
            ErrorKind::Conflict,
            "gs_pitr prune removes what a dead backup left".to_owned(),
        ),
    };
    Failure::new(kind, refused.to_string()).next(next)
}
