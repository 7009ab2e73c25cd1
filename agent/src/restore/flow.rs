//! From the proof to the end: forward, as soon as that is decided, or back.

use std::path::PathBuf;
use std::time::Duration;

use agent_api::{ApiError, ErrorKind, OpenRequest, Phase, Restored, WalState};
use catalog::model::{Decision, PromotedNode, Verdict};
use tokio::sync::mpsc;
use tokio::time::timeout;

use super::decide::{Patience, rolled_back};
use super::errors::{cancelled, local, of_workspace};
use super::journal::Stage;
use super::live::{Live, fill};
use super::recoverer::Recoverer;
use super::settings::Standalone;
use super::workspace::Workspace;
use super::{Restore, attached, prepare, promote, prove, settings, sweep, tablespaces};
use crate::facts;
use crate::operation::RestoreCommand;

/// How long a cancelled restore tries to find out whether it may go back.
const LAST_WORD: Duration = Duration::from_secs(15);

/// How a restore ends that does not end well.
#[derive(Debug)]
enum End {
    /// Everything that was made is taken away.
    Back(ApiError),
    /// Everything stays as it is, for the same operation to go on.
    Keep(ApiError),
}

type Commands = mpsc::Receiver<RestoreCommand>;

impl Restore {
    /// Runs from wherever the journal stands.
    pub(super) async fn go(
        mut self,
        mut workspace: Workspace,
        commands: &mut Commands,
    ) -> Result<(), ApiError> {
        let stage = workspace.journal.stage;
        if stage != Stage::Making {
            self.cx.report.warning(format!(
                "going on with a restore that was begun before: it was {stage:?}"
            ));
        }
        let ended = async {
            self.decided(&mut workspace, commands).await?;
            self.forward(&mut workspace, commands)
                .await
                .map_err(End::Keep)
        };
        match ended.await {
            Ok(()) => {
                let place = workspace.places.work.clone();
                if let Err(error) = workspace.finish().await {
                    self.cx.report.warning(format!(
                        "what the restore needed meanwhile is left in {}: {error}",
                        place.display()
                    ));
                }
                Ok(())
            }
            Err(End::Back(error)) => {
                let config = &self.cx.config;
                Err(sweep::taken_away(error, workspace, config).await)
            }
            Err(End::Keep(error)) => Err(self.kept(error)),
        }
    }

    fn kept(&self, mut error: ApiError) -> ApiError {
        error.changed = true;
        let resume = format!(
            "then go on: gs_pitr operations resume {}",
            self.spec.restore
        );
        error.next = Some(match error.next {
            Some(next) => format!("{next}; {resume}"),
            None => format!("mend that, {resume}"),
        });
        error
    }

    /// Returns when every node goes forward.
    async fn decided(
        &mut self,
        workspace: &mut Workspace,
        commands: &mut Commands,
    ) -> Result<(), End> {
        if workspace.is_committed() {
            self.cx.report.decided(Verdict::Commit);
            return Ok(());
        }
        if workspace.journal.stage == Stage::Making {
            self.watched(workspace).await.map_err(End::Back)?;
        }
        self.cx.report.phase(Phase::Proved);
        self.waiting(workspace, commands).await
    }

    /// Makes the copy; if the client is silent for too long meanwhile, it is decided that all go back.
    async fn watched(&mut self, workspace: &mut Workspace) -> Result<(), ApiError> {
        let making = self.make(workspace);
        tokio::pin!(making);
        let decision = tokio::select! {
            made = &mut making => return made,
            decision = self.judge.decided_alone() => decision,
        };
        // `commit` cannot stand before this node is proved; whatever stands, this node is not there.
        self.stop.cancel();
        let made = making.await;
        self.cx.report.decided(decision.verdict);
        match made {
            Err(error) if error.kind != ErrorKind::Cancelled => Err(error),
            _ => Err(rolled_back(&decision)),
        }
    }

