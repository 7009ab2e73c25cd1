//! The task: a session with the database, what holds its WAL, the way into the bucket, and segment after segment. Whatever may
//! pass is tried again for ever, with growing pauses; what may not ends the stretch.

use std::convert::Infallible;
use std::sync::Arc;
use std::time::{Duration, Instant};

use agent_api::{ApiError, ErrorKind};
use agent_sql::{Flavour, NodeConnection};
use agent_wal::{Lsn, SegmentName, SegmentSize};
use tokio::time::{sleep, timeout};
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

use super::begin::{self, Database, Joined};
use super::saved::{Saved, Stretch};
use super::stream::StreamSide;
use super::way::{SetAside, Way};
use super::{NEW_BASE, Shared};
use crate::database::connect_options;
use crate::engine::wal_hold::{mend, why_not_ours};
use crate::engine::{control, errors, node, slot};
use crate::wal::hold::HoldLimit;
use crate::wal::keeper::Keeper;
use crate::wal::ship::{PERIOD, wal_directory};
use crate::wal::transfer::{blocking, guard};
use crate::wal::trouble::Trouble;

/// First and longest pause before something is tried again.
const PAUSES: (Duration, Duration) = (Duration::from_millis(500), Duration::from_secs(30));
/// A session that has lasted so long went well.
const WELL: Duration = Duration::from_mins(1);

/// The task's own state.
pub(super) struct Run {
    pub(super) shared: Arc<Shared>,
    pub(super) cancel: CancellationToken,
    /// This life of the service, for the archive gate.
    id: Uuid,
    pub(super) way: Option<Way>,
    pause: Duration,
}

impl Run {
    pub(super) fn new(shared: Arc<Shared>, cancel: CancellationToken) -> Self {
        Self {
            shared,
            cancel,
            id: Uuid::now_v7(),
            way: None,
            pause: PAUSES.0,
        }
    }

    /// Runs until it is cancelled or refused.
    pub(super) async fn run(mut self) {
        loop {
            let begun = Instant::now();
            let cancel = self.cancel.clone();
            let trouble = tokio::select! {
                biased;
                () = cancel.cancelled() => break,
                trouble = self.session() => match trouble {
                    Ok(never) => match never {},
                    Err(trouble) => trouble,
                },
            };
            if begun.elapsed() > WELL {
                self.pause = PAUSES.0;
            }
            match trouble {
                Trouble::Gone(error) | Trouble::Overrun(error) => self.broken(&error).await,
                Trouble::Foreign(error) => {
                    self.refused(&error).await;
                    break;
                }
                Trouble::Other(error) => self.note(&error),
            }
            tokio::select! {
                () = cancel.cancelled() => break,
                () = self.rest() => {}
            }
        }
        self.leave().await;
    }

    /// Waits before the next try, each time longer, or until somebody helps.
    async fn rest(&mut self) {
        let pause = self.pause.mul_f64(rand::random_range(0.7..1.0));
        self.pause = (self.pause * 2).min(PAUSES.1);
        let _ = timeout(pause, self.shared.woken.notified()).await;
    }

    pub(super) fn saved(&self) -> Result<Saved, ApiError> {
        let saved = self.shared.state().saved.clone();
        // Whoever takes it away ends this task first.
        saved.ok_or_else(|| errors::internal("nothing is to be shipped"))
    }

    async fn update(&self, change: impl FnOnce(&mut Saved)) {
        if let Some(saved) = &mut self.shared.state().saved {
            change(saved);
        }
        self.shared.keep().await;
    }

    /// Shows what is in the way. The same is logged once.
    fn note(&self, error: &ApiError) {
        let mut state = self.shared.state();
        state.shown.running = false;
        if state.shown.error.as_ref() != Some(error) {
            tracing::warn!("shipping WAL is tried again: {error}");
            state.shown.error = Some(error.clone());
        }
    }

