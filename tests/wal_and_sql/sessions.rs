//! Sessions with a real server: ways in, deadlines, what a backup needs of it.

use std::path::Path;
use std::time::{Duration, Instant};

use agent_sql::{ConnectOptions, NodeConnection, Password, Severity, SqlError};
use rustix::process::{Pid, Signal, kill_process};
use support::os::Scratch;
use support::postgres::{ClusterOptions, Installation, SUPERUSER, query_one};
use tokio_util::sync::CancellationToken;

use crate::{log_in, options, settings, start};

#[tokio::test]
async fn passwords_and_ways_in() {
    let scratch = Scratch::new("login");
    let with = ClusterOptions {
        password: Some("s3cret 'quoted'".to_owned()),
        ..ClusterOptions::default()
    };
    let cluster = start(&Installation::newest(), &scratch, with);
    let tcp = |password: Option<&str>| ConnectOptions {
        host: "127.0.0.1".to_owned(),
        password: password.map(Password::new),
        ..options(&cluster)
    };
    let connect = async |options: ConnectOptions| {
        let node = NodeConnection::connect(&options, CancellationToken::new()).await;
        node.map(|node| node.version_num())
    };
    assert!(connect(tcp(Some("s3cret 'quoted'"))).await.is_ok());
    for wrong in [Some("wrong"), None] {
        let error = connect(tcp(wrong)).await.unwrap_err();
        assert!(
            matches!(&error, SqlError::WrongPassword { user, .. } if user == SUPERUSER),
            "{error}"
        );
        assert!(!format!("{error} {error:?}").contains("s3cret"));
    }
    assert!(!format!("{:?}", tcp(Some("s3cret"))).contains("s3cret"));

    let error = connect(ConnectOptions {
        database: "absent".to_owned(),
        ..options(&cluster)
    })
    .await;
    assert!(matches!(error, Err(SqlError::Refused { .. })), "{error:?}");
    let nobody = ConnectOptions {
        port: support::os::free_port(),
        ..options(&cluster)
    };
    let error = connect(nobody.clone()).await;
    assert!(
        matches!(error, Err(SqlError::Unreachable { .. })),
        "{error:?}"
    );
    let error = connect(ConnectOptions {
        host: "127.0.0.1".to_owned(),
        ..nobody
    })
    .await;
    assert!(
        matches!(error, Err(SqlError::Unreachable { .. })),
        "{error:?}"
    );

    // Something that accepts and says nothing.
    let silent = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let mute = ConnectOptions {
        port: silent.local_addr().unwrap().port(),
        connect_timeout: Duration::from_millis(300),
        ..tcp(None)
    };
    let error = connect(mute.clone()).await;
    assert!(
        matches!(error, Err(SqlError::Unreachable { .. })),
        "{error:?}"
    );
    let cancelled = CancellationToken::new();
    cancelled.cancel();
    let error = NodeConnection::connect(&mute, cancelled).await.map(|_| ());
    assert!(
        matches!(error, Err(SqlError::Cancelled { .. })),
        "{error:?}"
    );
}

#[tokio::test]
async fn deadlines_and_cancellation_leave_a_session_that_works() {
    let scratch = Scratch::new("late");
    // A checkpoint that nobody hurries takes its time if there is something to write.
    let with = settings(&[("checkpoint_completion_target", "0.9")]);
    let cluster = start(&Installation::newest(), &scratch, with);
    let mut node = log_in(&cluster).await;
    cluster
        .execute("CREATE TABLE t AS SELECT g, repeat('x', 200) FROM generate_series(1, 50000) g")
        .await;
    let after = Duration::from_millis(300);
    for tries in 1.. {
        let error = node.start_backup("slow", false, after).await.unwrap_err();
        assert!(matches!(error, SqlError::Timeout { .. }), "{error}");
        if !node.is_lost() {
            break;
        }
        // Given up, as the server did not cancel in time. That is for a busy moment only.
        assert!(tries < 5);
        node = log_in(&cluster).await;
    }
    assert!(!node.in_recovery().await.unwrap());

    let cancel = CancellationToken::new();
    let cancellable = node.with_cancel(cancel.clone());
    let begun = Instant::now();
    let (result, ()) = tokio::join!(
        cancellable.start_backup("slow", false, Duration::from_mins(5)),
        async {
            tokio::time::sleep(Duration::from_millis(200)).await;
            cancel.cancel();
        }
    );
    assert!(
        matches!(result, Err(SqlError::Cancelled { .. })),
        "{result:?}"
    );
    assert!(begun.elapsed() < Duration::from_mins(1));
    // The same session, under a token that is not cancelled.
    assert!(cancellable.insert_lsn().await.is_err());
    if node.is_lost() {
        node = log_in(&cluster).await;
    }
    node.start_backup("fast", true, Duration::from_mins(1))
        .await
        .unwrap();
    node.stop_backup().await.unwrap();
    let error = node.stop_backup().await.unwrap_err();
    assert!(
        matches!(&error, SqlError::Server { sqlstate, .. } if sqlstate == "55000"),
        "{error}"
    );
}

