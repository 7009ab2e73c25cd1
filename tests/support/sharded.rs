//! A cluster as ShardingSphere's users have it: PostgreSQL nodes, an agent beside each, two proxies in front, tables
//! sharded over the nodes, and a bucket.
//!
//! The proxies are the stand-in of [`crate::proxy`], or real ones when `SHARDINGSPHERE_PROXY_HOME` names a
//! distribution; which is printed.

use std::path::Path;
use std::process::Command;

use crate::bank::wire::Session;
use crate::bank::{self, Node, Ways};
use crate::bucket::Bucket;
use crate::fleet::{Fleet, Run, wait};
use crate::postgres::{Cluster, ClusterOptions, Installation, SUPERUSER};
use crate::proxy::{Clock, DataNode, Delays, ProxyFarm, ProxyFarmOptions, ProxyUser, Transaction};
use crate::raw::LogIn;
use crate::real_proxy::{self as real, RealClock, RealProxies, RealProxyOptions, StorageUnit};

/// Database with the tables on each node.
pub const SHARD: &str = "shard";
/// The superuser's password over TCP, which the proxies use.
pub const NODE_PASSWORD: &str = "node-secret";
/// Tables that are sharded by `id`, as [`bank::TABLES`] makes them.
const TABLE_NAMES: [&str; 2] = ["account", "ledger"];
/// The longest that a command may take.
const LIMIT: std::time::Duration = std::time::Duration::from_mins(5);

/// What is wanted.
#[derive(Debug, Clone)]
pub struct ShardedOptions {
    /// In the paths.
    pub name: &'static str,
    /// Data nodes.
    pub nodes: usize,
    /// Proxies.
    pub proxies: usize,
    /// Transactions over several nodes: XA, else LOCAL (committed shard after shard).
    pub xa: bool,
    /// The global clock.
    pub clock: RealClock,
    /// The proxies' password.
    pub password: &'static str,
    /// The stand-in even where real proxies are to be had.
    pub stand_in: bool,
    /// How late other proxies hear of a lock (of the stand-in; real ones take what they take).
    pub delays: Delays,
    /// A real MinIO if there is one.
    pub real_bucket: bool,
    /// Settings of the nodes.
    pub settings: Vec<(String, String)>,
    /// WAL segment size of the nodes, MiB.
    pub wal_segment_mib: u32,
}

impl Default for ShardedOptions {
    fn default() -> Self {
        Self {
            name: "sharded",
            nodes: 2,
            proxies: 2,
            xa: false,
            clock: RealClock::Off,
            password: real::PASSWORD,
            stand_in: false,
            delays: Delays::Measured,
            real_bucket: false,
            settings: Vec::new(),
            wal_segment_mib: 0,
        }
    }
}

/// The proxies of one kind or the other.
pub enum Proxies {
    /// The stand-in.
    StandIn(Box<ProxyFarm>),
    /// Real ones.
    Real(Box<RealProxies>),
}

/// The cluster. All of it ends on drop.
pub struct ShardedCluster {
    /// In front. Dropped first.
    pub proxies: Proxies,
    /// The nodes with their agents, hosts 0 to n - 1, and whatever is added.
    pub fleet: Fleet,
    /// The bucket.
    pub bucket: Bucket,
    nodes: usize,
    password: &'static str,
    /// Proxies as they are listed, and where they are.
    map: Vec<String>,
}

impl ShardedCluster {
    /// Starts all of it, and says which proxies and which bucket.
    ///
    /// # Panics
    /// If something does not start.
    pub async fn start(options: ShardedOptions) -> Self {
        let cluster = Self::quietly(options).await;
        cluster.say();
        cluster
    }

    /// Starts all of it.
    ///
    /// # Panics
    /// If something does not start.
    pub async fn quietly(options: ShardedOptions) -> Self {
        let bucket = if options.real_bucket {
            Bucket::best().await
        } else {
            Bucket::double().await
        };
        let mut fleet = Fleet::new(options.name, &bucket.config());
        let installation = Installation::newest();
        for number in 0..options.nodes {
            let name = format!("node{number}");
            fleet.add_database(&name, &installation, of_node(&options));
        }
        let databases = fleet
            .hosts
            .iter()
            .map(|host| host.cluster.as_ref().expect("a database"));
        let databases: Vec<_> = databases.collect();
        for database in &databases {
            database.execute(&format!("CREATE DATABASE {SHARD}")).await;
        }
        let proxies = match real::home().filter(|_| !options.stand_in) {
            Some(home) => {
                let real = real_proxies(&home, fleet.path(), &databases, &options);
                Proxies::Real(Box::new(real.await))
            }
            None => Proxies::StandIn(Box::new(stand_in(&databases, &options).await)),
        };
        for (number, database) in databases.iter().enumerate() {
            let client = database.connect(SHARD).await;
            let sql = bank::fill(number, options.nodes);
            client.batch_execute(&sql).await.expect("the accounts");
        }
        let mut cluster = Self {
            proxies,
            fleet,
            bucket,
            nodes: options.nodes,
            password: options.password,
            map: Vec::new(),
        };
        cluster.map = cluster.listed().await;
        cluster
    }

