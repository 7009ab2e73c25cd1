//! Zeros cost next to nothing, however they are written.

use crate::ops::{Fill, How, Outcome};
use crate::world::{MIB, World, finish, run};

const BASE: &str = "backups/node/T1/database";

fn directories(subject: &crate::subject::Subject) {
    for path in ["backups", "backups/node", "backups/node/T1", BASE] {
        subject.mkdir(path).unwrap();
    }
}

/// openGauss has `global/pg_dw_0` in every backup: 268,435,456 bytes of which nearly all are zeros, which `gs_probackup`
/// writes in 2048 pieces of 128 KiB.
#[test]
fn a_file_of_zeros_takes_less_than_a_hundredth() {
    run(async {
        let world = World::new(128 * MIB);
        let subject = world.subject();
        directories(&subject);
        let path = format!("{BASE}/pg_dw_0");
        let how = How {
            write: true,
            create: true,
            truncate: true,
            ..How::default()
        };
        let piece = vec![0; 128 << 10];
        let mut first = piece.clone();
        first[..8192].copy_from_slice(
            &Fill {
                seed: 7,
                length: 8192,
            }
            .bytes(),
        );
        let handle = subject.open(&path, how).unwrap().handle;
        for number in 0..2048_u64 {
            let piece = if number == 0 { &first } else { &piece };
            subject.write(handle, number << 17, piece).unwrap();
        }
        subject.close(handle).unwrap();
        let (copy, wal) = finish(&subject.fs).await.unwrap();
        let stored: u64 = copy.packs.iter().map(|pack| pack.size).sum();
        assert_eq!(copy.plain_bytes, 256 << 20);
        assert!(
            stored + copy.index.size < (256 << 20) / 100,
            "{stored} bytes"
        );
        let target = tempfile::tempdir().unwrap();
        let back = world.read_back(&copy, &wal, target.path()).await;
        let mut whole = first;
        whole.resize(256 << 20, 0);
        assert_eq!(back[&path], (0o600, Some(Outcome::of_bytes(&whole))));
    });
}

/// A hole takes no memory: the file is far larger than the budget.
#[test]
fn a_gap_of_a_gigabyte_stores_next_to_nothing() {
    run(async {
        let world = World::new(128 * MIB);
        let subject = world.subject();
        directories(&subject);
        let path = format!("{BASE}/hole");
        subject.put(&path, b"begin").unwrap();
        let how = How {
            write: true,
            ..How::default()
        };
        let handle = subject.open(&path, how).unwrap().handle;
        subject.write(handle, 1 << 30, b"end").unwrap();
        subject.close(handle).unwrap();
        assert_eq!(subject.find(&path).unwrap().size, (1 << 30) + 3);
        let (copy, _) = finish(&subject.fs).await.unwrap();
        assert_eq!(copy.plain_bytes, (1 << 30) + 3);
        let stored: u64 = copy.packs.iter().map(|pack| pack.size).sum();
        assert!(stored < MIB as u64, "{stored} bytes");
        let plain: u64 = copy.packs.iter().map(|pack| pack.plain_bytes).sum();
        assert_eq!(plain, (1 << 30) + 3);
    });
}
