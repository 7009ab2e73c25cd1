//! The client: one method per request, every one under a deadline, every failure an [`ApiError`].

use std::fmt;
use std::net::IpAddr;
use std::time::Duration;

use futures_util::StreamExt as _;
use reqwest::{Method, Response};
use serde::Serialize;
use serde::de::DeserializeOwned;
use uuid::Uuid;

use crate::check::{CheckReport, CheckRequest, RaceRequest, RaceResult};
pub use crate::client::events::EventStream;
use crate::error::{ApiError, ErrorKind};
use crate::types::{
    API_VERSION, Bandwidth, DiscardRequest, Discarded, Health, Look, MarkRequest, MarkResult,
    NodeFacts, ObserveRequest, Observed, OpenRequest, OperationStatus, RestoresHere,
    StartOperation, TargetFacts, TargetRequest,
};
use crate::wal::{StartWal, WalStatus};

mod events;
mod failure;
mod tls;
mod watchdog;

/// The agent's port where an address names none.
pub const DEFAULT_PORT: u16 = 18080;

/// Longest wait for a connection, TLS handshake included.
const CONNECT: Duration = Duration::from_secs(10);
/// An idle connection is closed before the agent does it (30 s), so that no request runs into that.
const IDLE: Duration = Duration::from_secs(15);
/// Longest wait for an answer that needs no work.
const ASK: Duration = Duration::from_secs(30);
/// Longest wait for an answer that comes when something is done; above the agent's own two minutes.
const COMMAND: Duration = Duration::from_secs(150);
/// Longest wait for the removal of an old cluster.
const DISCARD: Duration = Duration::from_mins(10);
/// Longest wait for a look at transactions: one that takes longer proves nothing.
const OBSERVE: Duration = Duration::from_secs(5);
/// Most bytes of an answer: a node's part of a manifest can be large.
const ANSWER_LIMIT: usize = 64 << 20;

/// What a client shows and trusts (PEM).
#[derive(Clone)]
pub struct ClientTls {
    /// Authority that signs the agents' certificates.
    pub ca_pem: Vec<u8>,
    /// The operator's certificate chain, the own one first.
    pub cert_pem: Vec<u8>,
    /// Its key.
    pub key_pem: Vec<u8>,
}

impl fmt::Debug for ClientTls {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("ClientTls(..)")
    }
}

/// How to talk to an agent.
#[derive(Debug, Clone)]
pub enum Transport {
    /// HTTPS, both sides with certificates.
    MutualTls(ClientTls),
    /// Plain HTTP; to loopback addresses only.
    InsecureHttp,
}

/// A client of one agent. Clones share connections.
#[derive(Debug, Clone)]
pub struct AgentClient {
    http: reqwest::Client,
    address: String,
    host: String,
    base: String,
}

impl AgentClient {
    /// A client of the agent at `address`: `HOST`, `HOST:PORT` or `[IPV6]:PORT`. Sends nothing.
    ///
    /// # Errors
    /// [`ErrorKind::Usage`] for an address that is none, or plain HTTP to another host;
    /// [`ErrorKind::Certificate`] if the certificates cannot be used, are expired or not an operator's.
    pub fn new(address: &str, transport: &Transport) -> Result<Self, ApiError> {
        let (host, port) = parse_address(address)?;
        let builder = reqwest::Client::builder()
            .no_proxy()
            .http1_only()
            .redirect(reqwest::redirect::Policy::none())
            .connect_timeout(CONNECT)
            .pool_idle_timeout(IDLE)
            .tls_info(true)
            .tcp_nodelay(true);
        let (scheme, builder) = match transport {
            Transport::MutualTls(tls) => {
                let config = tls::config(tls)?;
                ("https", builder.tls_backend_preconfigured(config))
            }
            Transport::InsecureHttp if is_loopback(&host) => ("http", builder),
            Transport::InsecureHttp => {
                let message = format!(
                    "--insecure-http goes with agents on loopback only, and {host} is another host"
                );
                let error = ApiError::new(ErrorKind::Usage, message);
                return Err(error.next("give --tls-crt, --tls-key and --tls-ca instead"));
            }
        };
        let http = builder
            .build()
            .map_err(|error| ApiError::new(ErrorKind::Internal, failure::words(&error)))?;
        let bracketed = if host.contains(':') {
            format!("[{host}]")
        } else {
            host.clone()
        };
        Ok(Self {
            http,
            address: format!("{bracketed}:{port}"),
            host,
            base: format!("{scheme}://{bracketed}:{port}/v1"),
        })
    }

