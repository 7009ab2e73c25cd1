//! openGauss. "S" is a sample that a running openGauss 5.0.0 gave (docs/OPENGAUSS.md says which), "V" its source at
//! v5.0.0.
//!
//! Its databases are of the Oracle kind unless made otherwise: an empty string is NULL, so no statement here
//! compares with one, and readers take NULL for empty. Transaction ids have 8 bytes, and threads take the place of
//! processes: their numbers do not fit in 32 bits.

use std::collections::BTreeMap;

use super::{Answer, Dialect, Flavour, OPENGAUSS};
use crate::connect::NodeConnection;
use crate::error::SqlError;
use crate::facts::{self, ServerFacts, ServerFiles};
use crate::preflight::{Finding, opengauss};
use crate::text::identifier;

/// An openGauss.
#[derive(Debug, Clone)]
pub(crate) struct OpenGauss {
    /// As `version()` has it, such as `5.0.0`.
    release: String,
}

impl OpenGauss {
    /// Reads `version()`; `None`: it is another server.
    pub(crate) fn of(version: &str) -> Option<Self> {
        // S E_tokio.txt: "(openGauss 5.0.0 build ) compiled at ..."; elder ones say "PostgreSQL 9.2.4 (openGauss ...",
        // and lite ones "openGauss-lite".
        let (_, rest) = version.split_once("(openGauss")?;
        let mut words = rest.split_whitespace();
        let release = words.find(|word| word.starts_with(|c: char| c.is_ascii_digit()))?;
        Some(Self {
            release: release.to_owned(),
        })
    }

    async fn read_facts(&self, sql: &NodeConnection) -> Result<ServerFacts, SqlError> {
        // S F_slots.txt, A_idle.txt; V builtin_funcs.ini. The timeline never changes (V xlog.cpp, StartupXLOG: no
        // new one after recovery), so the last checkpoint's is the one that is written. The identifier's type is
        // xid: unsigned, shown in decimal.
        let row = sql
            .row(
                "reading the server's facts",
                "SELECT s.system_identifier::text, s.catalog_version_no, c.timeline_id, pg_is_in_recovery() \
                 FROM pg_control_system() s, pg_control_checkpoint() c",
            )
            .await?;
        let settings = sql.settings().await?;
        let number = |name| facts::parsed::<u64>(sql.setting(&settings, name)?);
        Ok(ServerFacts {
            flavour: Flavour::OpenGauss,
            version: self.version(),
            system_identifier: row.value(0)?,
            catalog_version: row.value(1)?,
            server_version_num: OPENGAUSS,
            data_directory: sql.setting(&settings, "data_directory")?.to_owned(),
            port: facts::parsed(sql.setting(&settings, "port")?)?,
            // V guc_storage.cpp: in blocks of the WAL.
            wal_segment_size: number("wal_segment_size")?.saturating_mul(number("wal_block_size")?),
            block_size: facts::parsed(sql.setting(&settings, "block_size")?)?,
            timeline: row.value(2)?,
            in_recovery: row.flag(3)?,
            // V bufpage.cpp, PageSetChecksumInplace: every page has one, there is no switch.
            data_checksums: true,
            tablespaces: sql.tablespaces().await?,
            files: files(sql, &settings).await?,
        })
    }
}

impl Dialect for OpenGauss {
    fn flavour(&self) -> Flavour {
        Flavour::OpenGauss
    }

    fn version(&self) -> String {
        format!("openGauss {}", self.release)
    }

    fn version_num(&self) -> u32 {
        OPENGAUSS
    }

    /// S `F_slots.txt`: `session_timeout` is 10 minutes by default and ends an idle session. There is no
    /// `lock_timeout`; `lockwait_timeout` (20 minutes) is longer than any statement of ours.
    fn set_up(&self) -> String {
        "SET statement_timeout = 0; SET session_timeout = 0; \
         SET search_path = pg_catalog; SET standard_conforming_strings = on; \
         SET tcp_keepalives_idle = 10; SET tcp_keepalives_interval = 5; SET tcp_keepalives_count = 3"
            .to_owned()
    }

    fn create_restore_point(&self, name: &str) -> String {
        // S A_idle.txt, A_rp_flush.txt: where the record ends, and it is on disk by then.
        format!("SELECT pg_create_restore_point({name})")
    }

    fn flushed_restore_point(&self, name: &str) -> String {
        self.create_restore_point(name)
    }

