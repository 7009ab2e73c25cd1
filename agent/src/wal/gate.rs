//! The agent's side of `wal-put`: what may leave the server's disk, and what a backup still needs.
//!
//! The server asks about each segment it has filled, and keeps it as long as the answer is no. The answer is no
//! while a backup holds it: from the segment that was being written when the hold began, to the end of what is in the
//! bucket. Without a hold it is always yes. The socket is there as long as the agent, because the server's
//! `archive_command` names it for good.

use std::collections::HashMap;
use std::fs::{self, DirBuilder};
use std::io;
use std::os::unix::fs::{
    DirBuilderExt as _, FileTypeExt as _, MetadataExt as _, PermissionsExt as _,
};
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use agent_wal::{Lsn, SegmentName, SegmentSize};
use tokio::io::{AsyncBufReadExt as _, AsyncReadExt as _, AsyncWriteExt as _, BufReader};
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::{Semaphore, watch};
use tokio::time::timeout;
use uuid::Uuid;

use crate::walput::{Answer, LINE_MAX, parse_request};

/// How long a question waits for its segment to be shipped: an answer of no costs the server a line in its log
/// and up to a minute until it asks again. A server that is being stopped waits for it too.
pub const PATIENCE: Duration = Duration::from_secs(3);
/// How long a client may take to say what it wants, or to read the answer.
const CLIENT_DEADLINE: Duration = Duration::from_secs(5);
/// Questions at the same time. A server has one.
const QUESTIONS: usize = 16;
/// Pause after the system refused a connection (out of descriptors).
const PAUSE: Duration = Duration::from_millis(200);

/// What is held, by the operation that holds it. Clones share it.
#[derive(Debug, Clone)]
pub struct ArchiveGate {
    holds: Arc<watch::Sender<HashMap<Uuid, Hold>>>,
}

#[derive(Debug, Clone, Copy)]
struct Hold {
    size: SegmentSize,
    /// Everything before it may go.
    from: Lsn,
}

impl Hold {
    fn keeps(&self, name: &str) -> bool {
        // Histories and the like are never removed for being archived.
        SegmentName::parse(name, self.size)
            .is_ok_and(|segment| segment.end_lsn(self.size) > self.from)
    }
}

impl Default for ArchiveGate {
    fn default() -> Self {
        Self {
            holds: Arc::new(watch::Sender::new(HashMap::new())),
        }
    }
}

impl ArchiveGate {
    /// Holds every segment from now on, until [`HeldHandle::advance`] says from where.
    #[must_use]
    pub fn hold(&self, operation: Uuid, size: SegmentSize) -> Held {
        let hold = Hold { size, from: Lsn(0) };
        self.holds.send_modify(|holds| {
            holds.insert(operation, hold);
        });
        Held {
            gate: self.clone(),
            operation,
        }
    }

    /// Whether nothing needs the file of that name.
    #[must_use]
    pub fn lets_go(&self, name: &str) -> bool {
        !self.holds.borrow().values().any(|hold| hold.keeps(name))
    }

    /// The answer about `name`, now or when it is shipped.
    async fn answer(&self, name: &str) -> Answer {
        let mut holds = self.holds.subscribe();
        let free = holds.wait_for(|holds| !holds.values().any(|hold| hold.keeps(name)));
        match timeout(PATIENCE, free).await {
            Err(_) => Answer::Keep,
            Ok(_) => Answer::Go,
        }
    }