    /// One session, as long as it lasts.
    async fn session(&mut self) -> Result<Infallible, Trouble> {
        let options = connect_options(&self.shared.config, "gs_pitr WAL service")?;
        let sql = NodeConnection::connect(&options, self.cancel.clone()).await?;
        let database = self.database(&sql).await?;
        // Before anybody follows: whoever does shares what is left.
        self.set_aside(&database);
        let saved = self.saved()?;
        let keeper = self.keeper(&sql, &database, &saved).await?;
        if let Some(stretch) = saved.stretch {
            self.still_held(&sql, &database, &keeper, stretch).await?;
        } else {
            self.begin(&sql, &database, &keeper).await?;
        }
        self.stream()?;
        let saved = self.saved()?;
        let own = self.shared.config.wal_hold;
        let limit = HoldLimit {
            limit: [own, saved.hold].into_iter().flatten().min(),
            segment_size: database.size.bytes(),
        };
        let shared = Arc::clone(&self.shared);
        let held = |bytes| shared.state().shown.held = Some(bytes);
        tokio::select! {
            biased;
            // First: a hold that has grown too much ends everything, whatever hangs.
            trouble = guard(&sql, &keeper, &database.wal, limit, held) => trouble,
            trouble = self.ship(&sql, &database, &keeper) => trouble,
        }
    }

    async fn database(&self, sql: &NodeConnection) -> Result<Database, Trouble> {
        let facts = sql.server_facts().await?;
        if facts.in_recovery {
            return Err(begin::refuse_standby().into());
        }
        node::fits_memory(&facts, self.shared.budget.total_bytes() as u64)?;
        let (configured, about) = (self.shared.config.pgdata.clone(), facts.clone());
        let read = blocking(move || {
            let pgdata =
                node::data_directory(configured.as_deref(), about.data_directory.as_ref())?;
            let control = control::read(&pgdata).map_err(errors::copy)?.parsed;
            if control.system_identifier != about.system_identifier {
                return Err(node::elsewhere(&pgdata));
            }
            Ok((pgdata, control.wal_segment_size))
        });
        let (pgdata, size) = read.await??;
        Ok(Database {
            flavour: facts.flavour,
            system_identifier: facts.system_identifier,
            data_directory: facts.data_directory,
            wal: pgdata.join(wal_directory(facts.flavour)),
            size,
        })
    }

    /// What holds WAL, or will when the stretch begins.
    async fn keeper(
        &self,
        sql: &NodeConnection,
        database: &Database,
        saved: &Saved,
    ) -> Result<Keeper, Trouble> {
        if database.flavour == Flavour::PostgreSql {
            return Ok(Keeper::Slot(begin::slot_name(saved.node)));
        }
        let config = &self.shared.config;
        let archiving = sql.archiving().await?;
        if let Some(why) = why_not_ours(&archiving, &config.archive_socket) {
            let message = format!("the database does not keep its WAL for this agent: {why}");
            let error = ApiError::new(ErrorKind::Database, message);
            return Err(error.next(mend(&config.archive_socket)).into());
        }
        begin::hold_archive(config).map_err(errors::internal)?;
        let mut state = self.shared.state();
        let gate = &self.shared.gate;
        let held = state
            .held
            .get_or_insert_with(|| gate.hold(self.id, database.size));
        Ok(Keeper::Archive(held.handle()))
    }

    /// Whether all that is not in the bucket is there, on the same timeline.
    async fn still_held(
        &self,
        sql: &NodeConnection,
        database: &Database,
        keeper: &Keeper,
        stretch: Stretch,
    ) -> Result<(), Trouble> {
        if stretch.size() != Some(database.size) {
            return Err(Trouble::Foreign(other_history(
                "its WAL segments have another size",
            )));
        }
        let position = sql.wal_position().await?;
        if position.timeline != stretch.timeline {
            let why = format!(
                "it went from timeline {} to {}",
                stretch.timeline, position.timeline
            );
            return Err(Trouble::Foreign(other_history(&why)));
        }
        if position.insert < stretch.shipped() {
            let why = format!("it stands at {}, before what was shipped", position.insert);
            return Err(Trouble::Foreign(other_history(&why)));
        }
        let next = stretch.next();
        let file = next.format(database.size);
        keeper.check(sql, next.end_lsn(database.size), &file).await
    }

