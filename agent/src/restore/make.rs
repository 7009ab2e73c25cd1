//! From the bucket to a copy that is proved to be at its point.

use std::collections::{BTreeSet, HashMap};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use agent_api::{ApiError, ErrorKind, Phase, Place};
use agent_wal::control::ControlFile;
use catalog::keys;
use pipeline::download::Downloader;
use pipeline::error::PipelineError;
use pipeline::extract::{ExtractOptions, extract};
use pipeline::index::Index;
use pipeline::pack::IndexEntry;
use tokio_util::sync::CancellationToken;

use super::bucket::BucketWal;
use super::errors::{local, of_catalog, of_pipeline, of_workspace};
use super::journal::{Literal, Places, Stage, tag};
use super::live::Live;
use super::prepare::Placer;
use super::recover::Recovery;
use super::recoverer::Recoverer;
use super::settings::{Action, RecoveryTarget};
use super::tablespaces::{Created, Owner};
use super::walserve::{Spooled, WalServer};
use super::workspace::{Workspace, in_background};
use super::{Restore, attached, prepare, promote, prove, scan, settings, switch, tablespaces};
use crate::walget::WalFile;

/// openGauss's setting for the node's name; PostgreSQL has none.
const NODE_NAME: &str = "pgxc_node_name";
/// Most threads that decompress and write.
const MOST_JOBS: usize = 64;

impl Restore {
    async fn wal(&self) -> Result<BucketWal, ApiError> {
        let chain = self
            .judge
            .catalog
            .epoch_chain(self.spec.node.node_id, &self.spec.node.epoch)
            .await;
        Ok(BucketWal {
            store: Arc::clone(&self.cx.store),
            chain: chain.map_err(|error| of_catalog(&error))?,
            throttle: self.cx.throttle.clone(),
        })
    }

    /// Everything up to the proof.
    pub(super) async fn make(&self, workspace: &mut Workspace) -> Result<(), ApiError> {
        if matches!(self.spec.place, Place::InPlace { .. }) && !workspace.journal.clearing {
            self.clear_target(workspace).await?;
        }
        let wal = self.wal().await?;
        let spooled = self.fetch(workspace, &wal).await?;
        self.cx.report.phase(Phase::Recovering);
        self.serving(workspace, wal, spooled, Action::Shutdown)
            .await?;
        let mut control = control_of(workspace)?;
        if prove::is_short(&control, &self.plan) {
            // Begun at the checkpoint that it noted, the server has no other to note, and says how far it has replayed.
            let (wal, nothing) = (self.wal().await?, HashMap::new());
            self.serving(workspace, wal, nothing, Action::Shutdown)
                .await?;
            control = control_of(workspace)?;
        }
        prove::prove(&control, &self.spec, &self.plan)?;
        workspace
            .note(|journal| journal.stage = Stage::Proved)
            .map_err(|error| of_workspace(&error))
    }

    /// Promotes the proved copy, still private, and shuts it down.
    pub(super) async fn promote(&self, workspace: &Workspace) -> Result<(), ApiError> {
        let wal = self.wal().await?;
        self.serving(workspace, wal, HashMap::new(), Action::Promote)
            .await
    }

    /// Runs the private server, with WAL from the bucket.
    async fn serving(
        &self,
        workspace: &Workspace,
        wal: BucketWal,
        spooled: HashMap<WalFile, Spooled>,
        action: Action,
    ) -> Result<(), ApiError> {
        let places = &workspace.places;
        let socket = workspace.run().join("wal.sock");
        let server = WalServer::start(
            wal,
            self.plan.needed,
            spooled,
            &socket,
            &places.spool,
            &self.stop,
        )
        .map_err(|error| local(&socket, &error))?;
        let ended = self.recover(workspace, &server, &socket, action).await;
        // Also after an error: nothing may write into the workspace while it is taken away.
        server.stop().await;
        ended
    }

    async fn recover(
        &self,
        workspace: &Workspace,
        wal: &WalServer<BucketWal>,
        socket: &Path,
        action: Action,
    ) -> Result<(), ApiError> {
        let (cx, spec) = (&self.cx, &self.spec);
        let places = &workspace.places;
        let attached = attached::locate(&spec.node, &places.config)?;
        let recovery = Recovery {
            plan: &self.plan,
            workspace,
            places: settings::Places {
                data: places.data.clone(),
                config: attached.config,
                hba: places.hba.clone(),
                ident: places.ident.clone(),
            },
            source: &self.source,
            wal,
            socket,
            program: &self.program,
            cancel: &self.stop,
        };
        let target = RecoveryTarget {
            name: spec.point.restore_point.clone(),
            timeline: spec.point.timeline,
            action,
        };
        match action {
            Action::Shutdown => {
                let report = cx.report.clone();
                let mut on_segment = move |more| report.wal_segments(more);
                recovery.to_point(&target, &mut on_segment).await
            }
            Action::Promote => recovery.promote(&target).await,
        }
    }

