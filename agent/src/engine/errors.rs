//! Failures below an engine, as the operator is told.

use agent_api::{ApiError, ErrorKind};
use agent_sql::SqlError;
use catalog::error::CatalogError;
use pipeline::error::PipelineError;

use crate::engine::copy_error::CopyError;
use crate::failure;

/// A bug, or something nobody foresaw.
pub fn internal(error: impl std::fmt::Display) -> ApiError {
    ApiError::new(ErrorKind::Internal, error.to_string())
}

/// A failure between bytes and objects.
#[must_use]
#[expect(clippy::needless_pass_by_value, reason = "for map_err")]
pub fn pipeline(error: PipelineError) -> ApiError {
    failure::pipeline_error(&error)
}

/// A failure of the catalog.
#[must_use]
#[expect(clippy::needless_pass_by_value, reason = "for map_err")]
pub fn catalog(error: CatalogError) -> ApiError {
    let kind = match &error {
        CatalogError::Store(error) => return failure::store_error(error),
        CatalogError::Pipeline(error) => return failure::pipeline_error(error),
        CatalogError::NoRepository { .. }
        | CatalogError::NotFound { .. }
        | CatalogError::Deleted { .. }
        | CatalogError::Abandoned { .. } => ErrorKind::NotFound,
        CatalogError::NewerFormat { .. } => ErrorKind::Incompatible,
        CatalogError::Damaged { .. } => ErrorKind::Damaged,
        CatalogError::Conflict { .. }
        | CatalogError::Ambiguous { .. }
        | CatalogError::Leased { .. }
        | CatalogError::LeaseLost { .. }
        | CatalogError::Pinned { .. } => ErrorKind::Conflict,
        CatalogError::Refused { .. } | CatalogError::InvalidId(_) => ErrorKind::Usage,
        _ => ErrorKind::Internal,
    };
    ApiError::new(kind, error.to_string())
}

/// A failure of the database.
#[must_use]
#[expect(clippy::needless_pass_by_value, reason = "for map_err")]
pub fn sql(error: SqlError) -> ApiError {
    failure::sql_error(&error)
}

/// A failure of the copy.
#[must_use]
pub fn copy(error: CopyError) -> ApiError {
    let kind = match error {
        CopyError::Pipeline(error) => return pipeline(error),
        CopyError::Cancelled => ErrorKind::Cancelled,
        CopyError::Thread { .. } | CopyError::Panicked(_) => ErrorKind::Internal,
        CopyError::Read { .. }
        | CopyError::Name(_)
        | CopyError::Refused(_)
        | CopyError::Control(_) => ErrorKind::Database,
    };
    ApiError::new(kind, error.to_string())
}
