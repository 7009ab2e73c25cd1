use std::collections::BTreeMap;

use agent_api::Place;
use serde_json::json;

use super::super::live::Live;
use super::*;

pub(in crate::restore) fn names(directory: &Path) -> Vec<String> {
    let mut names: Vec<_> = fs::read_dir(directory)
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    names.sort();
    names
}

/// A restore to `target`, as far as a workspace looks at it.
pub(in crate::restore) fn spec(target: &Path, place: Place) -> RestoreSpec {
    let (epoch, backup) = ("00000001-9f3c1a2b", "20261121T040233Z-F-9f3c1a2b");
    let now = "2026-11-21T04:02:33Z";
    let node = Uuid::nil();
    serde_json::from_value(json!({
        "backup_id": backup,
        "node": {
            "node_id": node, "attempt": 1, "epoch": epoch, "host": "h", "port": 5432,
            "system_identifier": "7", "flavour": "postgresql", "server_version_num": 150_000,
            "control_version": 1300, "catalog_version": 202_209_061, "wal_segment_size": 16_777_216,
            "data_checksums": false, "timeline": 1, "start_lsn": "0/1", "stop_lsn": "0/2", "started": now,
            "completed": now, "data_directory": "/d", "tablespaces": [], "backup_label": "",
            "tablespace_map": null, "argv": [], "attachments": [], "wal_first": "", "wal_last": "",
            "packs": [], "index": {"size": 0, "sha256": "", "footer_offset": 0, "entries": 0},
            "files": 0, "plain_bytes": 0, "stored_bytes": 0, "corrupt_pages": []
        },
        "point": {
            "node_id": node, "epoch": epoch, "timeline": 1, "restore_point": "p", "record_lsn": "0/2",
            "end_lsn": "0/3", "made": now, "wal_first": "", "wal_last": ""
        },
        "restore": Uuid::new_v4(), "nodes": [node], "target": target, "place": place, "port": null, "jobs": 1
    }))
    .unwrap()
}

pub(in crate::restore) fn journal(spec: &RestoreSpec, mount: bool) -> Journal {
    let target: PathBuf = spec.target.clone().into();
    Journal {
        operation: Uuid::new_v4(),
        restore: spec.restore,
        mount,
        store: "s".into(),
        repository: None,
        stage: Stage::Making,
        decision: None,
        run: None,
        made: Vec::new(),
        literal: Vec::new(),
        live: (spec.place != Place::Fresh).then(|| Live {
            data: target.clone(),
            system_identifier: 7,
            major: 15,
            running: false,
            port: None,
            argv: Vec::new(),
            tablespaces: BTreeMap::new(),
            bindir: "/b".into(),
        }),
        target,
        stopped: false,
        out: Vec::new(),
        into: Vec::new(),
        clearing: false,
        cleared: Vec::new(),
        old: None,
        promoted: None,
    }
}

fn create(target: &Path) -> Result<Workspace, WorkspaceError> {
    let spec = spec(target, Place::Fresh);
    Workspace::create(journal(&spec, false), &spec)
}

fn literal(path: &Path, aside: bool) -> Literal {
    Literal {
        path: path.to_owned(),
        made: !path.exists(),
        version_directory: "PG_15_1".into(),
        aside: aside.then(|| path.join(".gs_pitr-old-12345678")),
        link: aside.then(|| "16385".into()),
    }
}

async fn discard(workspace: Workspace) {
    workspace.undo().await.unwrap();
    workspace.remove().await.unwrap();
}

#[tokio::test]
async fn a_discarded_restore_leaves_nothing() {
    let root = tempfile::tempdir().unwrap();
    let target = root.path().join("node");
    let (there, absent) = (root.path().join("there"), root.path().join("absent"));
    fs::create_dir(&there).unwrap();
    let mut workspace = create(&target).unwrap();
    let (run, config) = (workspace.run().to_owned(), workspace.places.config.clone());
    workspace.make(&config).unwrap();
    for path in [&there, &absent] {
        workspace.make_literal(&literal(path, false)).unwrap();
        fs::create_dir_all(path.join("PG_15_1/5")).unwrap();
    }
    fs::write(workspace.places.data.join("PG_VERSION"), "15").unwrap();
    assert!(run.exists() && !target.exists());
    discard(workspace).await;
    assert_eq!(names(root.path()), ["there"]);
    assert!(names(&there).is_empty() && !run.exists());
}

