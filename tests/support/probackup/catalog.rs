//! The backup catalog: its directories, the instance's configuration, the control files of its backups.

use std::fs;
use std::path::{Path, PathBuf};

use agent_wal::control::ControlFile;

use super::calls::{self, Out, SMALL, STDIO, exists, read_whole, sync_again};
use super::content::{self, Entry};
use super::control::Control;
use super::log::Log;
use super::{Failure, Kind};

/// Buffer of backup_content.control when it is written.
const CONTENT_ROOM: usize = 1 << 20;

/// What add-instance wrote down.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Configuration {
    pub(super) data: PathBuf,
    pub(super) system_identifier: u64,
}

/// A catalog and one instance in it.
#[derive(Debug, Clone)]
pub(super) struct Catalog {
    pub(super) kind: Kind,
    pub(super) log: Log,
    root: PathBuf,
    instance: String,
}

/// Parses `global/pg_control` of a data directory, again if the server was writing it.
pub(super) fn read_pg_control(data: &Path) -> Result<ControlFile, Failure> {
    let path = data.join("global/pg_control");
    let mut last = String::new();
    for _ in 0..10 {
        let bytes = fs::read(&path).map_err(|e| Failure::call("open file", &path, e))?;
        match ControlFile::parse(&bytes) {
            Ok(control) => return Ok(control),
            Err(e) => last = e.to_string(),
        }
    }
    Err(Failure::new(format!("{}: {last}", path.display())))
}

impl Catalog {
    pub(super) fn new(kind: Kind, log: Log, root: &Path, instance: &str) -> Self {
        Self {
            kind,
            log,
            root: root.to_owned(),
            instance: instance.to_owned(),
        }
    }

    /// `backups/INSTANCE`.
    pub(super) fn directory(&self) -> PathBuf {
        self.root.join("backups").join(&self.instance)
    }

    pub(super) fn instance(&self) -> &str {
        &self.instance
    }

    /// Where archived WAL is looked for.
    pub(super) fn archive(&self) -> PathBuf {
        self.root.join("wal").join(&self.instance)
    }

    /// The directory of a backup.
    pub(super) fn backup(&self, id: &str) -> PathBuf {
        self.directory().join(id)
    }

    /// `init`.
    pub(super) fn init(&self) -> Result<(), Failure> {
        if fs::read_dir(&self.root).is_ok_and(|mut entries| entries.next().is_some()) {
            return Err(Failure::new(
                "backup catalog already exist and it's not empty",
            ));
        }
        for directory in [
            self.root.clone(),
            self.root.join("backups"),
            self.root.join("wal"),
        ] {
            calls::make_directory(&directory)?;
        }
        let done = match self.kind {
            Kind::Gs => "inited",
            Kind::Pg => "initialized",
        };
        self.log.info(&format!(
            "Backup catalog '{}' successfully {done}",
            self.root.display()
        ));
        Ok(())
    }

    /// `add-instance`.
    pub(super) fn add_instance(&self, data: &Path) -> Result<(), Failure> {
        let cluster = read_pg_control(data)?;
        for directory in ["", "backups", "wal"] {
            let directory = self.root.join(directory);
            if !exists(&directory) {
                return Err(Failure::new(format!(
                    "Directory does not exist: '{}'",
                    directory.display()
                )));
            }
        }
        let wal = self.root.join("wal").join(&self.instance);
        for (what, directory) in [("backup", self.directory()), ("WAL archive", wal)] {
            if fs::metadata(&directory).is_ok_and(|found| found.is_dir()) {
                return Err(Failure::new(format!(
                    "Instance '{}' {what} directory already exists: '{}'",
                    self.instance,
                    directory.display()
                )));
            }
        }
        calls::make_directory(&self.directory())?;
        calls::make_directory(&self.root.join("wal").join(&self.instance))?;
        let mut text = format!(
            "# Backup instance information\npgdata = {}\nsystem-identifier = {}\n",
            data.display(),
            cluster.system_identifier
        );
        if self.kind == Kind::Pg {
            text += &format!("xlog-seg-size = {}\n", cluster.wal_segment_size.bytes());
        }
        let path = self.directory().join("pg_probackup.conf");
        let tmp = self.directory().join("pg_probackup.conf.tmp");
        let mut out = Out::create(&tmp, SMALL)?;
        out.write(text.as_bytes())?;
        out.close()?;
        if self.kind == Kind::Pg {
            sync_again(&tmp)?;
        }
        calls::rename(&tmp, &path)?;
        let done = match self.kind {
            Kind::Gs => "inited",
            Kind::Pg => "initialized",
        };
        self.log
            .info(&format!("Instance '{}' successfully {done}", self.instance));
        Ok(())
    }

