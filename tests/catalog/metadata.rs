//! The proxies' metadata of a point: named by its point, missed by verify, gone after its point.

use std::sync::Arc;
use std::time::Duration;

use catalog::model::{Metadata, MetadataRef};
use catalog::retention::Holdings;
use catalog::retention::plan::{self, GRACE, Rules};
use catalog::verify::{Depth, Report, Scope, Severity, Verify};
use catalog::{Catalog, CatalogError, keys};
use jiff::Timestamp;
use pipeline::budget::Budget;
use pipeline::download::Downloader;
use pipeline::meter::Meter;
use pipeline::store::ObjectStore;
use pipeline::throttle::Throttle;
use serde_json::{Map, json};
use support::memory_store::MemoryStore;
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

use super::samples::{self, OPERATION, enveloped, node_with_epoch, point_id};
use super::{damaged, repository};

fn metadata(last: char) -> Metadata {
    Metadata {
        format: catalog::model::FORMAT,
        point_id: point_id(last),
        source: "shardingsphere".into(),
        source_version: Some("5.5.2".into()),
        taken: Timestamp::now(),
        document: "{\"meta_data\":{}}".into(),
        placeholders: vec!["databases.bank.ds_0.password".into()],
        operation: OPERATION,
        nonce: Uuid::new_v4(),
        extra: Map::new(),
    }
}

/// A repository with a point that has metadata.
async fn with_metadata() -> (Arc<MemoryStore>, Catalog, MetadataRef) {
    let (store, catalog) = repository().await;
    let (node, epoch) = node_with_epoch(&catalog).await;
    let named = catalog.put_metadata(&metadata('b')).await.unwrap();
    let mut point = samples::point(&point_id('b'), node.node_id, &epoch);
    point.metadata = Some(named.clone());
    catalog.put_point(&point).await.unwrap();
    (store, catalog, named)
}

async fn verified(store: &Arc<MemoryStore>) -> Report {
    let verify = Verify {
        scope: Scope::All,
        depth: Depth::Fast,
        jobs: 1,
        downloader: Downloader::new(
            Arc::clone(store) as Arc<dyn ObjectStore>,
            Budget::new(64 << 20),
            Throttle::new(None),
            Arc::<Meter>::default(),
            CancellationToken::new(),
        ),
        mirror: None,
    };
    verify.run(&|_| {}).await.unwrap()
}

/// What was found of the metadata of point `b`.
async fn found(store: &Arc<MemoryStore>) -> Vec<(Severity, String)> {
    let key = keys::metadata(&point_id('b'));
    let all = verified(store).await.findings.into_iter();
    let its = all.filter(|finding| finding.key == key.as_str());
    its.map(|finding| (finding.severity, finding.what))
        .collect()
}

#[tokio::test]
async fn it_is_read_only_as_its_point_names_it() {
    let (store, catalog, named) = with_metadata().await;
    let id = point_id('b');
    let read = catalog.metadata(&id, &named).await.unwrap();
    assert_eq!(read.placeholders, ["databases.bank.ds_0.password"]);
    let point = catalog.point(&id).await.unwrap();
    assert_eq!(point.metadata, Some(named.clone()));
    assert_eq!(found(&store).await, []);

    // Nothing is overwritten, and the same again is no conflict.
    let other = catalog.put_metadata(&metadata('b')).await;
    assert!(
        matches!(other, Err(CatalogError::Conflict { .. })),
        "{other:?}"
    );
    assert_eq!(catalog.put_metadata(&read).await.unwrap(), named);

    // Another object in its place, whole in itself.
    let mut body = serde_json::to_value(&read).unwrap();
    body["document"] = json!("{}");
    store.tamper(&keys::metadata(&id), Some(enveloped(&body)));
    assert!(damaged(catalog.metadata(&id, &named).await).contains("point names"));
    let damage = found(&store).await;
    assert_eq!(damage.len(), 1);
    assert_eq!(damage[0].0, Severity::Damage);

    store.tamper(&keys::metadata(&id), None);
    assert_eq!(
        damaged(catalog.metadata(&id, &named).await),
        "it is missing"
    );
    let damage = found(&store).await;
    assert!(damage[0].1.contains("missing"), "{damage:?}");
}

#[tokio::test]
async fn what_no_point_names_is_an_orphan_and_goes_when_it_is_old() {
    let (store, catalog) = repository().await;
    catalog.put_metadata(&metadata('b')).await.unwrap();
    let orphans = found(&store).await;
    assert_eq!(orphans.len(), 1);
    assert_eq!(orphans[0].0, Severity::Orphan);
    let rules = Rules {
        keep_full: None,
        keep_days: None,
        grace: GRACE,
    };
    let young = plan::prune(&Holdings::read(&catalog).await.unwrap(), &rules);
    assert!(young.litter.is_empty());
    store.advance(GRACE + Duration::from_mins(1));
    let old = plan::prune(&Holdings::read(&catalog).await.unwrap(), &rules);
    assert_eq!(old.litter.len(), 1);
    assert_eq!(old.litter[0].key, keys::metadata(&point_id('b')));
}

#[tokio::test]
async fn it_goes_with_its_point() {
    let (store, catalog, _) = with_metadata().await;
    let rules = Rules {
        keep_full: None,
        keep_days: None,
        grace: GRACE,
    };
    store.advance(GRACE + Duration::from_mins(1));
    // No backup leads to the point.
    let plan = plan::prune(&Holdings::read(&catalog).await.unwrap(), &rules);
    assert_eq!(plan.points.len(), 1);
    let metadata = plan.points[0].metadata.as_ref().unwrap();
    assert_eq!(metadata.key, keys::metadata(&point_id('b')));
    assert!(plan.litter.is_empty(), "it goes after its point, and once");
}

#[tokio::test]
async fn points_of_older_programs_have_none() {
    let (_, catalog) = repository().await;
    let (node, epoch) = node_with_epoch(&catalog).await;
    let point = samples::point(&point_id('b'), node.node_id, &epoch);
    catalog.put_point(&point).await.unwrap();
    let read = catalog.point(&point_id('b')).await.unwrap();
    assert!(read.metadata.is_none() && read.lock.is_none());
}
