//! `make bench`, third part: a probackup of 1.3 GB through the mount.
//!
//! - Into a store that drops everything, against the same program into a tmpfs and the result put through the same frames
//!   and packs by as many threads: what the mount costs beside the work that has to be done anyway.
//! - What a file of zeros costs there.
//! - `gs_pitr backup` into MinIO over TLS, the whole command with its point, against the old way: the program into a directory
//!   on disk, then `mc cp`.
//!
//! Interleaved, in the same run.
#![allow(
    clippy::print_stdout,
    clippy::expect_used,
    clippy::unwrap_used,
    clippy::cast_precision_loss,
    reason = "it prints its figures, and a step that fails ends it with its reason"
)]

use std::collections::HashMap;
use std::ffi::OsStr;
use std::fs::{self, File};
use std::io::Read as _;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use bytes::Bytes;
use futures_util::future::BoxFuture;
use pipeline::budget::Budget;
use pipeline::index::{FilePacker, IndexBuilder};
use pipeline::meter::Meter;
use pipeline::pack::{FRAME_PLAIN_MAX, KeyOf, Lane, PackOptions, PackSet};
use pipeline::store::{Key, ObjectStore};
use pipeline::throttle::Throttle;
use pipeline::upload::Uploader;
use pitr_agent::catalog_fs::life::{MountHow, MountSettings, Mounted};
use pitr_agent::catalog_fs::{BackupSide, CatalogFs, Failure, NoLower, SealedCopy, WalSink};
use support::bench::{Sink, fill, goal, median, ready_mc, shell};
use support::fleet::{Fleet, built_program, wait};
use support::minio::{self, Minio};
use support::os::{self, Scratch};
use support::postgres::{Cluster, ClusterOptions, Installation};
use support::probackup::{Kind, ProbackupUnderTest};
use tokio::runtime::Handle;
use tokio_util::sync::CancellationToken;

const ROUNDS: usize = 3;
const ROWS: u64 = 8_000_000;
/// Threads of the program, and lanes.
const JOBS: usize = 2;
const BUDGET: usize = 128 << 20;

/// A stand-in for the archive: the program reads back what it streamed while it copied.
#[derive(Debug, Default)]
struct Streamed(Mutex<HashMap<String, Bytes>>);

impl WalSink for Streamed {
    fn put(&self, name: &str, bytes: Bytes) -> BoxFuture<'static, Result<(), Failure>> {
        // A copy: the mount has its memory back when nobody holds what it handed out.
        let kept = Bytes::copy_from_slice(&bytes);
        self.0.lock().unwrap().insert(name.to_owned(), kept);
        Box::pin(async { Ok(()) })
    }

    fn get(&self, name: &str, range: Range<u64>) -> BoxFuture<'static, Result<Bytes, Failure>> {
        let found = self.0.lock().unwrap().get(name).cloned();
        let part = |bytes: Bytes| {
            let at = |place: u64| usize::try_from(place).unwrap().min(bytes.len());
            bytes.slice(at(range.start)..at(range.end))
        };
        let found = found.map(part).ok_or(Failure::Closed);
        Box::pin(async { found })
    }
}

struct Packing {
    uploader: Uploader,
    set: PackSet,
    lanes: Vec<Lane>,
    index: Arc<IndexBuilder>,
    budget: Budget,
}

fn packing() -> Packing {
    let store: Arc<dyn ObjectStore> = Arc::new(Sink);
    let budget = Budget::new(BUDGET);
    let (meter, cancel) = (Arc::<Meter>::default(), CancellationToken::new());
    let throttle = Throttle::new(None);
    let uploader = Uploader::new(
        store,
        budget.clone(),
        throttle,
        Arc::new(Sink),
        meter,
        cancel,
    );
    let uploader = uploader.unwrap();
    let key_of: KeyOf = Arc::new(|number| Key::new(format!("pack-{number:05}")).unwrap());
    let options = PackOptions {
        lanes: JOBS,
        ..PackOptions::default()
    };
    let (set, lanes) = PackSet::new(&uploader, key_of, options).unwrap();
    let index = Arc::new(IndexBuilder::new());
    Packing {
        uploader,
        set,
        lanes,
        index,
        budget,
    }
}

