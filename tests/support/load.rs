//! A load on one node, and the ledger that says what a restored node must and must not have.
//!
//! Every acknowledged commit is written to a ledger outside the node, and synced there, with the node's WAL
//! positions from before the transaction began and from after its commit was acknowledged. So the
//! check needs no clock: a commit acknowledged at or before the restore point's LSN must be there, one
//! begun at or after it must not.

use std::collections::HashSet;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use tokio::io::AsyncWriteExt as _;
use tokio::task::JoinHandle;
use tokio_postgres::Client;
use tokio_util::sync::CancellationToken;

use crate::postgres::{Cluster, connect, query_one};

/// One acknowledged commit.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Entry {
    /// Which client, from 0.
    pub client: i32,
    /// The client's own count, from 1.
    pub number: i64,
    /// Insert position before the transaction began.
    pub before: u64,
    /// Insert position after the commit was acknowledged.
    pub after: u64,
}

/// What was acknowledged.
#[derive(Debug, Default)]
pub struct Ledger {
    /// In no order.
    pub entries: Vec<Entry>,
}

/// A load under way.
#[derive(Debug)]
pub struct Load {
    stop: CancellationToken,
    acknowledged: Arc<AtomicUsize>,
    writers: Vec<JoinHandle<Vec<Entry>>>,
    churn: JoinHandle<u64>,
}

/// `X/X` as a number.
///
/// # Panics
/// If `text` is something else.
pub fn lsn(text: &str) -> u64 {
    let (high, low) = text
        .split_once('/')
        .unwrap_or_else(|| panic!("`{text}` is no LSN"));
    let part = |hex: &str| u64::from_str_radix(hex, 16).unwrap_or_else(|_| panic!("`{text}`"));
    (part(high) << 32) | part(low)
}

/// Between two statements that change many rows.
const BREATH: std::time::Duration = std::time::Duration::from_millis(50);

/// Accounts per node; transfers between them keep the sum.
const ACCOUNTS: i32 = 20_000;

/// Makes the tables: names with spaces, a tablespace in `tablespace` (an empty directory of the server's
/// user), an unlogged table, and, if `big`, a relation above 1 GiB (sparse on disk).
///
/// # Panics
/// If a statement fails.
pub async fn prepare(cluster: &Cluster, tablespace: &Path, big: bool) {
    let client = cluster.connect("postgres").await;
    let place = tablespace.display();
    for sql in [
        format!("CREATE TABLESPACE \"old space\" LOCATION '{place}'"),
        "CREATE DATABASE \"shop db\"".to_owned(),
    ] {
        client
            .batch_execute(&sql)
            .await
            .unwrap_or_else(|e| panic!("{sql}: {e:?}"));
    }
    let client = cluster.connect("shop db").await;
    let sql = format!(
        "CREATE EXTENSION amcheck;
         CREATE TABLE ledger (client int, number bigint, note text, PRIMARY KEY (client, number));
         CREATE TABLE accounts (id int PRIMARY KEY, balance bigint NOT NULL, filler text);
         INSERT INTO accounts SELECT g, 1000, md5(g::text) FROM generate_series(1, {ACCOUNTS}) g;
         CREATE TABLE \"order lines\" (id bigserial PRIMARY KEY, body text) TABLESPACE \"old space\";
         INSERT INTO \"order lines\" (body) SELECT md5(g::text) FROM generate_series(1, 20000) g;
         CREATE UNLOGGED TABLE scratch (id int, body text);
         CREATE INDEX ON scratch (id);
         INSERT INTO scratch SELECT g, md5(g::text) FROM generate_series(1, 5000) g;
         CREATE TABLE churn (id int, body text);
         CREATE INDEX ON churn (id);
         INSERT INTO churn SELECT g, repeat(md5(g::text), 8) FROM generate_series(1, 20000) g;
         CREATE TABLE empties (id int);"
    );
    client.batch_execute(&sql).await.expect("the schema");
    if big {
        make_big(cluster, &client).await;
    }
    // A session of its own: making the big relation restarts the server.
    cluster.execute("CHECKPOINT").await;
}

