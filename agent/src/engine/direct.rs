//! The direct engine: reads the data directory in place between backup start and stop, as pgBackRest and WAL-G do.

pub mod exclude;
