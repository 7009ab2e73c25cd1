//! What is done to proxies of either kind.

use std::any::Any;
use std::fs;
use std::ops::Range;
use std::path::Path;
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};
use support::bank::wire::{Session, WireError};
use support::postgres::Cluster;
use support::proxy::ClusterState;
use support::sharded::{Proxies, ShardedCluster};

const PROBE: &str = r#"LABEL COMPUTE NODE "gs_pitr_probe" WITH probe"#;
const LOCK: &str = r#"LOCK CLUSTER WITH LOCK_STRATEGY(TYPE(NAME="WRITE")) TIMEOUT 3000"#;
const UNLOCK: &str = "UNLOCK CLUSTER TIMEOUT 3000";
/// Until every proxy has heard of a lock, on a machine that has other things to do.
const FOLLOWS: Duration = Duration::from_secs(10);

pub(crate) fn kill(cluster: &mut ShardedCluster, number: usize) {
    match &mut cluster.proxies {
        Proxies::StandIn(farm) => farm.kill(number),
        Proxies::Real(real) => real.kill(number),
    }
}

pub(crate) fn freeze(cluster: &ShardedCluster, number: usize) {
    match &cluster.proxies {
        Proxies::StandIn(farm) => farm.freeze(number),
        Proxies::Real(real) => real.freeze(number),
    }
}

pub(crate) fn thaw(cluster: &ShardedCluster, number: usize) {
    match &cluster.proxies {
        Proxies::StandIn(farm) => farm.thaw(number),
        Proxies::Real(real) => real.thaw(number),
    }
}

pub(crate) fn cut_off(cluster: &ShardedCluster, number: usize) {
    match &cluster.proxies {
        Proxies::StandIn(farm) => farm.cut_off(number),
        Proxies::Real(real) => real.cut_off(number),
    }
}

pub(crate) fn reconnect(cluster: &ShardedCluster, number: usize) {
    match &cluster.proxies {
        Proxies::StandIn(farm) => farm.reconnect(number),
        Proxies::Real(real) => real.reconnect(number),
    }
}

/// Whoever wants to lock or unlock waits in vain while this lives.
pub(crate) fn hold_mutex(cluster: &ShardedCluster) -> Box<dyn Any + Send> {
    match &cluster.proxies {
        Proxies::StandIn(farm) => Box::new(farm.hold_mutex()),
        Proxies::Real(real) => Box::new(real.hold_mutex()),
    }
}

/// Locks the cluster as somebody else does, through its first proxy, and waits until every proxy refuses.
pub(crate) async fn lock(cluster: &ShardedCluster) {
    said(cluster, LOCK).await;
    for number in 0..cluster.proxy_count() {
        let begun = Instant::now();
        while !refuses(cluster, number).await {
            assert!(begun.elapsed() < FOLLOWS, "proxy {number} does not follow");
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }
}

/// Ends [`lock`], and waits until every proxy lets writes pass.
pub(crate) async fn unlock(cluster: &ShardedCluster) {
    said(cluster, UNLOCK).await;
    until_open(cluster, 0..cluster.proxy_count(), FOLLOWS).await;
}

/// Whether the state that the proxies share is a locked one; a proxy may not have heard of it yet.
pub(crate) fn is_locked(cluster: &ShardedCluster) -> bool {
    match &cluster.proxies {
        Proxies::StandIn(farm) => farm.state() != ClusterState::Ok,
        Proxies::Real(real) => real.state() != "OK",
    }
}

/// Whether it ever was. A real one has to be looked at while it is.
pub(crate) fn was_locked(cluster: &ShardedCluster) -> bool {
    match &cluster.proxies {
        Proxies::StandIn(farm) => farm.locks() > 0,
        Proxies::Real(_) => is_locked(cluster),
    }
}

async fn said(cluster: &ShardedCluster, sql: &str) {
    let session = Session::open(&cluster.access(0, "postgres")).await;
    let said = session.expect("a session").query(sql).await;
    said.unwrap_or_else(|error| panic!("{sql}: {error}"));
}

/// Whether a proxy refuses the probe because of a lock.
async fn refuses(cluster: &ShardedCluster, number: usize) -> bool {
    let access = cluster.access(number, "postgres");
    let probe = async { Session::open(&access).await?.query(PROBE).await };
    let said: Result<_, WireError> = probe.await;
    said.is_err_and(|error| error.is_lock())
}

/// Each of `proxies` lets the probe pass within `patience`: it asks no node.
pub(crate) async fn until_open(
    cluster: &ShardedCluster,
    proxies: Range<usize>,
    patience: Duration,
) {
    let begun = Instant::now();
    for number in proxies {
        let access = cluster.access(number, "postgres");
        loop {
            let probe = async { Session::open(&access).await?.query(PROBE).await };
            let said: Result<_, WireError> = probe.await;
            let Err(error) = said else { break };
            assert!(begun.elapsed() < patience, "proxy {number}: {error}");
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    }
}

/// SIGKILL of a database, and of nothing else: its children notice. Nothing that was not flushed is there afterwards.
pub(crate) async fn kill_database(database: &Cluster) {
    let pid = database.pid().expect("it runs");
    let children = fs::read_to_string(format!("/proc/{pid}/task/{pid}/children"));
    let children = children.expect("its children");
    let number = i32::try_from(pid).ok().and_then(Pid::from_raw);
    kill_process(number.expect("a process"), Signal::KILL).expect("SIGKILL");
    let begun = Instant::now();
    let lives = |child: &str| Path::new("/proc").join(child).exists();
    while children.split_whitespace().any(lives) {
        assert!(
            begun.elapsed() < Duration::from_mins(1),
            "its processes do not end"
        );
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}
