//! The end of every WAL object: a zstd skippable frame of 184 bytes that says what the object is.

use pipeline::frame::{SKIPPABLE_HEAD, skippable_head};
use pipeline::store::Key;
use sha2::{Digest as _, Sha256};
use uuid::Uuid;

use crate::error::CatalogError;
use crate::ids::EpochId;
use crate::wal::{WalFile, WalName};

/// Stored bytes of the trailer.
pub(super) const TRAILER_LEN: usize = 184;
const DIGEST_LEN: usize = 32;
/// Which of zstd's 16 kinds of skippable frames it is: magic 0x184D2A5A.
const VARIANT: u8 = 10;
/// Bytes of the frame after its head.
const CONTENT_LEN: u32 = 176;
const TAG: &[u8; 8] = b"gspwal\x00\x01";
const EPOCH_LEN: usize = 24;
const NAME_LEN: usize = 32;

/// What a trailer says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Trailer {
    pub(super) file: WalFile,
    /// Plain bytes of the file.
    pub(super) length: u64,
    /// Random, so that a lost reply can be told from another's write.
    pub(super) nonce: Uuid,
    pub(super) plain_sha256: [u8; 32],
}

impl Trailer {
    /// The stored bytes; `before` has been fed every stored byte before the trailer.
    pub(super) fn encode(&self, mut before: Sha256) -> [u8; TRAILER_LEN] {
        let mut bytes = [0; TRAILER_LEN];
        let mut at = 0;
        let mut field = |content: &[u8], width: usize| {
            bytes[at..at + content.len()].copy_from_slice(content);
            at += width;
        };
        field(&skippable_head(VARIANT, CONTENT_LEN), SKIPPABLE_HEAD);
        field(TAG, 8);
        field(&[], 8);
        field(self.file.node.as_bytes(), 16);
        field(self.file.epoch.as_str().as_bytes(), EPOCH_LEN);
        field(self.file.name.as_str().as_bytes(), NAME_LEN);
        field(&self.length.to_le_bytes(), 8);
        field(self.nonce.as_bytes(), 16);
        field(&self.plain_sha256, 32);
        before.update(&bytes[..TRAILER_LEN - DIGEST_LEN]);
        bytes[TRAILER_LEN - DIGEST_LEN..].copy_from_slice(&before.finalize());
        bytes
    }

    /// Verifies the trailer of an object of which `before` has been fed all else.
    pub(super) fn decode(
        key: &Key,
        bytes: &[u8],
        mut before: Sha256,
    ) -> Result<Self, CatalogError> {
        let damaged = |what: &str| CatalogError::damaged(key, what);
        let bytes: &[u8; TRAILER_LEN] = bytes
            .try_into()
            .map_err(|_| damaged("it is shorter than its trailer"))?;
        before.update(&bytes[..TRAILER_LEN - DIGEST_LEN]);
        if before.finalize()[..] != bytes[TRAILER_LEN - DIGEST_LEN..] {
            return Err(damaged(
                "the SHA-256 in its trailer is another, or it is cut short",
            ));
        }
        let mut rest = &bytes[..];
        let mut field = |width: usize| {
            let (field, after) = rest.split_at(width);
            rest = after;
            field
        };
        let (head, tag, reserved) = (field(SKIPPABLE_HEAD), field(8), field(8));
        if head != skippable_head(VARIANT, CONTENT_LEN) {
            return Err(damaged("its trailer is no skippable frame of ours"));
        }
        if tag != TAG || reserved != [0; 8] {
            return Err(damaged(
                "its trailer is of a version or kind that this program does not know",
            ));
        }
        let node = Uuid::from_slice(field(16)).map_err(|_| damaged("no node in its trailer"))?;
        let epoch: EpochId = text(field(EPOCH_LEN))
            .and_then(|text| text.parse().ok())
            .ok_or_else(|| damaged("no epoch in its trailer"))?;
        let name: WalName = text(field(NAME_LEN))
            .and_then(|text| text.parse().ok())
            .ok_or_else(|| damaged("no WAL file name in its trailer"))?;
        let length = u64::from_le_bytes(array(field(8)));
        let nonce = Uuid::from_bytes(array(field(16)));
        let plain_sha256 = array(field(32));
        let file = WalFile { node, epoch, name };
        Ok(Self {
            file,
            length,
            nonce,
            plain_sha256,
        })
    }
}

/// The bytes of a field of `N` bytes.
fn array<const N: usize>(field: &[u8]) -> [u8; N] {
    let mut bytes = [0; N];
    bytes.copy_from_slice(field);
    bytes
}

/// The text of a field that is padded with zero bytes.
fn text(field: &[u8]) -> Option<&str> {
    let end = field.iter().rposition(|byte| *byte != 0)? + 1;
    std::str::from_utf8(&field[..end]).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn trailer(name: &str) -> Trailer {
        Trailer {
            file: WalFile {
                node: Uuid::from_u128(0x1234_5678),
                epoch: "00000001-9f3c1a2b".parse().unwrap(),
                name: name.parse().unwrap(),
            },
            length: 16 << 20,
            nonce: Uuid::from_u128(99),
            plain_sha256: [7; 32],
        }
    }

    #[test]
    fn it_comes_back_and_any_change_is_found() {
        let key = Key::new("wal/x").unwrap();
        for name in ["000000010000000A000000FF", "00000002.history"] {
            let trailer = trailer(name);
            let before = Sha256::new_with_prefix(b"stored");
            let bytes = trailer.encode(before.clone());
            assert_eq!(
                Trailer::decode(&key, &bytes, before.clone()).unwrap(),
                trailer
            );
            for at in 0..bytes.len() {
                let mut changed = bytes;
                changed[at] ^= 1;
                let error = Trailer::decode(&key, &changed, before.clone()).unwrap_err();
                assert!(matches!(error, CatalogError::Damaged { .. }));
            }
            assert!(Trailer::decode(&key, &bytes[1..], before).is_err());
            assert!(Trailer::decode(&key, &bytes, Sha256::new()).is_err());
        }
    }
}
