//! What `gs_pitr` and `pitr-agent` say to each other: HTTP with JSON bodies under `/v1`.
//!
//! | request | body -> answer |
//! |---|---|
//! | `GET /v1/health` | -> [`Health`] |
//! | `GET /v1/node` | -> [`NodeFacts`] |
//! | `POST /v1/check` | [`CheckRequest`] -> [`CheckReport`] (changes nothing but probe objects in the bucket) |
//! | `POST /v1/check/race` | [`RaceRequest`] -> [`RaceResult`] |
//! | `GET /v1/operations` | -> list of [`OperationStatus`] |
//! | `POST /v1/operations` | [`StartOperation`] -> [`OperationStatus`] (same id and body again: the same operation) |
//! | `GET /v1/operations/{id}` | -> [`OperationStatus`] |
//! | `GET /v1/operations/{id}/events?after=SEQ` | -> NDJSON stream of [`Event`]; ends when the operation ends |
//! | `POST /v1/operations/{id}/observe` | [`ObserveRequest`] -> [`Observed`] (backup that is `copied` or `marked`) |
//! | `POST /v1/operations/{id}/mark` | [`MarkRequest`] -> [`MarkResult`] (backup that is `copied`) |
//! | `POST /v1/operations/{id}/flush` | [`MarkRequest`] -> [`OperationStatus`] (backup that is marked: no crash loses the last restore point any more) |
//! | `POST /v1/operations/{id}/ship` | -> [`OperationStatus`] (backup that is marked: WAL up to the point) |
//! | `POST /v1/operations/{id}/release` | -> [`OperationStatus`] (backup that is shipped: WAL hold released) |
//! | `POST /v1/operations/{id}/promote` | -> [`OperationStatus`] (restore that is proved and decided) |
//! | `POST /v1/operations/{id}/open` | [`OpenRequest`] -> [`OperationStatus`] (restore that is promoted) |
//! | `POST /v1/operations/{id}/bandwidth` | [`Bandwidth`] -> [`OperationStatus`] |
//! | `POST /v1/operations/{id}/cancel` | -> [`OperationStatus`] |
//! | `POST /v1/target` | [`TargetRequest`] -> [`TargetFacts`] |
//! | `GET /v1/restores` | -> [`RestoresHere`] |
//! | `GET /v1/wal` | -> [`WalStatus`] |
//! | `PUT /v1/wal` | [`StartWal`] -> [`WalStatus`] (the same again changes nothing) |
//! | `DELETE /v1/wal` | -> [`WalStatus`] (what is shipped all the time ends, its hold released) |
//! | `POST /v1/discard` | [`DiscardRequest`] -> [`Discarded`] |
//! | `GET /v1/watchdogs` | -> list of [`WatchdogStatus`] |
//! | `POST /v1/watchdogs` | [`StartWatchdog`] -> [`WatchdogStatus`] (same id and body again: the same watchdog) |
//! | `POST /v1/watchdogs/{id}/arm` | [`ArmWatchdog`] -> [`WatchdogStatus`] |
//! | `POST /v1/watchdogs/{id}/disarm` | [`DisarmWatchdog`] -> [`WatchdogStatus`] |
//! | `GET /v1/watchdogs/{id}` | -> [`WatchdogStatus`] |
//! | `DELETE /v1/watchdogs/{id}` | -> [`WatchdogStatus`] (one that is neither armed nor at work) |
//!
//! An answer other than 2xx carries an [`ApiError`].

pub mod check;
pub mod client;
pub mod error;
pub mod identity;
mod pace;
mod repository;
pub mod types;
pub mod wal;
pub mod watchdog;

pub use check::{CheckReport, CheckRequest, Finding, Level, RaceRequest, RaceResult, clock};
pub use error::{ApiError, ErrorKind};
pub use pace::Pace;
pub use repository::{Credentials, RepositoryAccess, Secret};
pub use types::*;
pub use wal::{StartWal, WalGap, WalMode, WalState, WalStatus};
pub use watchdog::{
    ArmWatchdog, DisarmWatchdog, LockOutcome, ProxyAddress, StartWatchdog, WatchdogState,
    WatchdogStatus, WatchdogTls, WatchedProxy,
};
