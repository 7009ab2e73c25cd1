//! What one operation has to say: its status, and its events in a bounded log that many may follow.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use agent_api::{ApiError, Event, EventKind, OperationStatus, Phase, Progress, Restored};
use catalog::model::{NodeBackup, NodePoint, Verdict};
use jiff::Timestamp;
use pipeline::meter::Meter;
use tokio::sync::watch;
use uuid::Uuid;

/// Events kept for a reader that was away. Phases and warnings are few; progress takes one place.
const EVENTS_KEPT: usize = 2048;
/// Warnings kept in the status; what is above is counted in the last one.
const WARNINGS_KEPT: usize = 500;

/// The status and the events of one operation.
#[derive(Debug)]
pub struct OperationLog {
    operation: Uuid,
    kind: &'static str,
    started: Timestamp,
    meter: Arc<Meter>,
    bytes_total: AtomicU64,
    files_done: AtomicU64,
    wal_segments: AtomicU64,
    state: Mutex<State>,
    /// Sequence number of the newest event, and whether the operation has ended.
    news: watch::Sender<News>,
}

/// What a follower of the log waits for.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct News {
    /// Sequence number of the newest event.
    pub seq: u64,
    /// No event will follow.
    pub ended: bool,
}

#[derive(Debug)]
struct State {
    phase: Phase,
    phase_since: Instant,
    asked: Instant,
    ended: Option<Timestamp>,
    warnings: Vec<String>,
    warnings_dropped: u64,
    error: Option<ApiError>,
    backup: Option<Box<NodeBackup>>,
    point: Option<NodePoint>,
    restored: Option<Restored>,
    decision: Option<Verdict>,
    events: VecDeque<Event>,
    last_progress: Progress,
    next_seq: u64,
}

impl State {
    fn push(&mut self, what: EventKind) {
        if matches!(what, EventKind::Progress { .. }) {
            // Folded: a reader that was away gets the newest figures only.
            let is_progress = |event: &Event| matches!(event.what, EventKind::Progress { .. });
            if let Some(old) = self.events.iter().rposition(is_progress) {
                self.events.remove(old);
            }
        }
        if self.events.len() == EVENTS_KEPT {
            self.events.pop_front();
        }
        self.events.push_back(Event {
            seq: self.next_seq,
            at: Timestamp::now(),
            what,
        });
        self.next_seq += 1;
    }
}

/// Whether an operation in this phase waits for its client.
fn is_waiting(phase: Phase) -> bool {
    matches!(
        phase,
        Phase::Copied | Phase::Ready | Phase::Marked | Phase::Shipped
    )
}

