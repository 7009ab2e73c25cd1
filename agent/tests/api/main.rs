//! The agent's HTTP side, asked of the real program.

#![expect(clippy::unwrap_used, reason = "tests")]

mod backup;
mod certs;
mod process;
mod watchdog;

use std::fs::Permissions;
use std::os::unix::fs::PermissionsExt as _;

use agent_api::client::{AgentClient, Transport};
use agent_api::{ApiError, ErrorKind, EventKind, Phase, StartOperation};
use futures_util::StreamExt as _;
use rustix::process::Signal;
use rustls::version::{TLS12, TLS13};
use support::os::Scratch;
use support::postgres::{Cluster, ClusterOptions, Installation};
use uuid::Uuid;

use crate::certs::{Authority, Files};
use crate::process::{Agent, get, post, request, run, tls};

fn client(agent: &Agent, transport: &Transport) -> AgentClient {
    AgentClient::new(&agent.address, transport).unwrap()
}

fn insecure() -> Agent {
    Agent::start(&["--insecure-http"])
}

/// A backup of a node that is not there, into a store that is not there.
fn backup(id: Uuid) -> StartOperation {
    let json = serde_json::json!({
        "operation": id,
        "repository": {
            "bucket": "b", "prefix": "p", "endpoint": "http://127.0.0.1:1",
            "credentials": {"access_key_id": "A", "secret_access_key": "S3CR3T"}
        },
        "spec": {
            "kind": "backup", "backup_id": "20261121T040233Z-F-9f3c1a2b", "node_id": Uuid::nil(),
            "epoch": catalog::ids::EpochId::generate(1), "attempt": 1, "jobs": 1, "level": 1,
            "fast_checkpoint": true
        }
    });
    serde_json::from_value(json).unwrap()
}

#[tokio::test]
async fn the_right_certificate_gets_in_and_an_agent_without_a_database_serves() {
    let authority = Authority::new();
    let directory = tempfile::tempdir().unwrap();
    let mut agent = Agent::secure(&authority, &directory);
    let client = client(&agent, &authority.transport(&authority.operator()));
    let health = client.health().await.unwrap();
    assert_eq!(health.version, env!("CARGO_PKG_VERSION"));
    let facts = client.node().await.unwrap();
    assert!(facts.server.is_none() && !facts.has_credentials);
    assert_eq!(facts.server_error.unwrap().kind, ErrorKind::Database);
    assert!(client.operations().await.unwrap().is_empty());
    let unknown = client.status(Uuid::now_v7()).await.unwrap_err();
    assert_eq!(unknown.kind, ErrorKind::NotFound);
    assert_eq!(agent.stop().await, Some(0));
}

#[tokio::test]
async fn nobody_gets_in_without_an_operators_valid_certificate() {
    let authority = Authority::new();
    let stranger = Authority::named("another");
    let directory = tempfile::tempdir().unwrap();
    let agent = Agent::secure(&authority, &directory);
    let health = get("/v1/health");
    let refusals = [
        (None, "CertificateRequired"),
        (Some(stranger.operator()), "UnknownCA"),
        (Some(Authority::new().operator()), "DecryptError"),
        (Some(authority.expired_operator()), "CertificateExpired"),
    ];
    for (leaf, alert) in refusals {
        let config = tls(&authority, leaf.as_ref(), &[&TLS13]);
        let error = request(&agent.address, Some(config), &health)
            .await
            .unwrap_err();
        assert!(format!("{error:?}").contains(alert), "{alert}: {error:?}");
    }
    for leaf in [authority.nobody(), authority.agent()] {
        let config = tls(&authority, Some(&leaf), &[&TLS13]);
        let (status, body) = request(&agent.address, Some(config), &health)
            .await
            .unwrap();
        let error: ApiError = serde_json::from_str(&body).unwrap();
        assert_eq!((status, error.kind), (403, ErrorKind::Certificate));
    }
    let old = tls(&authority, Some(&authority.operator()), &[&TLS12]);
    let error = request(&agent.address, Some(old), &health)
        .await
        .unwrap_err();
    assert!(
        format!("{error:?}").contains("ProtocolVersion"),
        "{error:?}"
    );
    let (status, _) = request(&agent.address, None, &health)
        .await
        .unwrap_or_default();
    assert_eq!(status, 0, "plain HTTP is not answered");
    let good = tls(&authority, Some(&authority.operator()), &[&TLS13]);
    let (status, _) = request(&agent.address, Some(good), &health).await.unwrap();
    assert_eq!(status, 200);
}

