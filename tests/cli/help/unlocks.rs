//! The cluster before and after: what is checked, and a lock that is left.

use super::help;

#[test]
fn check() {
    insta::assert_snapshot!(help(&["check"]).own, @r"
    Find out whether backups and restores will work, and what to mend

    Usage: gs_pitr check [OPTIONS]

    Options:
          --nodes <HOST:PORT,...>
              The agents, one a data node, by their own addresses

              [env: GS_PITR_NODES]

      -h, --help
              Print help (see a summary with '-h')

    Examples:
      gs_pitr check --nodes db1:18080,db2:18080
      gs_pitr check --host proxy1 --username root --password-file /etc/gs_pitr/proxy
    ");
}

#[test]
fn unlock() {
    insta::assert_snapshot!(help(&["unlock"]).own, @r"
    Clear a lock that is left on a ShardingSphere cluster, after showing what is known of it

    Usage: gs_pitr unlock [OPTIONS]

    Options:
      -h, --help
              Print help (see a summary with '-h')

    Examples:
      gs_pitr unlock --host proxy1 --username root
      gs_pitr unlock --host proxy1 --username root --password-file /etc/gs_pitr/proxy --yes
    ");
}
