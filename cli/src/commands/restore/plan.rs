//! What becomes of which node: found out and checked before anything is changed.

use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::num::NonZeroU16;
use std::path::Path;

use agent_api::{ErrorKind, Place, RestoreSpec, TargetFacts};
use catalog::Catalog;
use catalog::ids::{BackupId, PointId};
use catalog::model::{
    Consistency, Epoch, Manifest, NodeBackup, NodePoint, PlannedNode, RestorePlan,
};
use catalog::repo::{NodeIdentity, NodeMatch};
use jiff::Timestamp;
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

use super::RestoreArgs;
use super::places::{self, source, told};
use super::target::Chosen;
use super::words::product;
use crate::agents::Host;
use crate::chain::chain_of;
use crate::failure::{Failure, Result};
use crate::operations::all_or_cancel;
use crate::printer::bytes;
use crate::restoring::Part;
use crate::settings::Settings;

/// One node and its new place.
#[derive(Debug, Clone)]
pub(super) struct Step {
    /// The node's copy.
    pub(super) node: NodeBackup,
    /// The node's part of the point.
    pub(super) point: NodePoint,
    /// The node that it becomes.
    pub(super) becomes: Uuid,
    /// Where it goes.
    pub(super) host: Host,
    /// Its data directory there.
    pub(super) target: String,
    /// What is there now.
    pub(super) there: TargetFacts,
    /// What becomes of that.
    pub(super) place: Place,
    /// Its port there.
    pub(super) port: u16,
}

/// One node and the agent that it goes to.
#[derive(Debug)]
struct Wanted {
    node: NodeBackup,
    point: NodePoint,
    host: Host,
    port: u16,
}

/// The plan of a restore.
#[derive(Debug, Clone)]
pub(super) struct Plan {
    /// The restore.
    pub(super) operation: Uuid,
    /// The backup.
    pub(super) backup: BackupId,
    /// What it builds on, the FULL first.
    pub(super) parents: Vec<Manifest>,
    /// The point.
    pub(super) point: PointId,
    /// When it was made, if it is another one than the backup's own.
    pub(super) later: Option<Timestamp>,
    /// What it proves.
    pub(super) consistency: Consistency,
    /// The nodes.
    pub(super) steps: Vec<Step>,
    /// Nodes of the backup that are left as they are.
    pub(super) others: Vec<NodeBackup>,
}

impl Plan {
    /// The backups whose bytes it reads.
    pub(super) fn reads(&self) -> Vec<BackupId> {
        let parents = self.parents.iter().map(|it| it.backup_id.clone());
        parents.chain([self.backup.clone()]).collect()
    }

    /// The plan as it is journalled.
    pub(super) fn document(&self, args: &RestoreArgs) -> RestorePlan {
        let planned = |step: &Step| PlannedNode {
            node_id: step.node.node_id,
            becomes: step.becomes,
            epoch: step.point.epoch.clone(),
            agent: step.host.agent.name(),
            host: step.host.facts.host.clone(),
            machine_id: step.host.facts.machine_id.clone(),
            operation: Uuid::now_v7(),
            target: step.there.target.clone(),
            place: step.place,
            port: step.port,
        };
        RestorePlan {
            backup_id: self.backup.clone(),
            point_id: self.point.clone(),
            consistency: self.consistency,
            start: !args.no_start,
            discard_old: args.discard_old,
            clone: args.clone,
            metadata: args.metadata_after(),
            nodes: self.steps.iter().map(planned).collect(),
        }
    }

    /// The agents' parts of it.
    pub(super) fn parts(
        &self,
        document: &RestorePlan,
        args: &RestoreArgs,
        settings: &Settings,
    ) -> Vec<(Part, RestoreSpec)> {
        let nodes: Vec<_> = self.steps.iter().map(|step| step.node.node_id).collect();
        let part = |(step, planned): (&Step, &PlannedNode)| {
            let spec = RestoreSpec {
                backup_id: self.backup.clone(),
                node: step.node.clone(),
                chain: chain_of(&self.parents, step.node.node_id),
                point: step.point.clone(),
                restore: self.operation,
                nodes: nodes.clone(),
                target: planned.target.clone(),
                place: planned.place,
                port: Some(planned.port),
                jobs: settings.jobs(),
                start: document.start,
                stop_early: args.stop_early,
            };
            let part = Part {
                planned: planned.clone(),
                agent: std::sync::Arc::clone(&step.host.agent),
                lend: !step.host.facts.has_credentials,
            };
            (part, spec)
        };
        self.steps.iter().zip(&document.nodes).map(part).collect()
    }
}

