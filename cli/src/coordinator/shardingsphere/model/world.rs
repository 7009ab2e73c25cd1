//! A cluster in virtual time: two proxies that follow a shared state late, two nodes, watchdogs, clients. Each message is a task of its own, so
//! that it lands although its sender has gone.

use std::cell::{Cell, RefCell};
use std::collections::{BTreeMap, BTreeSet};
use std::rc::Rc;
use std::time::Duration;

use super::time::{now, sleep, sleep_until, spawn};
use rand::rngs::StdRng;
use rand::{RngExt as _, SeedableRng as _};
use tokio::sync::Notify;

pub(super) const PROXIES: usize = 2;
pub(super) const NODES: usize = 2;

pub(super) fn ms(ms: u64) -> Duration {
    Duration::from_millis(ms)
}

/// Who locked.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Owner {
    Us,
    Foreign,
}

/// An UNLOCK of ours.
#[derive(Debug, Clone, Copy)]
pub(super) struct OurUnlock {
    sent: Duration,
    /// Nobody could tell whose lock it would release: what became of a LOCK is not known, a watchdog unlocks, or the lock had gone and
    /// nobody had seen it.
    in_doubt: bool,
}

/// What may go wrong in a run.
#[derive(Debug, Clone, Copy, Default)]
#[expect(clippy::struct_excessive_bools, reason = "each may go wrong by itself")]
pub(super) struct Faults {
    /// Replies are lost.
    pub(super) lost: bool,
    /// Proxies freeze and thaw, so that what was sent to them lands late.
    pub(super) freeze: bool,
    /// Proxies are cut off from the shared state for a while.
    pub(super) cut: bool,
    /// Somebody holds the mutex of the lock: LOCK and UNLOCK say success and do nothing.
    pub(super) mutex: bool,
    /// The program dies at its n-th step.
    pub(super) death: Option<u32>,
    /// Another locks now and then.
    pub(super) foreign: bool,
    /// Nodes crash and come back, most of all right after a restore point.
    pub(super) crash: bool,
    /// An agent is restarted, and knows nothing of its copy any more.
    pub(super) forget: bool,
}

#[derive(Debug, Clone)]
struct ProxyState {
    locked: bool,
    version: u64,
    frozen_until: Duration,
    cut_until: Duration,
}

#[derive(Debug, Clone, Default)]
pub(super) struct NodeState {
    /// Transactions that hold an id, with the time since when.
    pub(super) holders: BTreeMap<u64, Duration>,
    /// Transactions that have ended.
    pub(super) ended: u64,
    /// Transactions whose commit is in the WAL, with their place in the order of all events.
    in_wal: BTreeMap<u64, u64>,
    /// Restore points, with theirs.
    marks: BTreeMap<String, u64>,
    /// All before this place is on disk.
    flushed: u64,
    /// How often it has crashed, and when it is back.
    pub(super) crashes: u64,
    pub(super) down_until: Duration,
}

impl NodeState {
    pub(super) fn is_down(&self) -> bool {
        self.down_until > now()
    }
}

/// What was seen to go wrong.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Wrong {
    Torn(u64),
    /// A point that stands has no restore point on this node.
    Missing(usize),
    StaysLocked,
    HeldTooLong(Duration),
    ForeignReleased,
    LockedBesideWatchdog,
}