/// The server is stopped while it is asked to cancel a statement, which ends by itself meanwhile. What it then does must not
/// hit the next one.
#[tokio::test]
async fn a_late_cancellation_does_not_hit_the_next_statement() {
    let scratch = Scratch::new("latecancel");
    let cluster = start(&Installation::newest(), &scratch, ClusterOptions::default());
    let postmaster = Pid::from_raw(cluster.pid().unwrap().cast_signed()).unwrap();
    let node = log_in(&cluster).await;
    let [first, second, watch] = [
        cluster.connect("postgres").await,
        cluster.connect("postgres").await,
        cluster.connect("postgres").await,
    ];
    let waiting = async |count: &str| {
        let sql = "SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock'";
        while query_one(&watch, sql).await != count {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    let lock = "BEGIN; LOCK TABLE pg_tablespace";
    first.batch_execute(lock).await.unwrap();
    kill_process(postmaster, Signal::STOP).unwrap();

    let cancel = CancellationToken::new();
    let statements = async {
        let cut = node.with_cancel(cancel.clone()).tablespaces().await;
        (cut, node.tablespaces().await)
    };
    let others = async {
        waiting("1").await;
        let queued = async { second.batch_execute(lock).await.unwrap() };
        let meanwhile = async {
            waiting("2").await;
            cancel.cancel();
            tokio::time::sleep(Duration::from_millis(200)).await;
            first.batch_execute("ROLLBACK").await.unwrap();
        };
        tokio::join!(queued, meanwhile);
        tokio::time::sleep(Duration::from_millis(200)).await;
        kill_process(postmaster, Signal::CONT).unwrap();
        tokio::time::sleep(Duration::from_millis(500)).await;
        second.batch_execute("ROLLBACK").await.unwrap();
    };
    let ((cut, next), ()) = tokio::join!(statements, others);
    assert!(matches!(cut, Err(SqlError::Cancelled { .. })), "{cut:?}");
    // On a machine too slow for the server to be heard in time, the session is given up: that is right, too.
    assert!(
        matches!(next, Ok(_) | Err(SqlError::Lost { .. })),
        "{next:?}"
    );
}

#[tokio::test]
async fn a_lost_session_is_noticed_at_once() {
    let scratch = Scratch::new("gone");
    let cluster = start(&Installation::newest(), &scratch, ClusterOptions::default());
    let node = log_in(&cluster).await;
    node.start_backup("doomed", true, Duration::from_mins(1))
        .await
        .unwrap();
    let waiting = node.clone();
    let waiting = tokio::spawn(async move { waiting.wait_lost().await });
    cluster
        .execute("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name = 'wal_and_sql'")
        .await;
    let lost = tokio::time::timeout(Duration::from_secs(30), waiting)
        .await
        .unwrap()
        .unwrap();
    assert!(lost.session_is_gone(), "{lost}");
    let error = node.stop_backup().await.unwrap_err();
    assert!(error.session_is_gone(), "{error}");
    assert!(node.is_lost());

    let node = log_in(&cluster).await;
    cluster.stop("immediate");
    let error = node.flush_lsn().await.unwrap_err();
    assert!(error.session_is_gone(), "{error}");
}

/// Each refusal comes with a line that mends it.
#[tokio::test]
async fn preflight_says_what_is_missing_and_what_mends_it() {
    let scratch = Scratch::new("fit");
    let with = ClusterOptions {
        data_checksums: true,
        ..settings(&[("max_slot_wal_keep_size", "1GB")])
    };
    let cluster = start(&Installation::newest(), &scratch, with);
    assert_eq!(log_in(&cluster).await.preflight().await.unwrap(), []);
    cluster.execute("CREATE ROLE \"plain user\" LOGIN").await;
    let plain = ConnectOptions {
        user: "plain user".to_owned(),
        ..options(&cluster)
    };
    let node = NodeConnection::connect(&plain, CancellationToken::new())
        .await
        .unwrap();
    let error = node.server_facts().await.unwrap_err();
    assert!(
        matches!(&error, SqlError::Privilege { grant, .. } if grant == "GRANT pg_monitor TO \"plain user\";"),
        "{error}"
    );
    let error = node.create_restore_point("p").await.unwrap_err();
    assert!(matches!(error, SqlError::Privilege { .. }), "{error}");
    assert!(node.create_slot("s").await.is_err());
    let findings = node.preflight().await.unwrap();
    assert_eq!(findings.len(), 6, "{findings:?}");
    for finding in findings {
        assert_eq!(finding.severity, Severity::Refusal);
        cluster.execute(&finding.mend.unwrap()).await;
    }
    assert_eq!(node.preflight().await.unwrap(), []);
    // What was granted is enough for a whole backup.
    let facts = node.server_facts().await.unwrap();
    assert!(!facts.files.sources_complete || facts.files.sources.len() > 1);
    assert!(node.size_bytes().await.unwrap() > 0);
    node.create_slot("s").await.unwrap();
    node.start_backup("l", true, Duration::from_mins(1))
        .await
        .unwrap();
    node.create_restore_point("p").await.unwrap();
    node.stop_backup().await.unwrap();
    let switched = node.switch_wal().await.unwrap();
    node.advance_slot("s", switched).await.unwrap();
    node.drop_slot("s").await.unwrap();
}

#[tokio::test]
async fn preflight_refuses_settings_that_break_backups() {
    let scratch = Scratch::new("unfit");
    let with = settings(&[
        ("wal_level", "minimal"),
        ("max_wal_senders", "0"),
        ("fsync", "off"),
        ("full_page_writes", "off"),
        ("max_replication_slots", "0"),
    ]);
    let cluster = start(&Installation::newest(), &scratch, with);
    let findings = log_in(&cluster).await.preflight().await.unwrap();
    for (severity, what) in [
        (Severity::Refusal, "wal_level"),
        (Severity::Refusal, "fsync"),
        (Severity::Refusal, "full_page_writes"),
        (Severity::Refusal, "replication slots"),
        (Severity::Warning, "max_slot_wal_keep_size"),
        (Severity::Warning, "checksums"),
    ] {
        let found = findings
            .iter()
            .any(|f| f.severity == severity && f.what.contains(what) && f.mend.is_some());
        assert!(found, "{what}: {findings:?}");
    }
    assert_eq!(findings.len(), 6, "{findings:?}");
}

#[tokio::test]
async fn names_slots_and_files() {
    let scratch = Scratch::new("names");
    let with = ClusterOptions {
        config_outside: true,
        ..settings(&[("max_replication_slots", "1")])
    };
    let cluster = start(&Installation::newest(), &scratch, with);
    let node = log_in(&cluster).await;
    let long = "x".repeat(64);
    for bad in ["", &long, "é", "a\nb"] {
        let error = node.create_restore_point(bad).await.unwrap_err();
        assert!(matches!(error, SqlError::BadName { .. }), "{error}");
    }
    node.create_restore_point("it's \\ \"63\"").await.unwrap();
    node.create_slot("a").await.unwrap();
    let error = node.create_slot("a").await.unwrap_err();
    assert!(
        matches!(&error, SqlError::Server { sqlstate, .. } if sqlstate == "42710"),
        "{error}"
    );
    let error = node.create_slot("b").await.unwrap_err();
    assert!(
        matches!(
            error,
            SqlError::Setting {
                name: "max_replication_slots",
                ..
            }
        ),
        "{error}"
    );
    assert!(node.slot("b").await.unwrap().is_none());

    let files = node.server_facts().await.unwrap().files;
    let etc = cluster.root().join("etc");
    assert_eq!(Path::new(&files.config_file), etc.join("postgresql.conf"));
    assert_eq!(Path::new(&files.hba_file), etc.join("pg_hba.conf"));
    assert_eq!(Path::new(&files.ident_file), etc.join("pg_ident.conf"));
    let pid_file = cluster.root().join("external.pid");
    assert_eq!(files.external_pid_file.as_deref(), pid_file.to_str());
    assert_eq!(
        files.unix_socket_directories,
        [cluster.root().to_str().unwrap()]
    );
    assert_eq!(files.data_directory_mode, 0o700);
    assert!(files.sources_complete);
    for name in ["postgresql.conf", "conf.d/extra.conf"] {
        let path = etc.join(name).to_str().unwrap().to_owned();
        assert!(files.sources.contains(&path), "{:?}", files.sources);
    }
    assert_eq!(files.stats_temp_directory.is_some(), node.major() < 15);
}
