//! The way into the bucket: an operation with a journal of its own, credentials, memory, and the certainty that the epoch is this
//! database's.

use std::sync::Arc;
use std::time::{Duration, Instant};

use agent_api::{ApiError, ErrorKind, RepositoryAccess};
use catalog::Catalog;
use catalog::journal::{OperationJournal, OperationStart, WAL_JOURNAL, WAL_SERVICE};
use pipeline::budget::Budget;
use pipeline::meter::Meter;
use pipeline::pack::PART_SIZE;
use pipeline::throttle::Throttle;
use pipeline::upload::Uploader;
use tokio::time::timeout;
use uuid::Uuid;

use super::begin::Database;
use super::run::Run;
use crate::engine::errors;
use crate::identity;
use crate::wal::keeper::Keeper;
use crate::wal::transfer::Transfer;
use crate::wal::trouble::Trouble;

/// How often it is looked whether the epoch is still this database's.
const IDENTITY: Duration = Duration::from_mins(10);
/// For the end of a journal: it only saves a sweeper work.
const LAST_WORD: Duration = Duration::from_secs(5);
/// Of the memory budget this part at most is set aside for a segment; a larger one is taken when it is needed.
const SET_ASIDE: usize = 4;

/// Memory that shipping does not share. It keeps it from one way to the next: what a copy holds while the database waits for its WAL to be
/// shipped must not be what shipping waits for, and no copy may count on what shipping is about to take.
#[derive(Debug, Default)]
pub(super) struct SetAside {
    uploader: Option<Budget>,
    segment: Option<Budget>,
}

impl SetAside {
    /// Takes what is missing, as far as that is free.
    fn fill(&mut self, budget: &Budget, segment: usize) {
        let take = |bytes, what| budget.part(bytes, what).ok();
        if self.uploader.is_none() {
            self.uploader = take(PART_SIZE, "the upload of WAL");
        }
        if self.segment.is_none() && segment <= budget.total_bytes() / SET_ASIDE {
            self.segment = take(segment, "shipping WAL");
        }
    }
}

/// The way into the bucket.
pub(super) struct Way {
    pub(super) catalog: Catalog,
    uploader: Uploader,
    journal: Arc<OperationJournal>,
    /// The operation that it is the journal of.
    pub(super) operation: Uuid,
    begun: Instant,
    /// What had been lent when it was opened.
    lendings: u64,
    /// When the epoch was last seen to be this database's.
    pub(super) seen: Option<Instant>,
}

impl Run {
    /// Sets memory aside, if there is none yet and some is free.
    pub(super) fn set_aside(&self, database: &Database) {
        let (budget, segment) = (&self.shared.budget, database.size.in_memory());
        self.shared.state().memory.fill(budget, segment);
    }

    /// Whether there is a way into the bucket, and it is good.
    pub(super) fn is_open(&self) -> bool {
        let lendings = self.shared.state().lendings;
        let good = |way: &Way| way.lendings == lendings && way.begun.elapsed() < WAL_JOURNAL;
        self.way.as_ref().is_some_and(good)
    }

    /// Opens the way into the bucket, if there is none that is good. Nothing of another one may be in use.
    pub(super) async fn open(&mut self) -> Result<(), Trouble> {
        if self.is_open() {
            return Ok(());
        }
        let saved = self.saved()?;
        let (lent, lendings) = {
            let state = self.shared.state();
            (state.lent.clone(), state.lendings)
        };
        self.leave().await;
        if saved.lent && lent.is_none() && self.shared.config.credentials.is_none() {
            let message = "the S3 credentials that a client had lent ended with the agent that was running then";
            let error = ApiError::new(ErrorKind::StoreDenied, message);
            return Err(error
                .next("gs_pitr wal start, or any backup, lends them again; or start the agent with --s3-credentials-file")
                .into());
        }
        let access = RepositoryAccess {
            credentials: lent,
            ..saved.repository.clone()
        };
        let store = (self.shared.open)(&access)?;
        let catalog = Catalog::open(Arc::clone(&store)).await;
        let catalog = catalog.map_err(errors::catalog)?;
        let memory = self.shared.state().memory.uploader.clone();
        if let Some(memory) = &memory {
            // An upload that was cut off cleans up with it.
            let whole = memory.acquire(PART_SIZE, &self.cancel);
            let _ = timeout(LAST_WORD, whole).await;
        }
        let budget = memory.unwrap_or_else(|| self.shared.budget.clone());
        let operation = Uuid::now_v7();
        let start = OperationStart {
            operation,
            kind: WAL_SERVICE.into(),
            backup_id: None,
            node_id: Some(saved.node),
            log_head: None,
        };
        let journal = OperationJournal::start(Arc::clone(&store), start).await;
        let journal = Arc::new(journal.map_err(errors::catalog)?);
        let uploader = Uploader::new(
            store,
            budget,
            Throttle::new(saved.bandwidth),
            Arc::<OperationJournal>::clone(&journal),
            Arc::new(Meter::default()),
            self.cancel.child_token(),
        );
        self.way = Some(Way {
            catalog,
            uploader: uploader.map_err(errors::pipeline)?,
            journal,
            operation,
            begun: Instant::now(),
            lendings,
            seen: None,
        });
        Ok(())
    }

