//! The proof that a point cuts no transaction in half: its statements, what it says of real databases under
//! transfers between them, and that without it points are broken.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    reason = "a panic is a failed test, with its reason"
)]

#[path = "proof/obstacles.rs"]
mod obstacles;
#[path = "proof/points.rs"]
mod points;
#[path = "proof/roll.rs"]
mod roll;
#[path = "proof/statements.rs"]
mod statements;
#[path = "proof/transfers.rs"]
mod transfers;
