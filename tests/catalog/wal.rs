//! WAL objects: whole, verified, never replaced.

use std::io::Write as _;
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::Ordering;

use bytes::Bytes;
use catalog::journal::{self, OperationJournal, OperationStart};
use catalog::model::OperationEvent;
use catalog::repo::NewEpoch;
use catalog::wal::{self, WalFile, WalName};
use catalog::{Catalog, CatalogError, keys};
use pipeline::budget::Budget;
use pipeline::meter::Meter;
use pipeline::pack::PART_SIZE;
use pipeline::store::{Key, ObjectStore};
use pipeline::throttle::Throttle;
use pipeline::upload::{UploadJournal as _, Uploader};
use rand::RngExt as _;
use support::memory_store::MemoryStore;
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

use super::samples::{OPERATION, epoch, node_with_epoch};
use super::{damaged, repository};
use support::faulty_store::FaultyStore;

pub(crate) async fn uploader(store: &Arc<dyn ObjectStore>, operation: Uuid) -> Uploader {
    let start = OperationStart {
        operation,
        kind: "backup".into(),
        backup_id: None,
        node_id: None,
        log_head: None,
    };
    let journal = OperationJournal::start(Arc::clone(store), start)
        .await
        .unwrap();
    Uploader::new(
        Arc::clone(store),
        Budget::new(64 << 20),
        Throttle::new(None),
        Arc::new(journal),
        Arc::new(Meter::default()),
        CancellationToken::new(),
    )
    .unwrap()
}

pub(crate) fn noise(length: usize) -> Bytes {
    let mut bytes = vec![0; length];
    rand::rng().fill(&mut bytes[..]);
    bytes.into()
}

/// Half noise, half zeros, as a segment is that was switched early.
fn segment(size: usize) -> Bytes {
    let mut bytes = noise(size / 2).to_vec();
    bytes.resize(size, 0);
    bytes.into()
}

struct Fixture {
    memory: Arc<MemoryStore>,
    store: Arc<dyn ObjectStore>,
    uploader: Uploader,
    catalog: Catalog,
    file: WalFile,
}

async fn fixture() -> Fixture {
    let (memory, catalog) = repository().await;
    let (node, epoch) = node_with_epoch(&catalog).await;
    let store = Arc::clone(&memory) as Arc<dyn ObjectStore>;
    let uploader = uploader(&store, OPERATION).await;
    let file = WalFile {
        node: node.node_id,
        epoch,
        name: "000000010000000000000003".parse().unwrap(),
    };
    Fixture {
        memory,
        store,
        uploader,
        catalog,
        file,
    }
}

#[tokio::test]
async fn a_segment_comes_back_and_the_zstd_program_reads_it_too() {
    let f = fixture().await;
    // 16 MiB of noise need two parts, so this is a multipart upload.
    for (name, plain) in [
        ("000000010000000000000003", noise(16 << 20)),
        ("000000010000000000000004", segment(16 << 20)),
        ("000000010000000000000005", Bytes::from(vec![0; 1 << 20])),
        (
            "00000002.history",
            Bytes::from_static(b"1\t0/5000068\tno recovery target\n"),
        ),
    ] {
        let name: WalName = name.parse().unwrap();
        let file = WalFile {
            name,
            ..f.file.clone()
        };
        let stored = wal::put_segment(&f.uploader, &file, 1, &plain[..])
            .await
            .unwrap();
        assert_eq!(stored.plain_bytes, plain.len() as u64);
        assert_eq!(
            wal::read_segment(&*f.store, &file, plain.len())
                .await
                .unwrap(),
            plain
        );
        damaged(wal::read_segment(&*f.store, &file, plain.len() - 1).await);
        let object = f.memory.bytes(file.key().as_str()).unwrap();
        assert_eq!(stored.stored_bytes, object.len() as u64);
        assert!(
            decoded_by_zstd(&object) == plain,
            "{name}",
            name = file.name
        );
    }
    let listed = wal::list_segments(&*f.store, f.file.node, &f.file.epoch)
        .await
        .unwrap();
    let names: Vec<_> = listed.iter().map(|it| it.name.as_str()).collect();
    let wanted = [
        "000000010000000000000003",
        "000000010000000000000004",
        "000000010000000000000005",
        "00000002.history",
    ];
    assert_eq!(names, wanted);
    assert_eq!(f.memory.uploads_under_way(), 0);
}

