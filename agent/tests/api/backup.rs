//! Backups ordered over HTTP: to the end, forgotten by the client, and cut short by SIGTERM.

use std::sync::Arc;
use std::time::{Duration, Instant};

use agent_api::client::{AgentClient, Transport};
use agent_api::{
    BackupSpec, Credentials, ErrorKind, Event, EventKind, MarkRequest, OperationSpec,
    OperationStatus, Phase, RepositoryAccess, Secret, StartOperation,
};
use catalog::ids::{BackupId, EpochId};
use futures_util::StreamExt as _;
use jiff::Timestamp;
use pipeline::store::s3::{S3Config, S3Store};
use pitr_agent::facts::machine_id;
use support::os::Scratch;
use support::postgres::{Cluster, ClusterOptions, Installation};
use support::registered::register;
use support::s3::{self, S3Server};
use uuid::Uuid;

use crate::process::Agent;

const PATIENCE: Duration = Duration::from_mins(1);

/// A database, its agent and a bucket. Dropped in this order.
struct Node {
    agent: Agent,
    client: AgentClient,
    cluster: Cluster,
    bucket: S3Server,
    registered: (Uuid, EpochId),
    _scratch: Scratch,
}

impl Node {
    async fn start(name: &str, more: &[&str]) -> Self {
        let options = s3::Options {
            tls: true,
            ..s3::Options::default()
        };
        let bucket = s3::start(options).await.unwrap();
        let scratch = Scratch::new(name);
        let installation = Installation::newest();
        let cluster = Cluster::create(&installation, scratch.path(), ClusterOptions::default());
        cluster.start();
        let node = [
            "--insecure-http".to_owned(),
            "--pgdata".to_owned(),
            cluster.data_directory().display().to_string(),
            "--pg-port".to_owned(),
            cluster.port().to_string(),
            "--pg-host".to_owned(),
            cluster.socket_directory().display().to_string(),
            "--pg-user".to_owned(),
            "postgres".to_owned(),
        ];
        let node: Vec<_> = node.iter().map(String::as_str).collect();
        let agent = Agent::start(&[node.as_slice(), more].concat());
        let client = AgentClient::new(&agent.address, &Transport::InsecureHttp).unwrap();
        let config = S3Config {
            prefix: "repository".to_owned(),
            ..bucket.config()
        };
        let store = Arc::new(S3Store::new(config).unwrap());
        let registered = register(store, &cluster, &machine_id()).await;
        Self {
            agent,
            client,
            cluster,
            bucket,
            registered,
            _scratch: scratch,
        }
    }

