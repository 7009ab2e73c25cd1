//! PostgreSQL 12 to 18. "D" is its manual, by section of version 15.

use std::collections::BTreeMap;

use super::{Answer, Dialect, Flavour};
use crate::connect::NodeConnection;
use crate::error::SqlError;
use crate::facts::{self, ServerFacts, ServerFiles};
use crate::preflight::{self, Finding};
use crate::text::identifier;

/// A PostgreSQL.
#[derive(Debug, Clone, Copy)]
pub(crate) struct PostgreSql {
    version: u32,
}

impl PostgreSql {
    /// Of that `server_version_num`.
    pub(crate) fn new(version: u32) -> Self {
        Self { version }
    }

    pub(crate) fn major(self) -> u32 {
        self.version / 10_000
    }
}

impl Dialect for PostgreSql {
    fn flavour(&self) -> Flavour {
        Flavour::PostgreSql
    }

    fn version(&self) -> String {
        format!("PostgreSQL {}.{}", self.major(), self.version % 10_000)
    }

    fn version_num(&self) -> u32 {
        self.version
    }

    /// D 20.11 (client connection defaults): no timeout of the server may end a session that holds a backup
    /// open, and the death of this program must: a server that is busy with a statement looks whether its client is
    /// there (D 20.3.2), and a client that vanished with its host is noticed within half a minute.
    fn set_up(&self) -> String {
        let mut sql = "SET statement_timeout = 0; SET lock_timeout = 0; \
                       SET idle_in_transaction_session_timeout = 0; \
                       SET search_path = pg_catalog; SET standard_conforming_strings = on; \
                       SET tcp_keepalives_idle = 10; SET tcp_keepalives_interval = 5; SET tcp_keepalives_count = 3"
            .to_owned();
        if self.version >= 140_000 {
            sql.push_str(
                "; SET idle_session_timeout = 0; SET client_connection_check_interval = 2000",
            );
        }
        if self.version >= 170_000 {
            sql.push_str("; SET transaction_timeout = 0");
        }
        sql
    }

    fn create_restore_point(&self, name: &str) -> String {
        // D 9.27.3 pg_create_restore_point(name).
        format!("SELECT pg_create_restore_point({name})")
    }

    fn flushed_restore_point(&self, name: &str) -> String {
        // A commit with an id flushes what its session has written (xact.c, RecordTransactionCommit: wrote_xlog).
        format!("SELECT pg_create_restore_point({name}), txid_current()")
    }

