//! The catalog: what a repository holds, read from the bucket each time it is asked.
//!
//! Everything is written once. A write creates its object only if there is none, finds out what became
//! of it if the reply is lost, and then says so in the log. Killed between the two, the object stands
//! and its log entry is missing: the object counts.

mod backups;
mod gaps;
mod log;
mod logged;
mod metadata;
mod nodes;
mod operations;
mod points;

use std::sync::Arc;

use bytes::Bytes;
use futures_util::{StreamExt as _, TryStreamExt as _};
use jiff::Timestamp;
use pipeline::store::{Key, ObjectMeta, ObjectStore, StoreError};
use serde::Serialize;
use serde::de::DeserializeOwned;
use tokio::sync::Mutex;
use uuid::Uuid;

pub(crate) use gaps::gap_key;

pub use backups::{BackupState, Committed, ListedBackup, Restorable};
pub use log::LogHead;
pub use nodes::{KnownNode, NewEpoch, NewNode, NodeIdentity, NodeMatch};
pub use operations::JournalledOperation;
pub use points::{ListedPoint, PointState};

use crate::envelope::{self, OBJECT_LIMIT, Sealed};
use crate::error::CatalogError;
use crate::keys;
use crate::model::{FORMAT, LogAction, Repository};
use crate::put::{self, Outcome};

/// Objects fetched at the same time where many are needed.
const PARALLEL: usize = 16;

/// An open repository. Cheap to clone; every method asks the bucket. All futures may be dropped: what
/// was being written is then there or not, and a repetition finds out.
#[derive(Debug, Clone)]
pub struct Catalog {
    store: Arc<dyn ObjectStore>,
    repository: Arc<Repository>,
    log: Arc<Mutex<Option<LogHead>>>,
}

impl Catalog {
    /// Opens the repository that `store` has.
    ///
    /// # Errors
    /// [`CatalogError::NoRepository`]; [`CatalogError::NewerFormat`] with its number;
    /// [`CatalogError::Damaged`]; [`CatalogError::Store`].
    pub async fn open(store: Arc<dyn ObjectStore>) -> Result<Self, CatalogError> {
        match Self::find(&store).await? {
            Some(repository) => Ok(Self::new(store, repository)),
            None => Err(CatalogError::NoRepository {
                store: store.describe(),
            }),
        }
    }

    /// Opens the repository that `store` has, or creates one in an empty place. Of two that create it at
    /// the same time one wins and both open the same. `operation` goes into the log.
    ///
    /// # Errors
    /// As [`Catalog::open`]; [`CatalogError::Damaged`] also if `repository.json` is missing where
    /// other objects of a repository are.
    pub async fn open_or_create(
        store: Arc<dyn ObjectStore>,
        operation: Uuid,
    ) -> Result<Self, CatalogError> {
        if let Some(repository) = Self::find(&store).await? {
            return Ok(Self::new(store, repository));
        }
        // A check of the store before the first backup writes there, and may lack the right to delete.
        let others = keys::ROOTS
            .into_iter()
            .filter(|root| *root != keys::OPERATIONS);
        for root in others {
            if store.list(root).try_next().await?.is_none() {
                continue;
            }
            // Another may have created it since we looked.
            return match Self::find(&store).await? {
                Some(repository) => Ok(Self::new(store, repository)),
                None => Err(CatalogError::damaged(
                    &keys::repository(),
                    format!("it is missing, but there are objects below `{root}`"),
                )),
            };
        }
        let repository = Repository {
            format: FORMAT,
            repository_id: Uuid::new_v4(),
            created: Timestamp::now(),
            encryption: None,
            nonce: Uuid::new_v4(),
            extra: serde_json::Map::new(),
        };
        let key = keys::repository();
        let sealed = envelope::seal(&key, &repository)?;
        match put::create(&*store, &key, &sealed.bytes, OBJECT_LIMIT).await? {
            Outcome::Theirs(stored) => Ok(Self::new(store, envelope::open(&key, &stored)?)),
            Outcome::Ours => {
                let catalog = Self::new(store, repository);
                let action = LogAction::RepositoryCreated;
                catalog
                    .append_log(action, &key, &sealed.sha256, operation)
                    .await?;
                Ok(catalog)
            }
        }
    }

    fn new(store: Arc<dyn ObjectStore>, repository: Repository) -> Self {
        Self {
            store,
            repository: Arc::new(repository),
            log: Arc::default(),
        }
    }

    async fn find(store: &Arc<dyn ObjectStore>) -> Result<Option<Repository>, CatalogError> {
        let key = keys::repository();
        match envelope::fetch(&**store, &key, OBJECT_LIMIT).await {
            Ok(stored) => envelope::open(&key, &stored).map(Some),
            Err(CatalogError::Store(StoreError::NotFound(_))) => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// The repository's own description.
    #[must_use]
    pub fn repository(&self) -> &Repository {
        &self.repository
    }

    /// The store it is in.
    #[must_use]
    pub fn store(&self) -> &Arc<dyn ObjectStore> {
        &self.store
    }

    /// The stored bytes of a small object.
    pub(crate) async fn fetch(&self, key: &Key, limit: usize) -> Result<Bytes, CatalogError> {
        envelope::fetch(&*self.store, key, limit).await
    }

    pub(crate) async fn read<T: DeserializeOwned>(&self, key: &Key) -> Result<T, CatalogError> {
        envelope::open(key, &self.fetch(key, OBJECT_LIMIT).await?)
    }

    /// Everything below a prefix.
    pub(crate) async fn list(&self, prefix: &str) -> Result<Vec<ObjectMeta>, CatalogError> {
        Ok(self.store.list(prefix).try_collect().await?)
    }

    /// Seals and creates an object. Equal bytes that are there already (the nonce says that they are
    /// ours) count as created.
    pub(crate) async fn create<T: Serialize>(
        &self,
        key: &Key,
        body: &T,
        limit: usize,
    ) -> Result<(Sealed, Outcome), CatalogError> {
        let sealed = envelope::seal(key, body)?;
        let outcome = put::create(&*self.store, key, &sealed.bytes, limit).await?;
        Ok((sealed, outcome))
    }
}

/// Runs `fetch` for each item, [`PARALLEL`] at a time, and keeps the order.
pub(crate) async fn in_parallel<I, T, F, Fut>(items: I, fetch: F) -> Result<Vec<T>, CatalogError>
where
    I: IntoIterator,
    F: FnMut(I::Item) -> Fut,
    Fut: Future<Output = Result<T, CatalogError>>,
{
    let fetches: Vec<_> = items.into_iter().map(fetch).collect();
    futures_util::stream::iter(fetches)
        .buffered(PARALLEL)
        .try_collect()
        .await
}

/// The last component of a key, without `.json`: the name of what it holds.
fn stem<'a>(key: &'a Key, prefix: &str) -> Option<&'a str> {
    key.as_str().strip_prefix(prefix)?.strip_suffix(".json")
}

/// Up to three of `names`, those with the longest common beginning with `wanted` first.
pub(crate) fn nearest(wanted: &str, names: impl IntoIterator<Item = String>) -> Vec<String> {
    let common = |name: &str| {
        let pairs = name.bytes().zip(wanted.bytes());
        pairs.take_while(|(a, b)| a == b).count()
    };
    let mut names: Vec<_> = names.into_iter().collect();
    names.sort_by(|a, b| common(b).cmp(&common(a)).then_with(|| b.cmp(a)));
    names.truncate(3);
    names
}
