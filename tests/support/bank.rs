//! A bank: accounts and a ledger, sharded over nodes, and clients that move money between them in every way that
//! there is: through each proxy (simple and prepared statements, batches that pass the proxy's lock, autocommit),
//! and straight to a node (in one, and in two with two-phase commit). The ledger has all legs of every transfer. So
//! whatever moment is recovered to, it can be said whether it is one: [`check`].

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use futures_util::future::join_all;
use jiff::Timestamp;
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

use crate::raw::LogIn;

mod check;
mod client;
mod plan;
pub mod wire;

pub use check::{Verdict, Window, check};
use client::Client;

/// Accounts on each node.
pub const ACCOUNTS: i64 = 400;
/// On each account at the beginning.
pub const BALANCE: i64 = 10_000;

/// The tables, as a proxy and a node understand them. Both are sharded by `id` modulo the number of nodes.
pub const TABLES: [&str; 2] = [
    "CREATE TABLE account (id BIGINT PRIMARY KEY, balance BIGINT NOT NULL)",
    "CREATE TABLE ledger (id BIGINT PRIMARY KEY, transfer BIGINT NOT NULL, legs BIGINT NOT NULL, \
     account BIGINT NOT NULL, amount BIGINT NOT NULL)",
];

/// What fills the accounts of node `shard` of `nodes`, said to the node itself.
pub fn fill(shard: usize, nodes: usize) -> String {
    format!(
        "INSERT INTO account SELECT g * {nodes} + {shard}, {BALANCE} FROM generate_series(0, {ACCOUNTS} - 1) g"
    )
}

/// How a client works.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// Simple statements through a proxy, in a transaction.
    Simple,
    /// Prepared ones.
    Prepared,
    /// Four Bind and Execute before one Sync, in a transaction: pass the lock.
    Batch,
    /// A single statement without a transaction around it: one row of the ledger, that moves nothing.
    Autocommit,
    /// Straight to one node: passes the lock.
    OneNode,
    /// Straight to two nodes, with two-phase commit by gid: passes the lock.
    TwoPhase,
}

/// How many clients there are of each kind.
#[derive(Debug, Clone, Copy, Default)]
pub struct Mix {
    /// [`Kind::Simple`]
    pub simple: usize,
    /// [`Kind::Prepared`]
    pub prepared: usize,
    /// [`Kind::Batch`]
    pub batch: usize,
    /// [`Kind::Autocommit`]
    pub autocommit: usize,
    /// [`Kind::OneNode`]
    pub one_node: usize,
    /// [`Kind::TwoPhase`]
    pub two_phase: usize,
}

impl Mix {
    fn kinds(&self) -> Vec<Kind> {
        let counts = [
            (Kind::Simple, self.simple),
            (Kind::Prepared, self.prepared),
            (Kind::Batch, self.batch),
            (Kind::Autocommit, self.autocommit),
            (Kind::OneNode, self.one_node),
            (Kind::TwoPhase, self.two_phase),
        ];
        let each = counts.iter().map(|(kind, count)| vec![*kind; *count]);
        each.flatten().collect()
    }
}

/// How a bank works.
#[derive(Debug, Clone, Copy)]
pub struct BankOptions {
    /// What every client's choices follow from.
    pub seed: u64,
    /// Who works.
    pub mix: Mix,
    /// Clients that the lock stops pause for up to this between two transfers.
    pub pause: Duration,
    /// Those that it does not stop, for up to this: they alone leave a point no gap otherwise.
    pub passing_pause: Duration,
    /// Different for each bank on the same tables, below 1000: numbers of transfers begin with it.
    pub shift: i64,
}

/// Ways to the tables.
#[derive(Debug, Clone)]
pub struct Ways {
    /// Through the proxies.
    pub proxies: Vec<LogIn>,
    /// Straight to the nodes, in the order of their shards.
    pub nodes: Vec<Node>,
}

/// A node: over its unix socket, as superuser.
#[derive(Debug, Clone)]
pub struct Node {
    /// Where the socket lies.
    pub socket: PathBuf,
    /// Port.
    pub port: u16,
    /// Database with the tables.
    pub database: String,
}

/// What became of a transfer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Outcome {
    /// Its commit was acknowledged, at this time.
    Acknowledged(Timestamp),
    /// Its commit was sent, and no good answer came.
    Unknown,
    /// No commit was sent, or all of it was rolled back.
    RolledBack,
}

