//! A limit on the processor time that the threads of a copy take together, which can be changed while they work.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Weak};
use std::time::Duration;

use rustix::time::{ClockId, clock_gettime};

use crate::throttle::Throttle;

/// What the [lanes](crate::pack::Lane) of one copy may take of the processors, in all: a thread pays for the frame that it made before
/// it begins the next one. It holds nothing then that anybody else might wait for, other than a thread that the kernel is told to run
/// last, which stops wherever it is.
#[derive(Debug, Clone)]
pub struct Pace {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    /// Its bytes are nanoseconds.
    throttle: Throttle,
    spent: AtomicU64,
}

/// A [`Pace`], as long as a copy has it.
#[derive(Debug)]
pub struct WeakPace(Weak<Shared>);

impl WeakPace {
    /// The pace, if it is still somebody's.
    #[must_use]
    pub fn upgrade(&self) -> Option<Pace> {
        self.0.upgrade().map(|shared| Pace { shared })
    }
}

impl Default for Pace {
    /// No limit.
    fn default() -> Self {
        Self {
            shared: Arc::new(Shared {
                throttle: Throttle::new(None),
                spent: AtomicU64::new(0),
            }),
        }
    }
}

impl Pace {
    /// The limit from now on, in cores (0.5: half of one core's time); `None`: none.
    pub fn limit(&self, cores: Option<f64>) {
        match cores {
            Some(cores) => self.shared.throttle.retune(nanos(cores)),
            None if self.is_limited() => self.shared.throttle.set_rate(None),
            None => {}
        }
    }

    /// Processor time that was taken so far.
    #[must_use]
    pub fn spent(&self) -> Duration {
        Duration::from_nanos(self.shared.spent.load(Ordering::Relaxed))
    }

    /// For those who must not keep it alive.
    #[must_use]
    pub fn downgrade(&self) -> WeakPace {
        WeakPace(Arc::downgrade(&self.shared))
    }

    fn is_limited(&self) -> bool {
        self.shared.throttle.rate().is_some()
    }

    /// Counts what was taken; whether it has to be [paid](Self::pay) for.
    pub(crate) fn spend(&self, taken: Duration) -> bool {
        let nanos = u64::try_from(taken.as_nanos()).unwrap_or(u64::MAX);
        self.shared.spent.fetch_add(nanos, Ordering::Relaxed);
        self.is_limited()
    }

    /// Waits until what was taken may be. May be dropped.
    pub(crate) async fn pay(&self, taken: Duration) {
        let nanos = u64::try_from(taken.as_nanos()).unwrap_or(u64::MAX);
        self.shared.throttle.take(nanos).await;
    }
}

#[expect(
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "a float is cut to what fits, and below zero is nothing"
)]
fn nanos(cores: f64) -> u64 {
    (cores * 1e9) as u64
}

/// Processor time of the calling thread so far.
pub(crate) fn thread_time() -> Duration {
    let time = clock_gettime(ClockId::ThreadCPUTime);
    Duration::try_from(time).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use std::time::Instant;

    use super::*;

    #[test]
    fn a_thread_pays_for_what_it_took_and_for_nothing_without_a_limit() {
        let pace = Pace::default();
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_time()
            .build()
            .unwrap();
        let second = Duration::from_secs(1);
        let begun = Instant::now();
        assert!(!pace.spend(second * 20));
        runtime.block_on(pace.pay(second * 20));
        assert!(begun.elapsed() < second * 10, "there is no limit");
        // A fifth of a core: 20 ms of work are paid for in 100 ms, by whoever comes next.
        let begun = Instant::now();
        pace.limit(Some(0.2));
        for _ in 0..4 {
            assert!(pace.spend(second / 50));
            runtime.block_on(pace.pay(second / 50));
        }
        let took = begun.elapsed();
        assert!(took >= second * 3 / 10, "{took:?}");
        assert_eq!(pace.spent(), second * 20 + second * 4 / 50);
        pace.limit(None);
        assert!(!pace.spend(second));
    }

    #[test]
    fn only_work_counts_as_processor_time() {
        let before = thread_time();
        std::thread::park_timeout(Duration::from_millis(30));
        let slept = thread_time().saturating_sub(before);
        assert!(slept < Duration::from_millis(25), "{slept:?}");
        let mut sum = 0_u64;
        while thread_time().saturating_sub(before) < Duration::from_millis(30) {
            sum = std::hint::black_box(sum.wrapping_add(1));
        }
    }

    #[test]
    fn a_pace_ends_with_its_copy() {
        let pace = Pace::default();
        let weak = pace.downgrade();
        assert!(weak.upgrade().is_some());
        drop(pace);
        assert!(weak.upgrade().is_none());
    }
}
