//! A non-exclusive backup, restore points, and where the log stands.

use std::time::Duration;

use agent_wal::Lsn;

use crate::connect::NodeConnection;
use crate::dialect::Flavour;
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
    /// [`SqlError::Privilege`], [`SqlError::Lost`], [`SqlError::Timeout`], [`SqlError::Unsupported`] on openGauss; those of
    /// a statement.
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
        let sql = self.dialect().start_backup(&label, fast)?;
        only(what, self.rows_within(what, &sql, deadline).await?)?.value(0)
    }

    /// Ends the backup of this session. Does not wait for WAL to be archived: we ship it ourselves.
    ///
    /// # Errors
    /// [`SqlError::Server`] with SQLSTATE 55000 when none is under way, [`SqlError::Lost`]; those of a statement.
    pub async fn stop_backup(&self) -> Result<StopResult, SqlError> {
        let sql = self.dialect().stop_backup()?;
        let row = self.row("ending the backup", &sql).await?;
        Ok(StopResult {
            lsn: row.value(0)?,
            label_file: row.bytes(1)?,
            map_file: row.bytes(2)?,
        })
    }

    /// Writes a named restore point and returns where its record ends: what recovery to it reaches.
    ///
    /// PostgreSQL has NOT flushed the record when this returns (`XLogRestorePoint` does not);
    /// [`NodeConnection::switch_wal`] or any commit makes it so. openGauss has.
    ///
    /// # Errors
    /// [`SqlError::BadName`] unless the name is 1 to 63 bytes of ASCII, [`SqlError::Privilege`]; those of a
    /// statement.
    pub async fn create_restore_point(&self, name: &str) -> Result<Lsn, SqlError> {
        let name = restore_point(name)?;
        let sql = self.dialect().create_restore_point(&name);
        self.row("creating the restore point", &sql).await?.value(0)
    }

    /// As [`NodeConnection::create_restore_point`], and the record is on the server's disk: whoever streams WAL is sent it
    /// at once.
    ///
    /// # Errors
    /// As that.
    pub async fn create_flushed_restore_point(&self, name: &str) -> Result<Lsn, SqlError> {
        let name = restore_point(name)?;
        let sql = self.dialect().flushed_restore_point(&name);
        self.row("creating the restore point", &sql).await?.value(0)
    }

    /// Makes the server go on in the next segment and returns where the last record ends in the old one.
    /// On a server that wrote nothing since the last switch nothing happens.
    ///
    /// # Errors
    /// [`SqlError::Privilege`]; those of a statement.
    pub async fn switch_wal(&self) -> Result<Lsn, SqlError> {
        self.row("switching the WAL segment", self.dialect().switch_wal())
            .await?
            .value(0)
    }

    /// Everything before this position is on the server's disk; on openGauss every whole segment before it.
    ///
    /// # Errors
    /// Those of a statement; [`SqlError::Server`] (55000) during recovery.
    pub async fn flush_lsn(&self) -> Result<Lsn, SqlError> {
        self.row("reading the flush position", self.dialect().flush_lsn())
            .await?
            .value(0)
    }

    /// Everything that was ever written is before this position.
    ///
    /// # Errors
    /// Those of a statement; [`SqlError::Server`] (55000) during recovery.
    pub async fn insert_lsn(&self) -> Result<Lsn, SqlError> {
        self.row("reading the insert position", self.dialect().insert_lsn())
            .await?
            .value(0)
    }

    /// Ends an exclusive backup that somebody started and is not there any more to end; `None`: none is under way.
    /// Whose it is, its `backup_label` in the data directory tells: look before you call this.
    ///
    /// It waits until the server's archiver has taken the backup's WAL, hence the caller's `deadline`.
    ///
    /// # Errors
    /// [`SqlError::Unsupported`] on PostgreSQL; [`SqlError::Privilege`], [`SqlError::Timeout`]; those of a statement.
    pub async fn end_exclusive_backup(&self, deadline: Duration) -> Result<Option<Lsn>, SqlError> {
        if self.flavour() != Flavour::OpenGauss {
            return Err(SqlError::Unsupported {
                what: "exclusive backups",
                server: self.flavour(),
                instead: "a backup ends with its session",
            });
        }
        let what = "ending the exclusive backup";
        // A_privileges.txt, D_kill.txt: where it ended; 55000 (object not in prerequisite state) when there is none.
        let rows = self
            .rows_within(what, "SELECT pg_stop_backup()", deadline)
            .await;
        match rows {
            Ok(rows) => only(what, rows)?.value(0).map(Some),
            Err(SqlError::Server { sqlstate, .. }) if sqlstate == "55000" => Ok(None),
            Err(error) => Err(error),
        }
    }
}

/// Its literal, if it is a name of one.
fn restore_point(name: &str) -> Result<String, SqlError> {
    if name.is_empty() || name.len() > RESTORE_POINT_BYTES || !name.is_ascii() {
        return Err(SqlError::BadName {
            what: "the restore point",
            value: name.to_owned(),
            reason: "it must be 1 to 63 bytes of ASCII",
        });
    }
    literal("the restore point", name)
}
