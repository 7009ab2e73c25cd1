//! Two proxies before two nodes, of one kind or the other.

use std::any::Any;
use std::path::Path;
use std::time::{Duration, Instant};

use agent_sql::Password;
use agent_sql::proxy::{ProxyConnection, ProxyOptions};
use support::os::Scratch;
use support::postgres::{Cluster, ClusterOptions, Installation, SUPERUSER};
use support::proxy::{
    Clock, ClusterState, DataNode, Delays, Frontend, ProxyFarm, ProxyFarmOptions, ProxyUser,
    Transaction,
};
use support::raw::{LogIn, Raw, Reply};
use support::real_proxy::{
    self, DATABASE, PASSWORD, RealClock, RealProxies, RealProxyOptions, StorageUnit, USER,
};
use tokio_util::sync::CancellationToken;

pub(crate) const LOCK: &str = r#"LOCK CLUSTER WITH LOCK_STRATEGY(TYPE(NAME="WRITE")) TIMEOUT 3000"#;
pub(crate) const LOCK_ALL: &str =
    r#"LOCK CLUSTER WITH LOCK_STRATEGY(TYPE(NAME="READ_WRITE")) TIMEOUT 3000"#;
pub(crate) const UNLOCK: &str = "UNLOCK CLUSTER TIMEOUT 3000";
pub(crate) const PROBE: &str = r#"LABEL COMPUTE NODE "gs_pitr_probe" WITH probe"#;

/// How soon a proxy follows, on a machine that has other things to do: 112 ms were the most that was seen.
pub(crate) const MOMENT: Duration = Duration::from_secs(10);
/// A proxy is listed for up to 50 s after it was cut off or killed.
pub(crate) const LISTED: Duration = Duration::from_mins(2);

const NODE_PASSWORD: &str = "node-secret";
const TABLE: &str = "CREATE TABLE account (id int primary key, balance bigint not null)";
/// Accounts 1 to 8 with 100 each, which every check may count on.
const ACCOUNTS: u32 = 8;

/// What the proxies are like.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Shape {
    /// PostgreSQL's protocol, LOCAL, no clock.
    Plain,
    /// PostgreSQL's protocol, XA, TSO.redis.
    XaAndClock,
    /// openGauss's protocol, LOCAL, no clock.
    OpenGauss,
}

enum Proxies {
    StandIn(Box<ProxyFarm>),
    Real(Box<RealProxies>),
}

/// All of it. It ends on drop, proxies first.
pub(crate) struct Farm {
    proxies: Proxies,
    pub(crate) shape: Shape,
    pub(crate) nodes: Vec<Cluster>,
    killed: [bool; 2],
    frozen: [bool; 2],
    cut: [bool; 2],
    _scratch: Scratch,
}

fn database(number: usize) -> String {
    format!("bank_{number}")
}

impl Farm {
    pub(crate) async fn start(shape: Shape, home: Option<&Path>) -> Self {
        let scratch = Scratch::new("conform");
        let mut nodes = Vec::new();
        for number in 0..2 {
            let root = scratch.directory(&format!("node{number}"));
            let options = ClusterOptions {
                password: Some(NODE_PASSWORD.into()),
                settings: vec![
                    ("max_prepared_transactions".into(), "50".into()),
                    ("max_connections".into(), "150".into()),
                    ("lock_timeout".into(), "20s".into()),
                ],
                ..ClusterOptions::default()
            };
            let node = Cluster::create(&Installation::newest(), &root, options);
            node.start();
            node.execute(&format!("CREATE DATABASE {}", database(number)))
                .await;
            nodes.push(node);
        }
        let proxies = match home {
            Some(home) => {
                let root = scratch.directory("proxies");
                let real = RealProxies::start(home, &root, &real_options(shape, &nodes)).await;
                Proxies::Real(Box::new(real))
            }
            None => Proxies::StandIn(Box::new(stand_in(shape, &nodes).await)),
        };
        let mut farm = Self {
            proxies,
            shape,
            nodes,
            killed: [false; 2],
            frozen: [false; 2],
            cut: [false; 2],
            _scratch: scratch,
        };
        println!("{shape:?}: {}", farm.describe());
        farm.settle().await;
        farm
    }

