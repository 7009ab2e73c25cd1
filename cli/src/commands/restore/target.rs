//! What is restored: which point, and from which backup. Chosen before anything is changed, and never guessed.

use std::collections::BTreeMap;
use std::fmt::Write as _;

use agent_api::ErrorKind;
use catalog::Catalog;
use catalog::model::{Consistency, NodeBackup, Point};
use catalog::reach::Reach;
use catalog::repo::Restorable;
use jiff::Timestamp;
use uuid::Uuid;

use super::RestoreArgs;
use super::places;
use crate::failure::{Failure, Result};
use crate::moments::Moment;
use crate::printer::Printer;

/// Which point is wanted.
#[derive(Debug, Clone, Default, clap::Args)]
pub(crate) struct TargetArgs {
    /// The backup's id, or the beginning of one that is unique; alone: to its own point
    #[arg(long)]
    id: Option<String>,
    /// To this point, or the beginning of its id, from the newest backup that leads there
    #[arg(long, value_name = "POINT", conflicts_with_all = ["csn", "time"])]
    point: Option<String>,
    /// To the point with this commit sequence number
    #[arg(long, value_name = "CSN", conflicts_with = "time")]
    csn: Option<String>,
    /// To the last point of the whole cluster that was not made after this: RFC 3339, or a local date and time
    #[arg(long, value_name = "TIME")]
    time: Option<Moment>,
}

/// What was chosen.
#[derive(Debug)]
pub(super) struct Chosen {
    /// The backup, and the point that it is recovered to.
    pub(super) found: Restorable,
    /// Whether it is another point than the backup's own.
    pub(super) is_other: bool,
}

impl TargetArgs {
    /// Finds backup and point, and makes sure that one leads to the other.
    ///
    /// # Errors
    /// That there is none, or more than one; that no backup leads there, with the nearest points that can be reached. What
    /// the catalog says.
    pub(super) async fn choose(
        &self,
        args: &RestoreArgs,
        catalog: &Catalog,
        printer: &Printer,
    ) -> Result<Chosen> {
        let id = match &self.id {
            Some(text) => Some(catalog.resolve_backup_id(text).await?),
            None => None,
        };
        if self.point.is_none() && self.csn.is_none() && self.time.is_none() {
            let Some(id) = id else {
                let message = "nothing says what is to be restored";
                return Err(Failure::usage(message).next(
                    "give `--id`, `--point`, `--csn` or `--time`: gs_pitr show, gs_pitr point list",
                ));
            };
            let found = catalog.restorable(&id).await?;
            let is_other = false;
            return Ok(Chosen { found, is_other });
        }
        // Says that a backup is deleted, or unknown, better than that it leads nowhere.
        let manifest = match &id {
            Some(id) => Some(catalog.manifest(id).await?),
            None => None,
        };
        let reach = Reach::read(catalog).await?;
        let point = self.point(catalog, &reach, printer).await?;
        let nodes = nodes(&reach, point, args)?;
        let base = match &manifest {
            Some(manifest) => reach
                .leads(manifest, point, &nodes)
                .map(|()| manifest)
                .map_err(|why| format!("backup {}: {why}", manifest.backup_id)),
            None => reach.base(point, &nodes).map_err(|why| why.to_string()),
        };
        match base {
            Ok(base) => Ok(Chosen {
                is_other: base.point.as_ref() != Some(&point.point_id),
                found: Restorable {
                    manifest: base.clone(),
                    point: point.clone(),
                },
            }),
            Err(why) => {
                let what = format!("{} cannot be reached: {why}", named(point));
                let nearest = reach.nearest(point.made(), manifest.as_ref(), &nodes);
                Err(refused(&what, nearest))
            }
        }
    }

    async fn point<'a>(
        &self,
        catalog: &Catalog,
        reach: &'a Reach,
        printer: &Printer,
    ) -> Result<&'a Point> {
        if let Some(text) = &self.point {
            let id = catalog.resolve_point_id(text).await?;
            return match reach.point(&id) {
                Some(point) => Ok(point),
                // It says why.
                None => Err(match catalog.point(&id).await {
                    Err(error) => error.into(),
                    Ok(_) => Failure::new(
                        ErrorKind::Conflict,
                        format!("point {id} was written just now: run the command again"),
                    ),
                }),
            };
        }
        match (&self.csn, self.time) {
            (Some(csn), _) => with_csn(reach, csn.trim()),
            (None, time) => until(reach, time.map_or(Timestamp::MAX, |time| time.0), printer),
        }
    }
}

