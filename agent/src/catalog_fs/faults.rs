//! The first thing that went wrong, for everybody.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::sync::watch;

use super::error::{Failure, FsError};
use super::lanes::Room;

/// What went wrong.
#[derive(Debug)]
pub(super) struct Faults {
    poison: watch::Sender<Option<Failure>>,
    /// The program was told, and the rest goes on; but the copy cannot become good.
    spoiled: Mutex<Option<Failure>>,
    /// Nothing is taken any more, though nothing went wrong.
    closed: AtomicBool,
    /// Who is waiting for what will never be.
    rooms: Mutex<Vec<Arc<Room>>>,
}

impl Faults {
    pub(super) fn new() -> Arc<Self> {
        let (poison, _) = watch::channel(None);
        Arc::new(Self {
            poison,
            spoiled: Mutex::default(),
            closed: AtomicBool::new(false),
            rooms: Mutex::default(),
        })
    }

    /// Has `room` closed with the first failure.
    pub(super) fn closes(&self, room: &Arc<Room>) {
        self.rooms().push(Arc::clone(room));
    }

    fn rooms(&self) -> MutexGuard<'_, Vec<Arc<Room>>> {
        self.rooms.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn spoiled(&self) -> MutexGuard<'_, Option<Failure>> {
        self.spoiled.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Ends the copy: every write from now on is answered by EIO.
    pub(super) fn poison(&self, failure: Failure) {
        let first = self.poison.send_if_modified(|poison| {
            let first = poison.is_none();
            if first {
                tracing::error!(%failure, "the copy has failed: the mount answers with errors");
                *poison = Some(failure);
            }
            first
        });
        if first {
            for room in self.rooms().iter() {
                room.close();
            }
        }
    }

    /// The copy goes on, and is not good.
    pub(super) fn spoil(&self, path: &str, what: &'static str) {
        tracing::error!(path, what, "a call is refused, and the copy is spoiled");
        let failure = Failure::Spoiled {
            path: path.to_owned(),
            what,
        };
        self.spoiled().get_or_insert(failure);
    }

    /// Nothing is taken from now on.
    pub(super) fn close(&self) {
        self.closed.store(true, Ordering::Release);
    }

    /// # Errors
    /// [`FsError::Io`] if the copy has failed, or is closed.
    pub(super) fn check(&self) -> Result<(), FsError> {
        if self.closed.load(Ordering::Acquire) || self.poison.borrow().is_some() {
            Err(FsError::Io)
        } else {
            Ok(())
        }
    }

    /// What went wrong first, if anything.
    pub(super) fn first(&self) -> Option<Failure> {
        let poison = self.poison.borrow().clone();
        poison.or_else(|| self.spoiled().clone())
    }

    /// Waits for the failure that ends the copy.
    pub(super) async fn failed(&self) -> Failure {
        let mut poison = self.poison.subscribe();
        match poison.wait_for(Option::is_some).await.as_deref() {
            Ok(Some(failure)) => failure.clone(),
            // The sender lives as long as this.
            _ => Failure::Closed,
        }
    }
}
