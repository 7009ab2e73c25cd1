//! The program's own code against a cluster in virtual time, in many orders of events, each made from a seed.
//!
//! What must hold: no point that stands is torn; after the program has ended or died, writes pass and stay so; the lock is never held longer
//! than D and a bounded rest; another's lock is never released, but for the windows that docs/CONSISTENCY.md names; LOCK is never sent
//! while a watchdog of an earlier try may still unlock. And the model must see it when a rule is broken: it is broken by answering the program what it wants
//! to hear.

mod node;
mod time;
mod watchdog;
mod world;

use std::cell::Cell;
use std::rc::Rc;
use std::time::Duration;

use tokio::sync::oneshot;
use tokio_util::sync::CancellationToken;

use super::budget::Budget;
use super::clock::Clock as _;
use super::making::{Made, Order, Spent};
use super::parties::{Gate, LockReply, Parties, Proxy, ProxyError};
use super::told::Teller;
use crate::coordinator::proof;
use node::ModelNode;
use time::{Virtual, sleep, spawn};
use watchdog::ModelWatchdog;
use world::{Faults, NODES, Owner, PROXIES, World, Wrong, ms};

/// D
const DEADLINE: Duration = Duration::from_secs(2);
/// What the lock may be held beyond D: the rounds of those that unlock.
const REST: Duration = Duration::from_secs(3);

/// Which rule is broken.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Without {
    Nothing,
    /// S1 = S2.
    Proof,
    /// The watchdogs only say that they are armed.
    Watchdogs,
    /// A LOCK whose answer is lost counts as one that was never sent.
    Doubt,
    /// UNLOCK is believed to have taken: no probe contradicts it.
    UnlockProbe,
    /// "Already locked" is taken for success.
    Refusal,
    /// A watchdog that has fired counts as resting.
    Settling,
    /// A restore point counts as on disk as soon as it is made.
    Flush,
}

struct ModelProxy {
    number: usize,
    world: Rc<World>,
    without: Without,
    /// Whether UNLOCK has been sent since the last LOCK.
    unlocked: Cell<bool>,
    /// Whether it was seen to refuse writes since it was last seen to let them pass.
    refused: Cell<bool>,
}

enum Ask {
    Lock(Duration),
    Unlock(Duration),
    Probe,
}

#[derive(Debug)]
enum Answer {
    Done,
    Already,
    Gate(Gate),
}

/// Sends a message to a proxy and waits for its answer.
async fn call(
    world: &Rc<World>,
    proxy: usize,
    ask: Ask,
    deadline: Duration,
) -> Result<Answer, ProxyError> {
    match Virtual.within(deadline, send(world, proxy, ask)).await {
        Some(Ok(answer)) => Ok(answer),
        Some(Err(_)) => Err(ProxyError::Unheard("the session was lost".into())),
        None => Err(ProxyError::Unheard("no answer in time".into())),
    }
}

fn send(world: &Rc<World>, proxy: usize, ask: Ask) -> oneshot::Receiver<Answer> {
    let (sender, receiver) = oneshot::channel();
    let lost = world.faults.lost && world.chance(0.03);
    let (there, back) = (world.travel(), world.travel());
    let (far, unlock) = (Rc::clone(world), world.our_unlock());
    spawn(async move {
        sleep(there).await;
        far.until_thawed(proxy).await;
        let answer = match ask {
            Ask::Lock(wait) => match far.lock(proxy, Owner::Us, wait).await {
                Ok(()) => Some(Answer::Done),
                Err(Some(())) => Some(Answer::Already),
                Err(None) => None,
            },
            Ask::Unlock(wait) => {
                let done = far.unlock(proxy, Some(unlock), wait).await;
                done.ok().map(|()| Answer::Done)
            }
            Ask::Probe if far.is_locked(proxy) => Some(Answer::Gate(Gate::Locked)),
            Ask::Probe => Some(Answer::Gate(Gate::Open)),
        };
        sleep(back).await;
        far.until_thawed(proxy).await;
        match answer {
            Some(answer) if !lost => drop(sender.send(answer)),
            // The session breaks, or nothing is ever heard.
            _ if far.chance(0.5) => drop(sender),
            _ => {
                sleep(Duration::from_secs(100)).await;
                drop(sender);
            }
        }
    });
    receiver
}

