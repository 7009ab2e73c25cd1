//! What restores have left whose agent is dead: taken up by the same operation, taken away where nothing can bring it
//! back, left alone where only the bucket knows.

use std::path::Path;

use agent_api::{
    ApiError, ErrorKind, OperationSpec, Place, RestoreSpec, StartOperation, UnfinishedRestore,
};
use catalog::model::Verdict;
use uuid::Uuid;

use super::decide::Judge;
use super::errors::of_workspace;
use super::journal::Stage;
use super::search;
use super::workspace::{Found, Workspace};
use crate::config::Config;

/// Takes up what the same operation left; `None`: it has to begin from the beginning.
pub(super) async fn take_up(found: Found, config: &Config) -> Result<Option<Workspace>, ApiError> {
    let mut workspace = found.take().await.map_err(|error| of_workspace(&error))?;
    let journal = &workspace.journal;
    tracing::info!(operation = %journal.operation, stage = ?journal.stage, decision = ?journal.decision,
        "found what this restore had done before");
    // A copy that is not whole is not worth more than a new one.
    if journal.stage == Stage::Making && !workspace.is_committed() {
        go_back(workspace, config).await?;
        return Ok(None);
    }
    if workspace.journal.stage < Stage::InPlace {
        workspace.make_run().map_err(|error| of_workspace(&error))?;
    }
    Ok(Some(workspace))
}

/// Clears the way for another restore to the same target.
pub(super) async fn predecessor(
    found: Found,
    judge: &Judge,
    spec: &RestoreSpec,
    config: &Config,
) -> Result<(), ApiError> {
    let (dead, node) = (found.spec.restore, found.spec.node.node_id);
    let mut workspace = found.take().await.map_err(|error| of_workspace(&error))?;
    let journal = &workspace.journal;
    let resume = format!("gs_pitr operations resume {dead}");
    let conflict = |what: String| ApiError::new(ErrorKind::Conflict, what);
    let same_store = journal.store == judge.store.describe();
    let other = Judge {
        catalog: judge.catalog.clone(),
        store: std::sync::Arc::clone(&judge.store),
        report: judge.report.clone(),
        restore: dead,
        ..*judge
    };
    if journal.stage > Stage::Making && journal.decision.is_none() {
        if !same_store {
            let message = format!(
                "restore {dead} to the same target from {} has not come to its end",
                journal.store
            );
            return Err(conflict(message).next(resume));
        }
        let reason = "another restore to the same target was begun";
        let decision = other.roll_back(reason).await?;
        workspace
            .note(|journal| journal.decision = Some(decision.verdict))
            .map_err(|error| of_workspace(&error))?;
    }
    if !workspace.is_committed() {
        return go_back(workspace, config).await;
    }
    // The others were opened without this node; what it has is one restore too old.
    if workspace.journal.stage < Stage::Out && same_store && other.gave_up(node).await? {
        return go_back(workspace, config).await;
    }
    if workspace.journal.stage == Stage::InPlace && spec.place != Place::Fresh {
        // It stands at the target, which is to be replaced now.
        let finished = workspace.finish().await;
        return finished.map_err(|error| of_workspace(&error));
    }
    let message = format!(
        "restore {dead} to the same target is decided and has not come to its end here: it is {:?}",
        workspace.journal.stage
    );
    Err(conflict(message).next(resume))
}

/// Takes everything away that a restore has made, and starts again what was stopped for it.
async fn go_back(workspace: Workspace, config: &Config) -> Result<(), ApiError> {
    let journal = workspace.journal.clone();
    tracing::info!(operation = %journal.operation, work = %workspace.places.work.display(),
        "taking away what a restore left");
    workspace
        .undo()
        .await
        .map_err(|error| of_workspace(&error))?;
    if let Some(live) = journal
        .live
        .filter(|_| journal.stopped && !journal.clearing)
    {
        tracing::info!(data = %live.data.display(), "starting the database again that was stopped for a restore");
        live.start(config, &workspace.places.server_log).await?;
    }
    workspace
        .remove()
        .await
        .map_err(|error| of_workspace(&error))
}

