//! An executor with a time of its own: when nothing can go on, it is as late as the next sleeper wants.

use std::cell::RefCell;
use std::collections::{BTreeMap, VecDeque};
use std::pin::Pin;
use std::sync::{Arc, Mutex};
use std::task::{Context, Poll, Wake, Waker};
use std::time::Duration;

use crate::coordinator::shardingsphere::clock::Clock;

type Task = Pin<Box<dyn Future<Output = ()>>>;

#[derive(Default)]
struct State {
    now: Duration,
    timers: BTreeMap<(Duration, u64), Waker>,
    tasks: BTreeMap<u64, Task>,
    last: u64,
    woken: Arc<Mutex<VecDeque<u64>>>,
}

thread_local! {
    static STATE: RefCell<State> = RefCell::default();
}

struct Woken {
    task: u64,
    queue: Arc<Mutex<VecDeque<u64>>>,
}

impl Wake for Woken {
    fn wake(self: Arc<Self>) {
        self.queue.lock().unwrap().push_back(self.task);
    }
}

fn number() -> u64 {
    STATE.with_borrow_mut(|state| {
        state.last += 1;
        state.last
    })
}

/// Runs `task` beside all others.
pub(super) fn spawn(task: impl Future<Output = ()> + 'static) {
    let id = number();
    STATE.with_borrow_mut(|state| {
        state.tasks.insert(id, Box::pin(task));
        state.woken.lock().unwrap().push_back(id);
    });
}

pub(super) fn now() -> Duration {
    STATE.with_borrow(|state| state.now)
}

pub(super) async fn sleep(how_long: Duration) {
    sleep_until(now() + how_long).await;
}

pub(super) async fn sleep_until(until: Duration) {
    let mut key = None;
    std::future::poll_fn(|cx| {
        if now() >= until {
            return Poll::Ready(());
        }
        let id = *key.get_or_insert_with(number);
        STATE.with_borrow_mut(|state| {
            state.timers.insert((until, id), cx.waker().clone());
        });
        Poll::Pending
    })
    .await;
}

/// The model's.
#[derive(Debug, Clone, Copy)]
pub(super) struct Virtual;

impl Clock for Virtual {
    fn now(&self) -> Duration {
        now()
    }

    async fn sleep(&self, how_long: Duration) {
        sleep(how_long).await;
    }
}

/// Runs `story` and all that it spawns, from the beginning of time until it ends.
pub(super) fn run<T: 'static>(story: impl Future<Output = T> + 'static) -> T {
    STATE.with_borrow_mut(|state| *state = State::default());
    let done = std::rc::Rc::new(RefCell::new(None));
    let result = std::rc::Rc::clone(&done);
    spawn(async move {
        let value = story.await;
        *result.borrow_mut() = Some(value);
    });
    loop {
        let next = STATE.with_borrow(|state| state.woken.lock().unwrap().pop_front());
        if let Some(id) = next {
            poll(id);
        } else {
            pass_time();
        }
        if let Some(value) = done.borrow_mut().take() {
            // Dropped outside of the borrow: tasks may hold what looks at the time.
            let left = STATE.with_borrow_mut(std::mem::take);
            drop(left);
            return value;
        }
    }
}

fn poll(id: u64) {
    // Woken after its end, or twice.
    let taken = STATE.with_borrow_mut(|state| state.tasks.remove(&id));
    let Some(mut task) = taken else { return };
    let queue = STATE.with_borrow(|state| Arc::clone(&state.woken));
    let waker = Waker::from(Arc::new(Woken { task: id, queue }));
    if task
        .as_mut()
        .poll(&mut Context::from_waker(&waker))
        .is_pending()
    {
        STATE.with_borrow_mut(|state| state.tasks.insert(id, task));
    }
}

fn pass_time() {
    let waker = STATE.with_borrow_mut(|state| {
        let ((at, _), waker) = state
            .timers
            .pop_first()
            .expect("nothing can ever happen again");
        state.now = state.now.max(at);
        waker
    });
    waker.wake();
}
