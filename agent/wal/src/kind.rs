//! What records say: the few kinds that a backup or a restore has to know.

use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use std::path::PathBuf;

use crate::Lsn;
use crate::bytes::{array, i64_at, u32_at, u64_at};
use crate::record::Record;

/// `RM_XLOG_ID` (`src/include/access/rmgrlist.h`).
const RM_XLOG: u8 = 0;
/// `RM_TBLSPC_ID`.
const RM_TABLESPACE: u8 = 5;
/// `XLOG_CHECKPOINT_SHUTDOWN`.
const CHECKPOINT_SHUTDOWN: u8 = 0x00;
/// `XLOG_SWITCH` (`src/include/catalog/pg_control.h`).
const SWITCH: u8 = 0x40;
/// `XLOG_RESTORE_POINT`.
const RESTORE_POINT: u8 = 0x70;
/// `XLOG_TBLSPC_CREATE` (`src/include/commands/tablespace.h`).
const TABLESPACE_CREATE: u8 = 0x00;
/// `XLR_RMGR_INFO_MASK`.
const KIND: u8 = 0xF0;

/// `MAXFNAMELEN`, with its NUL.
const NAME_BYTES: usize = 64;
/// Microseconds from 1970 to 2000, where PostgreSQL's timestamps begin.
const EPOCH: i64 = 946_684_800_000_000;

/// A restore point.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RestorePoint {
    /// Its name; bytes that are no UTF-8 are replaced.
    pub name: String,
    /// When it was made, in microseconds since 1970 (UTC).
    pub time: i64,
}

fn is(record: &Record, rmid: u8, kind: u8) -> bool {
    record.rmid == rmid && record.info & KIND == kind
}

/// Bytes up to the first NUL.
fn until_nul(bytes: &[u8]) -> &[u8] {
    bytes.split(|byte| *byte == 0).next().unwrap_or_default()
}

/// Whether the record ends its segment: what follows it there is zero.
#[must_use]
pub fn is_switch(record: &Record) -> bool {
    is_switch_kind(record.rmid, record.info)
}

/// The same, of a record that is known in part.
pub(crate) fn is_switch_kind(rmid: u8, info: u8) -> bool {
    rmid == RM_XLOG && info & KIND == SWITCH
}

/// Where replay begins from the checkpoint that ends a recovery or a server's life, if the record is one
/// (`CheckPoint.redo`, the first field on PostgreSQL and openGauss).
#[must_use]
pub fn shutdown_checkpoint(record: &Record) -> Option<Lsn> {
    is(record, RM_XLOG, CHECKPOINT_SHUTDOWN)
        .then(|| u64_at(&record.data, 0).map(Lsn))
        .flatten()
}

/// The restore point that the record makes (`xl_restore_point`).
#[must_use]
pub fn restore_point(record: &Record) -> Option<RestorePoint> {
    if !is(record, RM_XLOG, RESTORE_POINT) {
        return None;
    }
    let name: [u8; NAME_BYTES] = array(&record.data, 8)?;
    Some(RestorePoint {
        name: String::from_utf8_lossy(until_nul(&name)).into_owned(),
        time: i64_at(&record.data, 0)?.saturating_add(EPOCH),
    })
}

/// OID and directory of the tablespace that replaying the record creates (`xl_tblspc_create_rec`). The path is the
/// literal one of the old host: replay makes a link to it and a directory in it. openGauss's `XLOG_TBLSPC_RELATIVE_CREATE`
/// is none of them: such a tablespace lies within the data directory, in `pg_location`.
#[must_use]
pub fn create_tablespace(record: &Record) -> Option<(u32, PathBuf)> {
    if !is(record, RM_TABLESPACE, TABLESPACE_CREATE) {
        return None;
    }
    let path = until_nul(record.data.get(4..)?);
    Some((
        u32_at(&record.data, 0)?,
        PathBuf::from(OsStr::from_bytes(path)),
    ))
}