    /// The agent's address, `HOST:PORT`.
    #[must_use]
    pub fn address(&self) -> &str {
        &self.address
    }

    /// Whether the agent is there and speaks this version.
    ///
    /// # Errors
    /// [`ErrorKind::Incompatible`] for another version; those of every request:
    /// [`ErrorKind::AgentUnreachable`], [`ErrorKind::Certificate`], and what the agent says.
    pub async fn health(&self) -> Result<Health, ApiError> {
        Ok(self.health_and_certificate().await?.0)
    }

    fn compatible(&self, health: Health) -> Result<Health, ApiError> {
        if health.api_version == API_VERSION {
            return Ok(health);
        }
        let message = format!(
            "the agent at {} ({}) speaks version {} of the API, this program version {API_VERSION}",
            self.address, health.version, health.api_version
        );
        let error = ApiError::new(ErrorKind::Incompatible, message);
        Err(error.next("install the same release of gs_pitr and pitr-agent"))
    }

    /// As [`Self::health`], and the certificate that the agent showed (DER); `None` over plain HTTP.
    ///
    /// # Errors
    /// As [`Self::health`].
    pub async fn health_and_certificate(&self) -> Result<(Health, Option<Vec<u8>>), ApiError> {
        let request = self.http.get(format!("{}/health", self.base)).timeout(ASK);
        let response = request.send().await.map_err(|error| self.failure(&error))?;
        let tls = response.extensions().get::<reqwest::tls::TlsInfo>();
        let shown = tls.and_then(|tls| tls.peer_certificate());
        let shown = shown.map(<[u8]>::to_vec);
        let health = self.parsed(self.accept(response).await?).await?;
        Ok((self.compatible(health)?, shown))
    }

    /// Has the agent look at its node and, if the request names one, at the store.
    ///
    /// # Errors
    /// As [`Self::health`].
    pub async fn check(&self, request: &CheckRequest) -> Result<CheckReport, ApiError> {
        self.send("/check", request, COMMAND).await
    }

    /// Has the agent take part in a race to create an object.
    ///
    /// # Errors
    /// As [`Self::health`].
    pub async fn race(&self, request: &RaceRequest) -> Result<RaceResult, ApiError> {
        self.send("/check/race", request, COMMAND).await
    }

    /// Facts about the host and its database.
    ///
    /// # Errors
    /// As [`Self::health`].
    pub async fn node(&self) -> Result<NodeFacts, ApiError> {
        self.ask(Method::GET, "/node", ASK).await
    }

    /// All operations the agent knows.
    ///
    /// # Errors
    /// As [`Self::health`].
    pub async fn operations(&self) -> Result<Vec<OperationStatus>, ApiError> {
        self.ask(Method::GET, "/operations", ASK).await
    }

    /// Starts an operation; the same request again finds the same one.
    ///
    /// # Errors
    /// As [`Self::health`].
    pub async fn start(&self, request: &StartOperation) -> Result<OperationStatus, ApiError> {
        self.send("/operations", request, COMMAND).await
    }

    /// How an operation stands.
    ///
    /// # Errors
    /// As [`Self::health`].
    pub async fn status(&self, operation: Uuid) -> Result<OperationStatus, ApiError> {
        let path = format!("/operations/{operation}");
        self.ask(Method::GET, &path, ASK).await
    }

