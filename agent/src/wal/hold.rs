//! How much WAL a slot may hold back before it endangers the source.
//!
//! A server whose WAL file system is full stops. A backup is never worth that: the hold is let go, the backup ends
//! with an error, and a new one is to be made.

use std::io;
use std::path::Path;

use agent_api::{ApiError, ErrorKind};
use agent_wal::Lsn;

/// Segments that any slot holds in passing; fewer are never the reason for a full disk.
const HARMLESS_SEGMENTS: u64 = 8;

/// Room on the file system that holds the WAL, in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Room {
    /// Free for the database's user.
    pub free: u64,
    /// In all.
    pub total: u64,
}

impl Room {
    /// Asks the file system of `directory`.
    ///
    /// # Errors
    /// As `statvfs`.
    pub fn of(directory: &Path) -> io::Result<Self> {
        let answer = rustix::fs::statvfs(directory)?;
        Ok(Self {
            free: answer.f_bavail.saturating_mul(answer.f_frsize),
            total: answer.f_blocks.saturating_mul(answer.f_frsize),
        })
    }
}

/// The rule: a slot holds at most 25 % of what is free (and at most `limit`), and nothing worth mentioning where
/// less than 10 % are free.
#[derive(Debug, Clone, Copy)]
pub struct HoldLimit {
    /// The operator's own limit in bytes.
    pub limit: Option<u64>,
    /// WAL segment size in bytes.
    pub segment_size: u64,
}

impl HoldLimit {
    /// Checks the WAL from `restart` to `insert` against `room`.
    ///
    /// # Errors
    /// [`ErrorKind::Database`], with the figures, if the hold is to be let go.
    pub fn check(self, restart: Lsn, insert: Lsn, room: Room) -> Result<(), ApiError> {
        let held = insert.bytes_since(restart);
        if held <= HARMLESS_SEGMENTS * self.segment_size {
            return Ok(());
        }
        let limit = self
            .limit
            .map_or(room.free / 4, |limit| limit.min(room.free / 4));
        let full = room.free < room.total / 10;
        if !full && held <= limit {
            return Ok(());
        }
        let mib = |bytes: u64| bytes >> 20;
        let message = format!(
            "the bucket takes WAL more slowly than the database writes it: {} MiB are held back, \
             {} MiB of {} MiB are free on the file system of pg_wal, at most {} MiB may be held; the hold was let go so \
             that the database keeps running",
            mib(held),
            mib(room.free),
            mib(room.total),
            if full { 0 } else { mib(limit) },
        );
        Err(ApiError::new(ErrorKind::Database, message)
            .next("make room for pg_wal or raise the bandwidth limit, then start a new backup"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const GIB: u64 = 1 << 30;

    fn check(held: u64, free: u64, limit: Option<u64>) -> bool {
        let rule = HoldLimit {
            limit,
            segment_size: 16 << 20,
        };
        let room = Room {
            free,
            total: 100 * GIB,
        };
        rule.check(Lsn(GIB), Lsn(GIB + held), room).is_ok()
    }

    #[test]
    fn a_hold_ends_at_its_limits() {
        assert!(check(10 * GIB, 40 * GIB, None));
        assert!(!check(10 * GIB + 1, 40 * GIB, None));
        assert!(!check(2 * GIB, 40 * GIB, Some(GIB)));
        assert!(check(GIB, 40 * GIB, Some(GIB)));
        assert!(!check(GIB, 9 * GIB, None));
        assert!(check(128 << 20, 0, None));
    }
}
