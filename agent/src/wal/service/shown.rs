//! How the service stands, for people and for operations that want to follow it.

use std::time::Instant;

use agent_api::{ApiError, ErrorKind, WalGap, WalState, WalStatus};
use agent_wal::Lsn;
use catalog::ids::EpochId;
use uuid::Uuid;

use super::{NEW_BASE, WalService, WalStream};

/// What is shown of it beside what is kept.
#[derive(Debug, Default, Clone)]
pub(super) struct Shown {
    pub(super) running: bool,
    pub(super) flushed: Option<Lsn>,
    pub(super) held: Option<u64>,
    /// Since when whole segments have been waiting.
    pub(super) behind: Option<Instant>,
    pub(super) error: Option<ApiError>,
}

impl WalService {
    /// How it stands.
    #[must_use]
    pub fn status(&self) -> WalStatus {
        let state = self.shared.state();
        let Some(saved) = &state.saved else {
            let error = state.shown.error.clone();
            return WalStatus {
                last_error: error.as_ref().map(|error| error.message.clone()),
                error_kind: error.as_ref().map(|error| error.kind),
                next: error.and_then(|error| error.next),
                ..WalStatus::off()
            };
        };
        let shown = &state.shown;
        let shipped = saved.stretch.map(|stretch| stretch.shipped());
        let broken = saved.broken.as_ref().map(|broken| WalGap {
            from: broken.from.clone(),
            to: None,
            why: broken.why.clone(),
            at: broken.at,
        });
        let error = match &saved.refused {
            Some(refused) => Some(refused.error()),
            None => shown.error.clone(),
        };
        let wanted = saved.wants_base.then(|| NEW_BASE.to_owned());
        WalStatus {
            state: match (&saved.refused, &saved.stretch, &saved.broken) {
                (Some(_), ..) => WalState::Refused,
                (None, None, Some(_)) => WalState::Gap,
                (None, Some(_), _) if shown.running => WalState::Running,
                _ => WalState::Waiting,
            },
            node_id: Some(saved.node),
            epoch: Some(saved.epoch.clone()),
            repository: Some(saved.place()),
            slot: saved.slot.clone(),
            first: saved.stretch.and_then(|stretch| {
                let size = stretch.size()?;
                Some(stretch.first().format(size))
            }),
            shipped_to: shipped.map(|lsn| lsn.to_string()),
            flushed_to: shown.flushed.map(|lsn| lsn.to_string()),
            lag_bytes: shipped
                .zip(shown.flushed)
                .map(|(shipped, flushed)| flushed.bytes_since(shipped)),
            lag_seconds: shown
                .behind
                .map(|since| since.elapsed().as_secs())
                .or(saved.stretch.map(|_| 0)),
            held_bytes: shown.held,
            since: Some(saved.since),
            last_error: error.as_ref().map(|error| error.message.clone()),
            error_kind: error.as_ref().map(|error| error.kind),
            next: error.and_then(|error| error.next).or(wanted),
            gap: broken.or_else(|| saved.gap.clone()),
            wants_base: saved.wants_base,
        }
    }

    /// The stretch that is being shipped into that epoch of that node, if it is.
    ///
    /// # Errors
    /// [`ErrorKind::Conflict`] if it is off, for another node or epoch, waiting for its beginning, in a gap, or refused, with
    /// what to do.
    pub fn stream(&self, node: Uuid, epoch: &EpochId) -> Result<WalStream, ApiError> {
        let status = self.status();
        let state = self.shared.state();
        let refuse = |why: String, next: &str| {
            let message = format!("WAL of node {node} is not shipped all the time: {why}");
            Err(ApiError::new(ErrorKind::Conflict, message).next(next))
        };
        let start = "gs_pitr backup, or gs_pitr wal start";
        let Some(saved) = &state.saved else {
            return refuse("the agent was not told to".to_owned(), start);
        };
        if saved.node != node || saved.epoch != *epoch {
            let why = format!(
                "the agent ships that of node {}, epoch {}",
                saved.node, saved.epoch
            );
            return refuse(why, start);
        }
        if let Some(side) = &state.side {
            return Ok(side.stream.clone());
        }
        let why = status
            .last_error
            .unwrap_or_else(|| "it is just beginning".to_owned());
        let next = status.next.unwrap_or_else(|| "try again".to_owned());
        refuse(format!("{} ({why})", status.state), &next)
    }
}
