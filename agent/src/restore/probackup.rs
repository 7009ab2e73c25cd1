//! Copies that `gs_probackup` or `pg_probackup` made: the same program brings the files back, out of a mount of the
//! chain, into the workspace. What follows is as for any other copy.
//!
//! The program writes nothing but the files: no byte of the copy lies anywhere else on this host meanwhile. It does not
//! validate (every frame is verified before a byte of it is shown, and its own checks of pages stay on), and it does not
//! flush: that is done here, directories included. What it thinks of recovery does not survive: its WAL (that of the archive
//! is the truth, and recovery asks for it segment by segment), its changes to `postgresql.auto.conf`, its links.
//!
//! Killed here, the workspace is left, and taken away by the next agent or restore; the program ends with its agent; a dead mount
//! is detached at the next start.

mod clean;
mod listed;

use std::path::Path;
use std::process::ExitStatus;
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use agent_api::{ApiError, ChainLink, ErrorKind, RestoreSpec};
use catalog::model::{NodeBackup, Probackup};
use pipeline::download::Downloader;
use pipeline::retry::RetryPolicy;
use tokio_util::sync::CancellationToken;

use self::listed::Original;
use super::errors::{cancelled, local};
use super::journal::Places;
use super::{Restore, tablespaces};
use crate::catalog_fs::life::{Mounted, available};
use crate::catalog_fs::stored::Stored;
use crate::catalog_fs::{CatalogFs, Failure};
use crate::config::Config;
use crate::engine::probackup::program::{Kind, Program};
use crate::engine::probackup::run::{End, Over, Watch, run};
use crate::engine::probackup::words::Told;
use crate::failure::pipeline_error;

/// Both programs refuse more threads than ten a core.
const THREADS_PER_CORE: usize = 10;
/// A store that is away for a minute is waited for: the program knows no second try.
const PATIENT: RetryPolicy = RetryPolicy {
    attempts: 12,
    first_pause: Duration::from_millis(250),
    longest_pause: Duration::from_secs(8),
};
/// A file that the program changes when it restores.
const AUTO_CONF: &str = "postgresql.auto.conf";
/// Warnings that say what we asked for.
const ASKED_FOR: [&str; 2] = [
    "is used without validation",
    "Restored files are not synced",
];

/// Checks that this host can bring the copy back, before anything is changed.
///
/// # Errors
/// [`ErrorKind::Incompatible`] if there is no such program, or no way to mount.
pub(super) async fn check(config: &Config, spec: &RestoreSpec) -> Result<(), ApiError> {
    let Some(probackup) = &spec.node.probackup else {
        return Ok(());
    };
    find(config, &spec.node, probackup).await?;
    available(&config.mount).await.map_err(|error| {
        let message = format!(
            "the copy was made by {}, which reads it through a mount, and {error}; nothing was changed",
            probackup.program
        );
        ApiError::new(ErrorKind::Incompatible, message)
            .next("make FUSE available on this host, or restore on another one")
    })?;
    Ok(())
}

/// The program that made the copy, or one of the same kind.
async fn find(
    config: &Config,
    node: &NodeBackup,
    probackup: &Probackup,
) -> Result<Program, ApiError> {
    let name = &probackup.program;
    let refuse = |why: String| {
        let message = format!(
            "the copy of node {} was made by {name} {}, and only {name} brings it back: {why}; nothing was changed",
            node.node_id, probackup.version
        );
        ApiError::new(ErrorKind::Incompatible, message).next(format!(
            "install {name} on this host, or start the agent with --probackup FILE"
        ))
    };
    let kind = [Kind::Gs, Kind::Pg]
        .into_iter()
        .find(|kind| kind.name() == name);
    let kind = kind.ok_or_else(|| refuse("this version does not know that program".into()))?;
    // Which server it was built for does not matter here: it only looks at pages.
    let program = Program::of_kind(config, kind).await;
    program.map_err(|error| refuse(error.message))
}

