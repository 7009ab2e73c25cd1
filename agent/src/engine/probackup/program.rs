//! Which program there is, and what it can.

use std::env;
use std::fmt;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::time::Duration;

use agent_api::{ApiError, ErrorKind};
use catalog::model::BackupMode;
use tokio::time::timeout;

use crate::child;
use crate::config::Config;

/// `--version` takes milliseconds.
const VERSION: Duration = Duration::from_secs(10);
/// Names that are looked for on `PATH`, in this order.
const NAMES: [&str; 2] = ["gs_probackup", "pg_probackup"];

/// Which of the two programs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// `gs_probackup`, openGauss's.
    Gs,
    /// `pg_probackup`, PostgreSQL's.
    Pg,
}

impl Kind {
    /// Its name.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Gs => "gs_probackup",
            Self::Pg => "pg_probackup",
        }
    }

    /// The databases that it knows: `flavour` in facts and manifests.
    #[must_use]
    pub fn flavour(self) -> &'static str {
        match self {
            Self::Gs => "opengauss",
            Self::Pg => "postgresql",
        }
    }

    /// The directory of the WAL in a data directory.
    #[must_use]
    pub fn wal_directory(self) -> &'static str {
        match self {
            Self::Gs => "pg_xlog",
            Self::Pg => "pg_wal",
        }
    }

    /// What it can make.
    #[must_use]
    pub fn modes(self) -> &'static [BackupMode] {
        match self {
            Self::Gs => &[BackupMode::Full, BackupMode::Ptrack],
            Self::Pg => &[
                BackupMode::Full,
                BackupMode::Delta,
                BackupMode::Page,
                BackupMode::Ptrack,
            ],
        }
    }
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// A program that was found and asked for its version.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Program {
    /// Where it is (absolute).
    pub path: PathBuf,
    /// Which it is.
    pub kind: Kind,
    /// Its answer to `--version` without its name: `2.5.16 (PostgreSQL 15.14)`, `openGauss 5.0.0`. A
    /// `gs_probackup` does not say its own version there.
    pub version: String,
    /// The PostgreSQL major it was built for; it refuses any other. `None`: it does not say.
    pub major: Option<u32>,
}

impl Program {
    /// Finds the configured program, or the first on `PATH`, and asks for its version.
    ///
    /// # Errors
    /// [`ErrorKind::Usage`] if there is none, or the configured one is none.
    pub async fn find(config: &Config) -> Result<Self, ApiError> {
        let path = match &config.probackup {
            Some(path) => path.clone(),
            None => on_path(&NAMES).ok_or_else(nowhere)?,
        };
        Self::ask(&path).await
    }

    /// Finds the program of one kind: the configured one, which must be that, or the first of its name on `PATH`.
    ///
    /// # Errors
    /// [`ErrorKind::Usage`] if there is none.
    pub async fn of_kind(config: &Config, kind: Kind) -> Result<Self, ApiError> {
        let path = match &config.probackup {
            Some(path) => path.clone(),
            None => on_path(&[kind.name()]).ok_or_else(|| {
                let message = format!("there is no {kind} on the agent's PATH");
                ApiError::new(ErrorKind::Usage, message)
            })?,
        };
        let program = Self::ask(&path).await?;
        if program.kind == kind {
            return Ok(program);
        }
        let message = format!(
            "the agent's --probackup {} is a {}",
            path.display(),
            program.kind
        );
        Err(ApiError::new(ErrorKind::Usage, message))
    }

    /// Asks the program at `path` for its version.
    ///
    /// # Errors
    /// [`ErrorKind::Usage`] if it cannot be run or is neither program.
    pub async fn ask(path: &Path) -> Result<Self, ApiError> {
        let output = child::command(path).arg("--version").output();
        let why = match timeout(VERSION, output).await {
            Ok(Ok(output)) => {
                let told = String::from_utf8_lossy(&output.stdout);
                if let Some(program) = Self::parse(path, &told) {
                    return Ok(program);
                }
                let complaint = String::from_utf8_lossy(&output.stderr);
                let words = if told.trim().is_empty() {
                    complaint
                } else {
                    told
                };
                let line = words.trim().lines().next().unwrap_or_default();
                format!("its `--version` says `{line}`")
            }
            Ok(Err(error)) => error.to_string(),
            Err(_) => format!("`--version` did not end within {} s", VERSION.as_secs()),
        };
        let message = format!(
            "`{}` is no gs_probackup or pg_probackup: {why}",
            path.display()
        );
        Err(ApiError::new(ErrorKind::Usage, message).next(
            "mend the agent's --probackup (and its LD_LIBRARY_PATH), or use `--engine direct`",
        ))
    }

