//! Files of a copy read anywhere, by many, as a program reads them through a mount.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use bytes::Bytes;
use futures_util::StreamExt as _;
use pipeline::PipelineError;
use pipeline::download::Downloader;
use pipeline::index::Index;
use pipeline::meter::Meter;
use pipeline::pack::{EntryKind, PackOptions};
use pipeline::random::{RandomFile, RandomFiles, RandomReader};
use proptest::prelude::*;

use crate::fixture::{Copy, FileSet, MIB, QUICK, World, eventually, noise, run};

/// What a program asks for at once.
const ASK: usize = 128 << 10;

/// A copy that is open.
struct Open {
    reader: RandomReader,
    files: BTreeMap<String, RandomFile>,
    meter: Arc<Meter>,
}

impl World {
    async fn open(&self, copy: &Copy, readers: usize) -> Result<Open, PipelineError> {
        let meter = Arc::<Meter>::default();
        let downloader = Downloader::new(
            Arc::clone(&self.store) as _,
            self.budget.clone(),
            self.throttle.clone(),
            Arc::clone(&meter),
            self.cancel.clone(),
        );
        let (key, info) = &copy.index;
        let mut entries = Index::open_with(self.downloader(), key.clone(), info)?.entries();
        let mut random = RandomFiles::new();
        let packs = random.copy(key, &copy.packs)?;
        let mut files = BTreeMap::new();
        while let Some(entry) = entries.next().await {
            let entry = entry?;
            if matches!(entry.kind, EntryKind::File { .. }) {
                files.insert(entry.path.clone(), random.file(&packs, &entry)?);
            }
        }
        Ok(Open {
            reader: random.open(&downloader.with_retry(QUICK), readers)?,
            files,
            meter,
        })
    }

    fn calls(&self) -> u64 {
        self.store.calls.load(Ordering::SeqCst)
    }
}

impl Open {
    /// As a mount reads: from memory at once if it is there.
    async fn read(&self, path: &str, offset: u64, length: usize) -> Result<Bytes, PipelineError> {
        let file = self.files[path];
        match self.reader.try_read(file, offset, length) {
            Some(bytes) => Ok(bytes),
            None => self.reader.read(file, offset, length).await,
        }
    }

    /// A file from front to back.
    async fn whole(&self, path: &str) -> Result<Vec<u8>, PipelineError> {
        let mut bytes = Vec::new();
        loop {
            let more = self.read(path, bytes.len() as u64, ASK).await?;
            if more.is_empty() {
                return Ok(bytes);
            }
            bytes.extend_from_slice(&more);
        }
    }
}

