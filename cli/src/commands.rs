//! One file a command.

pub(crate) mod backup;
pub(crate) mod certs;
pub(crate) mod check;
pub(crate) mod completions;
pub(crate) mod delete;
pub(crate) mod man;
pub(crate) mod metadata;
pub(crate) mod operations;
pub(crate) mod point;
pub(crate) mod prune;
pub(crate) mod restore;
pub(crate) mod show;
pub(crate) mod unlock;
pub(crate) mod verify;
pub(crate) mod wal;
