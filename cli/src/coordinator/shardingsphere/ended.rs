//! What is noted and said when a lock is over, or did not come to be: the same for a point and for the switch of a restore.

use std::time::Duration;

use agent_api::ErrorKind;
use catalog::Catalog;
use catalog::journal::OperationJournal;
use catalog::model::OperationEvent;
use tokio::task::JoinError;
use uuid::Uuid;

use super::real::{self, InAgent};
use super::setback::Setback;
use super::{known, millis};
use crate::failure::Failure;
use crate::printer::Printer;

/// What locks took, all together.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Took {
    /// How often `LOCK CLUSTER` was sent.
    pub(super) locks: u32,
    /// How long writes were refused, or may have been.
    pub(super) held: Duration,
    /// Whether writes have been seen to pass since.
    pub(super) open: bool,
}

impl Took {
    /// Notes that nothing is locked any more, lets the watchdogs go, and says so if writes do not pass.
    pub(super) async fn ended(
        self,
        journal: &OperationJournal,
        watchdogs: &[InAgent],
        printer: &Printer,
    ) {
        let event = OperationEvent::LockEnded {
            tries: self.locks,
            held_ms: millis(self.held),
            open: self.open,
        };
        if let Err(error) = journal.record(event).await {
            let message = format!("it could not be noted that the lock is released: {error}");
            printer.warning(None, &message);
        }
        real::end(watchdogs).await;
        if !self.open {
            real::still_shut(watchdogs, printer);
        }
    }
}

/// The failure of a command that `setback` is the end of; `message` is what came of it, without the reason. `shut`: writes have not been
/// seen to pass since.
pub(super) async fn failure(
    setback: &Setback,
    message: &str,
    shut: bool,
    (catalog, operation): (&Catalog, Uuid),
) -> Failure {
    let mut message = format!("{message}: {setback}");
    if let Setback::Foreign { .. } = setback {
        let known = known::holders(catalog, Some(operation)).await;
        message = format!("{message}; {known}");
    }
    let failure = Failure::new(setback.kind(), message)
        .next(setback.next())
        .changed_if(shut);
    match setback.node() {
        Some(node) => failure.on(node),
        None => failure,
    }
}

/// The task that may hold the lock is gone; `what` it is.
pub(super) fn broke_off(what: &str, error: &JoinError) -> Failure {
    Failure::new(ErrorKind::Internal, format!("{what} broke off: {error}"))
        .changed_if(true)
        .next("the watchdogs unlock; see whether writes pass: gs_pitr unlock")
}
