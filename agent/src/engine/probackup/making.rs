//! From the mount to the copy in the bucket.

use std::convert::Infallible;
use std::ffi::OsString;
use std::future::pending;
use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _};
use std::path::Path;
use std::process::ExitStatus;
use std::sync::Arc;

use agent_api::{ApiError, ErrorKind, Phase};
use agent_sql::WalPosition;
use agent_wal::SegmentName;
use catalog::model::BackupMode;
use futures_util::FutureExt as _;
use jiff::Timestamp;
use pipeline::index::IndexBuilder;
use tokio::process::Command;
use tokio::sync::Notify;

use super::archive::{self, Archive};
use super::arguments;
use super::chain::Parents;
use super::examine;
use super::preflight::Prepared;
use super::run::{self, End, Over, Watch};
use super::sink::EpochSink;
use super::words::Told;
use crate::catalog_fs::life::{MountError, Mounted};
use crate::catalog_fs::{BackupSide, CatalogFs, Failure};
use crate::engine::attempt::{Attempt, cancelled};
use crate::engine::errors;
use crate::engine::manifest::CopyInBucket;
use crate::failure;
use crate::wal::ship::Shipper;

/// Bytes that a lane wants at least: the part that is filled, and one on its way.
const LANE_BYTES: usize = 16 << 20;
/// Threads of the program; both refuse more than ten for each core.
const JOBS_MOST: u32 = 16;

/// A copy under way.
pub(super) struct Making<'a> {
    pub(super) attempt: &'a Attempt<'a>,
    pub(super) prepared: &'a Prepared,
    pub(super) shipper: &'a Shipper,
    /// Where the server was when it began.
    pub(super) position: WalPosition,
    /// When it began.
    pub(super) begun: Timestamp,
}

/// What the program said of its backup.
#[derive(Debug, Clone, Default)]
pub(super) struct Said {
    pub(super) version: String,
    pub(super) id: String,
}

