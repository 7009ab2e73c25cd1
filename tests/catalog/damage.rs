//! What is stored and is not what was written, or is of another kind or time.

use std::sync::Arc;

use bytes::Bytes;
use catalog::envelope;
use catalog::model::{LogAction, Manifest};
use catalog::repo::{BackupState, PointState};
use catalog::{Catalog, CatalogError, keys};
use pipeline::store::Key;
use serde_json::{Value, json};

use crate::samples::{OPERATION, backup_id, enveloped, identity, point_id};
use crate::{damaged, with_backup};

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
    let mut body = crate::samples::manifest_json(&id, &point, node, &epoch);
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

    let mut body = crate::samples::point_json(&point_id('e'), node, &epoch);
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
        let mut body = crate::samples::manifest_json(&id, &point, node, &epoch);
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
        let mut body = crate::samples::point_json(&point_id('f'), node, &epoch);
        body["nodes"][0][name] = value;
        store.tamper(&keys::point(&point_id('f')), Some(enveloped(&body)));
        let manifest = crate::samples::manifest(&id, &point_id('f'), node, &epoch);
        let error = catalog.commit_backup(&manifest).await.unwrap_err();
        assert!(
            matches!(error, CatalogError::Refused { .. }),
            "{name}: {error}"
        );
    }
    let mut manifest = crate::samples::manifest(&id, &point_id('a'), node, &epoch);
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
