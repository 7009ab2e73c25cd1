//! One client: well-behaved, that is, whatever is refused is rolled back, and the next transfer tried.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use futures_util::future::try_join_all;
use jiff::Timestamp;
use rand::rngs::StdRng;
use rand::{RngExt as _, SeedableRng as _};
use tokio_postgres::{Client as Direct, NoTls};
use tokio_util::sync::CancellationToken;

use super::plan::{Leg, Plan, Planner};
use super::wire::{Session, WireError};
use super::{BankOptions, Diary, Entry, Kind, Node, Outcome, Ways};
use crate::postgres::SUPERUSER;

const MOVE: &str = "UPDATE account SET balance = balance + $1 WHERE id = $2";
const NOTE: &str =
    "INSERT INTO ledger (id, transfer, legs, account, amount) VALUES ($1, $2, $3, $4, $5)";
/// Errors that a client keeps the words of.
const KEPT: usize = 20;

/// A client of one kind.
pub(super) struct Client {
    number: usize,
    kind: Kind,
    ways: Ways,
    pause: Duration,
    pauses: StdRng,
    planner: Planner,
    acknowledged: Arc<AtomicU64>,
    diary: Diary,
}

/// Why a transfer did not end well.
#[derive(Debug)]
struct Failed {
    error: WireError,
    outcome: Outcome,
}

impl Failed {
    /// Nothing of it remains.
    fn undone(error: WireError) -> Self {
        Self {
            error,
            outcome: Outcome::RolledBack,
        }
    }

    /// Its commit was sent.
    fn unknown(error: WireError) -> Self {
        Self {
            error,
            outcome: Outcome::Unknown,
        }
    }
}

impl Client {
    pub(super) fn new(
        number: usize,
        kind: Kind,
        ways: Ways,
        options: &BankOptions,
        acknowledged: Arc<AtomicU64>,
    ) -> Self {
        let passes = matches!(kind, Kind::Batch | Kind::OneNode | Kind::TwoPhase);
        Self {
            number,
            kind,
            pause: if passes {
                options.passing_pause
            } else {
                options.pause
            },
            // Of their own: how many there are depends on what fails, and no plan may.
            pauses: StdRng::seed_from_u64(options.seed ^ number as u64),
            planner: Planner::new(number, kind, ways.nodes.len(), options.seed, options.shift),
            ways,
            acknowledged,
            diary: Diary::default(),
        }
    }

    /// Works until `stop`, and ends the transfer that it is about.
    pub(super) async fn work(mut self, stop: CancellationToken) -> Diary {
        if matches!(self.kind, Kind::OneNode | Kind::TwoPhase) {
            self.at_the_nodes(&stop).await;
        } else {
            self.at_a_proxy(&stop).await;
        }
        self.diary
    }

    async fn at_a_proxy(&mut self, stop: &CancellationToken) {
        let access = self.ways.proxies[self.number % self.ways.proxies.len()].clone();
        let mut session = None;
        while !stop.is_cancelled() {
            let open = match session.take() {
                Some(open) => Ok(open),
                None => Session::open(&access).await,
            };
            match open {
                Ok(mut open) => {
                    let (plan, begun) = (self.planner.next(), Timestamp::now());
                    let ended = through(&mut open, self.kind, &plan).await;
                    if self.note(&plan, begun, ended) {
                        session = Some(open);
                    }
                }
                Err(error) => self.error(&error),
            }
            self.rest(stop, session.is_none()).await;
        }
    }

    async fn at_the_nodes(&mut self, stop: &CancellationToken) {
        let mut sessions = None;
        while !stop.is_cancelled() {
            let open = match sessions.take() {
                Some(open) => Ok(open),
                None => try_join_all(self.ways.nodes.iter().map(connect)).await,
            };
            match open {
                Ok(open) => {
                    let (plan, begun) = (self.planner.next(), Timestamp::now());
                    let ended = directly(&open, &plan).await;
                    if self.note(&plan, begun, ended) {
                        sessions = Some(open);
                    }
                }
                Err(error) => self.error(&of_node(&error)),
            }
            self.rest(stop, sessions.is_none()).await;
        }
    }

    /// Writes down what became of a transfer. Whether the session can be used further.
    fn note(&mut self, plan: &Plan, begun: Timestamp, ended: Result<(), Failed>) -> bool {
        let (outcome, goes_on) = match ended {
            Ok(()) => {
                self.acknowledged.fetch_add(1, Ordering::Relaxed);
                (Outcome::Acknowledged(Timestamp::now()), true)
            }
            Err(failed) => {
                self.error(&failed.error);
                (
                    failed.outcome,
                    matches!(failed.error, WireError::Refused { .. }),
                )
            }
        };
        self.diary.entries.push(Entry {
            transfer: plan.transfer,
            kind: self.kind,
            begun,
            outcome,
        });
        goes_on
    }

    fn error(&mut self, error: &WireError) {
        if error.is_lock() {
            self.diary.refused += 1;
        } else if self.diary.errors.len() < KEPT {
            self.diary
                .errors
                .push(format!("{:?} client {}: {error}", self.kind, self.number));
        }
    }

    async fn rest(&mut self, stop: &CancellationToken, lost: bool) {
        let mut pause = self.pause.mul_f64(self.pauses.random());
        if lost {
            pause += Duration::from_millis(100);
        }
        let _ = tokio::time::timeout(pause, stop.cancelled()).await;
    }
}