impl ModelProxy {
    async fn ask(&self, ask: Ask, deadline: Duration) -> Result<Answer, ProxyError> {
        self.world.step().await;
        let answer = call(&self.world, self.number, ask, deadline).await;
        self.world.step().await;
        answer
    }
}

impl Proxy for ModelProxy {
    fn name(&self) -> String {
        format!("proxy{}", self.number)
    }

    async fn ready(&self) -> Result<(), String> {
        let gate = self.ask(Ask::Probe, ms(500)).await;
        gate.map(drop).map_err(ProxyError::into_words)
    }

    async fn lock(&self, wait: Duration, deadline: Duration) -> Result<LockReply, ProxyError> {
        self.world.locks.set(self.world.locks.get() + 1);
        if self.world.fired.get() > 0 {
            self.world.wrong(Wrong::LockedBesideWatchdog);
        }
        let answer = self.ask(Ask::Lock(wait), deadline).await;
        match answer {
            Ok(Answer::Already) if self.without != Without::Refusal => {
                Ok(LockReply::AlreadyLocked("locked".into()))
            }
            Ok(_) => Ok(LockReply::Said),
            Err(_) if self.without == Without::Doubt => Err(ProxyError::Refused("lost".into())),
            Err(error) => {
                self.world.unknown.set(true);
                Err(error)
            }
        }
    }

    async fn unlock(&self, wait: Duration, deadline: Duration) -> Result<(), ProxyError> {
        self.unlocked.set(true);
        self.ask(Ask::Unlock(wait), deadline).await.map(drop)
    }

    async fn probe(&self, deadline: Duration) -> Result<Gate, ProxyError> {
        match self.ask(Ask::Probe, deadline).await? {
            Answer::Gate(Gate::Locked)
                if self.without == Without::UnlockProbe && self.unlocked.get() =>
            {
                Ok(Gate::Open)
            }
            Answer::Gate(gate) => {
                let refuses = gate == Gate::Locked;
                if self.refused.replace(refuses) && !refuses {
                    self.world.seen_gone.set(true);
                }
                Ok(gate)
            }
            Answer::Done | Answer::Already => panic!("no answer to a probe"),
        }
    }

    async fn csn(&self, _: Duration) -> Result<Option<String>, ProxyError> {
        Ok(None)
    }
}

/// What a run came to.
#[derive(Debug, Default)]
struct Ran {
    point: bool,
    locks: u32,
    /// For how long it went on although a copy was no more.
    in_vain: Duration,
    wrong: Vec<Wrong>,
}

/// One run: `batches` of its clients pass the lock.
fn run(seed: u64, faults: Faults, batches: usize, without: Without) -> Ran {
    time::run(story(seed, faults, batches, without))
}

fn parties(
    world: &Rc<World>,
    without: Without,
) -> Parties<ModelProxy, ModelWatchdog, ModelNode, Virtual> {
    Parties {
        proxies: (0..PROXIES)
            .map(|number| ModelProxy {
                number,
                world: Rc::clone(world),
                without,
                unlocked: Cell::new(false),
                refused: Cell::new(false),
            })
            .collect(),
        watchdogs: (0..NODES)
            .map(|_| ModelWatchdog::new(world, without))
            .collect(),
        nodes: (0..NODES)
            .map(|number| ModelNode {
                number,
                world: Rc::clone(world),
                without,
            })
            .collect(),
        deadline: DEADLINE,
        clock: Virtual,
        has_csn: false,
        proof: proof::Rules {
            retries: 0,
            timeout: Duration::ZERO,
            accept_in_doubt: false,
        },
        teller: Teller::new().0,
        cancel: CancellationToken::new(),
    }
}

