//! Restore of one node: copy from the bucket, recovery to the point, proof, promotion.
//!
//! | phase | what happens | killed here |
//! |---|---|---|
//! | preparing | checks; nothing is changed | nothing is left |
//! | fetching | files into the workspace; WAL to the point is read for what replay would do | the workspace is left, and taken away by the next restore beside it |
//! | recovering | a private server replays to the point and shuts itself down | as above; the server ends, because its WAL ends with an error |
//! | proved | `pg_control` says so; waits for `promote` | as above |
//! | promoting | promoted privately, shut down, renamed to the target | before the rename as above; after it the target is whole |
//!
//! Whatever fails before the rename, everything that was made is taken away again.

mod attached;
mod bucket;
mod errors;
mod prepare;
mod process;
mod promote;
mod prove;
mod recover;
mod scan;
mod settings;
mod tablespaces;
mod target;
mod walserve;
mod workspace;

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use agent_api::{ApiError, ErrorKind, OpenRequest, Phase, RestoreSpec, Restored};
use catalog::keys;
use catalog::repo::Catalog;
use pipeline::download::Downloader;
use pipeline::error::PipelineError;
use pipeline::extract::{ExtractOptions, extract};
use pipeline::index::Index;
use pipeline::pack::IndexEntry;
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;

use self::bucket::BucketWal;
use self::errors::{cancelled, local, of_catalog, of_pipeline, of_workspace};
use self::prepare::Placer;
use self::recover::Recovery;
use self::settings::{Action, RecoveryTarget, Setting, Standalone};
use self::target::Plan;
use self::walserve::{Spooled, WalServer};
use self::workspace::{Places, Workspace};
use crate::operation::{OperationContext, RestoreCommand};
use crate::walget::WalFile;

/// Most threads that decompress and write.
const MOST_JOBS: usize = 64;

/// Runs a restore to its end.
///
/// # Errors
/// Why it did not end well. `changed` is false if nothing of it is left.
pub async fn run(
    cx: OperationContext,
    spec: RestoreSpec,
    commands: mpsc::Receiver<RestoreCommand>,
) -> Result<(), ApiError> {
    // The server runs this very program to get its WAL.
    let program = std::env::current_exe().map_err(|error| {
        ApiError::new(
            ErrorKind::Internal,
            format!("the agent does not find its own program: {error}"),
        )
    })?;
    run_with(cx, spec, commands, &program).await
}

/// [`run`] with another program for `wal-get` (a test's own program is not the agent).
///
/// # Errors
/// As [`run`].
pub async fn run_with(
    cx: OperationContext,
    spec: RestoreSpec,
    mut commands: mpsc::Receiver<RestoreCommand>,
    program: &Path,
) -> Result<(), ApiError> {
    cx.report.phase(Phase::Preparing);
    if !program.is_file() {
        let message = format!(
            "the agent's own program {} is not there any more",
            program.display()
        );
        return Err(ApiError::new(ErrorKind::Internal, message).next("restart the agent"));
    }
    let plan = target::check(&cx.config, &spec).await?;
    let restore = Restore {
        source: settings::of_command_line(&spec.node.argv),
        cx,
        spec,
        plan,
        program: program.to_owned(),
    };
    let wal = restore.wal().await?;
    let workspace = Workspace::create(restore.cx.id, &restore.plan.target).await;
    let mut workspace = workspace.map_err(|error| of_workspace(&error))?;
    let prepared = restore
        .to_promotion(&mut workspace, wal, &mut commands)
        .await;
    let (end, attached) = match prepared {
        Ok(prepared) => prepared,
        Err(error) => return Err(taken_away(error, workspace).await),
    };
    restore
        .hand_over(workspace, end, &attached, &mut commands)
        .await
}

/// Takes away what was made, and says in the error whether that worked.
async fn taken_away(mut error: ApiError, workspace: Workspace) -> ApiError {
    let work = workspace.places.work.clone();
    match workspace.discard().await {
        Ok(()) => error.changed = false,
        Err(left) => {
            error.changed = true;
            error.message = format!(
                "{}; and what was made could not be taken away: {left}",
                error.message
            );
            error.next = Some(format!(
                "mend that; the next restore to this directory takes away what is left, which {} lists",
                work.join("restore.json").display()
            ));
        }
    }
    error
}

