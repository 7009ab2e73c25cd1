//! WAL segments as both programs write them, while the copy goes on.

use std::sync::Arc;
use std::time::{Duration, Instant};

use pitr_agent::catalog_fs::{Failure, FsError, Handle};

use crate::ops::{Fill, How, Outcome};
use crate::subject::Subject;
use crate::world::{MIB, World, alone, finish, run, unpack};

const WAL: &str = "backups/node/T1/database/pg_wal";
const WRITE: How = How {
    read: false,
    write: true,
    create: true,
    exclusive: false,
    truncate: false,
    append: false,
};

fn directories(subject: &Subject) {
    for path in [
        "backups",
        "backups/node",
        "backups/node/T1",
        "backups/node/T1/database",
        WAL,
    ] {
        subject.mkdir(path).unwrap();
    }
}

fn name(number: u64) -> String {
    format!("00000001{number:016X}")
}

fn bytes(world: &World, number: u64) -> Vec<u8> {
    let length = usize::try_from(world.segment).unwrap();
    Fill {
        seed: 2 * number + 2,
        length,
    }
    .bytes()
}

/// Zeros up to the size, as both do.
fn pad(world: &World, subject: &Subject, handle: Handle) {
    for block in 0..world.segment / 8192 {
        subject.write(handle, block * 8192, &[0; 8192]).unwrap();
    }
}

fn overwrite(subject: &Subject, handle: Handle, bytes: &[u8]) -> Result<(), FsError> {
    let mut at = 0;
    // What a server sends.
    for length in [328, 112, 48, 130_584]
        .into_iter()
        .chain(std::iter::repeat(131_072))
    {
        let end = bytes.len().min(at + length);
        subject.write(handle, at as u64, &bytes[at..end])?;
        at = end;
        if at == bytes.len() {
            break;
        }
    }
    Ok(())
}

fn gs(world: &World, subject: &Subject, number: u64) -> Result<(), FsError> {
    let partial = format!("{WAL}/{}.partial", name(number));
    let handle = subject.open(&partial, WRITE)?.handle;
    pad(world, subject, handle);
    overwrite(subject, handle, &bytes(world, number))?;
    crate::subject::wait(|done| subject.fs.fsync(handle, done))?;
    subject.close(handle)?;
    subject.rename(&partial, &format!("{WAL}/{}", name(number)))
}

fn eventually(what: &str, mut happened: impl FnMut() -> bool) {
    let start = Instant::now();
    while !happened() {
        assert!(
            start.elapsed() < Duration::from_secs(20),
            "{what} did not happen"
        );
        std::thread::park_timeout(Duration::from_millis(5));
    }
}

#[test]
fn a_renamed_segment_goes_to_the_bucket_and_is_read_from_there() {
    run(async {
        let world = World {
            segment: 16 << 20,
            ..World::new(128 * MIB)
        };
        let subject = world.subject();
        directories(&subject);
        *world.wal.takes.lock().unwrap() = Duration::from_secs(8);
        let path = format!("{WAL}/{}", name(3));
        let due = bytes(&world, 3);
        gs(&world, &subject, 3).unwrap();
        // On its way.
        assert!(world.wal.stored.lock().unwrap().is_empty());
        assert_eq!(subject.get(&path).unwrap(), due);
        assert_eq!(*world.wal.gets.lock().unwrap(), 0);
        eventually("the put", || {
            world.wal.stored.lock().unwrap().contains_key(&name(3))
        });
        eventually("the reads from the bucket", || {
            assert_eq!(subject.get(&path).unwrap(), due);
            *world.wal.gets.lock().unwrap() > 0
        });
        // 128 reads of a segment do not fetch it as often.
        let gets = *world.wal.gets.lock().unwrap();
        assert_eq!(subject.get(&path).unwrap(), due);
        assert!(*world.wal.gets.lock().unwrap() <= gets + 16);
        let (copy, wal) = finish(&subject.fs).await.unwrap();
        assert_eq!(copy.files, 0);
        let [segment] = &wal[..] else {
            panic!("{wal:?}")
        };
        assert_eq!(segment.path, path);
        assert_eq!(segment.segment, name(3));
        assert_eq!(segment.size, 16 << 20);
    });
}

#[test]
fn a_segment_that_was_overwritten_to_its_end_goes_when_it_is_closed() {
    run(async {
        let world = World::new(64 * MIB);
        let subject = world.subject();
        directories(&subject);
        let path = format!("{WAL}/{}", name(1));
        let due = bytes(&world, 1);
        let handle = subject.open(&path, WRITE).unwrap().handle;
        pad(&world, &subject, handle);
        let part = due.len() / 2;
        overwrite(&subject, handle, &due[..part]).unwrap();
        subject.close(handle).unwrap();
        // Not complete: half of it is padding still.
        assert!(world.wal.stored.lock().unwrap().is_empty());
        let mut half = due[..part].to_vec();
        half.resize(due.len(), 0);
        assert_eq!(subject.get(&path).unwrap(), half);
        let handle = subject.open(&path, WRITE).unwrap().handle;
        subject.write(handle, part as u64, &due[part..]).unwrap();
        assert!(world.wal.stored.lock().unwrap().is_empty());
        subject.close(handle).unwrap();
        eventually("the put", || {
            world.wal.stored.lock().unwrap().contains_key(&name(1))
        });
        let stored = world.wal.stored.lock().unwrap()[&name(1)].clone();
        assert_eq!(unpack(&stored), due);
        // The next one never gets that far, and is an ordinary file of the copy.
        let last = format!("{WAL}/{}", name(2));
        let handle = subject.open(&last, WRITE).unwrap().handle;
        pad(&world, &subject, handle);
        overwrite(&subject, handle, &due[..part]).unwrap();
        subject.close(handle).unwrap();
        let (copy, wal) = finish(&subject.fs).await.unwrap();
        assert_eq!(wal.len(), 1);
        let target = tempfile::tempdir().unwrap();
        let back = world.read_back(&copy, &wal, target.path()).await;
        assert_eq!(back[&path].1, Some(Outcome::of_bytes(&due)));
        assert_eq!(back[&last].1, Some(Outcome::of_bytes(&half)));
    });
}