    /// Answers on `socket` until the program ends. The directory is made if it is not there, for us alone.
    ///
    /// # Errors
    /// If the directory is not ours alone, or somebody else answers there.
    pub fn serve(&self, socket: &Path) -> io::Result<()> {
        let listener = listen(socket)?;
        let gate = self.clone();
        tokio::spawn(async move {
            let questions = Arc::new(Semaphore::new(QUESTIONS));
            loop {
                let Ok(permit) = Arc::clone(&questions).acquire_owned().await else {
                    return;
                };
                match listener.accept().await {
                    Ok((stream, _)) => {
                        let gate = gate.clone();
                        tokio::spawn(async move {
                            let _permit = permit;
                            if let Err(error) = gate.converse(stream).await {
                                tracing::debug!("a wal-put went away: {error}");
                            }
                        });
                    }
                    Err(error) => {
                        tracing::warn!("the archive socket: {error}");
                        tokio::time::sleep(PAUSE).await;
                    }
                }
            }
        });
        Ok(())
    }

    async fn converse(&self, stream: UnixStream) -> io::Result<()> {
        let mut stream = BufReader::new(stream);
        let mut line = String::new();
        let mut limited = (&mut stream).take(LINE_MAX);
        timeout(CLIENT_DEADLINE, limited.read_line(&mut line)).await??;
        let Some(name) = parse_request(&line) else {
            return Err(io::Error::other("its request is not understood"));
        };
        let answer = self.answer(name).await;
        tracing::debug!(name, ?answer, "the server asked about a WAL file");
        let written = stream.write_all(answer.line().as_bytes());
        timeout(CLIENT_DEADLINE, written).await?
    }
}

/// A hold. It ends with this.
#[derive(Debug)]
pub struct Held {
    gate: ArchiveGate,
    operation: Uuid,
}

impl Held {
    /// A handle that moves it and does not end it.
    #[must_use]
    pub fn handle(&self) -> HeldHandle {
        HeldHandle {
            gate: self.gate.clone(),
            operation: self.operation,
        }
    }

    /// Lets go of everything. May be repeated.
    pub fn release(&self) {
        self.gate
            .holds
            .send_if_modified(|holds| holds.remove(&self.operation).is_some());
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        self.release();
    }
}

/// Moves a hold.
#[derive(Debug, Clone)]
pub struct HeldHandle {
    gate: ArchiveGate,
    operation: Uuid,
}

impl HeldHandle {
    /// Where it begins; `None`: it has ended.
    #[must_use]
    pub fn from(&self) -> Option<Lsn> {
        let holds = self.gate.holds.borrow();
        holds.get(&self.operation).map(|hold| hold.from)
    }

    /// Lets go of WAL before `lsn`. Never goes back.
    pub fn advance(&self, lsn: Lsn) {
        self.gate
            .holds
            .send_if_modified(|holds| match holds.get_mut(&self.operation) {
                Some(hold) if hold.from < lsn => {
                    hold.from = lsn;
                    true
                }
                _ => false,
            });
    }
}

/// Listens on `socket`. One that a dead agent left is replaced.
fn listen(socket: &Path) -> io::Result<UnixListener> {
    let directory = socket.parent().unwrap_or(Path::new("/"));
    DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(directory)?;
    private(directory)?;
    match fs::symlink_metadata(socket) {
        Ok(there) if !there.file_type().is_socket() => {
            let message = format!("`{}` is there and no socket", socket.display());
            return Err(io::Error::new(io::ErrorKind::AlreadyExists, message));
        }
        Ok(_) => {
            if std::os::unix::net::UnixStream::connect(socket).is_ok() {
                let message = format!(
                    "another agent answers on `{}`: give each its own --archive-socket",
                    socket.display()
                );
                return Err(io::Error::new(io::ErrorKind::AddrInUse, message));
            }
            fs::remove_file(socket)?;
        }
        Err(_) => {}
    }
    let listener = UnixListener::bind(socket)?;
    fs::set_permissions(socket, fs::Permissions::from_mode(0o600))?;
    Ok(listener)
}

