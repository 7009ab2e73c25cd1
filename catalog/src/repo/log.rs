//! The log: what was committed and removed, each entry naming the stored bytes of the one before.

use jiff::Timestamp;
use pipeline::store::Key;
use uuid::Uuid;

use super::Catalog;
use crate::envelope::{OBJECT_LIMIT, sha256_hex};
use crate::error::CatalogError;
use crate::keys;
use crate::model::{LogAction, LogEntry};
use crate::put::Outcome;

/// Races lost in a row before an entry is given up: each is another writer's success.
const RACES: u32 = 1000;
/// How many of the newest entries are looked at for one that may just have been written.
const RECENT: usize = 64;

/// The last entry of the log.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LogHead {
    /// Its number, from 1.
    pub seq: u64,
    /// Hex SHA-256 of its stored bytes.
    pub sha256: String,
}

impl Catalog {
    /// The last entry of the log; `None` if there is none. The first call lists the log's keys, later ones
    /// look only for what came after.
    ///
    /// # Errors
    /// [`CatalogError::Store`].
    pub async fn log_head(&self) -> Result<Option<LogHead>, CatalogError> {
        let mut known = self.log.lock().await;
        if known.is_none() {
            let listed = self.list(keys::LOG).await?;
            let numbers = listed.iter().filter_map(|object| seq(&object.key));
            let Some(last) = numbers.max() else {
                return Ok(None);
            };
            *known = self.head_at(last).await?;
        }
        while let Some(head) = known.as_ref() {
            match self.head_at(head.seq + 1).await? {
                Some(next) => *known = Some(next),
                None => break,
            }
        }
        Ok(known.clone())
    }

    /// The entry of that number as a head. Its bytes count as they are: whether they are damaged
    /// is for a verification to say, and no reason to leave later commits out of the log.
    async fn head_at(&self, seq: u64) -> Result<Option<LogHead>, CatalogError> {
        match self.fetch(&keys::log(seq), OBJECT_LIMIT).await {
            Ok(stored) => Ok(Some(LogHead {
                seq,
                sha256: sha256_hex(&stored),
            })),
            Err(error) if error.is_absent() => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Reads entry `seq`, its envelope and number verified.
    ///
    /// # Errors
    /// [`CatalogError::Damaged`]; [`CatalogError::Store`], with `NotFound` if there is none.
    pub async fn log_entry(&self, seq: u64) -> Result<LogEntry, CatalogError> {
        let key = keys::log(seq);
        let entry: LogEntry = self.read(&key).await?;
        if entry.seq == seq {
            Ok(entry)
        } else {
            let what = format!("it says it is entry {}", entry.seq);
            Err(CatalogError::damaged(&key, what))
        }
    }

    /// Appends an entry about `object`, after those of all others that race with it.
    ///
    /// # Errors
    /// [`CatalogError::Store`]; if its outcome is unknown the entry may stand.
    pub(crate) async fn append_log(
        &self,
        action: LogAction,
        object: &Key,
        object_sha256: &str,
        operation: Uuid,
    ) -> Result<LogHead, CatalogError> {
        let mut head = self.log_head().await?;
        let mut entry = LogEntry {
            seq: 0,
            previous: None,
            at: Timestamp::now(),
            action,
            object: object.as_str().to_owned(),
            object_sha256: object_sha256.to_owned(),
            operation,
            nonce: Uuid::new_v4(),
            extra: serde_json::Map::new(),
        };
        for _ in 0..RACES {
            entry.seq = head.as_ref().map_or(1, |head| head.seq + 1);
            entry.previous = head.map(|head| head.sha256);
            let key = keys::log(entry.seq);
            let (sealed, outcome) = self.create(&key, &entry, OBJECT_LIMIT).await?;
            let (sha256, ours) = match outcome {
                Outcome::Ours => (sealed.sha256, true),
                Outcome::Theirs(stored) => (sha256_hex(&stored), false),
            };
            let seq = entry.seq;
            let new = LogHead { seq, sha256 };
            self.remember(&new).await;
            if ours {
                return Ok(new);
            }
            head = Some(new);
        }
        let what = format!("{RACES} other writers were faster in a row");
        Err(CatalogError::conflict(&keys::log(entry.seq), what))
    }

    /// Whether one of the newest entries is about that object.
    ///
    /// # Errors
    /// [`CatalogError::Store`].
    pub(crate) async fn is_logged(&self, key: &Key) -> Result<bool, CatalogError> {
        let Some(head) = self.log_head().await? else {
            return Ok(false);
        };
        for seq in (1..=head.seq).rev().take(RECENT) {
            match self.log_entry(seq).await {
                Ok(entry) if entry.object == key.as_str() => return Ok(true),
                Ok(_) => {}
                Err(error) if error.is_of_object() => {}
                Err(error) => return Err(error),
            }
        }
        Ok(false)
    }

    async fn remember(&self, head: &LogHead) {
        let mut known = self.log.lock().await;
        if known.as_ref().is_none_or(|known| known.seq < head.seq) {
            *known = Some(head.clone());
        }
    }
}

fn seq(key: &Key) -> Option<u64> {
    let digits = super::stem(key, keys::LOG)?;
    let valid = digits.len() == 10 && digits.bytes().all(|byte| byte.is_ascii_digit());
    valid.then(|| digits.parse().ok()).flatten()
}
