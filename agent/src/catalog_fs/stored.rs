//! Backups that are in the bucket, as the lower layer of a mount: what an increment builds on, or the chain to restore.
//!
//! The catalog that a program sees is the union of the copies' own: each brings its `backups/<instance>/<id>/`, and the
//! newest one `backups/<instance>/pg_probackup.conf`. Configuration that the copies carry besides is left out.
//! WAL segments that a copy streamed are not in its packs; they are read from the WAL of the node's epoch.

mod segments;

use std::collections::HashMap;
use std::fmt;
use std::sync::{Arc, Mutex, PoisonError};

use agent_api::{ApiError, ChainLink, ErrorKind};
use bytes::Bytes;
use catalog::error::CatalogError;
use catalog::keys;
use catalog::model::{Epoch, Probackup, StreamedWal};
use catalog::repo::Catalog;
use futures_util::StreamExt as _;
use pipeline::PipelineError;
use pipeline::budget::Budget;
use pipeline::download::Downloader;
use pipeline::index::Index;
use pipeline::pack::{EntryKind, IndexEntry, PackInfo};
use pipeline::random::{CopyPacks, RandomFile, RandomFiles, RandomReader};
use pipeline::store::Key;
use tokio::runtime::Handle;
use tokio::sync::oneshot;

use self::segments::{SegmentError, Segments};
use super::{Done, FsError, Lower, LowerEntry, LowerId, LowerKind};
use crate::failure::{pipeline_error, store_error};

/// Directory of the index that holds configuration from outside the data directory.
const ATTACHMENTS: &str = "attachments";
/// Control files up to this size are fetched when the chain is loaded; larger ones are read ahead of like any file.
const SMALL: u64 = 64 << 10;
/// Ids of files that are in memory begin here, those of WAL segments at twice that; below it are files in packs.
const IN_MEMORY: LowerId = 1 << 40;

/// The catalogs of a chain.
#[derive(Debug)]
pub struct Stored {
    /// Everything that there is in them.
    pub entries: Vec<LowerEntry>,
    /// Plain bytes of all files.
    pub plain_bytes: u64,
    /// What reads them.
    pub lower: Arc<StoredLower>,
}

/// Reads the files of a [`Stored`].
pub struct StoredLower {
    reader: RandomReader,
    files: Vec<RandomFile>,
    small: Vec<Bytes>,
    segments: Arc<Segments>,
    runtime: Handle,
    trouble: Mutex<Option<ApiError>>,
}

impl fmt::Debug for StoredLower {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("StoredLower")
            .field("files", &self.files.len())
            .finish_non_exhaustive()
    }
}

/// A chain that cannot be right: it is refused before anything is mounted.
fn damaged(what: impl Into<String>) -> ApiError {
    ApiError::new(ErrorKind::Damaged, what)
        .next("run `gs_pitr verify`, and `gs_pitr show` for other backups")
}

fn of_catalog(error: &CatalogError) -> ApiError {
    match error {
        CatalogError::Store(error) => store_error(error),
        error => damaged(error.to_string()),
    }
}

impl Stored {
    /// Reads the indexes and the control files of `chain`, from the FULL on, each building on the one before, and opens
    /// their files for `readers` at the same time. Fetches through `downloader`: its budget (see [`RandomFiles::open`]),
    /// throttle, counters and token; WAL segments into `segments`, if there is memory for nothing else. Call it within a tokio runtime.
    ///
    /// # Errors
    /// [`ErrorKind::Damaged`] if the copies are none of a probackup, do not build on each other or are not what was
    /// written; what the store says; no room in the budget.
    pub async fn load(
        downloader: &Downloader,
        catalog: &Catalog,
        chain: &[ChainLink],
        readers: usize,
        segments: Option<Budget>,
    ) -> Result<Self, ApiError> {
        let mut loading = Loading::default();
        let mut before: Option<&ChainLink> = None;
        for link in chain {
            let probackup = check_link(before, link)?;
            loading.copy(downloader, link, probackup).await?;
            before = Some(link);
        }
        let segments = Segments::new(downloader.clone(), segments, readers);
        for link in chain {
            let wal = link.node.probackup.as_ref().map(|it| &*it.wal);
            let Some(wal @ [_, ..]) = wal else {
                continue;
            };
            let epochs = catalog.epoch_chain(link.node.node_id, &link.node.epoch);
            let epochs = Arc::new(epochs.await.map_err(|error| of_catalog(&error))?);
            for wal in wal {
                let entry = segment_entry(&segments, &epochs, wal)?;
                loading.segment(entry)?;
            }
        }
        loading.open(downloader, segments, readers).await
    }
}

