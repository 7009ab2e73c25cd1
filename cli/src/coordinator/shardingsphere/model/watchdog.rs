//! A watchdog by the rule of docs/CONSISTENCY.md. The agents' own one has tests of its own.

use std::cell::Cell;
use std::rc::Rc;
use std::time::Duration;

use agent_api::{ApiError, ErrorKind, LockOutcome};
use tokio::sync::oneshot;

use super::time::{Virtual, now, sleep, spawn};
use super::world::{PROXIES, World, ms};
use super::{Answer, Ask, Without, call};
use crate::coordinator::shardingsphere::clock::Clock as _;
use crate::coordinator::shardingsphere::parties::{Gate, Watchdog};

#[derive(Debug, Clone, Copy, PartialEq)]
enum Stands {
    Rests,
    Armed(u32),
    /// What became of LOCK is known since then.
    Fired(u32, Option<Duration>),
}

pub(super) struct ModelWatchdog {
    world: Rc<World>,
    stands: Rc<Cell<Stands>>,
    over: Rc<Cell<u32>>,
    without: Without,
}

impl ModelWatchdog {
    pub(super) fn new(world: &Rc<World>, without: Without) -> Self {
        Self {
            world: Rc::clone(world),
            stands: Rc::new(Cell::new(Stands::Rests)),
            over: Rc::default(),
            without,
        }
    }

    /// There and back, with what is done there in between. `None`: one of them was lost.
    async fn there<T: 'static>(&self, work: impl FnOnce() -> T + 'static) -> Result<T, ApiError> {
        self.world.step().await;
        let (sender, receiver) = oneshot::channel();
        let lost = self.world.faults.lost && self.world.chance(0.02);
        let (there, back) = (self.world.travel(), self.world.travel());
        spawn(async move {
            sleep(there).await;
            let done = work();
            sleep(back).await;
            if !lost {
                drop(sender.send(done));
            }
        });
        let answer = Virtual.within(ms(400), receiver).await;
        self.world.step().await;
        match answer {
            Some(Ok(answer)) => Ok(answer),
            _ => Err(ApiError::new(ErrorKind::AgentUnreachable, "no answer")),
        }
    }
}

/// It fires: unlocks and probes until its rule is met.
async fn fired(world: Rc<World>, stands: Rc<Cell<Stands>>) {
    world.fired.set(world.fired.get() + 1);
    let mut open_since = None;
    loop {
        let mut open = true;
        let each = (0..PROXIES).map(async |proxy| {
            let unlock = Ask::Unlock(ms(500));
            let sent = call(&world, proxy, unlock, ms(700)).await.is_ok();
            let gate = call(&world, proxy, Ask::Probe, ms(500)).await;
            (sent, gate)
        });
        for (_, gate) in futures_util::future::join_all(each).await {
            open &= !matches!(gate, Ok(Answer::Gate(Gate::Locked)));
        }
        let now = now();
        let since = if open {
            *open_since.get_or_insert(now)
        } else {
            now
        };
        if !open {
            open_since = None;
        }
        let rests = match stands.get() {
            Stands::Fired(_, Some(known)) => now >= since.max(known) + Duration::from_secs(10),
            _ => now >= since + Duration::from_mins(1),
        };
        if rests {
            break;
        }
        sleep(ms(100)).await;
    }
    stands.set(Stands::Rests);
    world.fired.set(world.fired.get() - 1);
    if world.fired.get() == 0 {
        world.unknown.set(false);
    }
}

impl Watchdog for ModelWatchdog {
    fn name(&self) -> String {
        "watchdog".into()
    }

    async fn arm(&self, attempt: u32, deadline: Duration) -> Result<(), ApiError> {
        let (world, stands) = (Rc::clone(&self.world), Rc::clone(&self.stands));
        let (over, only_said) = (Rc::clone(&self.over), self.without == Without::Watchdogs);
        let settling = self.without == Without::Settling;
        let armed = self.there(move || {
            if only_said {
                return true;
            }
            if (stands.get() != Stands::Rests && !settling) || attempt <= over.get() {
                return settling;
            }
            stands.set(Stands::Armed(attempt));
            spawn(async move {
                sleep(deadline).await;
                if stands.get() == Stands::Armed(attempt) {
                    stands.set(Stands::Fired(attempt, None));
                    fired(world, stands).await;
                }
            });
            true
        });
        if armed.await? {
            return Ok(());
        }
        Err(ApiError::new(ErrorKind::Conflict, "it does not rest"))
    }

    async fn disarm(&self, attempt: u32, lock: LockOutcome) -> Result<bool, ApiError> {
        let (world, stands) = (Rc::clone(&self.world), Rc::clone(&self.stands));
        let over = Rc::clone(&self.over);
        self.there(move || {
            over.set(over.get().max(attempt));
            let unknown = lock == LockOutcome::Unknown;
            match stands.get() {
                Stands::Armed(armed) if armed == attempt && unknown => {
                    stands.set(Stands::Fired(attempt, None));
                    spawn(fired(world, Rc::clone(&stands)));
                }
                Stands::Armed(armed) if armed == attempt => stands.set(Stands::Rests),
                Stands::Fired(fired, None) if fired == attempt && !unknown => {
                    stands.set(Stands::Fired(attempt, Some(now())));
                }
                _ => {}
            }
            stands.get() == Stands::Rests
        })
        .await
    }

    async fn rests(&self) -> Result<bool, ApiError> {
        let (stands, settling) = (Rc::clone(&self.stands), self.without == Without::Settling);
        self.there(move || stands.get() == Stands::Rests || settling)
            .await
    }
}
