//! The kill table: every step of every command that changes something, and whoever can die there.
//!
//! A row holds the command at one step, by holding a request at the store or by waiting for a phase, and asserts that the
//! step's effect is there. Then the victim is killed, what died is started again, and the next commands are
//! run as a user would. Asserted after that: no wrong backup is listed, nothing is left, all nodes are old or all new.
//!
//! `KILL_ROWS=word` runs the rows whose names contain the word, `KILL_TIMES=n` each of them n times.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::print_stdout,
    reason = "a panic is a failed row, with its reason; the table is printed"
)]

#[path = "kill_table/backup.rs"]
mod backup;
#[path = "kill_table/removal.rs"]
mod removal;
#[path = "kill_table/restore.rs"]
mod restore;
#[path = "kill_table/table.rs"]
mod table;
#[path = "kill_table/world.rs"]
mod world;
