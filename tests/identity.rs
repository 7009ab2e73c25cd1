//! A database and a copy of it, file by file: same system identifier, same port. Nothing of one is ever taken for the
//! other's.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    reason = "a panic is a failed test, with its reason"
)]

use std::collections::BTreeSet;
use std::fs;
use std::process::Command;
use std::time::Duration;

use agent_api::client::{AgentClient, ClientTls, Transport};
use agent_api::{
    BackupSpec, Credentials, ErrorKind, OperationSpec, Phase, RepositoryAccess, Secret,
    StartOperation,
};
use catalog::Catalog;
use catalog::ids::{BackupId, EpochId};
use catalog::model::Manifest;
use catalog::wal::{self, WalFile};
use futures_util::TryStreamExt as _;
use jiff::Timestamp;
use pipeline::store::s3::CredentialSource;
use support::bucket::Bucket;
use support::fleet::{Fleet, Host, Run};
use support::os;
use support::postgres::{ClusterOptions, Installation};
use tokio::task::JoinHandle;
use uuid::Uuid;

/// Words that only one of the two databases ever writes.
const MARKERS: [&str; 2] = ["only-the-original-writes-this", "only-the-copy-writes-this"];

/// A database, and a copy of it beside it, both running and different by now.
async fn original_and_copy(bucket: &Bucket) -> Fleet {
    let mut fleet = Fleet::new("identity", &bucket.config());
    fleet.add_database(
        "original",
        &Installation::newest(),
        ClusterOptions::default(),
    );
    let original = fleet.hosts[0].cluster.as_ref().expect("a database");
    original.execute("CREATE TABLE words (word text)").await;
    original.stop("fast");
    let root = fleet.path().join("copy");
    fs::create_dir(&root).expect("a directory");
    os::give(&root);
    let copy = original.copied_to(&root);
    original.start();
    copy.start();
    assert_eq!(original.port(), copy.port());
    let agent = fleet.start_agent("copy", &root, Some(&copy), &[]);
    fleet.hosts.push(Host {
        name: "copy".into(),
        root,
        cluster: Some(copy),
        agent,
        flags: Vec::new(),
    });
    fleet
}

/// Has each database write its own words until this is dropped.
struct Writers(Vec<JoinHandle<()>>);

impl Writers {
    async fn start(fleet: &Fleet) -> Self {
        let mut writers = Vec::new();
        for (host, marker) in fleet.hosts.iter().zip(MARKERS) {
            let client = host
                .cluster
                .as_ref()
                .expect("a database")
                .connect("postgres")
                .await;
            writers.push(tokio::spawn(async move {
                let sql =
                    format!("INSERT INTO words SELECT '{marker}' FROM generate_series(1, 20)");
                loop {
                    client.batch_execute(&sql).await.expect("it writes");
                    tokio::time::sleep(Duration::from_millis(10)).await;
                }
            }));
        }
        Self(writers)
    }
}

impl Drop for Writers {
    fn drop(&mut self) {
        for writer in &self.0 {
            writer.abort();
        }
    }
}

/// A backup while both databases write.
async fn backup(fleet: &Fleet, hosts: &[usize], more: &[&str]) -> Run {
    let _writers = Writers::start(fleet).await;
    let nodes = fleet.addresses(hosts);
    let args = ["backup", "--output", "json", "--nodes", &nodes];
    let args: Vec<_> = args.iter().chain(more).copied().collect();
    fleet.run(&args)
}

async fn manifest(bucket: &Bucket, run: &Run) -> Manifest {
    let id = run.result()["backup_id"]
        .as_str()
        .expect("an id")
        .to_owned();
    bucket.recorded(&id).await.0
}

async fn keys(bucket: &Bucket) -> Vec<String> {
    let store = bucket.store();
    let listed = store.list("").map_ok(|meta| meta.key.to_string());
    listed.try_collect().await.expect("a listing")
}

/// How many lines `grep` finds: quick also where our own code is not optimised.
fn occurrences(bytes: &[u8], words: &str) -> usize {
    let file = tempfile::NamedTempFile::new().expect("a file");
    fs::write(file.path(), bytes).expect("a file");
    let grep = Command::new("grep")
        .args(["-a", "-o", "-F", words])
        .arg(file.path())
        .output();
    let output = grep.expect("grep runs");
    assert!(
        output.status.code().is_some_and(|code| code < 2),
        "{output:?}"
    );
    output
        .stdout
        .split(|byte| *byte == b'\n')
        .filter(|line| !line.is_empty())
        .count()
}