impl Making<'_> {
    /// Makes the copy.
    ///
    /// # Errors
    /// Whatever voids it. Nothing of it is under way then, and nothing is mounted.
    pub(super) async fn run(&self) -> Result<CopyInBucket, ApiError> {
        let attempt = self.attempt;
        attempt.cx.report.phase(Phase::Copying);
        let parents = Parents::load(attempt).await?;
        let fs = self.file_system(&parents).await?;
        let copied = self.mounted(&fs, &parents).await;
        let copy = match copied {
            Ok(said) => self.seal(&fs, &said).await,
            Err(error) => Err(error),
        };
        if copy.is_err() {
            fs.abort().await;
        }
        copy
    }

    async fn file_system(&self, parents: &Parents) -> Result<Arc<CatalogFs>, ApiError> {
        let (attempt, node) = (self.attempt, self.attempt.node);
        let size = node.segment_size();
        let budget = &attempt.cx.budget;
        // Beside the mount; the segment that is just being shipped has its own already.
        let left = budget
            .free_bytes()
            .saturating_sub(BackupSide::least_bytes(size));
        let lanes = u32::try_from(left / LANE_BYTES).unwrap_or(u32::MAX);
        let (packs, lanes) = attempt.packs(lanes).await?;
        let first = SegmentName::of_lsn(self.position.timeline, self.position.flush, size);
        let writing = BackupSide {
            uploader: attempt.uploader.clone(),
            packs,
            lanes,
            index: Arc::new(IndexBuilder::new()),
            budget: budget.clone(),
            segment_size: size,
            wal: Arc::new(EpochSink::new(attempt, first)),
            entries: parents.entries.clone(),
            lower: parents.lower(),
            cancel: attempt.work.child_token(),
        };
        CatalogFs::for_backup(writing).map_err(|error| failed(&error))
    }

    /// Runs the program in the mount, and takes that away again.
    async fn mounted(&self, fs: &Arc<CatalogFs>, parents: &Parents) -> Result<Said, ApiError> {
        let cx = self.attempt.cx;
        let operation = cx.id.simple().to_string();
        let mounted = Mounted::start(Arc::clone(fs), &cx.config.mount, &operation);
        let mounted = mounted.await.map_err(|error| no_mount(&error))?;
        let ran = self.programs(fs, &mounted, parents).await;
        if ran.as_ref().is_err_and(|stopped| !stopped.gone) {
            // It waits for an answer of the mount: every one is an error from now on.
            fs.abort().await;
        }
        let unmounted = mounted.unmount().await;
        match (ran, unmounted) {
            (Ok(said), Ok(())) => Ok(said),
            (Ok(_), Err(error)) => Err(no_mount(&error)),
            (Err(stopped), unmounted) => {
                let mut error = stopped.error;
                if let Err(left) = unmounted {
                    error.message = format!("{}; and {left}", error.message);
                    error.changed = true;
                }
                Err(super::exclusive::end(self.attempt, error, &stopped.id).await)
            }
        }
    }

    async fn programs(
        &self,
        fs: &Arc<CatalogFs>,
        mounted: &Mounted,
        parents: &Parents,
    ) -> Result<Said, Stopped> {
        let (attempt, prepared) = (self.attempt, self.prepared);
        let (catalog, node) = (mounted.path(), attempt.node);
        if parents.entries.is_empty() {
            self.program(fs, mounted, parents, arguments::init(catalog))
                .await?;
            self.program(
                fs,
                mounted,
                parents,
                arguments::add_instance(catalog, &node.pgdata),
            )
            .await?;
        }
        let jobs = match attempt.spec.mode {
            BackupMode::Page => archive::readers(attempt),
            _ => attempt.spec.jobs,
        };
        let how = arguments::Backup {
            kind: prepared.program.kind,
            mode: attempt.spec.mode,
            jobs: jobs.min(JOBS_MOST),
            fast_checkpoint: attempt.spec.fast_checkpoint,
            options: &node.options,
            tablespaces: &prepared.tablespaces,
        };
        let said = self
            .program(
                fs,
                mounted,
                parents,
                arguments::backup(catalog, &node.pgdata, &how),
            )
            .await?;
        if said.id.is_empty() {
            let message = format!(
                "{} ended well and never said that it began",
                prepared.program.kind
            );
            return Err(Stopped::gone(
                ApiError::new(ErrorKind::Database, message),
                "",
            ));
        }
        Ok(said)
    }

    /// Runs the program once, to its good end.
    async fn program(
        &self,
        fs: &Arc<CatalogFs>,
        mounted: &Mounted,
        parents: &Parents,
        argv: Vec<OsString>,
    ) -> Result<Said, Stopped> {
        let (attempt, program) = (self.attempt, &self.prepared.program);
        let report = &attempt.cx.report;
        let plain = |error| Stopped::gone(error, "");
        let password = attempt.cx.config.pg_password().map_err(plain)?;
        let mut command = mounted.command(&program.path);
        environment(&mut command);
        command.args(argv);
        let archive = Archive::open(self.attempt, parents).await;
        let archive = archive.map_err(plain)?;
        let mut said = Said::default();
        let ended = Notify::new();
        let heard = |told| match told {
            Told::Started { version, id } => said = Said { version, id },
            Told::Size(bytes) => report.expect_bytes(bytes),
            Told::Warning(text) => report.warning(format!("{}: {text}", program.kind)),
            Told::Ended => ended.notify_one(),
            Told::Working | Told::Nothing | Told::Checkpoint => {}
        };
        let watch = Watch {
            stall: attempt.cx.config.stall_timeout,
            cancel: attempt.work,
            password: password.as_ref(),
        };
        let spoiled = async {
            tokio::select! {
                biased;
                failure = fs.failed() => failed(&failure),
                why = mounted.ended() => lost(&why),
                error = self.shipper.failed() => error,
            }
        };
        let run = run::run(command, watch, heard, || fs.last_activity(), spoiled);
        let over = tokio::select! {
            over = run => over,
            never = self.wake_when(&ended) => match never {},
            never = Archive::appear(archive, fs) => match never {},
        };
        let over = over.map_err(|error| {
            let message = format!("cannot start `{}`: {error}", program.path.display());
            plain(ApiError::new(ErrorKind::Usage, message).next("mend the agent's --probackup"))
        })?;
        match self.verdict(fs, parents, &over) {
            None => Ok(said),
            Some(mut error) => {
                // It may have failed in the directory below the mount before anybody noticed that it is below no more.
                if matches!(over.end, End::Itself(_))
                    && let Some(why) = mounted.lost().await
                {
                    error = lost(&format!("{why}; {}", error.message));
                }
                Err(Stopped {
                    error,
                    gone: over.gone,
                    id: said.id,
                })
            }
        }
    }

    /// Has the server write something when the backup has ended on it. A program that streams WAL looks whether it has
    /// enough only when some arrives, and on a server that nobody writes to that is 10 s later (receivelog.c,
    /// `standby_message_timeout`).
    async fn wake_when(&self, ended: &Notify) -> Infallible {
        ended.notified().await;
        let name = format!("gs_pitr_wake_{}", self.attempt.cx.id.simple());
        let woken = self.attempt.node.sql.create_flushed_restore_point(&name);
        if let Err(error) = woken.await {
            tracing::info!(%error, "the program's end was not hurried");
        }
        pending().await
    }

    /// Why the run was no good; `None`: it was.
    fn verdict(
        &self,
        fs: &CatalogFs,
        parents: &Parents,
        over: &Over<ApiError>,
    ) -> Option<ApiError> {
        let kind = self.prepared.program.kind;
        let words = over.words.complaint();
        let and = if over.done.is_empty() {
            String::new()
        } else {
            format!("; {kind}: {}", over.done)
        };
        let mut error = match &over.end {
            End::Itself(status) => {
                // What the program complains about then is what we have answered it.
                if let Some(failure) = fs.failed().now_or_never() {
                    failed(&failure)
                } else if let Some(trouble) = parents.trouble() {
                    trouble
                } else if status.success() {
                    return None;
                } else {
                    let message = format!("{kind} ended with {}: {words}", code(*status));
                    ApiError::new(ErrorKind::Database, message).next(
                        "see what it says; the copy was given up, nothing was changed on the node",
                    )
                }
            }
            End::Stalled(idle) => {
                let message = format!(
                    "{kind} stood still for {} s: no byte moved and it said nothing; its last words: {}",
                    idle.as_secs(),
                    over.words.last_line()
                );
                ApiError::new(ErrorKind::Timeout, message).next(
                    "look at the database's log for what it waits for; --stall-timeout of the agent says how long is too long",
                )
            }
            End::Cancelled => cancelled(),
            End::Spoiled(error) => error.clone(),
        };
        error.message.push_str(&and);
        Some(error)
    }

    /// Closes the copy, holds it against the program's own list, and completes it.
    async fn seal(&self, fs: &Arc<CatalogFs>, said: &Said) -> Result<CopyInBucket, ApiError> {
        let attempt = self.attempt;
        let seal = async {
            let mut sealed = fs.seal().await.map_err(|error| failed(&error))?;
            let examined = examine::examine(self, &sealed, said).await?;
            for attachment in &attempt.node.attachments {
                let file = read(Path::new(&attachment.source)).await?;
                let added =
                    sealed.add_file(&attachment.path, file.mode, file.mtime, file.bytes.into());
                added.await.map_err(|error| failed(&error))?;
            }
            let spec = attempt.spec;
            let key = catalog::keys::index(&spec.backup_id, spec.node_id, spec.attempt);
            let copy = sealed.finish(key).await.map_err(|error| failed(&error))?;
            Ok(examined.describe(self, copy))
        };
        tokio::select! {
            biased;
            sealed = seal => sealed,
            () = attempt.work.cancelled() => Err(cancelled()),
            error = self.shipper.failed() => Err(error),
        }
    }
}

