//! The process that serves a mount: to write a copy into the bucket, or to read one from there.

use std::collections::BTreeMap;
use std::io;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::pin::Pin;
use std::process::Stdio;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use agent_api::ChainLink;
use agent_wal::SegmentSize;
use async_trait::async_trait;
use bytes::Bytes;
use catalog::Catalog;
use catalog::error::CatalogError;
use catalog::ids::{BackupId, EpochId};
use catalog::keys;
use catalog::model::{BackupMode, NodeBackup, Probackup};
use catalog::repo::{NewEpoch, NewNode};
use catalog::wal::{self, WalFile};
use futures_util::FutureExt as _;
use futures_util::future::BoxFuture;
use jiff::Timestamp;
use pipeline::budget::Budget;
use pipeline::download::Downloader;
use pipeline::index::IndexBuilder;
use pipeline::meter::Meter;
use pipeline::pack::{PackOptions, PackSet};
use pipeline::store::s3::{CredentialSource, S3Config, S3Store};
use pipeline::store::{Key, ObjectStore, StoreError};
use pipeline::throttle::Throttle;
use pipeline::upload::{UploadJournal, Uploader};
use pitr_agent::catalog_fs::life::{MountHow, MountSettings, Mounted};
use pitr_agent::catalog_fs::stored::Stored;
use pitr_agent::catalog_fs::{BackupSide, CatalogFs, Failure, NoLower, SealedCopy, WalSink};
use support::s3::Options;
use tokio::io::AsyncWrite;
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

use crate::program::Work;

/// Lanes of the packs: as many as an agent ever has.
pub(crate) const LANES: usize = 4;
/// The agent's `--memory`, when it is not given.
const MEMORY: usize = 128 << 20;
/// The program takes some seconds.
const PATIENCE: Duration = Duration::from_mins(3);

const WHAT: &str = "GS_PITR_SERVER";
const WORK: &str = "GS_PITR_SERVER_WORK";
const ENDPOINT: &str = "GS_PITR_SERVER_ENDPOINT";
const DIRECTORY: &str = "GS_PITR_SERVER_DIRECTORY";

/// What is to be served.
pub(crate) struct Order {
    what: String,
    work: Work,
    endpoint: String,
    directory: PathBuf,
}

impl Order {
    pub(crate) fn environment(
        what: &str,
        work: Work,
        endpoint: &str,
        directory: &Path,
    ) -> BTreeMap<&'static str, String> {
        BTreeMap::from([
            (WHAT, what.to_owned()),
            (WORK, work.name()),
            (ENDPOINT, endpoint.to_owned()),
            (DIRECTORY, directory.display().to_string()),
        ])
    }

    pub(crate) fn from_environment() -> Option<Self> {
        let value = |name: &str| std::env::var(name).ok();
        Some(Self {
            what: value(WHAT)?,
            work: Work::named(&value(WORK)?).unwrap(),
            endpoint: value(ENDPOINT).unwrap(),
            directory: value(DIRECTORY).unwrap().into(),
        })
    }

    /// Where the writer says what the reader is to read.
    fn copy(&self) -> PathBuf {
        self.directory.join("copy.json")
    }

    fn store(&self) -> Arc<dyn ObjectStore> {
        let options = Options::default();
        let config = S3Config {
            bucket: options.bucket,
            endpoint: Some(self.endpoint.clone()),
            region: Some(options.region),
            credentials: CredentialSource::Static {
                access_key_id: options.access_key,
                secret_access_key: options.secret_key,
                session_token: None,
            },
            ..S3Config::default()
        };
        Arc::new(S3Store::new(config).unwrap())
    }
}

pub(crate) fn serve(order: &Order) {
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .unwrap();
    let stored = runtime.block_on(async {
        match order.what.as_str() {
            "write" => write(order).await,
            "read" => read(order).await,
            other => panic!("what is {other}?"),
        }
    });
    println!("STORED BYTES {stored}");
    println!("PEAK MIB {}", peak_mib());
}

