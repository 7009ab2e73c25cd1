//! What the programs say, to standard error, in their words.

use std::io::{self, Write as _};

use jiff::Zoned;

use super::Kind;

/// Says things as one of the two programs does.
#[derive(Debug, Clone, Copy)]
pub(super) struct Log {
    kind: Kind,
}

#[expect(
    clippy::unused_self,
    reason = "what is said unasked is no matter of the caller's"
)]
impl Log {
    pub(super) fn new(kind: Kind) -> Self {
        Self { kind }
    }

    /// One write a line: lines of threads do not mix. A reader that has gone away is no reason to stop.
    fn line(text: &str) {
        let _ = io::stderr().write_all(text.as_bytes());
    }

    /// `LOG:`, which gs_probackup shows unasked and pg_probackup does not.
    pub(super) fn log(self, text: &str) {
        if self.kind == Kind::Gs {
            Self::line(&format!("LOG: {text}\n"));
        }
    }

    pub(super) fn info(self, text: &str) {
        Self::line(&format!("INFO: {text}\n"));
    }

    pub(super) fn warning(self, text: &str) {
        Self::line(&format!("WARNING: {text}\n"));
    }

    pub(super) fn error(self, text: &str) {
        Self::line(&format!("ERROR: {text}\n"));
    }

    /// A line of gs_probackup's WAL client: it clears a progress bar that nobody sees, with spaces and `\r`.
    pub(super) fn wal_client(self, text: &str) {
        if self.kind == Kind::Gs {
            let now = Zoned::now().strftime("%Y-%m-%d %H:%M:%S").to_string();
            Self::line(&format!("{:100}\r[{now}]: {text}\n", ""));
        }
    }

    /// Text as it is.
    pub(super) fn raw(self, text: &str) {
        Self::line(text);
    }
}

/// `pretty_size` of the real programs: whole units, `kB` to `TB`.
pub(super) fn pretty(bytes: u64) -> String {
    let mut size = bytes;
    for unit in ["B", "kB", "MB", "GB"] {
        if size < 10 * 1024 {
            return format!("{size}{unit}");
        }
        size = (size + 512) / 1024;
    }
    format!("{size}TB")
}
