//! One point: the nodes are made ready, marked at one moment, their WAL is waited for, and then it is written.
//!
//! | killed, or failed | what is left |
//! |---|---|
//! | before all nodes are shipped | unused restore points in the WAL; each agent gives up what nobody asks about, after 30 s |
//! | before `points/<id>.json` is written | the same |
//! | after it | the point; `verify --repair` adds its entry of the log if that is missing |

use std::time::Duration;

use agent_api::{OperationStatus, Phase};
use catalog::Catalog;
use catalog::ids::BackupId;
use catalog::journal::OperationJournal;
use catalog::model::{FORMAT, NodePoint, Point};
use futures_util::future::join_all;
use tokio::time::{Instant, timeout};
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

use super::base::Bases;
use super::create::CreateArgs;
use super::found::Found;
use crate::cluster::{Known, ProxyAccess};
use crate::commands::backup::nodes::{Choice, Part, Told, choose};
use crate::commands::backup::{agent_failed, metadata};
use crate::coordinator::direct::Direct;
use crate::coordinator::shardingsphere::{Budget, ShardingSphere};
use crate::coordinator::{Coordinator, Moment, Occasion, PointArgs};
use crate::failure::{Failure, Result};
use crate::journalled;
use crate::operations::{Live, Operation, all_or_cancel, lost};
use crate::printer::{Printer, duration};
use crate::settings::Settings;
use crate::shipping::Shipping;
use crate::unfinished;

/// How long the WAL of a point may take into the bucket: behind that the next point is worth more than this one.
const SHIP_WITHIN: Duration = Duration::from_mins(5);
/// How often nodes that were lost are made ready again for one point.
const AGAIN: u32 = 2;
/// How long the agents may take to say that they have let go.
const RELEASE_WITHIN: Duration = Duration::from_secs(10);

/// A point that can be restored.
#[derive(Debug)]
pub(super) struct Made {
    /// It.
    pub(super) point: Point,
    /// The backup that leads to it.
    pub(super) base: BackupId,
    /// From its marks until it was written.
    pub(super) lag: Duration,
}

/// Makes points, one after the other, of the same nodes.
pub(super) struct Maker<'a> {
    catalog: &'a Catalog,
    /// The nodes; `None`: they are to be found anew.
    found: Option<Found>,
    args: &'a CreateArgs,
    point: PointArgs,
    settings: &'a Settings,
    printer: Printer,
    live: &'a Live,
    /// The way to the proxies; `None`: nothing ties the nodes together.
    access: Option<&'a ProxyAccess>,
    /// What is known of the proxies.
    known: Known,
    /// What may be locked within an hour.
    budget: Budget,
    /// Which node each host's database is; empty: it is to be found out.
    parts: Vec<Part>,
    bases: Bases,
}

impl<'a> Maker<'a> {
    /// Of the nodes that were `found`. Nothing is asked yet.
    pub(super) fn new(
        catalog: &'a Catalog,
        found: Found,
        (args, access): (&'a CreateArgs, Option<&'a ProxyAccess>),
        settings: &'a Settings,
        printer: Printer,
        live: &'a Live,
    ) -> Self {
        let point = args.point();
        Self {
            catalog,
            found: Some(found),
            args,
            budget: Budget::new(point.lock_budget()),
            point,
            settings,
            printer,
            live,
            access,
            known: Known::default(),
            parts: Vec::new(),
            bases: Bases::default(),
        }
    }

