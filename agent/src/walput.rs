//! `pitr-agent wal-put --socket S %p %f`: the `archive_command` of a server whose slots hold no WAL (openGauss).
//!
//! It takes nothing anywhere: the agent reads WAL from the server's own files. It only asks the agent whether the
//! server may let go of a segment, because a server keeps what is not archived.
//!
//! | code | meaning | what the server does |
//! |---|---|---|
//! | 0 | nothing needs the file, or no agent answers and none ships WAL all the time | may remove it |
//! | 1 | it is needed and not in the bucket yet, or an agent that ships all the time does not answer | keeps it and asks again |
//! | 2 | the command line is wrong | keeps it, and says so in its log |
//!
//! An agent that is gone or does not answer holds nothing, unless it ships WAL all the time: then a file beside the socket says
//! so, and WAL is kept as long as a tenth of the disk is free. No backup is worth a full disk, and one that misses a segment
//! fails with that word. openGauss runs this without a shell, in the data directory, with its own hundred open
//! files, which must not outlive it here: they are closed before anything else.

use std::ffi::{OsStr, OsString};
use std::fs;
use std::io::{self, BufRead as _, BufReader, Read as _, Write as _};
use std::os::unix::net::UnixStream;
use std::panic;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

/// Name of the subcommand.
pub const SUBCOMMAND: &str = "wal-put";
/// First word of a request; another version of the agent would send another.
const GREETING: &str = "gs-pitr-wal-put-1";
/// The agent answers within [`crate::wal::gate::PATIENCE`]; after this long it is as good as gone.
const SILENCE: Duration = Duration::from_secs(10);
/// Longest line either side reads, in bytes.
pub const LINE_MAX: u64 = 1024;
const KEEP: u8 = 1;
const USAGE: u8 = 2;

/// The agent's answer, one line.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Answer {
    /// Nothing needs it.
    Go,
    /// A backup needs it.
    Keep,
}

impl Answer {
    /// The line.
    #[must_use]
    pub fn line(self) -> &'static str {
        match self {
            Self::Go => "go\n",
            Self::Keep => "keep\n",
        }
    }

    fn parse(line: &str) -> Option<Self> {
        [Self::Go, Self::Keep]
            .into_iter()
            .find(|answer| answer.line() == line)
    }
}

/// The file that a request line is about.
#[must_use]
pub fn parse_request(line: &str) -> Option<&str> {
    let mut words = line.split_whitespace();
    let name = (words.next() == Some(GREETING)).then(|| words.next())??;
    words.next().is_none().then_some(name)
}

/// The file beside `socket` that says that WAL is shipped all the time, also by an agent that does not answer just now.
#[must_use]
pub fn mark_of(socket: &Path) -> PathBuf {
    let mut mark = socket.as_os_str().to_owned();
    mark.push(".shipped");
    PathBuf::from(mark)
}

/// What is answered for an agent that is not there. One that ships all the time comes back, and needs the file then; but not at
/// the price of a full disk.
fn answer_without_agent(socket: &Path, wal: &Path) -> Answer {
    let directory = wal.parent().unwrap_or(Path::new("."));
    let room = rustix::fs::statvfs(directory);
    let room = room.is_ok_and(|room| room.f_bavail >= room.f_blocks / 10);
    if room && mark_of(socket).exists() {
        Answer::Keep
    } else {
        Answer::Go
    }
}

/// Runs the subcommand with the arguments that follow its name. Call it before anything else.
pub fn main(args: impl IntoIterator<Item = OsString>) -> ExitCode {
    close_inherited();
    let args: Vec<OsString> = args.into_iter().collect();
    let outcome = panic::catch_unwind(|| run(&args)).unwrap_or(Err("panicked".to_owned()));
    match outcome {
        Ok(Answer::Go) => ExitCode::SUCCESS,
        Ok(Answer::Keep) => ExitCode::from(KEEP),
        Err(message) => {
            // One line: the server reads little of it, and a full pipe would stop us.
            let _ = writeln!(io::stderr(), "pitr-agent wal-put: {message}");
            ExitCode::from(USAGE)
        }
    }
}

