//! Programs beside a mount: `pitr-agent catalog-run`, our own binary started again, and the agent's side of it.
//!
//! ```text
//! catalog-run SOCKET -     PROGRAM [ARGUMENT...]   the catalog is mounted already
//! catalog-run SOCKET POINT PROGRAM [ARGUMENT...]   mounts it at POINT, in a user and mount namespace of its own
//! ```
//!
//! It connects to the agent's socket, says `M` (mounted), or `D` with the descriptor of its mount, and starts the program when
//! the agent answers `G`. The connection stands for both lives: when the agent is gone it ends the program, and when it
//! is gone the agent knows that the program is. (The kernel's own signal for the death of a parent is tied to one thread of
//! it, which a runtime may end at any time; it is used below `catalog-run`, which has one.)
//!
//! A user namespace can be made only by a process of one thread. So this one is made before any runtime. Ids
//! are mapped to themselves: the program's files, and who it is at a database's socket, stay as they are. What is
//! mounted there nobody else sees, and with the last process in it the namespace goes.

use std::io;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use rustix::net::sockopt::socket_peercred;
use rustix::process::geteuid;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _, Interest};
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::watch;
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use super::CatalogFs;
use super::serving::{self, Serving};

pub use self::run::main;

mod enter;
mod run;
pub(super) mod wire;

/// Name of the hidden subcommand.
pub const SUBCOMMAND: &str = "catalog-run";
/// In the place of a mount point: it is mounted already.
pub(super) const MOUNTED: &str = "-";
/// Instead of all else: try whether a namespace can be had.
pub(super) const PROBE: &str = "--probe";
/// `--exec PARENT PROGRAM ARGUMENT...`: become the program, and die with the parent.
const EXEC: &str = "--exec";

/// The catalog is mounted already.
const HAS_MOUNT: u8 = b'M';
/// Serve this device.
const DEVICE: u8 = b'D';
/// It is served: go on.
const GO: u8 = b'G';
/// It is not; the reason follows.
const REFUSED: u8 = b'E';

/// How long a program has after SIGTERM when the agent is gone.
const GRACE: Duration = Duration::from_secs(10);
/// How long a runner may take to say what it wants.
const GREETING: Duration = Duration::from_secs(10);
/// From the end of a session to that of its runner: more, and the mount was taken away below it.
const AFTER: Duration = Duration::from_secs(2);
/// How long the kernel may take to end the session of a namespace that is gone.
const SESSION_END: Duration = Duration::from_secs(5);

/// The agent's side: the runners of one mount.
#[derive(Debug)]
pub(super) struct Runners {
    cancel: CancellationToken,
    tasks: TaskTracker,
    left: Arc<Mutex<Vec<Left>>>,
}

/// A namespace that was still there when its runner had gone.
#[derive(Debug)]
struct Left {
    serving: Serving,
    /// What `/proc/PID/ns/mnt` says of those in it.
    namespace: Option<PathBuf>,
}

impl Runners {
    /// Listens on `socket`, in a directory that only we can open. What goes wrong under way is put into `ended`.
    pub(super) fn listen(
        socket: &Path,
        fs: Arc<CatalogFs>,
        ended: watch::Sender<Option<String>>,
    ) -> io::Result<Self> {
        let listener = UnixListener::bind(socket)?;
        std::fs::set_permissions(socket, std::fs::Permissions::from_mode(0o600))?;
        let this = Self {
            cancel: CancellationToken::new(),
            tasks: TaskTracker::new(),
            left: Arc::default(),
        };
        let left = Arc::clone(&this.left);
        let (cancel, tasks) = (this.cancel.clone(), this.tasks.clone());
        this.tasks.spawn(async move {
            loop {
                let accepted = tokio::select! {
                    () = cancel.cancelled() => return,
                    accepted = listener.accept() => accepted,
                };
                match accepted {
                    Ok((stream, _)) => {
                        let one = Runner {
                            fs: Arc::clone(&fs),
                            ended: ended.clone(),
                            cancel: cancel.clone(),
                            left: Arc::clone(&left),
                        };
                        tasks.spawn(one.attend(stream));
                    }
                    Err(error) => {
                        tracing::warn!("a program's connection was not accepted: {error}");
                        tokio::time::sleep(Duration::from_millis(100)).await;
                    }
                }
            }
        });
        Ok(this)
    }

