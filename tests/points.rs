//! Points that are made without copying anything, on real databases: one backup, many points under load, and each kind of
//! restore target.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    reason = "a panic is a failed test, with its reason"
)]

#[path = "points/every.rs"]
mod every;
#[path = "points/reached.rs"]
mod reached;
#[path = "points/scene.rs"]
mod scene;
#[path = "proof/transfers.rs"]
mod transfers;
