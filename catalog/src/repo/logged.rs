//! What a restore rests on, compared with the log before anything is made of it.

use std::collections::BTreeMap;

use futures_util::StreamExt as _;
use pipeline::store::Key;

use super::{Catalog, PARALLEL, Restorable, in_parallel};
use crate::envelope::{MANIFEST_LIMIT, sha256_hex};
use crate::error::CatalogError;
use crate::keys;

impl Catalog {
    /// Makes sure that the objects a restore rests on (manifest, point, nodes, epochs) are those that the log names: an
    /// object that was changed AND sealed again has a right envelope. One that the log does not name counts, as a crash
    /// leaves such. Reads the log from its end until all are found.
    ///
    /// # Errors
    /// [`CatalogError::Damaged`] if one of them is another, or missing; [`CatalogError::Store`].
    pub async fn check_logged(&self, found: &Restorable) -> Result<(), CatalogError> {
        let mut wanted = vec![keys::manifest(&found.manifest.backup_id)];
        wanted.push(keys::point(&found.point.point_id));
        for copy in &found.manifest.nodes {
            wanted.push(keys::node(copy.node_id));
            let chain = self.epoch_chain(copy.node_id, &copy.epoch).await?;
            let epochs = chain
                .iter()
                .map(|epoch| keys::epoch(copy.node_id, &epoch.epoch));
            wanted.extend(epochs);
        }
        let digests = in_parallel(wanted, |key| async move {
            let stored = self.fetch(&key, MANIFEST_LIMIT).await?;
            Ok((key, sha256_hex(&stored)))
        });
        let mut digests: BTreeMap<Key, String> = digests.await?.into_iter().collect();
        let last = self.log_head().await?.map_or(0, |head| head.seq);
        let mut entries = futures_util::stream::iter((1..=last).rev())
            .map(|seq| self.log_entry(seq))
            .buffered(PARALLEL);
        while let Some(entry) = entries.next().await {
            let entry = match entry {
                Ok(entry) => entry,
                // A broken log is for a verification to say, and no reason to refuse a restore.
                Err(error) if error.is_of_object() => continue,
                Err(error) => return Err(error),
            };
            let Some((key, sha256)) = Key::new(entry.object.as_str())
                .ok()
                .and_then(|key| digests.remove_entry(&key))
            else {
                continue;
            };
            if sha256 != entry.object_sha256 {
                let what = format!("it is not the object that log entry {} names", entry.seq);
                return Err(CatalogError::damaged(&key, what));
            }
            if digests.is_empty() {
                break;
            }
        }
        Ok(())
    }
}
