//! Wrong command lines and configurations: named, exit code 2, nothing asked of anybody.

use std::net::TcpListener;

use crate::{Home, ran};

#[test]
fn wrong_flags_are_refused() {
    let home = Home::new();
    for args in [
        &[][..],
        &["frobnicate"],
        &["backup", "--frobnicate"],
        &["backup", "--nodes", "db1"],
        &[
            "backup",
            "--nodes",
            "db1:18080,db1:18080",
            "--repo",
            "s3://bucket/a",
        ],
        &["backup", "--repo", "bucket/a"],
        &["backup", "-j", "0"],
        &["backup", "--level", "20"],
        &["backup", "--bandwidth", "5 parsecs"],
        &["backup", "-b", "HALF"],
        &["backup", "--nodes", "a:1", "--node-id", "a:1"],
        &["show", "--output", "xml"],
        &["restore", "--nodes", "a:1"],
        &["restore", "--id", "x", "--target-dir", "relative", "--yes"],
        &["restore", "--id", "x", "--target-dir", "/a/../b", "--yes"],
        &[
            "restore",
            "--id",
            "x",
            "--target-dir",
            "/a",
            "--map",
            "db1",
            "--yes",
        ],
        &[
            "show",
            "--s3-credentials-file",
            "a",
            "--s3-credentials-command",
            "b",
        ],
        &["show"],
        &["completions", "tcsh"],
    ] {
        let ran = home.run(args);
        assert_eq!(ran.code, 2, "{args:?}: {ran:?}");
        assert!(ran.stdout.is_empty(), "{args:?}: {ran:?}");
        assert!(!ran.stderr.is_empty(), "{args:?}: {ran:?}");
    }
}

#[test]
fn a_wrong_flag_is_a_result_for_machines_too() {
    let home = Home::new();
    let (code, kind, message) = home.run(&["backup", "--output", "json", "-j", "0"]).error();
    assert_eq!((code, kind.as_str()), (2, "usage"));
    assert!(message.contains("--jobs"), "{message}");
}

#[test]
fn a_parent_goes_with_an_increment_only() {
    let home = Home::new();
    let args = [
        "backup", "-b", "full", "--parent", "20261121", "--output", "json",
    ];
    let (code, kind, message) = home.run(&args).error();
    assert_eq!((code, kind.as_str()), (2, "usage"));
    assert!(message.contains("`--parent`"), "{message}");
    let args = ["backup", "-b", "HALF", "--output", "json"];
    let (code, kind, message) = home.run(&args).error();
    assert_eq!((code, kind.as_str()), (2, "usage"));
    assert!(message.contains("HALF"), "{message}");
}

#[test]
fn a_mistake_in_the_configuration_names_file_and_key() {
    let home = Home::new();
    home.write(
        "broken.toml",
        "repo = 's3://bucket/a'\n[profile.prod]\ns3-regoin = 'x'\n",
    );
    let args = ["show", "--config", "broken.toml", "--output", "json"];
    let (code, kind, message) = home.run(&args).error();
    assert_eq!((code, kind.as_str()), (2, "usage"));
    assert!(
        message.contains("`broken.toml`: `profile.prod.s3-regoin`: unknown field"),
        "{message}"
    );

    let (code, _, message) = home
        .run(&["show", "--config", "missing.toml", "--output", "json"])
        .error();
    assert_eq!(code, 2);
    assert!(message.contains("missing.toml"), "{message}");

    let (code, _, message) = home
        .run(&["show", "--profile", "prod", "--output", "json"])
        .error();
    assert_eq!(code, 2);
    assert!(message.contains("no profile `prod`"), "{message}");
}

#[test]
fn a_restore_that_nobody_agreed_to_asks_nobody() {
    let home = Home::new();
    let listen = || {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        listener.set_nonblocking(true).unwrap();
        let address = listener.local_addr().unwrap().to_string();
        (listener, address)
    };
    let ((agent, agent_address), (store, store_address)) = (listen(), listen());
    let endpoint = format!("http://{store_address}");
    let mut command = home.command(&["restore", "--id", "20261121T040233Z-F-9f3c1a2b"]);
    command.args([
        "--nodes",
        &agent_address,
        "--target-dir",
        "/srv/restored",
        "--output",
        "json",
    ]);
    command.args([
        "--repo",
        "s3://bucket/a",
        "--s3-endpoint",
        &endpoint,
        "--insecure-http",
    ]);
    let (code, kind, message) = ran(&mut command).error();
    assert_eq!((code, kind.as_str()), (2, "usage"));
    assert!(message.contains("--yes"), "{message}");
    assert!(
        agent.accept().is_err() && store.accept().is_err(),
        "somebody was asked"
    );
}

#[test]
fn an_agent_that_is_not_there_is_named() {
    let home = Home::new();
    let address = {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        listener.local_addr().unwrap().to_string()
    };
    let mut command = home.command(&["backup", "--output", "json", "--nodes", &address]);
    command.args([
        "--repo",
        "s3://bucket/a",
        "--s3-endpoint",
        "http://127.0.0.1:1",
    ]);
    command.args(["--insecure-http", "--agent-timeout", "1"]);
    let ran = ran(&mut command);
    let (code, kind, message) = ran.error();
    assert_eq!((code, kind.as_str()), (5, "agent-unreachable"));
    assert!(message.contains(&address), "{message}");
    assert_eq!(ran.result()["error"]["node"], address);
    assert_eq!(ran.result()["error"]["changed"], false);
}

#[test]
fn certificates_that_are_not_there_are_named() {
    let home = Home::new();
    let args = [
        "backup",
        "--output",
        "json",
        "--nodes",
        "127.0.0.1:1",
        "--repo",
        "s3://bucket/a",
    ];
    let ran = home.run(&args);
    let (code, kind, message) = ran.error();
    assert_eq!((code, kind.as_str()), (6, "certificate"));
    assert!(message.contains("operator.crt"), "{message}");
    let next = ran.result()["error"]["next"].as_str().unwrap().to_owned();
    assert!(next.contains("gs_pitr certs init"), "{next}");
}

#[test]
fn errors_are_told_in_full_to_people() {
    let home = Home::new();
    let ran = home.run(&["show"]);
    insta::assert_snapshot!(ran.stderr, @r"
    error: no repository is given
      changed: nothing
      next:    give `--repo s3://BUCKET/PREFIX`, or set `GS_PITR_REPO`
      kind:    usage (exit code 2)
    ");
}
