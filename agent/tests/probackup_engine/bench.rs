//! A backup by the engine `probackup`, as the agent runs one, into a store in memory.

use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use agent_api::{
    ApiError, BackupMode, BackupSpec, ChainLink, Engine, MarkRequest, OperationStatus, Phase,
};
use catalog::ids::{BackupId, EpochId};
use catalog::model::NodeBackup;
use jiff::Timestamp;
use pipeline::budget::Budget;
use pipeline::meter::Meter;
use pipeline::store::ObjectStore;
use pipeline::throttle::Throttle;
use pitr_agent::catalog_fs::life::{MountHow, MountSettings, available};
use pitr_agent::config::Config;
use pitr_agent::engine;
use pitr_agent::facts::machine_id;
use pitr_agent::operation::log::OperationLog;
use pitr_agent::operation::{BackupCommand, OperationContext, Reporter};
use pitr_agent::wal::service::WalService;
use support::fleet::built_program;
use support::memory_store::MemoryStore;
use support::os::Scratch;
use support::postgres::Cluster;
use support::probackup::ProbackupUnderTest;
use support::registered::register;
use support::skip;
use tokio::sync::{mpsc, oneshot};
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

/// A database, and the repository that it is backed up into.
pub(crate) struct Bench {
    pub(crate) cluster: Cluster,
    pub(crate) store: Arc<MemoryStore>,
    pub(crate) config: Config,
    pub(crate) node: Uuid,
    pub(crate) epoch: EpochId,
    scratch: Scratch,
    source: Option<Scratch>,
    program: Option<ProbackupUnderTest>,
}

/// A backup under way.
pub(crate) struct Backup {
    pub(crate) log: Arc<OperationLog>,
    pub(crate) cancel: CancellationToken,
    pub(crate) spec: BackupSpec,
    commands: mpsc::Sender<BackupCommand>,
    task: JoinHandle<Result<(), ApiError>>,
}

impl Bench {
    /// `None`, and said so, where nothing can be mounted.
    pub(crate) async fn new(
        test: &str,
        cluster: Cluster,
        program: &ProbackupUnderTest,
    ) -> Option<Self> {
        let scratch = Scratch::new(test);
        let mount = MountSettings {
            how: MountHow::Auto,
            runtime_dir: scratch.path().to_owned(),
            runner: built_program("pitr-agent"),
        };
        if let Err(missing) = available(&mount).await {
            skip(test, &missing.to_string());
            return None;
        }
        let store = Arc::new(MemoryStore::default());
        let dynamic = Arc::clone(&store) as Arc<dyn ObjectStore>;
        let (node, epoch) = register(dynamic, &cluster, &machine_id()).await;
        let config = Config {
            pgdata: Some(cluster.data_directory()),
            pg_host: cluster.socket_directory().to_str().unwrap().to_owned(),
            pg_port: Some(cluster.port()),
            pg_user: Some("postgres".into()),
            probackup: Some(program.path().to_owned()),
            mount,
            ..Config::default()
        };
        Some(Self {
            cluster,
            store,
            config,
            node,
            epoch,
            scratch,
            source: None,
            program: None,
        })
    }

    /// Keeps the cluster's directory for as long as the cluster.
    pub(crate) fn keep(&mut self, source: Scratch) {
        self.source = Some(source);
    }

    /// Keeps the program's place.
    pub(crate) fn keep_program(&mut self, program: ProbackupUnderTest) {
        self.program = Some(program);
    }

    /// A program that runs `program` after `prelude`, a line for the shell.
    pub(crate) fn wrapper(&self, program: &Path, prelude: &str) -> PathBuf {
        let path = self.scratch.path().join("wrapped");
        let script = format!(
            "#!/bin/sh\n{prelude}\nexec '{}' \"$@\"\n",
            program.display()
        );
        fs::write(&path, script).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
        path
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.scratch.path().join(name)
    }

    pub(crate) fn start(&self, mode: BackupMode, chain: &[ChainLink]) -> Backup {
        self.start_with(self.config.clone(), mode, chain)
    }

