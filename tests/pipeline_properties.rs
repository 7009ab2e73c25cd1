//! What the byte path promises, tried with made-up data on a store in memory.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    reason = "a panic is a failed test, with its reason"
)]

#[path = "pipeline_properties/damage.rs"]
mod damage;
#[path = "pipeline_properties/fixture.rs"]
mod fixture;
#[path = "pipeline_properties/random.rs"]
mod random;
#[path = "pipeline_properties/uploads.rs"]
mod uploads;

use std::io::Write as _;
use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _};
use std::process::{Command, Stdio};

use fixture::{FileSet, LEAST, MIB, World, noise, read_tree, run};
use futures_util::StreamExt as _;
use pipeline::index::Index;
use pipeline::pack::PackOptions;
use proptest::prelude::*;
use support::skip;

/// One file's bytes: compressible, not compressible, or zeros, of any length around the limits.
pub(crate) fn content() -> impl Strategy<Value = Vec<u8>> {
    let length = prop_oneof![
        Just(0_usize),
        1..2000_usize,
        Just(256 << 10),
        Just(MIB),
        Just(MIB + 1),
        (200 << 10)..3 * MIB,
    ];
    (length, 0..3_u8, any::<u64>()).prop_map(|(length, kind, seed)| match kind {
        0 => vec![0; length],
        1 => noise(seed, length),
        _ => noise(seed, 512)
            .iter()
            .copied()
            .cycle()
            .take(length)
            .collect(),
    })
}

pub(crate) fn files() -> impl Strategy<Value = FileSet> {
    let path = prop::sample::select(vec![
        "PG_VERSION",
        "base/1/1259",
        "base/1/1259_fsm",
        "base/5/2619",
        "base/5/16384",
        "base/5/16384.1",
        "global/pg_control",
        "with space/ü/x",
        "z",
    ]);
    prop::collection::btree_map(path.prop_map(str::to_owned), content(), 0..7)
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 32, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn any_files_come_back_identical(
        files in files(),
        lanes in 1..5_usize,
        piece in prop_oneof![Just(16 * MIB), Just(MIB), 1..300_000_usize],
        pack_size in prop_oneof![Just(64 << 30), Just(MIB as u64), (MIB as u64)..(4 * MIB as u64)],
        level in prop_oneof![Just(1), Just(3)],
        jobs in 1..4_usize,
    ) {
        let target = tempfile::tempdir().unwrap();
        run(async {
            // A piece of one byte is one extent: keep their number sane.
            let piece = piece.max(1 + files.values().map(Vec::len).sum::<usize>() / 500);
            let world = World::new(128 * MIB);
            let options = PackOptions { lanes, level, pack_size };
            let copy = world.copy(&files, options, piece).await.unwrap();
            let extracted = world.extract(&copy, target.path(), jobs).await.unwrap();
            prop_assert_eq!(extracted.files, files.len() as u64);
            prop_assert_eq!(world.store.inner.uploads_under_way(), 0);
            prop_assert_eq!(world.budget.free_bytes(), 128 * MIB);
            let plain: u64 = copy.packs.iter().map(|(_, info)| info.plain_bytes).sum();
            prop_assert_eq!(plain, extracted.plain_bytes);
            let entries = Index::open_with(world.downloader(), copy.index.0.clone(), &copy.index.1);
            let entries: Vec<_> = entries.unwrap().entries().collect().await;
            for entry in entries {
                let entry = entry.unwrap();
                let Some(bytes) = files.get(&entry.path) else { continue };
                let reader = world.downloader().file_reader(&entry, &copy.packs);
                let mut stream = reader.unwrap();
                let mut read = Vec::new();
                while let Some(chunk) = stream.next().await {
                    read.extend_from_slice(&chunk.unwrap());
                }
                prop_assert!(&read == bytes, "`{}` as a stream", entry.path);
            }
            Ok(())
        })?;
        prop_assert!(read_tree(target.path()) == files, "the files differ");
    }
}

#[test]
fn files_get_their_modes_times_and_holes() {
    let target = tempfile::tempdir().unwrap();
    let mut files = FileSet::new();
    files.insert("a/zeros".into(), vec![0; 8 * MIB]);
    files.insert("a/empty".into(), Vec::new());
    let mut tail = vec![0; 4 * MIB];
    tail[0] = 1;
    files.insert("a/tail of zeros".into(), tail);
    run(async {
        let world = World::new(128 * MIB);
        let options = PackOptions::default();
        let copy = world.copy(&files, options, 16 * MIB).await.unwrap();
        world.extract(&copy, target.path(), 2).await.unwrap();
    });
    assert_eq!(read_tree(target.path()), files);
    for name in files.keys() {
        let found = std::fs::metadata(target.path().join(name)).unwrap();
        assert_eq!(found.permissions().mode() & 0o7777, 0o640, "{name}");
        assert_eq!(found.mtime(), 1_700_000_000, "{name}");
        assert!(found.blocks() * 512 <= MIB as u64, "{name} has no holes");
    }
    let directory = std::fs::metadata(target.path().join("a")).unwrap();
    assert_eq!(directory.permissions().mode() & 0o7777, 0o700);
}