/// Mounts `fs`, and runs the program in it to its end.
async fn use_mount(order: &Order, fs: &Arc<CatalogFs>) {
    let settings = MountSettings {
        how: MountHow::Auto,
        runtime_dir: order.directory.clone(),
        runner: env!("CARGO_BIN_EXE_pitr-agent").into(),
    };
    let mounted = Mounted::start(Arc::clone(fs), &settings, "memory")
        .await
        .unwrap();
    let mut program = mounted.command(std::env::current_exe().unwrap());
    program
        .args(["--exact", "a_program", "--nocapture", "--test-threads=1"])
        .envs(order.work.environment(&order.what, mounted.path()))
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    let output = tokio::time::timeout(PATIENCE, program.output()).await;
    let output = output.expect("the program ends").unwrap();
    let said = String::from_utf8_lossy(&output.stdout);
    let complained = String::from_utf8_lossy(&output.stderr);
    let good = output.status.success() && said.contains("PROGRAM OVER");
    assert!(good, "{}: {said}{complained}", output.status);
    mounted.unmount().await.unwrap();
}

async fn write(order: &Order) -> u64 {
    let store = order.store();
    let (node, epoch) = register(&store).await;
    let budget = Budget::new(MEMORY);
    let cancel = CancellationToken::new();
    let uploader = Uploader::new(
        Arc::clone(&store),
        budget.clone(),
        Throttle::new(None),
        Arc::new(NoJournal),
        Arc::new(Meter::default()),
        cancel.clone(),
    );
    let uploader = uploader.unwrap();
    let backup = BackupId::generate(Timestamp::now(), true);
    let of = backup.clone();
    let options = PackOptions {
        lanes: LANES,
        ..PackOptions::default()
    };
    let key_of = Arc::new(move |number| keys::pack(&of, node, 1, number));
    let (packs, lanes) = PackSet::new(&uploader, key_of, options).unwrap();
    let archive = Archive {
        uploader: uploader.clone(),
        node,
        epoch: epoch.clone(),
    };
    let side = BackupSide {
        uploader,
        packs,
        lanes,
        index: Arc::new(IndexBuilder::new()),
        budget,
        segment_size: SegmentSize::new(16 << 20).unwrap(),
        wal: Arc::new(archive),
        entries: Vec::new(),
        lower: Arc::new(NoLower),
        cancel,
    };
    let fs = CatalogFs::for_backup(side).unwrap();
    use_mount(order, &fs).await;
    let sealed = fs.seal().await.unwrap();
    let wal = sealed.wal().to_vec();
    let copy = sealed.finish(keys::index(&backup, node, 1)).await.unwrap();
    let stored = copy.packs.iter().map(|pack| pack.size).sum();
    let probackup = Probackup {
        program: "pg_probackup".into(),
        version: "2.5".into(),
        instance: "node".into(),
        id: "T0MEMO".into(),
        mode: BackupMode::Full,
        parent: None,
        external: Vec::new(),
        wal,
        extra: serde_json::Map::new(),
    };
    let link = ChainLink {
        backup_id: backup,
        node: node_backup(node, epoch, copy, probackup),
    };
    std::fs::write(order.copy(), serde_json::to_vec(&link).unwrap()).unwrap();
    stored
}

async fn read(order: &Order) -> u64 {
    let store = order.store();
    let link: ChainLink = serde_json::from_slice(&std::fs::read(order.copy()).unwrap()).unwrap();
    let stored = link.node.packs.iter().map(|pack| pack.size).sum();
    let budget = Budget::new(MEMORY);
    let downloader = Downloader::new(
        Arc::clone(&store),
        budget.clone(),
        Throttle::new(None),
        Arc::new(Meter::default()),
        CancellationToken::new(),
    );
    let catalog = Catalog::open(store).await.unwrap();
    let loaded = Stored::load(&downloader, &catalog, &[link], LANES, None).await;
    let loaded = loaded.unwrap();
    let lower = loaded.lower();
    let fs = CatalogFs::for_reading(loaded.entries, lower, &budget).unwrap();
    use_mount(order, &fs).await;
    stored
}

async fn register(store: &Arc<dyn ObjectStore>) -> (Uuid, EpochId) {
    let operation = Uuid::now_v7();
    let catalog = Catalog::open_or_create(Arc::clone(store), operation);
    let catalog = catalog.await.unwrap();
    let node = NewNode {
        system_identifier: 5,
        host: "source".into(),
        port: 5432,
    };
    let node = catalog.register_node(node, operation).await.unwrap();
    let epoch = NewEpoch {
        node_id: node.node_id,
        parent: None,
        timeline: 1,
        machine_id: "m".into(),
        data_directory: "/data".into(),
        host: "source".into(),
        port: 5432,
    };
    let epoch = catalog.start_epoch(epoch, operation).await.unwrap();
    (node.node_id, epoch.epoch)
}

