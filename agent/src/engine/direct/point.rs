//! The restore point: made on the node, shipped, and then read back from the bucket, because only what the
//! bucket has can be recovered to.

use std::time::Duration;

use agent_api::{ApiError, BackupSpec, ErrorKind, MarkRequest, MarkResult};
use agent_sql::NodeConnection;
use agent_wal::{Lsn, SegmentName};
use catalog::model::{Extra, NodePoint};
use jiff::Timestamp;

use super::attempt::void;
use super::manifest::CopyInBucket;
use super::node::Node;
use super::readback;
use crate::engine::errors;
use crate::operation::OperationContext;
use crate::wal::ship::Shipper;

/// A switched segment is flushed at once; this is for a server that hangs.
const FLUSH_DEADLINE: Duration = Duration::from_mins(1);
const FLUSH_POLL: Duration = Duration::from_millis(100);

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
    ) -> Result<Self, ApiError> {
        let name = request.restore_point;
        let end = sql.create_restore_point(&name).await.map_err(errors::sql)?;
        let result = MarkResult {
            restore_point: name,
            end_lsn: end.to_string(),
            timeline,
            made: Timestamp::now(),
        };
        Ok(Self { result, end })
    }

    /// The segment that holds the end of its record.
    #[must_use]
    pub fn segment(&self, node: &Node) -> SegmentName {
        SegmentName::before_lsn(self.result.timeline, self.end, node.segment_size())
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
        let end = self.segment(node).end_lsn(node.segment_size());
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
        })??;
        shipper.nudge();
        shipper.wait_for(end).await
    }

    /// Reads the record back from the bucket.
    ///
    /// # Errors
    /// [`ErrorKind::Damaged`] if the bucket's WAL has no such record there.
    pub async fn prove(
        &self,
        cx: &OperationContext,
        spec: &BackupSpec,
        node: &Node,
        copy: &CopyInBucket,
    ) -> Result<NodePoint, ApiError> {
        if self.end <= copy.stop {
            return Err(void(format!(
                "the restore point at {} is not behind the end of the copy at {}",
                self.end, copy.stop
            )));
        }
        let size = node.segment_size();
        let wanted = readback::Wanted {
            node: spec.node_id,
            epoch: spec.epoch.clone(),
            system_identifier: node.control.system_identifier,
            size,
            first: copy.first_segment(node),
            last: self.segment(node),
            name: self.result.restore_point.clone(),
            end: self.end,
        };
        let record = readback::find(cx, &wanted).await?;
        Ok(NodePoint {
            node_id: spec.node_id,
            epoch: spec.epoch.clone(),
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
