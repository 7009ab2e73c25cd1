//! What the agent says to a data node over SQL, and what is said to a ShardingSphere-Proxy ([`proxy`]).
//!
//! A [`NodeConnection`] is one session, straight to the server and not through a pooler: a non-exclusive
//! backup lives and dies with its session. Every statement has a deadline and can be cancelled, is sent by the
//! simple query protocol, and names in a comment where PostgreSQL documents it ("D" is the manual, by
//! section of version 15). Versions 12 to 18 are known; where they differ, the statement says so.
//!
//! openGauss is known too. Where it differs, both ways are in `dialect`, and its log-in is in `login`.

mod backup;
mod carrier;
mod connect;
mod dialect;
mod error;
mod facts;
mod login;
mod preflight;
pub mod proxy;
mod ptrack;
mod recovery;
mod session;
mod slot;
mod text;
mod transactions;

pub use backup::StopResult;
pub use connect::{ConnectOptions, NodeConnection, Password};
pub use dialect::Flavour;
pub use error::SqlError;
pub use facts::{
    Archiving, Identity, ServerFacts, ServerFiles, ServerTablespace, WalPosition, WalReceiver,
};
pub use preflight::{Finding, Severity};
pub use slot::{SlotState, WalStatus};
pub use transactions::{XidHolder, XidHolders};

// Positions are the same type wherever they are met.
pub use agent_wal::Lsn;