    /// Stops and removes the database at the target, for want of room.
    async fn clear_target(&self, workspace: &mut Workspace) -> Result<(), ApiError> {
        self.cx.report.warning(format!(
            "the database in {} is stopped and removed now, to make room: there is no way back",
            self.plan.target.display()
        ));
        self.stop_live(workspace).await?;
        let live = workspace.journal.live.as_ref();
        let version_directory = match live.filter(|live| !live.tablespaces.is_empty()) {
            Some(live) => self.version_directory(live.ask(NODE_NAME).await.as_deref())?,
            None => String::new(),
        };
        switch::clear_target(workspace, &version_directory).map_err(|error| of_workspace(&error))
    }

    /// Stops the database at the target, if it runs. It stands in the journal before.
    pub(super) async fn stop_live(&self, workspace: &mut Workspace) -> Result<(), ApiError> {
        let Some(mut live) = workspace.journal.live.clone() else {
            return Ok(());
        };
        // It may have been stopped, started otherwise or given tablespaces since it was looked at.
        if let Some(mut now) = Live::look(&live.data).await? {
            if now.system_identifier != live.system_identifier {
                let message = format!(
                    "another database than before is in {} now, with system identifier {}",
                    live.data.display(),
                    now.system_identifier
                );
                return Err(ApiError::new(ErrorKind::Target, message));
            }
            now.bindir.clone_from(&live.bindir);
            if now.argv.is_empty() {
                now.argv = live.argv;
            }
            now.port = now.port.or(live.port);
            live = now;
        }
        let stopping = live.running;
        workspace
            .note(|journal| {
                journal.live = Some(live.clone());
                journal.stopped |= stopping;
            })
            .map_err(|error| of_workspace(&error))?;
        live.stop(&self.cx.config).await
    }

