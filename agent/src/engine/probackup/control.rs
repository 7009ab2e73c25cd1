//! `backup.control`: what the program says of a backup of its own.
//!
//! Lines `name = value`, values quoted or not (`pgBackupWriteControl` in its catalog.c). The same in both programs; each
//! has names of its own, which are passed over.

use std::collections::BTreeMap;

use agent_wal::Lsn;
use catalog::model::BackupMode;

/// Why a `backup.control` cannot be used.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ControlError {
    /// A line is no line of it.
    #[error("line {0} of `backup.control` has no `=`")]
    Line(usize),
    /// A value is missing.
    #[error("`backup.control` says no `{0}`")]
    Missing(&'static str),
    /// A value is not what it should be.
    #[error("`backup.control` says `{name} = {value}`")]
    Value {
        /// Its name.
        name: &'static str,
        /// What stands there.
        value: String,
    },
}

/// What `backup.control` says of a backup.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BackupControl {
    /// `OK`, `DONE`, `ERROR`, `RUNNING`, ...
    pub status: String,
    /// What it is.
    pub mode: BackupMode,
    /// Whether it brought its WAL along.
    pub stream: bool,
    /// Whether it was taken from a standby.
    pub from_replica: bool,
    /// Version of the program that made it, such as `2.5.16`.
    pub program_version: String,
    /// Major version of the server, as a string: `15`, `9.2` (openGauss).
    pub server_version: String,
    /// Timeline.
    pub timeline: u32,
    /// Start.
    pub start: Lsn,
    /// End.
    pub stop: Lsn,
    /// Id of its parent.
    pub parent: Option<String>,
    /// Directories given with `-E`, in order.
    pub external_dirs: Vec<String>,
    /// Bytes of the data directory.
    pub pgdata_bytes: Option<u64>,
}

impl BackupControl {
    /// Reads it.
    ///
    /// # Errors
    /// [`ControlError`] for the first thing that is missing or wrong.
    pub fn parse(text: &str) -> Result<Self, ControlError> {
        let values = Values::parse(text)?;
        Ok(Self {
            status: values.text("status")?.to_owned(),
            mode: values.parsed("backup-mode")?,
            stream: values.parsed("stream")?,
            from_replica: values.parsed("from-replica")?,
            program_version: values.text("program-version")?.to_owned(),
            server_version: values.text("server-version")?.to_owned(),
            timeline: values.parsed("timelineid")?,
            start: values.parsed("start-lsn")?,
            stop: values.parsed("stop-lsn")?,
            parent: values.get("parent-backup-id").map(str::to_owned),
            external_dirs: values
                .get("external-dirs")
                .filter(|list| *list != "none")
                .map(|list| list.split(':').map(str::to_owned).collect())
                .unwrap_or_default(),
            pgdata_bytes: match values.get("pgdata-bytes") {
                Some(_) => Some(values.parsed("pgdata-bytes")?),
                None => None,
            },
        })
    }

    /// Whether the program holds the backup for one that can be restored. `DONE`: not validated, as it was told.
    #[must_use]
    pub fn is_good(&self) -> bool {
        matches!(self.status.as_str(), "OK" | "DONE")
    }
}

struct Values<'a>(BTreeMap<&'a str, &'a str>);

impl<'a> Values<'a> {
    fn parse(text: &'a str) -> Result<Self, ControlError> {
        let mut values = BTreeMap::new();
        for (number, line) in text.lines().enumerate() {
            let line = line.trim();
            if line.is_empty() || line.starts_with('#') {
                continue;
            }
            let (name, value) = line.split_once('=').ok_or(ControlError::Line(number + 1))?;
            let value = value.trim();
            let unquoted = value.strip_prefix('\'').and_then(|v| v.strip_suffix('\''));
            values.insert(name.trim(), unquoted.unwrap_or(value));
        }
        Ok(Self(values))
    }

    fn get(&self, name: &str) -> Option<&'a str> {
        self.0.get(name).copied()
    }

    fn text(&self, name: &'static str) -> Result<&'a str, ControlError> {
        self.get(name).ok_or(ControlError::Missing(name))
    }

    fn parsed<T: std::str::FromStr>(&self, name: &'static str) -> Result<T, ControlError> {
        let value = self.text(name)?;
        value.parse().map_err(|_| ControlError::Value {
            name,
            value: value.to_owned(),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const GS: &str = include_str!("samples/D_backup.control");
    const PG: &str = include_str!("samples/pg_delta_backup.control");

    #[test]
    fn both_programs_are_read() {
        let gs = BackupControl::parse(GS).unwrap();
        assert!(gs.is_good() && gs.stream && !gs.from_replica);
        assert_eq!((gs.mode, gs.timeline), (BackupMode::Full, 1));
        assert_eq!((gs.start, gs.stop), (Lsn(0x6300_0028), Lsn(0x6300_01E8)));
        assert_eq!(
            (gs.program_version.as_str(), gs.server_version.as_str()),
            ("2.4.2", "9.2")
        );
        assert_eq!((gs.parent, gs.external_dirs), (None, Vec::new()));
        let pg = BackupControl::parse(PG).unwrap();
        assert!(pg.is_good());
        assert_eq!(
            (pg.mode, pg.server_version.as_str()),
            (BackupMode::Delta, "15")
        );
        assert_eq!(pg.program_version, "2.5.16");
        assert!(pg.parent.is_some_and(|id| id.len() == 6));
    }

    #[test]
    fn what_is_missing_or_wrong_is_named() {
        let without = GS.replace("stop-lsn = 0/630001E8\n", "");
        assert_eq!(
            BackupControl::parse(&without),
            Err(ControlError::Missing("stop-lsn"))
        );
        let wrong = GS.replace("0/63000028", "nowhere");
        let error = BackupControl::parse(&wrong).unwrap_err().to_string();
        assert!(error.contains("start-lsn = nowhere"), "{error}");
        assert_eq!(BackupControl::parse("status"), Err(ControlError::Line(1)));
        for bad in ["ERROR", "RUNNING", "CORRUPT", "ORPHAN"] {
            let control = BackupControl::parse(&GS.replace("DONE", bad)).unwrap();
            assert!(!control.is_good(), "{bad}");
        }
    }

    #[test]
    fn external_directories_are_in_order() {
        let text = GS.to_owned() + "external-dirs = '/a b:/c'\n";
        assert_eq!(
            BackupControl::parse(&text).unwrap().external_dirs,
            ["/a b", "/c"]
        );
    }
}
