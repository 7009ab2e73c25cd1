//! The bucket as a model sees it: every call of every operator waits until the schedule lets it happen, and
//! whatever happens is checked against what must always hold.

use std::collections::{BTreeMap, VecDeque};
use std::ops::Range;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Poll, Waker};
use std::time::{Duration, SystemTime};

use async_trait::async_trait;
use bytes::Bytes;
use catalog::envelope;
use catalog::ids::BackupId;
use catalog::keys;
use catalog::model::{Decision, Lease, LeaseScope, LeaseState, Manifest, ManifestState, Verdict};
use futures_util::StreamExt as _;
use futures_util::stream::BoxStream;
use pipeline::store::{
    Detail, Key, ObjectBody, ObjectMeta, ObjectStore, Part, Sha256Digest, StoreError, UploadId,
};
use support::memory_store::MemoryStore;
use uuid::Uuid;

/// What the tested program does not do, to see that the model finds it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Broken {
    /// Nothing is missing.
    Nothing,
    /// Fences are not written.
    Fence,
    /// Whoever deletes does not look for pins again after its tombstone.
    SecondLook,
    /// A taker does not look whether its lease is the highest.
    ListAfterCreate,
}

/// What becomes of a call that is let through.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Fate {
    /// It takes effect and is answered.
    Answered,
    /// It takes effect and its reply is lost.
    Lost,
}

#[derive(Debug)]
struct Call {
    ticket: u64,
    /// Only of these a reply can be lost so that it matters.
    is_write: bool,
    /// Of the future that waits: it may be one of many that are polled only when woken.
    waker: Option<Waker>,
}

#[derive(Debug, Default)]
struct Gate {
    waiting: VecDeque<Call>,
    granted: BTreeMap<u64, Fate>,
}

/// A lease as its holder was told that it has it.
#[derive(Debug, Clone)]
struct Holding {
    scope: LeaseScope,
    operation: Uuid,
    seq: u64,
    from: SystemTime,
    until: SystemTime,
}

#[derive(Debug, Default)]
struct State {
    gates: BTreeMap<usize, Gate>,
    next_ticket: u64,
    /// Everything that was done, for the message of a violation.
    trace: Vec<String>,
    holdings: Vec<Holding>,
    /// Fences, tombstones and decisions as they were first written.
    kept: BTreeMap<Key, Bytes>,
    readers: BTreeMap<Uuid, BackupId>,
    /// The lease object that each operator created last, until it looked.
    last_lease: BTreeMap<usize, Key>,
    /// The first thing that must not be.
    violation: Option<String>,
}

/// All that operators share.
#[derive(Debug)]
pub(crate) struct World {
    pub(crate) store: Arc<MemoryStore>,
    pub(crate) broken: Broken,
    state: Mutex<State>,
}

