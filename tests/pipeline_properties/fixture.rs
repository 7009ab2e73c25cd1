//! A copy of made-up files through the pipeline and back, and a store that misbehaves on demand.

use std::collections::BTreeSet;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use pipeline::PipelineError;
use pipeline::budget::Budget;
use pipeline::download::Downloader;
use pipeline::extract::{ExtractOptions, Extracted, extract};
use pipeline::index::{FilePacker, Index, IndexBuilder};
use pipeline::meter::Meter;
use pipeline::pack::{
    EntryKind, IndexEntry, IndexInfo, KeyOf, Lane, PackInfo, PackOptions, PackSet,
};
use pipeline::retry::RetryPolicy;
use pipeline::store::Key;
use pipeline::throttle::Throttle;
use pipeline::upload::Uploader;
use support::faulty_store::FaultyStore;
pub(crate) use support::files::{Files as FileSet, noise, read_tree};
use tokio_util::sync::CancellationToken;

pub(crate) const MIB: usize = 1 << 20;
/// The least that one lane and an uploader need, see the test that says so.
pub(crate) const LEAST: usize = 8 * MIB + 14 * MIB;
pub(crate) const QUICK: RetryPolicy = RetryPolicy {
    attempts: 4,
    first_pause: Duration::from_millis(1),
    longest_pause: Duration::from_millis(4),
};

/// Everything around one copy.
#[derive(Clone)]
pub(crate) struct World {
    pub(crate) store: Arc<FaultyStore>,
    pub(crate) budget: Budget,
    pub(crate) throttle: Throttle,
    pub(crate) cancel: CancellationToken,
}

pub(crate) struct Copy {
    pub(crate) packs: Vec<(Key, PackInfo)>,
    pub(crate) index: (Key, IndexInfo),
}

pub(crate) fn pack_key(number: u32) -> Key {
    Key::new(format!("copy/pack-{number:05}")).unwrap()
}

impl World {
    pub(crate) fn new(budget: usize) -> Self {
        let store = Arc::<FaultyStore>::default();
        store.journal_first.store(true, Ordering::SeqCst);
        Self {
            store,
            budget: Budget::new(budget),
            throttle: Throttle::new(None),
            cancel: CancellationToken::new(),
        }
    }

    pub(crate) fn uploader(&self) -> Uploader {
        let store = Arc::clone(&self.store);
        let uploader = Uploader::new(
            Arc::clone(&store) as _,
            self.budget.clone(),
            self.throttle.clone(),
            store,
            Arc::<Meter>::default(),
            self.cancel.clone(),
        );
        uploader.unwrap().with_retry(QUICK)
    }

    pub(crate) fn downloader(&self) -> Downloader {
        let store = Arc::clone(&self.store);
        let meter = Arc::<Meter>::default();
        let (budget, throttle) = (self.budget.clone(), self.throttle.clone());
        Downloader::new(store, budget, throttle, meter, self.cancel.clone()).with_retry(QUICK)
    }

    pub(crate) fn packs(
        &self,
        options: PackOptions,
    ) -> Result<(PackSet, Vec<Lane>), PipelineError> {
        let key_of: KeyOf = Arc::new(pack_key);
        PackSet::new(&self.uploader(), key_of, options)
    }

    /// Copies `files`, each cut in pieces of `piece` bytes that go to the lanes in turn.
    pub(crate) async fn copy(
        &self,
        files: &FileSet,
        options: PackOptions,
        piece: usize,
    ) -> Result<Copy, PipelineError> {
        let (set, lanes) = self.packs(options)?;
        let index = Arc::new(IndexBuilder::new());
        let mut shares: Vec<Vec<_>> = lanes.iter().map(|_| Vec::new()).collect();
        let mut turn = 0;
        for directory in directories(files) {
            let (mode, mtime, kind) = (0o700, None, EntryKind::Directory);
            let path = directory;
            index.add(IndexEntry {
                path,
                mode,
                mtime,
                kind,
            })?;
        }
        for (path, bytes) in files {
            let id = index.file(path, 0o640, Some(1_700_000_000))?;
            index.close_file(id, bytes.len() as u64);
            for (number, part) in bytes.chunks(piece).enumerate() {
                let offset = (number * piece) as u64;
                shares[turn % options.lanes].push((id, offset, part.to_vec()));
                turn += 1;
            }
        }
        let threads: Vec<_> = lanes
            .into_iter()
            .zip(shares)
            .map(|(lane, share)| {
                let mut packer = FilePacker::new(lane, Arc::clone(&index));
                tokio::task::spawn_blocking(move || {
                    for (id, offset, part) in share {
                        packer.chunk(id, offset, &part)?;
                    }
                    packer.finish()
                })
            })
            .collect();
        for thread in threads {
            thread.await.unwrap()?;
        }
        let packs = set.finish().await?;
        let key = Key::new("copy/index").unwrap();
        let info = index.write(&self.uploader(), key.clone()).await?;
        let packs = packs.into_iter().map(|info| (pack_key(info.number), info));
        Ok(Copy {
            packs: packs.collect(),
            index: (key, info),
        })
    }

    pub(crate) async fn extract(
        &self,
        copy: &Copy,
        target: &Path,
        jobs: usize,
    ) -> Result<Extracted, PipelineError> {
        let downloader = self.downloader();
        let (key, info) = copy.index.clone();
        let index = Index::open_with(downloader.clone(), key, &info)?;
        let options = ExtractOptions { jobs, times: true };
        let map = |entry: &IndexEntry| Ok(Some(target.join(&entry.path)));
        extract(&downloader, &index, &copy.packs, options, map).await
    }
}

/// The directories that paths lie in.
pub(crate) fn directories(files: &FileSet) -> BTreeSet<String> {
    let mut directories = BTreeSet::new();
    for path in files.keys() {
        for (at, _) in path.match_indices('/') {
            directories.insert(path[..at].to_owned());
        }
    }
    directories
}

pub(crate) fn run<F: Future>(future: F) -> F::Output {
    let mut builder = tokio::runtime::Builder::new_multi_thread();
    let runtime = builder.worker_threads(2).enable_all().build().unwrap();
    let output = runtime.block_on(future);
    runtime.shutdown_timeout(Duration::from_secs(5));
    output
}

/// Waits for what happens in the background, far longer than it takes.
pub(crate) async fn eventually(what: &str, mut happened: impl FnMut() -> bool) {
    for _ in 0..2000 {
        if happened() {
            return;
        }
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    panic!("{what} did not happen in 10 s");
}
