//! The proof that restore points on several nodes cut no transaction in half (docs/CONSISTENCY.md).
//!
//! | step | each asked of all nodes at once | goes on if |
//! |---|---|---|
//! | quiet | who holds a transaction id | nobody has for long, and no prepared transaction is in doubt |
//! | drain | S1: the snapshot; when all have it, N1: who holds an id | nobody |
//! | mark | the restore point; and, beside it, what the caller reads | it is made |
//! | prove | N2 as N1, then S2 as S1 | nobody, and S1 = S2 on every node |
//! | flush | whether the restore point is on disk | it is: no crash of a node loses it any more |
//!
//! Here is no clock of another machine and no request: nodes are a trait, so that a model can take their
//! place and try every order of events.

use std::collections::BTreeSet;
use std::time::Duration;

use agent_api::{ApiError, Look, MarkResult, Observed, PreparedAs, XidHolder};
use catalog::ids::PointId;
use futures_util::future::{join, join_all};
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

    /// Waits until the last restore point is on its disk. Fails if its database may have crashed since it was made. Takes more than
    /// seconds where the disk does.
    fn flush(&self, restore_point: String) -> impl Future<Output = Result<(), ApiError>>;

    /// Why it will never make a restore point again, whatever is waited for: what it would be part of is no more.
    /// `None`: it may, or nobody can tell.
    fn lost(&self) -> impl Future<Output = Option<ApiError>> {
        async { None }
    }
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
    let nothing = async || Ok(());
    let (proved, ()) = prove_with(nodes, rules, nothing).await?;
    Ok(proved)
}

/// [`prove`], with something that is read while the marks are made: what it says is as true of the point as the marks are.
///
/// # Errors
/// What was in the way last.
pub(super) async fn prove_with<N: Node, T>(
    nodes: &[N],
    rules: &Rules,
    beside: impl AsyncFn() -> Result<T, Obstacle>,
) -> Result<(Proved, T), Unproved> {
    let begun = Instant::now();
    let (mut attempts, mut failures, mut pause) = (0, 0, PAUSES.0);
    loop {
        let outcome = match quiet(nodes, rules).await {
            Ok(()) => {
                attempts += 1;
                attempt(nodes, rules, attempts, beside()).await
            }
            Err(obstacle) => Err(obstacle),
        };
        let obstacle = match outcome {
            Ok(proved) => return Ok(proved),
            Err(obstacle) => or_lost(nodes, obstacle).await,
        };
        tracing::debug!(attempts, "no proof: {obstacle}");
        failures = match &obstacle {
            Obstacle::Lost { .. } => FAILURES,
            // A database that is being restarted comes back: that is waited for as anything else is.
            Obstacle::Failed { error, .. } if !error.passing => failures + 1,
            _ => 0,
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
pub(super) async fn quiet<N: Node>(nodes: &[N], rules: &Rules) -> Result<(), Obstacle> {
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

/// Drain, mark, prove, flush: one attempt, under a name of its own.
pub(super) async fn attempt<N: Node, T>(
    nodes: &[N],
    rules: &Rules,
    attempts: u32,
    beside: impl Future<Output = Result<T, Obstacle>>,
) -> Result<(Proved, T), Obstacle> {
    let drained = drained(nodes, rules).await?;
    let marked = marked(nodes, drained, beside).await?;
    let proved = proved(nodes, rules, marked, attempts).await?;
    flushed(nodes, &proved.0).await?;
    Ok(proved)
}

/// The point that is proved is on every node's disk. Until then the crash of a node may lose its restore point, though nothing
/// that the proof saw.
pub(super) async fn flushed<N: Node>(nodes: &[N], proved: &Proved) -> Result<(), Obstacle> {
    let name = restore_point(&proved.point);
    let flushed = all(nodes, |node| node.flush(name.clone())).await;
    flushed.map(drop)
}

/// If a node failed: the first node that is lost, if one is.
pub(super) async fn or_lost<N: Node>(nodes: &[N], obstacle: Obstacle) -> Obstacle {
    if !obstacle.is_failure() {
        return obstacle;
    }
    let asked = join_all(nodes.iter().map(Node::lost)).await;
    let lost = asked.into_iter().zip(nodes).find_map(|(lost, node)| {
        let node = node.name();
        lost.map(|error| Obstacle::Lost { node, error })
    });
    lost.unwrap_or(obstacle)
}

/// Nodes on which nobody held an id, after their snapshots were taken.
#[derive(Debug)]
pub(super) struct Drained {
    asked: Instant,
    s1: Vec<Observed>,
    accepted: Vec<(usize, XidHolder)>,
}

/// S1 on every node, then N1 on every node.
pub(super) async fn drained<N: Node>(nodes: &[N], rules: &Rules) -> Result<Drained, Obstacle> {
    let asked = Instant::now();
    let s1 = all(nodes, |node| node.observe(Look::Snapshot)).await?;
    let n1 = all(nodes, |node| node.observe(Look::Holders)).await?;
    let accepted = nobody(nodes, &n1, rules)?;
    Ok(Drained {
        asked,
        s1,
        accepted,
    })
}

/// Nodes that have made their restore points after they were drained.
#[derive(Debug)]
pub(super) struct Marked<T> {
    drained: Drained,
    point: PointId,
    created: Timestamp,
    marks: Vec<MarkResult>,
    beside: T,
}

/// The restore point on every node and, at the same time, `beside`.
pub(super) async fn marked<N: Node, T>(
    nodes: &[N],
    drained: Drained,
    beside: impl Future<Output = Result<T, Obstacle>>,
) -> Result<Marked<T>, Obstacle> {
    let created = Timestamp::now();
    let point = PointId::generate(created);
    let marks = all(nodes, |node| node.mark(restore_point(&point)));
    let (marks, beside) = join(marks, beside).await;
    Ok(Marked {
        drained,
        point,
        created,
        marks: marks?,
        beside: beside?,
    })
}

/// N2 on every node, then S2.
pub(super) async fn proved<N: Node, T>(
    nodes: &[N],
    rules: &Rules,
    marked: Marked<T>,
    attempts: u32,
) -> Result<(Proved, T), Obstacle> {
    let last = Look::HoldersThenSnapshot;
    let n2_s2 = all(nodes, |node| node.observe(last)).await?;
    let after = nobody(nodes, &n2_s2, rules)?;
    let drained = &marked.drained;
    nothing_ended(nodes, &drained.s1, &n2_s2)?;
    if gids(&drained.accepted) != gids(&after) {
        return Err(Obstacle::Doubtful);
    }
    let proved = Proved {
        point: marked.point,
        created: marked.created,
        marks: marked.marks,
        attempts,
        window: drained.asked.elapsed(),
        in_doubt: after,
    };
    Ok((proved, marked.beside))
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
