//! The bytes of a pack before and after its data frames. docs/FORMAT.md has the table of fields.

use std::ops::Range;

use sha2::{Digest as _, Sha256};

use super::{FRAME_PLAIN_MAX, FRAMES_MAX, PackInfo};
use crate::error::PipelineError;
use crate::frame::{FRAME_STORED_MAX, FrameStamp, SKIPPABLE_HEAD, skippable_head};
use crate::store::Key;

/// First bytes of the header's content.
const HEADER_MAGIC: &[u8; 8] = b"GSPITRPK";
/// First and last bytes of the table's content.
const TABLE_MAGIC: &[u8; 8] = b"GSPITRFT";
/// Format version of both.
const VERSION: u16 = 1;
/// Skippable frame variants of header and table.
const HEADER_VARIANT: u8 = 0;
const TABLE_VARIANT: u8 = 1;
/// Bytes of one table entry: stored length, plain length, SHA-256.
pub(super) const ENTRY: usize = 40;
/// Most bytes of a header: fixed fields and the longest key.
const HEADER_MAX: usize = SKIPPABLE_HEAD + 62 + 900;
/// Bytes of a table besides header copy and entries.
const TABLE_FIXED: usize = SKIPPABLE_HEAD + 20 + 12;

fn u32_of(length: usize) -> u32 {
    u32::try_from(length).unwrap_or(u32::MAX)
}

/// The header of a new pack: magic, version, flags (0: not encrypted), nonce, room for an encryption
/// salt, the object's own key.
pub(super) fn header(key: &Key, nonce: [u8; 16]) -> Vec<u8> {
    let key = key.as_str().as_bytes();
    let mut content = Vec::with_capacity(HEADER_MAX);
    content.extend_from_slice(HEADER_MAGIC);
    content.extend_from_slice(&VERSION.to_le_bytes());
    content.extend_from_slice(&0_u16.to_le_bytes());
    content.extend_from_slice(&nonce);
    content.extend_from_slice(&[0; 32]);
    content.extend_from_slice(&u16::try_from(key.len()).unwrap_or(u16::MAX).to_le_bytes());
    content.extend_from_slice(key);
    let mut header = skippable_head(HEADER_VARIANT, u32_of(content.len())).to_vec();
    header.extend_from_slice(&content);
    header
}

/// One entry of a table.
pub(super) fn push_entry(entries: &mut Vec<u8>, stamp: &FrameStamp) {
    entries.extend_from_slice(&stamp.stored_len.to_le_bytes());
    entries.extend_from_slice(&stamp.plain_len.to_le_bytes());
    entries.extend_from_slice(&stamp.sha256);
}

/// The frame table. It holds a copy of the header, so that a change there is seen too, and ends in its
/// own length, so that it is found without a manifest.
pub(super) fn table(header: &[u8], entries: &[u8]) -> Vec<u8> {
    let length = TABLE_FIXED + header.len() + entries.len();
    let mut table = skippable_head(TABLE_VARIANT, u32_of(length - SKIPPABLE_HEAD)).to_vec();
    table.reserve_exact(length);
    table.extend_from_slice(TABLE_MAGIC);
    table.extend_from_slice(&VERSION.to_le_bytes());
    table.extend_from_slice(&0_u16.to_le_bytes());
    table.extend_from_slice(&u32_of(entries.len() / ENTRY).to_le_bytes());
    table.extend_from_slice(&u32_of(header.len()).to_le_bytes());
    table.extend_from_slice(header);
    table.extend_from_slice(entries);
    table.extend_from_slice(&u32_of(length).to_le_bytes());
    table.extend_from_slice(TABLE_MAGIC);
    table
}

/// Most bytes of a table of `frames` frames.
fn table_max(frames: u32) -> u64 {
    (TABLE_FIXED + HEADER_MAX) as u64 + u64::from(frames) * ENTRY as u64
}

/// What a pack says of its frames, checked against what the manifest says of the pack.
#[derive(Debug)]
pub struct FrameTable {
    header: Vec<u8>,
    stamps: Vec<FrameStamp>,
    /// Where each frame begins in the object, and where the last one ends.
    offsets: Vec<u64>,
}

/// Reads little-endian fields; `None` when the bytes end.
struct Fields<'a>(&'a [u8]);

