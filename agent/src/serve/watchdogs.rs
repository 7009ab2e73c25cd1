//! The routes of watchdogs.

use agent_api::{ArmWatchdog, DisarmWatchdog, StartWatchdog, WatchdogStatus};
use axum::extract::State;
use axum::routing::{get, post};
use axum::{Json, Router};

use crate::serve::body::{Body, Id, Refusal};
use crate::watchdog::Watchdogs;

type Answer = Result<Json<WatchdogStatus>, Refusal>;

/// As `agent_api` lists them.
pub(super) fn routes<S: Clone + Send + Sync + 'static>(watchdogs: Watchdogs) -> Router<S> {
    Router::new()
        .route("/v1/watchdogs", get(list).post(start))
        .route("/v1/watchdogs/{id}", get(status).delete(end))
        .route("/v1/watchdogs/{id}/arm", post(arm))
        .route("/v1/watchdogs/{id}/disarm", post(disarm))
        .with_state(watchdogs)
}

async fn list(State(watchdogs): State<Watchdogs>) -> Json<Vec<WatchdogStatus>> {
    Json(watchdogs.list())
}

async fn start(State(watchdogs): State<Watchdogs>, Body(request): Body<StartWatchdog>) -> Answer {
    Ok(Json(watchdogs.start(request).await?))
}

async fn status(State(watchdogs): State<Watchdogs>, Id(id): Id) -> Answer {
    Ok(Json(watchdogs.status(id)?))
}

async fn end(State(watchdogs): State<Watchdogs>, Id(id): Id) -> Answer {
    Ok(Json(watchdogs.end(id)?))
}

async fn arm(
    State(watchdogs): State<Watchdogs>,
    Id(id): Id,
    Body(request): Body<ArmWatchdog>,
) -> Answer {
    Ok(Json(watchdogs.arm(id, request)?))
}

async fn disarm(
    State(watchdogs): State<Watchdogs>,
    Id(id): Id,
    Body(request): Body<DisarmWatchdog>,
) -> Answer {
    Ok(Json(watchdogs.disarm(id, request)?))
}
