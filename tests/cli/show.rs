//! `gs_pitr show` on a repository that the catalog has written: what is whole, and what is not.

use std::sync::Arc;

use catalog::Catalog;
use catalog::ids::{BackupId, EpochId, PointId};
use catalog::model::{Consistency, FORMAT, Manifest, ManifestState, NodeBackup, NodePoint, Point};
use catalog::repo::{NewEpoch, NewNode};
use jiff::Timestamp;
use pipeline::pack::IndexInfo;
use pipeline::store::{Key, ObjectStore as _};
use serde_json::{Map, json};
use support::s3::{self, S3Server};
use uuid::Uuid;

use crate::{Home, Ran, ran};

const GOOD: &str = "20261121T040233Z-F-00000001";
const OTHER: &str = "20261122T040233Z-F-00000002";

fn time(text: &str) -> Timestamp {
    text.parse().unwrap()
}

fn segment(number: u32) -> String {
    format!("0000000100000000{number:08X}")
}

fn copy(node: Uuid, epoch: &EpochId) -> NodeBackup {
    NodeBackup {
        node_id: node,
        attempt: 1,
        epoch: epoch.clone(),
        host: "db1.example".into(),
        port: 5432,
        system_identifier: 7_123_456_789_012_345_678,
        flavour: "postgresql".into(),
        server_version_num: 150_020,
        control_version: 1300,
        catalog_version: 202_209_061,
        wal_segment_size: 16 << 20,
        data_checksums: true,
        timeline: 1,
        start_lsn: "0/2000028".into(),
        stop_lsn: "0/2000138".into(),
        started: time("2026-11-21T04:02:33Z"),
        completed: time("2026-11-21T04:03:03.5Z"),
        data_directory: "/srv/pg".into(),
        tablespaces: Vec::new(),
        backup_label: "START WAL LOCATION: 0/2000028\n".into(),
        tablespace_map: None,
        argv: Vec::new(),
        attachments: Vec::new(),
        wal_first: segment(2),
        wal_last: segment(2),
        packs: Vec::new(),
        index: IndexInfo {
            size: 100,
            sha256: "0".repeat(64),
            footer_offset: 50,
            entries: 3,
            extra: Map::new(),
        },
        files: 3,
        plain_bytes: 3 << 20,
        stored_bytes: 1 << 20,
        corrupt_pages: Vec::new(),
        probackup: None,
        extra: Map::new(),
    }
}

/// Writes a backup of one node, with its point.
async fn backup(catalog: &Catalog, id: &str, node: Uuid, epoch: &EpochId) {
    let backup_id: BackupId = id.parse().unwrap();
    let point_id: PointId = id.replace("-F-", "-P-").parse().unwrap();
    let operation = Uuid::new_v4();
    let point = Point {
        format: FORMAT,
        point_id: point_id.clone(),
        created: time("2026-11-21T04:03:04Z"),
        consistency: Consistency::PerNode,
        csn: None,
        lock_ms: 0,
        proof: None,
        lock: None,
        metadata: None,
        label: None,
        base: None,
        operation,
        nodes: vec![NodePoint {
            node_id: node,
            epoch: epoch.clone(),
            timeline: 1,
            restore_point: format!("gs_pitr_{point_id}"),
            record_lsn: "0/3000028".into(),
            end_lsn: "0/3000090".into(),
            made: time("2026-11-21T04:03:04Z"),
            wal_first: segment(2),
            wal_last: segment(3),
            extra: Map::new(),
        }],
        nonce: Uuid::new_v4(),
        extra: Map::new(),
    };
    catalog.put_point(&point).await.unwrap();
    let manifest = Manifest {
        format: FORMAT,
        backup_id,
        state: ManifestState::Complete,
        mode: "FULL".into(),
        engine: "direct".into(),
        parent: None,
        label: Some("before the upgrade".into()),
        consistency: Consistency::PerNode,
        unproved: None,
        point: Some(point_id),
        started: time("2026-11-21T04:02:33Z"),
        completed: time("2026-11-21T04:03:05Z"),
        operation,
        writer: "a test".into(),
        nodes: vec![copy(node, epoch)],
        nonce: Uuid::new_v4(),
        extra: Map::new(),
    };
    catalog.commit_backup(&manifest).await.unwrap();
}