impl<'a> Fields<'a> {
    fn take(&mut self, count: usize) -> Option<&'a [u8]> {
        let (head, rest) = self.0.split_at_checked(count)?;
        self.0 = rest;
        Some(head)
    }

    fn array<const N: usize>(&mut self) -> Option<[u8; N]> {
        self.take(N)?.try_into().ok()
    }

    fn u16(&mut self) -> Option<u16> {
        self.array().map(u16::from_le_bytes)
    }

    fn u32(&mut self) -> Option<u32> {
        self.array().map(u32::from_le_bytes)
    }
}

impl FrameTable {
    /// Where the table lies in the object, if `info` can be true at all: so that no absurd number of it
    /// becomes an allocation.
    ///
    /// # Errors
    /// [`PipelineError::Damaged`].
    pub(crate) fn range(key: &Key, info: &PackInfo) -> Result<Range<u64>, PipelineError> {
        let length = info.size.checked_sub(info.table_offset);
        match length {
            Some(length) if info.frames <= FRAMES_MAX && length <= table_max(info.frames) => {
                Ok(info.table_offset..info.size)
            }
            _ => Err(PipelineError::damaged(
                key,
                format!(
                    "its description cannot be true: {} bytes, {} frames, frame table at {}",
                    info.size, info.frames, info.table_offset
                ),
            )),
        }
    }

    /// Checks and reads the stored bytes of a table.
    ///
    /// # Errors
    /// [`PipelineError::Damaged`], saying what does not fit.
    pub(crate) fn parse(key: &Key, info: &PackInfo, bytes: &[u8]) -> Result<Self, PipelineError> {
        let damaged = |what: &str| PipelineError::damaged(key, format!("frame table: {what}"));
        if hex::encode(Sha256::digest(bytes)) != info.table_sha256 {
            return Err(damaged("its SHA-256 is not the manifest's"));
        }
        let table = Self::fields(bytes, info.table_offset)
            .ok_or_else(|| damaged("it is not laid out as one"))?;
        if table.stamps.len() != info.frames as usize {
            return Err(damaged(
                "it has another number of frames than the manifest says",
            ));
        }
        let too_large = |stamp: &FrameStamp| {
            stamp.plain_len as usize > FRAME_PLAIN_MAX
                || stamp.stored_len as usize > FRAME_STORED_MAX
        };
        if table.stamps.iter().any(too_large) {
            return Err(damaged("a frame is larger than frames may be"));
        }
        let plain: u64 = table
            .stamps
            .iter()
            .map(|stamp| u64::from(stamp.plain_len))
            .sum();
        if plain != info.plain_bytes {
            return Err(damaged(
                "it has another number of plain bytes than the manifest says",
            ));
        }
        if !table.header_names(key) {
            return Err(damaged("it belongs to another object"));
        }
        Ok(table)
    }

    fn fields(bytes: &[u8], table_offset: u64) -> Option<Self> {
        let mut fields = Fields(bytes);
        let content = u32_of(bytes.len().checked_sub(SKIPPABLE_HEAD)?);
        let head = fields.array::<SKIPPABLE_HEAD>()? == skippable_head(TABLE_VARIANT, content);
        let magic = fields.array()? == *TABLE_MAGIC && fields.u16()? == VERSION;
        let _flags = fields.u16()?;
        let count = fields.u32()? as usize;
        let header_len = fields.u32()? as usize;
        let header = fields.take(header_len)?.to_vec();
        let mut entries = Fields(fields.take(count.checked_mul(ENTRY)?)?);
        let end = fields.u32()? as usize == bytes.len() && fields.array()? == *TABLE_MAGIC;
        if !(head && magic && end && fields.0.is_empty()) {
            return None;
        }
        let mut offset = header.len() as u64;
        let (mut stamps, mut offsets) = (Vec::with_capacity(count), Vec::with_capacity(count + 1));
        for _ in 0..count {
            let stamp = FrameStamp {
                stored_len: entries.u32()?,
                plain_len: entries.u32()?,
                sha256: entries.array()?,
            };
            offsets.push(offset);
            offset += u64::from(stamp.stored_len);
            stamps.push(stamp);
        }
        offsets.push(offset);
        // The frames end where the table begins, or bytes were put between.
        (offset == table_offset).then_some(Self {
            header,
            stamps,
            offsets,
        })
    }

