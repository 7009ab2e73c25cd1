//! What a client may tell an operation under way, and when.
//!
//! A command outlives the request that brought it: when the client goes away in the middle, the command
//! is still carried out, and its result found by the client that asks again.

use std::sync::Arc;
use std::time::Duration;

use agent_api::{ApiError, ErrorKind, Look, MarkRequest, MarkResult, Observed, OpenRequest, Phase};
use tokio::sync::{mpsc, oneshot};

use crate::operation::table::{Operation, Orders, validate};
use crate::operation::{BackupCommand, RestoreCommand};

/// How long an engine may take to answer a command.
const ANSWER: Duration = Duration::from_mins(2);
/// How long the end of an operation may take to show after its engine let go of a command.
const END: Duration = Duration::from_secs(5);

/// A restore point may be made, and the node looked at.
const BEFORE_SHIP: [Phase; 3] = [Phase::Copied, Phase::Ready, Phase::Marked];

/// Held by the command under way: there is one at a time.
#[derive(Debug, Default)]
pub(super) struct Turn {
    /// The last restore point, for a client that did not get the answer.
    marked: Option<MarkResult>,
}

impl Operation {
    /// Makes a restore point; the same name again finds the one made before.
    ///
    /// # Errors
    /// [`ErrorKind::Conflict`] at the wrong time, [`ErrorKind::Timeout`] without an answer, and what the
    /// engine says.
    pub async fn mark(self: &Arc<Self>, request: MarkRequest) -> Result<MarkResult, ApiError> {
        validate::restore_point(&request.restore_point)?;
        let sender = self.backup_orders("mark")?;
        let operation = Arc::clone(self);
        detached(async move {
            let mut turn = operation.turn.lock().await;
            let known = turn.marked.as_ref();
            if let Some(known) = known.filter(|m| m.restore_point == request.restore_point) {
                return Ok(known.clone());
            }
            operation.expect_phase("mark", &BEFORE_SHIP)?;
            let command = |answer| BackupCommand::Mark(request, answer);
            let result = operation.order("mark", &sender, command).await?;
            turn.marked = Some(result.clone());
            Ok(result)
        })
        .await
    }

    /// Waits until the last restore point is on disk, so that no crash of the database loses it.
    ///
    /// # Errors
    /// As [`Self::mark`]. Whether the restore point is there is not known then: it is to be made under another name.
    pub async fn flush(self: &Arc<Self>, request: MarkRequest) -> Result<(), ApiError> {
        validate::restore_point(&request.restore_point)?;
        let sender = self.backup_orders("flush")?;
        let operation = Arc::clone(self);
        detached(async move {
            let _turn = operation.turn.lock().await;
            operation.expect_phase("flush", &[Phase::Marked])?;
            let command = |answer| BackupCommand::Flush(request, answer);
            operation.order("flush", &sender, command).await
        })
        .await
    }

    /// Looks at the node's transactions.
    ///
    /// # Errors
    /// As [`Self::mark`].
    pub async fn observe(self: &Arc<Self>, look: Look) -> Result<Observed, ApiError> {
        let sender = self.backup_orders("observe")?;
        let operation = Arc::clone(self);
        detached(async move {
            let _turn = operation.turn.lock().await;
            operation.expect_phase("observe", &BEFORE_SHIP)?;
            let command = |answer| BackupCommand::Observe(look, answer);
            operation.order("observe", &sender, command).await
        })
        .await
    }

    /// Has the WAL up to the restore point sent; begun when this returns.
    ///
    /// # Errors
    /// As [`Self::mark`].
    pub async fn ship(self: &Arc<Self>) -> Result<(), ApiError> {
        let sender = self.backup_orders("ship")?;
        let operation = Arc::clone(self);
        detached(async move {
            let _turn = operation.turn.lock().await;
            if operation.is_in(&[Phase::Shipping, Phase::Shipped, Phase::Done]) {
                return Ok(());
            }
            operation.expect_phase("ship", &[Phase::Marked])?;
            operation.order("ship", &sender, BackupCommand::Ship).await
        })
        .await
    }

    /// Lets go of the WAL hold, if there is one, and ends the backup or the point.
    ///
    /// # Errors
    /// As [`Self::mark`].
    pub async fn release(self: &Arc<Self>) -> Result<(), ApiError> {
        let sender = self.backup_orders("release")?;
        let operation = Arc::clone(self);
        detached(async move {
            let _turn = operation.turn.lock().await;
            if operation.is_in(&[Phase::Done]) {
                return Ok(());
            }
            operation.expect_phase("release", &[Phase::Shipped])?;
            let command = BackupCommand::Release;
            operation.order("release", &sender, command).await
        })
        .await
    }

