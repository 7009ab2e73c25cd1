//! The log and what it names, kept as first seen: the one part of the mirror that outlives an object's loss.
//!
//! A file here is never written again while it is a right envelope: the bucket's objects are written once, so one that
//! differs later was changed. Whoever uses a file compares its SHA-256 with what the log says of it.

use std::collections::HashSet;
use std::fs::DirBuilder;
use std::os::unix::fs::DirBuilderExt as _;
use std::path::{Path, PathBuf};

use bytes::Bytes;
use futures_util::StreamExt as _;
use pipeline::store::Key;

use super::{Mirror, PARALLEL, failed, names, on_disk, read, remove, write};
use crate::envelope::{self, MANIFEST_LIMIT, OBJECT_LIMIT, sha256_hex};
use crate::error::CatalogError;
use crate::keys;
use crate::model::{LogAction, LogEntry};
use crate::repo::{Catalog, LogHead};

const FOLDER: &str = "ledger";

impl Mirror {
    /// The stored bytes of an object of the log, or of one that it names, if they were ever seen.
    pub async fn kept(&self, key: &Key) -> Option<Bytes> {
        let (path, key) = (self.ledger_file(key), key.clone());
        let kept = on_disk(move || Ok(valid(&path, &key)));
        kept.await.ok().flatten()
    }

    /// The last entry of the log that was ever seen.
    pub async fn log_head(&self) -> Option<LogHead> {
        let directory = self.directory().join(FOLDER);
        let names = on_disk(move || names(&directory)).await.ok()?;
        let numbers = names.iter().filter_map(|name| seq(name));
        let mut numbers: Vec<u64> = numbers.collect();
        while let Some(seq) = numbers.pop() {
            if let Some(bytes) = self.kept(&keys::log(seq)).await {
                let sha256 = sha256_hex(&bytes);
                return Some(LogHead { seq, sha256 });
            }
        }
        None
    }

    fn ledger_file(&self, key: &Key) -> PathBuf {
        let name = key.as_str().replace('/', "+");
        self.directory().join(FOLDER).join(name)
    }

    /// Takes in what the log has got since the last time.
    pub(super) async fn sync_ledger(&self, catalog: &Catalog) -> Result<(), CatalogError> {
        let directory = self.directory().join(FOLDER);
        let known = on_disk(move || {
            let made = DirBuilder::new()
                .recursive(true)
                .mode(0o700)
                .create(&directory);
            made.map_err(failed(&directory))?;
            Ok(names(&directory)?.into_iter().collect::<HashSet<_>>())
        });
        let known = known.await?;
        let listed = catalog
            .list(keys::LOG)
            .await?
            .into_iter()
            .map(|object| object.key);
        let new = listed.filter(|key| !known.contains(&key.as_str().replace('/', "+")));
        // In order: an entry counts as taken in when its file is there, so its object comes first.
        let mut fetched = futures_util::stream::iter(new)
            .map(|key| async move { self.entry(catalog, key).await })
            .buffered(PARALLEL);
        while let Some(taken) = fetched.next().await {
            taken?;
        }
        Ok(())
    }

    /// Takes in one entry and its object. One that cannot be read is left for a verification to say.
    async fn entry(&self, catalog: &Catalog, key: Key) -> Result<(), CatalogError> {
        let of_object = |error: CatalogError| {
            if error.is_of_object() {
                Ok(())
            } else {
                Err(error)
            }
        };
        let stored = match catalog.fetch(&key, OBJECT_LIMIT).await {
            Ok(stored) => stored,
            Err(error) => return of_object(error),
        };
        let Ok(entry) = envelope::open::<LogEntry>(&key, &stored) else {
            return Ok(());
        };
        if let Ok(object) = Key::new(entry.object.as_str()) {
            if entry.action == LogAction::BackupDeleted {
                self.forget(&object).await?;
            }
            match catalog.fetch(&object, MANIFEST_LIMIT).await {
                Ok(bytes) if sha256_hex(&bytes) == entry.object_sha256 => {
                    self.keep(&object, bytes).await?;
                }
                Ok(_) => {}
                Err(error) => of_object(error)?,
            }
        }
        self.keep(&key, stored).await
    }

    async fn keep(&self, key: &Key, bytes: Bytes) -> Result<(), CatalogError> {
        let (path, key) = (self.ledger_file(key), key.clone());
        on_disk(move || {
            if valid(&path, &key).is_some() {
                return Ok(());
            }
            write(&path, &bytes)
        })
        .await
    }

    /// A deleted backup's manifest is never put back.
    async fn forget(&self, tombstone: &Key) -> Result<(), CatalogError> {
        let folder = tombstone
            .as_str()
            .rsplit_once('/')
            .map_or("", |(folder, _)| folder);
        let Ok(manifest) = Key::new(format!("{folder}/manifest.json")) else {
            return Ok(());
        };
        let path = self.ledger_file(&manifest);
        on_disk(move || remove(&path).map(drop)).await
    }
}

/// A file's bytes, if it is a right envelope.
fn valid(path: &Path, key: &Key) -> Option<Bytes> {
    let stored = read(path, MANIFEST_LIMIT).ok()?;
    envelope::verify(key, &stored).ok()?;
    Some(stored.into())
}

/// The number of a log entry's file.
fn seq(name: &str) -> Option<u64> {
    name.strip_prefix("log+")?
        .strip_suffix(".json")?
        .parse()
        .ok()
}
