//! The agents, by address: connected to, asked, and asked again while they do not answer.

use std::sync::Arc;
use std::time::Duration;

use agent_api::client::{AgentClient, ClientTls, EventStream, Transport};
use agent_api::{
    ApiError, Discarded, ErrorKind, Look, MarkRequest, MarkResult, NodeFacts, Observed,
    OpenRequest, OperationStatus, Phase, RestoresHere, StartOperation, StartWal, TargetFacts,
    WalStatus,
};
use jiff::{SignedDuration, Timestamp};
use tokio::time::{Instant, sleep, timeout};
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

use crate::certs;
use crate::failure::{Failure, Result};
use crate::operations::all_or_cancel;
use crate::printer::{Printer, duration};
use crate::settings::Settings;
use crate::settings::values::Address;

/// How long a first contact is tried: an agent that was never there is a wrong address more often than
/// one that is just starting.
const FIRST_CONTACT: Duration = Duration::from_secs(5);
/// Pauses between attempts, the first and the longest.
const PAUSES: (Duration, Duration) = (Duration::from_millis(200), Duration::from_secs(5));
/// A request that is under way when everything is cancelled is waited for this long: a start that
/// arrives after its own cancellation would run on.
const GRACE: Duration = Duration::from_secs(5);
/// Clocks further apart than this are told of.
const CLOCK_SKEW: SignedDuration = SignedDuration::from_secs(30);

/// Events of an operation as they happen.
pub(crate) type Events = EventStream;

/// One agent.
#[derive(Debug)]
pub(crate) struct Agent {
    address: Address,
    client: AgentClient,
    patience: Duration,
    printer: Printer,
}

/// An agent and what it says of its host and database.
#[derive(Debug, Clone)]
pub(crate) struct Host {
    /// The agent.
    pub(crate) agent: Arc<Agent>,
    /// What it says.
    pub(crate) facts: NodeFacts,
}

impl Host {
    /// The data directory beside the agent: the running database's, or the one that the agent was told.
    pub(crate) fn data_directory(&self) -> Option<&str> {
        let server = self.facts.server.as_ref();
        let running = server.map(|server| server.data_directory.as_str());
        running.or(self.facts.pgdata.as_deref())
    }
}

/// Connects to all `addresses` at the same time and asks each for its facts.
///
/// # Errors
/// The first agent's that cannot be reached, or a certificate's before any is asked.
pub(crate) async fn connect(
    addresses: &[Address],
    settings: &Settings,
    printer: &Printer,
    cancel: &CancellationToken,
) -> Result<Vec<Host>> {
    let agents = all(addresses, settings, printer)?;
    all_or_cancel(agents, cancel, |agent, cancel| async move {
        let facts = agent.first_contact(&cancel).await?;
        Ok(Host { agent, facts })
    })
    .await
}

/// The agents at all `addresses`. None is asked for anything.
///
/// # Errors
/// A certificate's, or an address's that is none.
pub(crate) fn all(
    addresses: &[Address],
    settings: &Settings,
    printer: &Printer,
) -> Result<Vec<Arc<Agent>>> {
    let transport = transport(settings, printer)?;
    let mut agents = Vec::new();
    for address in addresses {
        let client = AgentClient::new(&address.to_string(), &transport)
            .map_err(|error| Failure::from(error).on(address.to_string()))?;
        agents.push(Arc::new(Agent {
            address: address.clone(),
            client,
            patience: settings.agent_timeout(),
            printer: printer.clone(),
        }));
    }
    Ok(agents)
}

