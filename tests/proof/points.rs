//! Points under transfers between three nodes: what is proved holds; without the proof it would not.

use std::fs;
use std::time::{Duration, Instant};

use agent_api::client::{AgentClient, ClientTls, Transport};
use agent_api::{
    ApiError, BackupSpec, Credentials, Look, MarkRequest, MarkResult, Observed, OperationSpec,
    Phase, RepositoryAccess, Secret, StartOperation,
};
use catalog::ids::BackupId;
use gs_pitr::proof::{self, Node, Rules};
use jiff::Timestamp;
use pipeline::store::s3::CredentialSource;
use serde_json::Value;
use support::bucket::Bucket;
use support::fleet::Fleet;
use support::os::{self, Scratch};
use support::postgres::{self, Cluster, Installation};
use support::registered::register;
use support::roll::{Copy, archiving, directory};
use uuid::Uuid;

use crate::roll;
use crate::transfers::{self, Transfers};

#[expect(clippy::print_stdout, reason = "shown by --nocapture and on failure")]
fn say(text: &str) {
    println!("{text}");
}

fn database(fleet: &Fleet, number: usize) -> &Cluster {
    fleet.hosts[number].cluster.as_ref().unwrap()
}

async fn three_nodes(bucket: &Bucket) -> Fleet {
    let mut fleet = Fleet::new("proof", &bucket.config());
    let installation = Installation::newest();
    for name in ["node1", "node2", "node3"] {
        let host = fleet.add_database(name, &installation, archiving());
        directory(&fleet.hosts[host].root.join("archive"));
        transfers::prepare(database(&fleet, host)).await;
    }
    fleet
}

/// A backup that waits for its point, asked through the agent's own client.
struct Marker {
    client: AgentClient,
    operation: Uuid,
}

