//! The client of a ShardingSphere-Proxy, against a scripted one that says what a running 5.5.2 said, and what others do.

#![allow(
    clippy::unwrap_used,
    reason = "a panic is a failed test, with its reason"
)]

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use agent_sql::proxy::{
    Clock, Effect, Gate, LockReply, ProxyConnection, ProxyOptions, ProxyTls, UnlockReply, effect,
};
use agent_sql::{Password, SqlError};
use proxy::scripted::{FrontEnd, PASSWORD, Say, Scripted, USER};
use rustls::ServerConfig;
use rustls::crypto::aws_lc_rs;
use rustls_pki_types::PrivateKeyDer;
use tokio_util::sync::CancellationToken;

mod proxy {
    pub(crate) mod scripted;
}

/// For what is answered at once, on any machine.
const PATIENT: Duration = Duration::from_secs(15);
/// For what is not answered.
const SOON: Duration = Duration::from_millis(200);
const ALL: [FrontEnd; 3] = [FrontEnd::Md5, FrontEnd::Cleartext, FrontEnd::Gauss];

// Recorded from 5.5.2.
const LOCK_TIMEOUT: &str = r#"LOCK CLUSTER WITH LOCK_STRATEGY(TYPE(NAME="WRITE")) TIMEOUT 700"#;
const LOCK_PLAIN: &str = r#"LOCK CLUSTER WITH LOCK_STRATEGY(TYPE(NAME="WRITE"))"#;
const PROBE: &str = r#"LABEL COMPUTE NODE "gs_pitr_probe" WITH probe"#;
const NO_TIMEOUT_GIVEN: Say = Say::Error(
    "58000",
    "Unknown exception.\nMore details: java.lang.NumberFormatException: Cannot parse null string",
);
const SYNTAX: Say = Say::Error(
    "99999",
    "You have an error in your SQL syntax: LOCK CLUSTER ... TIMEOUT 700, null",
);
const STATE_LOCK: &str =
    "The cluster state is READ_ONLY, can not support SQL statement 'LockClusterStatement'.";
const STATE_LABEL: &str =
    "The cluster state is READ_ONLY, can not support SQL statement 'LabelComputeNodeStatement'.";

fn options(port: u16) -> ProxyOptions {
    ProxyOptions {
        port,
        user: USER.to_owned(),
        password: Some(Password::new(PASSWORD)),
        connect_timeout: PATIENT,
        ..ProxyOptions::default()
    }
}

async fn log_in(proxy: &Scripted) -> ProxyConnection {
    ProxyConnection::connect(&options(proxy.port), CancellationToken::new())
        .await
        .unwrap()
}

async fn refused(options: &ProxyOptions) -> SqlError {
    let outcome = ProxyConnection::connect(options, CancellationToken::new()).await;
    outcome.map(|_| ()).unwrap_err()
}

fn rows(all: &[&[&str]]) -> Say {
    let row = |values: &&[&str]| values.iter().map(|it| Some((*it).to_owned())).collect();
    Say::Rows(all.iter().map(row).collect())
}

#[tokio::test]
async fn every_front_end_lets_us_in_and_names_what_is_wrong() {
    for front_end in ALL {
        let proxy = Scripted::start(front_end, |_| Say::Success).await;
        let connection = log_in(&proxy).await;
        assert_eq!(connection.probe(PATIENT).await.unwrap(), Gate::Open);
        assert_eq!(proxy.heard(), ["log-in", PROBE], "{front_end:?}");

        let good = options(proxy.port);
        let wrong = ProxyOptions {
            password: Some(Password::new("wrong")),
            ..good.clone()
        };
        let error = refused(&wrong).await;
        assert!(
            matches!(&error, SqlError::WrongPassword { user, .. } if user == USER),
            "{error:?}"
        );
        let none = ProxyOptions {
            password: None,
            ..good.clone()
        };
        let error = refused(&none).await;
        assert!(matches!(error, SqlError::WrongPassword { .. }), "{error:?}");
        let nobody = ProxyOptions {
            user: "nobody".to_owned(),
            ..good.clone()
        };
        let error = refused(&nobody).await;
        assert!(
            matches!(&error, SqlError::Refused { message, .. } if message.contains("unknown username")),
            "{error:?}"
        );
        let nowhere = ProxyOptions {
            database: "nowhere".to_owned(),
            ..good
        };
        let error = refused(&nowhere).await;
        assert!(matches!(error, SqlError::Refused { .. }), "{error:?}");
        assert_eq!(effect(&error), Effect::None);
    }
}

