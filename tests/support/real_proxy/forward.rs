//! A way to a server that can be cut: bytes are taken and passed on, and while it is cut they are held back, as by a
//! network that has fallen apart. Nobody is told; connections stay open.

use std::net::SocketAddr;
use std::time::Duration;

use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::tcp::{OwnedReadHalf, OwnedWriteHalf};
use tokio::net::{TcpListener, TcpStream};
use tokio::runtime::{Builder, Runtime};
use tokio::sync::watch;

/// A server that does not take a connection.
const CONNECTING: Duration = Duration::from_secs(10);

/// The way. It ends on drop.
#[derive(Debug)]
pub(super) struct Forward {
    port: u16,
    cut: watch::Sender<bool>,
    /// On threads of its own, so that a busy test does not slow it down. Ends in the background.
    runtime: Option<Runtime>,
}

impl Forward {
    /// Opens a way to `to`.
    ///
    /// # Panics
    /// If there is no free port.
    pub(super) fn to(to: SocketAddr) -> Self {
        let runtime = Builder::new_multi_thread()
            .worker_threads(1)
            .thread_name("forward")
            .enable_all()
            .build()
            .expect("a runtime");
        let listener = std::net::TcpListener::bind("127.0.0.1:0").expect("a free port");
        listener.set_nonblocking(true).expect("not blocking");
        let port = listener.local_addr().expect("its address").port();
        let cut = watch::Sender::new(false);
        let seen = cut.subscribe();
        runtime.spawn(async move {
            let listener = TcpListener::from_std(listener).expect("a listener");
            while let Ok((client, _)) = listener.accept().await {
                tokio::spawn(carry(client, to, seen.clone()));
            }
        });
        Self {
            port,
            cut,
            runtime: Some(runtime),
        }
    }

    /// Where it begins, on loopback.
    pub(super) fn port(&self) -> u16 {
        self.port
    }

    /// Cuts it, or mends it: what was held back then arrives.
    pub(super) fn set_cut(&self, cut: bool) {
        self.cut.send_replace(cut);
    }
}

impl Drop for Forward {
    fn drop(&mut self) {
        if let Some(runtime) = self.runtime.take() {
            runtime.shutdown_background();
        }
    }
}

async fn carry(client: TcpStream, to: SocketAddr, mut cut: watch::Receiver<bool>) {
    if cut.wait_for(|cut| !*cut).await.is_err() {
        return;
    }
    let server = tokio::time::timeout(CONNECTING, TcpStream::connect(to)).await;
    let Ok(Ok(server)) = server else { return };
    let _ = (client.set_nodelay(true), server.set_nodelay(true));
    let (from_client, to_client) = client.into_split();
    let (from_server, to_server) = server.into_split();
    tokio::join!(
        pass(from_client, to_server, cut.clone()),
        pass(from_server, to_client, cut)
    );
}

async fn pass(mut from: OwnedReadHalf, mut to: OwnedWriteHalf, mut cut: watch::Receiver<bool>) {
    let mut bytes = vec![0; 64 * 1024];
    loop {
        let read = from.read(&mut bytes).await;
        if cut.wait_for(|cut| !*cut).await.is_err() {
            return;
        }
        let written = match read {
            Ok(0) | Err(_) => return,
            Ok(length) => to.write_all(&bytes[..length]).await,
        };
        if written.is_err() {
            return;
        }
    }
}