    /// The repository.
    pub(super) fn catalog(&self) -> &'a Catalog {
        self.catalog
    }

    /// The settings.
    pub(super) fn settings(&self) -> &'a Settings {
        self.settings
    }

    /// Makes one point, as a part of `operation`.
    ///
    /// # Errors
    /// Why there is none. Then nothing is left but unused restore points.
    pub(super) async fn make(
        &mut self,
        operation: Uuid,
        journal: &OperationJournal,
        cancel: &CancellationToken,
    ) -> Result<Made> {
        let made = self.try_make(operation, journal, cancel).await;
        if made.is_err() {
            self.live.cancel_all(&self.printer).await;
            // What was known of the nodes may have been why.
            self.found = None;
            self.parts.clear();
        }
        made
    }

    async fn try_make(
        &mut self,
        operation: Uuid,
        journal: &OperationJournal,
        cancel: &CancellationToken,
    ) -> Result<Made> {
        let known = async {
            if self.found.is_none() {
                let (settings, printer) = (self.settings, &self.printer);
                self.found = Some(Found::find(self.access, settings, printer, cancel).await?);
            }
            if self.parts.is_empty() {
                self.parts = self.matched().await?;
            }
            let nodes: Vec<_> = self.parts.iter().map(|part| part.node).collect();
            unfinished::refuse(self.catalog, &nodes).await?;
            self.bases.expect(self.catalog, &self.parts).await
        };
        tokio::select! {
            known = known => known?,
            () = cancel.cancelled() => return Err(Failure::cancelled()),
        }
        let (parts, this) = (&self.parts, &*self);
        let ready = all_or_cancel(parts, cancel, |part, cancel| async move {
            this.ready(part, &cancel).await
        });
        let mut marking = ready.await?;
        let moment = self
            .pointed(operation, journal, &mut marking, cancel)
            .await?;
        let marked = Instant::now();
        let shipped = self.shipped(&mut marking, &moment, cancel);
        let shipped = timeout(SHIP_WITHIN, shipped).await;
        let shipped = shipped.map_err(|_| late())??;
        let mut point = self.document(operation, &moment, shipped)?;
        let base = self.bases.of(self.catalog, &point).await?;
        point.base = Some(base.clone());
        if cancel.is_cancelled() {
            return Err(Failure::cancelled());
        }
        // From here on nothing is cancelled: half of it helps nobody, and each request has a deadline of its own.
        point.metadata = metadata(self.catalog, &moment, &self.printer).await?;
        self.catalog.put_point(&point).await?;
        let lag = marked.elapsed();
        released(marking).await;
        Ok(Made { point, base, lag })
    }

    /// Which registered node each database is. Nothing is written.
    async fn matched(&self) -> Result<Vec<Part>> {
        let mut parts: Vec<Part> = Vec::new();
        for host in self.found.iter().flat_map(|found| &found.hosts) {
            let name = host.agent.name();
            let choice = choose(self.catalog, host, Told::default()).await;
            let (node, epoch) = match choice.map_err(|failure| failure.on(&*name))? {
                Choice::Known(node, epoch) => (node, epoch),
                Choice::Moved(_) | Choice::New => {
                    let message = format!(
                        "the database of the agent at {name} has not been backed up as it is now, so no point of it could be restored"
                    );
                    let failure = Failure::new(agent_api::ErrorKind::Conflict, message).on(name);
                    return Err(failure.next("make a backup of all nodes first: gs_pitr backup"));
                }
            };
            if parts.iter().any(|part| part.node == node) {
                let message = format!("two agents of `--nodes` are both of node {node}");
                return Err(Failure::usage(message).on(name));
            }
            let host = host.clone();
            parts.push(Part { host, node, epoch });
        }
        Ok(parts)
    }

    async fn ready(&self, part: &Part, cancel: &CancellationToken) -> Result<Operation> {
        self.shipping().ready(part.stand(), None, cancel).await
    }

    /// Has every node's WAL sent up to its restore point. The point stands: agents that are lost now are waited for.
    async fn shipped(
        &self,
        marking: &mut [Operation],
        moment: &Moment,
        cancel: &CancellationToken,
    ) -> Result<Vec<OperationStatus>> {
        let shipping = &self.shipping();
        let nodes = marking.iter_mut().zip(&self.parts).zip(&moment.marks);
        all_or_cancel(
            nodes,
            cancel,
            |((marking, part), mark), cancel| async move {
                shipping.shipped(marking, part.stand(), mark, &cancel).await
            },
        )
        .await
    }

    fn shipping(&self) -> Shipping<'_> {
        let occasion = Occasion::Point.through(self.access.is_some());
        Shipping {
            settings: self.settings,
            live: self.live,
            printer: &self.printer,
            patience: self.point.timeout(occasion),
        }
    }

    /// The restore points. A node that was lost meanwhile, because its agent was restarted, is made ready again first: nothing was
    /// copied, and its WAL is shipped on.
    async fn pointed(
        &self,
        operation: Uuid,
        journal: &OperationJournal,
        marking: &mut [Operation],
        cancel: &CancellationToken,
    ) -> Result<Moment> {
        let mut again = 0;
        loop {
            let failure = match self.moment(operation, journal, marking, cancel).await {
                Ok(moment) => return Ok(moment),
                Err(failure) => failure,
            };
            if cancel.is_cancelled() || again == AGAIN {
                return Err(failure);
            }
            again += 1;
            let mut anything = false;
            for (part, marking) in self.parts.iter().zip(&mut *marking) {
                let agent = &part.host.agent;
                if let Some(why) = lost(agent, marking.id()).await {
                    anything = true;
                    let message = format!("it is made ready for the point again: {why}");
                    self.printer.warning(Some(&agent.name()), &message);
                    self.live.cancel_on(agent, &self.printer).await;
                    *marking = self.ready(part, cancel).await?;
                }
            }
            if !anything {
                return Err(failure);
            }
        }
    }

    /// The restore points, made as the nodes are held together.
    async fn moment(
        &self,
        operation: Uuid,
        journal: &OperationJournal,
        marking: &[Operation],
        cancel: &CancellationToken,
    ) -> Result<Moment> {
        let (args, printer) = (&self.point, &self.printer);
        let (Some(access), Some(found)) = (self.access, &self.found) else {
            return Direct::new(args, printer).mark(marking, cancel).await;
        };
        let coordinator = ShardingSphere {
            args,
            occasion: Occasion::Point,
            access,
            known: &self.known,
            listed: &found.listed,
            catalog: self.catalog,
            journal,
            operation,
            by: &journalled::ourselves("gs_pitr point create"),
            budget: &self.budget,
            live: self.live,
            printer,
        };
        coordinator.mark(marking, cancel).await
    }

    fn document(
        &self,
        operation: Uuid,
        moment: &Moment,
        shipped: Vec<OperationStatus>,
    ) -> Result<Point> {
        let mut nodes: Vec<NodePoint> = Vec::new();
        for ((part, status), mark) in self.parts.iter().zip(shipped).zip(&moment.marks) {
            let wrong = |what: &str| {
                agent_failed(&part.host.agent, format!("the agent's result has {what}"))
            };
            let Some(node) = status.point else {
                return Err(wrong("no restore point"));
            };
            if node.node_id != part.node || node.epoch != part.epoch {
                return Err(wrong("another node or epoch"));
            }
            if node.restore_point != mark.restore_point || node.end_lsn != mark.end_lsn {
                return Err(wrong("another restore point than it made"));
            }
            nodes.push(node);
        }
        Ok(Point {
            format: FORMAT,
            point_id: moment.point.clone(),
            created: moment.created,
            consistency: moment.consistency,
            csn: moment.csn.clone(),
            lock_ms: moment.lock_ms,
            proof: moment.proof.clone(),
            lock: moment.lock.clone(),
            metadata: None,
            label: self.args.label.clone(),
            base: None,
            operation,
            nodes,
            nonce: Uuid::new_v4(),
            extra: serde_json::Map::new(),
        })
    }
}

fn late() -> Failure {
    let message = format!(
        "the WAL of the point was not in the bucket within {}, so the point was not written",
        duration(SHIP_WITHIN)
    );
    Failure::new(agent_api::ErrorKind::Timeout, message)
        .next("see what is in its way: gs_pitr wal status")
}

/// Ends the agents' part. The point stands whatever comes of it, and an agent ends by itself what nobody asks about.
async fn released(marking: Vec<Operation>) {
    let never = CancellationToken::new();
    let releases = marking.into_iter().map(|mut marking| {
        let never = &never;
        async move {
            let released = async {
                marking.agent().release(marking.id(), never).await?;
                marking.reach(Phase::Done, never).await
            };
            match timeout(RELEASE_WITHIN, released).await {
                Ok(Ok(_)) => {}
                Ok(Err(failure)) => tracing::info!(%failure, "a point was not released"),
                Err(_) => tracing::info!("a point was not released in time"),
            }
        }
    });
    join_all(releases).await;
}
