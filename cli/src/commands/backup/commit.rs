//! What the agents answered, made into a point and a manifest, and told.

use std::fmt::Write as _;
use std::time::Duration;

use agent_api::OperationStatus;
use catalog::ids::BackupId;
use catalog::model::{
    BackupMode, Consistency, Engine, FORMAT, Manifest, ManifestState, MetadataRef, NodeBackup,
    NodePoint, Point,
};
use catalog::{Catalog, CatalogError};
use jiff::Timestamp;
use serde_json::json;
use uuid::Uuid;

use super::agent_failed;
use super::nodes::Part;
use crate::coordinator::Moment;
use crate::coordinator::obstacle::printable;
use crate::failure::Result;
use crate::printer::{Printer, bytes, duration};

/// Name of the field of a node's part of a manifest that keeps the agent's address: `restore` finds
/// agents by it.
pub(crate) const AGENT_FIELD: &str = "agent";

/// What is known of the backup beside what the agents say.
pub(super) struct Head {
    pub(super) operation: Uuid,
    pub(super) backup: BackupId,
    pub(super) started: Timestamp,
    pub(super) label: Option<String>,
    pub(super) engine: Engine,
    pub(super) mode: BackupMode,
    pub(super) parent: Option<BackupId>,
}

/// Makes the point and the manifest.
///
/// # Errors
/// If an agent's answer is not about what it was asked for.
pub(super) fn documents(
    head: Head,
    moment: &Moment,
    parts: &[Part],
    shipped: Vec<OperationStatus>,
) -> Result<(Point, Manifest)> {
    let (mut backups, mut points) = (Vec::new(), Vec::new());
    for ((part, status), mark) in parts.iter().zip(shipped).zip(&moment.marks) {
        let (mut backup, point) = answer(part, status)?;
        let wrong =
            |what: &str| agent_failed(&part.host.agent, format!("the agent's result has {what}"));
        if backup.node_id != part.node || point.node_id != part.node {
            return Err(wrong("another node's id"));
        }
        if backup.epoch != part.epoch || point.epoch != part.epoch {
            return Err(wrong("another epoch"));
        }
        if backup.probackup.is_some() != (head.engine == Engine::Probackup) {
            return Err(wrong("a copy of another engine"));
        }
        if point.restore_point != mark.restore_point || point.end_lsn != mark.end_lsn {
            return Err(wrong("another restore point than it made"));
        }
        let address = part.host.agent.address().to_string();
        backup.extra.insert(AGENT_FIELD.to_owned(), address.into());
        backups.push(backup);
        points.push(point);
    }
    let point = Point {
        format: FORMAT,
        point_id: moment.point.clone(),
        created: moment.created,
        consistency: moment.consistency,
        csn: moment.csn.clone(),
        lock_ms: moment.lock_ms,
        proof: moment.proof.clone(),
        lock: moment.lock.clone(),
        metadata: None,
        label: None,
        base: None,
        operation: head.operation,
        nodes: points,
        nonce: Uuid::new_v4(),
        extra: serde_json::Map::new(),
    };
    let manifest = Manifest {
        format: FORMAT,
        backup_id: head.backup,
        state: ManifestState::Complete,
        mode: head.mode.name().into(),
        engine: head.engine.name().into(),
        parent: head.parent,
        label: head.label,
        consistency: moment.consistency,
        unproved: moment
            .proof
            .as_ref()
            .and_then(|proof| proof.unproved.clone()),
        point: Some(moment.point.clone()),
        started: head.started,
        completed: Timestamp::now(),
        operation: head.operation,
        writer: concat!("gs_pitr ", env!("CARGO_PKG_VERSION")).into(),
        nodes: backups,
        nonce: Uuid::new_v4(),
        extra: serde_json::Map::new(),
    };
    Ok((point, manifest))
}

