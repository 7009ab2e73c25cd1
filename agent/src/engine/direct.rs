//! The direct engine: reads the data directory in place between backup start and stop, as pgBackRest and WAL-G do.
//!
//! Two sessions and a hold: one session holds the backup open, the other ships the WAL that is held.

pub mod attempt;
pub mod copy;
pub mod exclude;
pub mod pages;
pub mod walk;

use agent_api::ApiError;

use super::attempt::Attempt;
use super::manifest::CopyInBucket;
use crate::wal::ship::Shipper;

/// Copies the node and ships its WAL from the backup's start on.
///
/// # Errors
/// Whatever voids the attempt. Nothing of it is under way then, and nothing uses the hold.
pub(super) async fn copy(attempt: &Attempt<'_>) -> Result<(Shipper, CopyInBucket), ApiError> {
    let started = attempt.start().await?;
    let shipper = attempt.ship(
        started.first_segment(attempt.node),
        attempt.cx.budget.clone(),
    );
    match attempt.copy(started, &shipper).await {
        Ok(copy) => Ok((shipper, copy)),
        Err(error) => {
            shipper.stop().await;
            Err(error)
        }
    }
}
