//! Fences: what is written so that an operator that stood still can commit nothing when it wakes up.
//!
//! A commit is one object created only if absent: the manifest of a backup, the decision of a restore. A
//! fence is the same key with the other content, so of the two exactly one can ever stand, whatever clocks
//! say and whoever sleeps. Deleting is the other way round: a tombstone, once there, stays for ever, so that
//! a deleter that wakes up deletes only what nobody sees any more. Fences and tombstones are never removed.

use jiff::Timestamp;
use pipeline::store::StoreError;
use uuid::Uuid;

use crate::envelope::{self, MANIFEST_LIMIT, OBJECT_LIMIT};
use crate::error::CatalogError;
use crate::ids::BackupId;
use crate::journal;
use crate::keys;
use crate::lease::StandingLease;
use crate::model::{
    Consistency, Decision, FORMAT, Lease, LeaseScope, LeaseState, LogAction, Manifest,
    ManifestState, OperationEvent, Pin, Tombstone, Verdict,
};
use crate::put::Outcome;
use crate::repo::{Catalog, LogHead};

/// What stands where a backup was to be fenced.
#[derive(Debug)]
pub enum Abandoned {
    /// The fence, ours or another's: this backup can never be completed.
    Fenced,
    /// It was complete before.
    Complete(Box<Manifest>),
}

/// What became of what a predecessor had not finished.
#[derive(Debug)]
pub enum Fenced {
    /// It had nothing that could be committed.
    Nothing,
    /// The backup that it was making.
    Backup(BackupId, Abandoned),
    /// The decision of its restore: rolled back now or before, or committed before.
    Restore(Decision),
}

/// A backup that was deleted.
#[derive(Debug)]
pub struct Buried {
    /// The tombstone that stands, perhaps another's.
    pub tombstone: Tombstone,
    /// Its log entry, if the tombstone is ours; if that failed the backup is deleted all the same.
    pub logged: Option<Result<LogHead, CatalogError>>,
}

/// A pin in force.
#[derive(Debug, Clone)]
pub struct LivePin {
    /// What is read.
    pub pin: Pin,
    /// The lease of the operation that reads. If it has run out, [`Catalog::fence`] ends the pin.
    pub holder: StandingLease,
}

impl Catalog {
    /// Fences what the holder of a lease that has run out had not finished. Whoever is fenced can commit
    /// nothing from then on.
    ///
    /// # Errors
    /// [`CatalogError::Damaged`] if what stands there cannot be read; [`CatalogError::Store`]: then it may or
    /// may not be fenced.
    pub async fn fence(&self, predecessor: &Lease) -> Result<Fenced, CatalogError> {
        let operation = predecessor.operation;
        match (predecessor.scope, &predecessor.backup_id) {
            (LeaseScope::Backup, Some(id)) => {
                let stands = self.abandon(id, operation).await?;
                Ok(Fenced::Backup(id.clone(), stands))
            }
            (LeaseScope::Restore, _) => {
                let reason = "its lease ran out";
                let (by, verdict) = ("who took its lease over", Verdict::Rollback);
                let stands = self.decide(operation, verdict, by, Some(reason)).await?;
                Ok(Fenced::Restore(stands))
            }
            // What deletes and repairs is safe to stop and to repeat anywhere; its tombstones are fences.
            (LeaseScope::Backup | LeaseScope::Maintain, _) => Ok(Fenced::Nothing),
        }
    }

    /// Whether somebody has fenced the operation of a lease.
    ///
    /// # Errors
    /// As [`Catalog::fence`].
    pub async fn is_fenced(&self, lease: &Lease) -> Result<bool, CatalogError> {
        match (lease.scope, &lease.backup_id) {
            (LeaseScope::Backup, Some(id)) => {
                let state = self.stored_manifest(id).await?.map(|stored| stored.state);
                Ok(state == Some(ManifestState::Abandoned))
            }
            (LeaseScope::Restore, _) => {
                let decision = self.decision(lease.operation).await?;
                Ok(decision.is_some_and(|decision| decision.verdict == Verdict::Rollback))
            }
            (LeaseScope::Backup | LeaseScope::Maintain, _) => Ok(false),
        }
    }

