//! Requests about watchdogs.

use std::time::Duration;

use reqwest::Method;
use uuid::Uuid;

use crate::client::AgentClient;
use crate::error::ApiError;
use crate::watchdog::{ArmWatchdog, DisarmWatchdog, LockOutcome, StartWatchdog, WatchdogStatus};

/// Longest wait for the log-ins to all proxies.
const LOG_IN: Duration = Duration::from_secs(20);
/// Longest wait for an answer while a lock may be held.
const PROMPT: Duration = Duration::from_secs(5);

impl AgentClient {
    /// Has the agent log in to the proxies. Which of them it cannot reach stands in the answer.
    ///
    /// # Errors
    /// As [`Self::health`]; [`crate::ErrorKind::Conflict`] if the agent has too many watchdogs, or one of this id that is another.
    pub async fn watchdog_start(
        &self,
        request: &StartWatchdog,
    ) -> Result<WatchdogStatus, ApiError> {
        self.send("/watchdogs", request, LOG_IN).await
    }

    /// Arms it: from now on it fires after the deadline unless it is disarmed. If the answer is lost, disarm it.
    ///
    /// # Errors
    /// As [`Self::health`]; [`crate::ErrorKind::Conflict`] unless every earlier attempt is settled, if it was to be renewed and has fired, and
    /// if it was to be alone and is not; [`crate::ErrorKind::Database`] if it has a session with no proxy.
    pub async fn watchdog_arm(
        &self,
        id: Uuid,
        request: &ArmWatchdog,
    ) -> Result<WatchdogStatus, ApiError> {
        self.send(&format!("/watchdogs/{id}/arm"), request, PROMPT)
            .await
    }

    /// Disarms it. One that has fired says so, and goes on until its rule is met.
    ///
    /// # Errors
    /// As [`Self::health`].
    pub async fn watchdog_disarm(
        &self,
        id: Uuid,
        attempt: u32,
        lock: LockOutcome,
    ) -> Result<WatchdogStatus, ApiError> {
        let request = DisarmWatchdog { attempt, lock };
        self.send(&format!("/watchdogs/{id}/disarm"), &request, PROMPT)
            .await
    }

    /// How it stands.
    ///
    /// # Errors
    /// As [`Self::health`].
    pub async fn watchdog(&self, id: Uuid) -> Result<WatchdogStatus, ApiError> {
        self.ask(Method::GET, &format!("/watchdogs/{id}"), PROMPT)
            .await
    }

    /// All watchdogs of the agent. Asking about all keeps none from being forgotten.
    ///
    /// # Errors
    /// As [`Self::health`].
    pub async fn watchdogs(&self) -> Result<Vec<WatchdogStatus>, ApiError> {
        self.ask(Method::GET, "/watchdogs", PROMPT).await
    }

    /// Has the agent log out and forget it, its password with it.
    ///
    /// # Errors
    /// As [`Self::health`]; [`crate::ErrorKind::Conflict`] while it is armed or has fired and is not settled.
    pub async fn watchdog_end(&self, id: Uuid) -> Result<WatchdogStatus, ApiError> {
        self.ask(Method::DELETE, &format!("/watchdogs/{id}"), PROMPT)
            .await
    }
}
