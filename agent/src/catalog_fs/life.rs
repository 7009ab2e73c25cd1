//! The life of a mount: made, watched, taken away; and what a killed agent has left of one.
//!
//! Three ways lead to the same thing. As root the agent mounts by itself; as a user it asks `fusermount3`, which is
//! setuid; or each program gets a user and mount namespace of its own ([`super::private`]), in which our own
//! binary mounts and hands the descriptor over. However it was mounted, the agent serves it from `/dev/fuse`, and
//! programs are started through `pitr-agent catalog-run`, so that none outlives the agent that feeds it.
//!
//! The process that serves a FUSE mount waits for itself when it touches it. So nothing here looks at a path of ours: whether
//! it is mounted stands in `/proc/self/mountinfo`, and directories are made and kept beside it.

use std::ffi::OsStr;
use std::fs;
use std::io;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use clap::ValueEnum;
use serde::Deserialize;
use tokio::process::Command;
use tokio::sync::watch;
use tokio::time::{Instant, sleep, timeout};
use tokio_util::sync::CancellationToken;

use self::device::Detach;
use self::place::Place;
use super::CatalogFs;
use super::private::{self, Runners};
use super::serving::{self, Serving};
use crate::child;

pub use self::available::{Unavailable, available};
pub use self::dead::detach_dead;
pub(super) use self::device::mount as mount_here;

mod available;
mod dead;
mod device;
mod place;
mod table;

/// Name of our mounts in the mount table.
pub const SOURCE: &str = "gs_pitr";
/// How often the mount table is looked at.
const WATCH: Duration = Duration::from_secs(1);
/// How long `unmount` waits for what still has a file open.
const UNMOUNT: Duration = Duration::from_secs(10);
/// Between two tries of it.
const RETRY: Duration = Duration::from_millis(50);
/// How long the kernel may take to end a session that is not mounted any more.
const SESSION_END: Duration = Duration::from_secs(15);

/// How catalogs are to be mounted.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, ValueEnum, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum MountHow {
    /// As root, else by fusermount3, else in a namespace
    #[default]
    Auto,
    /// By mount(2)
    Root,
    /// By the setuid program of the package fuse3
    #[value(name = "fusermount3")]
    #[serde(rename = "fusermount3")]
    Fusermount,
    /// In a user and mount namespace of each program
    Namespace,
}

/// How a catalog is mounted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum MountKind {
    /// By mount(2).
    Root,
    /// By `fusermount3`.
    Fusermount,
    /// In each program's own namespace.
    Namespace,
}

impl MountKind {
    /// Its name, as in facts and in `--mount`.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Root => "root",
            Self::Fusermount => "fusermount3",
            Self::Namespace => "namespace",
        }
    }
}

/// What a mount is made with.
#[derive(Debug, Clone)]
pub struct MountSettings {
    /// How.
    pub how: MountHow,
    /// Directory in which the private directories of mounts are made.
    pub runtime_dir: PathBuf,
    /// `pitr-agent`, to be started again beside a program.
    pub runner: PathBuf,
}

impl MountSettings {
    /// `how`, below the runtime directory, with this process's own binary.
    #[must_use]
    pub fn new(how: MountHow) -> Self {
        Self {
            how,
            runtime_dir: runtime_dir(),
            // Not its path: after an upgrade another version lies there, or none.
            runner: PathBuf::from("/proc/self/exe"),
        }
    }
}

/// `RUNTIME_DIRECTORY` (systemd's), else `XDG_RUNTIME_DIR`, else the directory for temporary files.
#[must_use]
pub fn runtime_dir() -> PathBuf {
    let absolute = |name: &str| {
        let value = std::env::var_os(name)?;
        // systemd separates several directories by colons.
        let first = std::env::split_paths(&value).next()?;
        first.is_absolute().then_some(first)
    };
    absolute("RUNTIME_DIRECTORY")
        .or_else(|| absolute("XDG_RUNTIME_DIR"))
        .unwrap_or_else(std::env::temp_dir)
}