    /// Gives a backup up for ever: from here on nobody can complete it. `operation` was making it. What
    /// stands is the answer, also to a commit whose reply was lost: it has come to be, or never will.
    ///
    /// # Errors
    /// [`CatalogError::Damaged`] if there is a manifest that cannot be read; [`CatalogError::Store`]: if its
    /// outcome is unknown it may be fenced.
    pub async fn abandon(&self, id: &BackupId, operation: Uuid) -> Result<Abandoned, CatalogError> {
        let key = keys::manifest(id);
        let now = Timestamp::now();
        let fence = Manifest {
            format: FORMAT,
            backup_id: id.clone(),
            state: ManifestState::Abandoned,
            mode: String::new(),
            engine: String::new(),
            parent: None,
            label: None,
            consistency: Consistency::PerNode,
            point: None,
            unproved: None,
            started: now,
            completed: now,
            operation,
            writer: concat!("gs_pitr ", env!("CARGO_PKG_VERSION")).to_owned(),
            nodes: Vec::new(),
            nonce: Uuid::new_v4(),
            extra: serde_json::Map::new(),
        };
        let (sealed, outcome) = self.create(&key, &fence, MANIFEST_LIMIT).await?;
        if let Outcome::Theirs(stored) = outcome {
            let theirs: Manifest = envelope::open(&key, &stored)?;
            return Ok(match theirs.state {
                ManifestState::Abandoned => Abandoned::Fenced,
                ManifestState::Complete => Abandoned::Complete(Box::new(theirs)),
            });
        }
        let action = LogAction::BackupAbandoned;
        let logged = self
            .append_log(action, &key, &sealed.sha256, operation)
            .await;
        if let Err(error) = logged {
            tracing::warn!(backup = %id, %error, "the backup is fenced, its log entry is missing");
        }
        Ok(Abandoned::Fenced)
    }

    /// Decides what becomes of a restore, unless it is decided. All obey the decision that is returned, which
    /// may be another's.
    ///
    /// # Errors
    /// [`CatalogError::Damaged`] if there is one that cannot be read; [`CatalogError::Store`]: if its outcome
    /// is unknown it may be decided; ask again.
    pub async fn decide(
        &self,
        operation: Uuid,
        verdict: Verdict,
        by: &str,
        reason: Option<&str>,
    ) -> Result<Decision, CatalogError> {
        let key = keys::decision(operation);
        let decision = Decision {
            operation,
            verdict,
            by: by.to_owned(),
            reason: reason.map(str::to_owned),
            at: Timestamp::now(),
            nonce: Uuid::new_v4(),
            extra: serde_json::Map::new(),
        };
        match self.create(&key, &decision, OBJECT_LIMIT).await?.1 {
            Outcome::Ours => Ok(decision),
            Outcome::Theirs(stored) => open_decision(operation, &stored),
        }
    }

