//! Runs operators under a schedule, and goes through schedules.

use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use catalog::Catalog;
use catalog::keys;
use futures_util::task::noop_waker_ref;
use pipeline::store::{Key, ObjectStore as _};
use rand::rngs::StdRng;
use rand::{RngExt as _, SeedableRng as _};
use support::memory_store::MemoryStore;
use uuid::Uuid;

use crate::operators::{Job, Operator, Setting, TTL, copy_of};
use crate::samples;
use crate::world::{Broken, Fate, World};

/// Steps after which a run is taken for endless.
const MOST_STEPS: usize = 3000;

/// What the schedule does before the next call of an operator.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Choice {
    /// Goes on with this one.
    Run(usize),
    /// Everybody stands still for longer than a lease lives; then this one goes on.
    RunLate(usize),
    /// This one goes on, and the reply to its write is lost.
    RunLost(usize),
    /// This one is killed.
    Kill(usize),
}

/// The bucket that every run begins with: one node and one complete backup.
#[derive(Debug)]
pub(crate) struct Beginning {
    objects: Vec<(Key, bytes::Bytes)>,
    setting: Setting,
}

impl Beginning {
    pub(crate) async fn new() -> Self {
        let store = Arc::new(MemoryStore::default());
        let shared: Arc<dyn pipeline::store::ObjectStore> = Arc::<MemoryStore>::clone(&store);
        let catalog = Catalog::open_or_create(shared, Uuid::nil()).await.unwrap();
        let (node, epoch) = samples::node_with_epoch(&catalog).await;
        let (old, point_id) = (samples::backup_id('b'), samples::point_id('b'));
        for key in copy_of(&old, node.node_id) {
            store.put_if_absent(&key, "a copy".into()).await.unwrap();
        }
        let point = samples::point(&point_id, node.node_id, &epoch);
        catalog.put_point(&point).await.unwrap();
        let manifest = samples::manifest(&old, &point_id, node.node_id, &epoch);
        catalog.commit_backup(&manifest).await.unwrap();
        let objects = store.keys().into_iter().map(|key| {
            let body = store.bytes(key.as_str()).unwrap();
            (key, body)
        });
        Self {
            objects: objects.collect(),
            setting: Setting {
                node: node.node_id,
                epoch,
                old,
            },
        }
    }
}

type Actor = Pin<Box<dyn Future<Output = ()>>>;

/// One run of some operators.
pub(crate) struct Run {
    pub(crate) world: Arc<World>,
    actors: Vec<Option<Actor>>,
}

impl Run {
    pub(crate) fn new(beginning: &Beginning, jobs: &[Job], broken: Broken) -> Self {
        let store = Arc::new(MemoryStore::default());
        store.stop_clock();
        for (key, body) in &beginning.objects {
            store.tamper(key, Some(body.clone()));
        }
        let world = World::new(store, broken);
        let actors = jobs.iter().enumerate().map(|(number, job)| {
            let operator = Operator {
                number,
                world: Arc::clone(&world),
                setting: beginning.setting.clone(),
            };
            Some(Box::pin(operator.run(*job)) as Actor)
        });
        let actors = actors.collect();
        Self { world, actors }
    }

