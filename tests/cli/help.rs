//! Help of every command: its own part as a snapshot, the part that all share once.

use crate::Home;

const COMMANDS: [&[&str]; 14] = [
    &[],
    &["backup"],
    &["show"],
    &["restore"],
    &["delete"],
    &["prune"],
    &["operations"],
    &["operations", "resume"],
    &["operations", "discard"],
    &["certs"],
    &["certs", "init"],
    &["certs", "issue"],
    &["completions"],
    &["man"],
];

/// What `--help` says: the command's own part, the global options, and the end.
fn help(command: &[&str]) -> (String, String, String) {
    let mut args = command.to_vec();
    args.push("--help");
    let ran = Home::new().run(&args);
    assert_eq!(ran.code, 0, "{ran:?}");
    let lines: Vec<_> = ran.stdout.lines().map(str::trim_end).collect();
    let text = lines.join("\n");
    let (own, rest) = text.split_once("Global options:\n").unwrap();
    let (global, end) = rest.split_once("Examples:\n").unwrap();
    let (examples, codes) = end.split_once("Exit codes:\n").unwrap();
    (
        format!("{own}Examples:\n{examples}"),
        global.to_owned(),
        codes.to_owned(),
    )
}

#[test]
fn every_help_has_examples_and_ends_with_the_exit_codes() {
    let (_, global, codes) = help(&[]);
    assert!(
        codes
            .trim_end()
            .ends_with("130  cancelled          somebody asked for it to stop"),
        "{codes}"
    );
    for command in COMMANDS {
        let (own, its_global, its_codes) = help(command);
        assert!(own.contains("\n  gs_pitr "), "{command:?}: {own}");
        assert_eq!(its_codes, codes, "{command:?}");
        let bare = |text: &str| text.split("  -h, --help").next().unwrap().trim().to_owned();
        assert_eq!(bare(&its_global), bare(&global), "{command:?}");
    }
}

