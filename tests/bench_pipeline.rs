//! `make bench`, first part: the byte path into a store that drops everything, against what the cores could do at most:
//! cores x one core doing just zstd-1 and SHA-256 of the result. Interleaved, in the same run.
#![allow(
    clippy::print_stdout,
    clippy::expect_used,
    clippy::unwrap_used,
    clippy::cast_precision_loss,
    reason = "it prints its figures, and a step that fails ends it with its reason"
)]

use std::fs::{self, File};
use std::ops::Range;
use std::os::unix::fs::FileExt as _;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;
use std::time::Instant;

use async_trait::async_trait;
use bytes::Bytes;
use futures_util::StreamExt as _;
use futures_util::stream::BoxStream;
use pipeline::budget::Budget;
use pipeline::index::{FilePacker, IndexBuilder};
use pipeline::meter::Meter;
use pipeline::pack::{FRAME_PLAIN_MAX, KeyOf, PackOptions, PackSet};
use pipeline::store::{
    Detail, Key, ObjectBody, ObjectMeta, ObjectStore, Part, Sha256Digest, StoreError, UploadId,
};
use pipeline::throttle::Throttle;
use pipeline::upload::{UploadJournal, Uploader};
use rand::rngs::SmallRng;
use rand::{Rng as _, RngExt as _, SeedableRng as _};
use sha2::{Digest as _, Sha256};
use tokio_util::sync::CancellationToken;

const MIB: usize = 1 << 20;
const ROUNDS: usize = 7;
/// Plain bytes of one round, far more than any cache.
const PLAIN: usize = 384 * MIB;
const BUDGET: usize = 128 * MIB;
const GOAL: f64 = 0.85;

/// A stand-in: a store that says yes and drops what it gets.
#[derive(Debug)]
struct Sink;

fn refused<T>(operation: &'static str) -> Result<T, StoreError> {
    Err(StoreError::NotFound(Detail::new(
        operation,
        "",
        "a sink has nothing",
    )))
}

fn meta(key: &Key, size: u64) -> ObjectMeta {
    ObjectMeta {
        key: key.clone(),
        size,
        etag: None,
        checksum: None,
        last_modified: None,
    }
}

#[async_trait]
impl ObjectStore for Sink {
    fn describe(&self) -> String {
        "a sink (a stand-in)".into()
    }

    async fn put_if_absent(&self, key: &Key, body: Bytes) -> Result<ObjectMeta, StoreError> {
        Ok(meta(key, body.len() as u64))
    }

    async fn get(&self, _: &Key, _: Option<Range<u64>>) -> Result<ObjectBody, StoreError> {
        refused("get")
    }

    async fn head(&self, _: &Key) -> Result<ObjectMeta, StoreError> {
        refused("head")
    }

    fn list(&self, _: &str) -> BoxStream<'static, Result<ObjectMeta, StoreError>> {
        futures_util::stream::empty().boxed()
    }

    async fn delete(&self, _: &[Key]) -> Result<Vec<StoreError>, StoreError> {
        Ok(Vec::new())
    }

    async fn create_upload(&self, key: &Key) -> Result<UploadId, StoreError> {
        Ok(UploadId(key.to_string()))
    }

    async fn upload_part(
        &self,
        _: &Key,
        _: &UploadId,
        number: u32,
        body: Bytes,
        sha256: Sha256Digest,
    ) -> Result<Part, StoreError> {
        Ok(Part {
            number,
            size: body.len() as u64,
            etag: String::new(),
            sha256: Some(sha256),
        })
    }

    async fn complete_if_absent(
        &self,
        key: &Key,
        _: &UploadId,
        parts: &[Part],
    ) -> Result<ObjectMeta, StoreError> {
        Ok(meta(key, parts.iter().map(|part| part.size).sum()))
    }

    async fn abort_upload(&self, _: &Key, _: &UploadId) -> Result<(), StoreError> {
        Ok(())
    }

    async fn list_uploads(&self, _: &Key) -> Result<Vec<UploadId>, StoreError> {
        Ok(Vec::new())
    }

    async fn list_parts(&self, _: &Key, _: &UploadId) -> Result<Vec<Part>, StoreError> {
        refused("list parts")
    }
}

