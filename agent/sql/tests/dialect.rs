//! The dialect of openGauss, against a double that answers what a running openGauss 5.0.0 answered.
//!
//! Each answer stands with the recording it is from: A consistent points, D `gs_probackup`, E log-in, F slots and settings.

#![allow(
    clippy::unwrap_used,
    reason = "a panic is a failed test, with its reason"
)]

use std::time::Duration;

use agent_sql::{ConnectOptions, Flavour, Lsn, NodeConnection, Password, Severity, SqlError};
use dialect::double::{Double, PASSWORD, Reply};
use tokio_util::sync::CancellationToken;

mod dialect {
    pub(crate) mod double;
}

/// `E_tokio.txt`.
const VERSION: &str = "(openGauss 5.0.0 build ) compiled at 2026-11-21 11:14:28 commit 0 last mr   on \
                       x86_64-unknown-linux-gnu, compiled by g++ (Debian 12.2.0-14+deb12u1) 12.2.0, 64-bit";

fn row(values: &[&str]) -> Vec<Option<String>> {
    // An empty text is NULL in a database of the Oracle kind.
    let value = |text: &&str| (!text.is_empty()).then(|| (*text).to_owned());
    values.iter().map(value).collect()
}

#[expect(clippy::unnecessary_wraps, reason = "as the others")]
fn rows(all: &[&[&str]]) -> Option<Reply> {
    Some(Ok(all.iter().map(|values| row(values)).collect()))
}

/// By what a statement has in it; the first that fits.
fn recorded(sql: &str) -> Option<Reply> {
    let has = |part: &str| sql.contains(part);
    if has("SHOW server_version_num") {
        rows(&[&["90204"]])
    } else if has("version()") {
        rows(&[&[VERSION]])
    } else if has("SET statement_timeout") {
        rows(&[])
    } else if has("pg_create_restore_point('refused')") {
        // A_privileges.txt.
        let words =
            "Must be system admin or operator admin in operation mode to create a restore point.";
        Some(Err(("42501", words)))
    } else if has("pg_create_restore_point") {
        // A_rp_flush.txt.
        rows(&[&["0/2B0002E8"]])
    } else if has("pg_switch_xlog") {
        // A_idle.txt.
        rows(&[&["0/C014080"]])
    } else if has("pg_xlogfile_name") {
        // A_idle.txt, F_slots.txt.
        rows(&[&["0/D000A60", "0/D0013B8", "00000001"]])
    } else if has("SELECT pg_current_xlog_location()") {
        rows(&[&["0/16006308"]])
    } else if has("gs_get_next_xid_csn") {
        // A_point.txt.
        rows(&[&["13203:812"]])
    } else if has("pg_locks") {
        // A_point.txt: the younger of two open transactions, and a prepared one.
        rows(&[
            &[
                "139761893185216",
                "pgbench",
                "idle in transaction",
                "postgres",
                "1200",
                "",
                "",
                "2",
            ],
            &["", "", "", "postgres", "700", "p1", "og", "2"],
        ])
    } else if has("pg_control_system") {
        // F_slots.txt, A_idle.txt.
        rows(&[&["215046882207012340", "201611171", "1", "f"]])
    } else if has("SELECT name, setting FROM pg_settings") {
        rows(SETTINGS)
    } else if has("sourcefile") {
        rows(&[&["/data/pgdata/postgresql.conf"]])
    } else if has("pg_tablespace_location") {
        rows(&[
            &["1663", "pg_default", ""],
            &["1664", "pg_global", ""],
            &["16390", "ts", "/data/ts"],
        ])
    } else if has("pg_is_in_recovery") || has("rolsystemadmin") {
        rows(&[&["f"]])
    } else if has("pg_stat_get_wal_senders") {
        rows(&[&["4"]])
    } else if has("pg_stat_replication") {
        rows(&[&["walsnd", "", "Streaming"], &["", "10.0.0.2", ""]])
    } else if has("SELECT pg_stop_backup()") {
        // A_privileges.txt.
        rows(&[&["0/1A000180"]])
    } else {
        None
    }
}

