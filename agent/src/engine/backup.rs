//! A backup from the order to the release of its WAL, whatever makes the copy: look, hold WAL, copy, serve the point.
//!
//! Whatever ends the operation ends all of it: [`run`] returns when nothing reads the data directory, no upload
//! is under way, the server knows of no backup, and its WAL is held no more.

use std::sync::Arc;
use std::time::Duration;

use agent_api::{ApiError, BackupSpec, Engine, ErrorKind, Phase};
use agent_sql::Flavour;
use agent_wal::SegmentName;
use catalog::journal::{OperationJournal, OperationStart};
use catalog::model::{BackupMode, NodeBackup, NodePoint};
use pipeline::upload::Uploader;
use tokio::sync::{mpsc, oneshot};
use tokio_util::sync::CancellationToken;

use super::attempt::{Attempt, cancelled};
use super::node::Node;
use super::point::Ground;
use super::probackup::{self, preflight};
use super::serve::{self, Server};
use super::slot;
use super::wal_hold::WalHold;
use super::{direct, errors};
use crate::cleanup;
use crate::identity;
use crate::operation::{BackupCommand, OperationContext};
use crate::wal::service::WalStream;

/// For the last entry of the journal. It only saves a sweeper work: no failure of it is worth more time.
const JOURNAL_DEADLINE: Duration = Duration::from_secs(15);

/// Who asked for the WAL hold to be released waits here for its end.
pub(super) type Released = oneshot::Sender<Result<(), ApiError>>;

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
    refuse_unfit(&spec)?;
    cx.report.phase(Phase::Preparing);
    let node = Node::open(&cx).await?;
    refuse_direct_of_opengauss(&spec, node.facts.flavour)?;
    identity::check(&cx, (spec.node_id, &spec.epoch), &node.facts).await?;
    let maker = Maker::prepare(&cx, &spec, &node).await?;
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
        Ok(uploader) => hold(&cx, &spec, &node, &maker, &uploader, &work, &mut commands).await,
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

/// Runs the backup with its WAL held, and lets go in the end, whatever the end is. When all is in the bucket nothing needs
/// the WAL on the node any more: the hold ends then, not when the client comes to say so.
async fn hold(
    cx: &OperationContext,
    spec: &BackupSpec,
    node: &Node,
    maker: &Maker,
    uploader: &Uploader,
    work: &CancellationToken,
    commands: &mut mpsc::Receiver<BackupCommand>,
) -> Result<Released, ApiError> {
    sweep_first(cx, node).await;
    let stream = shipped_all_the_time(cx, spec).await;
    let mut hold = match stream.clone() {
        Some(stream) => WalHold::Service(stream),
        None => WalHold::take(cx, node).await?,
    };
    let known = stream.as_ref().map(|stream| Arc::clone(stream.known()));
    let attempt = Attempt {
        cx,
        spec,
        node,
        hold: &hold,
        uploader,
        work,
        known: known.unwrap_or_default(),
    };
    let result = back_up(&attempt, maker, commands).await;
    work.cancel();
    let left = hold.release().await.err();
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
    match (released, hold.release().await) {
        (Ok(released), Ok(())) => {
            if let Some(stream) = stream {
                stream.based();
            }
            Ok(released)
        }
        (Ok(released), Err(left)) => {
            let _ = released.send(Err(left.clone()));
            Err(left)
        }
        (Err(error), _) => Err(error),
    }
}

