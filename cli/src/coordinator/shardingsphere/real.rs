//! Proxies and watchdogs as they are.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use agent_api::{
    ApiError, ArmWatchdog, ErrorKind, LockOutcome, ProxyAddress, StartWatchdog, WatchdogTls,
};
use agent_sql::SqlError;
use agent_sql::proxy::{
    self, Effect, ExportedMetadata, ProxyConnection, ProxyOptions, ProxyTls, StorageNode,
};
use futures_util::future::join_all;
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

use super::parties::{Gate, LockReply, Proxy, ProxyError, Watchdog};
use crate::agents::Agent;
use crate::cluster::{ProxyAccess, Reached};
use crate::failure::{Failure, Result as Outcome};
use crate::printer::Printer;

/// A log-in to a proxy, once it is known.
const CONNECT: Duration = Duration::from_secs(2);
/// Watchdogs, where there are so many agents.
const WATCHDOGS: usize = 3;
/// How long agents are asked to forget their watchdogs.
const END: Duration = Duration::from_secs(5);

/// A proxy that is logged in to again when its session is lost.
#[derive(Debug)]
pub(super) struct Session {
    name: String,
    options: ProxyOptions,
    connection: Mutex<Option<ProxyConnection>>,
}

impl Session {
    pub(super) fn new(
        name: String,
        options: ProxyOptions,
        connection: Option<ProxyConnection>,
    ) -> Self {
        // Unlocking goes on when everything else is cancelled.
        let never = CancellationToken::new();
        Self {
            name,
            options,
            connection: Mutex::new(connection.map(|it| it.with_cancel(never))),
        }
    }

    /// `EXPORT METADATA`
    pub(super) async fn metadata(&self, deadline: Duration) -> Result<ExportedMetadata, String> {
        let asked = async |proxy: ProxyConnection| proxy.export_metadata(deadline).await;
        self.asked(asked).await
    }

    /// `EXPORT STORAGE NODES`
    pub(super) async fn storage_nodes(
        &self,
        deadline: Duration,
    ) -> Result<Vec<StorageNode>, String> {
        let asked = async |proxy: ProxyConnection| proxy.export_storage_nodes(deadline).await;
        self.asked(asked).await
    }

    async fn asked<T>(
        &self,
        ask: impl AsyncFnOnce(ProxyConnection) -> Result<T, SqlError>,
    ) -> Result<T, String> {
        let connection = self.current().map_err(ProxyError::into_words)?;
        ask(connection).await.map_err(|error| error.to_string())
    }

    fn current(&self) -> Result<ProxyConnection, ProxyError> {
        let connection = self
            .connection
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        match &*connection {
            Some(connection) if !connection.is_lost() => Ok(connection.clone()),
            _ => Err(ProxyError::Refused("there is no session".to_owned())),
        }
    }
}

fn failed(error: &SqlError) -> ProxyError {
    match proxy::effect(error) {
        Effect::None => ProxyError::Refused(error.to_string()),
        Effect::Unknown => ProxyError::Unheard(error.to_string()),
    }
}

impl Proxy for Session {
    fn name(&self) -> String {
        self.name.clone()
    }

    async fn ready(&self) -> Result<(), String> {
        if self.current().is_ok() {
            return Ok(());
        }
        let connected = ProxyConnection::connect(&self.options, CancellationToken::new()).await;
        let connected = connected.map_err(|error| error.to_string())?;
        let mut connection = self
            .connection
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        *connection = Some(connected);
        Ok(())
    }

    async fn lock(&self, wait: Duration, deadline: Duration) -> Result<LockReply, ProxyError> {
        let reply = self.current()?.lock(wait, deadline).await;
        match reply.map_err(|error| failed(&error))? {
            proxy::LockReply::Said => Ok(LockReply::Said),
            proxy::LockReply::AlreadyLocked(said) => Ok(LockReply::AlreadyLocked(said)),
        }
    }

    async fn unlock(&self, wait: Duration, deadline: Duration) -> Result<(), ProxyError> {
        let reply = self.current()?.unlock(wait, deadline).await;
        reply.map(drop).map_err(|error| failed(&error))
    }

    async fn probe(&self, deadline: Duration) -> Result<Gate, ProxyError> {
        let gate = self.current()?.probe(deadline).await;
        match gate.map_err(|error| failed(&error))? {
            proxy::Gate::Open => Ok(Gate::Open),
            proxy::Gate::Locked(_) => Ok(Gate::Locked),
        }
    }

    async fn csn(&self, deadline: Duration) -> Result<Option<String>, ProxyError> {
        let exported = self.current()?.export_metadata(deadline).await;
        Ok(exported.map_err(|error| failed(&error))?.csn())
    }
}

/// A session of every proxy that is known, reachable or not.
pub(super) fn sessions(reached: &Reached) -> Vec<Session> {
    let proxies = reached.proxies().iter().map(|proxy| {
        let mut options = proxy.options.clone();
        options.connect_timeout = CONNECT;
        Session::new(proxy.address.to_string(), options, proxy.connection.clone())
    });
    proxies.collect()
}

