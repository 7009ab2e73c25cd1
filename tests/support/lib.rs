//! What the tests share: stand-ins (each says it is one), real servers started on loopback, and loads.
//!
//! Nothing here is linked into a product crate.

pub mod memory_store;