/// Writes what the proxies knew at the point, if there are any.
///
/// # Errors
/// What the store says.
pub(crate) async fn metadata(
    catalog: &Catalog,
    moment: &Moment,
    printer: &Printer,
) -> Result<Option<MetadataRef>> {
    let Some(metadata) = &moment.metadata else {
        return Ok(None);
    };
    match catalog.put_metadata(metadata).await {
        Ok(written) => Ok(Some(written)),
        Err(error @ CatalogError::Refused { .. }) => {
            let message = format!("the proxies' metadata are not kept: {error}");
            printer.warning(None, &message);
            Ok(None)
        }
        Err(error) => Err(error.into()),
    }
}

fn answer(part: &Part, status: OperationStatus) -> Result<(NodeBackup, NodePoint)> {
    if let (Some(backup), Some(point)) = (status.backup, status.point) {
        return Ok((*backup, point));
    }
    let message = "the agent says that all is shipped, and not what".to_owned();
    Err(agent_failed(&part.host.agent, message))
}

/// Tells what was made; `copied` is how long each node's copy took.
pub(super) fn report(manifest: &Manifest, moment: &Moment, copied: &[Duration], printer: &Printer) {
    let mut text = format!(
        "backup {}, {} by {}",
        manifest.backup_id, manifest.mode, manifest.engine
    );
    if let Some(parent) = &manifest.parent {
        let _ = write!(text, " on {parent}");
    }
    let mut nodes = Vec::new();
    for (node, copied) in manifest.nodes.iter().zip(copied) {
        if !node.corrupt_pages.is_empty() {
            let (host, port, pages) = (&node.host, node.port, node.corrupt_pages.join(", "));
            let message =
                format!("pages with a wrong checksum on the source, kept as they are: {pages}");
            printer.warning(Some(&format!("{host}:{port}")), &message);
        }
        let _ = write!(
            text,
            "\n  {} {}:{}  {} read, {} stored, {}",
            node.node_id,
            node.host,
            node.port,
            bytes(node.plain_bytes),
            bytes(node.stored_bytes),
            duration(*copied),
        );
        nodes.push(json!({
            "node_id": node.node_id,
            "host": node.host,
            "port": node.port,
            "plain_bytes": node.plain_bytes,
            "stored_bytes": node.stored_bytes,
            "seconds": copied.as_secs_f64(),
        }));
    }
    let of = match (moment.consistency, &moment.proof) {
        (Consistency::PerNode, _) => "consistent per node only".to_owned(),
        (Consistency::Cluster, None) => "of the only node".to_owned(),
        (Consistency::Cluster, Some(proof)) => proof.window_ms.map_or_else(
            || "of the whole cluster".to_owned(),
            |ms| format!("of the whole cluster, proved in {ms} ms"),
        ),
    };
    let _ = write!(text, "\n  point {}, {of}", moment.point);
    if let Some(lock) = &moment.lock {
        let _ = match lock.tries {
            0 => write!(text, ", without a lock"),
            1 => write!(text, ", the cluster was locked for {} ms", lock.held_ms),
            tries => write!(
                text,
                ", the cluster was locked {tries} times, {} ms in all",
                lock.held_ms
            ),
        };
    }
    if let Some(csn) = &moment.csn {
        let _ = write!(text, ", CSN {}", printable(csn));
    }
    for prepared in moment.proof.iter().flat_map(|proof| &proof.in_doubt) {
        let message = format!(
            "the transaction `{}` of database `{}` is in doubt on node {}: a restore brings it back prepared",
            printable(&prepared.gid),
            printable(&prepared.database),
            prepared.node_id
        );
        printer.warning(None, &message);
    }
    printer.text(&text);
    let fields = json!({
        "backup_id": manifest.backup_id,
        "mode": manifest.mode,
        "engine": manifest.engine,
        "parent": manifest.parent,
        "consistency": manifest.consistency,
        "point": manifest.point,
        "unproved": manifest.unproved,
        "proof": moment.proof,
        "lock": moment.lock,
        "lock_ms": moment.lock_ms,
        "csn": moment.csn,
        "nodes": nodes,
    });
    printer.result("backup", fields);
}
