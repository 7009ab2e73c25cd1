//! What the server says of itself.

use std::collections::BTreeMap;
use std::time::Duration;

use agent_wal::Lsn;

use crate::connect::NodeConnection;
use crate::error::SqlError;
use crate::text::{Row, identifier};

/// The size of all databases is summed file by file.
const SIZE_DEADLINE: Duration = Duration::from_mins(2);

/// A tablespace outside the data directory.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ServerTablespace {
    /// OID: the name of its link in `pg_tblspc`.
    pub oid: u32,
    /// Name.
    pub name: String,
    /// Directory; relative to the data directory for an in-place one (a developer's option of 15 and later).
    pub location: String,
}

/// A receiver of this server's WAL that is connected.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct WalReceiver {
    /// `application_name`
    pub application: String,
    /// `client_addr`; `None`: over the socket.
    pub address: Option<String>,
    /// `state`; empty where the user may not see it.
    pub state: String,
}

/// The cluster's identity and shape.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ServerFacts {
    /// System identifier.
    pub system_identifier: u64,
    /// Catalog version; names the directory inside each tablespace.
    pub catalog_version: u32,
    /// `server_version_num`.
    pub server_version_num: u32,
    /// Data directory.
    pub data_directory: String,
    /// Port it listens on.
    pub port: u16,
    /// WAL segment size in bytes.
    pub wal_segment_size: u64,
    /// Block size of data files in bytes.
    pub block_size: u32,
    /// Timeline it writes (or, in recovery, replayed last as far as its control file knows).
    pub timeline: u32,
    /// Whether it is a standby or still recovering.
    pub in_recovery: bool,
    /// Whether pages carry checksums.
    pub data_checksums: bool,
    /// Tablespaces other than the two built-in ones.
    pub tablespaces: Vec<ServerTablespace>,
    /// Its files and directories.
    pub files: ServerFiles,
}

/// Where the server's configuration and state are. Paths as the server has them: absolute, or relative to
/// the data directory.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct ServerFiles {
    /// `config_file`.
    pub config_file: String,
    /// `hba_file`.
    pub hba_file: String,
    /// `ident_file`.
    pub ident_file: String,
    /// `external_pid_file`, if one is set.
    pub external_pid_file: Option<String>,
    /// `unix_socket_directories`.
    pub unix_socket_directories: Vec<String>,
    /// `stats_temp_directory`; `None` from version 15 on.
    pub stats_temp_directory: Option<String>,
    /// Mode of the data directory, e.g. 0o700 (`data_directory_mode`).
    pub data_directory_mode: u32,
    /// All files that settings and rules came from, `config_file`, `postgresql.auto.conf` and included ones among
    /// them, sorted.
    pub sources: Vec<String>,
    /// Whether `sources` lists every included file. Without the right to read `pg_file_settings` only those are
    /// known that a setting in force came from.
    pub sources_complete: bool,
}

/// Where the log stands, read at one moment.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct WalPosition {
    /// Everything before it is on disk.
    pub flush: Lsn,
    /// Everything written so far is before it.
    pub insert: Lsn,
    /// Timeline that is written.
    pub timeline: u32,
}

impl NodeConnection {
    /// Identity, shape and files of the server.
    ///
    /// # Errors
    /// [`SqlError::Privilege`] without `pg_monitor`; those of a statement.
    pub async fn server_facts(&self) -> Result<ServerFacts, SqlError> {
        // D 9.27.x control data functions; pg_walfile_name() does not work in recovery, where the control
        // file's newest timeline is what can be known.
        let row = self
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
        let settings = self.settings().await?;
        let files = self.files(&settings).await?;
        Ok(ServerFacts {
            // pg_control_system() shows it as a signed number.
            system_identifier: row.value::<i64>(0)?.cast_unsigned(),
            catalog_version: row.value(1)?,
            server_version_num: self.version_num(),
            data_directory: self.setting(&settings, "data_directory")?.to_owned(),
            port: parsed(self.setting(&settings, "port")?)?,
            wal_segment_size: row.value(2)?,
            block_size: row.value(3)?,
            timeline: if in_recovery {
                row.value(6)?
            } else {
                hex_timeline(&row, 6)?
            },
            in_recovery,
            data_checksums: row.value::<u32>(4)? != 0,
            tablespaces: self.tablespaces().await?,
            files,
        })
    }

