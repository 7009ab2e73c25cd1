//! From `pg_wal` (openGauss: `pg_xlog`) into the bucket, while something keeps the server from removing what is not there
//! yet.
//!
//! A segment is whole once the flush position has passed its end. That a later file exists proves nothing: the
//! server renames old segments to names of the future before it writes them.

use std::convert::Infallible;
use std::sync::Arc;
use std::time::Duration;

use agent_api::{ApiError, ErrorKind};
use agent_sql::{ConnectOptions, NodeConnection, SqlError};
use agent_wal::{Lsn, SegmentName, SegmentSize};
use tokio::sync::{Notify, watch};
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

use super::hold::HoldLimit;
use super::service::WalStream;
use super::transfer::Transfer;
pub(crate) use super::transfer::wal_directory;
use super::trouble::Trouble;
use crate::operation::Reporter;

/// How often the server is asked how far it is.
pub(super) const PERIOD: Duration = Duration::from_millis(500);
/// How long the end of the task is waited for when it is told to stop.
const STOP_GRACE: Duration = Duration::from_secs(20);

/// How long the server may take to come back when its session is lost: until it has recovered from a crash. The hold outlives
/// that, and so does a copy that is whole.
pub(crate) const RESTART: Duration = Duration::from_mins(10);
const RECONNECT_PAUSE: Duration = Duration::from_secs(1);

/// What to ship, and where to.
#[derive(Debug)]
pub struct Shipping {
    /// A session for this alone.
    pub sql: NodeConnection,
    /// How to log in again when it is lost.
    pub options: ConnectOptions,
    /// The first segment to ship; its timeline is the only one.
    pub first: SegmentName,
    /// The way into the bucket.
    pub transfer: Transfer,
    /// The most that may be held.
    pub hold: HoldLimit,
    /// For counting segments.
    pub report: Reporter,
}

/// WAL being shipped: by a task of its own, or by the agent's service, whose stream it follows. Dropped, its own task stops.
#[derive(Debug)]
pub struct Shipper {
    shipped: watch::Receiver<Lsn>,
    failure: watch::Receiver<Option<ApiError>>,
    nudge: Arc<Notify>,
    stop: CancellationToken,
    task: Option<JoinHandle<()>>,
}

impl Shipper {
    /// Follows what the agent ships all the time, and counts it in `report`. It fails when that stretch ends.
    #[must_use]
    pub fn follow(stream: &WalStream, report: &Reporter) -> Self {
        let stop = CancellationToken::new();
        let counting = count(stream.shipped(), stream.segment_size(), report.clone());
        let counting = stop.clone().run_until_cancelled_owned(counting);
        Self {
            shipped: stream.shipped(),
            failure: stream.ended(),
            nudge: stream.nudger(),
            stop,
            task: Some(tokio::spawn(async move {
                let _ = counting.await;
            })),
        }
    }

    /// Starts shipping.
    #[must_use]
    pub fn start(shipping: Shipping, cancel: &CancellationToken) -> Self {
        let stop = cancel.child_token();
        let nudge = Arc::new(Notify::new());
        let start = shipping.first.start_lsn(shipping.transfer.segment_size);
        let (shipped_out, shipped) = watch::channel(start);
        let (failure_out, failure) = watch::channel(None);
        let mut run = Run {
            sql: shipping.sql.with_cancel(stop.clone()),
            shipping,
            nudge: Arc::clone(&nudge),
            shipped: shipped_out,
            cancel: stop.clone(),
        };
        let token = stop.clone();
        let task = tokio::spawn(async move {
            tokio::select! {
                biased;
                () = token.cancelled() => {}
                error = run.until_failure() => {
                    failure_out.send_replace(Some(error));
                }
            }
        });
        Self {
            shipped,
            failure,
            nudge,
            stop,
            task: Some(task),
        }
    }

    /// Waits until shipping fails; never returns while it goes on.
    pub async fn failed(&self) -> ApiError {
        let mut failure = self.failure.clone();
        let failed = failure.wait_for(Option::is_some).await;
        match failed.as_deref() {
            Ok(Some(error)) => error.clone(),
            _ if self.stop.is_cancelled() => ApiError::new(ErrorKind::Cancelled, "cancelled"),
            _ => ApiError::new(ErrorKind::Internal, "the task that ships WAL has panicked"),
        }
    }

    /// Looks at once whether there is something to ship.
    pub fn nudge(&self) {
        self.nudge.notify_one();
    }

