//! The proof that restore points on several nodes cut no transaction in half (docs/CONSISTENCY.md).
//!
//! | step | each asked of all nodes at once | goes on if |
//! |---|---|---|
//! | quiet | who holds a transaction id | nobody has for long, and no prepared transaction is in doubt |
//! | drain | S1: the snapshot; when all have it, N1: who holds an id | nobody |
//! | mark | the restore point | it is made |
//! | prove | N2 as N1, then S2 as S1 | nobody, and S1 = S2 on every node |
//!
//! Here is no clock of another machine and no request: nodes are a trait, so that a model can take their
//! place and try every order of events.

use std::collections::BTreeSet;
use std::time::Duration;

use agent_api::{ApiError, Look, MarkResult, Observed, PreparedAs, XidHolder};
use catalog::ids::PointId;
use futures_util::future::join_all;
use jiff::Timestamp;
use tokio::time::{Instant, sleep};

use super::obstacle::{Holding, Obstacle};

/// A transaction that holds its id for longer will not be gone in a moment.
const LONG: Duration = Duration::from_millis(500);
/// A transaction that has been prepared for longer has lost whoever was to end it.
const IN_DOUBT: Duration = Duration::from_secs(5);
/// Pauses between attempts while others merely work: many short attempts find a gap sooner than a few.
const PAUSES: (Duration, Duration) = (Duration::from_millis(5), Duration::from_millis(50));
/// Pause while something stands in the way for long.
const LONG_PAUSE: Duration = Duration::from_millis(250);
/// So many failures in a row are no accident.
const FAILURES: u32 = 3;

/// A data node, as the proof sees it. Each call must end within seconds.
pub trait Node {
    /// What it is called in messages.
    fn name(&self) -> String;

    /// Looks at its transactions.
    fn observe(&self, look: Look) -> impl Future<Output = Result<Observed, ApiError>>;

    /// Makes a restore point.
    fn mark(&self, restore_point: String) -> impl Future<Output = Result<MarkResult, ApiError>>;
}

/// How long and at what price a proof is tried.
#[derive(Debug, Clone, Copy)]
pub struct Rules {
    /// Attempts after the first one.
    pub retries: u32,
    /// For all attempts and pauses together.
    pub timeout: Duration,
    /// Whether prepared transactions that are in doubt are listed, rather than in the way.
    pub accept_in_doubt: bool,
}

/// Restore points that cut no transaction in half.
#[derive(Debug)]
pub struct Proved {
    /// The point they make up.
    pub point: PointId,
    /// When it was begun, by our clock (UTC).
    pub created: Timestamp,
    /// What each node made, in the order of the nodes.
    pub marks: Vec<MarkResult>,
    /// Attempts, this one included.
    pub attempts: u32,
    /// From asking for the first S1 to the last S2.
    pub window: Duration,
    /// Prepared transactions that were accepted, with the number of their node.
    pub in_doubt: Vec<(usize, XidHolder)>,
}

/// Why there is no proof.
#[derive(Debug)]
pub struct Unproved {
    /// Attempts that got as far as S1.
    pub attempts: u32,
    /// How long it was tried.
    pub tried: Duration,
    /// What was in the way last.
    pub obstacle: Obstacle,
}

/// Name of the restore points of a point.
#[must_use]
pub fn restore_point(point: &PointId) -> String {
    format!("gs_pitr_{point}")
}

/// Tries until a point stands, `rules` forbid another attempt, or requests fail.
///
/// # Errors
/// What was in the way last.
pub async fn prove<N: Node>(nodes: &[N], rules: &Rules) -> Result<Proved, Unproved> {
    let begun = Instant::now();
    let (mut attempts, mut failures, mut pause) = (0, 0, PAUSES.0);
    loop {
        let outcome = match quiet(nodes, rules).await {
            Ok(()) => {
                attempts += 1;
                attempt(nodes, rules, attempts).await
            }
            Err(obstacle) => Err(obstacle),
        };
        let obstacle = match outcome {
            Ok(proved) => return Ok(proved),
            Err(obstacle) => obstacle,
        };
        tracing::debug!(attempts, "no proof: {obstacle}");
        failures = if obstacle.is_failure() {
            failures + 1
        } else {
            0
        };
        let wait = if obstacle.is_for_long() {
            LONG_PAUSE
        } else {
            pause = (pause * 3 / 2).min(PAUSES.1);
            pause
        };
        let wait = wait.mul_f64(rand::random_range(0.5..1.5));
        let tried = begun.elapsed();
        if attempts > rules.retries || tried + wait > rules.timeout || failures == FAILURES {
            return Err(Unproved {
                attempts,
                tried,
                obstacle,
            });
        }
        sleep(wait).await;
    }
}

/// Nothing that will last is in the way.
async fn quiet<N: Node>(nodes: &[N], rules: &Rules) -> Result<(), Obstacle> {
    let seen = all(nodes, |node| node.observe(Look::Holders)).await?;
    let lasting = |holder: &XidHolder| older(holder, LONG);
    let holding = in_the_way(nodes, &seen, rules, lasting)?;
    if holding.is_empty() {
        return Ok(());
    }
    Err(Obstacle::Held {
        holding,
        for_long: true,
    })
}

