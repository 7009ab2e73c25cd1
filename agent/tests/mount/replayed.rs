//! The recorded calls of the real programs (`tests/fixtures/probackup`), through a real mount: each returns what was recorded, and
//! what it returns in a plain directory; what is stored is what a plain directory has then.

use std::collections::BTreeMap;
use std::env;
use std::fs;
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use pitr_agent::catalog_fs::life::{MountSettings, Mounted};
use pitr_agent::catalog_fs::{CatalogFs, Done, FsError, Lower, LowerEntry, LowerId, LowerKind};
use support::probackup::replay::{self, Outcome};
use support::probackup::trace::{self, Event};
use tokio::time::timeout;

use crate::ops;
use crate::scenes::SCENE;
use crate::through::POINT;
use crate::world::{MIB, World, finish, run, tree};

/// Recordings that the scene `replayer` makes the calls of, and the file for what they return.
const RECORDINGS: &str = "GS_PITR_SCENE_RECORDINGS";
const OUTCOME: &str = "GS_PITR_SCENE_OUTCOME";

/// A recording takes seconds.
const PATIENCE: Duration = Duration::from_mins(1);
/// Of both servers that were recorded.
const SEGMENT: u64 = 16 << 20;

/// Files by path: mode, and content or that it is a directory.
type Tree = BTreeMap<String, (u32, Option<ops::Outcome>)>;

/// The calls of recordings that are joined by `+`.
fn events(recordings: &str) -> Vec<Event> {
    let events = recordings.split('+').flat_map(trace::recorded);
    // The catalog itself is there.
    events.filter(|event| event.path != ".").collect()
}

fn replayed(recordings: &str, root: &Path) -> Outcome {
    let events = events(recordings);
    replay::prepare(&events, root);
    replay::run(&events, root)
}

/// The scene `replayer`, beside a mount.
pub(crate) fn make_calls() {
    let point = PathBuf::from(env::var_os(POINT).unwrap());
    let outcome = replayed(&env::var(RECORDINGS).unwrap(), &point);
    let text = serde_json::to_vec(&outcome).unwrap();
    fs::write(env::var_os(OUTCOME).unwrap(), text).unwrap();
}

/// The scene `replay`: copies, each of which builds on the one before.
pub(crate) fn compare(copies: &str, settings: &MountSettings) {
    let (plain, stored) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let mut below = Below::default();
    for (number, recordings) in copies.split(' ').enumerate() {
        let before = tree(plain.path());
        let due = replayed(recordings, plain.path());
        let after = tree(plain.path());
        let target = stored.path().join(number.to_string());
        fs::create_dir(&target).unwrap();
        let file = stored.path().join(format!("outcome-{number}"));
        run(async {
            let world = World {
                segment: SEGMENT,
                lower: below.lower(),
                ..World::new(160 * MIB)
            };
            let fs = world.fs().unwrap();
            let outcome = through_a_mount(&fs, settings, recordings, &file).await;
            let mut unlike = replay::unlike_the_record(&events(recordings), &outcome);
            // Others had written into the earlier copies by the time that this one was recorded.
            unlike
                .retain(|line| recordings != "gs-external" || !line.starts_with("backups/i1/TOUR"));
            assert!(unlike.is_empty(), "{recordings}: {unlike:?}");
            assert_eq!(outcome.len(), due.len());
            for (mount, plain) in outcome.iter().zip(&due) {
                assert_eq!(
                    mount, plain,
                    "{recordings}: the mount, and a plain directory"
                );
            }
            let (copy, wal) = finish(&fs).await.unwrap();
            assert!(
                !wal.is_empty(),
                "{recordings}: no segment went where WAL goes"
            );
            assert_eq!(world.wal.stored.lock().unwrap().len(), wal.len());
            assert!(wal.iter().all(|segment| segment.size == SEGMENT));
            let back = world.read_back(&copy, &wal, &target).await;
            same(recordings, &back, &own(&before, &after));
            println!(
                "REPLAYED {recordings}: {} calls, {} files, {} segments",
                outcome.len(),
                copy.files,
                wal.len()
            );
        });
        below.add(&target);
    }
}