impl OperationLog {
    /// The log of a new operation, in phase `preparing`.
    #[must_use]
    pub fn new(operation: Uuid, kind: &'static str, meter: Arc<Meter>) -> Arc<Self> {
        let now = Instant::now();
        let mut state = State {
            phase: Phase::Preparing,
            phase_since: now,
            asked: now,
            ended: None,
            warnings: Vec::new(),
            warnings_dropped: 0,
            error: None,
            backup: None,
            point: None,
            restored: None,
            decision: None,
            events: VecDeque::new(),
            last_progress: Progress::default(),
            next_seq: 1,
        };
        state.push(EventKind::Phase {
            phase: Phase::Preparing,
        });
        Arc::new(Self {
            operation,
            kind,
            started: Timestamp::now(),
            meter,
            bytes_total: AtomicU64::new(0),
            files_done: AtomicU64::new(0),
            wal_segments: AtomicU64::new(0),
            news: watch::Sender::new(News {
                seq: 1,
                ended: false,
            }),
            state: Mutex::new(state),
        })
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn publish(&self, state: &State) {
        self.news.send_replace(News {
            seq: state.next_seq - 1,
            ended: state.ended.is_some(),
        });
    }

    pub(super) fn phase(&self, phase: Phase) {
        let mut state = self.state();
        if state.ended.is_some() || phase.is_end() {
            return;
        }
        tracing::info!(operation = %self.operation, kind = self.kind, ?phase, "phase");
        state.phase = phase;
        state.phase_since = Instant::now();
        state.push(EventKind::Phase { phase });
        self.publish(&state);
    }

    pub(super) fn current_phase(&self) -> Phase {
        self.state().phase
    }

    pub(super) fn warning(&self, message: String) {
        tracing::warn!(operation = %self.operation, "{message}");
        let mut state = self.state();
        if state.ended.is_some() {
            return;
        }
        if state.warnings.len() == WARNINGS_KEPT {
            state.warnings_dropped += 1;
            return;
        }
        state.warnings.push(message.clone());
        state.push(EventKind::Warning { message });
        self.publish(&state);
    }

    pub(super) fn expect_bytes(&self, more: u64) {
        self.bytes_total.fetch_add(more, Ordering::Relaxed);
    }

    pub(super) fn files_done(&self, more: u64) {
        self.files_done.fetch_add(more, Ordering::Relaxed);
    }

    pub(super) fn wal_segments(&self, more: u64) {
        self.wal_segments.fetch_add(more, Ordering::Relaxed);
    }

    pub(super) fn set_backup(&self, backup: NodeBackup, point: NodePoint) {
        let mut state = self.state();
        state.backup = Some(Box::new(backup));
        state.point = Some(point);
    }

    pub(super) fn set_copy(&self, backup: NodeBackup) {
        self.state().backup = Some(Box::new(backup));
    }

    pub(super) fn set_point(&self, point: NodePoint) {
        self.state().point = Some(point);
    }

    pub(super) fn set_restored(&self, restored: Restored) {
        self.state().restored = Some(restored);
    }

    pub(super) fn set_decision(&self, verdict: Verdict) {
        tracing::info!(operation = %self.operation, ?verdict, "decided");
        self.state().decision = Some(verdict);
    }

    /// The operation has ended, well or with `error`; the first call counts.
    pub(super) fn end(&self, phase: Phase, error: Option<ApiError>) {
        let progress = self.progress();
        let mut state = self.state();
        if state.ended.is_some() {
            return;
        }
        match &error {
            None => tracing::info!(operation = %self.operation, kind = self.kind, "done"),
            Some(error) => tracing::error!(
                operation = %self.operation, kind = self.kind, ?phase, error_kind = ?error.kind,
                changed = error.changed, "{error}"
            ),
        }
        if progress != state.last_progress {
            state.push(EventKind::Progress { progress });
        }
        state.phase = phase;
        state.ended = Some(Timestamp::now());
        state.push(EventKind::Phase { phase });
        if let Some(error) = error {
            state.error = Some(error.clone());
            state.push(EventKind::Error { error });
        }
        self.publish(&state);
    }

    /// How far the operation is.
    #[must_use]
    pub fn progress(&self) -> Progress {
        Progress {
            bytes_total: self.bytes_total.load(Ordering::Relaxed),
            bytes_done: self.meter.plain_bytes(),
            stored_bytes: self.meter.stored_bytes(),
            files_done: self
                .files_done
                .load(Ordering::Relaxed)
                .max(self.meter.files()),
            wal_segments: self.wal_segments.load(Ordering::Relaxed),
        }
    }

    /// Makes a progress event if there is progress. Returns whether the operation is still running.
    pub(super) fn tick(&self) -> bool {
        let progress = self.progress();
        let mut state = self.state();
        if state.ended.is_some() {
            return false;
        }
        if progress != state.last_progress {
            state.last_progress = progress;
            state.push(EventKind::Progress { progress });
            self.publish(&state);
        }
        true
    }

    /// Somebody asked about the operation: it is no orphan.
    pub fn touch(&self) {
        self.state().asked = Instant::now();
    }

    /// For how long nobody has asked about the operation.
    #[must_use]
    pub fn silent_for(&self) -> Duration {
        self.state().asked.elapsed()
    }

    /// For how long the operation has waited for its client with nobody asking about it, and in which
    /// phase; `None` if it does not wait.
    #[must_use]
    pub fn forgotten_for(&self) -> Option<(Duration, Phase)> {
        let state = self.state();
        is_waiting(state.phase).then(|| {
            let since = state.asked.max(state.phase_since);
            (since.elapsed(), state.phase)
        })
    }

    /// The operation as it stands.
    #[must_use]
    pub fn status(&self) -> OperationStatus {
        let progress = self.progress();
        let state = self.state();
        let mut warnings = state.warnings.clone();
        if state.warnings_dropped > 0 {
            let dropped = state.warnings_dropped;
            warnings.push(format!("and {dropped} more warnings, see the agent's log"));
        }
        OperationStatus {
            operation: self.operation,
            kind: self.kind.to_owned(),
            backup_id: None,
            phase: state.phase,
            started: self.started,
            ended: state.ended,
            progress,
            warnings,
            error: state.error.clone(),
            backup: state.backup.clone(),
            point: state.point.clone(),
            restored: state.restored.clone(),
            decision: state.decision,
        }
    }

    /// Whether it has ended.
    #[must_use]
    pub fn has_ended(&self) -> bool {
        self.state().ended.is_some()
    }

    /// The events kept with a sequence number above `after`.
    #[must_use]
    pub fn events_after(&self, after: u64) -> Vec<Event> {
        let state = self.state();
        let first = state.events.partition_point(|event| event.seq <= after);
        state.events.range(first..).cloned().collect()
    }

    /// Tells of every new event.
    #[must_use]
    pub fn follow(&self) -> watch::Receiver<News> {
        self.news.subscribe()
    }
}
