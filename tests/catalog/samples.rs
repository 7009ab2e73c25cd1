//! Bodies with every field filled in.

use bytes::Bytes;
use catalog::envelope::sha256_hex;
use catalog::ids::{BackupId, EpochId, PointId};
use catalog::model::{Manifest, Node, Point};
use catalog::repo::{Catalog, NewEpoch, NewNode, NodeIdentity};
use serde_json::{Value, json};
use uuid::Uuid;

pub(crate) const OPERATION: Uuid = Uuid::from_u128(0x0009_0907);

pub(crate) async fn node_with_epoch(catalog: &Catalog) -> (Node, EpochId) {
    let new = NewNode {
        system_identifier: 7_000_000_000_000_000_001,
        host: "db1".into(),
        port: 5432,
    };
    let node = catalog.register_node(new, OPERATION).await.unwrap();
    let epoch = catalog
        .start_epoch(epoch(node.node_id), OPERATION)
        .await
        .unwrap();
    (node, epoch.epoch)
}

pub(crate) fn epoch(node: Uuid) -> NewEpoch {
    NewEpoch {
        node_id: node,
        parent: None,
        timeline: 1,
        machine_id: "m1".into(),
        data_directory: "/data".into(),
        host: "db1".into(),
        port: 5432,
    }
}

pub(crate) fn identity() -> NodeIdentity {
    NodeIdentity {
        system_identifier: 7_000_000_000_000_000_001,
        machine_id: "m1".into(),
        data_directory: "/data".into(),
    }
}

pub(crate) fn backup_id(last: char) -> BackupId {
    format!("20261121T040233Z-F-9f3c1a2{last}").parse().unwrap()
}

pub(crate) fn point_id(last: char) -> PointId {
    format!("20261121T040533Z-P-9f3c1a2{last}").parse().unwrap()
}

pub(crate) fn point(id: &PointId, node: Uuid, epoch: &EpochId) -> Point {
    serde_json::from_value(point_json(id, node, epoch)).unwrap()
}

pub(crate) fn point_json(id: &PointId, node: Uuid, epoch: &EpochId) -> Value {
    json!({
        "format": {"major": 1, "minor": 0},
        "point_id": id,
        "created": "2026-11-21T04:05:33Z",
        "consistency": "per-node",
        "csn": null,
        "lock_ms": 0,
        "operation": OPERATION,
        "nodes": [{
            "node_id": node, "epoch": epoch, "timeline": 1, "restore_point": format!("gs_pitr_{id}"),
            "record_lsn": "0/5000000", "end_lsn": "0/5000068", "made": "2026-11-21T04:05:33Z",
            "wal_first": "000000010000000000000002", "wal_last": "000000010000000000000005",
        }],
        "nonce": Uuid::new_v4(),
    })
}

pub(crate) fn manifest(id: &BackupId, point: &PointId, node: Uuid, epoch: &EpochId) -> Manifest {
    serde_json::from_value(manifest_json(id, point, node, epoch)).unwrap()
}

pub(crate) fn manifest_json(id: &BackupId, point: &PointId, node: Uuid, epoch: &EpochId) -> Value {
    json!({
        "format": {"major": 1, "minor": 0},
        "backup_id": id,
        "state": "complete",
        "mode": "FULL",
        "engine": "direct",
        "parent": null,
        "label": "nightly",
        "consistency": "per-node",
        "point": point,
        "started": "2026-11-21T04:02:33Z",
        "completed": "2026-11-21T04:05:40Z",
        "operation": OPERATION,
        "writer": "gs_pitr 0.1.0",
        "nodes": [copy_json(node, epoch)],
        "nonce": Uuid::new_v4(),
    })
}

fn copy_json(node: Uuid, epoch: &EpochId) -> Value {
    json!({
            "node_id": node, "attempt": 1, "epoch": epoch, "host": "db1", "port": 5432,
            "system_identifier": "7000000000000000001", "flavour": "postgresql",
            "server_version_num": 150_020, "control_version": 1300, "catalog_version": 202_209_061,
            "wal_segment_size": 16_777_216, "data_checksums": true, "timeline": 1,
            "start_lsn": "0/2000028", "stop_lsn": "0/4000100",
            "started": "2026-11-21T04:02:34Z", "completed": "2026-11-21T04:05:30Z",
            "data_directory": "/data",
            "tablespaces": [{"oid": 16_400, "location": "/fast/ts"}],
            "backup_label": "START WAL LOCATION: 0/2000028\n", "tablespace_map": "16400 /fast/ts\n",
            "argv": ["-D", "/data"],
            "attachments": [
                {"path": "attachments/postgresql.conf", "source": "/etc/postgresql.conf", "role": "config"},
            ],
            "wal_first": "000000010000000000000002", "wal_last": "000000010000000000000005",
            "packs": [{
                "number": 0, "size": 1000, "frames": 3, "plain_bytes": 4000,
                "parts_sha256": "a".repeat(64), "table_offset": 900, "table_sha256": "b".repeat(64),
            }],
            "index": {"size": 500, "sha256": "c".repeat(64), "footer_offset": 400, "entries": 10},
            "files": 9, "plain_bytes": 4000, "stored_bytes": 1500, "corrupt_pages": [],
    })
}

/// An envelope made without the product's code.
pub(crate) fn enveloped(body: &Value) -> Bytes {
    let body = body.to_string();
    let hash = sha256_hex(body.as_bytes());
    format!("{{\"body\":{body},\"sha256\":\"{hash}\"}}").into()
}
