//! A stand-in for ShardingSphere-Proxy: a small sharding proxy over real PostgreSQL nodes, for tests.
//!
//! It is called a stand-in because it is one: two or more proxies in this process that share one state, which plays
//! ZooKeeper. What it imitates, and how closely, was observed with a running ShardingSphere-Proxy 5.5.2; docs/TESTING.md says what it
//! does not imitate. It runs on threads of its own, so that a test that is busy does not slow it down.
//!
//! It takes orders, too: proxies killed, frozen and cut off, replies lost, locks that land late, unlocks that do nothing.

mod answer;
mod batch;
mod delay;
mod distsql;
mod execute;
mod instance;
mod login;
mod merge;
mod metadata;
mod node;
pub mod program;
mod registry;
mod route;
mod session;
mod sql;
mod statement;
mod tables;
mod transaction;
mod wire;
mod yaml;

use std::net::TcpListener;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use serde::Deserialize;
use tokio::runtime::{Builder, Runtime};
use tokio_rustls::TlsAcceptor;

use delay::{Delayer, Step};
use instance::{Common, Instance};
use registry::Registry;
use transaction::XaLog;

/// How clients log in.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Deserialize)]
pub enum Frontend {
    /// PostgreSQL's protocol, md5: the real one's default.
    #[default]
    PostgresMd5,
    /// PostgreSQL's protocol, the password as it is.
    PostgresCleartext,
    /// openGauss's protocol and its SHA256.
    OpenGaussSha256,
}

/// A data node, which is one storage unit.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Deserialize)]
pub struct DataNode {
    /// Host, or a directory of sockets.
    pub host: String,
    /// Port.
    pub port: u16,
    /// User.
    pub user: String,
    /// Password; empty where the node wants none.
    #[serde(default)]
    pub password: String,
    /// Database on the node.
    pub database: String,
}

/// A user of the proxies.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub struct ProxyUser {
    /// Name.
    pub name: String,
    /// Password.
    pub password: String,
}

/// What BEGIN begins.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Deserialize)]
pub enum Transaction {
    /// Committed on one node after the other.
    #[default]
    Local,
    /// Prepared on all nodes, then committed: the nodes need `max_prepared_transactions`.
    Xa,
}

/// How long things take, as measured on a real cluster.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Deserialize)]
pub enum Delays {
    /// Everything at once.
    #[default]
    None,
    /// As on a quiet machine.
    Measured,
    /// As on a loaded one.
    Loaded,
}

/// Which release is imitated.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Deserialize)]
pub enum Version {
    /// LOCK and UNLOCK know no TIMEOUT.
    V5_5_1,
    /// LOCK and UNLOCK fail without TIMEOUT.
    #[default]
    V5_5_2,
    /// LOCK and UNLOCK with or without TIMEOUT.
    V5_5_3,
}

impl Version {
    fn release(self) -> &'static str {
        match self {
            Self::V5_5_1 => "5.5.1",
            Self::V5_5_2 => "5.5.2",
            Self::V5_5_3 => "5.5.3",
        }
    }
}

/// The global clock, which makes CSNs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Deserialize)]
pub enum Clock {
    /// There is none.
    #[default]
    Off,
    /// One counter for all proxies.
    TsoRedis,
    /// A counter in each proxy.
    TsoLocal,
}

/// The state of the cluster.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ClusterState {
    /// Not locked.
    Ok,
    /// Locked for changes (`WRITE`).
    ReadOnly,
    /// Locked for everything (`READ_WRITE`).
    Unavailable,
}

impl ClusterState {
    fn name(self) -> &'static str {
        match self {
            Self::Ok => "OK",
            Self::ReadOnly => "READ_ONLY",
            Self::Unavailable => "UNAVAILABLE",
        }
    }
}

/// How a farm of proxies is made.
#[derive(Clone, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct ProxyFarmOptions {
    /// How many proxies.
    pub proxies: usize,
    /// How clients log in.
    pub frontend: Frontend,
    /// The data nodes; row `id` is on the node number `id` modulo their number.
    pub nodes: Vec<DataNode>,
    /// Who may log in.
    pub users: Vec<ProxyUser>,
    /// The logical database.
    pub database: String,
    /// Tables and the columns they are sharded by; all others are sharded by `id`.
    pub sharded: Vec<(String, String)>,
    /// What BEGIN begins.
    pub transaction: Transaction,
    /// How long things take.
    pub delays: Delays,
    /// Where the random part of the delays starts.
    pub seed: u64,
    /// Which release is imitated.
    pub version: Version,
    /// The global clock.
    pub clock: Clock,
    /// How long a proxy that was killed, or is frozen, stays listed.
    #[serde(skip)]
    pub listed_after_kill: Duration,
    /// How long a proxy that is cut off from the shared state stays listed.
    #[serde(skip)]
    pub listed_after_cut: Duration,
    /// What SHOW COMPUTE NODES says for a host. The real one says the address of an interface.
    pub listed_host: String,
    /// Ports to listen on, on 127.0.0.1; free ones where none is given.
    pub ports: Vec<u16>,
    /// Most sessions of one proxy on one node.
    pub pool: usize,
    /// Certificate chain and key, both PEM: then `SSLRequest` is granted.
    pub tls: Option<(String, String)>,
}