    fn switch_wal(&self) -> &'static str {
        // D 9.27.3 pg_switch_wal().
        "SELECT pg_switch_wal()"
    }

    fn flush_lsn(&self) -> &'static str {
        // D 9.27.3 pg_current_wal_flush_lsn().
        "SELECT pg_current_wal_flush_lsn()"
    }

    fn insert_lsn(&self) -> &'static str {
        // D 9.27.3 pg_current_wal_insert_lsn().
        "SELECT pg_current_wal_insert_lsn()"
    }

    fn wal_position(&self) -> &'static str {
        // D 9.27.3. The flush position is asked for first: it can only be behind the insert position.
        "SELECT pg_current_wal_flush_lsn(), pg_current_wal_insert_lsn(), \
         left(pg_walfile_name(pg_current_wal_insert_lsn()), 8)"
    }

    fn snapshot(&self) -> &'static str {
        // D 9.26 (transaction ids and snapshots); the newer name pg_current_snapshot came with 13, this one is still
        // there in 18. A statement of its own: its snapshot is then taken now, whatever the isolation level.
        "SELECT txid_current_snapshot()"
    }

    fn xid_holders(&self, most: u32) -> String {
        // D 54.12 pg_locks: every transaction holds an exclusive lock on its own id as long as it lasts; one
        // that is prepared goes on holding it, with a null pid. The lock table is read in one piece, and what
        // the two other views say (D 28.2.3, 54.16) is joined to it: read by themselves, they miss a
        // transaction that becomes prepared between one and the other. Subtransactions have ids too.
        format!(
            "SELECT l.pid, a.application_name, a.state, coalesce(a.datname, p.database), \
             greatest(0, (extract(epoch FROM clock_timestamp() - coalesce(p.prepared, a.xact_start)) * 1000)::bigint), \
             p.gid, p.owner, count(*) OVER () \
             FROM (SELECT pid, array_agg(transactionid) AS xids FROM pg_locks \
             WHERE locktype = 'transactionid' AND mode = 'ExclusiveLock' AND granted \
             GROUP BY pid, virtualtransaction) l \
             LEFT JOIN pg_stat_activity a ON a.pid = l.pid \
             LEFT JOIN pg_prepared_xacts p ON l.pid IS NULL AND p.transaction = ANY (l.xids) \
             WHERE a.backend_type IS DISTINCT FROM 'autovacuum worker' \
             ORDER BY 5 DESC NULLS LAST LIMIT {most}"
        )
    }

    fn wal_receivers(&self) -> &'static str {
        // D 28.2.4 pg_stat_replication: without pg_monitor only the process id is shown.
        "SELECT application_name, host(client_addr), state FROM pg_stat_replication ORDER BY 1, 2"
    }

    fn tablespaces(&self) -> &'static str {
        // D 9.26.3 pg_tablespace_location(): the built-in ones have none.
        "SELECT oid, spcname, pg_tablespace_location(oid) FROM pg_tablespace ORDER BY oid"
    }

    fn start_backup(&self, label: &str, fast: bool) -> Result<String, SqlError> {
        // D 26.3.3; to version 14 (D14 26.3.3.1) the third argument chose the non-exclusive kind.
        Ok(if self.version >= 150_000 {
            format!("SELECT pg_backup_start({label}, {fast})")
        } else {
            format!("SELECT pg_start_backup({label}, {fast}, false)")
        })
    }

    fn stop_backup(&self) -> Result<String, SqlError> {
        // D 26.3.3. The files' text goes through the client's encoding; paths are bytes, so both are
        // turned back into the database's own encoding first.
        let from = if self.version >= 150_000 {
            "pg_backup_stop(false)"
        } else {
            "pg_stop_backup(false, false)"
        };
        Ok(format!(
            "SELECT lsn, \
             encode(convert_to(labelfile, getdatabaseencoding()), 'hex'), \
             encode(convert_to(coalesce(spcmapfile, ''), getdatabaseencoding()), 'hex') FROM {from}"
        ))
    }

    fn slots_hold_wal(&self) -> bool {
        true
    }

    fn grant_for(&self, message: &str, user: &str) -> String {
        let role = identifier(user);
        // "permission denied for function pg_backup_start": the caller's preflight knows the signature, this
        // is only for privileges that went missing in between.
        match message.strip_prefix("permission denied for function ") {
            Some(function) => format!("GRANT EXECUTE ON FUNCTION {function} TO {role};"),
            None if message.contains("replication") => format!("ALTER ROLE {role} REPLICATION;"),
            None => format!("GRANT pg_monitor TO {role};"),
        }
    }

    fn server_facts<'a>(&'a self, sql: &'a NodeConnection) -> Answer<'a, ServerFacts> {
        Box::pin(self.read_facts(sql))
    }

    fn examine<'a>(&'a self, sql: &'a NodeConnection) -> Answer<'a, Vec<Finding>> {
        Box::pin(preflight::postgresql(sql, self.major()))
    }
}

