//! What lies below: the backups that a backup builds on, and the chain that a restore reads.

use std::sync::Arc;

use bytes::Bytes;
use pipeline::budget::Budget;
use pitr_agent::catalog_fs::{CatalogFs, Done, FsError, Lower, LowerEntry, LowerId, LowerKind};

use crate::ops::{How, Outcome};
use crate::subject::Subject;
use crate::world::{MIB, World, finish, run};

const READ: How = How {
    read: true,
    write: false,
    create: false,
    exclusive: false,
    truncate: false,
    append: false,
};
const WRITE: How = How {
    read: false,
    write: true,
    create: true,
    exclusive: false,
    truncate: true,
    append: false,
};

/// Files whose bytes are their number.
#[derive(Debug)]
struct Numbers;

impl Lower for Numbers {
    fn read(&self, id: LowerId, offset: u64, length: usize, done: Done<Bytes>) {
        let whole = [u8::try_from(id).unwrap(); 1000];
        let start = usize::try_from(offset).unwrap().min(1000);
        let end = (start + length).min(1000);
        let bytes = Bytes::copy_from_slice(&whole[start..end]);
        // From another thread, as a bucket answers.
        std::thread::spawn(move || done(Ok(bytes)));
    }
}

fn entries() -> Vec<LowerEntry> {
    let file = |path: &str, id| LowerEntry {
        path: path.to_owned(),
        mode: 0o640,
        mtime: Some(1_700_000_000),
        kind: LowerKind::File { size: 1000, id },
    };
    vec![
        file("backups/node/T0/backup.control", 1),
        file("backups/node/T0/backup_content.control", 2),
        file("backups/node/T0/database/base/1/100", 3),
        file("backups/node/pg_probackup.conf", 4),
        LowerEntry {
            path: "backups/node/T0/database/pg_wal".into(),
            mode: 0o750,
            mtime: None,
            kind: LowerKind::Directory,
        },
    ]
}

#[test]
fn a_parent_can_be_read_and_not_changed() {
    run(async {
        let world = World {
            lower: (entries(), Arc::new(Numbers)),
            ..World::new(64 * MIB)
        };
        let subject = world.subject();
        let control = "backups/node/T0/backup.control";
        assert_eq!(subject.get(control).unwrap(), [1; 1000]);
        assert_eq!(
            subject.get("backups/node/T0/database/base/1/100").unwrap(),
            [3; 1000]
        );
        let found = subject.find("backups/node/T0/database/pg_wal").unwrap();
        assert_eq!(found.mode, 0o750);
        let opened = subject.open(control, READ).unwrap();
        assert!(!opened.direct_io);
        subject.close(opened.handle).unwrap();

        let read_only = |done: Result<(), FsError>| assert_eq!(done, Err(FsError::ReadOnly));
        read_only(subject.unlink(control));
        read_only(subject.put("backups/node/T0/database/base/1/100", b"x"));
        read_only(subject.put("backups/node/T0/database/base/1/101", b"x"));
        read_only(subject.mkdir("backups/node/T0/database/base/2"));
        read_only(subject.rename(control, "backups/node/T0/backup.control.old"));
        read_only(subject.rename(control, "backups/node/backup.control"));

        // Its lock and its status are written, and go nowhere.
        let lock = "backups/node/T0/backup_ro.pid";
        subject.put(lock, b"1").unwrap();
        subject.unlink(lock).unwrap();
        let temporary = format!("{control}.tmp");
        subject.put(&temporary, b"status = OK").unwrap();
        subject.rename(&temporary, control).unwrap();
        assert_eq!(subject.get(control).unwrap(), b"status = OK");

        // What all backups share can be replaced, and is this one's then.
        let conf = "backups/node/pg_probackup.conf";
        let temporary = format!("{conf}.tmp");
        subject.put(&temporary, b"# ours").unwrap();
        subject.rename(&temporary, conf).unwrap();
        subject.mkdir("backups/node/T1").unwrap();
        subject
            .put("backups/node/T1/backup.control", b"ours")
            .unwrap();
        subject.put("backups/node/T1/backup.pid", b"1").unwrap();

        let (copy, wal) = finish(&subject.fs).await.unwrap();
        let target = tempfile::tempdir().unwrap();
        let back = world.read_back(&copy, &wal, target.path()).await;
        let file = |bytes: &[u8]| Some(Outcome::of_bytes(bytes));
        let due = [
            ("backups", 0o700, None),
            ("backups/node", 0o700, None),
            ("backups/node/T1", 0o700, None),
            ("backups/node/T1/backup.control", 0o600, file(b"ours")),
            ("backups/node/pg_probackup.conf", 0o600, file(b"# ours")),
        ];
        let due = due.map(|(path, mode, bytes)| (path.to_owned(), (mode, bytes)));
        assert_eq!(back, due.into_iter().collect());
    });
}

#[test]
fn what_is_written_for_a_restore_lies_in_memory() {
    let budget = Budget::new(64 * MIB);
    let fs = CatalogFs::for_reading(entries(), Arc::new(Numbers), &budget).unwrap();
    let subject = Subject::new(fs);
    let (control, data) = (
        "backups/node/T0/backup.control",
        "backups/node/T0/database/base/1/100",
    );
    // By a rename, by emptying it, and by taking it away.
    subject.put(&format!("{control}.tmp"), b"new").unwrap();
    subject.rename(&format!("{control}.tmp"), control).unwrap();
    assert_eq!(subject.get(control).unwrap(), b"new");
    let conf = "backups/node/pg_probackup.conf";
    subject.put(conf, b"shorter").unwrap();
    assert_eq!(subject.get(conf).unwrap(), b"shorter");
    subject
        .unlink("backups/node/T0/backup_content.control")
        .unwrap();
    assert_eq!(
        subject
            .find("backups/node/T0/backup_content.control")
            .unwrap_err(),
        FsError::NotFound
    );
    assert_eq!(subject.get(data).unwrap(), [3; 1000]);
    // In the middle, nothing of it can be changed.
    let how = How {
        truncate: false,
        create: false,
        ..WRITE
    };
    let handle = subject.open(data, how).unwrap().handle;
    assert!(matches!(
        subject.write(handle, 0, b"x"),
        Err(FsError::Refused(_))
    ));
    subject.close(handle).unwrap();
    let bytes = vec![1; 5 * MIB];
    assert_eq!(
        subject.put("backups/node/T0/large", &bytes),
        Err(FsError::NoSpace)
    );
    drop(subject);
    assert_eq!(budget.free_bytes(), budget.total_bytes());
}

#[test]
fn a_lower_layer_that_cannot_be_is_refused() {
    let budget = Budget::new(64 * MIB);
    let refused = |path: &str| {
        let mut entries = entries();
        entries.push(LowerEntry {
            path: path.to_owned(),
            mode: 0o600,
            mtime: None,
            kind: LowerKind::File { size: 1, id: 9 },
        });
        CatalogFs::for_reading(entries, Arc::new(Numbers), &budget).is_err()
    };
    assert!(!refused("backups/node/T0/other"));
    assert!(refused("backups/node/T0/backup.control"));
    assert!(refused("backups/node/T0/backup.control/below"));
    assert!(refused("backups/node"));
    assert!(refused("/absolute"));
    assert!(refused("a/../b"));
}