/// The only point with a commit sequence number.
fn with_csn<'a>(reach: &'a Reach, csn: &str) -> Result<&'a Point> {
    let all = reach.points().iter();
    let with: Vec<&Point> = all
        .filter(|point| point.csn.as_deref() == Some(csn))
        .collect();
    match with.as_slice() {
        [point] => Ok(point),
        [] => {
            let mut message = format!("no point has the CSN {csn}");
            let next = around(reach, csn, &mut message);
            Err(Failure::new(ErrorKind::NotFound, message).next(next))
        }
        several => {
            let mut message = format!("{} points have the CSN {csn}:", several.len());
            for point in several {
                let from = match reach.base(point, &[]) {
                    Ok(base) => format!("reached from backup {}", base.backup_id),
                    Err(why) => format!("unreachable: {why}"),
                };
                let _ = write!(message, "\n  {}, {from}", named(point));
            }
            Err(Failure::usage(message).next("say which one it is: --point ID"))
        }
    }
}

/// Names the points whose numbers are next to `csn`. What to do then.
fn around(reach: &Reach, csn: &str, message: &mut String) -> &'static str {
    const NEXT: &str = "gs_pitr point list";
    let Ok(wanted) = csn.parse::<u128>() else {
        return NEXT;
    };
    let numbered = reach.points().iter().filter_map(|point| {
        let number = point.csn.as_deref()?.parse::<u128>().ok()?;
        Some((number, point))
    });
    let numbered: Vec<_> = numbered.collect();
    let below = numbered.iter().filter(|(number, _)| *number < wanted);
    let above = numbered.iter().filter(|(number, _)| *number > wanted);
    let below = below.max_by_key(|(number, _)| *number);
    let above = above.min_by_key(|(number, _)| *number);
    for (which, found) in [("below", below), ("above", above)] {
        if let Some((number, point)) = found {
            let _ = write!(
                message,
                "; the nearest {which} is {number}, {}",
                named(point)
            );
        }
    }
    NEXT
}

/// The last point of the whole cluster that was not made after a moment.
fn until<'a>(reach: &'a Reach, moment: Timestamp, printer: &Printer) -> Result<&'a Point> {
    let all = reach.points().iter().rev();
    let mut before = all.filter(|point| point.made() <= moment);
    let mut passed = None;
    let found = before.find(|point| {
        let cluster = point.consistency == Consistency::Cluster;
        if !cluster {
            passed.get_or_insert(*point);
        }
        cluster
    });
    match (found, passed) {
        (Some(point), None) => Ok(point),
        (Some(point), Some(passed)) => {
            let message = format!(
                "{} is passed over, because it is consistent per node only; it can be had with `--point`",
                named(passed)
            );
            printer.warning(None, &message);
            Ok(point)
        }
        (None, passed) => {
            let mut what = format!(
                "no point of the whole cluster was made until {}",
                second(moment)
            );
            if let Some(passed) = passed {
                let _ = write!(what, "; {} is consistent per node only", named(passed));
            }
            Err(refused(&what, reach.nearest(moment, None, &[])))
        }
    }
}

/// The nodes that `--node` names; none: all.
fn nodes(reach: &Reach, point: &Point, args: &RestoreArgs) -> Result<Vec<Uuid>> {
    if args.node.is_empty() {
        return Ok(Vec::new());
    }
    let copies = reach.backups().iter().flat_map(|manifest| &manifest.nodes);
    let newest: BTreeMap<Uuid, &NodeBackup> = copies.map(|copy| (copy.node_id, copy)).collect();
    let of_point = point
        .nodes
        .iter()
        .filter_map(|mark| newest.get(&mark.node_id));
    let chosen = places::chosen(of_point.map(|copy| (*copy).clone()).collect(), args)?;
    Ok(chosen.into_iter().map(|copy| copy.node_id).collect())
}

/// A target that cannot be had, with those next to it that can.
fn refused(what: &str, (before, after): (Option<&Point>, Option<&Point>)) -> Failure {
    let mut message = what.to_owned();
    match (before, after) {
        (None, None) => message.push_str("; no point can be reached"),
        _ => message.push_str("; the nearest that can be reached:"),
    }
    for (which, point) in [("before", before), ("after", after)] {
        if let Some(point) = point {
            let _ = write!(message, "\n  {which}: {}", named(point));
        }
    }
    let next = before.or(after).map_or_else(
        || "gs_pitr point list".to_owned(),
        |point| format!("gs_pitr restore --point {}", point.point_id),
    );
    Failure::new(ErrorKind::NotFound, message).next(next)
}

fn named(point: &Point) -> String {
    format!("point {} (made {})", point.point_id, second(point.made()))
}

fn second(at: Timestamp) -> impl std::fmt::Display {
    at.strftime("%Y-%m-%d %H:%M:%S%.3fZ")
}
