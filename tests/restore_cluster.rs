//! A restore of a whole cluster behind its proxies: who is kept out while databases are switched, and what becomes of the proxies' metadata.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    reason = "a panic is a failed test, with its reason"
)]

#[path = "restore_cluster/locked.rs"]
mod locked;
#[path = "restore_cluster/metadata.rs"]
mod metadata;
#[path = "restore_cluster/scene.rs"]
mod scene;
