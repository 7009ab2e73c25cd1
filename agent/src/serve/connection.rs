//! One connection: handshake under a deadline, then requests until either side closes.

use std::net::SocketAddr;
use std::time::Duration;

use agent_api::identity::{OPERATOR_URI, check_role};
use axum::Router;
use hyper::server::conn::http1;
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::server::graceful::Watcher;
use hyper_util::service::TowerToHyperService;
use socket2::{SockRef, TcpKeepalive};
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _};
use tokio::net::TcpStream;
use tokio_rustls::TlsAcceptor;
use tokio_rustls::server::TlsStream;

const HANDSHAKE: Duration = Duration::from_secs(10);
/// Also how long a connection may lie idle; clients close theirs earlier.
const HEADERS: Duration = Duration::from_secs(30);
/// Sent bytes that nobody confirms for so long mean that the other side is gone. Without it a client whose
/// host vanished would pass as somebody who watches an operation, for a quarter of an hour.
const UNCONFIRMED: Duration = Duration::from_secs(45);
/// How long a refused client may take to read why.
const LAST_WORDS: Duration = Duration::from_millis(500);

pub(super) struct Connection {
    pub(super) stream: TcpStream,
    pub(super) peer: SocketAddr,
    pub(super) acceptor: Option<TlsAcceptor>,
    /// For operators.
    pub(super) router: Router,
    /// For those with a certificate that is not an operator's.
    pub(super) strangers: Router,
}

impl Connection {
    pub(super) async fn serve(self, watcher: Watcher) {
        set_up(&self.stream);
        let peer = self.peer;
        let Some(acceptor) = self.acceptor else {
            return requests(self.stream, peer, self.router, watcher).await;
        };
        let Some(stream) = handshake(acceptor, self.stream, peer).await else {
            return;
        };
        let (_, session) = stream.get_ref();
        let leaf = session.peer_certificates().and_then(<[_]>::first);
        let router = match leaf.map(|leaf| check_role(leaf, OPERATOR_URI)) {
            Some(Ok(())) => self.router,
            Some(Err(error)) => {
                tracing::warn!(%peer, "the client's certificate is refused: {error}");
                self.strangers
            }
            // The verifier lets nobody in without one.
            None => self.strangers,
        };
        requests(stream, peer, router, watcher).await;
    }
}

fn set_up(stream: &TcpStream) {
    let keepalive = TcpKeepalive::new()
        .with_time(Duration::from_secs(15))
        .with_interval(Duration::from_secs(10));
    let socket = SockRef::from(stream);
    let set = stream
        .set_nodelay(true)
        .and_then(|()| socket.set_tcp_keepalive(&keepalive))
        .and_then(|()| socket.set_tcp_user_timeout(Some(UNCONFIRMED)));
    if let Err(error) = set {
        tracing::debug!("socket options: {error}");
    }
}

async fn handshake(
    acceptor: TlsAcceptor,
    stream: TcpStream,
    peer: SocketAddr,
) -> Option<TlsStream<TcpStream>> {
    let accepted = acceptor.accept(stream).into_fallible();
    match tokio::time::timeout(HANDSHAKE, accepted).await {
        Ok(Ok(stream)) => Some(stream),
        Ok(Err((error, stream))) => {
            tracing::warn!(%peer, "TLS handshake: {error}");
            let _ = tokio::time::timeout(LAST_WORDS, say_goodbye(stream)).await;
            None
        }
        Err(_) => {
            tracing::warn!(%peer, "TLS handshake: not done within {} s", HANDSHAKE.as_secs());
            None
        }
    }
}

/// Reads what the client still sends. Closed at once, with its request unread, the connection would be reset,
/// and the client might never see the alert that says why.
async fn say_goodbye(mut stream: TcpStream) {
    let _ = stream.shutdown().await;
    let mut rest = [0; 4096];
    let mut left = 64;
    while left > 0 && stream.read(&mut rest).await.is_ok_and(|read| read > 0) {
        left -= 1;
    }
}

async fn requests<S>(stream: S, peer: SocketAddr, router: Router, watcher: Watcher)
where
    S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let service = TowerToHyperService::new(router);
    let connection = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(HEADERS)
        .serve_connection(TokioIo::new(stream), service);
    if let Err(error) = watcher.watch(connection).await {
        tracing::debug!(%peer, "connection: {error}");
    }
}