#[tokio::test]
async fn nobody_at_home_is_said_in_time() {
    let free = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let port = free.local_addr().unwrap().port();
    drop(free);
    let error = refused(&options(port)).await;
    assert!(matches!(error, SqlError::Unreachable { .. }), "{error:?}");

    // One that takes the connection and says nothing: the kernel does that for a frozen one.
    let frozen = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let impatient = ProxyOptions {
        connect_timeout: SOON,
        ..options(frozen.local_addr().unwrap().port())
    };
    let begun = Instant::now();
    let error = refused(&impatient).await;
    assert!(matches!(error, SqlError::Unreachable { .. }), "{error:?}");
    assert!(begun.elapsed() < PATIENT);

    let cancelled = CancellationToken::new();
    cancelled.cancel();
    let outcome = ProxyConnection::connect(&impatient, cancelled).await;
    assert!(matches!(
        outcome.map(|_| ()).unwrap_err(),
        SqlError::Cancelled { .. }
    ));
}

/// The forms of 5.5.2 (TIMEOUT required), 5.5.1 (unknown) and 5.5.3 (as you like).
#[tokio::test]
async fn the_form_that_a_release_knows_is_found_and_remembered() {
    type Script = fn(&str) -> Say;
    let wait = Duration::from_millis(700);
    let releases: [(&str, Script, &[&str]); 3] = [
        (
            "5.5.2",
            |sql| {
                if sql.contains("TIMEOUT") {
                    Say::Success
                } else {
                    NO_TIMEOUT_GIVEN
                }
            },
            &[LOCK_TIMEOUT, "UNLOCK CLUSTER TIMEOUT 700", LOCK_TIMEOUT],
        ),
        (
            "5.5.1",
            |sql| {
                if sql.contains("TIMEOUT") {
                    SYNTAX
                } else {
                    Say::Success
                }
            },
            &[LOCK_TIMEOUT, LOCK_PLAIN, "UNLOCK CLUSTER", LOCK_PLAIN],
        ),
        (
            "5.5.3",
            |_| Say::Success,
            &[LOCK_TIMEOUT, "UNLOCK CLUSTER TIMEOUT 700", LOCK_TIMEOUT],
        ),
    ];
    for (release, script, heard) in releases {
        let proxy = Scripted::start(FrontEnd::Md5, script).await;
        let connection = log_in(&proxy).await;
        assert_eq!(
            connection.lock(wait, PATIENT).await.unwrap(),
            LockReply::Said
        );
        assert_eq!(
            connection.unlock(wait, PATIENT).await.unwrap(),
            UnlockReply::Said
        );
        connection.clone().lock(wait, PATIENT).await.unwrap();
        assert_eq!(proxy.heard()[1..], *heard, "{release}");
    }
}