    pub(crate) fn describe(&self) -> &'static str {
        match &self.proxies {
            Proxies::StandIn(_) => "the stand-in",
            Proxies::Real(_) => "real ShardingSphere-Proxies",
        }
    }

    pub(crate) fn is_gauss(&self) -> bool {
        self.shape == Shape::OpenGauss
    }

    /// How the proxy calls a statement of SQL: `PostgreSQLInsertStatement`.
    pub(crate) fn class(&self, statement: &str) -> String {
        let dialect = if self.is_gauss() {
            "OpenGauss"
        } else {
            "PostgreSQL"
        };
        format!("{dialect}{statement}Statement")
    }

    pub(crate) fn port(&self, i: usize) -> u16 {
        match &self.proxies {
            Proxies::StandIn(farm) => farm.port(i),
            Proxies::Real(real) => real.port(i),
        }
    }

    pub(crate) fn log_in(&self, i: usize, database: &str) -> LogIn {
        LogIn {
            port: self.port(i),
            user: USER.into(),
            password: PASSWORD.into(),
            database: database.into(),
            minor: if self.is_gauss() { 51 } else { 0 },
        }
    }

    /// A session of the bank through proxy `i`.
    pub(crate) async fn bank(&self, i: usize) -> Raw {
        self.session(i, DATABASE).await
    }

    /// A session of the database that is always there.
    pub(crate) async fn postgres(&self, i: usize) -> Raw {
        self.session(i, "postgres").await
    }

    async fn session(&self, i: usize, database: &str) -> Raw {
        let session = Raw::log_in(&self.log_in(i, database)).await;
        session.expect("the proxy answers").expect("it lets us in")
    }

    /// The product's client.
    pub(crate) fn options(&self, i: usize) -> ProxyOptions {
        ProxyOptions {
            port: self.port(i),
            user: USER.into(),
            password: Some(Password::new(PASSWORD)),
            connect_timeout: Duration::from_secs(30),
            ..ProxyOptions::default()
        }
    }

    pub(crate) async fn product(&self, i: usize) -> ProxyConnection {
        let options = self.options(i);
        let connection = ProxyConnection::connect(&options, CancellationToken::new());
        connection.await.expect("it lets us in")
    }

    /// What proxy `i` says to the probe: `None` if it is open, else its words.
    pub(crate) async fn probe(&self, i: usize) -> Option<String> {
        let reply = self
            .postgres(i)
            .await
            .query(PROBE)
            .await
            .expect("an answer");
        reply.error().map(|(_, text)| text.to_owned())
    }

    /// Probes until proxy `i` is locked, or open. Returns how long that took.
    pub(crate) async fn until(&self, i: usize, locked: bool, patience: Duration) -> Duration {
        let begun = Instant::now();
        let mut session = self.postgres(i).await;
        loop {
            let reply = session.query(PROBE).await.expect("an answer");
            if reply.error().is_some() == locked {
                return begun.elapsed();
            }
            assert!(
                begun.elapsed() < patience,
                "proxy {i} is not locked={locked}: {reply:?}"
            );
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }

    pub(crate) fn state(&self) -> String {
        match &self.proxies {
            Proxies::StandIn(farm) => match farm.state() {
                ClusterState::Ok => "OK".into(),
                ClusterState::ReadOnly => "READ_ONLY".into(),
                ClusterState::Unavailable => "UNAVAILABLE".into(),
            },
            Proxies::Real(real) => real.state(),
        }
    }

    pub(crate) fn hold_mutex(&self) -> Box<dyn Any> {
        match &self.proxies {
            Proxies::StandIn(farm) => Box::new(farm.hold_mutex()),
            Proxies::Real(real) => Box::new(real.hold_mutex()),
        }
    }

    pub(crate) fn kill(&mut self, i: usize) {
        self.killed[i] = true;
        match &mut self.proxies {
            Proxies::StandIn(farm) => farm.kill(i),
            Proxies::Real(real) => real.kill(i),
        }
    }

    pub(crate) async fn restart(&mut self, i: usize) {
        self.killed[i] = false;
        match &mut self.proxies {
            Proxies::StandIn(farm) => farm.restart(i),
            Proxies::Real(real) => real.restart(i).await,
        }
    }

    pub(crate) fn freeze(&mut self, i: usize) {
        self.frozen[i] = true;
        match &self.proxies {
            Proxies::StandIn(farm) => farm.freeze(i),
            Proxies::Real(real) => real.freeze(i),
        }
    }

    pub(crate) fn thaw(&mut self, i: usize) {
        self.frozen[i] = false;
        match &self.proxies {
            Proxies::StandIn(farm) => farm.thaw(i),
            Proxies::Real(real) => real.thaw(i),
        }
    }

    pub(crate) fn cut_off(&mut self, i: usize) {
        self.cut[i] = true;
        match &self.proxies {
            Proxies::StandIn(farm) => farm.cut_off(i),
            Proxies::Real(real) => real.cut_off(i),
        }
    }

    pub(crate) fn reconnect(&mut self, i: usize) {
        self.cut[i] = false;
        match &self.proxies {
            Proxies::StandIn(farm) => farm.reconnect(i),
            Proxies::Real(real) => real.reconnect(i),
        }
    }

    /// One value, straight from node `number`.
    pub(crate) async fn ask(&self, number: usize, sql: &str) -> String {
        self.nodes[number].query_one(&database(number), sql).await
    }

    /// Sum of all balances, straight from the nodes.
    pub(crate) async fn sum(&self) -> i64 {
        let mut sum = 0;
        for number in 0..self.nodes.len() {
            let part = self.ask(number, "SELECT coalesce(sum(balance), 0) FROM account");
            sum += part.await.parse::<i64>().expect("a number");
        }
        sum
    }

    /// How many rows have this id, on all nodes.
    pub(crate) async fn rows(&self, from: u32, to: u32) -> i64 {
        let sql = format!("SELECT count(*) FROM account WHERE id BETWEEN {from} AND {to}");
        let mut rows = 0;
        for number in 0..self.nodes.len() {
            rows += self
                .ask(number, &sql)
                .await
                .parse::<i64>()
                .expect("a number");
        }
        rows
    }

    /// Makes it as every check expects it: all proxies run, none is locked, eight accounts with 100 each.
    pub(crate) async fn settle(&mut self) {
        for i in 0..2 {
            if self.frozen[i] {
                self.thaw(i);
            }
            if self.cut[i] {
                self.reconnect(i);
            }
            if self.killed[i] {
                self.restart(i).await;
            }
        }
        for i in 0..2 {
            let begun = Instant::now();
            while self.probe(i).await.is_some() {
                let _ = self.postgres(i).await.query(UNLOCK).await;
                assert!(
                    begun.elapsed() < Duration::from_mins(2),
                    "proxy {i} stays locked"
                );
            }
        }
        for (number, node) in self.nodes.iter().enumerate() {
            let client = node.connect(&database(number)).await;
            let sql = format!(
                "TRUNCATE account; INSERT INTO account SELECT id, 100 FROM generate_series(1, {ACCOUNTS}) id WHERE id % 2 = {number}"
            );
            client.batch_execute(&sql).await.expect("the accounts");
        }
    }
}

