//! The journal of an operation: which uploads it may have begun, written down before it begins them.
//!
//! A killed process leaves multipart uploads behind, and some stores list uploads only by exact key. So a
//! sweeper has to know the keys, and no upload may be created before its key is in the bucket.

use std::collections::HashSet;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use futures_util::TryStreamExt as _;
use jiff::Timestamp;
use pipeline::error::PipelineError;
use pipeline::store::{Detail, Key, ObjectStore, StoreError};
use pipeline::upload::UploadJournal;
use tokio::sync::Mutex;
use uuid::Uuid;

use crate::envelope::{self, OBJECT_LIMIT};
use crate::error::CatalogError;
use crate::ids::BackupId;
use crate::keys;
use crate::model::{Holder, OperationEvent, OperationRecord};
use crate::put::{self, Outcome};
use crate::repo::LogHead;
use crate::wal::WalName;

/// Kind of the operation of an agent that ships WAL all the time. It makes no backup, and its journal is ended and begun anew at
/// least every [`WAL_JOURNAL`].
pub const WAL_SERVICE: &str = "wal";
/// How long such a journal is kept at most.
pub const WAL_JOURNAL: Duration = Duration::from_hours(8);

/// Packs announced together: one record for the first 512 GiB of a copy.
const PACKS_AHEAD: u32 = 8;
/// WAL segments announced together.
const SEGMENTS_AHEAD: u64 = 32;
/// Keys in one record, far below what its size allows.
const KEYS_IN_RECORD: usize = 1000;
/// Numbers found taken in a row by others who write records of the same operation.
const RACES: u32 = 1000;

/// What an operation is, for its first record.
#[derive(Debug, Clone)]
pub struct OperationStart {
    /// Its id.
    pub operation: Uuid,
    /// `backup`, `restore`, ...
    pub kind: String,
    /// The backup concerned.
    pub backup_id: Option<BackupId>,
    /// The node concerned, if it is one agent's part.
    pub node_id: Option<Uuid>,
    /// Head of the log when it began, so that the log's last entry is named elsewhere too.
    pub log_head: Option<LogHead>,
}

/// The journal of one operation. Several processes may keep one of the same operation: each takes the
/// next free number.
#[derive(Debug)]
pub struct OperationJournal {
    store: Arc<dyn ObjectStore>,
    operation: Uuid,
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    /// Last number known to be taken.
    seq: u64,
    /// Keys that stand in a record.
    announced: HashSet<Key>,
}

impl OperationJournal {
    /// Writes the first record.
    ///
    /// # Errors
    /// [`CatalogError::Store`].
    pub async fn start(
        store: Arc<dyn ObjectStore>,
        start: OperationStart,
    ) -> Result<Self, CatalogError> {
        Self::start_by(store, start, None).await
    }

    /// [`Self::start`], saying for people who runs it.
    ///
    /// # Errors
    /// [`CatalogError::Store`].
    pub async fn start_by(
        store: Arc<dyn ObjectStore>,
        start: OperationStart,
        by: Option<Holder>,
    ) -> Result<Self, CatalogError> {
        let journal = Self {
            store,
            operation: start.operation,
            state: Mutex::default(),
        };
        let event = OperationEvent::Started {
            kind: start.kind,
            backup_id: start.backup_id,
            node_id: start.node_id,
            log_head: start.log_head.map(|head| (head.seq, head.sha256)),
            by,
        };
        let mut state = journal.state.lock().await;
        journal.write(&mut state, event).await?;
        drop(state);
        Ok(journal)
    }

    /// The journal of an operation that another process has begun.
    #[must_use]
    pub fn join(store: Arc<dyn ObjectStore>, operation: Uuid) -> Self {
        Self {
            store,
            operation,
            state: Mutex::default(),
        }
    }

    /// Writes one record.
    ///
    /// # Errors
    /// [`CatalogError::Store`]; if its outcome is unknown, the record may stand.
    pub async fn record(&self, event: OperationEvent) -> Result<(), CatalogError> {
        let mut state = self.state.lock().await;
        self.write(&mut state, event).await
    }

    /// Makes it durable that uploads of `keys` may be begun.
    ///
    /// # Errors
    /// [`CatalogError::Store`]. None of the uploads may be begun then.
    pub async fn intend_all(&self, keys: &[Key]) -> Result<(), CatalogError> {
        let mut state = self.state.lock().await;
        let new = keys.iter().filter(|key| !state.announced.contains(key));
        let new: Vec<Key> = new.cloned().collect();
        for some in new.chunks(KEYS_IN_RECORD) {
            let keys = some.iter().map(|key| key.as_str().to_owned()).collect();
            let event = OperationEvent::UploadsIntended { keys };
            self.write(&mut state, event).await?;
            state.announced.extend(some.iter().cloned());
        }
        Ok(())
    }

