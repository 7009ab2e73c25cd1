//! How a backup that cannot be completed is brought to an end that nobody has to wonder about: our own, and
//! those that others left on our agents.

use std::time::Duration;

use agent_api::ErrorKind;
use catalog::fence::Abandoned;
use catalog::ids::BackupId;
use catalog::{Catalog, CatalogError};
use futures_util::future::join_all;
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

use crate::agents::{Agent, Host};
use crate::failure::Failure;
use crate::operations::Live;
use crate::printer::Printer;

/// How long the store may take to say what became of a backup.
const SETTLE_WITHIN: Duration = Duration::from_mins(1);

/// Fences our own backup after `failure`. It is not left to `prune`, which would have to wait until it is sure
/// that nobody works on it any more: nobody knows that better than we, now. And the fence says what became of
/// a commit whose reply was lost.
pub(super) async fn given_up(
    catalog: &Catalog,
    backup: &BackupId,
    operation: Uuid,
    failure: Failure,
) -> Failure {
    let settled = tokio::time::timeout(SETTLE_WITHIN, catalog.abandon(backup, operation)).await;
    match settled {
        Ok(Ok(Abandoned::Fenced)) => failure,
        Ok(Ok(Abandoned::Complete(_))) => Failure {
            message: format!(
                "backup {backup} is complete, but it was not seen to be: {}",
                failure.message
            ),
            next: Some(format!("gs_pitr show {backup}")),
            ..failure
        },
        Ok(Err(error)) => open(failure, backup, &error.to_string()),
        Err(_) => open(failure, backup, "the store did not answer in time"),
    }
}

/// It may or may not be complete, and the store does not say.
fn open(failure: Failure, backup: &BackupId, why: &str) -> Failure {
    tracing::info!(%backup, why, "not fenced; whoever takes the lease over does it");
    Failure {
        unfinished: true,
        next: Some(format!(
            "gs_pitr show {backup} says what became of it, when the store answers again"
        )),
        ..failure
    }
}

/// Ends what is still under way on our agents for a backup that is fenced: its operator died or lost its
/// lease, and the agent would hold its slot, and us, until `--orphan-timeout`. What belongs to a backup that
/// this repository does not know as fenced is left alone: it may be another repository's.
pub(super) async fn strays(
    catalog: &Catalog,
    hosts: &[Host],
    printer: &Printer,
    cancel: &CancellationToken,
) {
    join_all(hosts.iter().map(|host| async move {
        if let Err(failure) = strays_of(catalog, &host.agent, printer, cancel).await {
            let message =
                format!("what earlier backups left there could not be looked at: {failure}");
            printer.warning(Some(&host.agent.name()), &message);
        }
    }))
    .await;
}

async fn strays_of(
    catalog: &Catalog,
    agent: &Agent,
    printer: &Printer,
    cancel: &CancellationToken,
) -> Result<(), Failure> {
    for status in agent.operations(cancel).await? {
        let Some(backup) = &status.backup_id else {
            continue;
        };
        if status.kind != "backup" || status.phase.is_end() {
            continue;
        }
        match catalog.manifest(backup).await {
            Err(CatalogError::Abandoned { .. }) => {}
            Ok(_) => continue,
            Err(error) => {
                let failure = Failure::from(error);
                if failure.kind == ErrorKind::NotFound {
                    continue;
                }
                return Err(failure);
            }
        }
        let ended = Live::cancel_stray(agent, status.operation).await;
        let how = if ended { "was ended" } else { "does not end" };
        let message = format!(
            "operation {} of backup {backup}, which is given up, was still {} there and {how}",
            status.operation, status.phase
        );
        printer.warning(Some(&agent.name()), &message);
    }
    Ok(())
}
