//! Bytes to and from object storage: compression, checksums, multipart uploads, ranged downloads.
//!
//! Knows nothing of databases. The way of a byte out is
//! read -> [`frame`] (zstd, SHA-256) -> [`pack`] -> [`upload`] -> [`store`]; the way back is
//! [`store`] -> [`download`] (every frame verified before it is used) -> the caller's sink.
//! Compression and hashing run on named threads, tokio does I/O only. Every buffer is paid for by
//! one [`budget`].

pub mod budget;
pub mod check;
pub mod download;
pub mod error;
pub mod extract;
pub mod frame;
pub mod index;
pub mod meter;
pub mod pace;
pub mod pack;
pub mod probe;
pub mod random;
pub mod retry;
pub mod store;
mod threads;
pub mod throttle;
pub mod upload;

pub use error::PipelineError;
