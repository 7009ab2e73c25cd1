//! The direct engine against real databases, into a store in memory.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "tests")]

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use agent_api::{ApiError, BackupSpec, ErrorKind, MarkRequest, MarkResult, OperationStatus, Phase};
use catalog::ids::{BackupId, EpochId};
use catalog::model::AttachmentRole;
use jiff::Timestamp;
use pipeline::budget::Budget;
use pipeline::meter::Meter;
use pipeline::store::ObjectStore;
use pipeline::throttle::Throttle;
use pitr_agent::config::Config;
use pitr_agent::engine::{self, slot};
use pitr_agent::facts::machine_id;
use pitr_agent::operation::log::OperationLog;
use pitr_agent::operation::{BackupCommand, OperationContext, Reporter};
use pitr_agent::wal::gate::ArchiveGate;
use pitr_agent::wal::service::WalService;
use support::load::{self, Load};
use support::memory_store::MemoryStore;
use support::os::Scratch;
use support::postgres::{Cluster, ClusterOptions, Installation};
use support::registered::register;
use tokio::sync::{mpsc, oneshot};
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

mod recover;

/// A backup under way.
struct Backup {
    store: Arc<MemoryStore>,
    log: Arc<OperationLog>,
    commands: mpsc::Sender<BackupCommand>,
    cancel: CancellationToken,
    spec: BackupSpec,
    task: JoinHandle<Result<(), ApiError>>,
}

fn config(cluster: &Cluster) -> Config {
    Config {
        pgdata: Some(cluster.data_directory()),
        pg_host: cluster.socket_directory().to_str().unwrap().to_owned(),
        pg_port: Some(cluster.port()),
        pg_user: Some("postgres".into()),
        ..Config::default()
    }
}

async fn start(cluster: &Cluster, bandwidth: Option<u64>) -> Backup {
    start_with(config(cluster), cluster, bandwidth).await
}

async fn start_with(config: Config, cluster: &Cluster, bandwidth: Option<u64>) -> Backup {
    let (store, id) = (Arc::new(MemoryStore::default()), Uuid::new_v4());
    let dynamic = Arc::clone(&store) as Arc<dyn ObjectStore>;
    let (node_id, epoch) = register(dynamic, cluster, &machine_id()).await;
    begin(config, store, id, node_id, epoch, bandwidth)
}

fn begin(
    config: Config,
    store: Arc<MemoryStore>,
    id: Uuid,
    node_id: Uuid,
    epoch: EpochId,
    bandwidth: Option<u64>,
) -> Backup {
    let (commands, received) = mpsc::channel(1);
    let meter = Arc::new(Meter::default());
    let log = OperationLog::new(id, "backup", Arc::clone(&meter));
    let cancel = CancellationToken::new();
    let spec = BackupSpec {
        backup_id: BackupId::generate(Timestamp::now(), true),
        node_id,
        epoch,
        attempt: 1,
        jobs: 2,
        level: 1,
        label: Some("a test\nSTART WAL LOCATION: 0/0".into()),
        fast_checkpoint: true,
        engine: catalog::model::Engine::Direct,
        mode: catalog::model::BackupMode::Full,
        chain: Vec::new(),
        wal: agent_api::WalMode::Backup,
        pace: agent_api::Pace::Full,
    };
    let cx = OperationContext {
        gate: ArchiveGate::default(),
        id,
        cancel: cancel.clone(),
        store: Arc::clone(&store) as Arc<dyn ObjectStore>,
        budget: Budget::new(128 << 20),
        throttle: Throttle::new(bandwidth),
        meter,
        report: Reporter::new(Arc::clone(&log)),
        config: Arc::new(config),
        wal: WalService::none(),
        repository: None,
    };
    let task = tokio::spawn(engine::run(cx, spec.clone(), received));
    Backup {
        store,
        log,
        commands,
        cancel,
        spec,
        task,
    }
}

