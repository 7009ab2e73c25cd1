//! The stand-in for ShardingSphere-Proxy over real PostgreSQL nodes: what it promises the tests that use it.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    reason = "a panic is a failed test, with its reason"
)]

#[path = "proxy_stand_in/bank.rs"]
mod bank;
#[path = "proxy_stand_in/extended.rs"]
mod extended;
#[path = "proxy_stand_in/faults.rs"]
mod faults;
#[path = "proxy_stand_in/lock.rs"]
mod lock;
#[path = "proxy_stand_in/login.rs"]
mod login;
#[path = "proxy_stand_in/metadata.rs"]
mod metadata;
#[path = "proxy_stand_in/transactions.rs"]
mod transactions;
