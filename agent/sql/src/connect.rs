//! Logging in.

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncWrite};
use tokio_postgres::{Config, NoTls};
use tokio_util::sync::CancellationToken;

use crate::error::SqlError;
use crate::session::Session;

/// First and last major version that is known, as `server_version_num`.
const KNOWN_VERSIONS: std::ops::Range<u32> = 120_000..190_000;

/// A password that no debug print shows.
#[derive(Clone, PartialEq, Eq)]
pub struct Password(String);

impl Password {
    /// Wraps a password.
    #[must_use]
    pub fn new(password: impl Into<String>) -> Self {
        Self(password.into())
    }
}

impl fmt::Debug for Password {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Password(..)")
    }
}

/// Where and as whom to log in.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ConnectOptions {
    /// Directory of the server's socket (an absolute path), or a host name or address.
    pub host: String,
    /// Port; it names the socket too.
    pub port: u16,
    /// Database user.
    pub user: String,
    /// Database. Grants on functions are looked for in this one.
    pub database: String,
    /// Password, for md5 and SCRAM; `None` for peer and trust.
    pub password: Option<Password>,
    /// Shown in `pg_stat_activity`.
    pub application_name: String,
    /// For connecting and logging in together.
    pub connect_timeout: Duration,
    /// For each statement that has no deadline of its own.
    pub statement_deadline: Duration,
}

impl Default for ConnectOptions {
    fn default() -> Self {
        Self {
            host: "/var/run/postgresql".to_owned(),
            port: 5432,
            user: "postgres".to_owned(),
            database: "postgres".to_owned(),
            password: None,
            application_name: "gs_pitr".to_owned(),
            connect_timeout: Duration::from_secs(10),
            statement_deadline: Duration::from_secs(30),
        }
    }
}

impl ConnectOptions {
    /// For messages.
    fn target(&self) -> String {
        format!("{}:{}", self.host, self.port)
    }

    fn config(&self) -> Config {
        let mut config = Config::new();
        config
            .host(&self.host)
            .port(self.port)
            .user(&self.user)
            .dbname(&self.database)
            .application_name(&self.application_name)
            .connect_timeout(self.connect_timeout)
            // A peer that vanished is noticed within half a minute also while the session only holds a
            // backup open and sends nothing.
            .keepalives_idle(Duration::from_secs(10))
            .keepalives_interval(Duration::from_secs(5))
            .keepalives_retries(3);
        if let Some(Password(password)) = &self.password {
            config.password(password);
        }
        config
    }
}

/// One session of a data node. Clones share it, and their statements wait for each other; the session ends
/// with the last clone.
#[derive(Debug, Clone)]
pub struct NodeConnection {
    pub(crate) session: Arc<Session>,
    pub(crate) cancel: CancellationToken,
}

impl NodeConnection {
    /// Connects and logs in. `cancel` ends this and every later statement of this handle.
    ///
    /// # Errors
    /// [`SqlError::Unreachable`], [`SqlError::WrongPassword`], [`SqlError::Refused`],
    /// [`SqlError::Cancelled`]; [`SqlError::Setting`] for a version that is not known.
    pub async fn connect(
        options: &ConnectOptions,
        cancel: CancellationToken,
    ) -> Result<Self, SqlError> {
        let config = options.config();
        let login = async {
            let (client, connection) = config
                .connect(NoTls)
                .await
                .map_err(|e| SqlError::of_login(&e, &options.user, &options.target()))?;
            Ok(Session::spawn(client, connection, options))
        };
        Self::open(login, options, cancel).await
    }

    /// Logs in over a stream that somebody else opened: TLS, or a server whose own authentication
    /// was answered on it before (openGauss; such a stream swallows the start-up message and replays the
    /// server's answer).
    ///
    /// Statements on such a session cannot be cancelled at the server: a deadline ends the session.
    ///
    /// # Errors
    /// As [`NodeConnection::connect`].
    pub async fn over<S>(
        stream: S,
        options: &ConnectOptions,
        cancel: CancellationToken,
    ) -> Result<Self, SqlError>
    where
        S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
    {
        let config = options.config();
        let login = async {
            let (client, connection) = config
                .connect_raw(stream, NoTls)
                .await
                .map_err(|e| SqlError::of_login(&e, &options.user, &options.target()))?;
            Ok(Session::spawn(client, connection, options))
        };
        Self::open(login, options, cancel).await
    }