    /// Begins a stretch where the database stands. Nothing is held if it does not succeed.
    async fn begin(
        &mut self,
        sql: &NodeConnection,
        database: &Database,
        keeper: &Keeper,
    ) -> Result<(), Trouble> {
        self.open().await?;
        self.identify(database).await?;
        let begun = self.begin_held(sql, database, keeper).await;
        if begun.is_err()
            && let Keeper::Slot(name) = keeper
        {
            // The session may be lost; another try begins with its end all the same.
            let _ = slot::drop_left(&self.shared.config, name).await;
        }
        begun
    }

    async fn begin_held(
        &self,
        sql: &NodeConnection,
        database: &Database,
        keeper: &Keeper,
    ) -> Result<(), Trouble> {
        let kept = match keeper {
            Keeper::Slot(name) => {
                // Before it is there: whoever finds it knows whose it is.
                self.update(|saved| saved.slot = Some(name.clone())).await;
                sql.drop_slot(name).await?;
                sql.create_slot(name).await?;
                keeper.kept_from(sql).await?
            }
            Keeper::Archive(_) | Keeper::Nobody => None,
        };
        let first = begin::first_segment(sql, database, kept).await?;
        keeper
            .advance(sql, kept.unwrap_or(first.start_lsn(database.size)))
            .await?;
        let Some(way) = &self.way else {
            return Err(errors::internal("no way into the bucket").into());
        };
        let saved = self.saved()?;
        // What the bucket says counts where nothing is remembered: a gap may be older than this order.
        let forgotten = saved.wants_base && saved.gap.is_none();
        let joined =
            begin::declare_gap(&way.catalog, way.operation, &saved, (first, database.size)).await?;
        let wanted = match joined {
            Joined::Before if forgotten => begin::wants_base(&way.catalog, &saved).await?,
            Joined::Before => saved.wants_base,
            Joined::Nothing | Joined::Gap(_) => true,
        };
        self.update(|saved| {
            saved.stretch = Some(Stretch::new(first, database.size));
            saved.broken = None;
            saved.wants_base = wanted;
            if let Joined::Gap(gap) = joined {
                saved.gap = Some(gap);
            }
        })
        .await;
        Ok(())
    }

    /// Lets others follow the stretch.
    fn stream(&self) -> Result<(), ApiError> {
        let mut state = self.shared.state();
        let saved = state.saved.as_ref();
        let stretch =
            saved.and_then(|saved| Some((saved.node, saved.epoch.clone(), saved.stretch?)));
        let Some((node, epoch, stretch)) = stretch else {
            return Err(errors::internal("no stretch of WAL has begun"));
        };
        let size = stretch
            .size()
            .ok_or_else(|| errors::internal("no WAL segment has that size"))?;
        state.side.get_or_insert_with(|| {
            StreamSide::new(
                (node, epoch),
                (stretch.first(), size),
                stretch.shipped(),
                Arc::clone(&self.shared.based),
            )
        });
        Ok(())
    }

    /// Ships, and tries again what may pass, for as long as the session lasts and WAL is held.
    async fn ship(
        &mut self,
        sql: &NodeConnection,
        database: &Database,
        keeper: &Keeper,
    ) -> Result<Infallible, Trouble> {
        loop {
            let trouble = match self.shipping(sql, database, keeper).await {
                Ok(()) => continue,
                Err(trouble) => trouble,
            };
            let Trouble::Other(error) = trouble else {
                return Err(trouble);
            };
            if sql.is_lost() {
                return Err(Trouble::Other(error));
            }
            self.note(&error);
            self.rest().await;
        }
    }

    /// Ships until the way into the bucket is to be opened anew.
    async fn shipping(
        &mut self,
        sql: &NodeConnection,
        database: &Database,
        keeper: &Keeper,
    ) -> Result<(), Trouble> {
        self.open().await?;
        self.identify(database).await?;
        let transfer = self.transfer(database, keeper)?;
        transfer.histories().await?;
        let (nudge, based) = {
            let state = self.shared.state();
            let side = state.side.as_ref().map(|side| side.stream.nudger());
            (side.unwrap_or_default(), Arc::clone(&self.shared.based))
        };
        loop {
            if !self.is_open() {
                return Ok(());
            }
            self.identify(database).await?;
            let position = sql.wal_position().await?;
            let next = self.next(position.timeline, position.flush, database.size)?;
            if let Some(next) = next {
                transfer.segment(sql, next, &self.cancel).await?;
                // Remembered first: a slot that is ahead of what is remembered would look like one that somebody moved.
                self.shipped(next, database.size).await;
                transfer.let_go(sql, next).await?;
                continue;
            }
            tokio::select! {
                () = nudge.notified() => {}
                () = based.notified() => {
                    self.update(|saved| {
                        saved.wants_base = false;
                        saved.gap = None;
                    })
                    .await;
                }
                () = sleep(PERIOD) => {}
            }
        }
    }

