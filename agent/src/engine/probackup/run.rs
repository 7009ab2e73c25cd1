//! The program under way: its output heard, its silence measured, its end seen to.
//!
//! A copy may take days, so nothing limits its time. What is limited is standing still: no byte through the mount and no
//! word, for too long.

use std::collections::VecDeque;
use std::io;
use std::process::{ExitStatus, Stdio};
use std::time::Duration;

use agent_api::Secret;
use rustix::process::{Pid, Signal, kill_process};
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWriteExt as _};
use tokio::process::{Child, ChildStderr, ChildStdin, ChildStdout, Command};
use tokio::time::{Instant, MissedTickBehavior, interval, sleep_until, timeout};
use tokio_util::sync::CancellationToken;

use super::lines::Lines;
use super::words::{Told, Words};

/// For the program's own cleaning up after SIGTERM: it ends the backup on the server.
const TERM_GRACE: Duration = Duration::from_secs(30);
/// Between SIGKILL and giving up on it: it waits for an answer of the mount then.
const KILL_GRACE: Duration = Duration::from_secs(10);
/// A checkpoint that does not hurry takes up to `checkpoint_timeout`, which is at most a day.
const CHECKPOINT: Duration = Duration::from_hours(25);
/// How often silence is measured.
const LOOK: Duration = Duration::from_secs(1);
/// For output that is still in the pipe when the program has ended.
const DRAIN: Duration = Duration::from_secs(2);
/// To hand the password over; the pipe takes it at once.
const HAND_OVER: Duration = Duration::from_secs(10);
const BUFFER: usize = 16 << 10;

/// What its end was.
#[derive(Debug)]
pub enum End<E> {
    /// It ended by itself.
    Itself(ExitStatus),
    /// It was ended because it stood still for so long.
    Stalled(Duration),
    /// It was ended because somebody asked for it.
    Cancelled,
    /// It was ended because it had become useless.
    Spoiled(E),
}

/// A run that is over.
#[derive(Debug)]
pub struct Over<E> {
    /// What its end was.
    pub end: End<E>,
    /// What was done to end it; empty: nothing.
    pub done: &'static str,
    /// Whether it is certain that it has ended. If not, it waits for the kernel.
    pub gone: bool,
    /// What it said.
    pub words: Words,
}

/// How a program is watched.
#[derive(Debug, Clone, Copy)]
pub struct Watch<'a> {
    /// How long it may stand still.
    pub stall: Duration,
    /// Ends it.
    pub cancel: &'a CancellationToken,
    /// Handed to it on its standard input, where it asks for one. Neither environment nor arguments are hidden from
    /// others.
    pub password: Option<&'a Secret>,
}

