//! The agent's side of `wal-get`: a private socket that hands WAL files from the bucket to one recovery.
//!
//! A file is fetched into the spool directory (next to the data directory, so that the client moves it by
//! rename), verified and synced before it is announced; the few that follow are fetched meanwhile.
//! Memory is one buffer a fetch; the disk holds at most [`AHEAD_BYTES`] of segments that nobody has asked for yet.

use std::collections::HashMap;
use std::fs;
use std::io;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use agent_api::{ApiError, ErrorKind};
use agent_wal::{SegmentName, SegmentSize};
use tokio::io::{AsyncBufReadExt as _, AsyncReadExt as _, AsyncWriteExt as _, BufReader};
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::watch;
use tokio::time::{sleep, timeout};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use super::errors::cancelled;
use crate::walget::{Answer, LINE_MAX, WalFile, parse_request};

/// Most segments fetched ahead.
const AHEAD: u64 = 4;
/// Most bytes of segments fetched ahead; one segment is always allowed.
const AHEAD_BYTES: u64 = 64 << 20;
/// How often a waiting client hears of us; it gives up after 30 seconds of silence.
const HEARTBEAT: Duration = Duration::from_secs(1);
/// How long a client may take to say what it wants, or to read a line.
const CLIENT_DEADLINE: Duration = Duration::from_secs(10);

/// Where WAL comes from.
pub(super) trait WalSource: Send + Sync + std::fmt::Debug + 'static {
    /// Writes the verified file to `into` and syncs it. Returns its size in bytes, or `None` if it is
    /// PROVED absent. Must end by itself when the source does not answer.
    fn fetch(
        &self,
        file: &WalFile,
        into: &Path,
    ) -> impl Future<Output = Result<Option<u64>, ApiError>> + Send;
}

/// What the recovery needs: without these segments it does not reach its point.
#[derive(Debug, Clone, Copy)]
pub(super) struct Needed {
    /// First segment.
    pub(super) first: SegmentName,
    /// Last segment, on the same timeline.
    pub(super) last: SegmentName,
    /// Size of the segments.
    pub(super) size: SegmentSize,
}

impl Needed {
    fn has(&self, file: &WalFile) -> bool {
        self.segment(file).is_some_and(|segment| {
            segment.timeline == self.last.timeline
                && (self.first.number..=self.last.number).contains(&segment.number)
        })
    }

    fn segment(&self, file: &WalFile) -> Option<SegmentName> {
        match file {
            WalFile::Segment(name) => SegmentName::parse(name, self.size).ok(),
            WalFile::History(_) | WalFile::Other(_) => None,
        }
    }

    /// The segments to fetch while the server replays `file`.
    fn after(&self, file: &WalFile) -> Vec<WalFile> {
        let Some(segment) = self.segment(file).filter(|_| self.has(file)) else {
            return Vec::new();
        };
        let count = (AHEAD_BYTES / self.size.bytes()).clamp(1, AHEAD);
        let last = self.last.number.min(segment.number + count);
        let name = |number| SegmentName { number, ..segment };
        (segment.number + 1..=last)
            .map(|number| WalFile::Segment(name(number).format(self.size)))
            .collect()
    }
}

/// A file in the spool, verified and synced.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Spooled {
    /// Where it is.
    pub(super) path: PathBuf,
    /// Its size in bytes.
    pub(super) size: u64,
}

type Fetched = Result<Option<Spooled>, ApiError>;

/// The server; stops when it is dropped or `stop` is awaited.
#[derive(Debug)]
pub(super) struct WalServer<S: WalSource> {
    shared: Arc<Shared<S>>,
    socket: PathBuf,
}

#[derive(Debug)]
struct Shared<S> {
    source: S,
    needed: Needed,
    spool: PathBuf,
    /// Fetches under way or done and not yet handed out.
    slots: Mutex<HashMap<WalFile, watch::Receiver<Option<Fetched>>>>,
    next_spool: AtomicU64,
    served: watch::Sender<u64>,
    failure: Mutex<Option<(WalFile, ApiError)>>,
    cancel: CancellationToken,
    tasks: TaskTracker,
}

