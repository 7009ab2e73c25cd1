//! Recovery: the server replays WAL to the point, closed to everybody, and ends by itself.

mod opengauss;

use std::ffi::OsString;
use std::path::Path;
use std::process::ExitStatus;
use std::time::{Duration, SystemTime};

use agent_api::{ApiError, ErrorKind};
use tokio::sync::watch;
use tokio::time::{Instant, interval, timeout};
use tokio_util::sync::CancellationToken;

use super::errors::{cancelled, local};
use super::process::Server;
use super::recoverer::Recoverer;
use super::settings::{Private, RecoveryTarget, Setting, restore_command};
use super::target::Plan;
use super::walserve::{WalServer, WalSource};
use super::workspace::Workspace;
use super::{prove, settings};

/// A server that for this long takes no WAL, writes no log and leaves `pg_control` alone is stuck.
const STUCK: Duration = Duration::from_mins(30);
/// How long the checkpoint of a shutdown may take.
const SHUTDOWN: Duration = Duration::from_mins(30);
/// How long an openGauss that has just opened is left alone: a thread that it is starting at that moment misses the order to
/// shut down, and then the server waits for it for ever.
const SETTLE: Duration = Duration::from_secs(5);
/// How often a running server is looked at.
const LOOK: Duration = Duration::from_millis(200);

/// What every private start needs.
#[derive(Debug)]
pub(super) struct Recovery<'a, S: WalSource> {
    pub(super) plan: &'a Plan,
    pub(super) workspace: &'a Workspace,
    /// Files of the private server.
    pub(super) places: settings::Places,
    /// Settings the source was started with.
    pub(super) source: &'a [Setting],
    pub(super) wal: &'a WalServer<S>,
    pub(super) socket: &'a Path,
    /// Program that `restore_command` runs: ours.
    pub(super) program: &'a Path,
    pub(super) cancel: &'a CancellationToken,
}

/// How a server that was watched came to its end.
enum Watched {
    Ended(ExitStatus),
    Seen,
}

