//! One try to copy a node, whatever makes the copy.

use std::sync::Arc;
use std::time::Duration;

use agent_api::{ApiError, BackupSpec, ErrorKind};
use agent_wal::SegmentName;
use catalog::keys;
use pipeline::budget::Budget;
use pipeline::pack::{Lane, PACK_SIZE, PackOptions, PackSet};
use pipeline::upload::Uploader;
use tokio_util::sync::CancellationToken;

use super::node::Node;
use super::pace;
use super::wal_hold::WalHold;
use crate::engine::errors;
use crate::operation::OperationContext;
use crate::wal::hold::HoldLimit;
use crate::wal::known::KnownSegments;
use crate::wal::ship::{Shipper, Shipping, wal_directory};
use crate::wal::transfer::Transfer;

/// More lanes than this gain nothing: the store is the limit then.
pub const LANES: u32 = 4;
/// How long memory for them is waited for: shipping WAL holds a large segment's worth of it for moments.
const PATIENCE: Duration = Duration::from_secs(30);

/// What an attempt has to work with.
#[derive(Debug)]
pub struct Attempt<'a> {
    /// The operation.
    pub cx: &'a OperationContext,
    /// What it was asked.
    pub spec: &'a BackupSpec,
    /// The node.
    pub node: &'a Node,
    /// What holds its WAL.
    pub hold: &'a WalHold,
    /// The way into the bucket.
    pub uploader: &'a Uploader,
    /// Ends this attempt and everything in it.
    pub work: &'a CancellationToken,
    /// WAL that it has put into the bucket.
    pub known: Arc<KnownSegments>,
}

impl Attempt<'_> {
    /// Ships WAL from the segment `first` on, by way of what is free of `budget` then. The hold must reach back to it. Where the agent
    /// ships WAL all the time, that is followed.
    #[must_use]
    pub fn ship(&self, first: SegmentName, budget: Budget) -> Shipper {
        if let WalHold::Service(stream) = self.hold {
            return Shipper::follow(stream, &self.cx.report);
        }
        let node = self.node;
        let segment_size = node.segment_size();
        let transfer = Transfer {
            keeper: self.hold.keeper(),
            directory: node.pgdata.join(wal_directory(node.facts.flavour)),
            system_identifier: node.control.system_identifier,
            segment_size,
            node: self.spec.node_id,
            epoch: self.spec.epoch.clone(),
            uploader: self.uploader.clone(),
            level: self.spec.level,
            budget,
            known: Arc::clone(&self.known),
        };
        let shipping = Shipping {
            sql: node.sql.clone(),
            options: node.options.clone(),
            first,
            transfer,
            hold: HoldLimit {
                limit: self.cx.config.wal_hold,
                segment_size: segment_size.bytes(),
            },
            report: self.cx.report.clone(),
        };
        Shipper::start(shipping, self.work)
    }

    /// Opens the packs of this attempt, with at most `most` lanes, and fewer where others keep the memory.
    ///
    /// # Errors
    /// As [`PackSet::within`].
    pub async fn packs(&self, most: u32) -> Result<(PackSet, Vec<Lane>), ApiError> {
        let (backup, node, attempt) = (
            self.spec.backup_id.clone(),
            self.spec.node_id,
            self.spec.attempt,
        );
        let key_of = Arc::new(move |number| keys::pack(&backup, node, attempt, number));
        let lanes = self.spec.jobs.clamp(1, most.clamp(1, LANES));
        let options = PackOptions {
            lanes: lanes as usize,
            level: self.spec.level,
            pack_size: PACK_SIZE,
        };
        let packs = PackSet::within(PATIENCE, self.uploader, key_of, options).await;
        let (packs, mut lanes) = packs.map_err(errors::pipeline)?;
        if lanes.len() < options.lanes {
            let (found, wanted) = (lanes.len(), options.lanes);
            self.cx.report.warning(format!(
                "memory for {found} of {wanted} lanes was free: the copy takes longer; pitr-agent --memory sets how much there is"
            ));
        }
        if self.spec.pace.is_gentle() {
            let pace = pace::gentle(&self.node.pgdata, &self.cx.report);
            for lane in &mut lanes {
                lane.set_pace(pace.clone());
            }
        }
        Ok((packs, lanes))
    }
}

/// An attempt that is worth nothing.
pub(super) fn void(message: String) -> ApiError {
    ApiError::new(ErrorKind::Database, message)
        .next("start a new backup")
        .passing()
}

pub(super) fn cancelled() -> ApiError {
    ApiError::new(ErrorKind::Cancelled, "cancelled")
}
