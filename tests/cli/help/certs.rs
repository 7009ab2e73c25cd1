//! Certificates.

use super::help;

#[test]
fn certs() {
    insta::assert_snapshot!(help(&["certs"]).own, @r"
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
    insta::assert_snapshot!(help(&["certs", "init"]).own, @r#"
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
    insta::assert_snapshot!(help(&["certs", "issue"]).own, @r"
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
