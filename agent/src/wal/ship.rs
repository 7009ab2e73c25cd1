//! From `pg_wal` into the bucket, while a slot keeps the server from removing what is not there yet.
//!
//! A segment is whole once the flush position has passed its end. That a later file exists proves nothing: the
//! server renames old segments to names of the future before it writes them.

use std::convert::Infallible;
use std::fs::{self, File};
use std::io::{self, Read as _};
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use agent_api::{ApiError, ErrorKind};
use agent_sql::{ConnectOptions, NodeConnection, SqlError};
use agent_wal::segment::{self, Expected};
use agent_wal::{Lsn, SegmentName, SegmentSize};
use bytes::Bytes;
use catalog::error::CatalogError;
use catalog::ids::EpochId;
use catalog::wal::{WalFile, put_segment};
use pipeline::budget::Budget;
use pipeline::upload::Uploader;
use tokio::sync::{Notify, watch};
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

use super::hold::{HoldLimit, Room};
use crate::engine::errors;
use crate::operation::Reporter;

/// How often the server is asked how far it is.
const PERIOD: Duration = Duration::from_millis(500);
/// How often the hold is weighed against the room there is. Runs also while an upload is stuck.
const GUARD_PERIOD: Duration = Duration::from_secs(2);
/// How long the end of the task is waited for when it is told to stop.
const STOP_GRACE: Duration = Duration::from_secs(20);
/// The most a timeline history may have, in bytes.
const HISTORY_LIMIT: u64 = 1 << 20;

/// How long a lost session is opened again: the server may be restarting. The slot outlives that.
const RECONNECT_FOR: Duration = Duration::from_mins(1);
const RECONNECT_PAUSE: Duration = Duration::from_secs(1);

/// What to ship, and where to.
#[derive(Debug)]
pub struct Shipping {
    /// A session for this alone.
    pub sql: NodeConnection,
    /// How to log in again when it is lost.
    pub options: ConnectOptions,
    /// The slot that holds the WAL.
    pub slot: String,
    /// Data directory.
    pub pgdata: PathBuf,
    /// System identifier that every segment must carry.
    pub system_identifier: u64,
    /// Segment size.
    pub segment_size: SegmentSize,
    /// The first segment to ship; its timeline is the only one.
    pub first: SegmentName,
    /// The node.
    pub node: Uuid,
    /// Its epoch.
    pub epoch: EpochId,
    /// The way into the bucket.
    pub uploader: Uploader,
    /// zstd level.
    pub level: i32,
    /// A segment is read into memory taken from here.
    pub budget: Budget,
    /// The most that the slot may hold.
    pub hold: HoldLimit,
    /// For counting segments.
    pub report: Reporter,
}

/// WAL being shipped. Dropped, it stops.
#[derive(Debug)]
pub struct Shipper {
    shipped: watch::Receiver<Lsn>,
    failure: watch::Receiver<Option<ApiError>>,
    nudge: Arc<Notify>,
    stop: CancellationToken,
    task: Option<JoinHandle<()>>,
}

