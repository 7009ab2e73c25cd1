//! Points of three nodes, recovered to by one copy of each that is rolled forward.

use support::roll::{self, Copy};

use crate::transfers;

/// What all copies have together at a restore point.
pub(crate) async fn at_point(copies: &[Copy], point: &str, proved: bool) -> Result<usize, String> {
    let nodes = roll::reach(copies, point, "postgres").await;
    let found = if proved {
        transfers::check_proved(&nodes).await
    } else {
        transfers::check(&nodes).await
    };
    roll::leave(copies, nodes).await;
    found
}
