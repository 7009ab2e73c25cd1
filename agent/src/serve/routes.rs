//! The routes, as `agent_api` lists them.

use std::net::IpAddr;
use std::sync::Arc;

use agent_api::identity::OPERATOR_URI;
use agent_api::{
    API_VERSION, ApiError, Bandwidth, CheckReport, CheckRequest, DiscardRequest, Discarded,
    ErrorKind, Health, MarkRequest, MarkResult, NodeFacts, ObserveRequest, Observed, OpenRequest,
    OperationStatus, RaceRequest, RaceResult, RestoresHere, StartOperation, StartWal, TargetFacts,
    TargetRequest, WalStatus,
};
use axum::extract::{Request, State};
use axum::http::{Uri, header};
use axum::middleware::{self, Next};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use axum::{Json, Router};
use jiff::Timestamp;

use crate::check::Checker;
use crate::config::Config;
use crate::engine::slot;
use crate::facts;
use crate::operation::table::OperationTable;
use crate::restore;
use crate::serve::body::{Body, Id, Refusal, usage};
use crate::serve::{stream, watchdogs};
use crate::watchdog::Watchdogs;

#[derive(Clone)]
struct App {
    config: Arc<Config>,
    operations: OperationTable,
    started: Timestamp,
}

type Answer<T> = Result<Json<T>, Refusal>;

/// The API. Without TLS (`secure` is false) only programs of this host are served, not web pages.
pub(super) fn router(
    config: &Arc<Config>,
    operations: &OperationTable,
    watchdogs: &Watchdogs,
    secure: bool,
) -> Router {
    let app = App {
        config: Arc::clone(config),
        operations: operations.clone(),
        started: Timestamp::now(),
    };
    let router = Router::new()
        .route("/v1/health", get(health))
        .route("/v1/node", get(node))
        .route("/v1/check", post(check))
        .route("/v1/check/race", post(race))
        .route("/v1/operations", get(list).post(start))
        .route("/v1/operations/{id}", get(status))
        .route("/v1/operations/{id}/events", get(events))
        .route("/v1/operations/{id}/observe", post(observe))
        .route("/v1/operations/{id}/mark", post(mark))
        .route("/v1/operations/{id}/flush", post(flush))
        .route("/v1/operations/{id}/ship", post(ship))
        .route("/v1/operations/{id}/release", post(release))
        .route("/v1/operations/{id}/promote", post(promote))
        .route("/v1/operations/{id}/open", post(open))
        .route("/v1/operations/{id}/bandwidth", post(bandwidth))
        .route("/v1/operations/{id}/cancel", post(cancel))
        .route("/v1/target", post(target))
        .route("/v1/restores", get(restores))
        .route("/v1/discard", post(discard))
        .merge(watchdogs::routes(watchdogs.clone()))
        .route("/v1/wal", get(wal).put(start_wal).delete(stop_wal))
        .fallback(unknown)
        .method_not_allowed_fallback(wrong_method)
        .with_state(app);
    if secure {
        router
    } else {
        router.layer(middleware::from_fn(no_web_pages))
    }
}

/// What somebody gets whose certificate is ours but not an operator's.
pub(super) fn strangers() -> Router {
    Router::new().fallback(|| async {
        let message =
            format!("the client's certificate does not carry the URI name {OPERATOR_URI}");
        let error = ApiError::new(ErrorKind::Certificate, message);
        Refusal(error.next("use the operator's certificate: gs_pitr certs issue --operator"))
    })
}

/// Plain HTTP has no log-in. A web page in a browser on this host must not be able to use it: neither as
/// itself (`Origin`) nor under a name that its owner points at loopback (`Host`).
async fn no_web_pages(request: Request, next: Next) -> Response {
    let headers = request.headers();
    let host = headers
        .get(header::HOST)
        .and_then(|host| host.to_str().ok());
    if headers.contains_key(header::ORIGIN) || !host.is_some_and(is_loopback_host) {
        let message = "plain HTTP is for programs on this host, under a loopback address";
        return Refusal(ApiError::new(ErrorKind::Certificate, message)).into_response();
    }
    next.run(request).await
}

fn is_loopback_host(host: &str) -> bool {
    let has_port = host
        .rsplit_once(':')
        .filter(|(_, port)| port.bytes().all(|b| b.is_ascii_digit()));
    let name = has_port.map_or(host, |(name, _)| name);
    let name = name.trim_start_matches('[').trim_end_matches(']');
    name == "localhost" || name.parse::<IpAddr>().is_ok_and(|ip| ip.is_loopback())
}

async fn unknown(request: Request) -> Refusal {
    let message = format!(
        "no such resource in version {API_VERSION} of the API: {}",
        request.uri().path()
    );
    Refusal(ApiError::new(ErrorKind::NotFound, message))
}

async fn wrong_method(request: Request) -> Refusal {
    usage(format!(
        "{} does not go with {}",
        request.method(),
        request.uri().path()
    ))
}

async fn health(State(app): State<App>) -> Json<Health> {
    Json(Health {
        api_version: API_VERSION,
        version: env!("CARGO_PKG_VERSION").to_owned(),
        now: Timestamp::now(),
        started: app.started,
    })
}

async fn node(State(app): State<App>) -> Json<NodeFacts> {
    Json(facts::gather(&app.config).await)
}

