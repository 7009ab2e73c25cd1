//! The end of a restore: promoted, whole at its target, and with the command that starts it.

mod opened;

use std::fs;
use std::io;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use agent_api::{ApiError, ErrorKind, RestoreSpec};
use agent_wal::control::{ControlFile, DbState};
use agent_wal::{Lsn, SegmentName};
use rustix::fs::{Access, access};
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _};
use tokio::net::{TcpStream, UnixStream};
use tokio::process::Command;
use tokio::time::{Instant, timeout};

use super::errors::local;
use super::files::{remove_file, sync};
use super::live::Live;
use super::process::{self, PidFile};
use super::prove;
use super::recoverer::Recoverer;
use super::settings::Setting;
use super::target::Plan;

/// How long the start of the promoted database may take; it was shut down in order.
const START: Duration = Duration::from_mins(5);
/// How long it may take to answer once it says that it is ready.
const ANSWER: Duration = Duration::from_secs(10);
/// A server that was started and is not to be seen for this long is not coming.
const GONE: Duration = Duration::from_secs(10);
/// How long `postgres -C` or `gaussdb -C` may take.
const ASK: Duration = Duration::from_secs(30);
/// Longest path of a unix socket in bytes.
const SUN_PATH: usize = 107;

/// What promotion made of the node.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Promoted {
    /// Its timeline: a new one on PostgreSQL, the same on openGauss.
    pub(super) timeline: u32,
    /// Where its own log begins.
    pub(super) fork: Lsn,
}

/// Checks a promoted database that was shut down, and takes away what recovery left in it.
///
/// # Errors
/// [`ErrorKind::Recovery`] if it was not promoted at its point.
pub(super) fn settle(data: &Path, spec: &RestoreSpec, plan: &Plan) -> Result<Promoted, ApiError> {
    let wrong = |what: String| ApiError::new(ErrorKind::Recovery, what);
    let control = prove::read_control(data).map_err(wrong)?;
    let (point, recoverer) = (&spec.point, plan.recoverer);
    let goes_on = match recoverer {
        Recoverer::PostgreSql(_) => control.timeline > point.timeline,
        Recoverer::OpenGauss => control.timeline == point.timeline,
    };
    if control.state != DbState::ShutDown || !goes_on {
        return Err(wrong(format!(
            "after its promotion pg_control says '{}' on timeline {}",
            control.state, control.timeline
        )));
    }
    let log = data.join(recoverer.wal_directory());
    match recoverer {
        Recoverer::PostgreSql(_) => left_at(&log, &control, point.timeline, plan.fork)?,
        Recoverer::OpenGauss => {
            opened::opened_at(&log, point.timeline, plan.fork, plan.segment_size).map_err(
                |what| {
                    wrong(format!(
                        "it was not opened at the point's record, {}: {what}",
                        plan.fork
                    ))
                },
            )?;
        }
    }
    let tidy = || {
        for name in recoverer.left_behind() {
            remove_file(&data.join(name))?;
        }
        sync(data)
    };
    tidy().map_err(|error| local(data, &error))?;
    Ok(Promoted {
        timeline: control.timeline,
        fork: plan.fork,
    })
}

/// Checks that PostgreSQL's new timeline left its parent at `fork`.
fn left_at(log: &Path, control: &ControlFile, parent: u32, fork: Lsn) -> Result<(), ApiError> {
    let history = log.join(SegmentName::history_file(control.timeline));
    let text = fs::read_to_string(&history).map_err(|error| local(&history, &error))?;
    let left = prove::fork_of(&text, parent);
    if left == Some(fork) {
        return Ok(());
    }
    let left = left.map_or("elsewhere".to_owned(), |lsn| format!("at {lsn}"));
    let message = format!(
        "timeline {} left timeline {parent} {left}, not at the point {fork}",
        control.timeline
    );
    Err(ApiError::new(ErrorKind::Recovery, message))
}

/// The value that the server would use for a setting, without starting it; `None` if it does not say.
pub(super) async fn ask(
    plan: &Plan,
    settings: &[Setting],
    data: &Path,
    name: &str,
) -> Option<String> {
    let mut command = process::command(&plan.server());
    command.arg("-D").arg(data);
    for (name, value) in settings {
        command.arg("-c").arg(format!("{name}={value}"));
    }
    command.args(["-c", "log_min_messages=fatal", "-C", name]);
    answer_of(command).await
}

/// What such a command prints; `None` if it fails.
pub(super) async fn answer_of(mut command: Command) -> Option<String> {
    command.stdin(Stdio::null()).kill_on_drop(true);
    let output = timeout(ASK, command.output()).await.ok()?.ok()?;
    let value = String::from_utf8(output.stdout).ok()?;
    output.status.success().then(|| value.trim().to_owned())
}

