//! Operations: what an engine is given, how it tells how far it is, and what it can be told meanwhile.
//!
//! An operation belongs to the agent, not to the client that started it. [`table`] keeps them all,
//! [`log`] keeps what one of them has to say. An engine sees only [`OperationContext`] and the receiving
//! end of its commands.

use std::sync::Arc;
use std::time::Duration;

use agent_api::{
    ApiError, Look, MarkRequest, MarkResult, Observed, OpenRequest, Phase, RepositoryAccess,
    Restored,
};
use catalog::model::{NodeBackup, NodePoint, Verdict};
use pipeline::budget::Budget;
use pipeline::meter::Meter;
use pipeline::store::ObjectStore;
use pipeline::throttle::Throttle;
use tokio::sync::oneshot;
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

use crate::config::Config;
use crate::operation::log::OperationLog;
use crate::wal::gate::ArchiveGate;
use crate::wal::service::WalService;

pub mod log;
pub mod table;

/// What an engine is given to run one operation.
#[derive(Debug, Clone)]
pub struct OperationContext {
    /// The operation's id.
    pub id: Uuid,
    /// Cancelled when the operation is to stop: undo, close, and return an error, within seconds.
    pub cancel: CancellationToken,
    /// The repository's store.
    pub store: Arc<dyn ObjectStore>,
    /// The PROCESS's byte budget; all operations share it.
    pub budget: Budget,
    /// The operation's bandwidth limit; changes while it runs.
    pub throttle: Throttle,
    /// Bytes and files done; read for the operation's progress.
    pub meter: Arc<Meter>,
    /// How the engine says where it stands.
    pub report: Reporter,
    /// The agent's settings.
    pub config: Arc<Config>,
    /// The repository as the client named it, without credentials.
    pub repository: Option<RepositoryAccess>,
    /// What the server's archiver is told about WAL.
    pub gate: ArchiveGate,
    /// WAL that is shipped all the time.
    pub wal: WalService,
}

/// How an engine says where it stands. Cheap to clone; never blocks, never fails.
#[derive(Debug, Clone)]
pub struct Reporter {
    log: Arc<OperationLog>,
}

impl Reporter {
    /// For how long nobody has asked about the operation.
    #[must_use]
    pub fn silent_for(&self) -> Duration {
        self.log.silent_for()
    }

    /// What is decided about a restore.
    pub fn decided(&self, verdict: Verdict) {
        self.log.set_decision(verdict);
    }

    /// A reporter into `log`.
    #[must_use]
    pub fn new(log: Arc<OperationLog>) -> Self {
        Self { log }
    }

    /// Enters a phase. Entering [`Phase::Copied`], [`Phase::Ready`], [`Phase::Marked`], or
    /// [`Phase::Shipped`] says that the engine waits for a command, and starts the clock of the orphan rule. The phases that end an operation are set by the agent from what the engine returns; an
    /// engine that asks for one is ignored.
    pub fn phase(&self, phase: Phase) {
        self.log.phase(phase);
    }

    /// The phase last entered.
    #[must_use]
    pub fn current_phase(&self) -> Phase {
        self.log.current_phase()
    }

    /// Something the operator should know; goes to the log too.
    pub fn warning(&self, message: impl Into<String>) {
        self.log.warning(message.into());
    }

    /// `more` plain bytes are to be moved than was known before.
    pub fn expect_bytes(&self, more: u64) {
        self.log.expect_bytes(more);
    }

    /// `more` files are done. An engine that counts files in the [`Meter`] need not call this: the
    /// larger figure is shown.
    pub fn files_done(&self, more: u64) {
        self.log.files_done(more);
    }

    /// `more` WAL segments are sent or replayed.
    pub fn wal_segments(&self, more: u64) {
        self.log.wal_segments(more);
    }

    /// The result of a backup; call it before entering [`Phase::Shipped`].
    pub fn backup(&self, backup: NodeBackup, point: NodePoint) {
        self.log.set_backup(backup, point);
    }

    /// What is known of a backup's copy that is worth as much without its operation; call it before entering [`Phase::Copied`].
    pub fn copy(&self, backup: NodeBackup) {
        self.log.set_copy(backup);
    }

    /// The result of a point; call it before entering [`Phase::Shipped`].
    pub fn point(&self, point: NodePoint) {
        self.log.set_point(point);
    }

    /// The result of a restore; call it before entering [`Phase::Promoted`], and again when it is open.
    pub fn restored(&self, restored: Restored) {
        self.log.set_restored(restored);
    }
}

/// What a backup or a point under way can be told. Whether it comes at the right phase is checked before it is
/// sent; at most one is under way. The sender waits two minutes for the answer.
#[derive(Debug)]
pub enum BackupCommand {
    /// Copied, ready or marked: look at the node's transactions.
    Observe(Look, oneshot::Sender<Result<Observed, ApiError>>),
    /// Copied, ready or marked: make a restore point. Answered when it is made; a crash of the database may still lose it.
    Mark(MarkRequest, oneshot::Sender<Result<MarkResult, ApiError>>),
    /// Marked: wait until the last restore point, of this name, is on disk.
    Flush(MarkRequest, oneshot::Sender<Result<(), ApiError>>),
    /// Marked: send WAL up to the last restore point. Answered as soon as it is begun; that it is done is
    /// said by [`Phase::Shipped`].
    Ship(oneshot::Sender<Result<(), ApiError>>),
    /// Shipped: let go of the WAL hold. Answered when it is gone; the engine then returns.
    Release(oneshot::Sender<Result<(), ApiError>>),
}

/// What a restore under way can be told; the rules of [`BackupCommand`].
#[derive(Debug)]
pub enum RestoreCommand {
    /// Proved: promote and put in place, if that is decided. Answered as soon as it is begun; that it is done is
    /// said by [`Phase::Promoted`].
    Promote(oneshot::Sender<Result<(), ApiError>>),
    /// Promoted: open the database, or leave it shut down. Answered as soon as it is begun; that it is done is said
    /// by the engine's end.
    Open(OpenRequest, oneshot::Sender<Result<(), ApiError>>),
}
