//! What happens after the copy, as the client asks for it: observe, mark, ship, release.

use agent_api::{ApiError, ErrorKind, Look, MarkRequest, Observed, Phase};
use agent_sql::NodeConnection;
use catalog::model::{NodeBackup, NodePoint};
use tokio::sync::mpsc;

use super::attempt::Attempt;
use super::manifest::CopyInBucket;
use super::observe::observe;
use super::point::Marked;
use super::{Released, cancelled};
use crate::database::connect_options;
use crate::engine::errors;
use crate::operation::{BackupCommand, OperationContext};
use crate::wal::ship::Shipper;

/// A copy that waits to be completed by a restore point.
pub(super) struct Server<'a> {
    attempt: &'a Attempt<'a>,
    shipper: &'a Shipper,
    copy: CopyInBucket,
    timeline: u32,
    commands: &'a mut mpsc::Receiver<BackupCommand>,
    /// A session of its own: a restore point must not wait behind a statement about WAL.
    sql: Option<NodeConnection>,
    /// How often it was opened.
    sessions: u64,
    /// Restore points so far; the last one counts.
    marked: Vec<Marked>,
}

impl<'a> Server<'a> {
    pub(super) fn new(
        attempt: &'a Attempt<'a>,
        shipper: &'a Shipper,
        copy: CopyInBucket,
        commands: &'a mut mpsc::Receiver<BackupCommand>,
    ) -> Self {
        Self {
            attempt,
            shipper,
            timeline: copy.timeline,
            copy,
            commands,
            sql: None,
            sessions: 0,
            marked: Vec::new(),
        }
    }

    /// Serves commands until a restore point is in the bucket.
    pub(super) async fn run(mut self) -> Result<(NodeBackup, NodePoint), ApiError> {
        let cx = self.attempt.cx;
        self.session().await?;
        // What makes a first look slow is done now; an error of it comes again when it matters.
        let _ = self.observe(Look::HoldersThenSnapshot).await;
        cx.report.phase(Phase::Copied);
        let marked = self.until_ship().await?;
        cx.report.phase(Phase::Shipping);
        self.complete(marked).await
    }

    /// The session for restore points and looks; a new one if it was lost.
    async fn session(&mut self) -> Result<NodeConnection, ApiError> {
        if let Some(sql) = self.sql.as_ref().filter(|sql| !sql.is_lost()) {
            return Ok(sql.clone());
        }
        let options = connect_options(&self.attempt.cx.config, "gs_pitr mark")?;
        let sql = NodeConnection::connect(&options, self.attempt.work.clone())
            .await
            .map_err(errors::sql)?;
        self.sql = Some(sql.clone());
        self.sessions += 1;
        Ok(sql)
    }

    async fn next(&mut self) -> Result<BackupCommand, ApiError> {
        tokio::select! {
            biased;
            () = self.attempt.work.cancelled() => Err(cancelled()),
            error = self.shipper.failed() => Err(error),
            command = self.commands.recv() => command.ok_or_else(cancelled),
        }
    }

    async fn until_ship(&mut self) -> Result<Marked, ApiError> {
        loop {
            match self.next().await? {
                BackupCommand::Observe(look, reply) => {
                    let _ = reply.send(self.observe(look).await);
                }
                BackupCommand::Mark(request, reply) => {
                    let made = self.mark(request).await;
                    // A point that failed is tried again under another name; the copy stays.
                    let _ = reply.send(made.map(|marked| marked.result));
                }
                BackupCommand::Ship(reply) => match self.marked.pop() {
                    Some(marked) => {
                        let _ = reply.send(Ok(()));
                        return Ok(marked);
                    }
                    None => {
                        let _ = reply.send(Err(out_of_turn("there is no restore point yet")));
                    }
                },
                BackupCommand::Release(reply) => {
                    let _ = reply.send(Err(out_of_turn("the WAL is not in the bucket yet")));
                }
            }
        }
    }

    async fn observe(&mut self, look: Look) -> Result<Observed, ApiError> {
        let sql = self.session().await?;
        observe(&sql, self.sessions, look).await
    }

    async fn mark(&mut self, request: MarkRequest) -> Result<Marked, ApiError> {
        let named = |marked: &Marked| marked.result.restore_point == request.restore_point;
        match self.marked.last() {
            // The answer was lost.
            Some(last) if named(last) => return Ok(last.clone()),
            _ if self.marked.iter().any(named) => {
                // Recovery stops at the first record of a name.
                let why = "an earlier restore point of this backup has this name";
                return Err(out_of_turn(why));
            }
            _ => {}
        }
        let sql = self.session().await?;
        let marked = Marked::make(&sql, request, self.timeline).await?;
        self.marked.push(marked.clone());
        // Said once: a proof that is tried for long makes many.
        if self.attempt.cx.report.current_phase() != Phase::Marked {
            self.attempt.cx.report.phase(Phase::Marked);
        }
        Ok(marked)
    }

    async fn complete(mut self, marked: Marked) -> Result<(NodeBackup, NodePoint), ApiError> {
        let sql = self.session().await?;
        let attempt = self.attempt;
        let node = attempt.node;
        tokio::select! {
            biased;
            () = attempt.work.cancelled() => return Err(cancelled()),
            shipped = marked.ship(node, &sql, self.shipper) => shipped?,
        }
        let point = tokio::select! {
            biased;
            () = attempt.work.cancelled() => return Err(cancelled()),
            error = self.shipper.failed() => return Err(error),
            point = marked.prove(attempt.cx, attempt.spec, node, &self.copy) => point?,
        };
        let backup = self.copy.describe(attempt.spec, node, marked.segment(node));
        Ok((backup, point))
    }
}

/// All is in the bucket: waits until the client has written it down.
pub(super) async fn until_release(
    cx: &OperationContext,
    commands: &mut mpsc::Receiver<BackupCommand>,
) -> Result<Released, ApiError> {
    loop {
        let command = tokio::select! {
            biased;
            () = cx.cancel.cancelled() => return Err(cancelled()),
            command = commands.recv() => command.ok_or_else(cancelled)?,
        };
        match command {
            BackupCommand::Release(reply) => return Ok(reply),
            BackupCommand::Ship(reply) => {
                let _ = reply.send(Ok(()));
            }
            BackupCommand::Observe(_, reply) => {
                let _ = reply.send(Err(out_of_turn("the WAL is shipped already")));
            }
            BackupCommand::Mark(_, reply) => {
                let _ = reply.send(Err(out_of_turn("the WAL is shipped already")));
            }
        }
    }
}

fn out_of_turn(why: &str) -> ApiError {
    ApiError::new(ErrorKind::Conflict, why)
}
