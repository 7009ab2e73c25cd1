//! Exclusive backup mode, which outlives the program that switched it on: `gs_probackup`'s on a primary of openGauss.
//! (`pg_probackup` has used none since PostgreSQL 9.6, `check_server_version` in its backup.c.)

use std::path::Path;
use std::time::Duration;

use agent_api::ApiError;
use agent_sql::{Flavour, NodeConnection};
use jiff::Timestamp;
use tokio::time::{Instant, sleep};
use tokio_util::sync::CancellationToken;

use crate::engine::attempt::Attempt;

/// The server ends it by itself when the session is gone.
const BY_ITSELF: Duration = Duration::from_secs(5);
const POLL: Duration = Duration::from_millis(200);
/// It waits for the server's archiver.
const STOP: Duration = Duration::from_secs(20);
/// What a server says that has the files of another backup.
const IN_PROGRESS: &str = "a backup is already in progress";
/// What the program's labels end with.
const OURS: &str = " with pg_probackup";

/// Ends the backup `id` on the server, if it is still on there, and says so in `error`.
pub(super) async fn end(attempt: &Attempt<'_>, mut error: ApiError, id: &str) -> ApiError {
    let node = attempt.node;
    if node.sql.flavour() != Flavour::OpenGauss || id.is_empty() {
        return error;
    }
    let label = node.pgdata.join("backup_label");
    let begun = Instant::now();
    loop {
        match tokio::fs::read_to_string(&label).await {
            Ok(text) if is_of(&text, id) => {}
            // None, or somebody else's.
            _ => return error,
        }
        if begun.elapsed() > BY_ITSELF {
            break;
        }
        sleep(POLL).await;
    }
    let ended = async {
        // The operation's own sessions may have been cancelled with it.
        let sql = NodeConnection::connect(&node.options, CancellationToken::new()).await?;
        sql.end_exclusive_backup(STOP).await
    };
    match ended.await {
        Ok(_) => {
            // A killed agent's backup left its `tablespace_map`, which went with this one: the next try finds none.
            if error.message.contains(IN_PROGRESS) {
                error = error.passing();
            }
            error.message.push_str(
                "; the database was still in backup mode, which was ended (pg_stop_backup)",
            );
        }
        Err(left) => {
            let path = Path::new(&label).display();
            error.message = format!(
                "{}; and the database is still in backup mode (`{path}`): {left}",
                error.message
            );
            error.changed = true;
            error.next = Some("end it on the node: SELECT pg_stop_backup();".into());
        }
    }
    error
}

/// Whether a `backup_label` is that of the program's backup `id`: it is named by the second of its start, as the id is.
fn is_of(label: &str, id: &str) -> bool {
    let line = label.lines().find_map(|line| line.strip_prefix("LABEL: "));
    let time = line.and_then(|line| line.strip_suffix(OURS));
    let started = time.and_then(seconds);
    started.is_some() && started == i64::from_str_radix(id, 36).ok()
}

/// `2026-11-21 13:03:40+00`, as `time2iso` writes it, `+HH` or `+HH:MM`.
fn seconds(time: &str) -> Option<i64> {
    let zone = time.rfind(['+', '-'])?;
    let time = match time.get(zone + 1..)? {
        short if short.len() == 2 => format!("{time}:00"),
        _ => time.to_owned(),
    };
    time.replacen(' ', "T", 1)
        .parse::<Timestamp>()
        .ok()
        .map(Timestamp::as_second)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_our_own_backup_is_ended() {
        // Id and start of the sample D_backup.control.
        let label = "START WAL LOCATION: 0/63000028 (file 000000010000000000000063)\nLABEL: 2026-11-21 13:03:40+00 with pg_probackup\n";
        assert!(is_of(label, "TOUSA4"));
        assert!(!is_of(label, "TOUSA5"));
        let zoned = label.replace("13:03:40+00", "18:33:40+05:30");
        assert!(is_of(&zoned, "TOUSA4"));
        assert!(!is_of(&label.replace(OURS, ""), "TOUSA4"));
        assert!(!is_of("LABEL: nightly\n", "TOUSA4") && !is_of("", ""));
    }
}
