//! `pitr-agent wal-get --socket S %f %p`: what a recovering server runs to get a WAL file.
//!
//! It asks the agent through a socket that only the agent's user can open, so that no credential is
//! in argv, environment or files. Its exit codes are the whole contract with the server:
//!
//! | code | meaning | what the server does |
//! |---|---|---|
//! | 0 | the file lies at `%p`, whole and synced | replays it |
//! | 1 | the bucket was asked and has no such file | takes it for the end of WAL (or of the timelines) |
//! | 255 | anything else | stops with FATAL |
//!
//! Every code from 1 to 125 means "no such file" to the server, so neither a wrong command line (clap
//! would exit with 2) nor a panic (101) may get out: both would look like the end of WAL, and a server
//! might open short of its point. That is why [`main`] reads its own few arguments and catches all.

use std::ffi::{OsStr, OsString};
use std::fs::{self, File};
use std::io::{self, BufRead as _, BufReader, Write as _};
use std::os::unix::net::UnixStream;
use std::panic;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

use serde::{Deserialize, Serialize};

/// Name of the subcommand.
pub const SUBCOMMAND: &str = "wal-get";
/// First word of a request; another version of the agent would send another.
const GREETING: &str = "gs-pitr-wal-get-1";
/// The agent says `wait` every second while it fetches; after this long without a word it is gone.
const SILENCE: Duration = Duration::from_secs(30);
/// Longest line either side reads, in bytes.
pub const LINE_MAX: u64 = 16 * 1024;
/// Proved absent.
const ABSENT: u8 = 1;
/// Anything else; above 125, so that the server stops.
const FAILED: u8 = 255;

/// One line of the agent's answer, JSON.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "answer", rename_all = "kebab-case")]
pub enum Answer {
    /// Still fetching; another line follows within a second.
    Wait,
    /// Verified and synced at `path`, to be moved from there.
    Found {
        /// Absolute path.
        path: PathBuf,
        /// Its size in bytes.
        size: u64,
    },
    /// The bucket has no such file.
    Absent,
    /// It could not be had, or not be proved absent.
    Failed {
        /// Why, in the store's words where it is the store's fault.
        message: String,
    },
}

/// A name of a file that recovery asks for.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum WalFile {
    /// `000000010000000000000042`
    Segment(String),
    /// `00000002.history`
    History(String),
    /// `.partial` and `.backup` files, which no repository holds.
    Other(String),
}

impl WalFile {
    /// Reads a name; `None` if it is not one of a WAL file.
    #[must_use]
    pub fn parse(name: &str) -> Option<Self> {
        let is_hex = |text: &str, len: usize| {
            text.len() == len
                && text
                    .bytes()
                    .all(|b| b.is_ascii_digit() || (b'A'..=b'F').contains(&b))
        };
        if is_hex(name, 24) {
            return Some(Self::Segment(name.to_owned()));
        }
        let (stem, rest) = name.split_once('.')?;
        if is_hex(stem, 8) && rest == "history" {
            return Some(Self::History(name.to_owned()));
        }
        let other = rest == "partial"
            || rest == "backup"
            || rest
                .strip_suffix(".backup")
                .is_some_and(|lsn| is_hex(lsn, 8));
        (is_hex(stem, 24) && other).then(|| Self::Other(name.to_owned()))
    }

    /// The name.
    #[must_use]
    pub fn name(&self) -> &str {
        match self {
            Self::Segment(name) | Self::History(name) | Self::Other(name) => name,
        }
    }
}

/// The request line for `file`.
fn request(file: &WalFile) -> String {
    format!("{GREETING} {}\n", file.name())
}

/// Reads a request line; the error is for the client.
///
/// # Errors
/// If it is not a request or names no WAL file.
pub fn parse_request(line: &str) -> Result<WalFile, String> {
    let words: Vec<&str> = line.split_whitespace().collect();
    match words[..] {
        [GREETING, name] => {
            WalFile::parse(name).ok_or_else(|| format!("`{name}` is not the name of a WAL file"))
        }
        _ => {
            Err("the request is not understood: are agent and wal-get of the same version?".into())
        }
    }
}

#[derive(Debug, PartialEq, Eq)]
enum Outcome {
    Found,
    Absent,
}

/// Runs the subcommand with the arguments that follow its name. Call it before anything else parses
/// the command line.
pub fn main(args: impl IntoIterator<Item = OsString>) -> ExitCode {
    let args: Vec<OsString> = args.into_iter().collect();
    let outcome = panic::catch_unwind(|| run(&args));
    let message = match outcome {
        Ok(Ok(Outcome::Found)) => return ExitCode::SUCCESS,
        Ok(Ok(Outcome::Absent)) => return ExitCode::from(ABSENT),
        Ok(Err(message)) => message,
        Err(_) => "panicked".to_owned(),
    };
    // The server's log gets this; if it does not take it, the code still says all.
    let _ = writeln!(io::stderr(), "pitr-agent wal-get: {message}");
    ExitCode::from(FAILED)
}

