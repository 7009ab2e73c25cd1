//! Clients that move money between nodes, each talking to the nodes itself: with two-phase commit where two
//! nodes are concerned. So a cut is right if the sum is, and every transfer is there with both legs or not at all.

use std::time::Duration;

use futures_util::future::join_all;
use support::postgres::{Cluster, query_one};
use tokio::task::JoinHandle;
use tokio_postgres::Client;
use tokio_util::sync::CancellationToken;

/// Accounts per node.
const ACCOUNTS: u32 = 200;
/// On each at the beginning.
const BALANCE: u32 = 1000;

pub(crate) async fn run(client: &Client, sql: &str) -> Result<(), String> {
    let done = client.batch_execute(sql).await;
    done.map_err(|error| format!("{sql}: {error:?}"))
}

/// Makes accounts and ledger on a node.
pub(crate) async fn prepare(cluster: &Cluster) {
    let sql = format!(
        "CREATE TABLE account (id int PRIMARY KEY, balance bigint NOT NULL);
         INSERT INTO account SELECT g, {BALANCE} FROM generate_series(1, {ACCOUNTS}) g;
         CREATE TABLE leg (transfer bigint PRIMARY KEY, amount bigint NOT NULL);"
    );
    cluster.execute(&sql).await;
}

#[derive(Debug)]
pub(crate) struct Transfers {
    stop: CancellationToken,
    clients: Vec<JoinHandle<u64>>,
}

impl Transfers {
    /// `count` clients, that pause up to `pause` between two transactions.
    pub(crate) async fn start(clusters: &[&Cluster], count: u32, pause: Duration) -> Self {
        let stop = CancellationToken::new();
        let mut clients = Vec::new();
        for number in 0..count {
            let sessions = clusters.iter().map(|cluster| cluster.connect("postgres"));
            let sessions = join_all(sessions).await;
            let stop = stop.clone();
            clients.push(tokio::spawn(async move {
                let mut done = 0;
                while !stop.is_cancelled() {
                    let transfer = u64::from(number) * 1_000_000 + done;
                    if rand::random_bool(0.2) {
                        local(&sessions, number).await.unwrap();
                    } else {
                        across(&sessions, number, transfer).await.unwrap();
                    }
                    done += 1;
                    tokio::time::sleep(pause.mul_f64(rand::random())).await;
                }
                done
            }));
        }
        Self { stop, clients }
    }

    /// Ends them. How many transactions they made.
    pub(crate) async fn stop(self) -> u64 {
        self.stop.cancel();
        let done = join_all(self.clients).await.into_iter();
        done.map(|done| done.expect("a client")).sum()
    }
}

/// An account of the client's own: clients must not wait for each other's locks across nodes for ever.
fn account(client: u32) -> u32 {
    client * 10 + rand::random_range(1..=10)
}

async fn local(sessions: &[Client], client: u32) -> Result<(), String> {
    let session = &sessions[rand::random_range(0..sessions.len())];
    let (from, to) = (account(client), account(client));
    let sql = format!(
        "BEGIN; UPDATE account SET balance = balance - 3 WHERE id = {from}; \
         UPDATE account SET balance = balance + 3 WHERE id = {to}; COMMIT"
    );
    run(session, &sql).await
}

async fn across(sessions: &[Client], client: u32, transfer: u64) -> Result<(), String> {
    let from = rand::random_range(0..sessions.len());
    let to = (from + rand::random_range(1..sessions.len())) % sessions.len();
    let write = async |session: &Client, amount: i32| {
        let id = account(client);
        let sql = format!(
            "BEGIN; UPDATE account SET balance = balance + {amount} WHERE id = {id}; \
             INSERT INTO leg VALUES ({transfer}, {amount})"
        );
        run(session, &sql).await
    };
    write(&sessions[from], -7).await?;
    write(&sessions[to], 7).await?;
    let both = async |sql: String| {
        let (one, other) = tokio::join!(run(&sessions[from], &sql), run(&sessions[to], &sql));
        one.and(other)
    };
    both(format!("PREPARE TRANSACTION 'transfer {transfer}'")).await?;
    both(format!("COMMIT PREPARED 'transfer {transfer}'")).await
}

/// As [`check`], of a point that is proved: nothing is half done either.
pub(crate) async fn check_proved(nodes: &[Client]) -> Result<usize, String> {
    for node in nodes {
        let prepared = query_one(node, "SELECT count(*) FROM pg_prepared_xacts").await;
        if prepared != "0" {
            return Err(format!("{prepared} transactions are prepared"));
        }
    }
    check(nodes).await
}

/// Holds all nodes against each other. How many transfers there are, or what is wrong.
pub(crate) async fn check(nodes: &[Client]) -> Result<usize, String> {
    let (mut sum, mut legs) = (0_i64, std::collections::BTreeMap::<i64, Vec<i64>>::new());
    for node in nodes {
        let balance = query_one(node, "SELECT sum(balance)::bigint FROM account").await;
        sum += balance.parse::<i64>().expect("a sum");
        for row in node
            .query("SELECT transfer, amount FROM leg", &[])
            .await
            .expect("the legs")
        {
            legs.entry(row.get(0)).or_default().push(row.get(1));
        }
    }
    let halves = legs
        .iter()
        .filter(|(_, legs)| legs.len() != 2 || legs[0] + legs[1] != 0);
    let halves = halves.count();
    let all = i64::from(ACCOUNTS * BALANCE) * i64::try_from(nodes.len()).expect("few nodes");
    if sum != all || halves > 0 {
        return Err(format!(
            "the sum is {sum} instead of {all}, {halves} transfers are halves"
        ));
    }
    Ok(legs.len())
}
