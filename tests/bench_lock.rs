//! `make bench`, third part: what the point costs the clients of a sharded cluster. Two PostgreSQL nodes, an agent beside each, two proxies in
//! front (the stand-in of `tests/support/proxy`, with the delays that were measured on real ones), clients that move money between
//! the nodes.
//!
//! - `lock`: 100 points with `--lock always`, beside them LOCK and UNLOCK through the same proxies with nothing in between, which no
//!   point can be faster than; then points with `--lock auto`, and how many of them made do without.
//! - `tps`: commits a second while a backup runs, against those while none does.
//!
//! Both are run when none is named. With `SHARDINGSPHERE_PROXY_HOME` the first part is run on real proxies, too.
//! `BENCH_LOCK_POINTS=20` makes fewer points.
#![allow(
    clippy::print_stdout,
    clippy::expect_used,
    clippy::unwrap_used,
    clippy::cast_precision_loss,
    reason = "it prints its figures, and a step that fails ends it with its reason"
)]

mod bench_lock {
    pub(super) mod bare;
    pub(super) mod figures;
    pub(super) mod load;
    pub(super) mod lost;
    pub(super) mod points;
}

use std::time::{Duration, Instant};

use support::proxy::Delays;
use support::real_proxy;
use support::sharded::{ShardedCluster, ShardedOptions};

use bench_lock::{bare, load, lost, points};

/// Points of each kind.
const POINTS: usize = 100;

/// How many points are wanted.
fn wanted() -> usize {
    std::env::var("BENCH_LOCK_POINTS").map_or(POINTS, |number| number.parse().expect("a number"))
}

async fn cluster(stand_in: bool, real_bucket: bool) -> ShardedCluster {
    ShardedCluster::start(ShardedOptions {
        name: "bench-lock",
        delays: Delays::Measured,
        stand_in,
        real_bucket,
        ..ShardedOptions::default()
    })
    .await
}

/// The lock's part. `name` begins the names of its goals.
async fn lock(stand_in: bool, name: &str) {
    let cluster = cluster(stand_in, false).await;
    let wanted = wanted();
    println!("\nthe lock, {}", cluster.describe());
    points::prepare(&cluster);
    // Points before they are counted warm up what there is to warm up: Java compiles what is used often.
    let warm = if stand_in { 3 } else { 15 };
    let busy = load::open(&cluster, &load::BUSY).await;
    points::make(&cluster, "always", warm).await;
    let always = points::make(&cluster, "always", wanted).await;
    let rate = busy.rate();
    let bare = bare::rounds(&cluster, wanted).await;
    println!("load: {}", busy.close().await);
    always.print("--lock always", rate);
    bare.print();
    support::bench::goal(&format!("{name}lock_p99_ms"), always.locked().p(99), 100.0);

    for kind in [&load::BUSY, &load::QUIET] {
        let load = load::open(&cluster, kind).await;
        // Under much load each of them tries for two seconds without the lock first.
        let auto = points::make(&cluster, "auto", (wanted * 3 / 10).max(1)).await;
        let rate = load.rate();
        load.close().await;
        auto.print(&format!("--lock auto, {}", kind.name), rate);
    }
}

async fn bench(parts: &[String]) {
    let begun = Instant::now();
    let is_wanted = |part: &str| parts.is_empty() || parts.iter().any(|wanted| wanted == part);
    if is_wanted("lock") {
        lock(true, "").await;
        if real_proxy::home().is_some() {
            lock(false, "real_").await;
        }
    }
    if is_wanted("tps") {
        lost::bench(&cluster(true, true).await).await;
    }
    println!("\nall of it took {:.0} s", begun.elapsed().as_secs_f64());
}

fn main() {
    let parts: Vec<_> = std::env::args().skip(1).collect();
    assert!(
        parts.iter().all(|part| part == "lock" || part == "tps"),
        "usage: bench-lock [lock] [tps]"
    );
    let runtime = tokio::runtime::Runtime::new().expect("a runtime");
    runtime.block_on(bench(&parts));
    runtime.shutdown_timeout(Duration::from_secs(5));
}