    /// pg_probackup.conf.
    pub(super) fn configuration(&self) -> Result<Configuration, Failure> {
        let path = self.directory().join("pg_probackup.conf");
        let unknown = || Failure::new(format!("Instance '{}' does not exist", self.instance));
        let bytes = read_whole(&path, SMALL)?.ok_or_else(unknown)?;
        let text = String::from_utf8_lossy(&bytes);
        let value = |name: &str| {
            let mut lines = text.lines().filter_map(|line| line.split_once(" = "));
            lines
                .find(|(found, _)| *found == name)
                .map(|(_, value)| value)
        };
        Ok(Configuration {
            data: value("pgdata").unwrap_or_default().into(),
            system_identifier: value("system-identifier")
                .and_then(|text| text.parse().ok())
                .unwrap_or_default(),
        })
    }

    /// The control files of all backups, the newest first. A directory without one is said and left out.
    pub(super) fn list(&self) -> Result<Vec<Control>, Failure> {
        let directory = self.directory();
        let entries =
            fs::read_dir(&directory).map_err(|e| Failure::call("open directory", &directory, e))?;
        let mut found = Vec::new();
        for entry in entries {
            let entry = entry.map_err(|e| Failure::call("read directory", &directory, e))?;
            if !entry.file_type().is_ok_and(|kind| kind.is_dir()) {
                continue;
            }
            let path = entry.path().join("backup.control");
            if !exists(&path) {
                self.log.warning(&format!(
                    "Control file \"{}\" doesn't exist",
                    path.display()
                ));
                continue;
            }
            let bytes = read_whole(&path, SMALL)?.unwrap_or_default();
            match Control::parse(&String::from_utf8_lossy(&bytes)) {
                Ok(control) => found.push(control),
                Err(e) => self.log.warning(&format!("{}: {e}", path.display())),
            }
        }
        found.sort_by_key(|control| std::cmp::Reverse(control.start));
        Ok(found)
    }

    /// Writes backup.control: beside it, synced, renamed over it.
    pub(super) fn write_control(&self, control: &Control) -> Result<(), Failure> {
        let path = self.backup(&control.id()).join("backup.control");
        let tmp = self.backup(&control.id()).join("backup.control.tmp");
        let mut out = Out::create(&tmp, SMALL)?;
        out.mode(0o600)?;
        out.write(control.text(self.kind).as_bytes())?;
        if self.kind == Kind::Gs {
            out.flush()?;
            out.sync()?;
            out.close()?;
        } else {
            out.close()?;
            sync_again(&tmp)?;
        }
        calls::rename(&tmp, &path)
    }

    /// Reads backup_content.control.
    pub(super) fn content(&self, id: &str) -> Result<Vec<Entry>, Failure> {
        let path = self.backup(id).join("backup_content.control");
        let missing = || Failure::new(format!("Cannot open file list \"{}\"", path.display()));
        let bytes = read_whole(&path, STDIO)?.ok_or_else(missing)?;
        content::parse(&String::from_utf8_lossy(&bytes))
    }

    /// Writes backup_content.control, and counts its bytes and its CRC into `control`. Without `sync`, as every 60
    /// seconds during a copy, the CRC stays and nothing is synced.
    pub(super) fn write_content(
        &self,
        control: &mut Control,
        entries: &[Entry],
        sync: bool,
    ) -> Result<(), Failure> {
        let path = self.backup(&control.id()).join("backup_content.control");
        let tmp = self
            .backup(&control.id())
            .join("backup_content.control.tmp");
        let text = content::text(entries, self.kind);
        let mut out = Out::create(&tmp, CONTENT_ROOM)?;
        out.mode(0o600)?;
        out.write(text.as_bytes())?;
        out.flush()?;
        if sync {
            out.sync()?;
            control.content_crc = crc32c::crc32c(text.as_bytes());
        }
        out.close()?;
        calls::rename(&tmp, &path)?;
        count(control, entries);
        Ok(())
    }
}

/// Bytes of a backup, as write_backup_filelist counts them.
fn count(control: &mut Control, entries: &[Entry]) {
    let (mut data, mut wal, mut full) = (0, 0, 0);
    for entry in entries {
        if entry.is_directory() {
            data += 4096;
            full += 4096;
        } else if let Ok(size) = u64::try_from(entry.size) {
            let is_wal = entry.external == 0
                && entry.name().len() == 24
                && entry.name().bytes().all(|b| b.is_ascii_hexdigit());
            if is_wal {
                wal += size;
            } else {
                data += size;
                full += if entry.is_data { entry.full_size } else { size };
            }
        }
    }
    control.data_bytes = Some(data);
    control.wal_bytes = Some(wal);
    control.uncompressed_bytes = full;
}
