use clap::Parser;

use super::*;

#[derive(Debug, Parser)]
struct Line {
    #[command(flatten)]
    settings: Settings,
}

fn load(args: &[&str]) -> Result<Config, ConfigError> {
    let line = Line::try_parse_from(std::iter::once(&"pitr-agent").chain(args)).unwrap();
    Config::load(line.settings)
}

fn problem(args: &[&str]) -> String {
    load(args).unwrap_err().to_string()
}

#[test]
fn a_flag_wins_over_the_file_and_the_file_over_the_default() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("agent.toml");
    fs::write(
        &file,
        "insecure-http = true\nport = 1\nmemory = 64\nstart-command = [\"a b\", \"$c\"]\n",
    )
    .unwrap();
    let config = load(&["--config", file.to_str().unwrap(), "--port", "2"]).unwrap();
    assert_eq!((config.port, config.memory), (2, 64 << 20));
    assert_eq!(config.pg_port(), 5432);
    assert_eq!(config.start_command.unwrap(), ["a b", "$c"]);
}

#[test]
fn a_file_with_an_unknown_key_is_refused_with_its_line() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("agent.toml");
    fs::write(&file, "port = 1\nprot = 2\n").unwrap();
    let text = problem(&["--config", file.to_str().unwrap()]);
    assert!(text.contains("line 2") && text.contains("prot"), "{text}");
    assert!(problem(&["--config", "/nowhere/x.toml"]).contains("cannot read /nowhere/x.toml"));
}

#[test]
fn plain_http_is_refused_off_loopback_and_beside_certificates() {
    assert!(problem(&["--insecure-http", "--listen", "0.0.0.0"]).contains("refused on 0.0.0.0"));
    assert!(load(&["--insecure-http", "--listen", "::1"]).is_ok());
    assert!(problem(&["--insecure-http", "--tls-ca", "x"]).contains("choose one"));
    let text = problem(&["--tls-crt", "x"]);
    assert!(text.contains("--tls-key, --tls-ca"), "{text}");
}

#[test]
fn values_that_cannot_work_are_refused() {
    let with = |args: &[&str]| problem(&[&["--insecure-http"], args].concat());
    assert!(with(&["--memory", "1"]).contains("--memory"));
    assert!(with(&["--orphan-timeout", "0"]).contains("--orphan-timeout"));
    assert!(with(&["--client-timeout", "1"]).contains("--client-timeout"));
    assert!(with(&["--stall-timeout", "9"]).contains("--stall-timeout"));
    assert!(with(&["--probackup", "pg_probackup"]).contains("not an absolute path"));
    assert!(with(&["--pgdata", "data"]).contains("not an absolute path"));
    assert!(with(&["--allow-root", "data"]).contains("not an absolute path"));
    assert!(with(&["--allow-root", "/no/such"]).contains("cannot read /no/such"));
    assert!(with(&["--allow-root", "/etc/passwd"]).contains("not a directory"));
}

#[test]
fn a_secret_that_others_may_read_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("password");
    fs::write(&file, "top secret\nmore\n").unwrap();
    let args = [
        "--insecure-http",
        "--pg-password-file",
        file.to_str().unwrap(),
    ];
    fs::set_permissions(&file, fs::Permissions::from_mode(0o644)).unwrap();
    assert!(problem(&args).contains("mode 0644"));
    fs::set_permissions(&file, fs::Permissions::from_mode(0o600)).unwrap();
    let config = load(&args).unwrap();
    assert_eq!(config.pg_password().unwrap().unwrap().0, "top secret");
    assert!(!format!("{config:?}").contains("top secret"));
}

#[test]
fn targets_are_allowed_below_their_roots_only_also_through_links() {
    let dir = tempfile::tempdir().unwrap();
    let root = dir.path().canonicalize().unwrap().join("root");
    let outside = dir.path().join("outside");
    fs::create_dir(&root).unwrap();
    fs::create_dir(&outside).unwrap();
    std::os::unix::fs::symlink(&outside, root.join("link")).unwrap();
    let config = load(&["--insecure-http", "--allow-root", root.to_str().unwrap()]).unwrap();
    let allowed = config.allowed_target(&root.join("new")).unwrap();
    assert_eq!(allowed, root.join("new"));
    let refused = [
        outside.join("new"),
        root.clone(),
        root.join("link/new"),
        root.join("../outside/new"),
        root.join("./new"),
        root.join("absent/new"),
        PathBuf::from("new"),
        PathBuf::from("/"),
    ];
    for target in refused {
        let error = config.allowed_target(&target).unwrap_err();
        assert_eq!(error.kind, ErrorKind::Target, "{}", target.display());
    }
}
