//! The restore point: made on the node, shipped, and then read back from the bucket, because only what the
//! bucket has can be recovered to.

use agent_api::{ApiError, ErrorKind, MarkRequest, MarkResult, Phase};
use agent_sql::{NodeConnection, SqlError};
use agent_wal::{Lsn, SegmentName};
use catalog::ids::EpochId;
use catalog::model::{Extra, NodePoint};
use jiff::Timestamp;
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

use super::attempt::void;
use super::node::Node;
use super::readback;
use crate::operation::OperationContext;
use crate::wal::service::flushed;
use crate::wal::ship::Shipper;

/// What restore points are made on: a copy that waits for one, or a stretch of WAL that is shipped all the time.
#[derive(Debug)]
pub struct Ground<'a> {
    /// The operation.
    pub cx: &'a OperationContext,
    /// Ends all of it.
    pub work: &'a CancellationToken,
    /// The node.
    pub node: &'a Node,
    /// Its id.
    pub node_id: Uuid,
    /// Its epoch.
    pub epoch: EpochId,
    /// The timeline that its WAL is of.
    pub timeline: u32,
    /// First segment in the bucket: from there on nothing is missing.
    pub first: SegmentName,
    /// A point has to lie behind this, and what that is.
    pub after: (Lsn, &'static str),
    /// The phase that says that points can be made.
    pub ready: Phase,
}

/// Reads a position that a client gives.
///
/// # Errors
/// If it is none.
pub(super) fn position(text: &str) -> Result<Lsn, ApiError> {
    text.parse().map_err(|_| {
        let message = format!("`{text}` is no position in the WAL");
        ApiError::new(ErrorKind::Usage, message)
    })
}

/// A restore point that was made.
#[derive(Debug, Clone)]
pub struct Marked {
    /// What the client was told.
    pub result: MarkResult,
    /// End of its record.
    pub end: Lsn,
}

impl Marked {
    /// Makes a restore point. Fast: the cluster may be locked meanwhile. Its record is not flushed yet.
    ///
    /// # Errors
    /// Of the statement.
    pub async fn make(
        sql: &NodeConnection,
        request: MarkRequest,
        timeline: u32,
    ) -> Result<Self, SqlError> {
        let name = request.restore_point;
        let end = sql.create_restore_point(&name).await?;
        let result = MarkResult {
            restore_point: name,
            end_lsn: end.to_string(),
            timeline,
            made: Timestamp::now(),
        };
        Ok(Self { result, end })
    }

    /// One that was made before.
    ///
    /// # Errors
    /// If where it ends is no position.
    pub fn known(result: MarkResult) -> Result<Self, ApiError> {
        let end = position(&result.end_lsn)?;
        Ok(Self { result, end })
    }

    /// The segment that holds the end of its record.
    #[must_use]
    pub fn segment(&self, node: &Node) -> SegmentName {
        SegmentName::before_lsn(self.result.timeline, self.end, node.segment_size())
    }

    /// Sees to it that the record's segment becomes whole, and waits until it is on disk: no crash of the server loses it then.
    ///
    /// # Errors
    /// Of the database.
    pub async fn flush(&self, node: &Node, sql: &NodeConnection) -> Result<(), ApiError> {
        let end = self.segment(node).end_lsn(node.segment_size());
        flushed(sql, end).await
    }

    /// Sees to it that the record's segment becomes whole, and waits until it is in the bucket.
    ///
    /// # Errors
    /// Of the database, or why shipping failed.
    pub async fn ship(
        &self,
        node: &Node,
        sql: &NodeConnection,
        shipper: &Shipper,
    ) -> Result<(), ApiError> {
        self.flush(node, sql).await?;
        shipper.nudge();
        let end = self.segment(node).end_lsn(node.segment_size());
        shipper.wait_for(end).await
    }

    /// Reads the record back from the bucket.
    ///
    /// # Errors
    /// [`agent_api::ErrorKind::Damaged`] if the bucket's WAL has no such record there.
    pub async fn prove(&self, ground: &Ground<'_>) -> Result<NodePoint, ApiError> {
        let (after, what) = ground.after;
        if self.end <= after {
            let message = format!(
                "the restore point at {} is not behind {what} at {after}",
                self.end
            );
            return Err(void(message));
        }
        let node = ground.node;
        let size = node.segment_size();
        let wanted = readback::Wanted {
            node: ground.node_id,
            epoch: ground.epoch.clone(),
            system_identifier: node.control.system_identifier,
            size,
            first: ground.first,
            last: self.segment(node),
            name: self.result.restore_point.clone(),
            end: self.end,
        };
        let record = readback::find(ground.cx, &wanted).await?;
        Ok(NodePoint {
            node_id: ground.node_id,
            epoch: ground.epoch.clone(),
            timeline: self.result.timeline,
            restore_point: self.result.restore_point.clone(),
            record_lsn: record.to_string(),
            end_lsn: self.end.to_string(),
            made: self.result.made,
            wal_first: wanted.first.format(size),
            wal_last: wanted.last.format(size),
            extra: Extra::new(),
        })
    }
}
