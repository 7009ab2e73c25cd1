//! Why a copy could not be made.

use std::io;
use std::path::Path;

use pipeline::error::PipelineError;

/// Why a copy could not be made, by what can be done about it.
#[derive(Debug, thiserror::Error)]
pub enum CopyError {
    /// A file or directory could not be read.
    #[error("cannot read `{path}`: {source}")]
    Read {
        /// Which.
        path: String,
        /// Why.
        source: io::Error,
    },
    /// A name that cannot stand in the index.
    #[error("the name `{0}` is not UTF-8: rename the file or move it out of the data directory")]
    Name(String),
    /// Something in the data directory that cannot be backed up.
    #[error("{0}")]
    Refused(String),
    /// `pg_control` was never whole.
    #[error("`global/pg_control` could not be read: {0}")]
    Control(String),
    /// A thread could not be started.
    #[error("cannot start the thread `{name}`: {source}")]
    Thread {
        /// Which.
        name: String,
        /// Why.
        source: io::Error,
    },
    /// The bytes could not be stored.
    #[error(transparent)]
    Pipeline(#[from] PipelineError),
    /// A thread panicked.
    #[error("the thread `{0}` panicked")]
    Panicked(String),
    /// Somebody asked for it to stop.
    #[error("cancelled")]
    Cancelled,
}

impl CopyError {
    /// Whether it only says that something else ended the copy.
    #[must_use]
    pub fn is_cancelled(&self) -> bool {
        matches!(
            self,
            Self::Cancelled | Self::Pipeline(PipelineError::Cancelled)
        )
    }

    /// A read of `path` that failed.
    #[must_use]
    pub fn read(path: &Path, source: io::Error) -> Self {
        Self::Read {
            path: path.display().to_string(),
            source,
        }
    }
}