/// Reads the certificates, and checks ours before anybody sees it.
fn transport(settings: &Settings, printer: &Printer) -> Result<Transport> {
    if settings.insecure_http() {
        return Ok(Transport::InsecureHttp);
    }
    let read = |path: std::path::PathBuf| {
        let text = std::fs::read_to_string(&path).map_err(|error| {
            let message = format!("cannot read `{}`: {error}", path.display());
            Failure::new(ErrorKind::Certificate, message)
                .next("gs_pitr certs init, or give `--tls-crt`, `--tls-key` and `--tls-ca`")
        })?;
        Ok::<_, Failure>((path, text))
    };
    let (crt, cert_pem) = read(settings.tls_crt())?;
    let facts = certs::check_operator(&crt, &cert_pem)?;
    let left = facts.not_after.duration_since(Timestamp::now());
    if left < SignedDuration::from_hours(14 * 24) {
        let days = left.as_hours() / 24;
        let message = format!(
            "`{}` expires in {days} days; renew it with `gs_pitr certs issue --operator`",
            crt.display()
        );
        printer.warning(None, &message);
    }
    let (_, key_pem) = read(settings.tls_key())?;
    let (_, ca_pem) = read(settings.tls_ca())?;
    Ok(Transport::MutualTls(ClientTls {
        ca_pem: ca_pem.into_bytes(),
        cert_pem: cert_pem.into_bytes(),
        key_pem: key_pem.into_bytes(),
    }))
}

impl Agent {
    /// What it is called in messages: its address as it was given.
    pub(crate) fn name(&self) -> String {
        self.address.to_string()
    }

    /// For what is asked once, without patience.
    pub(crate) fn client(&self) -> &AgentClient {
        &self.client
    }

    /// The address as it was given.
    pub(crate) fn address(&self) -> &Address {
        &self.address
    }

    /// Says hello, and asks for the host's facts.
    pub(crate) async fn first_contact(&self, cancel: &CancellationToken) -> Result<NodeFacts> {
        let client = &self.client;
        let health = self
            .patiently(FIRST_CONTACT.min(self.patience), cancel, || client.health())
            .await?;
        let skew = health.now.duration_since(Timestamp::now()).abs();
        if skew > CLOCK_SKEW {
            let skew = duration(skew.unsigned_abs());
            let message = format!("its clock differs from this machine's by {skew}");
            self.printer.warning(Some(&self.name()), &message);
        }
        self.patiently(self.patience, cancel, || client.node())
            .await
    }

    /// Starts an operation; the same request again finds the same one.
    pub(crate) async fn start(
        &self,
        request: &StartOperation,
        cancel: &CancellationToken,
    ) -> Result<OperationStatus> {
        let call = || self.client.start(request);
        self.patiently(self.patience, cancel, call).await
    }

    /// How an operation stands.
    pub(crate) async fn status(
        &self,
        operation: Uuid,
        cancel: &CancellationToken,
    ) -> Result<OperationStatus> {
        let call = || self.client.status(operation);
        let status = self.patiently(self.patience, cancel, call).await;
        status.map_err(|failure| match failure.kind {
            // It was there a moment ago: only a restart forgets an operation, and the same order can
            // be given again.
            ErrorKind::NotFound => {
                let message = format!(
                    "the agent at {} was restarted and has lost its operation",
                    self.name()
                );
                Failure::new(ErrorKind::AgentUnreachable, message)
                    .on(self.name())
                    .next("look at the agent's log on that host, then run the command again")
            }
            _ => failure,
        })
    }

    /// All operations that the agent knows, asked once and without patience.
    pub(crate) async fn operations(
        &self,
        cancel: &CancellationToken,
    ) -> Result<Vec<OperationStatus>> {
        let call = || self.client.operations();
        self.patiently(Duration::ZERO, cancel, call).await
    }

    /// How an operation stands, asked once and without patience; `None` if the agent does not know it.
    pub(crate) async fn status_now(
        &self,
        operation: Uuid,
        cancel: &CancellationToken,
    ) -> Result<Option<OperationStatus>> {
        let call = || self.client.status(operation);
        match self.patiently(Duration::ZERO, cancel, call).await {
            Ok(status) => Ok(Some(status)),
            Err(failure) if failure.kind == ErrorKind::NotFound => Ok(None),
            Err(failure) => Err(failure),
        }
    }

