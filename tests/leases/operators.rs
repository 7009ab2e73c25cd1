//! The operators of the model: what the commands do with leases and fences, and nothing else.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use catalog::fence::Abandoned;
use catalog::ids::{BackupId, EpochId, PointId};
use catalog::journal::{OperationJournal, OperationStart};
use catalog::keys;
use catalog::lease::{HeldLease, LeaseRequest};
use catalog::model::{Holder, LeaseScope, Tombstone, Verdict};
use catalog::repo::BackupState;
use catalog::{Catalog, CatalogError};
use jiff::Timestamp;
use pipeline::store::{Key, StoreError};
use uuid::Uuid;

use crate::samples;
use crate::world::{Broken, Stepped, World};

/// How long leases live in the model.
pub(crate) const TTL: Duration = Duration::from_mins(1);

/// What an operator is to do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Job {
    Backup,
    Restore,
    Prune,
}

/// The one node, and the backup that is there at the beginning.
#[derive(Debug, Clone)]
pub(crate) struct Setting {
    pub(crate) node: Uuid,
    pub(crate) epoch: EpochId,
    pub(crate) old: BackupId,
}

/// One operator: a process of its own, with its own sight of the bucket.
pub(crate) struct Operator {
    pub(crate) number: usize,
    pub(crate) world: Arc<World>,
    pub(crate) setting: Setting,
}

/// Ids that say whose they are, the same in every run.
fn operation(number: usize) -> Uuid {
    Uuid::from_u128(0x0bad_cafe_0000 + number as u128)
}

pub(crate) fn names(number: usize) -> (BackupId, PointId) {
    let backup = format!("20261122T00000{number}Z-F-0000000{number}");
    let point = format!("20261122T00000{number}Z-P-0000000{number}");
    (backup.parse().unwrap(), point.parse().unwrap())
}

/// The objects of a backup's one copy.
pub(crate) fn copy_of(id: &BackupId, node: Uuid) -> [Key; 2] {
    [keys::pack(id, node, 1, 0), keys::index(id, node, 1)]
}

impl Operator {
    pub(crate) async fn run(self, job: Job) {
        let store = Arc::new(Stepped {
            actor: self.number,
            world: Arc::clone(&self.world),
        });
        let outcome = async {
            let catalog = Catalog::open(store).await?;
            match job {
                Job::Backup => self.backup(&catalog).await,
                Job::Restore => self.restore(&catalog).await,
                Job::Prune => self.prune(&catalog).await,
            }
        };
        let outcome = outcome.await;
        self.world
            .note(format!("operator {}: ends with {outcome:?}", self.number));
    }

    async fn lease(
        &self,
        catalog: &Catalog,
        scope: LeaseScope,
        backup_id: Option<BackupId>,
    ) -> Result<HeldLease, CatalogError> {
        let request = LeaseRequest {
            scope,
            operation: operation(self.number),
            backup_id,
            holder: Holder {
                host: "model".into(),
                user: "operator".into(),
                pid: u32::try_from(self.number).unwrap(),
                command: scope.name().into(),
            },
            ttl: TTL,
        };
        let taken = catalog.take_lease(request).await?;
        self.world.holds(taken.lease.lease()).await;
        Ok(taken.lease)
    }

    async fn renew(&self, lease: &mut HeldLease) -> Result<(), CatalogError> {
        lease.renew().await?;
        self.world.holds(lease.lease()).await;
        Ok(())
    }

    /// As `gs_pitr backup`.
    async fn backup(&self, catalog: &Catalog) -> Result<(), CatalogError> {
        let (id, point_id) = names(self.number);
        let mut lease = self
            .lease(catalog, LeaseScope::Backup, Some(id.clone()))
            .await?;
        let outcome = self
            .copy_and_commit(catalog, &mut lease, &id, &point_id)
            .await;
        if outcome.is_err() {
            // Not known to be settled: the lease is left to run out.
            catalog.abandon(&id, operation(self.number)).await?;
        }
        let _ = lease.release().await;
        outcome
    }

    async fn copy_and_commit(
        &self,
        catalog: &Catalog,
        lease: &mut HeldLease,
        id: &BackupId,
        point_id: &PointId,
    ) -> Result<(), CatalogError> {
        let Setting { node, epoch, .. } = &self.setting;
        for key in copy_of(id, *node) {
            let body = Bytes::from_static(b"a copy");
            match catalog.store().put_if_absent(&key, body).await {
                // As an upload: equal bytes are ours.
                Ok(_) | Err(StoreError::UnknownOutcome(_)) => {}
                Err(error) => return Err(error.into()),
            }
        }
        self.renew(lease).await?;
        let mut point = samples::point(point_id, *node, epoch);
        let mut manifest = samples::manifest(id, point_id, *node, epoch);
        point.operation = operation(self.number);
        manifest.operation = operation(self.number);
        catalog.put_point(&point).await?;
        catalog.commit_backup(&manifest).await?;
        Ok(())
    }

