//! The program `catalog-run`.

use std::ffi::OsString;
use std::io::{self, Read as _, Write as _};
use std::os::fd::AsFd as _;
use std::os::unix::net::UnixStream;
use std::os::unix::process::{CommandExt as _, ExitStatusExt as _};
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, ExitStatus};
use std::time::Duration;

use rustix::process::{
    Pid, Signal, getppid, kill_process, set_parent_process_death_signal, setsid,
};
use tokio::io::AsyncReadExt as _;
use tokio::process::Child;
use tokio::signal::unix::{SignalKind, signal};
use tokio::time::timeout;

use super::{DEVICE, EXEC, GO, GRACE, HAS_MOUNT, MOUNTED, PROBE, SUBCOMMAND, enter, wire};
use crate::catalog_fs::life::mount_here;

/// The program never ran; standard error says why.
const NEVER_RAN: u8 = 126;
/// How long the agent may take to serve the mount.
const SERVED: Duration = Duration::from_secs(30);
/// Longest reason the agent may give, in bytes.
const REASON: u64 = 4096;

/// Runs the subcommand with the arguments that follow its name. Call it first of all: it needs a process of one thread.
pub fn main(args: impl IntoIterator<Item = OsString>) -> ExitCode {
    let args: Vec<OsString> = args.into_iter().collect();
    match run(&args) {
        Ok(code) => code,
        Err(error) => {
            // Whoever started us reads this as the program's words.
            let _ = writeln!(io::stderr(), "pitr-agent catalog-run: {error}");
            ExitCode::from(NEVER_RAN)
        }
    }
}

fn run(args: &[OsString]) -> io::Result<ExitCode> {
    match args {
        [probe] if probe == PROBE => {
            enter::namespace()?;
            mount_here(&std::env::temp_dir())?;
            Ok(ExitCode::SUCCESS)
        }
        [exec, parent, program @ ..] if exec == EXEC => become_program(parent, program),
        [socket, point, program @ ..] if !program.is_empty() => {
            let agent = greet(Path::new(socket), point)?;
            let status = tokio::runtime::Builder::new_current_thread()
                .enable_all()
                .build()?
                .block_on(attend(agent, program))?;
            Ok(code(status))
        }
        _ => Err(io::Error::new(
            io::ErrorKind::InvalidInput,
            "it is started by the agent, not by hand",
        )),
    }
}

/// Mounts if it is to, and waits until the agent serves.
fn greet(socket: &Path, point: &OsString) -> io::Result<UnixStream> {
    let step =
        |what: &str, error: io::Error| io::Error::new(error.kind(), format!("{what}: {error}"));
    let mut agent =
        UnixStream::connect(socket).map_err(|error| step("the agent's socket", error))?;
    agent.set_read_timeout(Some(SERVED))?;
    if point == MOUNTED {
        wire::send(&agent, HAS_MOUNT, None)?;
    } else {
        enter::namespace()?;
        let device = mount_here(&PathBuf::from(point))?;
        // Ours is closed with this: the mount lives and dies with the agent.
        wire::send(&agent, DEVICE, Some(device.as_fd()))?;
    }
    let mut answer = [0];
    agent
        .read_exact(&mut answer)
        .map_err(|error| step("the agent did not answer", error))?;
    if answer[0] != GO {
        let mut why = String::new();
        agent.take(REASON).read_to_string(&mut why)?;
        return Err(io::Error::other(format!("the agent refused: {why}")));
    }
    if point != MOUNTED {
        // The kernel takes the root of a mount for root's, who has no number in here, and lets nobody write into it until
        // it has asked whose it is.
        std::fs::metadata(point).map_err(|error| step("the mount", error))?;
    }
    Ok(agent)
}

/// Starts the program and stays until it has ended.
async fn attend(agent: UnixStream, program: &[OsString]) -> io::Result<ExitStatus> {
    agent.set_nonblocking(true)?;
    let mut agent = tokio::net::UnixStream::from_std(agent)?;
    // Before the program starts: none may come between.
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    let mut hang_up = signal(SignalKind::hangup())?;
    let mut quit = signal(SignalKind::quit())?;
    let mut child = tokio::process::Command::new("/proc/self/exe")
        .arg0("pitr-agent")
        .args([SUBCOMMAND, EXEC])
        .arg(std::process::id().to_string())
        .args(program)
        .kill_on_drop(true)
        .spawn()?;
    let pid = pid(&child)?;
    let mut byte = [0];
    loop {
        let passed_on = tokio::select! {
            status = child.wait() => return status,
            _ = terminate.recv() => Signal::TERM,
            _ = interrupt.recv() => Signal::INT,
            _ = hang_up.recv() => Signal::HUP,
            _ = quit.recv() => Signal::QUIT,
            read = agent.read(&mut byte) => match read {
                Ok(1..) => continue,
                // The agent is gone, or wants the end.
                _ => return end(&mut child, pid).await,
            },
        };
        pass_on(pid, passed_on);
    }
}

/// The program may have ended; its number is not given away before we have waited for it. One that somebody has stopped
/// hears a signal, and can clean up after itself, only when it goes on.
fn pass_on(pid: Pid, signal: Signal) {
    let _ = kill_process(pid, signal);
    let _ = kill_process(pid, Signal::CONT);
}

async fn end(child: &mut Child, pid: Pid) -> io::Result<ExitStatus> {
    pass_on(pid, Signal::TERM);
    if let Ok(status) = timeout(GRACE, child.wait()).await {
        return status;
    }
    let _ = kill_process(pid, Signal::KILL);
    child.wait().await
}

fn pid(child: &Child) -> io::Result<Pid> {
    child
        .id()
        .and_then(|pid| i32::try_from(pid).ok())
        .and_then(Pid::from_raw)
        .ok_or_else(|| io::Error::other("the program ended as it began"))
}

/// Never returns if all goes well. What is set here outlives `exec`: without it the program would live on when
/// `catalog-run` is killed.
fn become_program(parent: &OsString, program: &[OsString]) -> io::Result<ExitCode> {
    let [program, args @ ..] = program else {
        return Err(io::ErrorKind::InvalidInput.into());
    };
    // Without a terminal of its own: where there is one, the program asks it for the password, and not its input.
    setsid()?;
    set_parent_process_death_signal(Some(Signal::KILL))?;
    let parent: Option<i32> = parent.to_str().and_then(|parent| parent.parse().ok());
    if getppid().map(Pid::as_raw_nonzero).map(Into::into) != parent {
        return Err(io::Error::other("it was killed before the program began"));
    }
    let error = Command::new(program).args(args).exec();
    Err(io::Error::new(
        error.kind(),
        format!("cannot run {}: {error}", program.display()),
    ))
}

/// The program's code, or 128 and its signal, as shells say it.
fn code(status: ExitStatus) -> ExitCode {
    let code = status.code().or_else(|| status.signal().map(|s| 128 + s));
    ExitCode::from(
        code.and_then(|code| u8::try_from(code).ok())
            .unwrap_or(NEVER_RAN),
    )
}