/// What a plan is made of.
pub(super) struct Planner<'a> {
    pub(super) args: &'a RestoreArgs,
    pub(super) catalog: &'a Catalog,
    pub(super) hosts: &'a [Host],
    pub(super) operation: Uuid,
    pub(super) cancel: &'a CancellationToken,
}

impl Planner<'_> {
    /// Finds a place for every node, and refuses what cannot work. Nothing is changed.
    ///
    /// # Errors
    /// The first thing that would keep the restore from ending well.
    pub(super) async fn make(&self, chosen: Chosen) -> Result<Plan> {
        let Chosen { found, is_other } = chosen;
        let parents = self.catalog.parents(&found.manifest).await?;
        let later = is_other.then(|| found.point.made());
        let (args, backup) = (self.args, found.manifest.backup_id);
        let all = found.manifest.nodes;
        let nodes = places::chosen(all.clone(), args)?;
        let left = |node: &NodeBackup| !nodes.iter().any(|it| it.node_id == node.node_id);
        let others: Vec<_> = all.into_iter().filter(left).collect();
        let ports = told(&nodes, "--db-port", &args.db_port)?;
        let homes = places::homes(self.catalog, &nodes).await?;
        let places = places::choose(&nodes, &homes, self.hosts, args)?;
        let mut points: BTreeMap<_, _> = found
            .point
            .nodes
            .into_iter()
            .map(|point| (point.node_id, point))
            .collect();
        let mut wanted = Vec::new();
        for (((node, place), port), home) in nodes.into_iter().zip(&places).zip(ports).zip(homes) {
            let Some(point) = points.remove(&node.node_id) else {
                let message = format!("the point has nothing on node {}", node.node_id);
                return Err(Failure::new(ErrorKind::Damaged, message));
            };
            check_epoch(&node, &point, home.as_ref(), self.catalog).await?;
            let alone = places.iter().filter(|other| *other == place).count() == 1;
            let host = self.hosts[*place].clone();
            let port = port
                .map(NonZeroU16::get)
                .or_else(|| self.port(&host, alone));
            let port = port.unwrap_or(node.port);
            wanted.push(Wanted {
                node,
                point,
                host,
                port,
            });
        }
        for (place, it) in wanted.iter().enumerate() {
            check(it, &wanted[..place], args)?;
        }
        let steps = all_or_cancel(wanted, self.cancel, |wanted, cancel| async move {
            let name = wanted.host.agent.name();
            let step = self.step(wanted, &cancel).await;
            step.map_err(|failure| failure.on(name))
        });
        let steps = steps.await?;
        for step in &steps {
            check_managers(step, args)?;
            check_room(step, &parents)?;
            check_program(step)?;
        }
        Ok(Plan {
            operation: self.operation,
            backup,
            parents,
            later,
            point: found.point.point_id,
            consistency: found.point.consistency,
            steps,
            others,
        })
    }

    /// The port that is known of a place: where a database is, the one that its clients know.
    fn port(&self, host: &Host, alone: bool) -> Option<u16> {
        let told = host.facts.pg_port;
        if self.args.target_dir.is_some() {
            return told.filter(|_| alone);
        }
        let running = host.facts.server.as_ref().map(|server| server.port);
        running.or(told)
    }

    async fn step(&self, wanted: Wanted, cancel: &CancellationToken) -> Result<Step> {
        let Wanted {
            node,
            point,
            host,
            port,
        } = wanted;
        let becomes = if self.args.clone {
            Uuid::new_v4()
        } else {
            node.node_id
        };
        let target = match (&self.args.target_dir, host.data_directory()) {
            (Some(directory), _) => directory.join(becomes.to_string()).display().to_string(),
            (None, Some(directory)) => directory.to_owned(),
            (None, None) => {
                let message =
                    "the agent was told no data directory, so there is none to restore over";
                let failure = Failure::usage(message);
                return Err(failure.next("start it with `--pgdata`, or use `--target-dir DIR`"));
            }
        };
        let there = host.agent.target(&target, cancel).await?;
        let place = place(&there, &node, self.args)?;
        if place != Place::Fresh {
            self.check_owner(&node, &host, &there).await?;
        }
        Ok(Step {
            node,
            point,
            becomes,
            host,
            target,
            there,
            place,
            port,
        })
    }
}