    /// Sum of all databases' sizes in bytes. Reads the size of every file: not for a hot path.
    ///
    /// # Errors
    /// [`SqlError::Privilege`] without `pg_monitor`; those of a statement.
    pub async fn size_bytes(&self) -> Result<u64, SqlError> {
        let what = "summing the databases' sizes";
        // D 9.27.7 pg_database_size(): NULL for one that is dropped meanwhile.
        let rows = self
            .rows_within(
                what,
                "SELECT coalesce(sum(pg_database_size(oid)), 0)::bigint FROM pg_database",
                SIZE_DEADLINE,
            )
            .await?;
        crate::session::only(what, rows)?.value(0)
    }

    /// Flush and insert position and timeline of a server that is not in recovery.
    ///
    /// # Errors
    /// Those of a statement; [`SqlError::Server`] (55000) during recovery.
    pub async fn wal_position(&self) -> Result<WalPosition, SqlError> {
        // D 9.27.3. The flush position is asked for first: it can only be behind the insert position.
        let row = self
            .row(
                "reading the WAL position",
                "SELECT pg_current_wal_flush_lsn(), pg_current_wal_insert_lsn(), \
                 left(pg_walfile_name(pg_current_wal_insert_lsn()), 8)",
            )
            .await?;
        Ok(WalPosition {
            flush: row.value(0)?,
            insert: row.value(1)?,
            timeline: hex_timeline(&row, 2)?,
        })
    }

    /// Timeline that is written.
    ///
    /// # Errors
    /// As [`NodeConnection::wal_position`].
    pub async fn timeline(&self) -> Result<u32, SqlError> {
        Ok(self.wal_position().await?.timeline)
    }

    /// Whether the server is in recovery (a standby).
    ///
    /// # Errors
    /// Those of a statement.
    pub async fn in_recovery(&self) -> Result<bool, SqlError> {
        // D 9.27.4 pg_is_in_recovery().
        self.row("asking for the server's role", "SELECT pg_is_in_recovery()")
            .await?
            .flag(0)
    }

    /// Standbys and other programs that receive its WAL now.
    ///
    /// # Errors
    /// Those of a statement.
    pub async fn wal_receivers(&self) -> Result<Vec<WalReceiver>, SqlError> {
        // D 28.2.4 pg_stat_replication: without pg_monitor only the process id is shown.
        let rows = self
            .rows(
                "looking for standbys",
                "SELECT coalesce(application_name, ''), host(client_addr), coalesce(state, '') \
                 FROM pg_stat_replication ORDER BY 1, 2",
            )
            .await?;
        rows.iter()
            .map(|row| {
                Ok(WalReceiver {
                    application: row.text(0)?.to_owned(),
                    address: row.optional(1)?.map(str::to_owned),
                    state: row.text(2)?.to_owned(),
                })
            })
            .collect()
    }

    /// Tablespaces other than `pg_default` and `pg_global`.
    ///
    /// # Errors
    /// Those of a statement.
    pub async fn tablespaces(&self) -> Result<Vec<ServerTablespace>, SqlError> {
        // D 9.26.3 pg_tablespace_location(): the built-in ones have none.
        let rows = self
            .rows(
                "reading the tablespaces",
                "SELECT oid, spcname, pg_tablespace_location(oid) FROM pg_tablespace \
                 WHERE pg_tablespace_location(oid) <> '' ORDER BY oid",
            )
            .await?;
        rows.iter()
            .map(|row| {
                Ok(ServerTablespace {
                    oid: row.value(0)?,
                    name: row.text(1)?.to_owned(),
                    location: row.text(2)?.to_owned(),
                })
            })
            .collect()
    }

    /// All settings that this user may see, in their base units.
    pub(crate) async fn settings(&self) -> Result<BTreeMap<String, String>, SqlError> {
        // D 54.24 pg_settings: rows of settings for superusers are left out without pg_read_all_settings.
        let rows = self
            .rows(
                "reading the settings",
                "SELECT name, setting FROM pg_settings",
            )
            .await?;
        rows.iter()
            .map(|row| {
                let setting = row.optional(1)?.unwrap_or_default();
                Ok((row.text(0)?.to_owned(), setting.to_owned()))
            })
            .collect()
    }

