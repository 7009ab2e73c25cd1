//! Help of every command: its own part as a snapshot, the parts that many share once.

#[path = "help/backups.rs"]
mod backups;
#[path = "help/certs.rs"]
mod certs;
#[path = "help/points.rs"]
mod points;
#[path = "help/restores.rs"]
mod restores;
#[path = "help/unlocks.rs"]
mod unlocks;

use crate::Home;

const COMMANDS: [&[&str]; 24] = [
    &[],
    &["backup"],
    &["point"],
    &["point", "create"],
    &["point", "list"],
    &["show"],
    &["restore"],
    &["delete"],
    &["prune"],
    &["check"],
    &["unlock"],
    &["metadata"],
    &["operations"],
    &["operations", "resume"],
    &["operations", "discard"],
    &["wal"],
    &["wal", "status"],
    &["wal", "start"],
    &["wal", "stop"],
    &["certs"],
    &["certs", "init"],
    &["certs", "issue"],
    &["completions"],
    &["man"],
];

/// What `--help` says.
struct Help {
    /// The command's own part.
    own: String,
    /// The options that lead to proxies, where it has them.
    proxies: Option<String>,
    /// The options that all commands have.
    global: String,
    /// The end.
    codes: String,
}

fn help(command: &[&str]) -> Help {
    let mut args = command.to_vec();
    args.push("--help");
    let ran = Home::new().run(&args);
    assert_eq!(ran.code, 0, "{ran:?}");
    let lines: Vec<_> = ran.stdout.lines().map(str::trim_end).collect();
    let text = lines.join("\n");
    let (own, rest) = text.split_once("Global options:\n").unwrap();
    let (global, end) = rest.split_once("Examples:\n").unwrap();
    let (examples, codes) = end.split_once("Exit codes:\n").unwrap();
    let (own, proxies) = match own.split_once("ShardingSphere-Proxy:\n") {
        None => (own, None),
        Some((own, proxies)) => (own, Some(proxies.to_owned())),
    };
    Help {
        own: format!("{own}Examples:\n{examples}"),
        proxies,
        global: global.to_owned(),
        codes: codes.to_owned(),
    }
}

#[test]
fn every_help_has_examples_and_ends_with_the_exit_codes() {
    let main = help(&[]);
    assert!(
        main.codes
            .trim_end()
            .ends_with("130  cancelled          somebody asked for it to stop"),
        "{}",
        main.codes
    );
    let bare = |text: &str| text.split("  -h, --help").next().unwrap().trim().to_owned();
    let proxies = help(&["backup"]).proxies.unwrap();
    let mut ways = Vec::new();
    for command in COMMANDS {
        let its = help(command);
        assert!(its.own.contains("\n  gs_pitr "), "{command:?}: {}", its.own);
        assert_eq!(its.codes, main.codes, "{command:?}");
        assert_eq!(bare(&its.global), bare(&main.global), "{command:?}");
        if let Some(way) = its.proxies {
            assert_eq!(way.trim_end(), proxies.trim_end(), "{command:?}");
            ways.push(command.join(" "));
        }
    }
    assert_eq!(
        ways,
        [
            "backup",
            "point create",
            "restore",
            "check",
            "unlock",
            "metadata",
            "operations resume",
            "wal status",
            "wal start",
            "wal stop",
        ]
    );
}