fn run(args: &[OsString]) -> Result<Outcome, String> {
    let [flag, socket, name, destination] = args else {
        return Err("usage: pitr-agent wal-get --socket SOCKET NAME DESTINATION".into());
    };
    if flag != OsStr::new("--socket") {
        return Err("usage: pitr-agent wal-get --socket SOCKET NAME DESTINATION".into());
    }
    let file = name
        .to_str()
        .and_then(WalFile::parse)
        .ok_or_else(|| format!("{} is not the name of a WAL file", name.display()))?;
    match ask(Path::new(socket), &file)? {
        Answer::Found { path, size } => {
            let destination = Path::new(destination);
            put(&path, size, destination)
                .map_err(|e| format!("{} to {}: {e}", path.display(), destination.display()))?;
            Ok(Outcome::Found)
        }
        Answer::Absent => Ok(Outcome::Absent),
        Answer::Failed { message } => Err(format!("{}: {message}", file.name())),
        Answer::Wait => Err("the agent's answer is not understood".into()),
    }
}

/// Asks the agent on `socket` for `file` and waits for its answer, which is never [`Answer::Wait`]. Blocks.
///
/// # Errors
/// If the agent cannot be reached, goes away or falls silent.
pub(crate) fn ask(socket: &Path, file: &WalFile) -> Result<Answer, String> {
    let failed = |e: io::Error| format!("the agent at {}: {e}", socket.display());
    let mut stream = UnixStream::connect(socket).map_err(failed)?;
    stream.set_read_timeout(Some(SILENCE)).map_err(failed)?;
    stream.set_write_timeout(Some(SILENCE)).map_err(failed)?;
    stream.write_all(request(file).as_bytes()).map_err(failed)?;
    let mut lines = BufReader::new(stream);
    loop {
        let mut line = String::new();
        let read = io::Read::take(&mut lines, LINE_MAX)
            .read_line(&mut line)
            .map_err(failed)?;
        if read == 0 || !line.ends_with('\n') {
            return Err("the agent went away before it answered".into());
        }
        match serde_json::from_str(&line) {
            Ok(Answer::Wait) => {}
            Ok(answer) => return Ok(answer),
            Err(e) => return Err(format!("the agent's answer is not understood: {e}")),
        }
    }
}

/// Moves the file to where the server wants it: by rename, or, from another file system, by copy and
/// rename, so that it is whole or not there.
pub(crate) fn put(from: &Path, size: u64, to: &Path) -> io::Result<()> {
    let meta = fs::symlink_metadata(from)?;
    if !meta.is_file() || meta.len() != size {
        return Err(io::Error::other("it is not the file the agent made"));
    }
    let directory = match to.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    };
    match fs::rename(from, to) {
        Ok(()) => {}
        Err(e) if e.kind() == io::ErrorKind::CrossesDevices => {
            // A server removes `xlogtemp.*` of its WAL directory when it starts.
            let temporary = directory.join(format!("xlogtemp.{}", std::process::id()));
            let copied = copy_synced(from, &temporary).and_then(|()| fs::rename(&temporary, to));
            if copied.is_err() {
                let _ = fs::remove_file(&temporary);
            }
            copied?;
            fs::remove_file(from)?;
        }
        Err(e) => return Err(e),
    }
    File::open(directory)?.sync_all()
}

fn copy_synced(from: &Path, to: &Path) -> io::Result<()> {
    fs::copy(from, to)?;
    File::open(to)?.sync_all()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_of_wal_files_are_told_from_others() {
        let kinds = |name| match WalFile::parse(name) {
            Some(WalFile::Segment(_)) => "segment",
            Some(WalFile::History(_)) => "history",
            Some(WalFile::Other(_)) => "other",
            None => "none",
        };
        assert_eq!(kinds("0000000100000000000000FF"), "segment");
        assert_eq!(kinds("00000002.history"), "history");
        assert_eq!(kinds("000000010000000000000002.partial"), "other");
        assert_eq!(kinds("000000010000000000000002.00000028.backup"), "other");
        for name in [
            "",
            "..",
            "../../etc/passwd",
            "0000000100000000000000ff",
            "0000000100000000000000F",
            "00000001000000000000000F0",
            "0000002.history",
            "00000002.history.zst",
            "000000010000000000000002.x.backup",
            "00000001000000000000000é",
        ] {
            assert_eq!(kinds(name), "none", "{name}");
        }
    }

    #[test]
    fn a_request_comes_back_from_its_line() {
        let file = WalFile::parse("00000002.history").unwrap();
        assert_eq!(parse_request(&request(&file)), Ok(file));
        assert!(parse_request("GET / HTTP/1.1").is_err());
        assert!(parse_request(&format!("{GREETING} passwd")).is_err());
    }

    #[test]
    fn a_wrong_command_line_is_not_the_end_of_wal() {
        assert!(run(&[]).is_err());
        let args = ["--socket", "/nowhere", "000000010000000000000001", "x"].map(OsString::from);
        assert!(run(&args).unwrap_err().contains("/nowhere"));
        let args = ["--sock", "/nowhere", "000000010000000000000001", "x"].map(OsString::from);
        assert!(run(&args).unwrap_err().starts_with("usage"));
    }

    #[test]
    fn a_file_is_moved_only_if_it_is_the_one_announced() {
        let dir = tempfile::tempdir().unwrap();
        let from = dir.path().join("spool");
        let to = dir.path().join("RECOVERYXLOG");
        fs::write(&from, b"wal").unwrap();
        assert!(put(&from, 4, &to).is_err());
        assert!(!to.exists());
        put(&from, 3, &to).unwrap();
        assert_eq!(fs::read(&to).unwrap(), b"wal");
        assert!(!from.exists());
    }
}