#[tokio::test]
async fn the_client_says_which_certificate_is_wrong() {
    let authority = Authority::new();
    let namesake = Authority::new();
    let stranger = Authority::named("another");
    let directory = tempfile::tempdir().unwrap();
    let agent = Agent::secure(&authority, &directory);
    let says = |error: ApiError, words: &str| {
        assert_eq!(error.kind, ErrorKind::Certificate, "{error}");
        assert!(error.message.contains(words), "{words}: {error}");
    };
    let expired = authority.transport(&authority.expired_operator());
    says(
        AgentClient::new(&agent.address, &expired).unwrap_err(),
        "expired",
    );
    let nobody = authority.transport(&authority.nobody());
    says(
        AgentClient::new(&agent.address, &nobody).unwrap_err(),
        "gs-pitr:operator",
    );
    for other in [&stranger, &namesake] {
        // Ours trusts the agent, the agent does not know who signed ours.
        let unknown = client(&agent, &authority.transport(&other.operator()));
        for _ in 0..5 {
            says(
                unknown.health().await.unwrap_err(),
                "does not know the authority",
            );
        }
        let distrusting = client(&agent, &other.transport(&authority.operator()));
        says(
            distrusting.health().await.unwrap_err(),
            "--tls-ca did not sign",
        );
    }
    let (_, port) = agent.address.rsplit_once(':').unwrap();
    let operator = authority.transport(&authority.operator());
    let other_name = AgentClient::new(&format!("localhost:{port}"), &operator).unwrap();
    says(
        other_name.health().await.unwrap_err(),
        "not made for the name localhost",
    );
    let plain = insecure();
    says(
        client(&plain, &operator).health().await.unwrap_err(),
        "does not speak TLS",
    );
    let error = client(&agent, &Transport::InsecureHttp)
        .health()
        .await
        .unwrap_err();
    assert_eq!(error.kind, ErrorKind::AgentUnreachable, "{error}");
}

#[tokio::test]
async fn sighup_reads_the_certificates_again_and_keeps_the_old_ones_if_they_are_bad() {
    let (before, after) = (Authority::new(), Authority::new());
    let directory = tempfile::tempdir().unwrap();
    let agent = Agent::secure(&before, &directory);
    let old = client(&agent, &before.transport(&before.operator()));
    old.health().await.unwrap();

    let files = Files::write(directory.path(), &after.agent(), &after);
    std::fs::write(&files.certificate, "no certificate").unwrap();
    agent.signal(Signal::HUP);
    agent.wait_for_log("stay as they were").await;
    let again = client(&agent, &before.transport(&before.operator()));
    again.health().await.unwrap();

    Files::write(directory.path(), &after.agent(), &after);
    agent.signal(Signal::HUP);
    agent.wait_for_log("certificates read again").await;
    let new = client(&agent, &after.transport(&after.operator()));
    new.health().await.unwrap();
    let old = client(&agent, &before.transport(&before.operator()));
    assert_eq!(old.health().await.unwrap_err().kind, ErrorKind::Certificate);
}

#[tokio::test]
async fn plain_http_serves_programs_on_loopback_and_no_web_page() {
    let agent = insecure();
    client(&agent, &Transport::InsecureHttp)
        .health()
        .await
        .unwrap();
    let (status, _) = request(&agent.address, None, &get("/v1/health"))
        .await
        .unwrap();
    assert_eq!(status, 200);
    let of_a_page =
        get("/v1/health").replace("\r\nConnection", "\r\nOrigin: http://x\r\nConnection");
    let rebound = get("/v1/health").replace("127.0.0.1", "rebound.example");
    for text in [of_a_page, rebound] {
        let (status, _) = request(&agent.address, None, &text).await.unwrap();
        assert_eq!(status, 403, "{text}");
    }
    let form = post("/v1/operations", "text/plain", "{}");
    let (status, _) = request(&agent.address, None, &form).await.unwrap();
    assert_eq!(status, 400);
}

