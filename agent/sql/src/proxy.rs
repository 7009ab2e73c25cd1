//! What is said to a ShardingSphere-Proxy: `DistSQL`, by the simple query protocol, one statement a message.
//!
//! A [`ProxyConnection`] is one session of one proxy, whatever protocol its front end speaks (PostgreSQL's with md5 or
//! cleartext, openGauss's with SHA256 or md5). Every call has its own deadline. One that is not answered in time closes the session, as
//! nothing can be cancelled there (a proxy gives no key for it), and as a late answer must not be taken for that of a
//! later statement. What then became of the statement is not known: [`effect`] tells such an error from a refusal.
//!
//! Columns are read by position: their names differ between releases.

mod effect;
mod import;
mod line;
mod lock;
mod replies;
mod stream;

use std::sync::Arc;
use std::time::Duration;

use tokio_util::sync::CancellationToken;

use crate::connect::{ConnectOptions, Password};
use crate::error::SqlError;
use crate::login;
use line::Line;

pub use effect::{Effect, effect};
pub use import::ImportReply;
pub use lock::{Gate, LockReply, UnlockReply};
pub use replies::{Clock, ComputeNode, ExportedMetadata, StorageNode, StorageUnit};

/// Whether a proxy's connections are encrypted.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub enum ProxyTls {
    /// Not at all.
    #[default]
    Off,
    /// TLS 1.2 or 1.3; a proxy without it is refused.
    On {
        /// Authority (PEM) that must have signed the proxy's certificate for its host name. `None`: any certificate will do. That keeps out who
        /// only listens, not who answers in the proxy's place; a proxy of its own makes a new self-signed certificate
        /// at each start, which nothing can be compared with.
        ca_pem: Option<Vec<u8>>,
    },
}

/// Where and as whom to log in.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ProxyOptions {
    /// Host name or address.
    pub host: String,
    /// Port.
    pub port: u16,
    /// Proxy user.
    pub user: String,
    /// Its password.
    pub password: Option<Password>,
    /// Logical database; `postgres` is there always.
    pub database: String,
    /// Sent with the log-in.
    pub application_name: String,
    /// For connecting and logging in together.
    pub connect_timeout: Duration,
    /// Whether the connection is encrypted.
    pub tls: ProxyTls,
}

impl Default for ProxyOptions {
    fn default() -> Self {
        Self {
            host: "127.0.0.1".to_owned(),
            port: 3307,
            user: "root".to_owned(),
            password: None,
            database: "postgres".to_owned(),
            application_name: "gs_pitr".to_owned(),
            connect_timeout: Duration::from_secs(5),
            tls: ProxyTls::Off,
        }
    }
}

impl ProxyOptions {
    /// `HOST:PORT`, for messages.
    #[must_use]
    pub fn target(&self) -> String {
        if self.host.contains(':') {
            format!("[{}]:{}", self.host, self.port)
        } else {
            format!("{}:{}", self.host, self.port)
        }
    }

    /// As the log-in takes them.
    fn connect_options(&self) -> ConnectOptions {
        ConnectOptions {
            host: self.host.clone(),
            port: self.port,
            user: self.user.clone(),
            database: self.database.clone(),
            password: self.password.clone(),
            application_name: self.application_name.clone(),
            connect_timeout: self.connect_timeout,
            ..ConnectOptions::default()
        }
    }
}

/// One session of a proxy. Clones share it, and their statements wait for each other; it ends with the last clone.
#[derive(Debug, Clone)]
pub struct ProxyConnection {
    line: Arc<Line>,
    cancel: CancellationToken,
}

impl ProxyConnection {
    /// Connects and logs in. `cancel` ends this and every later statement of this handle.
    ///
    /// # Errors
    /// [`SqlError::Unreachable`], [`SqlError::WrongPassword`], [`SqlError::Refused`] (user or database), [`SqlError::Setting`] (a
    /// proxy without TLS), [`SqlError::Cancelled`].
    pub async fn connect(
        options: &ProxyOptions,
        cancel: CancellationToken,
    ) -> Result<Self, SqlError> {
        let who = options.connect_options();
        let target = options.target();
        let login = async {
            let stream = login::open_over(&who, || stream::connect(options)).await?;
            let (client, connection) = who
                .config()
                .connect_raw(stream, tokio_postgres::NoTls)
                .await
                .map_err(|error| SqlError::of_login(&error, &options.user, &target))?;
            Ok(Line::new(client, connection, target.clone()))
        };
        let line = tokio::select! {
            biased;
            () = cancel.cancelled() => return Err(SqlError::Cancelled { what: "logging in" }),
            login = tokio::time::timeout(options.connect_timeout, login) => {
                login.map_err(|_| SqlError::Unreachable {
                    target: options.target(),
                    message: format!("no answer within {:?}", options.connect_timeout),
                })??
            }
        };
        Ok(Self {
            line: Arc::new(line),
            cancel,
        })
    }

    /// The same session under another token: what has to be unlocked after a cancel needs one that is not cancelled.
    #[must_use]
    pub fn with_cancel(&self, cancel: CancellationToken) -> Self {
        Self {
            line: Arc::clone(&self.line),
            cancel,
        }
    }

    /// `HOST:PORT`, for messages.
    #[must_use]
    pub fn target(&self) -> &str {
        self.line.target()
    }

    /// Whether the session is known to be gone. It may be gone without being known.
    #[must_use]
    pub fn is_lost(&self) -> bool {
        self.line.ended().is_some()
    }

    /// Ends the session now, also for its clones.
    pub fn close(&self) {
        self.line.close("closed by this program");
    }
}