    fn header_names(&self, key: &Key) -> bool {
        let name = key.as_str().as_bytes();
        let nonce = self.header.get(SKIPPABLE_HEAD + 12..SKIPPABLE_HEAD + 28);
        let nonce = nonce.and_then(|nonce| <[u8; 16]>::try_from(nonce).ok());
        nonce.is_some_and(|nonce| self.header == header(key, nonce)) && !name.is_empty()
    }

    /// The header as it must stand at the front of the object.
    pub(crate) fn header(&self) -> &[u8] {
        &self.header
    }

    /// How many frames there are.
    #[must_use]
    pub fn len(&self) -> usize {
        self.stamps.len()
    }

    /// Whether there are none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.stamps.is_empty()
    }

    /// The stamp of frame `index`, from 0.
    #[must_use]
    pub fn stamp(&self, index: u32) -> Option<&FrameStamp> {
        self.stamps.get(index as usize)
    }

    /// Where frame `index` lies in the object.
    #[must_use]
    pub fn place(&self, index: u32) -> Option<Range<u64>> {
        let index = index as usize;
        let start = *self.offsets.get(index)?;
        Some(start..*self.offsets.get(index + 1)?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sample() -> (Key, PackInfo, Vec<u8>) {
        let key = Key::new("backups/b/n/1/pack-00000").unwrap();
        let header = header(&key, [7; 16]);
        let mut entries = Vec::new();
        for length in 1..4_u32 {
            let sha256 = Sha256::digest(length.to_le_bytes()).into();
            let stamp = FrameStamp {
                stored_len: length,
                plain_len: 10 * length,
                sha256,
            };
            push_entry(&mut entries, &stamp);
        }
        let table = table(&header, &entries);
        let table_offset = header.len() as u64 + 6;
        let info = PackInfo {
            number: 0,
            size: table_offset + table.len() as u64,
            frames: 3,
            plain_bytes: 60,
            parts_sha256: String::new(),
            table_offset,
            table_sha256: hex::encode(Sha256::digest(&table)),
            extra: serde_json::Map::new(),
        };
        (key, info, table)
    }

    #[test]
    fn a_table_comes_back() {
        let (key, info, bytes) = sample();
        assert_eq!(
            FrameTable::range(&key, &info).unwrap(),
            info.table_offset..info.size
        );
        let table = FrameTable::parse(&key, &info, &bytes).unwrap();
        let front = table.header().len() as u64;
        assert_eq!(table.place(2), Some(front + 3..front + 6));
        assert_eq!((table.place(3), table.stamp(3)), (None, None));
        assert_eq!(table.stamp(1).unwrap().plain_len, 20);
    }

    #[test]
    fn a_table_that_hashes_right_but_lies_is_refused() {
        let (key, info, bytes) = sample();
        for at in 0..bytes.len() {
            // The hash is made to fit: only the layout can tell, except inside the frames' own hashes.
            let mut changed = bytes.clone();
            changed[at] ^= 0x41;
            let table_sha256 = hex::encode(Sha256::digest(&changed));
            let info = PackInfo {
                table_sha256,
                ..info.clone()
            };
            // Must not panic, whatever it answers.
            let _ = FrameTable::parse(&key, &info, &changed);
        }
        let other = Key::new("backups/b/n/1/pack-00001").unwrap();
        assert!(FrameTable::parse(&other, &info, &bytes).is_err());
        for cut in 0..bytes.len() {
            assert!(FrameTable::parse(&key, &info, &bytes[..cut]).is_err());
        }
    }

    #[test]
    fn absurd_descriptions_make_no_allocation() {
        let (key, info, _) = sample();
        let huge = PackInfo {
            size: u64::MAX,
            ..info.clone()
        };
        assert!(FrameTable::range(&key, &huge).is_err());
        let before = PackInfo {
            table_offset: info.size + 1,
            ..info.clone()
        };
        assert!(FrameTable::range(&key, &before).is_err());
        let many = PackInfo {
            frames: u32::MAX,
            size: u64::MAX,
            table_offset: 0,
            ..info
        };
        assert!(FrameTable::range(&key, &many).is_err());
    }
}
