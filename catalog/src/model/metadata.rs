//! The proxies' metadata at a point.

use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use uuid::Uuid;

use super::{Extra, FormatVersion};
use crate::ids::PointId;

/// Which object holds a point's metadata, and that it is the one.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct MetadataRef {
    /// Hex SHA-256 of the stored bytes of `metadata/<point-id>.json`.
    pub sha256: String,
    /// Its stored bytes.
    pub size: u64,
    /// See [`Extra`].
    #[serde(flatten)]
    pub extra: Extra,
}

/// `metadata/<point-id>.json`: what the proxies knew of databases, storage units and rules at a point.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Metadata {
    /// Format of the object.
    pub format: FormatVersion,
    /// The point.
    pub point_id: PointId,
    /// What it comes from: `shardingsphere`.
    pub source: String,
    /// Version of that program, as it says.
    pub source_version: Option<String>,
    /// When it was read (UTC).
    pub taken: Timestamp,
    /// What `EXPORT METADATA` gave, decoded: JSON, with every secret in it replaced by `${gs_pitr:<name>}`.
    pub document: String,
    /// Names of the secrets that were replaced, in the order of the document. Never their values.
    pub placeholders: Vec<String>,
    /// Operation that wrote it.
    pub operation: Uuid,
    /// Random, see [`super::Repository::nonce`].
    pub nonce: Uuid,
    /// See [`Extra`].
    #[serde(flatten)]
    pub extra: Extra,
}
