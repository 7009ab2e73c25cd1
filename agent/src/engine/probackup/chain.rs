//! What an increment builds on, shown to the program out of the bucket.

use std::sync::Arc;
use std::time::Duration;

use agent_api::ApiError;
use catalog::Catalog;
use catalog::model::BackupMode;
use pipeline::download::Downloader;
use tokio::time::timeout;

use super::archive;
use super::preflight::late;
use crate::catalog_fs::stored::{Stored, StoredLower};
use crate::catalog_fs::{Lower, LowerEntry, NoLower};
use crate::engine::attempt::{Attempt, cancelled};
use crate::engine::errors;

/// To read indexes and control files: about 100 bytes a file of each copy.
const LOAD: Duration = Duration::from_mins(10);

/// The parents' catalog; of a FULL an empty one.
pub(super) struct Parents {
    pub(super) entries: Vec<LowerEntry>,
    stored: Option<Arc<StoredLower>>,
}

impl Parents {
    /// Reads what the chain's catalogs hold.
    ///
    /// # Errors
    /// If the chain is not what its manifests say; what the store says.
    pub(super) async fn load(attempt: &Attempt<'_>) -> Result<Self, ApiError> {
        let (cx, chain) = (attempt.cx, &attempt.spec.chain);
        if chain.is_empty() {
            return Ok(Self {
                entries: Vec::new(),
                stored: None,
            });
        }
        let downloader = Downloader::new(
            Arc::clone(&cx.store),
            cx.budget.clone(),
            cx.throttle.clone(),
            // Not the operation's: these bytes come, and it counts what goes.
            Arc::default(),
            attempt.work.child_token(),
        );
        // An increment reads control files of its parents, one after the other; a PAGE their WAL too.
        let (readers, segments) = match attempt.spec.mode {
            BackupMode::Page => (
                archive::kept(attempt) as usize,
                Some(archive::memory(attempt)?),
            ),
            _ => (1, None),
        };
        let load = async {
            let catalog = Catalog::open(Arc::clone(&cx.store)).await;
            let catalog = catalog.map_err(errors::catalog)?;
            Stored::load(&downloader, &catalog, chain, readers, segments).await
        };
        let stored = tokio::select! {
            biased;
            () = attempt.work.cancelled() => return Err(cancelled()),
            stored = timeout(LOAD, load) => stored.map_err(|_| late(LOAD))??,
        };
        Ok(Self {
            entries: stored.entries,
            stored: Some(stored.lower),
        })
    }

    /// What there is in the bucket; of a FULL nothing.
    pub(super) fn stored(&self) -> Option<Arc<StoredLower>> {
        self.stored.clone()
    }

    /// What reads them.
    pub(super) fn lower(&self) -> Arc<dyn Lower> {
        match &self.stored {
            Some(stored) => Arc::new(Arc::clone(stored)),
            None => Arc::new(NoLower),
        }
    }

    /// The first thing that could not be read.
    pub(super) fn trouble(&self) -> Option<ApiError> {
        self.stored.as_ref().and_then(|stored| stored.trouble())
    }
}
