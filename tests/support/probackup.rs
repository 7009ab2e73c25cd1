//! `gs_probackup` or `pg_probackup` for tests: the real program when one is on `PATH`, else the stand-in.
//!
//! The stand-in (`probackup-stand-in`, [`program`]) is a program of our own that does to a backup catalog what the
//! real ones do: the same system calls in the same order, over a real PostgreSQL data directory, with real page
//! files, increments and a restore that works. `tests/probackup_stand_in.rs` holds its traces against recorded
//! ones of the real programs, and lists every difference that is meant, with its reason.
//!
//! It is two programs, told apart by the name it is called by, or by `PROBACKUP_STAND_IN` = `gs` or `pg`:
//!
//! - `pg_probackup` 2.5.16: FULL, DELTA and PAGE (PTRACK with `PROBACKUP_STAND_IN_PTRACK=1`);
//! - `gs_probackup` 2.4.2 as of openGauss 5.0.0 (or 6.0.2, with `PROBACKUP_STAND_IN_RELEASE=6.0.2`: it looks at the free
//!   space, wraps its JSON, and prints progress to standard output): FULL and PTRACK.
//!
//! Where it differs from them because the server is PostgreSQL: the directory of the log is `pg_wal`; backup mode
//! is the non-exclusive one, so the label is what the server returns; the log is read out of `pg_wal` up to the
//! server's flush position instead of by a replication connection (what is written to the catalog is the same);
//! PTRACK takes the pages whose LSN is newer than the parent's start, as DELTA does, which is what the change
//! bitmap would say at worst; so does PAGE, which reads its archive through as the real one does. Pages are never compressed, whatever `--compress-algorithm` says: it says so.
//!
//! Faults are ordered by [`faults`].

#![expect(clippy::print_stdout, reason = "tests print which program they use")]
#![expect(
    clippy::doc_markdown,
    reason = "the names of programs and of their files are ordinary words here"
)]

mod archive;
mod args;
mod backup;
mod calls;
mod catalog;
mod chain;
mod content;
mod control;
mod copy;
pub mod faults;
mod header_map;
mod locks;
mod log;
pub mod program;
pub mod replay;
mod restore;
mod show;
mod sql;
mod stream;
pub mod trace;
mod transfer;
mod validate;
mod walk;

use std::fmt;
use std::io::{self, Write as _};
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;

use crate::fleet::built_program;
use crate::os::{self, Scratch};

/// Which of the two programs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Kind {
    /// `gs_probackup`, openGauss's.
    Gs,
    /// `pg_probackup`, PostgreSQL's.
    Pg,
}

impl Kind {
    /// The program's name.
    pub fn program(self) -> &'static str {
        match self {
            Self::Gs => "gs_probackup",
            Self::Pg => "pg_probackup",
        }
    }

    /// The version it calls itself.
    pub fn version(self) -> &'static str {
        match self {
            Self::Gs => "2.4.2",
            Self::Pg => "2.5.16",
        }
    }
}

/// Whether it is the real one.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum What {
    /// The real program, and what it says its version is.
    Real(String),
    /// Ours.
    StandIn,
}

/// A program to test with, and the place it stays in while this lives.
#[derive(Debug, Clone)]
pub struct ProbackupUnderTest {
    kind: Kind,
    path: PathBuf,
    what: What,
    _place: Option<Arc<Scratch>>,
}

/// In `--version` of the stand-in, and nowhere else.
const STAND_IN_MARK: &str = "stand-in";

impl ProbackupUnderTest {
    /// The real program if `PATH` has it, else the stand-in under the real one's name. Prints which.
    ///
    /// A real `gs_probackup` works on openGauss only: a test over PostgreSQL that wants its ways uses
    /// [`Self::stand_in`].
    ///
    /// # Panics
    /// If there is neither: `cargo build --workspace --bins`.
    pub fn find(kind: Kind) -> Self {
        let found = Self::real(kind).unwrap_or_else(|| Self::quiet_stand_in(kind));
        println!("{found}");
        // A passing test's standard output is hidden; this line is to be seen.
        let _ = io::stderr().write_all(format!("{found}\n").as_bytes());
        found
    }

    /// The stand-in, whatever `PATH` has. Prints that it is.
    ///
    /// # Panics
    /// If it has not been built.
    pub fn stand_in(kind: Kind) -> Self {
        let found = Self::quiet_stand_in(kind);
        let _ = io::stderr().write_all(format!("{found}\n").as_bytes());
        found
    }

    /// The real program, if `PATH` has it.
    pub fn real(kind: Kind) -> Option<Self> {
        let directories = std::env::var_os("PATH")?;
        std::env::split_paths(&directories).find_map(|directory| {
            let path = directory.join(kind.program());
            let said = Command::new(&path).arg("--version").output().ok()?;
            let version = String::from_utf8(said.stdout).ok()?;
            let version = version.lines().next().unwrap_or_default().trim().to_owned();
            (!version.contains(STAND_IN_MARK)).then(|| Self {
                kind,
                path,
                what: What::Real(version),
                _place: None,
            })
        })
    }

    fn quiet_stand_in(kind: Kind) -> Self {
        let place = Scratch::new(kind.program());
        let path = place.path().join(kind.program());
        symlink(built_program("probackup-stand-in"), &path).expect("a link to the stand-in");
        Self {
            kind,
            path,
            what: What::StandIn,
            _place: Some(Arc::new(place)),
        }
    }

    /// Which of the two it is, or stands in for.
    pub fn kind(&self) -> Kind {
        self.kind
    }

    /// Where it lies: named as the real program.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Whether it is real.
    pub fn what(&self) -> &What {
        &self.what
    }

    /// Whether it is the stand-in, so that [`faults`] can be ordered.
    pub fn is_stand_in(&self) -> bool {
        self.what == What::StandIn
    }

    /// A command that runs it as the database user.
    pub fn command(&self) -> Command {
        os::command(&self.path)
    }
}

impl fmt::Display for ProbackupUnderTest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.what {
            What::Real(version) => {
                write!(f, "probackup: real {version} at {}", self.path.display())
            }
            What::StandIn => write!(f, "probackup: the stand-in, as {}", self.kind.program()),
        }
    }
}

/// Why a command of the stand-in ended without success: the text behind `ERROR: `.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
struct Failure(String);

impl Failure {
    fn new(text: impl Into<String>) -> Self {
        Self(text.into())
    }

    /// A system call that failed, in the words of the C library: without Rust's error number.
    fn call(what: &str, path: &Path, error: impl Into<io::Error>) -> Self {
        let error = error.into().to_string();
        let words = error.split(" (os error").next().unwrap_or(&error);
        Self(format!("Cannot {what} \"{}\": {words}", path.display()))
    }
}