#[test]
fn global_options() {
    insta::assert_snapshot!(help(&[]).1, @r"
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
fn exit_codes() {
    insta::assert_snapshot!(help(&[]).2, @r"
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
    insta::assert_snapshot!(help(&[]).0, @r"
    One backup of a whole cluster, straight into a bucket, and back

    Usage: gs_pitr [OPTIONS] <COMMAND>

    Commands:
      backup       Back up all nodes to one point
      show         List the backups, or one in detail
      restore      Bring all nodes of a backup back, where they live or in fresh directories, recovered
                   to its point
      delete       Delete one backup
      prune        Remove old backups by a retention, and what dead ones left
      verify       Read stored bytes back and find every damage
      check        Find out whether backups and restores will work, and what to mend
      operations   List what ran, show one operation, or finish one that was left
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
fn backup() {
    insta::assert_snapshot!(help(&["backup"]).0, @r"
    Back up all nodes to one point

    Usage: gs_pitr backup [OPTIONS]

    Options:
          --nodes <HOST:PORT,...>
              The agents, one a data node, by their own addresses

              [env: GS_PITR_NODES]

      -j, --jobs <N>
              Files or ranges that each agent works on at the same time [default: 4]

              [env: GS_PITR_JOBS]

          --bandwidth <RATE>
              Most bytes a second that each agent sends to or fetches from the bucket, such as 50MiB

              [env: GS_PITR_BANDWIDTH]

      -b, --mode <MODE>
              Kind of backup; only FULL for now

              [default: FULL]
              [possible values: FULL]

          --label <TEXT>
              A word or two about this backup

          --level <N>
              zstd level, 1 (fast) to 19 (small) [default: 1]

              [env: GS_PITR_LEVEL]

          --spread-checkpoint
              Let the checkpoint at the start take its time, rather than hurry it

          --lock <WHEN>
              How the cluster is held still for its point; only `never` without a proxy

              [default: never]
              [possible values: never]

          --require-cluster
              Fail if no point of the whole cluster can be proved, rather than make one per node

          --accept-in-doubt
              Prove the point although transactions stay prepared, and list those in it

          --point-retries <N>
              Try so often again to prove the point, each time under a new name

              [default: 500]

          --point-timeout <SECONDS>
              Try to prove the point for so long

              [default: 30]

          --node-id <HOST:PORT=UUID>
              This agent's database is the node registered as UUID, wherever it lived before

          --new-node <HOST:PORT>
              This agent's database is a new node, whatever it resembles

      -h, --help
              Print help (see a summary with '-h')

    Examples:
      gs_pitr backup --nodes db1:18080,db2:18080
      gs_pitr backup --nodes db1:18080,db2:18080 -j 8 --label 'before the upgrade' --bandwidth 50MiB
      gs_pitr backup --profile prod --output json
    ");
}

#[test]
fn show() {
    insta::assert_snapshot!(help(&["show"]).0, @r"
    List the backups, or one in detail

    Usage: gs_pitr show [OPTIONS] [ID]

    Arguments:
      [ID]
              The backup's id, or the beginning of one that is unique; without it, all are listed

    Options:
          --from-mirror
              Show what the local mirror had when the bucket was last seen; never a basis for a restore

      -h, --help
              Print help (see a summary with '-h')

    Examples:
      gs_pitr show
      gs_pitr show 20261121T04
      gs_pitr show --output json
      gs_pitr show --from-mirror
    ");
}

#[test]
fn restore() {
    insta::assert_snapshot!(help(&["restore"]).0, @r"
    Bring all nodes of a backup back, where they live or in fresh directories, recovered to its point

    Usage: gs_pitr restore [OPTIONS] --id <ID>

    Options:
          --id <ID>
              The backup's id, or the beginning of one that is unique

          --nodes <HOST:PORT,...>
              The agents, one a data node, by their own addresses

              [env: GS_PITR_NODES]

      -j, --jobs <N>
              Files or ranges that each agent works on at the same time [default: 4]

              [env: GS_PITR_JOBS]

          --bandwidth <RATE>
              Most bytes a second that each agent sends to or fetches from the bucket, such as 50MiB

              [env: GS_PITR_BANDWIDTH]

          --node <NODE>
              Only this node of the backup; NODE is a node's id, the beginning of one, or its source's
              host:port

          --map <NODE=HOST:PORT>
              NODE goes to this agent

          --target-dir <DIR>
              Fresh directory on the agents' hosts: each node goes to `DIR/<node-id>` [default: over the
              databases where they live]

          --db-port <NODE=PORT>
              Port of the restored database [default: the one that is there, or that its agent was told,
              or the source's]

          --no-start
              Leave the restored databases stopped

          --clone
              The restored databases are new nodes beside the originals

          --in-place
              Remove what is there before the copy is made, for want of room: there is no way back

          --discard-old
              Remove what was there as soon as all nodes are open

          --manager-paused
              The cluster manager that is found beside a database is paused or stopped, and leaves it
              alone

          --stop-early
              Allow a running database to be stopped before the decision, where the backup's WAL creates
              a tablespace in a directory that it uses

      -h, --help
              Print help (see a summary with '-h')

    Examples:
      gs_pitr restore --id 20261121T04 --nodes db1:18080,db2:18080
      gs_pitr restore --id 20261121T04 --nodes db1:18080,db2:18080 --target-dir /srv/restored --yes
      gs_pitr restore --id 20261121T04 --nodes new1:18080,new2:18080 --target-dir /srv/restored \
          --map db1:5432=new1:18080 --map db2:5432=new2:18080 --no-start
    ");
}

#[test]
fn certs() {
    insta::assert_snapshot!(help(&["certs"]).0, @r"
    Make certificates for the agents and for this program

    Usage: gs_pitr certs [OPTIONS] <COMMAND>

    Commands:
      init   Make a CA and the operator's certificate
      issue  Issue an agent's certificate, or renew the operator's
      help   Print this message or the help of the given subcommand(s)

    Options:
      -h, --help
              Print help (see a summary with '-h')

    Examples:
      gs_pitr certs init
      gs_pitr certs issue --name db1 --san db1.example --san 10.0.0.11
    ");
}

#[test]
fn certs_init() {
    insta::assert_snapshot!(help(&["certs", "init"]).0, @r#"
    Make a CA and the operator's certificate

    Usage: gs_pitr certs init [OPTIONS]

    Options:
          --dir <DIR>
              Where the files go; without it, `~/.gs_pitr/certs`

          --name <CN>
              Common name of the CA

              [default: "gs_pitr CA"]

          --days <N>
              Days that the operator's certificate is valid (the CA: ten years)

              [default: 365]

      -h, --help
              Print help (see a summary with '-h')

    Examples:
      gs_pitr certs init
      gs_pitr certs init --dir /etc/gs_pitr/certs --name 'backup of prod'
    "#);
}

#[test]
fn certs_issue() {
    insta::assert_snapshot!(help(&["certs", "issue"]).0, @r"
    Issue an agent's certificate, or renew the operator's

    Usage: gs_pitr certs issue [OPTIONS]

    Options:
          --name <NAME>
              Name of the certificate and its files: NAME.crt and NAME.key

          --san <DNS-OR-IP>
              DNS name or IP address that clients reach the agent under; repeat for more

          --operator
              Renew the operator's certificate (its key stays)

          --dir <DIR>
              Where the CA is; without it, `~/.gs_pitr/certs`

          --out <DIR>
              Where the agent's files go [default: as --dir]

          --days <N>
              Days that it is valid

              [default: 365]

      -h, --help
              Print help (see a summary with '-h')

    Examples:
      gs_pitr certs issue --name db1 --san db1.example --san 10.0.0.11
      gs_pitr certs issue --name db1 --san db1.example --out /tmp/db1 --days 90
      gs_pitr certs issue --operator
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
