//! What went wrong below, as the operator is told: a kind, the server's own words, what to do next.

use agent_api::{ApiError, ErrorKind};
use agent_sql::SqlError;
use pipeline::error::PipelineError;
use pipeline::store::StoreError;

/// A store's refusal. `changed` is left false: whoever called knows better.
#[must_use]
pub fn store_error(error: &StoreError) -> ApiError {
    let (kind, next) = match error {
        StoreError::NotFound(_) => (
            ErrorKind::Damaged,
            "check that --repo names the right repository, then `gs_pitr show`",
        ),
        StoreError::NoSuchBucket(_) => (
            ErrorKind::StoreUnavailable,
            "create the bucket, or mend --repo",
        ),
        StoreError::AlreadyExists(_) => (
            ErrorKind::Conflict,
            "something else wrote under this name; run the command again",
        ),
        StoreError::PermissionDenied(_) => (
            ErrorKind::StoreDenied,
            "give the credentials the rights that the documentation lists",
        ),
        StoreError::Unauthenticated(_) => (
            ErrorKind::StoreDenied,
            "mend the S3 credentials (those of the agent come before the client's)",
        ),
        StoreError::Invalid(_) => (
            ErrorKind::Usage,
            "check --s3-endpoint, --s3-region and --repo",
        ),
        StoreError::Throttled(_) => (
            ErrorKind::StoreUnavailable,
            "the store asks for less; run it again later or with fewer jobs",
        ),
        StoreError::Unavailable(_) => (
            ErrorKind::StoreUnavailable,
            "check that this host reaches the endpoint, then run the command again",
        ),
        StoreError::UnknownOutcome(_) => (
            ErrorKind::StoreUnavailable,
            "run the command again; what was sent may have been written",
        ),
        StoreError::Corrupt(_) => (
            ErrorKind::Damaged,
            "the stored bytes are not what was written: choose another backup",
        ),
    };
    ApiError::new(kind, error.to_string()).next(next)
}

/// A failure of the pipeline.
#[must_use]
pub fn pipeline_error(error: &PipelineError) -> ApiError {
    let kind = match error {
        PipelineError::Store(error) => return store_error(error),
        PipelineError::Cancelled => ErrorKind::Cancelled,
        PipelineError::Deadline { .. } => ErrorKind::Timeout,
        PipelineError::Damaged { .. } => ErrorKind::Damaged,
        PipelineError::Setup(_) => ErrorKind::Usage,
        PipelineError::Sink { .. } => ErrorKind::Target,
        PipelineError::Panicked { .. } => ErrorKind::Internal,
    };
    ApiError::new(kind, error.to_string())
}

/// What the database refused.
#[must_use]
pub fn sql_error(error: &SqlError) -> ApiError {
    let (kind, next) = match error {
        SqlError::Unreachable { .. } => (
            ErrorKind::Database,
            Some("start the database, or mend the agent's --pg-host and --pg-port".to_owned()),
        ),
        SqlError::WrongPassword { .. } => (
            ErrorKind::Database,
            Some("mend the agent's --pg-password-file".to_owned()),
        ),
        SqlError::Refused { .. } => (
            ErrorKind::Database,
            Some("mend the agent's --pg-user, or the server's pg_hba.conf".to_owned()),
        ),
        SqlError::Privilege { grant, .. } => (ErrorKind::Database, Some(grant.clone())),
        SqlError::Setting { name, needed, .. } => (
            ErrorKind::Database,
            Some(format!("set {name} to {needed} and restart the database")),
        ),
        SqlError::Unsupported { .. } => (ErrorKind::Incompatible, None),
        SqlError::BadName { .. } => (ErrorKind::Usage, None),
        SqlError::Lost { .. } => (
            ErrorKind::Database,
            Some("look at the database's log, then run the command again".to_owned()),
        ),
        SqlError::Timeout { .. } => (
            ErrorKind::Timeout,
            Some("look at the database's log, then run the command again".to_owned()),
        ),
        SqlError::Cancelled { .. } => (ErrorKind::Cancelled, None),
        SqlError::Server { .. } | SqlError::Answer { .. } => (ErrorKind::Database, None),
    };
    let mut shown = ApiError::new(kind, error.to_string());
    shown.next = next;
    // A server that ended the session is being restarted, or has been.
    shown.passing = matches!(error, SqlError::Lost { .. } | SqlError::Unreachable { .. });
    shown
}