/// A relation of 1 GiB and 16 pages: segment 0 is extended to its full size as a sparse file behind the
/// server's back while it is down (zero pages are valid empty ones), then rows go into segment 1.
async fn make_big(cluster: &Cluster, client: &Client) {
    client
        .batch_execute(
            "CREATE TABLE big (id int, body text) WITH (autovacuum_enabled = off); CHECKPOINT",
        )
        .await
        .expect("big");
    let path = query_one(client, "SELECT pg_relation_filepath('big')").await;
    cluster.stop("fast");
    let file = cluster.data_directory().join(&path);
    let segment = std::fs::OpenOptions::new()
        .write(true)
        .open(&file)
        .expect("segment 0");
    segment.set_len(1 << 30).expect("1 GiB");
    let next = PathBuf::from(format!("{}.1", file.display()));
    std::fs::File::create(&next)
        .expect("segment 1")
        .set_len(16 * 8192)
        .expect("16 pages");
    crate::os::give(&next);
    cluster.start();
    let client = cluster.connect("shop db").await;
    // Free space is unknown, so rows go to the last page, which lies in segment 1.
    let sql = "INSERT INTO big SELECT g, md5(g::text) FROM generate_series(1, 2000) g";
    client.batch_execute(sql).await.expect("rows in segment 1");
    let size = query_one(&client, "SELECT pg_relation_size('big') > 1::bigint << 30").await;
    assert_eq!(size, "t", "the big relation has a second segment");
}

impl Load {
    /// Starts `clients` writers and one client that does DDL, truncates and VACUUM FULL. Ledgers go to
    /// `directory`, one file a writer.
    pub fn start(cluster: &Cluster, directory: &Path, clients: i32) -> Self {
        let stop = CancellationToken::new();
        let acknowledged = Arc::new(AtomicUsize::new(0));
        let socket = cluster.socket_directory().to_owned();
        let port = cluster.port();
        let writers = (0..clients).map(|client| {
            let (socket, stop) = (socket.clone(), stop.clone());
            let (file, acknowledged) = (
                directory.join(format!("ledger-{port}-{client}")),
                Arc::clone(&acknowledged),
            );
            tokio::spawn(
                async move { write(&socket, port, client, &file, stop, &acknowledged).await },
            )
        });
        let writers = writers.collect();
        let churn = tokio::spawn(churn(socket, port, stop.clone()));
        Self {
            stop,
            acknowledged,
            writers,
            churn,
        }
    }