    fn switch_wal(&self) -> &'static str {
        // S A_idle.txt: a third of a second, because it makes a checkpoint too. Never while the cluster waits.
        "SELECT pg_switch_xlog()"
    }

    fn flush_lsn(&self) -> &'static str {
        // S F_slots.txt: there is no pg_current_xlog_flush_location(). This is the position that is written (V
        // xlogfuncs.cpp); XLogWrite syncs a segment that it has filled before it says so (V xlog.cpp, finishing_seg).
        "SELECT pg_current_xlog_location()"
    }

    fn insert_lsn(&self) -> &'static str {
        // S A_idle.txt.
        "SELECT pg_current_xlog_insert_location()"
    }

    fn wal_position(&self) -> &'static str {
        // S A_idle.txt, F_slots.txt (a name is 24 hexadecimal digits, the timeline first).
        "SELECT pg_current_xlog_location(), pg_current_xlog_insert_location(), \
         substr(pg_xlogfile_name(pg_current_xlog_insert_location()), 1, 8)"
    }

    fn snapshot(&self) -> &'static str {
        // S A_point.txt, A_idle.txt: the next id moves with every id, the next commit number with every commit, of prepared
        // transactions too. txid_current_snapshot() has no list of ids here and does not move when the elder of two
        // open transactions commits. The number is taken BEFORE the commit's record is written (V xact.cpp,
        // RecordTransactionCommit), so N1 must come after S1.
        "SELECT next_xid::text || ':' || next_csn::text FROM gs_get_next_xid_csn()"
    }

    fn xid_holders(&self, most: u32) -> String {
        // S A_point.txt: one row for each id, those of subtransactions too; prepared ones with a null pid. V
        // builtin_funcs.ini: with a thread pool, a session's number outlives the thread that serves it.
        // Nothing that cannot be forged tells autovacuum here, so it is in the way like everybody.
        format!(
            "SELECT l.pid, a.application_name, a.state, coalesce(a.datname, p.database), \
             greatest(0, (extract(epoch FROM clock_timestamp() - coalesce(p.prepared, a.xact_start)) * 1000)::bigint), \
             p.gid, p.owner, count(*) OVER () \
             FROM (SELECT pid, sessionid, array_agg(transactionid::text) AS xids FROM pg_locks \
             WHERE locktype = 'transactionid' AND mode = 'ExclusiveLock' AND granted \
             GROUP BY pid, sessionid, virtualtransaction) l \
             LEFT JOIN pg_stat_activity a ON a.sessionid = l.sessionid \
             LEFT JOIN pg_prepared_xacts p ON l.pid IS NULL AND p.transaction::text = ANY (l.xids) \
             ORDER BY 5 DESC NULLS LAST LIMIT {most}"
        )
    }

    fn wal_receivers(&self) -> &'static str {
        // V system_views.sql: the view has these columns of PostgreSQL's.
        "SELECT application_name, host(client_addr), state FROM pg_stat_replication ORDER BY 1, 2"
    }

    fn tablespaces(&self) -> &'static str {
        // V builtin_funcs.ini: as PostgreSQL's. Not sifted here: see above.
        "SELECT oid, spcname, pg_tablespace_location(oid) FROM pg_tablespace ORDER BY oid"
    }

    fn start_backup(&self, _label: &str, _fast: bool) -> Result<String, SqlError> {
        Err(no_direct_copy())
    }

    fn stop_backup(&self) -> Result<String, SqlError> {
        Err(no_direct_copy())
    }

    fn slots_hold_wal(&self) -> bool {
        // S F_slots.txt: restart_lsn stays NULL, and pg_replication_slot_advance() is for logical ones.
        false
    }

    fn grant_for(&self, _message: &str, user: &str) -> String {
        // S A_privileges.txt: restore point and switch need it, and it brings all the rest.
        format!("ALTER USER {} SYSADMIN;", identifier(user))
    }

    fn server_facts<'a>(&'a self, sql: &'a NodeConnection) -> Answer<'a, ServerFacts> {
        Box::pin(self.read_facts(sql))
    }

    fn examine<'a>(&'a self, sql: &'a NodeConnection) -> Answer<'a, Vec<Finding>> {
        Box::pin(opengauss::examine(sql))
    }
}

fn no_direct_copy() -> SqlError {
    SqlError::Unsupported {
        what: "a copy by the engine `direct`",
        server: Flavour::OpenGauss,
        instead: "use the engine `probackup` with gs_probackup",
    }
}

async fn files(
    sql: &NodeConnection,
    settings: &BTreeMap<String, String>,
) -> Result<ServerFiles, SqlError> {
    let text = |name| sql.setting(settings, name).map(str::to_owned);
    let what = "reading the configuration's sources";
    Ok(ServerFiles {
        config_file: text("config_file")?,
        hba_file: text("hba_file")?,
        ident_file: text("ident_file")?,
        external_pid_file: facts::given(settings, "external_pid_file"),
        // V guc_network.cpp: one directory.
        unix_socket_directories: facts::given(settings, "unix_socket_directory")
            .into_iter()
            .collect(),
        stats_temp_directory: facts::given(settings, "stats_temp_directory"),
        // The server does not start over a directory that others may read (V postmaster.cpp, checkDataDir).
        data_directory_mode: 0o700,
        sources: sql.texts(what, facts::SETTINGS_SOURCES).await?,
        // No view tells what files are included.
        sources_complete: false,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_opengauss_is_taken_for_it() {
        let release = |text| OpenGauss::of(text).map(|server| server.release);
        // E_tokio.txt.
        let recorded = "(openGauss 5.0.0 build ) compiled at 2026-11-21 11:14:28 commit 0 last mr   on \
                        x86_64-unknown-linux-gnu, compiled by g++ (Debian 12.2.0-14+deb12u1) 12.2.0, 64-bit";
        assert_eq!(release(recorded).as_deref(), Some("5.0.0"));
        assert_eq!(
            release("(openGauss-lite 7.0.0-RC1 build 10d38387)").as_deref(),
            Some("7.0.0-RC1")
        );
        assert_eq!(
            release("PostgreSQL 9.2.4 (openGauss 2.0.0 build 78689da9)").as_deref(),
            Some("2.0.0")
        );
        assert_eq!(release("PostgreSQL 9.2.4 on x86_64"), None);
        assert_eq!(release("(GaussDB Kernel V500R002C00 build )"), None);
        assert_eq!(release(""), None);
    }
}