/// One transfer through a proxy.
async fn through(session: &mut Session, kind: Kind, plan: &Plan) -> Result<(), Failed> {
    if kind == Kind::Autocommit {
        let done = match session
            .query(&filled(NOTE, &note(plan, &plan.legs[0])))
            .await
        {
            Ok(_) => Ok(()),
            // A statement that is refused has done nothing.
            Err(error @ WireError::Refused { .. }) => Err(Failed::undone(error)),
            Err(error) => Err(Failed::unknown(error)),
        };
        return done;
    }
    if let Err(error) = statements(session, kind, plan).await {
        if matches!(error, WireError::Refused { .. })
            && let Err(second) = session.query("ROLLBACK").await
        {
            return Err(Failed::undone(second));
        }
        return Err(Failed::undone(error));
    }
    session
        .query("COMMIT")
        .await
        .map(|_| ())
        .map_err(Failed::unknown)
}

/// All of a transfer but its commit.
async fn statements(session: &mut Session, kind: Kind, plan: &Plan) -> Result<(), WireError> {
    session.query("BEGIN").await?;
    let moves = plan
        .legs
        .iter()
        .map(|leg| (MOVE, vec![leg.amount, leg.account]));
    let notes = plan.legs.iter().map(|leg| (NOTE, note(plan, leg)));
    if kind == Kind::Batch {
        let moves: Vec<_> = moves.map(|(_, values)| values).collect();
        let notes: Vec<_> = notes.map(|(_, values)| values).collect();
        session.batch(MOVE, &moves).await?;
        return session.batch(NOTE, &notes).await;
    }
    for (sql, values) in moves.chain(notes) {
        if kind == Kind::Prepared {
            session.execute(sql, &values).await?;
        } else {
            session.query(&filled(sql, &values)).await?;
        }
    }
    Ok(())
}

fn note(plan: &Plan, leg: &Leg) -> Vec<i64> {
    let legs = i64::try_from(plan.legs.len()).expect("few legs");
    vec![leg.id, plan.transfer, legs, leg.account, leg.amount]
}

/// The statement with its parameters in place.
fn filled(sql: &str, values: &[i64]) -> String {
    let mut sql = sql.to_owned();
    if values[0] < 0 {
        sql = sql.replace("+ $1 ", &format!("- {} ", -values[0]));
    }
    for (number, value) in values.iter().enumerate() {
        sql = sql.replace(&format!("${}", number + 1), &value.to_string());
    }
    sql
}

/// One transfer straight to the nodes: in one transaction if they are on one, else in two phases.
async fn directly(nodes: &[Direct], plan: &Plan) -> Result<(), Failed> {
    let count = i64::try_from(nodes.len()).expect("few nodes");
    let mut work: Vec<(usize, String)> = Vec::new();
    for leg in &plan.legs {
        let shard = usize::try_from(leg.account % count).expect("a shard");
        let moved = filled(MOVE, &[leg.amount, leg.account]);
        let sql = format!("{moved}; {}; ", filled(NOTE, &note(plan, leg)));
        match work.iter_mut().find(|(at, _)| *at == shard) {
            Some((_, all)) => all.push_str(&sql),
            None => work.push((shard, sql)),
        }
    }
    if let [(shard, sql)] = work.as_slice() {
        let whole = nodes[*shard]
            .batch_execute(&format!("BEGIN; {sql}COMMIT"))
            .await;
        return whole.map_err(|error| Failed::unknown(of_node(&error)));
    }
    let gid = format!("bank_{}", plan.transfer);
    for (number, (shard, sql)) in work.iter().enumerate() {
        let prepared = nodes[*shard]
            .batch_execute(&format!("BEGIN; {sql}PREPARE TRANSACTION '{gid}'"))
            .await;
        if let Err(error) = prepared {
            return Err(give_up(nodes, &work[..=number], &gid, of_node(&error)).await);
        }
    }
    for (shard, _) in &work {
        let committed = nodes[*shard]
            .batch_execute(&format!("COMMIT PREPARED '{gid}'"))
            .await;
        committed.map_err(|error| Failed::unknown(of_node(&error)))?;
    }
    Ok(())
}

/// Rolls back what is prepared on all but the last of `work`, and what is open there.
async fn give_up(
    nodes: &[Direct],
    work: &[(usize, String)],
    gid: &str,
    error: WireError,
) -> Failed {
    let (last, before) = work.split_last().expect("at least the one that failed");
    let mut clean = nodes[last.0].batch_execute("ROLLBACK").await.is_ok();
    for (shard, _) in before {
        clean &= nodes[*shard]
            .batch_execute(&format!("ROLLBACK PREPARED '{gid}'"))
            .await
            .is_ok();
    }
    if clean {
        Failed::undone(error)
    } else {
        Failed::unknown(error)
    }
}

async fn connect(node: &Node) -> Result<Direct, tokio_postgres::Error> {
    let mut config = tokio_postgres::Config::new();
    config
        .host_path(&node.socket)
        .port(node.port)
        .user(SUPERUSER)
        .dbname(&node.database);
    config.connect_timeout(Duration::from_secs(10));
    let (client, connection) = config.connect(NoTls).await?;
    tokio::spawn(connection);
    Ok(client)
}

fn of_node(error: &tokio_postgres::Error) -> WireError {
    match error.as_db_error() {
        Some(said) => WireError::Refused {
            code: said.code().code().to_owned(),
            message: said.message().to_owned(),
        },
        None => std::io::Error::other(error.to_string()).into(),
    }
}
