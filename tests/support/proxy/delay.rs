//! How long a real cluster took, as measured on one: two proxies and ZooKeeper, quiet and loaded.

use std::sync::Mutex;
use std::time::Duration;

use rand::rngs::StdRng;
use rand::{RngExt as _, SeedableRng as _};

use super::Delays;

/// What takes its time.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Step {
    /// LOCK, from statement to reply.
    Lock,
    /// From the reply to LOCK until a proxy refuses.
    Refuses,
    /// UNLOCK, from statement to reply.
    Unlock,
    /// From the reply to UNLOCK until a proxy accepts.
    Accepts,
}

impl Step {
    /// Median and largest, in milliseconds. Of the loaded machine only the largest was noted: its medians are taken to be
    /// four times those of the quiet one.
    fn measured(self, delays: Delays) -> Option<(f64, f64)> {
        let (median, quiet, loaded) = match self {
            Self::Lock => (7.6, 13.0, 258.0),
            Self::Refuses => (0.2, 3.0, 80.0),
            Self::Unlock => (9.3, 30.0, 112.0),
            Self::Accepts => (1.2, 7.5, 34.0),
        };
        match delays {
            Delays::None => None,
            Delays::Measured => Some((median, quiet)),
            Delays::Loaded => Some((4.0 * median, loaded)),
        }
    }
}

/// Draws delays.
pub(super) struct Delayer {
    delays: Delays,
    random: Mutex<StdRng>,
}

impl Delayer {
    pub(super) fn new(delays: Delays, seed: u64) -> Self {
        Self {
            delays,
            random: Mutex::new(StdRng::seed_from_u64(seed)),
        }
    }

    /// Whether there are delays at all.
    pub(super) fn is_real(&self) -> bool {
        self.delays != Delays::None
    }

    /// One delay. Half of them are below the median, and they get rare towards the largest.
    pub(super) fn of(&self, step: Step) -> Duration {
        let Some((median, largest)) = step.measured(self.delays) else {
            return Duration::ZERO;
        };
        let drawn: f64 = self.random.lock().expect("no panic").random();
        let milliseconds = if drawn < 0.5 {
            median * (0.5 + drawn)
        } else {
            let tail = (2.0 * drawn - 1.0).powi(4);
            median * (largest / median).powf(tail)
        };
        Duration::from_secs_f64(milliseconds / 1000.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn median_and_largest_are_as_measured() {
        for (delays, median, largest) in
            [(Delays::Measured, 7.6, 13.0), (Delays::Loaded, 30.4, 258.0)]
        {
            let delayer = Delayer::new(delays, 1);
            let draw = |_| delayer.of(Step::Lock).as_secs_f64() * 1000.0;
            let mut drawn: Vec<f64> = (0..2001).map(draw).collect();
            drawn.sort_by(f64::total_cmp);
            assert!((drawn[1000] / median - 1.0).abs() < 0.1, "{}", drawn[1000]);
            assert!(drawn[2000] <= largest && drawn[2000] > 0.8 * largest);
        }
        assert_eq!(Delayer::new(Delays::None, 1).of(Step::Lock), Duration::ZERO);
    }
}