    /// As `gs_pitr restore`, of the old backup.
    async fn restore(&self, catalog: &Catalog) -> Result<(), CatalogError> {
        let mut lease = self.lease(catalog, LeaseScope::Restore, None).await?;
        let operation = operation(self.number);
        let start = OperationStart {
            operation,
            kind: "restore".into(),
            backup_id: Some(self.setting.old.clone()),
            node_id: None,
            log_head: None,
        };
        let journal = OperationJournal::start(Arc::clone(catalog.store()), start).await?;
        let outcome = self.read_and_decide(catalog, &mut lease).await;
        self.world.reads(operation, None);
        if outcome.is_err() {
            let (by, why) = ("the model", Some("it failed"));
            catalog
                .decide(operation, Verdict::Rollback, by, why)
                .await?;
        }
        journal.ended(None).await?;
        let _ = lease.release().await;
        outcome
    }

    async fn read_and_decide(
        &self,
        catalog: &Catalog,
        lease: &mut HeldLease,
    ) -> Result<(), CatalogError> {
        let (operation, old) = (operation(self.number), &self.setting.old);
        catalog.pin(operation, std::slice::from_ref(old)).await?;
        self.world.reads(operation, Some(old));
        catalog.restorable(old).await?;
        for key in copy_of(old, self.setting.node) {
            catalog.store().head(&key).await?;
        }
        self.renew(lease).await?;
        let verdict = Verdict::Commit;
        let decision = catalog
            .decide(operation, verdict, "the model", None)
            .await?;
        match decision.verdict {
            Verdict::Commit => Ok(()),
            Verdict::Rollback => Err(CatalogError::Abandoned {
                id: operation.to_string(),
            }),
        }
    }

    /// As `gs_pitr prune` with no patience at all: the old backup goes, and whatever is not complete.
    async fn prune(&self, catalog: &Catalog) -> Result<(), CatalogError> {
        let mut lease = self.lease(catalog, LeaseScope::Maintain, None).await?;
        let outcome = self.sweep(catalog, &mut lease).await;
        let _ = lease.release().await;
        outcome
    }

    async fn sweep(&self, catalog: &Catalog, lease: &mut HeldLease) -> Result<(), CatalogError> {
        let node = self.setting.node;
        for scope in [
            LeaseScope::Backup,
            LeaseScope::Restore,
            LeaseScope::Maintain,
        ] {
            let old = catalog.old_leases(scope).await?;
            delete(catalog, &old).await?;
        }
        for listed in catalog.backups().await? {
            let Ok(id) = listed.name.parse::<BackupId>() else {
                continue;
            };
            match listed.state {
                BackupState::Complete(_) if id == self.setting.old => {
                    self.remove(catalog, lease, &id).await?;
                }
                BackupState::Unfinished | BackupState::Abandoned(_) => {
                    let backups = catalog.lease(LeaseScope::Backup).await?;
                    let alive = backups.is_some_and(|backups| {
                        backups.is_held() && backups.lease.backup_id.as_ref() == Some(&id)
                    });
                    if alive {
                        continue;
                    }
                    self.renew(lease).await?;
                    if let Abandoned::Fenced = catalog.abandon(&id, operation(self.number)).await? {
                        delete(catalog, &copy_of(&id, node)).await?;
                    }
                }
                _ => {}
            }
        }
        Ok(())
    }

    async fn remove(
        &self,
        catalog: &Catalog,
        lease: &mut HeldLease,
        id: &BackupId,
    ) -> Result<(), CatalogError> {
        let ids = std::slice::from_ref(id);
        catalog.check_unpinned(ids).await?;
        self.renew(lease).await?;
        let tombstone = Tombstone {
            backup_id: id.clone(),
            manifest_sha256: None,
            operation: operation(self.number),
            reason: "prune".into(),
            at: Timestamp::now(),
            nonce: Uuid::new_v4(),
            extra: serde_json::Map::new(),
        };
        catalog.bury(&tombstone).await?;
        if self.world.broken != Broken::SecondLook {
            catalog.check_unpinned(ids).await?;
        }
        delete(catalog, &copy_of(id, self.setting.node)).await
    }
}

async fn delete(catalog: &Catalog, keys: &[Key]) -> Result<(), CatalogError> {
    if keys.is_empty() {
        return Ok(());
    }
    match catalog.store().delete(keys).await {
        Ok(_) | Err(StoreError::UnknownOutcome(_)) => Ok(()),
        Err(error) => Err(error.into()),
    }
}
