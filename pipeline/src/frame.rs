//! One frame: at most 1 MiB of plain bytes as one standard zstd frame, and the SHA-256 of what is stored.

use std::io;

use sha2::{Digest as _, Sha256};
use zstd::bulk::{Compressor, Decompressor};
use zstd::zstd_safe::CParameter;

use crate::error::PipelineError;
use crate::pack::FRAME_PLAIN_MAX;
use crate::store::Sha256Digest;

/// Most stored bytes of one frame: what zstd may need for [`FRAME_PLAIN_MAX`] bytes it cannot compress,
/// with head and checksum.
pub const FRAME_STORED_MAX: usize = stored_bound(FRAME_PLAIN_MAX);

/// Most stored bytes for `plain` plain ones (zstd's own bound).
#[must_use]
pub const fn stored_bound(plain: usize) -> usize {
    let small = 128 << 10;
    plain
        + (plain >> 8)
        + if plain < small {
            (small - plain) >> 11
        } else {
            0
        }
}

/// What must be known of a frame before its bytes are used.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct FrameStamp {
    /// Stored bytes.
    pub stored_len: u32,
    /// Plain bytes.
    pub plain_len: u32,
    /// SHA-256 of the stored bytes.
    pub sha256: Sha256Digest,
}

/// Compresses frames; one per thread, its context is used again and again.
pub struct FrameEncoder {
    compressor: Compressor<'static>,
}

impl std::fmt::Debug for FrameEncoder {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("FrameEncoder").finish_non_exhaustive()
    }
}

impl FrameEncoder {
    /// An encoder at zstd `level`, with zstd's checksum of the plain bytes on.
    ///
    /// # Errors
    /// [`PipelineError::Setup`] if zstd refuses the level.
    pub fn new(level: i32) -> Result<Self, PipelineError> {
        let make = || -> io::Result<_> {
            let mut compressor = Compressor::new(level)?;
            compressor.set_parameter(CParameter::ChecksumFlag(true))?;
            Ok(compressor)
        };
        let compressor = make().map_err(|error| PipelineError::codec("set-up", &error))?;
        Ok(Self { compressor })
    }

    /// Compresses `plain` into the front of `out`, which should have [`stored_bound`] of it in bytes.
    ///
    /// # Errors
    /// [`PipelineError::Setup`] if `plain` is larger than a frame may be or `out` is too small.
    pub fn encode(&mut self, plain: &[u8], out: &mut [u8]) -> Result<FrameStamp, PipelineError> {
        let stored = self.compress(plain, out)?;
        Ok(stamp(plain, stored, Sha256::digest(stored).into()))
    }

    /// The same, and feeds the stored bytes to another hash that has been fed `fed` bytes.
    pub(crate) fn encode_into_part(
        &mut self,
        plain: &[u8],
        out: &mut [u8],
        part: &mut Sha256,
        fed: usize,
    ) -> Result<FrameStamp, PipelineError> {
        let stored = self.compress(plain, out)?;
        Ok(stamp(plain, stored, digest_beside(stored, part, fed)))
    }

    fn compress<'a>(&mut self, plain: &[u8], out: &'a mut [u8]) -> Result<&'a [u8], PipelineError> {
        if plain.len() > FRAME_PLAIN_MAX {
            let what = format!("a frame of {} bytes was asked for", plain.len());
            return Err(PipelineError::Setup(what));
        }
        let written = self.compressor.compress_to_buffer(plain, out);
        let written = written.map_err(|error| PipelineError::codec("compress", &error))?;
        Ok(out.get(..written).unwrap_or_default())
    }
}

fn stamp(plain: &[u8], stored: &[u8], sha256: Sha256Digest) -> FrameStamp {
    FrameStamp {
        stored_len: length(stored),
        plain_len: length(plain),
        sha256,
    }
}