    /// End of what is in the bucket, without a gap from the first segment on.
    #[must_use]
    pub fn shipped(&self) -> Lsn {
        *self.shipped.borrow()
    }

    /// Waits until everything before `lsn` is in the bucket.
    ///
    /// # Errors
    /// Why shipping failed.
    pub async fn wait_for(&self, lsn: Lsn) -> Result<(), ApiError> {
        let mut shipped = self.shipped.clone();
        tokio::select! {
            biased;
            Ok(_) = shipped.wait_for(|end| *end >= lsn) => Ok(()),
            error = self.failed() => Err(error),
        }
    }

    /// Stops and waits until nothing is under way, so that nobody uses the hold any more.
    pub async fn stop(mut self) {
        self.stop.cancel();
        if let Some(task) = self.task.take() {
            let abort = task.abort_handle();
            if tokio::time::timeout(STOP_GRACE, task).await.is_err() {
                abort.abort();
            }
        }
    }
}

impl Drop for Shipper {
    fn drop(&mut self) {
        self.stop.cancel();
    }
}

/// Counts segments from now on, until the stretch ends.
async fn count(mut shipped: watch::Receiver<Lsn>, size: SegmentSize, report: Reporter) {
    let mut counted = *shipped.borrow_and_update();
    while shipped.changed().await.is_ok() {
        let end = *shipped.borrow_and_update();
        report.wal_segments(end.bytes_since(counted) / size.bytes());
        counted = end;
    }
}

struct Run {
    sql: NodeConnection,
    shipping: Shipping,
    nudge: Arc<Notify>,
    shipped: watch::Sender<Lsn>,
    cancel: CancellationToken,
}

impl Run {
    async fn until_failure(&mut self) -> ApiError {
        loop {
            let (transfer, hold) = (&self.shipping.transfer, self.shipping.hold);
            let trouble = tokio::select! {
                biased;
                // First: a hold that has grown too much ends everything, whatever hangs.
                trouble = transfer.guard(&self.sql, hold) => trouble,
                trouble = self.ship() => trouble,
            };
            let error = match trouble {
                Ok(never) => match never {},
                Err(trouble) => ApiError::from(trouble),
            };
            if !self.sql.is_lost() {
                return error;
            }
            tracing::warn!(%error, "the session that ships WAL is opened again");
            match self.connect().await {
                Some(sql) => self.sql = sql,
                None => return error,
            }
        }
    }

    /// Opens a session in place of a lost one; `None` if the server does not come back in time.
    async fn connect(&self) -> Option<NodeConnection> {
        let tries = async {
            loop {
                let cancel = self.cancel.clone();
                match NodeConnection::connect(&self.shipping.options, cancel).await {
                    Ok(sql) => return Some(sql),
                    Err(SqlError::Unreachable { .. } | SqlError::Lost { .. }) => {}
                    Err(_) => return None,
                }
                tokio::time::sleep(RECONNECT_PAUSE).await;
            }
        };
        tokio::time::timeout(RESTART, tries).await.ok()?
    }

    async fn let_go(&self, name: SegmentName) -> Result<(), Trouble> {
        let transfer = &self.shipping.transfer;
        let Err(trouble) = transfer.let_go(&self.sql, name).await else {
            return Ok(());
        };
        // A slot that is gone is named as such, whichever statement meets it first.
        match transfer.keeper.kept_from(&self.sql).await {
            Err(gone @ Trouble::Gone(_)) => Err(gone),
            _ => Err(trouble),
        }
    }

    async fn ship(&self) -> Result<Infallible, Trouble> {
        let transfer = &self.shipping.transfer;
        transfer.histories().await?;
        let (size, timeline) = (transfer.segment_size, self.shipping.first.timeline);
        let shipped = *self.shipped.borrow();
        let mut next = SegmentName::of_lsn(timeline, shipped, size);
        loop {
            let position = self.sql.wal_position().await?;
            if position.timeline != timeline {
                let message = format!(
                    "the database changed from timeline {timeline} to {} during the backup",
                    position.timeline
                );
                let error = ApiError::new(ErrorKind::Database, message).next("start a new backup");
                return Err(error.into());
            }
            while position.flush >= next.end_lsn(size) {
                transfer.segment(&self.sql, next, &self.cancel).await?;
                self.let_go(next).await?;
                self.shipped.send_replace(next.end_lsn(size));
                self.shipping.report.wal_segments(1);
                next = next.next();
            }
            tokio::select! {
                () = self.nudge.notified() => {}
                () = tokio::time::sleep(PERIOD) => {}
            }
        }
    }
}
