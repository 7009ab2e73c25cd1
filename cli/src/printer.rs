//! Owns stdout and stderr: nothing else in this program writes to them.

mod progress;

use std::fmt::Write as _;
use std::fs::{File, OpenOptions};
use std::io::{self, IsTerminal as _, Write};
use std::os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use indicatif::{MultiProgress, ProgressDrawTarget};
use serde::Serialize;
use serde_json::{Map, Value, json};

pub(crate) use progress::{NodeBar, bytes, duration};

use crate::exit;
use crate::failure::{Failure, Result};
use crate::settings::Format;

/// Writes results, events, messages and bars. Clones share everything.
#[derive(Debug, Clone)]
pub(crate) struct Printer(Arc<Inner>, Detail);

/// What is told of what happens meanwhile.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Detail {
    /// All of it.
    Steps,
    /// Warnings.
    Warnings,
}

#[derive(Debug)]
struct Inner {
    format: Format,
    colour: bool,
    bars: Option<MultiProgress>,
    /// Whether stdout and stderr were terminals at the start: one that has gone away no longer is.
    terminals: (bool, bool),
    streams: Mutex<Streams>,
}

/// Where text goes: the process's own streams, or after the terminal went away a file.
#[derive(Debug, Default)]
struct Streams {
    stdout: Option<Arc<File>>,
    stderr: Option<Arc<File>>,
    /// First error of writing a result or event, other than a reader that has left.
    failed: Option<io::Error>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Stream {
    Out,
    Err,
}

impl Printer {
    /// A printer for `format`; bars are drawn only if `progress` and stderr is a terminal.
    pub(crate) fn new(format: Format, progress: bool) -> Self {
        let terminals = (io::stdout().is_terminal(), io::stderr().is_terminal());
        let terminal = terminals.1;
        let no_color = std::env::var_os("NO_COLOR").is_some_and(|value| !value.is_empty());
        let bars = (progress && terminal)
            .then(|| MultiProgress::with_draw_target(ProgressDrawTarget::stderr_with_hz(8)));
        let inner = Inner {
            format,
            colour: terminal && !no_color,
            bars,
            terminals,
            streams: Mutex::default(),
        };
        Self(Arc::new(inner), Detail::Steps)
    }

    /// The same, for steps that are not worth telling one by one: only their warnings are.
    #[must_use]
    pub(crate) fn without_steps(&self) -> Self {
        Self(Arc::clone(&self.0), Detail::Warnings)
    }

    fn streams(&self) -> MutexGuard<'_, Streams> {
        let streams = &self.0.streams;
        streams.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn write(&self, stream: Stream, text: &str) {
        let write = || {
            let mut streams = self.streams();
            let file = match stream {
                Stream::Out => streams.stdout.clone(),
                Stream::Err => streams.stderr.clone(),
            };
            let written = match (file, stream) {
                (Some(file), _) => (&*file).write_all(text.as_bytes()),
                (None, Stream::Out) => {
                    let mut out = io::stdout().lock();
                    out.write_all(text.as_bytes()).and_then(|()| out.flush())
                }
                (None, Stream::Err) => io::stderr().lock().write_all(text.as_bytes()),
            };
            // A reader that has left (`| head`) wants no more, and the work goes on.
            if let Err(error) = written
                && stream == Stream::Out
                && error.kind() != io::ErrorKind::BrokenPipe
            {
                streams.failed.get_or_insert(error);
            }
        };
        match &self.0.bars {
            Some(bars) => bars.suspend(write),
            None => write(),
        }
    }

    fn line(&self, stream: Stream, text: &str) {
        let mut line = String::with_capacity(text.len() + 1);
        line.push_str(text.trim_end_matches('\n'));
        line.push('\n');
        self.write(stream, &line);
    }

    fn json(&self, value: &impl Serialize) {
        match serde_json::to_string(value) {
            Ok(line) => self.line(Stream::Out, &line),
            Err(error) => self.line(Stream::Err, &format!("error: cannot write JSON: {error}")),
        }
    }

    /// Whether output is JSON lines.
    pub(crate) fn is_json(&self) -> bool {
        self.0.format == Format::Json
    }

    /// Whether bars are drawn.
    pub(crate) fn has_bars(&self) -> bool {
        let bars = self.0.bars.as_ref();
        bars.is_some_and(|bars| !bars.is_hidden())
    }

    fn painted(&self, style: &str, text: &str) -> String {
        if self.0.colour && self.streams().stderr.is_none() {
            format!("\x1b[{style}m{text}\x1b[0m")
        } else {
            text.to_owned()
        }
    }

    /// Something that happens now: a line for machines, `text` for people (on stderr).
    pub(crate) fn event(&self, name: &str, fields: Value, text: Option<&str>) {
        if self.1 == Detail::Warnings && name != "warning" {
            return;
        }
        if self.is_json() {
            let mut line = Map::from_iter([("event".to_owned(), name.into())]);
            if let Value::Object(fields) = fields {
                line.extend(fields);
            }
            self.json(&line);
        } else if let Some(text) = text {
            self.line(Stream::Err, text);
        }
    }