#[tokio::test]
async fn refusals_are_told_from_failures() {
    for locked in [STATE_LOCK, "Cluster is already locked."] {
        let proxy = Scripted::start(FrontEnd::Gauss, move |sql| match sql {
            PROBE => Say::Error("58000", STATE_LABEL),
            _ => Say::Error("58000", locked),
        })
        .await;
        let connection = log_in(&proxy).await;
        let reply = connection.lock(PATIENT, PATIENT).await.unwrap();
        assert_eq!(reply, LockReply::AlreadyLocked(locked.to_owned()));
        let gate = connection.probe(PATIENT).await.unwrap();
        assert_eq!(gate, Gate::Locked(STATE_LABEL.to_owned()));
        assert!(!connection.is_lost());
    }
    let proxy = Scripted::start(FrontEnd::Md5, |sql| {
        if sql.starts_with("UNLOCK") {
            Say::Error("58000", "Cluster is not locked.")
        } else if sql == PROBE {
            Say::Error("44000", "Mode must be 'cluster'.")
        } else {
            Say::Error("58000", "Cluster repository persist error.")
        }
    })
    .await;
    let connection = log_in(&proxy).await;
    assert_eq!(
        connection.unlock(PATIENT, PATIENT).await.unwrap(),
        UnlockReply::NotLocked
    );
    let error = connection.probe(PATIENT).await.unwrap_err();
    assert_eq!(effect(&error), Effect::None, "{error}");
    // ZooKeeper may have taken it.
    let error = connection.lock(PATIENT, PATIENT).await.unwrap_err();
    assert_eq!(effect(&error), Effect::Unknown, "{error}");
    assert!(!connection.is_lost());
}

#[tokio::test]
async fn a_reply_that_is_lost_leaves_the_outcome_open() {
    for lost in [Say::HangUp, Say::Nothing] {
        let silent = matches!(lost, Say::Nothing);
        let proxy = Scripted::start(FrontEnd::Md5, move |_| lost.clone()).await;
        let connection = log_in(&proxy).await;
        let begun = Instant::now();
        let error = connection.lock(SOON, SOON).await.unwrap_err();
        assert!(begun.elapsed() < PATIENT);
        assert_eq!(effect(&error), Effect::Unknown, "{error}");
        assert_eq!(matches!(error, SqlError::Timeout { .. }), silent, "{error}");
        assert!(connection.is_lost());
        // What comes after it is not sent, and that is known.
        let error = connection.unlock(SOON, SOON).await.unwrap_err();
        assert_eq!(effect(&error), Effect::None, "{error}");
        assert_eq!(proxy.heard().len(), 2);
    }
}

/// Recorded: FATAL is said of a database that is not there, and the session goes on; it is said of an end, too.
#[tokio::test]
async fn a_severity_says_nothing_of_the_session() {
    let proxy = Scripted::start(FrontEnd::Gauss, |sql| {
        if sql == PROBE {
            Say::Success
        } else if sql.starts_with("SHOW") {
            Say::Fatal("3D000", "Unknown database 'nowhere'.")
        } else {
            Say::LastWords("57P01", "terminating connection")
        }
    })
    .await;
    let connection = log_in(&proxy).await;
    let error = connection
        .storage_units("nowhere", PATIENT)
        .await
        .unwrap_err();
    assert!(matches!(error, SqlError::Server { .. }), "{error}");
    assert_eq!(connection.probe(PATIENT).await.unwrap(), Gate::Open);
    let error = connection.lock(PATIENT, PATIENT).await.unwrap_err();
    assert_eq!(effect(&error), Effect::Unknown, "{error}");
    connection.probe(PATIENT).await.unwrap_err();
    assert!(connection.is_lost());
}

#[tokio::test]
async fn a_late_reply_meets_no_later_statement() {
    let late = Say::Late(2 * SOON, Box::new(Say::Error("58000", STATE_LABEL)));
    let proxy = Scripted::start(FrontEnd::Md5, move |sql| match sql {
        PROBE => late.clone(),
        _ => Say::Success,
    })
    .await;
    let connection = log_in(&proxy).await;
    let error = connection.probe(SOON).await.unwrap_err();
    assert!(matches!(error, SqlError::Timeout { .. }), "{error}");
    tokio::time::sleep(2 * SOON).await;
    let error = connection.unlock(SOON, SOON).await.unwrap_err();
    assert!(matches!(error, SqlError::Unreachable { .. }), "{error}");
    // In time is not late.
    let again = log_in(&proxy).await;
    let gate = again.probe(PATIENT).await.unwrap();
    assert_eq!(gate, Gate::Locked(STATE_LABEL.to_owned()));
}