fn checker(app: &App) -> Checker {
    let running = app.operations.list().into_iter();
    let running = running.filter(|operation| !operation.phase.is_end());
    Checker {
        config: Arc::clone(&app.config),
        slots_in_use: running
            .map(|operation| slot::name_of(operation.operation))
            .chain(app.operations.wal().status().slot)
            .collect(),
    }
}

async fn check(State(app): State<App>, Body(request): Body<CheckRequest>) -> Answer<CheckReport> {
    Ok(Json(checker(&app).check(request).await?))
}

async fn race(State(app): State<App>, Body(request): Body<RaceRequest>) -> Answer<RaceResult> {
    Ok(Json(checker(&app).race(request).await?))
}

async fn list(State(app): State<App>) -> Json<Vec<OperationStatus>> {
    Json(app.operations.list())
}

async fn start(
    State(app): State<App>,
    Body(request): Body<StartOperation>,
) -> Answer<OperationStatus> {
    Ok(Json(app.operations.start(request)?.status()))
}

async fn status(State(app): State<App>, Id(id): Id) -> Answer<OperationStatus> {
    Ok(Json(app.operations.get(id)?.status()))
}

/// `?after=SEQ`; 0 if it is not there.
fn after(uri: &Uri) -> Result<u64, Refusal> {
    let Some(query) = uri.query().filter(|query| !query.is_empty()) else {
        return Ok(0);
    };
    let number = query
        .strip_prefix("after=")
        .and_then(|seq| seq.parse().ok());
    number.ok_or_else(|| usage(format!("`?{query}` is not understood: give ?after=SEQ")))
}

async fn events(State(app): State<App>, Id(id): Id, uri: Uri) -> Result<Response, Refusal> {
    let after = after(&uri)?;
    let operation = app.operations.get(id)?;
    let content_type = [(header::CONTENT_TYPE, "application/x-ndjson")];
    Ok((content_type, stream::body(operation, after)).into_response())
}

async fn observe(
    State(app): State<App>,
    Id(id): Id,
    Body(request): Body<ObserveRequest>,
) -> Answer<Observed> {
    Ok(Json(app.operations.get(id)?.observe(request.look).await?))
}

async fn mark(
    State(app): State<App>,
    Id(id): Id,
    Body(request): Body<MarkRequest>,
) -> Answer<MarkResult> {
    Ok(Json(app.operations.get(id)?.mark(request).await?))
}

async fn flush(
    State(app): State<App>,
    Id(id): Id,
    Body(request): Body<MarkRequest>,
) -> Answer<OperationStatus> {
    let operation = app.operations.get(id)?;
    operation.flush(request).await?;
    Ok(Json(operation.status()))
}

async fn ship(State(app): State<App>, Id(id): Id, Body(()): Body<()>) -> Answer<OperationStatus> {
    let operation = app.operations.get(id)?;
    operation.ship().await?;
    Ok(Json(operation.status()))
}

async fn release(
    State(app): State<App>,
    Id(id): Id,
    Body(()): Body<()>,
) -> Answer<OperationStatus> {
    let operation = app.operations.get(id)?;
    operation.release().await?;
    Ok(Json(operation.status()))
}

async fn promote(
    State(app): State<App>,
    Id(id): Id,
    Body(()): Body<()>,
) -> Answer<OperationStatus> {
    let operation = app.operations.get(id)?;
    operation.promote().await?;
    Ok(Json(operation.status()))
}

async fn open(
    State(app): State<App>,
    Id(id): Id,
    Body(request): Body<OpenRequest>,
) -> Answer<OperationStatus> {
    let operation = app.operations.get(id)?;
    operation.open(request).await?;
    Ok(Json(operation.status()))
}

async fn bandwidth(
    State(app): State<App>,
    Id(id): Id,
    Body(request): Body<Bandwidth>,
) -> Answer<OperationStatus> {
    let operation = app.operations.get(id)?;
    operation.set_bandwidth(request.bytes_per_second)?;
    Ok(Json(operation.status()))
}

async fn target(State(app): State<App>, Body(request): Body<TargetRequest>) -> Answer<TargetFacts> {
    Ok(Json(
        restore::target_facts(&app.config, &request.target).await?,
    ))
}

async fn restores(State(app): State<App>) -> Answer<RestoresHere> {
    let (config, operations) = (Arc::clone(&app.config), app.operations.clone());
    let looked = tokio::task::spawn_blocking(move || {
        restore::here(&config, |operation| operations.is_running(operation))
    });
    let here = looked
        .await
        .map_err(|error| ApiError::new(ErrorKind::Internal, error.to_string()))?;
    Ok(Json(here))
}

async fn discard(State(app): State<App>, Body(request): Body<DiscardRequest>) -> Answer<Discarded> {
    Ok(Json(restore::discard(&app.config, request.restore).await?))
}

async fn wal(State(app): State<App>) -> Json<WalStatus> {
    Json(app.operations.wal().status())
}

async fn start_wal(State(app): State<App>, Body(order): Body<StartWal>) -> Answer<WalStatus> {
    Ok(Json(app.operations.wal().start(order).await?))
}

async fn stop_wal(State(app): State<App>) -> Answer<WalStatus> {
    Ok(Json(app.operations.wal().stop().await?))
}

async fn cancel(State(app): State<App>, Id(id): Id, Body(()): Body<()>) -> Answer<OperationStatus> {
    let operation = app.operations.get(id)?;
    let reason = ApiError::new(ErrorKind::Cancelled, "cancelled by the client");
    operation.ask_to_cancel(reason)?;
    Ok(Json(operation.status()))
}