/// What a manifest says of the copy: little of it matters to who reads the files.
fn node_backup(node: Uuid, epoch: EpochId, copy: SealedCopy, probackup: Probackup) -> NodeBackup {
    NodeBackup {
        node_id: node,
        attempt: 1,
        epoch,
        host: "source".into(),
        port: 5432,
        system_identifier: 5,
        flavour: "postgresql".into(),
        server_version_num: 150_000,
        control_version: 1300,
        catalog_version: 202_209_061,
        wal_segment_size: 16 << 20,
        data_checksums: false,
        timeline: 1,
        start_lsn: "0/1000028".into(),
        stop_lsn: "0/1000100".into(),
        started: Timestamp::now(),
        completed: Timestamp::now(),
        data_directory: "/data".into(),
        tablespaces: Vec::new(),
        backup_label: String::new(),
        tablespace_map: None,
        argv: Vec::new(),
        attachments: Vec::new(),
        wal_first: "000000010000000000000001".into(),
        wal_last: "000000010000000000000001".into(),
        stored_bytes: copy.packs.iter().map(|pack| pack.size).sum(),
        packs: copy.packs,
        index: copy.index,
        files: copy.files,
        plain_bytes: copy.plain_bytes,
        corrupt_pages: Vec::new(),
        probackup: Some(probackup),
        extra: serde_json::Map::new(),
    }
}

#[derive(Debug)]
struct NoJournal;

#[async_trait]
impl UploadJournal for NoJournal {
    async fn intend(&self, _: &Key) -> Result<(), StoreError> {
        Ok(())
    }
}

/// The WAL of one epoch.
#[derive(Debug)]
struct Archive {
    uploader: Uploader,
    node: Uuid,
    epoch: EpochId,
}

impl Archive {
    fn file(&self, segment: &str) -> WalFile {
        WalFile {
            node: self.node,
            epoch: self.epoch.clone(),
            name: segment.parse().unwrap(),
        }
    }
}

fn failed(file: &WalFile, what: &CatalogError) -> Failure {
    Failure::Wal {
        segment: file.name.to_string(),
        what: what.to_string(),
    }
}

impl WalSink for Archive {
    fn put(&self, segment: &str, bytes: Bytes) -> BoxFuture<'static, Result<(), Failure>> {
        let (uploader, file) = (self.uploader.clone(), self.file(segment));
        async move {
            let put = wal::put_segment(&uploader, &file, 1, &bytes[..]).await;
            put.map(drop).map_err(|error| failed(&file, &error))
        }
        .boxed()
    }

    fn get(&self, segment: &str, range: Range<u64>) -> BoxFuture<'static, Result<Bytes, Failure>> {
        let (store, file) = (Arc::clone(self.uploader.store()), self.file(segment));
        async move {
            let mut window = Window {
                at: 0,
                range,
                bytes: Vec::new(),
            };
            let got = wal::get_segment(&*store, &file, &mut window).await;
            got.map_err(|error| failed(&file, &error))?;
            Ok(window.bytes.into())
        }
        .boxed()
    }
}

/// Keeps a range of what is written to it.
struct Window {
    at: u64,
    range: Range<u64>,
    bytes: Vec<u8>,
}

impl AsyncWrite for Window {
    fn poll_write(
        mut self: Pin<&mut Self>,
        _: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        let (at, length) = (self.at, bytes.len() as u64);
        let place = |offset: u64| usize::try_from(offset.saturating_sub(at).min(length)).unwrap();
        let part = place(self.range.start)..place(self.range.end);
        self.bytes.extend_from_slice(&bytes[part]);
        self.at += length;
        Poll::Ready(Ok(bytes.len()))
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }
}

fn peak_mib() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"));
    let kib = line.and_then(|rest| rest.trim().trim_end_matches(" kB").parse::<u64>().ok());
    kib.unwrap() / 1024
}