/// `OLD=NEW` as both programs read it.
fn mapping(old: &str, new: &Path) -> String {
    let escape = |path: &str| path.replace('=', "\\=");
    format!("{}={}", escape(old), escape(&new.display().to_string()))
}

/// What the program is told.
fn arguments(
    node: &NodeBackup,
    probackup: &Probackup,
    kind: Kind,
    (mount, places): (&Path, &Places),
    jobs: usize,
) -> Vec<String> {
    let text = |path: &Path| path.display().to_string();
    let mut argv: Vec<String> = ["restore", "-B"].map(str::to_owned).to_vec();
    argv.push(text(mount));
    argv.extend(["--instance".to_owned(), probackup.instance.clone()]);
    argv.extend(["-D".to_owned(), text(&places.data)]);
    argv.extend(["-i".to_owned(), probackup.id.clone()]);
    argv.extend(["-j".to_owned(), jobs.to_string()]);
    argv.extend(["--no-validate", "--no-sync"].map(str::to_owned));
    for tablespace in &node.tablespaces {
        let new = tablespaces::location(&places.tablespaces, tablespace.oid);
        argv.extend(["-T".to_owned(), mapping(&tablespace.location, &new)]);
        let external = probackup.external.iter();
        if kind == Kind::Gs && external.clone().any(|it| it.oid == tablespace.oid) {
            let option = format!("--external-mapping={}", mapping(&tablespace.location, &new));
            argv.push(option);
        }
    }
    argv
}

impl Restore {
    /// Brings the files back, flushed to disk. It returns only when nothing of it writes any more.
    pub(super) async fn fetch_by_program(
        &self,
        places: &Places,
        downloader: Downloader,
        probackup: &Probackup,
    ) -> Result<(), ApiError> {
        let (cx, spec) = (&self.cx, &self.spec);
        let program = find(&cx.config, &spec.node, probackup).await?;
        let cores = thread::available_parallelism().map_or(1, usize::from);
        let jobs = usize::try_from(spec.jobs).unwrap_or(1);
        let jobs = jobs.clamp(1, cores * THREADS_PER_CORE);
        let mut chain = spec.chain.clone();
        chain.push(ChainLink {
            backup_id: spec.backup_id.clone(),
            node: spec.node.clone(),
        });
        let cancel = downloader.cancel().clone();
        let downloader = downloader.with_retry(PATIENT);
        let stored = Stored::load(&downloader, &self.judge.catalog, &chain, jobs, None).await;
        let mut stored = stored.map_err(|error| unless_cancelled(error, &cancel))?;
        listed::check_label(&stored, &spec.node, probackup).await?;
        let auto_conf = listed::original(&stored, &chain, AUTO_CONF).await?;
        cx.report.expect_bytes(stored.plain_bytes);

        let entries = std::mem::take(&mut stored.entries);
        let fs = CatalogFs::for_reading(entries, stored.lower(), &cx.budget);
        let fs = fs.map_err(|error| match error {
            Failure::Pipeline(error) => pipeline_error(&error),
            error => ApiError::new(ErrorKind::Internal, error.to_string()),
        })?;
        let mounted = Mounted::start(Arc::clone(&fs), &cx.config.mount, &cx.id.to_string()).await;
        let mounted = mounted.map_err(|error| {
            ApiError::new(ErrorKind::Incompatible, error.to_string())
                .next("see `gs_pitr check`, or restore on another host")
        })?;
        let argv = arguments(
            &spec.node,
            probackup,
            program.kind,
            (mounted.path(), places),
            jobs,
        );
        let ran = self
            .run_program(&program, argv, (&mounted, &fs), &cancel)
            .await;
        // Also after an error: nothing may write into the workspace while it is taken away.
        if let Err(error) = mounted.unmount().await {
            cx.report.warning(error.to_string());
        }
        ran.map_err(|error| {
            // The program only saw an error of input or output.
            let error = stored.lower.trouble().unwrap_or(error);
            unless_cancelled(error, &cancel)
        })?;
        self.settle(places, probackup, auto_conf, cancel).await
    }