    /// A setting that every version has; one that is not seen is hidden.
    fn setting<'a>(
        &self,
        settings: &'a BTreeMap<String, String>,
        name: &str,
    ) -> Result<&'a str, SqlError> {
        settings
            .get(name)
            .map(String::as_str)
            .ok_or_else(|| SqlError::Privilege {
                what: "reading the server's settings",
                message: format!("{name} is hidden"),
                grant: format!("GRANT pg_monitor TO {};", identifier(self.session.user())),
            })
    }

    async fn files(&self, settings: &BTreeMap<String, String>) -> Result<ServerFiles, SqlError> {
        let text = |name| self.setting(settings, name).map(str::to_owned);
        let given = |name: &str| settings.get(name).filter(|v| !v.is_empty()).cloned();
        let (sources, sources_complete) = self.sources().await?;
        Ok(ServerFiles {
            config_file: text("config_file")?,
            hba_file: text("hba_file")?,
            ident_file: text("ident_file")?,
            external_pid_file: given("external_pid_file"),
            unix_socket_directories: text("unix_socket_directories")?
                .split(',')
                .map(|directory| directory.trim().trim_matches('"').to_owned())
                .filter(|directory| !directory.is_empty())
                .collect(),
            stats_temp_directory: given("stats_temp_directory"),
            data_directory_mode: u32::from_str_radix(&text("data_directory_mode")?, 8)
                .map_err(|_| unexpected(settings, "data_directory_mode"))?,
            sources,
            sources_complete,
        })
    }

    /// Files that settings and rules come from, and whether the list is complete.
    async fn sources(&self) -> Result<(Vec<String>, bool), SqlError> {
        let what = "reading the configuration's sources";
        let rights = self
            .row(
                what,
                "SELECT has_table_privilege('pg_file_settings', 'SELECT') \
                 AND has_function_privilege('pg_show_all_file_settings()', 'EXECUTE'), \
                 has_table_privilege('pg_hba_file_rules', 'SELECT') \
                 AND has_function_privilege('pg_hba_file_rules()', 'EXECUTE')",
            )
            .await?;
        let (settings, rules) = (rights.flag(0)?, rights.flag(1)?);
        let mut sql = "SELECT sourcefile FROM pg_settings WHERE sourcefile IS NOT NULL".to_owned();
        if settings {
            // D 54.9 pg_file_settings: also files whose settings are overridden.
            sql.push_str(
                " UNION SELECT sourcefile FROM pg_file_settings WHERE sourcefile IS NOT NULL",
            );
        }
        if rules && self.major() >= 16 {
            // From 16 on these can include files too (D16 21.1).
            sql.push_str(
                " UNION SELECT file_name FROM pg_hba_file_rules WHERE file_name IS NOT NULL \
                 UNION SELECT file_name FROM pg_ident_file_mappings WHERE file_name IS NOT NULL",
            );
        }
        sql.push_str(" ORDER BY 1");
        let rows = self.rows(what, &sql).await?;
        let sources = rows
            .iter()
            .map(|row| row.text(0).map(str::to_owned))
            .collect::<Result<_, _>>()?;
        Ok((sources, settings && (rules || self.major() < 16)))
    }
}

/// The timeline that a segment's name begins with.
fn hex_timeline(row: &Row, at: usize) -> Result<u32, SqlError> {
    let text = row.text(at)?;
    u32::from_str_radix(text, 16).map_err(|_| SqlError::Answer {
        what: row.what,
        answer: format!("segment name {text:?}"),
    })
}

fn parsed<T: std::str::FromStr>(text: &str) -> Result<T, SqlError> {
    text.parse().map_err(|_| SqlError::Answer {
        what: "reading the settings",
        answer: text.to_owned(),
    })
}

fn unexpected(settings: &BTreeMap<String, String>, name: &str) -> SqlError {
    SqlError::Answer {
        what: "reading the settings",
        answer: format!("{name} is {:?}", settings.get(name)),
    }
}