impl World {
    pub(crate) fn new(store: Arc<MemoryStore>, broken: Broken) -> Arc<Self> {
        Arc::new(Self {
            store,
            broken,
            state: Mutex::default(),
        })
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The calls of `actor` that wait, by whether they write.
    pub(crate) fn waiting(&self, actor: usize) -> Option<bool> {
        let state = self.state();
        Some(state.gates.get(&actor)?.waiting.front()?.is_write)
    }

    /// Lets the call of `actor` through that has waited longest.
    pub(crate) fn grant(&self, actor: usize, fate: Fate) {
        let mut state = self.state();
        let gate = state.gates.entry(actor).or_default();
        let call = gate.waiting.pop_front().expect("a call that waits");
        gate.granted.insert(call.ticket, fate);
        if let Some(waker) = call.waker {
            waker.wake();
        }
    }

    pub(crate) fn note(&self, what: String) {
        self.state().trace.push(what);
    }

    pub(crate) fn trace(&self) -> String {
        self.state().trace.join("\n")
    }

    pub(crate) fn violation(&self) -> Option<String> {
        self.state().violation.clone()
    }

    pub(crate) fn violated(&self, what: String) {
        self.state().violation.get_or_insert(what);
    }

    /// Somebody was told that it holds this lease, which must then be nobody else's.
    pub(crate) async fn holds(&self, lease: &Lease) {
        let written = self.store.head(&keys::lease(lease.scope, lease.seq)).await;
        // Removed already: there is a newer one, and whoever wrote that was told so.
        let Ok(meta) = written else { return };
        let from = meta.last_modified.expect("a date");
        let new = Holding {
            scope: lease.scope,
            operation: lease.operation,
            seq: lease.seq,
            from,
            until: from + Duration::from_millis(lease.ttl_ms),
        };
        let mut state = self.state();
        let overlaps = |old: &&Holding| {
            old.scope == new.scope
                && old.operation != new.operation
                && old.from < new.until
                && new.from < old.until
        };
        if let Some(old) = state.holdings.iter().find(overlaps) {
            let what = format!("two hold a lease at the same store time: {old:?} and {new:?}");
            state.violation.get_or_insert(what);
        }
        state.holdings.push(new);
    }

    pub(crate) fn reads(&self, operation: Uuid, backup: Option<&BackupId>) {
        let mut state = self.state();
        match backup {
            Some(backup) => state.readers.insert(operation, backup.clone()),
            None => state.readers.remove(&operation),
        };
    }

    /// Whether somebody else took the scope over after `operation` had it.
    fn taken_over(state: &State, scope: LeaseScope, operation: Uuid) -> Option<Holding> {
        let of_scope = |holding: &&Holding| holding.scope == scope;
        let last = state
            .holdings
            .iter()
            .filter(of_scope)
            .filter(|holding| holding.operation == operation)
            .map(|holding| holding.seq)
            .max()?;
        state
            .holdings
            .iter()
            .filter(of_scope)
            .find(|holding| holding.operation != operation && holding.seq > last)
            .cloned()
    }

    fn decision(&self, operation: Uuid) -> Option<Verdict> {
        let key = keys::decision(operation);
        let stored = self.store.bytes(key.as_str())?;
        let decision: Decision = envelope::open(&key, &stored).expect("a decision");
        Some(decision.verdict)
    }

    fn manifest(&self, key: &Key) -> Option<Manifest> {
        let stored = self.store.bytes(key.as_str())?;
        Some(envelope::open(key, &stored).expect("a manifest"))
    }

    /// After an object was created.
    fn created(&self, actor: usize, key: &Key, body: &Bytes, at: SystemTime) {
        let name = key.as_str();
        if name.starts_with("lease/") {
            let lease: Lease = envelope::open(key, body).expect("a lease");
            let mut state = self.state();
            state.last_lease.insert(actor, key.clone());
            let its =
                |old: &&mut Holding| old.scope == lease.scope && old.operation == lease.operation;
            if lease.state == LeaseState::Released {
                for holding in state.holdings.iter_mut().filter(its) {
                    holding.until = holding.until.min(at);
                }
            }
            return;
        }
        if name.ends_with("/manifest.json") {
            let manifest = self.manifest(key).expect("it was just written");
            if manifest.state == ManifestState::Complete {
                let state = &mut *self.state();
                let operation = manifest.operation;
                if let Some(taker) = Self::taken_over(state, LeaseScope::Backup, operation) {
                    let what =
                        format!("{name} was completed by {operation}, after {taker:?} took over");
                    state.violation.get_or_insert(what);
                }
                return;
            }
        } else if name.ends_with("/decision.json") {
            let decision: Decision = envelope::open(key, body).expect("a decision");
            let state = &mut *self.state();
            let taker = Self::taken_over(state, LeaseScope::Restore, decision.operation);
            if let (Verdict::Commit, Some(taker)) = (decision.verdict, taker) {
                let what = format!("{name} commits, after {taker:?} took over");
                state.violation.get_or_insert(what);
            }
        } else if !name.ends_with("/deleted.json") {
            return;
        }
        self.state().kept.insert(key.clone(), body.clone());
    }

    /// After objects were deleted.
    fn deleted(&self, gone: &[Key]) {
        let readers = self.state().readers.clone();
        for (operation, backup) in readers {
            let prefix = format!("backups/{backup}/");
            let its = gone.iter().find(|key| key.as_str().starts_with(&prefix));
            // Once it is decided it has read everything, or goes back.
            if let (Some(key), None) = (its, self.decision(operation)) {
                self.violated(format!("{key} was deleted while {operation} read it"));
            }
        }
    }

    /// What must hold at any time.
    pub(crate) fn check(&self) {
        for (key, body) in self.state().kept.clone() {
            if self.store.bytes(key.as_str()).as_ref() != Some(&body) {
                self.violated(format!("{key} was written, and is not what it was"));
            }
        }
        let all = self.store.keys();
        for key in &all {
            let name = key.as_str();
            let Some(folder) = name.strip_suffix("/manifest.json") else {
                continue;
            };
            let tombstone = Key::new(format!("{folder}/deleted.json")).expect("a key");
            let Some(manifest) = self.manifest(key) else {
                continue;
            };
            if manifest.state != ManifestState::Complete || all.contains(&tombstone) {
                continue;
            }
            let id = &manifest.backup_id;
            let mut needed = vec![];
            for node in &manifest.nodes {
                needed.push(keys::index(id, node.node_id, node.attempt));
                needed.extend(
                    node.packs
                        .iter()
                        .map(|pack| keys::pack(id, node.node_id, node.attempt, pack.number)),
                );
            }
            needed.extend(manifest.point.as_ref().map(keys::point));
            for object in needed {
                if !all.contains(&object) {
                    self.violated(format!("{name} is listed and lacks {object}"));
                }
            }
        }
    }
}

/// The store as one operator has it.
#[derive(Debug)]
pub(crate) struct Stepped {
    pub(crate) actor: usize,
    pub(crate) world: Arc<World>,
}

/// Takes a call out of the queue when it is dropped before it was let through.
struct Ticket<'a> {
    at: &'a Stepped,
    number: u64,
}