pub(super) struct World {
    rng: RefCell<StdRng>,
    pub(super) faults: Faults,
    proxies: RefCell<Vec<ProxyState>>,
    pub(super) nodes: RefCell<Vec<NodeState>>,
    /// Who locked the cluster, since when.
    shared: Cell<Option<(Owner, Duration)>>,
    version: Cell<u64>,
    mutex_until: Cell<Duration>,
    /// For how long somebody has held the mutex in all.
    blocked: Cell<Duration>,
    events: Cell<u64>,
    transactions: Cell<u64>,
    /// Transactions that a crash has cut: no lock and no proof makes them whole.
    cut: RefCell<BTreeSet<u64>>,
    /// Since when an agent knows nothing of its copy.
    pub(super) forgot: Cell<Option<Duration>>,
    /// Nothing new begins.
    pub(super) stopped: Cell<bool>,
    steps: Cell<u32>,
    pub(super) death: Notify,
    pub(super) dead: Cell<bool>,
    /// Watchdogs that unlock.
    pub(super) fired: Cell<usize>,
    /// What became of our last LOCK is not known to anybody.
    pub(super) unknown: Cell<bool>,
    /// Whether our last lock went.
    released: Cell<bool>,
    /// Whether the program has seen that: a proxy that it saw refuse lets writes pass.
    pub(super) seen_gone: Cell<bool>,
    /// When a LOCK of ours last came that said success and did nothing.
    in_vain: Cell<Option<Duration>>,
    pub(super) longest: Cell<Duration>,
    pub(super) locks: Cell<u32>,
    pub(super) wrong: RefCell<Vec<Wrong>>,
}

impl World {
    pub(super) fn new(seed: u64, faults: Faults) -> Rc<Self> {
        let now = now();
        let proxy = ProxyState {
            locked: false,
            version: 0,
            frozen_until: now,
            cut_until: now,
        };
        Rc::new(Self {
            rng: RefCell::new(StdRng::seed_from_u64(seed)),
            faults,
            proxies: RefCell::new(vec![proxy; PROXIES]),
            nodes: RefCell::new(vec![NodeState::default(); NODES]),
            shared: Cell::default(),
            version: Cell::new(0),
            mutex_until: Cell::new(now),
            blocked: Cell::default(),
            events: Cell::new(0),
            transactions: Cell::new(0),
            cut: RefCell::default(),
            forgot: Cell::default(),
            stopped: Cell::new(false),
            steps: Cell::new(0),
            death: Notify::new(),
            dead: Cell::new(false),
            fired: Cell::new(0),
            unknown: Cell::new(false),
            released: Cell::default(),
            seen_gone: Cell::default(),
            in_vain: Cell::default(),
            longest: Cell::default(),
            locks: Cell::new(0),
            wrong: RefCell::default(),
        })
    }

    pub(super) fn chance(&self, of: f64) -> bool {
        self.rng.borrow_mut().random_bool(of)
    }

    pub(super) fn pick(&self, below: usize) -> usize {
        self.rng.borrow_mut().random_range(0..below)
    }

    pub(super) fn between(&self, from: u64, to: u64) -> Duration {
        Duration::from_micros(self.rng.borrow_mut().random_range(from * 1000..to * 1000))
    }

    /// On its way: quick as a rule, and now and then not.
    pub(super) fn travel(&self) -> Duration {
        if self.chance(0.02) {
            self.between(10, 120)
        } else {
            self.between(0, 2)
        }
    }

    pub(super) fn wrong(&self, what: Wrong) {
        self.wrong.borrow_mut().push(what);
    }

    fn event(&self) -> u64 {
        self.events.set(self.events.get() + 1);
        self.events.get()
    }

    /// One step of the program, which may be its last.
    pub(super) async fn step(&self) {
        self.steps.set(self.steps.get() + 1);
        if self.faults.death == Some(self.steps.get()) {
            self.dead.set(true);
            self.death.notify_one();
            std::future::pending::<()>().await;
        }
    }

    pub(super) async fn until_thawed(&self, proxy: usize) {
        loop {
            let until = self.proxies.borrow()[proxy].frozen_until;
            if until <= now() {
                return;
            }
            sleep_until(until).await;
        }
    }

    fn is_cut(&self, proxy: usize) -> bool {
        self.proxies.borrow()[proxy].cut_until > now()
    }

    pub(super) fn is_locked(&self, proxy: usize) -> bool {
        self.proxies.borrow()[proxy].locked
    }