    async fn run_program(
        &self,
        program: &Program,
        argv: Vec<String>,
        (mounted, fs): (&Mounted, &CatalogFs),
        cancel: &CancellationToken,
    ) -> Result<(), ApiError> {
        let mut command = mounted.command(&program.path);
        command.args(argv);
        let watch = Watch {
            stall: self.cx.config.stall_timeout,
            cancel,
            password: None,
        };
        let heard = |told| match told {
            Told::Warning(text) if !ASKED_FOR.iter().any(|known| text.contains(known)) => {
                self.cx.report.warning(text);
            }
            _ => {}
        };
        let name = program.kind.name();
        let over = run(
            command,
            watch,
            heard,
            || fs.last_activity(),
            mounted.ended(),
        )
        .await;
        let over = over.map_err(|error| {
            let message = format!("{name} cannot be started: {error}");
            ApiError::new(ErrorKind::Incompatible, message)
        })?;
        ended(name, over)
    }

    /// What the program has made, as a copy has to be: as it was on the source, and on disk.
    async fn settle(
        &self,
        places: &Places,
        probackup: &Probackup,
        auto_conf: Original,
        cancel: CancellationToken,
    ) -> Result<(), ApiError> {
        let (places, node) = (places.clone(), self.spec.node.clone());
        let (recoverer, name) = (self.plan.recoverer, probackup.program.clone());
        let settling = tokio::task::spawn_blocking(move || {
            let made = |error: clean::Unclean| match error {
                clean::Unclean::Io { path, source } => local(&path, &source),
                clean::Unclean::Link { path, to } => ApiError::new(
                    ErrorKind::Damaged,
                    format!(
                        "{name} made a link at {} that leads to {}",
                        path.display(),
                        to.display()
                    ),
                ),
                clean::Unclean::Cancelled => cancelled(),
            };
            clean::remove_its_own(&places, &node, recoverer, &auto_conf).map_err(made)?;
            let mut roots = vec![places.data.clone()];
            if !node.tablespaces.is_empty() {
                roots.push(places.tablespaces.clone());
            }
            clean::flush(&roots, &cancel).map_err(made)
        });
        settling.await.map_err(|panic| {
            ApiError::new(ErrorKind::Internal, format!("settling the copy: {panic}"))
        })?
    }
}

/// What is said of something that failed because all was to stop.
fn unless_cancelled(error: ApiError, cancel: &CancellationToken) -> ApiError {
    if cancel.is_cancelled() {
        return cancelled();
    }
    error
}

/// How the program ended.
fn ended(name: &str, over: Over<String>) -> Result<(), ApiError> {
    let words = over.words.complaint();
    let words = if words.is_empty() {
        "nothing"
    } else {
        words.as_str()
    };
    let done = match (over.gone, over.done) {
        (true, "") => String::new(),
        (true, done) => format!("; {done}"),
        (false, done) => format!("; {done}, and it still has not ended"),
    };
    let failed = |kind, what: String| {
        let message = format!("{name} {what}{done}. It said: {words}");
        Err(ApiError::new(kind, message))
    };
    match over.end {
        End::Itself(status) if status.success() => Ok(()),
        End::Itself(status) => failed(ErrorKind::Recovery, said_of(status)),
        End::Cancelled => Err(cancelled()),
        End::Stalled(idle) => failed(
            ErrorKind::Timeout,
            format!("stood still for {} s and was ended", idle.as_secs()),
        )
        .map_err(|error| {
            error.next(
                "look at the store and this host's disks, or raise the agent's --stall-timeout",
            )
        }),
        End::Spoiled(why) => failed(
            ErrorKind::Recovery,
            format!("was ended, because its mount is gone ({why})"),
        ),
    }
}

fn said_of(status: ExitStatus) -> String {
    match status.code() {
        Some(code) => format!("ended with code {code}"),
        None => format!("ended: {status}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_with_an_equals_sign_are_mapped_as_a_whole() {
        assert_eq!(
            mapping("/a=b", Path::new("/c d/e=f/1")),
            "/a\\=b=/c d/e\\=f/1"
        );
    }
}