async fn stand_in(shape: Shape, nodes: &[Cluster]) -> ProxyFarm {
    for (number, node) in nodes.iter().enumerate() {
        let client = node.connect(&database(number)).await;
        client.batch_execute(TABLE).await.expect("the table");
    }
    let data = nodes.iter().enumerate().map(|(number, node)| DataNode {
        host: "127.0.0.1".into(),
        port: node.port(),
        user: SUPERUSER.into(),
        password: NODE_PASSWORD.into(),
        database: database(number),
    });
    let gauss = shape == Shape::OpenGauss;
    let xa = shape == Shape::XaAndClock;
    ProxyFarm::start(ProxyFarmOptions {
        proxies: 2,
        frontend: if gauss {
            Frontend::OpenGaussSha256
        } else {
            Frontend::PostgresMd5
        },
        nodes: data.collect(),
        users: vec![ProxyUser {
            name: USER.into(),
            password: PASSWORD.into(),
        }],
        database: DATABASE.into(),
        sharded: vec![("account".into(), "id".into())],
        transaction: if xa {
            Transaction::Xa
        } else {
            Transaction::Local
        },
        clock: if xa { Clock::TsoRedis } else { Clock::Off },
        delays: Delays::Measured,
        // The same, sooner: 40 s and more take long to wait for.
        listed_after_kill: Duration::from_secs(5),
        listed_after_cut: Duration::from_secs(5),
        ..ProxyFarmOptions::default()
    })
}

fn real_options(shape: Shape, nodes: &[Cluster]) -> RealProxyOptions {
    let units = nodes.iter().enumerate().map(|(number, node)| StorageUnit {
        host: "127.0.0.1".into(),
        port: node.port(),
        user: SUPERUSER.into(),
        password: NODE_PASSWORD.into(),
        database: database(number),
    });
    let xa = shape == Shape::XaAndClock;
    RealProxyOptions {
        proxies: 2,
        open_gauss: shape == Shape::OpenGauss,
        xa,
        clock: if xa { RealClock::Redis } else { RealClock::Off },
        password: PASSWORD.into(),
        units: units.collect(),
        tables: vec![("account".into(), TABLE.into())],
    }
}

/// Says a statement that is not refused.
pub(crate) async fn ok(session: &mut Raw, sql: &str) -> Reply {
    let reply = session.query(sql).await.expect("an answer");
    assert!(reply.error().is_none(), "{sql}: {reply:?}");
    reply
}

/// Says one that is. Returns SQLSTATE and text.
pub(crate) async fn refused(session: &mut Raw, sql: &str) -> (String, String) {
    let reply = session.query(sql).await.expect("an answer");
    let (code, text) = reply
        .error()
        .unwrap_or_else(|| panic!("{sql} is not refused: {reply:?}"));
    (code.to_owned(), text.to_owned())
}

/// What is said to a statement that the state of the cluster forbids.
pub(crate) fn forbidden(state: &str, class: &str) -> (String, String) {
    let text = format!("The cluster state is {state}, can not support SQL statement '{class}'.");
    ("58000".to_owned(), text)
}

#[test]
fn the_distribution_is_named_by_the_environment_only() {
    let named = std::env::var_os(real_proxy::HOME).is_some_and(|home| !home.is_empty());
    assert_eq!(real_proxy::home().is_some(), named);
}