/// Closes what the server left open for us, all but the standard streams.
fn close_inherited() {
    let Ok(open) = fs::read_dir("/proc/self/fd") else {
        return;
    };
    let names = open.flatten().map(|entry| entry.file_name());
    let numbers: Vec<i32> = names
        .filter_map(|name| name.to_str()?.parse().ok())
        .collect();
    for number in numbers {
        if number > 2 {
            // The directory's own is among them and closed already.
            let _ = nix::unistd::close(number);
        }
    }
}

/// `Err`: the command line is wrong.
fn run(args: &[OsString]) -> Result<Answer, String> {
    let usage = || "usage: pitr-agent wal-put --socket SOCKET PATH NAME".to_owned();
    let [flag, socket, path, name] = args else {
        return Err(usage());
    };
    if flag != OsStr::new("--socket") {
        return Err(usage());
    }
    let name = name.to_str().ok_or_else(usage)?;
    Ok(match ask(Path::new(socket), name) {
        Ok(answer) => answer,
        Err(error) => {
            let answer = answer_without_agent(Path::new(socket), Path::new(path));
            let held = match answer {
                Answer::Go => "is not held",
                Answer::Keep => "is held until it comes back or the disk is nearly full",
            };
            let line = format!(
                "pitr-agent wal-put: no agent at {}: {error}; {name} {held}",
                socket.display()
            );
            let _ = writeln!(io::stderr(), "{line}");
            answer
        }
    })
}

/// Asks the agent on `socket` about `name`. Blocks, for ten seconds at most.
///
/// # Errors
/// If the agent cannot be reached, does not answer in time or says what is not understood.
pub fn ask(socket: &Path, name: &str) -> io::Result<Answer> {
    let mut stream = UnixStream::connect(socket)?;
    stream.set_read_timeout(Some(SILENCE))?;
    stream.set_write_timeout(Some(SILENCE))?;
    stream.write_all(format!("{GREETING} {name}\n").as_bytes())?;
    let mut line = String::new();
    BufReader::new(stream.take(LINE_MAX)).read_line(&mut line)?;
    Answer::parse(&line).ok_or_else(|| io::Error::other("its answer is not understood"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn requests_and_answers_come_back_from_their_lines() {
        let name = "000000010000000000000042";
        assert_eq!(parse_request(&format!("{GREETING} {name}\n")), Some(name));
        for line in [
            "",
            "GET /\n",
            GREETING,
            "gs-pitr-wal-put-2 x\n",
            "gs-pitr-wal-put-1 x y\n",
        ] {
            assert_eq!(parse_request(line), None, "{line}");
        }
        for answer in [Answer::Go, Answer::Keep] {
            assert_eq!(Answer::parse(answer.line()), Some(answer));
        }
        assert_eq!(Answer::parse("go"), None);
    }

    #[test]
    fn a_dead_agent_that_ships_all_the_time_keeps_what_is_not_shipped() {
        let dir = tempfile::tempdir().unwrap();
        let socket = dir.path().join("s");
        let wal = dir.path().join("000000010000000000000042");
        assert_eq!(answer_without_agent(&socket, &wal), Answer::Go);
        fs::write(mark_of(&socket), "").unwrap();
        let room = rustix::fs::statvfs(dir.path()).unwrap();
        let keeps = room.f_bavail >= room.f_blocks / 10;
        let expected = if keeps { Answer::Keep } else { Answer::Go };
        assert_eq!(answer_without_agent(&socket, &wal), expected);
        assert_eq!(
            answer_without_agent(&socket, Path::new("/nowhere/x")),
            Answer::Go
        );
    }

    #[test]
    fn a_dead_agent_holds_nothing_and_a_wrong_command_line_does() {
        let run = |args: &[&str]| run(&args.iter().map(OsString::from).collect::<Vec<_>>());
        let name = "000000010000000000000042";
        let gone = ["--socket", "/nowhere/s", "pg_xlog/x", name];
        assert_eq!(run(&gone), Ok(Answer::Go));
        assert!(run(&["--socket", "/nowhere/s", name]).is_err());
        assert!(run(&["--sock", "/nowhere/s", "pg_xlog/x", name]).is_err());
        assert!(run(&[]).is_err());
    }
}
