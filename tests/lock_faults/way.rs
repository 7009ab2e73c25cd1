//! A way to a proxy on which the reply to a LOCK can be lost.

use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use support::sharded::ShardedCluster;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::tcp::{OwnedReadHalf, OwnedWriteHalf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;

/// Until a LOCK comes: the nodes are copied first.
const PATIENCE: Duration = Duration::from_mins(3);

/// What becomes of the reply to the next LOCK.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Loss {
    /// The connection breaks when it comes.
    Break,
    /// It never arrives, and the connection stays.
    Silence,
}

/// How far that LOCK has come.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Stage {
    Waiting,
    /// The proxy has it.
    Sent,
    /// The proxy has answered.
    Answered,
}

/// Carries bytes to a proxy. It ends with its runtime.
#[derive(Debug)]
pub(crate) struct Way {
    port: u16,
    proxy: u16,
    stage: watch::Receiver<Stage>,
}

struct Carrier {
    loss: Loss,
    armed: AtomicBool,
    stage: watch::Sender<Stage>,
}

impl Way {
    /// Opens a way to a proxy, on which the reply to the first LOCK is lost.
    pub(crate) async fn losing(proxy: u16, loss: Loss) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a free port");
        let port = listener.local_addr().expect("its address").port();
        let (sender, stage) = watch::channel(Stage::Waiting);
        let carrier = Arc::new(Carrier {
            loss,
            armed: AtomicBool::new(true),
            stage: sender,
        });
        tokio::spawn(async move {
            while let Ok((client, _)) = listener.accept().await {
                tokio::spawn(carry(client, proxy, Arc::clone(&carrier)));
            }
        });
        Self { port, proxy, stage }
    }

    /// Has `gs_pitr`, and whomever it tells, go this way.
    pub(crate) fn lead(&self, cluster: &ShardedCluster, command: &mut Command) {
        let (port, proxy) = (self.port, self.proxy);
        let mut environment = cluster.environment().into_iter();
        let map = environment.find(|(name, _)| *name == "GS_PITR_PROXY_MAP");
        let map = map.map_or_else(
            || format!("127.0.0.1:{proxy}=127.0.0.1:{port}"),
            |(_, map)| {
                map.replace(
                    &format!("=127.0.0.1:{proxy}"),
                    &format!("=127.0.0.1:{port}"),
                )
            },
        );
        command
            .env("GS_PITR_PROXY_PORT", port.to_string())
            .env("GS_PITR_PROXY_MAP", map);
    }

    /// Waits until the LOCK has come so far.
    pub(crate) async fn until(&mut self, stage: Stage) {
        let reached = self.stage.wait_for(|it| *it >= stage);
        let reached = tokio::time::timeout(PATIENCE, reached).await;
        reached.expect("a LOCK").expect("the way is there");
    }
}

async fn carry(client: TcpStream, proxy: u16, carrier: Arc<Carrier>) {
    let Ok(server) = TcpStream::connect(("127.0.0.1", proxy)).await else {
        return;
    };
    let _ = (client.set_nodelay(true), server.set_nodelay(true));
    let (from_client, to_client) = client.into_split();
    let (from_server, to_server) = server.into_split();
    let lost = AtomicBool::new(false);
    // Whichever direction ends first ends the connection.
    tokio::select! {
        () = ask(from_client, to_server, &carrier, &lost) => {}
        () = answer(from_server, to_client, &carrier, &lost) => {}
    }
}

/// A statement is one message, and is not sent before the one before it is answered.
fn is_lock(bytes: &[u8]) -> bool {
    bytes.first() == Some(&b'Q')
        && bytes
            .get(5..)
            .is_some_and(|sql| sql.starts_with(b"LOCK CLUSTER"))
}

async fn ask(
    mut from: OwnedReadHalf,
    mut to: OwnedWriteHalf,
    carrier: &Carrier,
    lost: &AtomicBool,
) {
    let mut bytes = vec![0; 64 * 1024];
    while let Ok(length) = from.read(&mut bytes).await {
        let bytes = &bytes[..length];
        let loses = is_lock(bytes) && carrier.armed.swap(false, Ordering::SeqCst);
        if loses {
            lost.store(true, Ordering::SeqCst);
        }
        if length == 0 || to.write_all(bytes).await.is_err() {
            return;
        }
        if loses {
            carrier.stage.send_replace(Stage::Sent);
        }
    }
}

async fn answer(
    mut from: OwnedReadHalf,
    mut to: OwnedWriteHalf,
    carrier: &Carrier,
    lost: &AtomicBool,
) {
    let mut bytes = vec![0; 64 * 1024];
    while let Ok(length) = from.read(&mut bytes).await {
        if length == 0 {
            return;
        }
        if lost.load(Ordering::SeqCst) {
            carrier.stage.send_replace(Stage::Answered);
            match carrier.loss {
                Loss::Break => return,
                Loss::Silence => continue,
            }
        }
        if to.write_all(&bytes[..length]).await.is_err() {
            return;
        }
    }
}
