//! The WAL that a backup needs, written into the catalog while it is made: each segment is padded with zeros first
//! and then overwritten.

use std::fs::File;
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Condvar, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use agent_wal::{Lsn, SegmentName, SegmentSize};
use rustix::fs::OFlags;
use rustix::process::getppid;

use super::calls::{self, Out, STDIO, read_whole};
use super::content::Entry;
use super::faults::{self, Faults};
use super::log::Log;
use super::sql::Session;
use super::{Failure, Kind};

/// Zeros written at a time.
const PADDING: usize = 8192;
/// Most bytes written at a time: what a server sends in one message.
const CHUNK: u64 = 128 << 10;
/// How often the server is asked how far it is.
const ASK: Duration = Duration::from_millis(50);
/// How long the end may take to come.
const DEADLINE: Duration = Duration::from_mins(5);
/// A server says it is alive this often.
const KEEPALIVE: Duration = Duration::from_secs(5);

/// What to stream.
pub(super) struct Order {
    pub(super) kind: Kind,
    pub(super) log: Log,
    pub(super) faults: Faults,
    /// `pg_wal` of the server.
    pub(super) from: PathBuf,
    /// `database/pg_wal` of the backup.
    pub(super) to: PathBuf,
    pub(super) timeline: u32,
    pub(super) size: SegmentSize,
    /// Any position in the first segment.
    pub(super) start: Lsn,
    /// Whether the server keeps what was not streamed yet (`--temp-slot`).
    pub(super) slot: bool,
}

#[derive(Debug, Default)]
struct State {
    written: Lsn,
    first_is_padded: bool,
    /// Where it may end, and whether that is the end of a segment that will be full.
    stop: Option<Lsn>,
    ended: Option<Result<Vec<Entry>, Failure>>,
}

#[derive(Debug, Default)]
struct Shared {
    state: Mutex<State>,
    changed: Condvar,
}

/// The streaming thread.
#[derive(Debug)]
pub(super) struct Stream {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

impl Stream {
    /// Starts it with a session of its own.
    pub(super) fn start(order: Order, session: Session) -> Self {
        let shared = Arc::new(Shared::default());
        let other = Arc::clone(&shared);
        let thread = std::thread::spawn(move || {
            let mut streamer = Streamer::new(order, session, other);
            let ended = streamer.run();
            let mut state = streamer.shared.state.lock().expect("no panic under it");
            state.ended = Some(ended);
            streamer.shared.changed.notify_all();
        });
        Self {
            shared,
            thread: Some(thread),
        }
    }

    fn wait(&self, ready: impl Fn(&State) -> bool) -> Result<(), Failure> {
        let until = Instant::now() + DEADLINE;
        let mut state = self.shared.state.lock().expect("no panic under it");
        while !ready(&state) {
            if let Some(Err(e)) = &state.ended {
                return Err(e.clone());
            }
            if faults::interrupted() {
                return Err(Failure::new("Interrupted during WAL streaming"));
            }
            if Instant::now() > until {
                return Err(Failure::new("WAL was not received in time"));
            }
            let waited = self.shared.changed.wait_timeout(state, ASK);
            state = waited.expect("no panic under it").0;
        }
        Ok(())
    }

    /// Waits until the first segment is padded.
    pub(super) fn wait_first(&self) -> Result<(), Failure> {
        self.wait(|state| state.first_is_padded || state.ended.is_some())
    }

    /// Ends it at `stop` and waits; the segments' entries.
    pub(super) fn finish(mut self, stop: Lsn) -> Result<Vec<Entry>, Failure> {
        self.shared.state.lock().expect("no panic under it").stop = Some(stop);
        self.wait(|state| state.ended.is_some())?;
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
        let mut state = self.shared.state.lock().expect("no panic under it");
        state.ended.take().unwrap_or_else(|| Ok(Vec::new()))
    }
}

struct Streamer {
    order: Order,
    session: Session,
    shared: Arc<Shared>,
    /// The segment that is being written, and its file.
    current: Option<(SegmentName, Out)>,
    done: Vec<Entry>,
}

impl Streamer {
    fn new(order: Order, session: Session, shared: Arc<Shared>) -> Self {
        Self {
            order,
            session,
            shared,
            current: None,
            done: Vec::new(),
        }
    }

