//! From the bucket to a copy that is proved to be at its point.

use std::collections::{BTreeSet, HashMap};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use agent_api::{ApiError, ErrorKind, Phase, Place};
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
use super::settings::{Action, RecoveryTarget};
use super::tablespaces::{Created, Owner};
use super::walserve::{Spooled, WalServer};
use super::workspace::{Workspace, in_background};
use super::{Restore, attached, prepare, prove, scan, settings, switch, tablespaces};
use crate::walget::WalFile;

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
        let places = &workspace.places;
        let control = prove::read_control(&places.data)
            .map_err(|error| ApiError::new(ErrorKind::Recovery, error))?;
        prove::prove(&control, &self.spec, self.plan.end)?;
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
        let version_directory = self.plan.version_directory(&self.spec);
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
                self.literals(live.as_ref(), &scanned.created)?;
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
        let literals = self.literals(live.as_ref(), &scanned.created)?;
        self.make_literals(workspace, literals).await?;
        Ok(scanned.spooled)
    }

    /// The literal paths of tablespaces that replay creates, if it may.
    fn literals(
        &self,
        live: Option<&Live>,
        created: &BTreeSet<Created>,
    ) -> Result<Vec<Literal>, ApiError> {
        let version_directory = self.plan.version_directory(&self.spec);
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
                version_directory: version_directory.clone(),
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
}
