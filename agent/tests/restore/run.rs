//! Runs a restore as the agent does, in this process.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use agent_api::{ApiError, OpenRequest, Phase, RestoreSpec, Restored};
use catalog::Catalog;
use catalog::model::{Decision, Verdict};
use pipeline::budget::Budget;
use pipeline::meter::Meter;
use pipeline::store::ObjectStore;
use pipeline::throttle::Throttle;
use pitr_agent::config::Config;
use pitr_agent::operation::log::OperationLog;
use pitr_agent::operation::{OperationContext, Reporter, RestoreCommand};
use pitr_agent::restore;
use pitr_agent::wal::gate::ArchiveGate;
use pitr_agent::wal::service::WalService;
use support::memory_store::MemoryStore;
use support::os::{self, Scratch};
use tokio::sync::{mpsc, oneshot};
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

/// Where the re-executed test finds the agent's program.
const PROGRAM: &str = "GS_PITR_TEST_AGENT";

/// Runs `body` as a user that databases accept: as root, the test runs itself again as that user, from a
/// directory that user can read.
pub(crate) fn as_database_user<F: Future<Output = ()>>(
    test: &str,
    body: impl FnOnce(PathBuf) -> F,
) {
    if os::database_user().is_none() {
        return on_this_user(body);
    }
    run_again(test, None);
}

/// Runs `body` as whom we are.
pub(crate) fn on_this_user<F: Future<Output = ()>>(body: impl FnOnce(PathBuf) -> F) {
    let program = std::env::var_os(PROGRAM).map_or_else(
        || PathBuf::from(env!("CARGO_BIN_EXE_pitr-agent")),
        Into::into,
    );
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build();
    runtime.unwrap().block_on(body(program));
}

/// Runs the test again as the database user, with something more in its environment.
pub(crate) fn run_again(test: &str, more: Option<(&str, &std::ffi::OsStr)>) {
    let scratch = Scratch::new("rs");
    let (agent, itself) = (
        scratch.path().join("pitr-agent"),
        scratch.path().join("test"),
    );
    fs::copy(env!("CARGO_BIN_EXE_pitr-agent"), &agent).unwrap();
    fs::copy(std::env::current_exe().unwrap(), &itself).unwrap();
    let mut command = os::command(&itself);
    command
        .args([test, "--exact", "--nocapture"])
        .env(PROGRAM, &agent)
        .envs(more);
    command.current_dir(scratch.path());
    let status = loop {
        match command.status() {
            // Another test forked while the copy was being written, and has not yet started its program.
            Err(e) if e.kind() == std::io::ErrorKind::ExecutableFileBusy => {
                std::thread::yield_now();
            }
            status => break status.unwrap(),
        }
    };
    assert!(status.success(), "{test} failed as the database user");
}

/// A restore under way.
pub(crate) struct Run {
    store: Arc<MemoryStore>,
    pub(crate) restore: Uuid,
    pub(crate) log: Arc<OperationLog>,
    pub(crate) cancel: CancellationToken,
    pub(crate) commands: mpsc::Sender<RestoreCommand>,
    pub(crate) task: tokio::task::JoinHandle<Result<(), ApiError>>,
}

/// The agent's settings for a target two levels below the scratch directory.
pub(crate) fn config(target: &Path, bindir: &Path) -> Config {
    let root = target.parent().unwrap().parent().unwrap();
    Config {
        allow_roots: vec![root.canonicalize().unwrap()],
        pg_bindir: Some(bindir.to_owned()),
        ..Config::default()
    }
}

pub(crate) async fn decide(store: &Arc<MemoryStore>, restore: Uuid, verdict: Verdict) -> Decision {
    let store: Arc<dyn ObjectStore> = Arc::<MemoryStore>::clone(store);
    let catalog = Catalog::open(store).await.unwrap();
    let decided = catalog.decide(restore, verdict, "the test", None).await;
    decided.unwrap()
}

