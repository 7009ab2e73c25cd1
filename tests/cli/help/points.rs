//! Points.

use super::help;

#[test]
fn point() {
    insta::assert_snapshot!(help(&["point"]).own, @r"
    Make points to recover to without copying anything, or list them

    Usage: gs_pitr point [OPTIONS] <COMMAND>

    Commands:
      create  Make a point that a backup can be recovered to, without copying anything
      list    List the points, each with the backup that leads to it, or why none does
      help    Print this message or the help of the given subcommand(s)

    Options:
      -h, --help
              Print help (see a summary with '-h')

    Examples:
      gs_pitr point create --nodes db1:18080,db2:18080 --every 5m
      gs_pitr point list
    ");
}

#[test]
fn point_create() {
    insta::assert_snapshot!(help(&["point", "create"]).own, @r"
    Make a point that a backup can be recovered to, without copying anything

    Usage: gs_pitr point create [OPTIONS]

    Options:
          --nodes <HOST:PORT,...>
              The agents, one a data node, by their own addresses

              [env: GS_PITR_NODES]

          --label <TEXT>
              A word or two about this point

          --every <SPAN>
              Go on, and make one so often, such as `5m`, until it is told to stop

          --per-node
              Make a point that is consistent per node only, if none of the whole cluster can be proved

          --lock <WHEN>
              Whether the cluster is locked for its point; `auto`: only if it is not quiet enough
              without [default: through a proxy `always` for a backup and `auto` for a point, with
              `--nodes` `never`]

              Possible values:
              - always: With the lock
              - auto:   Without at first, then with the lock
              - never:  Without

          --lock-timeout <SECONDS>
              Unlock after so long, whatever has been reached; watchdogs in the agents see to it if this
              program cannot

              [default: 2]

          --lock-budget <SECONDS>
              Lock the cluster for no longer than this within an hour, all tries and points together

              [default: 20]

          --accept-in-doubt
              Prove the point although transactions stay prepared, and list those in it

          --point-retries <N>
              Try so often again to prove the point, each time under a new name [default: 500, with the
              lock 20]

          --point-timeout <SECONDS>
              Try to prove the point for so long [default: 30, through a proxy 600 for a backup and 60
              for a point]

      -h, --help
              Print help (see a summary with '-h')

    Examples:
      gs_pitr point create --nodes db1:18080,db2:18080 --label 'before the migration'
      gs_pitr point create --nodes db1:18080,db2:18080 --every 5m --output json
    ");
}

#[test]
fn point_list() {
    insta::assert_snapshot!(help(&["point", "list"]).own, @r"
    List the points, each with the backup that leads to it, or why none does

    Usage: gs_pitr point list [OPTIONS]

    Options:
          --from <TIME>
              Only points that were not made before this: RFC 3339, or a local date and time

          --to <TIME>
              Only points that were not made after this

          --unreachable
              Only points that no backup leads to

          --limit <N>
              List so many, the newest; 0: all

              [default: 100]

      -h, --help
              Print help (see a summary with '-h')

    Examples:
      gs_pitr point list
      gs_pitr point list --unreachable
      gs_pitr point list --from '2026-11-21 04:00' --to 2026-11-21T06:00:00Z --output json
    ");
}