    /// Ends the way into the bucket.
    pub(super) async fn leave(&mut self) {
        if let Some(way) = self.way.take() {
            // Dropped uploads clean up after themselves; the journal is ended when none can be begun.
            drop(way.uploader);
            let _ = timeout(LAST_WORD, way.journal.ended(None)).await;
        }
    }

    /// Looks whether the epoch is still this database's, if that was not seen for a while.
    pub(super) async fn identify(&mut self, database: &Database) -> Result<(), Trouble> {
        let saved = self.saved()?;
        let Some(way) = &mut self.way else {
            return Err(errors::internal("no way into the bucket").into());
        };
        if way.seen.is_some_and(|seen| seen.elapsed() < IDENTITY) {
            return Ok(());
        }
        let place = identity::Place {
            node: saved.node,
            epoch: &saved.epoch,
            system_identifier: database.system_identifier,
            data_directory: &database.data_directory,
        };
        identity::check_in(&way.catalog, &place)
            .await
            .map_err(|error| {
                if error.kind == ErrorKind::Conflict {
                    Trouble::Foreign(error)
                } else {
                    Trouble::Other(error)
                }
            })?;
        way.seen = Some(Instant::now());
        Ok(())
    }

    pub(super) fn transfer(
        &self,
        database: &Database,
        keeper: &Keeper,
    ) -> Result<Transfer, ApiError> {
        let saved = self.saved()?;
        let known = {
            let state = self.shared.state();
            let side = state.side.as_ref();
            side.map(|side| Arc::clone(side.stream.known()))
                .unwrap_or_default()
        };
        self.set_aside(database);
        let memory = self.shared.state().memory.segment.clone();
        let Some(way) = &self.way else {
            return Err(errors::internal("no way into the bucket"));
        };
        Ok(Transfer {
            keeper: keeper.clone(),
            directory: database.wal.clone(),
            system_identifier: database.system_identifier,
            segment_size: database.size,
            node: saved.node,
            epoch: saved.epoch,
            uploader: way.uploader.clone(),
            level: saved.level,
            budget: memory.unwrap_or_else(|| self.shared.budget.clone()),
            known,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: usize = 1 << 20;

    #[test]
    fn what_is_set_aside_stays_and_what_was_missing_is_taken_later() {
        let budget = Budget::new(128 * MIB);
        let others = budget.reserve(108 * MIB, "a copy").unwrap();
        let mut memory = SetAside::default();
        memory.fill(&budget, 16 * MIB);
        assert_eq!(budget.free_bytes(), 12 * MIB, "the upload comes first");
        drop(others);
        for _ in 0..2 {
            memory.fill(&budget, 16 * MIB);
            assert_eq!(budget.free_bytes(), 104 * MIB);
        }
        // One that would take too much of the budget is taken when it is needed.
        let mut large = SetAside::default();
        large.fill(&budget, 64 * MIB);
        assert_eq!(budget.free_bytes(), 96 * MIB);
        assert!(large.segment.is_none());
        drop((memory, large));
        assert_eq!(budget.free_bytes(), 128 * MIB);
    }
}