/// As [`go_back`], and says in the error why it had to be, and what came of it.
pub(super) async fn taken_away(
    mut error: ApiError,
    workspace: Workspace,
    config: &Config,
) -> ApiError {
    let work = workspace.places.work.clone();
    let (cleared, target) = (workspace.journal.clearing, workspace.places.target.clone());
    match go_back(workspace, config).await {
        Ok(()) if cleared => {
            error.changed = true;
            error.message = format!(
                "{}; the database that was in {} was removed to make room, and is gone",
                error.message,
                target.display()
            );
        }
        Ok(()) => error.changed = false,
        Err(left) => {
            error.changed = true;
            error.message = format!(
                "{}; and it did not go back whole: {}",
                error.message, left.message
            );
            error.next = Some(left.next.unwrap_or_else(|| {
                format!(
                    "mend that; the agent's next start, or the next restore to this directory, takes away what is \
                     left, which {} lists",
                    work.join("restore.json").display()
                )
            }));
        }
    }
    error
}

/// Restores that have not come to their end.
pub(super) fn unfinished(
    config: &Config,
    running: impl Fn(Uuid) -> bool,
) -> Vec<UnfinishedRestore> {
    let found = search::find(config).workspaces;
    let found = found.iter().filter_map(|work| Found::read(work));
    found
        .map(|found| UnfinishedRestore {
            operation: found.journal.operation,
            running: running(found.journal.operation),
            state: found.journal.stage.state(),
            decision: found.journal.decision,
            stopped_live: found.journal.stopped && found.journal.stage < Stage::InPlace,
            spec: Box::new(found.spec),
        })
        .collect()
}

/// Looks, when the agent starts, for what restores have left that were running when it ended. Servers in them are
/// ended, half-made copies are taken away, a switch that had begun is finished. Returns the requests of those that
/// can go on by themselves, because the agent has credentials of its own.
pub async fn at_start(config: &Config) -> Vec<StartOperation> {
    let mut requests = Vec::new();
    for work in search::find(config).workspaces {
        let Some(found) = Found::read(&work) else {
            tracing::warn!(work = %work.display(), "not a workspace of this version: left as it is");
            continue;
        };
        match settle(found, config).await {
            Ok(request) => requests.extend(request),
            Err(error) => {
                tracing::error!(work = %work.display(), "what a restore left: {error}");
            }
        }
    }
    requests
}

async fn settle(found: Found, config: &Config) -> Result<Option<StartOperation>, ApiError> {
    let (spec, work) = (found.spec.clone(), found.places.work.clone());
    let mut workspace = found.take().await.map_err(|error| of_workspace(&error))?;
    let journal = &workspace.journal;
    let back = journal.stage == Stage::Making || journal.decision == Some(Verdict::Rollback);
    if back && !workspace.is_committed() {
        go_back(workspace, config).await?;
        return Ok(None);
    }
    if matches!(journal.stage, Stage::Out | Stage::In) {
        tracing::info!(work = %work.display(), "finishing a switch that had begun");
        switch(&mut workspace, config).await?;
    }
    Ok(left(&workspace, spec, config, &work))
}

/// Goes on with the switch to its end. A database that something has started again meanwhile, as a host does when it
/// comes up, is stopped first.
pub(super) async fn switch(workspace: &mut Workspace, config: &Config) -> Result<(), ApiError> {
    let journal = &workspace.journal;
    let replaced = journal.live.as_ref().filter(|_| !journal.clearing);
    if let (Some(live), Stage::Promoted | Stage::Out) = (replaced, journal.stage) {
        live.stop(config).await?;
    }
    super::switch::run(workspace).map_err(|error| of_workspace(&error))
}

/// Says what is left, and makes the request that goes on with it.
fn left(
    workspace: &Workspace,
    spec: RestoreSpec,
    config: &Config,
    work: &Path,
) -> Option<StartOperation> {
    let journal = &workspace.journal;
    let restore = spec.restore;
    if journal.stopped && journal.stage < Stage::InPlace {
        tracing::error!(target = %journal.target.display(), %restore,
            "the database was stopped for a restore that has not come to its end, and is down");
    }
    let repository = journal.repository.clone();
    let own = repository.filter(|_| config.credentials.is_some());
    let Some(repository) = own else {
        tracing::warn!(work = %work.display(), %restore, stage = ?journal.stage, decision = ?journal.decision,
            "a restore has not come to its end. What is decided stands in the bucket, for which the agent has no \
             credentials of its own: left as it is. Go on: gs_pitr operations resume {restore}");
        return None;
    };
    tracing::info!(work = %work.display(), %restore, "going on with a restore that has not come to its end");
    Some(StartOperation {
        operation: journal.operation,
        repository,
        spec: OperationSpec::Restore(Box::new(spec)),
        bandwidth: None,
    })
}
