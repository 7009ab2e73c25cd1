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
/// How long a server that was told to stop at once may take, and how long its children may outlive it.
const QUIT_DEADLINE: Duration = Duration::from_secs(10);
/// Between two looks at what ends.
const LOOK: Duration = Duration::from_millis(20);
/// What a server and its children are called.
const SERVERS: [&str; 2] = ["postgres", "gaussdb"];

/// A running server, killed if it is dropped.
#[derive(Debug)]
pub(super) struct Server {
    child: Child,
    pid: Pid,
    data: PathBuf,
    log: PathBuf,
}

impl Server {
    /// Starts a server's program on the directory `data` in a process group of its own, with its output appended to `log`.
    pub(super) fn start(
        postgres: &Path,
        argv: &[OsString],
        data: &Path,
        log: &Path,
    ) -> io::Result<Self> {
        let output = OpenOptions::new()
            .create(true)
            .append(true)
            .mode(0o600)
            .open(log)?;
        let child = command(postgres)
            .args(argv)
            .current_dir(data)
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
            data: data.to_owned(),
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
            self.child.start_kill()?;
            self.child.wait().await?;
            all_ended(&self.data).await?;
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

/// Ends a server that an earlier agent left behind in `data`, and all that it has started: only processes that have `data` as their
/// working directory, as every server and its children have.
///
/// # Errors
/// `TimedOut` if something does not end.
pub(super) async fn end_orphan(data: &Path) -> io::Result<()> {
    let server = PidFile::read(data).and_then(|file| Pid::from_raw(file.pid));
    if let Some(server) = server.filter(|server| runs_in(data, *server)) {
        let _ = kill_process(server, Signal::QUIT);
        if !until(|| !runs_in(data, server)).await {
            let _ = kill_process(server, Signal::KILL);
        }
    }
    all_ended(data).await?;
    // One that has ended is in the way of the next (`CreateLockFile` asks for its process) until its parent has waited for it; if
    // that never does, the next server says so.
    if let Some(server) = server {
        until(|| !is_zombie(server)).await;
    }
    Ok(())
}

/// Waits until nothing of a server is left in `data`. The children of one that was killed notice it some moments later; one that is
/// started beside them ends at once, and files that are moved meanwhile may be theirs.
async fn all_ended(data: &Path) -> io::Result<()> {
    if until(|| left_in(data).is_empty()).await {
        return Ok(());
    }
    for pid in left_in(data) {
        let _ = kill_process(pid, Signal::KILL);
    }
    if until(|| left_in(data).is_empty()).await {
        return Ok(());
    }
    let left = left_in(data).into_iter();
    let left: Vec<_> = left.map(|pid| pid.as_raw_nonzero().to_string()).collect();
    Err(io::Error::new(
        io::ErrorKind::TimedOut,
        format!(
            "what is left of an earlier server there does not end: processes {}",
            left.join(", ")
        ),
    ))
}

/// Whether it is so within [`QUIT_DEADLINE`].
async fn until(is_so: impl Fn() -> bool) -> bool {
    let waits = async {
        while !is_so() {
            tokio::time::sleep(LOOK).await;
        }
    };
    timeout(QUIT_DEADLINE, waits).await.is_ok()
}

fn runs_in(data: &Path, pid: Pid) -> bool {
    let cwd = format!("/proc/{}/cwd", pid.as_raw_nonzero());
    fs::read_link(cwd).is_ok_and(|cwd| cwd == data)
}

/// Processes of a server in `data`, by their program and their working directory.
fn left_in(data: &Path) -> Vec<Pid> {
    let all = fs::read_dir("/proc").into_iter().flatten().flatten();
    let pids = all.filter_map(|entry| entry.file_name().to_str()?.parse().ok());
    let is_server = |pid: &Pid| {
        let program = fs::read_link(format!("/proc/{}/exe", pid.as_raw_nonzero()));
        program.is_ok_and(|program| {
            let name = program.file_name().unwrap_or_default().to_string_lossy();
            // One whose file was replaced by an update is `postgres (deleted)`.
            let name = name.strip_suffix(" (deleted)").unwrap_or(&name);
            SERVERS.contains(&name)
        })
    };
    pids.filter_map(Pid::from_raw)
        .filter(|pid| runs_in(data, *pid) && is_server(pid))
        .collect()
}

/// Whether it has ended, and its parent has not waited for it yet (`proc_pid_stat(5)`).
fn is_zombie(pid: Pid) -> bool {
    let stat = fs::read_to_string(format!("/proc/{}/stat", pid.as_raw_nonzero()));
    stat.is_ok_and(|stat| {
        stat.rsplit_once(')')
            .is_some_and(|(_, rest)| rest.trim_start().starts_with('Z'))
    })
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
        let (ended, waited) = tokio::join!(end_orphan(&data), child.wait());
        ended.unwrap();
        assert!(!waited.unwrap().success());
        end_orphan(Path::new("/nowhere")).await.unwrap();
    }

    /// Its server was killed, and this has not noticed yet; or it never will.
    #[tokio::test]
    async fn children_of_a_server_that_was_killed_are_waited_for() {
        let scratch = tempfile::tempdir().unwrap();
        let data = scratch.path().canonicalize().unwrap();
        let program = data.join("postgres");
        fs::copy("/bin/sleep", &program).unwrap();
        for (seconds, ends) in [("1", true), ("600", false)] {
            let mut child = loop {
                let mut sleep = Command::new(&program);
                sleep.arg(seconds).current_dir(&data).kill_on_drop(true);
                match sleep.spawn() {
                    // Another test's child has not closed what it inherited yet.
                    Err(error) if error.kind() == io::ErrorKind::ExecutableFileBusy => {}
                    spawned => break spawned.unwrap(),
                }
                tokio::time::sleep(LOOK).await;
            };
            // Somebody who looks at the files is left alone.
            let mut looks = Command::new("sleep");
            looks.arg("60").current_dir(&data).kill_on_drop(true);
            let mut looks = looks.spawn().unwrap();
            while left_in(&data).is_empty() {
                tokio::time::sleep(LOOK).await;
            }
            end_orphan(&data).await.unwrap();
            assert!(left_in(&data).is_empty());
            assert_eq!(child.wait().await.unwrap().success(), ends);
            assert!(looks.try_wait().unwrap().is_none());
        }
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
