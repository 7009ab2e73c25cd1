//! The new epochs of the nodes that a restore has promoted.

use agent_api::ErrorKind;
use catalog::model::{PlannedNode, PromotedNode};
use catalog::repo::{NewEpoch, NewNode};

use super::Restoring;
use crate::failure::{Failure, Result};

impl Restoring<'_> {
    /// Opens the epoch of every node that its agent has said to be promoted, each once, whoever has begun
    /// with it before. A clone is registered first, as a node of its own; the original's epochs stay as they
    /// are.
    ///
    /// # Errors
    /// The repository's: nothing is lost, and it can be done again. That a node has no record: its agent has to
    /// go on first.
    pub(super) async fn write_epochs(&self) -> Result<()> {
        let journal = self.catalog.operation(self.operation).await?;
        for planned in &self.plan.nodes {
            let node = planned.node_id;
            let Some(promoted) = journal.promoted().find(|it| it.node_id == node) else {
                if journal.given_up().any(|given_up| given_up == node) {
                    continue;
                }
                let message = format!("the journal does not say yet that node {node} is promoted");
                return Err(Failure::new(ErrorKind::Conflict, message));
            };
            // A clone has no past in the repository: its first backup stands for itself.
            let continues = !self.plan.clone;
            let parent = continues.then(|| (planned.epoch.clone(), promoted.fork_lsn.clone()));
            self.write_epoch(planned, promoted, parent)
                .await
                .map_err(|failure| {
                    let message = format!(
                        "node {node} is restored, but its new epoch could not be written: {}",
                        failure.message
                    );
                    Failure { message, ..failure }
                })?;
        }
        Ok(())
    }

    async fn write_epoch(
        &self,
        planned: &PlannedNode,
        promoted: &PromotedNode,
        parent: Option<(catalog::ids::EpochId, String)>,
    ) -> Result<()> {
        let (catalog, node) = (self.catalog, planned.becomes);
        if self.plan.clone {
            let original = catalog.node(planned.node_id).await?;
            let new = NewNode {
                system_identifier: original.system_identifier,
                host: promoted.host.clone(),
                port: promoted.port,
            };
            catalog.register_node_as(node, new, self.operation).await?;
        }
        if catalog.epoch_of(node, self.operation).await?.is_some() {
            return Ok(());
        }
        let epoch = NewEpoch {
            node_id: node,
            parent,
            timeline: promoted.timeline,
            machine_id: promoted.machine_id.clone(),
            data_directory: promoted.data_directory.clone(),
            host: promoted.host.clone(),
            port: promoted.port,
        };
        catalog.start_epoch(epoch, self.operation).await?;
        Ok(())
    }
}
