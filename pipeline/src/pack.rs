//! Frames into pack objects, and the index that says which file lies in which frames.
//!
//! A pack is a header (a zstd skippable frame with a nonce), data frames back to back, and the frame table
//! (a zstd skippable frame again): `zstd -d` of a pack gives all its plain bytes in order. A [`PackSet`] has one
//! pack open per [`Lane`]; a lane belongs to one thread that reads, compresses and hashes, while tokio
//! tasks send what is full.

mod format;
mod lane;
mod set;

use serde::{Deserialize, Serialize};

/// Most plain bytes in one frame: 1 MiB.
pub const FRAME_PLAIN_MAX: usize = 1 << 20;
/// Bytes of each multipart part but the last: 8 MiB.
pub const PART_SIZE: usize = 8 << 20;
/// A new pack is begun when one has this many stored bytes: 64 GiB.
pub const PACK_SIZE: u64 = 64 << 30;

/// A new pack is begun when one has this many frames, so that its table stays small in memory.
pub const FRAMES_MAX: u32 = 1 << 16;

pub use format::FrameTable;
pub use lane::Lane;
pub use set::{KeyOf, PackOptions, PackSet};

/// What the manifest keeps of a finished pack object.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PackInfo {
    /// Its number, from 0; `pack-00000` in the key.
    pub number: u32,
    /// Stored bytes of the object.
    pub size: u64,
    /// Data frames in it (header and frame table not counted).
    pub frames: u32,
    /// Plain bytes in its frames.
    pub plain_bytes: u64,
    /// Hex SHA-256 over the concatenated SHA-256 digests of each [`PART_SIZE`] slice of the object (the
    /// last may be shorter): what S3 calls a composite checksum, so the store's own can be compared.
    pub parts_sha256: String,
    /// Byte offset of the frame table in the object.
    pub table_offset: u64,
    /// Hex SHA-256 of the stored bytes of the frame table (`table_offset` to the end of the object).
    pub table_sha256: String,
    /// Fields of a newer minor version, kept as they are.
    #[serde(flatten)]
    pub extra: serde_json::Map<String, serde_json::Value>,
}

/// What the manifest keeps of a finished index object.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct IndexInfo {
    /// Stored bytes of the object.
    pub size: u64,
    /// Hex SHA-256 of its stored bytes.
    pub sha256: String,
    /// Byte offset of the footer block in it.
    pub footer_offset: u64,
    /// Entries.
    pub entries: u64,
    /// Fields of a newer minor version, kept as they are.
    #[serde(flatten)]
    pub extra: serde_json::Map<String, serde_json::Value>,
}

/// A run of consecutive frames of one pack that holds consecutive bytes of a file.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Extent {
    /// Pack number.
    #[serde(rename = "p")]
    pub pack: u32,
    /// First frame, from 0.
    #[serde(rename = "f")]
    pub first: u32,
    /// Number of frames.
    #[serde(rename = "n")]
    pub count: u32,
    /// Where the bytes begin in the plain bytes of the first frame (small files share frames).
    #[serde(rename = "o", default, skip_serializing_if = "is_zero")]
    pub offset: u32,
    /// Plain bytes of the file in this run.
    #[serde(rename = "l")]
    pub length: u64,
}

#[expect(
    clippy::trivially_copy_pass_by_ref,
    reason = "the signature serde asks for"
)]
fn is_zero(value: &u32) -> bool {
    *value == 0
}

/// What an index entry is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "kebab-case")]
pub enum EntryKind {
    /// A regular file: `size` plain bytes, in order, in `extents` (none if empty).
    File {
        /// Plain bytes.
        size: u64,
        /// Where they are.
        #[serde(default, skip_serializing_if = "Vec::is_empty")]
        extents: Vec<Extent>,
    },
    /// A directory.
    Directory,
    /// A symbolic link that is kept as one.
    Symlink {
        /// Its target as read.
        target: String,
    },
}

/// One line of the index.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct IndexEntry {
    /// Relative path with `/`, no `.` or `..`; bytes that are not UTF-8 are refused when it is made.
    pub path: String,
    /// Permission bits (octal 7777 at most).
    pub mode: u32,
    /// Modification time, seconds since 1970.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mtime: Option<i64>,
    /// File, directory or link.
    #[serde(flatten)]
    pub kind: EntryKind,
}
