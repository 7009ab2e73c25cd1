//! Ways to copy a data node.

mod alone;
pub mod attachments;
pub mod attempt;
mod backup;
pub mod control;
pub mod copy_error;
pub mod direct;
pub mod errors;
pub mod manifest;
pub mod node;
mod observe;
mod pace;
pub mod point;
pub mod probackup;
mod readback;
mod serve;
pub mod slot;
pub mod wal_hold;

pub use self::alone::run as run_point;
pub use self::backup::run;