#[tokio::test]
async fn bad_requests_are_named_and_change_nothing() {
    let agent = insecure();
    let mut unknown_field = serde_json::to_value(backup(Uuid::now_v7())).unwrap();
    unknown_field["spec"]["jbos"] = 3.into();
    let mut no_jobs = serde_json::to_value(backup(Uuid::now_v7())).unwrap();
    no_jobs["spec"]["jobs"] = 0.into();
    let json = "application/json";
    let operations = "/v1/operations";
    let mark = format!("/v1/operations/{}/mark", Uuid::now_v7());
    let cases = [
        (post(operations, json, "{"), 400, "body"),
        (post(operations, json, ""), 400, "body"),
        (
            post(operations, json, &unknown_field.to_string()),
            400,
            "jbos",
        ),
        (post(operations, json, &no_jobs.to_string()), 400, "0 jobs"),
        (post(operations, json, &" ".repeat(17 << 20)), 400, "body"),
        (
            post(&mark, json, "{\"restore_point\": \"a\"}"),
            404,
            "no operation",
        ),
        (
            post("/v1/operations/x/mark", json, "{}"),
            400,
            "operation id",
        ),
        (post("/v1/health", json, "{}"), 400, "POST"),
        (get("/v2/health"), 404, "/v2/health"),
        (get("/v1/operations/x/events?after=1"), 400, "operation id"),
    ];
    for (text, expected, words) in cases {
        let (status, body) = request(&agent.address, None, &text).await.unwrap();
        let what = text.lines().next().unwrap_or_default();
        assert_eq!(status, expected, "{what}: {body}");
        let error: ApiError = serde_json::from_str(&body).unwrap();
        assert!(
            error.message.contains(words) && !error.changed,
            "{what}: {error}"
        );
    }
    let client = client(&agent, &Transport::InsecureHttp);
    assert!(client.operations().await.unwrap().is_empty());
}

#[tokio::test]
async fn an_operation_is_found_again_told_of_and_leaves_no_secret() {
    let agent = insecure();
    let client = client(&agent, &Transport::InsecureHttp);
    let id = Uuid::now_v7();
    let request = backup(id);
    client.start(&request).await.unwrap();
    let again = client.start(&request).await.unwrap();
    assert_eq!((again.operation, again.kind.as_str()), (id, "backup"));
    let mut other = request;
    other.bandwidth = Some(1);
    assert_eq!(
        client.start(&other).await.unwrap_err().kind,
        ErrorKind::Conflict
    );

    let events: Vec<_> = client.events(id, 0).await.unwrap().collect().await;
    let events: Vec<_> = events.into_iter().map(Result::unwrap).collect();
    let last = events.last().unwrap();
    assert!(
        matches!(last.what, EventKind::Error { .. }),
        "there is no node: {events:?}"
    );
    let mut rest = client.events(id, last.seq - 1).await.unwrap();
    assert_eq!(rest.next().await.unwrap().unwrap().seq, last.seq);
    assert!(rest.next().await.is_none());

    let status = client.status(id).await.unwrap();
    assert_eq!(status.phase, Phase::Failed, "{status:?}");
    assert_eq!(client.cancel(id).await.unwrap().phase, Phase::Failed);
    assert!(client.release(id).await.is_err());
    let zero = client.bandwidth(id, Some(0)).await.unwrap_err();
    assert_eq!(zero.kind, ErrorKind::Usage);
    assert_eq!(client.operations().await.unwrap().len(), 1);

    let pid = agent.pid();
    let argv = std::fs::read_to_string(format!("/proc/{pid}/cmdline")).unwrap();
    assert!(!agent.log().contains("S3CR3T") && !argv.contains("S3CR3T"));
}

#[tokio::test]
async fn a_target_outside_the_allowed_roots_is_refused_before_anything_is_begun() {
    let agent = insecure();
    let client = client(&agent, &Transport::InsecureHttp);
    let target = agent.home.path().join("new");
    let node = serde_json::json!({
        "node_id": Uuid::nil(), "attempt": 1, "epoch": catalog::ids::EpochId::generate(1), "host": "h",
        "port": 1, "system_identifier": "1", "flavour": "postgresql", "server_version_num": 150_000,
        "control_version": 1300, "catalog_version": 1, "wal_segment_size": 16_777_216,
        "data_checksums": true, "timeline": 1, "start_lsn": "0/1", "stop_lsn": "0/1",
        "started": "2026-11-21T00:00:00Z", "completed": "2026-11-21T00:00:00Z",
        "data_directory": "/d", "tablespaces": [], "backup_label": "", "argv": [], "attachments": [],
        "wal_first": "a", "wal_last": "a", "packs": [],
        "index": {"size": 1, "sha256": "", "footer_offset": 0, "entries": 0}, "files": 0,
        "plain_bytes": 0, "stored_bytes": 0, "corrupt_pages": []
    });
    let point = serde_json::json!({
        "node_id": Uuid::nil(), "epoch": catalog::ids::EpochId::generate(1), "timeline": 1,
        "restore_point": "p", "record_lsn": "0/1", "end_lsn": "0/1", "made": "2026-11-21T00:00:00Z",
        "wal_first": "a", "wal_last": "a"
    });
    let json = serde_json::json!({
        "operation": Uuid::now_v7(),
        "repository": {"bucket": "b", "prefix": ""},
        "spec": {
            "kind": "restore", "backup_id": "20261121T040233Z-F-9f3c1a2b", "node": node,
            "point": point, "restore": Uuid::now_v7(), "nodes": [Uuid::nil()], "target": target,
            "place": {"place": "fresh"}, "start": true, "stop_early": false, "jobs": 1
        }
    });
    let request: StartOperation = serde_json::from_value(json).unwrap();
    let error = client.start(&request).await.unwrap_err();
    assert_eq!(error.kind, ErrorKind::Target);
    assert!(error.message.contains("--allow-root"), "{error}");
    assert!(!target.exists() && client.operations().await.unwrap().is_empty());
}