impl Planner<'_> {
    /// Cloned images share a system identifier: only the repository can tell that what is there is another node.
    async fn check_owner(&self, node: &NodeBackup, host: &Host, there: &TargetFacts) -> Result<()> {
        let (Some(cluster), Some(directory)) = (&there.cluster, host.data_directory()) else {
            return Ok(());
        };
        let identity = NodeIdentity {
            system_identifier: cluster.system_identifier,
            machine_id: host.facts.machine_id.clone(),
            data_directory: directory.to_owned(),
        };
        let next = "map the node to its own agent (`--map`), or use `--target-dir DIR`";
        if let NodeMatch::Known(known) = self.catalog.match_node(&identity).await?
            && known.node.node_id != node.node_id
        {
            let (other, id) = (known.node.node_id, node.node_id);
            let message =
                format!("the database in `{directory}` is node {other}, and not node {id}");
            return Err(Failure::new(ErrorKind::Target, message).next(next));
        }
        let server = host.facts.server.as_ref();
        if server.is_some_and(|server| server.in_recovery) {
            let message = format!("the database in `{directory}` is a standby");
            return Err(Failure::new(ErrorKind::Target, message).next(next));
        }
        Ok(())
    }
}

/// What becomes of what is at the target.
fn place(there: &TargetFacts, node: &NodeBackup, args: &RestoreArgs) -> Result<Place> {
    if there.empty {
        return Ok(Place::Fresh);
    }
    let target = &there.target;
    let refuse =
        |message: String, next: &str| Err(Failure::new(ErrorKind::Target, message).next(next));
    if args.target_dir.is_some() {
        let message = format!("`{target}` exists and is not an empty directory");
        return refuse(
            message,
            "choose another `--target-dir`, or move what is there away",
        );
    }
    let Some(cluster) = &there.cluster else {
        let message = format!("`{target}` is not empty, and what is there is no database");
        return refuse(
            message,
            "see what it is and move it away, or use `--target-dir DIR`",
        );
    };
    let system_identifier = cluster.system_identifier;
    if system_identifier != node.system_identifier {
        let message = format!(
            "the database in `{target}` is another one than node {}: its system identifier is {system_identifier}, the backup's {}",
            node.node_id, node.system_identifier
        );
        return refuse(
            message,
            "map the node to its own agent (`--map`), move that database away, or use `--target-dir DIR`",
        );
    }
    Ok(if args.in_place {
        Place::InPlace { system_identifier }
    } else {
        Place::Replace { system_identifier }
    })
}

/// Makes sure that the catalog will take the epoch that the restored node opens: to find out after the
/// promotion would be too late.
async fn check_epoch(
    node: &NodeBackup,
    point: &NodePoint,
    home: Option<&Epoch>,
    catalog: &Catalog,
) -> Result<()> {
    let named = |failure: Failure| failure.on(source(node));
    let id = node.node_id;
    let known = catalog.node(id).await;
    known.map_err(|error| named(error.into()))?;
    if home.is_some_and(|home| home.epoch == point.epoch) {
        return Ok(());
    }
    let epochs = catalog.epochs(id).await;
    let epochs = epochs.map_err(|error| named(error.into()))?;
    if epochs.iter().any(|known| known.epoch == point.epoch) {
        return Ok(());
    }
    let epoch = &point.epoch;
    let message = format!("epoch {epoch} of node {id} is missing in the repository");
    Err(named(Failure::new(ErrorKind::Damaged, message)))
}

