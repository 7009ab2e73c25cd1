//! Real ShardingSphere-Proxies of a distribution that `SHARDINGSPHERE_PROXY_HOME` names, and the ZooKeeper that they
//! share, which Debian packages (`zookeeper`: `/usr/share/java/zookeeper.jar`). All on loopback, all state in a directory of the
//! caller's, all killed on drop.
//!
//! The tables are registered through the first proxy before the others start: one that is already up can miss
//! `REGISTER STORAGE UNIT` for good (5.5.2; its listener throws).

mod forward;
mod servers;
mod zookeeper;

use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use rustix::process::Signal;

use crate::os;
use crate::raw::{LogIn, Raw, Reply};
use forward::Forward;
use servers::{Process, directory, java, redis, zookeeper};
use zookeeper::ZooKeeper;

/// Names the distribution: the directory with `lib`.
pub const HOME: &str = "SHARDINGSPHERE_PROXY_HOME";
/// Who may do everything on the proxies.
pub const USER: &str = "root";
/// Their password, unless another one is wanted.
pub const PASSWORD: &str = "proxy-secret";
/// The logical database.
pub const DATABASE: &str = "bank";

const ZOOKEEPER: &str = "/usr/share/java/zookeeper.jar";
const NAMESPACE: &str = "gs_pitr_tests";
/// A Java program on a loaded machine.
const START: Duration = Duration::from_mins(4);
/// Until a statement of the set-up takes: what was made before it is known a moment later.
const SETTLE: Duration = Duration::from_mins(1);
/// Observed: above two seconds until every proxy has another transaction rule.
const RULE: Duration = Duration::from_secs(4);

/// A data node, as a storage unit is registered.
#[derive(Debug, Clone)]
pub struct StorageUnit {
    /// Host.
    pub host: String,
    /// Port.
    pub port: u16,
    /// User.
    pub user: String,
    /// Password.
    pub password: String,
    /// Physical database.
    pub database: String,
}

/// The global clock.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum RealClock {
    /// There is none.
    #[default]
    Off,
    /// `TSO.redis`, with a Redis of its own.
    Redis,
    /// `TSO.local`.
    Local,
}

/// What is wanted.
#[derive(Debug, Clone)]
pub struct RealProxyOptions {
    /// How many.
    pub proxies: usize,
    /// openGauss's protocol towards clients, else PostgreSQL's.
    pub open_gauss: bool,
    /// XA (Atomikos), else LOCAL.
    pub xa: bool,
    /// The global clock.
    pub clock: RealClock,
    /// Password of [`USER`].
    pub password: String,
    /// The data nodes: row `id` is on the node number `id` modulo their number.
    pub units: Vec<StorageUnit>,
    /// Tables that are sharded by `id`, and what creates them.
    pub tables: Vec<(String, String)>,
}

/// The distribution, if the environment names one.
///
/// # Panics
/// If it names something else, or what it needs is not here: that is a failure, not a reason to do without.
pub fn home() -> Option<PathBuf> {
    let home = PathBuf::from(std::env::var_os(HOME).filter(|named| !named.is_empty())?);
    let shown = home.display();
    assert!(home.join("lib").is_dir(), "{HOME}={shown}: there is no lib");
    let zookeeper = Path::new(ZOOKEEPER).exists();
    assert!(
        zookeeper,
        "{HOME} is set, and {ZOOKEEPER} is missing: apt-get install zookeeper"
    );
    Some(home)
}

/// A program that is a Redis server, if there is one: `REDIS_SERVER`, or on the PATH. Debian's `redis-tools` has it
/// as well: it is called `redis-check-rdb` there, and goes by the name that it is called by.
pub fn redis_server() -> Option<PathBuf> {
    if let Some(named) = std::env::var_os("REDIS_SERVER").filter(|named| !named.is_empty()) {
        return Some(PathBuf::from(named)).filter(|path| path.is_file());
    }
    let path = std::env::var_os("PATH").unwrap_or_default();
    let places: Vec<PathBuf> = std::env::split_paths(&path).collect();
    let named = |name| {
        places
            .iter()
            .map(move |place| place.join(name))
            .find(|it| it.is_file())
    };
    named("redis-server").or_else(|| named("redis-check-rdb"))
}

/// One proxy's place: its port, its way to ZooKeeper, its directory.
#[derive(Debug)]
struct Place {
    port: u16,
    forward: Forward,
    root: PathBuf,
    process: Option<Process>,
}

