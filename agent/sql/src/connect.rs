//! Logging in.

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use tokio_postgres::{Config, NoTls};
use tokio_util::sync::CancellationToken;

use crate::dialect::{self, Dialect, Flavour};
use crate::error::SqlError;
use crate::login;
use crate::session::Session;

/// A password that no debug print shows.
#[derive(Clone, PartialEq, Eq)]
pub struct Password(String);

impl Password {
    /// Wraps a password.
    #[must_use]
    pub fn new(password: impl Into<String>) -> Self {
        Self(password.into())
    }

    pub(crate) fn as_bytes(&self) -> &[u8] {
        self.0.as_bytes()
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
    /// Password, for md5, SCRAM and openGauss's sha256; `None` for peer and trust.
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
    pub(crate) fn target(&self) -> String {
        format!("{}:{}", self.host, self.port)
    }

    /// What tokio-postgres needs to know: the socket is ours.
    pub(crate) fn config(&self) -> Config {
        let mut config = Config::new();
        config
            .user(&self.user)
            .dbname(&self.database)
            .application_name(&self.application_name);
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
    /// Connects and logs in, to PostgreSQL or openGauss: which one it is, the server says. `cancel` ends this and every
    /// later statement of this handle.
    ///
    /// # Errors
    /// [`SqlError::Unreachable`], [`SqlError::WrongPassword`], [`SqlError::Refused`],
    /// [`SqlError::Cancelled`]; [`SqlError::Setting`] for a version that is not known.
    pub async fn connect(
        options: &ConnectOptions,
        cancel: CancellationToken,
    ) -> Result<Self, SqlError> {
        let login = async {
            let stream = login::open(options).await?;
            let (client, connection) = options
                .config()
                .connect_raw(stream, NoTls)
                .await
                .map_err(|e| SqlError::of_login(&e, &options.user, &options.target()))?;
            Ok(Session::spawn(client, connection, options))
        };
        let mut session = tokio::select! {
            biased;
            () = cancel.cancelled() => return Err(SqlError::Cancelled { what: "logging in" }),
            login = tokio::time::timeout(options.connect_timeout, login) => {
                login.map_err(|_| SqlError::Unreachable {
                    target: options.target(),
                    message: format!("no answer within {} s", options.connect_timeout.as_secs()),
                })??
            }
        };
        session.dialect = dialect::detect(&session, &cancel).await?;
        let connection = Self {
            session: Arc::new(session),
            cancel,
        };
        let set_up = connection.dialect().set_up();
        connection.rows("setting up the session", &set_up).await?;
        Ok(connection)
    }

    pub(crate) fn dialect(&self) -> &dyn Dialect {
        &*self.session.dialect
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

    /// Which kind of server it is.
    #[must_use]
    pub fn flavour(&self) -> Flavour {
        self.dialect().flavour()
    }

    /// Its name and release, such as `PostgreSQL 15.14` or `openGauss 5.0.0`.
    #[must_use]
    pub fn version(&self) -> String {
        self.dialect().version()
    }

    /// `server_version_num`, e.g. 150020; 90204 for every openGauss.
    #[must_use]
    pub fn version_num(&self) -> u32 {
        self.dialect().version_num()
    }

    /// Major version of PostgreSQL, e.g. 15; 9 for every openGauss.
    #[must_use]
    pub fn major(&self) -> u32 {
        self.version_num() / 10_000
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