#[tokio::test]
async fn a_cancelled_handle_says_nothing_more_and_another_one_can_unlock() {
    let proxy = Scripted::start(FrontEnd::Md5, |_| Say::Success).await;
    let token = CancellationToken::new();
    let connection = ProxyConnection::connect(&options(proxy.port), token.clone())
        .await
        .unwrap();
    token.cancel();
    let error = connection.lock(SOON, PATIENT).await.unwrap_err();
    assert_eq!(effect(&error), Effect::None, "{error}");
    let other = connection.with_cancel(CancellationToken::new());
    assert_eq!(
        other.unlock(SOON, PATIENT).await.unwrap(),
        UnlockReply::Said
    );
    other.close();
    assert!(connection.is_lost());
}

#[tokio::test]
async fn statements_wait_their_turn_but_not_for_ever() {
    let busy = Arc::new(AtomicBool::new(false));
    let begun = Arc::clone(&busy);
    let proxy = Scripted::start(FrontEnd::Md5, move |_| {
        begun.store(true, Ordering::SeqCst);
        Say::Late(3 * SOON, Box::new(Say::Success))
    })
    .await;
    let connection = log_in(&proxy).await;
    let first = connection.clone();
    let first = tokio::spawn(async move { first.probe(PATIENT).await });
    while !busy.load(Ordering::SeqCst) {
        tokio::task::yield_now().await;
    }
    let error = connection.probe(SOON / 4).await.unwrap_err();
    assert_eq!(effect(&error), Effect::None, "{error}");
    // The one under way is not disturbed by it.
    assert_eq!(first.await.unwrap().unwrap(), Gate::Open);
    assert_eq!(connection.probe(PATIENT).await.unwrap(), Gate::Open);
}

const STORAGE_NODES: &str = r#"{"storage_nodes":{"bank":[{"ip":"127.0.0.1","port":"35431","username":"ss","password":"ss_pw_0","database":"bank_0"},{"ip":"127.0.0.1","port":"35432","username":"ss","password":"ss_pw_0","database":"bank_1"}]}}"#;

/// Recorded from 5.5.2, but for the lists that other releases have.
fn tables(sql: &str) -> Say {
    match sql {
        "SHOW COMPUTE NODES" => rows(&[
            &[
                "9f9ce8e6-f9b9-47b0-99da-54974c56b3be",
                "PROXY",
                "192.0.2.2",
                "33307",
                "OK",
                "Cluster",
                "1",
                "",
                "5.5.2",
                "",
            ],
            // Without the last column, as before 5.5.2; inside a program.
            &[
                "11cac457-6cfb-4262-8c2c-acaaf70f489c",
                "JDBC",
                "192.0.2.3",
                "-1",
                "OK",
                "Cluster",
                "0",
                "",
                "5.5.1",
                "",
            ],
        ]),
        "EXPORT STORAGE NODES" => rows(&[&["id", "2026-11-21T23:57:27", STORAGE_NODES]]),
        "SHOW GLOBAL CLOCK RULE" => rows(&[&[
            "TSO",
            "redis",
            "true",
            r#"{"host":"127.0.0.1","port":26379}"#,
        ]]),
        "SHOW STORAGE UNITS FROM `bank`" => rows(&[&[
            "ds_0",
            "PostgreSQL",
            "127.0.0.1",
            "35431",
            "bank_0",
            "30000",
            "60000",
        ]]),
        _ => Say::Error("42601", "syntax error"),
    }
}

