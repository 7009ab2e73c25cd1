//! Certificates: the files, their modes, what is in them, and what becomes of old ones.

use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;
use std::process::Command;

use crate::Home;

fn mode(path: &Path) -> u32 {
    std::fs::metadata(path).unwrap().permissions().mode() & 0o7777
}

/// What `openssl` answers, if there is one.
fn openssl(args: &[&str]) -> Option<String> {
    let output = Command::new("openssl").args(args).output().ok()?;
    let words = String::from_utf8_lossy(&output.stdout).into_owned();
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "openssl {args:?}: {words}{errors}");
    Some(words)
}

#[test]
fn init_makes_a_ca_and_an_operator_and_overwrites_nothing() {
    let home = Home::new();
    let made = home.run(&["certs", "init", "--output", "json"]);
    assert_eq!(made.code, 0, "{made:?}");
    let result = made.result();
    assert_eq!(result["files"].as_array().unwrap().len(), 4, "{result}");
    assert!(result["expires"].is_string() && result["ca_expires"].is_string());

    let certs = home.path().join(".gs_pitr/certs");
    assert_eq!(mode(&certs), 0o700);
    for (file, expected) in [
        ("ca.key", 0o600),
        ("operator.key", 0o600),
        ("ca.crt", 0o644),
        ("operator.crt", 0o644),
    ] {
        assert_eq!(mode(&certs.join(file)), expected, "{file}");
    }
    let (ca, operator) = (certs.join("ca.crt"), certs.join("operator.crt"));
    let (ca, operator) = (ca.to_str().unwrap(), operator.to_str().unwrap());
    openssl(&["verify", "-purpose", "sslclient", "-CAfile", ca, operator]);
    if let Some(text) = openssl(&["x509", "-noout", "-text", "-in", operator]) {
        assert!(text.contains("URI:gs-pitr:operator"), "{text}");
        assert!(text.contains("TLS Web Client Authentication"), "{text}");
        assert!(!text.contains("TLS Web Server Authentication"), "{text}");
    }

    let before = std::fs::read(certs.join("ca.key")).unwrap();
    let again = home.run(&["certs", "init", "--output", "json"]);
    let (code, kind, message) = again.error();
    assert_eq!((code, kind.as_str()), (12, "conflict"));
    assert!(message.contains("ca.key"), "{message}");
    assert_eq!(std::fs::read(certs.join("ca.key")).unwrap(), before);
}

#[test]
fn issue_makes_an_agents_certificate() {
    let home = Home::new();
    home.run(&["certs", "init", "--name", "A CA of ours"]);
    let args = [
        "certs",
        "issue",
        "--name",
        "db1",
        "--san",
        "db1.example",
        "--san",
        "10.0.0.11",
        "--san",
        "::1",
        "--out",
        "for db1",
        "--days",
        "90",
    ];
    let issued = home.run(&args);
    assert_eq!(issued.code, 0, "{issued:?}");
    assert!(issued.stdout.contains("expires 2"), "{issued:?}");
    let out = home.path().join("for db1");
    assert_eq!(mode(&out), 0o700);
    assert_eq!(mode(&out.join("db1.key")), 0o600);
    let ca = home.path().join(".gs_pitr/certs/ca.crt");
    let (ca, leaf) = (ca.to_str().unwrap(), out.join("db1.crt"));
    let leaf = leaf.to_str().unwrap();
    openssl(&["verify", "-purpose", "sslserver", "-CAfile", ca, leaf]);
    if let Some(text) = openssl(&["x509", "-noout", "-text", "-in", leaf]) {
        for part in [
            "URI:gs-pitr:agent",
            "DNS:db1.example",
            "IP Address:10.0.0.11",
            "Issuer: CN = A CA of ours",
        ] {
            assert!(text.contains(part), "{part} is not in {text}");
        }
    }
    let again = home.run(&args);
    assert_eq!(again.code, 12, "{again:?}");
}

#[test]
fn the_operators_certificate_is_renewed_with_its_key() {
    let home = Home::new();
    home.run(&["certs", "init", "--days", "1"]);
    let certs = home.path().join(".gs_pitr/certs");
    let read = |name: &str| std::fs::read(certs.join(name)).unwrap();
    let (key, crt) = (read("operator.key"), read("operator.crt"));
    let renewed = home.run(&["certs", "issue", "--operator"]);
    assert_eq!(renewed.code, 0, "{renewed:?}");
    assert_eq!(read("operator.key"), key);
    assert_ne!(read("operator.crt"), crt);
    let left: Vec<_> = std::fs::read_dir(&certs).unwrap().collect();
    assert_eq!(left.len(), 4, "{left:?}");
}

#[test]
fn what_cannot_be_issued_is_refused() {
    let home = Home::new();
    let no_ca = home.run(&[
        "certs", "issue", "--name", "a", "--san", "a", "--output", "json",
    ]);
    let (code, kind, message) = no_ca.error();
    assert_eq!((code, kind.as_str()), (6, "certificate"));
    assert!(message.contains("ca.crt"), "{message}");
    home.run(&["certs", "init"]);
    for args in [
        &["certs", "issue", "--name", "../a", "--san", "a"][..],
        &["certs", "issue", "--name", "ca", "--san", "a"],
        &["certs", "issue", "--name", "a", "--san", "db1:18080"],
        &["certs", "issue", "--name", "a"],
        &["certs", "issue", "--name", "a", "--san", "a", "--operator"],
    ] {
        assert_eq!(home.run(args).code, 2, "{args:?}");
    }
}

#[test]
fn an_expired_certificate_is_noticed_before_any_connection() {
    let home = Home::new();
    home.run(&["certs", "init"]);
    let key = rcgen::KeyPair::generate().unwrap();
    let mut params = rcgen::CertificateParams::default();
    params.not_before = rcgen::date_time_ymd(2020, 1, 1);
    params.not_after = rcgen::date_time_ymd(2021, 1, 1);
    let expired = params.self_signed(&key).unwrap();
    home.write(".gs_pitr/certs/operator.crt", &expired.pem());
    let agent = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    agent.set_nonblocking(true).unwrap();
    let address = agent.local_addr().unwrap().to_string();
    let mut command = home.command(&["backup", "--output", "json", "--nodes", &address]);
    command.args([
        "--repo",
        "s3://bucket/a",
        "--s3-endpoint",
        "http://127.0.0.1:1",
    ]);
    let ran = crate::ran(&mut command);
    let (code, kind, message) = ran.error();
    assert_eq!((code, kind.as_str()), (6, "certificate"));
    assert!(message.contains("expired at 2021-01-01"), "{message}");
    assert_eq!(
        ran.result()["error"]["next"],
        "gs_pitr certs issue --operator"
    );
    assert!(agent.accept().is_err(), "the agent was asked");
}
