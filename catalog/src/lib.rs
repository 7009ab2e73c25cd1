//! What the bytes in the bucket mean: repository layout, data nodes, epochs, manifests, points, the log.
//!
//! The bucket is the truth and is write-once. A backup exists when its manifest object exists; the
//! manifest is created last and only if absent. docs/FORMAT.md specifies every object byte by byte.

mod check;
mod decimal;
pub mod envelope;
pub mod error;
pub mod fence;
pub mod ids;
pub mod journal;
pub mod keys;
pub mod lease;
pub mod mirror;
pub mod model;
mod put;
pub mod reach;
pub mod repo;
pub mod retention;
mod runs;
pub mod verify;
pub mod wal;

pub use error::CatalogError;
pub use repo::Catalog;
