//! The catalog against a store in memory: what it promises of damage, races, lost replies and old programs.

#![allow(
    clippy::unwrap_used,
    reason = "test code: a panic is a failed test, with its reason"
)]

#[path = "catalog/by_hand.rs"]
mod by_hand;
#[path = "catalog/local.rs"]
mod local;
#[path = "catalog/operations.rs"]
mod operations;
#[path = "catalog/samples.rs"]
mod samples;
#[path = "catalog/wal.rs"]
mod wal;

use std::sync::Arc;
use std::sync::atomic::Ordering;

use bytes::Bytes;
use catalog::envelope::{self, sha256_hex};
use catalog::model::{LogAction, Manifest, ManifestState};
use catalog::repo::{BackupState, NewEpoch, NodeIdentity, NodeMatch, PointState};
use catalog::{Catalog, CatalogError, keys};
use pipeline::store::{Key, ObjectStore};
use samples::{OPERATION, backup_id, enveloped, identity, node_with_epoch, point_id};
use serde_json::{Value, json};
use support::faulty_store::FaultyStore;
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
async fn a_newer_major_is_refused_with_its_number() {
    let (store, catalog, manifest) = with_backup().await;
    let newer = enveloped(&json!({"format": {"major": 2, "minor": 1}, "nodes": "elsewhere"}));
    let is_newer = |error: CatalogError| {
        let text = error.to_string();
        matches!(error, CatalogError::NewerFormat { major: 2, .. }) && text.contains("format 2")
    };
    store.tamper(&keys::manifest(&manifest.backup_id), Some(newer.clone()));
    assert!(is_newer(
        catalog.manifest(&manifest.backup_id).await.unwrap_err()
    ));
    match catalog.backups().await.unwrap().pop().unwrap().state {
        BackupState::Unusable(error) => assert!(is_newer(error)),
        other => panic!("{other:?}"),
    }
    store.tamper(&keys::point(&point_id('b')), Some(newer.clone()));
    assert!(is_newer(catalog.point(&point_id('b')).await.unwrap_err()));
    store.tamper(&keys::repository(), Some(newer));
    assert!(is_newer(
        Catalog::open(Arc::clone(catalog.store()))
            .await
            .unwrap_err()
    ));
}

#[tokio::test]
async fn any_change_of_one_byte_in_any_json_object_is_an_error() {
    let (store, _, _) = with_backup().await;
    let keys = store.keys();
    assert_eq!(keys.len(), 10, "{keys:?}");
    for key in keys {
        let good = store.bytes(key.as_str()).unwrap();
        envelope::open::<Value>(&key, &good).unwrap();
        for at in 0..good.len() {
            for flip in [1, 0x20, 0x80] {
                let mut changed = good.to_vec();
                changed[at] ^= flip;
                let opened = envelope::open::<Value>(&key, &changed);
                assert!(opened.is_err(), "{key}: byte {at} ^ {flip}");
            }
        }
    }
}

#[tokio::test]
async fn damage_is_found_wherever_an_object_is_read() {
    let (store, catalog, manifest) = with_backup().await;
    let (id, node) = (&manifest.backup_id, manifest.nodes[0].node_id);
    for key in store.keys() {
        let good = store.bytes(key.as_str()).unwrap();
        let half = good.slice(..good.len() / 2);
        let mut flipped = good.to_vec();
        flipped[good.len() / 2] ^= 4;
        for bad in [Bytes::from(flipped), half, Bytes::new()] {
            store.tamper(&key, Some(bad));
            let name = key.as_str();
            if name.starts_with("log/") {
                assert!((1..=5).map(keys::log).any(|log| log == key));
                let seq = name[4..14].parse().unwrap();
                damaged(catalog.log_entry(seq).await);
            } else if name.starts_with("backups/") {
                damaged(catalog.manifest(id).await);
                damaged(catalog.restorable(id).await);
                let state = catalog.backups().await.unwrap().pop().unwrap().state;
                assert!(matches!(
                    state,
                    BackupState::Unusable(CatalogError::Damaged { .. })
                ));
            } else if name.starts_with("points/") {
                damaged(catalog.restorable(id).await);
                let state = catalog.points().await.unwrap().pop().unwrap().state;
                assert!(matches!(
                    state,
                    PointState::Unusable(CatalogError::Damaged { .. })
                ));
            } else if name.starts_with("nodes/") {
                damaged(catalog.nodes().await);
                damaged(catalog.match_node(&identity()).await);
            } else if name.starts_with("wal/") {
                damaged(catalog.open_epoch(node).await);
            } else {
                damaged(Catalog::open(Arc::clone(catalog.store())).await);
            }
        }
        store.tamper(&key, Some(good));
    }
    store.tamper(&keys::point(&point_id('b')), None);
    assert!(catalog.restorable(id).await.unwrap_err().is_absent());
}

