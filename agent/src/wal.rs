//! WAL of a running node, on its way from the server's own files into the bucket.

pub mod hold;
pub mod ship;
