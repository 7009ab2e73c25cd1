//! `pitr-agent`: runs beside one data node, copies it into the bucket and brings it back.
//!
//! A library with a thin program around it, so that tests can run one engine against a real database.

pub mod allocator;
pub mod catalog_fs;
pub mod check;
pub mod child;
pub mod cleanup;
pub mod config;
pub mod database;
pub mod engine;
pub mod engines;
pub mod facts;
pub mod failure;
pub mod identity;
pub mod logging;
pub mod managers;
pub mod operation;
pub mod restore;
pub mod serve;
pub mod store_access;
pub mod tls;
pub mod wal;
pub mod walget;
pub mod walput;
pub mod watchdog;