fn one_lane() -> PackOptions {
    PackOptions {
        lanes: 1,
        ..PackOptions::default()
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 32, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn any_reads_give_the_bytes_of_the_files(
        files in crate::files(),
        lanes in 1..4_usize,
        piece in prop_oneof![Just(16 * MIB), Just(MIB), 1..300_000_usize],
        pack_size in prop_oneof![Just(64 << 30), Just(MIB as u64)],
        budget in prop_oneof![Just(64 * MIB), Just(9 * MIB)],
        readers in 1..5_usize,
        reads in prop::collection::vec(
            (any::<prop::sample::Index>(), any::<prop::sample::Index>(), prop_oneof![0..ASK, 0..3 * MIB]), 0..60),
    ) {
        run(async {
            let piece = piece.max(1 + files.values().map(Vec::len).sum::<usize>() / 500);
            let mut world = World::new(128 * MIB);
            let options = PackOptions { lanes, pack_size, ..PackOptions::default() };
            let copy = world.copy(&files, options, piece).await.unwrap();
            world.budget = pipeline::budget::Budget::new(budget);
            let open = Arc::new(world.open(&copy, readers).await.unwrap());
            let files = Arc::new(files);
            let mut tasks = Vec::new();
            for number in 0..readers {
                let (open, files) = (Arc::clone(&open), Arc::clone(&files));
                let reads: Vec<_> = reads.iter().skip(number).step_by(readers).copied().collect();
                tasks.push(tokio::spawn(async move {
                    for (which, offset, length) in reads {
                        if files.is_empty() { break }
                        let path = which.get(&files.keys().collect::<Vec<_>>()).to_owned();
                        let bytes = &files[path];
                        let offset = offset.index(bytes.len() + 2);
                        let read = open.read(path, offset as u64, length).await.unwrap();
                        let end = (offset + length).min(bytes.len());
                        let expected = bytes.get(offset..end).unwrap_or_default();
                        assert!(read == expected, "`{path}` from {offset}, {length} bytes");
                    }
                    for (path, bytes) in files.iter() {
                        assert!(open.whole(path).await.unwrap() == *bytes, "`{path}` as a whole");
                    }
                }));
            }
            for task in tasks {
                task.await.unwrap();
            }
            let plain: u64 = files.values().map(|bytes| bytes.len() as u64).sum();
            prop_assert_eq!(open.meter.plain_bytes(), plain, "each frame is counted once");
            drop(open);
            eventually("all memory goes back", || world.budget.free_bytes() == budget).await;
            Ok(())
        })?;
    }
}

#[test]
fn a_whole_file_costs_few_requests_and_no_byte_twice() {
    let bytes = noise(1, 100 * MIB);
    run(async {
        let world = World::new(128 * MIB);
        let files = FileSet::from([("big".to_owned(), bytes.clone())]);
        let copy = world.copy(&files, one_lane(), 16 * MIB).await.unwrap();
        let open = world.open(&copy, 1).await.unwrap();
        let before = world.calls();
        assert!(open.whole("big").await.unwrap() == bytes);
        let requests = world.calls() - before;
        assert!(requests <= 2 + 4 + 100 / 8 + 1, "{requests} requests");
        let size: u64 = copy.packs.iter().map(|(_, info)| info.size).sum();
        assert_eq!(open.meter.stored_bytes(), size, "of the pack");
        // Back to the front once, before much was read, as probackup does.
        let before = open.meter.stored_bytes();
        let tail = open.read("big", 99 * MIB as u64, 100).await.unwrap();
        assert!(tail == bytes[99 * MIB..99 * MIB + 100]);
        assert_eq!(
            open.meter.stored_bytes(),
            before,
            "what was just read is kept"
        );
    });
}

#[test]
fn files_that_take_turns_in_a_pack_are_each_read_once() {
    // Four writers share a lane: their frames alternate.
    let names = ["a", "b", "c", "d"];
    let files: FileSet = (0..)
        .zip(names)
        .map(|(seed, name)| (name.to_owned(), noise(seed, 16 * MIB)))
        .collect();
    run(async {
        let world = World::new(128 * MIB);
        let (set, mut lanes) = world.packs(one_lane()).unwrap();
        let index = Arc::new(pipeline::index::IndexBuilder::new());
        let lane = lanes.remove(0);
        let writing = {
            let (index, files) = (Arc::clone(&index), files.clone());
            tokio::task::spawn_blocking(move || {
                let mut packer = pipeline::index::FilePacker::new(lane, Arc::clone(&index));
                let ids: Vec<_> = files
                    .iter()
                    .map(|(path, bytes)| {
                        let id = index.file(path, 0o600, None).unwrap();
                        index.close_file(id, bytes.len() as u64);
                        (id, bytes)
                    })
                    .collect();
                for at in (0..16 * MIB).step_by(MIB) {
                    for (id, bytes) in &ids {
                        packer.chunk(*id, at as u64, &bytes[at..at + MIB]).unwrap();
                    }
                }
                packer.finish().unwrap();
            })
        };
        writing.await.unwrap();
        let packs = set.finish().await.unwrap();
        let key = pipeline::store::Key::new("copy/index").unwrap();
        let info = index.write(&world.uploader(), key.clone()).await.unwrap();
        let packs: Vec<_> = packs
            .into_iter()
            .map(|info| (crate::fixture::pack_key(info.number), info))
            .collect();
        let size: u64 = packs.iter().map(|(_, info)| info.size).sum();
        let index = (key, info);
        let copy = Copy { packs, index };
        // One after the other, with too little memory for all: nothing of the others is fetched along.
        let open = world.open(&copy, 1).await.unwrap();
        for (path, bytes) in &files {
            assert!(open.whole(path).await.unwrap() == *bytes, "`{path}`");
        }
        assert_eq!(open.meter.stored_bytes(), size, "one after the other");
        // All at once.
        let open = Arc::new(world.open(&copy, 4).await.unwrap());
        let all = files.keys().map(|path| {
            let (open, path) = (Arc::clone(&open), path.clone());
            tokio::spawn(async move { open.whole(&path).await.unwrap() })
        });
        let all: Vec<_> = all.collect();
        for (task, bytes) in all.into_iter().zip(files.values()) {
            assert!(task.await.unwrap() == *bytes);
        }
        assert_eq!(open.meter.stored_bytes(), size, "all at once");
    });
}

#[test]
fn many_small_files_cost_a_request_for_many_frames() {
    let files: FileSet = (0..4000_u64)
        .map(|n| (format!("f{n:05}"), noise(n, 8192)))
        .collect();
    run(async {
        let world = World::new(128 * MIB);
        let copy = world.copy(&files, one_lane(), 16 * MIB).await.unwrap();
        let open = world.open(&copy, 4).await.unwrap();
        let before = world.calls();
        for (path, bytes) in &files {
            assert!(open.whole(path).await.unwrap() == *bytes);
        }
        let frames: u32 = copy.packs.iter().map(|(_, info)| info.frames).sum();
        let requests = world.calls() - before;
        assert!(frames >= 31 && requests <= 12, "{requests} for {frames}");
    });
}

#[test]
fn a_file_that_is_looked_up_beside_streams_stays_in_memory() {
    // The map of page headers: one open, seek and small read for every data file that is restored.
    let mut files = FileSet::from([("map".to_owned(), noise(7, 3 * MIB))]);
    files.insert("stream".into(), noise(8, 90 * MIB));
    run(async {
        let world = World::new(128 * MIB);
        let copy = world.copy(&files, one_lane(), 16 * MIB).await.unwrap();
        let open = world.open(&copy, 2).await.unwrap();
        for at in (0..90 * MIB).step_by(ASK) {
            let looked = at * 13 % (3 * MIB - 5000);
            let map = open.read("map", looked as u64, 5000).await.unwrap();
            assert!(map == files["map"][looked..looked + 5000]);
            let read = open.read("stream", at as u64, ASK).await.unwrap();
            assert!(read == files["stream"][at..at + ASK]);
        }
        let size: u64 = copy.packs.iter().map(|(_, info)| info.size).sum();
        assert_eq!(open.meter.stored_bytes(), size, "each frame came once");
    });
}

#[test]
fn sixteen_readers_go_on_in_the_least_memory() {
    let files: FileSet = (0..16_u64)
        .map(|n| (format!("f{n:02}"), noise(n, 3 * MIB + 17)))
        .collect();
    run(async {
        let mut world = World::new(128 * MIB);
        let options = PackOptions {
            lanes: 3,
            pack_size: 8 * MIB as u64,
            ..PackOptions::default()
        };
        let copy = world.copy(&files, options, MIB).await.unwrap();
        let least = 4 * MIB;
        world.budget = pipeline::budget::Budget::new(least);
        let open = Arc::new(world.open(&copy, 16).await.unwrap());
        let taken = least - world.budget.free_bytes();
        let rest = world
            .budget
            .reserve(world.budget.free_bytes(), "others")
            .unwrap();
        let tasks: Vec<_> = files
            .keys()
            .map(|path| {
                let (open, path) = (Arc::clone(&open), path.clone());
                tokio::spawn(async move { open.whole(&path).await.unwrap() })
            })
            .collect();
        for (task, bytes) in tasks.into_iter().zip(files.values()) {
            let whole = tokio::time::timeout(Duration::from_mins(1), task).await;
            assert!(whole.expect("nobody waits for ever").unwrap() == *bytes);
        }
        assert!(taken <= 4 * MIB, "{taken} bytes are reserved");
        drop((open, rest));
        eventually("all memory goes back", || {
            world.budget.free_bytes() == least
        })
        .await;
        // Not even two frames.
        world.budget = pipeline::budget::Budget::new(2 * MIB);
        let error = world.open(&copy, 16).await.err().unwrap().to_string();
        assert!(error.contains("budget is too small"), "{error}");
    });
}

#[test]
fn a_damaged_frame_is_named_and_never_shown() {
    let files: FileSet = (0..6_u64)
        .map(|n| (format!("f{n}"), noise(n, MIB)))
        .collect();
    run(async {
        let world = World::new(128 * MIB);
        let copy = world.copy(&files, one_lane(), MIB).await.unwrap();
        let (key, _) = &copy.packs[0];
        let good = world.store.inner.bytes(key.as_str()).unwrap();
        let mut bad = good.to_vec();
        // In the fourth frame: each has a MiB that does not compress.
        bad[3 * MIB + MIB / 2] ^= 1;
        world.store.inner.tamper(key, Some(bad.into()));
        let open = world.open(&copy, 2).await.unwrap();
        for path in ["f0", "f1", "f2", "f4", "f5"] {
            let whole = open.whole(path).await;
            assert!(whole.unwrap() == files[path], "`{path}`");
        }
        for _ in 0..2 {
            let error = open.whole("f3").await.unwrap_err();
            let PipelineError::Damaged { key: named, what } = &error else {
                panic!("{error}");
            };
            assert_eq!(named, key.as_str());
            assert!(
                what.contains("frame 3") && what.contains("SHA-256"),
                "{what}"
            );
        }
        world
            .store
            .inner
            .tamper(key, Some(good.slice(..good.len() - 1)));
        let error = open.whole("f3").await.unwrap_err();
        assert!(matches!(error, PipelineError::Damaged { .. }), "{error}");
        world.store.inner.tamper(key, Some(good));
        assert!(open.whole("f3").await.unwrap() == files["f3"], "mended");
        assert!(open.read("f3", MIB as u64, 1).await.unwrap().is_empty());
        let budget = world.budget.clone();
        drop(open);
        eventually("all memory goes back", || budget.free_bytes() == 128 * MIB).await;
    });
}

#[test]
fn a_store_that_is_away_for_a_while_is_asked_again() {
    let bytes = noise(5, 20 * MIB);
    run(async {
        let world = World::new(128 * MIB);
        let files = FileSet::from([("f".to_owned(), bytes.clone())]);
        let copy = world.copy(&files, one_lane(), MIB).await.unwrap();
        let open = world.open(&copy, 1).await.unwrap();
        // 503 at once, and connections cut in the middle of a body.
        world.store.busy.store(2, Ordering::SeqCst);
        world.store.break_after.store(MIB / 3, Ordering::SeqCst);
        world.store.breaks.store(9, Ordering::SeqCst);
        assert!(open.whole("f").await.unwrap() == bytes);
        // Away for longer than anybody's patience: an error, and no end of it.
        let open = world.open(&copy, 1).await.unwrap();
        world.store.busy.store(1000, Ordering::SeqCst);
        let error = open.read("f", 0, 10).await.unwrap_err();
        assert!(matches!(error, PipelineError::Store(_)), "{error}");
        world.store.busy.store(0, Ordering::SeqCst);
        assert!(open.whole("f").await.unwrap() == bytes);
    });
}

#[test]
fn who_waits_is_told_when_all_is_to_stop() {
    run(async {
        let world = World::new(128 * MIB);
        let files = FileSet::from([("f".to_owned(), noise(5, 20 * MIB))]);
        let copy = world.copy(&files, one_lane(), MIB).await.unwrap();
        let open = Arc::new(world.open(&copy, 1).await.unwrap());
        world.throttle.set_rate(Some(1));
        let waiting = tokio::spawn({
            let open = Arc::clone(&open);
            async move { open.read("f", 0, 10).await }
        });
        tokio::time::sleep(Duration::from_millis(50)).await;
        assert!(!waiting.is_finished());
        world.cancel.cancel();
        let error = waiting.await.unwrap().unwrap_err();
        assert!(matches!(error, PipelineError::Cancelled), "{error}");
        drop(open);
        eventually("all memory goes back", || {
            world.budget.free_bytes() == 128 * MIB
        })
        .await;
    });
}
