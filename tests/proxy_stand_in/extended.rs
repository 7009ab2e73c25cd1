//! The extended protocol: prepared statements of a driver, and batches that pass the lock.

use support::bank::wire::{Session, WireError};
use support::proxy::{Clock, Frontend, ProxyFarm, ProxyFarmOptions};
use support::raw::LogIn;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;

use super::bank::*;

fn access(farm: &ProxyFarm, i: usize) -> LogIn {
    LogIn {
        port: farm.port(i),
        user: "root".to_owned(),
        password: "root".to_owned(),
        database: "bank".to_owned(),
        minor: 0,
    }
}

fn state(error: &tokio_postgres::Error) -> &str {
    error.code().map_or("", |state| state.code())
}

#[tokio::test]
async fn a_driver_s_prepared_statements_are_routed_and_merged() {
    let nodes = Nodes::start(1).await;
    let farm = ProxyFarm::start(nodes.options());
    let client = client(&farm, 0).await;
    let insert = client
        .prepare("INSERT INTO account VALUES ($1, $2)")
        .await
        .unwrap();
    for id in 1..=6_i64 {
        assert_eq!(
            client.execute(&insert, &[&id, &(id * 10)]).await.unwrap(),
            1
        );
    }
    let divided = "INSERT INTO account (balance, id) VALUES ($1, $2), ($3, $4), ($5, $6)";
    let values: [i64; 6] = [1, 7, 1, 8, 1, 9];
    let values: Vec<_> = values
        .iter()
        .map(|v| v as &(dyn tokio_postgres::types::ToSql + Sync))
        .collect();
    client.execute(divided, &values).await.unwrap();
    assert_eq!(
        nodes
            .ask(
                0,
                "SELECT string_agg(id::text, ' ' ORDER BY id) FROM account"
            )
            .await,
        "2 4 6 8"
    );
    assert_eq!(
        nodes
            .ask(
                1,
                "SELECT string_agg(id::text, ' ' ORDER BY id) FROM account"
            )
            .await,
        "1 3 5 7 9"
    );
    // Numbers come back in binary.
    let row = client
        .query_one("SELECT count(*), sum(balance)::bigint FROM account", &[])
        .await
        .unwrap();
    assert_eq!((row.get::<_, i64>(0), row.get::<_, i64>(1)), (9, 213));
    let rows = client
        .query(
            "SELECT id, balance FROM account WHERE balance > $1 ORDER BY id DESC LIMIT 3",
            &[&15_i64],
        )
        .await
        .unwrap();
    let ids: Vec<i64> = rows.iter().map(|row| row.get(0)).collect();
    assert_eq!(ids, [6, 5, 4]);
    let row = client
        .query_one("SELECT balance FROM account WHERE id = $1", &[&5_i64])
        .await
        .unwrap();
    assert_eq!(row.get::<_, i64>(0), 50);
    let changed = client
        .execute("UPDATE account SET balance = balance + $1", &[&1_i64])
        .await
        .unwrap();
    assert_eq!(changed, 9);
    // An error, and the session goes on after its Sync.
    let error = client
        .execute(&insert, &[&1_i64, &1_i64])
        .await
        .unwrap_err();
    assert_eq!(state(&error), "23505");
    assert_eq!(
        client.execute(&insert, &[&11_i64, &1_i64]).await.unwrap(),
        1
    );
}

#[tokio::test]
async fn distsql_cannot_be_prepared() {
    let nodes = Nodes::start(1).await;
    let farm = ProxyFarm::start(nodes.options());
    let outside = client_in(&farm, 0, "postgres").await;
    let error = outside.query("SHOW COMPUTE NODES", &[]).await.unwrap_err();
    assert!(
        error
            .as_db_error()
            .unwrap()
            .message()
            .contains("Can not find aggregated data source")
    );
    let inside = client(&farm, 0).await;
    let error = inside.query(PROBE, &[]).await.unwrap_err();
    assert_eq!(state(&error), "42601");
}

#[tokio::test]
async fn three_in_a_batch_pass_the_lock_and_two_do_not() {
    let nodes = Nodes::start(1).await;
    let farm = ProxyFarm::start(nodes.options());
    run(&client(&farm, 0).await, LOCK).await;
    let mut batcher = Session::open(&access(&farm, 1)).await.unwrap();
    let sql = "INSERT INTO account VALUES ($1, $2)";
    for count in [1, 2] {
        let rows: Vec<_> = (0..count).map(|id| vec![id, 5]).collect();
        let error = batcher.batch(sql, &rows).await.unwrap_err();
        assert!(error.is_lock(), "{error}");
        assert_eq!(nodes.sum().await, 0);
    }
    let rows: Vec<_> = (0..3).map(|id| vec![id, 5]).collect();
    batcher.batch(sql, &rows).await.unwrap();
    assert_eq!(nodes.sum().await, 15);
    // A whole transaction of them, COMMIT too.
    batcher.query("BEGIN").await.unwrap();
    let add = "UPDATE account SET balance = balance + $2 WHERE id = $1";
    batcher
        .batch(add, &[vec![0, 1], vec![1, 1], vec![2, 1]])
        .await
        .unwrap();
    assert_eq!(nodes.sum().await, 15);
    batcher.query("COMMIT").await.unwrap();
    assert_eq!(nodes.sum().await, 18);
    assert!(batcher.execute(add, &[1, 1]).await.unwrap_err().is_lock());
}

