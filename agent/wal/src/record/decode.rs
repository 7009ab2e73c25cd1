//! One record's bytes: CRC, block headers, main data (`DecodeXLogRecord`).

use super::{Record, RecordFault};
use crate::bytes::{array, u16_at, u32_at, u64_at};
use crate::flavour::{Flavour, Xid};
use crate::version::Major;
use crate::{BLOCK_SIZE, Lsn};

/// `XLR_MAX_BLOCK_ID`.
const MAX_BLOCK_ID: u8 = 32;
/// `XLR_BLOCK_ID_DATA_SHORT`, `_LONG`, `_ORIGIN`, and (from 14 on) `_TOPLEVEL_XID`.
const DATA_SHORT: u8 = 255;
const DATA_LONG: u8 = 254;
const ORIGIN: u8 = 253;
const TOPLEVEL_XID: u8 = 252;

/// `BKPBLOCK_HAS_IMAGE`, `_HAS_DATA`, `_SAME_REL`.
const HAS_IMAGE: u8 = 0x10;
const HAS_DATA: u8 = 0x20;
const SAME_RELATION: u8 = 0x80;

/// `BKPIMAGE_HAS_HOLE`.
const HAS_HOLE: u8 = 0x01;

/// Reads a whole record. `start`, `end` and `timeline` of the result are the caller's to fill in.
pub(super) fn record(bytes: &[u8], flavour: Flavour) -> Result<Record, RecordFault> {
    let layout = flavour.layout();
    let cut = RecordFault::Layout("header");
    let (head, body) = bytes.split_at_checked(layout.record_header).ok_or(cut)?;
    let (covered, stored) = head.split_last_chunk().ok_or(cut)?;
    // The CRC covers the data first, then the header before the CRC (XLogRecordAssemble). openGauss has the same
    // polynomial and order (COMP_CRC32C, ValidXLogRecord).
    let crc = crc32c::crc32c_append(crc32c::crc32c(body), covered);
    if u32::from_le_bytes(*stored) != crc {
        return Err(RecordFault::Crc);
    }
    let main = match flavour {
        Flavour::PostgreSql(major) => main_data_length(body, major)?,
        Flavour::OpenGauss => opengauss_main_data_length(body)?,
    };
    let data = body
        .len()
        .checked_sub(main)
        .and_then(|at| body.get(at..))
        .ok_or(RecordFault::Layout("main data"))?;
    let [info, rmid] = array(head, layout.info).ok_or(cut)?;
    let xid = match layout.xid {
        Xid::Narrow(at) => u32_at(head, at).map(u64::from),
        Xid::Wide(at) => u64_at(head, at),
    };
    Ok(Record {
        start: Lsn::INVALID,
        end: Lsn::INVALID,
        previous: Lsn(u64_at(head, layout.previous).ok_or(cut)?),
        rmid,
        info,
        xid: xid.ok_or(cut)?,
        timeline: 0,
        flavour,
        data: data.to_vec(),
    })
}

/// Reads bytes from the front.
struct Front<'a>(&'a [u8]);

impl<'a> Front<'a> {
    fn take(&mut self, length: usize) -> Result<&'a [u8], RecordFault> {
        let (front, rest) = self
            .0
            .split_at_checked(length)
            .ok_or(RecordFault::Layout("list of blocks"))?;
        self.0 = rest;
        Ok(front)
    }

    fn u8(&mut self) -> Result<u8, RecordFault> {
        Ok(self.take(1)?[0])
    }

    fn u16(&mut self) -> Result<u16, RecordFault> {
        u16_at(self.take(2)?, 0).ok_or(RecordFault::Layout("list of blocks"))
    }

    fn u32(&mut self) -> Result<u32, RecordFault> {
        u32_at(self.take(4)?, 0).ok_or(RecordFault::Layout("list of blocks"))
    }
}

/// Walks the headers and returns the length of the main data, which is last in the record. Every byte must
/// be accounted for.
fn main_data_length(body: &[u8], major: Major) -> Result<usize, RecordFault> {
    let mut front = Front(body);
    let mut of_blocks = 0;
    let mut main = 0;
    let mut last_block = None;
    let mut has_relation = false;
    // The headers end where what they announce begins.
    while front.0.len() > of_blocks + main {
        match front.u8()? {
            DATA_SHORT => {
                main = usize::from(front.u8()?);
                break;
            }
            DATA_LONG => {
                main = usize::try_from(front.u32()?).unwrap_or(usize::MAX);
                break;
            }
            ORIGIN => {
                front.take(2)?;
            }
            TOPLEVEL_XID if major.number() >= 14 => {
                front.take(4)?;
            }
            id if id <= MAX_BLOCK_ID && last_block.is_none_or(|last| id > last) => {
                last_block = Some(id);
                of_blocks += block(&mut front, major, &mut has_relation)?;
            }
            _ => return Err(RecordFault::Layout("block number")),
        }
    }
    let announced = of_blocks.checked_add(main);
    if announced == Some(front.0.len()) {
        Ok(main)
    } else {
        Err(RecordFault::Layout("sum of lengths"))
    }
}

/// The length of the main data of a record of openGauss; 0 if it has blocks.
///
/// Its blocks' headers grew from release to release under the same page magic (bucket, segment and encrypted pages), so they
/// are not taken apart: the CRC has shown that the record is whole, and none of the kinds that are looked for has blocks.
fn opengauss_main_data_length(body: &[u8]) -> Result<usize, RecordFault> {
    let mut front = Front(body);
    if front.0.first() == Some(&ORIGIN) {
        front.take(3)?;
    }
    let main = match front.0.first() {
        Some(&DATA_SHORT) => {
            front.take(1)?;
            usize::from(front.u8()?)
        }
        Some(&DATA_LONG) => {
            front.take(1)?;
            usize::try_from(front.u32()?).unwrap_or(usize::MAX)
        }
        _ => return Ok(0),
    };
    // By convention the main data is the last fragment.
    if main == front.0.len() {
        Ok(main)
    } else {
        Err(RecordFault::Layout("sum of lengths"))
    }
}

/// One block's header after its id; returns the bytes of image and data that it announces.
fn block(
    front: &mut Front<'_>,
    major: Major,
    has_relation: &mut bool,
) -> Result<usize, RecordFault> {
    let flags = front.u8()?;
    let data = usize::from(front.u16()?);
    if (flags & HAS_DATA != 0) != (data > 0) {
        return Err(RecordFault::Layout("block's data"));
    }
    let image = if flags & HAS_IMAGE == 0 {
        0
    } else {
        let length = usize::from(front.u16()?);
        front.take(2)?; // where the hole begins
        let info = front.u8()?;
        if info & HAS_HOLE != 0 && info & compressed(major) != 0 {
            front.take(2)?; // length of the hole
        }
        if length > BLOCK_SIZE {
            return Err(RecordFault::Layout("page image"));
        }
        length
    };
    if flags & SAME_RELATION == 0 {
        // RelFileNode to 15, RelFileLocator from 16 on: tablespace, database, number.
        front.take(12)?;
        *has_relation = true;
    } else if !*has_relation {
        return Err(RecordFault::Layout("relation of a block"));
    }
    front.take(4)?; // block number
    Ok(data + image)
}

/// Flags of `bimg_info` that say that a page image is compressed.
fn compressed(major: Major) -> u8 {
    if major.number() >= 15 {
        // BKPIMAGE_COMPRESS_PGLZ, _LZ4, _ZSTD; 0x02 became BKPIMAGE_APPLY.
        0x04 | 0x08 | 0x10
    } else {
        // BKPIMAGE_IS_COMPRESSED.
        0x02
    }
}