    /// Waits for the mutex. Whether it was had.
    async fn mutex(&self, wait: Duration) -> bool {
        let (now, until) = (now(), self.mutex_until.get());
        sleep_until(until.min(now + wait)).await;
        until <= now + wait
    }

    /// `LOCK CLUSTER`: `Err` if it is locked already, or the proxy is cut off (`None`).
    pub(super) async fn lock(
        self: &Rc<Self>,
        proxy: usize,
        owner: Owner,
        wait: Duration,
    ) -> Result<(), Option<()>> {
        if self.is_locked(proxy) {
            return Err(Some(()));
        }
        if self.is_cut(proxy) {
            sleep(wait).await;
            return Err(None);
        }
        let come = now();
        if !self.mutex(wait).await {
            if owner == Owner::Us {
                self.in_vain.set(Some(come));
            }
            return Ok(());
        }
        sleep(self.between(1, 8)).await;
        if self.shared.get().is_some() {
            return Err(Some(()));
        }
        self.set(Some(owner));
        Ok(())
    }

    /// That we send UNLOCK now.
    pub(super) fn our_unlock(&self) -> OurUnlock {
        let unseen = self.released.get() && !self.seen_gone.get();
        OurUnlock {
            sent: now(),
            in_doubt: unseen || self.fired.get() > 0 || self.unknown.get() || self.dead.get(),
        }
    }

    /// `UNLOCK CLUSTER`; `None`: another's. `Err`: the proxy is cut off.
    pub(super) async fn unlock(
        self: &Rc<Self>,
        proxy: usize,
        ours: Option<OurUnlock>,
        wait: Duration,
    ) -> Result<(), ()> {
        if !self.is_locked(proxy) {
            return Ok(());
        }
        if self.is_cut(proxy) {
            sleep(wait).await;
            return Err(());
        }
        if !self.mutex(wait).await {
            return Ok(());
        }
        sleep(self.between(1, 8)).await;
        if let (Some((Owner::Foreign, since)), Some(ours)) = (self.shared.get(), ours)
            && !self.is_excused(since, ours)
        {
            self.wrong(Wrong::ForeignReleased);
        }
        self.set(None);
        Ok(())
    }

    /// Whether another's lock, there since `since`, is released in one of the moments that docs/CONSISTENCY.md names.
    fn is_excused(&self, since: Duration, ours: OurUnlock) -> bool {
        // The other locked while this UNLOCK hung in a proxy that was frozen, or in the try whose LOCK did nothing.
        let in_vain = self.in_vain.get();
        ours.in_doubt
            || self.our_unlock().in_doubt
            || since > ours.sent
            || in_vain.is_some_and(|from| since >= from && since < from + ms(2000))
    }

    fn set(self: &Rc<Self>, to: Option<Owner>) {
        let now = now();
        if let Some((Owner::Us, since)) = self.shared.get() {
            self.longest
                .set(self.longest.get().max(now.saturating_sub(since)));
            self.released.set(true);
        }
        if let Some(Owner::Us) = to {
            self.released.set(false);
            self.seen_gone.set(false);
        }
        self.shared.set(to.map(|owner| (owner, now)));
        self.version.set(self.version.get() + 1);
        for proxy in 0..PROXIES {
            self.follow(proxy, self.version.get(), to.is_some());
        }
    }

    /// A proxy hears of a change, some time later.
    fn follow(self: &Rc<Self>, proxy: usize, version: u64, locked: bool) {
        let world = Rc::clone(self);
        let late = if world.chance(0.05) {
            world.between(20, 110)
        } else {
            world.between(0, 4)
        };
        spawn(async move {
            sleep(late).await;
            loop {
                world.until_thawed(proxy).await;
                let cut = world.proxies.borrow()[proxy].cut_until;
                if cut <= now() {
                    break;
                }
                sleep_until(cut).await;
            }
            let mut proxies = world.proxies.borrow_mut();
            if proxies[proxy].version < version {
                proxies[proxy].version = version;
                proxies[proxy].locked = locked;
            }
        });
    }

