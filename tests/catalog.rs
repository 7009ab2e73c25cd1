//! The catalog against a store in memory: what it promises of damage, races, lost replies and old programs.

#![allow(
    clippy::unwrap_used,
    reason = "test code: a panic is a failed test, with its reason"
)]

#[path = "catalog/by_hand.rs"]
mod by_hand;
#[path = "catalog/chains.rs"]
mod chains;
#[path = "catalog/damage.rs"]
mod damage;
#[path = "catalog/local.rs"]
mod local;
#[path = "catalog/metadata.rs"]
mod metadata;
#[path = "catalog/operations.rs"]
mod operations;
#[path = "catalog/races.rs"]
mod races;
#[path = "catalog/samples.rs"]
mod samples;
#[path = "catalog/wal.rs"]
mod wal;

use std::sync::Arc;

use bytes::Bytes;
use catalog::envelope::sha256_hex;
use catalog::model::{LogAction, Manifest, ManifestState};
use catalog::repo::{BackupState, NewEpoch, NodeIdentity, NodeMatch};
use catalog::{Catalog, CatalogError, keys};
use pipeline::store::{Key, ObjectStore};
use samples::{OPERATION, backup_id, identity, node_with_epoch, point_id};
use support::memory_store::MemoryStore;

async fn repository() -> (Arc<MemoryStore>, Catalog) {
    let store = Arc::new(MemoryStore::default());
    let shared = Arc::clone(&store) as Arc<dyn ObjectStore>;
    let catalog = Catalog::open_or_create(shared, OPERATION).await.unwrap();
    (store, catalog)
}

/// A repository with one complete backup, `9f3c1a2b`, and its point.
async fn with_backup() -> (Arc<MemoryStore>, Catalog, Manifest) {
    let (store, catalog) = repository().await;
    let (node, epoch) = node_with_epoch(&catalog).await;
    let point = samples::point(&point_id('b'), node.node_id, &epoch);
    catalog.put_point(&point).await.unwrap();
    let manifest = samples::manifest(&backup_id('b'), &point_id('b'), node.node_id, &epoch);
    let committed = catalog.commit_backup(&manifest).await.unwrap();
    committed.logged.unwrap();
    (store, catalog, manifest)
}

fn damaged<T: std::fmt::Debug>(result: Result<T, CatalogError>) -> String {
    match result {
        Err(CatalogError::Damaged { what, .. }) => what,
        other => panic!("not damaged: {other:?}"),
    }
}

/// Every entry of the log, the chain of hashes checked.
async fn log_of(store: &MemoryStore, catalog: &Catalog) -> Vec<(LogAction, String)> {
    let mut entries = Vec::new();
    let mut previous = None;
    let head = catalog.log_head().await.unwrap().map_or(0, |head| head.seq);
    for seq in 1..=head {
        let entry = catalog.log_entry(seq).await.unwrap();
        assert_eq!(entry.previous, previous, "entry {seq}");
        previous = Some(sha256_hex(&store.bytes(keys::log(seq).as_str()).unwrap()));
        let object = store.bytes(&entry.object).unwrap();
        assert_eq!(entry.object_sha256, sha256_hex(&object));
        entries.push((entry.action, entry.object));
    }
    entries
}

#[tokio::test]
async fn a_backup_is_written_listed_read_and_logged() {
    let (store, catalog, manifest) = with_backup().await;
    let id = &manifest.backup_id;
    assert_eq!(catalog.manifest(id).await.unwrap().nodes, manifest.nodes);
    let whole = catalog.restorable(id).await.unwrap();
    assert_eq!(Some(whole.point.point_id), manifest.point);
    let listed = catalog.backups().await.unwrap();
    assert_eq!(listed.len(), 1);
    assert!(matches!(&listed[0].state, BackupState::Complete(it) if it.backup_id == *id));
    let actions: Vec<_> = log_of(&store, &catalog)
        .await
        .into_iter()
        .map(|it| it.0)
        .collect();
    let wanted = [
        LogAction::RepositoryCreated,
        LogAction::NodeRegistered,
        LogAction::EpochOpened,
        LogAction::PointCreated,
        LogAction::BackupCommitted,
    ];
    assert_eq!(actions, wanted);
}

#[tokio::test]
async fn no_repository_is_made_by_opening_nor_where_one_has_lost_its_root() {
    let store = Arc::new(MemoryStore::default());
    let shared = || Arc::clone(&store) as Arc<dyn ObjectStore>;
    let error = Catalog::open(shared()).await.unwrap_err();
    assert!(
        matches!(error, CatalogError::NoRepository { .. }),
        "{error}"
    );
    let first = Catalog::open_or_create(shared(), OPERATION).await.unwrap();
    let again = Catalog::open_or_create(shared(), OPERATION).await.unwrap();
    let id = first.repository().repository_id;
    assert_eq!(again.repository().repository_id, id);
    assert_eq!(
        Catalog::open(shared())
            .await
            .unwrap()
            .repository()
            .repository_id,
        id
    );

    store.tamper(&keys::repository(), None);
    assert!(damaged(Catalog::open_or_create(shared(), OPERATION).await).contains("missing"));
}

