//! Sequences of calls that programs make on a backup catalog, and who can be asked to make them.
//!
//! [`steps`] generates [`Step`]s: what a program means to do. The model (`model.rs`) plays them on a plain directory and
//! makes of them a [`Script`]: calls with the outcome that each must have. A script does not know whom it is tried
//! on, and can be written down as JSON, so the very same one runs
//!
//! - in-process, on a `CatalogFs` through `subject.rs`;
//! - through a real mount: start a process that is not the one that serves it, give it the script and the mount point,
//!   and have it run [`Script::play`] on a [`PlainDirectory`] of the mount point, which makes the calls by `std::fs`.
//!
//! Both then compare what was stored with [`Script::tree`].

use std::collections::BTreeMap;
use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::unix::fs::{FileExt as _, MetadataExt as _, OpenOptionsExt as _, PermissionsExt as _};
use std::path::PathBuf;

use proptest::prelude::*;
use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};

/// Handles that a sequence uses at the same time.
pub(crate) const SLOTS: usize = 5;
/// Bytes of a WAL segment: the smallest there is.
pub(crate) const SEGMENT: u64 = 1 << 20;

/// What `open` is asked for.
#[allow(clippy::struct_excessive_bools, reason = "they are flags")]
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct How {
    pub(crate) read: bool,
    pub(crate) write: bool,
    pub(crate) create: bool,
    pub(crate) exclusive: bool,
    pub(crate) truncate: bool,
    pub(crate) append: bool,
}

/// Bytes that are made when they are needed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Fill {
    pub(crate) seed: u64,
    pub(crate) length: usize,
}

impl Fill {
    /// Zeros for seed 0, lines that repeat for even ones, noise for odd ones.
    pub(crate) fn bytes(self) -> Vec<u8> {
        let Self { seed, length } = self;
        if seed == 0 {
            return vec![0; length];
        }
        let mut state = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1;
        let distinct = if seed % 2 == 0 { 300 } else { length };
        let mut bytes = Vec::with_capacity(distinct + 8);
        while bytes.len() < distinct {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            bytes.extend_from_slice(&state.wrapping_mul(0x2545_F491_4F6C_DD1D).to_le_bytes());
        }
        bytes.truncate(distinct);
        while bytes.len() < length {
            let more = (length - bytes.len()).min(bytes.len());
            bytes.extend_from_within(..more);
        }
        bytes.truncate(length);
        bytes
    }
}

/// One call.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum Call {
    Open(usize, String, How),
    Write(usize, u64, Fill),
    Read(usize, u64, usize),
    Fsync(usize),
    Close(usize),
    Stat(String),
    List(String),
    Mkdir(String),
    Rmdir(String),
    Unlink(String),
    Rename(String, String),
    Chmod(String, u32),
    Truncate(String, u64),
}

/// What a call is answered.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum Outcome {
    Done,
    Errno(i32),
    /// Permission bits; bytes of a file.
    Stat {
        mode: u32,
        size: Option<u64>,
    },
    /// Sorted.
    Names(Vec<String>),
    /// How many, and their SHA-256.
    Bytes(usize, String),
}

impl Outcome {
    pub(crate) fn of_bytes(bytes: &[u8]) -> Self {
        Self::Bytes(bytes.len(), hex::encode(Sha256::digest(bytes)))
    }

    fn of(done: io::Result<()>) -> Self {
        done.map_or_else(|error| Self::errno(&error), |()| Self::Done)
    }

    fn errno(error: &io::Error) -> Self {
        Self::Errno(error.raw_os_error().unwrap_or(-1))
    }
}

/// Somebody who makes calls.
pub(crate) trait FileSystem {
    /// Makes a call and says what came of it.
    fn call(&mut self, call: &Call) -> Outcome;
}

/// Calls with the outcome that each must have.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct Script {
    pub(crate) calls: Vec<(Call, Outcome)>,
    /// Whether a copy of it must be refused: something was written that it cannot follow.
    pub(crate) spoiled: bool,
    /// What must be stored in the end: directories without, files with their bytes as [`Outcome::Bytes`].
    pub(crate) tree: BTreeMap<String, (u32, Option<Outcome>)>,
}

impl Script {
    /// Makes all calls; returns what went otherwise than it must.
    pub(crate) fn play(&self, subject: &mut dyn FileSystem) -> Result<(), String> {
        for (number, (call, expected)) in self.calls.iter().enumerate() {
            let outcome = subject.call(call);
            if outcome != *expected {
                return Err(format!(
                    "call {number}, {call:?}: {outcome:?}, and {expected:?} was due"
                ));
            }
        }
        Ok(())
    }
}

/// A directory of the system, or what is mounted there.
pub(crate) struct PlainDirectory {
    root: PathBuf,
    slots: Vec<Option<File>>,
}

impl PlainDirectory {
    pub(crate) fn new(root: PathBuf) -> Self {
        let slots = (0..SLOTS).map(|_| None).collect();
        Self { root, slots }
    }

    fn at(&self, path: &str) -> PathBuf {
        self.root.join(path)
    }

