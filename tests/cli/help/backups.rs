//! Backups: making, listing and deleting them.

use super::help;

#[test]
fn backup() {
    insta::assert_snapshot!(help(&["backup"]).own, @r"
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
              FULL, or what changed since an earlier backup: PTRACK, DELTA or PAGE

              [default: FULL]
              [possible values: FULL, PTRACK, DELTA, PAGE]

          --parent <ID>
              The backup that an increment builds on [default: the newest that fits]

          --engine <ENGINE>
              What makes the copies: a probackup, or the agents themselves

              Possible values:
              - auto:      Where all hosts have a probackup and FUSE, that; else the agents themselves
              - probackup: `gs_probackup` or `pg_probackup`, through a mount that is a stream
              - direct:    The agents read the data directories (PostgreSQL only, FULL only)

              [env: GS_PITR_ENGINE]
              [default: auto]

          --wal <MODE>
              What becomes of the nodes' WAL after it: `continuous`: the agents ship it all the time
              from now on, so that points can follow; `backup`: it ends at this backup's point

              [env: GS_PITR_WAL]
              [default: continuous]

          --label <TEXT>
              A word or two about this backup

          --level <N>
              zstd level, 1 (fast) to 19 (small) [default: 1]

              [env: GS_PITR_LEVEL]

          --pace <PACE>
              How much of the processors of a data node the copy takes: `gentle`: while the database is
              at work, only what hardly makes it wait; `full`: all that there is

              [env: GS_PITR_PACE]
              [default: gentle]

          --spread-checkpoint
              Let the checkpoint at the start take its time, rather than hurry it

          --node-id <HOST:PORT=UUID>
              This agent's database is the node registered as UUID, wherever it lived before

          --new-node <HOST:PORT>
              This agent's database is a new node, whatever it resembles

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

          --require-cluster
              Fail if no point of the whole cluster can be proved, rather than make one per node;
              through a proxy it always does

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
      gs_pitr backup --nodes db1:18080,db2:18080
      gs_pitr backup --nodes db1:18080,db2:18080 -j 8 --label 'before the upgrade' --bandwidth 50MiB
      GS_PITR_PROXY_PASSWORD=... gs_pitr backup --host proxy1 --username root
      gs_pitr backup --profile prod --output json
    ");
}

#[test]
fn show() {
    insta::assert_snapshot!(help(&["show"]).own, @r"
    List the backups, or one in detail

    Usage: gs_pitr show [OPTIONS] [ID]

    Arguments:
      [ID]
              The backup's id, or the beginning of one that is unique; without it, all are listed

    Options:
          --id <ID>
              The same as ID

          --csn <CSN>
              Only backups whose point has this commit sequence number; it may be several

          --from-mirror
              Show what the local mirror had when the bucket was last seen; never a basis for a restore

          --nodes <HOST:PORT,...>
              The agents, one a data node, by their own addresses

              [env: GS_PITR_NODES]

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
fn delete() {
    insta::assert_snapshot!(help(&["delete"]).own, @r"
    Delete one backup

    Usage: gs_pitr delete [OPTIONS]

    Options:
          --id <ID>
              The backup's id, or the beginning of one that is unique

          --csn <CSN>
              The only backup whose point has this commit sequence number

          --even-last-good
              Delete it even if it is the last good one, so that none is left

          --dry-run
              Show what would be deleted, and delete nothing

      -h, --help
              Print help (see a summary with '-h')

    Examples:
      gs_pitr delete --id 20261121T04 --dry-run
      gs_pitr delete --id 20261121T04 --yes
    ");
}