fn decoded_by_zstd(object: &Bytes) -> Vec<u8> {
    let mut child = Command::new("zstd")
        .args(["-d", "-c", "-q"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let (mut input, object) = (child.stdin.take().unwrap(), object.clone());
    let feeder = std::thread::spawn(move || input.write_all(&object).unwrap());
    let output = child.wait_with_output().unwrap();
    feeder.join().unwrap();
    assert!(output.status.success());
    output.stdout
}

#[tokio::test]
async fn the_same_bytes_again_are_fine_and_others_are_a_hard_error() {
    let f = fixture().await;
    let plain = segment(1 << 20);
    let first = wal::put_segment(&f.uploader, &f.file, 1, &plain[..])
        .await
        .unwrap();
    let object = f.memory.bytes(f.file.key().as_str()).unwrap();
    // Another level: other stored bytes, the same plain ones.
    assert_eq!(
        wal::put_segment(&f.uploader, &f.file, 3, &plain[..])
            .await
            .unwrap(),
        first
    );
    let error = wal::put_segment(&f.uploader, &f.file, 1, &segment(1 << 20)[..])
        .await
        .unwrap_err();
    assert!(matches!(error, CatalogError::Conflict { .. }), "{error}");
    assert_eq!(f.memory.bytes(f.file.key().as_str()).unwrap(), object);

    let mut flipped = object.to_vec();
    flipped[object.len() / 2] ^= 1;
    f.memory.tamper(&f.file.key(), Some(flipped.into()));
    damaged(wal::put_segment(&f.uploader, &f.file, 1, &plain[..]).await);
}

#[tokio::test]
async fn part_of_a_segment_is_refused() {
    let f = fixture().await;
    for length in [0, 1000, (1 << 20) - 1, 3 << 20] {
        let plain = vec![1; length];
        let error = wal::put_segment(&f.uploader, &f.file, 1, &plain[..])
            .await
            .unwrap_err();
        assert!(
            matches!(error, CatalogError::Refused { .. }),
            "{length}: {error}"
        );
    }
    assert!(f.memory.bytes(f.file.key().as_str()).is_none());
}

#[tokio::test]
async fn any_change_of_a_wal_object_is_an_error() {
    let f = fixture().await;
    let name: WalName = "00000002.history".parse().unwrap();
    let file = WalFile {
        name,
        ..f.file.clone()
    };
    let plain = b"1\t0/5000068\tno recovery target\n";
    wal::put_segment(&f.uploader, &file, 1, &plain[..])
        .await
        .unwrap();
    let good = f.memory.bytes(file.key().as_str()).unwrap();
    for at in 0..good.len() {
        let mut changed = good.to_vec();
        changed[at] ^= 1 << (at % 8);
        let mut longer = good.to_vec();
        longer.insert(at, 0);
        for bad in [
            changed.into(),
            longer.into(),
            good.slice(..at),
            good.slice(at + 1..),
        ] {
            f.memory.tamper(&file.key(), Some(bad));
            damaged(wal::read_segment(&*f.store, &file, 1000).await);
        }
    }
    f.memory
        .tamper(&file.key(), Some([&good[..], &good[..]].concat().into()));
    damaged(wal::read_segment(&*f.store, &file, 1000).await);
    // Whole, but another's: by name, by epoch, by node.
    let other = WalFile {
        name: "00000003.history".parse().unwrap(),
        ..file.clone()
    };
    f.memory.tamper(&other.key(), Some(good.clone()));
    assert!(damaged(wal::read_segment(&*f.store, &other, 1000).await).contains("it holds"));
    let other = WalFile {
        node: OPERATION,
        ..file
    };
    f.memory.tamper(&other.key(), Some(good));
    damaged(wal::read_segment(&*f.store, &other, 1000).await);
}

#[tokio::test]
async fn a_lost_reply_leaves_one_segment_and_no_upload() {
    let faulty = Arc::new(FaultyStore::default());
    let store = Arc::clone(&faulty) as Arc<dyn ObjectStore>;
    let uploader = uploader(&store, OPERATION).await;
    for (name, plain) in [
        ("000000010000000000000003", noise(16 << 20)),
        ("000000010000000000000004", segment(1 << 20)),
    ] {
        let file = WalFile {
            node: OPERATION,
            epoch: "00000001-9f3c1a2b".parse().unwrap(),
            name: name.parse().unwrap(),
        };
        let lost = if plain.len() > PART_SIZE {
            &faulty.lost_completions
        } else {
            &faulty.lost_replies
        };
        lost.store(1, Ordering::SeqCst);
        wal::put_segment(&uploader, &file, 1, &plain[..])
            .await
            .unwrap();
        assert_eq!(lost.load(Ordering::SeqCst), 0);
        assert_eq!(
            wal::read_segment(&*store, &file, plain.len())
                .await
                .unwrap(),
            plain
        );
    }
    assert_eq!(faulty.inner.uploads_under_way(), 0);
}

#[tokio::test]
async fn a_segment_is_looked_for_in_the_parents_up_to_the_fork() {
    let f = fixture().await;
    let first = WalFile {
        name: "000000010000000000000005".parse().unwrap(),
        ..f.file.clone()
    };
    wal::put_segment(&f.uploader, &first, 1, &segment(1 << 20)[..])
        .await
        .unwrap();
    // After the fork the parent went on, on a timeline 2 of its own.
    let foreign: WalName = "000000020000000000000006".parse().unwrap();
    let foreign = WalFile {
        name: foreign,
        ..f.file.clone()
    };
    wal::put_segment(&f.uploader, &foreign, 1, &segment(1 << 20)[..])
        .await
        .unwrap();
    let new = NewEpoch {
        parent: Some((f.file.epoch.clone(), "0/5000068".into())),
        timeline: 2,
        ..epoch(f.file.node)
    };
    let child = f.catalog.start_epoch(new, OPERATION).await.unwrap();
    let own = WalFile {
        epoch: child.epoch.clone(),
        name: "000000020000000000000005".parse().unwrap(),
        ..f.file.clone()
    };
    wal::put_segment(&f.uploader, &own, 1, &segment(1 << 20)[..])
        .await
        .unwrap();

    let chain = f
        .catalog
        .epoch_chain(f.file.node, &child.epoch)
        .await
        .unwrap();
    let find = async |name: &WalName| wal::find_wal(&*f.store, &chain, name).await;
    assert_eq!(find(&own.name).await.unwrap(), Some(own));
    assert_eq!(find(&first.name).await.unwrap(), Some(first));
    assert_eq!(find(&foreign.name).await.unwrap(), None);
    assert_eq!(
        find(&"000000010000000000000009".parse().unwrap())
            .await
            .unwrap(),
        None
    );
    assert_eq!(
        find(&"00000003.history".parse().unwrap()).await.unwrap(),
        None
    );

    // With the epoch gone (a wiped or another bucket) absence is not proved.
    f.memory
        .tamper(&keys::epoch(f.file.node, &child.epoch), None);
    assert!(find(&"00000003.history".parse().unwrap()).await.is_err());
}

/// openGauss opens on the timeline that it was recovered on: a parent's segment of a wanted name is another history.
#[tokio::test]
async fn a_parent_on_the_same_timeline_is_not_asked() {
    let f = fixture().await;
    let plain = segment(1 << 20);
    wal::put_segment(&f.uploader, &f.file, 1, &plain[..])
        .await
        .unwrap();
    let new = NewEpoch {
        parent: Some((f.file.epoch.clone(), "0/7009FB0".into())),
        ..epoch(f.file.node)
    };
    assert_eq!(new.timeline, f.file.name.timeline());
    let child = f.catalog.start_epoch(new, OPERATION).await.unwrap();
    let chain = f
        .catalog
        .epoch_chain(f.file.node, &child.epoch)
        .await
        .unwrap();
    assert_eq!(chain.len(), 2);
    let found = wal::find_wal(&*f.store, &chain, &f.file.name).await;
    assert_eq!(found.unwrap(), None);
}

#[tokio::test]
async fn a_store_that_is_away_is_not_the_end_of_wal() {
    let faulty = Arc::new(FaultyStore::default());
    let store = Arc::clone(&faulty) as Arc<dyn ObjectStore>;
    let catalog = Catalog::open_or_create(Arc::clone(&store), OPERATION)
        .await
        .unwrap();
    let (node, epoch) = node_with_epoch(&catalog).await;
    let chain = catalog.epoch_chain(node.node_id, &epoch).await.unwrap();
    faulty.down.store(true, Ordering::SeqCst);
    let name = "000000010000000000000005".parse().unwrap();
    let error = wal::find_wal(&*store, &chain, &name).await.unwrap_err();
    assert!(matches!(error, CatalogError::Store(_)), "{error}");
}

#[tokio::test]
async fn keys_are_in_the_journal_before_their_uploads_and_in_few_records() {
    let (memory, catalog) = repository().await;
    let store = Arc::clone(catalog.store());
    let start = |node| OperationStart {
        operation: OPERATION,
        kind: "backup".into(),
        backup_id: None,
        node_id: Some(node),
        log_head: None,
    };
    let head = catalog.log_head().await.unwrap();
    let first = OperationStart {
        log_head: head.clone(),
        ..start(OPERATION)
    };
    let journal = OperationJournal::start(Arc::clone(&store), first)
        .await
        .unwrap();
    let pack = |n: u32| Key::new(format!("backups/b/n/1/pack-{n:05}")).unwrap();
    for n in 0..8 {
        journal.intend(&pack(n)).await.unwrap();
    }
    let keys_of = |events: &[OperationEvent]| -> Vec<String> {
        let keys = events.iter().filter_map(|event| match event {
            OperationEvent::UploadsIntended { keys } => Some(keys.clone()),
            _ => None,
        });
        keys.flatten().collect()
    };
    let read = async || {
        let records = journal::records(&*store, OPERATION).await.unwrap();
        records.into_iter().map(|it| it.event).collect::<Vec<_>>()
    };
    let events = read().await;
    assert_eq!(events.len(), 2, "{events:?}");
    assert_eq!(
        keys_of(&events),
        (0..8).map(|n| pack(n).to_string()).collect::<Vec<_>>()
    );
    let OperationEvent::Started { log_head, .. } = &events[0] else {
        panic!("{events:?}")
    };
    assert_eq!(*log_head, head.map(|head| (head.seq, head.sha256)));

    // A second process of the same operation takes free numbers.
    let second = OperationJournal::start(Arc::clone(&store), start(Uuid::nil()))
        .await
        .unwrap();
    journal.intend(&pack(8)).await.unwrap();
    second
        .intend(&Key::new("backups/b/m/1/index").unwrap())
        .await
        .unwrap();
    journal.ended(Some("node db2 is away")).await.unwrap();
    second.ended(None).await.unwrap();
    let events = read().await;
    assert_eq!(events.len(), 7, "{events:?}");
    assert_eq!(keys_of(&events).len(), 8 + 8 + 1);
    assert!(matches!(events[6], OperationEvent::Ended { error: None }));

    memory.tamper(
        &keys::operation_record(OPERATION, 3),
        Some(Bytes::from_static(b"{}")),
    );
    damaged(journal::records(&*store, OPERATION).await);
}

#[tokio::test]
async fn without_its_record_no_upload_begins() {
    let faulty = Arc::new(FaultyStore::default());
    let store = Arc::clone(&faulty) as Arc<dyn ObjectStore>;
    let start = OperationStart {
        operation: OPERATION,
        kind: "backup".into(),
        backup_id: None,
        node_id: None,
        log_head: None,
    };
    let journal = OperationJournal::start(store, start).await.unwrap();
    faulty.down.store(true, Ordering::SeqCst);
    let key = Key::new("backups/b/n/1/pack-00000").unwrap();
    journal.intend(&key).await.unwrap_err();
    faulty.down.store(false, Ordering::SeqCst);
    journal.intend(&key).await.unwrap();
    assert_eq!(faulty.inner.keys().len(), 2);
}
