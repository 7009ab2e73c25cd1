//! A copy made through a [`CatalogFs`] into a store in memory, and read back from there.

use std::collections::BTreeMap;
use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _};
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use agent_wal::SegmentSize;
use bytes::Bytes;
use catalog::model::StreamedWal;
use futures_util::FutureExt as _;
use futures_util::future::BoxFuture;
use pipeline::budget::Budget;
use pipeline::download::Downloader;
use pipeline::extract::{ExtractOptions, extract};
use pipeline::index::{Index, IndexBuilder};
use pipeline::meter::Meter;
use pipeline::pack::{IndexEntry, PackOptions, PackSet};
use pipeline::retry::RetryPolicy;
use pipeline::store::Key;
use pipeline::throttle::Throttle;
use pipeline::upload::Uploader;
use pitr_agent::catalog_fs::{
    BackupSide, CatalogFs, Failure, Lower, LowerEntry, NoLower, Sealed, SealedCopy, WalSink,
};
use support::faulty_store::FaultyStore;
use tokio_util::sync::CancellationToken;

use crate::ops::{Outcome, SEGMENT};
use crate::subject::Subject;

pub(crate) const MIB: usize = 1 << 20;

/// Everything around one copy.
pub(crate) struct World {
    pub(crate) store: Arc<FaultyStore>,
    pub(crate) budget: Budget,
    pub(crate) meter: Arc<Meter>,
    pub(crate) wal: Arc<Segments>,
    pub(crate) cancel: CancellationToken,
    pub(crate) lanes: usize,
    pub(crate) segment: u64,
    pub(crate) lower: (Vec<LowerEntry>, Arc<dyn Lower>),
}

/// The part of a bucket where segments go.
#[derive(Debug, Default)]
pub(crate) struct Segments {
    /// Compressed.
    pub(crate) stored: Mutex<BTreeMap<String, Bytes>>,
    /// How long a put takes.
    pub(crate) takes: Mutex<Duration>,
    /// The next put fails.
    pub(crate) fails: Mutex<bool>,
    /// Calls of `get`.
    pub(crate) gets: Mutex<usize>,
}

/// The way there.
#[derive(Debug, Clone)]
struct ToSegments(Arc<Segments>);

impl WalSink for ToSegments {
    fn put(&self, segment: &str, bytes: Bytes) -> BoxFuture<'static, Result<(), Failure>> {
        let (this, segment) = (Arc::clone(&self.0), segment.to_owned());
        async move {
            let takes = *this.takes.lock().unwrap();
            tokio::time::sleep(takes).await;
            let wrong = |what: &str| Failure::Wal {
                segment: segment.clone(),
                what: what.to_owned(),
            };
            if *this.fails.lock().unwrap() {
                return Err(wrong("refused for a test"));
            }
            // Small, and a copy: the sender's memory must not live on here.
            let bytes = Bytes::from(zstd::bulk::compress(&bytes, 1).unwrap());
            let mut stored = this.stored.lock().unwrap();
            match stored.insert(segment.clone(), bytes.clone()) {
                Some(earlier) if earlier != bytes => Err(wrong("it is there with other bytes")),
                _ => Ok(()),
            }
        }
        .boxed()
    }

    fn get(
        &self,
        segment: &str,
        range: std::ops::Range<u64>,
    ) -> BoxFuture<'static, Result<Bytes, Failure>> {
        *self.0.gets.lock().unwrap() += 1;
        let found = self.0.stored.lock().unwrap().get(segment).cloned();
        let bytes = unpack(&found.expect("a segment that was never put is read"));
        let range = usize::try_from(range.start).unwrap()..usize::try_from(range.end).unwrap();
        async move { Ok(bytes.slice(range)) }.boxed()
    }
}

pub(crate) fn unpack(bytes: &[u8]) -> Bytes {
    zstd::bulk::decompress(bytes, 64 << 20).unwrap().into()
}

impl World {
    pub(crate) fn new(budget: usize) -> Self {
        Self {
            store: Arc::default(),
            budget: Budget::new(budget),
            meter: Arc::default(),
            wal: Arc::default(),
            cancel: CancellationToken::new(),
            lanes: 2,
            segment: SEGMENT,
            lower: (Vec::new(), Arc::new(NoLower)),
        }
    }

    pub(crate) fn fs(&self) -> Result<Arc<CatalogFs>, Failure> {
        let uploader = Uploader::new(
            Arc::clone(&self.store) as _,
            self.budget.clone(),
            Throttle::new(None),
            Arc::clone(&self.store) as _,
            Arc::clone(&self.meter),
            self.cancel.clone(),
        )?;
        let uploader = uploader.with_retry(RetryPolicy {
            attempts: 4,
            first_pause: Duration::from_millis(1),
            longest_pause: Duration::from_millis(4),
        });
        let options = PackOptions {
            lanes: self.lanes,
            ..PackOptions::default()
        };
        let (packs, lanes) = PackSet::new(&uploader, Arc::new(pack_key), options)?;
        let (entries, lower) = (self.lower.0.clone(), Arc::clone(&self.lower.1));
        CatalogFs::for_backup(BackupSide {
            uploader,
            packs,
            lanes,
            index: Arc::new(IndexBuilder::new()),
            budget: self.budget.clone(),
            segment_size: SegmentSize::new(self.segment).unwrap(),
            wal: Arc::new(ToSegments(Arc::clone(&self.wal))),
            entries,
            lower,
            cancel: self.cancel.clone(),
        })
    }