    /// Events with a sequence number above `after` (0: all), as they happen. After an error ask again
    /// with the last number seen.
    ///
    /// # Errors
    /// As [`Self::health`].
    pub async fn events(&self, operation: Uuid, after: u64) -> Result<EventStream, ApiError> {
        let url = format!("{}/operations/{operation}/events?after={after}", self.base);
        // No deadline for the whole: the stream watches for silence itself.
        let sent = tokio::time::timeout(ASK, self.http.get(url).send()).await;
        let response = match sent {
            Ok(sent) => sent.map_err(|error| self.failure(&error))?,
            Err(_) => return Err(self.silent(ASK)),
        };
        let response = self.accept(response).await?;
        Ok(events::follow(self.clone(), response))
    }

    /// Makes a restore point in a backup that is copied, or in a point that is ready.
    ///
    /// # Errors
    /// As [`Self::health`].
    pub async fn mark(
        &self,
        operation: Uuid,
        request: &MarkRequest,
    ) -> Result<MarkResult, ApiError> {
        self.order(operation, "mark", request).await
    }

    /// Looks at the transactions of a node whose backup is copied, or whose point is ready.
    ///
    /// # Errors
    /// As [`Self::health`].
    pub async fn observe(&self, operation: Uuid, look: Look) -> Result<Observed, ApiError> {
        let path = format!("/operations/{operation}/observe");
        self.send(&path, &ObserveRequest { look }, OBSERVE).await
    }

    /// Waits until the last restore point is on the node's disk, so that no crash of its database loses it.
    ///
    /// # Errors
    /// As [`Self::health`]; [`ErrorKind::Database`] if the database may have crashed since the restore point was made.
    pub async fn flush(
        &self,
        operation: Uuid,
        request: &MarkRequest,
    ) -> Result<OperationStatus, ApiError> {
        self.order(operation, "flush", request).await
    }

    /// Has the WAL up to the restore point sent.
    ///
    /// # Errors
    /// As [`Self::health`].
    pub async fn ship(&self, operation: Uuid) -> Result<OperationStatus, ApiError> {
        self.order(operation, "ship", &()).await
    }

    /// Lets go of the WAL hold, if there is one; the backup or the point ends.
    ///
    /// # Errors
    /// As [`Self::health`].
    pub async fn release(&self, operation: Uuid) -> Result<OperationStatus, ApiError> {
        self.order(operation, "release", &()).await
    }

    /// Has a restore that is proved promoted and put in its place, if `commit` is decided.
    ///
    /// # Errors
    /// As [`Self::health`].
    pub async fn promote(&self, operation: Uuid) -> Result<OperationStatus, ApiError> {
        self.order(operation, "promote", &()).await
    }

    /// Ends a restore that is promoted: opens its database.
    ///
    /// # Errors
    /// As [`Self::health`].
    pub async fn open(
        &self,
        operation: Uuid,
        request: &OpenRequest,
    ) -> Result<OperationStatus, ApiError> {
        self.order(operation, "open", request).await
    }

    /// What is at a place that somebody may want to restore to.
    ///
    /// # Errors
    /// As [`Self::health`]; [`ErrorKind::Target`] if the agent may not restore there.
    pub async fn target(&self, target: &str) -> Result<TargetFacts, ApiError> {
        let request = TargetRequest {
            target: target.to_owned(),
        };
        self.send("/target", &request, ASK).await
    }

    /// What restores have left on the host.
    ///
    /// # Errors
    /// As [`Self::health`].
    pub async fn restores(&self) -> Result<RestoresHere, ApiError> {
        self.ask(Method::GET, "/restores", ASK).await
    }

    /// Removes what was at the target before a restore. Asked again, it removes nothing.
    ///
    /// # Errors
    /// As [`Self::health`].
    pub async fn discard(&self, restore: Uuid) -> Result<Discarded, ApiError> {
        self.send("/discard", &DiscardRequest { restore }, DISCARD)
            .await
    }