#[async_trait]
impl UploadJournal for Sink {
    async fn intend(&self, _: &Key) -> Result<(), StoreError> {
        Ok(())
    }
}

/// Rows as a database has them: uuids as text, doubles, and words. About 2:1 at zstd-1.
fn rows(length: usize) -> Vec<u8> {
    let mut random = SmallRng::seed_from_u64(20_261_121);
    let words: Vec<String> = (0..2000)
        .map(|_| {
            let letters = random.random_range(3..10);
            (0..letters)
                .map(|_| char::from(random.random_range(b'a'..=b'z')))
                .collect()
        })
        .collect();
    let mut rows = Vec::with_capacity(length + 256);
    while rows.len() < length {
        let mut id = [0; 16];
        random.fill_bytes(&mut id);
        rows.extend_from_slice(hex::encode(id).as_bytes());
        for _ in 0..3 {
            rows.extend_from_slice(&random.random::<f64>().to_le_bytes());
        }
        for _ in 0..random.random_range(2..8) {
            rows.push(b' ');
            rows.extend_from_slice(words[random.random_range(0..words.len())].as_bytes());
        }
        rows.extend_from_slice(&[0; 6]);
    }
    rows.truncate(length);
    rows
}

/// User and system CPU seconds of this process.
fn cpu_seconds() -> f64 {
    let stat = fs::read_to_string("/proc/self/stat").expect("/proc");
    let fields: Vec<&str> = stat
        .rsplit_once(')')
        .expect("a name")
        .1
        .split_whitespace()
        .collect();
    // USER_HZ is 100 on every Linux that Rust runs on.
    (fields[11].parse::<f64>().unwrap() + fields[12].parse::<f64>().unwrap()) / 100.0
}

fn peak_rss_mib() -> f64 {
    let status = fs::read_to_string("/proc/self/status").expect("/proc");
    let line = status
        .lines()
        .find(|line| line.starts_with("VmHWM:"))
        .expect("VmHWM");
    line.split_whitespace()
        .nth(1)
        .unwrap()
        .parse::<f64>()
        .unwrap()
        / 1024.0
}

/// MiB/s of plain bytes for `threads` threads that each compress and hash their share, and do nothing else.
fn just_zstd_and_sha(file: &File, threads: usize, plain: usize) -> f64 {
    // Read before the clock starts: the limit has no input to fetch.
    let shares: Vec<Vec<u8>> = (0..threads)
        .map(|number| {
            let mut share = vec![0; plain / threads];
            file.read_exact_at(&mut share, (number * plain / threads) as u64)
                .unwrap();
            share
        })
        .collect();
    let begun = Instant::now();
    thread::scope(|scope| {
        for share in &shares {
            scope.spawn(|| {
                let mut zstd = zstd::bulk::Compressor::new(1).unwrap();
                let mut out = vec![0; zstd::zstd_safe::compress_bound(FRAME_PLAIN_MAX)];
                for frame in share.chunks(FRAME_PLAIN_MAX) {
                    let stored = zstd.compress_to_buffer(frame, &mut out[..]).unwrap();
                    std::hint::black_box(Sha256::digest(&out[..stored]));
                }
            });
        }
    });
    (plain / MIB) as f64 / begun.elapsed().as_secs_f64()
}

/// What one run of the pipeline cost.
struct Run {
    mib_per_s: f64,
    cpu_s: f64,
    stored: u64,
}