impl Backup {
    async fn reach(&self, phase: Phase) -> OperationStatus {
        let reached = async {
            while self.log.status().phase != phase {
                assert!(!self.task.is_finished(), "ended before {phase:?}");
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
        };
        let reached = tokio::time::timeout(Duration::from_mins(3), reached).await;
        reached.unwrap_or_else(|_| panic!("{phase:?} not reached: {:?}", self.log.status()));
        self.log.status()
    }

    async fn mark(&self, name: &str) -> Result<MarkResult, ApiError> {
        let (reply, answer) = oneshot::channel();
        let request = MarkRequest {
            restore_point: name.into(),
        };
        let sent = self
            .commands
            .send(BackupCommand::Mark(request, reply))
            .await;
        sent.unwrap();
        answer.await.unwrap()
    }

    async fn flush(&self, name: &str) -> Result<(), ApiError> {
        let (reply, answer) = oneshot::channel();
        let request = MarkRequest {
            restore_point: name.into(),
        };
        let command = BackupCommand::Flush(request, reply);
        self.commands.send(command).await.unwrap();
        answer.await.unwrap()
    }

    async fn ship(&self) -> Result<(), ApiError> {
        let (reply, answer) = oneshot::channel();
        self.commands
            .send(BackupCommand::Ship(reply))
            .await
            .unwrap();
        answer.await.unwrap()
    }

    async fn release(self) -> Result<(), ApiError> {
        let (reply, answer) = oneshot::channel();
        self.commands
            .send(BackupCommand::Release(reply))
            .await
            .unwrap();
        answer.await.unwrap()?;
        self.end().await
    }

    async fn end(self) -> Result<(), ApiError> {
        let ended = tokio::time::timeout(Duration::from_mins(1), self.task).await;
        ended.expect("it ends in time").expect("it does not panic")
    }
}

fn cluster(scratch: &Scratch, name: &str, options: ClusterOptions) -> Cluster {
    let root = scratch.directory(name);
    let cluster = Cluster::create(&Installation::newest(), &root, options);
    cluster.start();
    cluster
}

/// Neither slot nor backup nor upload is left.
async fn assert_nothing_left(cluster: &Cluster, store: &MemoryStore) {
    let sql = "SELECT count(*) FROM pg_replication_slots";
    assert_eq!(cluster.query_one("postgres", sql).await, "0", "slots");
    let sql = "SELECT count(*) FROM pg_stat_activity WHERE application_name LIKE 'gs_pitr%'";
    for _ in 0..50 {
        if cluster.query_one("postgres", sql).await == "0" {
            break;
        }
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    assert_eq!(cluster.query_one("postgres", sql).await, "0", "sessions");
    assert_eq!(store.uploads_under_way(), 0, "uploads");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_copy_under_load_recovers_to_its_point() {
    let scratch = Scratch::new("direct");
    let options = ClusterOptions {
        data_checksums: true,
        config_outside: true,
        ..ClusterOptions::default()
    };
    let source = cluster(&scratch, "source", options);
    load::prepare(&source, &scratch.directory("old space"), true).await;
    let load = Load::start(&source, &scratch.directory("ledgers"), 3);
    load.goes_on(15).await;

    let backup = start(&source, None).await;
    let copied = backup.reach(Phase::Copied).await;
    assert!(copied.progress.bytes_total > 1 << 30, "{copied:?}");
    // More than there are writers: one has begun after the copy.
    load.goes_on(10).await;
    // After the copy and before the point: only WAL has it.
    let space = scratch.directory("new space");
    let sql = format!("CREATE TABLESPACE young LOCATION '{}'", space.display());
    source.execute(&sql).await;
    backup.mark("first try").await.unwrap();
    let again = backup.mark("first try").await.unwrap();
    let marked = backup.mark("the point").await.unwrap();
    assert_ne!(again.end_lsn, marked.end_lsn);
    tokio::time::sleep(Duration::from_millis(500)).await;
    backup.ship().await.unwrap();
    let status = backup.reach(Phase::Shipped).await;
    let slots = "SELECT count(*) FROM pg_replication_slots";
    assert_eq!(source.query_one("postgres", slots).await, "0");
    let ledger = load.stop().await;
    let (store, spec) = (Arc::clone(&backup.store), backup.spec.clone());
    backup.release().await.unwrap();
    assert_nothing_left(&source, &store).await;

    let (node, point) = (status.backup.unwrap(), status.point.unwrap());
    assert_eq!(node.corrupt_pages, Vec::<String>::new());
    assert_eq!(point.end_lsn, marked.end_lsn);
    assert!(load::lsn(&point.record_lsn) < load::lsn(&point.end_lsn));
    assert_eq!(node.tablespaces.len(), 1, "{:?}", node.tablespaces);
    assert!(node.argv.iter().any(|arg| arg.starts_with("config_file=")));
    let roles: Vec<_> = node.attachments.iter().map(|a| a.role).collect();
    for role in [
        AttachmentRole::Config,
        AttachmentRole::Hba,
        AttachmentRole::Ident,
        AttachmentRole::Included,
    ] {
        assert!(roles.contains(&role), "{role:?} in {:?}", node.attachments);
    }

    let target = scratch.directory("restored");
    // Replay makes the young tablespace again at its literal path, which the source must not lose.
    source.stop("fast");
    let young = scratch.path().join("young of the source");
    std::fs::rename(&space, &young).unwrap();
    scratch.directory("new space");
    let restored = recover::recover(&store, &spec, &node, &point, &source, &target).await;
    let client = support::postgres::connect(&restored.root, restored.port, "shop db").await;
    let verdict = ledger
        .check(
            &client,
            load::lsn(&node.stop_lsn),
            load::lsn(&point.end_lsn),
        )
        .await
        .unwrap();
    assert!(verdict.required > 10 && verdict.from_wal > 0, "{verdict:?}");
    restored.amcheck("shop db");
    restored.checksums();
}

#[tokio::test(flavor = "multi_thread")]
async fn an_idle_server_is_backed_up_too() {
    let scratch = Scratch::new("idle");
    let source = cluster(&scratch, "source", ClusterOptions::default());
    let backup = start(&source, None).await;
    backup.reach(Phase::Copied).await;
    assert_eq!(backup.ship().await.unwrap_err().kind, ErrorKind::Conflict);
    assert_eq!(backup.mark("").await.unwrap_err().kind, ErrorKind::Usage);
    backup.mark("point").await.unwrap();
    backup.ship().await.unwrap();
    let status = backup.reach(Phase::Shipped).await;
    let node = status.backup.unwrap();
    assert!(
        node.backup_label.contains("a test START WAL"),
        "{}",
        node.backup_label
    );
    assert_eq!((node.tablespace_map, node.attachments.len()), (None, 0));
    let store = Arc::clone(&backup.store);
    backup.release().await.unwrap();
    assert_nothing_left(&source, &store).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_cancel_leaves_nothing_behind() {
    let scratch = Scratch::new("cancel");
    let source = cluster(&scratch, "source", ClusterOptions::default());
    for phase in [Phase::Copying, Phase::Copied, Phase::Marked] {
        let slow = (phase == Phase::Copying).then_some(100 << 10);
        let backup = start(&source, slow).await;
        if phase == Phase::Marked {
            backup.reach(Phase::Copied).await;
            backup.mark("point").await.unwrap();
        }
        backup.reach(phase).await;
        backup.cancel.cancel();
        let store = Arc::clone(&backup.store);
        let error = backup.end().await.unwrap_err();
        assert_eq!(
            (error.kind, error.changed),
            (ErrorKind::Cancelled, false),
            "{phase:?}: {error}"
        );
        assert_nothing_left(&source, &store).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_dropped_operation_drops_its_slot() {
    let scratch = Scratch::new("dropped");
    let source = cluster(&scratch, "source", ClusterOptions::default());
    let backup = start(&source, None).await;
    backup.reach(Phase::Copied).await;
    backup.task.abort();
    let sql = "SELECT count(*) FROM pg_replication_slots";
    for _ in 0..100 {
        if source.query_one("postgres", sql).await == "0" {
            break;
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    assert_nothing_left(&source, &backup.store).await;
}

/// Ends sessions of the engine from outside.
async fn terminate(cluster: &Cluster, session: &str) {
    let sql = format!(
        "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name LIKE '{session}%'"
    );
    cluster.execute(&sql).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_lost_backup_session_voids_the_attempt() {
    let scratch = Scratch::new("lost");
    let source = cluster(&scratch, "source", ClusterOptions::default());
    let backup = start(&source, Some(100 << 10)).await;
    backup.reach(Phase::Copying).await;
    terminate(&source, "gs_pitr backup").await;
    let store = Arc::clone(&backup.store);
    let error = backup.end().await.unwrap_err();
    assert_eq!(
        (error.kind, error.changed),
        (ErrorKind::Database, false),
        "{error}"
    );
    assert_nothing_left(&source, &store).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_restart_of_the_database_after_the_copy_is_lived_through() {
    let scratch = Scratch::new("restart");
    let source = cluster(&scratch, "source", ClusterOptions::default());
    let backup = start(&source, None).await;
    backup.reach(Phase::Copied).await;
    backup.mark("before").await.unwrap();
    assert_eq!(backup.mark("before").await.unwrap().restore_point, "before");
    source.stop("immediate");
    // Whether it was written before the crash is not known, so it is none, before the restart and after it.
    assert!(backup.flush("before").await.unwrap_err().passing);
    source.start();
    assert!(backup.flush("before").await.unwrap_err().passing);
    backup.mark("after").await.unwrap();
    let error = backup.flush("before").await.unwrap_err();
    assert_eq!(error.kind, ErrorKind::Conflict);
    backup.flush("after").await.unwrap();
    let error = backup.mark("before").await.unwrap_err();
    assert_eq!(error.kind, ErrorKind::Conflict);
    terminate(&source, "gs_pitr WAL").await;
    backup.ship().await.unwrap();
    let status = backup.reach(Phase::Shipped).await;
    assert_eq!(status.point.unwrap().restore_point, "after");
    let store = Arc::clone(&backup.store);
    backup.release().await.unwrap();
    assert_nothing_left(&source, &store).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_slow_store_never_fills_the_nodes_disk() {
    let scratch = Scratch::new("slow");
    let options = ClusterOptions {
        wal_segment_mib: 1,
        ..ClusterOptions::default()
    };
    let source = cluster(&scratch, "source", options);
    let mut config = config(&source);
    config.wal_hold = Some(2 << 20);
    let backup = start_with(config, &source, Some(50 << 10)).await;
    backup.reach(Phase::Copying).await;
    let sql = "CREATE TABLE t AS SELECT g, md5(g::text) FROM generate_series(1, 400000) g";
    source.execute(sql).await;
    let store = Arc::clone(&backup.store);
    let error = backup.end().await.unwrap_err();
    assert!(error.message.contains("are held back"), "{error}");
    assert_eq!((error.kind, error.changed), (ErrorKind::Database, false));
    assert_nothing_left(&source, &store).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_slot_that_somebody_drops_voids_the_attempt() {
    let scratch = Scratch::new("slot");
    let source = cluster(&scratch, "source", ClusterOptions::default());
    let backup = start(&source, None).await;
    backup.reach(Phase::Copied).await;
    source
        .execute("SELECT pg_drop_replication_slot(slot_name) FROM pg_replication_slots")
        .await;
    source.execute("SELECT pg_switch_wal()").await;
    let store = Arc::clone(&backup.store);
    let error = backup.end().await.unwrap_err();
    assert_eq!(error.kind, ErrorKind::Database);
    assert!(error.message.contains("dropped the slot"), "{error}");
    assert_nothing_left(&source, &store).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_damaged_page_is_named_and_copied_as_it_is() {
    let scratch = Scratch::new("damage");
    let options = ClusterOptions {
        data_checksums: true,
        ..ClusterOptions::default()
    };
    let source = cluster(&scratch, "source", options);
    let sql = "CREATE TABLE t AS SELECT g, md5(g::text) FROM generate_series(1, 20000) g";
    source.execute(sql).await;
    let file = source
        .query_one("postgres", "SELECT pg_relation_filepath('t')")
        .await;
    source.stop("fast");
    let path = source.data_directory().join(&file);
    flip(&path, 3 * 8192 + 5000);
    source.start();
    let backup = start(&source, None).await;
    backup.reach(Phase::Copied).await;
    backup.mark("point").await.unwrap();
    backup.ship().await.unwrap();
    let status = backup.reach(Phase::Shipped).await;
    assert_eq!(status.backup.unwrap().corrupt_pages, [format!("{file} 3")]);
    assert!(
        status.warnings.iter().any(|w| w.contains(&file)),
        "{:?}",
        status.warnings
    );
    backup.release().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_killed_agent_left_is_swept() {
    let scratch = Scratch::new("sweep");
    let source = cluster(&scratch, "source", ClusterOptions::default());
    for name in ["gs_pitr_0123abcd", "gs_pitr_standby", "other"] {
        let sql = format!("SELECT pg_create_physical_replication_slot('{name}', true)");
        source.execute(&sql).await;
    }
    let config = config(&source);
    let swept = slot::sweep(&config, &WalService::none()).await.unwrap();
    assert_eq!(swept.dropped, ["gs_pitr_0123abcd"]);
    let sql = "SELECT string_agg(slot_name, ' ' ORDER BY slot_name) FROM pg_replication_slots";
    let left = source.query_one("postgres", sql).await;
    assert_eq!(left, "gs_pitr_standby other");
}

/// Two agents beside one database are a mistake, but no reason to end the other one's backup.
#[tokio::test(flavor = "multi_thread")]
async fn the_slot_of_a_backup_under_way_is_not_swept() {
    let scratch = Scratch::new("busy");
    let source = cluster(&scratch, "source", ClusterOptions::default());
    let backup = start(&source, None).await;
    backup.reach(Phase::Copied).await;
    let config = config(&source);
    let swept = slot::sweep(&config, &WalService::none()).await.unwrap();
    assert_eq!(
        (swept.dropped.len(), swept.in_use.len()),
        (0, 1),
        "{swept:?}"
    );
    backup.mark("point").await.unwrap();
    backup.ship().await.unwrap();
    backup.reach(Phase::Shipped).await;
    let store = Arc::clone(&backup.store);
    backup.release().await.unwrap();
    assert_nothing_left(&source, &store).await;
    assert_eq!(
        slot::sweep(&config, &WalService::none()).await.unwrap(),
        slot::Swept::default()
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn bad_input_is_refused_by_name() {
    let scratch = Scratch::new("bad");
    let source = cluster(&scratch, "source", ClusterOptions::default());
    // A directory of another cluster.
    let mut other = config(&source);
    other.pgdata = Some(scratch.directory("elsewhere"));
    let backup = start_with(other, &source, None).await;
    let error = backup.end().await.unwrap_err();
    assert!(error.message.contains("was told"), "{error}");
    // A file that cannot stand in the index.
    let name: &std::ffi::OsStr = std::os::unix::ffi::OsStrExt::from_bytes(b"caf\xe9");
    std::fs::write(source.data_directory().join(name), "x").unwrap();
    let backup = start(&source, None).await;
    let store = Arc::clone(&backup.store);
    let error = backup.end().await.unwrap_err();
    assert!(error.message.contains("not UTF-8"), "{error}");
    assert_eq!((error.kind, error.changed), (ErrorKind::Database, false));
    assert_nothing_left(&source, &store).await;
    // Nobody answers.
    source.stop("fast");
    let error = start(&source, None).await.end().await.unwrap_err();
    assert_eq!(error.kind, ErrorKind::Database, "{error}");
}

/// The agent writes nothing for a node that lives elsewhere, or under an epoch that is over.
#[tokio::test(flavor = "multi_thread")]
async fn nothing_is_written_in_the_name_of_another_database() {
    let scratch = Scratch::new("identity");
    let source = cluster(&scratch, "source", ClusterOptions::default());
    let other = cluster(&scratch, "other", ClusterOptions::default());
    let machine = machine_id();
    let ordered = async |registered: &Cluster, machine: &str, stale: bool| {
        let store = Arc::new(MemoryStore::default());
        let dynamic = Arc::clone(&store) as Arc<dyn ObjectStore>;
        let (node, epoch) = register(Arc::clone(&dynamic), registered, machine).await;
        if stale {
            let catalog = catalog::Catalog::open(dynamic).await.unwrap();
            let mut again = catalog.open_epoch(node).await.unwrap().unwrap();
            again.data_directory.push_str("/elsewhere");
            let next = catalog::repo::NewEpoch {
                node_id: node,
                parent: None,
                timeline: 1,
                machine_id: again.machine_id,
                data_directory: again.data_directory,
                host: again.host,
                port: again.port,
            };
            catalog.start_epoch(next, Uuid::new_v4()).await.unwrap();
        }
        let before = store.keys();
        let backup = begin(
            config(&source),
            Arc::clone(&store),
            Uuid::new_v4(),
            node,
            epoch,
            None,
        );
        let error = backup.end().await.unwrap_err();
        assert_eq!(
            (error.kind, error.changed),
            (ErrorKind::Conflict, false),
            "{error}"
        );
        assert!(
            error.next.as_ref().unwrap().contains("--node-id"),
            "{error:?}"
        );
        assert_eq!(store.keys(), before, "nothing was written");
        error.message
    };
    let message = ordered(&other, &machine, false).await;
    assert!(message.contains("system identifier"), "{message}");
    let message = ordered(&source, "another machine", false).await;
    assert!(message.contains("another machine"), "{message}");
    let message = ordered(&source, &machine, true).await;
    assert!(message.contains("the order is for epoch"), "{message}");
    let slots = "SELECT count(*) FROM pg_replication_slots";
    assert_eq!(source.query_one("postgres", slots).await, "0");
}

/// Changes one byte of a file.
fn flip(path: &Path, at: u64) {
    use std::os::unix::fs::FileExt as _;
    let file = std::fs::File::options()
        .read(true)
        .write(true)
        .open(path)
        .unwrap();
    let mut byte = [0];
    file.read_exact_at(&mut byte, at).unwrap();
    file.write_all_at(&[!byte[0]], at).unwrap();
}