impl Drop for Ticket<'_> {
    fn drop(&mut self) {
        let mut state = self.at.world.state();
        let gate = state.gates.entry(self.at.actor).or_default();
        gate.waiting.retain(|call| call.ticket != self.number);
        gate.granted.remove(&self.number);
    }
}

impl Stepped {
    async fn step(&self, is_write: bool, verb: &str, about: &str) -> Fate {
        // The repository's name and the log decide nothing of what is tried here: to interleave them too
        // would only multiply the schedules.
        if about == "repository.json" || about.starts_with("log/") {
            return Fate::Answered;
        }
        let what = format!("{verb} {about}");
        let number = {
            let mut state = self.world.state();
            state.next_ticket += 1;
            let ticket = state.next_ticket;
            let call = Call {
                ticket,
                is_write,
                waker: None,
            };
            let gate = state.gates.entry(self.actor).or_default();
            gate.waiting.push_back(call);
            ticket
        };
        let ticket = Ticket { at: self, number };
        let fate = std::future::poll_fn(|cx| {
            let mut state = self.world.state();
            let gate = state.gates.entry(self.actor).or_default();
            if let Some(fate) = gate.granted.remove(&ticket.number) {
                return Poll::Ready(fate);
            }
            let its = |call: &&mut Call| call.ticket == ticket.number;
            if let Some(call) = gate.waiting.iter_mut().find(its) {
                call.waker = Some(cx.waker().clone());
            }
            Poll::Pending
        })
        .await;
        self.world
            .note(format!("operator {}: {what} ({fate:?})", self.actor));
        fate
    }

