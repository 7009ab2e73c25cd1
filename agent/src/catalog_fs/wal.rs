//! Complete WAL segments: into the bucket, and back from there.

use std::collections::VecDeque;
use std::fmt;
use std::ops::Range;
use std::sync::Arc;

use bytes::{Bytes, BytesMut};
use futures_util::future::BoxFuture;
use tokio::runtime::Handle;
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use super::Done;
use super::error::{Failure, FsError};
use super::faults::Faults;
use super::lanes::Room;
use super::tree::{Data, Node};

/// Where complete WAL segments go. Both calls have deadlines of their own, and end when they are dropped.
pub trait WalSink: Send + Sync + fmt::Debug {
    /// Puts a complete segment into the bucket, durably. Repeated with the same bytes it succeeds.
    ///
    /// # Errors
    /// [`Failure::Wal`]; the copy has failed then.
    fn put(&self, segment: &str, bytes: Bytes) -> BoxFuture<'static, Result<(), Failure>>;

    /// Bytes of a segment that was put, verified. The range lies within the segment; memory for it, and little
    /// more, is paid for by the caller.
    ///
    /// # Errors
    /// [`Failure::Wal`].
    fn get(&self, segment: &str, range: Range<u64>) -> BoxFuture<'static, Result<Bytes, Failure>>;
}

/// The segments of one copy.
#[derive(Debug)]
pub(super) struct Wal {
    /// Bytes of a whole segment.
    pub(super) segment_size: u64,
    /// The memory of segments that are not in the bucket yet.
    pub(super) room: Arc<Room>,
    sink: Arc<dyn WalSink>,
    runtime: Handle,
    tasks: TaskTracker,
    cancel: CancellationToken,
    faults: Arc<Faults>,
    reads: mpsc::UnboundedSender<(Request, Done<Bytes>)>,
}

/// A read of a segment in the bucket.
struct Request {
    segment: String,
    /// Bytes of the segment.
    size: u64,
    range: Range<u64>,
}

type Requests = mpsc::UnboundedReceiver<(Request, Done<Bytes>)>;

/// What is kept of segments that are read back.
#[derive(Debug, Clone, Copy)]
pub(super) struct CacheSize {
    /// Bytes fetched at a time.
    pub(super) window: u64,
    /// Windows kept.
    pub(super) windows: usize,
}

impl Wal {
    pub(super) fn start(
        segment_size: u64,
        room: Arc<Room>,
        sink: Arc<dyn WalSink>,
        cache: CacheSize,
        faults: Arc<Faults>,
        runtime: Handle,
    ) -> Arc<Self> {
        #[expect(
            clippy::disallowed_methods,
            reason = "one request for each thread of the program, and a call must not block"
        )]
        let (reads, requests) = mpsc::unbounded_channel();
        let tasks = TaskTracker::new();
        let cancel = CancellationToken::new();
        let reader = Reader {
            sink: Arc::clone(&sink),
            size: cache,
            kept: VecDeque::new(),
        };
        let stop = cancel.clone();
        tasks.spawn_on(
            async move {
                tokio::select! {
                    biased;
                    () = stop.cancelled() => {}
                    () = reader.run(requests) => {}
                }
            },
            &runtime,
        );
        Arc::new(Self {
            segment_size,
            room,
            sink,
            runtime,
            tasks,
            cancel,
            faults,
            reads,
        })
    }

    /// Sends a complete segment on its way; the file's memory is free when it has arrived.
    pub(super) fn put(&self, node: Arc<Node>, segment: String, bytes: Bytes) {
        self.room.begin();
        let (sink, room) = (Arc::clone(&self.sink), Arc::clone(&self.room));
        let (faults, cancel) = (Arc::clone(&self.faults), self.cancel.clone());
        let task = async move {
            let put = sink.put(&segment, bytes.clone());
            let put = tokio::select! {
                biased;
                () = cancel.cancelled() => Err(Failure::Closed),
                put = put => put,
            };
            match put {
                Ok(()) => {
                    let held = match &mut node.state().data {
                        Data::Segment(held) => held.stored(&bytes),
                        _ => None,
                    };
                    drop(held);
                }
                Err(Failure::Closed) => {}
                Err(failure) => faults.poison(failure),
            }
            drop(bytes);
            room.end();
        };
        self.tasks.spawn_on(task, &self.runtime);
    }

    /// Reads a segment that is in the bucket.
    pub(super) fn read(&self, segment: String, size: u64, range: Range<u64>, done: Done<Bytes>) {
        let request = Request {
            segment,
            size,
            range,
        };
        if let Err(unsent) = self.reads.send((request, done)) {
            (unsent.0.1)(Err(FsError::Io));
        }
    }

    /// Ends everything that is under way, and waits for it.
    pub(super) async fn stop(&self) {
        self.cancel.cancel();
        self.tasks.close();
        self.tasks.wait().await;
    }
}

impl Drop for Wal {
    fn drop(&mut self) {
        self.cancel.cancel();
    }
}

/// Reads back, one request after the other: a program reads its WAL in one thread.
struct Reader {
    sink: Arc<dyn WalSink>,
    size: CacheSize,
    /// Segment, number of the window, its bytes; the last used one at the end.
    kept: VecDeque<(String, u64, Bytes)>,
}

impl Reader {
    async fn run(mut self, mut requests: Requests) {
        while let Some((request, done)) = requests.recv().await {
            let read = self.read(&request).await;
            let read = read.map_err(|failure| {
                tracing::error!(segment = %request.segment, %failure, "a WAL segment cannot be read back");
                FsError::Io
            });
            done(read);
        }
    }

    async fn read(&mut self, request: &Request) -> Result<Bytes, Failure> {
        let mut whole = BytesMut::new();
        let mut at = request.range.start;
        while at < request.range.end {
            let number = at / self.size.window;
            let start = number * self.size.window;
            let window = self.window(request, number).await?;
            let from = usize::try_from(at - start).unwrap_or(usize::MAX);
            let until = usize::try_from(request.range.end - start).unwrap_or(usize::MAX);
            let until = until.min(window.len());
            if from >= until {
                return Err(Failure::Wal {
                    segment: request.segment.clone(),
                    what: "fewer bytes came back than were sent".into(),
                });
            }
            if at == request.range.start && start + until as u64 == request.range.end {
                return Ok(window.slice(from..until));
            }
            whole.extend_from_slice(&window.slice(from..until));
            at = start + until as u64;
        }
        Ok(whole.freeze())
    }

    async fn window(&mut self, request: &Request, number: u64) -> Result<Bytes, Failure> {
        let here = |kept: &(String, u64, Bytes)| kept.0 == request.segment && kept.1 == number;
        if let Some(found) = self.kept.iter().position(here)
            && let Some(kept) = self.kept.remove(found)
        {
            let bytes = kept.2.clone();
            self.kept.push_back(kept);
            return Ok(bytes);
        }
        // Room first.
        while self.kept.len() >= self.size.windows {
            self.kept.pop_front();
        }
        let start = number * self.size.window;
        let end = request.size.min(start + self.size.window);
        let bytes = self.sink.get(&request.segment, start..end).await?;
        let kept = (request.segment.clone(), number, bytes.clone());
        self.kept.push_back(kept);
        Ok(bytes)
    }
}
