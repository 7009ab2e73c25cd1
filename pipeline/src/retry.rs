//! Doing it again, a bounded number of times, when that can help.

use std::time::Duration;

use tokio_util::sync::CancellationToken;

use crate::error::PipelineError;
use crate::store::{Retry, StoreError};

/// How often and how patiently a store call is repeated at this level. The backend repeats on its own
/// too, within seconds; this is for a store that is away for longer.
#[derive(Debug, Clone, Copy)]
pub struct RetryPolicy {
    /// Attempts in all, at least 1.
    pub attempts: u32,
    /// Pause before the second attempt; doubled each time, and jittered to between half and all of it.
    pub first_pause: Duration,
    /// Longest pause.
    pub longest_pause: Duration,
}

impl Default for RetryPolicy {
    fn default() -> Self {
        Self {
            attempts: 6,
            first_pause: Duration::from_millis(250),
            longest_pause: Duration::from_secs(8),
        }
    }
}

impl RetryPolicy {
    /// The pause after failed attempt number `attempt` (from 1).
    pub(crate) fn pause(&self, attempt: u32) -> Duration {
        let doubled = self.first_pause.saturating_mul(1 << (attempt - 1).min(16));
        let pause = doubled.min(self.longest_pause);
        pause.mul_f64(rand::random_range(0.5..=1.0))
    }

    /// Runs `call` until it succeeds, `again` says that repeating does not help, or the attempts are
    /// used up.
    ///
    /// # Errors
    /// The last error, or `Cancelled`.
    pub(crate) async fn run<T, F: Future<Output = Result<T, StoreError>>>(
        &self,
        cancel: &CancellationToken,
        again: fn(&StoreError) -> bool,
        mut call: impl FnMut() -> F,
    ) -> Result<T, PipelineError> {
        let mut attempt = 1;
        loop {
            let error = match or_cancelled(cancel, call()).await? {
                Ok(value) => return Ok(value),
                Err(error) => error,
            };
            if attempt >= self.attempts || !again(&error) {
                return Err(error.into());
            }
            let pause = self.pause(attempt);
            tracing::info!(attempt, ?pause, %error, "store call is repeated");
            or_cancelled(cancel, tokio::time::sleep(pause)).await?;
            attempt += 1;
        }
    }
}

/// Whether nothing was done and the same may succeed later.
pub(crate) fn transient(error: &StoreError) -> bool {
    error.retry() == Retry::Transient
}

/// For calls that may be repeated whatever the last one did.
pub(crate) fn repeatable(error: &StoreError) -> bool {
    error.retry() != Retry::Permanent
}

/// Waits for `future` unless `cancel` fires first.
///
/// # Errors
/// `Cancelled`.
pub(crate) async fn or_cancelled<F: Future>(
    cancel: &CancellationToken,
    future: F,
) -> Result<F::Output, PipelineError> {
    tokio::select! {
        biased;
        () = cancel.cancelled() => Err(PipelineError::Cancelled),
        output = future => Ok(output),
    }
}
