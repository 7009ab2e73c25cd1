//! Bodies in and out: JSON, and every failure an `ApiError`.

use std::time::Duration;

use agent_api::{ApiError, ErrorKind};
use axum::Json;
use axum::extract::{FromRequest, FromRequestParts, Path, Request};
use axum::http::request::Parts;
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use serde::de::DeserializeOwned;
use uuid::Uuid;

/// Most bytes of a request: a node's part of a manifest can be large.
const LIMIT: usize = 16 << 20;
/// Longest wait for them.
const READ: Duration = Duration::from_mins(1);

/// An error as an answer.
#[derive(Debug)]
pub(super) struct Refusal(pub(super) ApiError);

impl From<ApiError> for Refusal {
    fn from(error: ApiError) -> Self {
        Self(error)
    }
}

impl IntoResponse for Refusal {
    fn into_response(self) -> Response {
        let status = match self.0.kind {
            ErrorKind::Usage | ErrorKind::Target => StatusCode::BAD_REQUEST,
            ErrorKind::Certificate => StatusCode::FORBIDDEN,
            ErrorKind::NotFound => StatusCode::NOT_FOUND,
            ErrorKind::Conflict | ErrorKind::Cancelled | ErrorKind::Incompatible => {
                StatusCode::CONFLICT
            }
            ErrorKind::Timeout => StatusCode::GATEWAY_TIMEOUT,
            ErrorKind::StoreUnavailable
            | ErrorKind::StoreDenied
            | ErrorKind::AgentUnreachable
            | ErrorKind::Database => StatusCode::BAD_GATEWAY,
            ErrorKind::Internal | ErrorKind::Damaged | ErrorKind::Recovery => {
                StatusCode::INTERNAL_SERVER_ERROR
            }
        };
        (status, Json(self.0)).into_response()
    }
}

pub(super) fn usage(message: impl Into<String>) -> Refusal {
    Refusal(ApiError::new(ErrorKind::Usage, message))
}

/// A JSON body; an empty one counts as `null`.
#[derive(Debug)]
pub(super) struct Body<T>(pub(super) T);

impl<S: Send + Sync, T: DeserializeOwned> FromRequest<S> for Body<T> {
    type Rejection = Refusal;

    async fn from_request(request: Request, _: &S) -> Result<Self, Refusal> {
        let content_type = request.headers().get(header::CONTENT_TYPE);
        let content_type = content_type.and_then(|value| value.to_str().ok());
        let essence = content_type.unwrap_or_default().split(';').next();
        // Required, because a web page can make a browser send other types to loopback without asking.
        if !essence.is_some_and(|e| e.trim().eq_ignore_ascii_case("application/json")) {
            return Err(usage("the request's content type is not application/json"));
        }
        let bytes = axum::body::to_bytes(request.into_body(), LIMIT);
        let bytes = tokio::time::timeout(READ, bytes)
            .await
            .map_err(|_| {
                usage(format!(
                    "the request's body took longer than {} s",
                    READ.as_secs()
                ))
            })?
            .map_err(|error| {
                usage(format!(
                    "cannot read the request's body (at most {LIMIT} bytes): {error}"
                ))
            })?;
        let text: &[u8] = if bytes.trim_ascii().is_empty() {
            b"null"
        } else {
            &bytes
        };
        serde_json::from_slice(text)
            .map(Self)
            .map_err(|error| usage(format!("the request's body: {error}")))
    }
}

/// The operation or watchdog named in the path.
#[derive(Debug)]
pub(super) struct Id(pub(super) Uuid);

impl<S: Send + Sync> FromRequestParts<S> for Id {
    type Rejection = Refusal;

    async fn from_request_parts(parts: &mut Parts, state: &S) -> Result<Self, Refusal> {
        let path = Path::<Uuid>::from_request_parts(parts, state).await;
        path.map(|Path(id)| Self(id))
            .map_err(|error| usage(format!("operation id or watchdog id: {error}")))
    }
}
