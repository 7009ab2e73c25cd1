//! What a store says of the versions of an object, and of what holds one back.

use std::time::SystemTime;

use super::{Key, ObjectMeta, StoreError};

/// The store's name for one version of an object.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct VersionId(pub String);

/// One version of an object, or a marker that hides the versions before it.
#[derive(Debug, Clone)]
pub struct ObjectVersion {
    /// The object's key.
    pub key: Key,
    /// The version; `None`: the store keeps no versions, there is only this one.
    pub version: Option<VersionId>,
    /// Stored size in bytes; 0 for a marker.
    pub size: u64,
    /// When the store says it was written.
    pub last_modified: Option<SystemTime>,
    /// Whether it is what a reader gets who names no version (of a marker: that there is no object).
    pub is_latest: bool,
    /// Whether it is no object but the mark of a deletion.
    pub is_marker: bool,
}

impl ObjectVersion {
    /// The only version of an object, in a store that keeps no others.
    #[must_use]
    pub fn only(object: ObjectMeta) -> Self {
        Self {
            key: object.key,
            version: None,
            size: object.size,
            last_modified: object.last_modified,
            is_latest: true,
            is_marker: false,
        }
    }
}

/// A version that was not deleted, and why.
#[derive(Debug, Clone)]
pub struct Undeleted {
    /// The object's key.
    pub key: Key,
    /// Which version of it.
    pub version: Option<VersionId>,
    /// The store's words.
    pub error: StoreError,
}

/// What keeps the store from deleting a version.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Hold {
    /// A retention and the moment it ends.
    pub until: Option<SystemTime>,
    /// `GOVERNANCE` or `COMPLIANCE`, as the store calls it; empty without a retention.
    pub mode: String,
    /// A legal hold: until somebody lifts it.
    pub legal: bool,
}
