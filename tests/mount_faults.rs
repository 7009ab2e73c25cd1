//! What goes wrong while a program writes a backup into the mount: the store, the program, the agent, the client, an
//! operator. Through the two real programs, with a real PostgreSQL and an S3 server that takes orders.
//!
//! Whatever happens: no backup is listed that is none, it is said why, nothing is left (no mount, no process, no slot, no
//! backup mode, no upload), and the next backup works.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::print_stdout,
    reason = "test code: a panic is a failed test, with its reason"
)]

#[path = "mount_faults/deaths.rs"]
mod deaths;
#[path = "mount_faults/memory.rs"]
mod memory;
#[path = "mount_faults/store.rs"]
mod store;
#[path = "mount_faults/world.rs"]
mod world;