    /// Things go wrong, now and then, until nothing new begins.
    pub(super) async fn mishaps(self: Rc<Self>) {
        while !self.stopped.get() {
            sleep(self.between(50, 2500)).await;
            let (now, proxy) = (now(), self.pick(PROXIES));
            match self.pick(3) {
                0 if self.faults.freeze => {
                    let long = if self.chance(0.2) { 25_000 } else { 3000 };
                    let until = now + self.between(100, long);
                    self.proxies.borrow_mut()[proxy].frozen_until = until;
                }
                1 if self.faults.cut => {
                    let until = now + self.between(100, 8000);
                    self.proxies.borrow_mut()[proxy].cut_until = until;
                }
                2 if self.faults.mutex => {
                    let held = self.between(100, 2500);
                    self.mutex_until.set(now + held);
                    self.blocked.set(self.blocked.get() + held);
                }
                _ => {}
            }
        }
    }

    /// Another locks and unlocks, by the rules of the house.
    pub(super) async fn foreigner(self: Rc<Self>) {
        while !self.stopped.get() {
            sleep(self.between(20, 3000)).await;
            let proxy = self.pick(PROXIES);
            if self.lock(proxy, Owner::Foreign, ms(1000)).await.is_err() {
                continue;
            }
            sleep(self.between(10, 4000)).await;
            while matches!(self.shared.get(), Some((Owner::Foreign, _))) {
                let _ = self.unlock(proxy, None, ms(500)).await;
                sleep(ms(20)).await;
            }
        }
    }

    /// A client that moves money between the nodes. A batch passes the lock.
    pub(super) async fn client(self: Rc<Self>, batch: bool) {
        while !self.stopped.get() {
            sleep(self.between(0, 60)).await;
            let (proxy, first) = (self.pick(PROXIES), self.pick(NODES));
            self.transfer(proxy, [first, (first + 1) % NODES], batch)
                .await;
        }
    }

    async fn transfer(&self, proxy: usize, legs: [usize; 2], batch: bool) {
        let xid = self.transactions.get() + 1;
        self.transactions.set(xid);
        let crashes = legs.map(|node| self.nodes.borrow()[node].crashes);
        let is_cut = || {
            let nodes = self.nodes.borrow();
            let mut each = legs.into_iter().zip(crashes);
            each.any(|(node, before)| nodes[node].crashes != before || nodes[node].is_down())
        };
        for (number, node) in legs.into_iter().enumerate() {
            self.until_thawed(proxy).await;
            if is_cut() {
                return self.give_up(xid, legs);
            }
            if !batch && self.is_locked(proxy) {
                for node in &legs[..number] {
                    self.end(*node, xid);
                }
                return;
            }
            self.nodes.borrow_mut()[node].holders.insert(xid, now());
            sleep(self.between(0, 3)).await;
        }
        for node in legs {
            self.until_thawed(proxy).await;
            if is_cut() {
                return self.give_up(xid, legs);
            }
            let event = self.event();
            self.nodes.borrow_mut()[node].in_wal.insert(xid, event);
            sleep(self.between(0, 2)).await;
            if is_cut() {
                return self.give_up(xid, legs);
            }
            self.nodes.borrow_mut()[node].ended += 1;
            sleep(self.between(0, 2)).await;
            self.nodes.borrow_mut()[node].holders.remove(&xid);
        }
    }

    /// Ends what a crash has cut.
    fn give_up(&self, xid: u64, legs: [usize; 2]) {
        self.cut.borrow_mut().insert(xid);
        for node in legs {
            if self.nodes.borrow_mut()[node].holders.remove(&xid).is_some() {
                self.nodes.borrow_mut()[node].ended += 1;
            }
        }
    }

