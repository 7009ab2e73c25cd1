//! A limit on bytes (or anything else that is counted) per second that can be changed while they flow.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::sync::Notify;
use tokio::time::Instant;

/// A token bucket shared by everything that sends or fetches for one operation.
///
/// A request may overdraw the bucket (a part is larger than the allowance of a second may be); the next
/// one then waits until the debt is paid, so that the average holds. Requests are served in order.
#[derive(Debug, Clone)]
pub struct Throttle {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    bucket: Mutex<Bucket>,
    turn: tokio::sync::Mutex<()>,
    changed: Notify,
}

#[derive(Debug)]
struct Bucket {
    /// Bytes per second; `None`: unlimited.
    rate: Option<u64>,
    /// Bytes that may go at once; negative: debt.
    tokens: f64,
    filled: Instant,
}

/// Longest pause before the clock is looked at again, so that no rate makes an absurd sleep.
const LONGEST_NAP: Duration = Duration::from_hours(1);

#[expect(
    clippy::cast_precision_loss,
    reason = "a rate needs no more than 52 bits"
)]
fn float(bytes: u64) -> f64 {
    bytes as f64
}

impl Bucket {
    fn refill(&mut self, rate: u64, now: Instant) {
        let earned = (now - self.filled).as_secs_f64() * float(rate);
        // A quarter of a second's worth is kept, so that a pause is not followed by a flood.
        self.tokens = (self.tokens + earned).min(float(rate) / 4.0);
        self.filled = now;
    }

    /// Takes `bytes` now, or says how long to wait before asking again.
    fn take(&mut self, bytes: u64, now: Instant) -> Option<Duration> {
        let rate = self.rate?;
        self.refill(rate, now);
        if self.tokens < 0.0 {
            let wait = (-self.tokens / float(rate)).min(LONGEST_NAP.as_secs_f64());
            // Never zero: a nap shorter than the clock's grain would spin.
            return Some(Duration::from_secs_f64(wait).max(Duration::from_millis(1)));
        }
        self.tokens -= float(bytes);
        None
    }
}

impl Throttle {
    /// A limit of `rate` bytes per second; `None`: no limit. A rate of 0 counts as 1.
    #[must_use]
    pub fn new(rate: Option<u64>) -> Self {
        let bucket = Bucket {
            rate: rate.map(|rate| rate.max(1)),
            tokens: 0.0,
            filled: Instant::now(),
        };
        Self {
            shared: Arc::new(Shared {
                bucket: Mutex::new(bucket),
                turn: tokio::sync::Mutex::default(),
                changed: Notify::new(),
            }),
        }
    }

    fn bucket(&self) -> MutexGuard<'_, Bucket> {
        let bucket = self.shared.bucket.lock();
        bucket.unwrap_or_else(PoisonError::into_inner)
    }

    /// The limit in bytes per second; `None`: there is none.
    #[must_use]
    pub fn rate(&self) -> Option<u64> {
        self.bucket().rate
    }

    /// Changes the limit, also for those who are waiting now. An old debt is forgiven.
    pub fn set_rate(&self, rate: Option<u64>) {
        {
            let mut bucket = self.bucket();
            bucket.rate = rate.map(|rate| rate.max(1));
            bucket.tokens = 0.0;
            bucket.filled = Instant::now();
        }
        self.shared.changed.notify_waiters();
    }

    /// Changes the limit, also for those who are waiting now. What was overdrawn stays to be paid: for limits that change all the
    /// time.
    pub fn retune(&self, rate: u64) {
        let rate = rate.max(1);
        {
            let mut bucket = self.bucket();
            match bucket.rate {
                Some(old) => bucket.refill(old, Instant::now()),
                None => bucket.filled = Instant::now(),
            }
            bucket.rate = Some(rate);
            bucket.tokens = bucket.tokens.min(float(rate) / 4.0);
        }
        self.shared.changed.notify_waiters();
    }

    /// Waits until `bytes` may go. May be dropped at any time; nothing is taken then.
    pub async fn take(&self, bytes: u64) {
        if self.bucket().rate.is_none() {
            return;
        }
        let _turn = self.shared.turn.lock().await;
        loop {
            // Made before the bucket is looked at, so that no change is missed.
            let changed = self.shared.changed.notified();
            let Some(wait) = self.bucket().take(bytes, Instant::now()) else {
                return;
            };
            tokio::select! {
                () = changed => {}
                () = tokio::time::sleep(wait) => {}
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: u64 = 1 << 20;

    /// Takes as one task after the other would, on a clock that only the naps move.
    fn seconds_for(bucket: &mut Bucket, requests: u32, bytes: u64) -> f64 {
        let begun = bucket.filled;
        let mut now = begun;
        for _ in 0..requests {
            while let Some(nap) = bucket.take(bytes, now) {
                now += nap;
            }
        }
        (now - begun).as_secs_f64()
    }

    #[test]
    fn holds_the_average_rate_also_after_a_change() {
        let mut bucket = Bucket {
            rate: Some(8 * MIB),
            tokens: 0.0,
            filled: Instant::now(),
        };
        // The first goes at once, each other one waits for the one before.
        let seconds = seconds_for(&mut bucket, 11, 8 * MIB);
        assert!((9.9..10.1).contains(&seconds), "{seconds} s");
        bucket.rate = Some(MIB);
        bucket.tokens = 0.0;
        let seconds = seconds_for(&mut bucket, 101, MIB / 10);
        assert!((9.9..10.1).contains(&seconds), "{seconds} s");
        bucket.rate = None;
        let seconds = seconds_for(&mut bucket, 1000, 8 * MIB);
        assert!(seconds < 0.001, "{seconds} s");
    }

    #[tokio::test]
    async fn a_debt_outlives_a_limit_that_is_tuned() {
        let throttle = Throttle::new(Some(1000));
        throttle.take(1_000_000).await;
        throttle.retune(100_000);
        let left = throttle.bucket().tokens;
        assert!((-1_000_000.0..-900_000.0).contains(&left), "{left}");
        throttle.set_rate(Some(100_000));
        assert!(throttle.bucket().tokens.abs() < f64::EPSILON);
    }

    #[test]
    fn a_pause_is_not_followed_by_a_flood() {
        let begun = Instant::now();
        let mut bucket = Bucket {
            rate: Some(MIB),
            tokens: 0.0,
            filled: begun,
        };
        let later = begun + Duration::from_mins(1);
        let at_once = (0..100).take_while(|_| bucket.take(MIB / 16, later).is_none());
        assert_eq!(
            at_once.count(),
            5,
            "a quarter of a second's worth, and one overdraft"
        );
    }

    #[tokio::test]
    async fn a_change_reaches_those_who_wait() {
        let throttle = Throttle::new(Some(1));
        throttle.take(8 * MIB).await;
        let mut waiting = tokio::spawn({
            let throttle = throttle.clone();
            async move { throttle.take(MIB).await }
        });
        // 8 MiB of debt at 1 B/s: three months.
        let soon = Duration::from_millis(50);
        assert!(tokio::time::timeout(soon, &mut waiting).await.is_err());
        throttle.set_rate(None);
        let long = Duration::from_secs(20);
        tokio::time::timeout(long, waiting).await.unwrap().unwrap();
    }
}
