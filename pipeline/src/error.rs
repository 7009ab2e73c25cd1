//! What can go wrong between bytes and objects, by what the caller can do about it.

use std::io;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio_util::sync::CancellationToken;

use crate::store::{Key, StoreError};

/// Why the pipeline stopped. Cheap to clone, because several threads report the one that came first.
#[derive(Debug, Clone, thiserror::Error)]
pub enum PipelineError {
    /// The store said no, in its own words.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// The operation's token was cancelled, or a writer was dropped unfinished.
    #[error("cancelled")]
    Cancelled,
    /// Something took longer than it may.
    #[error("deadline passed: {what}")]
    Deadline {
        /// What was waited for.
        what: String,
    },
    /// Stored bytes are missing, or are not the ones that were written.
    #[error("damaged: `{key}`: {what}")]
    Damaged {
        /// The object.
        key: String,
        /// What is wrong with it, and where.
        what: String,
    },
    /// The caller asked for something that cannot work: a budget too small, a path that is not one.
    #[error("{0}")]
    Setup(String),
    /// A local file could not be made, written or flushed.
    #[error("{}: {what}: {source}", path.display())]
    Sink {
        /// The file or directory.
        path: PathBuf,
        /// What was tried with it.
        what: &'static str,
        /// The system's own words.
        source: Arc<io::Error>,
    },
    /// A thread or task of the pipeline panicked: a bug, reported instead of a wait without end.
    #[error("internal error: `{thread}` panicked")]
    Panicked {
        /// The thread's or task's name.
        thread: String,
    },
}

impl PipelineError {
    /// A [`PipelineError::Damaged`].
    pub fn damaged(key: &Key, what: impl Into<String>) -> Self {
        Self::Damaged {
            key: key.to_string(),
            what: what.into(),
        }
    }

    /// A [`PipelineError::Sink`].
    pub fn sink(path: impl Into<PathBuf>, what: &'static str, source: io::Error) -> Self {
        Self::Sink {
            path: path.into(),
            what,
            source: Arc::new(source),
        }
    }

    /// An error of zstd itself, which has no file.
    pub(crate) fn codec(what: &str, source: &io::Error) -> Self {
        Self::Setup(format!("zstd: {what}: {source}"))
    }
}

/// What several threads and tasks of one job share: the first error ends them all.
#[derive(Debug, Clone)]
pub(crate) struct Fault {
    first: Arc<Mutex<Option<PipelineError>>>,
    cancel: CancellationToken,
}

impl Fault {
    /// `cancel` is fired by the first error; give a child token, so that only this job ends.
    pub(crate) fn new(cancel: CancellationToken) -> Self {
        Self {
            first: Arc::default(),
            cancel,
        }
    }

    fn first(&self) -> MutexGuard<'_, Option<PipelineError>> {
        self.first.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Keeps `error` if it is the first that says more than "cancelled", and stops the job.
    pub(crate) fn fail(&self, error: PipelineError) {
        {
            let mut first = self.first();
            if matches!(*first, None | Some(PipelineError::Cancelled)) {
                *first = Some(error);
            }
        }
        self.cancel.cancel();
    }

    pub(crate) fn token(&self) -> &CancellationToken {
        &self.cancel
    }

    /// # Errors
    /// The first error, or `Cancelled` if the token was fired from outside.
    pub(crate) fn check(&self) -> Result<(), PipelineError> {
        if !self.cancel.is_cancelled() {
            return Ok(());
        }
        Err(self.first().clone().unwrap_or(PipelineError::Cancelled))
    }

    /// The error that stopped the job, for one of its parts that itself only knows `seen`.
    pub(crate) fn instead_of(&self, seen: PipelineError) -> PipelineError {
        self.fail(seen.clone());
        self.first().clone().unwrap_or(seen)
    }
}