#[tokio::test]
async fn the_node_beside_the_agent_is_told_of_and_a_wrong_password_is_named() {
    let scratch = Scratch::new("agent-facts");
    let installation = Installation::newest();
    let options = ClusterOptions {
        password: Some("right".to_owned()),
        ..ClusterOptions::default()
    };
    let cluster = Cluster::create(&installation, scratch.path(), options);
    cluster.start();
    let port = cluster.port().to_string();
    let pgdata = cluster.data_directory().display().to_string();
    let bindir = installation.bindir.display().to_string();
    let node = [
        "--insecure-http",
        "--pgdata",
        &pgdata,
        "--pg-port",
        &port,
        "--pg-user",
        "postgres",
        "--pg-bindir",
        &bindir,
    ];
    let socket = cluster.socket_directory().display().to_string();
    let agent = Agent::start(&[node.as_slice(), &["--pg-host", &socket]].concat());
    let facts = client(&agent, &Transport::InsecureHttp)
        .node()
        .await
        .unwrap();
    let server = facts.server.unwrap();
    assert_eq!(
        (server.port, &server.data_directory),
        (cluster.port(), &pgdata)
    );
    assert!(server.size_bytes > 0 && !server.in_recovery);
    let major = server.server_version_num / 10000;
    assert_eq!(facts.installed.get(&major), Some(&bindir));

    let password = scratch.path().join("password");
    std::fs::write(&password, "wrong\n").unwrap();
    std::fs::set_permissions(&password, Permissions::from_mode(0o600)).unwrap();
    let password = password.display().to_string();
    let over_tcp = ["--pg-host", "127.0.0.1", "--pg-password-file", &password];
    let agent = Agent::start(&[node.as_slice(), &over_tcp].concat());
    let facts = client(&agent, &Transport::InsecureHttp)
        .node()
        .await
        .unwrap();
    let error = facts.server_error.unwrap();
    assert_eq!(error.kind, ErrorKind::Database);
    let next = error.next.unwrap_or_default();
    assert!(
        next.contains("--pg-password-file"),
        "{}: {next}",
        error.message
    );
}

#[test]
fn wrong_settings_end_with_exit_code_2_and_start_nothing() {
    let authority = Authority::new();
    let directory = tempfile::tempdir().unwrap();
    let files = Files::write(directory.path(), &authority.nobody(), &authority);
    let flags = files.flags();
    let not_an_agents: Vec<_> = flags.iter().map(String::as_str).collect();
    let cases: [(&[&str], &str); 6] = [
        (&["--insecure-http", "--listen", "0.0.0.0"], "loopback"),
        (&["--nonsense"], "--nonsense"),
        (&["--config", "/nowhere/agent.toml"], "/nowhere/agent.toml"),
        (&[], "--tls-crt"),
        (&["--insecure-http", "--allow-root", "relative"], "absolute"),
        (&not_an_agents, "gs-pitr:agent"),
    ];
    for (args, words) in cases {
        let output = run(args);
        let stderr = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(2), "{args:?}: {stderr}");
        assert!(stderr.contains(words), "{args:?}: {stderr}");
        assert!(output.stdout.is_empty(), "{args:?}");
    }
}

#[test]
fn help_has_examples_and_subcommands_print() {
    let help = run(&["--help"]);
    let text = String::from_utf8(help.stdout).unwrap();
    assert!(
        help.status.success() && text.contains("Examples:"),
        "{text}"
    );
    for args in [["completions", "bash"].as_slice(), &["man"]] {
        let output = run(args);
        assert!(
            output.status.success() && !output.stdout.is_empty(),
            "{args:?}"
        );
    }
    let wal_get = run(&["wal-get", "--nonsense"]);
    assert_eq!(
        wal_get.status.code(),
        Some(255),
        "a server takes 1 to 125 for the end of WAL"
    );
    let wal_put = run(&["wal-put", "--nonsense"]);
    assert_eq!(
        wal_put.status.code(),
        Some(2),
        "a wrong archive_command must not look like a file that may go"
    );
}