/// A directory for the server's socket if one of the configured ones cannot be used on this host.
pub(super) fn socket_directory(configured: &str, ours: &str, port: u16) -> Option<PathBuf> {
    let listed: Vec<PathBuf> = configured
        .split(',')
        .map(|path| PathBuf::from(path.trim().trim_matches('"')))
        .filter(|path| path.as_os_str() != "")
        .collect();
    let usable = |path: &PathBuf| {
        let socket = path.join(format!(".s.PGSQL.{port}"));
        let abstract_name = path.to_string_lossy().starts_with('@');
        abstract_name
            || (path.is_absolute()
                && path.is_dir()
                && socket.as_os_str().len() <= SUN_PATH
                && access(path, Access::WRITE_OK | Access::EXEC_OK).is_ok())
    };
    // None at all: the source wanted none.
    if listed.iter().all(usable) {
        return None;
    }
    let fallbacks = [ours, "/run/postgresql", "/tmp"].map(PathBuf::from);
    let mut all = listed.into_iter().chain(fallbacks);
    all.find(usable)
}

/// Starts the database and checks that it answers.
///
/// # Errors
/// [`ErrorKind::Database`] with the last words of its log.
pub(super) async fn open(
    recoverer: Recoverer,
    argv: &[String],
    data: &Path,
    log: &Path,
) -> Result<(), ApiError> {
    let failed = |what: String| {
        let message = format!("the restored database in {} {what}", data.display());
        ApiError::new(ErrorKind::Database, message).changed()
    };
    let Some((program, arguments)) = argv.split_first() else {
        return Err(failed("has an empty start command".to_owned()));
    };
    let mut command = process::command(Path::new(program));
    command.args(arguments).current_dir(data).kill_on_drop(true);
    // Not pipes: the server would inherit them and keep them open.
    command
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null());
    let status = match timeout(START, command.status()).await {
        Ok(Ok(status)) => status,
        Ok(Err(error)) => return Err(failed(format!("was not started: {program}: {error}"))),
        Err(_) => {
            return Err(failed(format!(
                "did not start within {} s",
                START.as_secs()
            )));
        }
    };
    let running = match recoverer {
        Recoverer::PostgreSql(_) if !status.success() => None,
        Recoverer::PostgreSql(_) => PidFile::read(data).filter(|file| file.ready == Some(true)),
        // The status of gs_ctl says nothing for a server that runs, nor for one that does not.
        Recoverer::OpenGauss => until_open(data).await,
    };
    let Some(running) = running else {
        let words = process::last_words(log);
        return Err(failed(format!("did not start ({status}): {words}")));
    };
    match timeout(ANSWER, answers(&running)).await {
        Ok(Ok(())) => Ok(()),
        Ok(Err(error)) => Err(failed(format!("runs and does not answer: {error}"))),
        Err(_) => Err(failed(format!(
            "runs and does not answer within {} s",
            ANSWER.as_secs()
        ))),
    }
}

/// Waits until an openGauss that was started is open; `None` if it does not run (any more), or takes too long.
async fn until_open(data: &Path) -> Option<PidFile> {
    let begun = Instant::now();
    let mut last_seen = begun;
    loop {
        // A process is there from the start; the file says the port a little later.
        let running = matches!(Live::runs(data).await, Ok(true));
        let open = prove::read_control(data).is_ok_and(|it| it.state == DbState::InProduction);
        if running {
            last_seen = Instant::now();
        }
        if running
            && open
            && let Some(file) = PidFile::read(data)
            && matches!(timeout(ANSWER, answers(&file)).await, Ok(Ok(())))
        {
            return Some(file);
        }
        if begun.elapsed() > START || last_seen.elapsed() > GONE {
            return None;
        }
        tokio::time::sleep(Duration::from_millis(200)).await;
    }
}

/// Asks the server the one thing that it answers to everybody.
pub(super) async fn answers(running: &PidFile) -> io::Result<()> {
    if let Some(directory) = &running.socket_directory {
        let socket = directory.join(format!(".s.PGSQL.{}", running.port));
        return says_whether_ssl(UnixStream::connect(socket).await?).await;
    }
    let address = SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), running.port);
    says_whether_ssl(TcpStream::connect(address).await?).await
}

/// `SSLRequest`, answered by one byte, `S` or `N`.
async fn says_whether_ssl(mut stream: impl AsyncRead + AsyncWrite + Unpin) -> io::Result<()> {
    stream
        .write_all(&[0, 0, 0, 8, 0x04, 0xd2, 0x16, 0x2f])
        .await?;
    match stream.read_u8().await? {
        b'S' | b'N' => Ok(()),
        other => Err(io::Error::other(format!("an unexpected byte {other:#x}"))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_unusable_socket_directory_is_replaced() {
        let here = tempfile::tempdir().unwrap();
        let path = here.path().to_str().unwrap();
        assert_eq!(socket_directory(path, "/nowhere", 5432), None);
        assert_eq!(socket_directory("", "/nowhere", 5432), None);
        assert_eq!(socket_directory("@name", "/nowhere", 5432), None);
        let both = format!("/gone/for/ever, \"{path}\"");
        assert_eq!(
            socket_directory(&both, "/nowhere", 5432),
            Some(here.path().to_owned())
        );
        assert!(socket_directory("/gone/for/ever", "/nowhere", 5432).is_some());
        let long = here.path().join("x".repeat(100));
        fs::create_dir(&long).unwrap();
        assert!(socket_directory(long.to_str().unwrap(), "/nowhere", 5432).is_some());
    }
}
