//! Little memory, many writers, and a store that fails.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use pitr_agent::catalog_fs::{CatalogFs, Failure, FsError};

use crate::ops::{Fill, How, Outcome};
use crate::subject::{Subject, wait};
use crate::world::{MIB, World, alone, finish, run};

const BASE: &str = "backups/node/T1/database";
const WRITE: How = How {
    read: false,
    write: true,
    create: true,
    exclusive: false,
    truncate: true,
    append: false,
};

fn directories(subject: &Subject) {
    for path in ["backups", "backups/node", "backups/node/T1", BASE] {
        subject.mkdir(path).unwrap();
    }
}

/// The least that an agent may have: 64 MiB, of which 16 are what ships the server's WAL needs at times.
fn smallest() -> World {
    World {
        lanes: 1,
        segment: 16 << 20,
        ..World::new(64 * MIB)
    }
}

/// What a writer writes: files small and large, in writes of the programs' sizes.
fn files(writer: u64) -> Vec<(String, Fill, usize)> {
    let lengths = [
        100,
        8200,
        70_000,
        300_000,
        1 << 20,
        5_000_000,
        9000,
        2_500_000,
    ];
    let file = |(number, length): (usize, &usize)| {
        let path = format!("{BASE}/{writer}_{number}");
        let seed = writer * 100 + number as u64 + 1;
        let piece = if number % 2 == 0 { 64 << 10 } else { 128 << 10 };
        (
            path,
            Fill {
                seed,
                length: *length,
            },
            piece,
        )
    };
    lengths.iter().enumerate().map(file).collect()
}

fn write(fs: &Arc<CatalogFs>, writer: u64) -> Result<(), FsError> {
    let subject = Subject::new(Arc::clone(fs));
    for (path, fill, piece) in files(writer) {
        let handle = subject.open(&path, WRITE)?.handle;
        let mut at = 0;
        for piece in fill.bytes().chunks(piece) {
            subject.write(handle, at, piece)?;
            at += piece.len() as u64;
        }
        subject.close(handle)?;
    }
    Ok(())
}

/// Sixteen writers, files that were opened and stand still, a slow store, and the least memory: they wait, and all come through.
#[test]
fn sixteen_writers_with_the_least_memory_get_on() {
    run(async {
        let world = smallest();
        let before = world.budget.free_bytes();
        let subject = world.subject();
        let taken = before - world.budget.free_bytes();
        println!("{taken} of {before} bytes are taken");
        // What the shipper of the server's WAL needs must be left.
        let rest = world.budget.reserve(16 * MIB, "a segment of the server");
        let rest = rest.unwrap();
        world.store.part_takes_ms.store(20, Ordering::SeqCst);
        directories(&subject);
        let idle: Vec<_> = (0..12)
            .map(|number| {
                let path = format!("{BASE}/idle_{number}");
                let handle = subject.open(&path, WRITE).unwrap().handle;
                subject.write(handle, 0, &[7; 200_000]).unwrap();
                handle
            })
            .collect();
        let threads: Vec<_> = (0..16)
            .map(|writer| {
                let fs = Arc::clone(&subject.fs);
                tokio::task::spawn_blocking(move || write(&fs, writer))
            })
            .collect();
        for thread in threads {
            thread.await.unwrap().unwrap();
        }
        for handle in idle {
            subject.close(handle).unwrap();
        }
        let (copy, wal) = finish(&subject.fs).await.unwrap();
        let target = tempfile::tempdir().unwrap();
        let back = world.read_back(&copy, &wal, target.path()).await;
        for (path, fill, _) in (0..16).flat_map(files) {
            let due = (0o600, Some(Outcome::of_bytes(&fill.bytes())));
            assert_eq!(back[&path], due, "{path}");
        }
        drop(rest);
        drop(subject);
        assert!(world.budget.free_bytes() > before - 9 * MIB);
    });
}