    /// Lets every operator get to its next call. Those that have one, and whether it writes.
    async fn settle(&mut self) -> Vec<(usize, bool)> {
        let mut ready = Vec::new();
        for number in 0..self.actors.len() {
            while let Some(actor) = &mut self.actors[number] {
                let mut cx = Context::from_waker(noop_waker_ref());
                if let Poll::Ready(()) = actor.as_mut().poll(&mut cx) {
                    self.actors[number] = None;
                    break;
                }
                if let Some(write) = self.world.waiting(number) {
                    ready.push((number, write));
                    break;
                }
                // It waits for nothing of the store: a pause between attempts.
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        }
        ready
    }

    fn take(&mut self, choice: Choice) {
        self.world.store.advance(Duration::from_millis(20));
        match choice {
            Choice::Run(number) => self.world.grant(number, Fate::Answered),
            Choice::RunLost(number) => self.world.grant(number, Fate::Lost),
            Choice::RunLate(number) => {
                self.world.note("    all stand still".to_owned());
                self.world.store.advance(TTL + Duration::from_secs(3));
                self.world.grant(number, Fate::Answered);
            }
            Choice::Kill(number) => {
                self.world.note(format!("operator {number}: killed"));
                self.actors[number] = None;
            }
        }
    }

    /// Runs to the end under `schedule`, which is asked before each step with what may go on. The violation,
    /// if there is one.
    async fn go(
        mut self,
        mut schedule: impl FnMut(usize, &[(usize, bool)]) -> Choice,
    ) -> Result<Arc<World>, (String, String)> {
        for step in 0..MOST_STEPS {
            let ready = self.settle().await;
            if let Some(violation) = self.world.violation() {
                return Err((violation, self.world.trace()));
            }
            if ready.is_empty() {
                return Ok(self.world);
            }
            self.take(schedule(step, &ready));
        }
        Err(("it does not end".to_owned(), self.world.trace()))
    }
}

/// How a search went.
#[derive(Debug)]
pub(crate) struct Search {
    pub(crate) runs: usize,
    pub(crate) found: Option<String>,
}

/// What goes on if the schedule says nothing: the one that went on before, or else the next.
fn usual(last: usize, ready: &[(usize, bool)]) -> usize {
    let same = ready.iter().find(|(number, _)| *number == last);
    let next = ready.iter().find(|(number, _)| *number > last);
    same.or(next).unwrap_or(&ready[0]).0
}

fn alternatives(going: usize, ready: &[(usize, bool)]) -> Vec<Choice> {
    let mut all = vec![Choice::Kill(going)];
    for (number, write) in ready {
        if *number != going {
            all.extend([Choice::Run(*number), Choice::RunLate(*number)]);
        } else if *write {
            all.push(Choice::RunLost(*number));
        }
    }
    all
}

/// Every schedule with at most `most` departures from "each runs to its end", depth first.
pub(crate) async fn every_schedule(
    beginning: &Beginning,
    jobs: &[Job],
    broken: Broken,
    most: usize,
) -> Search {
    let mut runs = 0;
    let mut left: Vec<Vec<(usize, Choice)>> = vec![Vec::new()];
    while let Some(departures) = left.pop() {
        runs += 1;
        let from = departures.last().map_or(0, |(step, _)| step + 1);
        let (mut last, mut more) = (0, Vec::new());
        let run = Run::new(beginning, jobs, broken);
        let outcome = run.go(|step, ready| {
            let going = usual(last, ready);
            let planned = departures.iter().find(|(at, _)| *at == step);
            if step >= from && departures.len() < most {
                let choices = alternatives(going, ready);
                more.extend(choices.into_iter().map(|choice| (step, choice)));
            }
            let choice = planned.map_or(Choice::Run(going), |(_, choice)| *choice);
            if let Choice::Run(number) | Choice::RunLate(number) | Choice::RunLost(number) = choice
            {
                last = number;
            }
            choice
        });
        if let Err((violation, trace)) = outcome.await {
            let found = Some(format!("{violation}\nschedule {departures:?}\n{trace}"));
            return Search { runs, found };
        }
        for departure in more {
            left.push([&departures[..], &[departure]].concat());
        }
    }
    Search { runs, found: None }
}

/// Long schedules that a seed makes: everything may happen at any time.
pub(crate) async fn random_schedules(
    beginning: &Beginning,
    jobs: &[Job],
    broken: Broken,
    seeds: std::ops::Range<u64>,
) -> Search {
    let mut runs = 0;
    for seed in seeds {
        runs += 1;
        let mut random = StdRng::seed_from_u64(seed);
        // Some runs change all the time, some seldom.
        let stay = random.random_range(0.3..0.97);
        let mut last = 0;
        let run = Run::new(beginning, jobs, broken);
        let outcome = run.go(|_, ready| {
            let going = usual(last, ready);
            let (number, write) = if random.random_bool(stay) {
                *ready.iter().find(|(number, _)| *number == going).unwrap()
            } else {
                ready[random.random_range(0..ready.len())]
            };
            last = number;
            match random.random_range(0..100) {
                0..5 => Choice::RunLate(number),
                5..9 if write => Choice::RunLost(number),
                9 => Choice::Kill(number),
                _ => Choice::Run(number),
            }
        });
        if let Err((violation, trace)) = outcome.await {
            let found = Some(format!("{violation}\nseed {seed}\n{trace}"));
            return Search { runs, found };
        }
    }
    Search { runs, found: None }
}

/// What is in the bucket after nobody disturbed anybody.
pub(crate) async fn undisturbed(beginning: &Beginning, jobs: &[Job]) -> Arc<World> {
    let run = Run::new(beginning, jobs, Broken::Nothing);
    let mut last = 0;
    let world = run.go(|_, ready| {
        last = usual(last, ready);
        Choice::Run(last)
    });
    world
        .await
        .unwrap_or_else(|(violation, trace)| panic!("{violation}\n{trace}"))
}

/// Whether a backup is complete and not deleted.
pub(crate) fn is_listed(world: &World, id: &catalog::ids::BackupId) -> bool {
    let stored = world.store.bytes(keys::manifest(id).as_str());
    let complete = |body: bytes::Bytes| String::from_utf8_lossy(&body).contains(r#""complete""#);
    stored.is_some_and(complete) && world.store.bytes(keys::tombstone(id).as_str()).is_none()
}
