//! The WAL that the service ships, as a backup or a point uses it.

use std::sync::Arc;
use std::time::Duration;

use agent_api::{ApiError, ErrorKind};
use agent_sql::NodeConnection;
use agent_wal::{Lsn, SegmentName, SegmentSize};
use catalog::ids::EpochId;
use tokio::sync::{Notify, watch};
use uuid::Uuid;

use crate::engine::errors;
use crate::wal::known::KnownSegments;

/// A switched segment is flushed at once; this is for a server that hangs.
const FLUSH_DEADLINE: Duration = Duration::from_mins(1);
const FLUSH_POLL: Duration = Duration::from_millis(100);

/// One unbroken stretch of WAL that is being shipped. Clones mean the same. It ends with a gap, a stop, a refusal; what waits
/// for it is told why then.
#[derive(Debug, Clone)]
pub struct WalStream {
    node: Uuid,
    epoch: EpochId,
    first: SegmentName,
    size: SegmentSize,
    shipped: watch::Receiver<Lsn>,
    ended: watch::Receiver<Option<ApiError>>,
    nudge: Arc<Notify>,
    known: Arc<KnownSegments>,
    based: Arc<Notify>,
}

/// The service's own end of a stream.
#[derive(Debug)]
pub(super) struct StreamSide {
    pub(super) shipped: watch::Sender<Lsn>,
    pub(super) ended: watch::Sender<Option<ApiError>>,
    pub(super) stream: WalStream,
}

impl StreamSide {
    /// A stretch from `first` on, of which everything before `shipped` is in the bucket.
    pub(super) fn new(
        (node, epoch): (Uuid, EpochId),
        (first, size): (SegmentName, SegmentSize),
        shipped: Lsn,
        based: Arc<Notify>,
    ) -> Self {
        let (shipped, seen) = watch::channel(shipped);
        let (ended, end) = watch::channel(None);
        let stream = WalStream {
            node,
            epoch,
            first,
            size,
            shipped: seen,
            ended: end,
            nudge: Arc::default(),
            known: Arc::default(),
            based,
        };
        Self {
            shipped,
            ended,
            stream,
        }
    }

    /// Tells whoever waits that it is over.
    pub(super) fn end(&self, why: ApiError) {
        self.ended.send_if_modified(|ended| {
            let first = ended.is_none();
            ended.get_or_insert(why);
            first
        });
    }
}

impl WalStream {
    /// The node.
    #[must_use]
    pub fn node(&self) -> Uuid {
        self.node
    }

    /// Its epoch.
    #[must_use]
    pub fn epoch(&self) -> &EpochId {
        &self.epoch
    }

    /// First segment of the stretch: WAL is in the bucket from its beginning to [`Self::shipped`] without a gap.
    #[must_use]
    pub fn first_segment(&self) -> SegmentName {
        self.first
    }

    /// Beginning of that segment.
    #[must_use]
    pub fn start(&self) -> Lsn {
        self.first.start_lsn(self.size)
    }

    /// Timeline of the stretch.
    #[must_use]
    pub fn timeline(&self) -> u32 {
        self.first.timeline
    }

    /// WAL segment size.
    #[must_use]
    pub fn segment_size(&self) -> SegmentSize {
        self.size
    }

    /// End of what is in the bucket; only grows.
    #[must_use]
    pub fn shipped(&self) -> watch::Receiver<Lsn> {
        self.shipped.clone()
    }

    /// Why the stretch is over; `None`: it goes on.
    #[must_use]
    pub fn ended(&self) -> watch::Receiver<Option<ApiError>> {
        self.ended.clone()
    }

    /// Segments that are known to be in the bucket. Who puts one by another way adds it here.
    #[must_use]
    pub fn known(&self) -> &Arc<KnownSegments> {
        &self.known
    }

    /// Looks at once whether there is something to ship.
    pub fn nudge(&self) {
        self.nudge.notify_one();
    }

    /// What [`Self::nudge`] notifies.
    pub(crate) fn nudger(&self) -> Arc<Notify> {
        Arc::clone(&self.nudge)
    }

    /// Waits until everything before `lsn` is in the bucket. Has no deadline: the caller has one.
    ///
    /// # Errors
    /// Why the stretch is over.
    pub async fn wait_for(&self, lsn: Lsn) -> Result<(), ApiError> {
        let (mut shipped, mut ended) = (self.shipped(), self.ended());
        tokio::select! {
            biased;
            Ok(_) = shipped.wait_for(|end| *end >= lsn) => Ok(()),
            over = ended.wait_for(Option::is_some) => {
                let why = over.ok().and_then(|over| (*over).clone());
                Err(why.unwrap_or_else(stopped))
            }
        }
    }

    /// Sees to it that the segment that holds the byte before `lsn` becomes whole, and waits until it is in the bucket.
    ///
    /// # Errors
    /// Of the database; [`ErrorKind::Timeout`] if it does not flush; why the stretch is over.
    pub async fn switch_and_ship(&self, sql: &NodeConnection, lsn: Lsn) -> Result<(), ApiError> {
        let segment = SegmentName::before_lsn(self.timeline(), lsn, self.size);
        let end = segment.end_lsn(self.size);
        flushed(sql, end).await?;
        self.nudge();
        self.wait_for(end).await
    }

    /// Notes that a base backup which begins in this stretch is in the bucket: no other is wanted.
    pub fn based(&self) {
        self.based.notify_one();
    }
}

/// Has the server go on to the segment that begins at `end` or a later one, and waits until all before it is on disk.
///
/// # Errors
/// Of the database; [`ErrorKind::Timeout`].
pub(crate) async fn flushed(sql: &NodeConnection, end: Lsn) -> Result<(), ApiError> {
    if sql.flush_lsn().await.map_err(errors::sql)? < end {
        sql.switch_wal().await.map_err(errors::sql)?;
    }
    let flushed = async {
        while sql.flush_lsn().await.map_err(errors::sql)? < end {
            tokio::time::sleep(FLUSH_POLL).await;
        }
        Ok(())
    };
    let in_time = tokio::time::timeout(FLUSH_DEADLINE, flushed).await;
    in_time.map_err(|_| {
        let message = format!(
            "the database did not flush its WAL up to {end} within {} s of the switch to the next segment",
            FLUSH_DEADLINE.as_secs()
        );
        ApiError::new(ErrorKind::Timeout, message)
    })?
}

/// A stretch whose service has gone without a word.
fn stopped() -> ApiError {
    ApiError::new(
        ErrorKind::Cancelled,
        "the agent ships WAL no more: it is being stopped",
    )
}