/// The proxies with their ZooKeeper.
#[derive(Debug)]
pub struct RealProxies {
    places: Vec<Place>,
    zookeeper: Process,
    zookeeper_port: u16,
    /// Kept for its end.
    redis: Option<Process>,
    home: PathBuf,
    open_gauss: bool,
    password: String,
}

/// While it lives, LOCK and UNLOCK do not get the internal mutex: they wait, say SUCCESS, and change nothing.
#[derive(Debug)]
pub struct RealMutexHeld {
    _session: ZooKeeper,
}

impl RealProxies {
    /// Starts them with their state in `root`, which must be there, and registers the tables.
    ///
    /// # Panics
    /// If something does not start, with its log.
    pub async fn start(home: &Path, root: &Path, options: &RealProxyOptions) -> Self {
        let (zookeeper, zookeeper_port) = zookeeper(root).await;
        let mut clock = String::new();
        let mut redis_process = None;
        match options.clock {
            RealClock::Off => {}
            RealClock::Local => {
                clock = "globalClock: {enabled: true, type: TSO, provider: local}\n".into();
            }
            RealClock::Redis => {
                let (process, port) = redis(root).await;
                redis_process = Some(process);
                clock = format!(
                    "globalClock: {{enabled: true, type: TSO, provider: redis, props: {{host: 127.0.0.1, port: {port}}}}}\n"
                );
            }
        }
        let mut all = Self {
            places: Vec::new(),
            zookeeper,
            zookeeper_port,
            redis: redis_process,
            home: home.to_owned(),
            open_gauss: options.open_gauss,
            password: options.password.clone(),
        };
        for number in 0..options.proxies {
            let place = Place {
                port: os::free_port(),
                forward: Forward::to(([127, 0, 0, 1], zookeeper_port).into()),
                root: directory(root, &format!("proxy{number}")),
                process: None,
            };
            configure(&place, options, &clock);
            all.places.push(place);
        }
        all.spawn(0);
        all.wait(0).await;
        all.register(options).await;
        for number in 1..options.proxies {
            all.spawn(number);
        }
        for number in 1..options.proxies {
            all.wait(number).await;
        }
        for number in 0..options.proxies {
            for (table, sql) in &options.tables {
                all.knows(number, table, sql).await;
            }
        }
        all
    }

    fn spawn(&mut self, number: usize) {
        let place = &mut self.places[number];
        let (conf, home) = (place.root.join("conf"), self.home.display());
        let classes = format!("{}:{home}/lib/*:{home}/ext-lib/*", conf.display());
        let mut command = java();
        command.args(["-Xmx256m", "-cp", &classes]);
        command.arg("org.apache.shardingsphere.proxy.Bootstrap");
        command
            .arg(place.port.to_string())
            .arg(&conf)
            .arg("127.0.0.1");
        place.process = Some(Process::spawn(command, &place.root));
    }

    /// Waits until one can be logged in to.
    async fn wait(&mut self, number: usize) {
        let (until, who) = (Instant::now() + START, self.log_in(number, "postgres"));
        while !matches!(Raw::log_in(&who).await, Ok(Ok(_))) {
            let process = self.places[number]
                .process
                .as_mut()
                .expect("it was started");
            assert!(
                process.lives(),
                "proxy {number} has ended:\n{}",
                process.log()
            );
            assert!(
                Instant::now() < until,
                "proxy {number} does not start:\n{}",
                process.log()
            );
            tokio::time::sleep(Duration::from_millis(200)).await;
        }
    }

