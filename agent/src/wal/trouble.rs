//! What goes wrong while WAL is shipped, by what it means for the WAL.

use agent_api::ApiError;
use agent_sql::SqlError;

use crate::engine::errors;

/// Why a segment is not in the bucket.
#[derive(Debug, Clone)]
pub enum Trouble {
    /// It is not kept on the node any more: what follows cannot join what is in the bucket.
    Gone(ApiError),
    /// So much is held back that it must be let go of.
    Overrun(ApiError),
    /// It is not the WAL of the epoch it would be written into, or the bucket has other WAL of its name.
    Foreign(ApiError),
    /// Anything else: it may pass.
    Other(ApiError),
}

impl Trouble {
    /// In words.
    #[must_use]
    pub fn error(&self) -> &ApiError {
        match self {
            Self::Gone(error)
            | Self::Overrun(error)
            | Self::Foreign(error)
            | Self::Other(error) => error,
        }
    }
}

impl From<Trouble> for ApiError {
    fn from(trouble: Trouble) -> Self {
        match trouble {
            Trouble::Gone(error)
            | Trouble::Overrun(error)
            | Trouble::Foreign(error)
            | Trouble::Other(error) => error,
        }
    }
}

impl From<ApiError> for Trouble {
    fn from(error: ApiError) -> Self {
        Self::Other(error)
    }
}

impl From<SqlError> for Trouble {
    fn from(error: SqlError) -> Self {
        Self::Other(errors::sql(error))
    }
}