/// The files of a database that is to be replaced come back, however far it had got when it was killed.
#[tokio::test]
async fn files_moved_aside_come_back_from_every_step() {
    for steps in 0..4 {
        let root = tempfile::tempdir().unwrap();
        let space = root.path().join("space");
        fs::create_dir_all(space.join("PG_15_1/5")).unwrap();
        fs::write(space.join("PG_15_1/5/1"), "rows").unwrap();
        let mut workspace = create(&root.path().join("node")).unwrap();
        let literal = literal(&space, true);
        let (aside, kept) = (literal.aside.clone().unwrap(), literal.kept().unwrap());
        if steps == 3 {
            workspace.make_literal(&literal).unwrap();
            fs::create_dir_all(space.join("PG_15_1/5")).unwrap();
            fs::write(space.join("PG_15_1/5/1"), "replayed").unwrap();
        } else {
            // As `make_literal`, cut off.
            let operation = workspace.journal.operation;
            workspace
                .note(|journal| journal.literal.push(literal))
                .unwrap();
            if steps > 0 {
                private_file(&space.join(MARKER), &format!("{operation}\n")).unwrap();
                directory(&aside).unwrap();
            }
            if steps > 1 {
                fs::rename(space.join("PG_15_1"), kept).unwrap();
            }
        }
        discard(workspace).await;
        assert_eq!(names(&space), ["PG_15_1"], "{steps}");
        let rows = fs::read_to_string(space.join("PG_15_1/5/1")).unwrap();
        assert_eq!(rows, "rows", "{steps}");
    }
}

#[tokio::test]
async fn a_living_restore_is_not_disturbed_and_a_dead_one_is_taken_over() {
    let root = tempfile::tempdir().unwrap();
    let target = root.path().join("node");
    let mut first = create(&target).unwrap();
    let (config, work) = (first.places.config.clone(), first.places.work.clone());
    first.make(&config).unwrap();
    assert!(matches!(create(&target), Err(WorkspaceError::Foreign(_))));
    let found = Found::read(&work).unwrap();
    assert!(matches!(
        found.clone().take().await,
        Err(WorkspaceError::Busy(_))
    ));
    // Dropped without a word, as by SIGKILL: the lock is gone, the rest stays.
    let run = first.run().to_owned();
    drop(first);
    assert_eq!(names(root.path()), ["node.config", "node.gs_pitr-restore"]);
    // One beside it neither disturbs nor is disturbed.
    let other = create(&root.path().join("other")).unwrap();
    let taken = found.take().await.unwrap();
    assert!(!run.exists());
    discard(other).await;
    discard(taken).await;
    assert!(names(root.path()).is_empty());
}

#[test]
fn a_workspace_killed_before_its_journal_is_taken_away() {
    let root = tempfile::tempdir().unwrap();
    let target = root.path().join("node");
    let work = Places::workspace(&target, false);
    fs::create_dir(&work).unwrap();
    fs::write(work.join(LOCK), "").unwrap();
    fs::write(work.join("spec.json.new"), "{").unwrap();
    assert!(Found::read(&work).is_none());
    let workspace = create(&target).unwrap();
    assert!(workspace.places.data.exists());
}

#[tokio::test]
async fn what_is_not_ours_stays() {
    let root = tempfile::tempdir().unwrap();
    let target = root.path().join("node");
    let work = Places::workspace(&target, false);
    fs::create_dir(&work).unwrap();
    fs::write(work.join("mine"), "x").unwrap();
    assert!(matches!(create(&target), Err(WorkspaceError::Foreign(_))));
    fs::remove_file(work.join("mine")).unwrap();
    let mut workspace = create(&target).unwrap();
    let full = root.path().join("full");
    fs::create_dir(&full).unwrap();
    fs::write(full.join("x"), "x").unwrap();
    assert!(workspace.make(&full).is_err());
    assert!(workspace.make_literal(&literal(&full, false)).is_err());
    discard(workspace).await;
    assert_eq!(names(&full), ["x"]);
}