#[tokio::test]
async fn an_object_under_anothers_key_is_damage() {
    let (store, catalog, manifest) = with_backup().await;
    let copy = |from: &Key, to: &Key| store.tamper(to, store.bytes(from.as_str()));
    copy(
        &keys::manifest(&manifest.backup_id),
        &keys::manifest(&backup_id('c')),
    );
    assert!(damaged(catalog.manifest(&backup_id('c')).await).contains("says it is backup"));
    copy(&keys::point(&point_id('b')), &keys::point(&point_id('c')));
    assert!(damaged(catalog.point(&point_id('c')).await).contains("says it is point"));
    copy(&keys::log(1), &keys::log(2));
    damaged(catalog.log_entry(2).await);
    copy(
        &keys::node(manifest.nodes[0].node_id),
        &keys::node(OPERATION),
    );
    damaged(catalog.nodes().await);
}

#[tokio::test]
async fn a_hostile_size_is_refused_before_it_is_read() {
    let (store, catalog, manifest) = with_backup().await;
    let key = keys::manifest(&manifest.backup_id);
    let huge = enveloped(&json!({"format": {"major": 1}, "pad": "x".repeat(9 << 20)}));
    store.tamper(&key, Some(huge));
    assert!(damaged(catalog.manifest(&manifest.backup_id).await).contains("more than"));
    let mut manifest = manifest;
    manifest.backup_id = backup_id('d');
    manifest.label = Some("x".repeat(9 << 20));
    let error = catalog.commit_backup(&manifest).await.unwrap_err();
    assert!(matches!(error, CatalogError::Refused { .. }), "{error}");
    assert!(
        store
            .bytes(keys::manifest(&backup_id('d')).as_str())
            .is_none()
    );
}

#[tokio::test]
async fn unknown_fields_survive_wherever_they_stand() {
    let (store, catalog, manifest) = with_backup().await;
    let (node, epoch) = (manifest.nodes[0].node_id, manifest.nodes[0].epoch.clone());
    let (id, point) = (backup_id('e'), point_id('b'));
    let mut body = samples::manifest_json(&id, &point, node, &epoch);
    for place in [
        "",
        "/nodes/0",
        "/nodes/0/tablespaces/0",
        "/nodes/0/attachments/0",
        "/nodes/0/packs/0",
        "/nodes/0/index",
    ] {
        let place = body.pointer_mut(place).unwrap().as_object_mut().unwrap();
        place.insert("later".into(), json!({"x": [1, "y", null], "n": u64::MAX}));
    }
    store.tamper(&keys::manifest(&id), Some(enveloped(&body)));
    let read = catalog.manifest(&id).await.unwrap();
    assert_eq!(serde_json::to_value(&read).unwrap(), body);

    let mut body = samples::point_json(&point_id('e'), node, &epoch);
    body["later"] = json!("top");
    body["nodes"][0]["later"] = json!("inner");
    store.tamper(&keys::point(&point_id('e')), Some(enveloped(&body)));
    let read = catalog.point(&point_id('e')).await.unwrap();
    assert_eq!(serde_json::to_value(&read).unwrap(), body);

    for key in [keys::node(node), keys::epoch(node, &epoch), keys::log(1)] {
        let stored = store.bytes(key.as_str()).unwrap();
        let mut body: Value = envelope::open(&key, &stored).unwrap();
        body["later"] = json!(true);
        store.tamper(&key, Some(enveloped(&body)));
    }
    assert_eq!(
        catalog.node(node).await.unwrap().extra["later"],
        json!(true)
    );
    assert_eq!(
        catalog.epochs(node).await.unwrap()[0].extra["later"],
        json!(true)
    );
    assert_eq!(
        catalog.log_entry(1).await.unwrap().extra["later"],
        json!(true)
    );

    let mut body: Value =
        envelope::open(&keys::log(2), &store.bytes(keys::log(2).as_str()).unwrap()).unwrap();
    body["action"] = json!("lease-taken");
    store.tamper(&keys::log(2), Some(enveloped(&body)));
    let entry = catalog.log_entry(2).await.unwrap();
    assert_eq!(entry.action, LogAction::Other("lease-taken".into()));
    assert_eq!(serde_json::to_value(&entry).unwrap(), body);
}