impl<S: WalSource> WalServer<S> {
    /// Listens on `socket`, in a directory that only we can open, and spools into `spool`, which exists and
    /// has some files already.
    pub(super) fn start(
        source: S,
        needed: Needed,
        spooled: HashMap<WalFile, Spooled>,
        socket: &Path,
        spool: &Path,
        cancel: &CancellationToken,
    ) -> io::Result<Self> {
        let listener = UnixListener::bind(socket)?;
        fs::set_permissions(socket, fs::Permissions::from_mode(0o600))?;
        let done = |spooled| watch::channel(Some(Ok(Some(spooled)))).1;
        let slots = spooled
            .into_iter()
            .map(|(file, spooled)| (file, done(spooled)))
            .collect();
        let shared = Arc::new(Shared {
            source,
            needed,
            spool: spool.to_owned(),
            slots: Mutex::new(slots),
            next_spool: AtomicU64::new(0),
            served: watch::Sender::new(0),
            failure: Mutex::new(None),
            cancel: cancel.child_token(),
            tasks: TaskTracker::new(),
        });
        shared.tasks.spawn(accept(Arc::clone(&shared), listener));
        Ok(Self {
            shared,
            socket: socket.to_owned(),
        })
    }

    /// Segments handed out so far; changes wake the receiver.
    pub(super) fn served(&self) -> watch::Receiver<u64> {
        self.shared.served.subscribe()
    }

    /// Why the last file that could not be handed out could not, if nothing was handed out since.
    pub(super) fn failure(&self) -> Option<ApiError> {
        let failure = lock(&self.shared.failure);
        failure.as_ref().map(|(file, error)| {
            let mut error = error.clone();
            error.message = format!("WAL file {}: {}", file.name(), error.message);
            error
        })
    }

    /// The first segment that recovery needs, in the spool.
    ///
    /// # Errors
    /// Why it cannot be had.
    pub(super) async fn first(&self) -> Result<Spooled, ApiError> {
        let needed = &self.shared.needed;
        let file = WalFile::Segment(needed.first.format(needed.size));
        let answer = tokio::select! {
            () = self.shared.cancel.cancelled() => return Err(cancelled()),
            fetched = self.shared.get(&file) => self.shared.answer(&file, fetched),
        };
        if let Answer::Found { path, size } = answer {
            return Ok(Spooled { path, size });
        }
        Err(self.failure().unwrap_or_else(|| {
            let message = format!("WAL file {} is not there", file.name());
            ApiError::new(ErrorKind::Damaged, message)
        }))
    }

    /// Name of the first segment that recovery needs.
    pub(super) fn first_name(&self) -> String {
        let needed = &self.shared.needed;
        needed.first.format(needed.size)
    }

    /// Stops serving and fetching, and waits until nothing touches the spool any more.
    pub(super) async fn stop(self) {
        self.shared.cancel.cancel();
        self.shared.tasks.close();
        self.shared.tasks.wait().await;
    }
}

