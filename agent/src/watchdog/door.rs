//! A proxy, as a watchdog uses it.

use std::sync::{Arc, Mutex as StdMutex, PoisonError};
use std::time::Duration;

use agent_api::{StartWatchdog, WatchdogTls};
use agent_sql::proxy::{Gate, ProxyConnection, ProxyOptions, ProxyTls, UnlockReply};
use agent_sql::{Password, SqlError};
use futures_util::future::BoxFuture;
use tokio::sync::Mutex;
use tokio_util::sync::CancellationToken;

/// Longest wait for a log-in.
const LOG_IN: Duration = Duration::from_secs(2);

/// One proxy. A call logs in first if there is no session; one that is not answered within its deadline ends the
/// session, so that the next call makes a new one.
pub(super) trait Door: Send + Sync + 'static {
    /// Whether writes pass there.
    fn probe(&self, deadline: Duration) -> BoxFuture<'_, Result<Gate, SqlError>>;

    /// UNLOCK CLUSTER.
    fn unlock(
        &self,
        wait: Duration,
        deadline: Duration,
    ) -> BoxFuture<'_, Result<UnlockReply, SqlError>>;

    /// Whether there is a session.
    fn is_connected(&self) -> bool;

    /// Ends the session.
    fn close(&self);
}

/// The doors of a request's proxies.
pub(super) fn real(request: &StartWatchdog) -> Vec<Arc<dyn Door>> {
    let tls = match &request.tls {
        WatchdogTls::Off => ProxyTls::Off,
        WatchdogTls::On { ca_pem } => ProxyTls::On {
            ca_pem: ca_pem.clone().map(String::into_bytes),
        },
    };
    let password = request.password.as_ref();
    let options = ProxyOptions {
        user: request.user.clone(),
        password: password.map(|secret| Password::new(&secret.0)),
        database: request.database.clone(),
        application_name: "pitr-agent watchdog".to_owned(),
        connect_timeout: LOG_IN,
        tls,
        ..ProxyOptions::default()
    };
    let door = |proxy: &agent_api::ProxyAddress| {
        let options = ProxyOptions {
            host: proxy.host.clone(),
            port: proxy.port,
            ..options.clone()
        };
        Arc::new(RealDoor::new(options)) as Arc<dyn Door>
    };
    request.proxies.iter().map(door).collect()
}

/// A door to a real proxy.
struct RealDoor {
    options: ProxyOptions,
    session: StdMutex<Option<ProxyConnection>>,
    /// One log-in at a time.
    turn: Mutex<()>,
}

impl RealDoor {
    fn new(options: ProxyOptions) -> Self {
        Self {
            options,
            session: StdMutex::new(None),
            turn: Mutex::new(()),
        }
    }

    fn living(&self) -> Option<ProxyConnection> {
        let session = self.session.lock().unwrap_or_else(PoisonError::into_inner);
        session.clone().filter(|session| !session.is_lost())
    }

    async fn session(&self) -> Result<ProxyConnection, SqlError> {
        let _turn = self.turn.lock().await;
        if let Some(living) = self.living() {
            return Ok(living);
        }
        let made = ProxyConnection::connect(&self.options, CancellationToken::new()).await?;
        let mut session = self.session.lock().unwrap_or_else(PoisonError::into_inner);
        *session = Some(made.clone());
        Ok(made)
    }
}

impl Door for RealDoor {
    fn probe(&self, deadline: Duration) -> BoxFuture<'_, Result<Gate, SqlError>> {
        Box::pin(async move { self.session().await?.probe(deadline).await })
    }

    fn unlock(
        &self,
        wait: Duration,
        deadline: Duration,
    ) -> BoxFuture<'_, Result<UnlockReply, SqlError>> {
        Box::pin(async move { self.session().await?.unlock(wait, deadline).await })
    }

    fn is_connected(&self) -> bool {
        self.living().is_some()
    }

    fn close(&self) {
        if let Some(session) = self.living() {
            session.close();
        }
    }
}
