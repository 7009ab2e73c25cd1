//! A node that is known to a repository, for tests of an agent alone.

use std::fs;
use std::sync::Arc;

use agent_wal::control::ControlFile;
use catalog::Catalog;
use catalog::ids::EpochId;
use catalog::repo::{NewEpoch, NewNode};
use pipeline::store::ObjectStore;
use uuid::Uuid;

use crate::postgres::Cluster;

/// Registers a cluster as a node that lives where it is, on the host `machine_id`, as a client does before it gives an
/// agent an order. Returns the node and its open epoch.
///
/// # Panics
/// If that fails.
pub async fn register(
    store: Arc<dyn ObjectStore>,
    cluster: &Cluster,
    machine_id: &str,
) -> (Uuid, EpochId) {
    let control = fs::read(cluster.data_directory().join("global/pg_control")).expect("pg_control");
    let control = ControlFile::parse(&control).expect("pg_control");
    let operation = Uuid::now_v7();
    let catalog = Catalog::open_or_create(store, operation)
        .await
        .expect("a repository");
    let node = NewNode {
        system_identifier: control.system_identifier,
        host: "source".into(),
        port: cluster.port(),
    };
    let node = catalog
        .register_node(node, operation)
        .await
        .expect("a node")
        .node_id;
    let epoch = NewEpoch {
        node_id: node,
        parent: None,
        timeline: control.timeline,
        machine_id: machine_id.to_owned(),
        data_directory: cluster.data_directory().display().to_string(),
        host: "source".into(),
        port: cluster.port(),
    };
    let epoch = catalog
        .start_epoch(epoch, operation)
        .await
        .expect("an epoch");
    (node, epoch.epoch)
}
