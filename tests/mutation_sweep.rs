//! Every stored object is changed in every way that comes to mind, one change at a time: `verify` has to find each, and
//! no restore may bring other bytes.

#![allow(
    clippy::unwrap_used,
    reason = "test code: a panic is a failed test, with its reason"
)]

#[path = "mutation_sweep/fixture.rs"]
mod fixture;

use catalog::verify::Depth;
use fixture::World;

#[tokio::test(flavor = "multi_thread")]
async fn a_repository_that_nobody_touched_has_no_finding() {
    let world = World::build().await;
    for depth in [Depth::Full, Depth::Fast] {
        let report = world.verify(depth).await;
        assert!(report.findings.is_empty(), "{:#?}", report.findings);
        assert!(report.repairs.is_empty() && report.unrestorable.is_empty());
        assert_eq!(
            report.backups.iter().collect::<Vec<_>>(),
            world.backups.iter().collect::<Vec<_>>()
        );
    }
}