impl<S: WalSource> Drop for WalServer<S> {
    fn drop(&mut self) {
        self.shared.cancel.cancel();
        // The directory goes too; this only shortens the time in which a client meets a dead socket.
        let _ = fs::remove_file(&self.socket);
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

async fn accept<S: WalSource>(shared: Arc<Shared<S>>, listener: UnixListener) {
    loop {
        let accepted = tokio::select! {
            () = shared.cancel.cancelled() => return,
            accepted = listener.accept() => accepted,
        };
        match accepted {
            Ok((stream, _)) => {
                let connection = serve(Arc::clone(&shared), stream);
                shared.tasks.spawn(connection);
            }
            Err(error) => {
                // Out of file descriptors, most likely; the client waits or tries again.
                tracing::warn!(%error, "wal-get: accept");
                sleep(Duration::from_millis(100)).await;
            }
        }
    }
}

async fn serve<S: WalSource>(shared: Arc<Shared<S>>, stream: UnixStream) {
    let cancel = shared.cancel.clone();
    let served = tokio::select! {
        () = cancel.cancelled() => return,
        served = shared.connection(stream) => served,
    };
    if let Err(error) = served {
        tracing::warn!(%error, "wal-get: a client went away");
    }
}

impl<S: WalSource> Shared<S> {
    async fn connection(self: &Arc<Self>, stream: UnixStream) -> io::Result<()> {
        let (reader, mut writer) = stream.into_split();
        let mut line = String::new();
        let mut reader = BufReader::new(reader.take(LINE_MAX));
        timeout(CLIENT_DEADLINE, reader.read_line(&mut line)).await??;
        let file = match parse_request(&line) {
            Ok(file) => file,
            Err(message) => return say(&mut writer, &Answer::Failed { message }).await,
        };
        let fetch = self.get(&file);
        tokio::pin!(fetch);
        let fetched = loop {
            tokio::select! {
                fetched = &mut fetch => break fetched,
                () = sleep(HEARTBEAT) => say(&mut writer, &Answer::Wait).await?,
            }
        };
        let answer = self.answer(&file, fetched);
        say(&mut writer, &answer).await
    }

    /// Waits for the file, fetching it if nobody does yet.
    async fn get(self: &Arc<Self>, file: &WalFile) -> Fetched {
        let ahead = lock(&self.slots).contains_key(file);
        let fetched = self.take(file).await;
        if ahead && !matches!(fetched, Ok(Some(_))) {
            // What was found ahead of time may be long ago.
            return self.take(file).await;
        }
        fetched
    }

    async fn take(self: &Arc<Self>, file: &WalFile) -> Fetched {
        let mut slot = self.slot(file);
        for next in self.needed.after(file) {
            self.slot(&next);
        }
        let fetched = match slot.wait_for(Option::is_some).await {
            Ok(fetched) => fetched.clone(),
            Err(_) => None,
        };
        // Handed out once: the client moves it away, a second request fetches again.
        lock(&self.slots).remove(file);
        fetched.unwrap_or_else(|| Err(ApiError::new(ErrorKind::Internal, "the fetch was dropped")))
    }

    fn slot(self: &Arc<Self>, file: &WalFile) -> watch::Receiver<Option<Fetched>> {
        let mut slots = lock(&self.slots);
        if let Some(slot) = slots.get(file) {
            return slot.clone();
        }
        let (sender, receiver) = watch::channel(None);
        slots.insert(file.clone(), receiver.clone());
        let shared = Arc::clone(self);
        let file = file.clone();
        self.tasks.spawn(async move {
            let cancel = shared.cancel.clone();
            let fetched = tokio::select! {
                () = cancel.cancelled() => return,
                fetched = shared.fetch(&file) => fetched,
            };
            sender.send_replace(Some(fetched));
        });
        receiver
    }

    async fn fetch(&self, file: &WalFile) -> Fetched {
        // Numbered: a dropped fetch may still be writing when the same file is fetched again.
        let number = self.next_spool.fetch_add(1, Ordering::Relaxed);
        let path = self.spool.join(format!("{}.{number}", file.name()));
        let size = match file {
            WalFile::Other(_) => None,
            WalFile::Segment(_) | WalFile::History(_) => self.source.fetch(file, &path).await?,
        };
        match (size, self.needed.segment(file)) {
            (Some(size), Some(_)) if size != self.needed.size.bytes() => Err(ApiError::new(
                ErrorKind::Damaged,
                format!(
                    "it has {size} bytes, a segment has {}",
                    self.needed.size.bytes()
                ),
            )),
            (size, _) => Ok(size.map(|size| Spooled { path, size })),
        }
    }

    /// What the client is told. "Absent" means the end of WAL to a server; a segment that the point needs is
    /// never that, whatever the bucket says: PostgreSQL 12 would open short of the point.
    fn answer(&self, file: &WalFile, fetched: Fetched) -> Answer {
        let failed = match fetched {
            Ok(Some(Spooled { path, size })) => {
                *lock(&self.failure) = None;
                if matches!(file, WalFile::Segment(_)) {
                    self.served.send_modify(|served| *served += 1);
                }
                return Answer::Found { path, size };
            }
            Ok(None) if !self.needed.has(file) => return Answer::Absent,
            Ok(None) => ApiError::new(
                ErrorKind::Damaged,
                "the bucket does not have it, and the point cannot be reached without it",
            ),
            Err(error) => error,
        };
        tracing::warn!(file = file.name(), error = %failed, "wal-get: cannot hand out");
        let message = failed.message.clone();
        *lock(&self.failure) = Some((file.clone(), failed));
        Answer::Failed { message }
    }
}

async fn say(writer: &mut (impl tokio::io::AsyncWrite + Unpin), answer: &Answer) -> io::Result<()> {
    let mut line = serde_json::to_string(answer)?;
    line.push('\n');
    timeout(CLIENT_DEADLINE, writer.write_all(line.as_bytes())).await?
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;
    use std::time::Instant;

    use super::*;
    use crate::walget;

    const SIZE: u64 = 1 << 20;

    fn segment(number: u64) -> WalFile {
        let size = SegmentSize::new(SIZE).unwrap();
        let name = SegmentName {
            timeline: 1,
            number,
        };
        WalFile::Segment(name.format(size))
    }

    /// A bucket with some files.
    #[derive(Debug, Default)]
    struct Bucket {
        files: HashSet<WalFile>,
        /// Takes this long for each.
        slow: Duration,
        down: Arc<Mutex<bool>>,
        fetched: Arc<Mutex<Vec<WalFile>>>,
    }

    impl WalSource for Bucket {
        async fn fetch(&self, file: &WalFile, into: &Path) -> Result<Option<u64>, ApiError> {
            lock(&self.fetched).push(file.clone());
            sleep(self.slow).await;
            if *lock(&self.down) {
                return Err(ApiError::new(
                    ErrorKind::StoreUnavailable,
                    "connection refused",
                ));
            }
            if !self.files.contains(file) {
                return Ok(None);
            }
            let bytes = vec![7; usize::try_from(SIZE).unwrap()];
            fs::write(into, bytes).unwrap();
            Ok(Some(SIZE))
        }
    }

    struct Fixture {
        directory: tempfile::TempDir,
        server: WalServer<Bucket>,
        cancel: CancellationToken,
    }

    impl Fixture {
        /// A server for a recovery that needs segments 3 to 9.
        fn new(bucket: Bucket) -> Self {
            let directory = tempfile::tempdir().unwrap();
            let name = |number| SegmentName {
                timeline: 1,
                number,
            };
            let needed = Needed {
                first: name(3),
                last: name(9),
                size: SegmentSize::new(SIZE).unwrap(),
            };
            let cancel = CancellationToken::new();
            let socket = directory.path().join("s");
            let spool = directory.path();
            let server = WalServer::start(bucket, needed, HashMap::new(), &socket, spool, &cancel);
            Self {
                server: server.unwrap(),
                directory,
                cancel,
            }
        }

        async fn ask(&self, file: &WalFile) -> Result<Answer, String> {
            let (socket, file) = (self.server.socket.clone(), file.clone());
            let asked = tokio::task::spawn_blocking(move || walget::ask(&socket, &file));
            asked.await.unwrap()
        }
    }

    #[tokio::test]
    async fn what_is_there_is_handed_out_and_the_next_ones_are_fetched_ahead() {
        let bucket = Bucket {
            files: (3..=12).map(segment).collect(),
            ..Bucket::default()
        };
        let fetched = Arc::clone(&bucket.fetched);
        let fixture = Fixture::new(bucket);
        let Ok(Answer::Found { path, size }) = fixture.ask(&segment(3)).await else {
            panic!("not found");
        };
        assert!(size == SIZE && path.starts_with(fixture.directory.path()));
        let Ok(Answer::Found { .. }) = fixture.ask(&segment(8)).await else {
            panic!("not found");
        };
        // Moved away by the client; asked for again it is fetched again.
        fs::remove_file(path).unwrap();
        assert!(matches!(
            fixture.ask(&segment(3)).await,
            Ok(Answer::Found { .. })
        ));
        assert_eq!(*fixture.server.served().borrow(), 3);
        fixture.server.stop().await;
        let mut fetched = lock(&fetched).clone();
        fetched.sort_by(|a, b| a.name().cmp(b.name()));
        // 3 twice, 4 to 7 after it, 8 and, as the last that is needed, 9.
        let expected: Vec<_> = [3, 3, 4, 5, 6, 7, 8, 9].map(segment).to_vec();
        assert_eq!(fetched, expected);
    }

    #[tokio::test]
    async fn absent_is_said_only_of_what_the_point_does_not_need() {
        let fixture = Fixture::new(Bucket::default());
        let history = WalFile::parse("00000002.history").unwrap();
        let partial = WalFile::parse("000000010000000000000002.partial").unwrap();
        for file in [history, partial, segment(10), segment(2)] {
            assert_eq!(fixture.ask(&file).await, Ok(Answer::Absent), "{file:?}");
        }
        assert!(fixture.server.failure().is_none());
        for number in [3, 9] {
            let answer = fixture.ask(&segment(number)).await;
            assert!(matches!(answer, Ok(Answer::Failed { .. })), "{answer:?}");
            let failure = fixture.server.failure().unwrap();
            assert_eq!(failure.kind, ErrorKind::Damaged);
            assert!(failure.message.contains(segment(number).name()));
        }
    }

    #[tokio::test]
    async fn a_store_that_is_down_is_never_the_end_of_wal() {
        let bucket = Bucket {
            files: (3..=9).map(segment).collect(),
            ..Bucket::default()
        };
        let down = Arc::clone(&bucket.down);
        let fixture = Fixture::new(bucket);
        *lock(&down) = true;
        for file in [
            segment(4),
            segment(11),
            WalFile::parse("00000002.history").unwrap(),
        ] {
            let Ok(Answer::Failed { message }) = fixture.ask(&file).await else {
                panic!("{file:?} did not fail");
            };
            assert!(message.contains("connection refused"));
            assert_eq!(
                fixture.server.failure().unwrap().kind,
                ErrorKind::StoreUnavailable
            );
        }
        // What failed ahead of time is tried again when it is asked for.
        *lock(&down) = false;
        assert!(matches!(
            fixture.ask(&segment(5)).await,
            Ok(Answer::Found { .. })
        ));
        assert!(fixture.server.failure().is_none());
    }

    #[tokio::test]
    async fn a_client_waits_for_a_slow_store_and_hears_when_the_agent_stops() {
        let fixture = Fixture::new(Bucket {
            slow: Duration::from_mins(1),
            ..Bucket::default()
        });
        let begun = Instant::now();
        let cancel = fixture.cancel.clone();
        let wanted = segment(3);
        let (answer, ()) = tokio::join!(fixture.ask(&wanted), async {
            // Longer than a heartbeat, so that a `wait` is read too.
            sleep(HEARTBEAT + Duration::from_millis(200)).await;
            cancel.cancel();
        });
        assert!(answer.unwrap_err().contains("went away"));
        assert!(begun.elapsed() < Duration::from_secs(30));
        let socket = fixture.server.socket.clone();
        fixture.server.stop().await;
        assert!(!socket.exists());
    }

    #[tokio::test]
    async fn a_stranger_gets_no_file() {
        let fixture = Fixture::new(Bucket::default());
        let mode = fs::metadata(&fixture.server.socket)
            .unwrap()
            .permissions()
            .mode();
        assert_eq!(mode & 0o777, 0o600);
        let mut stream = UnixStream::connect(&fixture.server.socket).await.unwrap();
        stream
            .write_all(b"GET /../../etc/passwd HTTP/1.1\n")
            .await
            .unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).await.unwrap();
        assert!(answer.starts_with(r#"{"answer":"failed""#), "{answer}");
    }
}