    async fn waiting(&self, workspace: &mut Workspace, commands: &mut Commands) -> Result<(), End> {
        let alone = self.judge.decided_alone();
        tokio::pin!(alone);
        loop {
            let command = tokio::select! {
                () = self.cx.cancel.cancelled() => return self.cancelled(workspace).await,
                decision = &mut alone => return self.obey(workspace, &decision),
                Some(command) = commands.recv() => command,
            };
            let RestoreCommand::Promote(reply) = command else {
                refuse(command, "it is not promoted yet");
                continue;
            };
            // Whoever asked may be gone; what stands is obeyed all the same.
            match self.judge.decision().await {
                Ok(Some(decision)) => {
                    let obeyed = self.obey(workspace, &decision);
                    let _ = reply.send(match &obeyed {
                        Ok(()) => Ok(()),
                        Err(End::Back(error) | End::Keep(error)) => {
                            let message = error.message.clone();
                            Err(ApiError::new(ErrorKind::Conflict, message))
                        }
                    });
                    return obeyed;
                }
                Ok(None) => {
                    let message = "nothing is decided about the restore yet, so it is not promoted";
                    let _ = reply.send(Err(ApiError::new(ErrorKind::Conflict, message)));
                }
                Err(error) => drop(reply.send(Err(error))),
            }
        }
    }

    /// Notes a decision before it is acted on.
    fn obey(&self, workspace: &mut Workspace, decision: &Decision) -> Result<(), End> {
        let noted = workspace.note(|journal| journal.decision = Some(decision.verdict));
        noted.map_err(|error| End::Keep(of_workspace(&error)))?;
        self.cx.report.decided(decision.verdict);
        match decision.verdict {
            Verdict::Commit => Ok(()),
            Verdict::Rollback => Err(End::Back(rolled_back(decision))),
        }
    }

    /// Cancelled when it was proved: another may just have decided `commit`, so that goes back only what is known to go
    /// back.
    async fn cancelled(&self, workspace: &mut Workspace) -> Result<(), End> {
        let reason = format!("the restore on {} was cancelled", facts::host_name());
        match timeout(LAST_WORD, self.judge.roll_back(&reason)).await {
            Ok(Ok(decision)) => match self.obey(workspace, &decision) {
                Err(End::Back(_)) => Err(End::Back(cancelled())),
                obeyed => obeyed,
            },
            unknown => {
                let why = match unknown {
                    Ok(Err(error)) => error.message,
                    _ => format!("no answer within {} s", LAST_WORD.as_secs()),
                };
                let mut error = cancelled();
                error.message = format!(
                    "{}; its proved copy is left in {}, because what was decided is not known: {why}",
                    error.message,
                    workspace.places.work.display()
                );
                Err(End::Keep(error))
            }
        }
    }

    /// After `commit`: promotion, the switch, the opening.
    async fn forward(
        &self,
        workspace: &mut Workspace,
        commands: &mut Commands,
    ) -> Result<(), ApiError> {
        if workspace.journal.stage < Stage::InPlace {
            self.cx.report.phase(Phase::Promoting);
        }
        if workspace.journal.stage < Stage::Promoted
            && !workspace.journal.clearing
            && self.judge.is_silent()
        {
            // The cluster's lock is taken off soon, and a promotion may take longer than that: what clients write from then on
            // would be thrown away with this database.
            self.stop_live(workspace).await?;
        }
        let mut patience = Patience::default();
        while workspace.journal.stage < Stage::Promoted {
            let Err(error) = self.to_promoted(workspace).await else {
                break;
            };
            let comes_back = matches!(error.kind, ErrorKind::StoreUnavailable | ErrorKind::Timeout);
            if !comes_back || self.cx.cancel.is_cancelled() {
                return Err(error);
            }
            let what = "every node goes forward, and this one cannot";
            tokio::select! {
                () = patience.wait(&self.cx.report, what, &error) => {}
                () = self.cx.cancel.cancelled() => return Err(cancelled()),
            }
        }
        let promoted = self.to_place(workspace).await?;
        self.end(workspace, &promoted, commands).await
    }

    /// Promotes the copy in the workspace. May be interrupted anywhere and begun again.
    async fn to_promoted(&self, workspace: &mut Workspace) -> Result<(), ApiError> {
        if workspace.journal.stage == Stage::Making {
            self.begin_again(workspace).await?;
            self.make(workspace).await?;
        }
        let data = workspace.places.data.clone();
        let control = prove::read_control(&data)
            .map_err(|error| ApiError::new(ErrorKind::Recovery, error))?;
        let (recoverer, timeline) = (self.plan.recoverer, self.spec.point.timeline);
        let settled = promote::settle(&data, &self.spec, &self.plan).ok();
        if settled.is_none() {
            if !recoverer.may_be_promoted(&data, &control, timeline) {
                self.begin_again(workspace).await?;
                self.make(workspace).await?;
            }
            self.promote(workspace).await?;
        }
        let promoted = promote::settle(&data, &self.spec, &self.plan)?;
        let places = &workspace.places;
        if recoverer == Recoverer::OpenGauss {
            tablespaces::lead_home(&data, &places.target).map_err(|error| local(&data, &error))?;
        }
        prepare::drop_replaced(places, &self.spec)
            .map_err(|error| local(&places.tablespaces, &error))?;
        workspace
            .note(|journal| {
                journal.promoted = Some((promoted.timeline, promoted.fork.to_string()));
                journal.stage = Stage::Promoted;
            })
            .map_err(|error| of_workspace(&error))
    }

