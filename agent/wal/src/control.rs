//! `global/pg_control`: what the cluster is and in which state it was left.
//!
//! Layout: `ControlFileData` and `CheckPoint`, `src/include/catalog/pg_control.h`. From 12 to 18 the
//! fields that we read keep their offsets; only the end of the structure moves:
//!
//! | version | PostgreSQL | changed | CRC at |
//! |---|---|---|---|
//! | 1201 | 12 | | 288 |
//! | 1300 | 13 to 16 | `float4ByVal` went, `float8ByVal` took its place | 288 |
//! | 1700 | 17 | `wal_level` in a hole of the checkpoint | 288 |
//! | 1800 | 18 | `default_char_signedness` before the nonce | 292 |
//!
//! openGauss has a structure of its own, with 8-byte transaction numbers: version 923 from 1.0 to 7.0, with the CRC at 224
//! since 3.0.

use thiserror::Error;

use crate::bytes::{array, i64_at, u32_at, u64_at};
use crate::{BLOCK_SIZE, Lsn, SegmentSize};

/// Bytes that are needed: the structure is kept within one 512-byte sector, the rest of the file is zero.
pub const CONTROL_BYTES: usize = 512;

/// `PG_CONTROL_VERSION` of openGauss.
const OPENGAUSS_VERSION: u32 = 923;

/// What is wrong with a control file.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum ControlError {
    /// It is cut short.
    #[error("pg_control has {0} bytes, at least {CONTROL_BYTES} are needed")]
    Short(usize),
    /// No version we know.
    #[error(
        "pg_control has format version {0}; known are those of PostgreSQL 12 to 18 and of openGauss"
    )]
    Version(u32),
    /// The checksum is another one: torn or damaged.
    #[error("pg_control has CRC {stored:08X}, its content {computed:08X}")]
    Crc {
        /// In the file.
        stored: u32,
        /// Of the content.
        computed: u32,
    },
    /// The checksum is right, but this program cannot work with it.
    #[error("pg_control has {what} {value}, which is not supported")]
    Unsupported {
        /// Which field.
        what: &'static str,
        /// Its value.
        value: u64,
    },
}

/// `DBState`: what the server was doing when it last wrote the file.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum DbState {
    /// Starting up.
    Startup,
    /// Shut down in order.
    ShutDown,
    /// Shut down in order while it was in recovery.
    ShutDownInRecovery,
    /// Shutting down.
    ShuttingDown,
    /// In crash recovery.
    InCrashRecovery,
    /// In archive recovery (standbys too).
    InArchiveRecovery,
    /// In production.
    InProduction,
}

impl DbState {
    fn of(value: u32) -> Option<Self> {
        Some(match value {
            0 => Self::Startup,
            1 => Self::ShutDown,
            2 => Self::ShutDownInRecovery,
            3 => Self::ShuttingDown,
            4 => Self::InCrashRecovery,
            5 => Self::InArchiveRecovery,
            6 => Self::InProduction,
            _ => return None,
        })
    }

    /// The words of `pg_controldata`.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Startup => "starting up",
            Self::ShutDown => "shut down",
            Self::ShutDownInRecovery => "shut down in recovery",
            Self::ShuttingDown => "shutting down",
            Self::InCrashRecovery => "in crash recovery",
            Self::InArchiveRecovery => "in archive recovery",
            Self::InProduction => "in production",
        }
    }
}

impl std::fmt::Display for DbState {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.as_str())
    }
}

/// A control file whose CRC was right.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ControlFile {
    /// Identifies the cluster; every WAL segment carries it.
    pub system_identifier: u64,
    /// Format of this file.
    pub control_version: u32,
    /// Format of the system catalogs; names the directories of tablespaces (`PG_15_202209061`).
    pub catalog_version: u32,
    /// State.
    pub state: DbState,
    /// When the file was last written, in seconds since 1970 (UTC).
    pub time: i64,
    /// Where the latest checkpoint's record begins.
    pub checkpoint: Lsn,
    /// Where replay from the latest checkpoint begins.
    pub redo: Lsn,
    /// Timeline of the latest checkpoint.
    pub timeline: u32,
    /// Timeline before it, if the checkpoint began a new one; else the same.
    pub previous_timeline: u32,
    /// When the latest checkpoint was made, in seconds since 1970 (UTC).
    pub checkpoint_time: i64,
    /// Recovery must reach at least this position; invalid outside archive recovery.
    pub min_recovery_point: Lsn,
    /// Timeline of that position; 0 outside archive recovery, and always on openGauss.
    pub min_recovery_timeline: u32,
    /// Start of the backup that is being recovered, until its end is reached.
    pub backup_start: Lsn,
    /// End of a backup taken from a standby.
    pub backup_end: Lsn,
    /// Whether recovery must see the end-of-backup record before it may open.
    pub backup_end_required: bool,
    /// Bytes in a WAL segment.
    pub wal_segment_size: SegmentSize,
    /// Bytes in a data block.
    pub block_size: u32,
    /// Blocks in a file of a relation (131072: files of 1 GiB).
    pub relation_segment_blocks: u32,
    /// 0: pages carry no checksums that are known here; 1: the known kind.
    pub data_checksum_version: u32,
}

/// Offsets in `ControlFileData` where the two differ; version numbers are at 8 and 12 in both.
#[derive(Debug)]
struct Offsets {
    state: usize,
    time: usize,
    checkpoint: usize,
    redo: usize,
    timeline: usize,
    /// `PrevTimeLineID`; openGauss has none.
    previous_timeline: Option<usize>,
    checkpoint_time: usize,
    min_recovery_point: usize,
    /// `minRecoveryPointTLI`; openGauss has none.
    min_recovery_timeline: Option<usize>,
    backup_start: usize,
    backup_end: usize,
    backup_end_required: usize,
    /// `maxAlign`, with `floatFormat` at the next multiple of 8.
    max_align: usize,
    float_format: usize,
    /// `blcksz`, `relseg_size`, `xlog_blcksz` and `xlog_seg_size` in a row.
    block_size: usize,
    /// `data_checksum_version`; openGauss has none: its pages have checksums of their own kind.
    data_checksum_version: Option<usize>,
    crc: usize,
}