/// Drain, mark, prove: one attempt, under a name of its own.
pub(super) async fn attempt<N: Node>(
    nodes: &[N],
    rules: &Rules,
    attempts: u32,
) -> Result<Proved, Obstacle> {
    let (created, asked) = (Timestamp::now(), Instant::now());
    let point = PointId::generate(created);
    let s1 = all(nodes, |node| node.observe(Look::Snapshot)).await?;
    let n1 = all(nodes, |node| node.observe(Look::Holders)).await?;
    let before = nobody(nodes, &n1, rules)?;
    let marks = all(nodes, |node| node.mark(restore_point(&point))).await?;
    let last = Look::HoldersThenSnapshot;
    let n2_s2 = all(nodes, |node| node.observe(last)).await?;
    let after = nobody(nodes, &n2_s2, rules)?;
    nothing_ended(nodes, &s1, &n2_s2)?;
    if gids(&before) != gids(&after) {
        return Err(Obstacle::Doubtful);
    }
    Ok(Proved {
        point,
        created,
        marks,
        attempts,
        window: asked.elapsed(),
        in_doubt: after,
    })
}

/// Asks all nodes at the same time, and waits for all answers.
async fn all<'a, N: Node, T, F>(
    nodes: &'a [N],
    ask: impl Fn(&'a N) -> F,
) -> Result<Vec<T>, Obstacle>
where
    F: Future<Output = Result<T, ApiError>>,
{
    let answers = join_all(nodes.iter().map(ask)).await.into_iter();
    let named = answers.zip(nodes).map(|(answer, node)| {
        answer.map_err(|error| Obstacle::Failed {
            node: node.name(),
            error,
        })
    });
    named.collect()
}

/// Nobody holds an id. Returns the prepared transactions that are accepted nevertheless.
fn nobody<N: Node>(
    nodes: &[N],
    seen: &[Observed],
    rules: &Rules,
) -> Result<Vec<(usize, XidHolder)>, Obstacle> {
    let holding = in_the_way(nodes, seen, rules, |_| true)?;
    if !holding.is_empty() {
        return Err(Obstacle::Held {
            for_long: holding.iter().any(|held| older(&held.holder, LONG)),
            holding,
        });
    }
    let holders = seen.iter().enumerate().flat_map(|(number, seen)| {
        let oldest = seen.holders.iter().flat_map(|holders| &holders.oldest);
        oldest.map(move |holder| (number, holder.clone()))
    });
    Ok(holders.collect())
}

/// Those holders that matter and are not accepted.
fn in_the_way<N: Node>(
    nodes: &[N],
    seen: &[Observed],
    rules: &Rules,
    matters: impl Fn(&XidHolder) -> bool,
) -> Result<Vec<Holding>, Obstacle> {
    let mut holding = Vec::new();
    for (node, seen) in nodes.iter().zip(seen) {
        let Some(holders) = &seen.holders else {
            return Err(Obstacle::misunderstood(node.name()));
        };
        let accepted = |holder: &XidHolder| {
            rules.accept_in_doubt && holder.prepared.is_some() && older(holder, IN_DOUBT)
        };
        let told = u64::try_from(holders.oldest.len()).unwrap_or(u64::MAX);
        // Of more than are told, only some could be accepted.
        let too_many = holders.total > told;
        let these = holders.oldest.iter();
        let these = these.filter(|holder| matters(holder) && (too_many || !accepted(holder)));
        holding.extend(these.map(|holder| Holding {
            node: node.name(),
            holder: holder.clone(),
        }));
    }
    Ok(holding)
}

/// On every node the snapshot is what it was, in the same session of its agent: a server that was restarted
/// in between may have lost the restore point.
fn nothing_ended<N: Node>(
    nodes: &[N],
    first: &[Observed],
    last: &[Observed],
) -> Result<(), Obstacle> {
    let mut moved = Vec::new();
    for ((node, first), last) in nodes.iter().zip(first).zip(last) {
        if first.snapshot.is_none() || last.snapshot.is_none() {
            return Err(Obstacle::misunderstood(node.name()));
        }
        if first.session != last.session {
            return Err(Obstacle::SessionLost { node: node.name() });
        }
        if first.snapshot != last.snapshot {
            moved.push(node.name());
        }
    }
    if moved.is_empty() {
        Ok(())
    } else {
        Err(Obstacle::Moved { nodes: moved })
    }
}

fn older(holder: &XidHolder, than: Duration) -> bool {
    holder
        .age_ms
        .is_some_and(|age| Duration::from_millis(age) > than)
}

fn gids(in_doubt: &[(usize, XidHolder)]) -> BTreeSet<(usize, &PreparedAs)> {
    let prepared = in_doubt
        .iter()
        .map(|(node, holder)| (*node, &holder.prepared));
    prepared
        .filter_map(|(node, prepared)| Some((node, prepared.as_ref()?)))
        .collect()
}

#[cfg(test)]
mod model;