struct World {
    server: S3Server,
    home: Home,
    node: Uuid,
}

impl World {
    async fn new() -> Self {
        let server = s3::start(s3::Options::default()).await.unwrap();
        let operation = Uuid::new_v4();
        let store = Arc::new(server.store().unwrap());
        let catalog = Catalog::open_or_create(store, operation).await.unwrap();
        let new = NewNode {
            system_identifier: 7_123_456_789_012_345_678,
            host: "db1.example".into(),
            port: 5432,
        };
        let node = catalog.register_node(new, operation).await.unwrap().node_id;
        let new = NewEpoch {
            node_id: node,
            parent: None,
            timeline: 1,
            machine_id: "machine".into(),
            data_directory: "/srv/pg".into(),
            host: "db1.example".into(),
            port: 5432,
        };
        let epoch = catalog.start_epoch(new, operation).await.unwrap().epoch;
        for id in [GOOD, OTHER] {
            backup(&catalog, id, node, &epoch).await;
        }
        let home = Home::new();
        Self { server, home, node }
    }

    fn run(&self, args: &[&str]) -> Ran {
        let options = self.server.options();
        let mut command = self.home.command(args);
        command.args(["--repo", &format!("s3://{}", options.bucket)]);
        command.args([
            "--s3-endpoint",
            &self.server.endpoint(),
            "--s3-region",
            &options.region,
        ]);
        command.env("AWS_ACCESS_KEY_ID", &options.access_key);
        command.env("AWS_SECRET_ACCESS_KEY", &options.secret_key);
        ran(&mut command)
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn backups_are_listed_for_people_and_machines() {
    let world = World::new().await;
    let listed = world.run(&["show"]);
    assert_eq!(listed.code, 0, "{listed:?}");
    insta::assert_snapshot!(listed.stdout, @r"
    ID                           MODE  ENGINE  STATUS    CONSISTENCY  COMPLETED             NODES  PLAIN    STORED   LABEL
    20261121T040233Z-F-00000001  FULL  direct  complete  per-node     2026-11-21 04:03:05Z  1      3.0 MiB  1.0 MiB  before the upgrade
    20261122T040233Z-F-00000002  FULL  direct  complete  per-node     2026-11-21 04:03:05Z  1      3.0 MiB  1.0 MiB  before the upgrade
    ");

    let listed = world.run(&["show", "--output", "json"]).result();
    assert_eq!(listed["status"], "ok");
    let first = &listed["backups"][0];
    assert_eq!(
        json!({
            "id": first["id"], "mode": first["mode"], "engine": first["engine"], "status": first["status"],
            "consistency": first["consistency"], "point": first["point"], "started": first["started"],
            "completed": first["completed"],
        }),
        json!({
            "id": GOOD, "mode": "FULL", "engine": "direct", "status": "complete",
            "consistency": "per-node", "point": "20261121T040233Z-P-00000001",
            "started": "2026-11-21T04:02:33Z", "completed": "2026-11-21T04:03:05Z",
        })
    );
    let node = &first["nodes"][0];
    assert_eq!(node["node_id"], world.node.to_string());
    assert_eq!(node["plain_bytes"], 3 << 20);
    assert_eq!(node["seconds"], 30.5);
}

#[tokio::test(flavor = "multi_thread")]
async fn one_backup_is_shown_by_a_unique_beginning() {
    let world = World::new().await;
    let shown = world.run(&["show", "20261121"]);
    assert_eq!(shown.code, 0, "{shown:?}");
    let text = shown.stdout.replace(&world.node.to_string(), "NODE");
    let text: Vec<_> = text
        .lines()
        .filter(|line| !line.contains("epoch"))
        .collect();
    insta::assert_snapshot!(text.join("\n"), @r"
    backup            20261121T040233Z-F-00000001
    status            complete
    mode              FULL
    engine            direct
    consistency       per-node
    point             20261121T040233Z-P-00000001
    label             before the upgrade
    started           2026-11-21 04:02:33Z
    completed         2026-11-21 04:03:05Z

    node              NODE
      source          db1.example:5432
      version         15.20
      data directory  /srv/pg
      tablespaces     0
      size            3.0 MiB plain, 1.0 MiB stored, 3 files
      copy            0/2000028 to 0/2000138 on timeline 1
      point           0/3000090 (gs_pitr_20261121T040233Z-P-00000001)
      WAL             000000010000000000000002 to 000000010000000000000003
    ");

    let (code, kind, message) = world.run(&["show", "2026", "--output", "json"]).error();
    assert_eq!((code, kind.as_str()), (2, "usage"));
    assert!(
        message.contains(GOOD) && message.contains(OTHER),
        "{message}"
    );
    let (code, kind, _) = world.run(&["show", "2031", "--output", "json"]).error();
    assert_eq!((code, kind.as_str()), (8, "not-found"));
}

#[tokio::test(flavor = "multi_thread")]
async fn what_cannot_be_restored_is_listed_as_such() {
    let world = World::new().await;
    let manifest = format!("backups/{GOOD}/manifest.json");
    assert!(world.server.flip_bit(&manifest, 2000));
    let store = world.server.store().unwrap();
    for key in [
        format!("backups/{OTHER}/deleted.json"),
        "backups/20261123T040233Z-F-00000003/x/1/pack-00000".to_owned(),
    ] {
        let key = Key::new(key).unwrap();
        store.put_if_absent(&key, "{}".into()).await.unwrap();
    }
    let listed = world.run(&["show", "--output", "json"]).result();
    let states: Vec<_> = listed["backups"]
        .as_array()
        .unwrap()
        .iter()
        .map(|it| &it["status"])
        .collect();
    assert_eq!(states, ["damaged", "deleted", "unfinished"]);
    assert!(
        listed["backups"][0]["problem"]
            .as_str()
            .unwrap()
            .contains(&manifest)
    );

    let (code, kind, message) = world.run(&["show", GOOD, "--output", "json"]).error();
    assert_eq!((code, kind.as_str()), (9, "damaged"), "{message}");
    let (code, kind, message) = world.run(&["show", OTHER, "--output", "json"]).error();
    assert_eq!((code, kind.as_str()), (8, "not-found"), "{message}");
    assert!(message.contains("deleted"), "{message}");
}

#[tokio::test(flavor = "multi_thread")]
async fn the_mirror_answers_when_the_bucket_is_away() {
    let world = World::new().await;
    let none = world.run(&["show", "--from-mirror", "--output", "json"]);
    assert_eq!(none.error().0, 8, "{none:?}");
    assert_eq!(world.run(&["show"]).code, 0);
    world.server.set_down(true);
    let away = world.run(&["show", "--output", "json"]);
    assert_eq!(
        (away.error().0, away.error().1.as_str()),
        (3, "store-unavailable")
    );
    let next = away.result()["error"]["next"].as_str().unwrap().to_owned();
    assert!(next.contains("--from-mirror"), "{next}");

    let mirrored = world.run(&["show", "--from-mirror", "--output", "json"]);
    assert_eq!(mirrored.code, 0, "{mirrored:?}");
    let result = mirrored.result();
    assert_eq!(result["source"], "mirror");
    assert_eq!(result["backups"].as_array().unwrap().len(), 2);
    assert!(
        mirrored.stdout.lines().next().unwrap().contains("warning"),
        "{mirrored:?}"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn wrong_keys_are_named() {
    let world = World::new().await;
    world.server.set_keys("another", "secret");
    let (code, kind, _) = world.run(&["show", "--output", "json"]).error();
    assert_eq!((code, kind.as_str()), (4, "store-denied"));
}
