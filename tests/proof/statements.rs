//! What agents ask the database, on every version that is here.

use agent_sql::{ConnectOptions, NodeConnection, XidHolders};
use support::os::Scratch;
use support::postgres::{self, Cluster, ClusterOptions, Installation, SUPERUSER};
use tokio_postgres::Client;
use tokio_util::sync::CancellationToken;

async fn run(client: &Client, sql: &str) {
    client
        .batch_execute(sql)
        .await
        .unwrap_or_else(|e| panic!("{sql}: {e:?}"));
}

async fn log_in(cluster: &Cluster) -> NodeConnection {
    let options = ConnectOptions {
        host: cluster.socket_directory().to_str().unwrap().to_owned(),
        port: cluster.port(),
        user: SUPERUSER.to_owned(),
        application_name: "looker".to_owned(),
        ..ConnectOptions::default()
    };
    NodeConnection::connect(&options, CancellationToken::new())
        .await
        .unwrap()
}

/// Looks many times between two ids, which must follow each other.
async fn looking_takes_no_id(looker: &NodeConnection, client: &Client) {
    let id = async || -> u64 {
        let text = postgres::query_one(client, "SELECT txid_current()").await;
        text.parse().unwrap()
    };
    let before = id().await;
    let snapshot = looker.transaction_snapshot().await.unwrap();
    for _ in 0..5 {
        assert_eq!(looker.xid_holders().await.unwrap(), XidHolders::default());
        assert_eq!(looker.transaction_snapshot().await.unwrap(), snapshot);
        looker.create_restore_point("a look").await.unwrap();
    }
    assert_eq!(id().await, before + 1);
}

async fn an_open_transaction_is_seen(looker: &NodeConnection, client: &Client) {
    let snapshot = looker.transaction_snapshot().await.unwrap();
    run(client, "BEGIN; SELECT count(*) FROM t").await;
    assert_eq!(
        looker.xid_holders().await.unwrap(),
        XidHolders::default(),
        "it only read"
    );
    let savepoints = "INSERT INTO t VALUES (1); SAVEPOINT a; INSERT INTO t VALUES (2); SAVEPOINT b; \
                      INSERT INTO t VALUES (3)";
    run(client, savepoints).await;
    let pid = postgres::query_one(client, "SELECT pg_backend_pid()").await;
    let holders = looker.xid_holders().await.unwrap();
    assert_eq!(holders.total, 1);
    let [holder] = holders.oldest.as_slice() else {
        panic!("one transaction, whatever it consists of: {holders:?}");
    };
    assert_eq!(holder.pid, Some(pid.parse().unwrap()));
    assert_eq!(holder.application.as_deref(), Some("transfers"));
    assert_eq!(holder.state.as_deref(), Some("idle in transaction"));
    assert_eq!(holder.database.as_deref(), Some("postgres"));
    assert!(holder.age_ms.unwrap() < 60_000);
    assert_eq!(holder.prepared, None);
    let during = looker.transaction_snapshot().await.unwrap();
    assert_eq!(during, snapshot, "a beginning leaves the snapshot as it is");
    run(client, "ROLLBACK").await;
    assert_eq!(looker.xid_holders().await.unwrap(), XidHolders::default());
    let after = looker.transaction_snapshot().await.unwrap();
    assert_ne!(after, snapshot, "an end does not, also a rollback");
}

async fn a_prepared_transaction_is_seen(looker: &NodeConnection, client: &Client) {
    let sql = "BEGIN; INSERT INTO t VALUES (1); SAVEPOINT a; INSERT INTO t VALUES (2); \
               PREPARE TRANSACTION 'a \"gid\"'";
    run(client, sql).await;
    let snapshot = looker.transaction_snapshot().await.unwrap();
    let holders = looker.xid_holders().await.unwrap();
    assert_eq!(holders.total, 1);
    let [holder] = holders.oldest.as_slice() else {
        panic!("one transaction: {holders:?}");
    };
    let prepared = ("a \"gid\"".to_owned(), SUPERUSER.to_owned());
    assert_eq!(holder.prepared.as_ref(), Some(&prepared));
    assert_eq!((holder.pid, &holder.application), (None, &None));
    assert_eq!(holder.database.as_deref(), Some("postgres"));
    assert!(holder.age_ms.unwrap() < 60_000);
    run(client, "COMMIT PREPARED 'a \"gid\"'").await;
    assert_eq!(looker.xid_holders().await.unwrap(), XidHolders::default());
    assert_ne!(looker.transaction_snapshot().await.unwrap(), snapshot);
}

/// Of two transactions the older one ends: the upper bound of the snapshot stays, its list does not.
async fn an_end_below_the_bound_is_seen(looker: &NodeConnection, cluster: &Cluster) {
    let old = cluster.connect("postgres").await;
    run(&old, "BEGIN; INSERT INTO t VALUES (1)").await;
    cluster.execute("INSERT INTO t VALUES (2)").await;
    let before = looker.transaction_snapshot().await.unwrap();
    run(&old, "COMMIT").await;
    assert_ne!(looker.transaction_snapshot().await.unwrap(), before);
}

/// Whatever the database's defaults are: each look is at the present.
async fn no_setting_holds_a_look_back(looker: &NodeConnection, client: &Client) {
    for _ in 0..2 {
        let before = looker.transaction_snapshot().await.unwrap();
        run(client, "INSERT INTO t VALUES (1)").await;
        assert_ne!(looker.transaction_snapshot().await.unwrap(), before);
    }
}

#[tokio::test]
async fn transactions_are_seen_by_every_version() {
    for installation in Installation::all() {
        let scratch = Scratch::new("looks");
        let root = scratch.directory(&format!("pg{}", installation.major));
        let pairs = [
            ("max_prepared_transactions", "10"),
            ("autovacuum", "off"),
            ("default_transaction_isolation", "serializable"),
        ];
        let settings = pairs.map(|(name, value)| (name.to_owned(), value.to_owned()));
        let options = ClusterOptions {
            settings: settings.to_vec(),
            ..ClusterOptions::default()
        };
        let cluster = Cluster::create(&installation, &root, options);
        cluster.start();
        let client = cluster.connect("postgres").await;
        let table = "SET application_name = 'transfers'; CREATE TABLE t (i int)";
        run(&client, table).await;
        let looker = log_in(&cluster).await;
        looking_takes_no_id(&looker, &client).await;
        an_open_transaction_is_seen(&looker, &client).await;
        a_prepared_transaction_is_seen(&looker, &client).await;
        an_end_below_the_bound_is_seen(&looker, &cluster).await;
        no_setting_holds_a_look_back(&looker, &client).await;
    }
}
