//! The cluster's lock around a backup's point: what it takes under load, and that writes pass again whatever goes wrong meanwhile. On
//! the stand-in and on real proxies alike.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    reason = "a panic is a failed test, with its reason"
)]

#[allow(
    dead_code,
    reason = "it is that of `lock_faults.rs`, which uses the rest"
)]
#[path = "lock_faults/hands.rs"]
mod hands;

mod lock {
    mod faults;
    mod killed;
    mod load;
    mod scene;
}