/// Whoever can write into the directory could answer in our place.
fn private(directory: &Path) -> io::Result<()> {
    let metadata = fs::symlink_metadata(directory)?;
    let ours = metadata.uid() == rustix::process::geteuid().as_raw();
    if metadata.is_dir() && ours && metadata.mode() & 0o022 == 0 {
        return Ok(());
    }
    let message = format!(
        "`{}` is not a directory that only the agent's user can write to",
        directory.display()
    );
    Err(io::Error::new(io::ErrorKind::PermissionDenied, message))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::walput;

    const SIZE: u64 = 16 << 20;

    fn name(number: u64) -> String {
        format!("00000001{:08X}{:08X}", number / 256, number % 256)
    }

    fn size() -> SegmentSize {
        SegmentSize::new(SIZE).unwrap()
    }

    #[test]
    fn what_is_not_shipped_is_kept_while_it_is_held() {
        let gate = ArchiveGate::default();
        assert!(gate.lets_go(&name(7)));
        let held = gate.hold(Uuid::now_v7(), size());
        // Before it is known from where, everything is kept.
        assert!(!gate.lets_go(&name(1)));
        let handle = held.handle();
        handle.advance(Lsn(7 * SIZE));
        assert!(gate.lets_go(&name(6)));
        assert!(!gate.lets_go(&name(7)));
        assert!(gate.lets_go("00000002.history"));
        assert!(gate.lets_go("000000010000000000000007.00000028.backup"));
        handle.advance(Lsn(8 * SIZE));
        handle.advance(Lsn(2 * SIZE));
        assert!(gate.lets_go(&name(7)));
        assert!(!gate.lets_go(&name(300)));
        let other = gate.hold(Uuid::now_v7(), size());
        other.handle().advance(Lsn(3 * SIZE));
        assert!(!gate.lets_go(&name(7)));
        drop(other);
        assert!(gate.lets_go(&name(7)));
        drop(held);
        assert!(gate.lets_go(&name(300)));
        assert_eq!(handle.from(), None);
        // A handle that outlives its hold brings nothing back.
        handle.advance(Lsn(9 * SIZE));
        assert!(gate.lets_go(&name(300)));
    }

    #[tokio::test]
    async fn questions_are_answered_through_the_socket() {
        let dir = tempfile::tempdir().unwrap();
        let socket = dir.path().join("own/archive.sock");
        let gate = ArchiveGate::default();
        gate.serve(&socket).unwrap();
        let ask = |number| {
            let socket = socket.clone();
            tokio::task::spawn_blocking(move || walput::ask(&socket, &name(number)).unwrap())
        };
        assert_eq!(ask(1).await.unwrap(), Answer::Go);
        let held = gate.hold(Uuid::now_v7(), size());
        held.handle().advance(Lsn(5 * SIZE));
        assert_eq!(ask(4).await.unwrap(), Answer::Go);
        assert_eq!(ask(5).await.unwrap(), Answer::Keep);
        // One that is shipped while the server waits for the answer.
        let waiting = ask(6);
        tokio::time::sleep(Duration::from_millis(100)).await;
        assert!(!waiting.is_finished());
        held.handle().advance(Lsn(7 * SIZE));
        assert_eq!(waiting.await.unwrap(), Answer::Go);

        let error = gate.serve(&socket).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::AddrInUse);
    }

    #[tokio::test]
    async fn a_socket_that_a_dead_agent_left_is_taken_over_and_a_foreign_place_is_not() {
        let dir = tempfile::tempdir().unwrap();
        let socket = dir.path().join("archive.sock");
        drop(std::os::unix::net::UnixListener::bind(&socket).unwrap());
        ArchiveGate::default().serve(&socket).unwrap();

        let file = dir.path().join("file");
        fs::write(&file, "mine").unwrap();
        assert!(ArchiveGate::default().serve(&file).is_err());
        assert_eq!(fs::read(&file).unwrap(), b"mine");

        let open = dir.path().join("open");
        fs::create_dir(&open).unwrap();
        fs::set_permissions(&open, fs::Permissions::from_mode(0o777)).unwrap();
        let error = ArchiveGate::default().serve(&open.join("s")).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::PermissionDenied);
    }
}