    /// What a node has in memory is written now and then.
    pub(super) async fn writer(self: Rc<Self>, node: usize) {
        while !self.stopped.get() {
            sleep(self.between(1, 40)).await;
            if !self.nodes.borrow()[node].is_down() {
                self.nodes.borrow_mut()[node].flushed = self.events.get();
            }
        }
    }

    /// A node loses what is not on its disk, and who was at work there.
    fn crash(&self, node: usize) {
        let back = now() + self.between(20, 4000);
        let node = &mut self.nodes.borrow_mut()[node];
        let flushed = node.flushed;
        node.crashes += 1;
        node.down_until = back;
        node.ended += 1;
        node.marks.retain(|_, at| *at <= flushed);
        let lost = node.in_wal.iter().filter(|(_, at)| **at > flushed);
        self.cut.borrow_mut().extend(lost.map(|(xid, _)| *xid));
        self.cut.borrow_mut().extend(node.holders.keys());
        node.in_wal.retain(|_, at| *at <= flushed);
        node.holders.clear();
    }

    /// Crashes a node soon, perhaps.
    fn perhaps_crash(self: &Rc<Self>, node: usize) {
        if self.faults.crash && !self.stopped.get() && self.chance(0.15) {
            let (world, soon) = (Rc::clone(self), self.between(0, 60));
            spawn(async move {
                sleep(soon).await;
                world.crash(node);
            });
        }
    }

    /// Waits until a restore point is on disk. Whether it is there.
    pub(super) async fn flushed(&self, node: usize, name: &str) -> bool {
        if !self.faults.crash {
            return true;
        }
        loop {
            let (at, flushed) = {
                let node = &self.nodes.borrow()[node];
                (node.marks.get(name).copied(), node.flushed)
            };
            match at {
                None => return false,
                Some(at) if at <= flushed => return true,
                Some(_) => sleep(ms(1)).await,
            }
        }
    }

    /// The agent of a node is restarted at some time.
    pub(super) async fn restart(self: Rc<Self>) {
        sleep(self.between(0, 2500)).await;
        self.forgot.set(Some(now()));
    }

    fn end(&self, node: usize, xid: u64) {
        let mut nodes = self.nodes.borrow_mut();
        nodes[node].ended += 1;
        nodes[node].holders.remove(&xid);
    }

    pub(super) fn mark(self: &Rc<Self>, node: usize, name: &str) {
        let event = self.event();
        let marks = &mut self.nodes.borrow_mut()[node].marks;
        marks.entry(name.to_owned()).or_insert(event);
        self.perhaps_crash(node);
    }

    /// Looks for a transaction that is in half of a point.
    pub(super) fn judge(&self, name: &str) {
        let nodes = self.nodes.borrow();
        for (number, node) in nodes.iter().enumerate() {
            if !node.marks.contains_key(name) {
                self.wrong(Wrong::Missing(number));
            }
        }
        let all: BTreeSet<u64> = nodes
            .iter()
            .flat_map(|node| node.in_wal.keys().copied())
            .collect();
        for xid in all.difference(&self.cut.borrow()) {
            let legs = nodes.iter().filter_map(|node| {
                let mark = node.marks.get(name)?;
                Some(node.in_wal.get(xid).is_some_and(|at| at < mark))
            });
            let legs: BTreeSet<bool> = legs.collect();
            if legs.len() > 1 {
                self.wrong(Wrong::Torn(*xid));
            }
        }
    }

    /// When all is over: nobody has the lock, no proxy refuses.
    pub(super) fn judge_lock(&self, bound: Duration) {
        let ours = matches!(self.shared.get(), Some((Owner::Us, _)));
        let stuck = self.shared.get().is_none() && (0..PROXIES).any(|proxy| self.is_locked(proxy));
        if ours || stuck {
            self.wrong(Wrong::StaysLocked);
        }
        if self.longest.get() > bound + self.blocked.get() {
            self.wrong(Wrong::HeldTooLong(self.longest.get()));
        }
    }
}
