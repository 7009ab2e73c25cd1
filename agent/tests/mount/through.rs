//! What `catalog_fs` shows in-process, through a real mount: the very same scripts, played by another process with the calls of
//! the system; and the errors of a copy that has failed.

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use pitr_agent::catalog_fs::Failure;
use pitr_agent::catalog_fs::life::{MountHow, MountSettings, Mounted};
use proptest::prelude::*;
use tokio::time::timeout;

use crate::ops::{self, DIRECTORIES, PlainDirectory, Script, Step};
use crate::scenes::SCENE;
use crate::world::{MIB, World, finish, run};
use crate::{Runtime, Way, model};

/// File with the script of the scene `player`, and where to play it.
pub(crate) const SCRIPT: &str = "GS_PITR_SCENE_SCRIPT";
pub(crate) const POINT: &str = "GS_PITR_SCENE_POINT";

/// A script takes seconds at most.
const PATIENCE: Duration = Duration::from_mins(1);

/// The way of this process itself.
fn way() -> Option<Way> {
    let test = "through_a_real_mount";
    if rustix::process::geteuid().is_root() {
        return Way::Root.is_here(test).then_some(Way::Root);
    }
    Way::Namespace.is_here(test).then_some(Way::Namespace)
}

fn settings(runtime: &Runtime) -> MountSettings {
    MountSettings {
        how: MountHow::Auto,
        runtime_dir: runtime.path.clone(),
        runner: PathBuf::from(env!("CARGO_BIN_EXE_pitr-agent")),
    }
}

/// The scene `player`: makes the calls of a script, and says what was wrong.
pub(crate) fn play() {
    let text = std::fs::read(std::env::var_os(SCRIPT).unwrap()).unwrap();
    let script: Script = serde_json::from_slice(&text).unwrap();
    let mut directory = PlainDirectory::new(PathBuf::from(std::env::var_os(POINT).unwrap()));
    if let Err(wrong) = script.play(&mut directory) {
        panic!("{wrong}");
    }
}

async fn played(mounted: &Mounted, script: &Script, file: &std::path::Path) -> Result<(), String> {
    std::fs::write(file, serde_json::to_vec(script).unwrap()).unwrap();
    let mut player = mounted.command(std::env::current_exe().unwrap());
    player
        .args(["--exact", "a_scene", "--nocapture"])
        .env(SCENE, "player")
        .env(SCRIPT, file)
        .env(POINT, mounted.path());
    let output = timeout(PATIENCE, player.output()).await;
    let output = output.map_err(|_| "it hangs".to_owned())?.unwrap();
    let words = [output.stdout, output.stderr].concat();
    let words = String::from_utf8_lossy(&words).into_owned();
    let over = output.status.success() && words.contains("SCENE OVER");
    if over { Ok(()) } else { Err(words) }
}

/// Not a directory into one above it: that is the kernel's own error, which never reaches a file system.
fn reaches_us(step: &Step) -> bool {
    let Step::RenameDirectory(from, to) = step else {
        return true;
    };
    !DIRECTORIES[*from].starts_with(DIRECTORIES[*to])
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 24, max_shrink_iters: 100, failure_persistence: None, ..ProptestConfig::default() })]

    /// Any sequence of calls gives what a plain directory gives, and what is stored is what a plain directory has.
    #[test]
    fn through_a_mount_it_is_a_plain_directory_that_streams_away((steps, spoils) in ops::steps(80)) {
        let Some(way) = way() else { return Ok(()) };
        let scratch = tempfile::tempdir().unwrap();
        let files = tempfile::tempdir().unwrap();
        let steps: Vec<_> = steps.into_iter().filter(reaches_us).collect();
        let script = model::script(&steps, spoils, scratch.path());
        let runtime = Runtime::new(way);
        run(async {
            let world = World::new(160 * MIB);
            let fs = world.fs().unwrap();
            let mounted = Mounted::start(Arc::clone(&fs), &settings(&runtime), "model").await.unwrap();
            let played = played(&mounted, &script, &files.path().join("script")).await;
            mounted.unmount().await.unwrap();
            prop_assert_eq!(played, Ok(()));
            let finished = finish(&fs).await;
            if script.spoiled {
                prop_assert!(matches!(finished, Err(Failure::Spoiled { .. })), "{:?}", finished);
                fs.abort().await;
                return Ok(());
            }
            let (copy, wal) = finished.unwrap();
            let target = files.path().join("back");
            std::fs::create_dir(&target).unwrap();
            let mut back = world.read_back(&copy, &wal, &target).await;
            // The mode of a segment that is not in packs is not kept.
            for segment in &wal {
                if let (Some(back), Some(due)) = (back.get_mut(&segment.path), script.tree.get(&segment.path)) {
                    back.0 = due.0;
                }
            }
            prop_assert_eq!(&back, &script.tree);
            Ok(())
        })?;
        runtime.is_clean();
    }
}

/// What cannot be stored is told to the program that writes it, by its own calls.
#[test]
fn a_program_hears_that_the_store_refuses() {
    let Some(way) = way() else { return };
    let runtime = Runtime::new(way);
    run(async {
        let world = World::new(160 * MIB);
        world.store.refuse_from_part.store(1, Ordering::SeqCst);
        let fs = world.fs().unwrap();
        let mounted = Mounted::start(Arc::clone(&fs), &settings(&runtime), "refused")
            .await
            .unwrap();
        let sh = |script: &str| {
            let mut command = mounted.command("/bin/sh");
            command
                .args(["-c", &format!("cd \"$0\" && {script}")])
                .arg(mounted.path());
            command
        };
        let base = "backups/node/T1/database/base";
        let writes = format!(
            "mkdir -p {base} && exec 3>{base}/open && head -c 200000000 /dev/urandom >{base}/1"
        );
        let output = timeout(PATIENCE, sh(&writes).output())
            .await
            .unwrap()
            .unwrap();
        let words = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(!output.status.success(), "{words}");
        assert!(words.contains("Input/output error"), "{words}");
        // From then on nothing is taken, and close(2) says so.
        let output = timeout(PATIENCE, sh(&format!(": >{base}/2")).output())
            .await
            .unwrap()
            .unwrap();
        assert!(!output.status.success());
        timeout(PATIENCE, fs.failed()).await.unwrap();
        mounted.unmount().await.unwrap();
        assert!(finish(&fs).await.is_err());
        fs.abort().await;
    });
    runtime.is_clean();
}
