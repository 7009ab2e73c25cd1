//! A cluster for people to look at: `make cluster` keeps one, `make demo` destroys one.

use std::time::Duration;

use crate::bank::{BankOptions, Mix};
use crate::postgres::{Cluster, Installation};
use crate::proxy::Delays;
use crate::real_proxy as real;
use crate::sharded::{SHARD, ShardedCluster, ShardedOptions};

/// Two nodes, two proxies with the delays that were measured, and a real bucket if there is one here.
///
/// # Panics
/// If something does not start.
pub async fn cluster(name: &'static str) -> ShardedCluster {
    // As the agents advise.
    let keep = ("max_slot_wal_keep_size".to_owned(), "1GB".to_owned());
    ShardedCluster::quietly(ShardedOptions {
        name,
        nodes: 2,
        delays: Delays::Measured,
        real_bucket: true,
        settings: vec![keep],
        ..ShardedOptions::default()
    })
    .await
}

/// Clients of every kind, none of them in a hurry.
pub fn clients() -> BankOptions {
    BankOptions {
        seed: rand::random(),
        mix: Mix {
            simple: 2,
            prepared: 2,
            batch: 1,
            autocommit: 1,
            one_node: 1,
            two_phase: 1,
        },
        pause: Duration::from_millis(300),
        passing_pause: Duration::from_secs(1),
        shift: 0,
    }
}

/// What there is, a line each.
pub fn describe(cluster: &ShardedCluster) -> [String; 3] {
    let on = |ports: Vec<u16>| {
        let all = ports.iter().map(|port| format!("127.0.0.1:{port}"));
        all.collect::<Vec<_>>().join(", ")
    };
    let nodes = cluster.databases().into_iter().map(Cluster::port);
    let proxies = (0..cluster.proxy_count()).map(|number| cluster.proxy_port(number));
    [
        format!(
            "nodes    PostgreSQL {} on {} (database {SHARD}), an agent beside each",
            Installation::newest().major,
            on(nodes.collect()),
        ),
        format!(
            "proxies  {} on {} (database {}, user {}, password {})",
            cluster.describe(),
            on(proxies.collect()),
            real::DATABASE,
            real::USER,
            real::PASSWORD,
        ),
        format!("bucket   {}", cluster.bucket.describe()),
    ]
}

/// The words after `gs_pitr` as the Go tool's users type them. It takes the agents to be on the nodes' hosts at one port; here
/// `GS_PITR_AGENTS` says where they are.
pub fn go_tool_backup(cluster: &ShardedCluster) -> Vec<String> {
    let port = cluster.proxy_port(0).to_string();
    let access = cluster.access(0, real::DATABASE);
    let words = [
        "backup",
        "--host",
        "127.0.0.1",
        "--port",
        &port,
        "--username",
        &access.user,
        "--password",
        &access.password,
        "--agent-port",
        "18080",
        "--dn-threads-num",
        "10",
        "--dn-backup-path",
        "/home/omm/data",
        "-b",
        "FULL",
    ];
    words.map(str::to_owned).to_vec()
}
