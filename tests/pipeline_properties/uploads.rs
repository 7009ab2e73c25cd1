//! Every upload that was begun is completed or aborted, whatever happens, and a lost reply is no loss.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use bytes::Bytes;
use pipeline::PipelineError;
use pipeline::pack::{PackOptions, PackSet};
use pipeline::store::{Key, ObjectStore as _, StoreError};
use pipeline::upload::{Put, put_verified};
use proptest::prelude::*;
use sha2::{Digest as _, Sha256};

use crate::fixture::{FileSet, MIB, World, eventually, noise, pack_key, read_tree, run};

const ONE_LANE: PackOptions = PackOptions {
    lanes: 1,
    level: 1,
    pack_size: 64 << 30,
};

#[derive(Debug, Clone, Copy)]
enum End {
    Cancel,
    Panic,
    DropLane,
    DropSet,
    AbortSet,
    PartRefused,
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 24, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn no_end_leaves_an_upload_under_way(
        end in prop::sample::select(vec![
            End::Cancel, End::Panic, End::DropLane, End::DropSet, End::AbortSet, End::PartRefused,
        ]),
        frames in 0..30_usize,
        lanes in 1..3_usize,
        part_takes_ms in 0..20_u64,
    ) {
        run(async {
            let world = World::new(128 * MIB);
            world.store.part_takes_ms.store(part_takes_ms, Ordering::SeqCst);
            if matches!(end, End::PartRefused) {
                world.store.refuse_from_part.store(2, Ordering::SeqCst);
            }
            let (set, lanes) = world.packs(PackOptions { lanes, ..ONE_LANE }).unwrap();
            let cancel = world.cancel.clone();
            let threads: Vec<_> = lanes.into_iter().enumerate().map(|(number, mut lane)| {
                let cancel = cancel.clone();
                let work = move || {
                    for frame in 0..30 {
                        if number == 0 && frame == frames {
                            match end {
                                End::Cancel => cancel.cancel(),
                                End::Panic => panic!("on purpose, in frame {frame}"),
                                End::DropLane => return Ok(()),
                                End::DropSet | End::AbortSet | End::PartRefused => {}
                            }
                        }
                        lane.write(&noise(frame as u64, MIB))?;
                    }
                    lane.finish()
                };
                std::thread::Builder::new().name(format!("lane-{number}")).spawn(work).unwrap()
            }).collect();
            let outcome = match end {
                End::DropSet => { drop(set); None }
                End::AbortSet => { set.abort().await; None }
                _ => {
                    let joined = tokio::task::spawn_blocking(move || {
                        threads.into_iter().map(|thread| thread.join().is_err()).collect::<Vec<_>>()
                    });
                    joined.await.unwrap();
                    Some(set.finish().await)
                }
            };
            match (end, outcome) {
                (End::Cancel | End::DropLane, Some(outcome)) => {
                    prop_assert!(matches!(outcome, Err(PipelineError::Cancelled)), "{outcome:?}");
                }
                (End::Panic, Some(outcome)) => {
                    let named = matches!(&outcome, Err(PipelineError::Panicked { thread }) if thread == "lane-0");
                    prop_assert!(named, "{outcome:?}");
                }
                (End::PartRefused, Some(outcome)) => {
                    let refused = matches!(outcome, Err(PipelineError::Store(StoreError::PermissionDenied(_))));
                    prop_assert!(refused, "{outcome:?}");
                }
                _ => {}
            }
            let store = &world.store;
            if !matches!(end, End::DropSet) {
                prop_assert_eq!(store.inner.uploads_under_way(), 0, "{:?}", end);
            }
            eventually("the last abort", || store.inner.uploads_under_way() == 0).await;
            eventually("the return of the memory", || world.budget.free_bytes() == 128 * MIB).await;
            Ok(())
        })?;
    }
}

fn one_file() -> FileSet {
    FileSet::from([("a".to_owned(), noise(5, 20 * MIB))])
}

#[test]
fn lost_replies_are_resolved_by_reading_back() {
    for no_checksums in [false, true] {
        let target = tempfile::tempdir().unwrap();
        run(async {
            let world = World::new(128 * MIB);
            let store = &world.store;
            store.no_checksums.store(no_checksums, Ordering::SeqCst);
            store.lose_create_reply.store(true, Ordering::SeqCst);
            store.lost_completions.store(1, Ordering::SeqCst);
            store.lost_replies.store(1, Ordering::SeqCst);
            store.flaky_parts.store(3, Ordering::SeqCst);
            let copy = world.copy(&one_file(), ONE_LANE, 16 * MIB).await.unwrap();
            assert_eq!(store.inner.uploads_under_way(), 0);
            assert!(store.intended.lock().unwrap().contains(&pack_key(0)));
            world.extract(&copy, target.path(), 2).await.unwrap();
        });
        assert!(read_tree(target.path()) == one_file());
    }
}

#[test]
fn the_object_of_somebody_else_is_not_taken_for_ours() {
    for no_checksums in [false, true] {
        run(async {
            let world = World::new(128 * MIB);
            world
                .store
                .no_checksums
                .store(no_checksums, Ordering::SeqCst);
            world.store.foreign_object.store(true, Ordering::SeqCst);
            let outcome = world.copy(&one_file(), ONE_LANE, 16 * MIB).await;
            let error = outcome
                .err()
                .expect("somebody else's object was taken for ours");
            let exists = matches!(error, PipelineError::Store(StoreError::AlreadyExists(_)));
            assert!(exists, "{error}");
            assert_eq!(world.store.inner.uploads_under_way(), 0);
            let found = world.store.inner.bytes(pack_key(0).as_str()).unwrap();
            assert_eq!(found, "somebody else's", "it was overwritten");
        });
    }
}