    #[expect(clippy::print_stdout, reason = "shown by --nocapture and on failure")]
    fn say(&self) {
        println!(
            "proxies: {}; bucket: {}",
            self.describe(),
            self.bucket.describe()
        );
    }

    /// Real proxies list themselves with the address of an interface, though they listen on loopback alone.
    async fn listed(&self) -> Vec<String> {
        let mut session = Session::open(&self.access(0, "postgres"))
            .await
            .expect("a session");
        let rows = session
            .query("SHOW COMPUTE NODES")
            .await
            .expect("the compute nodes");
        let listed = rows.into_iter().filter_map(|mut row| {
            let (host, port) = (row.get_mut(2)?.take()?, row.get_mut(3)?.take()?);
            (host != "127.0.0.1").then(|| format!("{host}:{port}=127.0.0.1:{port}"))
        });
        listed.collect()
    }

    /// Which proxies they are, for people.
    pub fn describe(&self) -> String {
        match &self.proxies {
            Proxies::StandIn(_) if real::home().is_some() => {
                "the stand-in of tests/support/proxy".to_owned()
            }
            Proxies::StandIn(_) => format!(
                "the stand-in of tests/support/proxy ({} is not set)",
                real::HOME
            ),
            Proxies::Real(real) => format!(
                "{} real ShardingSphere-Proxies with ZooKeeper",
                real.count()
            ),
        }
    }

    /// The database of a node.
    ///
    /// # Panics
    /// If there is no such node.
    pub fn database(&self, number: usize) -> &Cluster {
        self.fleet.hosts[number]
            .cluster
            .as_ref()
            .expect("a database")
    }

    /// All nodes' databases.
    pub fn databases(&self) -> Vec<&Cluster> {
        (0..self.nodes)
            .map(|number| self.database(number))
            .collect()
    }

    /// How many proxies there are.
    pub fn proxy_count(&self) -> usize {
        match &self.proxies {
            Proxies::StandIn(farm) => farm.proxies(),
            Proxies::Real(real) => real.count(),
        }
    }

    /// Kills a proxy and starts it anew.
    pub async fn restart_proxy(&mut self, number: usize) {
        match &mut self.proxies {
            Proxies::StandIn(farm) => farm.restart(number),
            Proxies::Real(real) => real.restart(number).await,
        }
    }

    /// Port of a proxy.
    pub fn proxy_port(&self, number: usize) -> u16 {
        match &self.proxies {
            Proxies::StandIn(farm) => farm.port(number),
            Proxies::Real(real) => real.port(number),
        }
    }

    /// Where to log in to a proxy.
    pub fn access(&self, number: usize, database: &str) -> LogIn {
        LogIn {
            port: self.proxy_port(number),
            user: real::USER.into(),
            password: self.password.into(),
            database: database.into(),
            minor: 0,
        }
    }

    /// Ways to the tables.
    pub fn ways(&self) -> Ways {
        let proxies = (0..self.proxy_count()).map(|number| self.access(number, real::DATABASE));
        let nodes = self.databases().into_iter().map(|database| Node {
            socket: database.socket_directory().to_owned(),
            port: database.port(),
            database: SHARD.into(),
        });
        Ways {
            proxies: proxies.collect(),
            nodes: nodes.collect(),
        }
    }

    /// Sets the kind of transactions for sessions that are opened from now on.
    ///
    /// # Panics
    /// If the proxies refuse.
    pub async fn transactions(&self, xa: bool) {
        match &self.proxies {
            Proxies::StandIn(farm) => farm.set_transaction(transaction(xa)),
            Proxies::Real(real) => real.transactions(xa).await,
        }
    }