#[tokio::test]
async fn a_batch_that_a_node_refuses_fails_its_transaction() {
    let nodes = Nodes::start(1).await;
    let farm = ProxyFarm::start(nodes.options());
    let mut session = Session::open(&access(&farm, 0)).await.unwrap();
    session
        .batch(
            "INSERT INTO account VALUES ($1, $2)",
            &[vec![1, 1], vec![2, 1], vec![3, 1]],
        )
        .await
        .unwrap();
    session.query("BEGIN").await.unwrap();
    // The same key twice: the node refuses it.
    let twice = [vec![4, 1], vec![4, 1], vec![6, 1]];
    let refused = session
        .batch("INSERT INTO account VALUES ($1, $2)", &twice)
        .await;
    assert!(matches!(refused, Err(WireError::Refused { code, .. }) if code == "23505"));
    let next = session.query("SELECT 1").await.unwrap_err().to_string();
    assert!(next.contains("Current transaction is aborted"), "{next}");
    session.query("COMMIT").await.unwrap();
    assert_eq!(nodes.sum().await, 3);
}

#[tokio::test]
async fn a_prepared_change_that_the_lock_refuses_fails_its_transaction() {
    let nodes = Nodes::start(1).await;
    let farm = ProxyFarm::start(nodes.options());
    let mut session = Session::open(&access(&farm, 0)).await.unwrap();
    session
        .query("INSERT INTO account VALUES (1, 100), (2, 100)")
        .await
        .unwrap();
    session.query("BEGIN").await.unwrap();
    let add = "UPDATE account SET balance = balance + $2 WHERE id = $1";
    session.execute(add, &[1, -5]).await.unwrap();
    run(&client(&farm, 1).await, LOCK).await;
    assert!(session.execute(add, &[2, 5]).await.unwrap_err().is_lock());
    let error = session.query("SELECT 1").await.unwrap_err().to_string();
    assert!(error.contains("Current transaction is aborted"), "{error}");
    // Which rolls back.
    session.query("COMMIT").await.unwrap();
    assert_eq!(nodes.sum().await, 200);
}

#[tokio::test]
async fn the_clock_goes_on_at_each_commit_and_not_at_autocommit() {
    let nodes = Nodes::start(1).await;
    let start = |clock| {
        ProxyFarm::start(ProxyFarmOptions {
            clock,
            ..nodes.options()
        })
    };
    let shared = start(Clock::TsoRedis);
    let before = shared.csn();
    for i in 0..2 {
        let client = client(&shared, i).await;
        run(&client, "INSERT INTO account VALUES (1, 1)").await;
        run(&client, "BEGIN").await;
        run(&client, "DELETE FROM account").await;
        run(&client, "COMMIT").await;
        run(&client, "BEGIN").await;
        run(&client, "ROLLBACK").await;
    }
    assert_eq!(shared.csn(), before + 2);
    let off = start(Clock::Off);
    let rule = |row: &Vec<Vec<String>>| row[0][..3].join(" ");
    assert_eq!(
        rule(&run(&client(&shared, 0).await, "SHOW GLOBAL CLOCK RULE").await),
        "TSO redis true"
    );
    assert_eq!(
        rule(&run(&client(&off, 0).await, "SHOW GLOBAL CLOCK RULE").await),
        "TSO local false"
    );
}

/// Messages, one after the other, byte by byte.
#[derive(Default)]
struct Messages(Vec<u8>);

impl Messages {
    fn add(mut self, kind: u8, body: &[u8]) -> Self {
        self.0.push(kind);
        let length = u32::try_from(body.len() + 4).unwrap();
        self.0.extend(length.to_be_bytes());
        self.0.extend(body);
        self
    }

    /// An unnamed statement, the types of its parameters not given.
    fn parse(self, sql: &str) -> Self {
        self.add(b'P', format!("\0{sql}\0\0\0").as_bytes())
    }

