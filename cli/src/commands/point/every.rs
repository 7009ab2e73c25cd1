//! A point every so often, until it is told to stop.
//!
//! One that fails is told, and tried again sooner than the next one is due, with growing pauses. Proxies, agents and bucket are not
//! connected to anew for each: what was found holds until a point fails, or the proxies answer otherwise than before.

use std::time::Duration;

use catalog::ids::PointId;
use catalog::journal::OperationJournal;
use jiff::Timestamp;
use serde_json::json;
use tokio::time::{Instant, sleep_until};
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

use super::create::{COMMAND, fields, is_for_good, text};
use super::making::Maker;
use crate::failure::{Failure, Result};
use crate::journalled::{self, Journalled};
use crate::mirrored;
use crate::printer::{Printer, duration};

/// Pause after a first failure; it doubles, up to the span between two points.
const PAUSE: Duration = Duration::from_secs(5);
/// So long the same operation goes on in the bucket: one that says nothing for a day counts as dead.
const OPERATION: Duration = Duration::from_hours(12);

/// What was done so far.
#[derive(Debug, Default)]
struct Tally {
    made: u64,
    failed: u64,
    /// Since the last point.
    in_a_row: u32,
    last: Option<(PointId, Timestamp)>,
}

/// Makes points until `cancel`, which is a good end.
///
/// # Errors
/// The first point's, if no waiting will mend it; that the operation cannot be journalled before the first point.
pub(super) async fn run(
    maker: &mut Maker<'_>,
    span: Duration,
    mut operation: Uuid,
    printer: &Printer,
    cancel: &CancellationToken,
) -> Result<()> {
    let mut tally = Tally::default();
    let mut due = Instant::now();
    while !cancel.is_cancelled() {
        let journalled = Journalled {
            operation,
            kind: "point",
            backup: None,
            by: journalled::ourselves("gs_pitr point create --every"),
        };
        let (catalog, quiet) = (maker.catalog(), printer.without_steps());
        let until = Instant::now() + OPERATION;
        let work = async |journal: &OperationJournal| {
            while !cancel.is_cancelled() && Instant::now() < until {
                wait(due, cancel).await;
                if cancel.is_cancelled() {
                    break;
                }
                due = round(
                    maker,
                    span,
                    due,
                    (operation, journal),
                    &mut tally,
                    printer,
                    cancel,
                )
                .await?;
            }
            Ok(())
        };
        let outcome = journalled.run(catalog, &quiet, None, work).await;
        if let Err(failure) = outcome {
            if tally.made == 0 {
                return Err(failure);
            }
            // The bucket is away: the next point says so again, or it is back.
            due = tally.failed(&failure, span, due, printer);
            wait(due, cancel).await;
        }
        mirrored::refresh(maker.catalog(), maker.settings(), &quiet).await;
        operation = Uuid::now_v7();
    }
    let last = tally.last.as_ref().map(|(id, _)| id);
    printer.text(&format!(
        "{} points made, {} failed",
        tally.made, tally.failed
    ));
    let fields = json!({"made": tally.made, "failed": tally.failed, "last": last});
    printer.result(COMMAND, fields);
    Ok(())
}

/// One point, or one failure. When the next one is due.
async fn round(
    maker: &mut Maker<'_>,
    span: Duration,
    due: Instant,
    (operation, journal): (Uuid, &OperationJournal),
    tally: &mut Tally,
    printer: &Printer,
    cancel: &CancellationToken,
) -> Result<Instant> {
    match maker.make(operation, journal, cancel).await {
        Ok(made) => {
            tally.made += 1;
            tally.in_a_row = 0;
            tally.last = Some((made.point.point_id.clone(), made.point.made()));
            let text = format!("{} {}", Timestamp::now().strftime("%FT%TZ"), text(&made));
            printer.event("point", fields(&made), Some(&text));
            Ok(next(due, span))
        }
        Err(_) if cancel.is_cancelled() => Ok(due),
        Err(failure) if tally.made == 0 && is_for_good(&failure) => Err(failure),
        Err(failure) => Ok(tally.failed(&failure, span, due, printer)),
    }
}

impl Tally {
    /// Tells of a failure. When to try again: sooner than the next point would be due, if that is long.
    fn failed(
        &mut self,
        failure: &Failure,
        span: Duration,
        due: Instant,
        printer: &Printer,
    ) -> Instant {
        self.failed += 1;
        self.in_a_row += 1;
        let wait = pause(self.in_a_row, span).mul_f64(rand::random_range(0.75..1.25));
        let again = (Instant::now() + wait).min(next(due, span));
        let since = self.last.as_ref().map(|(_, made)| {
            let age = Timestamp::now().duration_since(*made);
            Duration::try_from(age).unwrap_or_default()
        });
        let last = self.last.as_ref().map(|(id, _)| id);
        let age = since.map_or_else(
            || "there is no point of this run yet".to_owned(),
            |since| format!("the last one is {} old", duration(since)),
        );
        let text = format!(
            "{} no point: {failure}; {age}; again in {}",
            Timestamp::now().strftime("%FT%TZ"),
            duration(again.saturating_duration_since(Instant::now()))
        );
        let fields = json!({
            "error": failure,
            "failures": self.in_a_row,
            "last": last,
            "last_age_s": since.map(|since| since.as_secs()),
            "again_in_s": again.saturating_duration_since(Instant::now()).as_secs(),
        });
        printer.event("point-failed", fields, Some(&text));
        again
    }
}

/// The pause after so many failures in a row.
fn pause(failures: u32, span: Duration) -> Duration {
    let doubled = 2_u32.saturating_pow(failures.saturating_sub(1).min(16));
    PAUSE.saturating_mul(doubled).min(span)
}

/// When the point after the one of `due` is due: those that were missed are not made up for.
fn next(due: Instant, span: Duration) -> Instant {
    after(Instant::now(), due, span)
}

fn after(now: Instant, due: Instant, span: Duration) -> Instant {
    let mut next = due + span;
    if next <= now {
        let missed = now.duration_since(next).as_secs_f64() / span.as_secs_f64();
        next += span.mul_f64(missed.floor() + 1.0);
    }
    next
}

async fn wait(until: Instant, cancel: &CancellationToken) {
    tokio::select! {
        () = sleep_until(until) => {}
        () = cancel.cancelled() => {}
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn points_keep_their_beat_and_missed_ones_are_left_out() {
        let (due, span) = (Instant::now(), Duration::from_mins(5));
        let minute = Duration::from_mins(1);
        assert_eq!(after(due, due, span), due + span);
        assert_eq!(after(due + 4 * minute, due, span), due + span);
        assert_eq!(after(due + 12 * minute, due, span), due + span * 3);
    }

    #[test]
    fn pauses_grow_up_to_the_span() {
        let span = Duration::from_mins(5);
        let pauses: Vec<_> = (1..9).map(|count| pause(count, span).as_secs()).collect();
        assert_eq!(pauses, [5, 10, 20, 40, 80, 160, 300, 300]);
        assert_eq!(pause(99, Duration::from_secs(3)), Duration::from_secs(3));
    }
}
