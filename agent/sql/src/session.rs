//! The session itself: its connection's task, one statement at a time, deadlines.

use std::time::Duration;

use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite};
use tokio::sync::Mutex;
use tokio_postgres::{Client, Connection, NoTls, SimpleQueryMessage};
use tokio_util::sync::CancellationToken;

use crate::carrier::{Carrier, CloseUnlessAnswered};
use crate::connect::{ConnectOptions, NodeConnection};
use crate::dialect::{Dialect, PostgreSql};
use crate::error::SqlError;
use crate::login;
use crate::text::Row;

/// How long the server has to react to a request to cancel, before the session is given up.
const CANCEL_GRACE: Duration = Duration::from_secs(2);

/// A logged-in session. Its connection lives in a task of its own that ends when this is dropped.
#[derive(Debug)]
pub(crate) struct Session {
    client: Client,
    /// One statement at a time: a request to cancel must not hit somebody else's.
    turn: Mutex<()>,
    carrier: Carrier,
    /// Where to ask for a statement to be cancelled. Knows no password.
    server: ConnectOptions,
    pub(crate) deadline: Duration,
    pub(crate) dialect: Box<dyn Dialect>,
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
        Self {
            client,
            turn: Mutex::new(()),
            carrier: Carrier::spawn(connection),
            server: ConnectOptions {
                password: None,
                ..options.clone()
            },
            deadline: options.statement_deadline,
            // Until the server has said what it is, it is asked what both understand.
            dialect: Box::new(PostgreSql::new(0)),
        }
    }

    pub(crate) fn user(&self) -> &str {
        &self.server.user
    }

    /// Why the session is gone, if it is.
    pub(crate) fn ended(&self) -> Option<String> {
        self.carrier
            .ended()
            .or_else(|| self.client.is_closed().then(|| "connection closed".into()))
    }

    /// Waits for the end of the session.
    pub(crate) async fn wait_ended(&self) -> String {
        self.carrier.wait_ended().await
    }

    /// Ends the session.
    pub(crate) fn close(&self, reason: &str) {
        self.carrier.close(reason);
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
        let unanswered = CloseUnlessAnswered::new(&self.carrier);
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
                let ends = async {
                    self.cancel_statement().await && {
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

    /// Asks the server to cancel what this session does, over a socket of its own, and waits until it has
    /// passed that on; whether it has.
    ///
    /// The server closes that socket after it has sent its signal (`PQcancel` waits for the same). Without
    /// the wait a signal that is slower than the statement's own end would hit the session's next statement.
    async fn cancel_statement(&self) -> bool {
        let token = self.client.cancel_token();
        let Ok(mut socket) = login::socket(&self.server).await else {
            return false;
        };
        token.cancel_query_raw(&mut socket, NoTls).await.is_ok()
            && matches!(socket.read(&mut [0]).await, Ok(0))
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
                let error = SqlError::of_statement(&error, what, self.user(), &*self.dialect);
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

    /// Runs a statement that answers rows of one text.
    pub(crate) async fn texts(
        &self,
        what: &'static str,
        sql: &str,
    ) -> Result<Vec<String>, SqlError> {
        let rows = self.rows(what, sql).await?;
        rows.iter()
            .map(|row| row.text(0).map(str::to_owned))
            .collect()
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
