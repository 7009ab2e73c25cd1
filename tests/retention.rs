//! Retention: what goes and what stays, whoever is killed in between, on stores in memory, on the stand-in, on a
//! real MinIO with versions and locks, and with the real programs.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::print_stderr,
    reason = "a panic is a failed test, with its reason"
)]

#[path = "retention/killed.rs"]
mod killed;
#[path = "retention/plan.rs"]
mod plan;
#[path = "retention/programs.rs"]
mod programs;
#[path = "retention/readers.rs"]
mod readers;
#[path = "retention/stores.rs"]
mod stores;
#[path = "retention/world.rs"]
mod world;