/// The SHA-256 of `bytes`, which are also fed to `other`, a hash that has been fed `fed` bytes before.
///
/// Block by block in turns: each hash is one long chain of dependent instructions, and a core works on
/// two such chains at once. Both together cost 1.3 times one of them.
pub(crate) fn digest_beside(bytes: &[u8], other: &mut Sha256, fed: usize) -> Sha256Digest {
    const BLOCK: usize = 64;
    let mut own = Sha256::new();
    // From here on the other hash is at the start of a block too.
    let lead = (fed.next_multiple_of(BLOCK) - fed).min(bytes.len());
    let (head, rest) = bytes.split_at(lead);
    other.update(head);
    let (own_blocks, own_tail) = bytes.as_chunks::<BLOCK>();
    let (other_blocks, other_tail) = rest.as_chunks::<BLOCK>();
    for (own_block, other_block) in own_blocks.iter().zip(other_blocks) {
        own.update(own_block);
        other.update(other_block);
    }
    // The lead may have cost the other one a block.
    for block in own_blocks.iter().skip(other_blocks.len()) {
        own.update(block);
    }
    own.update(own_tail);
    other.update(other_tail);
    own.finalize().into()
}

/// Frames are far below 4 GiB.
fn length(bytes: &[u8]) -> u32 {
    u32::try_from(bytes.len()).unwrap_or(u32::MAX)
}

/// What is wrong with a frame, without its place: the caller knows that.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum FrameDamage {
    /// Fewer or more stored bytes than the stamp says.
    #[error("it has another length than its frame table says")]
    Length,
    /// Other stored bytes than were written.
    #[error("its SHA-256 is not the one in the frame table")]
    Hash,
    /// The stamp allows more plain bytes than a frame may have.
    #[error("it claims more than 1 MiB of plain bytes")]
    TooLarge,
    /// zstd could not read it, or its checksum of the plain bytes differs.
    #[error("zstd cannot decode it, or its checksum differs")]
    Codec,
    /// It decoded to fewer or more bytes than the stamp says.
    #[error("it has another number of plain bytes than its frame table says")]
    PlainLength,
}

/// Decompresses verified frames; one per thread.
pub struct FrameDecoder {
    decompressor: Decompressor<'static>,
    plain: Vec<u8>,
}

impl std::fmt::Debug for FrameDecoder {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("FrameDecoder").finish_non_exhaustive()
    }
}

impl FrameDecoder {
    /// A decoder with a buffer for one frame ([`FRAME_PLAIN_MAX`] bytes).
    ///
    /// # Errors
    /// [`PipelineError::Setup`] if zstd cannot be set up.
    pub fn new() -> Result<Self, PipelineError> {
        let decompressor = Decompressor::new();
        let decompressor = decompressor.map_err(|error| PipelineError::codec("set-up", &error))?;
        Ok(Self {
            decompressor,
            plain: vec![0; FRAME_PLAIN_MAX],
        })
    }

    /// Checks `stored` against `stamp`, decompresses it, checks the result, and only then shows it.
    ///
    /// # Errors
    /// What is wrong with the frame.
    pub fn decode_verified(
        &mut self,
        stored: &[u8],
        stamp: &FrameStamp,
    ) -> Result<&[u8], FrameDamage> {
        let plain = self.plain.get_mut(..stamp.plain_len as usize);
        let plain = plain.ok_or(FrameDamage::TooLarge)?;
        decode(&mut self.decompressor, stored, stamp, plain)?;
        Ok(plain)
    }

    /// The same into a buffer of the caller's, which must have exactly the stamp's plain length. What is in it
    /// after an error is not to be used.
    ///
    /// # Errors
    /// What is wrong with the frame.
    pub fn decode_verified_into(
        &mut self,
        stored: &[u8],
        stamp: &FrameStamp,
        plain: &mut [u8],
    ) -> Result<(), FrameDamage> {
        if plain.len() != stamp.plain_len as usize {
            return Err(FrameDamage::PlainLength);
        }
        decode(&mut self.decompressor, stored, stamp, plain)
    }
}

/// `plain` has exactly the size expected: a frame that holds more is an error of zstd's own.
fn decode(
    decompressor: &mut Decompressor<'static>,
    stored: &[u8],
    stamp: &FrameStamp,
    plain: &mut [u8],
) -> Result<(), FrameDamage> {
    if stored.len() != stamp.stored_len as usize {
        return Err(FrameDamage::Length);
    }
    let sha256: Sha256Digest = Sha256::digest(stored).into();
    if sha256 != stamp.sha256 {
        return Err(FrameDamage::Hash);
    }
    match decompressor.decompress_to_buffer(stored, plain) {
        Ok(written) if written == plain.len() => Ok(()),
        Ok(_) => Err(FrameDamage::PlainLength),
        Err(_) => Err(FrameDamage::Codec),
    }
}