    /// With one value, as text.
    fn bind_and_execute(self, value: &str) -> Self {
        let length = u32::try_from(value.len()).unwrap().to_be_bytes();
        let body = [b"\0\0\0\0\0\x01", &length[..], value.as_bytes(), b"\0\0"].concat();
        self.add(b'B', &body).add(b'E', b"\0\0\0\0\0")
    }
}

/// A session, byte by byte.
struct Raw(TcpStream);

impl Raw {
    async fn open(farm: &ProxyFarm) -> Self {
        let mut raw = Self(
            TcpStream::connect(("127.0.0.1", farm.port(0)))
                .await
                .unwrap(),
        );
        let start = b"\0\x03\0\0user\0root\0database\0bank\0\0";
        let length = u32::try_from(start.len() + 4).unwrap().to_be_bytes();
        raw.0
            .write_all(&[&length[..], start].concat())
            .await
            .unwrap();
        let password = Messages::default().add(b'p', b"root\0");
        assert!(raw.send(password).await.starts_with("RRSSSSS"));
        raw
    }

    /// Kinds of the messages up to `ReadyForQuery` with its status, an error with its SQLSTATE.
    async fn send(&mut self, messages: Messages) -> String {
        self.0.write_all(&messages.0).await.unwrap();
        let mut kinds = String::new();
        loop {
            let kind = char::from(self.0.read_u8().await.unwrap());
            let length = self.0.read_u32().await.unwrap();
            let mut body = vec![0; usize::try_from(length).unwrap() - 4];
            self.0.read_exact(&mut body).await.unwrap();
            kinds.push(kind);
            match kind {
                'Z' => return kinds + str::from_utf8(&body).unwrap(),
                'E' => {
                    let fields = String::from_utf8(body).unwrap();
                    let state = fields.split('\0').find_map(|field| field.strip_prefix('C'));
                    kinds += state.unwrap();
                }
                _ => {}
            }
        }
    }
}

#[tokio::test]
async fn messages_up_to_sync_are_one_and_after_an_error_nothing_more_is_done() {
    let nodes = Nodes::start(1).await;
    let farm = ProxyFarm::start(ProxyFarmOptions {
        frontend: Frontend::PostgresCleartext,
        ..nodes.options()
    });
    let mut raw = Raw::open(&farm).await;
    let insert = || Messages::default().parse("INSERT INTO account VALUES ($1, 1)");
    let good = insert()
        .bind_and_execute("1")
        .bind_and_execute("2")
        .add(b'S', b"");
    assert_eq!(raw.send(good).await, "12C2CZI");
    // The second fails: of the first nothing is told, though it was done, and the third is not.
    let bad = insert()
        .bind_and_execute("3")
        .bind_and_execute("1")
        .parse("SELECT 1")
        .add(b'S', b"");
    assert_eq!(raw.send(bad).await, "E23505ZI");
    assert_eq!(nodes.sum().await, 3);
    // After Flush everything is skipped up to the next Sync.
    let flushed = insert()
        .bind_and_execute("1")
        .add(b'H', b"")
        .bind_and_execute("5");
    assert_eq!(raw.send(flushed.add(b'S', b"")).await, "E23505ZI");
    assert_eq!(nodes.sum().await, 3);
    // A batch whose key has no type fails, unless a node was asked for it before.
    let batch = |messages: Messages| {
        let messages = messages.bind_and_execute("6").bind_and_execute("7");
        messages.bind_and_execute("8").add(b'S', b"")
    };
    assert_eq!(raw.send(batch(insert())).await, "E44000ZI");
    assert_eq!(
        raw.send(batch(insert().add(b'D', b"S\0"))).await,
        "1tn2C2C2CZI"
    );
    assert_eq!(nodes.sum().await, 6);
    // Rows can be fetched in portions.
    let portions = Messages::default()
        .parse("SELECT id FROM account WHERE id > $1 ORDER BY id")
        .add(b'B', b"\0\0\0\0\0\x01\0\0\0\x010\0\0")
        .add(b'D', b"P\0")
        .add(b'E', b"\0\0\0\0\x04")
        .add(b'E', b"\0\0\0\0\x04")
        .add(b'C', b"P\0")
        .add(b'S', b"");
    assert_eq!(raw.send(portions).await, "12TDDDDsDDC3ZI");
    // A transaction's status, also after an error.
    let query = |sql: &str| Messages::default().add(b'Q', format!("{sql}\0").as_bytes());
    assert_eq!(raw.send(query("BEGIN")).await, "CZT");
    assert_eq!(raw.send(query("fly")).await, "E99999ZE");
    assert_eq!(raw.send(query("SELECT 1")).await, "TDCZT");
    assert_eq!(raw.send(query("COMMIT")).await, "CZI");
    assert_eq!(raw.send(query("")).await, "IZI");
    assert_eq!(raw.send(query("SET x = 1")).await, "CSZI");
}