/// Two or three of `agents` that reach a proxy; all of them, if there are fewer.
///
/// # Errors
/// If none does.
pub(super) async fn watchdogs(
    agents: &[Arc<Agent>],
    access: &ProxyAccess,
    reached: &Reached,
    printer: &Printer,
) -> Outcome<Vec<InAgent>> {
    let wanted = WATCHDOGS.min(agents.len());
    let (mut found, mut without) = (Vec::new(), Vec::new());
    for agent in agents {
        if found.len() == wanted {
            break;
        }
        let watchdog = InAgent {
            agent: Arc::clone(agent),
            start: start(access, reached),
            alone: false,
        };
        match watchdog.begin().await {
            Ok(true) => found.push(watchdog),
            Ok(false) => without.push(format!("{}: it reaches no proxy", agent.name())),
            Err(error) => without.push(format!("{}: {error}", agent.name())),
        }
    }
    let why = without.join("; ");
    if found.is_empty() {
        let message = format!(
            "no agent can unlock the cluster if this program dies, so it is not locked: {why}"
        );
        return Err(Failure::new(ErrorKind::Database, message)
            .next("let the agents' hosts reach the proxies, or use `--lock never`"));
    }
    if found.len() < 2.min(wanted) {
        let message = format!("only one agent can unlock the cluster if this program dies: {why}");
        printer.warning(None, &message);
    }
    Ok(found)
}

/// Has the agents forget their watchdogs, as far as they can be asked.
pub(super) async fn end(watchdogs: &[InAgent]) {
    let ends = join_all(watchdogs.iter().map(InAgent::end));
    if timeout(END, ends).await.is_err() {
        tracing::info!("watchdogs were left to end by themselves");
    }
}

/// Says that writes were not seen to pass after unlocking.
pub(super) fn still_shut(watchdogs: &[InAgent], printer: &Printer) {
    let agents: Vec<_> = watchdogs.iter().map(|it| it.agent.name()).collect();
    let message = format!(
        "the cluster may still be locked: writes were not seen to pass through every proxy within half a minute of unlocking; the agents at {} go on for a while; then see `gs_pitr unlock`",
        agents.join(", ")
    );
    printer.warning(None, &message);
}

fn start(access: &ProxyAccess, reached: &Reached) -> StartWatchdog {
    let proxies = reached.proxies().iter().map(|proxy| ProxyAddress {
        host: proxy.address.host.clone(),
        port: proxy.address.port,
    });
    StartWatchdog {
        id: Uuid::new_v4(),
        proxies: proxies.collect(),
        user: access.user.clone(),
        password: access.password.clone(),
        database: "postgres".to_owned(),
        tls: match &access.tls {
            ProxyTls::Off => WatchdogTls::Off,
            ProxyTls::On { ca_pem } => WatchdogTls::On {
                ca_pem: ca_pem
                    .as_ref()
                    .map(|pem| String::from_utf8_lossy(pem).into_owned()),
            },
        },
    }
}

/// A watchdog in an agent.
#[derive(Debug, Clone)]
pub(super) struct InAgent {
    pub(super) agent: Arc<Agent>,
    pub(super) start: StartWatchdog,
    /// Whether it is armed only where no other client's would take the lock off.
    pub(super) alone: bool,
}

impl InAgent {
    /// Has the agent log in to the proxies. Whether it reaches one of them.
    pub(super) async fn begin(&self) -> Result<bool, ApiError> {
        let status = self.agent.client().watchdog_start(&self.start).await?;
        Ok(status.proxies.iter().any(|proxy| proxy.connected))
    }

    /// Shows the agent that its client lives. One whose agent was restarted is begun and armed again.
    pub(super) async fn renew(&self, attempt: u32, deadline: Duration) -> Result<(), ApiError> {
        let client = self.agent.client();
        let request = ArmWatchdog::of(attempt, deadline).renewing();
        match client.watchdog_arm(self.start.id, &request).await {
            Err(error) if error.kind == ErrorKind::NotFound => {
                self.begin().await?;
                self.arm(attempt, deadline).await
            }
            renewed => renewed.map(drop),
        }
    }

    /// Has the agent forget it, unless it has work to do yet.
    pub(super) async fn end(&self) {
        let ended = self.agent.client().watchdog_end(self.start.id).await;
        if let Err(error) = ended {
            tracing::info!(agent = self.agent.name(), %error, "a watchdog was left to end by itself");
        }
    }
}

impl Watchdog for InAgent {
    fn name(&self) -> String {
        self.agent.name()
    }

    async fn arm(&self, attempt: u32, deadline: Duration) -> Result<(), ApiError> {
        let request = ArmWatchdog::of(attempt, deadline).alone(self.alone);
        let armed = self.agent.client().watchdog_arm(self.start.id, &request);
        armed.await.map(drop)
    }

    async fn disarm(&self, attempt: u32, lock: LockOutcome) -> Result<bool, ApiError> {
        let client = self.agent.client();
        let status = client.watchdog_disarm(self.start.id, attempt, lock).await;
        match status {
            Ok(status) => Ok(status.state.is_quiet()),
            // The agent was restarted: what it was armed for is gone with it.
            Err(error) if error.kind == ErrorKind::NotFound => Ok(true),
            Err(error) => Err(error),
        }
    }

    async fn rests(&self) -> Result<bool, ApiError> {
        match self.agent.client().watchdog(self.start.id).await {
            Ok(status) => Ok(status.state.is_quiet()),
            Err(error) if error.kind == ErrorKind::NotFound => self.begin().await.map(|_| true),
            Err(error) => Err(error),
        }
    }
}
