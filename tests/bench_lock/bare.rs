//! LOCK, a probe of each proxy, UNLOCK, a probe of each proxy, and nothing else: what the proxies themselves cost.

use std::time::{Duration, Instant};

use agent_sql::Password;
use agent_sql::proxy::{Gate, ProxyConnection, ProxyOptions};
use futures_util::future::join_all;
use support::sharded::ShardedCluster;
use tokio::time::sleep;
use tokio_util::sync::CancellationToken;

use super::figures::Figures;

const DEADLINE: Duration = Duration::from_secs(5);
/// Between two rounds.
const PAUSE: Duration = Duration::from_millis(100);

/// What the rounds took.
pub(crate) struct Bare {
    /// From LOCK until the last proxy lets writes pass.
    all: Figures,
    /// LOCK and UNLOCK alone, from the statement to its answer.
    statements: Figures,
}

impl Bare {
    pub(crate) fn print(&self) {
        println!(
            "LOCK, probes, UNLOCK, probes, nothing else     ms {}   ({} rounds; the two statements alone p50 {:.1}, p99 {:.1})",
            self.all.line(),
            self.all.count(),
            self.statements.p(50),
            self.statements.p(99),
        );
    }
}

/// Asks until the proxy lets writes pass, or does not. As often as a point's making does.
async fn until(proxy: &ProxyConnection, open: bool) {
    let mut pause = Duration::from_millis(1);
    loop {
        let gate = proxy.probe(DEADLINE).await.expect("an answer to the probe");
        if matches!(gate, Gate::Open) == open {
            return;
        }
        sleep(pause).await;
        pause = (pause * 2).min(Duration::from_millis(10));
    }
}

/// So many rounds, through one proxy after the other.
pub(crate) async fn rounds(cluster: &ShardedCluster, rounds: usize) -> Bare {
    let mut proxies = Vec::new();
    for number in 0..cluster.proxy_count() {
        let access = cluster.access(number, "postgres");
        let options = ProxyOptions {
            port: access.port,
            user: access.user,
            password: Some(Password::new(access.password)),
            ..ProxyOptions::default()
        };
        let proxy = ProxyConnection::connect(&options, CancellationToken::new()).await;
        proxies.push(proxy.expect("a session"));
    }
    let (mut all, mut statements) = (Vec::new(), Vec::new());
    for round in 0..rounds {
        sleep(PAUSE).await;
        let via = &proxies[round % proxies.len()];
        let begun = Instant::now();
        via.lock(DEADLINE, DEADLINE).await.expect("LOCK");
        let locked = begun.elapsed();
        join_all(proxies.iter().map(|proxy| until(proxy, false))).await;
        let unlocking = Instant::now();
        via.unlock(DEADLINE, DEADLINE).await.expect("UNLOCK");
        let unlocked = unlocking.elapsed();
        join_all(proxies.iter().map(|proxy| until(proxy, true))).await;
        all.push(begun.elapsed().as_secs_f64() * 1e3);
        statements.push((locked + unlocked).as_secs_f64() * 1e3);
    }
    Bare {
        all: all.into_iter().collect(),
        statements: statements.into_iter().collect(),
    }
}