    /// What is at a place on its host, nothing changed.
    pub(crate) async fn target(
        &self,
        target: &str,
        cancel: &CancellationToken,
    ) -> Result<TargetFacts> {
        let call = || self.client.target(target);
        self.patiently(self.patience, cancel, call).await
    }

    /// What restores have left on its host.
    pub(crate) async fn restores(&self, cancel: &CancellationToken) -> Result<RestoresHere> {
        let call = || self.client.restores();
        self.patiently(FIRST_CONTACT.min(self.patience), cancel, call)
            .await
    }

    /// Removes what was at the target before `restore`.
    pub(crate) async fn discard(
        &self,
        restore: Uuid,
        cancel: &CancellationToken,
    ) -> Result<Discarded> {
        let call = || self.client.discard(restore);
        self.patiently(self.patience, cancel, call).await
    }

    /// What it ships all the time. An agent that knows nothing of the sort ships nothing.
    pub(crate) async fn wal(&self, cancel: &CancellationToken) -> Result<WalStatus> {
        let call = || self.client.wal();
        let asked = self
            .patiently(FIRST_CONTACT.min(self.patience), cancel, call)
            .await;
        match asked {
            Err(failure) if failure.kind == ErrorKind::NotFound => Ok(WalStatus::off()),
            asked => asked,
        }
    }

    /// Has it ship WAL all the time; the same order again changes nothing.
    pub(crate) async fn start_wal(
        &self,
        order: &StartWal,
        cancel: &CancellationToken,
    ) -> Result<WalStatus> {
        let call = || self.client.start_wal(order);
        self.patiently(self.patience, cancel, call).await
    }

    /// Has it stop that.
    pub(crate) async fn stop_wal(&self, cancel: &CancellationToken) -> Result<WalStatus> {
        let call = || self.client.stop_wal();
        self.patiently(self.patience, cancel, call).await
    }

    /// Events of an operation after number `after`.
    pub(crate) async fn events(&self, operation: Uuid, after: u64) -> Result<Events> {
        Ok(self.client.events(operation, after).await?)
    }

    /// Looks at the node's transactions, once.
    pub(crate) async fn observe(&self, operation: Uuid, look: Look) -> Result<Observed, ApiError> {
        self.client.observe(operation, look).await
    }

    /// Makes a restore point, once, for a caller with a deadline of its own.
    pub(crate) async fn mark_once(
        &self,
        operation: Uuid,
        request: &MarkRequest,
    ) -> Result<MarkResult, ApiError> {
        self.client.mark(operation, request).await
    }

    /// Waits until the last restore point is on disk, for a caller with a deadline of its own.
    pub(crate) async fn flush(
        &self,
        operation: Uuid,
        request: &MarkRequest,
    ) -> Result<(), ApiError> {
        self.client.flush(operation, request).await.map(drop)
    }

    /// Makes a restore point. Never asked twice: a lost answer may hide a point of that name, and
    /// recovery would stop at the first of two.
    pub(crate) async fn mark(
        &self,
        operation: Uuid,
        request: &MarkRequest,
        cancel: &CancellationToken,
    ) -> Result<MarkResult> {
        let call = || self.client.mark(operation, request);
        self.patiently(Duration::ZERO, cancel, call).await
    }

    /// Has the WAL up to the restore point sent. Asked again, it may have been heard the first time.
    pub(crate) async fn ship(&self, operation: Uuid, cancel: &CancellationToken) -> Result<()> {
        let call = || self.client.ship(operation);
        let sent = self.patiently(self.patience, cancel, call).await;
        self.unless_heard(sent, operation, Phase::Marked, cancel)
            .await
    }

