//! How a command ends when it does not end well, and the one place where every library's errors
//! become a kind of ours.

use std::fmt;

use agent_api::{ApiError, ErrorKind};
use catalog::CatalogError;
use pipeline::error::PipelineError;
use pipeline::store::StoreError;
use serde::Serialize;

/// What failed, on which node, whether anything was changed, and what to do next.
#[derive(Debug, Clone, Serialize)]
pub(crate) struct Failure {
    /// The kind; the exit code follows from it.
    pub(crate) kind: ErrorKind,
    /// What failed and why.
    pub(crate) message: String,
    /// The node or agent it failed on.
    pub(crate) node: Option<String>,
    /// Whether anything was changed and is still there.
    pub(crate) changed: bool,
    /// The next command to run, or the setting to mend.
    pub(crate) next: Option<String>,
    /// Whether its operation is left for somebody to go on with, so that its journal must stay open.
    #[serde(skip)]
    pub(crate) unfinished: bool,
    /// Whether it may pass by itself.
    #[serde(skip)]
    pub(crate) passing: bool,
}

/// What every step of a command answers.
pub(crate) type Result<T, E = Failure> = std::result::Result<T, E>;

impl Failure {
    /// A failure that changed nothing.
    pub(crate) fn new(kind: ErrorKind, message: impl Into<String>) -> Self {
        Self {
            kind,
            message: message.into(),
            node: None,
            changed: false,
            next: None,
            unfinished: false,
            passing: false,
        }
    }

    /// The command line or the configuration is wrong.
    pub(crate) fn usage(message: impl Into<String>) -> Self {
        Self::new(ErrorKind::Usage, message)
    }

    /// Somebody asked for it to stop.
    pub(crate) fn cancelled() -> Self {
        Self::new(ErrorKind::Cancelled, "cancelled on request")
    }

    /// A file of ours that cannot be read or written.
    pub(crate) fn file(path: &std::path::Path, action: &str, error: &std::io::Error) -> Self {
        Self::usage(format!("cannot {action} `{}`: {error}", path.display()))
    }

    /// Names the node, unless it is named already.
    pub(crate) fn on(mut self, node: impl Into<String>) -> Self {
        self.node.get_or_insert_with(|| node.into());
        self
    }

    /// Says that something was changed and is still there, if `changed`.
    pub(crate) fn changed_if(mut self, changed: bool) -> Self {
        self.changed |= changed;
        self
    }

    /// Says what to do next, unless that is said already.
    pub(crate) fn next(mut self, next: impl Into<String>) -> Self {
        self.next.get_or_insert_with(|| next.into());
        self
    }

    /// Names the store that it is about.
    pub(crate) fn at_store(mut self, place: &str) -> Self {
        let about_store = matches!(
            self.kind,
            ErrorKind::StoreUnavailable | ErrorKind::StoreDenied | ErrorKind::Usage
        );
        if about_store && !self.message.contains(place) {
            self.message = format!("{place}: {}", self.message);
        }
        self
    }

    /// The same failure with something to do next, if nothing better was said.
    pub(crate) fn with_some_next(self) -> Self {
        let next = match self.kind {
            ErrorKind::Internal => "run it again with `-v`, and report what it says",
            ErrorKind::Usage => "gs_pitr --help",
            ErrorKind::StoreUnavailable => "check `--s3-endpoint` and that the store is up",
            ErrorKind::StoreDenied => "check the S3 credentials and what they may do",
            ErrorKind::AgentUnreachable => {
                "check the address, and that the agent runs (systemctl status pitr-agent)"
            }
            ErrorKind::Certificate => "gs_pitr certs issue --help",
            ErrorKind::Database => "look at the database's log on that node",
            ErrorKind::NotFound => "gs_pitr show",
            ErrorKind::Damaged => "choose another backup: gs_pitr show",
            ErrorKind::Target => "choose another `--target-dir`",
            ErrorKind::Incompatible => "install the same release everywhere",
            ErrorKind::Conflict => "see what is there, then run the command again",
            ErrorKind::Timeout | ErrorKind::Cancelled => "run the command again",
            ErrorKind::Recovery => "look at the agent's log on that host",
        };
        self.next(next)
    }

    /// Whether doing the same again, without anybody mending anything, would fail the same way.
    pub(crate) fn is_permanent(&self) -> bool {
        if self.passing {
            return false;
        }
        match self.kind {
            ErrorKind::StoreUnavailable
            | ErrorKind::AgentUnreachable
            | ErrorKind::Timeout
            | ErrorKind::Internal => false,
            ErrorKind::Usage
            | ErrorKind::StoreDenied
            | ErrorKind::Certificate
            | ErrorKind::Database
            | ErrorKind::NotFound
            | ErrorKind::Damaged
            | ErrorKind::Target
            | ErrorKind::Incompatible
            | ErrorKind::Conflict
            | ErrorKind::Recovery
            | ErrorKind::Cancelled => true,
        }
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)
    }
}

