//! The engine `probackup`: `gs_probackup` or `pg_probackup`, unmodified, writes its catalog into a mount of ours, and
//! what it writes streams into the bucket.
//!
//! What can be known before is looked at before ([`preflight`]). The program runs beside the mount until it ends, is
//! cancelled, stands still, or has become useless ([`run`]). Then the mount is taken away, the copy is sealed and held against
//! the program's own list of its files ([`content`]), and only then completed. WAL goes two ways at once: the program's
//! own stream, which its copy must have, and the agent's from the slot on, up to the restore point; no segment is sent twice.

mod archive;
mod arguments;
mod chain;
pub mod content;
pub mod control;
mod examine;
mod exclusive;
pub mod lines;
mod making;
pub mod preflight;
pub mod program;
pub mod run;
mod sink;
pub mod words;

use agent_api::ApiError;
use agent_wal::SegmentName;
use jiff::Timestamp;

pub use self::arguments::INSTANCE;
use self::making::Making;
use self::preflight::Prepared;
use super::attempt::{Attempt, void};
use super::errors;
use super::manifest::CopyInBucket;
use super::wal_hold::WalHold;
use crate::wal::ship::Shipper;

/// Has the program copy the node, and ships its WAL from before that on. The slot must be there.
///
/// # Errors
/// Whatever voids the attempt. Nothing of it is under way then, and nothing uses the slot.
pub(super) async fn copy(
    attempt: &Attempt<'_>,
    prepared: &Prepared,
) -> Result<(Shipper, CopyInBucket), ApiError> {
    let node = attempt.node;
    let position = node.sql.wal_position().await.map_err(errors::sql)?;
    let size = node.segment_size();
    let mut first = SegmentName::of_lsn(position.timeline, position.flush, size);
    // A hold that has just been taken begins in the middle of a segment. The backup begins behind that one: its start
    // goes on to the next segment first (do_pg_backup_start; openGauss's do_pg_start_backup).
    let kept = attempt.hold.held_from(&node.sql).await?;
    if kept.is_some_and(|kept| kept > first.start_lsn(size)) {
        first = first.next();
    }
    // openGauss ends a backup only when its WAL is shipped, and the copy gives its memory back when it has ended.
    let budget = &attempt.cx.budget;
    let budget = match attempt.hold {
        WalHold::Service(_) => budget.clone(),
        _ => budget
            .part(size.in_memory(), "shipping WAL")
            .map_err(errors::pipeline)?,
    };
    let shipper = attempt.ship(first, budget);
    let making = Making {
        attempt,
        prepared,
        shipper: &shipper,
        position,
        begun: Timestamp::now(),
    };
    match making.run().await {
        Ok(copy) if copy.first_segment(node) >= first => Ok((shipper, copy)),
        Ok(copy) => {
            shipper.stop().await;
            let message = format!(
                "the copy begins at {}, before the WAL that is held",
                copy.start
            );
            Err(void(message))
        }
        Err(error) => {
            shipper.stop().await;
            Err(error)
        }
    }
}
