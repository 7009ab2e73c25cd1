//! What kind of backup it becomes: by which engine, and on what it builds.

use agent_api::{ErrorKind, ProbackupFacts};
use catalog::Catalog;
use catalog::model::{BackupMode, Engine, Manifest, NodeBackup};
use catalog::repo::BackupState;

use super::nodes::Part;
use super::{BackupArgs, EngineChoice};
use crate::agents::Host;
use crate::failure::{Failure, Result};
use crate::printer::Printer;

/// How the copies are made.
#[derive(Debug, Clone)]
pub(super) struct Kind {
    /// The engine, the same for all nodes.
    pub(super) engine: Engine,
    /// FULL, or a kind of increment.
    pub(super) mode: BackupMode,
    /// What it builds on, the FULL first; empty: nothing.
    pub(super) parents: Vec<Manifest>,
}

/// Why the engine `probackup` cannot be used on a host.
fn missing(host: &Host) -> Option<String> {
    match &host.facts.probackup {
        None => Some("the agent is of a version that does not know it".to_owned()),
        Some(ProbackupFacts { missing, .. }) => missing.clone(),
    }
}

fn is_opengauss(host: &Host) -> bool {
    let server = host.facts.server.as_ref();
    server.is_some_and(|server| server.flavour == "opengauss")
}

/// Chooses the engine, before anything is written.
///
/// # Errors
/// If a host cannot do what is asked for, with what would help.
pub(super) fn engine(args: &BackupArgs, hosts: &[Host], printer: &Printer) -> Result<Engine> {
    let without = hosts
        .iter()
        .find_map(|host| missing(host).map(|why| (host, why)));
    let only_direct = args.engine == EngineChoice::Direct;
    if let Some(host) = hosts.iter().find(|host| is_opengauss(host))
        && only_direct
    {
        let name = host.agent.name();
        let message = format!(
            "the database of the agent at {name} is an openGauss: the engine `direct` copies PostgreSQL only"
        );
        return Err(Failure::usage(message)
            .on(name)
            .next("leave `--engine` out"));
    }
    if only_direct && args.mode.is_increment() {
        let message = format!(
            "the engine `direct` makes no increments, and {} is one",
            args.mode
        );
        return Err(Failure::usage(message).next("leave `--engine` out, or use `-b FULL`"));
    }
    let Some((host, why)) = without else {
        return Ok(if only_direct {
            Engine::Direct
        } else {
            Engine::Probackup
        });
    };
    let needed = args.engine == EngineChoice::Probackup
        || args.mode.is_increment()
        || hosts.iter().any(is_opengauss);
    if !needed {
        let some = hosts.iter().any(|host| missing(host).is_none());
        if some && !only_direct {
            let message = format!(
                "the engine `direct` is used for all nodes, since this one cannot use `probackup`: {why}"
            );
            printer.warning(Some(&host.agent.name()), &message);
        }
        return Ok(Engine::Direct);
    }
    let message = format!("the engine `probackup` cannot be used: {why}");
    let next = if args.mode.is_increment() {
        "mend that, or make a FULL without it: gs_pitr backup -b FULL --engine direct"
    } else {
        "mend that, or, for a PostgreSQL, use `--engine direct`"
    };
    Err(Failure::new(ErrorKind::Incompatible, message)
        .on(host.agent.name())
        .next(next))
}

/// Finds what an increment builds on: the backup that is named, or the newest one that has a fitting copy of every node.
/// Nothing is written.
///
/// # Errors
/// If there is none, with the reason and the command that helps; what the catalog says.
pub(super) async fn parents(
    args: &BackupArgs,
    catalog: &Catalog,
    parts: &[Part],
) -> Result<Vec<Manifest>> {
    if !args.mode.is_increment() {
        return Ok(Vec::new());
    }
    let parent = match &args.parent {
        Some(text) => {
            let id = catalog.resolve_backup_id(text).await?;
            let manifest = catalog.manifest(&id).await?;
            fits(&manifest, parts).map_err(|why| unfit(&manifest, &why))?;
            manifest
        }
        None => newest(catalog, parts).await?,
    };
    let mut parents = catalog
        .parents(&parent)
        .await
        .map_err(|error| Failure::from(error).next("make a new FULL: gs_pitr backup -b FULL"))?;
    parents.push(parent);
    Ok(parents)
}

async fn newest(catalog: &Catalog, parts: &[Part]) -> Result<Manifest> {
    let mut complete: Vec<Manifest> = Vec::new();
    for listed in catalog.backups().await? {
        if let BackupState::Complete(manifest) = listed.state {
            complete.push(*manifest);
        }
    }
    complete.sort_by_key(|manifest| manifest.started);
    let mut why = None;
    while let Some(manifest) = complete.pop() {
        match fits(&manifest, parts) {
            Ok(()) => return Ok(manifest),
            Err(reason) => {
                why.get_or_insert_with(|| unfit(&manifest, &reason));
            }
        }
    }
    Err(why.unwrap_or_else(|| {
        let message = "an increment needs a backup to build on, and there is none";
        Failure::new(ErrorKind::Conflict, message).next(FULL)
    }))
}

/// What helps where there is nothing to build on.
const FULL: &str = "make a FULL first: gs_pitr backup -b FULL --engine probackup";

fn unfit(manifest: &Manifest, why: &str) -> Failure {
    let message = format!(
        "no increment can build on backup {}: {why}",
        manifest.backup_id
    );
    Failure::new(ErrorKind::Conflict, message).next(FULL)
}

/// Whether `manifest` has a copy of every node that an increment can build on.
fn fits(manifest: &Manifest, parts: &[Part]) -> std::result::Result<(), String> {
    for part in parts {
        let node = part.node;
        let copy = manifest.nodes.iter().find(|copy| copy.node_id == node);
        let Some(copy) = copy else {
            return Err(format!("it has no copy of node {node}"));
        };
        copy_fits(copy, part).map_err(|why| format!("node {node}: {why}"))?;
    }
    Ok(())
}

fn copy_fits(copy: &NodeBackup, part: &Part) -> std::result::Result<(), String> {
    let Some(probackup) = &copy.probackup else {
        return Err("its copy was made by the engine `direct`".to_owned());
    };
    if copy.epoch != part.epoch {
        return Err(format!(
            "its copy is of epoch {}, and the node is in {} now",
            copy.epoch, part.epoch
        ));
    }
    let server = part.host.facts.server.as_ref();
    if let Some(server) = server.filter(|server| server.timeline != copy.timeline) {
        return Err(format!(
            "its copy is of timeline {}, and the database is on {} now",
            copy.timeline, server.timeline
        ));
    }
    let here = part.host.facts.probackup.as_ref();
    let here = here.and_then(|facts| facts.program.as_deref());
    match here.and_then(|path| path.rsplit('/').next()) {
        Some(name) if name == probackup.program => Ok(()),
        Some(name) => Err(format!(
            "its copy was made by {}, and the agent has {name}",
            probackup.program
        )),
        None => Err(format!(
            "its copy was made by {}, which the agent does not have",
            probackup.program
        )),
    }
}