    /// Puts it in its place. What was there is stopped as late as can be, where a client holds the lock meanwhile.
    async fn to_place(&self, workspace: &mut Workspace) -> Result<Restored, ApiError> {
        self.end_of_epoch(workspace).await;
        if workspace.journal.stage == Stage::Promoted {
            if !workspace.journal.clearing {
                self.stop_live(workspace).await?;
            }
            for literal in &workspace.journal.literal {
                self.cx.report.warning(format!(
                    "a tablespace that was created between the copy and the point lies at the path that its WAL \
                     record has, {}",
                    literal.path.display()
                ));
            }
        }
        sweep::switch(workspace, &self.cx.config).await?;
        if let Some(old) = &workspace.journal.old {
            self.cx.report.warning(format!(
                "what was in {} is kept in {} until it is discarded: gs_pitr operations discard {}",
                workspace.places.target.display(),
                old.display(),
                self.spec.restore
            ));
        }
        let (timeline, fork_lsn) = workspace.journal.promoted.clone().ok_or_else(|| {
            ApiError::new(
                ErrorKind::Internal,
                "the journal does not say what was promoted",
            )
        })?;
        let (start_command, port) = self.start_command(workspace, timeline).await?;
        Ok(Restored {
            data_directory: workspace.places.target.to_string_lossy().into_owned(),
            recovered_to: self.plan.fork.to_string(),
            timeline,
            fork_lsn,
            port,
            running: false,
            start_command,
        })
    }

    /// What is shipped all the time from the database at the target ends with it: another history comes in its place.
    async fn end_of_epoch(&self, workspace: &Workspace) {
        let pgdata = self.cx.config.pgdata.as_ref();
        let own = pgdata.and_then(|pgdata| pgdata.canonicalize().ok());
        if own.is_some_and(|own| own == workspace.places.target)
            && self.cx.wal.status().state != WalState::Off
        {
            self.cx
                .wal
                .end_of_epoch("a restore puts another history in the database's place")
                .await;
            self.cx.report.warning(
                "WAL of this node is shipped no more, because the restore opens a new epoch: the next backup begins again",
            );
        }
    }

    /// Says that it is promoted, waits until all are, opens.
    async fn end(
        &self,
        workspace: &Workspace,
        restored: &Restored,
        commands: &mut Commands,
    ) -> Result<(), ApiError> {
        let report = &self.cx.report;
        report.restored(restored.clone());
        let node = PromotedNode {
            node_id: self.spec.node.node_id,
            timeline: restored.timeline,
            fork_lsn: restored.fork_lsn.clone(),
            machine_id: facts::machine_id(),
            data_directory: restored.data_directory.clone(),
            host: facts::host_name(),
            port: restored.port,
        };
        tokio::select! {
            () = self.judge.promoted(&node) => {}
            () = self.cx.cancel.cancelled() => return Err(cancelled()),
        }
        report.phase(Phase::Promoted);
        let request = tokio::select! {
            request = self.open_order(commands) => request,
            () = self.judge.all_promoted_alone(&self.spec) => OpenRequest { start: self.spec.start },
            () = self.cx.cancel.cancelled() => return Err(cancelled()),
        };
        report.phase(Phase::Opening);
        if request.start {
            let command = restored.start_command.join(" ");
            let places = &workspace.places;
            let (argv, log) = (&restored.start_command, &places.server_log);
            promote::open(self.plan.recoverer, argv, &places.target, log)
                .await
                .map_err(|error| error.next(format!("mend that (it is started by: {command})")))?;
            report.restored(Restored {
                running: true,
                ..restored.clone()
            });
        }
        Ok(())
    }

