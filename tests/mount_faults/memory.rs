//! The smallest budget, and more writers than it has room for.

use std::time::Duration;

use support::s3::{Fault, Operation};

use crate::world::World;

/// Resident memory of the agent at its peak, in MiB: its budget of 64, and what no budget counts.
const PEAK: u64 = 64 + 128;

#[tokio::test(flavor = "multi_thread")]
async fn sixteen_writers_share_the_smallest_budget() {
    let test = "sixteen_writers_share_the_smallest_budget";
    let Some(world) = World::with_real(test, &["--memory", "64"]).await else {
        return;
    };
    // Some MiB for each of them at the same time, half of it random.
    for table in 0..16 {
        let sql = format!(
            "CREATE TABLE t{table} AS SELECT md5(random()::text) || repeat('x', 32) AS w FROM generate_series(1, 40000)"
        );
        world.database().execute(&sql).await;
    }
    world.database().execute("CHECKPOINT").await;
    // The store is what all of them wait for.
    world.server().inject_at(
        Operation::UploadPart,
        0,
        u64::MAX,
        Fault::Stall(Duration::from_millis(400)),
    );
    let run = world.start(&["--jobs", "16"]).end().await;
    world.is_good(run).await;
    let peak = world.agent().peak_rss_mib();
    println!("peak of the agent: {peak} MiB");
    assert!(peak <= PEAK, "{peak} MiB, {PEAK} are allowed");
}
