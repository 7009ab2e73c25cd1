//! `gs_pitr delete`: delete one backup.

use agent_api::ErrorKind;
use catalog::retention::plan::{self, Refused};
use catalog::retention::{HeldState, Holdings};
use clap::Args;

use crate::cluster::FormerArgs;
use crate::failure::{Failure, Result};
use crate::printer::Printer;
use crate::removal::Removal;
use crate::settings::{Options, Settings};

/// `gs_pitr delete`
#[derive(Debug, Args)]
pub(crate) struct DeleteArgs {
    /// The backup's id, or the beginning of one that is unique
    #[arg(
        long,
        value_name = "ID",
        required_unless_present = "csn",
        conflicts_with = "csn"
    )]
    id: Option<String>,
    /// The only backup whose point has this commit sequence number
    #[arg(long, value_name = "CSN")]
    csn: Option<String>,
    /// Delete it even if it is the last good one, so that none is left
    #[arg(long)]
    even_last_good: bool,
    /// Show what would be deleted, and delete nothing
    #[arg(long)]
    dry_run: bool,
    #[command(flatten)]
    former: FormerArgs,
}

impl DeleteArgs {
    /// What the command's own flags say.
    #[expect(clippy::unused_self, reason = "every command has it")]
    pub(crate) fn options(&self) -> Options {
        Options::default()
    }
}

impl DeleteArgs {
    /// The backup's id, or the beginning of one. Several backups may have one CSN: none is guessed.
    fn name(&self, holdings: &Holdings) -> Result<String> {
        let csn = match (&self.id, &self.csn) {
            (Some(id), _) => return Ok(id.clone()),
            (None, Some(csn)) => csn,
            (None, None) => return Err(Failure::usage("neither `--id` nor `--csn` is given")),
        };
        let has = |name: &str| {
            let point = holdings.points.get(name);
            let point = point.and_then(|held| held.point.as_ref().ok());
            point.is_some_and(|point| point.csn.as_ref() == Some(csn))
        };
        let backups = holdings.backups.iter();
        let of_csn = backups.filter(|(_, held)| match &held.state {
            HeldState::Complete(manifest) => manifest
                .point
                .as_ref()
                .is_some_and(|point| has(point.as_str())),
            _ => false,
        });
        let names: Vec<&String> = of_csn.map(|(name, _)| name).collect();
        match names.as_slice() {
            [name] => Ok((*name).clone()),
            [] => {
                let message = format!("no backup's point has CSN {csn}");
                Err(Failure::new(ErrorKind::NotFound, message).next("gs_pitr show"))
            }
            several => {
                let several: Vec<&str> = several.iter().map(|name| name.as_str()).collect();
                let message = format!("several backups have CSN {csn}: {}", several.join(", "));
                Err(Failure::usage(message).next("give one of them with `--id`"))
            }
        }
    }
}

/// Runs the command.
pub(crate) async fn run(args: &DeleteArgs, settings: &Settings, printer: &Printer) -> Result<()> {
    args.former.tell("delete", printer);
    let removal = Removal {
        command: "delete",
        question: "Delete this backup for good?",
        dry_run: args.dry_run,
        settings,
        printer,
        plan: &|holdings| {
            let id = args.name(holdings)?;
            let plan = plan::delete(holdings, &id, args.even_last_good);
            plan.map_err(|refused| failure(&id, &refused))
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
