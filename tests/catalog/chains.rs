//! Increments: what they build on is found, and found to be what they were built on.

use catalog::CatalogError;
use catalog::ids::BackupId;
use catalog::model::{Manifest, Tombstone};
use jiff::Timestamp;
use serde_json::{Value, json};
use uuid::Uuid;

use super::samples::{self, OPERATION, node_with_epoch, point_id};
use super::{damaged, repository};

fn id(number: u32) -> BackupId {
    let kind = if number == 0 { 'F' } else { 'I' };
    format!("20261121T040233Z-{kind}-0000000{number}")
        .parse()
        .unwrap()
}

/// The copies of a chain of four, each on the one before.
struct Chain {
    catalog: catalog::Catalog,
    manifests: Vec<Manifest>,
}

impl Chain {
    /// `change` may spoil a manifest before it is stored.
    async fn new(change: impl Fn(u32, &mut Value)) -> Self {
        let (_, catalog) = repository().await;
        let (node, epoch) = node_with_epoch(&catalog).await;
        let mut manifests = Vec::new();
        for number in 0..4 {
            let point = point_id(char::from_digit(number, 10).unwrap());
            let mut body = samples::manifest_json(&id(number), &point, node.node_id, &epoch);
            let parent = number.checked_sub(1).map(id);
            let mode = if number == 0 { "FULL" } else { "DELTA" };
            body["mode"] = mode.into();
            body["engine"] = "probackup".into();
            body["parent"] = json!(parent);
            body["nodes"][0]["probackup"] = json!({
                "program": "pg_probackup", "version": "2.5.16", "instance": "node", "id": format!("TOUR{number}"),
                "mode": mode,
                "parent": parent.map(|it| json!({"backup_id": it, "attempt": 1, "id": format!("TOUR{}", number - 1)})),
            });
            change(number, &mut body);
            let manifest: Manifest = serde_json::from_value(body).unwrap();
            let copy = &manifest.nodes[0];
            let marked = samples::point(&point, copy.node_id, &copy.epoch);
            catalog.put_point(&marked).await.unwrap();
            catalog.commit_backup(&manifest).await.unwrap();
            manifests.push(manifest);
        }
        Self { catalog, manifests }
    }

    async fn parents(&self) -> Result<Vec<Manifest>, CatalogError> {
        self.catalog.parents(&self.manifests[3]).await
    }
}

#[tokio::test]
async fn a_chain_is_read_from_its_full_on() {
    let chain = Chain::new(|_, _| {}).await;
    let parents = chain.parents().await.unwrap();
    let names: Vec<_> = parents.into_iter().map(|it| it.backup_id).collect();
    assert_eq!(names, [id(0), id(1), id(2)]);
    let none = chain.catalog.parents(&chain.manifests[0]).await.unwrap();
    assert!(none.is_empty());
}

#[tokio::test]
async fn a_chain_with_another_link_is_damaged() {
    let other = |what: &'static str, value: Value| {
        Chain::new(move |number, body| {
            if number == 2 {
                body["nodes"][0]["probackup"]["parent"][what] = value.clone();
            }
        })
    };
    assert!(damaged(other("id", "TOUR9".into()).await.parents().await).contains("another copy"));
    assert!(damaged(other("attempt", 2.into()).await.parents().await).contains("another copy"));
    let epoch = Chain::new(|number, body| {
        if number == 1 {
            body["nodes"][0]["epoch"] = "00000002-9f3c1a2b".into();
        }
    });
    assert!(damaged(epoch.await.parents().await).contains("another epoch"));
    let node = Chain::new(|number, body| {
        if number == 1 {
            body["nodes"][0]["node_id"] = json!(Uuid::new_v4());
        }
    });
    assert!(damaged(node.await.parents().await).contains("no copy of it"));
}

#[tokio::test]
async fn a_chain_with_a_hole_is_damaged_and_says_where() {
    let chain = Chain::new(|_, _| {}).await;
    let tombstone: Tombstone = serde_json::from_value(json!({
        "backup_id": id(1), "operation": OPERATION, "reason": "delete", "at": Timestamp::now(), "nonce": Uuid::new_v4(),
    }))
    .unwrap();
    chain.catalog.bury(&tombstone).await.unwrap();
    let what = damaged(chain.parents().await);
    assert!(what.contains(id(1).as_str()), "{what}");
    let circle = Chain::new(|number, body| {
        if number == 0 {
            body["mode"] = "DELTA".into();
            body["parent"] = json!(id(3));
            body["nodes"][0]["probackup"]["mode"] = "DELTA".into();
            body["nodes"][0]["probackup"]["parent"] =
                json!({"backup_id": id(3), "attempt": 1, "id": "TOUR3"});
        }
    });
    assert!(damaged(circle.await.parents().await).contains("itself"));
}

#[tokio::test]
async fn a_copy_that_does_not_fit_its_backup_is_never_stored() {
    let (_, catalog) = repository().await;
    let (node, epoch) = node_with_epoch(&catalog).await;
    let body = samples::manifest_json(&id(1), &point_id('b'), node.node_id, &epoch);
    let probackup = json!({
        "program": "pg_probackup", "version": "2.5.16", "instance": "node", "id": "TOUR1", "mode": "FULL",
    });
    let spoiled: [(&str, Value); 5] = [
        ("/parent", json!(id(0))),
        ("/mode", "PTRACK".into()),
        ("/nodes/0/probackup/mode", "DELTA".into()),
        ("/nodes/0/probackup/id", "../../etc".into()),
        (
            "/nodes/0/probackup/wal",
            json!([{"path": "/etc/passwd", "segment": "000000010000000000000003", "size": 16_777_216}]),
        ),
    ];
    for (place, value) in spoiled {
        let mut body = body.clone();
        body["engine"] = "probackup".into();
        body["nodes"][0]["probackup"] = probackup.clone();
        body["nodes"][0]["probackup"]["wal"] = json!([]);
        *body.pointer_mut(place).unwrap() = value;
        let manifest: Manifest = serde_json::from_value(body).unwrap();
        let error = catalog.commit_backup(&manifest).await.unwrap_err();
        assert!(
            matches!(error, CatalogError::Refused { .. }),
            "{place}: {error}"
        );
    }
}
