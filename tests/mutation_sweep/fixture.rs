//! A small repository with everything in it that a repository can have, written by the real catalog and pipeline.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;

use bytes::Bytes;
use catalog::ids::BackupId;
use catalog::mirror::Mirror;
use catalog::model::Holder;
use catalog::retention::plan::{GRACE, MARGIN};
use catalog::verify::{Depth, Report, Scope, Verify};
use catalog::wal::WalFile;
use catalog::{Catalog, CatalogError};
use pipeline::budget::Budget;
use pipeline::download::Downloader;
use pipeline::meter::Meter;
use pipeline::store::{Key, ObjectStore};
use pipeline::throttle::Throttle;
pub(crate) use support::files::{Files, read_tree};
use support::memory_store::MemoryStore;
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

use super::building::{Builder, Place};

/// Bytes of a WAL segment, the least there is.
pub(crate) const SEGMENT: u64 = 1 << 20;

/// The repository, and what went into it.
pub(crate) struct World {
    pub(crate) store: Arc<MemoryStore>,
    /// The complete backups, the older first.
    pub(crate) backups: Vec<BackupId>,
    pub(crate) files: BTreeMap<(BackupId, Uuid), Files>,
    pub(crate) wal: HashMap<WalFile, Bytes>,
    /// The store just before the newest complete backup's point, and just after that backup's end; the clock stands.
    pub(crate) commit: Option<(Arc<MemoryStore>, Arc<MemoryStore>)>,
}

pub(crate) fn holder(command: &str) -> Holder {
    Holder {
        host: "ops1".into(),
        user: "dba".into(),
        pid: 4711,
        command: command.into(),
    }
}

pub(crate) fn downloader(store: &Arc<dyn ObjectStore>) -> Downloader {
    Downloader::new(
        Arc::clone(store),
        Budget::new(64 << 20),
        Throttle::new(None),
        Arc::<Meter>::default(),
        CancellationToken::new(),
    )
}

/// Verifies what is in a store.
pub(crate) async fn verify(
    store: &Arc<dyn ObjectStore>,
    scope: Scope,
    depth: Depth,
    mirror: Option<Mirror>,
) -> Result<Report, CatalogError> {
    let verify = Verify {
        scope,
        depth,
        jobs: 2,
        downloader: downloader(store),
        mirror,
    };
    verify.run(&|_| {}).await
}

impl World {
    pub(crate) async fn verify(&self, depth: Depth) -> Report {
        self.verify_as(Scope::All, depth).await
    }

    pub(crate) async fn verify_as(&self, scope: Scope, depth: Depth) -> Report {
        self.try_verify(scope, depth).await.unwrap()
    }

    pub(crate) async fn try_verify(
        &self,
        scope: Scope,
        depth: Depth,
    ) -> Result<Report, CatalogError> {
        let shared = Arc::clone(&self.store) as Arc<dyn ObjectStore>;
        verify(&shared, scope, depth, None).await
    }

    /// The same again, to do things to.
    pub(crate) fn fork(&self) -> Arc<MemoryStore> {
        Arc::new(self.store.fork())
    }

    /// Everything that is stored, by key.
    pub(crate) fn objects(&self) -> BTreeMap<Key, Bytes> {
        let keys = self.store.keys().into_iter();
        keys.map(|key| {
            let bytes = self.store.bytes(key.as_str()).unwrap();
            (key, bytes)
        })
        .collect()
    }

    /// Two nodes, two backups with points and WAL over an edge of the names, the second one in an epoch with a parent; a
    /// deleted backup, an abandoned one, restores that went forward and back, and all that operators leave.
    pub(crate) async fn build() -> Self {
        Self::builder().await.0.world
    }

    /// One more backup, of one node, that the WAL of its own epoch is enough for. No older point can be reached from it.
    pub(crate) async fn build_longer() -> Self {
        let (mut builder, [_, mut place]) = Self::builder().await;
        let id = "20261127T040233Z-F-00000007";
        builder.segments(&place.epoch, place.node, 1, 7, 8).await;
        place.wal = vec![(place.epoch.clone(), 1, 7, 8)];
        let last = builder.backup(Uuid::now_v7(), id, &[place]).await;
        builder.world.backups.push(last);
        builder.world
    }

    async fn builder() -> (Builder, [Place; 2]) {
        let store = Arc::new(MemoryStore::default());
        let shared = Arc::clone(&store) as Arc<dyn ObjectStore>;
        let first = Uuid::now_v7();
        let catalog = Catalog::open_or_create(Arc::clone(&shared), first)
            .await
            .unwrap();
        let world = Self {
            store: Arc::clone(&store),
            backups: Vec::new(),
            files: BTreeMap::new(),
            wal: HashMap::new(),
            commit: None,
        };
        let mut builder = Builder {
            store,
            shared,
            catalog,
            world,
            seed: 1,
        };
        let places = builder.run(first).await;
        // Operations without a lease count as under way for a day.
        builder.store.advance(GRACE + MARGIN);
        (builder, places)
    }
}
