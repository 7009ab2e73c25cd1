//! Restores that are decided and have not come to their end: until they have, their nodes cannot be relied on.

use agent_api::ErrorKind;
use catalog::Catalog;
use catalog::model::Verdict;
use uuid::Uuid;

use crate::failure::{Failure, Result};
use crate::restoring::resume;

/// Refuses to touch `nodes` while a restore that goes forward has not ended on them: their new epochs are not
/// open yet, so WAL would be filed under the old ones.
///
/// # Errors
/// A conflict that names the restore and the command that goes on with it.
pub(crate) async fn refuse(catalog: &Catalog, nodes: &[Uuid]) -> Result<()> {
    for left in catalog.decided_and_open().await? {
        let Some(plan) = left.plan() else {
            continue;
        };
        let concerned = |node: &&Uuid| {
            let is = |planned: &catalog::model::PlannedNode| planned.becomes == **node;
            plan.nodes.iter().any(is)
        };
        let Some(node) = nodes.iter().find(concerned) else {
            continue;
        };
        let decision = catalog.decision(left.operation).await?;
        if decision.is_none_or(|decision| decision.verdict == Verdict::Rollback) {
            continue;
        }
        let message = format!(
            "the restore {} of node {node} from backup {} is decided and was left before its end",
            left.operation, plan.backup_id
        );
        let failure = Failure::new(ErrorKind::Conflict, message);
        return Err(failure.next(resume(left.operation)));
    }
    Ok(())
}