async fn through_a_mount(
    fs: &Arc<CatalogFs>,
    settings: &MountSettings,
    recordings: &str,
    file: &Path,
) -> Outcome {
    let mounted = Mounted::start(Arc::clone(fs), settings, "replay").await;
    let mounted = mounted.unwrap();
    let mut replayer = mounted.command(env::current_exe().unwrap());
    replayer
        .args(["--exact", "a_scene", "--nocapture"])
        .env(SCENE, "replayer")
        .env(RECORDINGS, recordings)
        .env(OUTCOME, file)
        .env(POINT, mounted.path());
    let output = timeout(PATIENCE, replayer.output()).await;
    let output = output.expect("the calls return").unwrap();
    let words = [output.stdout, output.stderr].concat();
    let words = String::from_utf8_lossy(&words);
    assert!(
        output.status.success() && words.contains("SCENE OVER"),
        "{words}"
    );
    mounted.unmount().await.unwrap();
    serde_json::from_slice(&fs::read(file).unwrap()).unwrap()
}

/// What a copy has of its own: what is new or has changed, but for locks and what is written into parents, and the directories above it.
fn own(before: &Tree, after: &Tree) -> Tree {
    let parent = |path: &str| {
        let mut slashes = path.match_indices('/').map(|(at, _)| at);
        let backup = slashes.nth(2).map_or(path, |end| &path[..end]);
        // `backups/INSTANCE/ID`
        let depth = backup.matches('/').count();
        let directory = before.get(backup).is_some_and(|(_, file)| file.is_none());
        depth == 2 && directory
    };
    let changed = |path: &str| before.get(path) != after.get(path);
    let paths = after.keys().map(String::as_str);
    let paths = paths.filter(|path| changed(path) && !parent(path) && !path.contains(".pid"));
    let mut own = Tree::new();
    for path in paths {
        let above = path.match_indices('/').map(|(end, _)| &path[..end]);
        for path in above.chain([path]) {
            own.insert(path.to_owned(), after[path].clone());
        }
    }
    own
}

fn same(recordings: &str, back: &Tree, due: &Tree) {
    for (path, expected) in due {
        assert_eq!(back.get(path), Some(expected), "{recordings}: {path}");
    }
    let more: Vec<_> = back
        .keys()
        .filter(|path| !due.contains_key(*path))
        .collect();
    assert!(more.is_empty(), "{recordings}: {more:?}");
    assert!(due.len() > 20, "{recordings}: {}", due.len());
}

/// The copies that the next one builds on, each in a directory.
#[derive(Debug, Default)]
struct Below {
    entries: BTreeMap<String, LowerEntry>,
    files: Vec<PathBuf>,
}

impl Below {
    fn add(&mut self, root: &Path) {
        for (path, (mode, file)) in tree(root) {
            let kind = if file.is_some() {
                let file = root.join(&path);
                let size = fs::metadata(&file).unwrap().len();
                let id = self.files.len() as LowerId;
                self.files.push(file);
                LowerKind::File { size, id }
            } else {
                LowerKind::Directory
            };
            let entry = LowerEntry {
                path: path.clone(),
                mode,
                mtime: None,
                kind,
            };
            self.entries.insert(path, entry);
        }
    }

    fn lower(&self) -> (Vec<LowerEntry>, Arc<dyn Lower>) {
        let entries = self.entries.values().cloned().collect();
        (entries, Arc::new(Files(self.files.clone())))
    }
}

#[derive(Debug)]
struct Files(Vec<PathBuf>);

impl Lower for Files {
    fn read(&self, id: LowerId, offset: u64, length: usize, done: Done<Bytes>) {
        let path = self.0[usize::try_from(id).unwrap()].clone();
        let read = move || {
            let file = fs::File::open(path)?;
            let left = file.metadata()?.len().saturating_sub(offset);
            let length = usize::try_from(left).unwrap_or(length).min(length);
            let mut bytes = vec![0; length];
            file.read_exact_at(&mut bytes, offset)?;
            Ok::<_, std::io::Error>(Bytes::from(bytes))
        };
        // From another thread, as a bucket answers.
        std::thread::spawn(move || done(read().map_err(|_| FsError::Io)));
    }
}
