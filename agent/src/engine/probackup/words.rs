//! What the program's lines mean.
//!
//! Both programs write `LEVEL: message` to standard error (`logger.c`), lines without a level go on with the message before
//! them, and the WAL client of `gs_probackup` writes lines of its own, `[time]: message`, in between.

use std::collections::VecDeque;

/// Complaints that are kept, the first ones: what comes after them mostly follows from them.
const ERRORS: usize = 4;
/// Lines that are kept for the case that it complains about nothing, the last ones.
const LAST: usize = 5;
/// Lines of one message that are kept.
const MESSAGE_LINES: usize = 12;

/// Warnings that say what we asked for, what the agent's own checks say, or what an end with an error says anyway.
const KNOWN_WARNINGS: [&str; 6] = [
    "Backup files are not synced to disk",
    "Current PostgreSQL role is superuser",
    "This PostgreSQL instance was initialized without data block checksums",
    "A backup is in progress, stopping it",
    "backup in progress, stop backup",
    "is running, setting its status to ERROR",
];

/// How serious a message is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Level {
    Info,
    Warning,
    Error,
}

/// What a line says to us.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Told {
    /// Nothing, but that it works.
    Working,
    /// Nothing at all: printed by a clock, also when nothing moves.
    Nothing,
    /// It has begun: its version, and its id for the backup.
    Started {
        /// Its own version, such as `2.5.16`.
        version: String,
        /// Id of the backup.
        id: String,
    },
    /// It waits for the server's checkpoint, silently.
    Checkpoint,
    /// The backup has ended on the server; it waits for WAL up to that.
    Ended,
    /// About the size of the data directory, in bytes.
    Size(u64),
    /// The operator should know.
    Warning(String),
}

/// The program's words so far, as far as an error may need them. Memory: some lines.
#[derive(Debug, Default)]
pub struct Words {
    errors: Vec<String>,
    dropped: usize,
    /// Lines that the message which was begun last still may have.
    open: usize,
    last: VecDeque<String>,
}

impl Words {
    /// Takes the next line.
    pub fn hear(&mut self, line: &str) -> Told {
        if line.contains("keepalive message is received") {
            return Told::Nothing;
        }
        if self.last.len() == LAST {
            self.last.pop_front();
        }
        self.last.push_back(line.to_owned());
        let Some((level, message)) = leveled(line) else {
            // A part of the message before, unless it is the WAL client's.
            if self.open > 0 && !line.trim_start().starts_with('[') {
                self.open -= 1;
                if let Some(error) = self.errors.last_mut() {
                    error.push_str("; ");
                    error.push_str(line.trim());
                }
            }
            return Told::Working;
        };
        self.open = 0;
        match level {
            Level::Error => {
                if self.errors.iter().any(|error| error == message) || self.errors.len() == ERRORS {
                    self.dropped += 1;
                } else {
                    self.errors.push(message.to_owned());
                    self.open = MESSAGE_LINES;
                }
                Told::Working
            }
            Level::Warning if KNOWN_WARNINGS.iter().any(|known| message.contains(known)) => {
                Told::Working
            }
            Level::Warning => Told::Warning(message.to_owned()),
            Level::Info => about(message),
        }
    }

    /// What it complained about, or its last lines; empty if it said nothing.
    #[must_use]
    pub fn complaint(&self) -> String {
        if self.errors.is_empty() {
            return self.last_lines();
        }
        let mut all = self.errors.join("; ");
        if self.dropped > 0 {
            all.push_str("; and more");
        }
        all
    }

    /// The last line.
    #[must_use]
    pub fn last_line(&self) -> &str {
        self.last.back().map_or("", String::as_str)
    }

    fn last_lines(&self) -> String {
        let lines: Vec<_> = self.last.iter().map(String::as_str).collect();
        lines.join("; ")
    }
}

fn leveled(line: &str) -> Option<(Level, &str)> {
    let levels = [
        ("ERROR: ", Level::Error),
        ("WARNING: ", Level::Warning),
        ("INFO: ", Level::Info),
        ("LOG: ", Level::Info),
        ("VERBOSE: ", Level::Info),
        ("NOTICE: ", Level::Info),
    ];
    levels
        .into_iter()
        .find_map(|(name, level)| Some((level, line.strip_prefix(name)?.trim())))
}

fn about(message: &str) -> Told {
    if let Some(rest) = message.strip_prefix("Backup start, ") {
        let field = |name: &str| {
            let (_, value) = rest.split_once(name)?;
            Some(value.split(',').next().unwrap_or(value).trim().to_owned())
        };
        if let (Some(version), Some(id)) = (field("probackup version: "), field("backup ID: ")) {
            return Told::Started { version, id };
        }
    }
    // gs_probackup says nothing more specific before pg_start_backup.
    let waits = message.starts_with("wait for pg_backup_start")
        || message.starts_with("wait for pg_start_backup")
        || message == "Database backup start";
    if waits {
        return Told::Checkpoint;
    }
    if message.starts_with("stop_lsn: ") {
        return Told::Ended;
    }
    if let Some(bytes) = message.strip_prefix("PGDATA size: ").and_then(pretty_size) {
        return Told::Size(bytes);
    }
    Told::Working
}