struct Bench<'a> {
    program: &'a ProbackupUnderTest,
    cluster: &'a Cluster,
}

impl Bench<'_> {
    /// The arguments of each run of the program that a backup needs.
    fn runs(&self, catalog: &Path) -> [Vec<String>; 3] {
        let words = |text: &str| text.split(' ').map(str::to_owned).collect::<Vec<_>>();
        let (data, socket) = (
            self.cluster.data_directory(),
            self.cluster.socket_directory(),
        );
        let mut init = words("init -B");
        init.push(catalog.display().to_string());
        let mut add = words("add-instance --instance node -B");
        add.extend([
            catalog.display().to_string(),
            "-D".into(),
            data.display().to_string(),
        ]);
        let mut backup =
            words("backup --instance node -b FULL --stream --no-validate --no-sync -B");
        backup.push(catalog.display().to_string());
        backup.extend(["-h".into(), socket.display().to_string()]);
        let port = self.cluster.port();
        backup.extend(words(&format!(
            "-j {JOBS} -p {port} -U postgres -d postgres"
        )));
        [init, add, backup]
    }

    fn plain(&self, catalog: &Path) -> f64 {
        let begun = Instant::now();
        for arguments in self.runs(catalog) {
            let mut command = os::command(self.program.path());
            command.args(&arguments);
            let _ = wait(command, Duration::from_mins(3)).good();
        }
        begun.elapsed().as_secs_f64()
    }

    /// Into memory, then through the same stages.
    async fn tmpfs(&self) -> (f64, f64) {
        let place = PathBuf::from(format!(
            "/dev/shm/gs_pitr-bench-{:08x}",
            rand::random::<u32>()
        ));
        fs::create_dir(&place).unwrap();
        os::give(&place);
        let written = self.plain(&place);
        let begun = Instant::now();
        let packing = packing();
        let files = Arc::new(Mutex::new(files_below(&place)));
        let threads: Vec<_> = packing
            .lanes
            .into_iter()
            .map(|lane| {
                let (packer, files) = (
                    FilePacker::new(lane, Arc::clone(&packing.index)),
                    Arc::clone(&files),
                );
                let (index, root) = (Arc::clone(&packing.index), place.clone());
                thread::spawn(move || pack(packer, &files, &index, &root))
            })
            .collect();
        let joined = tokio::task::spawn_blocking(|| {
            for thread in threads {
                thread.join().unwrap();
            }
        });
        joined.await.unwrap();
        packing.set.finish().await.unwrap();
        let key = Key::new("index").unwrap();
        packing.index.write(&packing.uploader, key).await.unwrap();
        let packed = begun.elapsed().as_secs_f64();
        fs::remove_dir_all(&place).unwrap();
        (written, packed)
    }

    async fn mounted(&self, scratch: &Scratch) -> f64 {
        let begun = Instant::now();
        let into = SinkMount::start(scratch).await;
        for arguments in self.runs(into.mounted.path()) {
            into.run(self.program.path(), &arguments).await;
        }
        let copy = into.end().await;
        assert!(copy.files > 100, "{} files", copy.files);
        begun.elapsed().as_secs_f64()
    }
}

/// A mount whose copy goes into a store that drops everything.
struct SinkMount {
    fs: Arc<CatalogFs>,
    mounted: Mounted,
}

impl SinkMount {
    async fn start(scratch: &Scratch) -> Self {
        let Packing {
            uploader,
            set,
            lanes,
            index,
            budget,
        } = packing();
        let fs = CatalogFs::for_backup(BackupSide {
            uploader,
            packs: set,
            lanes,
            index,
            budget,
            segment_size: agent_wal::SegmentSize::new(16 << 20).unwrap(),
            wal: Arc::new(Streamed::default()),
            entries: Vec::new(),
            lower: Arc::new(NoLower),
            cancel: CancellationToken::new(),
        })
        .unwrap();
        let settings = MountSettings {
            how: MountHow::Auto,
            runtime_dir: scratch.path().to_owned(),
            runner: built_program("pitr-agent"),
        };
        let mounted = Mounted::start(Arc::clone(&fs), &settings, "bench");
        let mounted = mounted.await.unwrap();
        Self { fs, mounted }
    }

