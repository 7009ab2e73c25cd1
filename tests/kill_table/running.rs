//! A `gs_pitr` that runs, read line by line.

use std::io::{BufRead as _, BufReader, Read as _};
use std::process::{Child, Stdio};
use std::time::{Duration, Instant};

use serde_json::Value;
use support::fleet::{Fleet, Run};
use tokio::sync::mpsc;

/// The longest that anything in a row may take.
const LIMIT: Duration = Duration::from_secs(90);

/// The command under way.
pub(crate) struct Running {
    child: Child,
    lines: mpsc::Receiver<String>,
    said: String,
}

impl Running {
    /// Starts `gs_pitr` with `--output json`.
    pub(crate) fn start(fleet: &Fleet, args: &[&str]) -> Self {
        let mut child = fleet
            .command(args)
            .args(["--output", "json"])
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .expect("gs_pitr");
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

    /// Reads on until `node` is in `phase`.
    pub(crate) async fn until_phase(&mut self, node: &str, phase: &str) {
        self.until(|event| event["phase"] == phase && event["node"] == node)
            .await;
    }

    /// Reads on until an event is the one, unless it has come before, and returns it.
    pub(crate) async fn until(&mut self, is_it: impl Fn(&Value) -> bool) -> Value {
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
        let found = tokio::time::timeout(LIMIT, found).await;
        found
            .ok()
            .flatten()
            .unwrap_or_else(|| panic!("it never came: {}", self.said))
    }

    /// SIGKILL, and wait. It must have been alive.
    pub(crate) fn kill(mut self) -> String {
        let ended = self.child.try_wait().expect("its status");
        assert!(ended.is_none(), "it had ended before: {}", self.said);
        self.child.kill().expect("SIGKILL");
        self.child.wait().expect("its end");
        self.said
    }

    /// Waits for its end.
    pub(crate) async fn end(mut self) -> Run {
        let begun = Instant::now();
        while let Ok(Some(line)) = tokio::time::timeout(LIMIT, self.lines.recv()).await {
            self.said.push_str(&line);
            self.said.push('\n');
        }
        if begun.elapsed() >= LIMIT {
            let _ = self.child.kill();
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