    /// How the WAL stands that the agent ships all the time.
    ///
    /// # Errors
    /// As [`Self::health`].
    pub async fn wal(&self) -> Result<WalStatus, ApiError> {
        self.ask(Method::GET, "/wal", ASK).await
    }

    /// Has the agent ship WAL all the time. The same again changes nothing.
    ///
    /// # Errors
    /// As [`Self::health`]; [`ErrorKind::Conflict`] if it ships for another node, epoch or repository.
    pub async fn start_wal(&self, request: &StartWal) -> Result<WalStatus, ApiError> {
        let put = self.http.put(format!("{}/wal", self.base)).json(request);
        self.finish(put.timeout(COMMAND)).await
    }

    /// Has the agent stop that, and let go of the WAL it held.
    ///
    /// # Errors
    /// As [`Self::health`].
    pub async fn stop_wal(&self) -> Result<WalStatus, ApiError> {
        self.ask(Method::DELETE, "/wal", COMMAND).await
    }

    /// Changes the bandwidth limit.
    ///
    /// # Errors
    /// As [`Self::health`].
    pub async fn bandwidth(
        &self,
        operation: Uuid,
        bytes_per_second: Option<u64>,
    ) -> Result<OperationStatus, ApiError> {
        let request = Bandwidth { bytes_per_second };
        self.order(operation, "bandwidth", &request).await
    }

    /// Asks an operation to stop. It has stopped when its phase is an end.
    ///
    /// # Errors
    /// As [`Self::health`].
    pub async fn cancel(&self, operation: Uuid) -> Result<OperationStatus, ApiError> {
        self.order(operation, "cancel", &()).await
    }

    async fn order<T: DeserializeOwned>(
        &self,
        operation: Uuid,
        verb: &str,
        body: &impl Serialize,
    ) -> Result<T, ApiError> {
        let path = format!("/operations/{operation}/{verb}");
        self.send(&path, body, COMMAND).await
    }

    async fn ask<T: DeserializeOwned>(
        &self,
        method: Method,
        path: &str,
        deadline: Duration,
    ) -> Result<T, ApiError> {
        let request = self.http.request(method, format!("{}{path}", self.base));
        self.finish(request.timeout(deadline)).await
    }

    async fn send<T: DeserializeOwned>(
        &self,
        path: &str,
        body: &impl Serialize,
        deadline: Duration,
    ) -> Result<T, ApiError> {
        let request = self.http.post(format!("{}{path}", self.base)).json(body);
        self.finish(request.timeout(deadline)).await
    }

    async fn finish<T: DeserializeOwned>(
        &self,
        request: reqwest::RequestBuilder,
    ) -> Result<T, ApiError> {
        let response = request.send().await.map_err(|error| self.failure(&error))?;
        self.parsed(self.accept(response).await?).await
    }

    async fn parsed<T: DeserializeOwned>(&self, response: Response) -> Result<T, ApiError> {
        let body = self.collect(response).await?;
        serde_json::from_slice(&body).map_err(|error| self.not_this_api(&error.to_string()))
    }

    /// Passes a success on; makes the error that the agent sent of anything else.
    async fn accept(&self, response: Response) -> Result<Response, ApiError> {
        let status = response.status();
        if status.is_success() {
            return Ok(response);
        }
        let body = self.collect(response).await?;
        match serde_json::from_slice(&body) {
            Ok(error) => Err(error),
            Err(_) => Err(self.not_this_api(&format!("HTTP status {status}"))),
        }
    }

    async fn collect(&self, response: Response) -> Result<Vec<u8>, ApiError> {
        let mut body = Vec::new();
        let mut stream = response.bytes_stream();
        while let Some(chunk) = stream.next().await {
            let chunk = chunk.map_err(|error| self.failure(&error))?;
            if body.len() + chunk.len() > ANSWER_LIMIT {
                return Err(self.not_this_api("its answer is too long"));
            }
            body.extend_from_slice(&chunk);
        }
        Ok(body)
    }