    pub(crate) fn subject(&self) -> Subject {
        Subject::new(self.fs().unwrap())
    }

    /// Reads a copy back from the store: index and packs, and the segments beside them.
    pub(crate) async fn read_back(
        &self,
        copy: &SealedCopy,
        wal: &[StreamedWal],
        target: &Path,
    ) -> BTreeMap<String, (u32, Option<Outcome>)> {
        let downloader = Downloader::new(
            Arc::clone(&self.store) as _,
            Budget::new(256 * MIB),
            Throttle::new(None),
            Arc::default(),
            CancellationToken::new(),
        );
        let index = Index::open_with(downloader.clone(), index_key(), &copy.index).unwrap();
        let packs = copy.packs.iter();
        let packs = packs.map(|info| (pack_key(info.number), info.clone()));
        let packs: Vec<_> = packs.collect();
        let options = ExtractOptions {
            jobs: 2,
            times: true,
        };
        let map = |entry: &IndexEntry| Ok(Some(target.join(&entry.path)));
        let extracted = extract(&downloader, &index, &packs, options, map).await;
        extracted.unwrap();
        let stored = self.wal.stored.lock().unwrap();
        for segment in wal {
            let bytes = unpack(&stored[&segment.segment]);
            assert_eq!(bytes.len() as u64, segment.size);
            let path = target.join(&segment.path);
            assert!(!path.exists(), "{} is in packs too", segment.path);
            std::fs::write(&path, bytes).unwrap();
            // Not stored, and not needed.
            let mode = std::fs::Permissions::from_mode(0o600);
            std::fs::set_permissions(&path, mode).unwrap();
        }
        tree(target)
    }
}

pub(crate) fn pack_key(number: u32) -> Key {
    Key::new(format!("copy/pack-{number:05}")).unwrap()
}

pub(crate) fn index_key() -> Key {
    Key::new("copy/index").unwrap()
}

/// Seals and finishes.
pub(crate) async fn finish(fs: &Arc<CatalogFs>) -> Result<(SealedCopy, Vec<StreamedWal>), Failure> {
    let sealed: Sealed = fs.seal().await?;
    let listed: Vec<_> = sealed
        .files()
        .map(|(path, size)| (path.to_owned(), size))
        .collect();
    let wal = sealed.wal().to_vec();
    let copy = sealed.finish(index_key()).await?;
    assert_eq!(copy.files, listed.len() as u64);
    assert_eq!(
        copy.plain_bytes,
        listed.iter().map(|(_, size)| size).sum::<u64>()
    );
    Ok((copy, wal))
}

/// What is below a directory.
pub(crate) fn tree(root: &Path) -> BTreeMap<String, (u32, Option<Outcome>)> {
    let mut tree = BTreeMap::new();
    let mut rest = vec![root.to_owned()];
    while let Some(directory) = rest.pop() {
        for entry in std::fs::read_dir(directory).unwrap() {
            let path = entry.unwrap().path();
            let found = std::fs::symlink_metadata(&path).unwrap();
            let name = path.strip_prefix(root).unwrap().to_str().unwrap();
            let bytes = found
                .is_file()
                .then(|| Outcome::of_bytes(&std::fs::read(&path).unwrap()));
            tree.insert(name.to_owned(), (found.mode() & 0o7777, bytes));
            if found.is_dir() {
                rest.push(path);
            }
        }
    }
    tree
}

pub(crate) fn run<F: Future>(future: F) -> F::Output {
    let mut builder = tokio::runtime::Builder::new_multi_thread();
    let runtime = builder.worker_threads(2).enable_all().build().unwrap();
    let output = runtime.block_on(future);
    runtime.shutdown_timeout(Duration::from_secs(5));
    output
}

/// Runs `test` in a process of its own, because it looks at the memory of the process. `name` is the test's own.
pub(crate) fn alone(name: &str, test: impl FnOnce()) {
    const ALONE: &str = "GS_PITR_TEST_ALONE";
    if std::env::var_os(ALONE).is_some_and(|alone| alone == name) {
        return test();
    }
    let program = std::env::current_exe().unwrap();
    let mut command = std::process::Command::new(program);
    command.args(["--exact", name, "--nocapture"]);
    let output = command.env(ALONE, name).output().unwrap();
    let said = String::from_utf8_lossy(&output.stdout);
    println!("{said}");
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{errors}");
    assert!(said.contains("1 passed"), "no test has the name `{name}`");
}