/// `622MB`, as the programs round it.
fn pretty_size(text: &str) -> Option<u64> {
    let digits = text.find(|c: char| !c.is_ascii_digit())?;
    let (number, unit) = text.split_at(digits);
    let shift = match unit.trim() {
        "B" | "bytes" => 0,
        "kB" | "KB" => 10,
        "MB" => 20,
        "GB" => 30,
        "TB" => 40,
        _ => return None,
    };
    number.parse::<u64>().ok()?.checked_shl(shift)
}

#[cfg(test)]
mod tests {
    use super::super::lines::Lines;
    use super::*;

    /// What is heard in a recorded output.
    fn hear(recorded: &str) -> (Vec<Told>, Words) {
        let (mut words, mut told) = (Words::default(), Vec::new());
        let mut lines = Lines::default();
        let mut take = |line: String| told.push(words.hear(&line));
        lines.feed(recorded.as_bytes(), &mut take);
        lines.finish(&mut take);
        told.retain(|told| *told != Told::Working);
        (told, words)
    }

    #[test]
    fn a_good_backup_of_gs_probackup() {
        let (told, words) = hear(include_str!("samples/D_full_ok.err"));
        let expected = [
            Told::Started {
                version: "2.4.2".into(),
                id: "TOUR3A".into(),
            },
            Told::Checkpoint,
            Told::Nothing,
            Told::Size(622 << 20),
            Told::Nothing,
            Told::Ended,
        ];
        assert_eq!(told, expected);
        assert_eq!(words.last_line(), "INFO: Backup TOUR3A completed");
    }

    #[test]
    fn the_cause_is_found_before_what_follows_from_it() {
        let (_, words) = hear(include_str!("samples/D_diskfull.err"));
        let complaint = words.complaint();
        assert!(
            complaint.starts_with(
                "File: \"/w/small/c/backups/i/TOUS68/database/base/14720/16416\", cannot write"
            ),
            "{complaint}"
        );
        assert!(
            complaint.ends_with("and more") && complaint.len() < 600,
            "{complaint}"
        );
        let (_, words) = hear(include_str!("samples/D_server_down.err"));
        let complaint = words.complaint();
        assert!(
            complaint.starts_with("could not connect to database postgres"),
            "{complaint}"
        );
        assert!(
            complaint.contains("Is the server running on host"),
            "{complaint}"
        );
        let (_, words) = hear(include_str!("samples/D_wrong_password.err"));
        assert!(
            words.complaint().contains("Invalid username/password"),
            "{words:?}"
        );
        let (_, words) = hear(include_str!("samples/D_two_b.err"));
        assert!(
            words
                .complaint()
                .contains("a backup is already in progress"),
            "{words:?}"
        );
    }

    #[test]
    fn a_good_increment_of_pg_probackup() {
        let (told, words) = hear(include_str!("samples/pg_delta.err"));
        let expected = [
            Told::Started {
                version: "2.5.16".into(),
                id: "TOVDT6".into(),
            },
            Told::Checkpoint,
            Told::Checkpoint,
            Told::Size(24 << 20),
            Told::Ended,
        ];
        assert_eq!(told, expected);
        assert_eq!(words.last_line(), "INFO: Backup TOVDT6 completed");
        for (recorded, complaint) in [
            (include_str!("samples/pg_nopw.err"), "no password supplied"),
            (
                include_str!("samples/pg_wrong_password.err"),
                "password authentication failed for user \"postgres\"",
            ),
            (
                include_str!("samples/pg_server_down.err"),
                "Is the server running locally",
            ),
            (
                include_str!("samples/pg_ptrack.err"),
                "does not support ptrack",
            ),
        ] {
            let (_, words) = hear(recorded);
            assert!(words.complaint().contains(complaint), "{words:?}");
        }
    }

    #[test]
    fn a_hang_looks_like_one() {
        let (told, words) = hear(include_str!("samples/D_cbm_off.err"));
        let alive = told.iter().filter(|told| **told == Told::Nothing).count();
        assert_eq!(alive, 13);
        assert_eq!(words.complaint(), "interrupted");
    }

    #[test]
    fn warnings_worth_hearing_are_passed_on() {
        let (told, words) = hear(include_str!("samples/D_ptrack_noparent.err"));
        let warnings: Vec<_> = told
            .into_iter()
            .filter_map(|told| match told {
                Told::Warning(text) => Some(text),
                _ => None,
            })
            .collect();
        assert_eq!(warnings.len(), 2, "{warnings:?}");
        assert!(warnings[0].starts_with("Valid backup on current timeline 1 is not found"));
        assert_eq!(
            words.complaint(),
            "Create new full backup before an incremental one"
        );
    }

    #[test]
    fn a_program_that_says_nothing_of_use() {
        assert_eq!(Words::default().complaint(), "");
        let (_, words) = hear("Segmentation fault\n");
        assert_eq!(words.complaint(), "Segmentation fault");
    }
}
