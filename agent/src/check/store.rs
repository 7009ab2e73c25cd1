//! The store, asked with the agent's own credentials (or those the client lends).

use std::time::{Duration, SystemTime};

use agent_api::{
    ApiError, CheckRequest, ErrorKind, Finding, RaceRequest, RaceResult, RepositoryAccess,
};
use catalog::keys;
use pipeline::probe::{self, ProbeError, ProbeKeys};
use pipeline::store::{Key, StoreError};
use tokio::time::timeout;
use uuid::Uuid;

use crate::config::Config;
use crate::failure::store_error;
use crate::store_access;

/// Creates of one object that one request may ask for.
const MOST_BODIES: usize = 16;
/// For the store to say what time it is.
const CLOCK: Duration = Duration::from_secs(25);

/// What was seen of the store.
#[derive(Debug, Default)]
pub(super) struct Seen {
    pub(super) findings: Vec<Finding>,
    pub(super) usable: bool,
}

/// A participant's name becomes a part of keys.
pub(super) fn check_name(name: &str) -> Result<(), ApiError> {
    let good = (1..=64).contains(&name.len())
        && name.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-');
    if good {
        return Ok(());
    }
    let message = "a participant's name has 1 to 64 letters, digits and hyphens";
    Err(ApiError::new(ErrorKind::Usage, message))
}

pub(super) async fn check(config: &Config, request: &CheckRequest) -> Seen {
    let Some(access) = &request.repository else {
        return Seen::default();
    };
    let mut findings = vec![whose(config, access)];
    let opened = store_access::open(access, config.credentials.as_ref());
    let keys = probe_keys(request.operation, &request.participant);
    let (store, keys) = match (opened, keys) {
        (Ok(store), Ok(keys)) => (store, keys),
        (Err(error), _) | (_, Err(error)) => {
            findings.push(Finding::failure("store", error));
            return Seen {
                findings,
                ..Seen::default()
            };
        }
    };
    let (probes, now) = tokio::join!(probe::probe(&*store, &keys), timeout(CLOCK, store.now()));
    let usable = probes.usable();
    findings.extend(now.ok().and_then(Result::ok).map(its_clock));
    for probe in &probes.all {
        findings.push(finding(probe.name, &probe.result));
    }
    if usable {
        findings.push(right_to_delete(
            probe::may_delete(&*store, &keys.object).await,
        ));
    }
    if !probes.left.is_empty() {
        let message = format!(
            "{} uploads of `{}` could not be aborted",
            probes.left.len(),
            keys.upload
        );
        let mend = "give the agent's credentials s3:AbortMultipartUpload and s3:ListBucketMultipartUploads";
        findings.push(Finding::warning("store uploads", message, mend));
    }
    Seen { findings, usable }
}

/// The store cuts its time off at whole seconds.
fn its_clock(now: SystemTime) -> Finding {
    let ours = SystemTime::now();
    let apart = match now.duration_since(ours) {
        Ok(ahead) => ahead.as_secs_f64(),
        Err(behind) => -behind.duration().as_secs_f64(),
    };
    agent_api::clock("store clock", "the store's clock", apart + 0.5)
}

/// Whose credentials are used.
fn whose(config: &Config, access: &RepositoryAccess) -> Finding {
    let words = match (&config.credentials, &access.credentials) {
        (Some(_), _) => "the agent's own",
        (None, Some(_)) => "lent by gs_pitr for each operation",
        (None, None) => "none",
    };
    Finding::fine("store credentials", words)
}

fn finding(name: &str, result: &Result<String, ProbeError>) -> Finding {
    let name = format!("store {name}");
    match result {
        Ok(message) => Finding::fine(name, message),
        Err(ProbeError::Lacking(message)) => {
            let mend = "nothing has to be done; a store that keeps SHA-256 checksums is better";
            Finding::warning(name, message, mend)
        }
        Err(error) => Finding::failure(name, probe_error(error)),
    }
}

fn probe_error(error: &ProbeError) -> ApiError {
    match error {
        // Of an object just written, or of rights to see that there is none.
        ProbeError::Store(StoreError::NotFound(_)) => {
            let message = format!("what was just written is not there: {error}");
            ApiError::new(ErrorKind::StoreUnavailable, message)
                .next("use a store whose reads see what was written before (S3, MinIO)")
        }
        ProbeError::Store(error) => store_error(error),
        ProbeError::Broken(message) | ProbeError::Lacking(message) => ApiError::new(
            ErrorKind::StoreDenied,
            message,
        )
        .next("use another store, or a newer version of this one: backups would not be safe in it"),
        ProbeError::Late(_) => ApiError::new(ErrorKind::StoreUnavailable, error.to_string())
            .next("check that this host reaches the endpoint, and that the store is healthy"),
    }
}

fn right_to_delete(answer: Result<bool, ProbeError>) -> Finding {
    let name = "store deletion";
    match answer {
        Ok(false) => Finding::fine(name, "the agent may not delete; it has no need to"),
        Ok(true) => Finding::fine(
            name,
            "the agent may delete; it has no need to (leave s3:DeleteObject out of its policy)",
        ),
        Err(error) => Finding::warning(
            name,
            format!("whether the agent may delete could not be seen: {error}"),
            "nothing has to be done: agents do not delete",
        ),
    }
}

fn probe_keys(operation: Uuid, participant: &str) -> Result<ProbeKeys, ApiError> {
    Ok(ProbeKeys {
        absent: probe_key(operation, &format!("{participant}-absent"))?,
        object: probe_key(operation, &format!("{participant}-object"))?,
        upload: probe_key(operation, &format!("{participant}-upload"))?,
    })
}

fn probe_key(operation: Uuid, name: &str) -> Result<Key, ApiError> {
    let key = keys::probe(operation, name);
    key.map_err(|error| ApiError::new(ErrorKind::Internal, error.to_string()))
}

pub(super) async fn race(config: &Config, request: &RaceRequest) -> Result<RaceResult, ApiError> {
    if !(1..=MOST_BODIES).contains(&request.bodies.len()) {
        let message = format!("a race has 1 to {MOST_BODIES} bodies");
        return Err(ApiError::new(ErrorKind::Usage, message));
    }
    let store = store_access::open(&request.repository, config.credentials.as_ref())?;
    let key = probe_key(request.operation, &format!("race-{}", request.round))?;
    let bodies: Vec<_> = request.bodies.iter().map(ToString::to_string).collect();
    let mut result = RaceResult {
        won: Vec::new(),
        lost: 0,
        errors: Vec::new(),
    };
    let answers = probe::race(&*store, &key, &bodies).await;
    for (body, answer) in request.bodies.iter().zip(answers) {
        match answer {
            Ok(()) => result.won.push(*body),
            Err(ProbeError::Store(StoreError::AlreadyExists(_))) => result.lost += 1,
            Err(error) => result.errors.push(error.to_string()),
        }
    }
    Ok(result)
}