    /// What a person or a program sets in the environment to reach the proxies.
    pub fn environment(&self) -> Vec<(&'static str, String)> {
        let agents = (0..self.nodes).map(|number| {
            let node = self.database(number).port();
            format!(
                "127.0.0.1:{node}={}",
                self.fleet.hosts[number].agent.address
            )
        });
        let agents: Vec<_> = agents.collect();
        let others =
            (1..self.proxy_count()).map(|number| format!("127.0.0.1:{}", self.proxy_port(number)));
        let pairs = [
            ("GS_PITR_PROXY_HOST", "127.0.0.1".to_owned()),
            ("GS_PITR_PROXY_PORT", self.proxy_port(0).to_string()),
            ("GS_PITR_PROXY_USERNAME", real::USER.to_owned()),
            ("GS_PITR_PROXY_PASSWORD", self.password.to_owned()),
            ("GS_PITR_PROXIES", others.collect::<Vec<_>>().join(",")),
            ("GS_PITR_PROXY_MAP", self.map.join(",")),
            ("GS_PITR_AGENTS", agents.join(",")),
            ("GS_PITR_WAL", "continuous".to_owned()),
        ];
        pairs
            .into_iter()
            .filter(|(_, value)| !value.is_empty())
            .collect()
    }

    /// `gs_pitr` that knows the proxies, not yet started.
    pub fn command(&self, args: &[&str]) -> Command {
        let mut command = self.fleet.command(args);
        command.envs(self.environment());
        command
    }

    /// Runs `gs_pitr` with the proxies to its end.
    ///
    /// # Panics
    /// If it cannot be run.
    pub fn run(&self, args: &[&str]) -> Run {
        wait(self.command(args), LIMIT)
    }
}

fn of_node(options: &ShardedOptions) -> ClusterOptions {
    let pairs = [
        ("max_prepared_transactions", "100"),
        ("max_connections", "150"),
        // Clients whose locks wait for each other over nodes would do so for ever.
        ("lock_timeout", "20s"),
    ];
    let settings = pairs.map(|(name, value)| (name.to_owned(), value.to_owned()));
    ClusterOptions {
        settings: settings
            .into_iter()
            .chain(options.settings.clone())
            .collect(),
        password: Some(NODE_PASSWORD.into()),
        data_checksums: true,
        wal_segment_mib: options.wal_segment_mib,
        ..ClusterOptions::default()
    }
}

async fn stand_in(databases: &[&Cluster], options: &ShardedOptions) -> ProxyFarm {
    for database in databases {
        let client = database.connect(SHARD).await;
        for table in bank::TABLES {
            client.batch_execute(table).await.expect("a table");
        }
    }
    let nodes = databases.iter().map(|database| DataNode {
        host: "127.0.0.1".into(),
        port: database.port(),
        user: SUPERUSER.into(),
        password: NODE_PASSWORD.into(),
        database: SHARD.into(),
    });
    ProxyFarm::start(ProxyFarmOptions {
        proxies: options.proxies,
        nodes: nodes.collect(),
        users: vec![ProxyUser {
            name: real::USER.into(),
            password: options.password.into(),
        }],
        database: real::DATABASE.into(),
        sharded: TABLE_NAMES
            .map(|table| (table.to_owned(), "id".to_owned()))
            .to_vec(),
        transaction: transaction(options.xa),
        clock: match options.clock {
            RealClock::Off => Clock::Off,
            RealClock::Redis => Clock::TsoRedis,
            RealClock::Local => Clock::TsoLocal,
        },
        delays: options.delays,
        ..ProxyFarmOptions::default()
    })
}

fn transaction(xa: bool) -> Transaction {
    if xa {
        Transaction::Xa
    } else {
        Transaction::Local
    }
}

async fn real_proxies(
    home: &Path,
    root: &Path,
    databases: &[&Cluster],
    options: &ShardedOptions,
) -> RealProxies {
    let directory = root.join("proxies");
    std::fs::create_dir(&directory).expect("a directory");
    let units = databases.iter().map(|database| StorageUnit {
        host: "127.0.0.1".into(),
        port: database.port(),
        user: SUPERUSER.into(),
        password: NODE_PASSWORD.into(),
        database: SHARD.into(),
    });
    let tables = TABLE_NAMES.iter().zip(bank::TABLES);
    let options = RealProxyOptions {
        proxies: options.proxies,
        open_gauss: false,
        xa: options.xa,
        clock: options.clock,
        password: options.password.into(),
        units: units.collect(),
        tables: tables
            .map(|(name, sql)| ((*name).to_owned(), sql.to_owned()))
            .collect(),
    };
    RealProxies::start(home, &directory, &options).await
}
