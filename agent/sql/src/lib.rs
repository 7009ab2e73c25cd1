//! What the agent says to a data node over SQL.
//!
//! A [`NodeConnection`] is one session, straight to the server and not through a pooler: a non-exclusive
//! backup lives and dies with its session. Every statement has a deadline and can be cancelled, is sent by the
//! simple query protocol, and names in a comment where PostgreSQL documents it ("D" is the manual, by
//! section of version 15). Versions 12 to 18 are known; where they differ, the statement says so.

mod backup;
mod connect;
mod error;
mod facts;
mod preflight;
mod session;
mod slot;
mod text;
mod transactions;

pub use backup::StopResult;
pub use connect::{ConnectOptions, NodeConnection, Password};
pub use error::SqlError;
pub use facts::{ServerFacts, ServerFiles, ServerTablespace, WalPosition, WalReceiver};
pub use preflight::{Finding, Severity};
pub use slot::{SlotState, WalStatus};
pub use transactions::{XidHolder, XidHolders};

// Positions are the same type wherever they are met.
pub use agent_wal::Lsn;
