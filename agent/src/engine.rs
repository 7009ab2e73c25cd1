//! Ways to copy a data node.

pub mod direct;
pub mod errors;
