//! What the server says of itself.

use std::collections::BTreeMap;
use std::time::Duration;

use agent_wal::Lsn;

use crate::connect::NodeConnection;
use crate::dialect::Flavour;
use crate::error::SqlError;
use crate::text::Row;

/// The size of all databases is summed file by file.
const SIZE_DEADLINE: Duration = Duration::from_mins(2);

/// Files that settings in force came from, for those who may see it.
pub(crate) const SETTINGS_SOURCES: &str =
    "SELECT DISTINCT sourcefile FROM pg_settings WHERE sourcefile IS NOT NULL";

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
    /// Which kind of server it is.
    pub flavour: Flavour,
    /// Its name and release, such as `PostgreSQL 15.14`.
    pub version: String,
    /// System identifier.
    pub system_identifier: u64,
    /// Catalog version; names the directory inside each tablespace.
    pub catalog_version: u32,
    /// `server_version_num`; 90204 for every openGauss.
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

/// Which database cluster it is, and what it is to its replicas.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Identity {
    /// System identifier.
    pub system_identifier: u64,
    /// Whether it is a standby or still recovering.
    pub in_recovery: bool,
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
    /// `unix_socket_directories`; openGauss has one.
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

/// What the server does with WAL that it has filled.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Archiving {
    /// Whether it keeps WAL until it is archived.
    pub on: bool,
    /// `archive_command`; `None`: there is none.
    pub command: Option<String>,
    /// `archive_dest` of openGauss, which comes before the command.
    pub directory: Option<String>,
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
        self.dialect().server_facts(self).await
    }

    /// What everybody may know who may log in. D 9.27.x: the control data functions are for all.
    ///
    /// # Errors
    /// Those of a statement.
    pub async fn identity(&self) -> Result<Identity, SqlError> {
        let what = "asking which database it is";
        let sql =
            "SELECT s.system_identifier::text, pg_is_in_recovery() FROM pg_control_system() s";
        let row = self.row(what, sql).await?;
        let text = row.text(0)?;
        // PostgreSQL's type is signed, openGauss's is not.
        let signed = text.parse::<i64>().map(i64::cast_unsigned);
        let system_identifier = match signed.or_else(|_| text.parse()) {
            Ok(identifier) => identifier,
            Err(_) => row.value(0)?,
        };
        Ok(Identity {
            system_identifier,
            in_recovery: row.flag(1)?,
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
        let row = self
            .row("reading the WAL position", self.dialect().wal_position())
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
        let rows = self
            .rows("looking for standbys", self.dialect().wal_receivers())
            .await?;
        rows.iter()
            .map(|row| {
                Ok(WalReceiver {
                    application: row.optional(0)?.unwrap_or_default().to_owned(),
                    address: row.optional(1)?.map(str::to_owned),
                    state: row.optional(2)?.unwrap_or_default().to_owned(),
                })
            })
            .collect()
    }

    /// Tablespaces other than `pg_default` and `pg_global`.
    ///
    /// # Errors
    /// Those of a statement.
    pub async fn tablespaces(&self) -> Result<Vec<ServerTablespace>, SqlError> {
        let rows = self
            .rows("reading the tablespaces", self.dialect().tablespaces())
            .await?;
        let outside = rows.iter().filter_map(|row| {
            let location = match row.optional(2) {
                Ok(location) => location.filter(|location| !location.is_empty())?,
                Err(error) => return Some(Err(error)),
            };
            let space = || {
                Ok(ServerTablespace {
                    oid: row.value(0)?,
                    name: row.text(1)?.to_owned(),
                    location: location.to_owned(),
                })
            };
            Some(space())
        });
        outside.collect()
    }

    /// What the server does with WAL that it has filled.
    ///
    /// # Errors
    /// [`SqlError::Privilege`] if its settings are hidden; those of a statement.
    pub async fn archiving(&self) -> Result<Archiving, SqlError> {
        // D 20.5.3; openGauss has archive_dest beside it (F_slots.txt). "(disabled)" is what PostgreSQL shows of a
        // command while archive_mode is off.
        let settings = self.settings().await?;
        let mode = self.setting(&settings, "archive_mode")?;
        Ok(Archiving {
            on: mode != "off",
            command: given(&settings, "archive_command").filter(|command| command != "(disabled)"),
            directory: given(&settings, "archive_dest"),
        })
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
    pub(crate) fn setting<'a>(
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
                grant: self.dialect().grant_for("", self.session.user()),
            })
    }
}

/// A setting that may be there, unless it is empty.
pub(crate) fn given(settings: &BTreeMap<String, String>, name: &str) -> Option<String> {
    settings.get(name).filter(|v| !v.is_empty()).cloned()
}

/// A list of directories.
pub(crate) fn directories(list: &str) -> Vec<String> {
    list.split(',')
        .map(|directory| directory.trim().trim_matches('"').to_owned())
        .filter(|directory| !directory.is_empty())
        .collect()
}

/// The timeline that a segment's name begins with.
pub(crate) fn hex_timeline(row: &Row, at: usize) -> Result<u32, SqlError> {
    let text = row.text(at)?;
    u32::from_str_radix(text, 16).map_err(|_| SqlError::Answer {
        what: row.what,
        answer: format!("segment name {text:?}"),
    })
}

pub(crate) fn parsed<T: std::str::FromStr>(text: &str) -> Result<T, SqlError> {
    text.parse().map_err(|_| SqlError::Answer {
        what: "reading the settings",
        answer: text.to_owned(),
    })
}

pub(crate) fn unexpected(settings: &BTreeMap<String, String>, name: &str) -> SqlError {
    SqlError::Answer {
        what: "reading the settings",
        answer: format!("{name} is {:?}", settings.get(name)),
    }
}