    /// Waits for `more` acknowledged commits.
    ///
    /// # Panics
    /// If they do not come within two minutes.
    pub async fn goes_on(&self, more: usize) {
        let so_far = || self.acknowledged.load(Ordering::Relaxed);
        let wanted = so_far() + more;
        let enough = async {
            while so_far() < wanted {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        };
        let done = tokio::time::timeout(Duration::from_mins(2), enough).await;
        done.unwrap_or_else(|_| panic!("the writers stand still at {} commits", so_far()));
    }

    /// Stops it and returns what was acknowledged.
    ///
    /// # Panics
    /// If a client met an error it did not expect.
    pub async fn stop(self) -> Ledger {
        self.stop.cancel();
        let mut ledger = Ledger::default();
        for writer in self.writers {
            ledger
                .entries
                .extend(writer.await.expect("a writer that ends well"));
        }
        self.churn.await.expect("churn that ends well");
        ledger
    }
}

async fn write(
    socket: &Path,
    port: u16,
    client: i32,
    file: &Path,
    stop: CancellationToken,
    acknowledged: &AtomicUsize,
) -> Vec<Entry> {
    let session = connect(socket, port, "shop db").await;
    let mut ledger = tokio::fs::File::create(file).await.expect("a ledger");
    let mut entries = Vec::new();
    let position = "SELECT pg_current_wal_insert_lsn()";
    for number in 1.. {
        if stop.is_cancelled() {
            break;
        }
        let before = lsn(&query_one(&session, position).await);
        let (from, to) = (
            rand::random_range(1..=ACCOUNTS),
            rand::random_range(1..=ACCOUNTS),
        );
        // Always in the order of ids, so that writers do not deadlock.
        let (low, high, sign) = if from < to {
            (from, to, 1)
        } else {
            (to, from, -1)
        };
        let sql = format!(
            "BEGIN;
             INSERT INTO ledger VALUES ({client}, {number}, repeat(md5(random()::text), 20));
             UPDATE accounts SET balance = balance - {sign} WHERE id = {low};
             UPDATE accounts SET balance = balance + {sign} WHERE id = {high} AND {low} <> {high};
             UPDATE accounts SET balance = balance + {sign} WHERE id = {low} AND {low} = {high};
             INSERT INTO \"order lines\" (body) VALUES (repeat(md5(random()::text), 10));
             COMMIT"
        );
        if session.batch_execute(&sql).await.is_err() {
            break; // The database went away: not acknowledged, so not in the ledger.
        }
        let after = lsn(&query_one(&session, position).await);
        let line = format!("{client} {number} {before:X} {after:X}\n");
        ledger.write_all(line.as_bytes()).await.expect("ledger");
        ledger.sync_data().await.expect("ledger synced");
        entries.push(Entry {
            client,
            number,
            before,
            after,
        });
        acknowledged.fetch_add(1, Ordering::Relaxed);
    }
    entries
}

async fn churn(socket: PathBuf, port: u16, stop: CancellationToken) -> u64 {
    let session = connect(&socket, port, "shop db").await;
    let mut rounds = 0;
    while !stop.is_cancelled() {
        rounds += 1;
        for sql in [
            format!(
                "CREATE TABLE \"new table {rounds}\" AS SELECT g, md5(g::text) FROM generate_series(1, 2000) g"
            ),
            "UPDATE churn SET body = repeat(md5(random()::text), 8) WHERE id % 3 = 0".to_owned(),
            "TRUNCATE empties; INSERT INTO empties SELECT generate_series(1, 1000)".to_owned(),
            "VACUUM FULL churn".to_owned(),
            "INSERT INTO scratch SELECT g, md5(g::text) FROM generate_series(1, 500) g".to_owned(),
            format!("DROP TABLE IF EXISTS \"new table {}\"", rounds - 1),
            "ALTER TABLE churn ADD COLUMN extra int; ALTER TABLE churn DROP COLUMN extra"
                .to_owned(),
        ] {
            if stop.is_cancelled() || session.batch_execute(&sql).await.is_err() {
                return rounds;
            }
            // Rewriting tables is WAL by the hundred megabytes: as much as a slow machine can carry away.
            tokio::time::sleep(BREATH).await;
        }
    }
    rounds
}

/// What a restored node had.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Verdict {
    /// Commits acknowledged at or before the point: all were found.
    pub required: usize,
    /// Of these, begun after the base copy had ended: only WAL can have brought them.
    pub from_wal: usize,
    /// Commits begun at or after the point: none was found.
    pub forbidden: usize,
}

impl Ledger {
    /// Holds a restored node against the ledger. `end` is the end of the restore point's record, `stop` the end of
    /// the base copy.
    ///
    /// # Errors
    /// What is missing, too much, or broken, in words.
    pub async fn check(&self, restored: &Client, stop: u64, end: u64) -> Result<Verdict, String> {
        let rows = restored
            .query("SELECT client, number FROM ledger", &[])
            .await;
        let rows = rows.map_err(|e| format!("the ledger table cannot be read: {e:?}"))?;
        let present: HashSet<(i32, i64)> =
            rows.iter().map(|row| (row.get(0), row.get(1))).collect();
        let has = |entry: &&Entry| present.contains(&(entry.client, entry.number));
        let required: Vec<_> = self
            .entries
            .iter()
            .filter(|entry| entry.after <= end)
            .collect();
        if let Some(lost) = required.iter().find(|entry| !has(entry)) {
            return Err(format!("acknowledged before the point and lost: {lost:?}"));
        }
        let forbidden: Vec<_> = self
            .entries
            .iter()
            .filter(|entry| entry.before >= end)
            .collect();
        if let Some(extra) = forbidden.iter().find(|entry| has(entry)) {
            return Err(format!("begun after the point and there: {extra:?}"));
        }
        let sum = query_one(restored, "SELECT sum(balance) FROM accounts").await;
        if sum != (i64::from(ACCOUNTS) * 1000).to_string() {
            return Err(format!("the accounts' sum is {sum}"));
        }
        let unlogged = query_one(restored, "SELECT count(*) FROM scratch").await;
        if unlogged != "0" {
            return Err(format!(
                "the unlogged table has {unlogged} rows and should have been reset"
            ));
        }
        let from_wal = required.iter().filter(|entry| entry.before >= stop).count();
        Ok(Verdict {
            required: required.len(),
            from_wal,
            forbidden: forbidden.len(),
        })
    }
}