    /// Has all programs ended and waits for them; the listening ends, too.
    pub(super) async fn end(&self) {
        self.cancel.cancel();
        self.tasks.close();
        if timeout(GRACE + GREETING, self.tasks.wait()).await.is_err() {
            tracing::warn!("a program beside the mount does not end");
        }
    }

    /// The namespaces that something still keeps, though the runners have gone: what `/proc/PID/ns/mnt` says of those in them.
    pub(super) fn left(&self) -> Vec<PathBuf> {
        let left = self.left.lock().unwrap_or_else(PoisonError::into_inner);
        let left = left.iter().filter(|left| left.serving.why().is_none());
        left.map(|left| left.namespace.clone().unwrap_or_default())
            .collect()
    }
}

impl Drop for Runners {
    fn drop(&mut self) {
        self.cancel.cancel();
    }
}

/// One `catalog-run`.
struct Runner {
    fs: Arc<CatalogFs>,
    ended: watch::Sender<Option<String>>,
    cancel: CancellationToken,
    left: Arc<Mutex<Vec<Left>>>,
}

impl Runner {
    async fn attend(self, mut stream: UnixStream) {
        let serving = match timeout(GREETING, self.greet(&mut stream)).await {
            Ok(Ok(serving)) => serving,
            Ok(Err(error)) => {
                tracing::warn!("a program beside the mount was not started: {error}");
                let _ = stream.write_all(&[REFUSED]).await;
                let _ = stream.write_all(error.to_string().as_bytes()).await;
                return;
            }
            Err(_) => {
                tracing::warn!("a program beside the mount did not say what it wants");
                return;
            }
        };
        let over = async {
            match &serving {
                Some((serving, _)) => serving.over().await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            () = self.cancel.cancelled() => {
                // It reads the end of file and ends its program.
                let _ = stream.shutdown().await;
                let _ = timeout(GRACE + AFTER, gone(&mut stream)).await;
            }
            () = gone(&mut stream) => {}
            () = over => {
                if timeout(AFTER, gone(&mut stream)).await.is_err() {
                    self.taken_away(serving.as_ref().map(|(serving, _)| serving));
                    // The engine ends the program when it hears of it, or when it gives up.
                    tokio::select! {
                        () = self.cancel.cancelled() => {}
                        () = gone(&mut stream) => {}
                    }
                }
            }
        }
        drop(stream);
        if let Some((serving, namespace)) = serving
            && timeout(SESSION_END, serving.over()).await.is_err()
        {
            let mut left = self.left.lock().unwrap_or_else(PoisonError::into_inner);
            left.push(Left { serving, namespace });
        }
    }

    /// Hears what the runner has, serves it, and lets it go on.
    async fn greet(
        &self,
        stream: &mut UnixStream,
    ) -> io::Result<Option<(Serving, Option<PathBuf>)>> {
        let peer = socket_peercred(&*stream)?;
        if peer.uid != geteuid() {
            return Err(io::Error::other("it belongs to another user"));
        }
        let received = loop {
            stream.readable().await?;
            match stream.try_io(Interest::READABLE, || wire::receive(&*stream)) {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                received => break received?,
            }
        };
        let serving = match received {
            (HAS_MOUNT, None) => None,
            (DEVICE, Some(device)) => {
                let fs = Arc::clone(&self.fs);
                let namespace = format!("/proc/{}/ns/mnt", peer.pid.as_raw_nonzero());
                let namespace = std::fs::read_link(namespace).ok();
                Some((serving::serve(fs, device, |_| ()).await?, namespace))
            }
            _ => return Err(io::Error::other("it is of another version")),
        };
        stream.write_all(&[GO]).await?;
        Ok(serving)
    }

    fn taken_away(&self, serving: Option<&Serving>) {
        let why = serving.and_then(Serving::why).unwrap_or_default();
        let why =
            format!("the mount in the program's namespace is gone while it was in use: {why}");
        tracing::error!("{why}");
        self.ended
            .send_if_modified(|old| old.is_none().then(|| *old = Some(why)).is_some());
    }
}

/// Waits for the runner's end; it says nothing more.
async fn gone(stream: &mut UnixStream) {
    let mut byte = [0];
    while matches!(stream.read(&mut byte).await, Ok(1..)) {}
}