/// `F_slots.txt`, and the constants of the source.
const SETTINGS: &[&[&str]] = &[
    &["data_directory", "/data/pgdata"],
    &["port", "5432"],
    &["config_file", "/data/pgdata/postgresql.conf"],
    &["hba_file", "/data/pgdata/pg_hba.conf"],
    &["ident_file", "/data/pgdata/pg_ident.conf"],
    &["external_pid_file", ""],
    &["unix_socket_directory", "/tmp"],
    &["wal_segment_size", "2048"],
    &["wal_block_size", "8192"],
    &["block_size", "8192"],
    &["wal_level", "hot_standby"],
    &["fsync", "on"],
    &["enable_cbm_tracking", "off"],
    &["max_wal_senders", "4"],
];

fn options(port: u16) -> ConnectOptions {
    ConnectOptions {
        host: "127.0.0.1".to_owned(),
        port,
        user: "og".to_owned(),
        password: Some(Password::new(PASSWORD)),
        ..ConnectOptions::default()
    }
}

async fn log_in(port: u16) -> NodeConnection {
    NodeConnection::connect(&options(port), CancellationToken::new())
        .await
        .unwrap()
}

#[tokio::test]
async fn a_log_in_by_sha256_is_one_connection() {
    let (double, port) = Double::start(10_000, recorded).await;
    let node = log_in(port).await;
    assert_eq!(node.flavour(), Flavour::OpenGauss);
    assert_eq!(node.version(), "openGauss 5.0.0");
    let heard = double.heard();
    assert_eq!(heard[..2], ["protocol 3.0", "password"]);
    // Its own time-out of idle sessions must not end ours.
    assert!(
        heard
            .iter()
            .any(|sql| sql.contains("SET session_timeout = 0"))
    );
}

#[tokio::test]
async fn another_number_of_rounds_takes_a_second_connection() {
    let (double, port) = Double::start(20_000, recorded).await;
    assert_eq!(log_in(port).await.flavour(), Flavour::OpenGauss);
    let heard = double.heard();
    assert_eq!(heard[..3], ["protocol 3.0", "protocol 3.51", "password"]);
}

#[tokio::test]
async fn a_wrong_password_is_tried_once() {
    let (double, port) = Double::start(10_000, recorded).await;
    let wrong = ConnectOptions {
        password: Some(Password::new("wrong")),
        ..options(port)
    };
    let outcome = NodeConnection::connect(&wrong, CancellationToken::new()).await;
    let error = outcome.map(|_| ()).unwrap_err();
    assert!(
        matches!(&error, SqlError::WrongPassword { user, message }
            if user == "og" && message == "Invalid username/password,login denied."),
        "{error:?}"
    );
    // The server locks the user after ten.
    let tries = double.heard();
    let tries = tries.iter().filter(|heard| *heard == "password").count();
    assert_eq!(tries, 1);

    let none = ConnectOptions {
        password: None,
        ..options(port)
    };
    let outcome = NodeConnection::connect(&none, CancellationToken::new()).await;
    let error = outcome.map(|_| ()).unwrap_err();
    assert!(matches!(error, SqlError::WrongPassword { .. }), "{error:?}");
}

#[tokio::test]
async fn points_and_positions_are_read() {
    let (double, port) = Double::start(10_000, recorded).await;
    let node = log_in(port).await;
    let lsn = |text: &str| text.parse::<Lsn>().unwrap();
    assert_eq!(
        node.create_restore_point("p").await.unwrap(),
        lsn("0/2B0002E8")
    );
    assert_eq!(node.switch_wal().await.unwrap(), lsn("0/C014080"));
    assert_eq!(node.flush_lsn().await.unwrap(), lsn("0/16006308"));
    let position = node.wal_position().await.unwrap();
    assert_eq!(position.flush, lsn("0/D000A60"));
    assert_eq!(position.insert, lsn("0/D0013B8"));
    assert_eq!(position.timeline, 1);
    let ended = node
        .end_exclusive_backup(Duration::from_secs(5))
        .await
        .unwrap();
    assert_eq!(ended, Some(lsn("0/1A000180")));

    let error = node.create_restore_point("refused").await.unwrap_err();
    assert!(
        matches!(&error, SqlError::Privilege { grant, .. } if grant == "ALTER USER og SYSADMIN;"),
        "{error:?}"
    );
    // Nothing of PostgreSQL's is sent.
    let heard = double.heard().join("\n");
    for foreign in [
        "wal_lsn",
        "switch_wal",
        "walfile",
        "lock_timeout =",
        "pg_backup",
    ] {
        assert!(!heard.contains(foreign), "{foreign}");
    }
}

