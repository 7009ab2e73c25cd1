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
use std::os::unix::fs::FileExt as _;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;
use std::time::Instant;

use pipeline::budget::Budget;
use pipeline::index::{FilePacker, IndexBuilder};
use pipeline::meter::Meter;
use pipeline::pack::{FRAME_PLAIN_MAX, KeyOf, PackOptions, PackSet};
use pipeline::store::{Key, ObjectStore};
use pipeline::throttle::Throttle;
use pipeline::upload::Uploader;
use rand::rngs::SmallRng;
use rand::{Rng as _, RngExt as _, SeedableRng as _};
use sha2::{Digest as _, Sha256};
use support::bench::{Sink, median};
use tokio_util::sync::CancellationToken;

const MIB: usize = 1 << 20;
const ROUNDS: usize = 7;
/// Plain bytes of one round, far more than any cache.
const PLAIN: usize = 384 * MIB;
const BUDGET: usize = 128 * MIB;
const GOAL: f64 = 0.85;

/// Rows as a database has them: a head, a uuid as text, doubles, and words. About 2:1 at zstd-1.
fn rows(length: usize) -> Vec<u8> {
    let mut random = SmallRng::seed_from_u64(20_261_121);
    let words: Vec<String> = (0..400)
        .map(|_| {
            let letters = random.random_range(3..10);
            (0..letters)
                .map(|_| char::from(random.random_range(b'a'..=b'z')))
                .collect()
        })
        .collect();
    let mut rows = Vec::with_capacity(length + 256);
    let mut number = 0_u32;
    while rows.len() < length {
        number += 1;
        rows.extend_from_slice(&[0, 0, 0, 0, 5, 0, 2, 9, 24, 0, 0, 0]);
        rows.extend_from_slice(&number.to_le_bytes());
        let mut id = [0; 16];
        random.fill_bytes(&mut id);
        rows.extend_from_slice(hex::encode(id).as_bytes());
        rows.extend_from_slice(&random.random::<f64>().to_le_bytes());
        for _ in 0..random.random_range(4..10) {
            rows.push(b' ');
            rows.extend_from_slice(words[random.random_range(0..words.len())].as_bytes());
        }
        rows.resize(rows.len().next_multiple_of(8), 0);
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

/// What one run gave and cost.
struct Run {
    /// Plain bytes.
    mib_per_s: f64,
    /// CPU milliseconds for one MiB of plain bytes, all threads together.
    cpu_ms_per_mib: f64,
    stored: u64,
}

impl Run {
    fn of(plain: usize, cpu: f64, begun: Instant, stored: u64) -> Self {
        let mib = (plain / MIB) as f64;
        Self {
            mib_per_s: mib / begun.elapsed().as_secs_f64(),
            cpu_ms_per_mib: (cpu_seconds() - cpu) * 1000.0 / mib,
            stored,
        }
    }
}

/// What `threads` threads cost that each compress and hash their share, and do nothing else.
fn just_zstd_and_sha(file: &File, threads: usize) -> Run {
    let plain = PLAIN / 4;
    // Read before the clock starts: the limit has no input to fetch.
    let shares: Vec<Vec<u8>> = (0..threads)
        .map(|number| {
            let mut share = vec![0; plain / threads];
            file.read_exact_at(&mut share, (number * plain / threads) as u64)
                .unwrap();
            share
        })
        .collect();
    let (cpu, begun) = (cpu_seconds(), Instant::now());
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
    Run::of(plain, cpu, begun, 0)
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
    Run::of(PLAIN, cpu, begun, meter.stored_bytes())
}

fn main() {
    let cores = thread::available_parallelism().map_or(1, usize::from);
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let file = tempfile::tempfile().unwrap();
    file.write_all_at(&rows(PLAIN), 0).unwrap();
    let load = fs::read_to_string("/proc/loadavg").unwrap_or_default();
    println!(
        "{} MiB of rows, {cores} cores, load average {}",
        PLAIN / MIB,
        load.trim()
    );
    println!("round: MiB/s of plain bytes (CPU ms for one MiB)");
    let (mut ratios, mut cpu, mut stored) = (Vec::new(), Vec::new(), 0);
    for round in 1..=ROUNDS {
        let before = just_zstd_and_sha(&file, 1);
        let run = whole_pipeline(&runtime, &file, cores);
        let after = just_zstd_and_sha(&file, 1);
        let together = just_zstd_and_sha(&file, cores);
        let show = |run: &Run| format!("{:.0} ({:.2})", run.mib_per_s, run.cpu_ms_per_mib);
        println!(
            "{round}: one core just zstd-1 + SHA-256 {} and {}, {cores} such threads at once {}, pipeline {}",
            show(&before),
            show(&after),
            show(&together),
            show(&run),
        );
        let one = f64::midpoint(before.mib_per_s, after.mib_per_s);
        ratios.push(run.mib_per_s / (one * cores as f64));
        let one = f64::midpoint(before.cpu_ms_per_mib, after.cpu_ms_per_mib);
        cpu.push(one / run.cpu_ms_per_mib);
        stored = run.stored;
    }
    println!(
        "ratio {:.2}:1, stored {stored} bytes a round",
        PLAIN as f64 / stored as f64
    );
    println!(
        "peak RSS {:.0} MiB, with what the limit and the making of the rows need",
        peak_rss_mib()
    );
    println!(
        "CPU of the limit / CPU of the pipeline, median: {:.2}",
        median(cpu)
    );
    // Cut, not rounded: what is shown as met is met.
    let measured = (median(ratios) * 100.0).floor() / 100.0;
    let verdict = if measured >= GOAL { "met" } else { "missed" };
    println!("GOAL pipeline_vs_limit {measured:.2} >= {GOAL} {verdict}");
}