struct Restore {
    cx: OperationContext,
    spec: RestoreSpec,
    plan: Plan,
    /// Settings the source was started with.
    source: Vec<Setting>,
    program: PathBuf,
}

/// A database that is promoted and shut down, still in its workspace.
type Prepared = (promote::Promoted, attached::Attached);

impl Restore {
    async fn wal(&self) -> Result<BucketWal, ApiError> {
        let store = &self.cx.store;
        let opened = Catalog::open(Arc::clone(store)).await;
        let catalog = opened.map_err(|error| of_catalog(&error))?;
        let chain = catalog
            .epoch_chain(self.spec.node.node_id, &self.spec.node.epoch)
            .await;
        Ok(BucketWal {
            store: Arc::clone(store),
            chain: chain.map_err(|error| of_catalog(&error))?,
            throttle: self.cx.throttle.clone(),
        })
    }

    /// Everything up to the rename.
    async fn to_promotion(
        &self,
        workspace: &mut Workspace,
        wal: BucketWal,
        commands: &mut mpsc::Receiver<RestoreCommand>,
    ) -> Result<Prepared, ApiError> {
        let (attached, spooled) = self.fetch(workspace, &wal).await?;
        let socket = workspace.run().join("wal.sock");
        let server = WalServer::start(
            wal,
            self.plan.needed,
            spooled,
            &socket,
            &workspace.places.spool,
            &self.cx.cancel,
        )
        .map_err(|error| local(&socket, &error))?;
        let ended = self
            .recover(workspace, &server, &socket, &attached, commands)
            .await;
        // Also after an error: nothing may write into the workspace while it is taken away.
        server.stop().await;
        Ok((ended?, attached))
    }

    /// Files from the bucket, while WAL is read for what replay would do on this host.
    async fn fetch(
        &self,
        workspace: &mut Workspace,
        wal: &BucketWal,
    ) -> Result<(attached::Attached, HashMap<WalFile, Spooled>), ApiError> {
        let (cx, spec) = (&self.cx, &self.spec);
        cx.report.phase(Phase::Fetching);
        cx.report.expect_bytes(spec.node.plain_bytes);
        let places = workspace.places.clone();
        if !spec.node.tablespaces.is_empty() {
            workspace
                .make(&places.tablespaces)
                .map_err(|e| of_workspace(&e))?;
        }
        if !spec.node.attachments.is_empty() {
            workspace
                .make(&places.config)
                .map_err(|e| of_workspace(&e))?;
        }
        prepare::make_room(&places, spec)?;
        // The first that fails stops the other, and both are waited for: nothing may write into the
        // workspace while it is taken away.
        let both = cx.cancel.child_token();
        let extracting = async {
            let extracted = self.extract(&places, &both).await;
            extracted.inspect_err(|_| both.cancel())
        };
        let scanning = async {
            let scanned = scan::scan(wal, &self.plan, spec, &places.spool, &cx.budget, &both).await;
            scanned.inspect_err(|_| both.cancel())
        };
        let scanned = match tokio::join!(extracting, scanning) {
            (Ok(()), Ok(scanned)) => scanned,
            (Err(error), Ok(_)) | (Ok(()), Err(error)) => return Err(error),
            (Err(one), Err(other)) => {
                let first = if one.kind == ErrorKind::Cancelled {
                    other
                } else {
                    one
                };
                return Err(first);
            }
        };
        let version_directory = self.plan.version_directory(spec);
        for created in &scanned.created {
            tablespaces::check_literal(created, &places.target, &cx.config)?;
        }
        for created in &scanned.created {
            let made = workspace.make_literal(&created.location, &version_directory);
            made.map_err(|error| of_workspace(&error))?;
        }
        let (plan, spec) = (self.plan.clone(), spec.clone());
        let finished =
            tokio::task::spawn_blocking(move || prepare::finish(&places, &plan, &spec)).await;
        let (attached, warnings) = finished.map_err(|panic| {
            ApiError::new(ErrorKind::Internal, format!("preparing the copy: {panic}"))
        })??;
        for warning in warnings {
            cx.report.warning(warning);
        }
        Ok((attached, scanned.spooled))
    }