/// The whole byte path: read from the page cache, frames, packs, parts, index.
fn whole_pipeline(runtime: &tokio::runtime::Runtime, file: &File, lanes: usize) -> Run {
    let store: Arc<dyn ObjectStore> = Arc::new(Sink);
    let meter = Arc::<Meter>::default();
    let (cpu, begun) = (cpu_seconds(), Instant::now());
    runtime.block_on(async {
        let uploader = Uploader::new(
            store,
            Budget::new(BUDGET),
            Throttle::new(None),
            Arc::new(Sink),
            Arc::clone(&meter),
            CancellationToken::new(),
        );
        let uploader = uploader.unwrap();
        let key_of: KeyOf = Arc::new(|number| Key::new(format!("pack-{number:05}")).unwrap());
        let options = PackOptions {
            lanes,
            ..PackOptions::default()
        };
        let (set, lanes) = PackSet::new(&uploader, key_of, options).unwrap();
        let index = Arc::new(IndexBuilder::new());
        let relation = index.file("base/1/16384", 0o600, None).unwrap();
        index.close_file(relation, PLAIN as u64);
        let next = Arc::new(AtomicU64::new(0));
        let threads: Vec<_> = lanes
            .into_iter()
            .map(|lane| {
                let mut packer = FilePacker::new(lane, Arc::clone(&index));
                let (file, next) = (file.try_clone().unwrap(), Arc::clone(&next));
                thread::spawn(move || {
                    let mut buffer = vec![0; FRAME_PLAIN_MAX];
                    loop {
                        let at = next.fetch_add(16 * MIB as u64, Ordering::Relaxed);
                        if at >= PLAIN as u64 {
                            return packer.finish();
                        }
                        for frame in 0..16 {
                            let at = at + (frame * MIB) as u64;
                            file.read_exact_at(&mut buffer, at).unwrap();
                            packer.chunk(relation, at, &buffer)?;
                        }
                    }
                })
            })
            .collect();
        let joined = tokio::task::spawn_blocking(|| {
            for thread in threads {
                thread.join().unwrap().unwrap();
            }
        });
        joined.await.unwrap();
        set.finish().await.unwrap();
        index
            .write(&uploader, Key::new("index").unwrap())
            .await
            .unwrap();
    });
    Run {
        mib_per_s: (PLAIN / MIB) as f64 / begun.elapsed().as_secs_f64(),
        cpu_s: cpu_seconds() - cpu,
        stored: meter.stored_bytes(),
    }
}

fn median(mut figures: Vec<f64>) -> f64 {
    figures.sort_by(f64::total_cmp);
    figures[figures.len() / 2]
}

fn main() {
    let cores = thread::available_parallelism().map_or(1, usize::from);
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let file = tempfile::tempfile().unwrap();
    file.write_all_at(&rows(PLAIN), 0).unwrap();
    let (mut one, mut all, mut runs) = (Vec::new(), Vec::new(), Vec::new());
    println!(
        "{} MiB of rows, {cores} cores, {ROUNDS} rounds; MiB/s of plain bytes",
        PLAIN / MIB
    );
    for round in 1..=ROUNDS {
        one.push(just_zstd_and_sha(&file, 1, 96 * MIB));
        let run = whole_pipeline(&runtime, &file, cores);
        one.push(just_zstd_and_sha(&file, 1, 96 * MIB));
        all.push(just_zstd_and_sha(&file, cores, 96 * MIB));
        println!(
            "round {round}: one core zstd-1 + SHA-256 {:.0} and {:.0}, {cores} such threads {:.0}, pipeline {:.0} (CPU {:.2} s)",
            one[one.len() - 2],
            one[one.len() - 1],
            all[all.len() - 1],
            run.mib_per_s,
            run.cpu_s,
        );
        runs.push(run);
    }
    let stored = runs[0].stored;
    println!(
        "ratio {:.2}:1, stored {stored} bytes a round",
        PLAIN as f64 / stored as f64
    );
    println!(
        "peak RSS {:.0} MiB, the limit's own buffers and the rows' making included",
        peak_rss_mib()
    );
    let pipeline = median(runs.iter().map(|run| run.mib_per_s).collect());
    let (one, all) = (median(one), median(all));
    println!(
        "medians: one core {one:.0}, {cores} such threads at once {all:.0} ({:.2} of {cores} x one), pipeline {pipeline:.0}",
        all / (one * cores as f64)
    );
    let measured = pipeline / (one * cores as f64);
    let verdict = if measured >= GOAL { "met" } else { "missed" };
    println!("GOAL pipeline_vs_limit {measured:.2} >= {GOAL} {verdict}");
}