#[test]
fn put_verified_tells_ours_from_theirs() {
    run(async {
        let world = World::new(MIB);
        let store = &*world.store;
        let key = Key::new("manifest").unwrap();
        let body = Bytes::from_static(b"one nonce");
        let put = || put_verified(store, &key, body.clone());
        store.lost_replies.store(1, Ordering::SeqCst);
        assert_eq!(
            put().await.unwrap(),
            Put::AlreadyOurs,
            "the lost reply was ours"
        );
        assert_eq!(put().await.unwrap(), Put::AlreadyOurs);
        let other = put_verified(store, &key, Bytes::from_static(b"two nonce")).await;
        let exists = matches!(
            other,
            Err(PipelineError::Store(StoreError::AlreadyExists(_)))
        );
        assert!(exists, "{other:?}");
        let fresh = Key::new("fresh").unwrap();
        assert_eq!(
            put_verified(store, &fresh, body.clone()).await.unwrap(),
            Put::Created
        );
    });
}

#[test]
fn an_object_of_any_size_is_stored_whole_or_not_at_all() {
    run(async {
        let world = World::new(128 * MIB);
        let uploader = world.uploader();
        for size in [0, 1, 8 * MIB - 1, 8 * MIB, 8 * MIB + 1, 16 * MIB, 19 * MIB] {
            let body = noise(size as u64, size);
            let key = Key::new(format!("object/{size}")).unwrap();
            let mut object = uploader.object(key.clone());
            for piece in body.chunks(1_234_567) {
                object.write(piece).await.unwrap();
            }
            let stored = object.finish().await.unwrap();
            assert_eq!(stored.size, size as u64);
            assert_eq!(stored.sha256, hex::encode(Sha256::digest(&body)));
            assert_eq!(world.store.inner.bytes(key.as_str()).unwrap(), body);
            let downloader = world.downloader();
            let read = downloader
                .object(&key, stored.size, &stored.sha256)
                .await
                .unwrap();
            assert_eq!(read, body);
            let wrong = downloader.object(&key, stored.size, "00").await;
            assert!(
                matches!(wrong, Err(PipelineError::Damaged { .. })),
                "{wrong:?}"
            );
        }
        let key = Key::new("object/dropped").unwrap();
        let mut object = uploader.object(key.clone());
        object.write(&noise(1, 20 * MIB)).await.unwrap();
        drop(object);
        eventually("the abort", || world.store.inner.uploads_under_way() == 0).await;
        assert!(world.store.inner.bytes(key.as_str()).is_none());
        drop(uploader);
        eventually("the return of the memory", || {
            world.budget.free_bytes() == 128 * MIB
        })
        .await;
    });
}

#[test]
fn lanes_wait_for_memory_and_make_do_with_less() {
    run(async {
        let world = World::new(40 * MIB);
        let uploader = world.uploader();
        let open = |patience| {
            let options = PackOptions {
                lanes: 2,
                ..ONE_LANE
            };
            PackSet::within(patience, &uploader, Arc::new(pack_key), options)
        };
        let others = world.budget.reserve(24 * MIB, "others").unwrap();
        let none = open(Duration::ZERO).await.map(drop).unwrap_err();
        assert!(none.to_string().contains("a lane needs"), "{none}");
        let (opened, ()) = tokio::join!(open(Duration::from_mins(1)), async {
            tokio::task::yield_now().await;
            drop(others);
        });
        let (set, lanes) = opened.unwrap();
        assert_eq!(lanes.len(), 2, "what others gave back is enough for both");
        drop((set, lanes));
        let _others = world.budget.reserve(12 * MIB, "others").unwrap();
        let (set, lanes) = open(Duration::ZERO).await.unwrap();
        assert_eq!(lanes.len(), 1, "there is room for one");
        drop(set);
        world.cancel.cancel();
        let cancelled = open(Duration::from_mins(1)).await.map(drop);
        assert!(
            matches!(cancelled, Err(PipelineError::Cancelled)),
            "{cancelled:?}"
        );
    });
}

#[test]
fn a_failed_object_says_why_and_leaves_nothing() {
    run(async {
        let world = World::new(128 * MIB);
        world.store.refuse_from_part.store(1, Ordering::SeqCst);
        let mut object = world.uploader().object(Key::new("refused").unwrap());
        let body = noise(1, 4 * MIB);
        let error = loop {
            if let Err(error) = object.write(&body).await {
                break error;
            }
        };
        let refused = matches!(error, PipelineError::Store(StoreError::PermissionDenied(_)));
        assert!(refused, "{error}");
        assert_eq!(world.store.inner.uploads_under_way(), 0);
        assert!(
            world
                .store
                .head(&Key::new("refused").unwrap())
                .await
                .is_err()
        );
    });
}

#[test]
fn the_bandwidth_limit_can_be_lifted_while_it_holds() {
    let target = tempfile::tempdir().unwrap();
    run(async {
        let world = World::new(128 * MIB);
        // The first part overdraws; the next would have to wait for months.
        world.throttle.set_rate(Some(1));
        let files = one_file();
        let copying = {
            let (world, files) = (world.clone(), files.clone());
            tokio::spawn(async move { world.copy(&files, ONE_LANE, 16 * MIB).await })
        };
        let received = || world.store.parts_received.load(Ordering::SeqCst);
        eventually("the first part", || received() == 1).await;
        tokio::time::sleep(Duration::from_millis(100)).await;
        assert_eq!(received(), 1, "the limit does not hold");
        assert!(!copying.is_finished());
        world.throttle.set_rate(None);
        let copy = copying.await.unwrap().unwrap();
        assert!(received() >= 3);
        world.extract(&copy, target.path(), 2).await.unwrap();
    });
    assert!(read_tree(target.path()) == one_file());
}