    async fn run(&self, program: impl AsRef<OsStr>, arguments: &[String]) {
        let mut command = self.mounted.command(program);
        let output = command.args(arguments).output().await.unwrap();
        let complaint = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{complaint}");
    }

    async fn end(self) -> SealedCopy {
        self.mounted.unmount().await.unwrap();
        let sealed = self.fs.seal().await.unwrap();
        sealed.finish(Key::new("index").unwrap()).await.unwrap()
    }
}

/// Seconds for 256 MiB of zeros, written as the program writes openGauss's `global/pg_dw_0` in every backup, until the copy is complete.
async fn zeros(scratch: &Scratch) -> f64 {
    let into = SinkMount::start(scratch).await;
    let place = into.mounted.path().join("backups/node/T0ZERO");
    let script = format!(
        "mkdir -p '{0}/database/global' && dd if=/dev/zero of='{0}/database/global/pg_dw_0' bs=128k count=2048 && echo 'status = DONE' >'{0}/backup.control'",
        place.display()
    );
    let begun = Instant::now();
    into.run("sh", &["-c".to_owned(), script]).await;
    let copy = into.end().await;
    let took = begun.elapsed().as_secs_f64();
    assert!(copy.plain_bytes >= 256 << 20, "{} bytes", copy.plain_bytes);
    took
}

fn files_below(place: &Path) -> Vec<PathBuf> {
    let mut files = Vec::new();
    for entry in fs::read_dir(place).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            files.extend(files_below(&path));
        } else {
            files.push(path);
        }
    }
    files
}

/// What a lane's thread does with files on a file system.
fn pack(mut packer: FilePacker, files: &Mutex<Vec<PathBuf>>, index: &IndexBuilder, root: &Path) {
    let mut buffer = vec![0; FRAME_PLAIN_MAX];
    loop {
        let Some(path) = files.lock().unwrap().pop() else {
            return packer.finish().unwrap();
        };
        let mut file = File::open(&path).unwrap();
        let name = path.strip_prefix(root).unwrap().to_str().unwrap();
        let id = index.file(name, 0o600, None).unwrap();
        let mut at = 0;
        loop {
            let mut got = 0;
            while got < buffer.len() {
                match file.read(&mut buffer[got..]).unwrap() {
                    0 => break,
                    more => got += more,
                }
            }
            packer.chunk(id, at, &buffer[..got]).unwrap();
            at += got as u64;
            if got < buffer.len() {
                break;
            }
        }
        index.close_file(id, at);
    }
}

/// The old way: a directory on disk, then a copy of it.
fn copied_and_uploaded(
    bench: &Bench<'_>,
    minio: &Minio,
    mc: &str,
    fleet: &Fleet,
    round: usize,
) -> (f64, f64) {
    let place = fleet.path().join(format!("old-{round}"));
    fs::create_dir(&place).unwrap();
    os::give(&place);
    let written = bench.plain(&place);
    let begun = Instant::now();
    let script = format!(
        "{mc} cp --recursive '{}/' b/{}/old-{round}/ >/dev/null",
        place.display(),
        minio.bucket()
    );
    shell(&script, &[]);
    let uploaded = begun.elapsed().as_secs_f64();
    fs::remove_dir_all(&place).unwrap();
    (written, uploaded)
}

fn through_gs_pitr(fleet: &Fleet, minio: &Minio, round: usize) -> f64 {
    let repository = format!("s3://{}/round-{round}", minio.bucket());
    let nodes = fleet.addresses(&[0]);
    let args = [
        "backup",
        "--nodes",
        &nodes,
        "--engine",
        "probackup",
        "-j",
        "2",
        "--output",
        "json",
    ];
    let mut command = fleet.command(&args);
    command.env("GS_PITR_REPO", &repository);
    let begun = Instant::now();
    let result = wait(command, Duration::from_mins(3)).good().result();
    assert_eq!(result["engine"], "probackup");
    begun.elapsed().as_secs_f64()
}