impl Marker {
    /// Starts it, and waits until it is copied.
    async fn start(fleet: &Fleet, host: usize, bucket: &Bucket) -> Self {
        let read = |name: &str| fs::read(fleet.home().join(".gs_pitr/certs").join(name)).unwrap();
        let tls = ClientTls {
            ca_pem: read("ca.crt"),
            cert_pem: read("operator.crt"),
            key_pem: read("operator.key"),
        };
        let address = &fleet.hosts[host].agent.address;
        let client = AgentClient::new(address, &Transport::MutualTls(tls)).unwrap();
        let config = bucket.config();
        let CredentialSource::Static {
            access_key_id,
            secret_access_key,
            ..
        } = config.credentials
        else {
            panic!("static credentials are wanted");
        };
        let machine = client.node().await.unwrap().machine_id;
        let database = database(fleet, host);
        let (node_id, epoch) = register(bucket.store(), database, &machine).await;
        let request = StartOperation {
            operation: Uuid::now_v7(),
            repository: RepositoryAccess {
                bucket: config.bucket,
                prefix: config.prefix,
                endpoint: config.endpoint,
                region: config.region,
                ca_pem: config.ca_pem.map(|pem| String::from_utf8(pem).unwrap()),
                credentials: Some(Credentials {
                    access_key_id,
                    secret_access_key: Secret(secret_access_key),
                    session_token: None,
                }),
            },
            bandwidth: None,
            spec: OperationSpec::Backup(BackupSpec {
                backup_id: BackupId::generate(Timestamp::now(), true),
                node_id,
                epoch,
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
        };
        let operation = request.operation;
        let mut status = client.start(&request).await.unwrap();
        let deadline = Instant::now() + Duration::from_mins(2);
        while status.phase != Phase::Copied {
            assert!(
                !status.phase.is_end() && Instant::now() < deadline,
                "{status:?}"
            );
            tokio::time::sleep(Duration::from_millis(100)).await;
            status = client.status(operation).await.unwrap();
        }
        Self { client, operation }
    }
}

impl Node for Marker {
    fn name(&self) -> String {
        self.client.address().to_owned()
    }

    async fn observe(&self, look: Look) -> Result<Observed, ApiError> {
        self.client.observe(self.operation, look).await
    }

    async fn mark(&self, restore_point: String) -> Result<MarkResult, ApiError> {
        let request = MarkRequest { restore_point };
        self.client.mark(self.operation, &request).await
    }

    async fn flush(&self, restore_point: String) -> Result<(), ApiError> {
        let request = MarkRequest { restore_point };
        self.client.flush(self.operation, &request).await.map(drop)
    }
}

/// How long one look takes from here: the median and the longest of 100; and in the database. Returns the longest median.
async fn measure(node: &Marker) -> Duration {
    let mut usual = 0;
    for look in [Look::Holders, Look::Snapshot, Look::HoldersThenSnapshot] {
        let (mut whole, mut inside) = (Vec::new(), Vec::new());
        for _ in 0..100 {
            let begun = Instant::now();
            let seen = node.observe(look).await.unwrap();
            whole.push(begun.elapsed().as_micros());
            inside.push(u128::from(seen.took_us));
        }
        whole.sort_unstable();
        inside.sort_unstable();
        say(&format!(
            "{look:?}: a round trip of {} us (longest {}), of that {} us in the database",
            whole[50], whole[99], inside[50]
        ));
        usual = usual.max(whole[50]);
    }
    Duration::from_micros(usual.try_into().unwrap())
}

/// Many points of one backup, with the proof that `gs_pitr backup` uses; each is recovered to.
#[tokio::test(flavor = "multi_thread")]
async fn points_that_are_proved_cut_no_transfer_in_half() {
    let bucket = Bucket::double().await;
    let fleet = three_nodes(&bucket).await;
    let clusters = [0, 1, 2].map(|number| database(&fleet, number));
    let copies = clusters.map(Copy::of);
    let mut nodes = Vec::new();
    for number in 0..3 {
        nodes.push(Marker::start(&fleet, number, &bucket).await);
    }
    // Between two transfers there must be room for a proof, on a slow machine too.
    let pause = Duration::from_millis(150).max(measure(&nodes[0]).await * 50);
    let load = Transfers::start(&clusters, 3, pause).await;
    let rules = Rules {
        retries: 500,
        timeout: Duration::from_secs(5),
        accept_in_doubt: false,
    };
    let mut points = Vec::new();
    for _ in 0..10 {
        tokio::time::sleep(Duration::from_millis(100)).await;
        match proof::prove(&nodes, &rules).await {
            Ok(proved) => {
                say(&format!(
                    "proved at attempt {} in {:?}",
                    proved.attempts, proved.window
                ));
                points.push(proof::restore_point(&proved.point));
            }
            Err(unproved) => say(&format!("not proved: {}", unproved.obstacle)),
        }
    }
    say(&format!("{} transactions", load.stop().await));
    for node in &nodes {
        node.client.cancel(node.operation).await.unwrap();
    }
    assert!(
        points.len() >= 3,
        "only {} points were proved",
        points.len()
    );
    for (copy, cluster) in copies.iter().zip(clusters) {
        copy.archived(cluster).await;
    }
    let mut before = 0;
    for point in &points {
        let transfers = roll::at_point(&copies, point, true).await;
        let transfers = transfers.unwrap_or_else(|wrong| panic!("{point} was proved, and {wrong}"));
        assert!(transfers >= before, "transfers were lost on the way");
        before = transfers;
    }
    say(&format!(
        "{} points proved and recovered to, {before} transfers",
        points.len()
    ));
    assert!(before > 0, "nothing was transferred");
}

/// Points as a tool makes them that asks one node after the other: at least one of them is broken.
#[tokio::test(flavor = "multi_thread")]
async fn without_the_proof_a_point_breaks() {
    let scratch = Scratch::new("naive");
    let installation = Installation::newest();
    let mut clusters = Vec::new();
    for name in ["node1", "node2", "node3"] {
        let cluster = Cluster::create(&installation, &scratch.directory(name), archiving());
        cluster.start();
        transfers::prepare(&cluster).await;
        clusters.push(cluster);
    }
    let clusters: Vec<_> = clusters.iter().collect();
    let copies: Vec<_> = clusters.iter().map(|cluster| Copy::of(cluster)).collect();
    let load = Transfers::start(&clusters, 4, Duration::ZERO).await;
    let mut points = Vec::new();
    for number in 0..60 {
        let point = format!("naive {number}");
        for cluster in &clusters {
            let sql = format!("SELECT pg_create_restore_point('{point}')");
            cluster.query_one("postgres", &sql).await;
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        points.push(point);
    }
    load.stop().await;
    for (copy, cluster) in copies.iter().zip(&clusters) {
        copy.archived(cluster).await;
    }
    for (number, point) in points.iter().enumerate() {
        if let Err(wrong) = roll::at_point(&copies, point, false).await {
            say(&format!(
                "point {} of {}: {wrong}",
                number + 1,
                points.len()
            ));
            return;
        }
    }
    panic!(
        "{} points without a proof, and none of them is broken",
        points.len()
    );
}

/// Restores a backup beside its sources; what it has.
async fn restored(
    fleet: &Fleet,
    host: usize,
    result: &Value,
    round: usize,
) -> Result<usize, String> {
    let target = fleet.hosts[host].root.join(format!("round{round}"));
    fs::create_dir(&target).unwrap();
    os::give(&target);
    let address = &fleet.hosts[host].agent.address;
    let (mut args, mut ports) = (Vec::new(), Vec::new());
    for node in result["nodes"].as_array().unwrap() {
        let (id, port) = (node["node_id"].as_str().unwrap(), os::free_port());
        args.extend(["--map".to_owned(), format!("{id}={address}")]);
        args.extend(["--db-port".to_owned(), format!("{id}={port}")]);
        ports.push((target.join(id), port));
    }
    let (id, target) = (
        result["backup_id"].as_str().unwrap(),
        target.display().to_string(),
    );
    let fixed = [
        "restore",
        "--id",
        id,
        "--nodes",
        address,
        "--target-dir",
        &target,
        "--yes",
    ];
    let fixed = fixed.iter().copied();
    let args: Vec<_> = fixed.chain(args.iter().map(String::as_str)).collect();
    let _ = fleet.run(&args).good();
    let mut nodes = Vec::new();
    for (data, port) in &ports {
        let (socket, listening) = postgres::running(data);
        assert_eq!(listening, *port);
        nodes.push(postgres::connect(&socket, *port, "postgres").await);
    }
    let found = transfers::check_proved(&nodes).await;
    drop(nodes);
    for (data, _) in &ports {
        let mut command = os::command(Installation::newest().bindir.join("pg_ctl"));
        command
            .args(["stop", "-w", "-m", "immediate", "-D"])
            .arg(data);
        assert!(command.output().unwrap().status.success());
    }
    found
}

/// The whole way: backups under transfers; whichever says `cluster` is restored from the bucket.
#[tokio::test(flavor = "multi_thread")]
async fn backups_that_say_cluster_restore_without_a_half_transfer() {
    let bucket = Bucket::best().await;
    let mut fleet = three_nodes(&bucket).await;
    let nodes = fleet.addresses(&[0, 1, 2]);
    let host = fleet.add_host("beside", &[]);
    let mut results = Vec::new();
    {
        let clusters = [0, 1, 2].map(|number| database(&fleet, number));
        let load = Transfers::start(&clusters, 2, Duration::from_millis(150)).await;
        for _ in 0..3 {
            let args = [
                "backup",
                "--nodes",
                &nodes,
                "--output",
                "json",
                "--point-timeout",
                "15",
            ];
            let run = fleet.run(&args);
            results.push(run.good().result());
        }
        load.stop().await;
    }
    let mut proved = 0;
    for (round, result) in results.iter().enumerate() {
        if result["consistency"] != "cluster" {
            assert!(result["unproved"].is_string(), "{result}");
            continue;
        }
        assert!(
            result["proof"]["window_ms"].as_u64().unwrap() < 5000,
            "{result}"
        );
        let transfers = restored(&fleet, host, result, round).await;
        let transfers = transfers.unwrap_or_else(|wrong| panic!("{result}: {wrong}"));
        say(&format!(
            "restored, {transfers} transfers; {}",
            result["proof"]
        ));
        assert!(transfers > 0, "nothing was transferred");
        proved += 1;
    }
    assert!(proved > 0, "no backup was proved: {results:?}");
}
