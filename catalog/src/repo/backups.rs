//! Manifests: the commit points of backups.

use std::collections::BTreeMap;

use pipeline::store::StoreError;

use super::{Catalog, LogHead, in_parallel, nearest};
use crate::check;
use crate::envelope::{self, MANIFEST_LIMIT};
use crate::error::CatalogError;
use crate::ids::BackupId;
use crate::keys;
use crate::model::{LogAction, Manifest, ManifestState, Point};
use crate::put::Outcome;

/// What a name below `backups/` is.
#[derive(Debug)]
pub enum BackupState {
    /// A backup.
    Complete(Box<Manifest>),
    /// It was deleted; something of it may be left.
    Deleted,
    /// It was given up before it was complete, and fenced.
    Abandoned(Box<Manifest>),
    /// Objects without a manifest: a backup that is being made, or that died.
    Unfinished,
    /// A manifest that cannot be used, and why ([`CatalogError::Damaged`], [`CatalogError::NewerFormat`]).
    Unusable(CatalogError),
}

/// One name below `backups/`.
#[derive(Debug)]
pub struct ListedBackup {
    /// The backup's id as it stands in the bucket (of an unusable one perhaps no id at all).
    pub name: String,
    /// What it is.
    pub state: BackupState,
}

/// A manifest that was written.
#[derive(Debug)]
pub struct Committed {
    /// Hex SHA-256 of its stored bytes.
    pub sha256: String,
    /// Its log entry; if that failed, the backup exists all the same and `verify` will miss the entry.
    pub logged: Result<LogHead, CatalogError>,
}

/// A backup with the point it recovers to, checked against each other.
#[derive(Debug, Clone)]
pub struct Restorable {
    /// The manifest.
    pub manifest: Manifest,
    /// Its point.
    pub point: Point,
}

/// What the listing says of one name, before anything is read.
#[derive(Default)]
struct Found {
    manifest: bool,
    tombstone: bool,
}

impl Catalog {
    /// Writes a manifest: from here on the backup exists. The same manifest again (equal to the nonce)
    /// counts as written.
    ///
    /// # Errors
    /// [`CatalogError::Abandoned`] if somebody has fenced the backup; [`CatalogError::Conflict`] if there is
    /// another manifest; [`CatalogError::Refused`] if it breaks a rule of the format, its point is missing or
    /// is not its own; [`CatalogError::Store`]: if its outcome is unknown, the backup may exist.
    pub async fn commit_backup(&self, manifest: &Manifest) -> Result<Committed, CatalogError> {
        let id = &manifest.backup_id;
        let key = keys::manifest(id);
        let refused = |why: String| CatalogError::refused(&key, why);
        check::manifest(manifest, id).map_err(refused)?;
        if let Some(point) = &manifest.point {
            let point = self.point(point).await?;
            check::belongs(manifest, &point).map_err(refused)?;
        }
        let (sealed, outcome) = self.create(&key, manifest, MANIFEST_LIMIT).await?;
        if let Outcome::Theirs(stored) = outcome {
            let theirs: Manifest = envelope::open(&key, &stored)?;
            return Err(match theirs.state {
                ManifestState::Abandoned => CatalogError::Abandoned { id: id.to_string() },
                ManifestState::Complete => {
                    let what = format!("operation {} wrote it", theirs.operation);
                    CatalogError::conflict(&key, what)
                }
            });
        }
        let (action, operation) = (LogAction::BackupCommitted, manifest.operation);
        let logged = self
            .append_log(action, &key, &sealed.sha256, operation)
            .await;
        if let Err(error) = &logged {
            tracing::warn!(backup = %id, %error, "the backup is complete, its log entry is missing");
        }
        Ok(Committed {
            sha256: sealed.sha256,
            logged,
        })
    }

    /// The manifest of a backup that can be restored.
    ///
    /// # Errors
    /// [`CatalogError::Deleted`], [`CatalogError::Abandoned`]; [`CatalogError::NotFound`] with similar ids;
    /// [`CatalogError::NewerFormat`]; [`CatalogError::Damaged`]; [`CatalogError::Store`].
    pub async fn manifest(&self, id: &BackupId) -> Result<Manifest, CatalogError> {
        let key = keys::manifest(id);
        let tombstone = keys::tombstone(id);
        let (deleted, stored) = tokio::join!(
            self.store.head(&tombstone),
            self.fetch(&key, MANIFEST_LIMIT)
        );
        match deleted {
            Ok(_) => return Err(CatalogError::Deleted { id: id.to_string() }),
            Err(StoreError::NotFound(_)) => {}
            Err(error) => return Err(error.into()),
        }
        let stored = match stored {
            Ok(stored) => stored,
            Err(error) if error.is_absent() => return Err(self.no_backup(id.as_str()).await?),
            Err(error) => return Err(error),
        };
        let manifest: Manifest = envelope::open(&key, &stored)?;
        check::manifest(&manifest, id).map_err(|why| CatalogError::damaged(&key, why))?;
        match manifest.state {
            ManifestState::Complete => Ok(manifest),
            ManifestState::Abandoned => Err(CatalogError::Abandoned { id: id.to_string() }),
        }
    }

    /// A backup with its point: everything a restore rests on, verified, and each of the point's places in
    /// the WAL after the end of that node's copy.
    ///
    /// # Errors
    /// As [`Catalog::manifest`] and [`Catalog::point`]; [`CatalogError::Damaged`] also if the manifest names
    /// no point, or one that is not its own.
    pub async fn restorable(&self, id: &BackupId) -> Result<Restorable, CatalogError> {
        let manifest = self.manifest(id).await?;
        let damaged = |what: String| CatalogError::damaged(&keys::manifest(id), what);
        let point = match &manifest.point {
            Some(point) => self.point(point).await?,
            None => return Err(damaged("it names no point to recover to".to_owned())),
        };
        check::belongs(&manifest, &point).map_err(damaged)?;
        Ok(Restorable { manifest, point })
    }

