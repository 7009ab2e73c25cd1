//! The proxies' metadata: there where a point names it, and nowhere else.

use super::Context;
use super::finding::{Finding, Severity};
use super::lives::Live;
use super::records::Records;
use crate::check;
use crate::envelope::{self, OBJECT_LIMIT};
use crate::error::CatalogError;
use crate::ids::PointId;
use crate::keys;
use crate::model::{LogAction, LogEntry, MetadataRef, Point};

/// Checks what the points name. No backup is lost with it: databases come back without their proxies' metadata.
///
/// # Errors
/// [`CatalogError::Store`].
pub(super) async fn check(context: &Context<'_>, records: &Records) -> Result<(), CatalogError> {
    let points = records.points.iter();
    let points = points.filter_map(|(id, found)| Some((id, found.body.as_ref()?)));
    for (id, point) in points {
        if let Some(named) = &point.metadata {
            of_point(context, records, id, named).await?;
        }
    }
    Ok(())
}

async fn of_point(
    context: &Context<'_>,
    records: &Records,
    id: &PointId,
    named: &MetadataRef,
) -> Result<(), CatalogError> {
    let key = keys::metadata(id);
    let Some(found) = records.metadata.get(id) else {
        // It goes just before its point, after the log said that the point goes; and both may have gone since the listing.
        let going = is_going(records, id)
            || !context.is_there(&keys::point(id)).await?
            || is_going_since(context, records, id).await?;
        if !going {
            let what = format!("point {id} names it, and it is missing");
            context.add(next(Finding::damage(&key, what)));
        }
        return Ok(());
    };
    let Some(body) = &found.body else {
        return Ok(());
    };
    if found.sha256 != named.sha256 {
        let what = format!("point {id} names another SHA-256 than it has");
        context.add(next(Finding::damage(&key, what)));
    } else if let Err(what) = check::metadata(body, id) {
        context.add(next(Finding::damage(&key, what)));
    }
    Ok(())
}

/// Whether the log said at the listing that a point goes, or is gone.
fn is_going(records: &Records, id: &PointId) -> bool {
    let mut entries = records.log.values().filter_map(|found| found.body.as_ref());
    entries.any(|entry| says_so(entry, id))
}

/// Whether the log has said so since the listing.
async fn is_going_since(
    context: &Context<'_>,
    records: &Records,
    id: &PointId,
) -> Result<bool, CatalogError> {
    let mut seq = records.log.keys().next_back().map_or(1, |last| last + 1);
    loop {
        let key = keys::log(seq);
        match envelope::fetch(&*context.store, &key, OBJECT_LIMIT).await {
            Ok(stored) => {
                let entry = envelope::open::<LogEntry>(&key, &stored);
                if entry.is_ok_and(|entry| says_so(&entry, id)) {
                    return Ok(true);
                }
            }
            Err(error) if error.is_of_object() => return Ok(false),
            Err(error) => return Err(error),
        }
        seq += 1;
    }
}

fn says_so(entry: &LogEntry, id: &PointId) -> bool {
    entry.action == LogAction::PointRemoved && entry.object == keys::point(id).as_str()
}

fn next(finding: Finding) -> Finding {
    finding.next(
        "the databases can be restored all the same; the proxies' rules have to come from elsewhere",
    )
}

/// Looks for metadata whose point never came to be, or has gone.
///
/// # Errors
/// [`CatalogError::Store`].
pub(super) async fn orphans(
    context: &Context<'_>,
    records: &Records,
    live: &Live,
) -> Result<(), CatalogError> {
    for (id, found) in &records.metadata {
        let point: Option<&Point> = match records.points.get(id) {
            // Nobody can say what it names.
            Some(found) if found.body.is_none() => continue,
            Some(found) => found.body.as_ref(),
            None => None,
        };
        let operation = found.body.as_ref().map(|body| body.operation);
        let busy = operation.is_some_and(|operation| live.operation(operation));
        let named = point.is_some_and(|point| point.metadata.is_some());
        if named || busy || (point.is_none() && context.is_there(&keys::point(id)).await?) {
            continue;
        }
        let what = "metadata of a point that was never made, or is gone";
        let finding = Finding::new(Severity::Orphan, &found.key, what);
        context.add(finding.next("gs_pitr prune"));
    }
    Ok(())
}
