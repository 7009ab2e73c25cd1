//! A `gs_pitr` that runs, read line by line.

use std::io::{BufRead as _, BufReader, Read as _};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;
use tokio::sync::mpsc;

use crate::fleet::Run;

/// The longest that anything in a row may take.
const LIMIT: Duration = Duration::from_mins(2);

/// The command under way.
#[derive(Debug)]
pub struct Running {
    child: Child,
    lines: mpsc::Receiver<String>,
    said: String,
}

impl Running {
    /// Starts `command`, a `gs_pitr` that says `--output json`.
    ///
    /// # Panics
    /// If it cannot be started.
    pub fn start(mut command: Command) -> Self {
        let child = command.stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = child.spawn().expect("gs_pitr");
        let (sender, lines) = mpsc::channel(10_000);
        let stdout = BufReader::new(child.stdout.take().expect("its output"));
        std::thread::spawn(move || {
            for line in stdout.lines().map_while(Result::ok) {
                if sender.blocking_send(line).is_err() {
                    return;
                }
            }
        });
        Self {
            child,
            lines,
            said: String::new(),
        }
    }

    /// Reads on until every one of `agents` is in `phase`.
    ///
    /// # Panics
    /// If that does not come.
    pub async fn until(&mut self, phase: &str, agents: &[&str]) {
        for agent in agents {
            self.until_event(|event| event["phase"] == phase && event["node"] == *agent)
                .await;
        }
    }

    /// Reads on until an event is the one, unless it has come before, and returns it.
    ///
    /// # Panics
    /// If it does not come.
    pub async fn until_event(&mut self, is_it: impl Fn(&Value) -> bool) -> Value {
        let parse = |line: &str| serde_json::from_str(line).expect("every line is JSON");
        let before = self.said.lines().map(parse).find(&is_it);
        if let Some(event) = before {
            return event;
        }
        let found = async {
            while let Some(line) = self.lines.recv().await {
                self.said.push_str(&line);
                self.said.push('\n');
                let event = parse(&line);
                if is_it(&event) {
                    return Some(event);
                }
            }
            None
        };
        let found = tokio::time::timeout(LIMIT, found).await.ok().flatten();
        found.unwrap_or_else(|| panic!("it never came: {}", self.said))
    }

    /// Whether it has ended.
    ///
    /// # Panics
    /// If that cannot be known.
    pub fn has_ended(&mut self) -> bool {
        self.child.try_wait().expect("its status").is_some()
    }

    /// Sends a signal.
    ///
    /// # Panics
    /// If it has ended.
    pub fn signal(&self, signal: Signal) {
        kill_process(Pid::from_child(&self.child), signal).expect("it runs");
    }

    /// SIGKILL, and wait. It must have been alive. Returns what it said.
    ///
    /// # Panics
    /// If it had ended.
    pub fn kill(mut self) -> String {
        let ended = self.child.try_wait().expect("its status");
        assert!(ended.is_none(), "it had ended before: {}", self.said);
        self.child.kill().expect("SIGKILL");
        self.child.wait().expect("its end");
        self.said
    }

    /// Waits for its end; one that takes too long is killed.
    ///
    /// # Panics
    /// If its output cannot be read.
    pub async fn end(mut self) -> Run {
        let until = Instant::now() + LIMIT;
        loop {
            let left = until.saturating_duration_since(Instant::now());
            match tokio::time::timeout(left, self.lines.recv()).await {
                Ok(Some(line)) => {
                    self.said.push_str(&line);
                    self.said.push('\n');
                }
                Ok(None) => break,
                Err(_) => {
                    let _ = self.child.kill();
                    break;
                }
            }
        }
        let mut stderr = String::new();
        let mut pipe = self.child.stderr.take().expect("its errors");
        pipe.read_to_string(&mut stderr).expect("text");
        Run {
            code: self.child.wait().expect("its end").code().unwrap_or(-1),
            stdout: self.said,
            stderr,
        }
    }
}