    /// Lets go of the WAL hold.
    pub(crate) async fn release(&self, operation: Uuid, cancel: &CancellationToken) -> Result<()> {
        let call = || self.client.release(operation);
        let sent = self.patiently(self.patience, cancel, call).await;
        self.unless_heard(sent, operation, Phase::Shipped, cancel)
            .await
    }

    /// Has a restore that is proved promoted and put in its place.
    pub(crate) async fn promote(&self, operation: Uuid, cancel: &CancellationToken) -> Result<()> {
        let call = || self.client.promote(operation);
        let sent = self.patiently(self.patience, cancel, call).await;
        self.unless_heard(sent, operation, Phase::Proved, cancel)
            .await
    }

    /// Opens a restored database that is promoted.
    pub(crate) async fn open(
        &self,
        operation: Uuid,
        request: &OpenRequest,
        cancel: &CancellationToken,
    ) -> Result<()> {
        let call = || self.client.open(operation, request);
        let sent = self.patiently(self.patience, cancel, call).await;
        self.unless_heard(sent, operation, Phase::Promoted, cancel)
            .await
    }

    /// Asks an operation to stop.
    pub(crate) async fn cancel(
        &self,
        operation: Uuid,
        cancel: &CancellationToken,
    ) -> Result<OperationStatus> {
        let call = || self.client.cancel(operation);
        self.patiently(FIRST_CONTACT.min(self.patience), cancel, call)
            .await
    }

    /// An order whose answer was lost and that was given again is refused as a conflict: if the operation
    /// no longer waits in `phase`, the first one was heard, and what comes of it is seen in the status.
    async fn unless_heard(
        &self,
        sent: Result<OperationStatus>,
        operation: Uuid,
        phase: Phase,
        cancel: &CancellationToken,
    ) -> Result<()> {
        match sent {
            Ok(_) => Ok(()),
            Err(failure) if failure.kind == ErrorKind::Conflict => {
                let status = self.status(operation, cancel).await?;
                if status.error.is_none() && status.phase != phase {
                    Ok(())
                } else {
                    Err(failure)
                }
            }
            Err(failure) => Err(failure),
        }
    }

    /// Repeats `call` with growing pauses for as long as the agent is not reached, at most `patience`.
    async fn patiently<T, F>(
        &self,
        patience: Duration,
        cancel: &CancellationToken,
        call: impl Fn() -> F,
    ) -> Result<T>
    where
        F: Future<Output = Result<T, ApiError>>,
    {
        let until = Instant::now() + patience;
        let (mut pause, longest) = PAUSES;
        let mut told = false;
        loop {
            let answer = tokio::select! {
                answer = call() => answer,
                () = cancelled_for(GRACE, cancel) => return Err(Failure::cancelled()),
            };
            let error = match answer {
                Ok(value) => return Ok(value),
                Err(error) => error,
            };
            let left = until.saturating_duration_since(Instant::now());
            if cancel.is_cancelled() {
                return Err(Failure::cancelled());
            }
            if error.kind != ErrorKind::AgentUnreachable || left.is_zero() {
                return Err(Failure::from(error).on(self.name()));
            }
            if !told && patience > FIRST_CONTACT {
                let message = format!("{error}; trying again for {}", duration(left));
                self.printer.warning(Some(&self.name()), &message);
                told = true;
            }
            let jitter = pause.mul_f64(rand::random_range(0.5..1.0)).min(left);
            let _ = timeout(jitter, cancel.cancelled()).await;
            pause = (pause * 2).min(longest);
        }
    }
}

async fn cancelled_for(grace: Duration, cancel: &CancellationToken) {
    cancel.cancelled().await;
    sleep(grace).await;
}

/// Waits `pause`, or less if cancelled.
///
/// # Errors
/// A cancellation.
pub(crate) async fn pause(pause: Duration, cancel: &CancellationToken) -> Result<()> {
    tokio::select! {
        () = sleep(pause) => Ok(()),
        () = cancel.cancelled() => Err(Failure::cancelled()),
    }
}
