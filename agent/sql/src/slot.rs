//! Physical replication slots: what keeps the server from removing WAL that we have not shipped yet.

use std::str::FromStr;

use agent_wal::Lsn;

use crate::connect::NodeConnection;
use crate::error::SqlError;
use crate::text::{Row, literal};

/// `pg_replication_slots.wal_status` (D 54.19, from version 13).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum WalStatus {
    /// Within `max_wal_size`.
    Reserved,
    /// Beyond it, still kept.
    Extended,
    /// No longer kept, removed at the next checkpoint.
    Unreserved,
    /// Some of it is gone; the slot is no longer usable.
    Lost,
}

impl WalStatus {
    /// Whether all WAL from the slot's `restart_lsn` on is there and stays there.
    #[must_use]
    pub fn is_held(self) -> bool {
        matches!(self, Self::Reserved | Self::Extended)
    }
}

impl FromStr for WalStatus {
    type Err = ();

    fn from_str(text: &str) -> Result<Self, ()> {
        Ok(match text {
            "reserved" => Self::Reserved,
            "extended" => Self::Extended,
            "unreserved" => Self::Unreserved,
            "lost" => Self::Lost,
            _ => return Err(()),
        })
    }
}

/// A physical slot as it stands.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SlotState {
    /// Its name.
    pub name: String,
    /// Whether a walsender uses it; never one of ours.
    pub active: bool,
    /// Oldest position that is kept; `None` once the slot is invalidated.
    pub restart_lsn: Option<Lsn>,
    /// `None`: version 12, which never gives up a slot's WAL.
    pub wal_status: Option<WalStatus>,
}

impl SlotState {
    /// Whether all WAL from `from` on is there and stays there.
    #[must_use]
    pub fn holds(&self, from: Lsn) -> bool {
        self.restart_lsn
            .is_some_and(|restart| restart.is_valid() && restart <= from)
            && self.wal_status.is_none_or(WalStatus::is_held)
    }

    fn of(row: &Row) -> Result<Self, SqlError> {
        Ok(Self {
            name: row.text(0)?.to_owned(),
            active: row.flag(1)?,
            restart_lsn: row.optional_value(2)?,
            wal_status: row.optional_value(3)?,
        })
    }
}

impl NodeConnection {
    /// Creates a physical slot that reserves WAL from now on. Read it with [`NodeConnection::slot`]
    /// afterwards, in a statement of its own: a slot created earlier in the same statement is not seen.
    ///
    /// # Errors
    /// [`SqlError::Setting`] when no slot is free, [`SqlError::Privilege`], [`SqlError::Server`] with
    /// SQLSTATE 42710 when it exists, [`SqlError::Unsupported`] on openGauss, whose slots hold nothing; all those of a
    /// statement.
    pub async fn create_slot(&self, name: &str) -> Result<(), SqlError> {
        let what = "creating a replication slot";
        if !self.dialect().slots_hold_wal() {
            return Err(SqlError::Unsupported {
                what: "slots that hold WAL",
                server: self.flavour(),
                instead: "let its archive_command hold it",
            });
        }
        // D 9.27.6 pg_create_physical_replication_slot(slot_name, immediately_reserve); not temporary: the
        // server drops a temporary slot at ANY error of its session (ReplicationSlotCleanup).
        let sql = format!(
            "SELECT pg_create_physical_replication_slot({}, true)",
            literal("the slot", name)?
        );
        match self.rows(what, &sql).await {
            Ok(_) => Ok(()),
            // ERRCODE_CONFIGURATION_LIMIT_EXCEEDED, slot.c: "all replication slots are in use".
            Err(SqlError::Server { sqlstate, .. }) if sqlstate == "53400" => {
                let row = self.row(what, "SHOW max_replication_slots").await?;
                let value: u32 = row.value(0)?;
                Err(SqlError::Setting {
                    name: "max_replication_slots",
                    value: format!("{value}, all in use"),
                    needed: format!("at least {}", value.saturating_add(1)),
                })
            }
            Err(error) => Err(error),
        }
    }

    /// The slot of that name, if it exists.
    ///
    /// # Errors
    /// Those of a statement.
    pub async fn slot(&self, name: &str) -> Result<Option<SlotState>, SqlError> {
        let condition = format!("slot_name = {}", literal("the slot", name)?);
        Ok(self.slots_where(&condition).await?.into_iter().next())
    }

