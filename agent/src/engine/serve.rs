//! What happens when restore points can be made, as the client asks for it: observe, mark, flush, ship, release.
//!
//! A copy that is whole outlives its sessions with the database: what is in the bucket stays, and what holds the WAL (a permanent
//! slot, the archiver, the service) outlives a crash of the server. So a restart costs the restore points that were not on disk yet, and no copy.

use std::time::{Duration, Instant};

use agent_api::{ApiError, ErrorKind, Look, MarkRequest, Observed, Phase};
use agent_sql::NodeConnection;
use catalog::model::NodePoint;
use tokio::sync::mpsc;

use super::attempt::{cancelled, void};
use super::backup::Released;
use super::observe::observe;
use super::point::{Ground, Marked};
use crate::database::connect_options;
use crate::engine::errors;
use crate::operation::{BackupCommand, OperationContext};
use crate::wal::ship::{RESTART, Shipper};

const PAUSE: Duration = Duration::from_secs(1);

/// A node whose restore points are made, until one of them is shipped.
pub(super) struct Server<'a> {
    ground: &'a Ground<'a>,
    shipper: &'a Shipper,
    commands: &'a mut mpsc::Receiver<BackupCommand>,
    /// A session of its own: a restore point must not wait behind a statement about WAL.
    sql: Option<NodeConnection>,
    /// How often it was opened.
    sessions: u64,
    /// Restore points so far, each with the number of its session; the last one counts.
    marked: Vec<(u64, Marked)>,
    /// Names of those that may have been made or not.
    doubtful: Vec<String>,
}

impl<'a> Server<'a> {
    pub(super) fn new(
        ground: &'a Ground<'a>,
        shipper: &'a Shipper,
        commands: &'a mut mpsc::Receiver<BackupCommand>,
    ) -> Self {
        Self {
            ground,
            shipper,
            commands,
            sql: None,
            sessions: 0,
            marked: Vec::new(),
            doubtful: Vec::new(),
        }
    }

    /// Goes on with a restore point that another operation has made, if there is one.
    #[must_use]
    pub(super) fn knowing(mut self, marked: Option<Marked>) -> Self {
        // No session of this one has made it: it cannot be flushed here, and was.
        self.marked.extend(marked.map(|marked| (0, marked)));
        self
    }

    /// Serves commands until a restore point is in the bucket.
    pub(super) async fn run(mut self) -> Result<(Marked, NodePoint), ApiError> {
        let cx = self.ground.cx;
        self.session().await?;
        // What makes a first look slow is done now; an error of it comes again when it matters.
        let _ = self.observe(Look::HoldersThenSnapshot).await;
        cx.report.phase(self.ground.ready);
        let marked = self.until_ship().await?;
        cx.report.phase(Phase::Shipping);
        self.complete(marked).await
    }

    /// The session for restore points and looks; a new one if it was lost.
    async fn session(&mut self) -> Result<NodeConnection, ApiError> {
        if let Some(sql) = self.sql.as_ref().filter(|sql| !sql.is_lost()) {
            return Ok(sql.clone());
        }
        let options = connect_options(&self.ground.cx.config, "gs_pitr mark")?;
        let sql = NodeConnection::connect(&options, self.ground.work.clone())
            .await
            .map_err(errors::sql)?;
        self.sql = Some(sql.clone());
        self.sessions += 1;
        Ok(sql)
    }

    async fn next(&mut self) -> Result<BackupCommand, ApiError> {
        tokio::select! {
            biased;
            () = self.ground.work.cancelled() => Err(cancelled()),
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
                BackupCommand::Flush(request, reply) => {
                    let _ = reply.send(self.flush(&request).await);
                }
                BackupCommand::Ship(reply) => match self.marked.pop() {
                    Some((_, marked)) => {
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
            Some((_, last)) if named(last) => return Ok(last.clone()),
            _ if self.marked.iter().any(|(_, marked)| named(marked)) => {
                // Recovery stops at the first record of a name.
                let why = "an earlier restore point of this operation has this name";
                return Err(out_of_turn(why));
            }
            _ if self.doubtful.contains(&request.restore_point) => {
                let message = "whether the restore point was made is not known, and recovery stops at the first of a name";
                return Err(
                    ApiError::new(ErrorKind::Timeout, message).next("make it under another name")
                );
            }
            _ => {}
        }
        let sql = self.session().await?;
        let name = request.restore_point.clone();
        let marked = match Marked::make(&sql, request, self.ground.timeline).await {
            Ok(marked) => marked,
            Err(error) => {
                if error.outcome_is_unknown() {
                    self.doubtful.push(name);
                }
                return Err(errors::sql(error));
            }
        };
        self.marked.push((self.sessions, marked.clone()));
        // Said once: a proof that is tried for long makes many.
        if self.ground.cx.report.current_phase() != Phase::Marked {
            self.ground.cx.report.phase(Phase::Marked);
        }
        Ok(marked)
    }

    /// Waits until the last restore point is on disk. Only the session that made it can tell: behind another one there may have been
    /// a crash, which loses what was not.
    async fn flush(&self, request: &MarkRequest) -> Result<(), ApiError> {
        let Some((session, marked)) = self.marked.last() else {
            return Err(out_of_turn("there is no restore point yet"));
        };
        if marked.result.restore_point != request.restore_point {
            return Err(out_of_turn("it is not the last restore point"));
        }
        let sql = self.sql.as_ref().filter(|_| *session == self.sessions);
        let Some(sql) = sql.filter(|sql| !sql.is_lost()) else {
            let message = "the session that made the restore point is lost: the database may have crashed since, and have lost it";
            return Err(void(message.to_owned()).next("make it under another name"));
        };
        marked.flush(self.ground.node, sql).await
    }

    /// Ships, by a new session if the server was restarted meanwhile. Whether the record has outlived that is said by the
    /// bytes in the bucket.
    async fn ship(&mut self, marked: &Marked) -> Result<(), ApiError> {
        let deadline = Instant::now() + RESTART;
        let mut lost = false;
        loop {
            let error = match self.session().await {
                Ok(sql) => match marked.ship(self.ground.node, &sql, self.shipper).await {
                    Err(error) if sql.is_lost() => error,
                    outcome => return outcome,
                },
                Err(error) if lost => error,
                Err(error) => return Err(error),
            };
            lost = true;
            if Instant::now() > deadline {
                return Err(error);
            }
            tracing::warn!(%error, "the session of the restore point is opened again");
            tokio::time::sleep(PAUSE).await;
        }
    }

    async fn complete(mut self, marked: Marked) -> Result<(Marked, NodePoint), ApiError> {
        let ground = self.ground;
        tokio::select! {
            biased;
            () = ground.work.cancelled() => return Err(cancelled()),
            shipped = self.ship(&marked) => shipped?,
        }
        let point = tokio::select! {
            biased;
            () = ground.work.cancelled() => return Err(cancelled()),
            error = self.shipper.failed() => return Err(error),
            point = marked.prove(ground) => point?,
        };
        Ok((marked, point))
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
            BackupCommand::Flush(_, reply) => {
                let _ = reply.send(Err(out_of_turn("the WAL is shipped already")));
            }
        }
    }
}

fn out_of_turn(why: &str) -> ApiError {
    ApiError::new(ErrorKind::Conflict, why)
}