impl Run {
    /// A new restore: nothing is decided about it.
    #[allow(dead_code, reason = "not every test program uses all of this")]
    pub(crate) fn start(
        store: &Arc<MemoryStore>,
        spec: &RestoreSpec,
        bindir: &Path,
        program: &Path,
    ) -> Self {
        let spec = RestoreSpec {
            restore: Uuid::now_v7(),
            ..spec.clone()
        };
        let config = config(Path::new(&spec.target), bindir);
        Self::with(store, &spec, config, program, Uuid::new_v4())
    }

    /// A restore with everything given: the same operation again is the same restore.
    pub(crate) fn with(
        store: &Arc<MemoryStore>,
        spec: &RestoreSpec,
        config: Config,
        program: &Path,
        id: Uuid,
    ) -> Self {
        let meter = Arc::new(Meter::default());
        let log = OperationLog::new(id, "restore", Arc::clone(&meter));
        let cancel = CancellationToken::new();
        let shared = Arc::clone(store);
        let store: Arc<dyn ObjectStore> = Arc::<MemoryStore>::clone(store);
        let cx = OperationContext {
            gate: ArchiveGate::default(),
            id,
            cancel: cancel.clone(),
            store,
            budget: Budget::new(128 << 20),
            throttle: Throttle::new(None),
            meter,
            report: Reporter::new(Arc::clone(&log)),
            config: Arc::new(config),
            wal: WalService::none(),
            repository: None,
        };
        let (commands, receiver) = mpsc::channel(1);
        let (spec, program) = (spec.clone(), program.to_owned());
        let restore = spec.restore;
        let task =
            tokio::spawn(
                async move { Box::pin(restore::run_with(cx, spec, receiver, &program)).await },
            );
        Self {
            store: shared,
            restore,
            log,
            cancel,
            commands,
            task,
        }
    }

    /// Waits until `phase` is reached or passed; panics with the error if the restore ends before.
    pub(crate) async fn reach(&mut self, phase: Phase) {
        const WAY: [Phase; 8] = [
            Phase::Preparing,
            Phase::Fetching,
            Phase::Recovering,
            Phase::Proved,
            Phase::Promoting,
            Phase::Promoted,
            Phase::Opening,
            Phase::Done,
        ];
        let place = |phase| WAY.iter().position(|it| *it == phase);
        while place(self.log.status().phase) < place(phase) {
            if self.task.is_finished() {
                let ended = (&mut self.task).await.unwrap();
                panic!("ended before {phase:?}: {ended:?}");
            }
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    }

    /// Orders the promotion; what the agent says to it.
    pub(crate) async fn order_promotion(&mut self) -> Result<(), ApiError> {
        let (reply, answer) = oneshot::channel();
        self.commands
            .send(RestoreCommand::Promote(reply))
            .await
            .unwrap();
        answer.await.unwrap()
    }

    /// Waits for the end, which is a good one.
    pub(crate) async fn open(&mut self, start: bool) -> Restored {
        self.reach(Phase::Promoted).await;
        let (reply, answer) = oneshot::channel();
        let order = RestoreCommand::Open(OpenRequest { start }, reply);
        self.commands.send(order).await.unwrap();
        answer.await.unwrap().unwrap();
        (&mut self.task).await.unwrap().unwrap();
        self.log.status().restored.unwrap()
    }

    /// From the proof to the end.
    pub(crate) async fn promote(&mut self, start: bool) -> Restored {
        let decided = decide(&self.store, self.restore, Verdict::Commit).await;
        assert_eq!(decided.verdict, Verdict::Commit);
        self.order_promotion().await.unwrap();
        self.open(start).await
    }

    /// Ends it at once, as SIGKILL does.
    pub(crate) async fn kill(self) {
        self.task.abort();
        assert!(self.task.await.unwrap_err().is_cancelled());
    }

    pub(crate) async fn fails(self) -> ApiError {
        self.task.await.unwrap().unwrap_err()
    }
}

pub(crate) fn names(directory: &Path) -> Vec<String> {
    let entries = fs::read_dir(directory).unwrap();
    let mut names: Vec<_> = entries
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    names.sort();
    names
}