impl std::error::Error for Failure {}

impl From<ApiError> for Failure {
    fn from(error: ApiError) -> Self {
        Self {
            kind: error.kind,
            message: error.message,
            node: None,
            changed: error.changed,
            next: error.next,
            unfinished: false,
            passing: error.passing,
        }
    }
}

impl From<StoreError> for Failure {
    fn from(error: StoreError) -> Self {
        let (kind, next) = match &error {
            StoreError::NotFound(_) | StoreError::Corrupt(_) => (ErrorKind::Damaged, None),
            StoreError::NoSuchBucket(_) => (
                ErrorKind::StoreUnavailable,
                Some("create the bucket, or name another one with `--repo`"),
            ),
            StoreError::AlreadyExists(_) => (ErrorKind::Conflict, None),
            StoreError::PermissionDenied(_) => (
                ErrorKind::StoreDenied,
                Some("give these credentials the right to do it, or use others"),
            ),
            StoreError::Unauthenticated(_) => (
                ErrorKind::StoreDenied,
                Some(
                    "set `AWS_ACCESS_KEY_ID` and `AWS_SECRET_ACCESS_KEY`, or use `--s3-credentials-file`",
                ),
            ),
            StoreError::Invalid(_) => (
                ErrorKind::Usage,
                Some("check `--repo`, `--s3-endpoint` and `--s3-region`"),
            ),
            StoreError::Throttled(_)
            | StoreError::Unavailable(_)
            | StoreError::UnknownOutcome(_) => (
                ErrorKind::StoreUnavailable,
                Some("check `--s3-endpoint` and that the store is up, then run the command again"),
            ),
        };
        let failure = Self::new(kind, error.to_string());
        match next {
            Some(next) => failure.next(next),
            None => failure,
        }
    }
}

impl From<PipelineError> for Failure {
    fn from(error: PipelineError) -> Self {
        let kind = match error {
            PipelineError::Store(error) => return error.into(),
            PipelineError::Cancelled => return Self::cancelled(),
            PipelineError::Deadline { .. } => ErrorKind::Timeout,
            PipelineError::Damaged { .. } => ErrorKind::Damaged,
            PipelineError::Setup(_) => ErrorKind::Usage,
            PipelineError::Sink { .. } => ErrorKind::Target,
            PipelineError::Panicked { .. } => ErrorKind::Internal,
        };
        Self::new(kind, error.to_string())
    }
}

impl From<CatalogError> for Failure {
    fn from(error: CatalogError) -> Self {
        let (kind, next) = match &error {
            CatalogError::Store(error) => return error.clone().into(),
            CatalogError::Pipeline(error) => return error.clone().into(),
            CatalogError::NoRepository { .. } => (
                ErrorKind::NotFound,
                Some("check `--repo`; the first `gs_pitr backup` makes a repository"),
            ),
            CatalogError::NewerFormat { .. } => {
                (ErrorKind::Incompatible, Some("use a newer gs_pitr"))
            }
            CatalogError::Damaged { .. } => (
                ErrorKind::Damaged,
                Some("choose another backup (gs_pitr show), and look into who changed the bucket"),
            ),
            CatalogError::NotFound { .. }
            | CatalogError::Deleted { .. }
            | CatalogError::Abandoned { .. } => (ErrorKind::NotFound, Some("gs_pitr show")),
            CatalogError::Conflict { .. } => (ErrorKind::Conflict, None),
            CatalogError::Leased { .. } => (
                ErrorKind::Conflict,
                Some("wait until it is given back or runs out, or see `gs_pitr operations`"),
            ),
            CatalogError::LeaseLost { .. } => (
                ErrorKind::Conflict,
                Some("see `gs_pitr operations`, then run the command again"),
            ),
            CatalogError::Pinned { .. } => (
                ErrorKind::Conflict,
                Some("wait until that operation has ended (gs_pitr operations)"),
            ),
            CatalogError::Ambiguous { .. } => (ErrorKind::Usage, Some("give more of the id")),
            CatalogError::Refused { .. } => (ErrorKind::Internal, None),
            CatalogError::InvalidId(_) => (ErrorKind::Usage, Some("gs_pitr show")),
            CatalogError::Sink { .. } | CatalogError::Source { .. } => (ErrorKind::Target, None),
            CatalogError::Mirror { .. } => (
                ErrorKind::Internal,
                Some("the mirror below `~/.gs_pitr/repositories` may be deleted at any time"),
            ),
        };
        let failure = Self::new(kind, error.to_string());
        match next {
            Some(next) => failure.next(next),
            None => failure,
        }
    }
}
