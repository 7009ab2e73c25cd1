//! Time, as a trait: a model has its own.

use std::pin::pin;
use std::time::Duration;

use futures_util::future::{Either, select};
use tokio::time::Instant;

/// A clock that never goes back.
pub(super) trait Clock {
    /// The time since some moment in the past.
    fn now(&self) -> Duration;

    /// Returns so much later.
    fn sleep(&self, how_long: Duration) -> impl Future<Output = ()>;

    /// Does `work`, or drops it after `how_long`.
    fn within<T>(
        &self,
        how_long: Duration,
        work: impl Future<Output = T>,
    ) -> impl Future<Output = Option<T>> {
        async move {
            match select(pin!(work), pin!(self.sleep(how_long))).await {
                Either::Left((done, _)) => Some(done),
                Either::Right(_) => None,
            }
        }
    }
}

/// This machine's.
#[derive(Debug, Clone, Copy)]
pub(super) struct Monotonic(Instant);

impl Monotonic {
    /// One that begins now.
    pub(super) fn start() -> Self {
        Self(Instant::now())
    }
}

impl Clock for Monotonic {
    fn now(&self) -> Duration {
        self.0.elapsed()
    }

    async fn sleep(&self, how_long: Duration) {
        tokio::time::sleep(how_long).await;
    }
}
