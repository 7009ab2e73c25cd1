//! WAL of a running node, on its way from the server's own files into the bucket.

pub mod gate;
pub mod hold;
pub mod keeper;
pub mod known;
pub mod service;
pub mod ship;
pub mod transfer;
pub mod trouble;