/// No call waits for ever, and nobody is told that it went well, when a part cannot be stored.
#[test]
fn the_first_failed_part_ends_the_copy() {
    run(async {
        let world = smallest();
        let subject = world.subject();
        directories(&subject);
        subject.put(&format!("{BASE}/closed"), &[1; 1000]).unwrap();
        world.store.refuse_from_part.store(1, Ordering::SeqCst);
        let failed = Arc::new(AtomicBool::new(false));
        let threads: Vec<_> = (0..16)
            .map(|writer| {
                let fs = Arc::clone(&subject.fs);
                let failed = Arc::clone(&failed);
                tokio::task::spawn_blocking(move || {
                    let subject = Subject::new(fs);
                    let path = format!("{BASE}/{writer}");
                    let handle = subject.open(&path, WRITE).map_err(|error| (error, None))?;
                    let bytes = Fill {
                        seed: 2 * writer + 1,
                        length: MIB,
                    }
                    .bytes();
                    for number in 0..200 {
                        let at = number * MIB as u64;
                        if let Err(error) = subject.write(handle.handle, at, &bytes) {
                            failed.store(true, Ordering::SeqCst);
                            return Err((error, Some(subject.close(handle.handle))));
                        }
                    }
                    Ok(())
                })
            })
            .collect();
        let failure = tokio::time::timeout(Duration::from_secs(60), subject.fs.failed()).await;
        let failure = failure.unwrap();
        assert!(matches!(failure, Failure::Pipeline(_)), "{failure}");
        assert!(failure.to_string().contains("AccessDenied"), "{failure}");
        for thread in threads {
            let (write, close) = thread.await.unwrap().unwrap_err();
            assert_eq!(write, FsError::Io);
            // close() tells of it too.
            assert!(matches!(close, None | Some(Err(FsError::Io))));
        }
        assert!(failed.load(Ordering::SeqCst));
        let how = How {
            truncate: false,
            ..WRITE
        };
        let path = format!("{BASE}/later");
        assert_eq!(subject.open(&path, how).unwrap_err(), FsError::Io);
        let sealed = subject.fs.seal().await.unwrap_err();
        assert_eq!(sealed.to_string(), failure.to_string());
        subject.fs.abort().await;
        assert_eq!(world.store.inner.uploads_under_way(), 0);
    });
}

/// A part that fails for good after its file was closed, and when nothing more is written, is still found.
#[test]
fn a_part_that_fails_after_the_close_is_found() {
    run(async {
        let world = smallest();
        let subject = world.subject();
        directories(&subject);
        world.store.refuse_from_part.store(1, Ordering::SeqCst);
        let bytes = Fill {
            seed: 3,
            length: 20 * MIB,
        }
        .bytes();
        let path = format!("{BASE}/1");
        // It may end well: close() waits for no part.
        let _ = subject.put(&path, &bytes);
        let failed = tokio::time::timeout(Duration::from_secs(60), subject.fs.failed()).await;
        assert!(failed.unwrap().to_string().contains("AccessDenied"));
        assert!(subject.fs.seal().await.is_err());
        subject.fs.abort().await;
        assert_eq!(world.store.inner.uploads_under_way(), 0);
    });
}

/// A failure when the copy is sealed already, and only its last parts are sent.
#[test]
fn a_copy_whose_last_part_fails_is_not_finished() {
    run(async {
        let world = smallest();
        let subject = world.subject();
        directories(&subject);
        let bytes = Fill {
            seed: 3,
            length: 12 * MIB,
        }
        .bytes();
        subject.put(&format!("{BASE}/1"), &bytes).unwrap();
        let sealed = subject.fs.seal().await.unwrap();
        world.store.refuse_from_part.store(2, Ordering::SeqCst);
        let finished = sealed.finish(crate::world::index_key()).await;
        let failure = finished.unwrap_err();
        assert!(failure.to_string().contains("AccessDenied"), "{failure}");
        assert_eq!(world.store.inner.uploads_under_way(), 0);
        assert!(world.store.inner.bytes("copy/index").is_none());
    });
}

/// A cancel reaches whoever waits, and leaves nothing.
#[test]
fn a_cancel_ends_everything() {
    run(async {
        let world = smallest();
        let subject = world.subject();
        directories(&subject);
        world.store.part_takes_ms.store(60_000, Ordering::SeqCst);
        let fs = Arc::clone(&subject.fs);
        let writer = tokio::task::spawn_blocking(move || {
            let subject = Subject::new(fs);
            let bytes = Fill {
                seed: 3,
                length: 100 * MIB,
            }
            .bytes();
            subject.put(&format!("{BASE}/1"), &bytes)
        });
        tokio::time::sleep(Duration::from_millis(300)).await;
        assert!(!writer.is_finished());
        world.cancel.cancel();
        assert_eq!(writer.await.unwrap(), Err(FsError::Io));
        let aborted = tokio::time::timeout(Duration::from_secs(30), subject.fs.abort()).await;
        aborted.unwrap();
        assert_eq!(world.store.inner.uploads_under_way(), 0);
        drop(subject);
        assert_eq!(world.budget.free_bytes(), world.budget.total_bytes());
    });
}