    /// Bounds the log-in, then makes the session ours.
    async fn open(
        login: impl Future<Output = Result<Session, SqlError>>,
        options: &ConnectOptions,
        cancel: CancellationToken,
    ) -> Result<Self, SqlError> {
        let session = tokio::select! {
            biased;
            () = cancel.cancelled() => return Err(SqlError::Cancelled { what: "logging in" }),
            login = tokio::time::timeout(options.connect_timeout, login) => {
                login.map_err(|_| SqlError::Unreachable {
                    target: options.target(),
                    message: format!("no answer within {} s", options.connect_timeout.as_secs()),
                })??
            }
        };
        let mut session = session;
        // D 20.1.3; an integer in every version.
        let version = Self::ask_version(&session, &cancel).await?;
        if !KNOWN_VERSIONS.contains(&version) {
            return Err(SqlError::Setting {
                name: "server_version_num",
                value: version.to_string(),
                needed: "that of PostgreSQL 12 to 18".to_owned(),
            });
        }
        session.version_num = version;
        let connection = Self {
            session: Arc::new(session),
            cancel,
        };
        connection
            .rows("setting up the session", &set_up(version))
            .await?;
        Ok(connection)
    }

    async fn ask_version(session: &Session, cancel: &CancellationToken) -> Result<u32, SqlError> {
        let what = "reading the server's version";
        let rows = session
            .run(what, "SHOW server_version_num", session.deadline, cancel)
            .await?;
        rows.first()
            .ok_or_else(|| SqlError::Answer {
                what,
                answer: "no row".to_owned(),
            })?
            .value(0)
    }

    /// The same session under another token: what has to be cleaned up after a cancel needs one that is
    /// not cancelled.
    #[must_use]
    pub fn with_cancel(&self, cancel: CancellationToken) -> Self {
        Self {
            session: Arc::clone(&self.session),
            cancel,
        }
    }

    /// `server_version_num`, e.g. 150020.
    #[must_use]
    pub fn version_num(&self) -> u32 {
        self.session.version_num
    }

    /// Major version, e.g. 15.
    #[must_use]
    pub fn major(&self) -> u32 {
        self.session.version_num / 10_000
    }

    /// Whether the session is known to be gone. It may be gone without being known: ask the server.
    #[must_use]
    pub fn is_lost(&self) -> bool {
        self.session.ended().is_some()
    }

    /// Waits until the session is gone, and says why. Never returns while it lives.
    pub async fn wait_lost(&self) -> SqlError {
        SqlError::Lost {
            what: "waiting",
            message: self.session.wait_ended().await,
        }
    }

    /// Ends the session now, also for its clones. A backup that it holds open is aborted by the server.
    pub fn close(&self) {
        self.session.close("closed by this program");
    }
}

/// Settings of our sessions.
///
/// D 20.11 (client connection defaults): no timeout of the server may end a session that holds a backup
/// open, and the death of this program must: a server that is busy with a statement looks whether its client is
/// there (D 20.3.2), and a client that vanished with its host is noticed within half a minute; nothing is looked up along somebody else's `search_path`; literals mean what they say.
fn set_up(version: u32) -> String {
    let mut sql = "SET statement_timeout = 0; SET lock_timeout = 0; \
                   SET idle_in_transaction_session_timeout = 0; \
                   SET search_path = pg_catalog; SET standard_conforming_strings = on; \
                   SET tcp_keepalives_idle = 10; SET tcp_keepalives_interval = 5; SET tcp_keepalives_count = 3"
        .to_owned();
    if version >= 140_000 {
        sql.push_str("; SET idle_session_timeout = 0; SET client_connection_check_interval = 2000");
    }
    if version >= 170_000 {
        sql.push_str("; SET transaction_timeout = 0");
    }
    sql
}