/// Checks that a copy builds on the one before it, and on no other.
fn check_link<'a>(
    before: Option<&ChainLink>,
    link: &'a ChainLink,
) -> Result<&'a Probackup, ApiError> {
    let ChainLink { backup_id, node } = link;
    let probackup = node.probackup.as_ref().ok_or_else(|| {
        damaged(format!(
            "the copy of node {} in backup {backup_id} was not made by a probackup",
            node.node_id
        ))
    })?;
    let fits = match (before, &probackup.parent) {
        (None, None) => true,
        (Some(before), Some(parent)) => {
            let of = before.node.probackup.as_ref();
            parent.backup_id == before.backup_id
                && parent.attempt == before.node.attempt
                && of.is_some_and(|of| of.id == parent.id && of.instance == probackup.instance)
                && before.node.node_id == node.node_id
        }
        _ => false,
    };
    let whole = fits && probackup.mode.is_increment() == before.is_some();
    if whole {
        return Ok(probackup);
    }
    let on = match (&probackup.parent, before) {
        (Some(parent), Some(before)) => {
            format!("{}, and {} was given", parent.backup_id, before.backup_id)
        }
        (Some(parent), None) => format!("{}, which was not given", parent.backup_id),
        (None, Some(before)) => format!("nothing, and {} was given", before.backup_id),
        (None, None) => "nothing that the manifest names".to_owned(),
    };
    Err(damaged(format!(
        "the copy of node {} in backup {backup_id} ({}) builds on {on}",
        node.node_id, probackup.mode
    )))
}

/// A union of catalogs that grows.
#[derive(Default)]
struct Loading {
    random: RandomFiles,
    files: Vec<RandomFile>,
    entries: Vec<LowerEntry>,
    /// Paths that several copies may have, and where they stand in `entries`.
    common: HashMap<String, usize>,
    /// Places in `entries` of files to fetch now.
    at_once: Vec<usize>,
    /// Directories of the copies so far.
    seen: Vec<String>,
}

impl Loading {
    async fn copy(
        &mut self,
        downloader: &Downloader,
        link: &ChainLink,
        probackup: &Probackup,
    ) -> Result<(), ApiError> {
        let ChainLink { backup_id, node } = link;
        let failed = |error: PipelineError| pipeline_error(&error);
        let key = keys::index(backup_id, node.node_id, node.attempt);
        let packs: Vec<(Key, PackInfo)> = node
            .packs
            .iter()
            .map(|pack| {
                let key = keys::pack(backup_id, node.node_id, node.attempt, pack.number);
                (key, pack.clone())
            })
            .collect();
        let packs = self.random.copy(&key, &packs).map_err(failed)?;
        let instance = format!("backups/{}", probackup.instance);
        let own = format!("{instance}/{}", probackup.id);
        if self.seen.contains(&own) {
            let message = format!("two copies of the chain have the id {}", probackup.id);
            return Err(damaged(message));
        }
        let index = Index::open_with(downloader.clone(), key.clone(), &node.index);
        let mut entries = index.map_err(failed)?.entries();
        while let Some(entry) = entries.next().await {
            let entry = entry.map_err(failed)?;
            if below(&entry.path, ATTACHMENTS) {
                continue;
            }
            self.take(&packs, &entry, &instance, &own)
                .map_err(|what| damaged(format!("`{key}`: {what}")))?;
        }
        self.seen.push(own);
        Ok(())
    }

