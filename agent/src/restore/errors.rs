//! Errors of the parts below, as the operator gets them.

use std::io;
use std::path::Path;

use agent_api::{ApiError, ErrorKind};
use catalog::error::CatalogError;
use pipeline::error::PipelineError;

use super::workspace::WorkspaceError;
use crate::failure::{pipeline_error, store_error};

const OTHER_BACKUP: &str = "run `gs_pitr show`, and restore another backup";

/// The operation was cancelled.
pub(super) fn cancelled() -> ApiError {
    ApiError::new(ErrorKind::Cancelled, "the restore was cancelled")
}

/// A local file or directory could not be used.
pub(super) fn local(path: &Path, error: &io::Error) -> ApiError {
    ApiError::new(ErrorKind::Target, format!("{}: {error}", path.display()))
}

/// A failure of the catalog.
pub(super) fn of_catalog(error: &CatalogError) -> ApiError {
    let kind = match error {
        CatalogError::Store(error) => return store_error(error),
        // What a manifest names and the bucket does not have was there once.
        CatalogError::Damaged { .. } | CatalogError::NotFound { .. } => ErrorKind::Damaged,
        CatalogError::NewerFormat { .. } => ErrorKind::Incompatible,
        CatalogError::Sink { .. } => ErrorKind::Target,
        CatalogError::NoRepository { .. } => ErrorKind::NotFound,
        _ => ErrorKind::Internal,
    };
    let error = ApiError::new(kind, error.to_string());
    match kind {
        ErrorKind::Damaged => error.next(OTHER_BACKUP),
        _ => error,
    }
}

/// A failure of the pipeline.
pub(super) fn of_pipeline(error: &PipelineError) -> ApiError {
    let error = match error {
        PipelineError::Cancelled => return cancelled(),
        error => pipeline_error(error),
    };
    match (error.kind, &error.next) {
        (ErrorKind::Damaged, None) => error.next(OTHER_BACKUP),
        _ => error,
    }
}

/// A failure of the workspace.
pub(super) fn of_workspace(error: &WorkspaceError) -> ApiError {
    let (kind, next) = match error {
        WorkspaceError::Busy(_) => (
            ErrorKind::Conflict,
            "wait until it has ended, or cancel it".to_owned(),
        ),
        WorkspaceError::Foreign(path) => (
            ErrorKind::Target,
            format!("look at {}, and move it away", path.display()),
        ),
        WorkspaceError::Io { .. } => (
            ErrorKind::Target,
            "mend what the message names, and restore again".to_owned(),
        ),
    };
    ApiError::new(kind, error.to_string()).next(next)
}
