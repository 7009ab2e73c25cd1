//! A ShardingSphere cluster: the proof on its nodes, and around it its proxies' lock, for a blink (docs/CONSISTENCY.md).
//!
//! One try is in [`attempt`], on one page, with the way in ([`arming`]) and the way out ([`unlocking`]) beside it; [`making`] tries again. Here they are given real proxies, agents and nodes. All that may
//! hold the lock runs in a task of its own: dropping who waits for it tells it to stop, which means to unlock first.

mod arming;
mod attempt;
mod budget;
mod clock;
mod ended;
pub(crate) mod foreign;
mod keeping;
mod known;
mod making;
mod parties;
mod printing;
mod real;
mod setback;
mod told;
mod unlocking;

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use agent_api::ErrorKind;
use agent_sql::proxy::Clock as GlobalClock;
use catalog::Catalog;
use catalog::journal::OperationJournal;
use catalog::model::{Extra, FORMAT, Holder, LockRecord, Metadata, OperationEvent};
use jiff::Timestamp;
use tokio::task::JoinHandle;
use tokio::time::Instant;
use tokio_util::sync::{CancellationToken, DropGuard};
use uuid::Uuid;

pub(crate) use budget::Budget;
pub(crate) use keeping::{Switch, SwitchLock};

use super::direct::{OnAgent, moment};
use super::obstacle::Obstacle;
use super::{Coordinator, Lock, Moment, Occasion, PointArgs};
use crate::cluster::metadata::{MetadataExport, Redacted};
use crate::cluster::{Known, ProxyAccess, Reached, clock_refused, places};
use crate::failure::{Failure, Result};
use crate::operations::{Live, Operation};
use crate::printer::{Printer, duration};
use crate::settings::values::Address;
use clock::Monotonic;
use ended::Took;
use making::{Made, Order, Spent};
use parties::{Parties, Proxy as _};
use printing::Printing;
use real::{InAgent, Session};
use setback::Setback;
use told::Teller;

/// `auto` tries so often, and for so long, without the lock at first.
const WITHOUT: (u32, Duration) = (40, Duration::from_secs(2));
/// How long another's lock is waited for by a point that costs nothing to be made later.
const FOREIGN: Duration = Duration::from_secs(5);
/// For an export. Nothing is locked meanwhile.
const EXPORT: Duration = Duration::from_secs(30);
/// Points whose metadata changed while they were made, in a row.
const CHANGES: u32 = 5;

type Real = Parties<Session, InAgent, OnAgent, Monotonic>;

/// Makes points of a cluster behind proxies.
#[derive(Debug, Clone, Copy)]
pub(crate) struct ShardingSphere<'a> {
    /// How.
    pub(crate) args: &'a PointArgs,
    /// What for.
    pub(crate) occasion: Occasion,
    /// The way to the proxies.
    pub(crate) access: &'a ProxyAccess,
    /// What is known of them from earlier points.
    pub(crate) known: &'a Known,
    /// The data nodes that the proxies listed when those were found whose agents make the point. It is of no others.
    pub(crate) listed: &'a BTreeSet<Address>,
    /// Where points are kept: how long earlier ones locked, and who else may.
    pub(crate) catalog: &'a Catalog,
    /// Where it is noted that the cluster may be locked.
    pub(crate) journal: &'a OperationJournal,
    /// The operation that the journal is of.
    pub(crate) operation: Uuid,
    /// Who we are.
    pub(crate) by: &'a Holder,
    /// What may be locked within an hour. One for as long as the program runs.
    pub(crate) budget: &'a Budget,
    /// What this program must not leave behind.
    pub(crate) live: &'a Live,
    /// Who is told.
    pub(crate) printer: &'a Printer,
}

/// A point that is being made, with all that was found out for it.
struct Making<'a> {
    of: &'a ShardingSphere<'a>,
    begun: Timestamp,
    since: Instant,
    reached: Reached,
    has_csn: bool,
    nodes: Vec<OnAgent>,
    spent: Spent,
    printing: Printing,
    teller: Teller,
    cancel: CancellationToken,
}

/// What a task that may lock comes back with.
type Came = (std::result::Result<Made, Setback>, Spent, Real);

impl Coordinator for ShardingSphere<'_> {
    async fn mark(&self, copies: &[Operation], cancel: &CancellationToken) -> Result<Moment> {
        let reached = self.known.reached(self.access, cancel).await?;
        let clock = reached.clock().await?;
        let has_csn = matches!(clock, GlobalClock::Tso { .. }) && clock_refused(&clock).is_none();
        let (teller, told) = Teller::new();
        let mut making = Making {
            of: self,
            begun: Timestamp::now(),
            since: Instant::now(),
            reached,
            has_csn,
            nodes: copies.iter().map(OnAgent::of).collect(),
            spent: Spent::default(),
            printing: Printing::start(told, printing::POINT, self.printer),
            teller,
            cancel: cancel.clone(),
        };
        let made = Box::pin(making.with_metadata(copies)).await;
        let record = making.record();
        let mut proxies = making.reached.proxies().iter();
        let version = proxies.find_map(|proxy| proxy.version.clone());
        let Making {
            reached,
            spent,
            printing,
            teller,
            ..
        } = making;
        drop(teller);
        printing.end().await;
        let (made, exported) = made?;
        self.known.keep(reached);
        let locked = !spent.refusing.is_empty();
        let metadata = self.metadata(&made, &exported, version);
        Ok(Moment {
            csn: made.csn,
            lock_ms: if locked { millis(spent.last) } else { 0 },
            lock: Some(record),
            metadata: Some(metadata),
            ..moment(made.proved, copies)
        })
    }
}

