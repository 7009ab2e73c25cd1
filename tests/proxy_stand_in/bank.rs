//! Two data nodes with an account table, proxies before them, and clients.

use std::time::Duration;

use support::os::Scratch;
use support::postgres::{Cluster, ClusterOptions, Installation, SUPERUSER};
use support::proxy::{DataNode, ProxyFarm, ProxyFarmOptions};
use tokio::sync::oneshot;
use tokio::task::JoinHandle;
use tokio_postgres::{Client, Config, NoTls, SimpleQueryMessage};

/// Password of the nodes' superuser, so that the proxies log in by SCRAM.
pub(crate) const PASSWORD: &str = "node secret";

pub(crate) const PROBE: &str = r#"LABEL COMPUTE NODE "gs_pitr_probe" WITH probe"#;
pub(crate) const LOCK: &str = r#"LOCK CLUSTER WITH LOCK_STRATEGY(TYPE(NAME="WRITE")) TIMEOUT 500"#;
pub(crate) const LOCK_ALL: &str =
    r#"LOCK CLUSTER WITH LOCK_STRATEGY(TYPE(NAME="READ_WRITE")) TIMEOUT 500"#;
pub(crate) const UNLOCK: &str = "UNLOCK CLUSTER TIMEOUT 500";

/// The nodes.
pub(crate) struct Nodes {
    pub(crate) clusters: Vec<Cluster>,
    _scratch: Scratch,
}

impl Nodes {
    /// Two databases, in one server or each in one of its own.
    pub(crate) async fn start(servers: usize) -> Self {
        let scratch = Scratch::new("proxy");
        let mut clusters = Vec::new();
        for number in 0..servers {
            let root = scratch.directory(&format!("node{number}"));
            let options = ClusterOptions {
                password: Some(PASSWORD.to_owned()),
                settings: vec![("max_prepared_transactions".to_owned(), "50".to_owned())],
                ..ClusterOptions::default()
            };
            let cluster = Cluster::create(&Installation::newest(), &root, options);
            cluster.start();
            clusters.push(cluster);
        }
        let nodes = Self {
            clusters,
            _scratch: scratch,
        };
        for number in 0..2 {
            let server = nodes.server(number);
            server
                .execute(&format!("CREATE DATABASE bank_{number}"))
                .await;
            let client = server.connect(&format!("bank_{number}")).await;
            let sql = "CREATE TABLE account (id bigint PRIMARY KEY, balance bigint NOT NULL)";
            client.batch_execute(sql).await.unwrap();
        }
        nodes
    }

    fn server(&self, number: usize) -> &Cluster {
        &self.clusters[number % self.clusters.len()]
    }

    /// Options with these nodes.
    pub(crate) fn options(&self) -> ProxyFarmOptions {
        let node = |number| DataNode {
            host: "127.0.0.1".to_owned(),
            port: self.server(number).port(),
            user: SUPERUSER.to_owned(),
            password: PASSWORD.to_owned(),
            database: format!("bank_{number}"),
        };
        ProxyFarmOptions {
            nodes: vec![node(0), node(1)],
            ..ProxyFarmOptions::default()
        }
    }

    /// One value, straight from node `number`.
    pub(crate) async fn ask(&self, number: usize, sql: &str) -> String {
        let database = format!("bank_{number}");
        self.server(number).query_one(&database, sql).await
    }

    /// Sum of the balances of both nodes.
    pub(crate) async fn sum(&self) -> i64 {
        let sql = "SELECT coalesce(sum(balance), 0) FROM account";
        let mut sum = 0;
        for number in 0..2 {
            sum += self.ask(number, sql).await.parse::<i64>().unwrap();
        }
        sum
    }
}

/// Moves money from account 1 to account 2 until that fails. The first transfer is over: what a session needs at first is there.
pub(crate) async fn transfers(client: Client) -> JoinHandle<()> {
    let (first, over) = oneshot::channel();
    let work = tokio::spawn(async move {
        let mut first = Some(first);
        loop {
            for sql in [
                "BEGIN",
                "UPDATE account SET balance = balance - 1 WHERE id = 1",
                "UPDATE account SET balance = balance + 1 WHERE id = 2",
                "COMMIT",
            ] {
                if ask(&client, sql).await.is_err() {
                    return;
                }
            }
            let _ = first.take().map(|first| first.send(()));
        }
    });
    over.await.expect("a transfer");
    work
}

/// Configuration of a client of proxy `i`.
pub(crate) fn config(farm: &ProxyFarm, i: usize, database: &str) -> Config {
    let mut config = Config::new();
    config
        .host("127.0.0.1")
        .port(farm.port(i))
        .user("root")
        .password("root")
        .dbname(database)
        .connect_timeout(Duration::from_secs(10));
    config
}

/// A client of proxy `i` in the sharded database.
pub(crate) async fn client(farm: &ProxyFarm, i: usize) -> Client {
    client_in(farm, i, "bank").await
}

/// A client of proxy `i`.
pub(crate) async fn client_in(farm: &ProxyFarm, i: usize, database: &str) -> Client {
    let connected = config(farm, i, database).connect(NoTls).await;
    let (client, connection) = connected.expect("the proxy lets us in");
    tokio::spawn(connection);
    client
}

/// Rows of a statement, sent by the simple protocol, as texts; or SQLSTATE and message.
pub(crate) async fn ask(client: &Client, sql: &str) -> Result<Vec<Vec<String>>, (String, String)> {
    let answer = tokio::time::timeout(Duration::from_secs(20), client.simple_query(sql));
    let answer = answer
        .await
        .unwrap_or_else(|_| panic!("no answer to {sql}"));
    let messages = answer.map_err(|error| {
        let Some(error) = error.as_db_error() else {
            return ("lost".to_owned(), error.to_string());
        };
        (error.code().code().to_owned(), error.message().to_owned())
    })?;
    let rows = messages.iter().filter_map(|message| match message {
        SimpleQueryMessage::Row(row) => Some(row),
        _ => None,
    });
    let text = |value: Option<&str>| value.unwrap_or("NULL").to_owned();
    Ok(rows
        .map(|row| (0..row.len()).map(|i| text(row.get(i))).collect())
        .collect())
}

/// Runs a statement that must succeed.
pub(crate) async fn run(client: &Client, sql: &str) -> Vec<Vec<String>> {
    ask(client, sql)
        .await
        .unwrap_or_else(|e| panic!("{sql}: {e:?}"))
}

/// Runs a statement that must be refused.
pub(crate) async fn refused(client: &Client, sql: &str) -> (String, String) {
    match ask(client, sql).await {
        Ok(rows) => panic!("{sql}: not refused: {rows:?}"),
        Err(refusal) => refusal,
    }
}

/// Waits until `holds`, for thirty seconds at most.
pub(crate) async fn until(what: &str, holds: impl AsyncFn() -> bool) {
    let wait = async {
        while !holds().await {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    let waited = tokio::time::timeout(Duration::from_secs(30), wait).await;
    waited.unwrap_or_else(|_| panic!("never: {what}"));
}