/// What a busy server writes while a large copy goes on, with the least memory and a slow store.
#[test]
fn a_hundred_segments_stay_within_memory() {
    alone(
        "wal::a_hundred_segments_stay_within_memory",
        hundred_segments_within_memory,
    );
}

fn hundred_segments_within_memory() {
    run(async {
        let world = World {
            segment: 16 << 20,
            lanes: 1,
            ..World::new(64 * MIB)
        };
        let subject = world.subject();
        directories(&subject);
        *world.wal.takes.lock().unwrap() = Duration::from_millis(20);
        let stop = Arc::new(std::sync::atomic::AtomicBool::new(false));
        let data = {
            let (fs, stop) = (Arc::clone(&subject.fs), Arc::clone(&stop));
            tokio::task::spawn_blocking(move || {
                let subject = Subject::new(fs);
                let bytes = Fill {
                    seed: 4,
                    length: 3 * MIB,
                }
                .bytes();
                let mut number = 0;
                while !stop.load(std::sync::atomic::Ordering::Relaxed) {
                    let path = format!("backups/node/T1/database/{number}");
                    subject.put(&path, &bytes).unwrap();
                    number += 1;
                }
                number
            })
        };
        let memory = || {
            let status = std::fs::read_to_string("/proc/self/statm").unwrap();
            status.split(' ').nth(1).unwrap().parse::<usize>().unwrap() * 4096
        };
        let (mut first, mut most) = (0, 0);
        for number in 1..=100 {
            gs(&world, &subject, number).unwrap();
            if number == 5 {
                first = memory();
            }
            most = most.max(memory());
            let path = format!("{WAL}/{}", name(number - number / 3));
            let how = How {
                read: true,
                ..How::default()
            };
            let handle = subject.open(&path, how).unwrap().handle;
            let page = subject.read(handle, 8192 * 5, 16_384).unwrap();
            assert_eq!(
                page,
                bytes(&world, number - number / 3)[8192 * 5..][..16_384]
            );
            subject.close(handle).unwrap();
        }
        stop.store(true, std::sync::atomic::Ordering::Relaxed);
        let files = data.await.unwrap();
        println!(
            "{files} files beside; {} MiB more than at the start",
            most.saturating_sub(first) / MIB
        );
        assert!(files > 0);
        assert!(most.saturating_sub(first) < 100 * MIB, "{first} {most}");
        let (_, wal) = finish(&subject.fs).await.unwrap();
        assert_eq!(wal.len(), 100);
    });
}

#[test]
fn a_segment_that_cannot_be_stored_ends_the_copy() {
    run(async {
        let world = World::new(64 * MIB);
        let subject = world.subject();
        directories(&subject);
        *world.wal.fails.lock().unwrap() = true;
        gs(&world, &subject, 1).unwrap();
        let failure = tokio::time::timeout(Duration::from_secs(20), subject.fs.failed()).await;
        let failure = failure.unwrap();
        assert!(matches!(failure, Failure::Wal { .. }), "{failure}");
        assert_eq!(subject.put(&format!("{WAL}/x"), b"x"), Err(FsError::Io));
        assert!(subject.fs.seal().await.is_err());
        subject.fs.abort().await;
    });
}

/// A wait would be of no use when no segment is on its way.
#[test]
fn incomplete_segments_that_take_all_memory_are_refused() {
    run(async {
        let world = World {
            segment: 16 << 20,
            lanes: 1,
            ..World::new(64 * MIB)
        };
        let subject = world.subject();
        directories(&subject);
        for number in 1..10 {
            let path = format!("{WAL}/{}.partial", name(number));
            let handle = subject.open(&path, WRITE).unwrap().handle;
            pad(&world, &subject, handle);
            match subject.write(handle, 0, b"x") {
                Ok(()) => subject.close(handle).unwrap(),
                Err(error) => {
                    assert_eq!(error, FsError::NoSpace);
                    assert!(number > 1);
                    return;
                }
            }
        }
        panic!("nine segments of 16 MiB fit in 64 MiB");
    });
}

#[test]
fn a_complete_segment_is_not_written_again() {
    run(async {
        let world = World::new(64 * MIB);
        let subject = world.subject();
        directories(&subject);
        gs(&world, &subject, 1).unwrap();
        let path = format!("{WAL}/{}", name(1));
        let handle = subject.open(&path, WRITE).unwrap().handle;
        // As without --no-sync.
        crate::subject::wait(|done| subject.fs.fsync(handle, done)).unwrap();
        assert_eq!(subject.write(handle, 0, b"x"), Err(FsError::Io));
        assert_eq!(
            subject.write(handle, 16 << 20, b"x"),
            Err(FsError::TooLarge)
        );
        subject.close(handle).unwrap();
        let failure = subject.fs.seal().await.unwrap_err();
        assert!(matches!(failure, Failure::Spoiled { .. }), "{failure}");
        assert!(failure.to_string().contains(&path), "{failure}");
    });
}