    fn file(&self, slot: usize) -> io::Result<&File> {
        let file = self.slots.get(slot).and_then(Option::as_ref);
        file.ok_or_else(|| io::Error::from_raw_os_error(9))
    }

    /// Bytes of the file that a handle stands for, even if it has no name any more.
    pub(crate) fn size(&self, slot: usize) -> io::Result<u64> {
        Ok(self.file(slot)?.metadata()?.len())
    }

    fn open(&mut self, slot: usize, path: &str, how: How) -> io::Result<()> {
        let mut options = OpenOptions::new();
        options.read(how.read).mode(0o600);
        // The system's own meaning of the flags, not that of std, which refuses some.
        let mut flags = rustix::fs::OFlags::empty();
        if how.append {
            options.append(true);
        } else {
            options.write(how.write);
        }
        if how.create {
            flags |= rustix::fs::OFlags::CREATE;
        }
        if how.exclusive {
            flags |= rustix::fs::OFlags::EXCL;
        }
        if how.truncate {
            flags |= rustix::fs::OFlags::TRUNC;
        }
        options.custom_flags(flags.bits().cast_signed());
        self.slots[slot] = None;
        self.slots[slot] = Some(options.open(self.at(path))?);
        Ok(())
    }

    fn read(&self, slot: usize, offset: u64, length: usize) -> io::Result<Vec<u8>> {
        let file = self.file(slot)?;
        let mut bytes = vec![0; length];
        let mut filled = 0;
        while filled < length {
            match file.read_at(&mut bytes[filled..], offset + filled as u64)? {
                0 => break,
                more => filled += more,
            }
        }
        bytes.truncate(filled);
        Ok(bytes)
    }

    fn list(&self, path: &str) -> io::Result<Vec<String>> {
        let mut names = Vec::new();
        for entry in fs::read_dir(self.at(path))? {
            names.push(entry?.file_name().to_str().unwrap().to_owned());
        }
        names.sort();
        Ok(names)
    }
}

impl FileSystem for PlainDirectory {
    fn call(&mut self, call: &Call) -> Outcome {
        match call {
            Call::Open(slot, path, how) => Outcome::of(self.open(*slot, path, *how)),
            Call::Write(slot, offset, fill) => {
                let write = |file: &File| file.write_all_at(&fill.bytes(), *offset);
                Outcome::of(self.file(*slot).and_then(write))
            }
            Call::Read(slot, offset, length) => match self.read(*slot, *offset, *length) {
                Ok(bytes) => Outcome::of_bytes(&bytes),
                Err(error) => Outcome::errno(&error),
            },
            Call::Fsync(slot) => Outcome::of(self.file(*slot).and_then(File::sync_all)),
            Call::Close(slot) => {
                self.slots[*slot] = None;
                Outcome::Done
            }
            Call::Stat(path) => match fs::symlink_metadata(self.at(path)) {
                Ok(found) => Outcome::Stat {
                    mode: found.mode() & 0o7777,
                    size: found.is_file().then_some(found.len()),
                },
                Err(error) => Outcome::errno(&error),
            },
            Call::List(path) => match self.list(path) {
                Ok(names) => Outcome::Names(names),
                Err(error) => Outcome::errno(&error),
            },
            Call::Mkdir(path) => {
                let mut builder = fs::DirBuilder::new();
                std::os::unix::fs::DirBuilderExt::mode(&mut builder, 0o700);
                Outcome::of(builder.create(self.at(path)))
            }
            Call::Rmdir(path) => Outcome::of(fs::remove_dir(self.at(path))),
            Call::Unlink(path) => {
                // `std::fs::remove_file` is unlink(2).
                Outcome::of(fs::remove_file(self.at(path)))
            }
            Call::Rename(from, to) => Outcome::of(fs::rename(self.at(from), self.at(to))),
            Call::Chmod(path, mode) => {
                let mode = fs::Permissions::from_mode(*mode);
                Outcome::of(fs::set_permissions(self.at(path), mode))
            }
            Call::Truncate(path, size) => {
                let file = OpenOptions::new().write(true).open(self.at(path));
                Outcome::of(file.and_then(|file| file.set_len(*size)))
            }
        }
    }
}

/// Where a write goes.
#[derive(Debug, Clone, Copy)]
pub(crate) enum At {
    End,
    /// So many bytes behind the end.
    Gap(u64),
    /// At a part of the file's size, in 256ths.
    Within(u8),
}

/// What a program means to do. Where it depends on what is there, the model looks it up.
#[derive(Debug, Clone)]
pub(crate) enum Step {
    Open(usize, usize, How),
    Write(usize, At, Fill),
    /// At a part of the size in 256ths, so many bytes.
    Read(usize, u8, usize),
    Fsync(usize),
    Close(usize),
    Stat(usize),
    List(usize),
    Mkdir(usize),
    Rmdir(usize),
    Unlink(usize),
    Rename(usize, usize),
    RenameDirectory(usize, usize),
    Chmod(usize, u32),
    /// To a part of the size in 256ths, or so many bytes more.
    Truncate(usize, Option<u8>, u64),
    /// A whole segment as one of the programs writes it: its number, `gs_probackup`'s way.
    Wal(u8, bool),
}