impl std::fmt::Debug for ProxyFarmOptions {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ProxyFarmOptions")
            .field("proxies", &self.proxies)
            .field("frontend", &self.frontend)
            .field("nodes", &self.nodes.len())
            .field("transaction", &self.transaction)
            .field("delays", &self.delays)
            .field("version", &self.version)
            .field("clock", &self.clock)
            .finish_non_exhaustive()
    }
}

impl Default for ProxyFarmOptions {
    fn default() -> Self {
        Self {
            proxies: 2,
            frontend: Frontend::default(),
            nodes: Vec::new(),
            users: vec![ProxyUser {
                name: "root".to_owned(),
                password: "root".to_owned(),
            }],
            database: "bank".to_owned(),
            sharded: Vec::new(),
            transaction: Transaction::default(),
            delays: Delays::default(),
            seed: 0,
            version: Version::default(),
            clock: Clock::default(),
            listed_after_kill: Duration::from_secs(40),
            listed_after_cut: Duration::from_secs(42),
            listed_host: "127.0.0.1".to_owned(),
            ports: Vec::new(),
            pool: 20,
            tls: None,
        }
    }
}

/// A place for a proxy, which keeps its port and its log of distributed transactions.
struct Slot {
    port: u16,
    xa: Arc<XaLog>,
    instance: Mutex<Option<Arc<Instance>>>,
}

/// Running proxies that share one state. They end on drop.
pub struct ProxyFarm {
    common: Common,
    slots: Vec<Slot>,
    database: String,
    /// Ends in the background, since it may be dropped within another runtime.
    runtime: Option<Runtime>,
}

/// While it lives, LOCK and UNLOCK do not get the internal mutex: they wait, say SUCCESS, and change nothing.
pub struct MutexHeld {
    registry: Arc<Registry>,
}

impl Drop for MutexHeld {
    fn drop(&mut self) {
        self.registry.release();
    }
}

impl ProxyFarm {
    /// Starts the proxies. The nodes are not spoken to before a client wants something of them.
    ///
    /// # Panics
    /// If a port or the certificate cannot be used.
    pub fn start(options: ProxyFarmOptions) -> Self {
        let runtime = Builder::new_multi_thread()
            .worker_threads(2)
            .thread_name("proxy-stand-in")
            .enable_all()
            .build()
            .expect("a runtime");
        let tls = options
            .tls
            .as_ref()
            .map(|(chain, key)| acceptor(chain, key));
        let common = Common {
            registry: Registry::new(&options),
            frontend: options.frontend,
            version: options.version,
            delayer: Arc::new(Delayer::new(options.delays, options.seed)),
            tls,
            pool: options.pool,
            handle: runtime.handle().clone(),
        };
        let slots = (0..options.proxies).map(|index| {
            let port = options.ports.get(index).copied();
            let port = port.unwrap_or_else(crate::os::free_port);
            let listener = TcpListener::bind(("127.0.0.1", port)).expect("the port is free");
            let xa = XaLog::new(port);
            let instance = Instance::start(&common, index, listener, Arc::clone(&xa), false);
            Slot {
                port,
                xa,
                instance: Mutex::new(Some(instance.expect("the proxy starts"))),
            }
        });
        Self {
            slots: slots.collect(),
            common,
            database: options.database,
            runtime: Some(runtime),
        }
    }

    /// The port of proxy `i`, on 127.0.0.1; it stays the same after a restart.
    pub fn port(&self, i: usize) -> u16 {
        self.slots[i].port
    }

    /// How many proxies there are.
    pub fn proxies(&self) -> usize {
        self.slots.len()
    }

    /// The logical database.
    pub fn database(&self) -> &str {
        &self.database
    }

    fn registry(&self) -> &Registry {
        &self.common.registry
    }

    fn with(&self, i: usize, order: impl Fn(&Arc<Instance>)) {
        if let Some(instance) = &*self.slots[i].instance.lock().expect("no panic") {
            order(instance);
        }
    }

    /// Ends proxy `i` as SIGKILL does: its clients and its sessions on the nodes are cut off in the middle of whatever they do.
    ///
    /// # Panics
    /// If a thread of the farm has panicked.
    pub fn kill(&self, i: usize) {
        if let Some(instance) = self.slots[i].instance.lock().expect("no panic").take() {
            instance.kill();
        }
    }