    /// Fired by `cancel`, it returns only when no thread of it writes any more.
    async fn extract(&self, places: &Places, cancel: &CancellationToken) -> Result<(), ApiError> {
        let (cx, node) = (&self.cx, &self.spec.node);
        let downloader = Downloader::new(
            Arc::clone(&cx.store),
            cx.budget.clone(),
            cx.throttle.clone(),
            Arc::clone(&cx.meter),
            cancel.clone(),
        );
        let (backup, node_id) = (&self.spec.backup_id, node.node_id);
        let index_key = keys::index(backup, node_id, node.attempt);
        let index = Index::open_with(downloader.clone(), index_key.clone(), &node.index);
        let index = index.map_err(|error| of_pipeline(&error))?;
        let packs = node.packs.iter().map(|pack| {
            let key = keys::pack(backup, node_id, node.attempt, pack.number);
            (key, pack.clone())
        });
        let packs: Vec<_> = packs.collect();
        let options = ExtractOptions {
            jobs: usize::try_from(self.spec.jobs)
                .unwrap_or(1)
                .clamp(1, MOST_JOBS),
            ..ExtractOptions::default()
        };
        let mapper = Placer::new(places, &self.spec);
        let map = |entry: &IndexEntry| {
            let place = mapper.place(entry);
            place.map_err(|what| PipelineError::damaged(&index_key, what))
        };
        let extracted = extract(&downloader, &index, &packs, options, map).await;
        extracted.map(drop).map_err(|error| of_pipeline(&error))
    }

    /// Recovery, proof, the wait for the order, promotion.
    async fn recover(
        &self,
        workspace: &Workspace,
        wal: &WalServer<BucketWal>,
        socket: &Path,
        attached: &attached::Attached,
        commands: &mut mpsc::Receiver<RestoreCommand>,
    ) -> Result<promote::Promoted, ApiError> {
        let (cx, spec, plan) = (&self.cx, &self.spec, &self.plan);
        let places = &workspace.places;
        let recovery = Recovery {
            plan,
            workspace,
            places: settings::Places {
                data: places.data.clone(),
                config: attached.config.clone(),
                hba: places.hba.clone(),
                ident: places.ident.clone(),
            },
            source: &self.source,
            wal,
            socket,
            program: &self.program,
            cancel: &cx.cancel,
        };
        let mut target = RecoveryTarget {
            name: spec.point.restore_point.clone(),
            timeline: spec.point.timeline,
            action: Action::Shutdown,
        };
        cx.report.phase(Phase::Recovering);
        let report = cx.report.clone();
        let mut on_segment = move |more| report.wal_segments(more);
        recovery.to_point(&target, &mut on_segment).await?;
        let control = prove::read_control(&places.data)
            .map_err(|error| ApiError::new(ErrorKind::Recovery, error))?;
        let end = prove::prove(&control, spec, plan.end)?;
        cx.report.phase(Phase::Proved);
        self.order(commands).await?;
        cx.report.phase(Phase::Promoting);
        target.action = Action::Promote;
        recovery.promote(&target).await?;
        let promoted = promote::settle(&places.data, spec, end)?;
        prepare::drop_replaced(places, spec).map_err(|error| local(&places.tablespaces, &error))?;
        Ok(promoted)
    }

    async fn order(&self, commands: &mut mpsc::Receiver<RestoreCommand>) -> Result<(), ApiError> {
        loop {
            let command = tokio::select! {
                () = self.cx.cancel.cancelled() => None,
                command = commands.recv() => command,
            };
            match command {
                Some(RestoreCommand::Promote(reply)) => {
                    // Whoever asked may be gone; the order stands.
                    let _ = reply.send(Ok(()));
                    return Ok(());
                }
                Some(RestoreCommand::Open(_, reply)) => drop(reply),
                None => return Err(cancelled()),
            }
        }
    }

    async fn open_order(
        &self,
        commands: &mut mpsc::Receiver<RestoreCommand>,
    ) -> Result<OpenRequest, ApiError> {
        loop {
            let command = tokio::select! {
                () = self.cx.cancel.cancelled() => None,
                command = commands.recv() => command,
            };
            match command {
                Some(RestoreCommand::Open(request, reply)) => {
                    let _ = reply.send(Ok(()));
                    return Ok(request);
                }
                Some(RestoreCommand::Promote(reply)) => drop(reply.send(Ok(()))),
                None => return Err(cancelled().changed()),
            }
        }
    }

