//! One running proxy.

use std::collections::{HashMap, HashSet};
use std::io;
use std::sync::atomic::{AtomicBool, AtomicI64, Ordering};
use std::sync::mpsc::{self, Receiver, Sender};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use tokio::net::{TcpListener, TcpStream};
use tokio::runtime::Handle;
use tokio::sync::watch;
use tokio_rustls::TlsAcceptor;
use tokio_util::sync::CancellationToken;

use super::delay::{Delayer, Step};
use super::login;
use super::node::Pool;
use super::registry::Registry;
use super::session::Session;
use super::tables::Tables;
use super::transaction::{self, XaLog};
use super::wire::Refusal;
use super::{ClusterState, DataNode, Frontend, Version};

/// How soon it is seen that the registry is reached again.
const IN_TOUCH: Duration = Duration::from_millis(20);

/// What the proxies of a farm have in common.
pub(super) struct Common {
    pub registry: Arc<Registry>,
    pub frontend: Frontend,
    pub version: Version,
    pub delayer: Arc<Delayer>,
    pub tls: Option<TlsAcceptor>,
    pub pool: usize,
    pub handle: Handle,
}

/// One running proxy.
pub(super) struct Instance {
    pub index: usize,
    /// Whether it was started before.
    pub again: bool,
    pub port: u16,
    /// A new one at each start.
    pub id: String,
    pub registry: Arc<Registry>,
    pub frontend: Frontend,
    pub version: Version,
    pub delayer: Arc<Delayer>,
    pub tls: Option<TlsAcceptor>,
    /// The log of its distributed transactions, which survives it.
    pub xa: Arc<XaLog>,
    /// Logical databases whose tables it does not know, because IMPORT did not persist them.
    pub unknown_tables: Mutex<HashSet<String>>,
    /// Logical databases whose pools are closed and not opened again.
    pub closed_pools: Mutex<HashSet<String>>,
    /// The counter of `TSO.local`.
    pub csn: AtomicI64,
    pub tables: Tables,
    /// Tables that were made through it.
    pub made_tables: Mutex<HashSet<String>>,
    seen: Mutex<ClusterState>,
    frozen: watch::Sender<bool>,
    cut_off: AtomicBool,
    pools: Mutex<HashMap<DataNode, Arc<Pool>>>,
    pool: usize,
    handle: Handle,
    killed: CancellationToken,
    /// Held by every task of it: when all have gone, it is dead.
    alive: Mutex<Option<Sender<()>>>,
    gone: Mutex<Receiver<()>>,
}

impl Instance {
    /// Starts proxy `index`, which serves `listener`.
    pub(super) fn start(
        common: &Common,
        index: usize,
        listener: std::net::TcpListener,
        xa: Arc<XaLog>,
        again: bool,
    ) -> io::Result<Arc<Self>> {
        let port = listener.local_addr()?.port();
        listener.set_nonblocking(true)?;
        let listener = {
            let _inside = common.handle.enter();
            TcpListener::from_std(listener)?
        };
        let (alive, gone) = mpsc::channel();
        let registry = Arc::clone(&common.registry);
        let unknown: HashSet<String> = {
            let shared = registry.shared();
            let unknown = shared.databases.iter().filter(|(_, db)| !db.has_tables);
            unknown.map(|(name, _)| name.clone()).collect()
        };
        let instance = Arc::new(Self {
            index,
            again,
            port,
            id: uuid::Uuid::new_v4().to_string(),
            seen: Mutex::new(registry.state()),
            registry,
            frontend: common.frontend,
            version: common.version,
            delayer: Arc::clone(&common.delayer),
            tls: common.tls.clone(),
            xa,
            unknown_tables: Mutex::new(unknown),
            closed_pools: Mutex::default(),
            csn: AtomicI64::new(0),
            tables: Tables::default(),
            made_tables: Mutex::default(),
            frozen: watch::Sender::new(false),
            cut_off: AtomicBool::new(false),
            pools: Mutex::default(),
            pool: common.pool,
            handle: common.handle.clone(),
            killed: CancellationToken::new(),
            alive: Mutex::new(Some(alive)),
            gone: Mutex::new(gone),
        });
        instance.registry.join(&instance);
        instance.spawn(Arc::clone(&instance).serve(listener));
        instance.spawn(transaction::recover(Arc::clone(&instance)));
        Ok(instance)
    }