impl Shipper {
    /// Starts shipping.
    #[must_use]
    pub fn start(shipping: Shipping, cancel: &CancellationToken) -> Self {
        let stop = cancel.child_token();
        let nudge = Arc::new(Notify::new());
        let start = shipping.first.start_lsn(shipping.segment_size);
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

    /// Stops and waits until nothing is under way, so that nobody uses the slot any more.
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
            let error = tokio::select! {
                biased;
                // First: a hold that has grown too much ends everything, whatever hangs.
                error = self.guard() => error,
                error = self.ship() => error,
            };
            let error = match error {
                Ok(never) => match never {},
                Err(error) => error,
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
        tokio::time::timeout(RECONNECT_FOR, tries).await.ok()?
    }

    async fn guard(&self) -> Result<Infallible, ApiError> {
        let wal = self.wal_directory();
        loop {
            tokio::time::sleep(GUARD_PERIOD).await;
            let position = self.sql.wal_position().await.map_err(errors::sql)?;
            let slot = self.slot_state().await?;
            let directory = wal.clone();
            let room = blocking(move || Room::of(&directory)).await?;
            let room = room.map_err(|e| unreadable(&wal, &e))?;
            let restart = slot.restart_lsn.unwrap_or(position.insert);
            self.shipping.hold.check(restart, position.insert, room)?;
        }
    }

    async fn ship(&self) -> Result<Infallible, ApiError> {
        self.ship_histories().await?;
        let (size, timeline) = (self.shipping.segment_size, self.shipping.first.timeline);
        let shipped = *self.shipped.borrow();
        let mut next = SegmentName::of_lsn(timeline, shipped, size);
        loop {
            let position = self.sql.wal_position().await.map_err(errors::sql)?;
            if position.timeline != timeline {
                let message = format!(
                    "the database changed from timeline {timeline} to {} during the backup",
                    position.timeline
                );
                return Err(ApiError::new(ErrorKind::Database, message).next("start a new backup"));
            }
            while position.flush >= next.end_lsn(size) {
                self.ship_segment(next).await?;
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

    async fn ship_segment(&self, name: SegmentName) -> Result<(), ApiError> {
        let shipping = &self.shipping;
        let size = shipping.segment_size;
        let file_name = name.format(size);
        let path = self.wal_directory().join(&file_name);
        let bytes = usize::try_from(size.bytes()).unwrap_or(usize::MAX);
        let lease = shipping.budget.acquire(bytes, &self.cancel).await;
        let _lease = lease.map_err(errors::pipeline)?;
        let expected = Expected {
            system_identifier: shipping.system_identifier,
            segment_size: size,
            name,
            timelines: vec![name.timeline],
            major: None,
        };
        let read = {
            let path = path.clone();
            blocking(move || ReadSegment::read(&path, &expected)).await??
        };
        // Only now: what was read while it was held is what was written.
        let slot = self.slot_state().await?;
        if !slot.holds(name.start_lsn(size)) {
            let message = format!(
                "the slot `{}` no longer held the WAL segment {file_name} when it had been read (restart_lsn {}, \
                 wal_status {:?}): somebody moved it, or max_slot_wal_keep_size is too small",
                shipping.slot,
                slot.restart_lsn
                    .map_or_else(|| "none".into(), |lsn| lsn.to_string()),
                slot.wal_status,
            );
            return Err(void(message));
        }
        let inode = {
            let path = path.clone();
            blocking(move || fs::metadata(path).map(|metadata| metadata.ino())).await?
        };
        if inode.map_err(|e| unreadable(&path, &e))? != read.inode {
            let message = format!("the WAL segment {file_name} was replaced while it was read");
            return Err(void(message));
        }
        self.put(&file_name, read.bytes).await?;
        let end = name.end_lsn(size);
        let advanced = self.sql.advance_slot(&shipping.slot, end).await;
        advanced.map_err(errors::sql)
    }

    /// Timeline histories, all there are: a recovery that crosses timelines asks for each.
    async fn ship_histories(&self) -> Result<(), ApiError> {
        let directory = self.wal_directory();
        let histories = {
            let directory = directory.clone();
            blocking(move || histories(&directory)).await?
        };
        for (name, bytes) in histories.map_err(|e| unreadable(&directory, &e))? {
            self.put(&name, bytes).await?;
        }
        Ok(())
    }

    async fn put(&self, name: &str, bytes: Bytes) -> Result<(), ApiError> {
        let shipping = &self.shipping;
        let file = WalFile {
            node: shipping.node,
            epoch: shipping.epoch.clone(),
            name: name.parse().map_err(errors::internal)?,
        };
        let put = put_segment(&shipping.uploader, &file, shipping.level, &bytes[..]).await;
        put.map_err(|error| {
            let conflict = matches!(error, CatalogError::Conflict { .. });
            let error = errors::catalog(error);
            if conflict {
                return error.next(
                    "two databases write WAL under one name: this one is a copy of the node or was restored by \
                     other means; register it anew with --new-node",
                );
            }
            error
        })?;
        Ok(())
    }

    async fn slot_state(&self) -> Result<agent_sql::SlotState, ApiError> {
        let name = &self.shipping.slot;
        let slot = self.sql.slot(name).await.map_err(errors::sql)?;
        slot.ok_or_else(|| void(format!("somebody dropped the slot `{name}` of this backup")))
    }

    fn wal_directory(&self) -> PathBuf {
        self.shipping.pgdata.join("pg_wal")
    }
}

struct ReadSegment {
    bytes: Bytes,
    inode: u64,
}

impl ReadSegment {
    /// Reads a segment whole and checks that it is the one it should be.
    fn read(path: &Path, expected: &Expected) -> Result<Self, ApiError> {
        let size = expected.segment_size.bytes();
        let mut bytes = Vec::with_capacity(usize::try_from(size).unwrap_or_default());
        let inode = (|| {
            let file = File::open(path)?;
            let inode = file.metadata()?.ino();
            file.take(size + 1).read_to_end(&mut bytes)?;
            Ok(inode)
        })();
        let inode = inode.map_err(|e| unreadable(path, &e))?;
        segment::verify(&bytes, expected).map_err(|error| {
            let message = format!("`{}` is not the WAL it should be: {error}", path.display());
            ApiError::new(ErrorKind::Database, message)
        })?;
        Ok(Self {
            bytes: bytes.into(),
            inode,
        })
    }
}

fn histories(directory: &Path) -> io::Result<Vec<(String, Bytes)>> {
    let mut found = Vec::new();
    for entry in fs::read_dir(directory)? {
        let entry = entry?;
        let Ok(name) = entry.file_name().into_string() else {
            continue;
        };
        if SegmentName::parse_history_file(&name).is_none() {
            continue;
        }
        let mut bytes = Vec::new();
        File::open(entry.path())?
            .take(HISTORY_LIMIT)
            .read_to_end(&mut bytes)?;
        found.push((name, bytes.into()));
    }
    found.sort_unstable();
    Ok(found)
}

/// Runs what blocks in the file system away from the tasks.
async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> T + Send + 'static,
) -> Result<T, ApiError> {
    tokio::task::spawn_blocking(work)
        .await
        .map_err(errors::internal)
}

fn unreadable(path: &Path, error: &io::Error) -> ApiError {
    let message = format!("cannot read `{}`: {error}", path.display());
    ApiError::new(ErrorKind::Database, message)
}

fn void(message: String) -> ApiError {
    ApiError::new(ErrorKind::Database, message).next("start a new backup")
}