const POSTGRESQL: Offsets = Offsets {
    state: 16,
    time: 24,
    checkpoint: 32,
    redo: 40,
    timeline: 48,
    previous_timeline: Some(52),
    checkpoint_time: 104,
    min_recovery_point: 136,
    min_recovery_timeline: Some(144),
    backup_start: 152,
    backup_end: 160,
    backup_end_required: 168,
    max_align: 204,
    float_format: 208,
    block_size: 216,
    data_checksum_version: Some(252),
    crc: 288,
};

/// The nonce moved by 4 bytes.
const POSTGRESQL_18: Offsets = Offsets {
    crc: 292,
    ..POSTGRESQL
};

/// `pg_control.h` of openGauss 3.0 to 7.0. Transactions have 8 bytes; a `timeline` at 16 counts starts of the server
/// and is none of the log's.
const OPENGAUSS: Offsets = Offsets {
    state: 20,
    time: 24,
    checkpoint: 32,
    redo: 48,
    timeline: 56,
    previous_timeline: None,
    checkpoint_time: 112,
    min_recovery_point: 136,
    min_recovery_timeline: None,
    backup_start: 144,
    backup_end: 152,
    backup_end_required: 160,
    max_align: 180,
    float_format: 184,
    block_size: 192,
    data_checksum_version: None,
    crc: 224,
};

impl Offsets {
    fn of(control_version: u32) -> Option<&'static Self> {
        match control_version {
            OPENGAUSS_VERSION => Some(&OPENGAUSS),
            1201 | 1300 | 1700 => Some(&POSTGRESQL),
            1800 => Some(&POSTGRESQL_18),
            _ => None,
        }
    }
}

impl ControlFile {
    /// Whether it is one of openGauss.
    #[must_use]
    pub fn is_opengauss(&self) -> bool {
        self.control_version == OPENGAUSS_VERSION
    }

    /// Reads a control file, or its first [`CONTROL_BYTES`].
    ///
    /// A running server rewrites the file in place, so a reader may catch it torn: on
    /// [`ControlError::Crc`] read the file again.
    ///
    /// # Errors
    /// [`ControlError`]: cut short, of an unknown version, torn, or of a build we cannot work with.
    pub fn parse(file: &[u8]) -> Result<Self, ControlError> {
        let file = file
            .get(..CONTROL_BYTES)
            .ok_or(ControlError::Short(file.len()))?;
        let u32 = |offset| u32_at(file, offset).ok_or(ControlError::Short(file.len()));
        let u64 = |offset| u64_at(file, offset).ok_or(ControlError::Short(file.len()));
        let i64 = |offset| i64_at(file, offset).ok_or(ControlError::Short(file.len()));
        let lsn = |offset| u64(offset).map(Lsn);
        let optional = |offset: Option<usize>| offset.map_or(Ok(0), u32);

        let control_version = u32(8)?;
        let at = Offsets::of(control_version).ok_or(ControlError::Version(control_version))?;
        let stored = u32(at.crc)?;
        let computed = crc32c::crc32c(&file[..at.crc]);
        if stored != computed {
            return Err(ControlError::Crc { stored, computed });
        }

        let supported = |what, value: u64, ok: bool| {
            ok.then_some(())
                .ok_or(ControlError::Unsupported { what, value })
        };
        let max_align = u32(at.max_align)?;
        supported("MAXALIGN", max_align.into(), max_align == 8)?;
        let float = array::<8>(file, at.float_format).map(f64::from_le_bytes);
        supported(
            "floating-point format",
            u64(at.float_format)?,
            float == Some(1_234_567.0),
        )?;
        let block_size = u32(at.block_size)?;
        supported("block size", block_size.into(), is_block_size(block_size))?;
        let wal_block_size = u32(at.block_size + 8)?;
        supported(
            "WAL block size",
            wal_block_size.into(),
            is_block_size(wal_block_size),
        )?;
        let segment_size = u64::from(u32(at.block_size + 12)?);
        let state = u32(at.state)?;

        Ok(Self {
            system_identifier: u64(0)?,
            control_version,
            catalog_version: u32(12)?,
            state: DbState::of(state).ok_or(ControlError::Unsupported {
                what: "state",
                value: state.into(),
            })?,
            time: i64(at.time)?,
            checkpoint: lsn(at.checkpoint)?,
            redo: lsn(at.redo)?,
            timeline: u32(at.timeline)?,
            previous_timeline: u32(at.previous_timeline.unwrap_or(at.timeline))?,
            checkpoint_time: i64(at.checkpoint_time)?,
            min_recovery_point: lsn(at.min_recovery_point)?,
            min_recovery_timeline: optional(at.min_recovery_timeline)?,
            backup_start: lsn(at.backup_start)?,
            backup_end: lsn(at.backup_end)?,
            backup_end_required: file[at.backup_end_required] != 0,
            wal_segment_size: SegmentSize::new(segment_size).ok_or(ControlError::Unsupported {
                what: "WAL segment size",
                value: segment_size,
            })?,
            block_size,
            relation_segment_blocks: u32(at.block_size + 4)?,
            data_checksum_version: optional(at.data_checksum_version)?,
        })
    }
}

fn is_block_size(bytes: u32) -> bool {
    usize::try_from(bytes) == Ok(BLOCK_SIZE)
}
