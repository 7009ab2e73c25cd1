//! Tests that cannot run here, said so that they can be counted.

use std::fs::OpenOptions;
use std::io::{self, Write as _};

/// Prints the one line `SKIPPED {test}: {why}`.
///
/// `cargo test` hides what a passing test prints, so the line is also appended to the file that
/// `GS_PITR_SKIPS` names, if it is set.
///
/// # Panics
/// If that file cannot be written: an uncounted skip must not pass.
pub fn skip(test: &str, why: &str) {
    let line = format!("SKIPPED {test}: {}\n", why.replace('\n', " "));
    // Not through the captured `print!`, which a passing test's reader never sees.
    let _ = io::stderr().write_all(line.as_bytes());
    if let Some(path) = std::env::var_os("GS_PITR_SKIPS") {
        let file = OpenOptions::new().create(true).append(true).open(&path);
        let written = file.and_then(|mut file| file.write_all(line.as_bytes()));
        written.unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    }
}