    /// Something the operator should know.
    pub(crate) fn warning(&self, node: Option<&str>, message: &str) {
        let label = self.painted("1;33", "warning:");
        let place = node.map(|node| format!(" {node}:")).unwrap_or_default();
        let text = format!("{label}{place} {message}");
        let fields = json!({"node": node, "message": message});
        self.event("warning", fields, Some(&text));
    }

    /// Data as text, the result of a command for people; nothing in JSON.
    pub(crate) fn text(&self, text: &str) {
        if !self.is_json() {
            self.line(Stream::Out, text);
        }
    }

    /// Bytes that are the same in every format, such as a completion script.
    pub(crate) fn raw(&self, text: &str) {
        self.write(Stream::Out, text);
    }

    /// The last line of a command that went well, for machines.
    pub(crate) fn result(&self, command: &str, fields: Value) {
        if self.is_json() {
            let mut line = result_head(command, "ok");
            if let Value::Object(fields) = fields {
                line.extend(fields);
            }
            self.json(&line);
        }
    }

    /// The last words of a command that failed.
    pub(crate) fn failure(&self, command: &str, failure: &Failure) {
        if let Some(bars) = &self.0.bars {
            let _ = bars.clear();
        }
        if self.is_json() {
            let mut line = result_head(command, "error");
            line.insert("error".to_owned(), json!(failure));
            self.json(&line);
            return;
        }
        let label = self.painted("1;31", "error:");
        let mut text = format!("{label} {}", failure.message);
        if let Some(node) = &failure.node {
            let _ = write!(text, "\n  node:    {node}");
        }
        text.push_str(if failure.changed {
            "\n  changed: yes, and it is still there"
        } else {
            "\n  changed: nothing"
        });
        if let Some(next) = &failure.next {
            let _ = write!(text, "\n  next:    {next}");
        }
        let kind = exit::name(failure.kind);
        let code = failure.kind.exit_code();
        let _ = write!(text, "\n  kind:    {kind} (exit code {code})");
        self.line(Stream::Err, &text);
    }

    /// Asks a question that only the word `yes` answers. `None`: there is nobody to ask.
    pub(crate) fn confirm(&self, question: &str) -> Option<bool> {
        if !Self::can_ask() {
            return None;
        }
        self.write(Stream::Err, &format!("{question} Type `yes` to go on: "));
        let mut answer = String::new();
        let read = io::stdin().read_line(&mut answer);
        Some(read.is_ok() && answer.trim() == "yes")
    }

    /// Whether somebody can be asked: stdin and stderr are terminals.
    pub(crate) fn can_ask() -> bool {
        io::stdin().is_terminal() && io::stderr().is_terminal()
    }

    /// A bar for one node, hidden where bars are.
    pub(crate) fn bar(&self, name: &str) -> NodeBar {
        let bars = self.0.bars.as_ref();
        NodeBar::new(bars.filter(|_| self.1 == Detail::Steps), name)
    }

    /// Sends what went to a terminal to `path` from now on: the terminal has gone away. Streams that
    /// are files or pipes stay what they are.
    ///
    /// # Errors
    /// If the file cannot be made.
    pub(crate) fn detach(&self, path: &Path) -> Result<()> {
        let (stdout, stderr) = self.0.terminals;
        if !stdout && !stderr {
            return Ok(());
        }
        let failed = |error: io::Error| Failure::file(path, "write", &error);
        if let Some(parent) = path.parent() {
            let mut make = std::fs::DirBuilder::new();
            make.recursive(true)
                .mode(0o700)
                .create(parent)
                .map_err(failed)?;
        }
        let mut open = OpenOptions::new();
        open.append(true).create(true).mode(0o600);
        let file = Arc::new(open.open(path).map_err(failed)?);
        if let Some(bars) = &self.0.bars {
            bars.set_draw_target(ProgressDrawTarget::hidden());
        }
        let mut streams = self.streams();
        if stdout {
            streams.stdout = Some(Arc::clone(&file));
        }
        if stderr {
            streams.stderr = Some(file);
        }
        Ok(())
    }

    /// What could not be written to stdout, if anything.
    pub(crate) fn take_error(&self) -> Option<io::Error> {
        self.streams().failed.take()
    }
}

fn result_head(command: &str, status: &str) -> Map<String, Value> {
    Map::from_iter([
        ("event".to_owned(), "result".into()),
        ("command".to_owned(), command.into()),
        ("status".to_owned(), status.into()),
    ])
}

/// Lets the log go through the printer, past the bars.
impl Printer {
    /// A writer of one log line.
    pub(crate) fn log_writer(&self) -> LogWriter {
        LogWriter(self.clone())
    }
}

/// One log line on its way to stderr.
#[derive(Debug)]
pub(crate) struct LogWriter(Printer);

impl Write for LogWriter {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.write(Stream::Err, &String::from_utf8_lossy(bytes));
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Where a detached operation writes.
pub(crate) fn log_path(home: &Path, operation: uuid::Uuid) -> PathBuf {
    home.join("log").join(format!("{operation}.log"))
}
