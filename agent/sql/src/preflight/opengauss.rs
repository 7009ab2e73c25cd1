//! What an openGauss must be like. How it holds WAL is not looked at here: that is between its `archive_command` and
//! the agent's socket.

use super::{Finding, Findings};
use crate::connect::NodeConnection;
use crate::error::SqlError;
use crate::text::identifier;

/// Looks for whatever would stop a backup by `gs_probackup`, or make it worthless.
pub(crate) async fn examine(sql: &NodeConnection) -> Result<Vec<Finding>, SqlError> {
    let settings = sql.settings().await?;
    let mut findings = Findings::new(&settings);
    findings.role(sql.in_recovery().await?);
    findings.opengauss();
    privileges(sql, &mut findings).await?;
    senders(sql, &mut findings).await?;
    Ok(findings.found)
}

impl Findings<'_> {
    fn opengauss(&mut self) {
        // V guc_storage.cpp: minimal, archive, hot_standby, logical. The proof of a restored point is a server that pauses there and
        // can be asked, which takes hot_standby.
        match self.setting("wal_level").to_owned().as_str() {
            level @ ("minimal" | "archive") => self.refuse(
                "wal_level",
                format!("wal_level is {level}: no point could be proved after a restore"),
                "gs_guc set -c \"wal_level=hot_standby\"  (restart)",
            ),
            level => self.fine("wal_level", level),
        }
        if self.setting("fsync") == "off" {
            self.refuse(
                "fsync",
                "fsync is off: a crash can destroy the database, and WAL may be gone after it",
                "gs_guc reload -c \"fsync=on\"",
            );
        } else {
            self.fine("fsync", "on");
        }
        self.block_sizes();
        if self.setting("enable_dss") == "on" {
            self.refuse(
                "enable_dss",
                "enable_dss is on: data in shared storage (DSS) is not supported",
                "",
            );
        }
        // Observed: gs_probackup waits for ever for changes that nobody records.
        if self.setting("enable_cbm_tracking") == "on" {
            self.fine("enable_cbm_tracking", "on");
        } else {
            self.warn(
                "enable_cbm_tracking",
                "enable_cbm_tracking is off: FULL backups are possible, PTRACK ones are refused",
                "gs_guc reload -c \"enable_cbm_tracking=on\", then take a FULL",
            );
        }
    }
}

async fn privileges(sql: &NodeConnection, findings: &mut Findings<'_>) -> Result<(), SqlError> {
    let role = identifier(sql.session.user());
    // V system_views.sql, pg_roles. A_privileges.txt: restore point and switch need it; replication alone is enough for
    // gs_probackup itself.
    let row = sql
        .row(
            "reading the user's privileges",
            "SELECT rolsystemadmin FROM pg_roles WHERE rolname = current_user",
        )
        .await?;
    if row.flag(0)? {
        findings.fine("privileges", format!("user {role} has SYSADMIN"));
    } else {
        findings.refuse(
            "privileges",
            format!("user {role} may not make restore points"),
            format!("ALTER USER {role} SYSADMIN;"),
        );
    }
    Ok(())
}

/// `gs_probackup` streams WAL over a connection of its own.
async fn senders(sql: &NodeConnection, findings: &mut Findings<'_>) -> Result<(), SqlError> {
    let name = "max_wal_senders";
    // V builtin_funcs.ini: a row for each that is connected.
    let used: i64 = sql
        .row(
            "counting the WAL senders",
            "SELECT count(*) FROM pg_stat_get_wal_senders()",
        )
        .await?
        .value(0)?;
    let most = findings.number(name);
    if used < most {
        let what = format!("{} of {most} WAL senders are free", most - used);
        findings.fine(name, what);
    } else {
        findings.refuse(
            name,
            format!("all {most} WAL senders are in use: gs_probackup needs one"),
            format!("gs_guc set -c \"max_wal_senders={}\"  (restart)", used + 2),
        );
    }
    Ok(())
}