impl PostgreSql {
    async fn read_facts(&self, sql: &NodeConnection) -> Result<ServerFacts, SqlError> {
        // D 9.27.x control data functions; pg_walfile_name() does not work in recovery, where the control
        // file's newest timeline is what can be known.
        let row = sql
            .row(
                "reading the server's facts",
                "SELECT s.system_identifier, s.catalog_version_no, i.bytes_per_wal_segment, \
                 i.database_block_size, i.data_page_checksum_version, pg_is_in_recovery(), \
                 CASE WHEN pg_is_in_recovery() \
                 THEN greatest(c.timeline_id, r.min_recovery_end_timeline)::text \
                 ELSE left(pg_walfile_name(pg_current_wal_insert_lsn()), 8) END \
                 FROM pg_control_system() s, pg_control_init() i, \
                 pg_control_checkpoint() c, pg_control_recovery() r",
            )
            .await?;
        let in_recovery = row.flag(5)?;
        let settings = sql.settings().await?;
        let files = self.files(sql, &settings).await?;
        Ok(ServerFacts {
            flavour: Flavour::PostgreSql,
            version: self.version(),
            // pg_control_system() shows it as a signed number.
            system_identifier: row.value::<i64>(0)?.cast_unsigned(),
            catalog_version: row.value(1)?,
            server_version_num: self.version,
            data_directory: sql.setting(&settings, "data_directory")?.to_owned(),
            port: facts::parsed(sql.setting(&settings, "port")?)?,
            wal_segment_size: row.value(2)?,
            block_size: row.value(3)?,
            timeline: if in_recovery {
                row.value(6)?
            } else {
                facts::hex_timeline(&row, 6)?
            },
            in_recovery,
            data_checksums: row.value::<u32>(4)? != 0,
            tablespaces: sql.tablespaces().await?,
            files,
        })
    }

    async fn files(
        &self,
        sql: &NodeConnection,
        settings: &BTreeMap<String, String>,
    ) -> Result<ServerFiles, SqlError> {
        let text = |name| sql.setting(settings, name).map(str::to_owned);
        let (sources, sources_complete) = self.sources(sql).await?;
        Ok(ServerFiles {
            config_file: text("config_file")?,
            hba_file: text("hba_file")?,
            ident_file: text("ident_file")?,
            external_pid_file: facts::given(settings, "external_pid_file"),
            unix_socket_directories: facts::directories(&text("unix_socket_directories")?),
            stats_temp_directory: facts::given(settings, "stats_temp_directory"),
            data_directory_mode: u32::from_str_radix(&text("data_directory_mode")?, 8)
                .map_err(|_| facts::unexpected(settings, "data_directory_mode"))?,
            sources,
            sources_complete,
        })
    }

    /// Files that settings and rules come from, and whether the list is complete.
    async fn sources(&self, sql: &NodeConnection) -> Result<(Vec<String>, bool), SqlError> {
        let what = "reading the configuration's sources";
        let rights = sql
            .row(
                what,
                "SELECT has_table_privilege('pg_file_settings', 'SELECT') \
                 AND has_function_privilege('pg_show_all_file_settings()', 'EXECUTE'), \
                 has_table_privilege('pg_hba_file_rules', 'SELECT') \
                 AND has_function_privilege('pg_hba_file_rules()', 'EXECUTE')",
            )
            .await?;
        let (settings, rules) = (rights.flag(0)?, rights.flag(1)?);
        let mut query = facts::SETTINGS_SOURCES.to_owned();
        if settings {
            // D 54.9 pg_file_settings: also files whose settings are overridden.
            query.push_str(
                " UNION SELECT sourcefile FROM pg_file_settings WHERE sourcefile IS NOT NULL",
            );
        }
        if rules && self.version >= 160_000 {
            // From 16 on these can include files too (D16 21.1).
            query.push_str(
                " UNION SELECT file_name FROM pg_hba_file_rules WHERE file_name IS NOT NULL \
                 UNION SELECT file_name FROM pg_ident_file_mappings WHERE file_name IS NOT NULL",
            );
        }
        query.push_str(" ORDER BY 1");
        let sources = sql.texts(what, &query).await?;
        Ok((sources, settings && (rules || self.version < 160_000)))
    }
}
