//! `pitr-agent`: runs beside one data node, copies it into the bucket and brings it back.
//!
//! A library with a thin program around it, so that tests can run one engine against a real database.

pub mod engine;
pub mod wal;