    fn take(
        &mut self,
        packs: &CopyPacks,
        entry: &IndexEntry,
        instance: &str,
        own: &str,
    ) -> Result<(), String> {
        let path = entry.path.as_str();
        let is_own = below(path, own);
        let conf = path.strip_prefix(instance) == Some("/pg_probackup.conf");
        let kind = match &entry.kind {
            EntryKind::Directory => {
                let above = below(instance, path) || path == "wal" || path.starts_with("wal/");
                if !is_own && !above {
                    return Err(format!("`{path}` is no directory of this copy"));
                }
                LowerKind::Directory
            }
            EntryKind::File { size, .. } if is_own || conf => {
                let file = self.random.file(packs, entry);
                let file = file.map_err(|error| error.to_string())?;
                let id = self.files.len() as LowerId;
                self.files.push(file);
                LowerKind::File { size: *size, id }
            }
            EntryKind::File { .. } => return Err(format!("`{path}` is no file of this copy")),
            EntryKind::Symlink { .. } => return Err(format!("`{path}` is a link")),
        };
        let place = if is_own {
            self.entries.push(lower_entry(entry, kind));
            self.entries.len() - 1
        } else if let Some(place) = self.common.get(path).copied() {
            // The newest copy's wins.
            if let Some(earlier) = self.entries.get_mut(place) {
                *earlier = lower_entry(entry, kind);
            }
            place
        } else {
            self.common.insert(path.to_owned(), self.entries.len());
            self.entries.push(lower_entry(entry, kind));
            self.entries.len() - 1
        };
        let small = matches!(kind, LowerKind::File { size, .. } if size <= SMALL);
        let control = conf || (is_own && path.strip_prefix(own) == Some("/backup.control"));
        if small && control && !self.at_once.contains(&place) {
            self.at_once.push(place);
        }
        Ok(())
    }

    fn segment(&mut self, entry: LowerEntry) -> Result<(), ApiError> {
        if !self.seen.iter().any(|own| below(&entry.path, own)) {
            let path = &entry.path;
            return Err(damaged(format!("`{path}` is no place for a WAL segment")));
        }
        self.entries.push(entry);
        Ok(())
    }

    async fn open(
        mut self,
        downloader: &Downloader,
        segments: Segments,
        readers: usize,
    ) -> Result<Stored, ApiError> {
        let reader = self.random.open(downloader, readers);
        let reader = reader.map_err(|error| pipeline_error(&error))?;
        let mut small = Vec::new();
        for place in self.at_once {
            let Some(LowerEntry {
                kind: LowerKind::File { size, id },
                ..
            }) = self.entries.get_mut(place)
            else {
                continue;
            };
            let file = usize::try_from(*id).ok().and_then(|id| self.files.get(id));
            let Some(file) = file else { continue };
            let length = usize::try_from(*size).unwrap_or(usize::MAX);
            let bytes = reader.read(*file, 0, length).await;
            let bytes = bytes.map_err(|error| pipeline_error(&error))?;
            // A copy: what was read holds its whole frame.
            small.push(Bytes::copy_from_slice(&bytes));
            *id = IN_MEMORY + small.len() as LowerId - 1;
        }
        let plain_bytes = self.entries.iter().map(|entry| match entry.kind {
            LowerKind::File { size, .. } => size,
            LowerKind::Directory => 0,
        });
        Ok(Stored {
            plain_bytes: plain_bytes.sum(),
            entries: self.entries,
            lower: Arc::new(StoredLower {
                reader,
                files: self.files,
                small,
                segments: Arc::new(segments),
                runtime: Handle::current(),
                trouble: Mutex::default(),
            }),
        })
    }
}

/// Makes a WAL segment one that can be read.
fn segment_entry(
    segments: &Segments,
    epochs: &Arc<Vec<Epoch>>,
    wal: &StreamedWal,
) -> Result<LowerEntry, ApiError> {
    let path = &wal.path;
    pipeline::index::check_path(path).map_err(|what| damaged(format!("`{path}`: {what}")))?;
    let number = segments.add(epochs, wal).map_err(damaged)?;
    Ok(LowerEntry {
        path: path.clone(),
        mode: 0o600,
        mtime: None,
        kind: LowerKind::File {
            size: wal.size,
            id: 2 * IN_MEMORY + number,
        },
    })
}

/// Whether `path` is `above`, or lies in it.
fn below(path: &str, above: &str) -> bool {
    let rest = path.strip_prefix(above);
    rest.is_some_and(|rest| rest.is_empty() || rest.starts_with('/'))
}

fn lower_entry(entry: &IndexEntry, kind: LowerKind) -> LowerEntry {
    LowerEntry {
        path: entry.path.clone(),
        mode: entry.mode,
        mtime: entry.mtime,
        kind,
    }
}

impl Stored {
    /// At most `length` bytes of a file from `offset`, if there is one of this path: for what is looked at before the
    /// mount is there.
    ///
    /// # Errors
    /// As reads of it.
    pub async fn read(
        &self,
        path: &str,
        offset: u64,
        length: usize,
    ) -> Result<Option<Bytes>, ApiError> {
        let Some((_, id)) = self.find(path) else {
            return Ok(None);
        };
        let (sender, answer) = oneshot::channel();
        let done = move |read| drop(sender.send(read));
        self.lower.read(id, offset, length, Box::new(done));
        match answer.await {
            Ok(Ok(bytes)) => Ok(Some(bytes)),
            // Errors are noted before they are answered.
            _ => Err(self.lower.trouble().unwrap_or_else(|| {
                ApiError::new(ErrorKind::Internal, format!("`{path}` cannot be read"))
            })),
        }
    }