    async fn open_order(&self, commands: &mut Commands) -> OpenRequest {
        loop {
            match commands.recv().await {
                Some(RestoreCommand::Open(request, reply)) => {
                    // Whoever asked may be gone; the order stands.
                    let _ = reply.send(Ok(()));
                    return request;
                }
                Some(RestoreCommand::Promote(reply)) => drop(reply.send(Ok(()))),
                // Nobody can give orders any more; what all others have done is still to be seen.
                None => std::future::pending().await,
            }
        }
    }

    /// The command that starts the database in its place, and its port.
    async fn start_command(
        &self,
        workspace: &Workspace,
        timeline: u32,
    ) -> Result<(Vec<String>, u16), ApiError> {
        if let Some(live) = &workspace.journal.live
            && !live.argv.is_empty()
        {
            return Ok(self.as_before(workspace, live).await);
        }
        let places = &workspace.places;
        let attached = attached::locate(&self.spec.node, &places.config)?;
        let files = settings::Places {
            data: places.target.clone(),
            config: attached.config,
            hba: attached
                .hba
                .unwrap_or_else(|| places.target.join("pg_hba.conf")),
            ident: attached
                .ident
                .unwrap_or_else(|| places.target.join("pg_ident.conf")),
        };
        let live_port = workspace.journal.live.as_ref().and_then(|live| live.port);
        let mut standalone = Standalone {
            recoverer: self.plan.recoverer,
            bindir: &self.plan.bindir,
            places: &files,
            source: &self.source,
            port: self.spec.port.or(live_port).unwrap_or(self.spec.node.port),
            socket_directory: None,
            log: &places.server_log,
        };
        let replaced = self.look_at(&standalone, timeline).await;
        standalone.socket_directory = replaced.as_deref();
        let argv = match &self.cx.config.start_command {
            Some(argv) => fill(argv, &places.target, Some(standalone.port)),
            None => standalone.argv(),
        };
        Ok((argv, standalone.port))
    }

    /// The words that the database at the target was started with: its configuration outside the data directory is on
    /// this host and stays in force, and so does its port.
    async fn as_before(&self, workspace: &Workspace, live: &Live) -> (Vec<String>, u16) {
        let configured = live.ask("port").await.and_then(|port| port.parse().ok());
        let port = self.spec.port.or(live.port).or(configured);
        let port = port.unwrap_or(self.spec.node.port);
        let other = (configured != Some(port)).then_some(port);
        if other.is_some() && self.cx.config.start_command.is_some() {
            self.cx.report.warning(format!(
                "the restored configuration has port {}, and the agent's start command cannot be given port {port}",
                configured.map_or("none".to_owned(), |port: u16| port.to_string()),
            ));
        }
        let live = Live {
            port: Some(port),
            ..live.clone()
        };
        let argv = live.start_argv(&self.cx.config, &workspace.places.server_log, other);
        (argv, port)
    }

    /// Looks at the settings the database will have, and warns of what the operator should know before it is
    /// started. Returns a socket directory if the configured one cannot be used here.
    async fn look_at(&self, standalone: &Standalone<'_>, timeline: u32) -> Option<PathBuf> {
        let settings = standalone.settings();
        let data = &standalone.places.data;
        let report = &self.cx.report;
        let ask = |name| promote::ask(&self.plan, &settings, data, name);
        if ask("archive_mode").await.is_some_and(|mode| mode != "off") {
            let what = match self.plan.recoverer {
                Recoverer::PostgreSql(_) => format!("archives its new timeline {timeline}"),
                Recoverer::OpenGauss => {
                    "archives WAL under names that the source has used for other content".to_owned()
                }
            };
            report.warning(format!(
                "archive_mode is on in the restored configuration: once started, {} {what} by the source's archive_command",
                data.display()
            ));
        }
        let setting = self.plan.recoverer.socket_setting();
        let sockets = ask(setting).await?;
        let replaced =
            promote::socket_directory(&sockets, &self.cx.config.pg_host, standalone.port)?;
        report.warning(format!(
            "{setting} = '{sockets}' of the source cannot be used on this host; {} is used instead",
            replaced.display()
        ));
        Some(replaced)
    }
}

fn refuse(command: RestoreCommand, why: &str) {
    let (RestoreCommand::Promote(reply) | RestoreCommand::Open(_, reply)) = command;
    let _ = reply.send(Err(ApiError::new(ErrorKind::Conflict, why)));
}