    /// Why it cannot back up a PostgreSQL of this major; `None`: nothing is known against it.
    #[must_use]
    pub fn misfit(&self, server: u32) -> Option<ApiError> {
        let built = self.major.filter(|built| *built != server)?;
        let message = format!(
            "`{}` was built for PostgreSQL {built}, and the database is PostgreSQL {server}",
            self.path.display()
        );
        Some(ApiError::new(ErrorKind::Incompatible, message).next(format!(
            "install pg_probackup for PostgreSQL {server} and start the agent with its --probackup, or use \
             `--engine direct`"
        )))
    }

    fn parse(path: &Path, told: &str) -> Option<Self> {
        let line = told.trim().lines().next()?;
        let (kind, rest) = [Kind::Gs, Kind::Pg]
            .into_iter()
            .find_map(|kind| Some((kind, line.strip_prefix(kind.name())?.strip_prefix(' ')?)))?;
        let version = match kind {
            // gs_probackup (openGauss 5.0.0 build a07d57c3) compiled at ... commit 0 last mr
            Kind::Gs => {
                let inside = rest.strip_prefix('(')?.split(')').next()?;
                let inside = inside.trim();
                inside.strip_suffix(" build").unwrap_or(inside).to_owned()
            }
            // pg_probackup 2.5.16 (PostgreSQL 15.18 (Debian ...))
            Kind::Pg => rest.to_owned(),
        };
        let major = built_for(rest);
        Some(Self {
            path: path.to_owned(),
            kind,
            version,
            major,
        })
    }
}

fn on_path(names: &[&str]) -> Option<PathBuf> {
    let path = env::var_os("PATH").unwrap_or_default();
    let directories: Vec<_> = env::split_paths(&path)
        .filter(|directory| directory.is_absolute())
        .collect();
    let executable = |file: &PathBuf| {
        file.metadata()
            .is_ok_and(|found| found.is_file() && found.permissions().mode() & 0o111 != 0)
    };
    names.iter().find_map(|name| {
        let mut files = directories.iter().map(|directory| directory.join(name));
        files.find(executable)
    })
}

/// The PostgreSQL major in a version such as `2.5.16 (PostgreSQL 15.14)`.
#[must_use]
pub fn built_for(version: &str) -> Option<u32> {
    let (_, number) = version.split_once("(PostgreSQL ")?;
    let digits = number.find(|c: char| !c.is_ascii_digit());
    let (major, more) = number.split_at(digits.unwrap_or(number.len()));
    // A range: it was built for none in particular.
    if more.starts_with(" to ") {
        return None;
    }
    major.parse().ok()
}

fn nowhere() -> ApiError {
    let message = "there is no gs_probackup and no pg_probackup on the agent's PATH";
    ApiError::new(ErrorKind::Usage, message).next(
        "start the agent with --probackup FILE (gs_probackup comes with openGauss, pg_probackup is a package of its own), \
         or use `--engine direct`",
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(told: &str) -> Option<Program> {
        Program::parse(Path::new("/x"), told)
    }

    #[test]
    fn versions_are_read() {
        let gs = parse(include_str!("samples/D_version.out")).unwrap();
        assert_eq!(
            (gs.kind, gs.version.as_str(), gs.major),
            (Kind::Gs, "openGauss 5.0.0", None)
        );
        let pg = parse(include_str!("samples/pg_version.out")).unwrap();
        assert_eq!((pg.kind, pg.major), (Kind::Pg, Some(15)));
        assert!(pg.version.starts_with("2.5.16 (PostgreSQL 15.18"), "{pg:?}");
        assert_eq!(parse("gs_probackup\n"), None);
        assert_eq!(parse("pg_basebackup (PostgreSQL) 15.18\n"), None);
        assert_eq!(parse(""), None);
    }

    #[tokio::test]
    async fn what_is_no_probackup_is_named() {
        for (path, why) in [("/bin/echo", "says `"), ("/no/such", "No such file")] {
            let error = Program::ask(Path::new(path)).await.unwrap_err();
            assert_eq!(error.kind, ErrorKind::Usage);
            assert!(
                error.message.contains(path) && error.message.contains(why),
                "{error}"
            );
        }
    }
}