    /// Starts proxy `i` again, on its port and with a new instance id; one that runs is killed first.
    ///
    /// # Panics
    /// If its port was taken meanwhile.
    pub fn restart(&self, i: usize) {
        self.kill(i);
        let slot = &self.slots[i];
        let listener = TcpListener::bind(("127.0.0.1", slot.port)).expect("the port is still free");
        let instance = Instance::start(&self.common, i, listener, Arc::clone(&slot.xa), true);
        let instance = instance.expect("the proxy starts");
        *slot.instance.lock().expect("no panic") = Some(instance);
    }

    /// Stops proxy `i` where it stands: connections are accepted, and nothing is answered.
    pub fn freeze(&self, i: usize) {
        self.with(i, |instance| instance.freeze());
    }

    /// Lets proxy `i` go on. What has changed meanwhile it sees a moment later.
    pub fn thaw(&self, i: usize) {
        self.with(i, |instance| {
            instance.thaw();
            instance.follow(Step::Accepts, Duration::ZERO);
        });
    }

    /// Cuts proxy `i` off from the shared state: it goes on with the state that it knows.
    pub fn cut_off(&self, i: usize) {
        self.with(i, |instance| instance.cut_off());
    }

    /// Ends [`ProxyFarm::cut_off`].
    pub fn reconnect(&self, i: usize) {
        self.with(i, |instance| instance.reconnect());
    }

    /// Takes the internal mutex of LOCK and UNLOCK away until the guard is dropped.
    #[must_use]
    pub fn hold_mutex(&self) -> MutexHeld {
        self.registry().hold();
        let registry = Arc::clone(&self.common.registry);
        MutexHeld { registry }
    }

    /// The state in the registry; a proxy may not have seen it yet.
    pub fn state(&self) -> ClusterState {
        self.registry().state()
    }

    /// How often it was locked so far: a lock may be gone before it is seen.
    pub fn locks(&self) -> usize {
        self.registry().shared().locks
    }

    /// The state as proxy `i` knows it; `None`: it does not run.
    ///
    /// # Panics
    /// If a thread of the farm has panicked.
    pub fn seen(&self, i: usize) -> Option<ClusterState> {
        let instance = self.slots[i].instance.lock().expect("no panic");
        instance.as_ref().map(|instance| instance.seen())
    }

    /// Writes the state past LOCK and UNLOCK.
    pub fn force_state(&self, state: ClusterState) {
        self.registry().write(state, Duration::ZERO);
    }

    /// The next LOCK is executed, and its connection ends before the reply.
    pub fn lose_next_lock_reply(&self) {
        let lost = &self.registry().faults.lose_lock_replies;
        lost.fetch_add(1, Ordering::Relaxed);
    }

    /// The next LOCK is executed this much later, whether its client still waits or not.
    ///
    /// # Panics
    /// If a thread of the farm has panicked.
    pub fn delay_next_lock(&self, by: Duration) {
        let delayed = &self.registry().faults.delay_lock;
        *delayed.lock().expect("no panic") = Some(by);
    }

    /// The next so many UNLOCKs say SUCCESS and do nothing.
    pub fn ignore_unlocks(&self, count: usize) {
        let ignored = &self.registry().faults.ignore_unlocks;
        ignored.store(count, Ordering::Relaxed);
    }

    /// Closes the connection pools of proxy `i` for the logical database, until it is dropped and imported.
    ///
    /// # Panics
    /// If a thread of the stand-in panicked.
    pub fn close_pools(&self, i: usize) {
        self.with(i, |instance| {
            let mut closed = instance.closed_pools.lock().expect("no panic");
            closed.insert(self.database.clone());
        });
    }

    /// The shared CSN.
    pub fn csn(&self) -> i64 {
        self.registry().csn.load(Ordering::Relaxed)
    }

    /// Changes what BEGIN begins from now on.
    pub fn set_transaction(&self, transaction: Transaction) {
        self.registry().shared().transaction = transaction;
    }
}

impl Drop for ProxyFarm {
    fn drop(&mut self) {
        for i in 0..self.slots.len() {
            self.kill(i);
        }
        if let Some(runtime) = self.runtime.take() {
            runtime.shutdown_background();
        }
    }
}

fn acceptor(chain: &str, key: &str) -> TlsAcceptor {
    use tokio_rustls::rustls::ServerConfig;
    use tokio_rustls::rustls::crypto::aws_lc_rs;
    use tokio_rustls::rustls::pki_types::pem::PemObject as _;
    use tokio_rustls::rustls::pki_types::{CertificateDer, PrivateKeyDer};

    let chain = CertificateDer::pem_slice_iter(chain.as_bytes());
    let chain = chain.collect::<Result<Vec<_>, _>>().expect("certificates");
    let key = PrivateKeyDer::from_pem_slice(key.as_bytes()).expect("a private key");
    let config = ServerConfig::builder_with_provider(Arc::new(aws_lc_rs::default_provider()))
        .with_safe_default_protocol_versions()
        .expect("TLS versions")
        .with_no_client_auth()
        .with_single_cert(chain, key)
        .expect("a certificate and its key");
    TlsAcceptor::from(Arc::new(config))
}
