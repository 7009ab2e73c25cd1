use agent_api::Place;

use super::super::workspace::tests::{journal, names, spec};
use super::super::workspace::{Found, Workspace};
use super::*;

/// Small files and empty directories, as a data directory has them.
fn database(at: &Path, content: &str) {
    for name in ["base", "pg_notify", "pg_tblspc"] {
        fs::create_dir_all(at.join(name)).unwrap();
    }
    fs::write(at.join("PG_VERSION"), "15").unwrap();
    fs::write(at.join("base/1"), content).unwrap();
}

fn content(at: &Path) -> String {
    fs::read_to_string(at.join("base/1")).unwrap_or_default()
}

struct Case {
    place: Place,
    mount: bool,
}

const CASES: [Case; 4] = [
    Case {
        place: Place::Fresh,
        mount: false,
    },
    Case {
        place: Place::Fresh,
        mount: true,
    },
    Case {
        place: Place::Replace {
            system_identifier: 7,
        },
        mount: false,
    },
    Case {
        place: Place::Replace {
            system_identifier: 7,
        },
        mount: true,
    },
];

/// A promoted copy beside (or inside) its target.
fn promoted(root: &Path, case: &Case) -> Workspace {
    let target = root.join("node");
    let spec = spec(&target, case.place);
    let replaces = case.place != Place::Fresh;
    if replaces {
        database(&target, "old");
    } else if case.mount {
        fs::create_dir(&target).unwrap();
        // A file system's own.
        fs::create_dir(target.join("lost+found")).unwrap();
    }
    let mut workspace = Workspace::create(journal(&spec, case.mount), &spec).unwrap();
    database(&workspace.places.data, "new");
    workspace
        .note(|journal| journal.stage = Stage::Promoted)
        .unwrap();
    workspace
}

fn check(workspace: &Workspace, case: &Case) {
    let places = &workspace.places;
    assert_eq!(workspace.journal.stage, Stage::InPlace);
    assert_eq!(content(&places.target), "new");
    for name in ["base", "pg_notify", "pg_tblspc", "PG_VERSION"] {
        assert!(places.target.join(name).exists(), "{name}");
    }
    if case.place != Place::Fresh {
        assert_eq!(content(&places.old), "old");
        let all = [
            ".gs_pitr-old.json",
            "PG_VERSION",
            "base",
            "pg_notify",
            "pg_tblspc",
        ];
        assert_eq!(names(&places.old), all);
    }
    if case.mount && case.place == Place::Fresh {
        assert!(places.target.join("lost+found").exists());
    }
}

/// Killed between any two steps, the journal alone leads to the end; one that ran through counts the steps.
#[tokio::test]
async fn killed_at_any_step_the_switch_is_finished_by_its_journal() {
    for case in &CASES {
        let mut steps = 0;
        loop {
            let root = tempfile::tempdir().unwrap();
            let mut workspace = promoted(root.path(), case);
            let work = workspace.places.work.clone();
            let mut ended = false;
            for _ in 0..steps {
                ended = step(&mut workspace).unwrap();
            }
            // Neither half: what stands at the target has all of one and nothing of the other.
            if !case.mount && workspace.places.target.exists() {
                let content = content(&workspace.places.target);
                assert!(["old", "new"].contains(&content.as_str()), "{content}");
            }
            drop(workspace);
            let mut again = Found::read(&work).unwrap().take().await.unwrap();
            run(&mut again).unwrap();
            check(&again, case);
            // Done again it changes nothing.
            run(&mut again).unwrap();
            check(&again, case);
            again.finish().await.unwrap();
            assert!(!work.exists());
            if ended {
                break;
            }
            steps += 1;
        }
        assert!(steps >= 4, "{steps}");
    }
}

/// A rename whose record was lost with the power is seen by what lies where.
#[tokio::test]
async fn a_step_that_was_done_and_not_noted_is_not_done_twice() {
    let case = &CASES[3];
    let root = tempfile::tempdir().unwrap();
    let mut workspace = promoted(root.path(), case);
    // Planned, one entry moved; then everything else goes out behind the journal's back.
    step(&mut workspace).unwrap();
    rename_all(&workspace.journal.out.clone()).unwrap();
    let work = workspace.places.work.clone();
    drop(workspace);
    let mut again = Found::read(&work).unwrap().take().await.unwrap();
    assert_eq!(again.journal.stage, Stage::Out);
    run(&mut again).unwrap();
    check(&again, case);
}

#[test]
fn something_new_at_a_fresh_target_is_not_overwritten() {
    let root = tempfile::tempdir().unwrap();
    let mut workspace = promoted(root.path(), &CASES[0]);
    database(&workspace.places.target, "another's");
    assert!(matches!(
        run(&mut workspace),
        Err(WorkspaceError::Foreign(_))
    ));
    assert_eq!(content(&workspace.places.target), "another's");
    assert_eq!(content(&workspace.places.data), "new");
}

#[test]
fn a_database_is_removed_in_one_step_as_seen_from_its_place() {
    for mount in [false, true] {
        let root = tempfile::tempdir().unwrap();
        let place = Place::InPlace {
            system_identifier: 7,
        };
        let target = root.path().join("node");
        database(&target, "old");
        let space = root.path().join("space");
        fs::create_dir_all(space.join("PG_15_1")).unwrap();
        let spec = spec(&target, place);
        let mut journal = journal(&spec, mount);
        if let Some(live) = &mut journal.live {
            live.tablespaces.insert("16385".into(), space.clone());
        }
        let mut workspace = Workspace::create(journal, &spec).unwrap();
        clear_target(&mut workspace, "PG_15_1").unwrap();
        assert!(!target.join("PG_VERSION").exists() && names(&space).is_empty());
        assert!(!workspace.places.removed.exists());
        database(&workspace.places.data, "new");
        workspace
            .note(|journal| journal.stage = Stage::Promoted)
            .unwrap();
        run(&mut workspace).unwrap();
        assert_eq!(content(&target), "new");
        assert!(workspace.journal.old.is_none());
    }
}