impl<S: WalSource> Recovery<'_, S> {
    fn start(&self, major: u32, target: &RecoveryTarget) -> Result<Server, ApiError> {
        let private = Private {
            major,
            places: &self.places,
            socket_directory: self.workspace.run(),
            source: self.source,
            restore_command: restore_command(self.program, self.socket),
            target,
        };
        self.launch(&private.argv())
    }

    fn launch(&self, argv: &[OsString]) -> Result<Server, ApiError> {
        let (places, program) = (&self.workspace.places, self.plan.server());
        Server::start(&program, argv, &places.data, &places.log)
            .map_err(|error| local(&program, &error))
    }

    /// Replays to the point and has the server shut down there. `on_segment` hears of every segment that is handed
    /// out. That the point was reached is for `pg_control` to say.
    pub(super) async fn to_point(
        &self,
        target: &RecoveryTarget,
        on_segment: &mut (dyn FnMut(u64) + Send),
    ) -> Result<(), ApiError> {
        let mut server = match self.plan.recoverer {
            Recoverer::PostgreSql(major) => self.start(major, target)?,
            Recoverer::OpenGauss => return self.pause_and_stop(target, on_segment).await,
        };
        match self.watch(&mut server, on_segment, &|| false).await? {
            Watched::Ended(status) if status.success() => Ok(()),
            Watched::Ended(status) => Err(self.failed(&server, status)),
            Watched::Seen => Err(ApiError::new(
                ErrorKind::Internal,
                "the server was not awaited",
            )),
        }
    }

    /// Replays to the point again, promotes there, waits for the checkpoint that ends recovery and
    /// shuts down.
    pub(super) async fn promote(&self, target: &RecoveryTarget) -> Result<(), ApiError> {
        let recoverer = self.plan.recoverer;
        let mut server = match recoverer {
            Recoverer::PostgreSql(major) => self.start(major, target)?,
            Recoverer::OpenGauss => self.start_opengauss(target).await?.server,
        };
        let data = &self.workspace.places.data;
        let promoted =
            || prove::read_control(data).is_ok_and(|it| recoverer.is_open(&it, target.timeline));
        match self.watch(&mut server, &mut |_| {}, &promoted).await? {
            Watched::Seen => {}
            Watched::Ended(status) => return Err(self.failed(&server, status)),
        }
        if matches!(recoverer, Recoverer::OpenGauss) {
            let _ = timeout(SETTLE, self.cancel.cancelled()).await;
        }
        self.shut_down(&mut server).await
    }

    async fn shut_down(&self, server: &mut Server) -> Result<(), ApiError> {
        let ended = tokio::select! {
            ended = server.shut_down(SHUTDOWN) => Some(ended),
            () = self.cancel.cancelled() => None,
        };
        match ended {
            Some(Ok(status)) if status.success() => Ok(()),
            Some(Ok(status)) => Err(self.failed(server, status)),
            Some(Err(error)) => Err(ApiError::new(
                ErrorKind::Recovery,
                format!("the recovered server was not shut down: {error}"),
            )),
            None => Err(self.give_up(server, cancelled()).await),
        }
    }

    /// Waits until the server ends or `seen` says so; stops it on cancel, and when it is stuck.
    async fn watch(
        &self,
        server: &mut Server,
        on_segment: &mut (dyn FnMut(u64) + Send),
        seen: &(dyn Fn() -> bool + Sync),
    ) -> Result<Watched, ApiError> {
        let mut handed_out: watch::Receiver<u64> = self.wal.served();
        let mut told = *handed_out.borrow_and_update();
        let mut tick = interval(LOOK);
        let mut life = (Instant::now(), self.signs_of_life());
        loop {
            tokio::select! {
                ended = server.ended() => {
                    on_segment(handed_out.borrow().saturating_sub(told));
                    let ended = ended.map_err(|e| local(&self.plan.server(), &e));
                    return ended.map(Watched::Ended);
                }
                () = self.cancel.cancelled() => return Err(self.give_up(server, cancelled()).await),
                Ok(()) = handed_out.changed() => {
                    let now = *handed_out.borrow_and_update();
                    on_segment(now.saturating_sub(told));
                    told = now;
                    life.0 = Instant::now();
                }
                _ = tick.tick() => {
                    if seen() {
                        return Ok(Watched::Seen);
                    }
                    let signs = self.signs_of_life();
                    if signs != life.1 {
                        life = (Instant::now(), signs);
                    } else if life.0.elapsed() > STUCK {
                        let message = format!(
                            "the recovering server has shown no progress for {} minutes: {}",
                            STUCK.as_secs() / 60,
                            server.last_words()
                        );
                        let error = ApiError::new(ErrorKind::Timeout, message);
                        return Err(self.give_up(server, error).await);
                    }
                }
            }
        }
    }

    /// Changes as long as the server does something.
    fn signs_of_life(&self) -> [Option<(u64, SystemTime)>; 2] {
        let places = &self.workspace.places;
        [places.data.join("global/pg_control"), places.log.clone()].map(|path| {
            let metadata = std::fs::metadata(path).ok()?;
            Some((metadata.len(), metadata.modified().ok()?))
        })
    }

    async fn give_up(&self, server: &mut Server, mut error: ApiError) -> ApiError {
        if let Err(failed) = server.kill().await {
            error.message = format!("{}; and its server does not end: {failed}", error.message);
        }
        error
    }

    /// Why the server ended early: in the store's words if it was for lack of WAL, else in its own.
    fn failed(&self, server: &Server, status: ExitStatus) -> ApiError {
        if let Some(mut error) = self.wal.failure() {
            error.message = format!(
                "recovery stopped before its point, and the database was not opened: {}",
                error.message
            );
            return error;
        }
        let words = server.last_words();
        let message = format!("the recovering server ended early ({status}): {words}");
        let error = ApiError::new(ErrorKind::Recovery, message);
        match missing_library(&words) {
            Some(library) => error.next(format!(
                "install the extension that has `{library}` (shared_preload_libraries of the source) for \
                 {}, and restore again",
                self.plan.recoverer
            )),
            None => error.next("mend what the server complains of, and restore again"),
        }
    }
}

/// The library in the server's `could not access file "..."`.
fn missing_library(words: &str) -> Option<&str> {
    let after = words.split("could not access file \"").nth(1)?;
    after.split('"').next()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_missing_library_is_named() {
        let words = "FATAL: could not access file \"pg_cron\": No such file or directory";
        assert_eq!(missing_library(words), Some("pg_cron"));
        assert_eq!(missing_library("FATAL: out of memory"), None);
    }
}