#[tokio::test]
async fn what_cannot_be_a_backup_is_neither_written_nor_read() {
    let (store, catalog, manifest) = with_backup().await;
    let (node, epoch) = (manifest.nodes[0].node_id, manifest.nodes[0].epoch.clone());
    let (id, point) = (backup_id('f'), point_id('b'));
    let wrong: [(&str, Value); 11] = [
        ("/nodes", json!([])),
        ("/nodes/0/attempt", json!(0)),
        ("/nodes/0/start_lsn", json!("0/9000000")),
        ("/nodes/0/stop_lsn", json!("nowhere")),
        ("/nodes/0/wal_segment_size", json!(12345)),
        ("/nodes/0/wal_first", json!("00000002.history")),
        ("/nodes/0/packs/0/number", json!(1)),
        ("/nodes/0/packs/0/table_sha256", json!("B".repeat(64))),
        ("/nodes/0/packs/0/table_offset", json!(1001)),
        ("/nodes/0/index/sha256", json!("")),
        (
            "/nodes/0/attachments/0/path",
            json!("attachments/../../etc/passwd"),
        ),
    ];
    for (place, value) in wrong {
        let mut body = samples::manifest_json(&id, &point, node, &epoch);
        *body.pointer_mut(place).unwrap() = value;
        let manifest: Manifest = serde_json::from_value(body.clone()).unwrap();
        let error = catalog.commit_backup(&manifest).await.unwrap_err();
        assert!(
            matches!(error, CatalogError::Refused { .. }),
            "{place}: {error}"
        );
        assert!(store.bytes(keys::manifest(&id).as_str()).is_none());
        store.tamper(&keys::manifest(&id), Some(enveloped(&body)));
        damaged(catalog.manifest(&id).await);
        store.tamper(&keys::manifest(&id), None);
    }
    // A point before the end of the copy, in another epoch, or without the node.
    for (name, value) in [
        ("record_lsn", json!("0/3000000")),
        ("epoch", json!("00000001-00000000")),
        ("node_id", json!(OPERATION)),
    ] {
        let mut body = samples::point_json(&point_id('f'), node, &epoch);
        body["nodes"][0][name] = value;
        store.tamper(&keys::point(&point_id('f')), Some(enveloped(&body)));
        let manifest = samples::manifest(&id, &point_id('f'), node, &epoch);
        let error = catalog.commit_backup(&manifest).await.unwrap_err();
        assert!(
            matches!(error, CatalogError::Refused { .. }),
            "{name}: {error}"
        );
    }
    let mut manifest = samples::manifest(&id, &point_id('a'), node, &epoch);
    assert!(
        catalog
            .commit_backup(&manifest)
            .await
            .unwrap_err()
            .is_absent()
    );
    manifest.point = None;
    catalog.commit_backup(&manifest).await.unwrap();
    damaged(catalog.restorable(&id).await);
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
    let point = samples::point(&point_id('b'), node.node_id, &epoch);
    catalog.put_point(&point).await.unwrap();
    store.lost_replies.store(0, Ordering::SeqCst);
    store.lost_writes.store(2, Ordering::SeqCst);
    let manifest = samples::manifest(&backup_id('b'), &point_id('b'), node.node_id, &epoch);
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