impl ShardingSphere<'_> {
    /// What is kept of the proxies' metadata.
    fn metadata(
        &self,
        made: &Made,
        exported: &MetadataExport,
        version: Option<String>,
    ) -> Metadata {
        let Redacted {
            document,
            placeholders,
        } = exported.redacted();
        Metadata {
            format: FORMAT,
            point_id: made.proved.point.clone(),
            source: "shardingsphere".to_owned(),
            source_version: version,
            taken: Timestamp::now(),
            document,
            placeholders,
            operation: self.operation,
            nonce: Uuid::new_v4(),
            extra: Extra::new(),
        }
    }
}

impl Making<'_> {
    /// A point before and after which the proxies' metadata are the same.
    async fn with_metadata(&mut self, copies: &[Operation]) -> Result<(Made, MetadataExport)> {
        let parties = self.parties(Vec::new());
        let mut before = exported(&parties, &self.cancel).await?;
        for _ in 0..CHANGES {
            // Between two exports that are the same, no data node has come or gone.
            self.same_nodes(&parties).await?;
            let made = self.made(copies).await?;
            let after = exported(&parties, &self.cancel).await?;
            if after.same_as(&before) {
                return Ok((made, after));
            }
            let message = "databases, rules or properties of the proxies were changed while the point was made; it is made again";
            self.of.printer.warning(None, message);
            before = after;
        }
        let message = format!(
            "no point: databases, rules or properties of the proxies were changed during each of {CHANGES} points"
        );
        let next = "run the command when nobody changes them";
        Err(Failure::new(ErrorKind::Conflict, message).next(next))
    }

    /// Sees that the data nodes are those that were found.
    async fn same_nodes(&self, parties: &Real) -> Result<()> {
        let units = told(
            parties,
            "storage nodes",
            &self.cancel,
            Session::storage_nodes,
        )
        .await?;
        let now = places(&units);
        let names = |nodes: &BTreeSet<Address>, others: &BTreeSet<Address>| {
            let only: Vec<_> = nodes.difference(others).map(ToString::to_string).collect();
            if only.is_empty() {
                "none".to_owned()
            } else {
                only.join(", ")
            }
        };
        let listed = self.of.listed;
        if now == *listed {
            return Ok(());
        }
        let message = format!(
            "no point: the proxies have other data nodes than when these were found; new: {}; gone: {}",
            names(&now, listed),
            names(listed, &now)
        );
        Err(Failure::new(ErrorKind::Conflict, message)
            .next("run the command again, which finds them anew; what has not been backed up needs a backup first"))
    }

    /// One point, with the lock or without.
    async fn made(&mut self, copies: &[Operation]) -> Result<Made> {
        let args = self.of.args;
        let rules = args.rules(self.of.occasion);
        self.spent.refusing.clear();
        let (retries, longest) = match args.lock(self.of.occasion) {
            Lock::Always => return self.locked(copies).await,
            Lock::Auto => WITHOUT,
            Lock::Never => (rules.retries, rules.timeout),
        };
        let parties = self.parties(Vec::new());
        let without = parties.without_lock(retries, longest.min(self.left()));
        match without.await {
            Ok(made) => Ok(made),
            Err(Setback::Cancelled) => Err(Failure::cancelled()),
            Err(setback)
                if args.lock(self.of.occasion) == Lock::Never
                    || matches!(setback, Setback::Nodes(Obstacle::Lost { .. })) =>
            {
                Err(self.gave_up(&setback, false).await)
            }
            Err(setback) => {
                parties.setback(self.spent.attempt, None, &setback);
                self.locked(copies).await
            }
        }
    }

    /// One point with the lock. What is left of the time when no lock is allowed any more is for the proof alone.
    async fn locked(&mut self, copies: &[Operation]) -> Result<Made> {
        known::spent(self.of.catalog, self.of.budget).await?;
        let agents: Vec<_> = copies.iter().map(|it| Arc::clone(it.agent())).collect();
        let (access, printer) = (self.of.access, self.of.printer);
        let watchdogs = real::watchdogs(&agents, access, &self.reached, printer).await?;
        let proxies = self.reached.proxies().iter();
        let proxies = proxies.map(|proxy| proxy.address.to_string()).collect();
        let intended = OperationEvent::LockIntended { proxies };
        self.of.journal.record(intended).await?;
        let (outcome, spent, parties) = self.come(watchdogs.clone()).await?;
        self.spent = spent;
        let took = Took {
            locks: self.spent.locks,
            held: self.spent.held,
            open: !self.spent.shut,
        };
        took.ended(self.of.journal, &watchdogs, printer).await;
        let setback = match outcome {
            Ok(made) => return Ok(made),
            Err(setback) => setback,
        };
        if let Setback::Budget { .. } = setback {
            let message = format!("{setback}; it is tried on without the lock");
            self.of.printer.warning(None, &message);
            self.spent.refusing.clear();
            let rules = self.of.args.rules(self.of.occasion);
            match parties.without_lock(rules.retries, self.left()).await {
                Ok(made) => return Ok(made),
                Err(Setback::Cancelled) => return Err(Failure::cancelled()),
                Err(_) => {}
            }
        }
        Err(self.gave_up(&setback, self.spent.shut).await)
    }

    /// Has a task of its own make it. If this is dropped, that one unlocks and ends.
    async fn come(&self, watchdogs: Vec<InAgent>) -> Result<Came> {
        let (task, _stop) = self.spawned(watchdogs);
        let what = "the task that makes the point";
        task.await.map_err(|error| ended::broke_off(what, &error))
    }

    fn spawned(&self, watchdogs: Vec<InAgent>) -> (JoinHandle<Came>, DropGuard) {
        let stop = self.cancel.child_token();
        let mut parties = self.parties(watchdogs);
        parties.cancel = stop.clone();
        let order = Order {
            retries: self.of.args.locks(),
            timeout: self.left(),
            foreign: match self.of.occasion {
                Occasion::Backup => self.left(),
                Occasion::Point | Occasion::Nodes => FOREIGN,
            },
        };
        let (budget, mut spent) = (self.of.budget.clone(), self.spent.clone());
        let task = self.of.live.unlocks_itself(async move {
            let made = parties.make(&order, &budget, &mut spent, rand::random());
            let made = Box::pin(made).await;
            (made, spent, parties)
        });
        (task, stop.drop_guard())
    }

    fn parties(&self, watchdogs: Vec<InAgent>) -> Real {
        Parties {
            proxies: real::sessions(&self.reached),
            watchdogs,
            nodes: self.nodes.clone(),
            deadline: self.of.args.lock_timeout(),
            clock: Monotonic::start(),
            has_csn: self.has_csn,
            proof: self.of.args.rules(self.of.occasion),
            teller: self.teller.clone(),
            cancel: self.cancel.clone(),
        }
    }

    /// What is left of `--point-timeout`.
    fn left(&self) -> Duration {
        let all = self.of.args.timeout(self.of.occasion);
        all.saturating_sub(self.since.elapsed())
    }

    async fn gave_up(&self, setback: &Setback, shut: bool) -> Failure {
        if let Setback::Cancelled = setback {
            let held = match self.spent.locks {
                0 => "the cluster was not locked".to_owned(),
                _ => format!("the cluster was locked for {} ms", millis(self.spent.held)),
            };
            let failure = Failure::cancelled();
            let message = format!("{}; {held}", failure.message);
            return Failure { message, ..failure }.changed_if(shut);
        }
        let message = format!(
            "no point of the whole cluster within {}, locked {} times, {} ms in all",
            duration(self.since.elapsed()),
            self.spent.locks,
            millis(self.spent.held),
        );
        ended::failure(
            setback,
            &message,
            shut,
            (self.of.catalog, self.of.operation),
        )
        .await
    }

    fn record(&self) -> LockRecord {
        LockRecord {
            at: self.begun,
            mode: self.of.args.lock(self.of.occasion).name().to_owned(),
            held_ms: millis(self.spent.held),
            tries: self.spent.locks,
            proxies: self.spent.refusing.clone(),
            unreachable: self.spent.unreachable.clone(),
            by: Some(self.of.by.clone()),
            extra: Extra::new(),
        }
    }
}

/// The proxies' metadata.
async fn exported(parties: &Real, cancel: &CancellationToken) -> Result<MetadataExport> {
    MetadataExport::read(&told(parties, "metadata", cancel, Session::metadata).await?)
}

/// What all proxies know, from the first that tells it: any of them may have gone since it was found.
async fn told<T>(
    parties: &Real,
    what: &str,
    cancel: &CancellationToken,
    ask: impl AsyncFn(&Session, Duration) -> std::result::Result<T, String>,
) -> Result<T> {
    let mut why = Vec::new();
    for proxy in &parties.proxies {
        let asked = async {
            proxy.ready().await?;
            ask(proxy, EXPORT).await
        };
        match cancel.run_until_cancelled(asked).await {
            None => return Err(Failure::cancelled()),
            Some(Ok(told)) => return Ok(told),
            Some(Err(error)) => why.push(format!("{}: {error}", proxy.name())),
        }
    }
    let message = format!("no proxy exports its {what}: {}", why.join("; "));
    Err(Failure::new(ErrorKind::Database, message).next("look at the proxies' logs"))
}

fn millis(duration: Duration) -> u64 {
    u64::try_from(duration.as_micros().div_ceil(1000)).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod model;
