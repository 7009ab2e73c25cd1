//! Versions, locks and orphan uploads, on the stand-ins and on a real MinIO.

use std::sync::Arc;
use std::time::Duration;

use catalog::keys;
use catalog::retention::apply;
use catalog::retention::plan::{self, Rules};
use futures_util::TryStreamExt as _;
use pipeline::store::s3::{S3Config, S3Store};
use pipeline::store::{Key, ObjectStore, ObjectVersion, StoreError};
use support::memory_store::MemoryStore;
use support::{minio, s3, skip};

use crate::world::{DAY, End, World, rules};

async fn versions(store: &dyn ObjectStore, prefix: &str) -> Vec<ObjectVersion> {
    store.list_versions(prefix).try_collect().await.unwrap()
}

/// Nothing has a grace: for stores whose clock cannot be moved.
const NO_GRACE: Rules = Rules {
    keep_full: None,
    keep_days: None,
    grace: Duration::ZERO,
};

/// On any store: a killed backup's upload and objects go, and the one that stays is whole.
async fn orphan_uploads(store: Arc<dyn ObjectStore>) {
    let mut world = World::on(store, Arc::default()).await;
    world.full().await;
    let killed = world.backup(None, End::Killed, 1).await;
    let node = world.keys(&format!("backups/{killed}/")).await;
    let index = node.iter().find(|key| key.ends_with("index")).unwrap();
    let pack = Key::new(index.replace("index", "pack-00002")).unwrap();
    assert_eq!(world.store.list_uploads(&pack).await.unwrap().len(), 1);
    // The store's dates have whole seconds.
    tokio::time::sleep(Duration::from_millis(2100)).await;
    let plan = world.plan(&NO_GRACE).await;
    assert_eq!((plan.uploads.len(), plan.dead.len()), (2, 1), "{plan:?}");
    let report = world.apply(&plan).await;
    assert_eq!(report.uploads, 2);
    assert!(world.store.list_uploads(&pack).await.unwrap().is_empty());
    let left = world.keys(&format!("backups/{killed}/")).await;
    assert_eq!(
        left.into_iter().collect::<Vec<_>>(),
        [keys::manifest(&killed).to_string()]
    );
    world.assert_whole().await;
    let again = world.plan(&NO_GRACE).await;
    assert!(again.is_empty(), "{again:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn orphan_uploads_go_from_the_stand_in() {
    let server = s3::start(s3::Options::default()).await.unwrap();
    orphan_uploads(Arc::new(server.store().unwrap())).await;
    assert_eq!(server.uploads_under_way(), 0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn orphan_uploads_go_from_minio() {
    let Some(minio) = minio::start(false).await else {
        skip(
            "retention::orphan_uploads_go_from_minio",
            "there is no minio binary here",
        );
        return;
    };
    orphan_uploads(Arc::new(minio.store().unwrap())).await;
}

/// What is deleted is gone with all versions and marks; what stays keeps its own.
async fn by_version(store: Arc<dyn ObjectStore>, memory: Arc<MemoryStore>) {
    let mut world = World::on(store, memory).await;
    let gone = world.full().await;
    world.gap();
    let kept = world.full().await;
    // Somebody deleted a pack of each by hand: that only hid them.
    for id in [&gone, &kept] {
        let packs = world.keys(&format!("backups/{id}/")).await;
        let pack = packs
            .iter()
            .find(|key| key.ends_with("pack-00001"))
            .unwrap();
        let pack = Key::new(pack.clone()).unwrap();
        assert!(world.store.delete(&[pack]).await.unwrap().is_empty());
    }
    world.gap();
    let newest = world.full().await;
    let below = format!("backups/{gone}/");
    assert!(
        versions(&*world.store, &below)
            .await
            .iter()
            .any(|it| it.is_marker)
    );
    let kept_before = versions(&*world.store, &format!("backups/{kept}/"))
        .await
        .len();
    let report = world.delete(&gone).await;
    assert!(
        report.held.is_empty() && report.refused.is_none(),
        "{report:?}"
    );
    let left = versions(&*world.store, &below).await;
    let left: Vec<_> = left.iter().map(|it| it.key.as_str()).collect();
    assert_eq!(left, [keys::tombstone(&gone).as_str()]);
    // The other one is damaged, not deleted: its bytes are still there.
    let kept_after = versions(&*world.store, &format!("backups/{kept}/"))
        .await
        .len();
    assert_eq!(kept_before, kept_after);
    let plan = world.plan(&NO_GRACE).await;
    assert!(plan.is_empty(), "{plan:?}");
    // A manifest that is only hidden is nothing to build a judgement on.
    world
        .store
        .delete(&[keys::manifest(&newest)])
        .await
        .unwrap();
    let plan = world
        .plan(&Rules {
            keep_full: Some(1),
            ..NO_GRACE
        })
        .await;
    assert!(plan.dead.is_empty() && plan.wal.is_empty(), "{plan:?}");
    assert!(
        plan.notes.iter().any(|note| note.contains(newest.as_str())),
        "{:?}",
        plan.notes
    );
}

#[tokio::test]
async fn versions_go_from_memory() {
    let memory = Arc::new(MemoryStore::versioned(None));
    by_version(Arc::clone(&memory) as _, memory).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn versions_go_from_minio() {
    let Some(minio) = minio::start(false).await else {
        skip(
            "retention::versions_go_from_minio",
            "there is no minio binary here",
        );
        return;
    };
    minio.make_locked_bucket("versions", None).await;
    let store = minio.store_of("versions").unwrap();
    by_version(Arc::new(store), Arc::default()).await;
}

#[tokio::test]
async fn what_a_lock_holds_is_reported_and_goes_later() {
    let memory = MemoryStore::versioned(Some(DAY * 30));
    let mut world = World::new(memory).await;
    let gone = world.full().await;
    world.gap();
    world.full().await;
    world.advance(DAY * 10);
    let plan = world.plan(&rules(Some(1), None)).await;
    let forecast = apply::holds(&world.catalog, &plan).await.unwrap();
    assert_eq!(forecast.len(), plan.versions());
    let report = world.apply(&plan).await;
    // The manifest is not tried while it is needed to say what the others are.
    assert_eq!(
        (report.held.len(), report.versions),
        (plan.versions() - 1, 0)
    );
    assert!(report.refused.is_none() && report.held.iter().all(|it| it.hold.until.is_some()));
    // It is deleted all the same, and its bytes are for a later run.
    assert_eq!(world.names().await.len(), 1);
    world.advance(DAY * 21);
    let plan = world.plan(&rules(Some(1), None)).await;
    assert!(
        apply::holds(&world.catalog, &plan)
            .await
            .unwrap()
            .is_empty()
    );
    world.apply(&plan).await;
    assert_eq!(world.keys(&format!("backups/{gone}/")).await.len(), 1);
    assert!(world.plan(&rules(Some(1), None)).await.is_empty());
    world.assert_whole().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_a_lock_holds_on_minio_is_reported() {
    let Some(minio) = minio::start(false).await else {
        skip(
            "retention::what_a_lock_holds_on_minio_is_reported",
            "there is no minio binary here",
        );
        return;
    };
    minio.make_locked_bucket("locked", Some(1)).await;
    let store: Arc<dyn ObjectStore> = Arc::new(minio.store_of("locked").unwrap());
    let mut world = World::on(store, Arc::default()).await;
    let gone = world.full().await;
    world.gap();
    world.full().await;
    let plan = plan::delete(&world.holdings().await, gone.as_str(), false).unwrap();
    let forecast = apply::holds(&world.catalog, &plan).await.unwrap();
    assert_eq!(forecast.len(), plan.versions());
    let report = world.apply(&plan).await;
    assert_eq!(
        (report.held.len(), report.versions),
        (plan.versions() - 1, 0),
        "{report:?}"
    );
    assert!(report.refused.is_none(), "{report:?}");
    let now = world.store.now().await.unwrap();
    for held in &report.held {
        let until = held.hold.until.unwrap();
        assert!(
            until > now && until < now + Duration::from_hours(25),
            "{held:?}"
        );
    }
    assert_eq!(world.names().await.len(), 1);
    world.assert_whole().await;
    // Nothing was hidden instead: the versions are all there, without a mark.
    let left = versions(&*world.store, &format!("backups/{gone}/")).await;
    assert!(left.iter().all(|it| !it.is_marker), "{left:?}");
}

/// The policies of `minio/`: who makes backups cannot delete, who prunes can, both only below their prefix.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_policies_let_only_the_operator_delete() {
    let test = "retention::the_policies_let_only_the_operator_delete";
    let Some(minio) = minio::start(false).await else {
        skip(test, "there is no minio binary here");
        return;
    };
    let agent = include_str!("../../minio/policies/agent.json");
    let operator = include_str!("../../minio/policies/operator.json");
    let (Some(agent), Some(operator)) = (
        minio.user("agent", agent, "prod"),
        minio.user("operator", operator, "prod"),
    ) else {
        skip(test, "there is no mc binary here");
        return;
    };
    let agents: Arc<dyn ObjectStore> = Arc::new(S3Store::new(agent.clone()).unwrap());
    let operators: Arc<dyn ObjectStore> = Arc::new(S3Store::new(operator).unwrap());
    // All that a backup does, with the agents' right: to make objects and uploads, and to end these.
    let mut made = World::on(Arc::clone(&agents), Arc::default()).await;
    let first = made.full().await;
    made.gap();
    made.full().await;
    let dead = made.backup(None, End::Killed, 1).await;
    made.assert_whole().await;
    let pack = made.keys(&format!("backups/{first}/")).await;
    let pack = Key::new(
        pack.iter()
            .find(|key| key.ends_with("pack-00000"))
            .unwrap()
            .clone(),
    )
    .unwrap();
    let refused = agents.delete_versions(&[(pack.clone(), None)]).await;
    let denied = |error: &StoreError| matches!(error, StoreError::PermissionDenied(_));
    match refused {
        Ok(left) => assert!(left.len() == 1 && denied(&left[0].error), "{left:?}"),
        Err(error) => assert!(denied(&error), "{error}"),
    }
    assert!(agents.head(&pack).await.is_ok());
    // Nobody's prefix but one's own.
    let elsewhere = S3Store::new(S3Config {
        prefix: "other".into(),
        ..agent
    });
    let elsewhere = elsewhere.unwrap().put_if_absent(&pack, "x".into()).await;
    assert!(elsewhere.as_ref().is_err_and(denied), "{elsewhere:?}");
    let world = made.over(&operators, &Arc::default()).await;
    tokio::time::sleep(Duration::from_millis(2100)).await;
    let plan = world
        .plan(&Rules {
            keep_full: Some(1),
            ..NO_GRACE
        })
        .await;
    assert_eq!(
        (plan.removed.len(), plan.dead.len(), plan.uploads.len()),
        (1, 1, 2),
        "{plan:?}"
    );
    assert!(
        apply::holds(&world.catalog, &plan)
            .await
            .unwrap()
            .is_empty()
    );
    let report = world.apply(&plan).await;
    assert!(report.refused.is_none(), "{report:?}");
    assert_eq!((report.deleted, report.fenced), (vec![first], vec![dead]));
    world.assert_whole().await;
}