    /// All slots whose names begin so; none on openGauss, where none of ours can be.
    ///
    /// # Errors
    /// Those of a statement.
    pub async fn slots_like(&self, prefix: &str) -> Result<Vec<SlotState>, SqlError> {
        if !self.dialect().slots_hold_wal() {
            return Ok(Vec::new());
        }
        let condition = format!(
            "starts_with(slot_name::text, {})",
            literal("the slot", prefix)?
        );
        self.slots_where(&condition).await
    }

    async fn slots_where(&self, condition: &str) -> Result<Vec<SlotState>, SqlError> {
        // D 54.19 pg_replication_slots; wal_status from version 13.
        let wal_status = if self.major() >= 13 {
            "wal_status"
        } else {
            "NULL"
        };
        let sql = format!(
            "SELECT slot_name, active, restart_lsn, {wal_status} FROM pg_replication_slots \
             WHERE slot_type = 'physical' AND {condition} ORDER BY slot_name"
        );
        let rows = self.rows("reading the replication slots", &sql).await?;
        rows.iter().map(SlotState::of).collect()
    }

    /// How many sessions of that `application_name` there are, other users' too.
    ///
    /// # Errors
    /// Those of a statement.
    pub async fn sessions_named(&self, name: &str) -> Result<u64, SqlError> {
        // D 28.2.3 pg_stat_activity; application_name is shown to everybody.
        let sql = format!(
            "SELECT count(*) FROM pg_stat_activity WHERE application_name = {}",
            literal("the session", name)?
        );
        self.row("looking for sessions", &sql).await?.value(0)
    }

    /// Lets go of WAL before `lsn`. Never goes back: a slot that is further already stays as it is.
    ///
    /// # Errors
    /// [`SqlError::Server`] when the slot is gone or invalidated; those of a statement.
    pub async fn advance_slot(&self, name: &str, lsn: Lsn) -> Result<(), SqlError> {
        let name = literal("the slot", name)?;
        // D 9.27.6 pg_replication_slot_advance(slot_name, upto_lsn): an error for a position before
        // the slot's own, so the server compares first. A missing slot must be an error too.
        let sql = format!(
            "SELECT CASE WHEN (SELECT restart_lsn FROM pg_replication_slots WHERE slot_name = {name}) \
             >= '{lsn}'::pg_lsn THEN NULL \
             ELSE (SELECT end_lsn FROM pg_replication_slot_advance({name}, '{lsn}')) END"
        );
        self.row("advancing the replication slot", &sql).await?;
        Ok(())
    }

    /// Drops the slot. A slot that is not there counts as dropped: returns whether it was.
    ///
    /// # Errors
    /// [`SqlError::Server`] when somebody uses it; those of a statement.
    pub async fn drop_slot(&self, name: &str) -> Result<bool, SqlError> {
        // D 9.27.6 pg_drop_replication_slot(slot_name).
        let sql = format!(
            "SELECT pg_drop_replication_slot(slot_name) FROM pg_replication_slots WHERE slot_name = {}",
            literal("the slot", name)?
        );
        let rows = self.rows("dropping the replication slot", &sql).await;
        match rows {
            Ok(rows) => Ok(!rows.is_empty()),
            // Somebody else dropped it between the list and the drop (ERRCODE_UNDEFINED_OBJECT).
            Err(SqlError::Server { sqlstate, .. }) if sqlstate == "42704" => Ok(false),
            Err(error) => Err(error),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_slot_holds_what_is_not_before_it() {
        let slot = |restart: Option<u64>, wal_status| SlotState {
            name: "s".to_owned(),
            active: false,
            restart_lsn: restart.map(Lsn),
            wal_status,
        };
        assert!(slot(Some(5), None).holds(Lsn(5)));
        assert!(slot(Some(5), Some(WalStatus::Extended)).holds(Lsn(6)));
        assert!(!slot(Some(5), Some(WalStatus::Reserved)).holds(Lsn(4)));
        assert!(!slot(Some(5), Some(WalStatus::Unreserved)).holds(Lsn(6)));
        assert!(!slot(Some(5), Some(WalStatus::Lost)).holds(Lsn(6)));
        assert!(!slot(None, Some(WalStatus::Reserved)).holds(Lsn(6)));
        assert!(!slot(Some(0), None).holds(Lsn(6)));
    }
}