#[tokio::test]
async fn what_a_cluster_says_of_itself_is_read() {
    let proxy = Scripted::start(FrontEnd::Md5, tables).await;
    let connection = log_in(&proxy).await;
    let nodes = connection.compute_nodes(PATIENT).await.unwrap();
    let seen: Vec<_> = nodes
        .iter()
        .map(|node| {
            (
                node.kind.as_str(),
                node.host.as_str(),
                node.port,
                node.version.as_str(),
            )
        })
        .collect();
    assert_eq!(
        seen,
        [
            ("PROXY", "192.0.2.2", 33307, "5.5.2"),
            ("JDBC", "192.0.2.3", 0, "5.5.1")
        ]
    );
    assert_eq!(
        (nodes[0].status.as_str(), nodes[0].mode.as_str()),
        ("OK", "Cluster")
    );

    let nodes = connection.export_storage_nodes(PATIENT).await.unwrap();
    assert_eq!(nodes.len(), 2);
    assert_eq!(
        (nodes[1].host.as_str(), nodes[1].port),
        ("127.0.0.1", 35432)
    );
    assert_eq!(
        (nodes[1].user.as_str(), nodes[1].database.as_str()),
        ("ss", "bank_1")
    );
    assert_eq!(nodes[1].logical_database, "bank");
    assert!(!format!("{nodes:?}").contains("ss_pw_0"));

    let units = connection.storage_units("bank", PATIENT).await.unwrap();
    assert_eq!(units.len(), 1);
    assert_eq!((units[0].name.as_str(), units[0].port), ("ds_0", 35431));
    let error = connection.storage_units("a`b", PATIENT).await.unwrap_err();
    assert!(matches!(error, SqlError::BadName { .. }), "{error}");

    let clock = connection.clock(PATIENT).await.unwrap();
    let provider = "redis".to_owned();
    assert_eq!(clock, Clock::Tso { provider });
}

#[tokio::test]
async fn clocks_that_are_off_or_not_known_are_told_apart() {
    let cases = [
        (rows(&[&["TSO", "local", "false", ""]]), Clock::Off),
        (rows(&[&["HLC", "x", "true", ""]]), Clock::Unknown),
        (SYNTAX, Clock::Unknown),
        (Say::Rows(Vec::new()), Clock::Unknown),
    ];
    for (say, expected) in cases {
        let proxy = Scripted::start(FrontEnd::Md5, move |_| say.clone()).await;
        let connection = log_in(&proxy).await;
        assert_eq!(connection.clock(PATIENT).await.unwrap(), expected);
    }
}

async fn exported(text: &str) -> Result<agent_sql::proxy::ExportedMetadata, SqlError> {
    let say = rows(&[&["id", "time", text]]);
    let proxy = Scripted::start(FrontEnd::Md5, move |_| say.clone()).await;
    log_in(&proxy).await.export_metadata(PATIENT).await
}

