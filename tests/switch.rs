//! A restore over a running cluster, and its way back: the real programs, real databases, a stand-in for the bucket.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    reason = "a panic is a failed test, with its reason"
)]

#[path = "switch/back.rs"]
mod back;
#[path = "switch/forward.rs"]
mod forward;
#[path = "switch/over.rs"]
mod over;
#[path = "switch/scene.rs"]
mod scene;
#[path = "switch/tablespace.rs"]
mod tablespace;
#[path = "switch/ways.rs"]
mod ways;