/// The last handle must be gone before the copy is sealed.
#[test]
fn a_copy_with_an_open_file_is_not_sealed() {
    run(async {
        let world = smallest();
        let subject = world.subject();
        directories(&subject);
        let path = format!("{BASE}/1");
        let handle = subject.open(&path, WRITE).unwrap().handle;
        let open = subject.fs.seal().await.unwrap_err();
        assert!(matches!(open, Failure::StillOpen { .. }), "{open}");
        assert!(open.to_string().contains(&path), "{open}");
        subject.close(handle).unwrap();
        finish(&subject.fs).await.unwrap();
        let late = wait(|done| subject.fs.write(handle, 0, b"x", done));
        assert!(late.is_err());
        assert!(subject.mkdir("backups/late").is_err());
    });
}

/// A budget that does not fit is refused at the start, in words that say so.
#[test]
fn a_budget_that_is_too_small_is_refused() {
    run(async {
        let world = World {
            segment: 64 << 20,
            ..smallest()
        };
        let refused = world.fs().unwrap_err();
        assert!(
            refused.to_string().contains("memory budget is too small"),
            "{refused}"
        );
    });
}

/// What small files in memory may take is limited, and the limit is an error, not a crash.
#[test]
fn a_control_file_that_grows_absurdly_is_refused() {
    run(async {
        let world = smallest();
        let subject = world.subject();
        directories(&subject);
        let bytes = Fill {
            seed: 3,
            length: 3 * MIB,
        }
        .bytes();
        let path = "backups/node/T1/backup.control";
        assert_eq!(subject.put(path, &bytes), Err(FsError::NoSpace));
        // Its memory is free again.
        subject.unlink(path).unwrap();
        subject.put(path, &bytes[..500_000]).unwrap();
        assert_eq!(subject.get(path).unwrap(), bytes[..500_000]);
    });
}

/// A hundred thousand small files: names, sizes, and the list of them all in memory, compressed.
#[test]
fn a_hundred_thousand_files_fit_easily() {
    alone(
        "pressure::a_hundred_thousand_files_fit_easily",
        hundred_thousand_files,
    );
}

fn hundred_thousand_files() {
    run(async {
        let world = smallest();
        let subject = world.subject();
        directories(&subject);
        let memory = || {
            let status = std::fs::read_to_string("/proc/self/statm").unwrap();
            let pages: usize = status.split(' ').nth(1).unwrap().parse().unwrap();
            pages * 4096
        };
        let before = memory();
        let mut list = String::new();
        for directory in 0..100 {
            subject.mkdir(&format!("{BASE}/{directory}")).unwrap();
            for file in 0..1000 {
                let path = format!("{BASE}/{directory}/{file}");
                subject.put(&path, path.as_bytes()).unwrap();
                list.push_str(&format!(
                    "{{\"path\":\"base/{directory}/{file}\", \"size\":\"{}\", \"mode\":\"33152\", \"is_datafile\":\"0\", \"is_cfs\":\"0\", \"crc\":\"{}\", \"compress_alg\":\"none\", \"external_dir_num\":\"0\", \"dbOid\":\"0\"}}\n",
                    path.len(),
                    (directory * 1000 + file) * 7919 % 4_294_967
                ));
            }
        }
        let of_files = memory().saturating_sub(before + list.len());
        println!("{} bytes a file, all together", of_files / 100_000);
        assert!(of_files < 100_000 * 1500, "{of_files}");
        let before = memory();
        let path = "backups/node/T1/backup_content.control";
        let temporary = format!("{path}.tmp");
        subject.put(&temporary, list.as_bytes()).unwrap();
        subject.rename(&temporary, path).unwrap();
        println!(
            "{} bytes for a list of {}",
            memory().saturating_sub(before),
            list.len()
        );
        assert_eq!(subject.get(path).unwrap(), list.as_bytes());
        let sealed = subject.fs.seal().await.unwrap();
        assert_eq!(sealed.read(path).unwrap().unwrap(), list.as_bytes());
        assert_eq!(sealed.files().count(), 100_001);
        let copy = sealed.finish(crate::world::index_key()).await.unwrap();
        assert_eq!(copy.files, 100_001);
        assert_eq!(world.meter.files(), 100_001);
    });
}