    /// Writes the last record: the operation has ended, well or with `error`, and left no upload behind.
    ///
    /// # Errors
    /// [`CatalogError::Store`]. The operation then counts as killed, which a sweeper can live with.
    pub async fn ended(&self, error: Option<&str>) -> Result<(), CatalogError> {
        let error = error.map(str::to_owned);
        self.record(OperationEvent::Ended { error }).await
    }

    async fn write(&self, state: &mut State, event: OperationEvent) -> Result<(), CatalogError> {
        let mut record = OperationRecord {
            operation: self.operation,
            seq: state.seq,
            at: Timestamp::now(),
            event,
            nonce: Uuid::new_v4(),
        };
        for _ in 0..RACES {
            record.seq = state.seq + 1;
            let key = keys::operation_record(self.operation, record.seq);
            let sealed = envelope::seal(&key, &record)?;
            let outcome = put::create(&*self.store, &key, &sealed.bytes, OBJECT_LIMIT).await?;
            state.seq = record.seq;
            if let Outcome::Ours = outcome {
                return Ok(());
            }
        }
        let key = keys::operation_record(self.operation, state.seq);
        let what = format!("{RACES} other writers were faster in a row");
        Err(CatalogError::conflict(&key, what))
    }
}

#[async_trait]
impl UploadJournal for OperationJournal {
    async fn intend(&self, key: &Key) -> Result<(), StoreError> {
        if self.state.lock().await.announced.contains(key) {
            return Ok(());
        }
        let mut keys = vec![key.clone()];
        keys.extend(following(key));
        self.intend_all(&keys).await.map_err(|error| match error {
            CatalogError::Store(error) | CatalogError::Pipeline(PipelineError::Store(error)) => {
                error
            }
            other => StoreError::Invalid(Detail::new("journal", key.as_str(), other.to_string())),
        })
    }
}

/// Keys that are likely to be announced after `key`: a round trip saved each. Those that never come to be
/// are harmless.
fn following(key: &Key) -> Vec<Key> {
    let Some((folder, name)) = key.as_str().rsplit_once('/') else {
        return Vec::new();
    };
    let names: Vec<String> = if let Some(number) = name.strip_prefix("pack-") {
        let number = number.parse().unwrap_or(u32::MAX);
        let last = number.saturating_add(PACKS_AHEAD);
        (number..last)
            .skip(1)
            .map(|next| format!("pack-{next:05}"))
            .collect()
    } else if let Some(Ok(segment)) = name.strip_suffix(".zst").map(str::parse::<WalName>) {
        let next = segment.following(SEGMENTS_AHEAD).into_iter();
        next.map(|name| format!("{name}.zst")).collect()
    } else {
        Vec::new()
    };
    let keys = names
        .iter()
        .map(|name| Key::new(format!("{folder}/{name}")));
    keys.filter_map(Result::ok).collect()
}

/// Reads all records of an operation, in order.
///
/// # Errors
/// [`CatalogError::Damaged`] if a record is, or is another's; [`CatalogError::Store`].
pub async fn records(
    store: &dyn ObjectStore,
    operation: Uuid,
) -> Result<Vec<OperationRecord>, CatalogError> {
    let mut listing = store.list(&keys::operation_prefix(operation));
    let mut records = Vec::new();
    while let Some(object) = listing.try_next().await? {
        let key = object.key;
        let no_record = key == keys::decision(operation)
            || key == keys::pin(operation)
            || key.as_str().starts_with(&keys::probes_prefix(operation));
        if no_record {
            continue;
        }
        records.push(record(store, &key).await?);
    }
    Ok(records)
}

/// Reads the record that is to be under `key`.
pub(crate) async fn record(
    store: &dyn ObjectStore,
    key: &Key,
) -> Result<OperationRecord, CatalogError> {
    let stored = envelope::fetch(store, key, OBJECT_LIMIT).await?;
    let record: OperationRecord = envelope::open(key, &stored)?;
    if keys::operation_record(record.operation, record.seq) == *key {
        return Ok(record);
    }
    let (seq, operation) = (record.seq, record.operation);
    let what = format!("it says it is record {seq} of {operation}");
    Err(CatalogError::damaged(key, what))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn guessed(key: &str) -> Vec<String> {
        let keys = following(&Key::new(key).unwrap());
        keys.iter().map(ToString::to_string).collect()
    }

    #[test]
    fn what_is_announced_ahead() {
        let packs = guessed("backups/b/n/1/pack-00002");
        assert_eq!(packs.len(), 7);
        assert_eq!(packs[0], "backups/b/n/1/pack-00003");
        let wal = guessed("wal/n/e/0000000100000000000000FF.zst");
        assert_eq!(wal.len(), 32);
        assert_eq!(wal[0], "wal/n/e/000000010000000100000000.zst");
        assert!(guessed("backups/b/n/1/index").is_empty());
        assert!(guessed("wal/n/e/00000002.history.zst").is_empty());
    }
}