/// A run that came to nothing.
struct Stopped {
    error: ApiError,
    /// Whether the program has ended.
    gone: bool,
    /// Its id of the backup, if it had one.
    id: String,
}

impl Stopped {
    fn gone(error: ApiError, id: &str) -> Self {
        Self {
            error,
            gone: true,
            id: id.to_owned(),
        }
    }
}

/// Its words in English, and the connection as its arguments say it: no variable of libpq changes that.
fn environment(command: &mut Command) {
    for (name, _) in std::env::vars_os() {
        if name.to_string_lossy().starts_with("PG") {
            command.env_remove(&name);
        }
    }
    command.env("LC_ALL", "C");
}

fn code(status: ExitStatus) -> String {
    // As the program beside the mount says it.
    match status.code() {
        Some(code @ 129..=192) => format!("signal {}", code - 128),
        Some(code) => format!("exit code {code}"),
        None => status.to_string(),
    }
}

pub(super) fn failed(failure: &Failure) -> ApiError {
    match failure {
        Failure::Pipeline(error) => failure::pipeline_error(error),
        Failure::Wal { .. } => {
            ApiError::new(ErrorKind::Database, failure.to_string()).next("start a new backup")
        }
        Failure::Spoiled { .. } | Failure::StillOpen { .. } | Failure::Closed => {
            errors::internal(failure)
        }
    }
}

fn no_mount(error: &MountError) -> ApiError {
    let shown = ApiError::new(ErrorKind::Usage, error.to_string());
    match error {
        MountError::Unavailable(missing) => shown.next(missing.mend()),
        _ => shown.next("run `gs_pitr check`, or use `--engine direct`"),
    }
}

fn lost(why: &str) -> ApiError {
    ApiError::new(ErrorKind::Conflict, format!("the mount was lost: {why}"))
        .next("leave the mounts of gs_pitr alone, then start a new backup")
}

struct Attached {
    bytes: Vec<u8>,
    mode: u32,
    mtime: i64,
}

async fn read(source: &Path) -> Result<Attached, ApiError> {
    let path = source.to_owned();
    let read = tokio::task::spawn_blocking(move || {
        let metadata = path.metadata()?;
        Ok::<_, std::io::Error>(Attached {
            bytes: std::fs::read(&path)?,
            mode: metadata.permissions().mode() & 0o7777,
            mtime: metadata.mtime(),
        })
    });
    read.await.map_err(errors::internal)?.map_err(|error| {
        let message = format!("cannot read `{}`: {error}", source.display());
        ApiError::new(ErrorKind::Database, message)
    })
}