    /// Has the restored database promoted and put in its place; begun when this returns.
    ///
    /// # Errors
    /// As [`Self::mark`].
    pub async fn promote(self: &Arc<Self>) -> Result<(), ApiError> {
        const AFTER: [Phase; 4] = [
            Phase::Promoting,
            Phase::Promoted,
            Phase::Opening,
            Phase::Done,
        ];
        let sender = self.restore_orders("promote")?;
        let operation = Arc::clone(self);
        detached(async move {
            let _turn = operation.turn.lock().await;
            if operation.is_in(&AFTER) {
                return Ok(());
            }
            operation.expect_phase("promote", &[Phase::Proved])?;
            let command = RestoreCommand::Promote;
            operation.order("promote", &sender, command).await
        })
        .await
    }

    /// Opens the promoted database, or ends with it shut down; begun when this returns.
    ///
    /// # Errors
    /// As [`Self::mark`].
    pub async fn open(self: &Arc<Self>, request: OpenRequest) -> Result<(), ApiError> {
        let sender = self.restore_orders("open")?;
        let operation = Arc::clone(self);
        detached(async move {
            let _turn = operation.turn.lock().await;
            if operation.is_in(&[Phase::Opening, Phase::Done]) {
                return Ok(());
            }
            operation.expect_phase("open", &[Phase::Promoted])?;
            let command = |answer| RestoreCommand::Open(request, answer);
            operation.order("open", &sender, command).await
        })
        .await
    }

    fn restore_orders(&self, name: &str) -> Result<mpsc::Sender<RestoreCommand>, ApiError> {
        match &self.orders {
            Orders::Restore(sender) => Ok(sender.clone()),
            Orders::Backup(_) => Err(wrong_kind(name, "restore")),
        }
    }

    fn backup_orders(&self, name: &str) -> Result<mpsc::Sender<BackupCommand>, ApiError> {
        match &self.orders {
            Orders::Backup(sender) => Ok(sender.clone()),
            Orders::Restore(_) => Err(wrong_kind(name, "backup or a point")),
        }
    }

    fn is_in(&self, phases: &[Phase]) -> bool {
        phases.contains(&self.log.current_phase())
    }

    fn expect_phase(&self, name: &str, phases: &[Phase]) -> Result<(), ApiError> {
        if self.is_in(phases) {
            return Ok(());
        }
        let status = self.status();
        if let Some(error) = status.error {
            return Err(too_late(name, &error));
        }
        let right: Vec<_> = phases.iter().map(|phase| phase.name()).collect();
        let message = format!(
            "{name} goes with an operation that is {}, and this one is {}",
            right.join(" or "),
            status.phase
        );
        Err(ApiError::new(ErrorKind::Conflict, message))
    }

    /// Sends one command to the engine and waits for its answer.
    async fn order<C, T>(
        &self,
        name: &str,
        sender: &mpsc::Sender<C>,
        command: impl FnOnce(oneshot::Sender<Result<T, ApiError>>) -> C,
    ) -> Result<T, ApiError> {
        let (answer, answered) = oneshot::channel();
        let exchange = async {
            sender.send(command(answer)).await.ok()?;
            answered.await.ok()
        };
        match tokio::time::timeout(ANSWER, exchange).await {
            Ok(Some(answer)) => answer,
            Ok(None) => Err(self.gone(name).await),
            Err(_) => {
                let message = format!(
                    "{name}: no answer for {} s; it may still be carried out",
                    ANSWER.as_secs()
                );
                let error = ApiError::new(ErrorKind::Timeout, message).changed();
                Err(error.next("ask for the operation's status"))
            }
        }
    }

    /// The engine let go of a command: its end says why.
    async fn gone(&self, name: &str) -> ApiError {
        let mut news = self.log.follow();
        let ended = news.wait_for(|news| news.ended);
        // Nothing to do about a timeout: the words below are then less exact.
        let _ = tokio::time::timeout(END, ended).await;
        if let Some(error) = self.status().error {
            return too_late(name, &error);
        }
        let message = format!("{name} was not carried out: the operation has ended");
        ApiError::new(ErrorKind::Conflict, message)
    }
}

/// Runs `command` to its end whether or not the caller waits for it.
async fn detached<T: Send + 'static>(
    command: impl Future<Output = Result<T, ApiError>> + Send + 'static,
) -> Result<T, ApiError> {
    tokio::spawn(command).await.unwrap_or_else(|error| {
        let message = format!("a bug in the agent: the command ended: {error}");
        Err(ApiError::new(ErrorKind::Internal, message).changed())
    })
}

fn wrong_kind(name: &str, kind: &str) -> ApiError {
    let message = format!("{name} goes with a {kind}, and this operation is none");
    ApiError::new(ErrorKind::Usage, message)
}

/// The operation ended with `error` before the command: that error is what the operator must know.
fn too_late(name: &str, error: &ApiError) -> ApiError {
    let mut shown = error.clone();
    shown.message = format!("{name} was not carried out, the operation had ended: {error}");
    shown
}
