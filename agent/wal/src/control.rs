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

use thiserror::Error;

use crate::bytes::{array, i64_at, u32_at, u64_at};
use crate::{BLOCK_SIZE, Lsn, SegmentSize};

/// Bytes that are needed: the structure is kept within one 512-byte sector, the rest of the file is zero.
pub const CONTROL_BYTES: usize = 512;

/// What is wrong with a control file.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum ControlError {
    /// It is cut short.
    #[error("pg_control has {0} bytes, at least {CONTROL_BYTES} are needed")]
    Short(usize),
    /// No version we know.
    #[error("pg_control has format version {0}; known are those of PostgreSQL 12 to 18")]
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
    /// Timeline of that position; 0 outside archive recovery.
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
    /// 0: pages carry no checksums; 1: the known kind.
    pub data_checksum_version: u32,
}

/// Offsets in `ControlFileData`; the checkpoint's copy begins at 40.
mod at {
    pub(super) const STATE: usize = 16;
    pub(super) const TIME: usize = 24;
    pub(super) const CHECKPOINT: usize = 32;
    pub(super) const REDO: usize = 40;
    pub(super) const TIMELINE: usize = 48;
    pub(super) const PREVIOUS_TIMELINE: usize = 52;
    pub(super) const CHECKPOINT_TIME: usize = 104;
    pub(super) const MIN_RECOVERY_POINT: usize = 136;
    pub(super) const MIN_RECOVERY_TIMELINE: usize = 144;
    pub(super) const BACKUP_START: usize = 152;
    pub(super) const BACKUP_END: usize = 160;
    pub(super) const BACKUP_END_REQUIRED: usize = 168;
    pub(super) const MAX_ALIGN: usize = 204;
    pub(super) const FLOAT_FORMAT: usize = 208;
    pub(super) const BLOCK_SIZE: usize = 216;
    pub(super) const RELATION_SEGMENT: usize = 220;
    pub(super) const WAL_BLOCK_SIZE: usize = 224;
    pub(super) const WAL_SEGMENT_SIZE: usize = 228;
    pub(super) const DATA_CHECKSUM_VERSION: usize = 252;
}

impl ControlFile {
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

        let control_version = u32(8)?;
        let crc_at = match control_version {
            1201 | 1300 | 1700 => 288,
            1800 => 292,
            other => return Err(ControlError::Version(other)),
        };
        let stored = u32(crc_at)?;
        let computed = crc32c::crc32c(&file[..crc_at]);
        if stored != computed {
            return Err(ControlError::Crc { stored, computed });
        }

        let supported = |what, value: u64, ok: bool| {
            ok.then_some(())
                .ok_or(ControlError::Unsupported { what, value })
        };
        let max_align = u32(at::MAX_ALIGN)?;
        supported("MAXALIGN", max_align.into(), max_align == 8)?;
        let float = array::<8>(file, at::FLOAT_FORMAT).map(f64::from_le_bytes);
        supported(
            "floating-point format",
            u64(at::FLOAT_FORMAT)?,
            float == Some(1_234_567.0),
        )?;
        let block_size = u32(at::BLOCK_SIZE)?;
        supported("block size", block_size.into(), is_block_size(block_size))?;
        let wal_block_size = u32(at::WAL_BLOCK_SIZE)?;
        supported(
            "WAL block size",
            wal_block_size.into(),
            is_block_size(wal_block_size),
        )?;
        let segment_size = u64::from(u32(at::WAL_SEGMENT_SIZE)?);
        let state = u32(at::STATE)?;

        Ok(Self {
            system_identifier: u64(0)?,
            control_version,
            catalog_version: u32(12)?,
            state: DbState::of(state).ok_or(ControlError::Unsupported {
                what: "state",
                value: state.into(),
            })?,
            time: i64(at::TIME)?,
            checkpoint: lsn(at::CHECKPOINT)?,
            redo: lsn(at::REDO)?,
            timeline: u32(at::TIMELINE)?,
            previous_timeline: u32(at::PREVIOUS_TIMELINE)?,
            checkpoint_time: i64(at::CHECKPOINT_TIME)?,
            min_recovery_point: lsn(at::MIN_RECOVERY_POINT)?,
            min_recovery_timeline: u32(at::MIN_RECOVERY_TIMELINE)?,
            backup_start: lsn(at::BACKUP_START)?,
            backup_end: lsn(at::BACKUP_END)?,
            backup_end_required: file[at::BACKUP_END_REQUIRED] != 0,
            wal_segment_size: SegmentSize::new(segment_size).ok_or(ControlError::Unsupported {
                what: "WAL segment size",
                value: segment_size,
            })?,
            block_size,
            relation_segment_blocks: u32(at::RELATION_SEGMENT)?,
            data_checksum_version: u32(at::DATA_CHECKSUM_VERSION)?,
        })
    }
}

fn is_block_size(bytes: u32) -> bool {
    usize::try_from(bytes) == Ok(BLOCK_SIZE)
}