/// Bytes before the content of a zstd skippable frame: magic and length.
pub const SKIPPABLE_HEAD: usize = 8;

/// The first 8 bytes of a zstd skippable frame of `length` content bytes; `variant` is 0 to 15.
///
/// Every zstd reader passes over such a frame, so `zstd -d` reads our objects as they are.
#[must_use]
pub fn skippable_head(variant: u8, length: u32) -> [u8; SKIPPABLE_HEAD] {
    let magic = 0x184D_2A50_u32 + u32::from(variant & 15);
    let mut head = [0; SKIPPABLE_HEAD];
    let (left, right) = head.split_at_mut(4);
    left.copy_from_slice(&magic.to_le_bytes());
    right.copy_from_slice(&length.to_le_bytes());
    head
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_bound_is_that_of_zstd() {
        for plain in [0, 1, 100, 4096, 131_071, 131_072, 999_999, FRAME_PLAIN_MAX] {
            assert_eq!(stored_bound(plain), zstd::zstd_safe::compress_bound(plain));
        }
        // Head (at most 18 bytes) and checksum (4) fit in the bound's slack.
        let noise: Vec<u8> = (0..FRAME_PLAIN_MAX).map(|_| rand::random()).collect();
        let mut out = vec![0; FRAME_STORED_MAX];
        let stamp = FrameEncoder::new(1)
            .unwrap()
            .encode(&noise, &mut out)
            .unwrap();
        let mut decoder = FrameDecoder::new().unwrap();
        let stored = &out[..stamp.stored_len as usize];
        assert_eq!(decoder.decode_verified(stored, &stamp).unwrap(), noise);
    }

    #[test]
    fn two_hashes_in_turns_are_those_one_after_the_other() {
        let bytes: Vec<u8> = (0..1000_u32).map(|n| n.to_le_bytes()[0]).collect();
        for fed in [0, 1, 63, 64, 65, 100] {
            for length in [0, 1, 27, 28, 62, 63, 64, 65, 127, 128, 129, 191, 1000] {
                let (before, now) = (&bytes[..fed], &bytes[..length]);
                let mut other = Sha256::new();
                other.update(before);
                let own = digest_beside(now, &mut other, fed);
                assert_eq!(own, <Sha256Digest>::from(Sha256::digest(now)));
                let both = [before, now].concat();
                assert_eq!(other.finalize(), Sha256::digest(both), "{fed} + {length}");
            }
        }
    }

    #[test]
    fn each_kind_of_damage_has_its_name() {
        let mut out = vec![0; FRAME_STORED_MAX];
        let plain = vec![7; 5000];
        let stamp = FrameEncoder::new(1)
            .unwrap()
            .encode(&plain, &mut out)
            .unwrap();
        let stored = &out[..stamp.stored_len as usize];
        let mut decoder = FrameDecoder::new().unwrap();
        let cut = &stored[..stored.len() - 1];
        assert_eq!(
            decoder.decode_verified(cut, &stamp),
            Err(FrameDamage::Length)
        );
        let mut flipped = stored.to_vec();
        flipped[9] ^= 1;
        assert_eq!(
            decoder.decode_verified(&flipped, &stamp),
            Err(FrameDamage::Hash)
        );
        let huge = FrameStamp {
            plain_len: u32::MAX,
            ..stamp
        };
        assert_eq!(
            decoder.decode_verified(stored, &huge),
            Err(FrameDamage::TooLarge)
        );
        let short = FrameStamp {
            plain_len: 4999,
            ..stamp
        };
        assert_eq!(
            decoder.decode_verified(stored, &short),
            Err(FrameDamage::Codec)
        );
        let long = FrameStamp {
            plain_len: 5001,
            ..stamp
        };
        assert_eq!(
            decoder.decode_verified(stored, &long),
            Err(FrameDamage::PlainLength)
        );
        let sha256 = Sha256::digest(&flipped).into();
        let rehashed = FrameStamp { sha256, ..stamp };
        assert_eq!(
            decoder.decode_verified(&flipped, &rehashed),
            Err(FrameDamage::Codec)
        );
    }
}