/// One transfer, by its client.
#[derive(Debug, Clone, Copy)]
pub struct Entry {
    /// Its number.
    pub transfer: i64,
    /// Whose.
    pub kind: Kind,
    /// Before its first statement was sent.
    pub begun: Timestamp,
    /// Its end.
    pub outcome: Outcome,
}

/// What the clients know.
#[derive(Debug, Default)]
pub struct Diary {
    /// In no order.
    pub entries: Vec<Entry>,
    /// Statements that a proxy's lock refused.
    pub refused: u64,
    /// Other errors.
    pub errors: Vec<String>,
}

impl Diary {
    /// Adds what others know.
    pub fn join(&mut self, other: Self) {
        self.entries.extend(other.entries);
        self.refused += other.refused;
        self.errors.extend(other.errors);
    }

    /// How many commits were acknowledged, of one kind or of all.
    pub fn acknowledged(&self, kind: Option<Kind>) -> usize {
        let of_kind = self
            .entries
            .iter()
            .filter(|entry| kind.is_none_or(|kind| entry.kind == kind));
        of_kind
            .filter(|entry| matches!(entry.outcome, Outcome::Acknowledged(_)))
            .count()
    }

    /// In a line.
    pub fn describe(&self) -> String {
        let of = |kind| self.acknowledged(Some(kind));
        let unknown = self
            .entries
            .iter()
            .filter(|entry| entry.outcome == Outcome::Unknown)
            .count();
        let rolled_back = self.entries.len() - self.acknowledged(None) - unknown;
        let mut line = format!(
            "{} commits acknowledged (simple {}, prepared {}, batch {}, autocommit {}, one node {}, two-phase {}), {rolled_back} \
             rolled back, {unknown} unknown, {} statements refused by the lock, {} other errors",
            self.acknowledged(None),
            of(Kind::Simple),
            of(Kind::Prepared),
            of(Kind::Batch),
            of(Kind::Autocommit),
            of(Kind::OneNode),
            of(Kind::TwoPhase),
            self.refused,
            self.errors.len(),
        );
        if let Some(error) = self.errors.first() {
            line += &format!(", the first: {error}");
        }
        line
    }
}

/// A bank at work.
#[derive(Debug)]
pub struct Bank {
    stop: CancellationToken,
    clients: Vec<JoinHandle<Diary>>,
    acknowledged: Arc<AtomicU64>,
}

impl Bank {
    /// Opens it. Each client goes through one proxy, in turn.
    ///
    /// # Panics
    /// If a client of a proxy is wanted, and there is none.
    pub fn open(ways: &Ways, options: &BankOptions) -> Self {
        let (stop, acknowledged) = (CancellationToken::new(), Arc::new(AtomicU64::new(0)));
        let kinds = options.mix.kinds();
        assert!(
            i64::try_from(kinds.len()).expect("few") <= plan::CLIENTS,
            "a client has accounts of its own, and there are {} sets",
            plan::CLIENTS
        );
        let clients = kinds.into_iter().enumerate().map(|(number, kind)| {
            let client = Client::new(
                number,
                kind,
                ways.clone(),
                options,
                Arc::clone(&acknowledged),
            );
            tokio::spawn(client.work(stop.clone()))
        });
        let clients = clients.collect();
        Self {
            stop,
            clients,
            acknowledged,
        }
    }

    /// Commits that were acknowledged so far.
    pub fn so_far(&self) -> u64 {
        self.acknowledged.load(Ordering::Relaxed)
    }

    /// Waits until `more` commits more are acknowledged.
    ///
    /// # Panics
    /// If that takes a minute.
    pub async fn goes_on(&self, more: u64) {
        let wanted = self.so_far() + more;
        let enough = async {
            while self.so_far() < wanted {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        };
        let done = tokio::time::timeout(Duration::from_mins(1), enough).await;
        done.unwrap_or_else(|_| panic!("the clients stand still at {} commits", self.so_far()));
    }

    /// Closes it: each client ends the transfer that it is about.
    ///
    /// # Panics
    /// If a client did.
    pub async fn close(self) -> Diary {
        self.stop.cancel();
        let mut all = Diary::default();
        for diary in join_all(self.clients).await {
            all.join(diary.expect("a client"));
        }
        all
    }
}