    fn request(&self) -> StartOperation {
        let options = self.bucket.options();
        StartOperation {
            operation: Uuid::now_v7(),
            repository: RepositoryAccess {
                bucket: options.bucket.clone(),
                prefix: "repository".to_owned(),
                endpoint: Some(self.bucket.endpoint()),
                region: Some(options.region.clone()),
                ca_pem: self.bucket.ca_pem().map(str::to_owned),
                credentials: Some(Credentials {
                    access_key_id: options.access_key.clone(),
                    secret_access_key: Secret(options.secret_key.clone()),
                    session_token: None,
                }),
            },
            spec: OperationSpec::Backup(BackupSpec {
                backup_id: BackupId::generate(Timestamp::now(), true),
                node_id: self.registered.0,
                epoch: self.registered.1.clone(),
                attempt: 1,
                jobs: 2,
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

    /// Starts a backup and waits until it is copied. Returns the last event's number too.
    async fn copied(&self) -> (Uuid, u64) {
        let id = self.client.start(&self.request()).await.unwrap().operation;
        let seq = self.reach(id, 0, Phase::Copied).await;
        (id, seq)
    }

    async fn reach(&self, id: Uuid, after: u64, phase: Phase) -> u64 {
        let mut events = self.client.events(id, after).await.unwrap();
        let arrival = async {
            while let Some(event) = events.next().await {
                match event.unwrap() {
                    Event {
                        seq,
                        what: EventKind::Phase { phase: reached },
                        ..
                    } if reached == phase => {
                        return seq;
                    }
                    Event {
                        what: EventKind::Error { error },
                        ..
                    } => {
                        panic!("before {phase}: {error:?}\n{}", self.agent.log())
                    }
                    _ => {}
                }
            }
            panic!("it ended before {phase}: {}", self.agent.log())
        };
        tokio::time::timeout(PATIENCE, arrival).await.unwrap()
    }

    /// The only operation, without being taken for somebody who asks about it.
    async fn end(&self) -> OperationStatus {
        let begun = Instant::now();
        loop {
            let all = self.client.operations().await.unwrap();
            let [only] = all.as_slice() else {
                panic!("{all:?}");
            };
            if only.phase.is_end() {
                return only.clone();
            }
            assert!(begun.elapsed() < PATIENCE, "{only:?}");
            tokio::time::sleep(Duration::from_millis(200)).await;
        }
    }

    async fn assert_nothing_left(&self) {
        let sql = self.cluster.connect("postgres").await;
        let question = "SELECT count(*) FROM pg_replication_slots";
        let slots: i64 = sql.query_one(question, &[]).await.unwrap().get(0);
        assert_eq!(slots, 0, "{}", self.agent.log());
        assert_eq!(self.bucket.uploads_under_way(), 0);
    }
}

#[tokio::test]
async fn a_backup_ordered_over_http_is_in_the_bucket() {
    let node = Node::start("agent-backup", &[]).await;
    let (id, seq) = node.copied().await;
    let second = node.client.start(&node.request()).await.unwrap_err();
    assert_eq!(second.kind, ErrorKind::Conflict);
    assert!(second.message.contains(&id.to_string()), "{second}");
    let mark = MarkRequest {
        restore_point: "gs_pitr_test".to_owned(),
    };
    let marked = node.client.mark(id, &mark).await.unwrap();
    assert_eq!(
        node.client.mark(id, &mark).await.unwrap().end_lsn,
        marked.end_lsn
    );
    node.client.ship(id).await.unwrap();
    let seq = node.reach(id, seq, Phase::Shipped).await;
    let status = node.client.status(id).await.unwrap();
    let (backup, point) = (
        status.backup.as_ref().unwrap(),
        status.point.as_ref().unwrap(),
    );
    assert_eq!(point.end_lsn, marked.end_lsn);
    assert!(
        status.progress.files_done > 0 && status.progress.wal_segments > 0,
        "{status:?}"
    );
    assert!(
        status.progress.bytes_done >= backup.plain_bytes,
        "{status:?}"
    );
    let done = node.client.release(id).await.unwrap();
    assert!(done.error.is_none());
    node.reach(id, seq, Phase::Done).await;
    let packs = node
        .bucket
        .keys()
        .iter()
        .filter(|key| key.contains("/pack-"))
        .count();
    assert_eq!(packs, backup.packs.len());
    assert!(!node.agent.log().contains(&node.bucket.options().secret_key));
    node.assert_nothing_left().await;
}

#[tokio::test]
async fn a_backup_whose_client_went_away_cleans_up_after_itself() {
    let node = Node::start("agent-orphan", &["--orphan-timeout", "2"]).await;
    node.copied().await;
    let status = node.end().await;
    assert_eq!(status.phase, Phase::Cancelled);
    let error = status.error.unwrap();
    assert_eq!(error.kind, ErrorKind::Timeout);
    assert!(error.message.contains("--orphan-timeout"), "{error}");
    node.assert_nothing_left().await;
}

#[tokio::test]
async fn sigterm_ends_a_backup_in_order() {
    let mut node = Node::start("agent-sigterm", &[]).await;
    node.copied().await;
    assert_eq!(node.agent.stop().await, Some(0), "{}", node.agent.log());
    node.assert_nothing_left().await;
}
