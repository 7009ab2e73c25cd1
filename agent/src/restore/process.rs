//! A server that we start as our own child, without `pg_ctl`, so that it cannot outlive us unnoticed.

use std::ffi::OsString;
use std::fs::{self, File, OpenOptions};
use std::io::{self, Read as _, Seek as _, SeekFrom};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};
use std::process::{ExitStatus, Stdio};
use std::time::Duration;

use rustix::process::{Pid, Signal, kill_process};
use tokio::process::{Child, Command};
use tokio::time::timeout;

/// How much of the end of a server's log is searched for its last words, in bytes.
const LOG_TAIL: u64 = 64 << 10;
/// How long a server that was told to stop at once may take.
const QUIT_DEADLINE: Duration = Duration::from_secs(10);

/// A running server, killed if it is dropped.
#[derive(Debug)]
pub(super) struct Server {
    child: Child,
    pid: Pid,
    log: PathBuf,
}

impl Server {
    /// Starts a server's program in a process group of its own, with its output appended to `log`.
    pub(super) fn start(
        postgres: &Path,
        argv: &[OsString],
        directory: &Path,
        log: &Path,
    ) -> io::Result<Self> {
        let output = OpenOptions::new()
            .create(true)
            .append(true)
            .mode(0o600)
            .open(log)?;
        let child = command(postgres)
            .args(argv)
            .current_dir(directory)
            .stdin(Stdio::null())
            .stdout(output.try_clone()?)
            .stderr(output)
            .process_group(0)
            .kill_on_drop(true)
            .spawn()?;
        let pid = child
            .id()
            .and_then(|pid| i32::try_from(pid).ok())
            .and_then(Pid::from_raw)
            .ok_or_else(|| io::Error::other("the server ended as it began"))?;
        Ok(Self {
            child,
            pid,
            log: log.to_owned(),
        })
    }

    /// Waits until it ends by itself. May be dropped and called again.
    pub(super) async fn ended(&mut self) -> io::Result<ExitStatus> {
        self.child.wait().await
    }

    /// Shuts it down in order (`fast`), and waits as long as its last checkpoint takes, at most `deadline`.
    pub(super) async fn shut_down(&mut self, deadline: Duration) -> io::Result<ExitStatus> {
        self.signal(Signal::INT);
        if let Ok(ended) = timeout(deadline, self.child.wait()).await {
            return ended;
        }
        self.kill().await?;
        let late = format!(
            "the server did not shut down within {} s",
            deadline.as_secs()
        );
        Err(io::Error::new(io::ErrorKind::TimedOut, late))
    }

    /// Stops it at once: `immediate`, then SIGKILL. The data directory is given up.
    pub(super) async fn kill(&mut self) -> io::Result<()> {
        self.signal(Signal::QUIT);
        if timeout(QUIT_DEADLINE, self.child.wait()).await.is_err() {
            // Its children notice that it is gone and end by themselves.
            self.child.start_kill()?;
            self.child.wait().await?;
        }
        Ok(())
    }

    fn signal(&self, signal: Signal) {
        // It may have ended already. Its id is not given to another process before we have waited for it.
        let _ = kill_process(self.pid, signal);
    }

    /// Its last complaint, for an error message.
    pub(super) fn last_words(&self) -> String {
        last_words(&self.log)
    }
}

/// A command with an environment that has nothing of ours: an agent's may carry credentials, and what a
/// process was started with can be read in /proc.
pub(super) fn command(program: &Path) -> Command {
    let mut command = Command::new(program);
    command.env_clear().env("LC_ALL", "C");
    // The last two are where openGauss finds its own files, and writes what its tools are told.
    for name in [
        "PATH",
        "HOME",
        "TZ",
        "LD_LIBRARY_PATH",
        "TMPDIR",
        "GAUSSHOME",
        "GAUSSLOG",
    ] {
        if let Some(value) = std::env::var_os(name) {
            command.env(name, value);
        }
    }
    command
}

/// The last FATAL or PANIC of a server's log with what explains it, or the log's last lines.
pub(super) fn last_words(log: &Path) -> String {
    match tail(log) {
        Ok(text) => complaint(&text),
        Err(error) => format!("its log {} cannot be read: {error}", log.display()),
    }
}

fn tail(log: &Path) -> io::Result<String> {
    let mut file = File::open(log)?;
    let length = file.metadata()?.len();
    file.seek(SeekFrom::Start(length.saturating_sub(LOG_TAIL)))?;
    let mut bytes = Vec::new();
    file.take(LOG_TAIL).read_to_end(&mut bytes)?;
    Ok(String::from_utf8_lossy(&bytes).into_owned())
}

fn complaint(text: &str) -> String {
    const LEVELS: [&str; 2] = ["FATAL:  ", "PANIC:  "];
    const MORE: [&str; 2] = ["DETAIL:  ", "HINT:  "];
    let lines: Vec<&str> = text.lines().collect();
    let after = |line: &'_ str, words: &[&str]| {
        let found = words.iter().find_map(|word| line.find(word));
        found.map(|at| line.get(at..).unwrap_or_default().replace(":  ", ": "))
    };
    let Some(at) = lines
        .iter()
        .rposition(|line| after(line, &LEVELS).is_some())
    else {
        let first = lines.len().saturating_sub(3);
        return lines.get(first..).unwrap_or_default().join("; ");
    };
    let mut words: Vec<String> = after(lines[at], &LEVELS).into_iter().collect();
    for line in &lines[at + 1..] {
        match after(line, &MORE) {
            Some(more) => words.push(more),
            None => break,
        }
    }
    words.join(" ")
}

