//! Clients at work, and how much they get done.

use std::time::{Duration, Instant};

use support::bank::{Bank, BankOptions, Mix};
use support::sharded::ShardedCluster;

/// A load.
#[derive(Debug)]
pub(crate) struct Kind {
    /// In the figures.
    pub(crate) name: &'static str,
    mix: Mix,
    pause: Duration,
}

/// Transfers over both nodes all the time; one client sends batches, which pass the lock.
pub(crate) const BUSY: Kind = Kind {
    name: "much load",
    mix: Mix {
        simple: 4,
        prepared: 2,
        batch: 1,
        autocommit: 1,
        one_node: 0,
        two_phase: 0,
    },
    pause: Duration::from_millis(40),
};

/// Now and then one.
pub(crate) const QUIET: Kind = Kind {
    name: "little load",
    mix: Mix {
        simple: 1,
        prepared: 1,
        batch: 0,
        autocommit: 1,
        one_node: 0,
        two_phase: 0,
    },
    pause: Duration::from_millis(300),
};

/// Clients at work.
pub(crate) struct Load {
    bank: Bank,
    begun: Instant,
    before: u64,
}

/// Opens one, and waits until it is under way.
pub(crate) async fn open(cluster: &ShardedCluster, kind: &Kind) -> Load {
    let bank = Bank::open(
        &cluster.ways(),
        &BankOptions {
            seed: rand::random(),
            mix: kind.mix,
            pause: kind.pause,
            passing_pause: kind.pause * 5,
            shift: shift(),
        },
    );
    bank.goes_on(10).await;
    Load {
        begun: Instant::now(),
        before: bank.so_far(),
        bank,
    }
}

/// Another one for each bank, whose transfers it numbers.
pub(crate) fn shift() -> i64 {
    use std::sync::atomic::{AtomicI64, Ordering};
    static NEXT: AtomicI64 = AtomicI64::new(1);
    NEXT.fetch_add(1, Ordering::Relaxed)
}

impl Load {
    /// Commits a second so far.
    pub(crate) fn rate(&self) -> f64 {
        (self.bank.so_far() - self.before) as f64 / self.begun.elapsed().as_secs_f64()
    }

    /// Ends it, and says what the clients saw.
    pub(crate) async fn close(self) -> String {
        self.bank.close().await.describe()
    }
}