/// Runs `command` to its end. `heard` is given what its lines mean; `moved` says when a byte last went through the
/// mount; `spoiled` ends when it is no use to go on. May be dropped: the program is killed then.
///
/// # Errors
/// If it cannot be started.
pub async fn run<E>(
    mut command: Command,
    watch: Watch<'_>,
    mut heard: impl FnMut(Told),
    moved: impl Fn() -> std::time::Instant,
    spoiled: impl Future<Output = E>,
) -> io::Result<Over<E>> {
    let stdin = match watch.password {
        Some(_) => Stdio::piped(),
        None => Stdio::null(),
    };
    command
        .stdin(stdin)
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .kill_on_drop(true);
    let mut running = Running::start(&mut command)?;
    if let (Some(stdin), Some(password)) = (running.child.stdin.take(), watch.password) {
        hand_over(stdin, password).await;
    }
    let mut silence = Silence::new(watch.stall);
    let mut look = interval(LOOK);
    look.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut ending: Option<(End<E>, &'static str, Instant)> = None;
    tokio::pin!(spoiled);
    loop {
        let why = tokio::select! {
            biased;
            () = watch.cancel.cancelled(), if ending.is_none() => End::Cancelled,
            error = &mut spoiled, if ending.is_none() => End::Spoiled(error),
            () = until(ending.as_ref().map(|(_, _, at)| *at)) => {
                match ending.take() {
                    Some((end, TERMED, _)) => {
                        let _ = running.child.start_kill();
                        ending = Some((end, KILLED, Instant::now() + KILL_GRACE));
                    }
                    Some((end, _, _)) => return Ok(running.over(end, KILLED, false)),
                    None => {}
                }
                continue;
            }
            // Before the output: one that only ever prints would never be looked at.
            _ = look.tick(), if ending.is_none() => match silence.look(moved(), running.words.last_line()) {
                Look::Moving => continue,
                Look::Slow(warning) => {
                    heard(Told::Warning(warning));
                    continue;
                }
                Look::Stalled(idle) => End::Stalled(idle),
            },
            told = running.next() => match told {
                Next::Told(told) => {
                    silence.hear(&told);
                    heard(told);
                    continue;
                }
                Next::Ended(status) => {
                    let (end, done) = match ending {
                        Some((end, done, _)) => (end, done),
                        None => (End::Itself(status?), ""),
                    };
                    return Ok(running.over(end, done, true));
                }
            },
        };
        running.signal(Signal::TERM);
        ending = Some((why, TERMED, Instant::now() + TERM_GRACE));
    }
}

const TERMED: &str = "it was asked to stop (SIGTERM)";
const KILLED: &str = "it did not stop when asked and was killed";

async fn until(at: Option<Instant>) {
    match at {
        Some(at) => sleep_until(at).await,
        None => std::future::pending().await,
    }
}

/// Writes the password to its standard input and closes that. A program that asks for none may be gone already.
async fn hand_over(mut stdin: ChildStdin, password: &Secret) {
    let written = async {
        stdin.write_all(password.0.as_bytes()).await?;
        stdin.write_all(b"\n").await?;
        stdin.shutdown().await
    };
    if let Ok(Err(error)) = timeout(HAND_OVER, written).await {
        tracing::debug!(%error, "the program took no password");
    }
}

/// How long nothing has moved.
struct Silence {
    stall: Duration,
    said: std::time::Instant,
    checkpoint: bool,
    warned: bool,
}

enum Look {
    Moving,
    Slow(String),
    Stalled(Duration),
}

impl Silence {
    fn new(stall: Duration) -> Self {
        Self {
            stall,
            said: std::time::Instant::now(),
            checkpoint: false,
            warned: false,
        }
    }

    fn hear(&mut self, told: &Told) {
        if *told == Told::Nothing {
            return;
        }
        self.said = std::time::Instant::now();
        self.checkpoint = *told == Told::Checkpoint;
    }

    fn look(&mut self, moved: std::time::Instant, last: &str) -> Look {
        let idle = self.said.max(moved).elapsed();
        let limit = if self.checkpoint {
            CHECKPOINT.max(self.stall)
        } else {
            self.stall
        };
        if idle >= limit {
            return Look::Stalled(idle);
        }
        if idle < limit / 2 {
            self.warned = false;
            return Look::Moving;
        }
        if self.warned {
            return Look::Moving;
        }
        self.warned = true;
        Look::Slow(format!(
            "no byte has moved for {} s; it is ended after {} s (--stall-timeout). Its last words: {last}",
            idle.as_secs(),
            limit.as_secs()
        ))
    }
}

enum Next {
    Told(Told),
    Ended(io::Result<ExitStatus>),
}

struct Running {
    child: Child,
    pid: Option<Pid>,
    out: Pipe<ChildStdout>,
    err: Pipe<ChildStderr>,
    told: VecDeque<Told>,
    words: Words,
    status: Option<io::Result<ExitStatus>>,
    drained: Option<Instant>,
}

impl Running {
    fn start(command: &mut Command) -> io::Result<Self> {
        let mut child = command.spawn()?;
        let pid = child.id().and_then(|pid| i32::try_from(pid).ok());
        Ok(Self {
            pid: pid.and_then(Pid::from_raw),
            out: Pipe::new(child.stdout.take()),
            err: Pipe::new(child.stderr.take()),
            child,
            told: VecDeque::new(),
            words: Words::default(),
            status: None,
            drained: None,
        })
    }

    /// What comes next. May be dropped and called again.
    async fn next(&mut self) -> Next {
        loop {
            if let Some(told) = self.told.pop_front() {
                return Next::Told(told);
            }
            let silent = self.out.is_closed() && self.err.is_closed();
            if silent && let Some(status) = self.status.take() {
                return Next::Ended(status);
            }
            tokio::select! {
                biased;
                lines = self.out.read() => self.hear(&lines),
                lines = self.err.read() => self.hear(&lines),
                status = self.child.wait(), if self.status.is_none() => {
                    self.status = Some(status);
                    self.drained = Some(Instant::now() + DRAIN);
                }
                // Something that it started has its output still open.
                () = until(self.drained) => {
                    self.drained = None;
                    self.out.close();
                    self.err.close();
                }
            }
        }
    }

    fn hear(&mut self, lines: &[String]) {
        for line in lines {
            tracing::debug!("{line}");
            let told = self.words.hear(line);
            self.told.push_back(told);
        }
    }

    fn signal(&self, signal: Signal) {
        // Its number is not given away before we have waited for it.
        if let Some(pid) = self.pid.filter(|_| self.status.is_none()) {
            let _ = kill_process(pid, signal);
        }
    }

    fn over<E>(self, end: End<E>, done: &'static str, gone: bool) -> Over<E> {
        Over {
            end,
            done,
            gone,
            words: self.words,
        }
    }
}

/// One of its outputs.
struct Pipe<R> {
    end: Option<R>,
    lines: Lines,
    buffer: Vec<u8>,
}

impl<R: AsyncRead + Unpin> Pipe<R> {
    fn new(pipe: Option<R>) -> Self {
        Self {
            end: pipe,
            lines: Lines::default(),
            buffer: vec![0; BUFFER],
        }
    }

    fn is_closed(&self) -> bool {
        self.end.is_none()
    }

    fn close(&mut self) {
        self.end = None;
    }

    /// The lines that end in the next bytes; at the end the last one. Never again after that.
    async fn read(&mut self) -> Vec<String> {
        let Some(pipe) = &mut self.end else {
            return std::future::pending().await;
        };
        let mut found = Vec::new();
        if let Ok(count @ 1..) = pipe.read(&mut self.buffer).await {
            let bytes = &self.buffer[..count];
            self.lines.feed(bytes, &mut |line| found.push(line));
        } else {
            self.end = None;
            std::mem::take(&mut self.lines).finish(&mut |line| found.push(line));
        }
        found
    }
}

#[cfg(test)]
mod tests {
    use tokio::time::sleep;

    use super::*;

    async fn watched(
        script: &str,
        stall: Duration,
        password: Option<&Secret>,
        cancel: &CancellationToken,
        spoiled: impl Future<Output = &'static str>,
    ) -> (Over<&'static str>, Vec<Told>) {
        let mut command = Command::new("/bin/sh");
        command.args(["-c", script]);
        let (watch, mut told) = (
            Watch {
                stall,
                cancel,
                password,
            },
            Vec::new(),
        );
        let begun = std::time::Instant::now();
        let over = run(command, watch, |t| told.push(t), || begun, spoiled).await;
        (over.unwrap(), told)
    }

    const LONG: Duration = Duration::from_mins(1);

    #[tokio::test]
    async fn its_end_and_its_words_are_heard() {
        let script = "echo 'WARNING: careful' >&2; printf 'ERROR: no room' >&2; exit 3";
        let (over, told) = watched(
            script,
            LONG,
            None,
            &CancellationToken::new(),
            std::future::pending(),
        )
        .await;
        assert!(
            matches!(over.end, End::Itself(status) if status.code() == Some(3)),
            "{over:?}"
        );
        assert_eq!(over.words.complaint(), "no room");
        assert!(told.contains(&Told::Warning("careful".into())));
        assert!(over.gone && over.done.is_empty());
    }

    #[tokio::test]
    async fn the_password_comes_on_its_input_and_its_input_ends() {
        let script = "read word; cat; echo \"INFO: got $word\"";
        let password = Secret("top 'secret'".into());
        let (over, _) = watched(
            script,
            LONG,
            Some(&password),
            &CancellationToken::new(),
            std::future::pending(),
        )
        .await;
        assert_eq!(over.words.last_line(), "INFO: got top 'secret'");
    }

    #[tokio::test]
    async fn one_that_stands_still_is_ended() {
        let script = "while :; do echo '[now]: keepalive message is received' >&2; sleep 0.1; done";
        let stall = Duration::from_secs(6);
        let (over, told) = watched(
            script,
            stall,
            None,
            &CancellationToken::new(),
            std::future::pending(),
        )
        .await;
        assert!(
            matches!(over.end, End::Stalled(idle) if idle >= stall),
            "{over:?}"
        );
        assert!(over.gone && over.done == TERMED);
        let warned = told
            .iter()
            .any(|told| matches!(told, Told::Warning(text) if text.contains("--stall-timeout")));
        assert!(warned, "{told:?}");
    }

    #[tokio::test]
    async fn one_that_works_or_waits_for_a_checkpoint_is_not() {
        let stall = Duration::from_secs(6);
        let script =
            "for i in 1 2 3 4 5 6 7 8 9 10 11 12 13 14; do echo INFO: busy; sleep 0.5; done";
        let (over, _) = watched(
            script,
            stall,
            None,
            &CancellationToken::new(),
            std::future::pending(),
        )
        .await;
        assert!(matches!(over.end, End::Itself(_)), "{over:?}");
        let script = "echo 'LOG: Database backup start' >&2; sleep 8";
        let (over, _) = watched(
            script,
            stall,
            None,
            &CancellationToken::new(),
            std::future::pending(),
        )
        .await;
        assert!(matches!(over.end, End::Itself(_)), "{over:?}");
    }

    #[tokio::test]
    async fn a_cancel_lets_it_clean_up() {
        let directory = tempfile::tempdir().unwrap();
        let up = directory.path().join("up");
        let script = format!(
            "trap 'echo INFO: cleaned; exit 1' TERM; : >'{}'; while :; do sleep 0.1; done",
            up.display()
        );
        let cancel = CancellationToken::new();
        let later = cancel.clone();
        tokio::spawn(async move {
            while !up.exists() {
                sleep(Duration::from_millis(20)).await;
            }
            later.cancel();
        });
        let (over, _) = watched(&script, LONG, None, &cancel, std::future::pending()).await;
        assert!(matches!(over.end, End::Cancelled), "{over:?}");
        assert_eq!(over.words.last_line(), "INFO: cleaned");
        let spoiled = async { "the store is gone" };
        let (over, _) = watched("sleep 60", LONG, None, &CancellationToken::new(), spoiled).await;
        assert!(
            matches!(over.end, End::Spoiled("the store is gone")),
            "{over:?}"
        );
    }
}