fn check(step: &Wanted, before: &[Wanted], args: &RestoreArgs) -> Result<()> {
    let name = step.host.agent.name();
    let facts = &step.host.facts;
    let major = step.node.server_version_num / 10_000;
    if !facts.installed.contains_key(&major) {
        let has: Vec<_> = facts.installed.keys().map(ToString::to_string).collect();
        let has = if has.is_empty() {
            "none".to_owned()
        } else {
            has.join(", ")
        };
        let product = product(major);
        let message = format!(
            "node {} is of {product}, and the agent at {name} has programs of: {has}",
            step.node.node_id
        );
        let next = format!("install {product} there, or start the agent with its `--pg-bindir`");
        return Err(Failure::new(ErrorKind::Incompatible, message)
            .on(name)
            .next(next));
    }
    let same_port = before
        .iter()
        .find(|other| other.host.facts.machine_id == facts.machine_id && other.port == step.port);
    if let Some(other) = same_port {
        let message = format!(
            "nodes {} and {} would both listen on port {} of {}",
            other.node.node_id, step.node.node_id, step.port, facts.host
        );
        let next = format!(
            "give one of them another port: `--db-port {}=PORT`",
            step.node.node_id
        );
        return Err(Failure::usage(message).next(next));
    }
    if let Some(server) = &facts.server
        && server.port == step.port
        && args.target_dir.is_some()
        && !args.no_start
    {
        let message = format!(
            "port {} of {} is taken by the running database in `{}`",
            step.port, facts.host, server.data_directory
        );
        let failure = Failure::new(ErrorKind::Conflict, message).on(name);
        return Err(failure.next(format!(
            "stop that database, use `--no-start`, or choose a port: `--db-port {}=PORT`",
            step.node.node_id
        )));
    }
    Ok(())
}

/// A cluster manager would start what we stop, or fail over to what we leave behind.
fn check_managers(step: &Step, args: &RestoreArgs) -> Result<()> {
    let facts = &step.host.facts;
    let Some(manager) = facts.managers.first() else {
        return Ok(());
    };
    if step.place == Place::Fresh || facts.own_commands || args.manager_paused {
        return Ok(());
    }
    let message = format!(
        "{} manages the database in `{}` on {} and would fight a restore over it ({})",
        manager.name, step.target, facts.host, manager.evidence
    );
    let next = format!(
        "{}; then run it again with `--manager-paused`, or give the agent `--start-command` and `--stop-command`",
        manager.next
    );
    let failure = Failure::new(ErrorKind::Conflict, message).on(step.host.agent.name());
    Err(failure.next(next))
}

/// A copy that a probackup made is brought back by one of its kind.
fn check_program(step: &Step) -> Result<()> {
    let Some(copy) = &step.node.probackup else {
        return Ok(());
    };
    let name = step.host.agent.name();
    let there = step.host.facts.probackup.clone().unwrap_or_default();
    let refuse = |what: String, next: String| {
        let failure = Failure::new(ErrorKind::Incompatible, what).on(name.clone());
        Err(failure.next(next))
    };
    if let Some(missing) = there.missing {
        let what = format!(
            "node {} was copied by {}, which cannot run at {name}: {missing}",
            step.node.node_id, copy.program
        );
        let next = format!(
            "install {} there (`gs_pitr check` says what is missing)",
            copy.program
        );
        return refuse(what, next);
    }
    let program = there.program.unwrap_or_default();
    if Path::new(&program).file_name() != Some(OsStr::new(&copy.program)) {
        let what = format!(
            "node {} was copied by {}, and the agent at {name} has `{program}`",
            step.node.node_id, copy.program
        );
        let next = format!(
            "start that agent with `--probackup /path/to/{}`",
            copy.program
        );
        return refuse(what, next);
    }
    Ok(())
}

/// Bytes that the copy needs at least; its agent looks closer. Of an increment only the part that changed counts as
/// read, so what it builds on says more.
fn check_room(step: &Step, parents: &[Manifest]) -> Result<()> {
    let chain = chain_of(parents, step.node.node_id);
    let below = chain.iter().map(|link| link.node.plain_bytes).max();
    let needed = step.node.plain_bytes.max(below.unwrap_or(0));
    let free = step.there.free_bytes;
    if free >= needed || matches!(step.place, Place::InPlace { .. }) {
        return Ok(());
    }
    let message = format!(
        "there are {} free beside `{}` on {}, and {} are needed at least",
        bytes(free),
        step.target,
        step.host.facts.host,
        bytes(needed)
    );
    let next = if step.place == Place::Fresh {
        "make room, or choose another `--target-dir`"
    } else {
        "make room, or use `--in-place`: it removes what is there first, and has no way back"
    };
    let failure = Failure::new(ErrorKind::Target, message).on(step.host.agent.name());
    Err(failure.next(next))
}
