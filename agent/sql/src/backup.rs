//! A non-exclusive backup, restore points, and where the log stands.

use std::time::Duration;

use agent_wal::Lsn;

use crate::connect::NodeConnection;
use crate::error::SqlError;
use crate::session::only;
use crate::text::literal;

/// Longest name of a restore point: `MAXFNAMELEN` less its NUL (`xlog_internal.h`).
const RESTORE_POINT_BYTES: usize = 63;
/// Longest label: `MAXPGPATH` (`do_pg_backup_start`, xlog.c).
const LABEL_BYTES: usize = 1023;

/// What a backup's end gives: to be stored beside the copy, byte for byte, never in the live data directory.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StopResult {
    /// Recovery must reach it before the copy is consistent.
    pub lsn: Lsn,
    /// Content of `backup_label`.
    pub label_file: Vec<u8>,
    /// Content of `tablespace_map`; empty: there is no such file.
    pub map_file: Vec<u8>,
}

impl NodeConnection {
    /// Starts a backup that lives as long as this session, and returns where its WAL begins.
    ///
    /// It waits for a checkpoint: with `fast` that hurries, else it takes up to `checkpoint_timeout`,
    /// hence the caller's `deadline`.
    ///
    /// # Errors
    /// [`SqlError::Privilege`], [`SqlError::Lost`], [`SqlError::Timeout`]; those of a statement.
    pub async fn start_backup(
        &self,
        label: &str,
        fast: bool,
        deadline: Duration,
    ) -> Result<Lsn, SqlError> {
        let what = "starting the backup";
        if label.len() > LABEL_BYTES {
            return Err(SqlError::BadName {
                what: "the label",
                value: label.to_owned(),
                reason: "it is longer than 1023 bytes",
            });
        }
        let label = literal("the label", label)?;
        // D 26.3.3; to version 14 (D14 26.3.3.1) the third argument chose the non-exclusive kind.
        let sql = if self.major() >= 15 {
            format!("SELECT pg_backup_start({label}, {fast})")
        } else {
            format!("SELECT pg_start_backup({label}, {fast}, false)")
        };
        only(what, self.rows_within(what, &sql, deadline).await?)?.value(0)
    }

    /// Ends the backup of this session. Does not wait for WAL to be archived: we ship it ourselves.
    ///
    /// # Errors
    /// [`SqlError::Server`] with SQLSTATE 55000 when none is under way, [`SqlError::Lost`]; those of a statement.
    pub async fn stop_backup(&self) -> Result<StopResult, SqlError> {
        // D 26.3.3. The files' text goes through the client's encoding; paths are bytes, so both are
        // turned back into the database's own encoding first.
        let from = if self.major() >= 15 {
            "pg_backup_stop(false)"
        } else {
            "pg_stop_backup(false, false)"
        };
        let sql = format!(
            "SELECT lsn, \
             encode(convert_to(labelfile, getdatabaseencoding()), 'hex'), \
             encode(convert_to(coalesce(spcmapfile, ''), getdatabaseencoding()), 'hex') FROM {from}"
        );
        let row = self.row("ending the backup", &sql).await?;
        Ok(StopResult {
            lsn: row.value(0)?,
            label_file: row.bytes(1)?,
            map_file: row.bytes(2)?,
        })
    }

    /// Writes a named restore point and returns where its record ends: what recovery to it reaches.
    ///
    /// The record is NOT flushed yet when this returns (`XLogRestorePoint` does not); [`NodeConnection::switch_wal`]
    /// or any commit makes it so.
    ///
    /// # Errors
    /// [`SqlError::BadName`] unless the name is 1 to 63 bytes of ASCII, [`SqlError::Privilege`]; those of a
    /// statement.
    pub async fn create_restore_point(&self, name: &str) -> Result<Lsn, SqlError> {
        if name.is_empty() || name.len() > RESTORE_POINT_BYTES || !name.is_ascii() {
            return Err(SqlError::BadName {
                what: "the restore point",
                value: name.to_owned(),
                reason: "it must be 1 to 63 bytes of ASCII",
            });
        }
        // D 9.27.3 pg_create_restore_point(name).
        let sql = format!(
            "SELECT pg_create_restore_point({})",
            literal("the restore point", name)?
        );
        self.row("creating the restore point", &sql).await?.value(0)
    }

    /// Makes the server go on in the next segment and returns where the last record ends in the old one.
    /// On a server that wrote nothing since the last switch nothing happens.
    ///
    /// # Errors
    /// [`SqlError::Privilege`]; those of a statement.
    pub async fn switch_wal(&self) -> Result<Lsn, SqlError> {
        // D 9.27.3 pg_switch_wal().
        self.row("switching the WAL segment", "SELECT pg_switch_wal()")
            .await?
            .value(0)
    }

    /// Everything before this position is on the server's disk.
    ///
    /// # Errors
    /// Those of a statement; [`SqlError::Server`] (55000) during recovery.
    pub async fn flush_lsn(&self) -> Result<Lsn, SqlError> {
        // D 9.27.3 pg_current_wal_flush_lsn().
        self.row(
            "reading the flush position",
            "SELECT pg_current_wal_flush_lsn()",
        )
        .await?
        .value(0)
    }

    /// Everything that was ever written is before this position.
    ///
    /// # Errors
    /// Those of a statement; [`SqlError::Server`] (55000) during recovery.
    pub async fn insert_lsn(&self) -> Result<Lsn, SqlError> {
        // D 9.27.3 pg_current_wal_insert_lsn().
        self.row(
            "reading the insert position",
            "SELECT pg_current_wal_insert_lsn()",
        )
        .await?
        .value(0)
    }
}