    fn run(&mut self) -> Result<Vec<Entry>, Failure> {
        let order = &self.order;
        let size = order.size;
        let parent = getppid();
        let first = SegmentName::of_lsn(order.timeline, order.start, size);
        let mut written = first.start_lsn(size);
        let log = order.log;
        if order.slot {
            self.session.hold_wal()?;
        }
        log.log(&format!(
            "started streaming WAL at {written} (timeline {})",
            order.timeline
        ));
        log.wal_client("check identify system success");
        log.wal_client(&format!("send START_REPLICATION {written} success"));
        log.wal_client("keepalive message is received");
        let mut alive = Instant::now();
        let timeline = order.timeline;
        loop {
            let stop = self.shared.state.lock().expect("no panic under it").stop;
            if stop.is_some_and(|stop| written >= stop) {
                break;
            }
            // gs_probackup's client gives up when its parent is not the one that started it.
            if self.order.kind == Kind::Gs && getppid() != parent {
                log.error("Problem in receivexlog");
                return Err(Failure::new("Interrupted during waiting for WAL archiving"));
            }
            if alive.elapsed() > KEEPALIVE {
                log.wal_client("keepalive message is received");
                alive = Instant::now();
            }
            // Beyond the stop position nothing is needed.
            let flushed = self.session.flushed()?.min(stop.unwrap_or(Lsn(u64::MAX)));
            if flushed <= written {
                faults::wait(ASK)?;
                continue;
            }
            while written < flushed {
                written = self.write(timeline, written, flushed)?;
            }
            if self.order.slot {
                self.session.release_wal(written)?;
            }
            let mut state = self.shared.state.lock().expect("no panic under it");
            state.written = written;
            state.first_is_padded = true;
            self.shared.changed.notify_all();
        }
        self.complete(false)?;
        log.log(&format!(
            "finished streaming WAL at {written} (timeline {timeline})"
        ));
        Ok(std::mem::take(&mut self.done))
    }

    /// Writes one piece of the log; the position after it.
    fn write(&mut self, timeline: u32, from: Lsn, to: Lsn) -> Result<Lsn, Failure> {
        let size = self.order.size;
        let segment = SegmentName::of_lsn(timeline, from, size);
        if self.current.is_none() {
            let out = self.pad(segment)?;
            self.current = Some((segment, out));
            if segment.number == size.number_of(self.order.start) {
                self.order.faults.reach("streaming", self.order.log)?;
            }
        }
        let end = Lsn(from.0 / CHUNK * CHUNK + CHUNK)
            .min(to)
            .min(segment.end_lsn(size));
        let length = usize::try_from(end.0 - from.0).unwrap_or(0);
        let mut bytes = vec![0; length];
        let path = self.order.from.join(segment.format(size));
        let file = File::open(&path).map_err(|e| Failure::call("open file", &path, e))?;
        file.read_exact_at(&mut bytes, from.0 - segment.start_lsn(size).0)
            .map_err(|e| Failure::call("read file", &path, e))?;
        if let Some((_, out)) = &mut self.current {
            out.write(&bytes)?;
        }
        if end == segment.end_lsn(size) {
            self.complete(true)?;
        }
        Ok(end)
    }

    /// Makes a segment's file, full of zeros.
    fn pad(&self, segment: SegmentName) -> Result<Out, Failure> {
        let size = self.order.size;
        let name = segment.format(size);
        let path = match self.order.kind {
            Kind::Gs => self.order.to.join(format!("{name}.partial")),
            Kind::Pg => self.order.to.join(name),
        };
        let mut out = Out::open(&path, OFlags::WRONLY | OFlags::CREATE, 0o600, 0)?;
        for _ in 0..size.bytes() / PADDING as u64 {
            out.write(&[0; PADDING])?;
        }
        out.seek(0)?;
        Ok(out)
    }

    /// Closes the segment that is being written.
    fn complete(&mut self, is_full: bool) -> Result<(), Failure> {
        let Some((segment, out)) = self.current.take() else {
            return Ok(());
        };
        let name = segment.format(self.order.size);
        if self.order.kind == Kind::Gs {
            out.sync()?;
        }
        out.close()?;
        let path = self.order.to.join(&name);
        if self.order.kind == Kind::Gs {
            // An incomplete one keeps its name: gs_probackup waits for it to be complete on a primary.
            let partial = self.order.to.join(format!("{name}.partial"));
            if is_full {
                calls::rename(&partial, &path)?;
            }
            return Ok(());
        }
        let entry = segment_entry(&path, &name)?;
        self.done.push(entry);
        Ok(())
    }
}

/// The entry of a segment in backup_content.control: it is read whole for its CRC.
pub(super) fn segment_entry(path: &Path, name: &str) -> Result<Entry, Failure> {
    let found = std::fs::metadata(path).map_err(|e| Failure::call("stat file", path, e))?;
    let bytes = read_whole(path, STDIO)?.unwrap_or_default();
    Ok(Entry {
        path: format!("pg_wal/{name}"),
        size: i64::try_from(found.len()).unwrap_or(i64::MAX),
        mode: 0o100_600,
        crc: crc32c::crc32c(&bytes),
        compress: "none".to_owned(),
        full_size: found.len(),
        ..Entry::default()
    })
}