#[tokio::test]
async fn metadata_comes_in_base64_or_in_clear_and_is_never_shown() {
    let json = r#"{"meta_data":{"props":"hidden"},"snapshot_info":{"csn":"2147483750","create_time":"x"}}"#;
    let in_base64 = "eyJtZXRhX2RhdGEiOnsicHJvcHMiOiJoaWRkZW4ifSwic25hcHNob3RfaW5mbyI6eyJjc24iOiIyMTQ3NDgzNzUwIiwiY3JlYXRlX3RpbWUiOiJ4In19";
    for text in [json, in_base64] {
        let metadata = exported(text).await.unwrap();
        assert_eq!(metadata.json, json);
        assert_eq!(metadata.csn().as_deref(), Some("2147483750"));
        assert!(!format!("{metadata:?}").contains("hidden"));
    }
    for (text, csn) in [
        (r#"{"meta_data":{}}"#, None),
        (r#"{"snapshot_info":{"csn":7}}"#, Some("7")),
        (r#"{"snapshot_info":null}"#, None),
    ] {
        assert_eq!(exported(text).await.unwrap().csn().as_deref(), csn);
    }
    for damaged in ["hidden!", "aGlkZGVu", ""] {
        let error = exported(damaged).await.unwrap_err();
        assert!(matches!(error, SqlError::Answer { .. }), "{error}");
        assert!(!error.to_string().contains("hidden"), "{error}");
    }
}

#[tokio::test]
async fn both_shapes_of_storage_nodes_are_read_and_damaged_ones_shown_without_their_passwords() {
    async fn nodes(text: &str) -> Result<Vec<agent_sql::proxy::StorageNode>, SqlError> {
        let say = rows(&[&["id", "time", text]]);
        let proxy = Scripted::start(FrontEnd::Md5, move |_| say.clone()).await;
        log_in(&proxy).await.export_storage_nodes(PATIENT).await
    }
    let list = r#"{"storage_nodes":[{"ip":"a","port":1,"username":"u","password":"hidden","remark":"r"}]}"#;
    let list = nodes(list).await.unwrap();
    assert_eq!(
        (list[0].host.as_str(), list[0].port, list[0].remark.as_str()),
        ("a", 1, "r")
    );
    assert_eq!(list[0].logical_database, "");
    assert!(nodes(r#"{"storage_nodes":{}}"#).await.unwrap().is_empty());
    for damaged in [
        "hidden",
        r#"{"hidden":1}"#,
        r#"{"storage_nodes":{"d":[{"password":"hidden"}]}}"#,
        r#"{"storage_nodes":{"d":[{"ip":"a","port":"x","password":"hidden"}]}}"#,
        r#"{"storage_nodes":{"d":[{"ip":"a","port":70000,"password":"hidden"}]}}"#,
        r#"{"storage_nodes":{"d":["hidden"]}}"#,
    ] {
        let error = nodes(damaged).await.unwrap_err();
        assert!(!error.to_string().contains("hidden"), "{error}");
    }
}

fn tls(names: &[&str]) -> (Arc<ServerConfig>, String) {
    let names: Vec<String> = names.iter().map(|it| (*it).to_owned()).collect();
    let made = rcgen::generate_simple_self_signed(names).unwrap();
    let key = PrivateKeyDer::try_from(made.signing_key.serialize_der()).unwrap();
    let provider = Arc::new(aws_lc_rs::default_provider());
    let config = ServerConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_no_client_auth()
        .with_single_cert(vec![made.cert.der().clone()], key)
        .unwrap();
    (Arc::new(config), made.cert.pem())
}

#[tokio::test]
async fn tls_is_used_when_it_is_asked_for() {
    let (config, pem) = tls(&["127.0.0.1"]);
    let (_, other_pem) = tls(&["127.0.0.1"]);
    for front_end in ALL {
        let script = |_: &str| Say::Success;
        let proxy = Scripted::start_with(front_end, Some(Arc::clone(&config)), script).await;
        let with = |ca: Option<&str>| ProxyOptions {
            tls: ProxyTls::On {
                ca_pem: ca.map(|pem| pem.as_bytes().to_vec()),
            },
            ..options(proxy.port)
        };
        for ca in [None, Some(pem.as_str())] {
            let options = with(ca);
            let connection = ProxyConnection::connect(&options, CancellationToken::new());
            let connection = connection.await.unwrap();
            assert_eq!(connection.probe(PATIENT).await.unwrap(), Gate::Open);
        }
        assert_eq!(proxy.heard()[..2], ["TLS", "log-in"]);
        let said = proxy.heard().len();
        for ca in [other_pem.as_str(), "no certificate"] {
            let error = refused(&with(Some(ca))).await;
            assert!(error.to_string().contains("TLS"), "{error}");
        }
        // Nobody who is not believed is told a name or a password.
        assert_eq!(proxy.heard().len(), said);
    }
}

#[tokio::test]
async fn a_proxy_without_tls_is_refused_where_it_is_asked_for() {
    let proxy = Scripted::start(FrontEnd::Cleartext, |_| Say::Success).await;
    let options = ProxyOptions {
        tls: ProxyTls::On { ca_pem: None },
        ..options(proxy.port)
    };
    let error = refused(&options).await;
    assert!(
        error.to_string().contains("proxy-frontend-ssl-enabled"),
        "{error}"
    );
    assert!(proxy.heard().is_empty());
}
