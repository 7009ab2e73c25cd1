//! How long the cluster may be locked within an hour.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use tokio::time::Instant;

/// What the cap is counted over.
pub(super) const HOUR: Duration = Duration::from_hours(1);

/// A cap on locked time, and what has been used of it. One for as long as the program runs; clones share it.
#[derive(Debug, Clone)]
pub(crate) struct Budget(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    cap: Duration,
    /// Whether it knows of locks before this program's.
    begun: AtomicBool,
    /// When it was spent, and how much.
    spent: Mutex<VecDeque<(Instant, Duration)>>,
}

impl Budget {
    /// Nothing of `cap` is used.
    pub(crate) fn new(cap: Duration) -> Self {
        Self(Arc::new(Inner {
            cap,
            begun: AtomicBool::new(false),
            spent: Mutex::default(),
        }))
    }

    /// Whether it has still to be told of locks before this program's. Answers `true` once.
    pub(super) fn begins(&self) -> bool {
        !self.0.begun.swap(true, Ordering::Relaxed)
    }

    /// Milliseconds that are allowed in an hour.
    pub(super) fn cap_ms(&self) -> u64 {
        u64::try_from(self.0.cap.as_millis()).unwrap_or(u64::MAX)
    }

    /// Somebody has locked the cluster for `held`, at `at`; `None`: longer ago than this machine's clock knows.
    pub(super) fn spend(&self, held: Duration, at: Option<Instant>) {
        let mut spent = self.0.spent.lock().unwrap_or_else(PoisonError::into_inner);
        spent.extend(at.map(|at| (at, held)));
    }

    /// Whether a lock of at most `longest` stays below the cap now.
    pub(super) fn allows(&self, longest: Duration, now: Instant) -> bool {
        let mut spent = self.0.spent.lock().unwrap_or_else(PoisonError::into_inner);
        spent.retain(|(at, _)| now.saturating_duration_since(*at) < HOUR);
        let used: Duration = spent.iter().map(|(_, held)| *held).sum();
        used + longest <= self.0.cap
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    #[test]
    fn what_is_older_than_an_hour_is_free_again() {
        let (budget, now) = (Budget::new(SECOND * 5), Instant::now());
        assert!(budget.allows(SECOND * 5, now) && !budget.allows(SECOND * 6, now));
        budget.spend(SECOND * 2, Some(now));
        budget.spend(SECOND * 2, Some(now + HOUR / 2));
        budget.spend(SECOND * 9, None);
        let later = now + HOUR / 2;
        assert!(budget.allows(SECOND, later) && !budget.allows(SECOND * 2, later));
        let later = now + HOUR;
        assert!(budget.allows(SECOND * 3, later) && !budget.allows(SECOND * 4, later));
        assert!(budget.allows(SECOND * 5, now + HOUR * 2));
    }
}