    /// Runs `task` until the proxy is killed.
    pub(super) fn spawn(&self, task: impl Future<Output = ()> + Send + 'static) {
        let Some(alive) = self.alive.lock().expect("no panic").clone() else {
            return;
        };
        let killed = self.killed.clone();
        self.handle.spawn(async move {
            tokio::select! {
                biased;
                () = killed.cancelled() => {}
                () = task => {}
            }
            drop(alive);
        });
    }

    /// Ends it as SIGKILL does, and waits until its sockets are closed.
    pub(super) fn kill(&self) {
        self.registry.silent(self, false);
        self.killed.cancel();
        self.alive.lock().expect("no panic").take();
        let gone = self.gone.lock().expect("no panic");
        let _ = gone.recv_timeout(Duration::from_secs(10));
        self.pools.lock().expect("no panic").clear();
    }

    async fn serve(self: Arc<Self>, listener: TcpListener) {
        loop {
            // A frozen process still has its connections accepted, by the kernel.
            let Ok((stream, _)) = listener.accept().await else {
                continue;
            };
            let proxy = Arc::clone(&self);
            self.spawn(async move {
                if let Err(error) = proxy.client(stream).await {
                    tracing::debug!(%error, "a client's session ended");
                }
            });
        }
    }

    async fn client(self: Arc<Self>, stream: TcpStream) -> io::Result<()> {
        stream.set_nodelay(true)?;
        if let Some((stream, client)) = login::log_in(Box::new(stream), &self).await? {
            Session::new(self, stream, client).run().await?;
        }
        Ok(())
    }

    /// Waits while it is frozen.
    pub(super) async fn thawed(&self) {
        let mut frozen = self.frozen.subscribe();
        // It cannot end: the sender lives as long as we do.
        let _ = frozen.wait_for(|frozen| !*frozen).await;
    }

    pub(super) fn freeze(&self) {
        if !self.frozen.send_replace(true) {
            self.registry.silent(self, false);
        }
    }

    pub(super) fn thaw(&self) {
        if self.frozen.send_replace(false) && !self.is_cut_off() {
            self.registry.heard(self);
        }
    }

    pub(super) fn is_cut_off(&self) -> bool {
        self.cut_off.load(Ordering::Acquire)
    }

    pub(super) fn cut_off(&self) {
        if !self.cut_off.swap(true, Ordering::AcqRel) {
            self.registry.silent(self, true);
        }
    }

    pub(super) fn reconnect(&self) {
        if self.cut_off.swap(false, Ordering::AcqRel) {
            self.registry.heard(self);
            *self.seen.lock().expect("no panic") = self.registry.state();
        }
    }

    /// The state as this proxy knows it.
    pub(super) fn seen(&self) -> ClusterState {
        *self.seen.lock().expect("no panic")
    }

    /// Lets it see the registry's state, some time after `after`.
    pub(super) fn follow(self: &Arc<Self>, step: Step, after: Duration) {
        if self.is_cut_off() {
            return;
        }
        if !self.delayer.is_real() && !*self.frozen.borrow() {
            *self.seen.lock().expect("no panic") = self.registry.state();
            return;
        }
        let delay = after + self.delayer.of(step);
        let this = Arc::clone(self);
        self.spawn(async move {
            tokio::time::sleep(delay).await;
            this.thawed().await;
            if !this.is_cut_off() {
                // What stands there now, as a watch reads it.
                *this.seen.lock().expect("no panic") = this.registry.state();
            }
        });
    }

    /// Its sessions of a data node.
    pub(super) fn pool_of(&self, node: &DataNode) -> Arc<Pool> {
        let mut pools = self.pools.lock().expect("no panic");
        let pool = pools.entry(node.clone());
        Arc::clone(pool.or_insert_with(|| Pool::new(node.clone(), self.pool)))
    }

    /// Waits until the registry can be read: the real one gave no answer for as long as it was cut off.
    pub(super) async fn in_touch(&self) {
        while self.is_cut_off() {
            tokio::time::sleep(IN_TOUCH).await;
        }
    }

    /// What is said where the registry is to be written and is not reached.
    pub(super) fn connected(&self) -> Result<(), Refusal> {
        if self.is_cut_off() {
            return Err(Refusal::system("Cluster repository persist error."));
        }
        Ok(())
    }
}