    /// The next segment, if it is whole.
    fn next(
        &self,
        timeline: u32,
        flush: Lsn,
        size: SegmentSize,
    ) -> Result<Option<SegmentName>, Trouble> {
        let mut state = self.shared.state();
        let stretch = state.saved.as_ref().and_then(|saved| saved.stretch);
        let stretch = stretch.ok_or_else(|| errors::internal("no stretch of WAL has begun"))?;
        if timeline != stretch.timeline {
            let why = format!("it went from timeline {} to {timeline}", stretch.timeline);
            return Err(Trouble::Foreign(other_history(&why)));
        }
        let shown = &mut state.shown;
        shown.flushed = Some(flush);
        let next = Some(stretch.next()).filter(|next| flush >= next.end_lsn(size));
        if next.is_some() {
            shown.behind.get_or_insert_with(Instant::now);
        } else {
            shown.behind = None;
            if !shown.running {
                shown.running = true;
                shown.error = None;
            }
        }
        Ok(next)
    }

    async fn shipped(&mut self, segment: SegmentName, size: SegmentSize) {
        self.pause = PAUSES.0;
        let end = segment.end_lsn(size);
        {
            let mut state = self.shared.state();
            if let Some(stretch) = state
                .saved
                .as_mut()
                .and_then(|saved| saved.stretch.as_mut())
            {
                stretch.advance(segment.next());
            }
            if let Some(side) = &state.side {
                side.shipped.send_replace(end);
            }
            state.shown.running = true;
            state.shown.error = None;
            // It counts from the oldest that waits.
            state.shown.behind = None;
        }
        self.shared.keep().await;
    }

    /// The stretch ends in a gap: the hold is let go, and the next session begins another.
    async fn broken(&mut self, error: &ApiError) {
        tracing::error!("WAL is lost to the bucket: {error}");
        // Nothing is held again before the store has answered.
        if let Some(way) = &mut self.way {
            way.seen = None;
        }
        let slot = {
            let mut state = self.shared.state();
            let told = ApiError::new(
                error.kind,
                format!("the WAL that is shipped all the time has a gap: {error}"),
            );
            state.end(&told.next(NEW_BASE));
            state.held = None;
            state.shown.held = None;
            state.shown.running = false;
            state.shown.error = Some(error.clone().next(NEW_BASE));
            if let Some(saved) = &mut state.saved {
                saved.break_off(&error.message);
                saved.wants_base = true;
            }
            state.saved.as_ref().and_then(|saved| saved.slot.clone())
        };
        self.shared.keep().await;
        begin::let_go_of_archive(&self.shared.config);
        if let Some(slot) = slot
            && let Err(error) = slot::drop_left(&self.shared.config, &slot).await
        {
            tracing::error!(%error, "the next stretch begins with dropping it");
        }
    }

    /// Writes nothing from now on, and holds nothing.
    async fn refused(&mut self, error: &ApiError) {
        tracing::error!("WAL is shipped no more: {error}");
        let slot = {
            let mut state = self.shared.state();
            state.refuse(error);
            state.held = None;
            state.memory = SetAside::default();
            state.saved.as_mut().and_then(|saved| saved.slot.take())
        };
        self.shared.keep().await;
        begin::let_go_of_archive(&self.shared.config);
        if let Some(slot) = slot
            && let Err(error) = slot::drop_left(&self.shared.config, &slot).await
        {
            tracing::error!(%error, "a slot was left");
        }
    }
}

/// The database has another history than the epoch.
fn other_history(why: &str) -> ApiError {
    let message = format!(
        "the database is not what it was when its WAL was shipped: {why}; it was restored or promoted meanwhile, and nothing \
         more is written into its epoch"
    );
    ApiError::new(ErrorKind::Conflict, message)
        .next("gs_pitr backup: it finds out, and begins anew")
}
