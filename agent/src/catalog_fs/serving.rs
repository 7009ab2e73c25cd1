//! A session of the kernel with a mount: begun on threads of its own, and over when nothing is mounted any more.

use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::Duration;

use fuser::SessionACL;
use tokio::sync::watch;
use tokio::time::timeout;

use super::CatalogFs;
use super::session::CatalogSession;

/// How long the kernel may take to greet us: its greeting lies there when the mount is made.
const GREETING: Duration = Duration::from_secs(10);

/// Threads that take requests off the kernel. They never wait, so few are enough.
const THREADS: usize = 4;

/// Why a session ends that has not failed.
pub(super) const UNMOUNTED: &str = "it was unmounted";

/// A session under way, on threads of its own.
#[derive(Debug)]
pub(super) struct Serving {
    why: watch::Receiver<Option<String>>,
}

impl Serving {
    /// Waits until the kernel has sent its last request.
    pub(super) async fn over(&self) {
        let mut why = self.why.clone();
        // An error: the thread is gone, which is as over.
        let _ = why.wait_for(Option::is_some).await;
    }

    /// Why it is over, if it is.
    pub(super) fn why(&self) -> Option<String> {
        self.why.borrow().clone()
    }
}

/// Serves `fs` on `device` until nothing is mounted on it any more; then `on_end` is told why.
///
/// # Errors
/// If the kernel does not greet us.
pub(super) async fn serve(
    fs: Arc<CatalogFs>,
    device: OwnedFd,
    on_end: impl FnOnce(String) + Send + 'static,
) -> io::Result<Serving> {
    let (ended, why) = watch::channel(None);
    let (greeted, greeting) = tokio::sync::oneshot::channel();
    let threads = std::thread::available_parallelism().map_or(2, |n| n.get().clamp(2, THREADS));
    let mut config = fuser::Config::default();
    config.n_threads = Some(threads);
    // Each thread has requests of its own to answer, so that none waits for another's lock in the kernel.
    config.clone_fd = true;
    let serving = move || {
        // Who may use it the kernel decides: only the user who mounted it.
        let session =
            fuser::Session::from_fd(CatalogSession::new(fs), device, SessionACL::All, config);
        let session = match session {
            Ok(session) => session,
            Err(error) => {
                let _ = greeted.send(Err(error));
                return;
            }
        };
        let _ = greeted.send(Ok(()));
        let end = match session.run() {
            Ok(()) => UNMOUNTED.to_owned(),
            Err(error) => format!("serving the mount has failed: {error}"),
        };
        tracing::debug!("the session of a mount has ended: {end}");
        ended.send_replace(Some(end.clone()));
        on_end(end);
    };
    std::thread::Builder::new()
        .name("catalog-mount".to_owned())
        .spawn(serving)?;
    match timeout(GREETING, greeting).await {
        Ok(Ok(greeted)) => greeted?,
        Ok(Err(_)) => {
            return Err(io::Error::other(
                "the thread that serves the mount has ended",
            ));
        }
        Err(_) => return Err(io::ErrorKind::TimedOut.into()),
    }
    Ok(Serving { why })
}
