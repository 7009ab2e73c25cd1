//! The mirror on the local disk.

use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;

use catalog::mirror::Mirror;
use catalog::{CatalogError, keys};
use serde_json::json;

use super::samples::{self, backup_id, enveloped, point_id};
use super::with_backup;

fn mode(path: &Path) -> u32 {
    fs::metadata(path).unwrap().permissions().mode() & 0o7777
}

#[tokio::test]
async fn the_mirror_is_what_the_bucket_has_whatever_was_there() {
    let (store, catalog, manifest) = with_backup().await;
    let home = tempfile::tempdir().unwrap();
    let home = home.path().join("home").join(".gs_pitr");
    let mirror = Mirror::new(&home, catalog.repository().repository_id);
    assert!(mirror.backups().await.unwrap().is_empty());

    let report = mirror.sync(&catalog).await.unwrap();
    assert_eq!((report.written, report.kept, report.removed), (2, 0, 0));
    let backup = mirror
        .directory()
        .join(format!("backups/{}.json", manifest.backup_id));
    let point = mirror
        .directory()
        .join(format!("points/{}.json", point_id('b')));
    let in_bucket = store
        .bytes(keys::manifest(&manifest.backup_id).as_str())
        .unwrap();
    assert_eq!(fs::read(&backup).unwrap(), in_bucket);
    for file in [&backup, &point] {
        assert_eq!(mode(file), 0o600);
        for directory in file.ancestors().skip(1).take(4) {
            assert_eq!(mode(directory), 0o700, "{}", directory.display());
        }
    }
    assert_eq!(mirror.backups().await.unwrap()[0].nodes, manifest.nodes);
    assert_eq!(mirror.points().await.unwrap().len(), 1);
    let report = mirror.sync(&catalog).await.unwrap();
    assert_eq!((report.written, report.kept, report.removed), (0, 2, 0));

    // Damaged files are ignored, and mended by the next sync; so are those that nobody knows.
    let mut bad = in_bucket.to_vec();
    bad[50] ^= 1;
    fs::write(&backup, bad).unwrap();
    fs::write(&point, "").unwrap();
    let unknown = mirror
        .directory()
        .join("backups/20200101T000000Z-F-00000000.json");
    fs::write(&unknown, &in_bucket).unwrap();
    assert!(mirror.backups().await.unwrap().is_empty());
    assert!(mirror.points().await.unwrap().is_empty());
    let report = mirror.sync(&catalog).await.unwrap();
    assert_eq!((report.written, report.kept, report.removed), (2, 0, 1));
    assert_eq!(fs::read(&backup).unwrap(), in_bucket);
    assert!(!unknown.exists());

    fs::remove_dir_all(&home).unwrap();
    assert_eq!(mirror.sync(&catalog).await.unwrap().written, 2);

    // A tombstone takes the backup out of the mirror, a lost point its point.
    store.tamper(
        &keys::tombstone(&manifest.backup_id),
        Some(enveloped(&json!({}))),
    );
    store.tamper(&keys::point(&point_id('b')), None);
    assert_eq!(mirror.sync(&catalog).await.unwrap().removed, 2);
    assert!(!backup.exists() && !point.exists());
}

#[tokio::test]
async fn what_a_killed_command_left_in_the_mirror_goes_and_what_a_living_one_writes_stays() {
    let (_store, catalog, _manifest) = with_backup().await;
    let home = tempfile::tempdir().unwrap();
    let mirror = Mirror::new(home.path(), catalog.repository().repository_id);
    mirror.sync(&catalog).await.unwrap();
    let folder = mirror.directory().join("backups");
    let [dead, alive] = [".tmp-dead", ".tmp-alive"].map(|name| folder.join(name));
    fs::write(&dead, "half").unwrap();
    let writing = fs::File::create(&alive).unwrap();
    writing.lock().unwrap();
    mirror.sync(&catalog).await.unwrap();
    assert!(!dead.exists() && alive.exists());
    // Its process has been killed: the lock is gone with it.
    drop(writing);
    mirror.sync(&catalog).await.unwrap();
    assert!(!alive.exists());
}

#[tokio::test]
async fn the_mirror_keeps_unknown_fields_and_leaves_out_what_is_damaged() {
    let (store, catalog, manifest) = with_backup().await;
    let home = tempfile::tempdir().unwrap();
    let mirror = Mirror::new(home.path(), catalog.repository().repository_id);
    let node = &manifest.nodes[0];
    let id = backup_id('c');
    let mut body = samples::manifest_json(&id, &point_id('b'), node.node_id, &node.epoch);
    body["later"] = json!(1.5);
    body["nodes"][0]["packs"][0]["later"] = json!("kept");
    let newer = enveloped(&body);
    store.tamper(&keys::manifest(&id), Some(newer.clone()));
    let good = store
        .bytes(keys::manifest(&manifest.backup_id).as_str())
        .unwrap();
    store.tamper(&keys::manifest(&backup_id('d')), Some(good.slice(..100)));
    let report = mirror.sync(&catalog).await.unwrap();
    assert_eq!(report.written, 3);
    assert!(
        matches!(report.unusable[..], [CatalogError::Damaged { .. }]),
        "{report:?}"
    );
    let mirrored = mirror.directory().join(format!("backups/{id}.json"));
    assert_eq!(fs::read(mirrored).unwrap(), newer);

    // Damaged in the bucket after it was mirrored: a file that another size unmasks goes too.
    store.tamper(&keys::manifest(&id), Some(newer.slice(1..)));
    let report = mirror.sync(&catalog).await.unwrap();
    assert_eq!((report.removed, report.unusable.len()), (1, 2));
}
