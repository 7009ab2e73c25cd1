//! Journals of operations: found, read, told apart, and what a restore leaves to be taken up again.

use std::sync::Arc;

use catalog::Catalog;
use catalog::journal::{OperationJournal, OperationStart};
use catalog::model::{
    Consistency, MetadataAfter, OperationEvent, Place, PlannedNode, PromotedNode, RestorePlan,
};
use catalog::repo::NewNode;
use pipeline::store::ObjectStore;
use serde_json::json;
use support::memory_store::MemoryStore;
use uuid::Uuid;

use crate::samples::{self, OPERATION, backup_id, enveloped, node_with_epoch, point_id};

fn start(operation: Uuid, node_id: Option<Uuid>) -> OperationStart {
    OperationStart {
        operation,
        kind: "restore".into(),
        backup_id: Some(backup_id('a')),
        node_id,
        log_head: None,
    }
}

fn plan(node: Uuid) -> RestorePlan {
    RestorePlan {
        backup_id: backup_id('a'),
        point_id: point_id('a'),
        consistency: Consistency::PerNode,
        start: true,
        discard_old: false,
        clone: false,
        metadata: MetadataAfter::Import,
        nodes: vec![PlannedNode {
            node_id: node,
            becomes: node,
            epoch: "00000001-9f3c1a2b".parse().unwrap(),
            agent: "db1:18080".into(),
            host: "db1".into(),
            machine_id: "m1".into(),
            operation: Uuid::now_v7(),
            target: "/data".into(),
            place: Place::Replace {
                system_identifier: u64::MAX,
            },
            port: 5432,
        }],
    }
}

#[tokio::test]
async fn a_restore_that_was_left_is_found_with_its_plan() {
    let store: Arc<dyn ObjectStore> = Arc::new(MemoryStore::default());
    let catalog = Catalog::open_or_create(Arc::clone(&store), OPERATION)
        .await
        .unwrap();
    let (left, part, done) = (Uuid::now_v7(), Uuid::now_v7(), Uuid::now_v7());
    let node = Uuid::new_v4();
    let journal = OperationJournal::start(Arc::clone(&store), start(left, None))
        .await
        .unwrap();
    let planned = plan(node);
    journal
        .record(OperationEvent::RestorePlanned(planned.clone()))
        .await
        .unwrap();
    OperationJournal::start(Arc::clone(&store), start(part, Some(node)))
        .await
        .unwrap();
    let whole = OperationJournal::start(Arc::clone(&store), start(done, None))
        .await
        .unwrap();
    whole.ended(Some("it failed")).await.unwrap();

    // Another process goes on with the same journal.
    let promoted = PromotedNode {
        node_id: node,
        timeline: 2,
        fork_lsn: "0/5000068".into(),
        machine_id: "m1".into(),
        data_directory: "/data".into(),
        host: "db1".into(),
        port: 5432,
    };
    let agent = OperationJournal::join(Arc::clone(&store), left);
    agent
        .record(OperationEvent::NodePromoted(promoted.clone()))
        .await
        .unwrap();

    let found = catalog.operation(left).await.unwrap();
    assert_eq!(found.kind(), Some("restore"));
    assert_eq!(found.plan(), Some(&planned));
    assert_eq!(found.promoted().collect::<Vec<_>>(), [&promoted]);
    assert_eq!(found.ended(), None);
    assert!(!found.is_part() && catalog.operation(part).await.unwrap().is_part());
    let failed = catalog.operation(done).await.unwrap();
    assert_eq!(failed.ended(), Some(Some("it failed")));
    assert!(
        catalog
            .operation(Uuid::now_v7())
            .await
            .unwrap_err()
            .is_absent()
    );

    // Only what is decided and has not ended stands in the way of others.
    assert!(catalog.decided_and_open().await.unwrap().is_empty());
    for operation in [left, done] {
        let key = catalog::keys::decision(operation);
        let body = enveloped(&json!({"operation": operation}));
        store.put_if_absent(&key, body).await.unwrap();
    }
    let open = catalog.decided_and_open().await.unwrap();
    assert_eq!(
        open.iter().map(|it| it.operation).collect::<Vec<_>>(),
        [left]
    );
    let ids = catalog.operation_ids().await.unwrap();
    assert_eq!(ids.get(&left), Some(&true));
    assert_eq!(ids.get(&part), Some(&false));

    let text = left.to_string().to_uppercase();
    assert_eq!(catalog.resolve_operation_id(&text).await.unwrap(), left);
    for unknown in ["ffffffff", ""] {
        let error = catalog.resolve_operation_id(unknown).await.unwrap_err();
        assert!(error.is_absent(), "{error}");
    }
}

#[tokio::test]
async fn a_chosen_id_is_registered_once_and_an_epoch_found_by_who_opened_it() {
    let store: Arc<dyn ObjectStore> = Arc::new(MemoryStore::default());
    let catalog = Catalog::open_or_create(store, OPERATION).await.unwrap();
    let id = Uuid::new_v4();
    let new = |system_identifier| NewNode {
        system_identifier,
        host: "db2".into(),
        port: 5433,
    };
    let first = catalog
        .register_node_as(id, new(7), OPERATION)
        .await
        .unwrap();
    let again = catalog
        .register_node_as(id, new(7), OPERATION)
        .await
        .unwrap();
    assert_eq!((first.node_id, again.nonce), (id, first.nonce));
    let other = catalog
        .register_node_as(id, new(8), OPERATION)
        .await
        .unwrap_err();
    assert!(
        matches!(other, catalog::CatalogError::Conflict { .. }),
        "{other}"
    );

    let (node, epoch) = node_with_epoch(&catalog).await;
    let restore = Uuid::now_v7();
    assert!(
        catalog
            .epoch_of(node.node_id, restore)
            .await
            .unwrap()
            .is_none()
    );
    let next = catalog
        .start_epoch(samples::epoch(node.node_id), restore)
        .await
        .unwrap();
    let found = catalog
        .epoch_of(node.node_id, restore)
        .await
        .unwrap()
        .unwrap();
    assert_eq!(found.epoch, next.epoch);
    let first = catalog
        .epoch_of(node.node_id, OPERATION)
        .await
        .unwrap()
        .unwrap();
    assert_eq!(first.epoch, epoch);
}
