//! Proxies and time around one watchdog, played through.

use std::collections::BTreeMap;

use super::super::*;

pub(super) const D: u64 = 2000;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Health {
    Up,
    /// Refuses connections.
    Dead,
    /// Takes them, and says nothing; what it was told it does when it thaws.
    Frozen,
    /// Answers, and neither sees nor changes the cluster's state.
    CutOff,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Event {
    /// A call reaches its proxy.
    Act(Order),
    /// Its answer reaches the watchdog.
    Reply(usize, Heard),
    /// LOCK takes effect.
    Lands,
    /// A proxy sees the cluster's state.
    Sees(usize),
    /// A proxy's health changes.
    Becomes(usize, Health),
    /// The client speaks.
    Tells(LockOutcome),
    /// The agent is told to stop.
    Stops,
    /// Another watchdog's UNLOCK.
    OthersUnlock,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Heard {
    Open,
    Locked,
    Said,
    Nothing,
}

#[derive(Debug)]
pub(super) struct World {
    pub(super) base: Instant,
    pub(super) now: u64,
    pub(super) machine: Machine,
    pub(super) locked: bool,
    /// Somebody holds the mutex until then.
    pub(super) mutex_until: u64,
    pub(super) health: Vec<Health>,
    pub(super) sees_locked: Vec<bool>,
    /// Milliseconds of a call, there and back.
    pub(super) latency: u64,
    /// UNLOCKs that a frozen proxy has been told.
    pub(super) asleep: Vec<usize>,
    pub(super) events: BTreeMap<(u64, u64), Event>,
    pub(super) count: u64,
    pub(super) unlocks_sent: Vec<u64>,
    /// When it was locked and opened, in turns.
    pub(super) changes: Vec<(u64, bool)>,
}

impl World {
    pub(super) fn new(proxies: usize) -> Self {
        let base = Instant::now();
        let addresses: Vec<_> = (0..proxies)
            .map(|index| ProxyAddress {
                host: format!("p{index}"),
                port: 3307,
            })
            .collect();
        let mut world = Self {
            base,
            now: 0,
            machine: Machine::new(&addresses, base),
            locked: false,
            mutex_until: 0,
            health: vec![Health::Up; proxies],
            sees_locked: vec![false; proxies],
            latency: 4,
            asleep: Vec::new(),
            events: BTreeMap::new(),
            count: 0,
            unlocks_sent: Vec::new(),
            changes: Vec::new(),
        };
        world.run(1000);
        world
    }

    pub(super) fn at(&self, ms: u64) -> Instant {
        self.base + Duration::from_millis(ms)
    }

    pub(super) fn plan(&mut self, at: u64, event: Event) {
        self.count += 1;
        self.events.insert((at.max(self.now), self.count), event);
    }

    pub(super) fn arm(&mut self, attempt: u32) {
        let deadline = Duration::from_millis(D);
        let now = self.at(self.now);
        self.machine.arm(now, attempt, deadline).unwrap();
    }

    pub(super) fn state(&mut self) -> WatchdogState {
        let now = self.at(self.now);
        self.machine.state(now)
    }

    pub(super) fn set_locked(&mut self, locked: bool) {
        if self.locked != locked {
            self.locked = locked;
            self.changes.push((self.now, locked));
        }
        for proxy in 0..self.health.len() {
            let at = self.now + 1 + 20 * u64::try_from(proxy).unwrap();
            self.plan(at, Event::Sees(proxy));
        }
    }

    pub(super) fn unlock(&mut self) {
        if self.now >= self.mutex_until {
            self.set_locked(false);
        }
    }

    /// Lets it all happen up to `until`.
    pub(super) fn run(&mut self, until: u64) {
        loop {
            let now = self.at(self.now);
            let (orders, wake) = self.machine.next(now);
            assert!(wake > now, "it would spin");
            for order in orders {
                if order.call == Call::Unlock {
                    self.unlocks_sent.push(self.now);
                }
                self.plan(self.now + self.latency / 2, Event::Act(order));
            }
            let wake = u64::try_from((wake - self.base).as_millis()).unwrap();
            let next = self.events.first_key_value().map(|((at, _), _)| *at);
            let next = next.map_or(wake, |at| at.min(wake));
            if next > until {
                self.now = until;
                return;
            }
            self.now = next.max(self.now);
            while let Some(entry) = self
                .events
                .first_entry()
                .filter(|it| it.key().0 <= self.now)
            {
                let event = entry.remove();
                self.happens(event);
            }
        }
    }

    pub(super) fn happens(&mut self, event: Event) {
        let now = self.at(self.now);
        match event {
            Event::Act(order) => self.act(order),
            Event::Reply(proxy, heard) => {
                let (answer, connected) = match heard {
                    Heard::Open => (Answer::Open, true),
                    Heard::Locked => (Answer::Locked, true),
                    Heard::Said => (Answer::Said, true),
                    Heard::Nothing => {
                        let message = "nothing".to_owned();
                        let refused = false;
                        (Answer::Failed { message, refused }, false)
                    }
                };
                self.machine.answered(now, proxy, answer, connected);
            }
            Event::Lands => self.set_locked(true),
            Event::Sees(proxy) => {
                if self.health[proxy] != Health::CutOff {
                    self.sees_locked[proxy] = self.locked;
                }
            }
            Event::Becomes(proxy, health) => {
                let thaws = self.health[proxy] == Health::Frozen;
                self.health[proxy] = health;
                if thaws && self.asleep.contains(&proxy) {
                    self.asleep.retain(|it| *it != proxy);
                    self.unlock();
                }
                self.plan(self.now, Event::Sees(proxy));
            }
            Event::Tells(lock) => self.machine.disarm(now, 1, lock).unwrap(),
            Event::Stops => self.machine.stop(now),
            Event::OthersUnlock => self.unlock(),
        }
    }

    pub(super) fn act(&mut self, order: Order) {
        let proxy = order.proxy;
        let back = self.now + self.latency / 2;
        let (at, heard) = match (self.health[proxy], order.call) {
            (Health::Dead, _) => (back, Heard::Nothing),
            (Health::Frozen, Call::Probe) => (self.now + 3000, Heard::Nothing),
            (Health::Frozen, Call::Unlock) => {
                self.asleep.push(proxy);
                (self.now + 1500, Heard::Nothing)
            }
            (_, Call::Probe) if self.sees_locked[proxy] => (back, Heard::Locked),
            (_, Call::Probe) => (back, Heard::Open),
            (Health::CutOff, Call::Unlock) => (self.now + 1000, Heard::Nothing),
            (Health::Up, Call::Unlock) if !self.sees_locked[proxy] => (back, Heard::Open),
            (Health::Up, Call::Unlock) if self.now < self.mutex_until => {
                (self.now + 1000, Heard::Said)
            }
            (Health::Up, Call::Unlock) => {
                self.unlock();
                (back, Heard::Said)
            }
        };
        self.plan(at, Event::Reply(proxy, heard));
    }
}

/// When it settled, as its state says.
pub(super) fn open_after(state: &WatchdogState) -> Option<u64> {
    match state {
        WatchdogState::Settled { open_after_ms, .. } => *open_after_ms,
        other => panic!("{other:?}"),
    }
}