    async fn register(&self, options: &RealProxyOptions) {
        said(
            &self.log_in(0, "postgres"),
            &format!("CREATE DATABASE {DATABASE}"),
        )
        .await;
        let who = self.log_in(0, DATABASE);
        let units = options.units.iter().enumerate().map(|(number, unit)| {
            // HOST and PORT would mean jdbc:opengauss with that front end.
            let StorageUnit { host, port, user, password, database } = unit;
            format!(
                "ds_{number} (URL='jdbc:postgresql://{host}:{port}/{database}', USER='{user}', PASSWORD='{password}', \
                 PROPERTIES('maximumPoolSize'='20', 'minimumIdle'='1'))"
            )
        });
        let units: Vec<_> = units.collect();
        said(&who, &format!("REGISTER STORAGE UNIT {}", units.join(", "))).await;
        let (last, count) = (units.len() - 1, units.len());
        let rules = options.tables.iter().map(|(table, _)| {
            format!(
                "{table} (DATANODES(\"ds_${{0..{last}}}.{table}\"), DATABASE_STRATEGY(TYPE=\"standard\", SHARDING_COLUMN=id, \
                 SHARDING_ALGORITHM(TYPE(NAME=\"INLINE\", PROPERTIES(\"algorithm-expression\"=\"ds_${{id % {count}}}\")))))"
            )
        });
        let rules: Vec<_> = rules.collect();
        said(
            &who,
            &format!("CREATE SHARDING TABLE RULE {}", rules.join(", ")),
        )
        .await;
        // A table that is created before the rule is known is one of a single node.
        let until = Instant::now() + SETTLE;
        while said(&who, "SHOW SHARDING TABLE RULES").await.rows().len() < rules.len() {
            assert!(Instant::now() < until, "the sharding rules are not known");
            tokio::time::sleep(Duration::from_millis(200)).await;
        }
        for (_, sql) in &options.tables {
            said(&who, &unless_there(sql)).await;
        }
    }

    /// Waits until a proxy reads a table. One that has started before the table's metadata were written never does by itself; and on a
    /// busy machine the table may have been made on some nodes only.
    async fn knows(&self, number: usize, table: &str, sql: &str) {
        let who = self.log_in(number, DATABASE);
        let until = Instant::now() + SETTLE;
        loop {
            let session = Raw::log_in(&who).await;
            let mut session = session.expect("it answers").expect("it lets us in");
            let asked = format!("SELECT count(*) FROM {table}");
            let reply = session.query(&asked).await.expect("an answer");
            let Some(problem) = reply.error() else { return };
            assert!(Instant::now() < until, "proxy {number}: {problem:?}");
            for again in [
                unless_there(sql),
                format!("REFRESH DATABASE METADATA {DATABASE}"),
            ] {
                session.query(&again).await.expect("an answer");
            }
        }
    }

    /// How many there are.
    pub fn count(&self) -> usize {
        self.places.len()
    }

    /// The port of one, on 127.0.0.1; it stays the same after a restart.
    pub fn port(&self, number: usize) -> u16 {
        self.places[number].port
    }

    /// Where to log in.
    pub fn log_in(&self, number: usize, database: &str) -> LogIn {
        LogIn {
            port: self.port(number),
            user: USER.into(),
            password: self.password.clone(),
            database: database.into(),
            minor: if self.open_gauss { 51 } else { 0 },
        }
    }

    /// The process ids: ZooKeeper's, Redis's if there is one, then the proxies'.
    pub fn pids(&self) -> Vec<u32> {
        let first = std::iter::once(&self.zookeeper).chain(&self.redis);
        let proxies = self
            .places
            .iter()
            .filter_map(|place| place.process.as_ref());
        first.chain(proxies).map(Process::pid).collect()
    }

    /// The last lines that one logged.
    pub fn log(&self, number: usize) -> String {
        let process = self.places[number].process.as_ref();
        process.map(Process::log).unwrap_or_default()
    }

    /// SIGKILL, and wait.
    pub fn kill(&mut self, number: usize) {
        self.places[number].process = None;
    }

    /// Starts one again, on its port; one that runs is killed first.
    ///
    /// # Panics
    /// If it does not start.
    pub async fn restart(&mut self, number: usize) {
        self.kill(number);
        self.spawn(number);
        self.wait(number).await;
    }

    fn running(&self, number: usize) -> &Process {
        self.places[number].process.as_ref().expect("it runs")
    }

    /// Stops one where it stands, and waits until all its threads do.
    ///
    /// # Panics
    /// If it does not run, or goes on.
    pub fn freeze(&self, number: usize) {
        self.running(number).freeze();
    }

    /// Lets it go on.
    ///
    /// # Panics
    /// If it does not run.
    pub fn thaw(&self, number: usize) {
        self.running(number).signal(Signal::CONT);
    }

    /// Cuts one off from ZooKeeper: no byte goes either way.
    pub fn cut_off(&self, number: usize) {
        self.places[number].forward.set_cut(true);
    }

    /// Ends [`Self::cut_off`].
    pub fn reconnect(&self, number: usize) {
        self.places[number].forward.set_cut(false);
    }

    fn zookeeper(&self) -> ZooKeeper {
        ZooKeeper::open(self.zookeeper_port).expect("ZooKeeper answers")
    }

