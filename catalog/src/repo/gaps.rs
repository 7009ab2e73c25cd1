//! Gaps: WAL that is missing in an epoch for good, written down by the agent that had to let go of it.

use uuid::Uuid;

use super::{Catalog, in_parallel};
use crate::check;
use crate::envelope::{OBJECT_LIMIT, sha256_hex};
use crate::error::CatalogError;
use crate::ids::EpochId;
use crate::keys;
use crate::model::{Gap, LogAction};
use crate::put::Outcome;
use pipeline::store::Key;

impl Catalog {
    /// Writes down a gap, and its log entry. One from and to the same positions that is there already counts as written; it gets
    /// its entry if whoever wrote it was killed before that.
    ///
    /// # Errors
    /// [`CatalogError::Refused`] if its positions are none, or it ends before it begins; [`CatalogError::Damaged`] if the
    /// object that is there is; [`CatalogError::Store`]: it may be written, and may be written again.
    pub async fn declare_gap(&self, gap: &Gap, operation: Uuid) -> Result<(), CatalogError> {
        let key = gap_key(gap)
            .map_err(|why| CatalogError::refused(&keys::epoch(gap.node_id, &gap.epoch), why))?;
        match self.create(&key, gap, OBJECT_LIMIT).await? {
            (sealed, Outcome::Ours) => self.log_gap(&key, &sealed.sha256, operation).await,
            (_, Outcome::Theirs(stored)) => {
                self.read_gap(&key).await?;
                if self.is_logged(&key).await? {
                    return Ok(());
                }
                self.log_gap(&key, &sha256_hex(&stored), operation).await
            }
        }
    }

    async fn log_gap(&self, key: &Key, sha256: &str, operation: Uuid) -> Result<(), CatalogError> {
        let action = LogAction::GapDeclared;
        self.append_log(action, key, sha256, operation)
            .await
            .map(drop)
    }

    /// The gaps of an epoch, by their beginnings.
    ///
    /// # Errors
    /// [`CatalogError::Damaged`] if one of them is; [`CatalogError::Store`].
    pub async fn gaps(&self, node: Uuid, epoch: &EpochId) -> Result<Vec<Gap>, CatalogError> {
        let listed = self.list(&keys::gaps_prefix(node, epoch)).await?;
        in_parallel(&listed, async |object| self.read_gap(&object.key).await).await
    }

    async fn read_gap(&self, key: &Key) -> Result<Gap, CatalogError> {
        let gap: Gap = self.read(key).await?;
        match gap_key(&gap) {
            Ok(own) if own == *key => Ok(gap),
            Ok(own) => Err(CatalogError::damaged(key, format!("it says it is `{own}`"))),
            Err(why) => Err(CatalogError::damaged(key, why)),
        }
    }
}

/// The key of a gap, from what it says.
pub(crate) fn gap_key(gap: &Gap) -> Result<Key, String> {
    let (from, to) = (check::lsn(&gap.from)?, check::lsn(&gap.to)?);
    if from >= to {
        return Err(format!("a gap from {} to {} is none", gap.from, gap.to));
    }
    Ok(keys::gap(gap.node_id, &gap.epoch, from, to))
}