#[test]
fn global_options() {
    insta::assert_snapshot!(help(&[]).global, @r"
        --repo <s3://BUCKET/PREFIX>
            The repository

            [env: GS_PITR_REPO]

        --s3-endpoint <URL>
            Endpoint of the store; without it, AWS's own

            [env: GS_PITR_S3_ENDPOINT]

        --s3-region <REGION>
            Region of the bucket

            [env: GS_PITR_S3_REGION]

        --s3-ca-file <FILE>
            Certificates (PEM) that the store's certificate is signed by

            [env: GS_PITR_S3_CA_FILE]

        --s3-credentials-file <FILE>
            S3 credentials: a file in the format of `~/.aws/credentials`, read again when they expire

            [env: GS_PITR_S3_CREDENTIALS_FILE]

        --s3-credentials-command <ARGV>
            S3 credentials: a command (no shell) that prints them as AWS's `credential_process` does

            [env: GS_PITR_S3_CREDENTIALS_COMMAND]

        --tls-crt <FILE>
            Our certificate for the agents [default: `~/.gs_pitr/certs/operator.crt`]

            [env: GS_PITR_TLS_CRT]

        --tls-key <FILE>
            Its key [default: `~/.gs_pitr/certs/operator.key`]

            [env: GS_PITR_TLS_KEY]

        --tls-ca <FILE>
            CA that signs the agents' certificates [default: `~/.gs_pitr/certs/ca.crt`]

            [env: GS_PITR_TLS_CA]

        --insecure-http[=<BOOL>]
            Talk plain HTTP to the agents; only for agents on loopback

            [env: GS_PITR_INSECURE_HTTP]

        --agent-timeout <SECONDS>
            Seconds without an answer after which an agent counts as lost [default: 60]

            [env: GS_PITR_AGENT_TIMEOUT]

        --lease-ttl <SECONDS>
            Seconds until another may take over from this command if it dies [default: 60]

            [env: GS_PITR_LEASE_TTL]

        --profile <NAME>
            Profile of the configuration file to use

            [env: GS_PITR_PROFILE]

        --config <FILE>
            Configuration file [default: `~/.gs_pitr/config.toml`, if there is one]

            [env: GS_PITR_CONFIG]

        --output <FORMAT>
            How results are written [default: text]

            Possible values:
            - text: For people: results on stdout, all else on stderr
            - json: JSON lines on stdout, the last one is the result

            [env: GS_PITR_OUTPUT]

    -y, --yes
            Answer yes to every question

    -v, --verbose...
            Say more on stderr; twice: much more

        --no-progress[=<BOOL>]
            No progress bars

            [env: GS_PITR_NO_PROGRESS]
    ");
}

#[test]
fn the_way_to_the_proxies() {
    insta::assert_snapshot!(help(&["backup"]).proxies.unwrap(), @r"
      -H, --host <HOST>
              A proxy of the cluster; it names the others, and the data nodes

              [env: GS_PITR_PROXY_HOST]

      -P, --port <PORT>
              Its port [default: 3307]

              [env: GS_PITR_PROXY_PORT]

      -u, --username <USER>
              User of all proxies

              [env: GS_PITR_PROXY_USERNAME]

      -p, --password <PASSWORD>
              Its password, which every process of this host can see here: rather set
              `GS_PITR_PROXY_PASSWORD`, give `--password-file`, or give none and be asked

          --password-file <FILE>
              File (mode 0600) with the password in its first line

              [env: GS_PITR_PROXY_PASSWORD_FILE]

          --proxies <HOST:PORT,...>
              More proxies, as they are reached from here

              [env: GS_PITR_PROXIES]

          --proxy-map <LISTED=HOST:PORT,...>
              A proxy that is listed as LISTED (`host:port`) is reached at HOST:PORT

              [env: GS_PITR_PROXY_MAP]

          --proxy-tls[=<BOOL>]
              Talk TLS to the proxies

              [env: GS_PITR_PROXY_TLS]

          --proxy-ca <FILE>
              Certificates (PEM) that the proxies' are signed by; implies `--proxy-tls`

              [env: GS_PITR_PROXY_CA]

      -a, --agent-port <PORT>
              Port of the agent on each data node's host [default: 18080]

              [env: GS_PITR_AGENT_PORT]

          --agents <NODE=HOST:PORT,...>
              The agent of data node NODE (`host:port`, as the proxy has it) is at HOST:PORT

              [env: GS_PITR_AGENTS]
    ");
}

#[test]
fn exit_codes() {
    insta::assert_snapshot!(help(&[]).codes, @r"
      0  ok                 it did what was asked
      1  internal           a bug, or something nobody foresaw
      2  usage              the command line or the configuration is wrong
      3  store-unavailable  the bucket cannot be reached or does not exist
      4  store-denied       the store refuses the credentials or an action
      5  agent-unreachable  an agent cannot be reached
      6  certificate        a certificate is missing, expired, unknown or of the wrong kind
      7  database           the database is not there, refuses us, or lacks a privilege or setting
      8  not-found          no backup, point, node or operation of that name
      9  damaged            stored bytes are missing or are not what was written
     10  target             the restore target is not empty, not allowed, or has no room
     11  incompatible       another major version of PostgreSQL, or a newer format
     12  conflict           something else is under way or was there first
     13  timeout            it took longer than it may
     14  recovery           a recovery ended anywhere else than at its point
    130  cancelled          somebody asked for it to stop
    ");
}

#[test]
fn main_page() {
    insta::assert_snapshot!(help(&[]).own, @r"
    One backup of a whole cluster, straight into a bucket, and back

    Usage: gs_pitr [OPTIONS] <COMMAND>

    Commands:
      backup       Back up all nodes to one point
      point        Make points to recover to without copying anything, or list them
      show         List the backups, or one in detail
      restore      Bring all nodes of a backup back, where they live or in fresh directories, recovered
                   to a point
      delete       Delete one backup
      prune        Remove old backups by a retention, and what dead ones left
      verify       Read stored bytes back and find every damage
      check        Find out whether backups and restores will work, and what to mend
      unlock       Clear a lock that is left on a ShardingSphere cluster, after showing what is known of
                   it
      metadata     Compare the databases and rules that the proxies know with those of a point, and
                   bring those back
      operations   List what ran, show one operation, or finish one that was left
      wal          Show, start or stop the WAL that the agents ship all the time
      certs        Make certificates for the agents and for this program
      completions  Print a script that completes this program's command line
      man          Print the manual page, or write all of them
      help         Print this message or the help of the given subcommand(s)

    Options:
      -h, --help
              Print help (see a summary with '-h')

      -V, --version
              Print version

    Examples:
      gs_pitr certs init
      gs_pitr backup --repo s3://backups/prod --nodes db1:18080,db2:18080
      gs_pitr show --repo s3://backups/prod
      gs_pitr restore --repo s3://backups/prod --id 20261121T040233Z-F-9f3c1a2b \
          --nodes db1:18080,db2:18080 --target-dir /srv/restored
    ");
}

#[test]
fn completions_and_manual_pages_are_made() {
    let home = Home::new();
    for shell in ["bash", "zsh", "fish"] {
        let script = home.run(&["completions", shell]);
        assert_eq!(script.code, 0, "{script:?}");
        assert!(script.stdout.contains("target-dir"), "{shell}");
    }
    let page = home.run(&["man"]);
    assert!(page.stdout.contains(".TH gs_pitr 1"), "{page:?}");
    std::fs::create_dir(home.path().join("pages")).unwrap();
    assert_eq!(home.run(&["man", "--dir", "pages"]).code, 0);
    for page in ["gs_pitr.1", "gs_pitr-backup.1", "gs_pitr-certs-issue.1"] {
        assert!(home.path().join("pages").join(page).exists(), "{page}");
    }
}
