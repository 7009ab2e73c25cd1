//! What the tests share: stand-ins (each says it is one), real servers started on loopback, and loads.
//!
//! Nothing here is linked into a product crate.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::must_use_candidate,
    clippy::format_push_string,
    reason = "the whole crate is test code: a panic is a failed test, with its reason"
)]

pub mod bank;
pub mod bench;
pub mod bucket;
pub mod faulty_store;
pub mod files;
pub mod fleet;
pub mod fuse;
pub mod load;
pub mod memory_store;
pub mod minio;
pub mod opengauss;
pub mod os;
pub mod postgres;
pub mod probackup;
pub mod proxy;
pub mod raw;
pub mod real_proxy;
pub mod registered;
pub mod roll;
pub mod running;
pub mod s3;
pub mod sharded;
pub mod shown;
pub mod skip;
pub mod strace;
pub mod versitygw;

pub use skip::skip;