    /// Files from the bucket, while WAL is read for what replay would do on this host.
    async fn fetch(
        &self,
        workspace: &mut Workspace,
        wal: &BucketWal,
    ) -> Result<HashMap<WalFile, Spooled>, ApiError> {
        let (cx, spec) = (&self.cx, &self.spec);
        cx.report.phase(Phase::Fetching);
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
        let live = match spec.place {
            Place::Replace { .. } => workspace.journal.live.clone(),
            Place::Fresh | Place::InPlace { .. } => None,
        };
        // The first that fails stops the other, and both are waited for: nothing may write into the
        // workspace while it is taken away.
        let both = self.stop.child_token();
        let extracting = async {
            let extracted = self.extract(&places, &both).await;
            extracted.inspect_err(|_| both.cancel())
        };
        let scanning = async {
            let scanned = scan::scan(wal, &self.plan, spec, &places.spool, &cx.budget, &both).await;
            let scanned = scanned.and_then(|scanned| {
                // Refused before hours of copying, if it is to be refused.
                self.literals(live.as_ref(), &scanned.created, "")?;
                Ok(scanned)
            });
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
        let (plan, finishing) = (self.plan.clone(), spec.clone());
        let finished =
            tokio::task::spawn_blocking(move || prepare::finish(&places, &plan, &finishing)).await;
        let (_, warnings) = finished.map_err(|panic| {
            ApiError::new(ErrorKind::Internal, format!("preparing the copy: {panic}"))
        })??;
        for warning in warnings {
            cx.report.warning(warning);
        }
        if !scanned.created.is_empty() {
            let data = &workspace.places.data;
            let node_name = promote::ask(&self.plan, &self.source, data, NODE_NAME).await;
            let version_directory = self.version_directory(node_name.as_deref())?;
            let literals = self.literals(live.as_ref(), &scanned.created, &version_directory)?;
            self.make_literals(workspace, literals).await?;
        }
        Ok(scanned.spooled)
    }

    /// Name of the server's directory in a tablespace, with openGauss's name of the node as its configuration has it.
    fn version_directory(&self, node_name: Option<&str>) -> Result<String, ApiError> {
        let recoverer = self.plan.recoverer;
        if recoverer == Recoverer::OpenGauss && node_name.is_none_or(str::is_empty) {
            let message = format!(
                "`{} -C {NODE_NAME}` does not say what the node's directories in tablespaces are called",
                self.plan.server().display()
            );
            return Err(ApiError::new(ErrorKind::Target, message));
        }
        let catalog_version = self.spec.node.catalog_version;
        Ok(recoverer.version_directory(catalog_version, node_name))
    }

    /// The literal paths of tablespaces that replay creates, if it may.
    fn literals(
        &self,
        live: Option<&Live>,
        created: &BTreeSet<Created>,
        version_directory: &str,
    ) -> Result<Vec<Literal>, ApiError> {
        let mut literals: Vec<Literal> = Vec::new();
        for created in created {
            let path: PathBuf = created.location.clone();
            let config = &self.cx.config;
            let owner = tablespaces::check_literal(created, &self.plan.target, live, config)?;
            if literals.iter().any(|it| it.path == path) {
                continue;
            }
            let (aside, link) = match owner {
                Owner::Nobody => (None, None),
                Owner::Replaced(link) => {
                    self.may_stop_early(&path)?;
                    let aside = format!(".gs_pitr-old-{}", tag(self.spec.restore));
                    (Some(path.join(aside)), Some(link))
                }
            };
            literals.push(Literal {
                made: !path.exists(),
                path,
                version_directory: version_directory.to_owned(),
                aside,
                link,
            });
        }
        Ok(literals)
    }

    fn may_stop_early(&self, path: &Path) -> Result<(), ApiError> {
        if self.spec.stop_early {
            return Ok(());
        }
        let message = format!(
            "between the copy and the point a tablespace was created at {}, where the database in {} keeps one: replay \
             would write into it, so that database has to be stopped before all nodes are proved, and that is not \
             allowed",
            path.display(),
            self.plan.target.display()
        );
        Err(ApiError::new(ErrorKind::Target, message).next(
            "allow it to be stopped early (gs_pitr restore --stop-early), or choose a backup that was made after that tablespace",
        ))
    }

    async fn make_literals(
        &self,
        workspace: &mut Workspace,
        literals: Vec<Literal>,
    ) -> Result<(), ApiError> {
        if literals.iter().any(|literal| literal.aside.is_some()) {
            self.cx.report.warning(format!(
                "the database in {} is stopped now, before the decision: replay needs the paths of its tablespaces. It is \
                 started again if the restore goes back",
                self.plan.target.display()
            ));
            self.stop_live(workspace).await?;
        }
        for literal in literals {
            workspace
                .make_literal(&literal)
                .map_err(|error| of_workspace(&error))?;
        }
        Ok(())
    }

    /// Begins again with nothing but the decision: a promotion was cut off where its data directory cannot be
    /// trusted any more.
    pub(super) async fn begin_again(&self, workspace: &mut Workspace) -> Result<(), ApiError> {
        self.cx.report.warning(
            "the promotion was interrupted at a place where it cannot be taken up: copying again",
        );
        let failed = |error| of_workspace(&error);
        workspace.undo().await.map_err(failed)?;
        workspace
            .note(|journal| {
                journal.stage = Stage::Making;
                journal.made.clear();
                journal.literal.clear();
            })
            .map_err(failed)?;
        let places = workspace.places.clone();
        in_background(move || super::workspace::empty(&places))
            .await
            .map_err(failed)
    }

    /// Fired by `cancel`, it returns only when nothing of it writes any more.
    async fn extract(&self, places: &Places, cancel: &CancellationToken) -> Result<(), ApiError> {
        let cx = &self.cx;
        let downloader = Downloader::new(
            Arc::clone(&cx.store),
            cx.budget.clone(),
            cx.throttle.clone(),
            Arc::clone(&cx.meter),
            cancel.clone(),
        );
        let jobs = usize::try_from(self.spec.jobs).unwrap_or(1);
        let Some(probackup) = &self.spec.node.probackup else {
            cx.report.expect_bytes(self.spec.node.plain_bytes);
            let all = |_: &IndexEntry| true;
            return self.unpack(places, &downloader, jobs, all).await;
        };
        if !self.spec.node.attachments.is_empty() {
            let attached =
                |entry: &IndexEntry| Path::new(&entry.path).starts_with(attached::ATTACHMENTS);
            self.unpack(places, &downloader, 1, attached).await?;
        }
        self.fetch_by_program(places, downloader, probackup).await
    }

    /// Entries of the copy's own index to where they belong.
    async fn unpack(
        &self,
        places: &Places,
        downloader: &Downloader,
        jobs: usize,
        wanted: impl Fn(&IndexEntry) -> bool + Send + Sync,
    ) -> Result<(), ApiError> {
        let node = &self.spec.node;
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
            jobs: jobs.clamp(1, MOST_JOBS),
            ..ExtractOptions::default()
        };
        let mapper = Placer::new(places, &self.spec, self.plan.recoverer);
        let map = |entry: &IndexEntry| {
            if !wanted(entry) {
                return Ok(None);
            }
            let place = mapper.place(entry);
            place.map_err(|what| PipelineError::damaged(&index_key, what))
        };
        let extracted = extract(downloader, &index, &packs, options, map).await;
        extracted.map(drop).map_err(|error| of_pipeline(&error))
    }
}

fn control_of(workspace: &Workspace) -> Result<ControlFile, ApiError> {
    prove::read_control(&workspace.places.data)
        .map_err(|error| ApiError::new(ErrorKind::Recovery, error))
}
