//! Is this server fit for a backup? Each finding comes with the line that mends it.

use std::collections::BTreeMap;
use std::fmt::Write as _;

use crate::connect::NodeConnection;
use crate::error::SqlError;
use crate::text::identifier;

pub(crate) mod opengauss;

/// How bad it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Severity {
    /// It is as it should be.
    Fine,
    /// A backup is possible, the operator should know.
    Warning,
    /// No backup can be taken, or none that would restore.
    Refusal,
}

/// One thing that was looked at.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Finding {
    /// What was looked at: a setting's name or a word.
    pub name: &'static str,
    /// How bad it is.
    pub severity: Severity,
    /// What was found.
    pub what: String,
    /// Statement or setting that mends it.
    pub mend: Option<String>,
}

/// The findings so far.
struct Findings<'a> {
    settings: &'a BTreeMap<String, String>,
    found: Vec<Finding>,
}

impl<'a> Findings<'a> {
    fn new(settings: &'a BTreeMap<String, String>) -> Self {
        Self {
            settings,
            found: Vec::new(),
        }
    }

    fn refuse(&mut self, name: &'static str, what: impl Into<String>, mend: impl Into<String>) {
        self.add(name, Severity::Refusal, what.into(), mend.into());
    }

    fn warn(&mut self, name: &'static str, what: impl Into<String>, mend: impl Into<String>) {
        self.add(name, Severity::Warning, what.into(), mend.into());
    }

    fn fine(&mut self, name: &'static str, what: impl Into<String>) {
        self.add(name, Severity::Fine, what.into(), String::new());
    }

    fn add(&mut self, name: &'static str, severity: Severity, what: String, mend: String) {
        let mend = (!mend.is_empty()).then_some(mend);
        self.found.push(Finding {
            name,
            severity,
            what,
            mend,
        });
    }

    /// A setting's value; empty if the version does not have it.
    fn setting(&self, name: &str) -> &str {
        self.settings.get(name).map_or("", String::as_str)
    }

    fn number(&self, name: &str) -> i64 {
        self.setting(name).parse().unwrap_or(0)
    }
}

impl NodeConnection {
    /// Looks for whatever would stop a backup, or make it worthless, the worst first. Changes nothing.
    ///
    /// # Errors
    /// Those of a statement: what is found is no error.
    pub async fn preflight(&self) -> Result<Vec<Finding>, SqlError> {
        let mut found = self.examine().await?;
        found.retain(|finding| finding.severity != Severity::Fine);
        found.sort_by_key(|finding| std::cmp::Reverse(finding.severity));
        Ok(found)
    }

    /// All that [`NodeConnection::preflight`] looks at, what is fine too. Changes nothing.
    ///
    /// # Errors
    /// Those of a statement: what is found is no error.
    pub async fn examine(&self) -> Result<Vec<Finding>, SqlError> {
        self.dialect().examine(self).await
    }
}

/// What a PostgreSQL must be like.
pub(crate) async fn postgresql(sql: &NodeConnection, major: u32) -> Result<Vec<Finding>, SqlError> {
    let settings = sql.settings().await?;
    let mut findings = Findings::new(&settings);
    findings.role(sql.in_recovery().await?);
    findings.server();
    sql.privileges(&mut findings).await?;
    sql.slots_free(&mut findings).await?;
    findings.slot_limits(major);
    Ok(findings.found)
}

impl NodeConnection {
    async fn privileges(&self, findings: &mut Findings<'_>) -> Result<(), SqlError> {
        let role = identifier(self.session.user());
        let row = self
            .row(
                "reading the user's privileges",
                // D 22.5 predefined roles, D 54.10 pg_roles.
                "SELECT rolsuper, rolreplication, pg_has_role('pg_monitor', 'USAGE'), current_database() \
                 FROM pg_roles WHERE rolname = current_user",
            )
            .await?;
        let (superuser, replication, monitor) = (row.flag(0)?, row.flag(1)?, row.flag(2)?);
        let database = row.text(3)?.to_owned();
        if superuser {
            findings.fine("privileges", format!("user {role} is a superuser"));
            return Ok(());
        }
        let before = findings.found.len();
        if !replication {
            findings.refuse(
                "privileges",
                format!("user {role} may not create replication slots"),
                format!("ALTER ROLE {role} REPLICATION;"),
            );
        }
        if !monitor {
            findings.refuse(
                "privileges",
                format!("user {role} does not see all settings and sessions"),
                format!("GRANT pg_monitor TO {role};"),
            );
        }
        for function in self.needed_functions() {
            let what = "reading the user's privileges";
            // D 9.26.2 has_function_privilege(function, privilege).
            let sql = format!("SELECT has_function_privilege('{function}', 'EXECUTE')");
            if !self.row(what, &sql).await?.flag(0)? {
                findings.refuse(
                    "privileges",
                    format!("user {role} may not execute {function} in database {database}"),
                    format!(
                        "GRANT EXECUTE ON FUNCTION {function} TO {role};  -- in database {}",
                        identifier(&database)
                    ),
                );
            }
        }
        if findings.found.len() == before {
            let what = format!(
                "user {role} has REPLICATION, pg_monitor and EXECUTE on the backup functions"
            );
            findings.fine("privileges", what);
        }
        Ok(())
    }