fn row(name: &str, walls: &[f64]) {
    let each: Vec<_> = walls.iter().map(|wall| format!("{wall:.2}")).collect();
    println!(
        "{name:<44} wall s {:<20} median {:>5.2}",
        each.join(" / "),
        median(walls.to_vec())
    );
}

fn ratio(ours: &[f64], theirs: &[f64]) -> f64 {
    median(
        ours.iter()
            .zip(theirs)
            .map(|(ours, theirs)| ours / theirs)
            .collect(),
    )
}

async fn bench(mc: PathBuf, minio: Minio) {
    let (installation, program) = (Installation::newest(), ProbackupUnderTest::find(Kind::Pg));
    let mut fleet = Fleet::new("bench", &minio.config());
    let path = program.path().display().to_string();
    let options = ClusterOptions {
        data_checksums: true,
        ..ClusterOptions::default()
    };
    fleet.add_database_with("node", &installation, options, &["--probackup", &path]);
    let mc = ready_mc(&mc, &minio, fleet.path());
    let cluster = fleet.hosts[0].cluster.as_ref().expect("a database");
    let size = fill(cluster, ROWS).await;
    println!(
        "one node, PostgreSQL {}, {:.2} GB, {program}; -j {JOBS}; MinIO over TLS; {ROUNDS} rounds, interleaved",
        installation.major,
        size as f64 / 1e9
    );
    let bench = Bench {
        program: &program,
        cluster,
    };
    let scratch = Scratch::new("mounts");
    let (mut sink, mut memory, mut ours, mut old) =
        (Vec::new(), Vec::new(), Vec::new(), Vec::new());
    let mut empty = Vec::new();
    for round in 0..ROUNDS {
        memory.push(bench.tmpfs().await);
        sink.push(bench.mounted(&scratch).await);
        empty.push(zeros(&scratch).await);
        let (bench, minio, mc, fleet) = (&bench, &minio, &mc, &fleet);
        old.push(blocking(|| {
            copied_and_uploaded(bench, minio, mc, fleet, round)
        }));
        ours.push(blocking(|| through_gs_pitr(fleet, minio, round)));
    }
    let sums = |parts: &[(f64, f64)]| parts.iter().map(|(a, b)| a + b).collect::<Vec<_>>();
    let first = |parts: &[(f64, f64)]| parts.iter().map(|(a, _)| *a).collect::<Vec<_>>();
    row("program into tmpfs", &first(&memory));
    row("program into tmpfs, then the same frames", &sums(&memory));
    row("program through the mount into a sink", &sink);
    row("256 MiB of zeros through the mount", &empty);
    row("program onto disk", &first(&old));
    row("program onto disk, then mc cp", &sums(&old));
    row("gs_pitr backup --engine probackup", &ours);
    goal("mount_vs_tmpfs", ratio(&sink, &sums(&memory)), 1.15);
    goal("mount_vs_copy_upload", ratio(&ours, &sums(&old)), 0.7);
    goal("mount_zeros_s", median(empty), 1.0);
    goal(
        "mount_agent_rss_mib",
        fleet.hosts[0].agent.peak_rss_mib() as f64,
        256.0,
    );
}

/// The runtime's other threads go on meanwhile: MinIO's client lives there.
fn blocking<T>(work: impl FnOnce() -> T) -> T {
    let _inside = Handle::current().enter();
    work()
}

fn main() {
    let runtime = tokio::runtime::Runtime::new().expect("a runtime");
    runtime.block_on(async {
        if let Err(why) = support::fuse::ready() {
            return support::skip("bench-mount", &why);
        }
        match (minio::client_binary(), minio::start(true).await) {
            (Some(mc), Some(minio)) => bench(mc, minio).await,
            _ => support::skip(
                "bench-mount",
                "it needs the programs minio and mc (go install)",
            ),
        }
    });
    runtime.shutdown_timeout(Duration::from_secs(5));
}