    pub(crate) fn start_with(
        &self,
        config: Config,
        mode: BackupMode,
        chain: &[ChainLink],
    ) -> Backup {
        let (commands, received) = mpsc::channel(1);
        let (id, meter) = (Uuid::now_v7(), Arc::new(Meter::default()));
        let log = OperationLog::new(id, "backup", Arc::clone(&meter));
        let cancel = CancellationToken::new();
        let spec = BackupSpec {
            backup_id: BackupId::generate(Timestamp::now(), !mode.is_increment()),
            node_id: self.node,
            epoch: self.epoch.clone(),
            attempt: 1,
            jobs: 2,
            level: 1,
            label: None,
            fast_checkpoint: true,
            engine: Engine::Probackup,
            mode,
            chain: chain.to_vec(),
            wal: agent_api::WalMode::Backup,
            pace: agent_api::Pace::Full,
        };
        let cx = OperationContext {
            id,
            cancel: cancel.clone(),
            store: Arc::clone(&self.store) as Arc<dyn ObjectStore>,
            budget: Budget::new(128 << 20),
            throttle: Throttle::new(None),
            meter,
            report: Reporter::new(Arc::clone(&log)),
            config: Arc::new(config),
            wal: WalService::none(),
            repository: None,
            gate: pitr_agent::wal::gate::ArchiveGate::default(),
        };
        let run = engine::run(cx, spec.clone(), received);
        let task = tokio::spawn(run);
        Backup {
            log,
            cancel,
            spec,
            commands,
            task,
        }
    }

    /// A whole backup, from the order to its release.
    pub(crate) async fn back_up(&self, mode: BackupMode, chain: &[ChainLink]) -> ChainLink {
        let backup = self.start(mode, chain);
        backup.reach(Phase::Copied).await;
        backup
            .mark(&format!("gs_pitr test {}", Uuid::new_v4().simple()))
            .await
            .unwrap();
        backup.tell(BackupCommand::Ship).await.unwrap();
        let status = backup.reach(Phase::Shipped).await;
        let backup_id = backup.spec.backup_id.clone();
        backup.tell(BackupCommand::Release).await.unwrap();
        backup.end().await.unwrap();
        assert_eq!(self.store.uploads_under_way(), 0);
        ChainLink {
            backup_id,
            node: *status.backup.unwrap(),
        }
    }

    /// Nothing of a backup is left: on the server, in the mount table, in the store's uploads.
    pub(crate) async fn assert_clean(&self) {
        let client = self.cluster.connect("postgres").await;
        let left = async || -> (i64, i64) {
            let row = client
                .query_one(
                    "SELECT (SELECT count(*) FROM pg_replication_slots), (SELECT count(*) FROM pg_stat_activity \
                     WHERE application_name LIKE '%probackup%' OR backend_type = 'walsender')",
                    &[],
                )
                .await
                .unwrap();
            (row.get(0), row.get(1))
        };
        let gone = async {
            while left().await != (0, 0) {
                tokio::time::sleep(Duration::from_millis(100)).await;
            }
        };
        let in_time = tokio::time::timeout(Duration::from_secs(20), gone).await;
        assert!(in_time.is_ok(), "slots and sessions: {:?}", left().await);
        let mounts = fs::read_to_string("/proc/self/mounts").unwrap();
        let ours = mounts
            .lines()
            .find(|line| line.contains(self.scratch.path().to_str().unwrap()));
        assert_eq!(ours, None);
        assert_eq!(self.store.uploads_under_way(), 0);
    }
}

impl Backup {
    pub(crate) async fn reach(&self, phase: Phase) -> OperationStatus {
        let reached = async {
            while self.log.status().phase != phase {
                assert!(
                    !self.task.is_finished(),
                    "ended before {phase:?}: {:?}",
                    self.log.status()
                );
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
        };
        let reached = tokio::time::timeout(Duration::from_mins(3), reached).await;
        reached.unwrap_or_else(|_| panic!("{phase:?} not reached: {:?}", self.log.status()));
        self.log.status()
    }

    pub(crate) async fn mark(&self, name: &str) -> Result<agent_api::MarkResult, ApiError> {
        let request = MarkRequest {
            restore_point: name.into(),
        };
        self.tell(|reply| BackupCommand::Mark(request, reply)).await
    }

    pub(crate) async fn tell<T>(
        &self,
        command: impl FnOnce(oneshot::Sender<Result<T, ApiError>>) -> BackupCommand,
    ) -> Result<T, ApiError> {
        let (reply, answer) = oneshot::channel();
        self.commands.send(command(reply)).await.unwrap();
        answer.await.unwrap()
    }

    pub(crate) fn has_ended(&self) -> bool {
        self.task.is_finished()
    }

    pub(crate) async fn end(self) -> Result<(), ApiError> {
        let ended = tokio::time::timeout(Duration::from_mins(3), self.task).await;
        ended.expect("it ends in time").expect("it does not panic")
    }
}

/// The files in a copy, by its index, with their sizes.
pub(crate) fn copied(copy: &NodeBackup) -> (u64, u64) {
    (copy.files, copy.plain_bytes)
}