#[tokio::test]
async fn transactions_are_looked_at() {
    let (_double, port) = Double::start(10_000, recorded).await;
    let node = log_in(port).await;
    assert_eq!(node.transaction_snapshot().await.unwrap(), "13203:812");
    let holders = node.xid_holders().await.unwrap();
    assert_eq!(holders.total, 2);
    // A thread's number does not fit in 32 bits.
    assert_eq!(holders.oldest[0].pid, Some(139_761_893_185_216));
    assert_eq!(holders.oldest[0].prepared, None);
    assert_eq!(holders.oldest[1].pid, None);
    let prepared = ("p1".to_owned(), "og".to_owned());
    assert_eq!(holders.oldest[1].prepared, Some(prepared));
}

#[tokio::test]
async fn the_server_describes_itself() {
    let (_double, port) = Double::start(10_000, recorded).await;
    let node = log_in(port).await;
    let facts = node.server_facts().await.unwrap();
    assert_eq!(facts.flavour, Flavour::OpenGauss);
    assert_eq!(facts.server_version_num, 90_204);
    assert_eq!(facts.system_identifier, 215_046_882_207_012_340);
    assert_eq!(facts.catalog_version, 201_611_171);
    assert_eq!(facts.wal_segment_size, 16 << 20);
    assert_eq!(facts.timeline, 1);
    assert!(!facts.in_recovery);
    assert_eq!(facts.files.unix_socket_directories, ["/tmp"]);
    assert_eq!(facts.files.external_pid_file, None);
    let spaces: Vec<_> = facts
        .tablespaces
        .iter()
        .map(|space| &space.location[..])
        .collect();
    assert_eq!(spaces, ["/data/ts"]);
    let receivers = node.wal_receivers().await.unwrap();
    assert_eq!(receivers[0].application, "walsnd");
    assert_eq!(receivers[1].address.as_deref(), Some("10.0.0.2"));
}

#[tokio::test]
async fn what_stands_in_the_way_is_found() {
    let (_double, port) = Double::start(10_000, recorded).await;
    let node = log_in(port).await;
    let found = node.preflight().await.unwrap();
    let names = |severity| {
        let of = found.iter().filter(|found| found.severity == severity);
        of.map(|found| found.name).collect::<Vec<_>>()
    };
    assert_eq!(names(Severity::Refusal), ["privileges", "max_wal_senders"]);
    assert_eq!(names(Severity::Warning), ["enable_cbm_tracking"]);
    for finding in &found {
        assert!(finding.mend.is_some(), "{finding:?}");
    }
    let direct = node.start_backup("x", true, Duration::from_secs(1)).await;
    assert!(matches!(direct, Err(SqlError::Unsupported { .. })));
    assert!(node.create_slot("gs_pitr_00000000").await.is_err());
    assert!(node.slots_like("gs_pitr_").await.unwrap().is_empty());
}

#[tokio::test]
async fn a_statement_that_is_too_late_is_cancelled_at_the_server() {
    let (_double, port) = Double::start(10_000, recorded).await;
    let node = log_in(port).await;
    let hurried = CancellationToken::new();
    let hurry = hurried.clone();
    // The double sleeps over this name.
    let asked = node.with_cancel(hurried);
    let asked = tokio::spawn(async move { asked.sessions_named("pg_sleep").await });
    tokio::time::sleep(Duration::from_millis(200)).await;
    hurry.cancel();
    let outcome = asked.await.unwrap();
    assert!(
        matches!(outcome, Err(SqlError::Cancelled { .. })),
        "{outcome:?}"
    );
    // The answer came after all: the session is as good as before.
    assert!(!node.is_lost());
    assert!(!node.in_recovery().await.unwrap());
}

#[tokio::test]
async fn a_postgresql_of_that_age_is_refused() {
    let (_double, port) = Double::start(10_000, |sql| {
        if sql.contains("version()") {
            return rows(&[&["PostgreSQL 9.2.4 on x86_64-unknown-linux-gnu"]]);
        }
        recorded(sql)
    })
    .await;
    let outcome = NodeConnection::connect(&options(port), CancellationToken::new()).await;
    let error = outcome.map(|_| ()).unwrap_err();
    assert!(matches!(error, SqlError::Setting { .. }), "{error:?}");
}