    /// Functions whose use PostgreSQL restricts (`system_functions.sql`), and those that anybody may use unless
    /// somebody took that away.
    fn needed_functions(&self) -> Vec<&'static str> {
        let mut functions = vec![
            "pg_create_restore_point(text)",
            "pg_switch_wal()",
            "pg_create_physical_replication_slot(name, boolean, boolean)",
            "pg_replication_slot_advance(name, pg_lsn)",
            "pg_drop_replication_slot(name)",
        ];
        if self.major() >= 15 {
            functions.extend(["pg_backup_start(text, boolean)", "pg_backup_stop(boolean)"]);
        } else {
            functions.extend([
                "pg_start_backup(text, boolean, boolean)",
                "pg_stop_backup(boolean, boolean)",
            ]);
        }
        functions
    }

    /// Our slot is no walsender's, so `max_wal_senders` may be used up.
    async fn slots_free(&self, findings: &mut Findings<'_>) -> Result<(), SqlError> {
        let used: i64 = self
            .row(
                "counting the replication slots",
                "SELECT count(*) FROM pg_replication_slots",
            )
            .await?
            .value(0)?;
        let most = findings.number("max_replication_slots");
        if used >= most {
            findings.refuse(
                "max_replication_slots",
                format!("all {most} replication slots are in use"),
                format!("max_replication_slots = {}  (restart)", used + 1),
            );
        } else {
            let what = format!("{} of {most} replication slots are free", most - used);
            findings.fine("max_replication_slots", what);
        }
        Ok(())
    }
}

impl Findings<'_> {
    fn role(&mut self, in_recovery: bool) {
        if in_recovery {
            self.refuse(
                "role",
                "the server is in recovery: a standby cannot create restore points",
                "run the agent beside the primary",
            );
        } else {
            self.fine("role", "a primary");
        }
    }

    /// Sizes that this program reads.
    fn block_sizes(&mut self) {
        for name in ["block_size", "wal_block_size"] {
            if self.number(name) == 8192 {
                self.fine(name, "8192");
            } else {
                let value = self.setting(name).to_owned();
                self.refuse(
                    name,
                    format!("{name} is {value}, only 8192 is supported"),
                    "",
                );
            }
        }
    }

    /// Settings without which a copy would not recover (D 20.5, 26.3.3).
    fn server(&mut self) {
        match self.setting("wal_level").to_owned().as_str() {
            "minimal" => self.refuse(
                "wal_level",
                "wal_level is minimal: a copy taken while the server runs would not recover",
                "ALTER SYSTEM SET wal_level = replica;  -- then restart",
            ),
            level => self.fine("wal_level", level),
        }
        for (name, why) in [
            (
                "fsync",
                "a crash can destroy the database, and WAL may be gone after it",
            ),
            (
                "full_page_writes",
                "pages that are copied half-written would not be mended",
            ),
        ] {
            if self.setting(name) == "off" {
                self.refuse(
                    name,
                    format!("{name} is off: {why}"),
                    format!("ALTER SYSTEM SET {name} = on; SELECT pg_reload_conf();"),
                );
            } else {
                self.fine(name, "on");
            }
        }
        self.block_sizes();
        if self.setting("data_checksums") == "off" {
            self.warn(
                "data_checksums",
                "data pages carry no checksums: damage on disk goes into the backup unseen",
                "pg_checksums --enable  (server stopped)",
            );
        } else {
            self.fine("data_checksums", "on");
        }
        self.archiving();
    }

    /// Archiving of the server's own is nothing to us, and nothing that we disturb; one that fails fills the disk
    /// that our slot needs too, and the operator should know who else keeps WAL.
    fn archiving(&mut self) {
        let keep = ["wal_keep_size", "wal_keep_segments"]
            .into_iter()
            .find(|name| !self.setting(name).is_empty());
        let mut what = format!("archive_mode is {}", self.setting("archive_mode"));
        if let Some(keep) = keep {
            let _ = write!(what, ", {keep} is {}", self.setting(keep));
        }
        let _ = write!(
            what,
            ", max_wal_senders is {}; backups use none of them",
            self.setting("max_wal_senders")
        );
        self.fine("archiving", what);
    }

    /// What becomes of a slot that lags.
    fn slot_limits(&mut self, major: u32) {
        let name = "max_slot_wal_keep_size";
        // D 20.6.1, from 13 on, in MiB; -1: no limit.
        if major < 13 {
            self.warn(
                name,
                "PostgreSQL 12 cannot limit what a replication slot holds: while WAL cannot be shipped, \
                 its disk fills up",
                "watch the free space of pg_wal",
            );
        } else if self.number(name) < 0 {
            self.warn(
                name,
                "max_slot_wal_keep_size is -1: while WAL cannot be shipped, its disk fills up",
                "ALTER SYSTEM SET max_slot_wal_keep_size = '<what the disk can spare>'; \
                 SELECT pg_reload_conf();",
            );
        } else {
            self.fine(name, format!("{} MiB", self.number(name)));
        }
        // D18 19.6.1: a slot that no walsender uses counts as idle, however often it is advanced in
        // between two checkpoints.
        if self.number("idle_replication_slot_timeout") > 0 {
            let value = self.setting("idle_replication_slot_timeout").to_owned();
            self.warn(
                "idle_replication_slot_timeout",
                format!(
                    "idle_replication_slot_timeout is {value} s: a backup whose slot does not move for \
                     that long loses its WAL"
                ),
                "ALTER SYSTEM SET idle_replication_slot_timeout = 0; SELECT pg_reload_conf();",
            );
        }
    }
}