    /// The state in ZooKeeper: `OK`, `READ_ONLY`, `UNAVAILABLE`; a proxy may not have seen it yet. `OK` also where nobody ever
    /// locked.
    pub fn state(&self) -> String {
        let state = self.zookeeper().get(&state_path());
        state.unwrap_or_else(|| "OK".to_owned())
    }

    /// Writes the state past LOCK and UNLOCK. Somebody must have locked before.
    pub fn force_state(&self, state: &str) {
        self.zookeeper().set(&state_path(), state);
    }

    /// Takes the internal mutex of LOCK and UNLOCK away until the guard is dropped.
    #[must_use]
    pub fn hold_mutex(&self) -> RealMutexHeld {
        let session = self.zookeeper();
        session.take_mutex(&format!("/{NAMESPACE}/lock/global/locks/cluster_lock"));
        RealMutexHeld { _session: session }
    }

    /// Sets the kind of transactions for sessions that are opened from now on.
    ///
    /// # Panics
    /// If the proxy refuses.
    pub async fn transactions(&self, xa: bool) {
        let kind = if xa {
            "DEFAULT=\"XA\", TYPE(NAME=\"Atomikos\")"
        } else {
            "DEFAULT=\"LOCAL\""
        };
        let sql = format!("ALTER TRANSACTION RULE({kind})");
        said(&self.log_in(0, "postgres"), &sql).await;
        tokio::time::sleep(RULE).await;
    }
}

/// A statement that makes a table, to be said again.
fn unless_there(sql: &str) -> String {
    sql.replacen("CREATE TABLE ", "CREATE TABLE IF NOT EXISTS ", 1)
}

fn state_path() -> String {
    format!("/{NAMESPACE}/states/cluster_state")
}

/// Says a statement in a session of its own, until it is done: what was made before it takes a moment to be known.
async fn said(who: &LogIn, sql: &str) -> Reply {
    let until = Instant::now() + SETTLE;
    loop {
        let reply = async { Ok::<_, std::io::Error>(Raw::log_in(who).await?.map(Some)) };
        let problem = match reply.await {
            Ok(Ok(Some(mut session))) => match session.query(sql).await {
                Ok(reply) => match reply.error() {
                    None => return reply,
                    // It had been done, and the answer was an error of something else.
                    Some((_, text)) if text.contains("already exist") => return reply,
                    Some((code, text)) => format!("{code}: {text}"),
                },
                Err(error) => error.to_string(),
            },
            other => format!("{other:?}"),
        };
        assert!(Instant::now() < until, "{sql}: {problem}");
        tokio::time::sleep(Duration::from_millis(400)).await;
    }
}

fn configure(place: &Place, options: &RealProxyOptions, clock: &str) {
    let conf = directory(&place.root, "conf");
    let transaction = if options.xa { "XA" } else { "LOCAL" };
    let frontend = if options.open_gauss {
        "openGauss"
    } else {
        "PostgreSQL"
    };
    let (zookeeper, port) = (place.forward.port(), place.port);
    let password = options.password.replace('\'', "''");
    let global = format!(
        "mode:
  type: Cluster
  repository:
    type: ZooKeeper
    props:
      namespace: {NAMESPACE}
      server-lists: 127.0.0.1:{zookeeper}
      retryIntervalMilliseconds: 500
      timeToLiveSeconds: 60
      maxRetries: 3
      operationTimeoutMilliseconds: 500
authority:
  users:
    - user: {USER}@%
      password: '{password}'
      admin: true
  privilege:
    type: ALL_PERMITTED
transaction:
  defaultType: {transaction}
  providerType: Atomikos
{clock}props:
  proxy-frontend-database-protocol-type: {frontend}
  proxy-default-port: {port}
  system-log-level: INFO
"
    );
    fs::write(conf.join("global.yaml"), global).expect("global.yaml");
    let logback = "<configuration>
<appender name=\"c\" class=\"ch.qos.logback.core.ConsoleAppender\"><encoder><pattern>%d %-5level [%thread] %logger{36} - %msg%n</pattern></encoder></appender>
<logger name=\"io.netty.handler.logging\" level=\"WARN\"/><root level=\"INFO\"><appender-ref ref=\"c\"/></root>
</configuration>
";
    fs::write(conf.join("logback.xml"), logback).expect("logback.xml");
}