    /// What `manifest` builds on, from the FULL to its parent; nothing if it stands for itself.
    ///
    /// # Errors
    /// [`CatalogError::Damaged`] of `manifest`, or of one that it builds on, if one of them is missing, was deleted, or is not
    /// what it was built on; [`CatalogError::Store`].
    pub async fn parents(&self, manifest: &Manifest) -> Result<Vec<Manifest>, CatalogError> {
        let mut chain: Vec<Manifest> = Vec::new();
        let mut child = manifest.clone();
        while let Some(id) = child.parent.clone() {
            let key = keys::manifest(&child.backup_id);
            let circle = id == manifest.backup_id || chain.iter().any(|it| it.backup_id == id);
            if circle {
                return Err(CatalogError::damaged(
                    &key,
                    "it builds on itself".to_owned(),
                ));
            }
            let parent = match self.manifest(&id).await {
                Ok(parent) => parent,
                Err(error @ CatalogError::Store(_)) if !error.is_absent() => return Err(error),
                Err(error) => {
                    let what = format!("it builds on backup {id}: {error}");
                    return Err(CatalogError::damaged(&key, what));
                }
            };
            check::builds_on(&child, &parent).map_err(|what| CatalogError::damaged(&key, what))?;
            chain.push(parent.clone());
            child = parent;
        }
        chain.reverse();
        Ok(chain)
    }

    /// Everything below `backups/`, by name and so by time: also what was deleted, abandoned, never
    /// finished or cannot be read, each marked as what it is.
    ///
    /// # Errors
    /// [`CatalogError::Store`] if the store cannot list or hand out one of them: then nothing is known.
    pub async fn backups(&self) -> Result<Vec<ListedBackup>, CatalogError> {
        let found = self.find_backups("").await?;
        in_parallel(found, |(name, found)| async move {
            let state = self.backup_state(&name, &found).await?;
            Ok(ListedBackup { name, state })
        })
        .await
    }

    async fn backup_state(&self, name: &str, found: &Found) -> Result<BackupState, CatalogError> {
        if found.tombstone {
            return Ok(BackupState::Deleted);
        }
        if !found.manifest {
            return Ok(BackupState::Unfinished);
        }
        let id: BackupId = match name.parse() {
            Ok(id) => id,
            Err(error) => return Ok(BackupState::Unusable(error.into())),
        };
        let key = keys::manifest(&id);
        let read = match self.fetch(&key, MANIFEST_LIMIT).await {
            Ok(stored) => envelope::open::<Manifest>(&key, &stored),
            Err(error) => Err(error),
        };
        match read {
            Ok(manifest) => Ok(match check::manifest(&manifest, &id) {
                Err(why) => BackupState::Unusable(CatalogError::damaged(&key, why)),
                Ok(()) if manifest.state == ManifestState::Abandoned => {
                    BackupState::Abandoned(Box::new(manifest))
                }
                Ok(()) => BackupState::Complete(Box::new(manifest)),
            }),
            Err(error) if error.is_of_object() => Ok(BackupState::Unusable(error)),
            Err(error) => Err(error),
        }
    }

    /// The backup that `text` names: an id, or the beginning of exactly one that has a manifest.
    ///
    /// # Errors
    /// [`CatalogError::NotFound`] with similar ids; [`CatalogError::Ambiguous`] with all it may mean;
    /// [`CatalogError::Store`].
    pub async fn resolve_backup_id(&self, text: &str) -> Result<BackupId, CatalogError> {
        if let Ok(id) = text.parse() {
            return Ok(id);
        }
        let plain = |byte: u8| byte.is_ascii_alphanumeric() || byte == b'-';
        if text.is_empty() || !text.bytes().all(plain) {
            return Err(self.no_backup(text).await?);
        }
        let found = self.find_backups(text).await?;
        let with_manifest = found.into_iter().filter(|(_, found)| found.manifest);
        let mut ids: Vec<BackupId> = with_manifest
            .filter_map(|(name, _)| name.parse().ok())
            .collect();
        match (ids.pop(), ids.is_empty()) {
            (Some(id), true) => Ok(id),
            (None, _) => Err(self.no_backup(text).await?),
            (Some(last), false) => {
                ids.push(last);
                Err(CatalogError::Ambiguous {
                    what: "backup",
                    text: text.to_owned(),
                    candidates: ids.iter().map(ToString::to_string).collect(),
                })
            }
        }
    }

    /// The error that says there is no such backup.
    async fn no_backup(&self, id: &str) -> Result<CatalogError, CatalogError> {
        let found = self.find_backups("").await?;
        let whole = found
            .into_iter()
            .filter(|(_, it)| it.manifest && !it.tombstone);
        Ok(CatalogError::NotFound {
            what: "backup",
            id: id.to_owned(),
            nearest: nearest(id, whole.map(|(name, _)| name)),
        })
    }

    /// Names below `backups/` that begin with `start`, and which of their objects decide what they are.
    async fn find_backups(&self, start: &str) -> Result<BTreeMap<String, Found>, CatalogError> {
        let mut all: BTreeMap<String, Found> = BTreeMap::new();
        for object in self.list(&format!("{}{start}", keys::BACKUPS)).await? {
            let rest = object.key.as_str().strip_prefix(keys::BACKUPS);
            let Some((name, inner)) = rest.and_then(|rest| rest.split_once('/')) else {
                continue;
            };
            let found = all.entry(name.to_owned()).or_default();
            found.manifest |= inner == "manifest.json";
            found.tombstone |= inner == "deleted.json";
        }
        Ok(all)
    }
}
