//! The stand-in for `gs_probackup` and `pg_probackup`, held against the real programs: the calls they were recorded to make,
//! catalogs that one writes and the other reads, and what goes wrong when it is told to.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::print_stdout,
    clippy::format_push_string,
    reason = "a panic is a failed test, with its reason, and it says what it compared"
)]

#[path = "probackup_stand_in/calls.rs"]
mod calls;
#[path = "probackup_stand_in/chains.rs"]
mod chains;
#[path = "probackup_stand_in/faults.rs"]
mod faults;
#[path = "probackup_stand_in/world.rs"]
mod world;