/// What `postmaster.pid` says of the server in `data`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct PidFile {
    /// Its process.
    pub(super) pid: i32,
    /// Its port.
    pub(super) port: u16,
    /// Its first socket directory, if it has one.
    pub(super) socket_directory: Option<PathBuf>,
    /// Whether it takes connections; `None` if the file does not say, as openGauss's.
    pub(super) ready: Option<bool>,
}

impl PidFile {
    /// Reads it; `None` if there is none, or the server is just writing it.
    pub(super) fn read(data: &Path) -> Option<Self> {
        Self::parse(&fs::read_to_string(data.join("postmaster.pid")).ok()?)
    }

    /// The lines of `miscadmin.h` (`LOCK_FILE_LINE_*`): pid, data directory, start time, port, socket
    /// directory, listen address, shared memory key, status.
    fn parse(text: &str) -> Option<Self> {
        let lines: Vec<&str> = text.lines().map(str::trim).collect();
        let sockets = lines.get(4).filter(|line| !line.is_empty());
        Some(Self {
            pid: lines.first()?.parse().ok()?,
            port: lines.get(3)?.parse().ok()?,
            socket_directory: sockets.map(PathBuf::from),
            ready: lines.get(7).map(|status| *status == "ready"),
        })
    }
}

/// Ends a server that an earlier agent left behind in `data`: only a process that has `data` as its working
/// directory, as every server has.
pub(super) async fn end_orphan(data: &Path) -> io::Result<()> {
    let Some(pid) = PidFile::read(data).and_then(|file| Pid::from_raw(file.pid)) else {
        return Ok(());
    };
    let runs_there = || {
        let cwd = format!("/proc/{}/cwd", pid.as_raw_nonzero());
        fs::read_link(cwd).is_ok_and(|cwd| cwd == data)
    };
    for (signal, seconds) in [(Signal::QUIT, 10), (Signal::KILL, 10)] {
        if !runs_there() {
            return Ok(());
        }
        kill_process(pid, signal)?;
        for _ in 0..seconds * 10 {
            if !runs_there() {
                return Ok(());
            }
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
    }
    Err(io::Error::new(
        io::ErrorKind::TimedOut,
        format!("process {} does not end", pid.as_raw_nonzero()),
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_servers_complaint_is_found_in_its_log() {
        let log = "2026-11-21 12:00:00.000 UTC [7] LOG:  starting PostgreSQL 15\n\
                   2026-11-21 12:00:01.000 UTC [7] FATAL:  could not access file \"x\": No such file\n\
                   2026-11-21 12:00:01.000 UTC [7] HINT:  Install it.\n\
                   2026-11-21 12:00:01.000 UTC [7] LOG:  database system is shut down\n";
        assert_eq!(
            complaint(log),
            "FATAL: could not access file \"x\": No such file HINT: Install it."
        );
        assert_eq!(complaint("a\nb\nc\nd\n"), "b; c; d");
        assert_eq!(complaint(""), "");
    }

    #[tokio::test]
    async fn only_a_server_of_that_directory_is_ended() {
        let (here, there) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let data = here.path().canonicalize().unwrap();
        let mut sleep = Command::new("sleep");
        sleep.arg("60").current_dir(there.path()).kill_on_drop(true);
        let mut child = sleep.spawn().unwrap();
        let text = format!("{}\n/d\n1\n5432\n\n\n\nready\n", child.id().unwrap());
        fs::write(data.join("postmaster.pid"), &text).unwrap();
        // The number was given to somebody else's process since.
        end_orphan(&data).await.unwrap();
        assert!(child.try_wait().unwrap().is_none());
        let data = there.path().canonicalize().unwrap();
        fs::write(data.join("postmaster.pid"), text).unwrap();
        end_orphan(&data).await.unwrap();
        assert!(!child.wait().await.unwrap().success());
        end_orphan(Path::new("/nowhere")).await.unwrap();
    }

    #[test]
    fn the_pid_file_is_read_by_its_lines() {
        let text = "4711\n/data\n1700000000\n5432\n/tmp\n127.0.0.1\n  5432001   7\nready   \n";
        let expected = PidFile {
            pid: 4711,
            port: 5432,
            socket_directory: Some("/tmp".into()),
            ready: Some(true),
        };
        assert_eq!(PidFile::parse(text), Some(expected));
        assert_eq!(PidFile::parse("4711\n/data\n"), None);
        let starting = PidFile::parse("1\n/d\n1\n1\n\n\n\nstarting\n").unwrap();
        assert!(starting.ready == Some(false) && starting.socket_directory.is_none());
        let opengauss = PidFile::parse("1\n/d\n1\n5432\n/tmp\n*\n  5432001   7\n").unwrap();
        assert_eq!(opengauss.ready, None);
    }
}
