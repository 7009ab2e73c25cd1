//! The direct engine: reads the data directory in place between backup start and stop, as pgBackRest and WAL-G do.
//!
//! Two sessions and a slot: one session holds the backup open, the other ships the WAL that the slot keeps.
//! Whatever ends the operation ends all of it: [`run`] returns when no thread reads the data directory, no upload
//! is under way, the server knows of no backup, and the slot is gone.

pub mod attachments;
pub mod attempt;
pub mod control;
pub mod copy;
pub mod copy_error;
pub mod exclude;
pub mod manifest;
pub mod node;
mod observe;
pub mod pages;
pub mod point;
mod readback;
mod serve;
pub mod slot;
pub mod walk;

use std::sync::Arc;
use std::time::Duration;

use agent_api::{ApiError, BackupSpec, ErrorKind, Phase};
use catalog::journal::{OperationJournal, OperationStart};
use catalog::model::{NodeBackup, NodePoint};
use pipeline::upload::Uploader;
use tokio::sync::{mpsc, oneshot};
use tokio_util::sync::CancellationToken;

use self::attempt::Attempt;
use self::node::Node;
use self::serve::Server;
use self::slot::Slot;
use crate::cleanup;
use crate::engine::errors;
use crate::identity;
use crate::operation::{BackupCommand, OperationContext};

pub use self::slot::{Swept, sweep};

/// For the last entry of the journal. It only saves a sweeper work: no failure of it is worth more time.
const JOURNAL_DEADLINE: Duration = Duration::from_secs(15);

/// Who asked for the WAL hold to be released waits here for its end.
type Released = oneshot::Sender<Result<(), ApiError>>;

/// Copies the node beside the agent into the repository, ships its WAL, makes and proves a restore point.
///
/// # Errors
/// Whatever ended the backup. Its `changed` says whether something is left on the node; what is left in the
/// bucket belongs to no manifest.
pub async fn run(
    cx: OperationContext,
    spec: BackupSpec,
    mut commands: mpsc::Receiver<BackupCommand>,
) -> Result<(), ApiError> {
    cx.report.phase(Phase::Preparing);
    let node = Node::open(&cx).await?;
    identity::check(&cx, &spec, &node.facts).await?;
    let start = OperationStart {
        operation: cx.id,
        kind: "backup".into(),
        backup_id: Some(spec.backup_id.clone()),
        node_id: Some(spec.node_id),
        log_head: None,
    };
    let journal = OperationJournal::start(Arc::clone(&cx.store), start);
    let journal = tokio::select! {
        biased;
        () = cx.cancel.cancelled() => return Err(cancelled()),
        journal = journal => Arc::new(journal.map_err(errors::catalog)?),
    };
    let work = cx.cancel.child_token();
    // Also if this future is dropped.
    let _work = work.clone().drop_guard();
    let uploader = Uploader::new(
        Arc::clone(&cx.store),
        cx.budget.clone(),
        cx.throttle.clone(),
        Arc::<OperationJournal>::clone(&journal),
        Arc::clone(&cx.meter),
        work.clone(),
    );
    let result = match uploader.map_err(errors::pipeline) {
        Ok(uploader) => hold(&cx, &spec, &node, &uploader, &work, &mut commands).await,
        Err(error) => Err(error),
    };
    work.cancel();
    let (result, released) = match result {
        Ok(released) => (Ok(()), Some(released)),
        Err(error) => (Err(error), None),
    };
    let why = result.as_ref().err().map(ApiError::to_string);
    match tokio::time::timeout(JOURNAL_DEADLINE, journal.ended(why.as_deref())).await {
        Ok(Ok(())) => {}
        Ok(Err(error)) => cx
            .report
            .warning(format!("the journal was not ended: {error}")),
        Err(_) => cx
            .report
            .warning("the journal was not ended: no answer in time"),
    }
    if let Some(released) = released {
        // The client may be gone; the hold is released all the same.
        let _ = released.send(Ok(()));
    }
    result
}

/// Runs the backup with a slot, and drops it in the end, whatever the end is. When all is in the bucket nothing needs
/// the WAL on the node any more: the hold ends then, not when the client comes to say so.
async fn hold(
    cx: &OperationContext,
    spec: &BackupSpec,
    node: &Node,
    uploader: &Uploader,
    work: &CancellationToken,
    commands: &mut mpsc::Receiver<BackupCommand>,
) -> Result<Released, ApiError> {
    sweep_first(cx, node).await;
    let mut slot = Slot::create(cx.id, &node.sql, node.options.clone()).await?;
    let attempt = Attempt {
        cx,
        spec,
        node,
        slot: slot.name(),
        uploader,
        work,
    };
    let result = back_up(&attempt, &slot, commands).await;
    work.cancel();
    let left = slot.release().await.err();
    let (backup, point) = match (result, left) {
        (Ok(done), None) => done,
        (Ok(done), Some(left)) => {
            // It is tried again when the client releases the hold.
            cx.report.warning(left.message);
            done
        }
        (Err(error), None) => return Err(error),
        (Err(mut error), Some(left)) => {
            error.message = format!("{}; and {}", error.message, left.message);
            error.changed = true;
            error.next = left.next;
            return Err(error);
        }
    };
    cx.report.backup(backup, point);
    cx.report.phase(Phase::Shipped);
    let released = serve::until_release(cx, commands).await;
    match (released, slot.release().await) {
        (Ok(released), Ok(())) => Ok(released),
        (Ok(released), Err(left)) => {
            let _ = released.send(Err(left.clone()));
            Err(left)
        }
        (Err(error), _) => Err(error),
    }
}

/// Takes away what killed agents left, and says so: the sweep at the agent's start may not have found the database. It
/// is no reason not to make a backup if it fails.
async fn sweep_first(cx: &OperationContext, node: &Node) {
    match slot::sweep_over(&node.sql).await {
        Ok(swept) => {
            for slot in swept.dropped {
                cx.report.warning(cleanup::dropped(&slot));
            }
        }
        Err(error) => {
            let message = format!("did not look for slots that a killed agent left: {error}");
            cx.report.warning(message);
        }
    }
}

/// Everything that needs the WAL hold. Nothing uses the slot any more when this returns.
async fn back_up(
    attempt: &Attempt<'_>,
    slot: &Slot,
    commands: &mut mpsc::Receiver<BackupCommand>,
) -> Result<(NodeBackup, NodePoint), ApiError> {
    let started = attempt.start(slot).await?;
    let shipper = attempt.ship(&started);
    let result = match attempt.copy(started, &shipper).await {
        Ok(copy) => Server::new(attempt, &shipper, copy, commands).run().await,
        Err(error) => Err(error),
    };
    shipper.stop().await;
    result
}

fn cancelled() -> ApiError {
    ApiError::new(ErrorKind::Cancelled, "cancelled")
}

/// Lets a thread of the copy wait.
fn pause(duration: Duration) {
    let _ = crossbeam_channel::never::<()>().recv_timeout(duration);
}
