//! One file a command.

pub(crate) mod backup;
pub(crate) mod certs;
pub(crate) mod completions;
pub(crate) mod man;
pub(crate) mod restore;
pub(crate) mod show;
