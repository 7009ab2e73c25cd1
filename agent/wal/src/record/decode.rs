//! One record's bytes: CRC, block headers, main data (`DecodeXLogRecord`).

use super::{HEADER, Record, RecordFault};
use crate::bytes::{array, u16_at, u32_at, u64_at};
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
pub(super) fn record(bytes: &[u8], major: Major) -> Result<Record, RecordFault> {
    let layout = RecordFault::Layout("header");
    let (head, body) = bytes.split_at_checked(HEADER).ok_or(layout)?;
    // The CRC covers the data first, then the header before the CRC (XLogRecordAssemble).
    let crc = crc32c::crc32c_append(crc32c::crc32c(body), &head[..20]);
    if u32_at(head, 20) != Some(crc) {
        return Err(RecordFault::Crc);
    }
    let main = main_data_length(body, major)?;
    let data = body
        .len()
        .checked_sub(main)
        .and_then(|at| body.get(at..))
        .ok_or(RecordFault::Layout("main data"))?;
    let [info, rmid] = array(head, 16).ok_or(layout)?;
    Ok(Record {
        start: Lsn::INVALID,
        end: Lsn::INVALID,
        previous: Lsn(u64_at(head, 8).ok_or(layout)?),
        rmid,
        info,
        xid: u32_at(head, 4).ok_or(layout)?,
        timeline: 0,
        major,
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
