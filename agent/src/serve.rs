//! The agent's HTTP side: who may connect, what is asked, and the orderly end.

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use hyper_util::server::graceful::GracefulShutdown;
use rustls::ServerConfig;
use tokio::net::{TcpListener, TcpStream};
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::sync::Semaphore;
use tokio_rustls::TlsAcceptor;

use crate::config::Config;
use crate::operation::table::OperationTable;
use crate::serve::connection::Connection;
use crate::tls::{self, TlsError};
use crate::watchdog::Watchdogs;

mod body;
mod connection;
mod routes;
mod stream;
mod watchdogs;

/// Connections at the same time; an operator has a handful.
const MOST_CONNECTIONS: usize = 256;
/// Pause after an accept that failed, such as for want of file descriptors.
const ACCEPT_PAUSE: Duration = Duration::from_millis(200);
/// How long running operations have to clean up, and watchdogs to unlock, when the agent is stopped.
const STOP_OPERATIONS: Duration = Duration::from_mins(1);
/// How long open connections have after that.
const STOP_CONNECTIONS: Duration = Duration::from_secs(5);

/// Why the agent cannot serve.
#[derive(Debug, thiserror::Error)]
pub enum ServeError {
    /// The certificates do not do.
    #[error(transparent)]
    Tls(#[from] TlsError),
    /// The address cannot be had.
    #[error("cannot listen on {address}: {source}")]
    Bind {
        /// The address.
        address: SocketAddr,
        /// Why.
        source: io::Error,
    },
    /// Signals cannot be watched.
    #[error("cannot watch signals: {0}")]
    Signals(io::Error),
    /// Operations or watchdogs did not end in time after the agent was told to stop.
    #[error("stopped although operations or watchdogs had not ended")]
    Unfinished,
}

/// An agent that has its address and has not begun to serve.
#[derive(Debug)]
pub struct Server {
    config: Arc<Config>,
    listener: TcpListener,
    address: SocketAddr,
    tls: Option<Arc<ServerConfig>>,
    signals: Signals,
}

#[derive(Debug)]
struct Signals {
    terminate: Signal,
    interrupt: Signal,
    hang_up: Signal,
}

/// What a signal asks for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Told {
    Stop,
    Reload,
}

impl Signals {
    fn watch() -> io::Result<Self> {
        Ok(Self {
            terminate: signal(SignalKind::terminate())?,
            interrupt: signal(SignalKind::interrupt())?,
            hang_up: signal(SignalKind::hangup())?,
        })
    }

    async fn next(&mut self) -> Told {
        tokio::select! {
            _ = self.terminate.recv() => Told::Stop,
            _ = self.interrupt.recv() => Told::Stop,
            _ = self.hang_up.recv() => Told::Reload,
        }
    }

    async fn stop(&mut self) {
        while self.next().await != Told::Stop {}
    }
}

impl Server {
    /// Reads the certificates and takes the address.
    ///
    /// # Errors
    /// [`ServeError`]; nothing is left behind.
    pub async fn bind(config: Arc<Config>) -> Result<Self, ServeError> {
        let signals = Signals::watch().map_err(ServeError::Signals)?;
        let tls = config.tls.as_ref().map(tls::load).transpose()?;
        let address = SocketAddr::new(config.listen, config.port);
        let bind = async {
            let listener = TcpListener::bind(address).await?;
            let address = listener.local_addr()?;
            Ok((listener, address))
        };
        let (listener, address) = bind
            .await
            .map_err(|source| ServeError::Bind { address, source })?;
        Ok(Self {
            config,
            listener,
            address,
            tls,
            signals,
        })
    }

    /// Where it listens, as a URL.
    #[must_use]
    pub fn url(&self) -> String {
        let scheme = if self.tls.is_some() { "https" } else { "http" };
        format!("{scheme}://{}", self.address)
    }

    /// Serves until SIGTERM or SIGINT, then stops what runs; watchdogs that are armed unlock first. SIGHUP reads the certificates again.
    ///
    /// # Errors
    /// [`ServeError::Unfinished`] if an operation or a watchdog did not end in time.
    pub async fn run(mut self, operations: OperationTable) -> Result<(), ServeError> {
        let secure = self.tls.is_some();
        let watchdogs = Watchdogs::new();
        let router = routes::router(&self.config, &operations, &watchdogs, secure);
        let strangers = routes::strangers();
        let graceful = GracefulShutdown::new();
        let room = Arc::new(Semaphore::new(MOST_CONNECTIONS));
        loop {
            let next = async {
                // Nobody closes the semaphore.
                let permit = Arc::clone(&room).acquire_owned().await.ok();
                (permit, self.listener.accept().await)
            };
            tokio::select! {
                (permit, accepted) = next => match accepted {
                    Ok((stream, peer)) => {
                        let connection = self.connection(stream, peer, &router, &strangers);
                        let watcher = graceful.watcher();
                        tokio::spawn(async move {
                            connection.serve(watcher).await;
                            drop(permit);
                        });
                    }
                    Err(error) => {
                        tracing::warn!("cannot accept a connection: {error}");
                        tokio::time::sleep(ACCEPT_PAUSE).await;
                    }
                },
                told = self.signals.next() => match told {
                    Told::Stop => break,
                    Told::Reload => reload(&self.config, &mut self.tls),
                },
            }
        }
        drop(self.listener);
        stop(&operations, &watchdogs, graceful, &mut self.signals).await
    }

    fn connection(
        &self,
        stream: TcpStream,
        peer: SocketAddr,
        router: &Router,
        strangers: &Router,
    ) -> Connection {
        Connection {
            stream,
            peer,
            acceptor: self.tls.clone().map(TlsAcceptor::from),
            router: router.clone(),
            strangers: strangers.clone(),
        }
    }
}

/// Reads the certificates again. If they do not do, those before stay.
fn reload(config: &Config, current: &mut Option<Arc<ServerConfig>>) {
    let Some(files) = &config.tls else {
        tracing::info!("SIGHUP: there are no certificates to read again");
        return;
    };
    match tls::load(files) {
        Ok(new) => {
            *current = Some(new);
            tracing::info!("SIGHUP: certificates read again");
        }
        Err(error) => tracing::error!("SIGHUP: the certificates stay as they were: {error}"),
    }
}

async fn stop(
    operations: &OperationTable,
    watchdogs: &Watchdogs,
    graceful: GracefulShutdown,
    signals: &mut Signals,
) -> Result<(), ServeError> {
    tracing::info!("stopping");
    let all = async {
        tokio::join!(
            operations.shut_down(STOP_OPERATIONS),
            watchdogs.shut_down(STOP_OPERATIONS),
        )
    };
    let finished = tokio::select! {
        (ended, settled) = all => {
            if !settled {
                tracing::error!("a watchdog could not see to it that writes pass; the cluster may be locked");
            }
            ended && settled
        }
        () = signals.stop() => {
            tracing::warn!("a second signal: not waiting for operations and watchdogs any longer");
            false
        }
    };
    tokio::select! {
        () = graceful.shutdown() => {}
        () = tokio::time::sleep(STOP_CONNECTIONS) => {
            tracing::info!("closing connections that are still open");
        }
        () = signals.stop() => {}
    }
    if finished {
        Ok(())
    } else {
        Err(ServeError::Unfinished)
    }
}