/// Reads every WAL segment of a node back: how often each marker is in them.
async fn markers_in_wal(bucket: &Bucket, node: Uuid) -> [usize; 2] {
    let store = bucket.store();
    let catalog = Catalog::open(bucket.store()).await.expect("a repository");
    let mut counts = [0; 2];
    for epoch in catalog.epochs(node).await.expect("epochs") {
        let listed = wal::list_segments(&*store, node, &epoch.epoch)
            .await
            .expect("segments");
        assert!(!listed.is_empty(), "node {node} has WAL");
        for segment in listed {
            let file = WalFile {
                node,
                epoch: epoch.epoch.clone(),
                name: segment.name,
            };
            let mut plain = Vec::new();
            wal::get_segment(&*store, &file, &mut plain)
                .await
                .expect("a segment");
            for (count, marker) in counts.iter_mut().zip(MARKERS) {
                *count += occurrences(&plain, marker);
            }
        }
    }
    counts
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn a_copy_beside_the_original_shares_no_key_and_no_wal() {
    let bucket = Bucket::best().await;
    let fleet = original_and_copy(&bucket).await;
    // Both at once, never seen before: they are two nodes.
    let first = manifest(&bucket, &backup(&fleet, &[0, 1], &[]).await.good()).await;
    // And each is known again.
    let second = manifest(&bucket, &backup(&fleet, &[0, 1], &[]).await.good()).await;

    let stored: BTreeSet<_> = keys(&bucket).await.into_iter().collect();
    let (mut owned, mut packs) = (BTreeSet::new(), 0);
    for manifest in [&first, &second] {
        for node in &manifest.nodes {
            for pack in &node.packs {
                let (id, number) = (node.node_id, pack.number);
                let key = catalog::keys::pack(&manifest.backup_id, id, node.attempt, number);
                assert!(stored.contains(key.as_str()), "{key}");
                owned.insert(key);
                packs += 1;
            }
        }
    }
    assert_eq!(owned.len(), packs, "no object belongs to two");
    for (number, host) in fleet.hosts.iter().enumerate() {
        let directory = host.cluster.as_ref().expect("a database").data_directory();
        let is_it = |manifest: &Manifest| {
            let mut nodes = manifest.nodes.iter();
            let node = nodes.find(|node| node.data_directory == directory.display().to_string());
            node.expect("its part").node_id
        };
        let node = is_it(&first);
        assert_eq!(node, is_it(&second));
        let counts = markers_in_wal(&bucket, node).await;
        assert!(
            counts[number] > 0,
            "its own words are in its WAL: {counts:?}"
        );
        assert_eq!(counts[1 - number], 0, "the other's are not: {counts:?}");
    }
    let identifiers: BTreeSet<_> = first
        .nodes
        .iter()
        .map(|node| node.system_identifier)
        .collect();
    assert_eq!((identifiers.len(), first.nodes.len()), (1, 2));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn a_copy_that_comes_later_asks_which_it_is() {
    let bucket = Bucket::double().await;
    let fleet = original_and_copy(&bucket).await;
    let original = manifest(&bucket, &backup(&fleet, &[0], &[]).await.good())
        .await
        .nodes[0]
        .node_id;
    let before = keys(&bucket).await;
    let copy = fleet.addresses(&[1]);

    let asks = backup(&fleet, &[1], &[]).await;
    assert_eq!(asks.code, 12, "{asks:?}");
    let error = &asks.result()["error"];
    let next = error["next"].as_str().expect("what to say");
    assert!(next.contains(&format!("--new-node {copy}")), "{next}");
    assert!(
        next.contains(&format!("--node-id {copy}={original}")),
        "{next}"
    );
    // Nothing in the name of any node: journals and leases are all that a refusal leaves.
    let new: Vec<_> = keys(&bucket)
        .await
        .into_iter()
        .filter(|key| !before.contains(key))
        .collect();
    let harmless = |key: &&String| key.starts_with("operations/") || key.starts_with("lease/");
    assert!(new.iter().all(|key| harmless(&key)), "{new:?}");
    // Check says so before anybody is asked.
    let check = fleet.run(&["check", "--nodes", &copy, "--output", "json"]);
    assert_eq!(check.code, 12, "{check:?}");
    assert!(
        check.result()["error"]["next"]
            .to_string()
            .contains("--new-node"),
        "{check:?}"
    );

    let made = backup(&fleet, &[1], &["--new-node", &copy]).await.good();
    let made = manifest(&bucket, &made).await;
    assert_ne!(made.nodes[0].node_id, original);
    let counts = markers_in_wal(&bucket, original).await;
    assert!(counts[0] > 0 && counts[1] == 0, "{counts:?}");
    let counts = markers_in_wal(&bucket, made.nodes[0].node_id).await;
    assert!(counts[0] == 0 && counts[1] > 0, "{counts:?}");
}

/// The client's own certificates, for orders that no client would give.
fn client(fleet: &Fleet, host: usize) -> AgentClient {
    let certs = fleet.home().join(".gs_pitr/certs");
    let read = |name: &str| fs::read(certs.join(name)).expect("a file of the client's");
    let tls = ClientTls {
        ca_pem: read("ca.crt"),
        cert_pem: read("operator.crt"),
        key_pem: read("operator.key"),
    };
    let transport = Transport::MutualTls(tls);
    AgentClient::new(&fleet.hosts[host].agent.address, &transport).expect("a client")
}

fn order(bucket: &Bucket, node_id: Uuid, epoch: &EpochId) -> StartOperation {
    let config = bucket.config();
    let CredentialSource::Static {
        access_key_id,
        secret_access_key,
        ..
    } = config.credentials
    else {
        panic!("static credentials");
    };
    StartOperation {
        operation: Uuid::now_v7(),
        repository: RepositoryAccess {
            bucket: config.bucket,
            prefix: config.prefix,
            endpoint: config.endpoint,
            region: config.region,
            ca_pem: config
                .ca_pem
                .map(|pem| String::from_utf8(pem).expect("PEM")),
            credentials: Some(Credentials {
                access_key_id,
                secret_access_key: Secret(secret_access_key),
                session_token: None,
            }),
        },
        spec: OperationSpec::Backup(BackupSpec {
            backup_id: BackupId::generate(Timestamp::now(), true),
            node_id,
            epoch: epoch.clone(),
            attempt: 1,
            jobs: 1,
            level: 1,
            label: None,
            fast_checkpoint: true,
            engine: catalog::model::Engine::Direct,
            mode: catalog::model::BackupMode::Full,
            chain: Vec::new(),
            wal: agent_api::WalMode::Backup,
            pace: agent_api::Pace::Full,
        }),
        bandwidth: None,
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn an_agent_writes_nothing_for_an_epoch_that_is_not_its_databases() {
    let bucket = Bucket::double().await;
    let fleet = original_and_copy(&bucket).await;
    let node = manifest(&bucket, &backup(&fleet, &[0], &[]).await.good())
        .await
        .nodes
        .remove(0);
    let before = keys(&bucket).await;
    let agent = client(&fleet, 1);
    for (epoch, words) in [
        (node.epoch.clone(), "and the one here is in"),
        (EpochId::generate(1), "the order is for epoch"),
    ] {
        let order = order(&bucket, node.node_id, &epoch);
        let mut status = agent.start(&order).await.expect("it is taken");
        while !status.phase.is_end() {
            tokio::time::sleep(Duration::from_millis(50)).await;
            status = agent.status(order.operation).await.expect("its status");
        }
        assert_eq!(status.phase, Phase::Failed);
        let error = status.error.expect("why");
        assert_eq!(
            (error.kind, error.changed),
            (ErrorKind::Conflict, false),
            "{error}"
        );
        assert!(error.message.contains(words), "{error}");
        assert!(error.next.expect("what to do").contains("--node-id"));
    }
    assert_eq!(keys(&bucket).await, before, "nothing was written");
    let copy = fleet.hosts[1].cluster.as_ref().expect("a database");
    let slots = copy
        .query_one("postgres", "SELECT count(*) FROM pg_replication_slots")
        .await;
    assert_eq!(slots, "0");
}
