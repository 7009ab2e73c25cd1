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
//! | `POST /v1/operations/{id}/ship` | -> [`OperationStatus`] (backup that is marked: WAL up to the point) |
//! | `POST /v1/operations/{id}/release` | -> [`OperationStatus`] (backup that is shipped: WAL hold released) |
//! | `POST /v1/operations/{id}/promote` | -> [`OperationStatus`] (restore that is proved and decided) |
//! | `POST /v1/operations/{id}/open` | [`OpenRequest`] -> [`OperationStatus`] (restore that is promoted) |
//! | `POST /v1/operations/{id}/bandwidth` | [`Bandwidth`] -> [`OperationStatus`] |
//! | `POST /v1/operations/{id}/cancel` | -> [`OperationStatus`] |
//! | `POST /v1/target` | [`TargetRequest`] -> [`TargetFacts`] |
//! | `GET /v1/restores` | -> [`RestoresHere`] |
//! | `POST /v1/discard` | [`DiscardRequest`] -> [`Discarded`] |
//!
//! An answer other than 2xx carries an [`ApiError`].

pub mod check;
pub mod client;
pub mod error;
pub mod identity;
pub mod types;

pub use check::{CheckReport, CheckRequest, Finding, Level, RaceRequest, RaceResult, clock};
pub use error::{ApiError, ErrorKind};
pub use types::*;