    /// The rename, and what comes after it. There is no way back from here.
    async fn hand_over(
        &self,
        mut workspace: Workspace,
        promoted: promote::Promoted,
        attached: &attached::Attached,
        commands: &mut mpsc::Receiver<RestoreCommand>,
    ) -> Result<(), ApiError> {
        let (cx, spec, plan) = (&self.cx, &self.spec, &self.plan);
        let places = workspace.places.clone();
        for literal in workspace.literal() {
            cx.report.warning(format!(
                "a tablespace that was created between the copy and the point lies at the path that its WAL \
                 record has, {}",
                literal.path.display()
            ));
        }
        if let Err(error) = workspace.commit() {
            return Err(taken_away(of_workspace(&error), workspace).await);
        }
        if let Err(error) = workspace.finish() {
            let place = places.work.display();
            cx.report.warning(format!(
                "what the restore needed meanwhile is left in {place}: {error}"
            ));
        }
        let files = settings::Places {
            data: places.target.clone(),
            config: attached.config.clone(),
            hba: attached
                .hba
                .clone()
                .unwrap_or_else(|| places.target.join("pg_hba.conf")),
            ident: attached
                .ident
                .clone()
                .unwrap_or_else(|| places.target.join("pg_ident.conf")),
        };
        let mut standalone = Standalone {
            pg_ctl: &plan.bindir.join("pg_ctl"),
            places: &files,
            source: &self.source,
            port: spec.port.unwrap_or(spec.node.port),
            socket_directory: None,
            log: &places.server_log,
        };
        let replaced = self.look_at(&standalone, promoted.timeline).await;
        standalone.socket_directory = replaced.as_deref();
        let start_command = self.start_command(&standalone);
        let mut restored = Restored {
            data_directory: places.target.to_string_lossy().into_owned(),
            recovered_to: plan.end.to_string(),
            timeline: promoted.timeline,
            fork_lsn: promoted.fork.to_string(),
            port: standalone.port,
            running: false,
            start_command: start_command.clone(),
        };
        cx.report.restored(restored.clone());
        cx.report.phase(Phase::Promoted);
        let request = self.open_order(commands).await?;
        cx.report.phase(Phase::Opening);
        if request.start {
            let command = start_command.join(" ");
            promote::open(&start_command, &standalone)
                .await
                .map_err(|error| error.next(format!("mend that, then start it: {command}")))?;
            restored.running = true;
            cx.report.restored(restored);
        }
        Ok(())
    }

    /// Looks at the settings the database will have, and warns of what the operator should know before it is
    /// started. Returns a socket directory if the configured one cannot be used here.
    async fn look_at(&self, standalone: &Standalone<'_>, timeline: u32) -> Option<PathBuf> {
        let settings = standalone.settings();
        let data = &standalone.places.data;
        let report = &self.cx.report;
        let ask = |name| promote::ask(&self.plan, &settings, data, name);
        if ask("archive_mode").await.is_some_and(|mode| mode != "off") {
            report.warning(format!(
                "archive_mode is on in the restored configuration: once started, {} archives its new timeline \
                 {timeline} by the source's archive_command",
                data.display()
            ));
        }
        let sockets = ask("unix_socket_directories").await?;
        let replaced =
            promote::socket_directory(&sockets, &self.cx.config.pg_host, standalone.port)?;
        report.warning(format!(
            "unix_socket_directories = '{sockets}' of the source cannot be used on this host; {} is used instead",
            replaced.display()
        ));
        Some(replaced)
    }

    /// The configured command, in which `{data_directory}` and `{port}` stand for this database's, or ours.
    fn start_command(&self, standalone: &Standalone<'_>) -> Vec<String> {
        let Some(argv) = &self.cx.config.start_command else {
            return standalone.argv();
        };
        let data = standalone.places.data.to_string_lossy();
        let port = standalone.port.to_string();
        let fill = |word: &String| {
            word.replace("{data_directory}", &data)
                .replace("{port}", &port)
        };
        argv.iter().map(fill).collect()
    }
}
