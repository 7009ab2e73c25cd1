//! The cluster's lock: taken, given back, looked at.

use std::time::{Duration, Instant};

use super::ProxyConnection;
use super::effect::{is_syntax, says_locked, says_not_locked};
use crate::error::SqlError;

const LOCK: &str = r#"LOCK CLUSTER WITH LOCK_STRATEGY(TYPE(NAME="WRITE"))"#;
const UNLOCK: &str = "UNLOCK CLUSTER";
/// A statement that is refused as every write is, and that does nothing where it is not: there is no such instance.
const PROBE: &str = r#"LABEL COMPUTE NODE "gs_pitr_probe" WITH probe"#;

/// What a proxy says to LOCK CLUSTER.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum LockReply {
    /// `SUCCESS`. That proves nothing: it is said too when the lock was not had in time. Probe.
    Said,
    /// Refused: it is locked; the proxy's words.
    AlreadyLocked(String),
}

/// What a proxy says to UNLOCK CLUSTER.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum UnlockReply {
    /// `SUCCESS`. That proves nothing, as with [`LockReply::Said`]. Probe.
    Said,
    /// Refused: this proxy thinks that the cluster is not locked.
    NotLocked,
}

/// Whether a proxy lets writes pass.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Gate {
    /// It does.
    Open,
    /// It refuses them; its words.
    Locked(String),
}

impl ProxyConnection {
    /// `LOCK CLUSTER` for writes. `wait` is for how long the proxy tries to get the cluster's internal mutex, no lease of the lock;
    /// keep it below `deadline`.
    ///
    /// # Errors
    /// [`effect`](super::effect()) tells whether it may have locked, or may still lock.
    pub async fn lock(&self, wait: Duration, deadline: Duration) -> Result<LockReply, SqlError> {
        match self.switch("LOCK CLUSTER", LOCK, wait, deadline).await {
            Ok(()) => Ok(LockReply::Said),
            Err(SqlError::Server { message, .. }) if says_locked(&message) => {
                Ok(LockReply::AlreadyLocked(message))
            }
            Err(error) => Err(error),
        }
    }

    /// `UNLOCK CLUSTER`, whoever locked it; `wait` as for [`Self::lock`].
    ///
    /// # Errors
    /// [`effect`](super::effect()) tells whether it may have unlocked, or may still unlock.
    pub async fn unlock(
        &self,
        wait: Duration,
        deadline: Duration,
    ) -> Result<UnlockReply, SqlError> {
        match self.switch("UNLOCK CLUSTER", UNLOCK, wait, deadline).await {
            Ok(()) => Ok(UnlockReply::Said),
            Err(SqlError::Server { message, .. }) if says_not_locked(&message) => {
                Ok(UnlockReply::NotLocked)
            }
            Err(error) => Err(error),
        }
    }

    /// Whether this proxy lets writes pass now. Changes nothing.
    ///
    /// # Errors
    /// Those of a call; [`SqlError::Server`] for any other refusal, such as that of a proxy that is no cluster's.
    pub async fn probe(&self, deadline: Duration) -> Result<Gate, SqlError> {
        match self.ask("the write probe", PROBE, deadline).await {
            Ok(_) => Ok(Gate::Open),
            Err(SqlError::Server { message, .. }) if says_locked(&message) => {
                Ok(Gate::Locked(message))
            }
            Err(error) => Err(error),
        }
    }

    /// Sends `statement` with TIMEOUT, which 5.5.2 requires; and where that is no grammar (before 5.5.2), without.
    async fn switch(
        &self,
        what: &'static str,
        statement: &str,
        wait: Duration,
        deadline: Duration,
    ) -> Result<(), SqlError> {
        let until = Instant::now() + deadline;
        if !self.no_timeout_clause() {
            let sql = format!("{statement} TIMEOUT {}", wait.as_millis().max(1));
            match self.ask(what, &sql, deadline).await {
                Err(SqlError::Server {
                    sqlstate, message, ..
                }) if is_syntax(&sqlstate, &message) => self.note_no_timeout_clause(),
                other => return other.map(|_| ()),
            }
        }
        let left = until.saturating_duration_since(Instant::now());
        self.ask(what, statement, left).await.map(|_| ())
    }
}