    /// What was decided of a restore; `None`: nothing yet.
    ///
    /// # Errors
    /// [`CatalogError::Damaged`]; [`CatalogError::Store`].
    pub async fn decision(&self, operation: Uuid) -> Result<Option<Decision>, CatalogError> {
        match self.fetch(&keys::decision(operation), OBJECT_LIMIT).await {
            Ok(stored) => open_decision(operation, &stored).map(Some),
            Err(error) if error.is_absent() => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Says that `operation`, which holds the restore or the backup lease, reads `backups` until it ends, and
    /// then makes sure that none of them is deleted: whoever deletes looks for pins after its tombstone, so of
    /// the two at least one sees the other. Once per operation; the same backups again count as pinned.
    ///
    /// # Errors
    /// [`CatalogError::Deleted`]: it may not be read; [`CatalogError::Conflict`] if the operation has pinned
    /// others; [`CatalogError::Store`].
    pub async fn pin(&self, operation: Uuid, backups: &[BackupId]) -> Result<(), CatalogError> {
        let key = keys::pin(operation);
        let pin = Pin {
            operation,
            backups: backups.to_vec(),
            at: Timestamp::now(),
            nonce: Uuid::new_v4(),
            extra: serde_json::Map::new(),
        };
        if let Outcome::Theirs(stored) = self.create(&key, &pin, OBJECT_LIMIT).await?.1 {
            let theirs: Pin = envelope::open(&key, &stored)?;
            if !backups.iter().all(|id| theirs.backups.contains(id)) {
                let what = "the operation has pinned other backups";
                return Err(CatalogError::conflict(&key, what));
            }
        }
        for id in backups {
            if self.tombstone(id).await?.is_some() {
                return Err(CatalogError::Deleted { id: id.to_string() });
            }
        }
        Ok(())
    }

    /// All pins in force: of the operation that holds the restore or the backup lease, or let it run out
    /// without being taken over, unless it has ended or is fenced.
    ///
    /// # Errors
    /// [`CatalogError::Damaged`] if a lease, a pin or a fence cannot be read; [`CatalogError::Store`].
    pub async fn pins(&self) -> Result<Vec<LivePin>, CatalogError> {
        let mut pins = Vec::new();
        for scope in [LeaseScope::Restore, LeaseScope::Backup] {
            let Some(holder) = self.lease(scope).await? else {
                continue;
            };
            if holder.lease.state == LeaseState::Released {
                continue;
            }
            let operation = holder.lease.operation;
            let pin: Pin = match self.read(&keys::pin(operation)).await {
                Ok(pin) => pin,
                Err(error) if error.is_absent() => continue,
                Err(error) => return Err(error),
            };
            if !self.is_over(&holder).await? {
                pins.push(LivePin { pin, holder });
            }
        }
        Ok(pins)
    }

    /// Whether the operation of a lease reads nothing any more.
    async fn is_over(&self, holder: &StandingLease) -> Result<bool, CatalogError> {
        let operation = holder.lease.operation;
        if self.is_fenced(&holder.lease).await? {
            return Ok(true);
        }
        if holder.expired {
            // A restore that is committed has read everything; a backup that stands reads nothing.
            let over = match (holder.lease.scope, &holder.lease.backup_id) {
                (LeaseScope::Backup, Some(id)) => self.stored_manifest(id).await?.is_some(),
                _ => self.decision(operation).await?.is_some(),
            };
            if over {
                return Ok(true);
            }
        }
        match journal::records(&**self.store(), operation).await {
            Ok(records) => Ok(records
                .iter()
                .any(|record| matches!(record.event, OperationEvent::Ended { .. }))),
            // What it says cannot be known: it may still read.
            Err(error) if error.is_of_object() => Ok(false),
            Err(error) => Err(error),
        }
    }

    /// Makes sure that nobody reads `backups`. A reader whose lease has run out is fenced, so that it can make
    /// nothing of what it reads. Whoever deletes asks twice: before the tombstone, so that a reader is not
    /// disturbed, and after it, before the first byte is deleted, because one may have begun in between.
    ///
    /// # Errors
    /// [`CatalogError::Pinned`]; as [`Catalog::pins`] and [`Catalog::fence`].
    pub async fn check_unpinned(&self, backups: &[BackupId]) -> Result<(), CatalogError> {
        for LivePin { pin, holder } in self.pins().await? {
            let Some(id) = pin.backups.iter().find(|id| backups.contains(id)) else {
                continue;
            };
            if holder.expired {
                self.fence(&holder.lease).await?;
                continue;
            }
            return Err(CatalogError::Pinned {
                id: id.to_string(),
                scope: holder.lease.scope,
                operation: pin.operation,
            });
        }
        Ok(())
    }

    /// Writes the tombstone of a backup, or finds another's: from here on it does not exist. Its bytes may be
    /// deleted after [`Catalog::check_unpinned`] has said so ONCE MORE.
    ///
    /// # Errors
    /// [`CatalogError::Damaged`] if there is a tombstone that cannot be read (the backup is deleted all the
    /// same); [`CatalogError::Store`]: if its outcome is unknown it may be deleted.
    pub async fn bury(&self, tombstone: &Tombstone) -> Result<Buried, CatalogError> {
        let key = keys::tombstone(&tombstone.backup_id);
        let (sealed, outcome) = self.create(&key, tombstone, OBJECT_LIMIT).await?;
        if let Outcome::Theirs(stored) = outcome {
            return Ok(Buried {
                tombstone: open_tombstone(&tombstone.backup_id, &stored)?,
                logged: None,
            });
        }
        let (action, operation) = (LogAction::BackupDeleted, tombstone.operation);
        let logged = self
            .append_log(action, &key, &sealed.sha256, operation)
            .await;
        if let Err(error) = &logged {
            tracing::warn!(backup = %tombstone.backup_id, %error, "the backup is deleted, its log entry is missing");
        }
        Ok(Buried {
            tombstone: tombstone.clone(),
            logged: Some(logged),
        })
    }

    /// The tombstone of a backup, if it was deleted.
    ///
    /// # Errors
    /// [`CatalogError::Damaged`]: it was deleted, and by whom cannot be read; [`CatalogError::Store`].
    pub async fn tombstone(&self, id: &BackupId) -> Result<Option<Tombstone>, CatalogError> {
        match self.fetch(&keys::tombstone(id), OBJECT_LIMIT).await {
            Ok(stored) => open_tombstone(id, &stored).map(Some),
            Err(error) if error.is_absent() => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// The manifest under a backup's name, complete or a fence, deleted or not.
    async fn stored_manifest(&self, id: &BackupId) -> Result<Option<Manifest>, CatalogError> {
        let key = keys::manifest(id);
        match self.fetch(&key, MANIFEST_LIMIT).await {
            Ok(stored) => envelope::open(&key, &stored).map(Some),
            Err(CatalogError::Store(StoreError::NotFound(_))) => Ok(None),
            Err(error) => Err(error),
        }
    }
}

fn open_decision(operation: Uuid, stored: &[u8]) -> Result<Decision, CatalogError> {
    let key = keys::decision(operation);
    let decision: Decision = envelope::open(&key, stored)?;
    if decision.operation == operation {
        return Ok(decision);
    }
    let what = format!("it says it is of operation {}", decision.operation);
    Err(CatalogError::damaged(&key, what))
}

fn open_tombstone(id: &BackupId, stored: &[u8]) -> Result<Tombstone, CatalogError> {
    let key = keys::tombstone(id);
    let tombstone: Tombstone = envelope::open(&key, stored)?;
    if tombstone.backup_id == *id {
        return Ok(tombstone);
    }
    let what = format!("it says it is of backup {}", tombstone.backup_id);
    Err(CatalogError::damaged(&key, what))
}
