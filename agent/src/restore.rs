//! Restore of one node: copy from the bucket, recovery to the point, proof; and when all nodes are proved and `commit`
//! is decided, promotion and the switch.
//!
//! | phase | what happens | killed here |
//! |---|---|---|
//! | preparing | checks; nothing is changed | nothing is left |
//! | fetching | files into the workspace; WAL to the point is read for what replay would do | the workspace is left, and taken away by the next agent or restore |
//! | recovering | a private server replays to the point and shuts itself down | as above; the server ends, because its WAL ends with an error |
//! | proved | `pg_control` says so; waits for `promote` | the same operation goes on here; without it, what is decided is obeyed |
//! | promoting | promoted privately, shut down; the database at the target is stopped and moved aside; the new one takes its place | the same operation goes on where the journal says; renames that had begun are finished at the agent's next start |
//! | promoted | stands in its place, closed; waits for `open` | the same operation goes on here |
//! | opening | started for its clients | as above |
//!
//! Whatever fails before the decision, everything that was made is taken away again, and what was stopped is started.
//! After `commit` nothing is taken away: the same operation, sent again, goes on.

mod attached;
mod bucket;
mod decide;
mod errors;
mod files;
mod flow;
mod inspect;
mod journal;
mod live;
mod make;
mod old;
mod prepare;
mod probackup;
mod process;
mod promote;
mod prove;
mod recover;
mod recoverer;
mod scan;
mod search;
mod settings;
mod sweep;
mod switch;
mod tablespaces;
mod target;
mod walserve;
mod workspace;

use std::path::{Path, PathBuf};
use std::sync::Arc;

use agent_api::{ApiError, Discarded, ErrorKind, Phase, RestoreSpec, RestoresHere};
use catalog::repo::Catalog;
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

pub use self::inspect::target as target_facts;
pub use self::sweep::at_start;

pub(crate) use self::inspect::real_target;

use self::decide::Judge;
use self::errors::{of_catalog, of_workspace};
use self::journal::{Journal, Places, Stage};
use self::settings::Setting;
use self::target::Plan;
use self::workspace::{Found, Workspace};
use crate::config::Config;
use crate::operation::{OperationContext, RestoreCommand};

/// Runs a restore to its end.
///
/// # Errors
/// Why it did not end well. `changed` is false if nothing of it is left.
pub async fn run(
    cx: OperationContext,
    spec: RestoreSpec,
    commands: mpsc::Receiver<RestoreCommand>,
) -> Result<(), ApiError> {
    // The server runs this very program to get its WAL.
    let program = std::env::current_exe().map_err(|error| {
        ApiError::new(
            ErrorKind::Internal,
            format!("the agent does not find its own program: {error}"),
        )
    })?;
    Box::pin(run_with(cx, spec, commands, &program)).await
}

/// [`run`] with another program for `wal-get` (a test's own program is not the agent).
///
/// # Errors
/// As [`run`].
pub async fn run_with(
    cx: OperationContext,
    spec: RestoreSpec,
    mut commands: mpsc::Receiver<RestoreCommand>,
    program: &Path,
) -> Result<(), ApiError> {
    cx.report.phase(Phase::Preparing);
    if !program.is_file() {
        let message = format!(
            "the agent's own program {} is not there any more",
            program.display()
        );
        return Err(ApiError::new(ErrorKind::Internal, message).next("restart the agent"));
    }
    let (target, mount) = target::path(&cx.config, &spec)?;
    let found = Found::read(&Places::workspace(&target, mount));
    let ours = found
        .as_ref()
        .is_some_and(|found| found.journal.operation == cx.id);
    if ours && found.as_ref().is_some_and(|found| found.spec != spec) {
        let message = format!("operation {} was begun with another request", cx.id);
        return Err(ApiError::new(ErrorKind::Conflict, message));
    }
    let judge = Judge {
        catalog: open_catalog(&cx, ours).await?,
        store: Arc::clone(&cx.store),
        restore: spec.restore,
        report: cx.report.clone(),
        client_timeout: cx.config.client_timeout,
    };
    let begun = match found {
        Some(found) if ours => sweep::take_up(found, &cx.config).await?,
        Some(found) => {
            sweep::predecessor(found, &judge, &spec, &cx.config).await?;
            None
        }
        None => None,
    };
    let plan = target::check(&cx.config, &spec, (target, mount), begun.is_some()).await?;
    if begun.is_none() {
        probackup::check(&cx.config, &spec).await?;
    }
    let workspace = if let Some(workspace) = begun {
        workspace
    } else {
        let journal = first_entry(&cx, &spec, &plan);
        Workspace::create(journal, &spec).map_err(|error| of_workspace(&error))?
    };
    let restore = Restore {
        source: settings::of_command_line(&spec.node.argv),
        stop: cx.cancel.child_token(),
        cx,
        spec,
        plan,
        program: program.to_owned(),
        judge,
    };
    restore.go(workspace, &mut commands).await
}

/// A restore that was begun before waits for its store; a new one is refused.
async fn open_catalog(cx: &OperationContext, begun: bool) -> Result<Catalog, ApiError> {
    let mut patience = decide::Patience::default();
    loop {
        let opened = Catalog::open(Arc::clone(&cx.store)).await;
        let error = match opened {
            Ok(catalog) => return Ok(catalog),
            Err(error) => of_catalog(&error),
        };
        if !begun || error.kind != ErrorKind::StoreUnavailable {
            return Err(error);
        }
        let what = "a restore that was begun before cannot go on";
        tokio::select! {
            () = patience.wait(&cx.report, what, &error) => {}
            () = cx.cancel.cancelled() => return Err(errors::cancelled().changed()),
        }
    }
}

fn first_entry(cx: &OperationContext, spec: &RestoreSpec, plan: &Plan) -> Journal {
    Journal {
        operation: cx.id,
        restore: spec.restore,
        target: plan.target.clone(),
        mount: plan.mount,
        store: cx.store.describe(),
        repository: cx.repository.clone(),
        stage: Stage::Making,
        decision: None,
        run: None,
        made: Vec::new(),
        literal: Vec::new(),
        live: plan.live.clone(),
        stopped: false,
        out: Vec::new(),
        into: Vec::new(),
        clearing: false,
        cleared: Vec::new(),
        old: None,
        promoted: None,
    }
}

struct Restore {
    cx: OperationContext,
    spec: RestoreSpec,
    plan: Plan,
    /// Settings the source was started with.
    source: Vec<Setting>,
    program: PathBuf,
    judge: Judge,
    /// Fired when the work is to stop: by a cancellation, or because the client is gone.
    stop: CancellationToken,
}

/// What restores have left on this host. `running` says of an operation whether this agent works on it.
#[must_use]
pub fn here(config: &Config, running: impl Fn(Uuid) -> bool) -> RestoresHere {
    RestoresHere {
        unfinished: sweep::unfinished(config, running),
        old: old::list(config),
    }
}

/// Removes what was at a target before a restore.
///
/// # Errors
/// [`ErrorKind::Conflict`] if a server runs in it or the restore has not ended; [`ErrorKind::Target`] for what cannot be
/// removed.
pub async fn discard(config: &Config, restore: Uuid) -> Result<Discarded, ApiError> {
    let unfinished = sweep::unfinished(config, |_| false);
    if unfinished.iter().any(|it| it.spec.restore == restore) {
        let message = format!("restore {restore} has not come to its end on this host");
        return Err(ApiError::new(ErrorKind::Conflict, message)
            .next(format!("gs_pitr operations resume {restore}")));
    }
    old::discard(config, restore).await
}