/// Directories, parents first. The first ones are there at the start.
pub(crate) const DIRECTORIES: [&str; 9] = [
    "backups",
    "backups/node",
    "backups/node/T1",
    "backups/node/T1/database",
    "backups/node/T1/database/pg_wal",
    "backups/node/T1/database/base",
    "backups/node/T1/database/base/1",
    "backups/node/T1/database/base/2",
    "backups/node/T1/external_directories",
];
/// So many of them are there at the start.
pub(crate) const THERE: usize = 7;

/// Files of all classes.
pub(crate) const FILES: [&str; 19] = [
    "backups/node/T1/database/base/1/100",
    "backups/node/T1/database/base/1/100_vm",
    "backups/node/T1/database/base/1/101",
    "backups/node/T1/database/base/2/100",
    "backups/node/T1/database/PG_VERSION",
    "backups/node/T1/page_header_map",
    "backups/node/T1/database/pg_wal/000000010000000000000001",
    "backups/node/T1/database/pg_wal/000000010000000000000001.partial",
    "backups/node/T1/database/pg_wal/000000010000000000000002",
    "backups/node/T1/database/backup_label",
    "backups/node/T1/database/tablespace_map",
    "backups/node/T1/backup.control",
    "backups/node/T1/backup.control.tmp",
    "backups/node/T1/backup_content.control",
    "backups/node/T1/backup_content.control.tmp",
    "backups/node/T1/backup.pid",
    "backups/node/pg_probackup.conf",
    "backups/node/pg_probackup.conf.tmp",
    // Below what is a file, at times.
    "backups/node/T1/database/PG_VERSION/below",
];

fn how() -> impl Strategy<Value = How> {
    let write = How {
        write: true,
        create: true,
        ..How::default()
    };
    let read = How {
        read: true,
        ..How::default()
    };
    prop_oneof![
        4 => Just(How { truncate: true, ..write }),
        2 => Just(write),
        1 => Just(How { exclusive: true, ..write }),
        2 => Just(How { append: true, ..write }),
        1 => Just(How { read: true, truncate: true, ..write }),
        2 => Just(How { read: true, ..write }),
        1 => Just(How { create: false, ..write }),
        2 => Just(read),
        1 => Just(How { create: true, ..read }),
    ]
}

fn fill() -> impl Strategy<Value = Fill> {
    let seed = prop_oneof![1 => Just(0_u64), 4 => 1..1000_u64];
    let length = prop_oneof![
        6 => 0..2000_usize,
        4 => 4000..70_000_usize,
        2 => 100_000..600_000_usize,
        1 => 1_000_000..2_500_000_usize,
    ];
    (seed, length).prop_map(|(seed, length)| Fill { seed, length })
}

fn at() -> impl Strategy<Value = At> {
    prop_oneof![
        8 => Just(At::End),
        1 => (0..3000_u64).prop_map(At::Gap),
        1 => (60_000..3_000_000_u64).prop_map(At::Gap),
        3 => any::<u8>().prop_map(At::Within),
    ]
}

fn step() -> impl Strategy<Value = Step> {
    let slot = || 0..SLOTS;
    // The last one cannot always be there.
    let file = || 0..FILES.len();
    let directory = || 0..DIRECTORIES.len();
    let mode = prop::sample::select(vec![0o600, 0o640, 0o700, 0o644]);
    prop_oneof![
        10 => (slot(), file(), how()).prop_map(|(slot, file, how)| Step::Open(slot, file, how)),
        24 => (slot(), at(), fill()).prop_map(|(slot, at, fill)| Step::Write(slot, at, fill)),
        6 => (slot(), any::<u8>(), 0..300_000_usize).prop_map(|(slot, at, length)| Step::Read(slot, at, length)),
        2 => slot().prop_map(Step::Fsync),
        5 => slot().prop_map(Step::Close),
        4 => file().prop_map(Step::Stat),
        2 => directory().prop_map(Step::List),
        2 => directory().prop_map(Step::Mkdir),
        1 => directory().prop_map(Step::Rmdir),
        2 => file().prop_map(Step::Unlink),
        4 => (file(), file()).prop_map(|(from, to)| Step::Rename(from, to)),
        1 => (5..DIRECTORIES.len(), 5..DIRECTORIES.len()).prop_map(|(from, to)| Step::RenameDirectory(from, to)),
        2 => (file(), mode).prop_map(|(file, mode)| Step::Chmod(file, mode)),
        2 => (file(), prop::option::of(any::<u8>()), 0..200_000_u64)
            .prop_map(|(file, part, more)| Step::Truncate(file, part, more)),
        2 => (1..4_u8, any::<bool>()).prop_map(|(number, gs)| Step::Wal(number, gs)),
    ]
}

/// A sequence; whether it may do what a copy cannot follow.
pub(crate) fn steps(most: usize) -> impl Strategy<Value = (Vec<Step>, bool)> {
    let spoils = prop::sample::select(vec![false, false, false, true]);
    (prop::collection::vec(step(), 1..most), spoils)
}
