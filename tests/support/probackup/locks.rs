//! The files that say a backup is being worked on: `backup.pid`, and pg_probackup's `backup_ro.pid` for readers.

use std::path::{Path, PathBuf};

use rustix::fs::OFlags;
use rustix::process::{Pid, getpid, test_kill_process};

use super::calls::{self, Out, SMALL, read_whole};
use super::{Failure, Kind};

/// A lock that is held. It is given back by [`Lock::release`]; a killed program leaves its file behind.
#[derive(Debug)]
pub(super) struct Lock {
    directory: PathBuf,
    /// On a catalog that cannot be written there is no lock, and none is needed.
    held: Held,
}

#[derive(Debug, PartialEq, Eq)]
enum Held {
    Exclusive,
    Shared,
    Nothing,
}

fn own_pid() -> i32 {
    getpid().as_raw_nonzero().get()
}

/// Makes `backup.pid`, only if it is not there; `false` if the catalog cannot be written.
fn grab(directory: &Path) -> Result<bool, Failure> {
    let path = directory.join("backup.pid");
    for _ in 0..3 {
        let flags = OFlags::RDWR | OFlags::CREATE | OFlags::EXCL;
        match Out::open(&path, flags, 0o600, 0) {
            Ok(mut out) => {
                out.write(format!("{}\n", own_pid()).as_bytes())?;
                out.sync()?;
                out.close()?;
                return Ok(true);
            }
            Err(e) if e.0.ends_with("Read-only file system") => return Ok(false),
            Err(e) if !e.0.ends_with("File exists") => return Err(e),
            Err(_) => {}
        }
        let text = read_whole(&path, SMALL)?.unwrap_or_default();
        let pid = std::str::from_utf8(&text).ok();
        let pid = pid.and_then(|text| text.trim().parse::<i32>().ok());
        let alive = |pid: i32| {
            Pid::from_raw(pid)
                .is_some_and(|pid| !matches!(test_kill_process(pid), Err(rustix::io::Errno::SRCH)))
        };
        match pid {
            Some(pid) if pid != own_pid() && alive(pid) => {
                return Err(Failure::new(format!(
                    "Process {pid} is using backup {}, it is still running",
                    directory.display()
                )));
            }
            _ => {
                calls::unlink(&path)?;
            }
        }
    }
    Err(Failure::new(format!(
        "Cannot lock backup {} directory",
        directory.display()
    )))
}

impl Lock {
    /// For a command that changes the backup.
    pub(super) fn exclusive(kind: Kind, directory: &Path) -> Result<Self, Failure> {
        if !grab(directory)? {
            return Err(Failure::new(format!(
                "Could not create file \"{}/backup.pid\": Read-only file system",
                directory.display()
            )));
        }
        if kind == Kind::Pg {
            let readers = directory.join("backup_ro.pid");
            let _ = read_whole(&readers, SMALL)?;
            calls::unlink(&readers)?;
        }
        Ok(Self {
            directory: directory.to_owned(),
            held: Held::Exclusive,
        })
    }

    /// For a command that reads it. gs_probackup of openGauss 5.0.0 knows no such thing and locks for itself.
    pub(super) fn shared(kind: Kind, directory: &Path) -> Result<Self, Failure> {
        if kind == Kind::Gs {
            return Self::exclusive(kind, directory);
        }
        let directory = directory.to_owned();
        if !grab(&directory)? {
            let held = Held::Nothing;
            return Ok(Self { directory, held });
        }
        let readers = directory.join("backup_ro.pid");
        let mut text = read_whole(&readers, SMALL)?.unwrap_or_default();
        text.extend_from_slice(format!("{}\n", own_pid()).as_bytes());
        let tmp = directory.join("backup_ro.pidtmp");
        let mut out = Out::create(&tmp, SMALL)?;
        out.write(&text)?;
        out.close()?;
        calls::rename(&tmp, &readers)?;
        calls::unlink(&directory.join("backup.pid"))?;
        let held = Held::Shared;
        Ok(Self { directory, held })
    }

    /// Gives it back.
    pub(super) fn release(self) -> Result<(), Failure> {
        match self.held {
            Held::Nothing => Ok(()),
            Held::Exclusive => calls::unlink(&self.directory.join("backup.pid")).map(drop),
            Held::Shared => {
                if !grab(&self.directory)? {
                    return Ok(());
                }
                let readers = self.directory.join("backup_ro.pid");
                let text = read_whole(&readers, SMALL)?.unwrap_or_default();
                let own = own_pid().to_string();
                let text = String::from_utf8_lossy(&text);
                let others: Vec<_> = text.lines().filter(|line| *line != own).collect();
                if others.is_empty() {
                    calls::unlink(&readers)?;
                } else {
                    let mut out = Out::create(&readers, SMALL)?;
                    out.write((others.join("\n") + "\n").as_bytes())?;
                    out.close()?;
                }
                calls::unlink(&self.directory.join("backup.pid")).map(drop)
            }
        }
    }
}