    fn is_fence(key: &Key, body: &Bytes) -> bool {
        let (manifest, decision) = (
            key.as_str().ends_with("/manifest.json"),
            key.as_str().ends_with("/decision.json"),
        );
        let text = String::from_utf8_lossy(body);
        manifest && text.contains(r#""state":"abandoned""#)
            || decision && text.contains(r#""verdict":"rollback""#)
    }
}

#[async_trait]
impl ObjectStore for Stepped {
    fn describe(&self) -> String {
        "memory, step by step (a stand-in)".into()
    }

    async fn now(&self) -> Result<SystemTime, StoreError> {
        self.step(false, "asks", "the time").await;
        self.world.store.now().await
    }

    async fn put_if_absent(&self, key: &Key, body: Bytes) -> Result<ObjectMeta, StoreError> {
        let fate = self.step(true, "creates", key.as_str()).await;
        if self.world.broken == Broken::Fence && Self::is_fence(key, &body) {
            return self.world.store.head(&keys::repository()).await;
        }
        let done = self.world.store.put_if_absent(key, body.clone()).await;
        if done.is_ok() {
            let meta = self.world.store.head(key).await?;
            let at = meta.last_modified.expect("a date");
            self.world.created(self.actor, key, &body, at);
        } else {
            self.world.note("    it is there".to_owned());
        }
        self.world.check();
        if fate == Fate::Lost {
            let detail = Detail::new("put", key.as_str(), "reply lost");
            return Err(StoreError::UnknownOutcome(detail));
        }
        done
    }

    async fn get(&self, key: &Key, range: Option<Range<u64>>) -> Result<ObjectBody, StoreError> {
        self.step(false, "reads", key.as_str()).await;
        self.world.store.get(key, range).await
    }

    async fn head(&self, key: &Key) -> Result<ObjectMeta, StoreError> {
        self.step(false, "looks at", key.as_str()).await;
        self.world.store.head(key).await
    }

    fn list(&self, prefix: &str) -> BoxStream<'static, Result<ObjectMeta, StoreError>> {
        let (prefix, again) = (
            prefix.to_owned(),
            Self {
                actor: self.actor,
                world: Arc::clone(&self.world),
            },
        );
        let listed = async move {
            again.step(false, "lists", &prefix).await;
            let found = again.world.store.list(&prefix);
            let own = again.world.state().last_lease.remove(&again.actor);
            let blind = again.world.broken == Broken::ListAfterCreate;
            let seen = move |key: &Key| match &own {
                Some(own) if blind => key <= own,
                _ => true,
            };
            found.filter(move |object| {
                let keep = object.as_ref().is_ok_and(|object| seen(&object.key));
                std::future::ready(keep)
            })
        };
        futures_util::stream::once(listed).flatten().boxed()
    }

    async fn delete(&self, keys: &[Key]) -> Result<Vec<StoreError>, StoreError> {
        let names: Vec<_> = keys.iter().map(Key::as_str).collect();
        let fate = self.step(true, "deletes", &names.join(", ")).await;
        let there: Vec<Key> = keys
            .iter()
            .filter(|key| self.world.store.bytes(key.as_str()).is_some())
            .cloned()
            .collect();
        let done = self.world.store.delete(keys).await;
        self.world.deleted(&there);
        self.world.check();
        if fate == Fate::Lost {
            let detail = Detail::new("delete", "", "reply lost");
            return Err(StoreError::UnknownOutcome(detail));
        }
        done
    }

    async fn create_upload(&self, _: &Key) -> Result<UploadId, StoreError> {
        unreachable!("no operator of the model uploads in parts")
    }

    async fn upload_part(
        &self,
        _: &Key,
        _: &UploadId,
        _: u32,
        _: Bytes,
        _: Sha256Digest,
    ) -> Result<Part, StoreError> {
        unreachable!("no operator of the model uploads in parts")
    }

    async fn complete_if_absent(
        &self,
        _: &Key,
        _: &UploadId,
        _: &[Part],
    ) -> Result<ObjectMeta, StoreError> {
        unreachable!("no operator of the model uploads in parts")
    }

    async fn abort_upload(&self, _: &Key, _: &UploadId) -> Result<(), StoreError> {
        unreachable!("no operator of the model uploads in parts")
    }

    async fn list_uploads(&self, _: &Key) -> Result<Vec<UploadId>, StoreError> {
        Ok(Vec::new())
    }

    async fn list_parts(&self, _: &Key, _: &UploadId) -> Result<Vec<Part>, StoreError> {
        unreachable!("no operator of the model uploads in parts")
    }
}
