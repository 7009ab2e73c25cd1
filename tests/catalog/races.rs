//! Several writers, lost replies, and a store that is away.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use catalog::model::{Manifest, ManifestState};
use catalog::repo::NodeMatch;
use catalog::{Catalog, CatalogError};
use pipeline::store::ObjectStore;
use support::faulty_store::FaultyStore;

use crate::samples::{OPERATION, backup_id, identity, node_with_epoch, point_id};
use crate::{log_of, with_backup};

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn racing_writers_all_stand_in_an_unbroken_log() {
    let store = Arc::new(FaultyStore::default());
    let shared = || Arc::clone(&store) as Arc<dyn ObjectStore>;
    let mut tasks = tokio::task::JoinSet::new();
    for _ in 0..12 {
        let store = shared();
        tasks.spawn(async move {
            // Each its own process, as it were: they share nothing but the store.
            let catalog = Catalog::open_or_create(store, OPERATION).await.unwrap();
            let (node, _) = node_with_epoch(&catalog).await;
            (catalog.repository().repository_id, node.node_id)
        });
    }
    let all = tasks.join_all().await;
    assert!(all.iter().all(|(repository, _)| *repository == all[0].0));
    let catalog = Catalog::open(shared()).await.unwrap();
    assert_eq!(catalog.nodes().await.unwrap().len(), 12);
    let log = log_of(&store.inner, &catalog).await;
    assert_eq!(log.len(), 1 + 12 + 12);
    match catalog.match_node(&identity()).await.unwrap() {
        NodeMatch::Ambiguous(candidates) => assert_eq!(candidates.len(), 12),
        other => panic!("{other:?}"),
    }
}

#[tokio::test]
async fn of_two_manifests_one_wins_and_the_same_one_again_is_no_conflict() {
    let (store, catalog, manifest) = with_backup().await;
    catalog.commit_backup(&manifest).await.unwrap();
    let other = Manifest {
        nonce: OPERATION,
        ..manifest.clone()
    };
    let error = catalog.commit_backup(&other).await.unwrap_err();
    assert!(matches!(error, CatalogError::Conflict { .. }), "{error}");

    let (fence, late) = (backup_id('1'), backup_id('1'));
    let fence = Manifest {
        backup_id: fence,
        state: ManifestState::Abandoned,
        nodes: Vec::new(),
        ..manifest.clone()
    };
    catalog.commit_backup(&fence).await.unwrap();
    let late = Manifest {
        backup_id: late,
        ..manifest
    };
    let error = catalog.commit_backup(&late).await.unwrap_err();
    assert!(matches!(error, CatalogError::Abandoned { .. }), "{error}");
    log_of(&store, &catalog).await;
}

#[tokio::test]
async fn lost_replies_are_found_out_and_nothing_is_written_twice() {
    let store = Arc::new(FaultyStore::default());
    let shared = Arc::clone(&store) as Arc<dyn ObjectStore>;
    let catalog = Catalog::open_or_create(shared, OPERATION).await.unwrap();
    store.lost_replies.store(100, Ordering::SeqCst);
    let (node, epoch) = node_with_epoch(&catalog).await;
    let point = crate::samples::point(&point_id('b'), node.node_id, &epoch);
    catalog.put_point(&point).await.unwrap();
    store.lost_replies.store(0, Ordering::SeqCst);
    store.lost_writes.store(2, Ordering::SeqCst);
    let manifest = crate::samples::manifest(&backup_id('b'), &point_id('b'), node.node_id, &epoch);
    catalog
        .commit_backup(&manifest)
        .await
        .unwrap()
        .logged
        .unwrap();
    let log = log_of(&store.inner, &catalog).await;
    assert_eq!(log.len(), 5, "{log:?}");
    assert_eq!(store.inner.keys().len(), 10);
}

#[tokio::test]
async fn a_store_that_is_away_is_never_an_empty_one() {
    let store = Arc::new(FaultyStore::default());
    let shared = Arc::clone(&store) as Arc<dyn ObjectStore>;
    let catalog = Catalog::open_or_create(Arc::clone(&shared), OPERATION)
        .await
        .unwrap();
    store.down.store(true, Ordering::SeqCst);
    let store_failed =
        |error: CatalogError| matches!(error, CatalogError::Store(_)) && !error.is_absent();
    assert!(store_failed(catalog.backups().await.unwrap_err()));
    assert!(store_failed(catalog.points().await.unwrap_err()));
    assert!(store_failed(
        catalog.match_node(&identity()).await.unwrap_err()
    ));
    assert!(store_failed(
        catalog.manifest(&backup_id('b')).await.unwrap_err()
    ));
    assert!(store_failed(
        Catalog::open(Arc::clone(&shared)).await.unwrap_err()
    ));
    assert!(store_failed(
        Catalog::open_or_create(shared, OPERATION)
            .await
            .unwrap_err()
    ));
}