    /// The whole of a small file, if there is one of this path.
    ///
    /// # Errors
    /// As reads of it.
    pub async fn file(&self, path: &str) -> Result<Option<Bytes>, ApiError> {
        let Some((size, _)) = self.find(path) else {
            return Ok(None);
        };
        let length = usize::try_from(size).unwrap_or(usize::MAX);
        self.read(path, 0, length).await
    }

    fn find(&self, path: &str) -> Option<(u64, LowerId)> {
        let entry = self.entries.iter().find(|entry| entry.path == path)?;
        match entry.kind {
            LowerKind::File { size, id } => Some((size, id)),
            LowerKind::Directory => None,
        }
    }

    /// For a [`super::CatalogFs`].
    #[must_use]
    pub fn lower(&self) -> Arc<dyn Lower> {
        Arc::new(Arc::clone(&self.lower))
    }
}

impl StoredLower {
    /// The most WAL segments that are kept in memory while they are read.
    pub const SEGMENTS_KEPT: u32 = segments::KEPT;

    /// A WAL segment that no copy of the chain brought, found in `epochs` when it is read: for a mount that shows it from
    /// now on.
    ///
    /// # Errors
    /// [`ErrorKind::Damaged`] if that can be none.
    pub fn segment(
        &self,
        epochs: &Arc<Vec<Epoch>>,
        wal: &StreamedWal,
    ) -> Result<LowerEntry, ApiError> {
        segment_entry(&self.segments, epochs, wal)
    }

    /// The first error that a reader was answered with: the program above only sees `EIO`.
    #[must_use]
    pub fn trouble(&self) -> Option<ApiError> {
        let trouble = self.trouble.lock().unwrap_or_else(PoisonError::into_inner);
        trouble.clone()
    }

    /// Plain bytes that were asked for and given so far, repetitions included.
    #[must_use]
    pub fn served(&self) -> u64 {
        self.reader.served() + self.segments.served()
    }

    fn failed(&self, error: ApiError, path: &str) -> FsError {
        tracing::error!(path, %error, "a file of a stored backup could not be read");
        let mut trouble = self.trouble.lock().unwrap_or_else(PoisonError::into_inner);
        trouble.get_or_insert(error);
        FsError::Io
    }
}

impl Lower for Arc<StoredLower> {
    fn read(&self, id: LowerId, offset: u64, length: usize, done: Done<Bytes>) {
        let number = |base: LowerId| usize::try_from(id - base).unwrap_or(usize::MAX);
        if id >= 2 * IN_MEMORY {
            let (lower, number) = (Self::clone(self), number(2 * IN_MEMORY));
            if let Some(bytes) = lower.segments.try_read(number, offset, length) {
                return done(Ok(bytes));
            }
            self.runtime.spawn(async move {
                let read = Arc::clone(&lower.segments).read(number, offset, length);
                done(
                    read.await
                        .map_err(|SegmentError { path, error }| lower.failed(error, &path)),
                );
            });
        } else if id >= IN_MEMORY {
            let bytes = self.small.get(number(IN_MEMORY));
            done(
                bytes
                    .map(|bytes| cut(bytes, offset, length))
                    .ok_or(FsError::NotFound),
            );
        } else {
            let Some(file) = self.files.get(number(0)).copied() else {
                return done(Err(FsError::NotFound));
            };
            if let Some(bytes) = self.reader.try_read(file, offset, length) {
                return done(Ok(bytes));
            }
            let lower = Self::clone(self);
            self.runtime.spawn(async move {
                let read = lower.reader.read(file, offset, length).await;
                done(read.map_err(|error| lower.failed(pipeline_error(&error), "in a pack")));
            });
        }
    }
}

/// At most `length` bytes from `offset`.
fn cut(bytes: &Bytes, offset: u64, length: usize) -> Bytes {
    let start = usize::try_from(offset)
        .unwrap_or(usize::MAX)
        .min(bytes.len());
    bytes.slice(start..start.saturating_add(length).min(bytes.len()))
}