#[test]
fn a_target_that_is_not_empty_is_left_as_it_is() {
    let target = tempfile::tempdir().unwrap();
    std::fs::write(target.path().join("x"), "mine").unwrap();
    let files = FileSet::from([("x".to_owned(), noise(1, 5000))]);
    let error = run(async {
        let world = World::new(128 * MIB);
        let options = PackOptions::default();
        let copy = world.copy(&files, options, MIB).await.unwrap();
        world.extract(&copy, target.path(), 2).await.unwrap_err()
    });
    assert!(error.to_string().contains("create"), "{error}");
    assert_eq!(std::fs::read(target.path().join("x")).unwrap(), b"mine");
}

#[test]
fn a_budget_smaller_than_the_data_makes_progress() {
    let files = FileSet::from([
        ("a".to_owned(), noise(1, 60 * MIB)),
        ("b".to_owned(), vec![7; 30 * MIB]),
    ]);
    let target = tempfile::tempdir().unwrap();
    run(async {
        let world = World::new(LEAST);
        world
            .store
            .part_takes_ms
            .store(3, std::sync::atomic::Ordering::SeqCst);
        let options = PackOptions {
            lanes: 1,
            ..PackOptions::default()
        };
        let copy = world.copy(&files, options, 16 * MIB).await.unwrap();
        let most = world
            .store
            .most_in_flight
            .load(std::sync::atomic::Ordering::SeqCst);
        assert!(most <= LEAST, "{most} bytes were in flight");
        world.extract(&copy, target.path(), 1).await.unwrap();
        assert_eq!(world.budget.free_bytes(), LEAST);
    });
    assert!(read_tree(target.path()) == files);
}

#[test]
fn a_budget_without_room_is_refused_at_start() {
    run(async {
        let world = World::new(LEAST);
        let options = PackOptions {
            lanes: 2,
            ..PackOptions::default()
        };
        let error = world.packs(options).unwrap_err();
        assert!(error.to_string().contains("budget is too small"), "{error}");
        assert_eq!(world.budget.free_bytes(), LEAST, "what was taken went back");
    });
}

/// `zstd -d` of `stored`, or `None` (said so) where there is no such program.
fn zstd_program(test: &str, stored: &[u8]) -> Option<Vec<u8>> {
    let mut command = Command::new("zstd");
    command
        .arg("-dc")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped());
    let mut child = match command.spawn() {
        Ok(child) => child,
        Err(error) => {
            skip(test, &format!("`zstd` cannot be run: {error}"));
            return None;
        }
    };
    let mut input = child.stdin.take().unwrap();
    let stored = stored.to_vec();
    let feeding = std::thread::spawn(move || input.write_all(&stored));
    let output = child.wait_with_output().unwrap();
    feeding.join().unwrap().unwrap();
    assert!(output.status.success(), "zstd -d failed");
    Some(output.stdout)
}

#[test]
fn the_zstd_program_reads_what_is_stored() {
    let mut plain = noise(3, 3 * MIB);
    plain.extend(vec![42; 2 * MIB + 5000]);
    let files = FileSet::from([("a".to_owned(), plain.clone())]);
    run(async {
        let world = World::new(128 * MIB);
        let options = PackOptions {
            lanes: 1,
            ..PackOptions::default()
        };
        let copy = world.copy(&files, options, 64 * MIB).await.unwrap();
        let pack = world.store.inner.bytes("copy/pack-00000").unwrap();
        let test = "the_zstd_program_reads_what_is_stored";
        let Some(decoded) = zstd_program(test, &pack) else {
            return;
        };
        assert!(decoded == plain, "the pack decodes to other bytes");
        let index = world.store.inner.bytes(copy.index.0.as_str()).unwrap();
        let lines = String::from_utf8(zstd_program(test, &index).unwrap()).unwrap();
        let lines: Vec<_> = lines.lines().collect();
        assert_eq!(lines.len(), 2);
        assert!(lines[0].starts_with(r#"{"path":"a","#), "{}", lines[0]);
        assert!(lines[1].contains(r#""entries":1"#), "{}", lines[1]);
    });
}