    fn failure(&self, error: &reqwest::Error) -> ApiError {
        failure::of(&self.address, &self.host, error)
    }

    fn silent(&self, waited: Duration) -> ApiError {
        let message = format!(
            "the agent at {} has not answered for {} s",
            self.address,
            waited.as_secs()
        );
        let error = ApiError::new(ErrorKind::AgentUnreachable, message);
        error.next("look at the agent's log on that host")
    }

    fn not_this_api(&self, what: &str) -> ApiError {
        let message = format!(
            "what answers at {} does not speak version {API_VERSION} of the agent's API: {what}",
            self.address
        );
        let error = ApiError::new(ErrorKind::Incompatible, message);
        error.next("check host and port; install the same release of gs_pitr and pitr-agent")
    }
}

fn parse_address(address: &str) -> Result<(String, u16), ApiError> {
    let bad = || {
        let message = format!("`{address}` is not an agent's address: give HOST:PORT");
        ApiError::new(ErrorKind::Usage, message)
    };
    let (host, port) = if let Some(rest) = address.strip_prefix('[') {
        let (host, rest) = rest.split_once(']').ok_or_else(bad)?;
        host.parse::<std::net::Ipv6Addr>().map_err(|_| bad())?;
        let port = match rest {
            "" => None,
            rest => Some(rest.strip_prefix(':').ok_or_else(bad)?),
        };
        (host, port)
    } else {
        match address.rsplit_once(':') {
            Some((host, port)) => (host, Some(port)),
            None => (address, None),
        }
    };
    let port = match port {
        None => DEFAULT_PORT,
        Some(port) => port
            .parse()
            .ok()
            .filter(|port| *port != 0)
            .ok_or_else(bad)?,
    };
    let in_a_name = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '-' | '_');
    let is_name = !host.is_empty() && host.chars().all(in_a_name);
    if is_name
        || host
            .parse::<IpAddr>()
            .is_ok_and(|ip| ip.is_ipv6() && address.starts_with('['))
    {
        return Ok((host.to_owned(), port));
    }
    Err(bad())
}

fn is_loopback(host: &str) -> bool {
    host == "localhost" || host.parse::<IpAddr>().is_ok_and(|ip| ip.is_loopback())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_are_understood_or_refused() {
        let good = [
            ("db1", "db1", DEFAULT_PORT),
            ("db1.example:1", "db1.example", 1),
            ("127.0.0.1:9", "127.0.0.1", 9),
            ("[::1]:9", "::1", 9),
            ("[fe80::1]", "fe80::1", DEFAULT_PORT),
        ];
        for (text, host, port) in good {
            assert_eq!(
                parse_address(text).unwrap(),
                (host.to_owned(), port),
                "{text}"
            );
        }
        let bad = [
            "", ":1", "a:", "a:0", "a:70000", "::1", "[::1", "[a]:1", "a/b:1", "u@h:1", "[::1]x",
        ];
        for text in bad {
            let error = parse_address(text).unwrap_err();
            assert_eq!(error.kind, ErrorKind::Usage, "{text}");
        }
    }

    #[test]
    fn plain_http_goes_to_loopback_only() {
        assert!(AgentClient::new("127.0.0.1:1", &Transport::InsecureHttp).is_ok());
        let error = AgentClient::new("192.0.2.1:1", &Transport::InsecureHttp).unwrap_err();
        assert_eq!(error.kind, ErrorKind::Usage);
    }

    #[tokio::test]
    async fn a_refused_connection_is_an_unreachable_agent() {
        let free = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let address = free.local_addr().unwrap().to_string();
        drop(free);
        let client = AgentClient::new(&address, &Transport::InsecureHttp).unwrap();
        let error = client.health().await.unwrap_err();
        assert_eq!(error.kind, ErrorKind::AgentUnreachable);
        assert!(error.message.contains("refused"), "{error}");
    }
}
