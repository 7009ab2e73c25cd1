//! The session itself: its connection's task, one statement at a time, deadlines.

use std::time::Duration;

use tokio::io::{AsyncRead, AsyncWrite};
use tokio::sync::{Mutex, watch};
use tokio_postgres::{Client, Connection, NoTls, SimpleQueryMessage};
use tokio_util::sync::CancellationToken;

use crate::connect::{ConnectOptions, NodeConnection};
use crate::error::{SqlError, chain};
use crate::text::Row;

/// How long the server has to react to a request to cancel, before the session is given up.
const CANCEL_GRACE: Duration = Duration::from_secs(2);

/// A logged-in session. Its connection lives in a task of its own that ends when this is dropped.
#[derive(Debug)]
pub(crate) struct Session {
    client: Client,
    /// One statement at a time: a request to cancel must not hit somebody else's.
    turn: Mutex<()>,
    /// Why the session is gone.
    ended: watch::Receiver<Option<String>>,
    end: watch::Sender<Option<String>>,
    user: String,
    pub(crate) deadline: Duration,
    pub(crate) version_num: u32,
}

impl Session {
    /// Starts the task that carries the session's bytes.
    pub(crate) fn spawn<S, T>(
        client: Client,
        connection: Connection<S, T>,
        options: &ConnectOptions,
    ) -> Self
    where
        S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
        T: AsyncRead + AsyncWrite + Unpin + Send + 'static,
    {
        let (end, ended) = watch::channel(None);
        let (task_end, mut task_ended) = (end.clone(), ended.clone());
        tokio::spawn(async move {
            let reason = tokio::select! {
                // Said by `close`: dropping the connection closes the socket.
                _ = task_ended.wait_for(Option::is_some) => return,
                result = connection => match result {
                    Ok(()) => "the connection was closed".to_owned(),
                    Err(error) => chain(&error),
                },
            };
            task_end.send_if_modified(|said| {
                let first = said.is_none();
                said.get_or_insert(reason);
                first
            });
        });
        Self {
            client,
            turn: Mutex::new(()),
            ended,
            end,
            user: options.user.clone(),
            deadline: options.statement_deadline,
            version_num: 0,
        }
    }

    pub(crate) fn user(&self) -> &str {
        &self.user
    }

    /// Why the session is gone, if it is.
    pub(crate) fn ended(&self) -> Option<String> {
        self.ended
            .borrow()
            .clone()
            .or_else(|| self.client.is_closed().then(|| "connection closed".into()))
    }

    /// Waits for the end of the session.
    pub(crate) async fn wait_ended(&self) -> String {
        let mut ended = self.ended.clone();
        match ended.wait_for(Option::is_some).await {
            Ok(reason) => reason.clone().unwrap_or_default(),
            Err(_) => "the connection's task is gone".to_owned(),
        }
    }

    /// Ends the session.
    pub(crate) fn close(&self, reason: &str) {
        self.end.send_if_modified(|said| {
            let first = said.is_none();
            said.get_or_insert_with(|| reason.to_owned());
            first
        });
    }

    /// Runs one simple query within `deadline`.
    ///
    /// When it is cut off, the server is asked to cancel. If the statement then ends, either way, the
    /// session stays usable; if not, the session is closed, so that no late answer meets a later question.
    pub(crate) async fn run(
        &self,
        what: &'static str,
        sql: &str,
        deadline: Duration,
        cancel: &CancellationToken,
    ) -> Result<Vec<Row>, SqlError> {
        let late = tokio::time::sleep(deadline);
        tokio::pin!(late);
        let cut = |timeout: bool| {
            if timeout {
                let after = deadline;
                SqlError::Timeout { what, after }
            } else {
                SqlError::Cancelled { what }
            }
        };
        let _turn = tokio::select! {
            biased;
            () = cancel.cancelled() => return Err(cut(false)),
            turn = self.turn.lock() => turn,
            () = &mut late => return Err(cut(true)),
        };
        if let Some(message) = self.ended() {
            return Err(SqlError::Lost { what, message });
        }
        // Whoever drops this future drops an answer that is still under way: no later statement of
        // this session may be mistaken for its sequel.
        let unanswered = CloseUnlessAnswered(Some(self));
        let query = self.client.simple_query(sql);
        tokio::pin!(query);
        let outcome = tokio::select! {
            biased;
            answer = &mut query => Ok(answer),
            () = cancel.cancelled() => Err(cut(false)),
            () = &mut late => Err(cut(true)),
        };
        match outcome {
            Ok(answer) => {
                unanswered.answered();
                self.rows(what, answer).await
            }
            Err(error) => {
                let asked = self.client.cancel_token();
                let ends = async {
                    asked.cancel_query(NoTls).await.is_ok() && {
                        let _ = (&mut query).await;
                        true
                    }
                };
                if tokio::time::timeout(CANCEL_GRACE, ends).await == Ok(true) {
                    unanswered.answered();
                }
                Err(error)
            }
        }
    }

    async fn rows(
        &self,
        what: &'static str,
        answer: Result<Vec<SimpleQueryMessage>, tokio_postgres::Error>,
    ) -> Result<Vec<Row>, SqlError> {
        match answer {
            Ok(messages) => Ok(messages
                .into_iter()
                .filter_map(|message| match message {
                    SimpleQueryMessage::Row(row) => Some(Row { what, row }),
                    _ => None,
                })
                .collect()),
            Err(error) => {
                let said_by_server = error.as_db_error().is_some();
                let error = SqlError::of_statement(&error, what, &self.user);
                let SqlError::Lost { message, .. } = &error else {
                    return Err(error);
                };
                if !said_by_server {
                    // The connection's task knows better than "connection closed".
                    let _ =
                        tokio::time::timeout(Duration::from_millis(500), self.wait_ended()).await;
                }
                self.close(message);
                let message = if said_by_server {
                    message.clone()
                } else {
                    self.wait_ended().await
                };
                Err(SqlError::Lost { what, message })
            }
        }
    }
}

/// Closes the session when a statement's answer was not waited for.
struct CloseUnlessAnswered<'a>(Option<&'a Session>);

impl CloseUnlessAnswered<'_> {
    fn answered(mut self) {
        self.0 = None;
    }
}

impl Drop for CloseUnlessAnswered<'_> {
    fn drop(&mut self) {
        if let Some(session) = self.0 {
            session.close("given up: a statement was not answered in time");
        }
    }
}

impl NodeConnection {
    /// Runs a statement with the usual deadline.
    pub(crate) async fn rows(&self, what: &'static str, sql: &str) -> Result<Vec<Row>, SqlError> {
        self.rows_within(what, sql, self.session.deadline).await
    }

    /// Runs a statement with a deadline of its own.
    pub(crate) async fn rows_within(
        &self,
        what: &'static str,
        sql: &str,
        deadline: Duration,
    ) -> Result<Vec<Row>, SqlError> {
        self.session.run(what, sql, deadline, &self.cancel).await
    }

    /// Runs a statement that answers exactly one row.
    pub(crate) async fn row(&self, what: &'static str, sql: &str) -> Result<Row, SqlError> {
        only(what, self.rows(what, sql).await?)
    }
}

/// The only row of an answer.
pub(crate) fn only(what: &'static str, rows: Vec<Row>) -> Result<Row, SqlError> {
    let count = rows.len();
    let mut rows = rows.into_iter();
    match (rows.next(), count) {
        (Some(row), 1) => Ok(row),
        _ => Err(SqlError::Answer {
            what,
            answer: format!("{count} rows"),
        }),
    }
}