/// The WAL that the agent ships all the time, from before the backup begins; it is begun if that is asked for. `None`: the
/// backup ships its own, and ends with that.
async fn shipped_all_the_time(cx: &OperationContext, spec: &BackupSpec) -> Option<WalStream> {
    let (node, epoch) = (spec.node_id, &spec.epoch);
    if spec.wal.is_backup() {
        return cx.wal.stream(node, epoch).ok();
    }
    let begun = cx
        .wal
        .start_for_backup(node, epoch, spec.level, cx.throttle.rate());
    let begun = tokio::select! {
        biased;
        () = cx.cancel.cancelled() => return None,
        begun = begun => begun,
    };
    match begun {
        Ok(stream) => Some(stream),
        Err(error) => {
            let next = error
                .next
                .map(|next| format!(" ({next})"))
                .unwrap_or_default();
            cx.report.warning(format!(
                "its WAL is not shipped after this backup: {}{next}",
                error.message
            ));
            None
        }
    }
}

/// Takes away what killed agents left, and says so: the sweep at the agent's start may not have found the database. It
/// is no reason not to make a backup if it fails.
async fn sweep_first(cx: &OperationContext, node: &Node) {
    match slot::sweep_over(&node.sql, &cx.wal).await {
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

/// Everything that needs the WAL hold. Nothing uses it any more when this returns.
async fn back_up(
    attempt: &Attempt<'_>,
    maker: &Maker,
    commands: &mut mpsc::Receiver<BackupCommand>,
) -> Result<(NodeBackup, NodePoint), ApiError> {
    let (shipper, copy) = match maker {
        Maker::Direct => direct::copy(attempt).await?,
        Maker::Probackup(prepared) => probackup::copy(attempt, prepared).await?,
    };
    let ground = Ground {
        cx: attempt.cx,
        work: attempt.work,
        node: attempt.node,
        node_id: attempt.spec.node_id,
        epoch: attempt.spec.epoch.clone(),
        timeline: copy.timeline,
        first: copy.first_segment(attempt.node),
        after: (copy.stop, "the end of the copy"),
        ready: Phase::Copied,
    };
    if let WalHold::Service(_) = attempt.hold {
        // Whatever becomes of this operation, the service sees the WAL into the bucket.
        let size = attempt.node.segment_size();
        let last = SegmentName::before_lsn(copy.timeline, copy.stop, size);
        let known = copy.describe(attempt.spec, attempt.node, last);
        attempt.cx.report.copy(known);
    }
    let result = Server::new(&ground, &shipper, commands).run().await;
    shipper.stop().await;
    let (marked, point) = result?;
    let last = marked.segment(attempt.node);
    Ok((copy.describe(attempt.spec, attempt.node, last), point))
}

/// What makes the copy.
enum Maker {
    Direct,
    Probackup(Box<preflight::Prepared>),
}

impl Maker {
    /// Looks whether it can. Changes nothing.
    async fn prepare(
        cx: &OperationContext,
        spec: &BackupSpec,
        node: &Node,
    ) -> Result<Self, ApiError> {
        match spec.engine {
            Engine::Direct => Ok(Self::Direct),
            Engine::Probackup => {
                let prepared = preflight::prepare(cx, spec, node).await?;
                Ok(Self::Probackup(Box::new(prepared)))
            }
        }
    }
}

/// Refuses an order that no engine can follow.
fn refuse_unfit(spec: &BackupSpec) -> Result<(), ApiError> {
    if spec.engine == Engine::Direct && spec.mode != BackupMode::Full {
        let message = format!(
            "the engine `direct` makes no {} backup, only FULL",
            spec.mode
        );
        return Err(ApiError::new(ErrorKind::Usage, message)
            .next("give --engine probackup, or leave -b away"));
    }
    Ok(())
}

/// Its data directory cannot be copied in place: its backup mode is the whole server's, and what its files need to
/// become whole again only `gs_probackup` knows.
fn refuse_direct_of_opengauss(spec: &BackupSpec, flavour: Flavour) -> Result<(), ApiError> {
    if spec.engine == Engine::Direct && flavour == Flavour::OpenGauss {
        let message = "the engine `direct` copies PostgreSQL, and this is an openGauss";
        return Err(ApiError::new(ErrorKind::Incompatible, message)
            .next("give --engine probackup; gs_probackup comes with openGauss"));
    }
    Ok(())
}