async fn story(seed: u64, faults: Faults, batches: usize, without: Without) -> Ran {
    let world = World::new(seed, faults);
    for client in 0..5 {
        spawn(Rc::clone(&world).client(client < batches));
    }
    spawn(Rc::clone(&world).mishaps());
    if faults.foreign {
        spawn(Rc::clone(&world).foreigner());
    }
    if faults.crash {
        for node in 0..NODES {
            spawn(Rc::clone(&world).writer(node));
        }
    }
    if faults.forget {
        spawn(Rc::clone(&world).restart());
    }
    sleep(world.between(0, 2000)).await;
    let parties = parties(&world, without);
    let order = Order {
        retries: 6,
        timeout: Duration::from_mins(4),
        foreign: Duration::from_mins(1),
    };
    let (budget, mut spent) = (Budget::new(Duration::from_mins(10)), Spent::default());
    let made = tokio::select! {
        biased;
        () = world.death.notified() => None,
        made = parties.make(&order, &budget, &mut spent, seed) => made.ok(),
    };
    let in_vain = world.forgot.get().filter(|_| made.is_none());
    let in_vain = in_vain.map_or(Duration::ZERO, |since| time::now().saturating_sub(since));
    // Whatever is under way ends; a watchdog may still have to wait for a minute, and for what was frozen.
    sleep(ms(200)).await;
    world.stopped.set(true);
    sleep(Duration::from_secs(150)).await;
    if let Some(Made { proved, .. }) = &made {
        world.judge(&proof::restore_point(&proved.point));
    }
    world.judge_lock(DEADLINE + REST);
    let wrong = world.wrong.take();
    Ran {
        point: made.is_some(),
        locks: world.locks.get(),
        in_vain,
        wrong,
    }
}

/// Runs many stories. All that went wrong, with the seeds.
fn explore(
    seeds: std::ops::Range<u64>,
    faults: impl Fn(u64) -> Faults,
    batches: usize,
    without: Without,
) -> (u32, u32, Vec<(u64, Vec<Wrong>)>) {
    let (mut points, mut locks, mut wrong) = (0, 0, Vec::new());
    for seed in seeds {
        let ran = run(seed, faults(seed), batches, without);
        points += u32::from(ran.point);
        locks += ran.locks;
        if !ran.wrong.is_empty() {
            wrong.push((seed, ran.wrong));
        }
    }
    (points, locks, wrong)
}

/// How many stories of each kind; more of them: `GS_PITR_MODEL_RUNS=5000`.
fn runs(usual: u64) -> u64 {
    let asked = std::env::var("GS_PITR_MODEL_RUNS").ok();
    asked.and_then(|text| text.parse().ok()).unwrap_or(usual)
}

#[test]
fn ordinary_clients_get_a_point_at_once() {
    let (points, locks, wrong) = explore(0..runs(60), |_| Faults::default(), 0, Without::Nothing);
    assert_eq!(wrong, []);
    assert_eq!(u64::from(points), runs(60), "{locks}");
    assert!(u64::from(locks) < runs(60) * 3 / 2, "{locks}");
}

#[test]
fn no_point_is_torn_though_batches_pass_the_lock() {
    let faults = |_| Faults {
        cut: true,
        lost: true,
        ..Faults::default()
    };
    let (points, _, wrong) = explore(0..runs(60), faults, 3, Without::Nothing);
    assert_eq!(wrong, []);
    assert!(points > 0);
}

/// Everything that can go wrong with proxies, one thing or several at a time.
fn all_faults(seed: u64) -> Faults {
    Faults {
        lost: seed & 1 != 0,
        freeze: seed & 2 != 0,
        cut: seed & 4 != 0,
        mutex: seed & 8 != 0,
        ..Faults::default()
    }
}

/// Among these stories were four in which a proxy that was cut off, and had never heard of the lock, was taken for proof that it was gone.
#[test]
fn a_proxy_that_never_heard_of_the_lock_proves_nothing() {
    let faults = |_| Faults {
        cut: true,
        lost: true,
        ..Faults::default()
    };
    let (_, _, wrong) = explore(195..270, faults, 3, Without::Nothing);
    let stays = |(_, wrong): &&(u64, Vec<Wrong>)| wrong.contains(&Wrong::StaysLocked);
    assert_eq!(wrong.iter().find(stays), None);
}