#[tokio::test]
async fn every_name_is_listed_as_what_it_is() {
    let (store, catalog, manifest) = with_backup().await;
    let good = store
        .bytes(keys::manifest(&manifest.backup_id).as_str())
        .unwrap();
    let fence = Manifest {
        backup_id: backup_id('1'),
        state: ManifestState::Abandoned,
        ..manifest.clone()
    };
    catalog.commit_backup(&fence).await.unwrap();
    store.tamper(&keys::tombstone(&backup_id('2')), Some(Bytes::new()));
    store.tamper(&keys::manifest(&backup_id('2')), Some(good.clone()));
    store.tamper(
        &keys::index(&backup_id('3'), OPERATION, 1),
        Some(Bytes::new()),
    );
    store.tamper(&keys::manifest(&backup_id('4')), Some(good.slice(1..)));
    store.tamper(
        &Key::new("backups/hand-made/manifest.json").unwrap(),
        Some(good),
    );
    let listed = catalog.backups().await.unwrap();
    let states = listed.iter().map(|it| {
        let state = match &it.state {
            BackupState::Complete(_) => "complete",
            BackupState::Deleted => "deleted",
            BackupState::Abandoned(_) => "abandoned",
            BackupState::Unfinished => "unfinished",
            BackupState::Unusable(_) => "unusable",
        };
        (it.name.chars().last().unwrap(), state)
    });
    let states: Vec<_> = states.collect();
    let wanted = [
        ('1', "abandoned"),
        ('2', "deleted"),
        ('3', "unfinished"),
        ('4', "unusable"),
        ('b', "complete"),
        ('e', "unusable"),
    ];
    assert_eq!(states, wanted);

    let error = catalog.manifest(&backup_id('1')).await.unwrap_err();
    assert!(matches!(error, CatalogError::Abandoned { .. }), "{error}");
    let error = catalog.manifest(&backup_id('2')).await.unwrap_err();
    assert!(matches!(error, CatalogError::Deleted { .. }), "{error}");
    for id in [backup_id('3'), backup_id('9')] {
        match catalog.manifest(&id).await.unwrap_err() {
            CatalogError::NotFound { nearest, .. } => {
                assert!(
                    nearest.contains(&manifest.backup_id.to_string()),
                    "{nearest:?}"
                );
            }
            other => panic!("{other}"),
        }
    }
}

#[tokio::test]
async fn an_id_is_found_by_its_beginning() {
    let (store, catalog, manifest) = with_backup().await;
    let id = manifest.backup_id.clone();
    for text in ["2026", "20261121T040233Z-F-9f3c1a2", id.as_str()] {
        assert_eq!(catalog.resolve_backup_id(text).await.unwrap(), id);
    }
    for text in ["", "2025", "../x", "20261121T040233Z-F-9f3c1a2b/", "é"] {
        let error = catalog.resolve_backup_id(text).await.unwrap_err();
        assert!(
            matches!(error, CatalogError::NotFound { .. }),
            "{text}: {error}"
        );
    }
    let good = store.bytes(keys::manifest(&id).as_str());
    store.tamper(&keys::manifest(&backup_id('c')), good);
    match catalog.resolve_backup_id("2026").await.unwrap_err() {
        CatalogError::Ambiguous { candidates, .. } => assert_eq!(candidates.len(), 2),
        other => panic!("{other}"),
    }
}

#[tokio::test]
async fn a_database_is_matched_to_its_node_or_asked_about() {
    let (_, catalog) = repository().await;
    let matched = async |identity: &NodeIdentity| catalog.match_node(identity).await.unwrap();
    assert!(matches!(matched(&identity()).await, NodeMatch::New));
    let (node, epoch) = node_with_epoch(&catalog).await;
    match matched(&identity()).await {
        NodeMatch::Known(known) => {
            assert_eq!(
                (known.node.node_id, &known.epoch.epoch),
                (node.node_id, &epoch)
            );
        }
        other => panic!("{other:?}"),
    }
    let other_system = NodeIdentity {
        system_identifier: 1,
        ..identity()
    };
    assert!(matches!(matched(&other_system).await, NodeMatch::New));
    let moved = NodeIdentity {
        machine_id: "m2".into(),
        ..identity()
    };
    assert!(matches!(matched(&moved).await, NodeMatch::Ambiguous(all) if all.len() == 1));

    // The node moves: its old place is no longer the node's.
    let next = NewEpoch {
        parent: Some((epoch.clone(), "0/5000068".into())),
        timeline: 2,
        machine_id: "m2".into(),
        ..samples::epoch(node.node_id)
    };
    let next = catalog.start_epoch(next, OPERATION).await.unwrap();
    assert!(
        matches!(matched(&moved).await, NodeMatch::Known(known) if known.epoch.epoch == next.epoch)
    );
    assert!(matches!(
        matched(&identity()).await,
        NodeMatch::Ambiguous(_)
    ));
    let chain = catalog
        .epoch_chain(node.node_id, &next.epoch)
        .await
        .unwrap();
    let chain: Vec<_> = chain.into_iter().map(|it| it.epoch).collect();
    assert_eq!(chain, [next.epoch, epoch]);

    let orphan = NewEpoch {
        parent: Some(("00000001-00000000".parse().unwrap(), "0/1".into())),
        ..samples::epoch(node.node_id)
    };
    assert!(
        catalog
            .start_epoch(orphan, OPERATION)
            .await
            .unwrap_err()
            .is_absent()
    );
}

/// Callers spawn these; a future that is not `Send` would only show there.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_request_can_be_spawned() {
    let (_, catalog, manifest) = with_backup().await;
    let task = tokio::spawn(async move {
        let node = &manifest.nodes[0];
        catalog.backups().await.unwrap();
        catalog.points().await.unwrap();
        catalog.match_node(&identity()).await.unwrap();
        catalog.restorable(&manifest.backup_id).await.unwrap();
        catalog.resolve_backup_id("2026").await.unwrap();
        catalog
            .epoch_chain(node.node_id, &node.epoch)
            .await
            .unwrap();
        let home = tempfile::tempdir().unwrap();
        let mirror = catalog::mirror::Mirror::new(home.path(), OPERATION);
        mirror.sync(&catalog).await.unwrap();
    });
    task.await.unwrap();
}