/// Why a catalog is not mounted, or not any more.
#[derive(Debug, thiserror::Error)]
pub enum MountError {
    /// It cannot be done on this host.
    #[error(transparent)]
    Unavailable(#[from] Unavailable),
    /// The directory for it could not be made. Nothing is mounted.
    #[error("cannot make the directory for the mount, `{path}`: {source}")]
    Place {
        /// The directory.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// It was tried and refused. Nothing is mounted.
    #[error("cannot mount the catalog as {how}: {why}")]
    Refused {
        /// The way that was tried.
        how: &'static str,
        /// What was said.
        why: String,
    },
    /// Something still had it open at the end. It is detached all the same.
    #[error("the mount `{path}` was still in use {} s after its program had ended and was detached lazily: {who}", UNMOUNT.as_secs())]
    HeldOpen {
        /// The mount point.
        path: PathBuf,
        /// Process ids and names.
        who: String,
    },
    /// It could not be taken away.
    #[error("cannot unmount `{path}`: {why}; `umount -l {path}` does it by hand")]
    Stuck {
        /// The mount point.
        path: PathBuf,
        /// What was said.
        why: String,
    },
}

/// A mounted catalog. [`Mounted::unmount`] ends it; dropped, it is detached at once.
#[derive(Debug)]
pub struct Mounted {
    inner: Option<Inner>,
}

#[derive(Debug)]
struct Inner {
    kind: MountKind,
    place: Place,
    runner: PathBuf,
    runners: Runners,
    session: Option<Serving>,
    ended: watch::Sender<Option<String>>,
    /// Ends the watch of the mount table: from then on, not being mounted is what we want.
    leaving: CancellationToken,
}

impl Mounted {
    /// Mounts `fs` for `operation` (any text that tells mounts apart), after taking away what dead agents have left.
    ///
    /// # Errors
    /// [`MountError`]; nothing is mounted then.
    pub async fn start(
        fs: Arc<CatalogFs>,
        settings: &MountSettings,
        operation: &str,
    ) -> Result<Self, MountError> {
        for told in detach_dead(&settings.runtime_dir).await {
            tracing::warn!("{told}");
        }
        let kind = available(settings).await?;
        let place = Place::make(&settings.runtime_dir, operation)?;
        let started = Self::start_at(fs, kind, &place, settings).await;
        if started.is_err() {
            place.remove();
        }
        let (session, runners, ended) = started?;
        tracing::info!(
            "the catalog is mounted as {} at {}",
            kind.name(),
            place.point().display()
        );
        let leaving = CancellationToken::new();
        if session.is_some() {
            tokio::spawn(watch_table(
                place.point().to_owned(),
                ended.clone(),
                leaving.clone(),
            ));
        }
        let inner = Inner {
            kind,
            place,
            runner: settings.runner.clone(),
            runners,
            session,
            ended,
            leaving,
        };
        Ok(Self { inner: Some(inner) })
    }

    async fn start_at(
        fs: Arc<CatalogFs>,
        kind: MountKind,
        place: &Place,
        settings: &MountSettings,
    ) -> Result<(Option<Serving>, Runners, watch::Sender<Option<String>>), MountError> {
        let refused = |why: String| MountError::Refused {
            how: kind.name(),
            why,
        };
        let ended = watch::Sender::new(None);
        let runners = Runners::listen(&place.socket(), Arc::clone(&fs), ended.clone())
            .map_err(|error| refused(format!("no socket {}: {error}", place.socket().display())))?;
        let below = place.below().map_err(|source| MountError::Place {
            path: place.point().to_owned(),
            source,
        })?;
        let device: OwnedFd = match kind {
            MountKind::Namespace => return Ok((None, runners, ended)),
            MountKind::Root => device::mount(place.point()).map_err(|e| refused(e.to_string()))?,
            MountKind::Fusermount => device::fusermount(place.point()).await.map_err(refused)?,
        };
        // Who comes here after a lazy unmount by hand finds a directory that takes no files (unless he is root).
        if let Err(error) = below.close() {
            tracing::warn!("{}: {error}", place.point().display());
        }
        let (reason, point) = (ended.clone(), place.point().to_owned());
        let served = serving::serve(fs, device, move |why| {
            // Who hears this has not asked for it: `unmount` waits for the session itself.
            let why = if why == serving::UNMOUNTED {
                taken_away(&point)
            } else {
                why
            };
            reason.send_if_modified(|old| old.is_none().then(|| *old = Some(why)).is_some());
        });
        match served.await {
            Ok(session) => Ok((Some(session), runners, ended)),
            Err(error) => {
                device::detach(place.point(), Detach::Lazily).await.ok();
                let how = settings.how;
                Err(refused(format!(
                    "the kernel did not greet us ({how:?}): {error}"
                )))
            }
        }
    }

    fn inner(&self) -> &Inner {
        match &self.inner {
            Some(inner) => inner,
            // Taken only by `unmount` and `drop`, which have it by value.
            None => unreachable!("a mount is used after its end"),
        }
    }

    /// Where programs find the catalog. In a namespace the path is theirs only. Never touch it in this process.
    #[must_use]
    pub fn path(&self) -> &Path {
        self.inner().place.point()
    }

    /// How it is mounted.
    #[must_use]
    pub fn kind(&self) -> MountKind {
        self.inner().kind
    }

    /// A command that runs `program` where it sees the mount; its arguments are to be appended. Its environment has none of our
    /// secrets, its standard input is `/dev/null` unless set. What is started is `pitr-agent catalog-run`, which stays the
    /// program's parent, hands SIGTERM, SIGINT, SIGHUP and SIGQUIT on, ends the program when the agent is gone, and exits with its
    /// code, or 128 and the signal that ended it, or 126 with a line on standard error if the program never ran.
    #[must_use]
    pub fn command(&self, program: impl AsRef<OsStr>) -> Command {
        let inner = self.inner();
        let mut command = child::command(&inner.runner);
        command
            .arg0("pitr-agent")
            .arg(private::SUBCOMMAND)
            .arg(inner.place.socket());
        match inner.kind {
            MountKind::Namespace => command.arg(inner.place.point()),
            MountKind::Root | MountKind::Fusermount => command.arg(private::MOUNTED),
        };
        command.arg(program);
        command
    }

    /// Waits until the mount is gone though nobody has called [`Mounted::unmount`], and says why.
    pub async fn ended(&self) -> String {
        let mut ended = self.inner().ended.subscribe();
        match ended.wait_for(Option::is_some).await {
            Ok(why) => why.clone().unwrap_or_default(),
            Err(_) => "the mount's watcher is gone".to_owned(),
        }
    }

    /// Why the mount is gone, if it is: looks now, for a program that failed before anybody noticed.
    pub async fn lost(&self) -> Option<String> {
        let inner = self.inner();
        let known = inner.ended.borrow().clone();
        if known.is_some() || inner.session.is_none() {
            return known;
        }
        let point = inner.place.point().to_owned();
        let looked = tokio::task::spawn_blocking(move || {
            (!table::mounted(&point)).then(|| taken_away(&point))
        });
        looked.await.ok().flatten()
    }

    /// Takes the mount away and waits until the kernel has sent its last request: 10 s for what still has a file
    /// open, then lazily. Programs that still run are ended.
    ///
    /// # Errors
    /// [`MountError::HeldOpen`] with who held it, [`MountError::Stuck`].
    pub async fn unmount(mut self) -> Result<(), MountError> {
        match self.inner.take() {
            Some(inner) => inner.unmount(UNMOUNT).await,
            None => Ok(()),
        }
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        let Some(inner) = self.inner.take() else {
            return;
        };
        if let Ok(runtime) = tokio::runtime::Handle::try_current() {
            runtime.spawn(async move {
                if let Err(error) = inner.unmount(Duration::ZERO).await {
                    tracing::warn!("{error}");
                }
            });
        }
    }
}

impl Inner {
    async fn unmount(self, patience: Duration) -> Result<(), MountError> {
        self.leaving.cancel();
        self.runners.end().await;
        let result = match self.kind {
            // With its last process a namespace goes, and its mounts with it.
            MountKind::Namespace => Ok(()),
            MountKind::Root | MountKind::Fusermount => self.detach(patience).await,
        };
        let left = self.runners.left();
        // Removed now: a mount namespace that was made meanwhile has a copy of the mount and keeps the session alive. With its mount
        // point a copy goes (since Linux 3.18, commit 8ed936b5671b, "Lazily remove mounts on unlinked files and directories").
        self.place.remove();
        let late = match &self.session {
            Some(session) if result.is_ok() => timeout(SESSION_END, session.over()).await.is_err(),
            Some(_) => false,
            None => !left.is_empty(),
        };
        match result {
            Ok(()) if late => Err(MountError::HeldOpen {
                path: self.place.point().to_owned(),
                who: holders(self.place.point(), left).await,
            }),
            result => result,
        }
    }

    /// Unmounts, or after `patience` detaches.
    async fn detach(&self, patience: Duration) -> Result<(), MountError> {
        let point = self.place.point();
        let deadline = Instant::now() + patience;
        loop {
            let why = match device::detach(point, Detach::IfUnused).await {
                Ok(()) => return Ok(()),
                Err(why) => why,
            };
            if !table::mounted(point) {
                return Ok(());
            }
            if Instant::now() < deadline {
                sleep(RETRY).await;
                continue;
            }
            let who = holders(point, Vec::new()).await;
            return match device::detach(point, Detach::Lazily).await {
                Ok(()) if patience.is_zero() => Ok(()),
                Ok(()) => Err(MountError::HeldOpen {
                    path: point.to_owned(),
                    who,
                }),
                Err(lazily) => Err(MountError::Stuck {
                    path: point.to_owned(),
                    why: format!("{why}; {lazily}"),
                }),
            };
        }
    }
}

fn taken_away(point: &Path) -> String {
    format!(
        "the mount `{}` was taken away by somebody else (umount) while it was in use",
        point.display()
    )
}

/// Notices that somebody else has detached the mount: programs that go on would write into the directory below it.
async fn watch_table(
    point: PathBuf,
    ended: watch::Sender<Option<String>>,
    leaving: CancellationToken,
) {
    loop {
        tokio::select! {
            () = leaving.cancelled() => return,
            () = sleep(WATCH) => {}
        }
        let looked = point.clone();
        let there = tokio::task::spawn_blocking(move || table::mounted(&looked)).await;
        if there.is_ok_and(|there| !there) && !leaving.is_cancelled() {
            let why = taken_away(&point);
            tracing::error!("{why}");
            ended.send_if_modified(|old| old.is_none().then(|| *old = Some(why)).is_some());
            return;
        }
    }
}

/// Processes with a file or their working directory below `point`, or in one of `namespaces`, as far as we may see; from
/// `/proc`, whose links are read without asking the file system they lead to.
async fn holders(point: &Path, namespaces: Vec<PathBuf>) -> String {
    let point = point.to_owned();
    let looked = tokio::task::spawn_blocking(move || {
        let processes = fs::read_dir("/proc").into_iter().flatten().flatten();
        let mut found = Vec::new();
        for process in processes {
            let directory = process.path();
            let descriptors = fs::read_dir(directory.join("fd")).into_iter().flatten();
            let mut links = descriptors.flatten().map(|entry| entry.path());
            let here = |link: PathBuf| fs::read_link(link).is_ok_and(|to| to.starts_with(&point));
            let inside = || {
                let namespace = fs::read_link(directory.join("ns/mnt"));
                namespace.is_ok_and(|namespace| namespaces.contains(&namespace))
            };
            if here(directory.join("cwd")) || links.any(here) || inside() {
                let name = fs::read_to_string(directory.join("comm")).unwrap_or_default();
                let pid = process.file_name();
                found.push(format!("process {} ({})", pid.display(), name.trim()));
            }
        }
        found.join(", ")
    });
    match looked.await {
        Ok(found) if !found.is_empty() => found,
        _ => "by whom cannot be seen (lsof as root shows it)".to_owned(),
    }
}