#[test]
fn writes_pass_again_whatever_happens_to_proxies() {
    let (points, _, wrong) = explore(0..runs(96), all_faults, 1, Without::Nothing);
    assert_eq!(wrong, []);
    assert!(u64::from(points) > runs(96) / 4, "{points}");
}

#[test]
fn writes_pass_again_wherever_the_program_dies() {
    let dying = |seed: u64| Faults {
        death: Some(u32::try_from(seed % 97).unwrap() + 1),
        ..all_faults(seed / 97)
    };
    let (_, _, wrong) = explore(0..runs(97 * 2), dying, 1, Without::Nothing);
    assert_eq!(wrong, []);
}

/// A point that stands is on every node, whatever crashes while it is made.
#[test]
fn nodes_that_crash_cost_tries_and_no_point() {
    let crash = |seed| Faults {
        crash: true,
        ..all_faults(seed)
    };
    let (points, _, wrong) = explore(0..runs(96), crash, 0, Without::Nothing);
    assert_eq!(wrong, []);
    assert!(u64::from(points) > runs(96) / 4, "{points}");
}

#[test]
fn a_copy_that_is_no_more_is_not_waited_for() {
    let mut ended = 0;
    for seed in 0..runs(80) {
        let faults = Faults {
            forget: true,
            ..Faults::default()
        };
        let ran = run(seed, faults, 0, Without::Nothing);
        assert_eq!(ran.wrong, [], "{seed}");
        assert!(ran.in_vain < Duration::from_secs(5), "{seed}: {ran:?}");
        ended += u32::from(!ran.point);
    }
    assert!(ended > 0);
}

#[test]
fn anothers_lock_is_left_alone() {
    let foreign = |_| Faults {
        foreign: true,
        ..Faults::default()
    };
    let (points, _, wrong) = explore(0..runs(80), foreign, 0, Without::Nothing);
    assert_eq!(wrong, []);
    assert!(points > 0);
    let with_all = |seed| Faults {
        foreign: true,
        ..all_faults(seed)
    };
    let (_, _, wrong) = explore(0..runs(48), with_all, 0, Without::Nothing);
    assert_eq!(wrong, []);
}

/// What the model sees go wrong without a rule.
fn seen_without(without: Without, faults: impl Fn(u64) -> Faults, batches: usize) -> Vec<Wrong> {
    for seed in 0..2000 {
        let ran = run(seed, faults(seed), batches, without);
        if !ran.wrong.is_empty() {
            return ran.wrong;
        }
    }
    panic!("nothing goes wrong without {without:?}");
}

#[test]
fn each_rule_is_needed() {
    let none = |_| Faults::default();
    let torn = seen_without(Without::Proof, none, 4);
    assert!(matches!(torn[0], Wrong::Torn(_)), "{torn:?}");

    let dying = |seed: u64| Faults {
        death: Some(u32::try_from(seed % 97).unwrap() + 1),
        ..Faults::default()
    };
    let stays = seen_without(Without::Watchdogs, dying, 0);
    assert!(stays.contains(&Wrong::StaysLocked), "{stays:?}");

    let lost = |_| Faults {
        lost: true,
        freeze: true,
        ..Faults::default()
    };
    let stays = seen_without(Without::Doubt, lost, 0);
    assert!(stays.contains(&Wrong::StaysLocked), "{stays:?}");

    let mutex = |_| Faults {
        mutex: true,
        ..Faults::default()
    };
    let stays = seen_without(Without::UnlockProbe, mutex, 0);
    assert!(stays.contains(&Wrong::StaysLocked), "{stays:?}");

    let foreign = |_| Faults {
        foreign: true,
        ..Faults::default()
    };
    let released = seen_without(Without::Refusal, foreign, 0);
    assert!(released.contains(&Wrong::ForeignReleased), "{released:?}");

    let crash = |_| Faults {
        crash: true,
        ..Faults::default()
    };
    let missing = seen_without(Without::Flush, crash, 0);
    assert!(matches!(missing[0], Wrong::Missing(_)), "{missing:?}");

    let beside = seen_without(Without::Settling, lost, 0);
    assert!(beside.contains(&Wrong::LockedBesideWatchdog), "{beside:?}");
}
