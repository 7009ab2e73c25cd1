//! Bringing them back.

use super::help;

#[test]
fn restore() {
    insta::assert_snapshot!(help(&["restore"]).own, @r"
    Bring all nodes of a backup back, where they live or in fresh directories, recovered to a point

    Usage: gs_pitr restore [OPTIONS]

    Options:
          --id <ID>
              The backup's id, or the beginning of one that is unique; alone: to its own point

          --point <POINT>
              To this point, or the beginning of its id, from the newest backup that leads there

          --csn <CSN>
              To the point with this commit sequence number

          --time <TIME>
              To the last point of the whole cluster that was not made after this: RFC 3339, or a local
              date and time

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

          --lock <WHEN>
              Whether writes through the proxies are refused while the databases are stopped, replaced
              and opened [default: with a proxy `always`, without one `never`]

              Possible values:
              - always: With the lock
              - never:  Without

          --lock-timeout <SECONDS>
              Unlock when the agents have not heard of this program for so long: it is dead, or cut off

              [default: 30]

          --import-metadata
              Then drop the databases that differ from the point's at the proxies, and import those of
              the point

          --metadata-secrets <FILE>
              File (mode 0600) with a line NAME=SECRET for each secret of the metadata that the proxies
              do not know any more

              [env: GS_PITR_METADATA_SECRETS]

      -h, --help
              Print help (see a summary with '-h')

    Examples:
      gs_pitr restore --id 20261121T04 --nodes db1:18080,db2:18080
      gs_pitr restore --id 20261121T04 --host proxy1 --username root
      gs_pitr restore --time '2026-11-21 04:02:00' --nodes db1:18080,db2:18080
      gs_pitr restore --id 20261121T04 --nodes db1:18080,db2:18080 --target-dir /srv/restored --yes
      gs_pitr restore --id 20261121T04 --nodes new1:18080,new2:18080 --target-dir /srv/restored \
          --map db1:5432=new1:18080 --map db2:5432=new2:18080 --no-start
    ");
}
