//! What increments build on.

use agent_api::ChainLink;
use catalog::model::Manifest;
use uuid::Uuid;

/// One node's copies in `parents`, in their order.
pub(crate) fn chain_of(parents: &[Manifest], node: Uuid) -> Vec<ChainLink> {
    let link = |manifest: &Manifest| {
        let copy = manifest.nodes.iter().find(|copy| copy.node_id == node)?;
        Some(ChainLink {
            backup_id: manifest.backup_id.clone(),
            node: copy.clone(),
        })
    };
    parents.iter().filter_map(link).collect()
}
